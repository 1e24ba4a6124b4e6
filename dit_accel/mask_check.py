"""Masks that a user gives to a whole forward: one that hides image tokens is no padding of text, and leaves the forward to the original."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.context import Context

NAME = "attention_mask"
REMEMBERED = 2  # masks of a run: with a prompt and with a negative one


class MaskCheck:
    """Looks at the masks over all tokens among a forward's arguments; at each tensor once, as that waits for the device."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self._known: list[tuple[Tensor, int, bool]] = []  # mask, its version, whether it hides an image token

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": []}

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook, after the context's own."""
        context = self.context
        if not context.active or context.family.mask not in ("keys", "pairs") or context.text is None:
            return
        arguments = dict(zip(context.names, args, strict=False)) | kwargs
        tokens = context.image + context.text
        if any(self._hides(mask) for mask in given(arguments) if mask.shape[-1] == tokens):
            context.active = False
            context.fall_back("an attention mask over image tokens")

    def _hides(self, mask: Tensor) -> bool:
        for known, version, answer in self._known:
            if known is mask and version == mask._version:
                return answer
        answer = torch.compiler.disable(hides_image)(mask, self.context.image, self.context.family.text_first)
        self._known = [(mask, mask._version, answer), *self._known][:REMEMBERED]
        return answer


def given(arguments: Mapping[str, Any]) -> Iterator[Tensor]:
    """The masks among a forward's arguments, and among keyword arguments of its attention modules."""
    for held in (arguments, *(x for x in arguments.values() if isinstance(x, dict))):
        if isinstance(mask := held.get(NAME), Tensor):
            yield mask


def hides_image(mask: Tensor, image: int, text_first: bool) -> bool:
    """Whether a mask `[..., N]` differs from one image key to another."""
    keys = mask[..., -image:] if text_first else mask[..., :image]
    return not torch.equal(keys, keys[..., :1].expand_as(keys))
