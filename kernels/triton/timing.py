"""One kernel by itself on a GPU: whether it is of use there, and how long it takes."""

from dit_accel.kernels.triton.launch import Launch, execute
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.testing import do_bench


def seconds(launch: Launch) -> float | str:
    """Compile and run a launch, several times: its median seconds; or why its tile is of no use."""
    try:
        compiled = launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:  # the last from the passes between
        return f"does not compile: {' '.join(str(error).split())[:200]}"
    if compiled.n_spills:
        return f"spills {compiled.n_spills} registers"
    return float(do_bench(lambda: execute(launch), return_mode="median")) / 1e3
