"""Where tokens stand: the grid of the image or video, the place of the text, and the order of image tokens in memory."""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.spec import Order, Raster, Tiles


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `text` text tokens and T·H·W image tokens; `grid` is (T, H, W) in tokens.

    `text_first` tells which come first. `order` is the order in which the image tokens lie in memory: raster unless the caller has
    permuted them already. Raises ValueError where a length is negative or a grid axis is below 1.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = True
    order: Order = Raster()

    def __post_init__(self) -> None:
        grid = tuple(self.grid) if isinstance(self.grid, tuple | list) else ()
        if len(grid) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in grid):
            raise ValueError(f"grid is (frames, height, width) in tokens, three ints >= 1, got {self.grid!r}")
        object.__setattr__(self, "grid", grid)
        if not isinstance(self.text, int) or isinstance(self.text, bool) or self.text < 0:
            raise ValueError(f"text is a number of tokens >= 0, got {self.text!r}")
        if not isinstance(self.order, Order):
            raise ValueError(f"order is Raster() or Tiles(...), got {self.order!r}")

    @property
    def image(self) -> int:
        """Number of image tokens."""
        return math.prod(self.grid)

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return self.image + self.text


@dataclass(frozen=True)
class Partition:
    """Consecutive blocks of tokens in memory.

    `order` `[N]`: the raster index of the token at each place in memory. `starts` `[blocks + 1]`: where each block begins.
    """

    order: Tensor
    starts: Tensor


def _split(length: int, side: int) -> list[int]:
    """The axis cut into ceil(length / side) parts whose lengths differ by at most one."""
    parts = -(-length // side)
    return [length * i // parts for i in range(parts + 1)]


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors must serve training as well
def partition(grid: tuple[int, int, int], order: Order, block: int) -> Partition:
    """The blocks of image tokens in memory: one per tile in tile order, runs of `block` tokens in raster order (the last may be short).

    A pure function; the cached tensors must not be written to.
    """
    total = math.prod(grid)
    if isinstance(order, Raster):
        edges = torch.arange(0, total + block, block).clamp(max=total)
        return Partition(torch.arange(total), edges)
    raster = torch.arange(total).view(grid)
    cuts = [_split(n, side) for n, side in zip(grid, order.sides, strict=True)]
    tiles = [
        raster[t0:t1, y0:y1, x0:x1].reshape(-1)
        for t0, t1 in zip(cuts[0], cuts[0][1:], strict=False)
        for y0, y1 in zip(cuts[1], cuts[1][1:], strict=False)
        for x0, x1 in zip(cuts[2], cuts[2][1:], strict=False)
    ]
    lengths = torch.tensor([0, *(len(tile) for tile in tiles)])
    return Partition(torch.cat(tiles), lengths.cumsum(0))


def memory_order(grid: tuple[int, int, int], order: Order) -> Tensor:
    """The raster index `[N]` of the token at each place in memory; `x[:, memory_order(...)]` brings a raster into that order."""
    return partition(grid, order, math.prod(order.sides) if isinstance(order, Tiles) else 64).order


def raster_order(grid: tuple[int, int, int], order: Order) -> Tensor:
    """The place in memory `[N]` of each raster token: the inverse of `memory_order`."""
    return memory_order(grid, order).argsort()


def coordinates(grid: tuple[int, int, int], raster_index: Tensor) -> Tensor:
    """(t, y, x) `[N, 3]` of raster indices."""
    _, h, w = grid
    return torch.stack([raster_index // (h * w), raster_index // w % h, raster_index % w], dim=-1)
