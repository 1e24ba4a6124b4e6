"""A clock that waits for the GPU."""

import time
from collections.abc import Callable
from typing import Any

import torch


def clock() -> float:
    """Seconds, after all work given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = clock()
    function()
    return clock() - start
