"""How an accelerated transformer runs for the length of a `with` block, but for `dense`: `always`, `proportional`, `running`,
`at_moment`, `without_dense_steps`."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dit_accel.errors import ArgumentError
from dit_accel.method.assignment import Assignment, Moment
from dit_accel.method.spec import AttentionSpec
from dit_accel.patch.anatomy import attention_layers
from dit_accel.patch.heads import joint_parameters
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import patches_of

P = TypeVar("P")


def check_trained_tokens(tokens: int | None) -> None:
    """Raise ValueError unless it is None or a number of tokens whose logarithm can divide."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 2):
        raise ValueError(f"trained_tokens must be a number of tokens >= 2 or None, not {tokens!r}")


@contextlib.contextmanager
def _set(pipe_or_transformer: object, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """An attribute of all patches' contexts changed for the length of a `with` block."""
    contexts = [patch.context for _, patch in patches_of(pipe_or_transformer)]
    before = [getattr(context, name) for context in contexts]
    for context, value in zip(contexts, before, strict=True):
        setattr(context, name, change(value))
    try:
        yield
    finally:
        for context, value in zip(contexts, before, strict=True):
            setattr(context, name, value)


@contextlib.contextmanager
def always(pipe_or_transformer: P) -> Iterator[P]:
    """The method at every size, even where the original attention is faster, for the length of a `with` block. For training and measuring.

    Raises NotAcceleratedError.
    """
    with _set(pipe_or_transformer, "always", lambda _: True):
        yield pipe_or_transformer


@contextlib.contextmanager
def proportional(pipe_or_transformer: P, trained_tokens: int) -> Iterator[P]:
    """`trained_tokens` of `accelerate`, for the length of a `with` block, where the patch has none.

    Raises ValueError or NotAcceleratedError.
    """
    check_trained_tokens(trained_tokens)
    with _set(pipe_or_transformer, "trained_tokens", lambda own: trained_tokens if own is None else own):
        yield pipe_or_transformer


@contextlib.contextmanager
def at_moment(pipe_or_transformer: P, moment: Moment) -> Iterator[P]:
    """Forwards that are at this moment of a run, whatever calls them, for the length of a `with` block: recorded ones, replayed by
    themselves. Raises NotAcceleratedError."""
    with _set(pipe_or_transformer, "moment", lambda _: moment):
        yield pipe_or_transformer


@contextlib.contextmanager
def running(pipe_or_transformer: P, method: AttentionSpec | Assignment) -> Iterator[P]:
    """Another method on the accelerated layers, for the length of a `with` block; what is known of grids and runs is kept.

    Layers that are not accelerated stay as they are. Raises NotAcceleratedError, and ValueError where the method names no layer or head of
    the model or requires learned parameters that the layers lack, before anything is changed.
    """
    patches, assignment = patches_of(pipe_or_transformer), Assignment.of(method)
    heads = [{layer.name: layer.heads for layer in patch.context.layers} for _, patch in patches]
    assignment.check([dict.fromkeys(attention_layers(model), sys.maxsize) | own for (model, _), own in zip(patches, heads, strict=True)])
    for model, patch in patches:
        for name in patch.originals:
            check_learned(model.get_submodule(name).dit_accel, assignment)
    with _set(pipe_or_transformer, "assignment", lambda _: assignment):
        yield pipe_or_transformer


@contextlib.contextmanager
def without_dense_steps(pipe_or_transformer: P) -> Iterator[P]:
    """The method in the steps, too, that `dense_steps` keeps for the original attention, for the length of a `with` block. For training and
    measuring. Raises NotAcceleratedError."""
    with _set(pipe_or_transformer, "assignment", lambda own: own.after_dense_steps):
        yield pipe_or_transformer


def check_learned(operator: AcceleratedAttention, assignment: Assignment) -> None:
    """Raise ValueError unless a layer has the learned parameters of all specs that an assignment gives it."""
    specs = assignment.specs_of(operator.name)
    required = joint_parameters(specs, operator.layer).named_parameters() if specs else ()
    found = {name: tuple(parameter.shape) for name, parameter in operator.params.named_parameters()}
    for name, parameter in required:
        if found.get(name) != tuple(parameter.shape):
            raise ArgumentError(
                f"{operator.name} has the parameters {found} of the method that it was accelerated with, but {assignment} requires {name} "
                f"of the shape {tuple(parameter.shape)}: call restore(...) and accelerate(...) with it"
            )
