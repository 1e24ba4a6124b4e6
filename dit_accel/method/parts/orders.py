"""Orders: how image tokens are cut into blocks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.method.checks import is_int, items, plain, require
from dit_accel.method.parts.base import Order
from dit_accel.method.parts.call import Grid


@dataclass(frozen=True)
class Raster(Order):
    """Image tokens follow each other row by row; blocks are runs of them, of which the last may be short."""

    boxes = False

    def partition(self, grid: Grid, block: int) -> tuple[Tensor, Tensor]:
        total = math.prod(grid)
        return torch.arange(total), torch.arange(0, total + block, block).clamp(max=total)


@dataclass(frozen=True)
class Tiles(Order):
    """Image tokens follow each other tile by tile; `shape` is the largest tile, (height, width) or (frames, height, width) in tokens.

    An axis that the tile does not divide is split evenly into shorter tiles, so that no tile is a sliver.
    """

    boxes = True
    shape: tuple[int, ...] = (8, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", plain(items("shape", self.shape)))
        ok = len(self.shape) in (2, 3) and all(is_int(side) and side >= 1 for side in self.shape)
        require(ok, "a tile's shape must be two or three ints >= 1", self.shape)

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shape as (frames, height, width)."""
        t, h, w = (1, *self.shape) if len(self.shape) == 2 else self.shape
        return (t, h, w)

    @property
    def block(self) -> int:
        return math.prod(self.sides)

    def partition(self, grid: Grid, block: int) -> tuple[Tensor, Tensor]:
        raster = torch.arange(math.prod(grid)).view(grid)
        cuts = [_split(n, side) for n, side in zip(grid, self.sides, strict=True)]
        tiles = [
            raster[t0:t1, y0:y1, x0:x1].reshape(-1)
            for t0, t1 in zip(cuts[0], cuts[0][1:], strict=False)
            for y0, y1 in zip(cuts[1], cuts[1][1:], strict=False)
            for x0, x1 in zip(cuts[2], cuts[2][1:], strict=False)
        ]
        lengths = torch.tensor([0, *(len(tile) for tile in tiles)])
        return torch.cat(tiles), lengths.cumsum(0)


def _split(length: int, side: int) -> list[int]:
    """The axis cut into ceil(length / side) parts whose lengths differ by at most one."""
    parts = -(-length // side)
    return [length * i // parts for i in range(parts + 1)]
