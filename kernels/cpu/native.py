"""The compiled library: found, loaded by ctypes, and called with raw pointers. No torch headers, no Python objects on the other side."""

import ctypes
import functools
import os
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TARGETS = ("portable", "avx2", "avx512", "avx512bf16")
TARGET_VARIABLE = "DIT_ACCEL_CPU_TARGET"  # one of TARGETS: run that code instead of the CPU's best, for tests and bug reports


class Rows(Structure):
    """`[B, H, N, D]` by strides (problem.h)."""

    _fields_ = [
        ("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64), ("bf16", c_int32), ("unused", c_int32),
    ]  # fmt: skip


def _fields(kind: Any, names: str) -> list[Any]:
    return [(name, kind) for name in names.split()]


class Problem(Structure):
    """One call of the operator (problem.h)."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels text text_start image image_start q_blocks k_blocks list_width lists_per_head extra"),
        *_fields(Rows, "q k v out"),
        *_fields(c_void_p, "q_starts k_starts lists counts full coords windows"),
        *_fields(c_int64, "n_windows reach"),
        *_fields(c_void_p, "extra_k extra_v offset weight bias text_bias"),
        *_fields(c_int32, "rest log_count variance feature_map linear_all residual"),
        *_fields(c_float, "scale cap"),
        ("lse", c_void_p), ("threads", c_int64), ("dout", Rows), ("dlse", c_void_p),
        *_fields(c_void_p, "dq dk dv dextra_k dextra_v doffset dweight dbias"),
    ]  # fmt: skip


class Selection(Structure):
    """One selection of key blocks (problem.h)."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels q_blocks k_blocks top"),
        *_fields(Rows, "q k"),
        *_fields(c_void_p, "q_starts k_starts weight lists"),
        ("threads", c_int64),
    ]


def rows(x: Tensor) -> Rows:
    """The tensor `[B, H, N, D]` as the library sees it; the caller keeps it alive."""
    return Rows(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.dtype == torch.bfloat16, 0)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where the package was built without a compiler."""
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        return None
    lib = ctypes.CDLL(str(found[0]))
    for name, kind in (("forward", Problem), ("backward", Problem), ("select", Selection)):
        getattr(lib, f"dit_accel_{name}").argtypes = [POINTER(kind), c_int32]
    for name, kind in (("problem", Problem), ("selection", Selection)):
        size = getattr(lib, f"dit_accel_{name}_size")
        size.restype = c_int64
        if size() != ctypes.sizeof(kind):
            raise RuntimeError(f"{found[0].name} was built from other sources: install dit_accel again")
    return lib


@functools.cache
def best_target() -> str:
    """The instruction set that this CPU's calls run."""
    lib = library()
    return TARGETS[lib.dit_accel_best_target()] if lib else "none"


def target() -> int:
    """The target of the next call: the CPU's best, or the one that the environment names, as long as the CPU has it."""
    wanted = os.environ.get(TARGET_VARIABLE, best_target())
    if wanted not in TARGETS or TARGETS.index(wanted) > TARGETS.index(best_target()):
        raise ValueError(f"{TARGET_VARIABLE} is one of {TARGETS[: TARGETS.index(best_target()) + 1]} on this CPU, got {wanted!r}")
    return TARGETS.index(wanted)


def call(name: str, argument: Structure) -> None:
    """Run "forward", "backward" or "select". Raises MemoryError where the machine has no more."""
    lib = library()
    if lib is None:
        raise RuntimeError("the CPU kernels are not built")
    if getattr(lib, f"dit_accel_{name}")(ctypes.byref(argument), target()):
        raise MemoryError(f"the CPU kernels found no memory for {name}")
