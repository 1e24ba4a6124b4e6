"""Several processes of one run, as `accelerate launch` starts them: each takes its share of the work, and all learn what came of it.

Under context parallelism (`sharing`) the work is one for all: every process runs every forward, on its part of the sequence, and knows the
whole of what comes out. What it has of gradients is a part.
"""

import contextlib
import socket
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, reduce
from torch import Tensor, nn

from dit_accel.errors import DistillationError
from dit_accel.parallel.ranks import Ranks

MESSAGE = 64 * 2**20  # bytes, at most, of the gradients that are summed at once: a message is copied twice


def processes(device: torch.device) -> PartialState:
    """The processes of this run; a program that was started alone is one."""
    return PartialState(cpu=device.type == "cpu")


_together: ContextVar[bool] = ContextVar("together", default=False)


@contextlib.contextmanager
def sharing(transformer: nn.Module) -> Iterator[None]:
    """A `with` block in which the processes share each sequence, where the transformer is spread over them.

    Raises DistillationError where it is spread over some of them alone.
    """
    ranks = Ranks.of(getattr(transformer, "_parallel_config", None))
    count = processes(next(transformer.parameters()).device).num_processes
    if ranks is not None and ranks.size != count:
        raise DistillationError(
            f"the model is spread over {ranks.size} of {count} processes: start as many as the degree says, as the "
            "others have no part in it"
        )
    token = _together.set(ranks is not None)
    try:
        yield
    finally:
        _together.reset(token)


def together() -> bool:
    """Whether the processes share each sequence."""
    return _together.get()


def writes() -> bool:
    """Whether this process writes what it has made: of what all have made together, the main one alone."""
    return not together() or is_main()


def means_over_sequence(*tensors: Tensor) -> tuple[list[Tensor], int]:
    """The mean of each of some tensors of equal size, of which each process has its part of a sequence, and the size of the whole."""
    count = tensors[0].numel()
    if not together():
        return [x.mean() for x in tensors], count
    (sums,) = _added([torch.stack([*(x.sum().double() for x in tensors), tensors[0].new_tensor(count, dtype=torch.float64)])])
    return list((sums[:-1] / sums[-1]).to(tensors[0].dtype)), int(sums[-1])


def is_main() -> bool:
    """Whether this process is the one that writes and speaks; the others of a launch only share the work."""
    return bool(PartialState().is_main_process)


def shared_gpus(device: torch.device) -> list[str]:
    """The GPUs that hold the model in more than one process, as "host cuda:0"; known to all processes."""
    if device.type != "cuda":
        return []
    places = _gathered([f"{socket.gethostname()} cuda:{device.index or 0}"])
    return sorted({place for place in places if places.count(place) > 1})


def wait_for_all() -> None:
    """Until every process has come here."""
    PartialState().wait_for_everyone()


def share(count: int) -> range:
    """Which of so many pieces of work are this process's: every n-th, or all of what the processes do together."""
    if together():
        return range(count)
    state = PartialState()
    return range(state.process_index, count, state.num_processes)


def gathered(items: Sequence[Any]) -> list[Any]:
    """The items of all processes, those of `share` in their order. The processes may have numbers of items that differ by one."""
    return list(from_main(list(items))) if together() else _gathered(items)


def _gathered(items: Sequence[Any]) -> list[Any]:
    parts = gather_object([list(items)])  # one list per process
    longest = max(len(part) for part in parts)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def from_main(value: Any) -> Any:
    """The main process's value, in all processes."""
    if PartialState().num_processes == 1:
        return value
    (value,) = broadcast_object_list([value])
    return value


def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over the shares of the processes, all in one message: for a few small ones."""
    return list(tensors) if together() else _added(tensors)


def _added(tensors: Sequence[Tensor]) -> list[Tensor]:
    if PartialState().num_processes == 1:
        return list(tensors)
    flat = reduce(torch.cat([t.flatten() for t in tensors]), "sum")
    return [part.view_as(t) for part, t in zip(flat.split([t.numel() for t in tensors]), tensors, strict=True)]


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Put the sum over the processes, taken in float32, in the place of every gradient; MESSAGE bytes at a time."""
    if PartialState().num_processes == 1:
        return
    for bucket in _buckets(parameters):
        sums = _added([(torch.zeros_like(p) if p.grad is None else p.grad).float() for p in bucket])
        for parameter, total in zip(bucket, sums, strict=True):
            if parameter.grad is not None or bool(total.any()):  # the optimizer leaves alone what has no gradient
                parameter.grad = total.to(parameter.dtype)


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in order, as many at a time as MESSAGE holds, a larger one alone."""
    bucket: list[nn.Parameter] = []
    for parameter in parameters:
        if bucket and 4 * sum(p.numel() for p in (*bucket, parameter)) > MESSAGE:
            yield bucket
            bucket = []
        bucket.append(parameter)
    if bucket:
        yield bucket
