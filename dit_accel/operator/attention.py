"""`attention`: the one operator that every method is. It knows specs and layouts; the arithmetic is in `kernels`.

Letters: B batch, H heads, N tokens (text and image), D channels per head, T blocks. Words: `density` share of key blocks kept, `kept` and
`rest`, `grid` (T, H, W) in tokens, `block` in memory, `tile` in space, `lse` natural logarithm of softmax mass.
"""

from collections.abc import Callable
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import capture, dispatch, reference, xformers_rows
from dit_accel.kernels.blocks import BlockMap, pool_blocks, select_blocks
from dit_accel.kernels.reference import Partial
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.method.spec import AttentionSpec, Downsampled, Linear, Mass, Pooled, Residual, TopK, unknown
from dit_accel.operator import lowering
from dit_accel.operator.blocks_of_grid import Plan, listed_beside
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lowering import downsample
from dit_accel.operator.plans import RECENT

Dense = Callable[..., Partial]  # `reference.dense_attention`, or xformers' with the same arguments but the bias


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, *, params: AttentionParameters | None = None,
    scale: float | None = None, text_bias: Tensor | None = None, backend: str = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, *, params: AttentionParameters | None = None,
    scale: float | None = None, text_bias: Tensor | None = None, backend: str = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    layout: TokenLayout,
    *,
    params: AttentionParameters | None = None,
    scale: float | None = None,
    text_bias: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention that `spec` describes, over the tokens that `layout` describes.

    Args:
        query, key, value: `[B, H, N, D]`, one floating dtype and device, after q/k norm and rotary embedding; N = layout.tokens. Under
            autocast they are cast to its dtype first, as `scaled_dot_product_attention` casts them, and may differ in dtype.
        spec, layout: the method; the text's length and place, the grid, the order in memory.
        params: the method's learned part from `spec.make_parameters`; None means its start values.
        scale: of the logits; 1/sqrt(D) unless given.
        text_bias: `[B, layout.text]`, any floating dtype, natural-log units: added to the scaled logits of the text's keys, for every
            query. -inf masks a key: it is never attended, and neither its key nor its value changes anything. Not differentiated.
        backend: "auto", "cpu" (compiled kernels), "triton" (fused GPU kernels), "xformers" (its attention for
            the dense parts, without gradients) or "reference".
        return_lse: also return the natural log of the softmax mass `[B, H, N]` (float32; of the exact part under `Residual`).

    Returns the output `[B, H, N, D]` in the input's dtype, under autocast in autocast's. Differentiable in query, key, value and the
    parameters; the selection is not.
    Raises ValueError for shapes, dtypes, devices or parameters that don't fit and for a text_bias that requires grad, BackendError for a
    backend that can't run the call.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value, layout)
    if params is None:
        params = start_values(spec, query)
    else:
        check_parameters(params, spec, query)
    _choose(backend, spec, text_bias, query, key, value, params.spatial_weight)
    if not torch.compiler.is_compiling():
        dispatch.warn_of_reference(backend, query.device)
    plan = RECENT.get(spec, layout, query.device)
    out, lse = attend(query, key, value, spec, layout, plan, params(), scale, backend, text_bias=text_bias)
    return (out, lse) if return_lse else out


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Values,
    scale: float | None, backend: str, *, text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` without its checks of all but dtypes and `text_bias`, for callers that hold the plan already: output and lse."""
    query, key, value = autocast(query, key, value)
    check_dtypes(query, key, value)
    check_text_bias(text_bias, query, layout)
    if not torch.compiler.is_compiling():
        capture.keep(query.device, plan)  # plans are cached for a while only, and a graph reads this one at every replay
    chosen = _choose(backend, spec, text_bias, query, key, value, params.spatial_weight)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # autocast has done its part: the accumulators, the lse and the learned projection stay in float32 (float64 for float64 inputs)
    with torch.autocast(query.device.type, enabled=False):
        if chosen in ("cpu", "triton"):
            return lowering.attend(query, key, value, spec, layout, plan, params, scale, chosen, text_bias=text_bias)
        wide = torch.promote_types(query.dtype, torch.float32)
        q, k, v = (x.to(wide).flatten(0, 1) for x in (query, key, value))
        bias = None if text_bias is None else text_bias.to(wide).repeat_interleave(query.shape[1], 0)
        dense = xformers_rows.dense_attention if chosen == "xformers" else reference.dense_attention
        out, lse = _attend(q, k, v, bias, spec, layout, plan, params, scale, dense)
        return out.to(query.dtype).unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])


def _choose(backend: str, spec: AttentionSpec, text_bias: Tensor | None, query: Tensor, *others: Tensor | None) -> str:
    """The backend for this call. `others`: all else that keys and values are made of, whose gradients pass through the attention."""
    gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, *others))
    linear = isinstance(spec.rest, Linear)
    return dispatch.choose(
        backend, query.device, query.dtype, query.shape[-1], linear=linear, gradient=gradient, text_bias=text_bias is not None
    )[0]


def start_values(spec: AttentionSpec, query: Tensor) -> AttentionParameters:
    """The spec's parameters at their start values, frozen, beside the query."""
    params = spec.make_parameters(heads=query.shape[1], head_dim=query.shape[3])
    if any(True for _ in params.parameters()):
        capture.refuse(query.device, "the method's parameters are made and copied to the card; hand them over as `params`")
    return params.to(query.device).requires_grad_(False)


def check_inputs(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError unless the three are `[B, H, N, D]` of one dtype and device with N = layout.tokens."""
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"query, key and value have one shape [B, H, N, D], got {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    if query.shape[2] != layout.tokens:
        raise ValueError(f"the layout {layout.grid} with {layout.text} text tokens wants {layout.tokens} tokens, got {query.shape[2]}")
    check_dtypes(query, key, value)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast gives to attention on their device; as they are without autocast and where they are float64."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three have one floating dtype and one device."""
    if not query.is_floating_point() or len({(x.dtype, x.device) for x in (query, key, value)}) > 1:
        raise ValueError(
            "query, key and value share one floating dtype and one device, got "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
        )


def check_text_bias(text_bias: Tensor | None, query: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError unless the bias is `[B, layout.text]`, floating, on the query's device and without a gradient."""
    if text_bias is None:
        return
    wanted = (query.shape[0], layout.text)
    if tuple(text_bias.shape) != wanted:
        raise ValueError(f"text_bias is [batch, text], here {wanted}, got {tuple(text_bias.shape)}")
    if not text_bias.is_floating_point() or text_bias.device != query.device:
        raise ValueError(f"text_bias is floating and on {query.device}, got {text_bias.dtype} on {text_bias.device}")
    if text_bias.requires_grad:
        raise ValueError("text_bias is not differentiated: wanted one that does not require grad, got one that does")


def check_parameters(params: AttentionParameters, spec: AttentionSpec, query: Tensor) -> None:
    """Raise ValueError unless the parameters have the names and shapes of the spec's own, on the query's device."""
    wanted = {k: tuple(v.shape) for k, v in spec.make_parameters(heads=query.shape[1], head_dim=query.shape[3]).named_parameters()}
    got = {k: tuple(v.shape) for k, v in params.named_parameters()}
    if wanted != got:
        raise ValueError(f"{spec} on {query.shape[1]} heads of {query.shape[3]} wants parameters {wanted}, got {got}")
    elsewhere = {str(p.device) for p in params.parameters()} - {str(query.device)}
    if elsewhere:
        raise ValueError(f"the parameters are wanted on {query.device}, got {sorted(elsewhere)}")


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Values,
    scale: float, dense: Dense,
) -> Partial:  # fmt: skip
    """The operator on `[BH, N, D]`, with a bias `[BH, text]` or none: image queries by the spec, text queries dense."""
    text = slice(0, layout.text) if layout.text_first else slice(layout.image, None)
    image = slice(layout.text, None) if layout.text_first else slice(0, layout.image)
    qi, ki, vi = (_permuted(x[:, image], plan.to_memory) for x in (q, k, v))
    text_keys = (k[:, text], v[:, text], *(() if bias is None else (bias,))) if layout.text else None
    out, lse = _attend_image(qi, ki, vi, text_keys, spec, layout, plan, params, scale, dense)
    out, lse = _permuted(out, plan.to_raster), _permuted(lse, plan.to_raster)
    if not layout.text:
        return out, lse
    everything = (k, v) if bias is None else (k, v, F.pad(bias, (0, layout.image) if layout.text_first else (layout.image, 0)))
    rows = dense(q[:, text], *everything, scale=scale)
    parts = [rows, (out, lse)] if layout.text_first else [(out, lse), rows]
    return torch.cat([o for o, _ in parts], 1), torch.cat([x for _, x in parts], 1)


def _permuted(x: Tensor, order: Tensor | None) -> Tensor:
    return x if order is None else x.index_select(1, order)


def _attend_image(
    q: Tensor, k: Tensor, v: Tensor, text_keys: tuple[Tensor, ...] | None, spec: AttentionSpec, layout: TokenLayout, plan: Plan,
    params: Values, scale: float, dense: Dense,
) -> Partial:  # fmt: skip
    blocks = visited_blocks(q, k, spec, plan)
    exact = [
        reference.block_sparse_attention(
            q, k, v, blocks, plan.q_blocks, plan.k_blocks, scale=scale, predicate=plan.predicate, coords=plan.coords
        )
    ]
    if text_keys is not None:
        exact.append(dense(q, *text_keys, scale=scale))
    if spec.rest is None:
        return reference.merge_partials(exact)
    rest = _rest(q, k, v, blocks, spec, layout, plan, params, scale, dense)
    match spec.merge:
        case Mass():
            if params.offset is not None:
                offset = params.offset.to(q.dtype).repeat(q.shape[0] // len(params.offset))
                rest = (rest[0], rest[1] + offset[:, None])
            return reference.merge_partials([*exact, rest])
        case Residual():
            out, lse = reference.merge_partials(exact)
            if params.proj is not None:
                out = out + rest[0] @ params.proj.weight.to(q.dtype).T + params.proj.bias.to(q.dtype)
            return out, lse
        case _:
            raise unknown(spec.merge, "the reference")


def visited_blocks(q: Tensor, k: Tensor, spec: AttentionSpec, plan: Plan) -> BlockMap:
    """The static lists of the spec's patterns and, where it has a TopK, the blocks chosen for this call beside them."""
    top = next((p for p in spec.keep if isinstance(p, TopK)), None)
    if top is None:
        return plan.static  # type: ignore[return-value]
    weight = plan.short_weight.to(q.dtype) if top.correct_short and plan.short_weight is not None else None
    with torch.no_grad():
        q_mean, k_mean = pool_blocks(q, plan.q_blocks)[0], pool_blocks(k, plan.k_blocks)[0]
    chosen = select_blocks(q_mean, k_mean, plan.top, key_weight=weight)
    return chosen if plan.static is None else listed_beside(plan.static, chosen.index)


def _rest(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, spec: AttentionSpec, layout: TokenLayout, plan: Plan,
    params: Values, scale: float, dense: Dense,
) -> Partial:  # fmt: skip
    """The cheap estimate of what the kept blocks leave out, and the log of its mass."""
    match spec.rest:
        case Linear(feature_map, scope):
            phi = reference.FEATURE_MAPS[feature_map]
            if scope == "all":
                return reference.linear_attention(phi(q), phi(k), v)
            return reference.linear_attention_rest(phi(q), phi(k), v, blocks.kept(len(plan.k_blocks.count)), plan.q_blocks, plan.k_blocks)
        case Pooled(log_count, variance, cap):
            k_mean, k_var = pool_blocks(k, plan.k_blocks, variance=variance)
            v_mean, _ = pool_blocks(v, plan.k_blocks)
            log_n = plan.k_blocks.count.to(q.dtype).log() if log_count else None
            kept = blocks.kept(len(plan.k_blocks.count))
            return reference.pooled_attention(q, k_mean, v_mean, k_var, log_n, kept, plan.q_blocks, scale=scale, cap=cap)
        case Downsampled(factor):
            weight = params.spatial_weight
            keys, values = (downsample(x, plan, factor, weight) for x in (k, v))
            return dense(q, keys, values, scale=scale)
        case _:
            raise unknown(spec.rest, "the reference")
