"""Masks that a user gives to a whole forward: one that hides image tokens is no padding of text, and leaves the forward to the original."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.patch.forward import Forward

NAME = "attention_mask"
REMEMBERED = 2  # masks of a run: with a prompt and with a negative one


class MaskCheck:
    """Looks at the masks over all tokens among a forward's arguments; at each tensor once, as that waits for the device."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, int, bool]] = []  # mask, its version, whether it hides an image token

    def hides_image(self, masks: Iterable[Tensor], forward: Forward) -> bool:
        """Whether one of the masks that a forward was given hides an image token."""
        if forward.family.mask not in ("keys", "pairs") or forward.text is None:
            return False
        tokens = forward.image + forward.text
        return any(self._hides(mask, forward) for mask in masks if mask.shape[-1] == tokens)

    def _hides(self, mask: Tensor, forward: Forward) -> bool:
        version = None if mask.is_inference() else mask._version
        for known, before, answer in self._known:
            if known is mask and before == version is not None:
                return answer
        answer = hides_image(mask, forward.image, forward.family.text_first)
        if version is not None:
            self._known = [(mask, version, answer), *self._known][:REMEMBERED]
        return answer


def given(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    """The masks among a forward's arguments, and among keyword arguments of its attention modules."""
    for held in (arguments, *(x for x in arguments.values() if isinstance(x, dict))):
        if isinstance(mask := held.get(NAME), Tensor):
            yield mask


def hides_image(mask: Tensor, image: int, text_first: bool) -> bool:
    """Whether a mask `[..., N]` differs from one image key to another or, where it is over keys, hides all of them.

    Rows of a mask over pairs that hide all are those of padding.
    """
    keys = mask[..., -image:] if text_first else mask[..., :image]
    if not torch.equal(keys, keys[..., :1].expand_as(keys)):
        return True
    first, over_keys = keys[..., 0], mask.ndim <= 2 or mask.shape[-2] == 1
    if not over_keys or not (first.dtype == torch.bool or first.is_floating_point()):
        return False
    # the least number of a type stands for -inf: a part of the logits that is added to all alike would round them away
    shown = first if first.dtype == torch.bool else first.abs() < torch.finfo(first.dtype).max / 2
    return not bool(shown.all())
