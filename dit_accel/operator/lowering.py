"""What the compiled kernels of the CPU and the GPU do of a spec: the exact part of any, and all of a layer's operator where they know it.

The one place, besides `method`, that tells parts apart by their type: a part that is not known here runs in torch (`composition`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import Arguments, SelectionArguments
from dit_accel.kernels.reference import MASKED
from dit_accel.method.parameters import Values
from dit_accel.method.parts import Call, Downsampled, Linear, Mass, MeanProduct, Merge, Part, Pooled, Residual, TopK
from dit_accel.method.parts.content import slopes_of_queries
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, listed_beside
from dit_accel.operator.layout import Layouts
from dit_accel.operator.lists import Lists

COMPILED = ("cpu", "triton")
FUSED = (Linear, Pooled, Downsampled, Residual, Mass)  # by their exact type: one derived from them may compute something else


def fuses(spec: AttentionSpec) -> bool:
    """Whether the kernels know the rest and the merge: then one call is a layer's whole operator, once its blocks are chosen."""
    return all(part is None or type(part) in FUSED for part in (spec.rest, spec.merge))


def selects(spec: AttentionSpec) -> bool:
    """Whether the kernels choose the spec's blocks, if any are chosen."""
    chosen = spec.selection
    return chosen is None or (type(chosen) is TopK and type(chosen.score) is MeanProduct)


def in_torch(spec: AttentionSpec) -> list[Part]:
    """The parts that run in torch where the compiled kernels run the exact part."""
    rest = () if fuses(spec) else (spec.rest, spec.merge)
    found: list[Part | None] = [None if selects(spec) else spec.selection, *rest]
    return [part for part in found if part is not None]


def has_states(spec: AttentionSpec) -> bool:
    """Whether the kernels hold the states of a linear rest, which limits the size of a head."""
    return type(spec.rest) is Linear and type(spec.merge) in FUSED


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, lists: Lists, params: Values,
    scale: float, implementation: str, text_bias: Tensor | None, call: Callable[[], Call],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of queries `[B, H, Nq, D]` for a spec whose rest and merge the kernels know. `call`: makes what parts are given."""
    if type(spec.rest) is Pooled and not spec.rest.plain:
        rest = _summaries(spec.rest, spec.merge, dataclasses.replace(call(), visited=lists), params)
    else:
        rest = _rest(key, value, spec, layouts, plan, params)
    return _run(query, key, value, layouts, plan, lists, scale, implementation, text_bias, rest)


def exact(
    query: Tensor, key: Tensor, value: Tensor, layouts: Layouts, plan: Plan, lists: Lists, scale: float, implementation: str,
    text_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of queries `[B, H, Nq, D]`: of the image's queries over their blocks and the text, of the text's over everything."""
    return _run(query, key, value, layouts, plan, lists, scale, implementation, text_bias, {})


def _run(
    query: Tensor, key: Tensor, value: Tensor, layouts: Layouts, plan: Plan, lists: Lists, scale: float, implementation: str,
    text_bias: Tensor | None, rest: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One call of the kernels; `rest`: further arguments by name."""
    g = plan.geometry
    q, k, v = (_widened(x, implementation) for x in (query, key, value))
    if text_bias is not None:
        text_bias = text_bias.float().clamp_min(MASKED).contiguous() if layouts.k.text else None
    for name in rest.keys() & {"extra_k", "extra_v"}:
        rest[name] = rest[name].unflatten(0, q.shape[:2]).to(torch.float32 if implementation == "cpu" else q.dtype).contiguous()
    # where there are neither windows nor masks, no block is kept in part
    tables: dict[str, Any] = {"windows": g.windows, "residues": g.residues}
    if g.masks is not None:
        tables = {"masks": g.masks, "masks_t": g.masks_t, "mask_of": lists.mask_of}
    arguments = Arguments(
        q=q, k=k, v=v, lists=lists.index, counts=lists.counts, full=lists.full, q_starts=g.starts_q, k_starts=g.starts_k, coords=g.coords,
        text=layouts.k.text, text_q=layouts.q.text, text_first=layouts.text_first, scale=scale, places_q=g.places_q, places_k=g.places_k,
        text_bias=text_bias, **_widths(plan), **tables, **rest,
    )  # fmt: skip
    out, lse = ops.attention(arguments, implementation)
    return out.to(query.dtype), lse


def _rest(key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, params: Values) -> dict[str, Any]:
    """The rest and the merge of a spec that `fuses`, as `Arguments` names them; further keys `[BH, M, D]`."""
    found: dict[str, Any] = {}
    match spec.rest:
        case Pooled(log_count, variance, cap):
            found = {"rest": "pooled", "log_count": log_count, "variance": variance, "cap": cap}
        case Linear(feature_map, scope):
            found = {"rest": "linear", "feature_map": feature_map, "linear_all": scope == "all"}
        case Downsampled():
            for name, x in (("extra_k", key), ("extra_v", value)):
                found[name] = spec.rest.pooled(x[:, :, layouts.k.image_slice].float().flatten(0, 1), plan.prepared, params)
    return found | _merge(spec.merge, params)


def _merge(merge: Merge | None, params: Values) -> dict[str, Any]:
    match merge:
        case Residual():
            return {"residual": True} | {name: params[f"proj.{name}"].float().contiguous() for name in ("weight", "bias")}
        case Mass(offset=True):
            return {"offset": params["offset"].float().contiguous()}
    return {}


def _summaries(rest: Pooled, merge: Merge | None, call: Call, params: Values) -> dict[str, Any]:
    """A rest of pooled keys that are made in torch: the keys, and the slopes of the query blocks, as `Arguments` names them."""
    pooled = rest.pooled(call)
    found = {"pooled_k": pooled.key, "pooled_v": pooled.value, "pooled_bias": pooled.bias}
    if rest.order:
        found["slopes"] = slopes_of_queries(call, pooled, rest.parts)
    given = {name: x.float().unflatten(0, (-1, call.heads)).contiguous() for name, x in found.items()}
    return {"rest": "pooled"} | given | _merge(merge, params)


def _widened(x: Tensor, implementation: str) -> Tensor:
    """As the kernels take it: those of the CPU know no float16."""
    return x.float() if x.dtype == torch.float16 and implementation == "cpu" else x


def _widths(plan: Plan) -> dict[str, Any]:
    return {"q_width": plan.q_blocks.index.shape[1], "k_width": plan.k_blocks.index.shape[1]}


def lists(query: Tensor, key: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, implementation: str) -> Lists:
    """The static lists, or the blocks that the kernels choose for this call, or both, of a spec whose blocks the kernels can choose."""
    g = plan.geometry
    if spec.selection is None:
        return g.lists  # type: ignore[return-value]
    q, k = (_widened(x[:, :, layout.image_slice].detach(), implementation) for x, layout in zip((query, key), layouts, strict=True))
    arguments = SelectionArguments(
        q=q, k=k, q_starts=g.starts_q, k_starts=g.starts_k, top=plan.top, weight=plan.prepared.get("short_weight"),
        places_q=g.places_q, places_k=g.places_k, **_widths(plan),
    )  # fmt: skip
    chosen = ops.select_blocks(arguments, implementation)
    return Lists.of_chosen(chosen) if plan.static is None else Lists.from_map(listed_beside(plan.static, chosen.long()))
