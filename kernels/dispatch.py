"""Which implementation runs a call: the compiled CPU kernels or the Triton kernels where they can, the eager reference elsewhere."""

import importlib.util
import os
import warnings
from collections.abc import Callable

import torch

from dit_accel.errors import BackendError
from dit_accel.kernels import xformers_rows
from dit_accel.kernels.cpu import native

BACKENDS = ("auto", "cpu", "triton", "xformers", "reference")
# constants, so that torch.compile sees them too
CPU_TARGET = native.best_target()
TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NOT_BUILT = native.refusal() or native.NOT_BUILT
LINEAR_LIMIT = 128  # beyond, the states of a linear rest don't fit a multiprocessor's registers
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INT8_CAPABILITIES = (8, 9, 12)  # compiled for, with tensor cores that multiply 8-bit integers at least at twice the rate of 16 bits
AMD = ("gfx942",)  # architectures of AMD that the tile table has a column for, which the kernels are compiled for and checked


def cpu_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason that the CPU kernels can't run a call, or None where they can."""
    if device.type != "cpu":
        return f"the tensors are on {device}"
    if CPU_TARGET == "none":
        return NOT_BUILT
    return _shape_refusal("CPU", dtype, head_dim)


def triton_refusal(device: torch.device, dtype: torch.dtype, head_dim: int, *, linear: bool = False) -> str | None:
    """The reason that the Triton kernels can't run a call (with a `linear` rest), or None where they can."""
    if not TRITON:
        return "triton is not installed"
    if device.type == "cpu" and INTERPRETED:
        if dtype == torch.bfloat16:  # it multiplies their bit patterns
            return "Triton's interpreter can't multiply bfloat16"
    elif device.type != "cuda":
        return f"the tensors are on {device}"
    elif torch.version.hip:
        if (found := _amd_architecture(device)) not in AMD:
            return f"of AMD's GPUs the Triton kernels are compiled and checked for {', '.join(AMD)} (MI300, MI325) alone, not for {found}"
    elif _capability(device) < (8, 0):
        return f"the Triton kernels require compute capability 8.0, this GPU has {'.'.join(map(str, _capability(device)))}"
    return _triton_shape_refusal(dtype, head_dim, linear=linear)


def _triton_shape_refusal(dtype: torch.dtype, head_dim: int, *, linear: bool) -> str | None:
    if linear and head_dim > LINEAR_LIMIT:
        return f"the Triton kernels take a linear rest up to head_dim {LINEAR_LIMIT}, not {head_dim}"
    return _shape_refusal("Triton", dtype, head_dim)


def int8_refusal_here() -> str | None:
    """The reason that no call in this process can multiply queries by keys in 8 bits, or None where one may."""
    if not TRITON:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    return "this PyTorch is for AMD's" if torch.version.hip else None


def int8_refusal(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The reason that the Triton kernels multiply queries by keys in the tensors' type, whatever is asked for, or None."""
    if dtype.itemsize != 2:
        return f"the tensors are {dtype}"
    if head_dim <= 16:
        return f"the head dimension is {head_dim}"
    if device.type == "cuda" and (torch.version.hip or _capability(device)[0] not in INT8_CAPABILITIES):
        return "there are none for this GPU"
    return None


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@torch.compiler.assume_constant_result
def _amd_architecture(device: torch.device) -> str:
    """As "gfx942", without the features that ROCm names after it."""
    name: str = torch.cuda.get_device_properties(device).gcnArchName
    return name.split(":")[0]


def _shape_refusal(name: str, dtype: torch.dtype, head_dim: int) -> str | None:
    if dtype not in DTYPES:
        return f"the {name} kernels take float32, bfloat16 or float16, not {dtype}"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"the {name} kernels take a head_dim of 8 to 256 in steps of 8, not {head_dim}"
    return None


def slow_on_gpu(device: torch.device, dtype: torch.dtype, head_dim: int, *, linear: bool) -> str | None:
    """The warning for a user whose GPU runs the eager reference under backend "auto", and what to do; None where a kernel runs."""
    if device.type != "cuda":
        return None
    chosen, reason = choose("auto", device, dtype, head_dim, linear=linear)
    if chosen != "reference":
        return None
    install = "" if TRITON else ": install triton (pip install triton)"
    if not TRITON and not xformers_rows.INSTALLED:
        install += " or xformers (pip install dit-accel[xformers])"
    return f"the slow eager reference runs on {device}, because {reason}{install}"


def check(backend: str) -> None:
    """Raise BackendError at an unknown name."""
    if backend not in BACKENDS:
        raise BackendError(f"backend must be one of {BACKENDS}, not {backend!r}")


def warn_of_reference(backend: str, device: torch.device) -> None:
    """Warn where "auto" runs the slower reference on a CPU because the compiled kernels are missing or stale."""
    if CPU_TARGET == "none" and backend == "auto" and device.type == "cpu":
        warnings.warn(f"{NOT_BUILT}; until then the slower reference runs", stacklevel=3)


def check_model(backend: str, head_dim: int, *, linear: bool) -> None:
    """Raise BackendError where a backend can't run a model (with a `linear` rest) wherever the model is moved and whatever its dtype is."""
    check(backend)
    dtype = torch.float32
    refusals = {
        "cpu": lambda: cpu_refusal(torch.device("cpu"), dtype, head_dim),
        "triton": lambda: "triton is not installed" if not TRITON else _triton_shape_refusal(dtype, head_dim, linear=linear),
        "xformers": lambda: xformers_rows.refusal(torch.device("cuda"), dtype, head_dim, gradient=False),
    }
    refusal = refusals[backend]() if backend in refusals else None
    if refusal:
        raise BackendError(f"backend {backend!r} can't run this model: {refusal}")


def choose(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, *, linear: bool = False,
    gradient: Callable[[], bool] = lambda: False, text_bias: bool = False,
) -> tuple[str, str]:  # fmt: skip
    """The implementation for a call (with a `linear` rest or a `text_bias`) under a backend's name, and why. `gradient`: whether one is
    required, asked only where the answer decides.

    "auto" takes the CPU's kernels there; elsewhere Triton's, else xformers for what is dense, else the reference. Raises BackendError where
    the one asked for can't run it.
    """
    check(backend)
    if backend == "reference":
        return "reference", "asked for"
    refusals = {
        "cpu": lambda: cpu_refusal(device, dtype, head_dim),
        "triton": lambda: triton_refusal(device, dtype, head_dim, linear=linear),
        "xformers": lambda: xformers_rows.refusal(device, dtype, head_dim, gradient=gradient(), text_bias=text_bias),
    }
    if backend != "auto":
        refusal = refusals[backend]()
        if refusal:
            raise BackendError(f"backend {backend!r} can't run this call: {refusal}")
        return backend, "asked for"
    own = "cpu" if device.type == "cpu" else "triton"
    refusal = refusals[own]()
    if refusal is None:
        return own, f"compiled kernels, {CPU_TARGET}" if own == "cpu" else "fused kernels"
    if own == "triton" and refusals["xformers"]() is None:
        return "xformers", f"the dense parts; {refusal}"
    return "reference", refusal
