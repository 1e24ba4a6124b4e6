"""xformers' attention with lse for the parts that are dense: text rows over all keys, image rows over the text's keys."""

import importlib.util

import torch
from torch import Tensor

from dit_accel.kernels.reference import Partial

INSTALLED = importlib.util.find_spec("xformers") is not None  # a constant, so that torch.compile sees one
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(device: torch.device, dtype: torch.dtype, head_dim: int, *, gradient: bool, text_bias: bool = False) -> str | None:
    """The reason that xformers can't run the dense parts of a call, or None where it can."""
    if not INSTALLED:
        return "xformers is not installed: pip install dit-accel[xformers]"
    if gradient:
        return "xformers has no gradient of the lse, by which parts merge"
    if text_bias:
        return "xformers takes no bias of the text's keys here"
    if device.type != "cuda":
        return f"xformers requires a CUDA device, the tensors are on {device}"
    if dtype not in DTYPES or head_dim % 8 or not 8 <= head_dim <= 256:
        return f"xformers takes float32, bfloat16 or float16 of head_dim 8 to 256 in steps of 8, not {dtype} of {head_dim}"
    return None


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Partial:
    """`reference.dense_attention` without a bias, by xformers: q, k, v `[BH, N, D]`; output `[BH, Nq, D]` and lse `[BH, Nq]` float32.

    Calls `memory_efficient_attention_partial` with the heads as batch: `[BH, N, 1, D]`; its lse may be padded after the last query.
    """
    from xformers.ops import fmha

    rows = (x[:, :, None].contiguous() for x in (q, k, v))
    out, lse = fmha.memory_efficient_attention_partial(*rows, scale=scale)
    return out[:, :, 0].to(q.dtype), lse[:, 0, : q.shape[1]].float()
