"""ComfyUI's attention calls as tensors `[B, H, N, D]`, and an output in the form that a call asks for.

An override is called as `override(function, query, key, value, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **options)`,
any of them by name; query, key and value are `[B, N, H·D]` (some models' values `[B, N, H, D]`), or with `skip_reshape` `[B, H, N, D]`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# what a call may say in addition and what changes nothing here: accumulators are float32 anyway
KNOWN = {"transformer_options", "scale", "enable_gqa", "low_precision_attention", "_inside_attn_wrapper"}


@dataclass(frozen=True)
class Call:
    """One call: tensors `[B, H, N, D]`, keys and values repeated for all heads; `mask` of 4 axes or None; `special`: why it can't be
    accelerated, whatever its shapes."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float | None
    keep_heads: bool
    special: str | None

    def answer(self, out: Tensor) -> Tensor:
        """The output `[B, H, N, D]` in the form that the call asks for."""
        return out if self.keep_heads else out.transpose(1, 2).flatten(2)


def read(
    query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None, attn_precision: torch.dtype | None = None,
    skip_reshape: bool = False, skip_output_reshape: bool = False, **options: Any,
) -> Call:  # fmt: skip
    """A call by its arguments; `attn_precision` is never more than the float32 of the accumulators."""
    if not skip_reshape:
        width = query.shape[-1] // heads
        query, key, value = (x.reshape(*x.shape[:2], -1, width).transpose(1, 2) for x in (query, key, value))
    special = None
    if unknown := sorted(options.keys() - KNOWN):
        special = f"the argument {unknown[0]}"
    elif len({(x.dtype, x.device) for x in (query, key, value)}) > 1 or not query.is_floating_point():
        special = f"query, key and value of {', '.join(str(x.dtype).removeprefix('torch.') for x in (query, key, value))}"
    elif query.shape[1] % key.shape[1] or key.shape[1] != value.shape[1] or query.shape[3] != value.shape[3]:
        special = f"queries, keys and values of shapes {', '.join(str(list(x.shape)) for x in (query, key, value))}"
    elif (times := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
    if mask is not None:
        mask = mask[(None,) * (3 - mask.ndim)] if mask.ndim < 3 else mask  # two axes are queries and keys, three a batch of them
        mask = mask[:, None] if mask.ndim == 3 else mask
        if mask.ndim != 4 or mask.shape[1] != 1 or mask.shape[0] not in (1, len(query)):
            special = special or f"an attention mask of shape {list(mask.shape)}"
        if mask.dtype != torch.bool and not mask.is_floating_point():
            special = special or f"an attention mask of {str(mask.dtype).removeprefix('torch.')}"
    return Call(query, key, value, mask, options.get("scale"), skip_output_reshape, special)
