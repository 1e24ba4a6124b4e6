"""Gradient checkpointing: a block that is computed again in the backward pass runs in the forward that it belongs to.

The second computation comes after the forward has ended, perhaps after another one, and on a GPU in a thread of autograd's. diffusers keeps
the function that checkpoints a block on the module that calls it, so that function is wrapped: it takes the current forward along.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from dit_accel.patch.forward import running, within

NAME = "_gradient_checkpointing_func"


class Carried:
    """A checkpointing function under which blocks are computed within the forward that was current when it was called."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.function(block, *args, **kwargs)
        return self.function(functools.partial(within, running(), block), *args, **kwargs)


def carry_forwards(model: nn.Module) -> None:
    """Wrap the checkpointing functions of a model's modules where checkpointing is on."""
    for module in model.modules():
        function = getattr(module, NAME, None) if getattr(module, "gradient_checkpointing", False) else None
        if function is not None and not isinstance(function, Carried):
            setattr(module, NAME, Carried(function))


def drop_carried(model: nn.Module) -> None:
    """Undo `carry_forwards`."""
    for module in model.modules():
        function = vars(module).get(NAME)
        if isinstance(function, Carried):
            setattr(module, NAME, function.function)
