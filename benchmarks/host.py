"""The processor's time of a call of the operator around its kernels:

    python benchmarks/host.py --out host.json
    python benchmarks/host.py --device cpu --side 16

For a GPU it is measured without one: kernels are compiled for a card that is not there (sm_90) and handed to a launcher that does nothing,
so that what counts is Python's and torch's part of a call; a card's driver adds some microseconds for each launch. For a CPU its compiled
library does nothing. Each line has the kernels of a forward pass and the processor's time in microseconds, the median of rounds, for calls
that follow a record and for calls that decide everything anew, in turns. Torch's operators between kernels calculate on the processor:
choose few tokens.
"""

import argparse
import functools
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
from dit_accel.kernels.cpu import calls as cpu_calls
from dit_accel.kernels.cpu import native
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


class Silent:
    """In place of the CPU's library: of its kernels none does anything, and each is counted."""

    def __init__(self, library: Any) -> None:
        self._library, self.calls = library, 0

    def __getattr__(self, name: str) -> Any:
        return self[name] if name.removeprefix("dit_accel_") in native.FUNCTIONS else getattr(self._library, name)

    def __getitem__(self, name: str) -> Callable[..., int]:
        def kernel(*_: Any) -> int:
            self.calls += 1
            return 0

        return kernel


def microseconds(call: Callable[[], Any]) -> float:
    """Of this process, per call: other work on the machine counts little."""
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS * 1e6


def on_card(card: Machine, call: Callable[[], None]) -> tuple[int, Callable[[bool], None]]:
    """Launches of a call, and what switches its records on and off."""
    with calls.recorded(card) as launches:
        call()

    def switch(recorded: bool) -> None:
        replay.possible = lambda _: recorded

    return len(launches), switch


def on_cpu(silent: Silent, call: Callable[[], None]) -> tuple[int, Callable[[bool], None]]:
    """The same of the CPU's library."""
    before, together = silent.calls, cpu_calls.together
    call()

    def switch(recorded: bool) -> None:
        cpu_calls.together = together if recorded else lambda *given: given[-1]()

    return silent.calls - before, switch


def measure(name: str, args: argparse.Namespace, kernels: Callable[..., Any]) -> dict[str, Any]:
    """A row for one method."""
    spec = SPECS[name]
    layout = TokenLayout((1, args.side, args.side), args.text, order=spec.order)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    qkv: list[Tensor] = [torch.zeros(1, layout.tokens, args.heads, 128, dtype=dtype).transpose(1, 2) for _ in range(3)]
    params = start_values(spec, qkv[0])

    def call() -> None:
        attention(*qkv, spec, layout, params=params, backend="cpu" if args.device == "cpu" else "triton")

    call()
    count, switch = kernels(call)
    found: dict[str, list[float]] = {"anew_us": [], "us": []}
    for _ in range(ROUNDS):
        for what, recorded in (("anew_us", False), ("us", True)):
            switch(recorded)
            call()
            call()
            found[what].append(microseconds(call))
    switch(True)
    return {"method": name, "kernels": count, **{what: statistics.median(times) for what, times in found.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu", help="whose kernels")
    parser.add_argument("--side", type=int, default=32, help="of the grid of tokens: times depend little on it")
    parser.add_argument(
        "--text", type=int, default=64, help="tokens of it: where they are many, and the heads, they share a launch with the image"
    )
    parser.add_argument("--heads", type=int, default=2, help="times depend little on their number")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    if args.device == "gpu":
        card = Machine("sm_90", 132)
        pretend(card)
        kernels: Callable[..., Any] = functools.partial(on_card, card)
    else:
        silent = Silent(native.library())
        native.library = lambda: silent
        kernels = functools.partial(on_cpu, silent)
    with torch.no_grad():
        for name in SPECS:
            rows.append(measure(name, args, kernels))
            row = rows[-1]
            print(f"{name:20} {row['kernels']:3} kernels {row['us']:6.0f} us, anew {row['anew_us']:6.0f} us", flush=True)
    if args.out is not None:
        write_json(
            args.out, {"machine": machine(), "device": args.device, "side": args.side, "text": args.text, "heads": args.heads, "rows": rows}
        )


if __name__ == "__main__":
    main()
