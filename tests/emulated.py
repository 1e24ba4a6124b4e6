"""A pytest plugin: the tests' calls of the CPU kernels run in a program for another CPU, under an emulator; all else runs here.

The environment variable DIT_ACCEL_EMULATED is the command of that program (`emulated.cpp`, as .ci/arm builds and calls it). PyTorch, the
formulas and the comparison stay on this machine, so that tests take seconds and the other CPU needs no Python. Tensors travel through
files in memory, amid NaNs, so that what is read outside of them shows.
"""

import ctypes
import mmap
import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from ctypes import Structure, addressof, c_void_p, sizeof
from pathlib import Path

import pytest
from torch import Tensor

from dit_accel.kernels.cpu import calls, native

COMMAND = "DIT_ACCEL_EMULATED"
MACHINE = "DIT_ACCEL_EMULATED_MACHINE"  # as `platform.machine` names it; x86-64 where it is not set
LINE = 64  # bytes; a tensor begins where it begins in a line of this memory
found: dict[int, int] = {}  # of addresses that were asked for: the bytes from there to the end of the tensor's memory
address_of = Tensor.data_ptr


def data_ptr(x: Tensor) -> int:
    """`Tensor.data_ptr`, remembered."""
    address, memory = address_of(x), x.untyped_storage()
    found[address] = memory.data_ptr() + memory.nbytes() - address
    return address


def pointers(argument: Structure, offset: int = 0) -> Iterator[tuple[int, int]]:
    """The offset and value of each pointer in a struct and in the structs inside it that is not null."""
    for name, kind, *_ in argument._fields_:
        value, at = getattr(argument, name), offset + getattr(type(argument), name).offset
        if isinstance(value, Structure):
            yield from pointers(value, at)
        elif kind is c_void_p and value:
            yield at, value


class Emulated:
    """The program, and how to call it."""

    def __init__(self, command: str) -> None:
        self.calls, self._lock = 0, threading.Lock()
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self._program = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.best = native.TARGETS[self._answer()]

    def _answer(self) -> int:
        assert self._program.stdout is not None
        line = self._program.stdout.readline()
        if not line:
            raise RuntimeError(f"the emulated program ended with {self._program.wait()}")
        return int(line)

    def call(self, name: str, argument: Structure) -> None:
        """In the place of `native.call`."""
        with self._lock:
            self.calls += 1
            places, end = [], sizeof(argument)
            for offset, address in pointers(argument):
                place = (end + LINE - 1) // LINE * LINE + LINE + address % LINE
                places.append((offset, place, address))
                end = place + found[address]
            path = Path(self._folder.name, "call")
            path.write_bytes(b"\xff" * (end + LINE))
            with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
                base = addressof(ctypes.c_char.from_buffer(memory))
                ctypes.memmove(base, addressof(argument), sizeof(argument))
                for _, place, address in places:
                    ctypes.memmove(base + place, address, found[address])
                target = native.target(bfloat16=native._on_bfloat16(argument))
                assert self._program.stdin is not None
                print(
                    name, target, path, *(x for offset, place, _ in places for x in (offset, place)), file=self._program.stdin, flush=True
                )
                if self._answer():
                    raise MemoryError(f"the CPU kernels found no memory for {name}")
                for _, place, address in places:
                    ctypes.memmove(address, base + place, found[address])


def pytest_configure(config: pytest.Config) -> None:
    """Before any test's module asks for the targets of this machine."""
    native.TARGETS = native.targets_of(os.environ.get(MACHINE, "x86_64"))
    program = Emulated(os.environ[COMMAND])
    config.stash[PROGRAM] = program
    Tensor.data_ptr = data_ptr  # type: ignore[method-assign]
    native.call = program.call  # type: ignore[assignment]
    calls.together = lambda *given: given[-1]()  # type: ignore[assignment]  # a record calls the library of this computer
    native.best_target = lambda: program.best  # type: ignore[assignment]
    native.BFLOAT16.chooser = native.best_target


PROGRAM = pytest.StashKey[Emulated]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Tests that never called the program show nothing."""
    program = session.config.stash[PROGRAM]
    print(f"\n{program.calls} calls of the kernels in the emulated program, target {program.best}")
    if exitstatus == 0 and program.calls == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
