"""The candidates of `dit-accel bench kernels --tune` compiled before they are timed, on all processors, for the cache that they share.

One after the other they would take a quarter of an hour for a head dimension. The tensors are as large as the timed ones, because Triton
compiles another kernel where a number is 1 or not divisible by 16; their memory is never touched.
"""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from rich.console import Console

from dit_accel.kernels.triton.tables import Machine, Tile
from dit_accel.measure.gpu_candidates import KERNELS, Work, candidates, forward_backward, methods_of

CACHED = 0.25  # seconds that a kernel takes at most where Triton finds it in its cache


@dataclass(frozen=True)
class Job:
    """One candidate: its kernel in a forward and backward of one method."""

    work: Work
    tile: Tile
    method: str
    machine: Machine
    target: Any

    def run(self) -> list[float]:
        """The seconds that each of its kernels took. What does not compile is left to the trial, which says why."""
        from dit_accel.kernels.triton import ahead, calls

        own = Machine(self.machine.arch, self.machine.units, {self.work.key: self.tile})
        with torch.autograd.set_multithreading_enabled(False), calls.recorded(own) as launches:
            # one head compiles to what many do; what a method has in torch runs here, of however many there are
            forward_backward(self.method, self.work, torch.device("cpu"), heads=1, empty=True)
        seconds = []
        for launch in launches:
            if launch.kernel.__name__ in KERNELS[self.work.kernel].functions:
                start = time.perf_counter()
                ahead.compile_launch(launch, self.target)
                seconds.append(time.perf_counter() - start)
        return seconds


def _run(job: Job) -> int:
    torch.set_num_threads(1)  # as many jobs run as there are processors
    return len(job.run())


def jobs_of(work: Sequence[Work], machine: Machine, target: Any) -> list[Job]:
    """A job per candidate and method of each kernel."""
    return [
        Job(one, tile, method, machine, target)
        for one in work
        for tile in candidates(one, machine)
        for method in methods_of(one.kernel, one.head_dim)
    ]


def compile_ahead(work: Sequence[Work], machine: Machine, target: Any, shown: Console) -> int:
    """Compile the candidates of all of the work for a target; the number of processes that did. The last is compiled in this one: where
    the cache has it, it has them all, as in a second tuning, and no process is started."""
    jobs = jobs_of(work, machine, target)
    if not jobs:
        return 0
    last = jobs.pop()
    if max(last.run(), default=0.0) < CACHED:
        return 0
    processes = min(os.cpu_count() or 1, len(jobs))
    shown.print(f"compiling {len(jobs)} candidates in {processes} processes")
    start = time.perf_counter()
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            compiled = sum(pool.map(_run, jobs, chunksize=2))
    except BrokenProcessPool:
        shown.print("a compiler ended its process; the candidates that it leaves are compiled when they are timed")
        return processes
    shown.print(f"{compiled} kernels in {time.perf_counter() - start:.0f} s")
    return processes
