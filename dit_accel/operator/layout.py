"""Where tokens are: the grid of the image or video, the place of the text, and the order of image tokens in memory."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.method.checks import plain
from dit_accel.method.parts import Grid, Order, Raster
from dit_accel.method.parts.base import check_part


def _grid(name: str, value: Any) -> Grid:
    grid = tuple(plain(value)) if isinstance(value, tuple | list) else ()
    if len(grid) != 3 or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in grid):
        raise ValueError(f"{name} must be (frames, height, width) in tokens, three ints >= 1, not {value!r}")
    return grid


@dataclass(frozen=True)
class TokenLayout:
    """A sequence of `text` text tokens and T·H·W image tokens; `grid` is (T, H, W) in tokens.

    Args:
        grid: (T, H, W) in tokens; T = 1 for a picture.
        text: number of text tokens.
        text_first: whether the text comes first.
        order: the order of the image tokens in memory: raster unless the caller has permuted them already.
        references: the grids of further images that follow the first in the sequence, as edit models have them; their coordinates begin at
            the same corner, so that what is near in one is near in the others.

    Raises ValueError where a length is negative or a grid axis is below 1.
    """

    grid: Grid
    text: int = 0
    text_first: bool = True
    order: Order = Raster()
    references: tuple[Grid, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", _grid("grid", self.grid))
        object.__setattr__(self, "references", tuple(_grid("a reference's grid", grid) for grid in self.references))
        object.__setattr__(self, "text", plain(self.text))
        if not isinstance(self.text, int) or isinstance(self.text, bool) or self.text < 0:
            raise ValueError(f"text must be a number of tokens >= 0, not {self.text!r}")
        check_part(self.order, Order, "order")

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids of all images in the sequence."""
        return (self.grid, *self.references)

    @property
    def image(self) -> int:
        """Number of image tokens, those of references among them."""
        return sum(math.prod(grid) for grid in self.grids)

    @property
    def tokens(self) -> int:
        """Number of all tokens."""
        return self.image + self.text

    @property
    def text_slice(self) -> slice:
        """Where the text's tokens are in the sequence."""
        return slice(0, self.text) if self.text_first else slice(self.image, None)

    @property
    def image_slice(self) -> slice:
        """Where the image's tokens are in the sequence."""
        return slice(self.text, None) if self.text_first else slice(0, self.image)


class Layouts(NamedTuple):
    """Where the queries' tokens are, and where the keys' are."""

    q: TokenLayout
    k: TokenLayout

    @property
    def text_first(self) -> bool:
        return self.k.text_first if self.k.text else self.q.text_first


def layouts_of(queries: TokenLayout, keys: TokenLayout) -> Layouts:
    """Both. Raises ValueError where the text is first in one and last in the other."""
    if queries.text and keys.text and queries.text_first != keys.text_first:
        places = ["first" if layout.text_first else "last" for layout in (queries, keys)]
        raise ValueError(f"the text is {places[0]} among the queries and {places[1]} among the keys: move it to the same end of both")
    return Layouts(queries, keys)


@dataclass(frozen=True)
class Partition:
    """Consecutive blocks of tokens in memory.

    `order` `[N]`: the raster index of the token at each place in memory. `starts` `[blocks + 1]`: where each block begins.
    """

    order: Tensor
    starts: Tensor


@torch.inference_mode(False)  # plans keep the tensors, which must serve training as well
def partition(grid: Grid, order: Order, block: int) -> Partition:
    """The blocks of image tokens in memory, of `block` tokens at most where the order leaves that open."""
    return Partition(*order.partition(grid, block))


def memory_order(grid: Grid, order: Order) -> Tensor:
    """The raster index `[N]` of the token at each place in memory; `x[:, memory_order(...)]` brings a raster into that order."""
    return partition(grid, order, order.block or 64).order


def raster_order(grid: Grid, order: Order) -> Tensor:
    """The place in memory `[N]` of each raster token: the inverse of `memory_order`."""
    return memory_order(grid, order).argsort()


def coordinates(grid: Grid, raster_index: Tensor) -> Tensor:
    """(t, y, x) `[N, 3]` of raster indices."""
    _, h, w = grid
    return torch.stack([raster_index // (h * w), raster_index // w % h, raster_index % w], dim=-1)


def joint_partition(grids: tuple[Grid, ...], order: Order, block: int) -> Partition:
    """The blocks of several images that follow each other; no block contains tokens of two."""
    parts = [partition(grid, order, block) for grid in grids]
    before = torch.tensor([0, *(len(part.order) for part in parts)]).cumsum(0).tolist()
    starts = [part.starts[1:] + offset for part, offset in zip(parts, before, strict=False)]
    return Partition(
        torch.cat([part.order + offset for part, offset in zip(parts, before, strict=False)]), torch.cat([parts[0].starts[:1], *starts])
    )


def joint_memory_order(grids: tuple[Grid, ...], order: Order) -> Tensor:
    """`memory_order` of several images that follow each other."""
    return joint_partition(grids, order, order.block or 64).order
