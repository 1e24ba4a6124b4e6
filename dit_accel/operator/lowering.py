"""`attention` by the compiled kernels of the CPU or the GPU: one call for a whole layer's operator, text and image, selection apart."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import BackendError
from dit_accel.kernels import ops
from dit_accel.kernels.arguments import Arguments, SelectionArguments
from dit_accel.kernels.reference import MASKED
from dit_accel.method.parameters import Values
from dit_accel.method.spec import AttentionSpec, Downsampled, Linear, Mass, Pooled, Residual, TopK
from dit_accel.operator.blocks_of_grid import Plan, listed_beside
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import Geometry, Lists


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Values, scale: float,
    implementation: str, *, text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of `[B, H, N, D]`; the arithmetic of `operator`'s reference path, by one of `ops`' implementations."""
    g, in_place = plan.geometry, implementation == "cpu"  # the CPU kernels find a block's tokens where they are
    order, places = (None, g.places) if in_place else (_sequence_order(plan.to_memory, layout), None)
    wide = torch.float32 if query.dtype == torch.float16 and implementation == "cpu" else query.dtype
    q, k, v = (_reordered(x.to(wide), order) for x in (query, key, value))
    lists = _lists(q, k, spec, layout, plan, places, implementation)
    extra_k = extra_v = None
    if isinstance(spec.rest, Downsampled):
        image, in_blocks = _image(layout), None if places is None else plan.to_memory
        extra_k, extra_v = (
            downsample(_reordered(x[:, :, image], in_blocks).float().flatten(0, 1), plan, spec.rest.factor, params.spatial_weight)
            .unflatten(0, q.shape[:2])
            .to(torch.float32 if implementation == "cpu" else q.dtype)
            .contiguous()
            for x in (k, v)
        )
    if text_bias is not None:
        text_bias = text_bias.float().clamp_min(MASKED).contiguous() if layout.text else None
    weight, bias = (None, None) if params.proj is None else (params.proj.weight, params.proj.bias)
    arguments = Arguments(
        q=q, k=k, v=v, lists=lists.index, counts=lists.counts, full=lists.full, q_starts=g.starts_q, k_starts=g.starts_k, coords=g.coords,
        text=layout.text, text_first=layout.text_first, scale=scale, windows=g.windows, reach=g.reach, places_q=places, places_k=places,
        extra_k=extra_k, extra_v=extra_v, offset=_float(params.offset), weight=_float(weight), bias=_float(bias), text_bias=text_bias,
        **_widths(plan), **_method(spec),
    )  # fmt: skip
    out, lse = ops.attention(arguments, implementation)
    back = None if in_place else _sequence_order(plan.to_raster, layout)
    return _reordered(out, back).to(query.dtype), lse if back is None else lse.index_select(2, back)


def _reordered(x: Tensor, order: Tensor | None) -> Tensor:
    """Tokens of `[B, H, N, D]` in another order; where the heads of a token follow each other in memory they go on doing so.

    Whole tokens are copied then, and what a processor makes of the output, one row per token, is no further copy.
    """
    if order is None:
        return x
    return x.transpose(1, 2).index_select(1, order).transpose(1, 2) if x.stride(1) < x.stride(2) else x.index_select(2, order)


def _image(layout: TokenLayout) -> slice:
    return slice(layout.text, None) if layout.text_first else slice(0, layout.image)


def _float(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _sequence_order(order: Tensor | None, layout: TokenLayout) -> Tensor | None:
    """A permutation of the image's tokens as one of the sequence."""
    if order is None or not layout.text:
        return order
    text = torch.arange(layout.text, device=order.device)
    return torch.cat([text, order + layout.text] if layout.text_first else [order, text + layout.image])


def _method(spec: AttentionSpec) -> dict[str, Any]:
    """The rest and the merge as `Arguments` names them. Raises BackendError at one that the kernels have no code for."""
    match spec.rest:
        case Pooled(log_count, variance, cap):
            given: dict[str, Any] = {"rest": "pooled", "log_count": log_count, "variance": variance, "cap": cap}
        case Linear(feature_map, scope):
            given = {"rest": "linear", "feature_map": feature_map, "linear_all": scope == "all"}
        case Downsampled() | None:  # down-sampled keys are computed before and given as further keys
            given = {}
        case _:
            raise _not_compiled(spec.rest)
    match spec.merge:
        case Residual():
            return {**given, "residual": True}
        case Mass() | None:
            return given
        case _:
            raise _not_compiled(spec.merge)


def _not_compiled(slot: object) -> BackendError:
    return BackendError(f"the compiled kernels do not support {type(slot).__name__}, got {slot!r}: use backend='reference'")


def _widths(plan: Plan) -> dict[str, Any]:
    return {"q_width": plan.q_blocks.index.shape[1], "k_width": plan.k_blocks.index.shape[1]}


def _lists(q: Tensor, k: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, places: Tensor | None, implementation: str) -> Lists:
    """The static lists, or the blocks chosen for this call, or both."""
    g: Geometry = plan.geometry
    top = next((p for p in spec.keep if isinstance(p, TopK)), None)
    if top is None:
        return g.lists  # type: ignore[return-value]
    image = _image(layout)
    arguments = SelectionArguments(
        q=q[:, :, image].detach(), k=k[:, :, image].detach(), q_starts=g.starts_q, k_starts=g.starts_k, top=plan.top,
        weight=plan.short_weight if top.correct_short else None, places_q=places, places_k=places, **_widths(plan),
    )  # fmt: skip
    chosen = ops.select_blocks(arguments, implementation)
    if plan.static is None:
        return Lists.of_chosen(chosen)
    return Lists.from_map(listed_beside(plan.static, chosen.long()))


def downsample(x: Tensor, plan: Plan, factor: int, weight: Tensor | None) -> Tensor:
    """Weighted sums `[BH, M, D]` of the factor × factor patches of image tokens `[BH, N, D]` in the plan's order (CLEAR's pooled keys).

    A patch cut off by the border is scaled by factor² over its number of tokens, so that weights of 1/factor² average it.
    """
    if plan.cells is None or plan.patch_tokens is None:
        raise ValueError("the plan is not one of a spec with down-sampled keys")
    w = torch.full((factor, factor), 1 / factor**2, device=x.device) if weight is None else weight
    # each token goes to a cell of its own and each sum has one order: the same to the bit each time, on a GPU too, backward as forward
    cells = x.new_zeros(x.shape[0], len(plan.patch_tokens) * factor**2, x.shape[2]).index_copy(1, plan.cells, x)
    scaled = w.to(x.dtype).flatten() * (factor**2 / plan.patch_tokens.to(x.dtype))[:, None]  # [M, factor²]
    return (cells.unflatten(1, scaled.shape) * scaled[..., None]).sum(2)
