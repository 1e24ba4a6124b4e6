"""What processes tell each other of the keys that a rest is of: as much of each layer whatever the border, and once for all queries.

By what the rest requires (`Rest.far`): the moments of all blocks, put together where bands cut a block; sums over the keys that a process
does not read; or keys that are made of all tokens, put together where their tokens are in several bands.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.method.parameters import Values
from dit_accel.method.parts.base import Rest
from dit_accel.method.parts.call import Call, Far, FarBlocks, FarKeys, FarSums, Moments
from dit_accel.operator.bands import Grounds, Pieces
from dit_accel.operator.blocks_of_grid import Plan
from dit_accel.parallel.rows import exchanged, to_all, to_owners


@dataclass(frozen=True)
class Unread:
    """A band's own tokens by which bands don't read them: `order`, group after group, the groups' sizes `counts`, and of each band the
    numbers of the groups that it does not read, `groups`."""

    order: Tensor
    counts: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Shares:
    """Keys that are made of all tokens, from each band's share of those that its tokens take part in.

    `own`: what the rest prepared for this band. `counts`: how many keys each band has a share of; they are numbered band by band. `index`
    `[M, most]`: the shares of each key, `held` `[M, most, 1]`: whether there are so many.
    """

    own: dict[str, Tensor]
    counts: tuple[int, ...]
    index: Tensor
    held: Tensor


Told = Pieces | Unread | Shares


@dataclass(frozen=True)
class Peers:
    """The processes of a group that tell each other: this one's number, and how many there are."""

    group: Any
    rank: int
    count: int


def plan_told(rest: Rest | None, grounds: Grounds, rank: int, sent: Sequence[Tensor], device: torch.device) -> Told | None:
    """What one rank has to know to tell the others; `sent`: its own tokens that each of them reads. None without a rest."""
    if rest is None:
        return None
    if rest.far is FarSums:
        return unread(sent, grounds.ranges[rank][1] - grounds.ranges[rank][0], device)
    return grounds.pieces(rank, device) if rest.far is FarBlocks else shares_of_keys(rest, grounds, rank, device)


def unread(sent: Sequence[Tensor], own: int, device: torch.device) -> Unread:
    """`sent`: as in `plan_told`, of `own` tokens."""
    reads = torch.zeros(len(sent), own, dtype=torch.bool)
    for row, tokens in zip(reads, sent, strict=True):
        row[tokens.cpu()] = True
    kinds, number = reads.unique(dim=1, return_inverse=True)
    left = tuple(tuple((~row).nonzero().flatten().tolist()) for row in kinds)
    counts = tuple(number.bincount(minlength=kinds.shape[1]).tolist())
    return Unread(number.argsort(stable=True).to(device), counts, left)


def shares_of_keys(rest: Rest, grounds: Grounds, rank: int, device: torch.device) -> Shares:
    """Of a rest that makes keys of all tokens."""
    prepared = grounds.whole.prepared
    parts = [rest.in_part(prepared, slice(*tokens)) for tokens in grounds.ranges]
    numbers = torch.cat([found for _, found in parts])
    order = numbers.argsort(stable=True)  # by key, and band by band
    count = numbers.bincount()
    place = torch.arange(len(order)) - (count.cumsum(0) - count)[numbers[order]]
    index = torch.zeros(len(count), int(count.max()), dtype=torch.int64).index_put((numbers[order], place), order)
    held = torch.arange(index.shape[1]) < count[:, None]
    own = {name: x.to(device) for name, x in parts[rank][0].items()}
    return Shares(own, tuple(len(found) for _, found in parts), index.to(device), held[..., None].to(device))


def far_of(key: Tensor, value: Tensor, rest: Rest, told: Told, plan: Plan, params: Values, scale: float, peers: Peers) -> Far:
    """What the rest requires of all keys and values, of which this rank has `[B, H, own tokens, D]`; float32 at least. Differentiable.

    `plan`: of this rank's queries. All ranks call it alike.
    """
    match told:
        case Pieces():
            return FarBlocks(_moments(key, value, told, peers), told.kept, told.slots)
        case Unread():
            return FarSums(_sums(key, value, rest, told, plan, params, scale, peers))
    return _keys(key, value, rest, told, params, peers)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _moments(key: Tensor, value: Tensor, pieces: Pieces, peers: Peers) -> Moments:
    """Those of all blocks of the grid, from those of all ranks' pieces of them."""
    heads, rows = key.shape[:2], to_all(pieces.counts, peers.rank, key.device)
    k, v = (_wide(x).flatten(0, 1) for x in (key, value))
    own = Moments.of(k, v, pieces.own)
    gathered = exchanged(peers.group, [rows] * 3, [x.unflatten(0, heads) for x in own[1:]])
    mean, mean_value, variance = (_picked(x, pieces.index) for x in gathered)
    share = pieces.share.to(mean.dtype)[..., None]
    k_mean, v_mean = ((x * share).sum(2) for x in (mean, mean_value))
    spread_of = ((variance + (mean - k_mean[:, :, None]).square()) * share).sum(2)  # within the pieces, and between them
    return Moments(pieces.tokens, k_mean, v_mean, spread_of)


def _picked(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[B, H, rows, D]` by number, as `[BH, *index.shape, D]`."""
    return x.flatten(0, 1).index_select(1, index.flatten()).unflatten(1, index.shape)


def _sums(
    key: Tensor, value: Tensor, rest: Rest, own: Unread, plan: Plan, params: Values, scale: float, peers: Peers
) -> Tensor:  # fmt: skip
    """Those of all keys that this rank does not read `[BH, F, D + 1]` (LASP-2, arXiv 2502.07563).

    Each rank sends to each other the sums over what that does not read of its tokens: nothing is taken from a sum over all, so that no
    digits are lost where little is left.
    """
    heads = key.shape[:2]

    def of_group(k: Tensor, v: Tensor) -> Tensor:
        k, v = (_wide(x).flatten(0, 1) for x in (k, v))
        call = Call(k, k, v, heads[1], scale, plan.coords, plan.q_blocks, plan.k_blocks, plan.prepared, params)
        features, values = rest.factors(call)
        return features.mT @ torch.cat([values, torch.ones_like(values[..., :1])], -1)

    parts = zip(*(x.index_select(2, own.order).split(list(own.counts), 2) for x in (key, value)), strict=True)
    of_groups = [reference.run_again(of_group, k, v) for k, v in parts]
    totals = {groups: sum((of_groups[i] for i in groups), torch.zeros_like(of_groups[0])) for groups in set(own.groups)}
    for_all = torch.cat([totals[groups] for groups in own.groups], 1).unflatten(0, heads)
    rows = [for_all.shape[2] // peers.count] * peers.count
    (found,) = exchanged(peers.group, [to_owners(rows, peers.rank, key.device)], [for_all])
    return found.unflatten(2, (peers.count, -1)).sum(2).flatten(0, 1)


def _keys(key: Tensor, value: Tensor, rest: Rest, shares: Shares, params: Values, peers: Peers) -> FarKeys:
    heads, rows = key.shape[:2], to_all(shares.counts, peers.rank, key.device)
    own = [rest.keys_of(_wide(x).flatten(0, 1), shares.own, params).unflatten(0, heads) for x in (key, value)]
    whole = [(_picked(x, shares.index) * shares.held).sum(2) for x in exchanged(peers.group, [rows] * 2, own)]
    return FarKeys(*whole)
