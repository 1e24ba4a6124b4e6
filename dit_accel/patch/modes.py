"""How an accelerated transformer runs for the length of a `with` block, but for `dense`: `always`, `proportional`, `running`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dit_accel.method.spec import AttentionSpec
from dit_accel.patch.state import Patch, patches_of

P = TypeVar("P")


def check_trained_tokens(tokens: int | None) -> None:
    """Raise ValueError unless it is None or a number of tokens whose logarithm can divide."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 2):
        raise ValueError(f"trained_tokens is a number of tokens >= 2 or None, got {tokens!r}")


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
def running(pipe_or_transformer: P, spec: AttentionSpec) -> Iterator[P]:
    """Another spec with the same parameters, order and blocks, for the length of a `with` block. Raises NotAcceleratedError."""
    patches = patches_of(pipe_or_transformer)
    before = [patch.context.spec for _, patch in patches]
    try:
        for model, patch in patches:
            _switch(model, patch, spec)
        yield pipe_or_transformer
    finally:
        for (model, patch), own in zip(patches, before, strict=True):
            _switch(model, patch, own)


def _switch(model: Any, patch: Patch, spec: AttentionSpec) -> None:
    if patch.context.spec == spec:
        return
    patch.context.switch(spec)
    for name in patch.originals:
        model.get_submodule(name).dit_accel.spec = spec
