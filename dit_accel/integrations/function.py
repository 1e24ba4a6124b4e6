"""`as_attention_function`: a method on one layout as a function of query, key and value, for programs other than diffusers."""

import operator
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.kernels import capture, dispatch
from dit_accel.method.assignment import Assignment
from dit_accel.method.checks import is_real, require
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attend, attention, autocast, check_inputs, check_parameters, kept_start_values
from dit_accel.operator.blocks_of_grid import Plan, make_plan
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
    Differentiable in query, key, value and `params`. Under torch.compile a call is part of the graph (`fullgraph=True`); each function is
    compiled by itself.

    Raises ValueError for everything that does not fit, BackendError for a backend that can't run the call.
    """
    advice = "give its specs to layers and steps by accelerate, or pass one of its specs" if isinstance(spec, Assignment) else ""
    require(isinstance(spec, AttentionSpec), "spec must be an AttentionSpec (Fovea, CLEAR, SLA, GNA, ...)", spec, advice)
    require(isinstance(layout, TokenLayout), "layout must be a TokenLayout", layout)
    require(tensor_layout in ORDERS, f"tensor_layout must be one of {', '.join(ORDERS)}", tensor_layout)
    _check_scale(scale)
    dispatch.check(backend)
    default, (heads_axis, token_axis) = scale, ORDERS[tensor_layout]
    compute = _computation(spec, layout, params, backend)

    def function(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        _check_scale(scale)
        _check_shapes(query, key, value, tensor_layout, layout)
        if tensor_layout == "BNHD":
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if (times := query.shape[1] // key.shape[1]) > 1:
            key, value = (x.repeat_interleave(times, dim=1) for x in (key, value))
        bias = None if mask is None else key_bias(mask, layout, len(query))
        out = compute(query, key, value, default if scale is None else scale, bias)
        return out.transpose(heads_axis, token_axis) if tensor_layout == "BNHD" else out

    return function


def _computation(spec: AttentionSpec, layout: TokenLayout, params: AttentionParameters | None, backend: str) -> Callable[..., Tensor]:
    """`attention` of a spec on a layout, `(query, key, value, scale, bias)`, of which torch.compile makes one graph."""
    prepared: dict[str, tuple[Plan, Values]] = {}  # for graphs, whose inputs these are

    @torch.compiler.assume_constant_result
    def prepare(device: torch.device, heads: int, head_dim: int) -> str:
        """Make what a graph that is being traced reads, and tell its name in `prepared`."""
        name = f"{device} {heads} {head_dim}"
        if params is not None:
            check_parameters(params(), spec, torch.empty(1, heads, 0, head_dim, device=device))
        if name not in prepared:
            values = {} if params is not None else kept_start_values(spec, heads, head_dim, device)
            prepared[name] = make_plan(spec, layout, device), values
        return name

    def compute(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_compiling():
            return attention(query, key, value, spec, layout, params=params, scale=scale, text_bias=bias, backend=backend)
        query, key, value = autocast(query, key, value)
        check_inputs(query, key, value, layout)
        heads, head_dim = (operator.index(query.shape[axis]) for axis in (1, 3))  # numbers, also where sizes are symbols
        plan, values = prepared[prepare(query.device, heads, head_dim)]
        if params is not None:
            values = params()
        return attend(query, key, value, spec, layout, plan, values, scale, backend, text_bias=bias)[0]

    return compute


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
    bias: Tensor = read_mask(mask.reshape(len(mask), tokens), layout.image, layout.text_first)
    return bias.expand(batch, -1) if layout.text else None


@torch.library.custom_op("dit_accel::read_mask", mutates_args=(), **capture.ALWAYS_RUNS)
def read_mask(keys: Tensor, image: int, text_first: bool) -> Tensor:
    """What a mask `[B, N]` over keys adds to the logits of the text's, float32 `[B, text]`. An operator, because the values decide whether
    it raises ArgumentError: where it differs between image tokens or hides them."""
    if hides_image(keys, image, text_first):
        raise ArgumentError("mask must be the same for all image tokens, but hides some of them: run those calls without dit_accel")
    text = keys.shape[1] - image
    return masks.text_bias(keys, TokenLayout((1, 1, image), text, text_first), len(keys)).clone()


@read_mask.register_fake
def _(keys: Tensor, image: int, text_first: bool) -> Tensor:
    return keys.new_empty(len(keys), keys.shape[1] - image, dtype=torch.float32)


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
