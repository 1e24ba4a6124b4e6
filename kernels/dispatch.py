"""Which implementation runs a call: the compiled CPU kernels where they can, the eager reference elsewhere."""

import torch

from dit_accel.errors import BackendError
from dit_accel.kernels.cpu import native

BACKENDS = ("auto", "cpu", "reference")
CPU_TARGET = native.best_target()  # a constant, so that torch.compile sees one too
NOT_BUILT = "dit_accel's CPU kernels are not built: install it where there is a C++17 compiler (g++ or clang++)"
CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cpu_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the CPU kernels can't run a call, or None where they can."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if CPU_TARGET == "none":
        return NOT_BUILT
    if dtype not in CPU_DTYPES:
        return f"the CPU kernels take float32, bfloat16 or float16, got {dtype}"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"the CPU kernels take a head_dim of 8 to 256 in steps of 8, got {head_dim}"
    return None


def check(backend: str) -> None:
    """Raise BackendError at an unknown name."""
    if backend not in BACKENDS:
        raise BackendError(f"backend is one of {BACKENDS}, got {backend!r}")


def choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The implementation for a call under a backend's name, and why. Raises BackendError where the one asked for can't run it."""
    check(backend)
    if backend == "reference":
        return "reference", "asked for"
    refusal = cpu_refusal(device, dtype, head_dim)
    if backend == "cpu":
        if refusal:
            raise BackendError(f"backend 'cpu' can't run this call: {refusal}")
        return "cpu", "asked for"
    return ("reference", refusal) if refusal else ("cpu", f"compiled kernels, {CPU_TARGET}")
