"""How long a GPU takes, by its own events, with the second-level cache emptied before each run."""

from collections.abc import Callable
from typing import Any

from dit_accel.kernels.triton.ahead import FAILURES
from dit_accel.kernels.triton.launch import Launch, execute
from triton.testing import do_bench


def median_seconds(function: Callable[[], Any]) -> float:
    """The median of many runs after a few that are not counted. A call that keeps the GPU busy for less time than it takes to launch is
    measured with the gaps between its kernels, as a model would have them too."""
    return float(do_bench(function, return_mode="median")) / 1e3


def seconds(launch: Launch) -> float | str:
    """Compile and run a launch, several times: its median seconds; or why its tile is of no use.

    Spilled registers are no reason: outside of the loops they cost nothing that is seen, and within them the time shows it.
    """
    try:
        launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps)
    except FAILURES as error:
        return f"does not compile: {' '.join(str(error).split())[:200]}"
    return median_seconds(lambda: execute(launch))
