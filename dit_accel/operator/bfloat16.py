"""Which of the CPU's instruction sets computes bfloat16: measured at its first use, once per machine.

The newest is not always the fastest: on some CPUs float32 products of widened values take less time than products of bfloat16. The times
are kept in the user's cache folder (`decisions`), so that all processes choose alike. Nothing is measured where the environment names an
instruction set, or has measuring off: then the newest serves.
"""

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dit_accel import __version__
from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.cpu import calls, native, sources
from dit_accel.operator import decisions

CANDIDATES = (("amx", "avx512bf16", "avx512", "avx2"), ("bfmmla", "portable"))  # x86, arm64; the newest first, as ties go to it
ROUNDS = 3
TOKENS, BLOCK, VISITS, CHANNELS = 1024, 64, 8, 64  # of the call that is timed: 16 blocks, each of which visits 8


@dataclass(frozen=True)
class Choice:
    """The instruction set, and the seconds that each candidate took; none where nothing was measured, for the reason `why`."""

    target: str
    seconds: dict[str, float] = field(default_factory=dict)
    file: Path | None = None
    why: str = ""

    def __str__(self) -> str:
        if not self.seconds:
            return f"{self.target}, {self.why}"
        times = ", ".join(f"{name} {took * 1e3:.2f} ms" for name, took in self.seconds.items())
        return f"{self.target}, the fastest of {times}, measured {f'once, kept in {self.file}' if self.file else 'for this process alone'}"


@functools.cache
def choice() -> Choice:
    """The choice of this process; the second call costs nothing. Raises ValueError as `decisions.enabled`."""
    best = native.best_target()
    candidates = next((names[names.index(best) :] for names in CANDIDATES if best in names), ())
    if len(candidates) < 2:
        return Choice(best, why="the only one here")
    if not decisions.enabled():
        return Choice(best, why=f"the newest here, as {decisions.VARIABLE} lets nothing be measured")
    seconds, file = decisions.decided(_question(), lambda: measured(candidates), kind="bfloat16", names=candidates)
    times = dict(zip(candidates, seconds, strict=True))
    return Choice(min(candidates, key=times.__getitem__), times, file)


def described() -> str:
    """What computes bfloat16 here, and why."""
    asked = os.environ.get(native.TARGET_VARIABLE)
    return str(choice()) if asked is None else f"{asked}, as {native.TARGET_VARIABLE} asks"


def _question() -> decisions.Question:
    return {
        "version": __version__,
        "device": decisions.cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": sources.fingerprint(Path(native.__file__).parent),
    }


def measured(candidates: tuple[str, ...], clock: Callable[[], float] = time.perf_counter) -> decisions.Seconds:
    """The least that each takes for the same call; they take turns, as other programs disturb all of them alike."""
    a = _call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(ROUNDS + 1):
        for name in candidates:
            with native.running(name):
                start = clock()
                calls.attend(a)
                times[name].append(clock() - start)
    return tuple(min(found[1:]) for found in times.values())  # the first call of each has code and memory to fetch


def _call() -> Arguments:
    seed, blocks = torch.Generator().manual_seed(0), TOKENS // BLOCK
    q, k, v = (torch.randn(1, 1, TOKENS, CHANNELS, generator=seed).to(torch.bfloat16) for _ in range(3))
    starts = torch.arange(0, TOKENS + 1, BLOCK, dtype=torch.int32)
    every = torch.full((blocks,), VISITS, dtype=torch.int32)
    lists = (torch.arange(blocks)[:, None] + torch.arange(VISITS)) % blocks
    empty = torch.empty(0, dtype=torch.int32)
    return Arguments(
        q, k, v, lists.to(torch.int32), every, every.clone(), starts, starts, empty, BLOCK, BLOCK, text=0, text_first=False,
        scale=CHANNELS**-0.5,
    )  # fmt: skip


native.BFLOAT16.chooser = lambda: choice().target  # the kernels ask at their first call on bfloat16
