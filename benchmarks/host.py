"""The processor's time of a call of the operator on a GPU, measured without one:

    python benchmarks/host.py --out host.json

Kernels are compiled for a card that is not there (sm_90) and handed to a launcher that does nothing, so that what counts is Python's and
torch's part of a call; a card's driver adds some microseconds for each launch. Each line has the launches of a forward pass and the
processor's time in microseconds, the median of rounds, for calls that follow a record and for calls that decide everything anew.
"""

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # triton and dit_accel read it at import

import torch
from gpu import SPECS
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from dit_accel.files import write_json
from dit_accel.kernels import dispatch
from dit_accel.kernels.triton import calls, replay
from dit_accel.kernels.triton.tables import Machine
from dit_accel.measure.timing import machine
from dit_accel.operator.attention import attention, start_values
from dit_accel.operator.layout import TokenLayout

ROUNDS, CALLS = 9, 30


class Launcher:
    """In place of what puts a kernel on a stream."""

    def __init__(self, source: Any, metadata: Any) -> None:
        del source, metadata

    def __call__(self, *arguments: Any) -> None:
        """Nothing."""


class Utilities:
    """What Triton loads kernels by."""

    numbers = itertools.count(1)

    @classmethod
    def load_binary(cls, *_: Any) -> tuple[int, int, int, int, int]:
        return 1, next(cls.numbers), 32, 0, 1024

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}


class Driver:
    """In place of a card's."""

    launcher_cls = Launcher
    utils = Utilities

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 7


def pretend(card: Machine) -> None:
    """From now on tensors of the processor are taken for a card's."""
    driver.set_active(Driver())
    dispatch.triton_refusal = lambda *_, **__: None
    calls.machine_of = lambda _: card


def microseconds(call: Callable[[], Any]) -> float:
    """Of this process, per call: other work on the machine counts little."""
    found = []
    for _ in range(ROUNDS):
        start = time.process_time()
        for _ in range(CALLS):
            call()
        found.append((time.process_time() - start) / CALLS * 1e6)
    return statistics.median(found)


def measure(name: str, side: int, card: Machine) -> dict[str, Any]:
    """A row for one method."""
    spec = SPECS[name]
    layout = TokenLayout((1, side, side), 64, order=spec.order)
    qkv: list[Tensor] = [torch.zeros(1, layout.tokens, 2, 128, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
    params = start_values(spec, qkv[0])

    def call() -> None:
        attention(*qkv, spec, layout, params=params, backend="triton")

    call()
    with calls.recorded(card) as launches:
        call()
    row: dict[str, Any] = {"method": name, "launches": len(launches)}
    for what, recorded in (("anew_us", False), ("us", True)):
        replay.possible = lambda _, recorded=recorded: recorded
        call()
        call()
        row[what] = microseconds(call)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--side", type=int, default=32, help="of the grid of tokens: launches and times depend little on it")
    args = parser.parse_args()
    torch.set_num_threads(1)
    card, rows = Machine("sm_90", 132), []
    pretend(card)
    with torch.no_grad():
        for name in SPECS:
            rows.append(measure(name, args.side, card))
            row = rows[-1]
            print(f"{name:20} {row['launches']:3} launches {row['us']:6.0f} us, anew {row['anew_us']:6.0f} us", flush=True)
    if args.out is not None:
        write_json(args.out, {"machine": machine(), "side": args.side, "rows": rows})


if __name__ == "__main__":
    main()
