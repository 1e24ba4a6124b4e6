"""Records of Triton's launches (`kernels/replay`).

Triton compiles a kernel for types, for integers that are 1 or divisible by 16, and for pointers that are divisible by 16: the first two
follow from a record's key, and of every pointer it is asked again.
"""

from collections.abc import Iterator
from typing import Any

import torch

from dit_accel.kernels import replay
from dit_accel.kernels.replay import Writer
from dit_accel.kernels.triton import launch
from dit_accel.kernels.triton.launch import Launch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver


class Recorder(replay.Recorder):
    """One that notes launches."""

    _on_stream = False

    def run(self, one: Launch) -> None:
        """Launch, and note it."""
        self._paused = True
        try:
            compiled = launch.execute(one)
        finally:
            self._paused = False
        if isinstance(compiled, CompiledKernel):
            self._note_compiled(compiled, one)
        else:
            self._note_interpreted(one)

    def _note_interpreted(self, one: Launch) -> None:
        given, empty = self.pieces(one.arguments), one._replace(arguments={})

        def write(writer: Writer) -> Iterator[str]:
            again = f"{writer.constant(empty)}._replace(arguments={writer.value(given, writer.tensor)})"
            yield f"{writer.constant(launch.execute)}({again})"

        self.kernel(write, given)

    def _note_compiled(self, compiled: Any, one: Launch) -> None:
        given, first = self.pieces(tuple(one.arguments[name] for name in one.kernel.arg_names)), not self._on_stream
        self._on_stream = True

        def write(writer: Writer) -> Iterator[str]:
            if first:
                yield f"stream = {writer.constant(_stream)}()"
            fixed = ", ".join(map(writer.constant, (*one.grid, 1, 1)[:3]))
            kernel = f"{writer.constant(compiled.function)}, {writer.constant(compiled.packed_metadata)}"
            addresses = ", ".join(writer.value(x, writer.address, kinds=False) for x in given)
            yield f"{writer.constant(compiled.run)}({fixed}, stream, {kernel}, None, None, None, {addresses})"

        self.kernel(write, given)


def _stream() -> Any:
    return driver.active.get_current_stream(driver.active.get_current_device())


def possible(device: torch.device) -> bool:
    """Whether calls on a device are recorded: NVIDIA's, unless a profiler follows Triton's launches."""
    return device.type == "cuda" and torch.version.hip is None and not hooked()


def hooked() -> bool:
    """Whether a hook is called at each of Triton's launches."""
    return any(getattr(hook, "calls", hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))
