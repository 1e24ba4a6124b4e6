"""The state of one forward of an accelerated transformer: a value, current while that forward runs, in the thread that runs it.

Nothing of it is kept on the model, so threads may run one transformer at once, and an attention module that is called outside of a forward
finds no grid of an earlier one.
"""

import functools
import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from dit_accel.method.assignment import Group, Rules, groups
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.plans import Plans
from dit_accel.patch.heads import Layer
from dit_accel.pipelines.family import Family, Grids


@dataclass(frozen=True)
class Forward:
    """What is read at the transformer's boundary, once per forward.

    `rules`: those of the assignment that fit it. `grids`: of the images in its sequence, none where they are not known. `text`: how
    many other tokens there are, or None where only a call tells. `history`: how many of them come before the image although text comes
    behind it. `trained_tokens`: see `accelerate`. `active`: the operators run.
    """

    family: Family
    rules: Rules
    grids: Grids
    text: int | None
    history: int
    trained_tokens: int | None
    plans: Plans = field(compare=False, repr=False)
    active: bool

    def groups(self, layer: Layer) -> tuple[Group, ...]:
        """The specs that a layer runs, each with its heads."""
        return groups(self.rules, layer.name, layer.heads)

    def runs(self, layer: Layer) -> bool:
        """Whether a layer runs a spec in some head."""
        return any(group.spec is not None for group in self.groups(layer))

    @functools.cached_property
    def image(self) -> int:
        """Tokens of all images."""
        return sum(math.prod(grid) for grid in self.grids)

    def images(self, image_only: bool, tokens: int) -> tuple[Grids, int, int | None]:
        """The grids of the images in a sequence of so many tokens, their tokens, and how many others there are, if that is known.

        `image_only`: the module sees the drawn image only.
        """
        if image_only:
            return self.grids[:1], math.prod(self.grids[0]), 0
        if self.family.doubled and self.text is not None and tokens == 2 * self.image != self.image + self.text:
            return self.grids * 2, 2 * self.image, 0
        return self.grids, self.image, self.text

    def layout(self, image_only: bool, tokens: int) -> TokenLayout:
        """Of a sequence of so many tokens, images and text."""
        grids, image, _ = self.images(image_only, tokens)
        return _layout(grids, tokens - image, self.family.text_first)

    def scaled(self, scale: float | None, tokens: int, head_dim: int) -> float | None:
        """The scale of the logits in a sequence of so many tokens: as given, or CLEAR's proportional one (arXiv 2412.16112)."""
        if self.trained_tokens is None:
            return scale
        return (head_dim**-0.5 if scale is None else scale) * math.sqrt(math.log(tokens) / math.log(self.trained_tokens))


@functools.lru_cache(maxsize=256)
def _layout(grids: Grids, text: int, text_first: bool) -> TokenLayout:
    """Kept, because each layer of each forward asks for it."""
    return TokenLayout(grids[0], text, text_first, references=grids[1:])


@dataclass(frozen=True)
class Entered:
    """A forward that has begun, of which transformer (its context), and the one that it began in."""

    owner: object
    forward: Forward
    outer: "Entered | None"


_entered: ContextVar[Entered | None] = ContextVar("entered", default=None)


def enter(owner: object, forward: Forward) -> None:
    """Make a forward the current one until `leave`."""
    outer = _entered.get()
    while outer is not None and outer.owner is owner:  # a transformer does not call itself: what is left of it was interrupted
        outer = outer.outer
    _entered.set(Entered(owner, forward, outer))


def leave(owner: object) -> None:
    """End the current forward, if it is the owner's."""
    now = _entered.get()
    if now is not None and now.owner is owner:
        _entered.set(now.outer)


def current(owner: object) -> Forward | None:
    """The owner's forward that is running in this thread, or None."""
    now = _entered.get()
    return now.forward if now is not None and now.owner is owner else None


def running() -> Entered | None:
    """The forward that is running in this thread, of any transformer, for `within`."""
    return _entered.get()


def within(entered: Entered | None, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function as if in that forward, in whichever thread."""
    token = _entered.set(entered)
    try:
        return function(*args, **kwargs)
    finally:
        _entered.reset(token)
