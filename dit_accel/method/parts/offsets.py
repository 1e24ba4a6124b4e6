"""Keep patterns of whole tiles by their distance counted in tiles: near ones, and far ones along lines."""

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.method.checks import is_int, is_real, require
from dit_accel.method.parts.base import Blockwise
from dit_accel.method.parts.call import Boxes, Grid

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec

BITS = 62  # of a word


@dataclass(frozen=True)
class _Offsets(Blockwise):
    """Tiles at certain offsets, in tiles, from the query's.

    Tiles are counted as the query's image cuts its axes. A key tile of another image, which may be cut elsewhere, is in every tile of the
    query's image that has one of its places.
    """

    @abstractmethod
    def words(self, first: Tensor, last: Tensor, longest: int) -> Tensor:
        """Of an axis: what `kept` looks at, as bits of words `[W, ...]`, where key tiles are at the offsets `first` to `last` `[...]`.

        `longest`: the largest distance along any axis.
        """

    @abstractmethod
    def kept(self, words: list[Tensor]) -> Tensor:
        """Whether key tiles are kept, `[Tq, Tk]`, by the words `[W, Tq, Tk]` of each axis."""

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = boxes
        largest = torch.maximum((q_high - q_low).amax(0), (k_high - k_low).amax(0)) + 1  # the tile's sides, as far as any image fills them
        axes = []
        for axis, (n, side) in enumerate(zip(grid, largest.tolist(), strict=True)):
            count = -(-n // side)  # tile i begins at the place n i // count
            query, low, high = (((corner[:, axis] + 1) * count - 1) // n for corner in (q_low, k_low, k_high))
            rows, row = query.unique(return_inverse=True)  # few along an axis, so that few pairs are looked at
            columns, column = (low << 31 | high).unique(return_inverse=True)
            axes.append(((columns >> 31) - rows[:, None], (columns & (1 << 31) - 1) - rows[:, None], row, column))
        longest = max(int(torch.maximum(last, -first).max()) for first, last, _, _ in axes)
        words = [self.words(first, last, longest)[:, row][..., column] for first, last, row, column in axes]
        mask = self.kept(words)
        return mask, mask

    def check(self, spec: "AttentionSpec") -> None:
        require(spec.order.boxes, f"{type(self).__name__} requires an order of boxes, as Tiles", spec.order)


def _reached(first: Tensor, last: Tensor, offset: int, span: int = 0) -> Tensor:
    """Whether an offset, or one at most `span` from it, is among those from `first` to `last`."""
    return (first <= offset + span) & (last >= offset - span)


@dataclass(frozen=True)
class PowerTiles(_Offsets):
    """The tiles at most `near` away along every axis, and those that are a power of two away along one axis alone (PowerAttention,
    arXiv 2503.03588, on a grid in both directions): within Σ_a ⌈log2 n_a⌉ layers every token reaches every other."""

    near: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.near) and self.near >= 0, "near must be a number of tiles >= 0", self.near)

    def words(self, first: Tensor, last: Tensor, longest: int) -> Tensor:
        far = torch.zeros_like(first, dtype=torch.bool)
        for power in (2**m for m in range(longest.bit_length())):
            far = far | _reached(first, last, power) | _reached(first, last, -power)
        return torch.stack([_reached(first, last, 0), far, _reached(first, last, 0, self.near)])

    def kept(self, words: list[Tensor]) -> Tensor:
        (t, far_t, near_t), (y, far_y, near_y), (x, far_x, near_x) = words
        return (near_t & near_y & near_x) | (far_t & y & x) | (t & far_y & x) | (t & y & far_x)


@dataclass(frozen=True)
class Stripes(_Offsets):
    """The tiles ⌈i^(1/power)⌉ = 1, 4, 9, ... away along an axis or a diagonal, i = 0, 1, ..., and all tiles at most `span` from one of
    these: the anchors of Superlinear (arXiv 2601.18401, stripes of power p = 1/2) on a grid, in both directions. Here all are kept;
    the paper searches among the anchors and keeps the spans at the best, which is `Among`."""

    power: float = 0.5
    span: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.power) and 0.1 <= self.power <= 1, "power must be a number in [0.1, 1]", self.power)
        require(is_int(self.span) and self.span >= 0, "span must be a number of tiles >= 0", self.span)

    def steps(self, longest: int) -> list[int]:
        """0, and the distances of anchors up to `longest`."""
        found = [0]
        while (step := math.ceil(len(found) ** (1 / self.power) - 1e-9)) <= longest:  # whole powers of floats are a little off
            found.append(step)
        return found

    def words(self, first: Tensor, last: Tensor, longest: int) -> Tensor:
        own, found = _reached(first, last, 0, self.span), []
        for number, step in enumerate(self.steps(longest + self.span)):
            bit = own | _reached(first, last, step, self.span) | _reached(first, last, -step, self.span)
            if number % BITS == 0:
                found.append(torch.zeros_like(first))
            found[-1] = found[-1] | bit.long() << (number % BITS)
        return torch.stack(found)

    def kept(self, words: list[Tensor]) -> Tensor:
        t, y, x = words
        return functools.reduce(torch.bitwise_or, (t & y & x).unbind(0)) != 0  # at one and the same step along every axis
