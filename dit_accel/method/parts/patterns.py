"""Keep patterns that depend on the tokens' places alone."""

import functools
import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.method.checks import axes, is_int, require
from dit_accel.method.parts.base import Blockwise, Static, Tokenwise
from dit_accel.method.parts.call import Boxes, Grid

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec


@dataclass(frozen=True)
class _Round(Static):
    """A distance from the query, in tokens."""

    radius: float

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = isinstance(self.radius, int | float) and not isinstance(self.radius, bool) and 0 < self.radius < 1e9
        require(legal, "radius must be a number of tokens > 0 (and below 1e9)", self.radius)

    @property
    def reach(self) -> int:
        """The largest squared integer distance below radius², at least 0 (a token is close to itself)."""
        return max(0, math.ceil(self.radius * self.radius) - 1)

    def gaps(self, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """Whether the nearest and whether the farthest tokens of two blocks are within the radius, `[Tq, Tk]`."""
        near = far = torch.zeros((), dtype=torch.int64)
        for q_low, q_high, k_low, k_high in zip(*(corner.unbind(-1) for corner in boxes), strict=True):  # axis by axis
            if max(int(q_high.max()), int(k_high.max())) > 0:
                after, before = k_low[None] - q_high[:, None], q_low[:, None] - k_high[None]
                near = near + torch.maximum(after, before).clamp_min(0).square()
                far = far + torch.maximum(k_high[None] - q_low[:, None], q_high[:, None] - k_low[None]).square()
        shape = (len(boxes[0]), len(boxes[2]))
        return (near <= self.reach).expand(shape), (far <= self.reach).expand(shape)


@dataclass(frozen=True)
class Disc(_Round, Tokenwise):  # type: ignore[override]
    """Keys with dt² + dy² + dx² < radius² in token coordinates, strict, clipped at borders (CLEAR, arXiv 2412.16112)."""

    invariant = True

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        return self.gaps(boxes)

    def allowed(self, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        used = [axis for axis in range(3) if max(grid[axis] for grid in grids) > 1]
        distance = sum((q[..., :, None, axis] - k[..., None, :, axis]).square() for axis in used)
        return torch.as_tensor(distance, device=q.device) <= self.reach

    def pairs(self, grid: Grid) -> int:
        """A sum over offsets."""
        side = math.isqrt(self.reach)
        offsets = [range(-min(side, n - 1), min(side, n - 1) + 1) for n in grid]
        return sum(
            math.prod(n - abs(d) for n, d in zip(grid, gap, strict=True))
            for gap in ((t, y, x) for t in offsets[0] for y in offsets[1] for x in offsets[2])
            if sum(d * d for d in gap) <= self.reach
        )


@dataclass(frozen=True)
class DiscBlocks(_Round, Blockwise):
    """Every whole key block that contains a key closer than `radius` to some query of the query block: no partial blocks."""

    nested_boxes = True

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        near, _ = self.gaps(boxes)
        return near, near

    def check(self, spec: "AttentionSpec") -> None:
        require(spec.order.boxes, "DiscBlocks requires an order of boxes, as Tiles", spec.order)


@dataclass(frozen=True)
class FirstFrames(Blockwise):
    """Every whole key block that contains a token of the first `count` frames of the grid, for every query: the given image of an
    image-to-video model, an attention sink."""

    nested_boxes = True
    count: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.count) and self.count >= 1, "count must be a number of frames >= 1", self.count)

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        q_low, _, k_low, _ = boxes
        first = (k_low[:, 0] < self.count).expand(len(q_low), -1)
        return first, first


class Intervals(Tokenwise):
    """A pattern that is, along every axis of the grid, an interval of keys for each place of a query: a window or a box."""

    intervals = True

    @abstractmethod
    def bounds(self, grid: Grid, axis: int) -> tuple[Tensor, int]:
        """First and last key `[length, 2]` that each query of an axis sees, and the step between its keys (a dilation).

        Both ends may lie outside the grid: another image's may be larger.
        """

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = boxes
        visited, full = torch.ones(2, len(q_low), len(k_low), dtype=torch.bool)
        for axis in range(3):
            table, dilation = self.bounds(grid, axis)
            first, last = table.unbind(-1)
            # both ends never fall as the query moves on, but for the residues of a dilated window: hence the running extremes
            reach_low = first.flip(0).cummin(0).values.flip(0)[q_low[:, axis], None]
            reach_high = last.cummax(0).values[q_high[:, axis], None]
            low, high = k_low[None, :, axis], k_high[None, :, axis]
            visited &= (low <= reach_high) & (high >= reach_low)
            if dilation == 1 or grid[axis] == 1:
                full &= (low >= first[q_high[:, axis], None]) & (high <= last[q_low[:, axis], None])
            else:
                full &= False
        return visited, full

    def allowed(self, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        inside = torch.ones((), dtype=torch.bool, device=q.device)
        for axis in range(3):
            table, dilation = _stacked(self, grids, axis)
            span = table[q[..., 3], q[..., axis]]
            key = k[..., None, :, axis]
            inside = inside & (key >= span[..., :1]) & (key <= span[..., 1:])
            if dilation > 1:
                inside = inside & (key % dilation == q[..., :, None, axis] % dilation)
        return inside


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors must serve training as well
def _stacked(pattern: Intervals, grids: tuple[Grid, ...], axis: int) -> tuple[Tensor, int]:
    """A pattern's bounds in every image, `[images, longest, 2]`, and its step."""
    bounds = [pattern.bounds(grid, axis) for grid in grids]
    longest = max(len(table) for table, _ in bounds)
    return torch.stack([pad(table, (0, 0, 0, longest - len(table))) for table, _ in bounds]), bounds[0][1]


@dataclass(frozen=True)
class Window(Intervals):
    """NATTEN's window: exactly `size` keys per axis, shifted inwards at borders (arXiv 2403.04690, 2504.16922).

    An int applies to all axes of the grid, a pair for height and width, a triple for frames, height and width. An axis shorter than the
    window (after dilation) is kept whole.
    """

    size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "stride", "dilation"):
            object.__setattr__(self, name, axes(name, getattr(self, name)))
        for size, stride in zip(self.per_axis("size"), self.per_axis("stride"), strict=True):
            require(stride <= size, f"stride must be at most the window's size {self.size}", self.stride)

    def per_axis(self, name: str) -> tuple[int, int, int]:
        """The field's values for (T, H, W): an int is that of every axis that `size` names, and axes not named are 1."""
        value = getattr(self, name)
        if isinstance(value, int):
            value = (value,) * (len(self.size) if isinstance(self.size, tuple) else 3)
        filled = (1,) * (3 - len(value)) + value
        return (filled[0], filled[1], filled[2])

    def bounds(self, grid: Grid, axis: int) -> tuple[Tensor, int]:
        size, stride, dilation = (self.per_axis(name)[axis] for name in ("size", "stride", "dilation"))
        return _window_table(grid[axis], size, stride, dilation), dilation

    def pairs(self, grid: Grid) -> int:
        """The product over the axes."""
        spans = [(self.bounds(grid, axis)) for axis in range(3)]
        return math.prod(int(((table[:, 1] - table[:, 0]) // dilation + 1).sum()) for table, dilation in spans)


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)
def _window_table(length: int, size: int, stride: int, dilation: int) -> Tensor:
    """First and last key `[length, 2]` that each query of an axis sees (NATTEN's rule, arXiv 2504.16922)."""
    rows = []
    for i in range(length):
        group, query = i % dilation, i // dilation
        total = -(-(length - group) // dilation)
        k = min(size, total)
        left, right = k // 2, k // 2 + k % 2 - 1
        leader = min(query // stride * stride + stride // 2, total - 1)
        centre = min(max(leader, left), total - 1 - right)
        rows.append([(centre - left) * dilation + group, (centre + right) * dilation + group])
    return torch.tensor(rows)


@dataclass(frozen=True)
class Box(Intervals):
    """Keys within `radius` of the query along every axis, strict (`|distance| < radius`), clipped at borders: the disc's box.

    An int applies to all axes of the grid, a pair for height and width, a triple for frames, height and width; an axis not named has 1.
    """

    invariant = True
    radius: int | tuple[int, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "radius", axes("radius", self.radius))

    @property
    def radii(self) -> tuple[int, int, int]:
        """The radius per axis of (T, H, W)."""
        value = (self.radius,) * 3 if isinstance(self.radius, int) else self.radius
        filled = (1,) * (3 - len(value)) + value
        return (filled[0], filled[1], filled[2])

    def bounds(self, grid: Grid, axis: int) -> tuple[Tensor, int]:
        place, reach = torch.arange(grid[axis]), self.radii[axis] - 1
        return torch.stack([(place - reach).clamp_min(0), place + reach], dim=1), 1
