"""Key blocks in groups of four, these in larger groups, and what of them a query sees in the place of what is not kept.

A query block near to a group, or one whose weights on it are large, sees its members; one far from it sees the group. So the number of
pooled keys for each query hardly grows with the number of tokens. Relatives, and what was measured: docs/methods.md.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.blocks import Blocks, pool_blocks
from dit_accel.kernels.reference import MASKED, softmax_weights
from dit_accel.method.parts.call import Call, Ground
from dit_accel.method.parts.content import PooledKeys, error_bias, error_score

MEMBERS = 4  # of a group


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


def starts_by_level(prepared: Mapping[str, Tensor]) -> list[Tensor]:
    """Where the run of each slot of a level starts, and the end; of all levels, from the key blocks up."""
    starts, roots = prepared["far_starts"], len(prepared["far_roots"])
    depth = 0
    while roots * MEMBERS**depth < len(starts) - 1:
        depth += 1
    return [starts[:: MEMBERS**level] for level in range(depth + 1)]


def levels(call: Call) -> list[Call]:
    """The call with each level's units in the place of its key blocks, from the key blocks up."""
    runs = [Blocks.from_starts(starts).among(call.prepared["far_order"]) for starts in starts_by_level(call.prepared)]
    return [dataclasses.replace(call, k_blocks=blocks, visited=None) for blocks in runs]


def spans_of(kept: Tensor) -> Tensor:
    """`[..., Tq, n]` of query blocks as `[..., spans, SPAN, n]`; the last span is filled up with zeros."""
    return F.pad(kept, (0, 0, 0, -kept.shape[-2] % SPAN)).unflatten(-2, (-1, SPAN))


def span_means(means: Tensor, blocks: Blocks) -> Tensor:
    """The mean query `[..., spans, D]` of each span, of those of the query blocks `[..., Tq, D]`."""
    count = blocks.count.to(means.dtype)[:, None]
    return spans_of(means * count).sum(-2) / spans_of(count).sum(-2)


def scores_of(call: Call, above: list[Call], cap: float) -> list[Tensor]:
    """The score of the error `[BH, spans, slots]` of the units of the levels `above` the key blocks, for the spans' mean queries."""
    means = span_means(pool_blocks(call.q, call.q_blocks)[0], call.q_blocks)
    return [error_score(means, *error_bias(level, cap), call.scale) for level in above]


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
        candidates, seen = filled[-1].expand(holds[-1].shape), list[Tensor]()
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
    """The pooled keys of all levels."""
    slopes = [level.slope for level in pooled if level.slope is not None]
    key, value, bias = (torch.cat(tensors, 1) for tensors in zip(*((level.key, level.value, level.bias) for level in pooled), strict=True))
    return PooledKeys(key, value, bias, torch.cat(slopes, 1) if slopes else None)


def weights_of_spans(means: Tensor, pooled: PooledKeys, found: Listed, parts: int, scale: float) -> Tensor:
    """The share ω `[BH, spans, units]` of each unit that a span sees in the pooled softmax of its mean query `means` `[BH, spans, D]`.

    A key block counts by the share of the span's query blocks that do not keep it. 0 where a span sees nothing.
    """
    kept = found.kept.sum(-2) / found.blocks.to(means.dtype)[:, None]
    seen = torch.cat([found.units[0] * (1 - kept), *(units.to(means.dtype) for units in found.units[1:])], -1)
    bias = pooled.bias.clamp_min(MASKED)  # finite: the gradient of a logsumexp over nothing is NaN
    logits = (scale * means @ pooled.key.transpose(-1, -2) + bias[:, None]).unflatten(-1, (-1, parts)).logsumexp(-1)
    logits = (logits + seen.log()).masked_fill(seen == 0, -torch.inf)
    return softmax_weights(logits)[0]


def slopes_of_spans(call: Call, pooled: PooledKeys, found: Listed, parts: int) -> Tensor:
    """One matrix S `[BH, spans, D of k, D of v]` for each span: to first order the rest's value changes by s q S.

    S = Σ_J ω_J · slope_J over the units that the span sees (`weights_of_spans`).
    """
    if pooled.slope is None:
        raise ValueError("the first order requires the blocks' slopes: pool_parts(slope=True)")
    means = span_means(pool_blocks(call.q, call.q_blocks)[0], call.q_blocks)
    weights = weights_of_spans(means, pooled, found, parts, call.scale)
    return (weights @ pooled.slope.flatten(-2)).unflatten(-1, pooled.slope.shape[-2:])


def of_blocks(slopes: Tensor, query_blocks: int) -> Tensor:
    """The matrix of each query block `[BH, Tq, D, D]` of those of the spans."""
    return slopes.repeat_interleave(SPAN, 1)[:, :query_blocks]
