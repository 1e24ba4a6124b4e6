"""`as_attention_function`: a method on one layout as a function of query, key and value, for programs other than diffusers."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.kernels import dispatch
from dit_accel.method.assignment import Assignment
from dit_accel.method.checks import is_real, require
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch import masks
from dit_accel.patch.mask_check import hides_image

Order = Literal["BHND", "BNHD"]
ORDERS: dict[str, tuple[int, int]] = {"BHND": (1, 2), "BNHD": (2, 1)}  # which axes are heads and tokens


class AttentionFunction(Protocol):
    """What `as_attention_function` gives; see there."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor: ...


def as_attention_function(
    spec: AttentionSpec, layout: TokenLayout, *, tensor_layout: Order = "BHND", scale: float | None = None,
    params: AttentionParameters | None = None, backend: str = "auto",
) -> AttentionFunction:  # fmt: skip
    """A function `(query, key, value, *, mask=None, scale=None) -> output` that computes one method on one layout of tokens.

    Args:
        spec: the method; an `Assignment` is of layers and steps, which a function of tensors does not know, and is refused.
        layout: grid of the image or video, number and place of the text's tokens.
        tensor_layout: of query, key, value and output: "BHND" is `[batch, heads, tokens, channels]`, "BNHD" `[batch, tokens, heads,
            channels]`. The tokens of an image are in raster order, and the text's are before or after them, as `layout.text_first` says.
        scale: of the logits, 1/sqrt(channels) unless given here or in the call, which goes first.
        params: the method's learned part (`spec.make_parameters`); None means its start values.
        backend: as in `dit_accel.attention`.

    Query, key and value have one shape, floating dtype and device; keys of fewer heads than queries (GQA) are repeated. `mask` hides
    padded text: `[B, N]`, `[B, 1, N]` or `[B, 1, 1, N]`, True (or 0 where it is floating and added to the logits) for what is attended; it
    must be the same for all image tokens and hide none of them. A mask over pairs of tokens and a causal one are not supported.
    Differentiable in query, key, value and `params`.

    Raises ValueError for everything that does not fit, BackendError for a backend that can't run the call.
    """
    advice = "give its specs to layers and steps by accelerate, or pass one of its specs" if isinstance(spec, Assignment) else ""
    require(isinstance(spec, AttentionSpec), "spec must be an AttentionSpec (Fovea, CLEAR, SLA, GNA, ...)", spec, advice)
    require(isinstance(layout, TokenLayout), "layout must be a TokenLayout", layout)
    require(tensor_layout in ORDERS, f"tensor_layout must be one of {', '.join(ORDERS)}", tensor_layout)
    _check_scale(scale)
    dispatch.check(backend)
    default, (heads_axis, token_axis) = scale, ORDERS[tensor_layout]

    def function(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        _check_scale(scale)
        _check_shapes(query, key, value, tensor_layout, layout)
        if tensor_layout == "BNHD":
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if (times := query.shape[1] // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        bias = None if mask is None else key_bias(mask, layout, len(query))
        out = attention(
            query, key, value, spec, layout, params=params, scale=default if scale is None else scale, text_bias=bias, backend=backend
        )
        return out.transpose(heads_axis, token_axis) if tensor_layout == "BNHD" else out

    return function


def key_bias(mask: Tensor, layout: TokenLayout, batch: int) -> Tensor | None:
    """What a mask over keys adds to the logits of the text's keys, float32 `[B, text]`; None where there is no text.

    Raises ValueError for a mask that is over pairs, of another length, not the same for all image tokens, or that hides them; that reads
    device memory.
    """
    tokens, rule = layout.tokens, "mask must be over keys: [B, N], [B, 1, N] or [B, 1, 1, N]"
    require(isinstance(mask, Tensor), rule, type(mask).__name__)
    advice = f"here N = {tokens} and B = {batch} or 1; a mask over pairs of tokens or of each head is not supported"
    over_keys = 2 <= mask.ndim <= 4 and mask.shape[-1] == tokens and set(mask.shape[1:-1]) <= {1} and mask.shape[0] in (1, batch)
    require(over_keys, rule, tuple(mask.shape), advice)
    require(mask.dtype == torch.bool or mask.is_floating_point(), "mask must be bool or floating", mask.dtype)
    keys = mask.reshape(len(mask), tokens)
    if hides_image(keys, layout.image, layout.text_first):
        raise ArgumentError("mask must be the same for all image tokens, but hides some of them: run those calls without dit_accel")
    return masks.text_bias(keys, layout, batch) if layout.text else None


def _check_scale(scale: float | None) -> None:
    require(scale is None or (is_real(scale) and scale > 0), "scale must be None or a number > 0", scale)


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, tensor_layout: str, layout: TokenLayout) -> None:
    """Raise ArgumentError unless the three are as `tensor_layout` says, of the layout's length, with heads that the keys' divide."""
    heads_axis, token_axis = ORDERS[tensor_layout]
    shapes = [tuple(x.shape) for x in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        raise ArgumentError(f"query, key and value must have 4 axes, {tensor_layout}, not the shapes {shapes}: split the heads first")
    heads, keys = query.shape[heads_axis], key.shape[heads_axis]
    if shapes[1] != shapes[2] or (len(query), query.shape[3]) != (len(key), key.shape[3]) or keys == 0 or heads % keys:
        raise ArgumentError(f"query, key and value must fit each other as {tensor_layout}, heads a multiple of the keys', not {shapes}")
    if query.shape[token_axis] != layout.tokens or key.shape[token_axis] != layout.tokens:
        got = (query.shape[token_axis], key.shape[token_axis])
        raise ArgumentError(
            f"queries and keys must be the {layout.tokens} tokens of grid {layout.grid} and {layout.text} of text, not {got}: the axes of "
            f"{tensor_layout} are batch, {'heads, tokens' if heads_axis == 1 else 'tokens, heads'}, channels"
        )
