"""CUDA graphs: what must have run before a capture begins, and what a captured graph reads for as long as it is replayed.

A graph holds raw pointers. Nothing says when it is gone, and it may outlive the model that it was captured from: so what it reads of
ours is never freed, a few megabytes for each captured size.
"""

from collections.abc import Hashable
from typing import Any

import torch

from dit_accel.errors import BackendError

# of an operator that decides by values: a replayed graph would repeat what was decided when it was recorded; PyTorch releases without the
# tag record none with a CPU tensor
ALWAYS_RUNS: dict[str, Any] = {"tags": (torch.Tag.cudagraph_unsafe,)} if hasattr(torch.Tag, "cudagraph_unsafe") else {}
SEEN = 4096  # calls that are remembered as having run; a capture follows its first run at once
_seen: dict[int, None] = {}  # hashes of what decides which kernels a call compiles and loads, the latest last
_kept: dict[int, object] = {}  # by identity: plans compare tensor by tensor


def capturing(device: torch.device) -> bool:
    """Whether the current stream of a device records a CUDA graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def refuse(device: torch.device, what: str) -> None:
    """Raise BackendError while a graph is captured: `what` belongs to a first call, and no graph can record it."""
    if capturing(device):
        raise BackendError(f"a CUDA graph can't record a first call ({what}): run the pipeline once with these sizes before capturing")


def ran(call: Hashable) -> None:
    """Remember that a call ran to its end outside a capture."""
    key = hash(call)
    _seen.pop(key, None)
    _seen[key] = None
    if len(_seen) > SEEN:
        del _seen[next(iter(_seen))]


def check(device: torch.device, call: Hashable) -> bool:
    """Whether a graph is captured. Raises BackendError where one is and this call has not run before: its kernels are not loaded."""
    if not capturing(device):
        return False
    if hash(call) not in _seen:
        refuse(device, "its kernels are compiled and loaded")
    return True


def keep(device: torch.device, *things: object) -> None:
    """Never free these while a graph that is being captured may read them; nothing outside a capture."""
    if capturing(device):
        _kept.update((id(thing), thing) for thing in things)
