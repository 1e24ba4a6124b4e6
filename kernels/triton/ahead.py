"""Compiling a launch into Triton's cache folder without opening the card that it is for, so that many processes can do it at once."""

import contextlib
from collections.abc import Iterator

from dit_accel.kernels.triton.launch import Launch
from triton.backends.compiler import GPUTarget
from triton.compiler.errors import CompilationError
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources, PTXASError

FAILURES = (CompilationError, OutOfResources, PTXASError, RuntimeError)  # the last from the passes between


class Unopened:
    """What Triton asks its driver before it compiles; the real one would open the card, which takes half a gigabyte of it per process."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def unopened(target: GPUTarget) -> Iterator[None]:
    """Inside, Triton compiles for a target and can run nothing."""
    before = driver._active
    driver.set_active(Unopened(target))
    try:
        yield
    finally:
        driver._active = before


def compile_launch(launch: Launch, target: GPUTarget) -> str | None:
    """Compile what running the launch on the target would, from tensors of any device, unless the cache has it; why not, or None."""
    with unopened(target):
        try:
            launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, num_warps=launch.warps)
        except FAILURES as error:
            return f"does not compile: {' '.join(str(error).split())[:200]}"
    return None


def current_target() -> GPUTarget:
    """That of the current device."""
    return driver.active.get_current_target()
