"""Bit masks of partial blocks: which pairs of tokens are kept there, one mask for all pairs of blocks that are alike."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.blocks import WORD, BlockMap, Blocks, unpacked
from dit_accel.method.parts import Grid, Tokenwise

TOGETHER = 1 << 22  # pairs of tokens that are looked at together


class BitMasks(NamedTuple):
    """`masks` `[M, q width, words]`, `masks_t` `[M, k width, words]` int64, see `kernels.arguments.Arguments`; `mask_of`: the number of
    each list entry's mask, int32 in the shape of the lists, 0 at entries that are not partial."""

    masks: Tensor
    masks_t: Tensor
    mask_of: Tensor


def bit_masks(
    patterns: Sequence[Tokenwise], grids: tuple[Grid, ...], coords: Tensor, q_blocks: Blocks, k_blocks: Blocks, lists: BlockMap
) -> BitMasks:
    """The masks of the partial entries of static lists. `coords` `[N, 4]` in the blocks' order.

    Where every pattern is the same under translation, one pair of blocks is looked at for each offset and each two shapes of blocks,
    however many tokens there are; else every partial pair of blocks is, a chunk of them at a time. Equal masks are one either way.
    """
    if lists.partial is None:
        raise ValueError("bit masks are of partial blocks, and the lists have none")
    partial = lists.partial & lists.valid
    row, place = partial.nonzero(as_tuple=True)
    column = lists.index[row, place]
    which = torch.arange(len(row))
    if all(pattern.invariant for pattern in patterns):
        offsets = coords[k_blocks.index[column, 0], :3] - coords[q_blocks.index[row, 0], :3]
        alike = torch.cat([_shapes(coords, q_blocks)[row, None], _shapes(coords, k_blocks)[column, None], offsets], 1)
        first, which = distinct(alike)
        row, column = row[first], column[first]
    size = max(1, TOGETHER // (q_blocks.index.shape[1] * k_blocks.index.shape[1]))
    found: list[Tensor] = []
    numbers: list[Tensor] = []
    for rows, columns in zip(row.split(size), column.split(size), strict=True):
        packed = _packed(_allowed(patterns, grids, coords, q_blocks, k_blocks, rows, columns))
        first, number = distinct(packed)
        numbers.append(number + sum(len(part) for part in found))
        found.append(packed[first])
    every = torch.cat(found)
    first, number = distinct(every)
    masks, mask_of = every[first], torch.zeros_like(lists.index, dtype=torch.int32)
    mask_of[partial] = number[torch.cat(numbers)][which].to(torch.int32)
    transposed = [_packed(unpacked(part, k_blocks.index.shape[1]).mT) for part in masks.split(size)]
    return BitMasks(masks, torch.cat(transposed), mask_of)


def _allowed(
    patterns: Sequence[Tokenwise],
    grids: tuple[Grid, ...],
    coords: Tensor,
    q_blocks: Blocks,
    k_blocks: Blocks,
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Which pairs of tokens of pairs of blocks are kept, `[P, q width, k width]`."""
    q, k = coords[q_blocks.index[rows]], coords[k_blocks.index[columns]]
    kept = functools.reduce(torch.logical_or, [pattern.allowed(q, k, grids) for pattern in patterns])
    return kept & q_blocks.valid[rows][:, :, None] & k_blocks.valid[columns][:, None, :]


def _shapes(coords: Tensor, blocks: Blocks) -> Tensor:
    """A number `[T]` for each block, equal where its tokens are placed alike around its first one."""
    places = coords[blocks.index][..., :3]
    around = (places - places[:, :1]).masked_fill(~blocks.valid[..., None], torch.iinfo(torch.int32).max)
    return distinct(around)[1]


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first of each set of equal rows is, and for each row `[n, ...]` (int64) the number of its set."""
    flat = rows.flatten(1)
    sets, number = _sums(flat).unique(return_inverse=True)
    first = torch.full_like(sets, len(flat)).scatter_reduce(0, number, torch.arange(len(flat)), "amin")
    if not torch.equal(flat, flat[first][number]):  # two rows that differ have one sum: compare them as they are
        _, number = flat.unique(dim=0, return_inverse=True)
        first = torch.full((int(number.max()) + 1,), len(flat)).scatter_reduce(0, number, torch.arange(len(flat)), "amin")
    return first, number


def _sums(flat: Tensor) -> Tensor:
    """A number for each row, seldom the same for rows that differ."""
    halves = torch.cat([flat & 0xFFFFFFFF, flat >> 32], 1)
    odd = torch.randint(-(2**62), 2**62, (halves.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (halves * odd).sum(1)


def _packed(kept: Tensor) -> Tensor:
    """`[..., width]` as bits of words `[..., ceil(width / 64)]`."""
    width = kept.shape[-1]
    bits = torch.nn.functional.pad(kept, (0, -width % WORD)).unflatten(-1, (-1, WORD))
    return (bits.long() << torch.arange(WORD)).sum(-1)
