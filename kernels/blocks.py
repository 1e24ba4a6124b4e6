"""Blocks of tokens: gathering them, pooling them, choosing among them, and the lists of blocks that queries visit."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, overload

import torch
from torch import Tensor

WORD = 64  # bits of a word of a mask


@dataclass(frozen=True)
class Blocks:
    """N tokens cut into T blocks of at most `width` tokens, as gather indices.

    `index` `[T, width]`: token at each place (short blocks repeat their last token). `valid` `[T, width]`: whether the place is a token.
    `count` `[T]`: tokens per block. `place` `[N]`: where each token is placed in the padded `[T · width]`. `even`: all blocks are full.
    `consecutive`: blocks follow each other as their tokens do.
    """

    index: Tensor
    valid: Tensor
    count: Tensor
    place: Tensor
    even: bool
    consecutive: bool = True

    @classmethod
    def from_starts(cls, starts: Tensor) -> "Blocks":
        """From the first token of each block and, last, N: `[T + 1]`."""
        count = starts[1:] - starts[:-1]
        width = int(count.max())
        offset = torch.arange(width, device=starts.device)
        valid = offset < count[:, None]
        index = torch.minimum(starts[:-1, None] + offset, starts[1:, None] - 1).clamp_min(0)  # a block may be empty
        return cls(index, valid, count, valid.flatten().nonzero().flatten(), bool(valid.all()))

    def among(self, order: Tensor) -> "Blocks":
        """The same blocks of tokens that are kept in another order; `order` `[N]`: the new place of each token that the blocks count."""
        return replace(self, index=order[self.index], place=self.place[order.argsort()], consecutive=False)

    def gather(self, x: Tensor) -> Tensor:
        """`[..., N, D]` to `[..., T, width, D]`; a view where all blocks are full and follow each other."""
        if self.consecutive and self.even:  # in this order: torch.compile does not know whether blocks made in a graph are even
            return x.unflatten(-2, self.index.shape)
        return x.index_select(-2, self.index.flatten()).unflatten(-2, self.index.shape)

    def ungather(self, x: Tensor) -> Tensor:
        """The inverse: `[..., T, width, D]` to `[..., N, D]`, padding dropped."""
        flat = x.flatten(-3, -2)
        return flat if self.consecutive and self.even else flat.index_select(-2, self.place)


@dataclass(frozen=True)
class BlockMap:
    """The key blocks that each query block visits.

    `index` `[..., Tq, n]` int64, `valid` `[..., Tq, n]` (false: padding of a shorter list), `partial` `[..., Tq, n]` (the token predicate
    applies) or None where no block is partial. Leading dimensions are absent (shared by batch and heads) or (batch · heads).
    `complete`: every entry is known to be valid. `mask_of`: the number of each entry's bit mask, read where it is partial (`TokenTables`).
    """

    index: Tensor
    valid: Tensor
    partial: Tensor | None = None
    complete: bool = False
    mask_of: Tensor | None = None

    def kept(self, key_blocks: int) -> Tensor:
        """The same as a mask `[..., Tq, Tk]`."""
        seen = torch.zeros(*self.index.shape[:-1], key_blocks, dtype=torch.int32, device=self.index.device)
        return seen.scatter_add(-1, self.index, self.valid.int()) > 0

    def listed(self) -> tuple[Tensor, Tensor]:
        """The key blocks `[..., Tq, n]`, and which of these entries count."""
        return self.index, self.valid


@dataclass(frozen=True)
class TokenTables:
    """Which pairs of tokens are kept in partial blocks, as the kernels read it: `masks`, or without them any of the `windows`.

    See `arguments.Arguments`; all count tokens in the order of the blocks. `residues`: the keys' own, None: those of the windows.
    """

    coords: Tensor
    windows: Tensor | None
    masks: Tensor | None
    residues: Tensor | None = None

    def kept(self, rows: Tensor, index: Tensor, mask_of: Tensor | None, q_blocks: Blocks, k_blocks: Blocks) -> Tensor:
        """`[..., C, q width, n · k width]` for query blocks `rows` `[C]` and their key blocks `index` `[..., C, n]`."""
        if self.masks is not None and mask_of is not None:
            return unpacked(self.masks[mask_of], k_blocks.index.shape[1]).transpose(-3, -2).flatten(-2)
        if self.windows is None:
            raise ValueError("partial blocks require windows or masks, and neither is given")
        q, k = _places(q_blocks, rows), _places(k_blocks, index).flatten(-2)
        found = torch.zeros((), dtype=torch.bool, device=index.device)
        of_keys = self.windows[:, :, 2] if self.residues is None else self.residues
        for (first, last, residue), of_key in zip((axes.unbind(1) for axes in self.windows), of_keys, strict=True):  # [3 axes, N] each
            inside = torch.ones((), dtype=torch.bool, device=index.device)
            for axis in range(3):
                key = self.coords[axis][k][..., None, :]
                inside = inside & (first[axis][q][..., None] <= key) & (key <= last[axis][q][..., None])
                inside = inside & (residue[axis][q][..., None] == of_key[axis][k][..., None, :])
            found = found | inside
        return found


def _places(blocks: Blocks, numbers: Tensor) -> Tensor:
    """Of blocks by number `[...]`: the places `[..., width]` of their tokens in the blocks' order, the last repeated in short ones."""
    offset = torch.arange(blocks.index.shape[1], device=numbers.device)
    start = blocks.count.cumsum(0) - blocks.count
    return start[numbers][..., None] + torch.minimum(offset, blocks.count[numbers][..., None] - 1)


def unpacked(masks: Tensor, width: int) -> Tensor:
    """Bits of words `[..., words]` (int64) as `[..., width]`, the lowest of each word first."""
    bits = (masks[..., None] >> torch.arange(WORD, device=masks.device)) & 1
    return bits.flatten(-2)[..., :width].bool()


def map_from_masks(chunks: Iterable[tuple[Tensor, Tensor, Tensor]]) -> BlockMap:
    """Lists of key blocks, full ones first, padded to the longest list.

    Each chunk: masks (visited, full) `[q, n]` of some query blocks, and the numbers `[n]` of the key blocks that they are of, ascending.
    """
    parts = []
    for visited, full, columns in chunks:
        row, column = visited.nonzero(as_tuple=True)
        partial = ~full[row, column]
        order = (row * 2 + partial).argsort(stable=True)
        parts.append((columns[column[order]], partial[order], visited.sum(-1)))
    column, partial, count = (torch.cat(part) for part in zip(*parts, strict=True))
    row = torch.arange(len(count), device=count.device).repeat_interleave(count)
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    index = torch.zeros(len(count), int(count.max()), dtype=torch.int64, device=count.device)
    valid, masked = torch.zeros_like(index, dtype=torch.bool), torch.zeros_like(index, dtype=torch.bool)
    index[row, place], valid[row, place], masked[row, place] = column, True, partial
    return BlockMap(index, valid, masked if bool(partial.any()) else None, bool(valid.all()))


@overload
def pool_blocks(x: Tensor, blocks: Blocks, *, variance: Literal[True]) -> tuple[Tensor, Tensor]: ...


@overload
def pool_blocks(x: Tensor, blocks: Blocks, *, variance: bool = False) -> tuple[Tensor, Tensor | None]: ...


def pool_blocks(x: Tensor, blocks: Blocks, *, variance: bool = False) -> tuple[Tensor, Tensor | None]:
    """Mean `[..., T, D]` of each block over its true number of tokens, and the (biased) variance where asked; float32 at least."""
    parts = blocks.gather(x if x.dtype == torch.float64 else x.float())
    weight = (blocks.valid.to(parts.dtype) / blocks.count.clamp_min(1)[:, None])[..., None]
    mean = (parts * weight).sum(-2)
    return mean, ((parts - mean[..., None, :]).square() * weight).sum(-2) if variance else None


def mean_product(query_mean: Tensor, key_mean: Tensor) -> Tensor:
    """The products `[BH, Tq, Tk]` of block means `[BH, Tq, D]` and `[BH, Tk, D]`, without a gradient.

    In float64, because what the user allows products of float32 to round (TF32, bfloat16) is not to change which blocks are chosen.
    """
    with torch.no_grad():
        return query_mean.double() @ key_mean.double().transpose(-1, -2)


def best_blocks(score: Tensor, count: int) -> BlockMap:
    """The `count` key blocks with the largest score `[BH, Tq, Tk]` of each query block. Selection is not differentiated."""
    index = score.detach().topk(count, dim=-1).indices
    return BlockMap(index, torch.ones_like(index, dtype=torch.bool), complete=True)


def select_blocks(query_mean: Tensor, key_mean: Tensor, count: int, *, key_weight: Tensor | None = None) -> BlockMap:
    """The `count` best key blocks per query block by the product of block means (SLA, arXiv 2509.24006, section 3).

    Shapes `[BH, Tq, D]` and `[BH, Tk, D]`. `key_weight` `[Tk]` multiplies scores.
    """
    score = mean_product(query_mean, key_mean)
    return best_blocks(score if key_weight is None else score * key_weight, count)
