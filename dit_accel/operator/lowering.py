"""What the compiled kernels of the CPU and the GPU do of a spec: the exact part of any, and all of a layer's operator where they know it.

The one place, besides `method`, that tells parts apart by their type: a part that is not known here runs in torch (`composition`).
"""

import functools
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import dispatch, ops
from dit_accel.kernels.arguments import Arguments, MixtureArguments, Summaries, SummaryArguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.grouping import GroupingArguments
from dit_accel.kernels.precision import get_query_key_products
from dit_accel.kernels.reference import MASKED
from dit_accel.method.parameters import Values
from dit_accel.method.parts import (
    Downsampled,
    ErrorProduct,
    Linear,
    Mass,
    MeanProduct,
    Merge,
    Part,
    Pooled,
    Residual,
    Score,
    TopK,
)
from dit_accel.method.parts.call import Far, FarBlocks, FarKeys, FarSums
from dit_accel.method.parts.content import weights_of
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, with_chosen
from dit_accel.operator.layout import Layouts, TokenLayout
from dit_accel.operator.lists import Lists

COMPILED = ("cpu", "triton")
FUSED = (Linear, Pooled, Downsampled, Residual, Mass)  # by their exact type: one derived from them may compute something else


def fuses(spec: AttentionSpec) -> bool:
    """Whether the kernels know the rest and the merge: then one call is a layer's whole operator, once its blocks are chosen."""
    rest = _finer(spec)
    if rest is not None and rest.opened is not None:
        score = _score(spec)  # blocks are summarised once, for the choice and for what is opened
        if isinstance(score, ErrorProduct) and score.cap != rest.cap:
            return False
    if type(spec.rest) is Linear and not spec.rest.plain:
        return False
    if isinstance(spec.merge, Mass) and spec.merge.offset == "query":
        return False
    return all(part is None or type(part) in FUSED for part in (spec.rest, spec.merge))


def selects(spec: AttentionSpec) -> bool:
    """Whether the kernels choose the spec's blocks, if any are chosen."""
    return spec.selection is None or type(_score(spec)) in (MeanProduct, ErrorProduct)


def _score(spec: AttentionSpec) -> Score | None:
    """The score of the one selection that kernels know."""
    return spec.selection.score if type(spec.selection) is TopK else None


def _finer(spec: AttentionSpec) -> Pooled | None:
    """The rest where its pooled keys are not those that the kernels pool themselves."""
    return spec.rest if type(spec.rest) is Pooled and not spec.rest.plain else None


def _grouped_rest(spec: AttentionSpec) -> bool:
    """Whether the kernels do a rest of blocks in groups."""
    rest = _finer(spec)
    return rest is not None and rest.opened is not None and fuses(spec)


def in_torch(spec: AttentionSpec) -> list[Part]:
    """The parts that run in torch where the compiled kernels run the exact part."""
    rest = () if fuses(spec) else (spec.rest, spec.merge)
    found: list[Part | None] = [None if selects(spec) else spec.selection, *rest, *spec.extras]
    return [part for part in found if part is not None]


@functools.lru_cache(maxsize=256)  # asked at every call
def compiles(spec: AttentionSpec) -> bool:
    """Whether compiled kernels do all of a spec, but for some of torch's operators between them."""
    return selects(spec) and fuses(spec) and not spec.extras


def has_states(spec: AttentionSpec) -> bool:
    """Whether the kernels hold the states of a linear rest, which limits the size of a head."""
    return type(spec.rest) is Linear and fuses(spec)


def exact(
    query: Tensor, key: Tensor, value: Tensor, layouts: Layouts, plan: Plan, lists: Lists, scale: float, implementation: str,
    text_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and lse of queries `[B, H, Nq, D]`: of the image's queries over their blocks and the text, of the text's over everything."""
    return attend(query, key, value, layouts, plan, lists, scale, implementation, text_bias, {})


def attend(
    query: Tensor, key: Tensor, value: Tensor, layouts: Layouts, plan: Plan, lists: Lists, scale: float, implementation: str,
    text_bias: Tensor | None, rest: dict[str, Any],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same with the rest of a spec that `fuses`, as `rest_of` says it."""
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
        text_bias=text_bias, bits=lists.bits if rest.get("rest") == "pooled" else None, **_widths(plan), **tables, **rest,
    )  # fmt: skip
    if get_query_key_products() == "int8" and implementation == "triton":
        arguments = arguments._replace(int8=_in_8_bits(arguments))
    out, lse = ops.attention(arguments, implementation)
    return out.to(query.dtype), lse


def _in_8_bits(a: Arguments) -> bool:
    """Whether the kernels may round queries and keys to 8 bits: gradients are of what is not rounded."""
    gradient = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in a)
    return not gradient and dispatch.int8_refusal(a.q.device, a.q.dtype, a.q.shape[3]) is None


def rest_of(
    key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, params: Values, scale: float, lists: Lists,
    made: Summaries | None, chosen: dict[str, Tensor], implementation: str,
) -> dict[str, Any]:  # fmt: skip
    """The rest and the merge of a spec that `fuses`, as `Arguments` names them; further keys `[BH, M, D]`.

    `made`: the blocks' `summaries`, where its pooled keys are of them; `chosen`: what the choice made, see `lists`.
    """
    found: dict[str, Any] = {}
    finer = _finer(spec)
    # no pattern tells them apart: what is calculated from a number is never the constant False for torch.compile, and no pattern would fit
    if finer is not None and made is None:
        raise ValueError("pooled keys of this kind are made of the blocks' summaries: give those of `summaries`")
    match spec.rest:
        case Pooled(opened=opened) if finer and made:
            given = (lists, scale, key.dtype.itemsize == 2, implementation)
            found = _given(made, finer, *given) if opened is None else _grouped(made, finer, opened, plan, *given)
        case Pooled(log_count, variance, cap):
            found = {"rest": "pooled", "log_count": log_count, "variance": variance, "cap": cap} | chosen
        case Linear() as linear:
            found = _linear(linear) | chosen
        case Downsampled():
            for name, x in (("extra_k", key), ("extra_v", value)):
                found[name] = spec.rest.keys_of(x[:, :, layouts.k.image_slice].float().flatten(0, 1), plan.prepared, params)
    return found | _merge(spec.merge, params)


def rest_of_far(spec: AttentionSpec, far: Far, heads: int, params: Values) -> dict[str, Any]:
    """The same of a spec that `fuses`, where some of the keys are known as `far` alone."""
    match spec.rest, far:
        case (Pooled() as pooled, FarBlocks() as blocks) if pooled.plain:
            found = _far_blocks(pooled, blocks, heads)
        case (Linear() as linear, FarSums(sums)):
            states = torch.cat([sums[..., :-1], sums[..., -1:].mT], -2).float()  # below the matrix the sums of the features
            found = _linear(linear) | {"far_states": states.unflatten(0, (-1, heads)).contiguous()}
        case (Downsampled(), FarKeys(key, value)):
            found = {"extra_k": key.float(), "extra_v": value.float()}
        case _:
            raise ValueError(f"{spec.rest} can't be computed of {type(far).__name__}: call it with all keys and values")
    return found | _merge(spec.merge, params)


def _linear(rest: Linear) -> dict[str, Any]:
    return {"rest": "linear", "feature_map": rest.feature_map, "linear_all": rest.scope == "all"}


def _far_blocks(rest: Pooled, far: FarBlocks, heads: int) -> dict[str, Any]:
    moments = far.moments
    bias = moments.tokens.float().log() if rest.log_count else torch.zeros_like(moments.tokens, dtype=torch.float32)
    given = {"pooled_k": moments.key, "pooled_v": moments.value, "pooled_bias": bias.expand(len(moments.key), -1)}
    if rest.variance:
        given["pooled_var"] = moments.variance
    found: dict[str, Any] = {name: x.float().unflatten(0, (-1, heads)).contiguous() for name, x in given.items()}
    return found | {"rest": "pooled", "variance": rest.variance, "cap": rest.cap, "pool_slots": far.slots}


def _merge(merge: Merge | None, params: Values) -> dict[str, Any]:
    match merge:
        case Residual():
            return {"residual": True} | {name: params[f"proj.{name}"].float().contiguous() for name in ("weight", "bias")}
        case Mass(offset=True):
            return {"offset": params["offset"].float().contiguous()}
    return {}


def summaries(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, scale: float, implementation: str
) -> Summaries | None:
    """What the kernels make of whole blocks for a finer rest, and the choice of blocks then takes too; None for any other rest.

    Of the key blocks; of a rest in groups, of the slots of level 0 (`groups.group_blocks`).
    """
    rest, score = _finer(spec) if fuses(spec) else None, _score(spec)
    if rest is None:
        return None
    q, k, v = (_widened(x, implementation) for x in (query, key, value))
    g = plan.geometry
    cap = score.cap if isinstance(score, ErrorProduct) else rest.cap
    arguments = SummaryArguments(
        q=q, k=k, v=v, q_starts=g.starts_q, k_starts=g.starts_k, parts=rest.parts, text=layouts.k.text, text_q=layouts.q.text,
        text_first=layouts.text_first, scale=scale, cap=rest.cap if rest.variance else 0.0, score_cap=cap, log_count=rest.log_count,
        first_order=bool(rest.order), places_q=g.places_q, places_k=g.places_k, **_widths(plan),
    )  # fmt: skip
    if _grouped_rest(spec):
        arguments = arguments._replace(k_starts=plan.prepared["far_starts"].int(), places_k=plan.prepared["far_order"].int())
    return ops.summarize_blocks(arguments, implementation)


def _given(made: Summaries, rest: Pooled, lists: Lists, scale: float, narrow: bool, implementation: str) -> dict[str, Any]:
    """The pooled keys, and the slopes of the query blocks, as `Arguments` names them; `narrow`: whether the tokens have 16 bits."""
    found = {"rest": "pooled", "pooled_k": made.pooled_k, "pooled_v": made.pooled_v, "pooled_bias": made.pooled_bias}
    if rest.order:
        heads, seen = made.q_mean.shape[:2], (~lists.kept(made.slope.shape[3])).to(made.q_mean.dtype)
        means, key, bias = (x.flatten(0, 1) for x in (made.q_mean, made.pooled_k, made.pooled_bias))
        weights = weights_of(means, key, bias, seen, rest.parts, scale).unflatten(0, heads).contiguous()
        found["slopes"] = ops.mix_slopes(MixtureArguments(weights, made.slope, narrow), implementation)
    return found


def _grouped(
    made: Summaries, rest: Pooled, opened: int, plan: Plan, lists: Lists, scale: float, narrow: bool, implementation: str
) -> dict[str, Any]:  # fmt: skip
    """The same of the units of all levels, and the lists of what the query blocks see of them."""
    place = plan.prepared["far_slot"].int()
    found = ops.group_units(
        GroupingArguments(
            q_mean=made.q_mean, pooled_k=made.pooled_k, pooled_v=made.pooled_v, slope=made.slope if rest.order else None,
            second=made.second, metric=made.metric if rest.parts > 1 else None, tokens=made.tokens, spread=made.spread,
            v_spread=made.v_spread, lists=lists.index, counts=lists.counts, place=place, q_starts=plan.geometry.starts_q,
            parts=rest.parts, roots=len(plan.prepared["far_roots"]), opened=opened, scale=scale, cap=rest.most, score_cap=rest.cap,
            log_count=rest.log_count, narrow=narrow,
        ),
        implementation,
    )  # fmt: skip
    slopes = {"slopes": found.slopes} if rest.order else {}
    return slopes | {
        "rest": "pooled", "pooled_k": found.joined_k, "pooled_v": found.joined_v, "pooled_bias": found.joined_bias,
        "pool_lists": found.pool_lists, "pool_counts": found.pool_counts, "pool_slots": place, "pool_parts": rest.parts,
    }  # fmt: skip


def _image_of(x: Tensor, layout: TokenLayout) -> Tensor:
    """The image's tokens without a gradient, in no more steps than that takes: each is some microseconds of every call."""
    if x.requires_grad:
        x = x.detach()
    return x[:, :, layout.image_slice] if layout.text else x


def _widened(x: Tensor, implementation: str) -> Tensor:
    """As the kernels take it: those of the CPU know no float16."""
    return x.float() if x.dtype == torch.float16 and implementation == "cpu" else x


def _widths(plan: Plan) -> dict[str, Any]:
    return {"q_width": plan.q_blocks.index.shape[1], "k_width": plan.k_blocks.index.shape[1]}


def lists(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, params: Values, scale: float,
    implementation: str, made: Summaries | None,
) -> tuple[Lists, dict[str, Tensor]]:  # fmt: skip
    """The static lists, or the blocks that the kernels choose for this call, or both, of a spec whose blocks the kernels can choose; and
    what choosing made for the rest as well, as `Arguments` names it.

    `made`: the blocks' `summaries`, where there are some.
    """
    g = plan.geometry
    if spec.selection is None:
        return g.lists, {}  # type: ignore[return-value]
    weight, score = plan.prepared.get("short_weight"), _score(spec)
    if made is None:
        q, k = (_widened(_image_of(x, layout), implementation) for x, layout in zip((query, key), layouts, strict=True))
        further: dict[str, Any] = {}
        if isinstance(score, ErrorProduct):
            v = _widened(_image_of(value, layouts.k), implementation)
            further = {"v": v, "scale": scale, "score_cap": score.cap, "pooled": fuses(spec) and type(spec.rest) is Pooled}
        elif implementation == "triton" and _chooses_states(spec, plan):
            further = {"v": _image_of(value, layouts.k), "states": True, "feature_map": spec.rest.feature_map}  # type: ignore[union-attr]
            if isinstance(spec.merge, Residual):
                learned = params["proj.weight"]
                further["projection"] = (learned.detach() if torch.is_grad_enabled() else learned).float().contiguous()
        arguments = SelectionArguments(
            q=q, k=k, q_starts=g.starts_q, k_starts=g.starts_k, top=plan.top, weight=weight, places_q=g.places_q, places_k=g.places_k,
            **further, **_widths(plan),
        )  # fmt: skip
    else:  # means of blocks, each a block of one token
        starts = [torch.arange(len(x), dtype=torch.int32, device=x.device) for x in (g.starts_q, g.starts_k)]
        k_mean, bias = made.k_mean.detach(), made.score_bias.detach() / scale
        if _grouped_rest(spec):  # they are of slots
            k_mean, bias = (x.index_select(2, plan.prepared["far_slot"]) for x in (k_mean, bias))
        arguments = SelectionArguments(
            q=made.q_mean.detach(), k=k_mean, q_starts=starts[0], k_starts=starts[1], q_width=1, k_width=1, top=plan.top,
            weight=weight, bias=bias if isinstance(score, ErrorProduct) else None,
        )  # fmt: skip
    chosen = ops.select_blocks(arguments, implementation)
    made_too = {name: getattr(chosen, name) for name in ("means", "states", "totals", "mapped")}
    found = {name: x for name, x in made_too.items() if x.numel()}
    return Lists.of_chosen(chosen) if plan.static is None else Lists.from_map(with_chosen(plan.static, chosen.lists.long())), found


def _chooses_states(spec: AttentionSpec, plan: Plan) -> bool:
    """Whether choosing makes a linear rest's states too: not those of all keys, and none where the kernels sum what is left by itself."""
    linear = spec.rest if type(spec.rest) is Linear and fuses(spec) else None
    return linear is not None and linear.scope != "all" and plan.static is None and 2 * plan.top <= len(plan.geometry.starts_k) - 1
