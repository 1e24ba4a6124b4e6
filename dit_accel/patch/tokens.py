"""Names, as tensors, of the contexts and forwards that operators of a compiled graph look up when they run."""

import itertools
import threading
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from dit_accel.patch.forward import Forward


@dataclass(eq=False)
class Known:
    """What a token names: a forward of a context, or, without one, whichever of the context's forwards is running."""

    context: Any
    forward: Forward | None
    token: Tensor


_numbers = itertools.count(1)
_known: WeakValueDictionary[int, Known] = WeakValueDictionary()  # held by their contexts


class _Begun(threading.local):
    """The forward that each context began last in this thread: with breaks in its graph, the token at hand may be another thread's."""

    def __init__(self) -> None:
        self.forwards: WeakKeyDictionary[Any, Forward] = WeakKeyDictionary()


_begun = _Begun()


@torch.inference_mode(False)  # the token must serve training as well
def token_of(context: Any, forward: Forward | None) -> Tensor:
    """The token of a context, or of one of its forwards: an int64 on the CPU. It is good for as long as the context lives."""
    if forward not in context.known:
        number = next(_numbers)
        context.known[forward] = _known[number] = Known(context, forward, torch.tensor(number))
    token: Tensor = context.known[forward].token
    return token


def begin(context: Any, forward: Forward) -> Tensor:
    """The token of a forward that begins in this thread."""
    _begun.forwards[context] = forward
    return token_of(context, forward)


def find(token: Tensor) -> tuple[Any, Forward | None]:
    """A token's context, and the forward that is running, or that the backward pass belongs to; None where there is none."""
    known = _known[int(token)]
    if known.forward is None:
        return known.context, known.context.forward()
    return known.context, known.forward if in_backward() else _begun.forwards.get(known.context, known.forward)


def in_backward() -> bool:
    """Whether this thread is in a backward pass of autograd."""
    return torch._C._current_graph_task_id() != -1
