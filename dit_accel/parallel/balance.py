"""Which rank computes which heads: as many each, and where the specs of heads differ, of equal cost as nearly as can be."""

import functools
from collections.abc import Sequence

from dit_accel.method.assignment import Group
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout


@functools.lru_cache(maxsize=1024)
def heads_of_ranks(groups: tuple[Group, ...], layout: TokenLayout, head_dim: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """The heads of each rank, in ascending order, for a layer whose heads run these groups on a layout."""
    heads = sum(len(group.heads) for group in groups)
    if len(groups) == 1:
        return balanced([1.0] * heads, ranks)
    costs = [0.0] * heads
    for spec, numbers in groups:
        cost = computed_pairs(spec, layout, head_dim)
        for head in numbers:
            costs[head] = cost
    return balanced(costs, ranks)


def balanced(costs: Sequence[float], ranks: int) -> tuple[tuple[int, ...], ...]:
    """Spread heads of given costs: consecutive ones where all cost the same, else the dearest first, each to the rank that has least yet.

    Raises ValueError where the ranks do not divide the number of heads.
    """
    each, left = divmod(len(costs), ranks)
    if left or not each:
        raise ValueError(f"{len(costs)} heads can't be spread evenly over {ranks} processes")
    if len(set(costs)) == 1:
        return tuple(tuple(range(rank * each, (rank + 1) * each)) for rank in range(ranks))
    found: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for head in sorted(range(len(costs)), key=lambda head: (-costs[head], head)):
        rank = min((rank for rank in range(ranks) if len(found[rank]) < each), key=lambda rank: (loads[rank], rank))
        found[rank].append(head)
        loads[rank] += costs[head]
    return tuple(tuple(sorted(heads)) for heads in found)


@functools.lru_cache(maxsize=1024)
def of_heads(groups: tuple[Group, ...], held: tuple[int, ...]) -> tuple[Group, ...]:
    """The groups with those of their heads that a rank computes."""
    own = [Group(spec, tuple(head for head in heads if head in held)) for spec, heads in groups]
    return tuple(group for group in own if group.heads)
