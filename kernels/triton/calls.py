"""The Triton kernels on tensors: float32, bfloat16 or float16, parameters and their gradients float32."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

import triton
from dit_accel.kernels.arguments import Arguments, dense
from dit_accel.kernels.triton import launch, launch_backward, tuned
from dit_accel.kernels.triton.launch import Launch, Run
from dit_accel.kernels.triton.tables import Machine

INTERPRETED = Machine("sm_90", 4)  # few units, so that short reductions are split as long ones are on a device


class Redirected(NamedTuple):
    """The machine whose tiles are taken, what is done with a launch, and whether that runs it."""

    machine: Machine
    run: Run
    runs: bool


_redirected: ContextVar[Redirected | None] = ContextVar("redirected", default=None)


@contextlib.contextmanager
def redirected(machine: Machine, run: Run, *, runs: bool = True) -> Iterator[None]:
    """Inside, this thread's launches have the tiles of `machine` and go to `run`."""
    token = _redirected.set(Redirected(machine, run, runs))
    try:
        yield
    finally:
        _redirected.reset(token)


@contextlib.contextmanager
def recorded(machine: Machine) -> Iterator[list[Launch]]:
    """Collect what would be launched on `machine`, on tensors of any device, and run nothing: results hold whatever memory held."""
    found: list[Launch] = []
    with redirected(machine, found.append, runs=False):
        yield found


def _where(device: torch.device) -> tuple[Machine, Run]:
    elsewhere = _redirected.get()
    return (machine_of(device), launch.execute) if elsewhere is None else (elsewhere.machine, elsewhere.run)


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The architecture whose tiles suit a device, its number of multiprocessors, and the tiles that were timed on it."""
    if device.type == "cpu":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    timed = tuned.tiles_of(gpu_of(device))
    if torch.version.hip:
        return Machine("gfx942", properties.multi_processor_count, timed)
    # 8.6 and 8.9 are consumer chips: tensor cores as on 8.0, shared memory as on 12.0
    exact = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return Machine(exact.get((properties.major, properties.minor), "sm_120"), properties.multi_processor_count, timed)


def gpu_of(device: torch.device) -> tuned.Gpu:
    """What tiles timed on a device are kept under."""
    properties = torch.cuda.get_device_properties(device)
    capability = properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}"
    return tuned.Gpu(properties.name, capability, triton.__version__)


# Triton starts a kernel on the current device, wherever its tensors are: hence `device_of`, which is nothing to tensors on the CPU.


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, N]`."""
    with torch.cuda.device_of(a.q):
        return launch.attend(a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v)), *_where(a.q.device))


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments) -> list[Tensor]:
    """Gradients of the first eight arguments; absent ones are empty."""
    with torch.cuda.device_of(a.q):
        a = a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v))
        dlse = None if dlse is None else dlse.contiguous()
        grads = launch_backward.gradients(dense(dout), dlse, dense(out), lse, a, *_where(a.q.device))
    return [a.q.new_empty(0, dtype=torch.float32) if x is None else x for x in grads]


def select_blocks(
    q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor, weight: Tensor | None, top: int, widths: Sequence[int]
) -> Tensor:
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`."""
    with torch.cuda.device_of(q):
        chosen = launch.select_blocks(dense(q), dense(k), q_starts, k_starts, weight, top, widths, *_where(q.device))
    elsewhere = _redirected.get()
    return chosen if elsewhere is None or elsewhere.runs else chosen.zero_()  # lists must name blocks that there are
