"""Attention masks as diffusers' families pass them, read as what they are: a bias on the keys of padded text.

No family pads image tokens, so a family's mask (see `Family.mask`) says something of text keys alone, the same for every image query.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.operator.layout import TokenLayout


def refusal(mask: object, kind: str | None, tokens: int, text: int) -> str | None:
    """Why a call's mask can't be read as a bias on its text keys, or None where it can.

    `kind`: the family's. `tokens`, `text`: of the sequence.
    """
    if mask is None or kind == "ones":
        return None
    if kind is None or not isinstance(mask, Tensor):
        return "an attention mask"
    if text == 0:
        return "an attention mask over image tokens"
    by_key = mask.ndim == 2 or (mask.ndim == 4 and mask.shape[2] == 1)
    by_pair = kind == "pairs" and mask.ndim == 4 and mask.shape[2] == tokens
    if mask.shape[-1] != tokens or not (by_key or by_pair):
        return f"an attention mask of shape {list(mask.shape)} over {tokens} tokens"
    return None


def text_bias(mask: Tensor, layout: TokenLayout, batch: int) -> Tensor:
    """What an accepted mask adds to the logits of the text keys: float32 `[B, text]`, -inf where a key is padding."""
    image = -1 if layout.text_first else 0  # an image token's place
    keys = mask if mask.ndim == 2 else mask[:, 0, image]  # an image query's row
    text = keys[:, layout.text_slice]
    if mask.dtype == torch.bool:
        bias = torch.zeros(text.shape, device=mask.device).masked_fill(~text, -torch.inf)
    else:  # added to the logits as it is; what image keys get themselves shifts all logits alike
        bias = text.float() - keys[:, image, None].float()
    return bias.expand(batch, -1)


def over_keys(bias: Tensor, layout: TokenLayout) -> Tensor:
    """A bias `[B, text]` on the text's keys as a mask over all keys, `[B, 1, 1, N]`."""
    image = (0, layout.image) if layout.text_first else (layout.image, 0)
    return F.pad(bias, image)[:, None, None]


def rolled(mask: Tensor, shift: int) -> Tensor:
    """An accepted mask for a sequence whose tokens are rolled by `shift`."""
    by_pair = mask.ndim == 4 and mask.shape[2] > 1
    return mask.roll((shift, shift), (-2, -1)) if by_pair else mask.roll(shift, -1)


def differs_by_row(mask: Tensor) -> bool:
    """Whether text queries have rows of their own, other than those of image queries, that matter: a mask of numbers over pairs.

    Of a boolean one, the rows that differ are those of padding, which nothing attends to.
    """
    return mask.ndim == 4 and mask.shape[2] > 1 and mask.dtype != torch.bool


def with_text_rows(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, layout: TokenLayout, scale: float | None
) -> Tensor:
    """The output `[B, H, N, D]` with the rows of text queries computed under the mask as it is."""
    rows = layout.text_slice
    text = F.scaled_dot_product_attention(query[:, :, rows], key, value, attn_mask=mask[:, :, rows].to(query.dtype), scale=scale)
    image = out[:, :, layout.image_slice]
    return torch.cat([text, image] if layout.text_first else [image, text], dim=2)
