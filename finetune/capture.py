"""The outputs of a model's accelerated attention layers in one forward: the teacher's outputs, and the student's compared with them.

Of all layers at once there is one tensor of the output's size, which backward needs: a teacher's output is let go of when the student's
has been compared with it, and of that the gradient alone is kept, in the teacher's memory.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.processes import means_over_sequence
from dit_accel.patch.state import patches_of

Outputs = dict[str, list[Tensor]]  # by layer, one for each of its calls


@contextlib.contextmanager
def capture(pipe_or_transformer: object) -> Iterator[Outputs]:
    """Collects what each accelerated attention module returns for the image (or joint) tokens; hooks end with the block."""
    outputs: Outputs = {}
    with _watched(pipe_or_transformer, lambda name, output: outputs.setdefault(name, []).append(output)):
        yield outputs


@contextlib.contextmanager
def compared(pipe_or_transformer: object, taught: Outputs) -> Iterator[list[Tensor]]:
    """Collects the relative error of each attention module's output, as `losses.relative_error` defines it, and takes the outputs that it
    was compared with out of `taught`. Forwards that gradient checkpointing repeats find none and are left alone."""
    errors: list[Tensor] = []

    def compare(name: str, output: Tensor) -> None:
        if taught.get(name):
            errors.append(_RelativeError.apply(output, taught[name].pop(0)))

    with _watched(pipe_or_transformer, compare):
        yield errors


@contextlib.contextmanager
def _watched(pipe_or_transformer: object, see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """`see` is given the name and the output of each accelerated attention module for the length of a `with` block."""

    def seeing(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda module, args, output: see(name, output[0] if isinstance(output, tuple) else output)

    layers = [(name, model.get_submodule(name)) for model, patch in patches_of(pipe_or_transformer) for name in patch.originals]
    hooks = [module.register_forward_hook(seeing(name)) for name, module in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _RelativeError(torch.autograd.Function):
    """`losses.relative_error`, whose graph would hold three float32 tensors of the value's size. Here it is the gradient, in the value's
    type, and not as a saved tensor: of those a checkpointed block must save as many when it is repeated, without a teacher."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, target: Tensor) -> Tensor:
        difference = value.float() - target.float()
        (wrong, whole), count = means_over_sequence(difference.square(), target.float().square())
        size = whole.clamp_min(1e-12)
        ctx.gradient = (difference * (2 / count / size)).to(value.dtype)
        return wrong / size

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient * gradients[0].to(ctx.gradient.dtype), None
