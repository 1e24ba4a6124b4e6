"""A band of a grid's tokens as queries, and the key blocks that the static patterns keep for them, as one of several devices has them.

A band is any run of the image's tokens in memory: where its ends cut a block, the tokens of the block that are in the band are a shorter
query block, which visits what the whole one does.
"""

import functools
import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, Blocks
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.bit_masks import bit_masks
from dit_accel.operator.blocks_of_grid import Plan, make_plan, moved, plan_key
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import Geometry, Lists, make_geometry, padded

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Band:
    """The plan of a band's queries over the keys that they read.

    `plan`: its query blocks are of the band's tokens, its key blocks of the tokens `keys` `[n]`, by their places in memory, ascending.
    """

    plan: Plan
    keys: Tensor


@dataclass(frozen=True)
class Pieces:
    """The key blocks of a grid, cut where bands cut them.

    `own`: the pieces in this band, of its tokens. `counts`: how many pieces each band has; they are numbered band by band. `index`
    `[Tk, most]`: the pieces of each block, `share` `[Tk, most]`: their shares of the block's tokens, 0 where there are no more of them.
    `tokens` `[Tk]`: of each block. `kept` `[Tq, Tk]`: which of the blocks each query block of this band keeps; `slots` `[n]` int32: those
    that any of them keeps, which are the key blocks of the band's plan.
    """

    own: Blocks
    counts: tuple[int, ...]
    index: Tensor
    share: Tensor
    tokens: Tensor
    kept: Tensor
    slots: Tensor


class Grounds:
    """A spec on a grid whose tokens are spread over bands of consecutive ones, of so many tokens each; on the CPU."""

    def __init__(self, spec: AttentionSpec, layout: TokenLayout, tokens: tuple[int, ...]) -> None:
        self.spec = spec
        self.whole = make_plan(spec, TokenLayout(layout.grid, order=layout.order, references=layout.references), CPU)
        ends = torch.tensor([0, *tokens]).cumsum(0).tolist()
        self.ranges = list(itertools.pairwise(ends))
        places = self.whole.geometry.places_q
        self.places = torch.arange(ends[-1]) if places is None else places.long()  # of each token in the blocks' order
        self.q_block, self.k_block = (_number_of_block(side) for side in (self.whole.q_blocks, self.whole.k_blocks))

    def in_band(self, band: int) -> Tensor:
        """Which tokens of the blocks' order `[N]` are in a band."""
        first, end = self.ranges[band]
        return (self.places >= first) & (self.places < end)

    def rows(self, band: int) -> Tensor:
        """The query blocks with tokens in a band, ascending."""
        return self.q_block[self.in_band(band)].unique()

    @functools.cached_property
    def static(self) -> BlockMap:
        """The lists of all query blocks. Raises ValueError where the spec has no static pattern."""
        if self.whole.static is None:
            raise ValueError(f"{self.spec} has no static pattern: a band's keys are known of static patterns alone")
        return self.whole.static

    def needed(self, band: int) -> Tensor:
        """The key blocks that a band's queries keep, ascending."""
        rows = self.rows(band)
        return self.static.index[rows][self.static.valid[rows]].unique()

    def keys(self, band: int) -> Tensor:
        """The places in memory of the tokens in these blocks, ascending."""
        return self.places[self._in_blocks(self.needed(band))].sort().values

    def _in_blocks(self, blocks: Tensor) -> Tensor:
        """Which tokens of the blocks' order `[N]` are in some key blocks."""
        found = torch.zeros(len(self.whole.k_blocks.count), dtype=torch.bool)
        found[blocks] = True
        return found[self.k_block]

    def band(self, band: int, device: torch.device) -> Band:
        """The plan of a band."""
        rows, needed, g = self.rows(band), self.needed(band), self.whole.geometry
        of_q, of_k = self.in_band(band), self._in_blocks(needed)
        keys = self.places[of_k].sort().values
        places_q = self.places[of_q] - self.ranges[band][0]
        places_k = torch.searchsorted(keys, self.places[of_k])
        q_counts = self.q_block[of_q].bincount(minlength=len(self.whole.q_blocks.count))[rows]
        starts_q, starts_k = (_starts(counts) for counts in (q_counts, self.whole.k_blocks.count[needed]))
        lists, masks = self._lists(rows, needed, of_q, starts_q)
        geometry = Geometry(
            starts_q=starts_q.int(),
            starts_k=starts_k.int(),
            lists=Lists.from_map(lists),
            coords=padded(g.coords[:, : len(of_k)][:, of_k]),
            windows=None if g.windows is None else padded(g.windows[..., : len(of_q)][..., of_q]),
            places_q=places_q.int(),
            places_k=places_k.int(),
            masks=None if masks is None else masks[0],
            masks_t=None if masks is None else masks[1],
            residues=None if g.windows is None else padded(g.windows[:, :, 2, : len(of_k)][..., of_k]),
        )
        plan = Plan(
            key=self.whole.key,
            q_blocks=moved(Blocks.from_starts(starts_q).among(places_q), device),
            k_blocks=moved(Blocks.from_starts(starts_k).among(places_k), device),
            coords=self.whole.coords[keys].to(device),
            static=moved(lists, device),
            top=0,
            prepared={},
            geometry=moved(geometry, device),
        )
        return Band(plan, keys.to(device))

    def _lists(self, rows: Tensor, needed: Tensor, of_q: Tensor, starts_q: Tensor) -> tuple[BlockMap, tuple[Tensor, Tensor] | None]:
        """The static lists of some query blocks over the needed key blocks, and the bit masks of what is left of these query blocks."""
        static = self.static
        longest = int(static.valid[rows].sum(-1).max())
        index, valid = (x[rows][:, :longest] for x in (static.index, static.valid))
        partial = None if static.partial is None else static.partial[rows][:, :longest]
        lists = BlockMap(index, valid, partial, bool(valid.all()))
        masks = None
        if static.mask_of is not None:
            places = of_q.nonzero().flatten()  # the pieces, of places in the whole's blocks' order
            blocks = Blocks.from_starts(starts_q)
            pieces = replace(blocks, index=places[blocks.index])
            k_blocks = Blocks.from_starts(_starts(self.whole.k_blocks.count))
            grids, coords = self.whole.key[1], self.whole.coords[self.places]
            if bool((lists.valid & partial).any() if partial is not None else False):
                made = bit_masks(self.spec.tokenwise, grids, coords, pieces, k_blocks, lists)
                lists, masks = replace(lists, mask_of=made.mask_of), (made.masks, made.masks_t)
        number = torch.zeros(len(self.whole.k_blocks.count), dtype=torch.int64)
        number[needed] = torch.arange(len(needed))
        return replace(lists, index=number[lists.index].masked_fill(~valid, 0)), masks

    def _tokens_of_pieces(self) -> Tensor:
        """How many tokens each band has of each key block, `[bands, Tk]`."""
        blocks, bands = len(self.whole.k_blocks.count), len(self.ranges)
        return (self._bands() * blocks + self.k_block).bincount(minlength=bands * blocks).view(bands, blocks)

    def pieces_of_bands(self) -> list[int]:
        """With how many key blocks each band has tokens in common."""
        pairs = (self._bands() * len(self.whole.k_blocks.count) + self.k_block).unique()
        return (pairs // len(self.whole.k_blocks.count)).bincount(minlength=len(self.ranges)).tolist()

    def _bands(self) -> Tensor:
        """The band `[N]` of each token in the blocks' order."""
        return torch.searchsorted(torch.tensor([end for _, end in self.ranges]), self.places, right=True)

    def pieces(self, band: int, device: torch.device) -> Pieces:
        """The key blocks, cut at the ends of the bands."""
        blocks, counts = len(self.whole.k_blocks.count), self._tokens_of_pieces()
        of_block = counts.T  # the pieces of a block, in the order of the bands
        number = (counts.flatten() > 0).cumsum(0).view_as(counts) - 1
        order = (of_block > 0).int().argsort(dim=1, descending=True, stable=True)[:, : int((of_block > 0).sum(1).max())]
        share = of_block.gather(1, order) / self.whole.k_blocks.count[:, None].double()
        index = number.T.gather(1, order).masked_fill(share == 0, 0)
        mine = self.in_band(band)
        starts = _starts(counts[band][counts[band] > 0])
        own = Blocks.from_starts(starts).among(self.places[mine] - self.ranges[band][0])
        rows = self.rows(band)
        kept = BlockMap(self.static.index[rows], self.static.valid[rows]).kept(blocks)
        found = (index, share, self.whole.k_blocks.count, kept, self.needed(band).int())
        return Pieces(moved(own, device), tuple(self.pieces_of_bands()), *(x.to(device) for x in found))


def all_pairs(spec: AttentionSpec, queries: int, keys: int, device: torch.device) -> Plan:
    """The plan of queries that see every one of some keys, whatever the spec; both in blocks of 64."""
    layout = TokenLayout((1, 1, keys))
    starts_q, starts_k = (torch.arange(0, n + 64, 64).clamp_max(n).unique() for n in (queries, keys))
    blocks = [Blocks.from_starts(starts) for starts in (starts_q, starts_k)]
    index = torch.arange(len(starts_k) - 1).repeat(len(starts_q) - 1, 1)
    static, coords = BlockMap(index, torch.ones_like(index, dtype=torch.bool), complete=True), torch.zeros(keys, 4, dtype=torch.int64)
    geometry = make_geometry(starts_q, starts_k, coords[:, :3], static, [], None, None)
    q_blocks, k_blocks = (moved(side, device) for side in blocks)
    key = plan_key(spec, layout, device)
    return Plan(key, q_blocks, k_blocks, coords.to(device), moved(static, device), 0, {}, moved(geometry, device))


def _number_of_block(blocks: Blocks) -> Tensor:
    """The block `[N]` of each token in the blocks' order."""
    return torch.arange(len(blocks.count)).repeat_interleave(blocks.count)


def _starts(counts: Tensor) -> Tensor:
    """Where blocks of so many tokens begin, and where the last one ends `[T + 1]`."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
