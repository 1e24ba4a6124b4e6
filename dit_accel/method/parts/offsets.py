"""Keep patterns of whole tiles by their distance counted in tiles: near ones, and far ones along lines."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from dit_accel.method.checks import is_int, is_real, require
from dit_accel.method.parts.base import Blockwise
from dit_accel.method.parts.call import Boxes, Grid

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec


class Reached(Protocol):
    """Of an offset: for each axis, whether the key tile is there or at most `span` tiles from there, `[Tq, Tk]`."""

    def __call__(self, offset: int, span: int = 0) -> list[Tensor]: ...


@dataclass(frozen=True)
class _Offsets(Blockwise):
    """Tiles at certain offsets, in tiles, from the query's.

    Tiles are counted as the query's image cuts its axes. A key tile of another image, which may be cut elsewhere, is in every tile of the
    query's image that has one of its places.
    """

    @abstractmethod
    def kept(self, reached: Reached, longest: int) -> Tensor:
        """Whether the key tile is kept, `[Tq, Tk]`; all offsets are less than `longest`."""

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = boxes
        largest = torch.maximum((q_high - q_low).amax(0), (k_high - k_low).amax(0)) + 1  # the tile's sides, as far as any image fills them
        cuts = [(n, -(-n // side)) for n, side in zip(grid, largest.tolist(), strict=True)]

        def tile(corner: Tensor) -> Tensor:
            """The number of the tile, along each axis, that has a place: tile i begins at the place ⌊n i / count⌋."""
            numbers = [((place + 1) * count - 1) // n for place, (n, count) in zip(corner.unbind(-1), cuts, strict=True)]
            return torch.stack(numbers, -1)

        first, last = (tile(corner)[None] - tile(q_low)[:, None] for corner in (k_low, k_high))  # [Tq, Tk, 3]

        def reached(offset: int, span: int = 0) -> list[Tensor]:
            return list(((first <= offset + span) & (last >= offset - span)).unbind(-1))

        mask = self.kept(reached, 1 + int(torch.maximum(last, -first).max()))
        return mask, mask

    def check(self, spec: "AttentionSpec") -> None:
        require(spec.order.boxes, f"{type(self).__name__} requires an order of boxes, as Tiles", spec.order)


def _all(masks: list[Tensor]) -> Tensor:
    return torch.stack(masks).all(0)


@dataclass(frozen=True)
class PowerTiles(_Offsets):
    """The tiles at most `near` away along every axis, and those that are a power of two away along one axis alone (PowerAttention,
    arXiv 2503.03588, on a grid in both directions): within Σ_a ⌈log2 n_a⌉ layers every token reaches every other."""

    near: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.near) and self.near >= 0, "near must be a number of tiles >= 0", self.near)

    def kept(self, reached: Reached, longest: int) -> Tensor:
        mask, own = _all(reached(0, self.near)), reached(0)
        for power in (2**m for m in range((longest - 1).bit_length())):
            far = [there | back for there, back in zip(reached(power), reached(-power), strict=True)]
            for axis in range(3):
                mask = mask | _all([far[a] if a == axis else own[a] for a in range(3)])
        return mask


@dataclass(frozen=True)
class Stripes(_Offsets):
    """The tiles ⌈i^(1/power)⌉ = 1, 4, 9, ... away along an axis or a diagonal, i = 0, 1, ..., and all tiles at most `span` from one of
    these: the anchors of Superlinear's search (arXiv 2601.18401, stripes of power p = 1/2) on a grid, in both directions."""

    power: float = 0.5
    span: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.power) and 0 < self.power <= 1, "power must be a number in (0, 1]", self.power)
        require(is_int(self.span) and self.span >= 0, "span must be a number of tiles >= 0", self.span)

    def steps(self, longest: int) -> list[int]:
        """0, and the distances of anchors that are less than `longest`."""
        found = [0]
        while (step := math.ceil(len(found) ** (1 / self.power) - 1e-9)) < longest:  # whole powers of floats are a little off
            found.append(step)
        return found

    def kept(self, reached: Reached, longest: int) -> Tensor:
        mask = torch.zeros((), dtype=torch.bool)
        for step in self.steps(longest + self.span):
            mask = mask | _all([torch.stack(axis).any(0) for axis in zip(*(reached(o, self.span) for o in (0, step, -step)), strict=True)])
        return mask
