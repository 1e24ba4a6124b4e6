"""Records of calls of the compiled library (`kernels/replay`): its structs as bytes, in which later calls put their own addresses."""

from collections.abc import Iterator
from ctypes import Structure, byref, c_uint64, c_void_p, sizeof
from typing import Any

from dit_accel.kernels import replay
from dit_accel.kernels.cpu import native
from dit_accel.kernels.replay import Writer


class Recorder(replay.Recorder):
    """One that notes calls of the library."""

    def note(self, name: str, argument: Structure, target: int) -> None:
        """Note a call that was made."""
        words = [(number, self.at(address)) for number, address in _addresses(argument)]
        given = [(number, x) for number, x in words if x is not None]
        copied = (c_uint64 * (sizeof(argument) // 8)).from_buffer_copy
        template, function = bytes(argument), native.function(name)

        def write(writer: Writer) -> Iterator[str]:
            yield f"a = {writer.constant(copied)}({writer.constant(template)})"
            for number, x in given:
                yield f"a[{number}] = {writer.value(x, writer.address)}"
            yield f"if {writer.constant(function)}({writer.constant(byref)}(a), {target}): {writer.constant(native.fail)}({name!r})"

        self.kernel(write, given)


def _addresses(argument: Structure) -> Iterator[tuple[int, int]]:
    """The pointers in a struct that are not null, each with the number of its word."""
    for name, kind, *_ in argument._fields_:
        if kind is not c_void_p and kind is not native.Rows:
            continue
        value: Any = getattr(argument, name)
        address = value.data if kind is native.Rows else value
        if address:
            yield getattr(type(argument), name).offset // 8, address
