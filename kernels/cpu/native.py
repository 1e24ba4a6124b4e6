"""The compiled library: found, loaded by ctypes, and called with raw pointers. No torch headers, no Python objects on the other side."""

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.arguments import DIFFERENTIABLE, Arguments, Declared, MixtureArguments, SummaryArguments, declared
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.cpu import sources
from dit_accel.kernels.grouping import DIFFERENTIABLE_GROUPING, GRADIENTS_OF_UNITS, GroupingArguments, Units


def targets_of(machine: str) -> tuple[str, ...]:
    """The instruction sets that there is code for, by the numbers that api.cpp gives them: a CPU has those up to its best."""
    if machine.lower() in ("aarch64", "arm64"):
        return ("portable", "bfmmla")
    return ("portable", "avx2", "avx512", "avx512bf16", "amx")


TARGETS = targets_of(platform.machine())
TARGET_VARIABLE = "DIT_ACCEL_CPU_TARGET"  # one of TARGETS: run that code instead of the CPU's best, for tests and bug reports


class Rows(Structure):
    """`[B, H, N, D]` by strides (problem.h)."""

    _fields_ = [
        ("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64), ("bf16", c_int32), ("unused", c_int32),
    ]  # fmt: skip


C_TYPES = {Tensor: c_void_p, int: c_int64, float: c_float, bool: c_int32, str: c_int32}


def _fields(kind: Any, names: str) -> list[Any]:
    return [(name, kind) for name in names.split()]


def declared_fields(kind: type) -> list[Any]:
    """A field for each declared argument: tensors by address or by strides, strings by their number among the choices."""
    return [(d.name, Rows if d.mark.strided else C_TYPES[d.kind]) for d in declared(kind) if not d.mark.gpu]


class Problem(Structure):
    """One call of the operator (problem.h): sizes, the arguments, results, and for the backward pass the gradients."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels image_q image_k q_blocks k_blocks list_width lists_per_head"),
        *_fields(c_int64, "extra n_windows pools pool_width"),
        *declared_fields(Arguments),
        ("out", Rows), ("lse", c_void_p), ("threads", c_int64), ("dout", Rows), ("dlse", c_void_p),
        *((f"d{name}", c_void_p) for name in DIFFERENTIABLE),
    ]  # fmt: skip


class Selection(Structure):
    """One selection of key blocks (problem.h)."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels q_blocks k_blocks"),
        *declared_fields(SelectionArguments),
        ("chosen", c_void_p),
        ("threads", c_int64),
    ]


class Summary(Structure):
    """The summaries of all blocks (problem.h), and for the backward pass the gradients."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels q_blocks k_blocks"),
        *declared_fields(SummaryArguments),
        *_fields(c_void_p, "q_mean k_mean score_bias pooled_k pooled_v pooled_bias slope second metric tokens spread v_spread part"),
        ("threads", c_int64),
        *_fields(c_void_p, "dq_mean dpooled_k dpooled_v dpooled_bias dslope dsecond dspread"),
        *_fields(Rows, "dq dk dv"),
    ]


class Mixture(Structure):
    """Mixtures of slopes (problem.h), and for the backward pass the gradients."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels mixtures units"),
        *declared_fields(MixtureArguments),
        ("out", c_void_p),
        ("threads", c_int64),
        *_fields(c_void_p, "dout dweight dslope"),
    ]


class Grouping(Structure):
    """Groups of key blocks (problem.h), and for the backward pass the gradients."""

    _fields_ = [
        *_fields(c_int64, "batch heads channels q_blocks k_blocks slots list_width lists_per_head width"),
        *declared_fields(GroupingArguments),
        *((name, c_void_p) for name in Units._fields),
        ("threads", c_int64),
        *((f"d{name}", c_void_p) for name in (*GRADIENTS_OF_UNITS, *DIFFERENTIABLE_GROUPING)),
    ]  # fmt: skip


class Field(Structure):
    """A row of the library's tables of fields (api.cpp)."""

    _fields_ = [("name", c_char_p), ("offset", c_int64), ("size", c_int64)]


def rows(x: Tensor) -> Rows:
    """The tensor `[B, H, N, D]` as the library sees it; the caller keeps it alive."""
    return Rows(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2), x.dtype == torch.bfloat16, 0)


def pointer(x: Tensor | None) -> int | None:
    """The address of a contiguous tensor, null for None."""
    return None if x is None else x.data_ptr()


AnyArguments = Arguments | SelectionArguments | SummaryArguments | MixtureArguments | GroupingArguments


def fields_of(a: AnyArguments) -> dict[str, Any]:
    """The arguments as the fields of a struct, without those that are None; the caller keeps the tensors alive."""
    kind: type = type(a)
    given = ((name, made, a[place]) for place, name, made in _fields_made(kind))
    return {name: value if made is None else made(value) for name, made, value in given if value is not None}


@functools.cache
def _fields_made(kind: type) -> tuple[tuple[int, str, Callable[[Any], Any] | None], ...]:
    """The place and name of each argument that has a field, and how that is made of it; None: the field is the argument."""
    return tuple((place, d.name, _made(d)) for place, d in enumerate(declared(kind)) if not d.mark.gpu)


def _made(d: Declared) -> Callable[[Any], Any] | None:
    if d.kind is Tensor:
        return rows if d.mark.strided else Tensor.data_ptr
    return d.mark.choices.index if d.mark.choices else None


FUNCTIONS: dict[str, type[Structure]] = {
    "forward": Problem,
    "backward": Problem,
    "select": Selection,
    "summarize": Summary,
    "summarize_backward": Summary,
    "mix_slopes": Mixture,
    "mix_slopes_backward": Mixture,
    "group_units": Grouping,
    "group_units_backward": Grouping,
}  # of the library, and what they are called with

NOT_BUILT = "dit_accel's CPU kernels are not built: install it where there is a C++17 compiler (g++ or clang++)"
REBUILD = "pip install --force-reinstall --no-deps -e . in its checkout, or by installing its wheel again"


def library_file() -> Path:
    """Where the build puts the library, which serves every version of Python."""
    return Path(__file__).with_name("_native.so")


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where there are none that fit (see `refusal`)."""
    if refusal() is not None:
        return None
    lib = _loaded(library_file())
    for name, kind in FUNCTIONS.items():
        getattr(lib, f"dit_accel_{name}").argtypes = [POINTER(kind), c_int32]
    return lib


@functools.cache
def refusal() -> str | None:
    """Why the compiled kernels can't run here: not built, or built from other sources than these; None where they can."""
    path = library_file()
    if not path.exists():
        if any(path.parent.glob("_native.*.so")):  # as versions up to 0.2.0 named it
            return f"dit_accel's CPU kernels ({path.parent}) were built by an earlier version: build them again by {REBUILD}"
        return NOT_BUILT
    expected, found = sources.fingerprint(path.parent), _built_from(path)
    if found != expected:
        return f"dit_accel's CPU kernels ({path}) were built from other sources ({found}, now {expected}): build them again by {REBUILD}"
    return None


def _loaded(path: Path) -> ctypes.CDLL:
    """The library, once its structs are found to be laid out as these classes are."""
    lib = ctypes.CDLL(str(path))
    kinds = {"rows": Rows, "problem": Problem, "selection": Selection, "summary": Summary, "mixture": Mixture}
    kinds["grouping"] = Grouping
    for name, kind in kinds.items():
        table = getattr(lib, f"dit_accel_{name}_fields")
        table.restype = POINTER(Field)
        compare_fields(kind, table())
    return lib


def _built_from(path: Path) -> str:
    """The fingerprint of the sources that a library was built from."""
    try:
        function = ctypes.CDLL(str(path)).dit_accel_sources
    except (OSError, AttributeError):  # not a library for this machine, or one from before there were fingerprints
        return "unknown"
    function.restype = c_char_p
    return str(function().decode())


def compare_fields(kind: type[Structure], table: Any) -> None:
    """Raise RuntimeError unless a struct's fields have the names, offsets and sizes of the library's table."""
    theirs: dict[str, tuple[int, int]] = {}
    while table[len(theirs)].name is not None:
        row = table[len(theirs)]
        theirs[row.name.decode()] = row.offset, row.size
    size = table[len(theirs)].size
    descriptors = {name: getattr(kind, name) for name, *_ in kind._fields_}
    ours = {name: (field.offset, field.size) for name, field in descriptors.items()}
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong or size != ctypes.sizeof(kind):
        raise RuntimeError(f"native.{kind.__name__} is not problem.h's: {', '.join(wrong) or f'{ctypes.sizeof(kind)} bytes, not {size}'}")


@functools.cache
def best_target() -> str:
    """The instruction set that this CPU's calls run."""
    lib = library()
    return TARGETS[lib.dit_accel_best_target()] if lib else "none"


class Bfloat16:
    """The instruction set of calls on bfloat16, which is not always the fastest of those that the CPU has: decided at the first of them,
    for this process's life. `chooser` names it; the operator puts a measurement there."""

    def __init__(self) -> None:
        self.chooser: Callable[[], str] = best_target
        self._lock = threading.Lock()
        self._chosen: str | None = None

    def target(self) -> str:
        """What was chosen; other threads wait for the choice."""
        with self._lock:
            if self._chosen is None:
                self._chosen = self.chooser()
            return self._chosen


BFLOAT16 = Bfloat16()
_thread = threading.local()  # its `target`: what `running` has this thread run


@contextlib.contextmanager
def running(name: str) -> Iterator[None]:
    """Run one of TARGETS that the CPU has, in this thread, whatever was chosen or is in the environment."""
    _thread.target = name
    try:
        yield
    finally:
        del _thread.target


def target(*, bfloat16: bool = False) -> int:
    """The target of the next call: the CPU's best, or for tensors of `bfloat16` what was chosen for them; or the one that the environment
    names, as long as the CPU has it."""
    if hasattr(_thread, "target"):
        return TARGETS.index(_thread.target)
    name = os.environ.get(TARGET_VARIABLE)
    if name is None:
        name = BFLOAT16.target() if bfloat16 else best_target()
    if name not in TARGETS or TARGETS.index(name) > TARGETS.index(best_target()):
        raise ValueError(f"{TARGET_VARIABLE} must be one of {TARGETS[: TARGETS.index(best_target()) + 1]} on this CPU, not {name!r}")
    return TARGETS.index(name)


def _on_bfloat16(argument: Structure) -> bool:
    rows = getattr(argument, "q", None)
    return isinstance(rows, Rows) and rows.bf16 == 1


noting: ContextVar[Callable[[str, Structure, int], None] | None] = ContextVar("noting", default=None)  # called for each call that it makes


def call(name: str, argument: Structure) -> None:
    """Run one of FUNCTIONS. Raises MemoryError where the machine has no more."""
    lib = library()
    if lib is None:
        raise RuntimeError(refusal())
    number = target(bfloat16=_on_bfloat16(argument))
    if getattr(lib, f"dit_accel_{name}")(ctypes.byref(argument), number):
        fail(name)
    if note := noting.get():
        note(name, argument, number)


def fail(name: str) -> None:
    """Raise MemoryError."""
    raise MemoryError(f"the CPU kernels found no memory for {name}")


def function(name: str) -> Any:
    """One of FUNCTIONS, which takes any memory that is laid out as its argument is."""
    lib = library()
    if lib is None:
        raise RuntimeError(refusal())
    return lib[f"dit_accel_{name}"]
