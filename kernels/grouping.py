"""The arguments and results of `dit_accel::group_units`: key blocks in groups, what spans of query blocks see of them, and their slopes."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import SPAN, Mark, Narrow, Transport

MEMBERS = 4  # of a group

Given = Annotated[Tensor, Mark(differentiable=True)]


class GroupingArguments(NamedTuple):
    """The arguments of `dit_accel::group_units`, but for the implementation's name. Contiguous; real numbers float32.

    `q_mean`, `pooled_k`, `pooled_v`, `slope`, `second`, `metric`, `tokens`, `spread`, `v_spread`: of `Summaries`, of the slots of level 0;
    None for `slope` where no slopes are made, for `metric` where there is one part. `lists` `[q blocks, n]`, or with a leading B·H, and
    `counts`, int32: the key blocks that each query block keeps. `place` `[k blocks]` int32: the slot of each. `q_starts` `[q blocks + 1]`
    int32. `roots`: slots of the last level; `opened`: units of each level that are opened by their score, in addition to those in which
    something is kept. `scale`, `cap`, `score_cap`, `log_count`: as in `SummaryArguments`; `narrow`: of the mixtures of slopes, see
    `Narrow`.
    """

    q_mean: Given
    pooled_k: Given
    pooled_v: Given
    slope: Annotated[Tensor | None, Mark(differentiable=True)]
    second: Given
    metric: Tensor | None
    tokens: Tensor
    spread: Given
    v_spread: Tensor
    lists: Tensor
    counts: Tensor
    place: Tensor
    q_starts: Tensor
    parts: int
    roots: int
    opened: int
    scale: float
    cap: float
    score_cap: float
    log_count: bool
    narrow: Narrow = False


class Units(NamedTuple):
    """What the units of all levels are, level after level, and what spans of SPAN query blocks see of them.

    Differentiable: joined_k, joined_v, joined_bias, slopes. `joined_k`, `joined_v` `[B, H, units · parts, D]`, `joined_bias`,
    `joined_tokens`, `joined_spread` `[B, H, units · parts]`: pooled keys and values, their biases, numbers of tokens, variances of logits.
    `slopes` `[B, H, spans, D of k, D of v]`, `pool_lists` `[B, H, spans, n]`, `pool_counts` `[B, H, spans]`: as in `Arguments`. For the
    backward pass: `above` `[B, H, D of k, units - slots, D of v]`: the slopes of groups, on a GPU without those of their members; `shares`
    `[B, H, spans, n, parts]`: of each pooled key on a list in the softmax of the span's mean query; `part`
    `[B, H, units - slots, 4 · parts]` uint8: of each part of its members. No elements where there are no slopes: slopes, above and shares.
    """

    joined_k: Tensor
    joined_v: Tensor
    joined_bias: Tensor
    slopes: Tensor
    pool_lists: Tensor
    pool_counts: Tensor
    above: Tensor
    joined_tokens: Tensor
    joined_spread: Tensor
    shares: Tensor
    part: Tensor


GROUPING = Transport(GroupingArguments)
GRADIENTS_OF_UNITS = ("joined_k", "joined_v", "joined_bias", "slopes")
SAVED_UNITS = (*GRADIENTS_OF_UNITS[:3], *Units._fields[4:])
DIFFERENTIABLE_GROUPING = ("q_mean", "pooled_k", "pooled_v", "slope", "second", "spread")


def levels_of(slots: int, roots: int) -> list[int]:
    """How many slots each level has, from the key blocks up."""
    levels = [slots]
    while levels[-1] > roots:
        levels.append(levels[-1] // MEMBERS)
    return levels


def _most_seen(a: GroupingArguments, levels: list[int]) -> int:
    """No span sees more units: one that is opened adds MEMBERS - 1, and so many of a level can be, by their score or for what is kept."""
    opened = a.opened + SPAN * a.lists.shape[-1]
    return min(sum(levels), levels[-1] + (MEMBERS - 1) * sum(min(level, opened) for level in levels[1:]))


def new_units(a: GroupingArguments) -> Units:
    """Empty tensors for the results."""
    (batch, heads, blocks, d), slots = a.q_mean.shape, a.tokens.shape[-1] // a.parts
    levels = levels_of(slots, a.roots)
    units, spans, n = sum(levels), -(-blocks // SPAN), _most_seen(a, levels)
    pools = units * a.parts
    sizes = {
        "joined_k": (pools, d), "joined_v": (pools, d), "joined_bias": (pools,), "slopes": (spans, d, d), "pool_lists": (spans, n),
        "pool_counts": (spans,), "above": (d, units - slots, d), "joined_tokens": (pools,), "joined_spread": (pools,),
        "shares": (spans, n, a.parts), "part": (units - slots, MEMBERS * a.parts),
    }  # fmt: skip
    kinds = {"pool_lists": torch.int32, "pool_counts": torch.int32, "part": torch.uint8}
    absent = ("slopes", "above", "shares") if a.slope is None else ()
    made = {
        name: a.q_mean.new_empty(0 if name in absent else (batch, heads, *size), dtype=kinds.get(name, torch.float32))
        for name, size in sizes.items()
    }
    return Units(**made)


def check_grouping(a: GroupingArguments) -> None:
    """Raise ValueError at arguments that do not fit each other: a kernel would read what is not there."""
    (batch, heads, blocks, d), pools = a.q_mean.shape, a.tokens.shape[-1]
    if a.parts not in (1, 2, 4) or pools % a.parts:
        raise ValueError(f"parts must be 1, 2 or 4 pooled keys for each of the slots, not {a.parts} of {pools} pooled keys")
    slots = pools // a.parts
    levels = levels_of(slots, a.roots) if a.roots >= 1 else [-1]
    if levels[-1] != a.roots or any(level % MEMBERS for level in levels[:-1]):
        raise ValueError(f"roots must be slots over a power of {MEMBERS}, not {a.roots} of {slots}")
    if a.opened < 1:
        raise ValueError(f"opened must be a number of units >= 1, not {a.opened}")
    if (a.metric is None) != (a.parts == 1):
        raise ValueError("metric must be given where there is more than one part, and only there")
    lead = (batch * heads,) if a.lists.ndim == 3 else ()
    real = {
        "q_mean": (batch, heads, blocks, d), "pooled_k": (batch, heads, pools, d), "pooled_v": (batch, heads, pools, d),
        "slope": (batch, heads, d, slots, d), "second": (batch, heads, d), "metric": (batch, heads, d, d),
        "tokens": (batch, heads, pools), "spread": (batch, heads, pools), "v_spread": (batch, heads, pools),
    }  # fmt: skip
    whole = {"lists": (*lead, blocks, a.lists.shape[-1]), "counts": (*lead, blocks), "place": a.place.shape[:1], "q_starts": (blocks + 1,)}
    for shapes, dtype in ((real, torch.float32), (whole, torch.int32)):
        for name, shape in shapes.items():
            x = getattr(a, name)
            if x is not None and (x.shape != shape or x.dtype != dtype or not x.is_contiguous()):
                raise ValueError(f"{name} must be {dtype} {tuple(shape)} and contiguous, not {x.dtype} {tuple(x.shape)}")
