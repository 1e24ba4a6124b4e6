"""Key blocks in groups of four, these in larger groups, and what of them a query sees in the place of what is not kept.

A query block near to a group, or one whose weights on it are large, sees its members; one far from it sees the group. So the number of
pooled keys for each query hardly grows with the number of tokens. Relatives, and what was measured: docs/methods.md.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.grouping import MEMBERS
from dit_accel.kernels.splitting import split
from dit_accel.method.parts.call import Call, Ground
from dit_accel.method.parts.content import Moments, PooledKeys, damping, error_of, error_score, metric_of, spread_of, weights_of

Divide = Callable[[Tensor, Tensor, Tensor | None, int], Tensor]


class Listed(NamedTuple):
    """What the query blocks see, by level from the key blocks up; units are counted by their slots (`group_blocks`).

    `units`: `[BH, spans, slots]` of each level: whether the span sees the unit; a key block also where some of its query blocks keep it.
    `kept` `[BH, spans, SPAN, slots]`: which key blocks each query block keeps. All bool. `blocks` `[spans]`: the query blocks of each span.
    """

    units: list[Tensor]
    kept: Tensor
    blocks: Tensor


def group_blocks(ground: Ground, least: int) -> dict[str, Tensor]:
    """The key blocks in groups of up to four neighbours, those in groups of four, and so on while at least `least` groups are left.

    Level 0 is the key blocks. A unit of a level has a slot, and the slots 4s to 4s + 3 of the level below belong to slot s; those that are
    not needed are empty. `far_slot` `[T]`: the slot of each key block. `far_order` `[N]`: the image's tokens, so that each unit of each
    level is a run of them. `far_starts` `[slots + 1]`: where the run of each slot of level 0 starts; every fourth entry: of level 1.
    `far_roots` `[R]`: the number of tokens of each slot of the last level.
    """
    places = _places(ground)
    parents: list[Tensor] = []
    while True:
        above, parent = _halved_twice(places).unique(dim=0, return_inverse=True)
        if len(above) < least or len(above) == len(places):
            break
        parents.append(parent)
        places = above
    slot, slots = torch.arange(len(places)), -(-len(places) // MEMBERS) * MEMBERS
    for parent in reversed(parents):
        slot, slots = MEMBERS * slot[parent] + _ranks(parent), MEMBERS * slots
    blocks = ground.k_blocks
    counts = torch.zeros(slots, dtype=torch.int64).index_copy(0, slot, blocks.count)
    by_slot = slot.argsort()
    return {
        "far_slot": slot,
        "far_order": blocks.index[by_slot][blocks.valid[by_slot]],
        "far_starts": F.pad(counts.cumsum(0), (1, 0)),
        "far_roots": counts.unflatten(0, (-1, MEMBERS ** len(parents))).sum(1),
    }


def _places(ground: Ground) -> Tensor:
    """Of each key block its image and its place on the grid of blocks, `[T, 4]`; blocks that are no grid are in a row."""
    corners = ground.coords[ground.k_blocks.index].amin(1)
    places = torch.zeros_like(corners)
    places[:, 0] = corners[:, 3]
    for image in range(len(ground.grids)):
        mine = corners[:, 3] == image
        axes = [corners[mine, axis].unique(return_inverse=True) for axis in range(3)]
        count = int(mine.sum())
        regular = len(axes[0][0]) * len(axes[1][0]) * len(axes[2][0]) == count
        places[mine, 1:] = torch.stack([place for _, place in axes], 1) if regular else F.pad(torch.arange(count)[:, None], (2, 0))
    return places


def _halved_twice(places: Tensor) -> Tensor:
    """The places of the groups that units belong to: of each image the longest axis is halved, and again the longest."""
    places = places.clone()
    for image in places[:, 0].unique():
        mine = places[:, 0] == image
        for _ in range(2):
            axis = 1 + int(places[mine, 1:].amax(0).argmax())
            places[mine, axis] //= 2
    return places


def _ranks(parent: Tensor) -> Tensor:
    """Which of its parent's children each unit is."""
    order = parent.argsort(stable=True)
    first = F.pad(parent.bincount().cumsum(0), (1, 0))
    ranks = torch.empty_like(parent)
    ranks[order] = torch.arange(len(parent)) - first[parent[order]]
    return ranks


def key_slots(call: Call) -> Call:
    """The call with the slots of level 0 in the place of its key blocks."""
    runs = Blocks.from_starts(call.prepared["far_starts"]).among(call.prepared["far_order"])
    return dataclasses.replace(call, k_blocks=runs, visited=None)


class Queries(NamedTuple):
    """What the summaries take from a head's queries: E[q²] `[BH, D]`, E[q qᵀ] `[BH, D, D]` (None: nothing is split), and the scale s."""

    second: Tensor
    metric: Tensor | None
    scale: float

    @classmethod
    def of(cls, call: Call, parts: int) -> "Queries":
        return cls(call.q.square().mean(1), metric_of(call.q.detach()) if parts > 1 else None, call.scale)


def merged(each: Moments, part: Tensor, parts: int, queries: Queries) -> Moments:
    """The moments of `parts` new parts of each unit, from those of its elements `[BH, T, n]`, which go to `part` `[BH, T, n]`.

    Means, counts and spreads are those of all tokens together. `slope`: of what lies between the elements alone, Σ_P (n_P / n) / (1 + σ²_P)
    · Cov_P of their means: what lies within them is damped as they are (`slopes_of_spans` adds it).
    """
    member = part[:, :, None] == torch.arange(parts, device=part.device)[:, None]  # [BH, T, parts, n]
    weight = torch.where(member, each.tokens[:, :, None], 0)
    count = weight.sum(-1)
    share, member = weight / count.clamp_min(1)[..., None], member.to(weight.dtype)
    key, value = share @ each.key, share @ each.value
    filled = (each.tokens > 0).to(weight.dtype)[..., None]
    k_off, v_off = ((x - member.mT @ mean) * filled for x, mean in ((each.key, key), (each.value, value)))
    spread = (share @ (each.spread + spread_of(k_off.square(), queries.second, queries.scale))[..., None])[..., 0]
    v_spread = (share @ (each.v_spread + v_off.square().sum(-1))[..., None])[..., 0]
    slope = None
    if each.slope is not None:
        damped = (member.mT @ damping(spread)[..., None])[..., 0] * each.tokens / count.sum(-1, keepdim=True).clamp_min(1)
        slope = k_off.mT @ (v_off * damped[..., None])
    return Moments(key, value, count, spread, v_spread, slope)


def group_moments(below: Moments, parts: int, queries: Queries, divide: Divide) -> Moments:
    """The moments of groups of MEMBERS units, whose parts are the members' own, split by content anew. No gradient through the split."""
    each = Moments(*(None if x is None else x.unflatten(1, (-1, MEMBERS)) for x in below))  # type: ignore[arg-type]
    each = each._replace(**{name: getattr(each, name).flatten(2, 3) for name in ("key", "value", "tokens", "spread", "v_spread")})
    with torch.no_grad():
        part = divide(each.key, each.tokens, queries.metric, parts)
    return merged(each, part, parts, queries)


def moments_by_level(lowest: Moments, roots: int, parts: int, queries: Queries, divide: Divide = split) -> list[Moments]:
    """The moments of all levels' units, from the slots of level 0 up to the level of so many `roots`. `divide`: `split`, or a kernel's."""
    found = [lowest]
    while found[-1].tokens.shape[1] > roots:
        found.append(group_moments(found[-1], parts, queries, divide))
    return found


def spans_of(kept: Tensor) -> Tensor:
    """`[..., Tq, n]` of query blocks as `[..., spans, SPAN, n]`; the last span is filled up with zeros."""
    return F.pad(kept, (0, 0, 0, -kept.shape[-2] % SPAN)).unflatten(-2, (-1, SPAN))


def span_means(means: Tensor, blocks: Blocks) -> Tensor:
    """The mean query `[..., spans, D]` of each span, of those of the query blocks `[..., Tq, D]`."""
    count = blocks.count.to(means.dtype)[:, None]
    return spans_of(means * count).sum(-2) / spans_of(count).sum(-2)


def scores_of(means: Tensor, above: list[Moments], cap: float, queries: Queries) -> list[Tensor]:
    """The score of the error `[BH, spans, slots]` of the units of the levels `above` the key blocks, for the spans' mean queries `means`.

    No gradient.
    """
    found = []
    with torch.no_grad():
        for level in above:
            whole = merged(level._replace(slope=None), torch.zeros_like(level.tokens, dtype=torch.int64), 1, queries)
            bias = error_of(whole.tokens, whole.spread, whole.v_spread, cap)[..., 0]
            found.append(error_score(means.detach(), whole.key[:, :, 0], bias, queries.scale))
    return found


def listed(kept: Tensor, scores: list[Tensor], prepared: Mapping[str, Tensor], opened: int) -> Listed:
    """What each span of query blocks sees of the levels' units; without a gradient.

    `kept` `[BH, Tq, Tk]`: the key blocks that each query block keeps. From the last level down a unit is opened, that is, its members are
    seen in its place, if some block of the span keeps one of its key blocks, or if it is among the `opened` of its level with the largest
    score (`scores_of`, of the levels above the key blocks).
    """
    with torch.no_grad():
        blocks = spans_of(torch.ones(kept.shape[-2], 1, dtype=torch.int64, device=kept.device)).sum((-1, -2))
        kept, starts = spans_of(kept), prepared["far_starts"]
        kept = kept.new_zeros(*kept.shape[:-1], len(starts) - 1).index_copy(-1, prepared["far_slot"], kept)
        holds = [kept.any(-2)]  # a key block that is kept
        for _ in scores:
            holds.append(holds[-1].unflatten(-1, (-1, MEMBERS)).any(-1))
        filled = [starts[:: MEMBERS**level].diff() > 0 for level in range(len(scores) + 1)]
        candidates = filled[-1].expand(holds[-1].shape)
        seen: list[Tensor] = []
        for level in range(len(scores), 0, -1):
            score, held = scores[level - 1].masked_fill(~candidates, -torch.inf), holds[level]
            best = score.topk(min(opened, score.shape[-1]), dim=-1).indices
            open_ = (torch.zeros_like(held).scatter_(-1, best, True) & candidates) | held
            seen.insert(0, candidates & ~open_)
            candidates = open_.repeat_interleave(MEMBERS, -1) & filled[level - 1]
        return Listed([candidates, *seen], kept, blocks)


def hidden(found: Listed, parts: int, query_blocks: int) -> Tensor:
    """`[BH, Tq, P]`: the pooled keys, `parts` for each unit of all levels, that a query block does not see."""
    lowest = found.units[0][..., None, :] & ~found.kept  # [BH, spans, SPAN, slots]
    seen = torch.cat([lowest, *(units[..., None, :].expand(*lowest.shape[:-1], -1) for units in found.units[1:])], -1)
    return ~seen.flatten(1, 2)[:, :query_blocks].repeat_interleave(parts, -1)


def unit_lists(found: Listed) -> tuple[Tensor, Tensor]:
    """The units that each span sees, counted through all levels, ascending: `[BH, spans, n]`, and how many `[BH, spans]`; int32."""
    seen = torch.cat(found.units, -1)
    counts = seen.sum(-1, dtype=torch.int32)
    most = seen.shape[-1] if seen.is_cuda else max(1, int(counts.max()))  # nothing waits for a GPU
    return seen.byte().argsort(dim=-1, descending=True, stable=True)[..., :most].int(), counts


def joined(pooled: list[PooledKeys]) -> PooledKeys:
    """The pooled keys of all levels, without slopes."""
    key, value, bias = (torch.cat(tensors, 1) for tensors in zip(*((level.key, level.value, level.bias) for level in pooled), strict=True))
    return PooledKeys(key, value, bias, None)


def weights_of_spans(means: Tensor, pooled: PooledKeys, found: Listed, parts: int, scale: float) -> Tensor:
    """The share ω `[BH, spans, units]` of each unit that a span sees in the pooled softmax of its mean query `means` `[BH, spans, D]`.

    A key block counts by the share of the span's query blocks that do not keep it. 0 where a span sees nothing.
    """
    kept = found.kept.sum(-2) / found.blocks.to(means.dtype)[:, None]
    seen = torch.cat([found.units[0] * (1 - kept), *(units.to(means.dtype) for units in found.units[1:])], -1)
    return weights_of(means, pooled.key, pooled.bias, seen, parts, scale)


def handed_down(weights: Tensor, by_level: list[Moments]) -> list[Tensor]:
    """What each level's slopes are multiplied by `[BH, spans, slots]`, of the weights of what the spans see (`weights_of_spans`).

    The slope of a group is that between its members and, by their shares of its tokens, their own: a group's weight is its members' too.
    """
    own = list(weights.split([level.tokens.shape[1] for level in by_level], -1))
    for level in range(len(by_level) - 1, 0, -1):
        tokens, members = (by_level[n].tokens.sum(-1) for n in (level, level - 1))  # [BH, slots]
        share = members / tokens.repeat_interleave(MEMBERS, -1).clamp_min(1)
        own[level - 1] = own[level - 1] + own[level].repeat_interleave(MEMBERS, -1) * share[:, None]
    return own


def slopes_of_spans(weights: Tensor, by_level: list[Moments]) -> Tensor:
    """One matrix S `[BH, spans, D of k, D of v]` for each span: to first order the rest's value changes by s q S.

    S = Σ_J ω_J · slope_J over the units that the span sees, ω = `weights_of_spans`.
    """
    states = [
        (own @ moments.slope.flatten(-2)).unflatten(-1, moments.slope.shape[-2:])  # type: ignore[union-attr]
        for own, moments in zip(handed_down(weights, by_level), by_level, strict=True)
    ]
    return torch.stack(states).sum(0)


def of_blocks(slopes: Tensor, query_blocks: int) -> Tensor:
    """The matrix of each query block `[BH, Tq, D, D]` of those of the spans."""
    return slopes.repeat_interleave(SPAN, 1)[:, :query_blocks]
