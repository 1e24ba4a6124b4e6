"""From a spec and a layout to tensors: blocks, the static part of the block lists, and the token predicate. `plans` keeps them."""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.kernels import capture
from dit_accel.kernels.blocks import BlockMap, Blocks, map_from_masks
from dit_accel.method.spec import (
    AttentionSpec,
    Box,
    Disc,
    DiscBlocks,
    Downsampled,
    FirstFrames,
    Linear,
    Order,
    Pooled,
    TopK,
    Window,
    unknown,
)
from dit_accel.operator.layout import Grid, TokenLayout, coordinates, joint_memory_order, joint_partition
from dit_accel.operator.lists import Geometry, Lists, make_geometry

Predicate = Callable[[Tensor, Tensor], Tensor]
Exact = Disc | Window | Box  # patterns that decide token by token
Static = Exact | DiscBlocks | FirstFrames
Key = tuple[AttentionSpec, tuple[Grid, ...], Order, torch.device]
MASK_ELEMENTS = 1 << 20  # pairs of blocks that are looked at together
COUNTED_PAIRS = 1 << 22  # pairs of tokens that are counted together
T = TypeVar("T", Blocks, BlockMap, Geometry, Lists)


@dataclass(frozen=True)
class Plan:
    """What a spec means on one grid, on one device.

    `coords` `[N, 4]`: (t, y, x, image) of the image tokens in the spec's memory order; `image` counts the grids of the layout.
    `to_memory`, `to_raster` `[N]`: permutations, or None where the layout is in that order already. `static`: the visited blocks of the
    patterns that depend on coordinates alone. `short_weight` `[Tk]`: factor of a short block's score where blocks differ, or None.
    `cells` `[N]`: the place of each token among the factor² of each patch that down-sampling sums, `patch_tokens` `[M]`: the tokens of each
    patch; None without down-sampling. `geometry`: the same for compiled kernels. `key`: see
    `plan_key`.
    """

    key: Key
    q_blocks: Blocks
    k_blocks: Blocks
    coords: Tensor
    to_memory: Tensor | None
    to_raster: Tensor | None
    static: BlockMap | None
    predicate: Predicate | None
    top: int
    short_weight: Tensor | None
    cells: Tensor | None
    patch_tokens: Tensor | None
    geometry: Geometry


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # cached tensors must serve training as well
def window_table(length: int, size: int, stride: int, dilation: int) -> Tensor:
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


def _bounds(pattern: Window | Box, grid: Grid, axis: int) -> tuple[Tensor, int]:
    """First and last key `[length, 2]` that each query of an axis sees, and the dilation."""
    length = grid[axis]
    if isinstance(pattern, Box):
        place, reach = torch.arange(length), pattern.radii[axis] - 1
        return torch.stack([(place - reach).clamp_min(0), place + reach], dim=1), 1  # a reference may be larger than the grid
    size, stride, dilation = (pattern.per_axis(name)[axis] for name in ("size", "stride", "dilation"))
    return window_table(length, size, stride, dilation), dilation


def _gaps(q_low: Tensor, q_high: Tensor, k_low: Tensor, k_high: Tensor) -> tuple[Tensor, Tensor]:
    """Squared smallest and largest distance between boxes `[T, 3]` of integer coordinates, as `[Tq, Tk]`."""
    after, before = k_low[None] - q_high[:, None], q_low[:, None] - k_high[None]
    near = torch.maximum(after, before).clamp_min(0)
    far = torch.maximum(k_high[None] - q_low[:, None], q_high[:, None] - k_low[None])
    return near.square().sum(-1), far.square().sum(-1)


def _visits(pattern: Static, grid: Grid, boxes: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Masks `[Tq, Tk]`: blocks that may hold a kept pair (none is missed), and blocks all of whose pairs are kept.

    `grid`: that of the query blocks.
    """
    q_low, _, k_low, _ = boxes
    match pattern:
        case FirstFrames(count):
            first = (k_low[:, 0] < count).expand(len(q_low), -1)
            return first, first
        case Disc() | DiscBlocks():
            near, far = _gaps(*boxes)
            visited = near <= pattern.reach
            return visited, visited if isinstance(pattern, DiscBlocks) else far <= pattern.reach
        case Window() | Box():
            return _visits_of_window(pattern, grid, boxes)
        case _:
            raise unknown(pattern, "the plan of visited blocks")


def _visits_of_window(pattern: Window | Box, grid: Grid, boxes: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    q_low, q_high, k_low, k_high = boxes
    visited, full = torch.ones(2, len(q_low), len(k_low), dtype=torch.bool)
    for axis in range(3):
        table, dilation = _bounds(pattern, grid, axis)
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


def _predicate(patterns: list[Exact], grids: tuple[Grid, ...], device: torch.device) -> Predicate:
    """Whether a pair of coordinates (t, y, x, image) is kept by any of the patterns."""
    tables = {}
    for pattern in patterns:
        for axis in range(3) if isinstance(pattern, Window | Box) else ():
            bounds = [_bounds(pattern, grid, axis) for grid in grids]  # type: ignore[arg-type]
            longest = max(len(table) for table, _ in bounds)
            rows = [pad(table, (0, 0, 0, longest - len(table))) for table, _ in bounds]
            tables[pattern, axis] = torch.stack(rows).to(device), bounds[0][1]

    def inside_window(pattern: Window | Box, q: Tensor, k: Tensor) -> Tensor:
        allowed = torch.ones((), dtype=torch.bool, device=q.device)
        for axis in range(3):
            table, dilation = tables[pattern, axis]
            span = table[q[..., 3], q[..., axis]]
            key = k[..., None, :, axis]
            allowed = allowed & (key >= span[..., :1]) & (key <= span[..., 1:])
            if dilation > 1:
                allowed = allowed & (key % dilation == q[..., :, None, axis] % dilation)
        return allowed

    def inside_disc(pattern: Disc, q: Tensor, k: Tensor) -> Tensor:
        distance = sum((q[..., :, None, axis] - k[..., None, :, axis]).square() for axis in range(3) if max(g[axis] for g in grids) > 1)
        return torch.as_tensor(distance, device=q.device) <= pattern.reach

    def allowed(q: Tensor, k: Tensor) -> Tensor:
        masks = [inside_disc(p, q, k) if isinstance(p, Disc) else inside_window(p, q, k) for p in patterns]
        return functools.reduce(torch.logical_or, masks)

    return allowed


def _joined(masks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    visited, full = (functools.reduce(torch.logical_or, mask) for mask in zip(*masks, strict=True))
    return visited, full


def _static_lists(fixed: list[Static], grids: tuple[Grid, ...], coords: Tensor, blocks: tuple[Blocks, Blocks]) -> BlockMap:
    """The block lists of the patterns that depend on coordinates alone."""
    corners = [coords[side.index] for side in blocks]
    q_boxes, k_boxes = ((corner.amin(1), corner.amax(1)) for corner in corners)
    rows = max(1, MASK_ELEMENTS // len(k_boxes[0]))  # all pairs of blocks at once would fill the memory at a million tokens
    blocks_of = torch.bincount(q_boxes[0][:, 3], minlength=len(grids)).tolist()  # no block holds tokens of two images

    def chunks() -> Iterator[tuple[Tensor, Tensor]]:
        for grid, *bounds in zip(grids, *(bound.split(blocks_of) for bound in q_boxes), strict=True):
            for chunk in zip(*(bound.split(rows) for bound in bounds), strict=True):
                yield _joined([_visits(p, grid, (*(x[:, :3] for x in (*chunk, *k_boxes)),)) for p in fixed])

    return map_from_masks(chunks())


_alive: WeakValueDictionary[Key, Plan] = WeakValueDictionary()  # so that models and layers share a plan; whoever uses one keeps it alive


def plan_key(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> Key:
    """All that a plan depends on: not the text, which has no place in it."""
    return spec, layout.grids, layout.order, device


def make_plan(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> Plan:
    """The plan of a spec on a layout: the one that somebody holds already (`plans` says who does), or a new one.

    A pure function of its arguments; the plan's tensors must not be written to. Raises BackendError where it would be made while a CUDA
    graph is captured: its tensors are copied to the card.
    """
    key = plan_key(spec, layout, device)
    plan = _alive.get(key)
    if plan is None:
        plan = _alive[key] = _new_plan(key)
    return plan


@torch.inference_mode(False)  # the tensors must serve training as well
def _new_plan(key: Key) -> Plan:
    spec, grids, layout_order, device = key
    capture.refuse(device, "its block lists are made and copied to the card")
    q_part = joint_partition(grids, spec.order, spec.block[0])
    k_part = q_part if spec.block[1] == spec.block[0] else joint_partition(grids, spec.order, spec.block[1])
    places = torch.cat([pad(coordinates(grid, torch.arange(math.prod(grid))), (0, 1), value=n) for n, grid in enumerate(grids)])
    coords = places[q_part.order]
    q_blocks, k_blocks = Blocks.from_starts(q_part.starts), Blocks.from_starts(k_part.starts)
    top = next((p for p in spec.keep if isinstance(p, TopK)), None)
    fixed = [p for p in spec.keep if not isinstance(p, TopK)]
    static = _static_lists(fixed, grids, coords, (q_blocks, k_blocks)) if fixed else None
    to_memory = None if layout_order == spec.order else joint_memory_order(grids, layout_order).argsort()[q_part.order]
    exact = [p for p in fixed if isinstance(p, Disc | Window | Box)]
    cells, patch_tokens = _patches(spec.rest.factor, grids, coords) if isinstance(spec.rest, Downsampled) else (None, None)
    geometry = make_geometry(q_part.starts, k_part.starts, coords[:, :3], static, _windows(exact, grids, coords), to_memory, _reach(exact))
    return Plan(
        key=key,
        q_blocks=_moved(q_blocks, device),
        k_blocks=_moved(k_blocks, device),
        coords=coords.to(device),
        to_memory=None if to_memory is None else to_memory.to(device),
        to_raster=None if to_memory is None else to_memory.argsort().to(device),
        static=_moved(static, device) if static else None,
        predicate=_predicate(exact, grids, device) if exact else None,
        top=0 if top is None else top.count(len(k_part.starts[1:])),
        short_weight=None if k_blocks.even else (k_blocks.count.float() / spec.block[1]).sqrt().to(device),
        cells=None if cells is None else cells.to(device),
        patch_tokens=None if patch_tokens is None else patch_tokens.to(device),
        geometry=_moved(geometry, device),
    )


def _patches(factor: int, grids: tuple[Grid, ...], coords: Tensor) -> tuple[Tensor, Tensor]:
    """Which cell of the factor × factor patches each token is in, through all frames of all images, and the tokens of each patch."""
    t, y, x, image = coords.unbind(-1)
    sizes = [(t, -(-h // factor), -(-w // factor)) for t, h, w in grids]
    before = torch.tensor([0, *(math.prod(size) for size in sizes)]).cumsum(0)
    rows, columns = torch.tensor(sizes)[image, 1:].unbind(-1)
    patch = before[image] + (t * rows + y // factor) * columns + x // factor
    return (patch * factor + y % factor) * factor + x % factor, patch.bincount(minlength=int(before[-1]))


def _windows(patterns: list[Exact], grids: tuple[Grid, ...], coords: Tensor) -> list[Tensor]:
    """Per window or box `[3 axes, 3, N]`: the first and the last coordinate that a query sees, and the residue that its keys share."""
    windows = []
    for pattern in patterns:
        if isinstance(pattern, Window | Box):
            rows = torch.empty(3, 3, len(coords), dtype=coords.dtype)
            for axis in range(3):
                for number, grid in enumerate(grids):
                    mine = coords[:, 3] == number
                    table, dilation = _bounds(pattern, grid, axis)
                    place = coords[mine, axis]
                    rows[axis, :, mine] = torch.stack([*table[place].unbind(-1), place % dilation])
            windows.append(rows)
    return windows


def _reach(patterns: list[Exact]) -> int:
    return max((p.reach for p in patterns if isinstance(p, Disc)), default=-1)


def listed_beside(static: BlockMap, chosen: Tensor) -> BlockMap:
    """Static lists and the chosen blocks `[BH, Tq, n]`; a block on both is visited once, as a chosen one: whole.

    Memory is that of the lists: a mask of all pairs of blocks would grow with the square of the tokens.
    """
    listed = static.index.expand(len(chosen), -1, -1).contiguous()
    ordered = chosen.sort(-1).values
    place = torch.searchsorted(ordered, listed).clamp_max(chosen.shape[-1] - 1)
    mine = torch.ones_like(chosen, dtype=torch.bool)
    index = torch.cat([listed, chosen], -1)
    valid = torch.cat([static.valid & (ordered.gather(-1, place) != listed), mine], -1)
    if static.partial is None:
        return BlockMap(index, valid)
    return BlockMap(index, valid, torch.cat([static.partial.expand(len(chosen), -1, -1), torch.zeros_like(mine)], -1))


def _moved(value: T, device: torch.device) -> T:
    """The dataclass with its tensors, and those of dataclasses in it, on a device."""
    moved: dict[str, Any] = {k: x.to(device) for k, x in vars(value).items() if isinstance(x, Tensor)}
    moved |= {k: _moved(x, device) for k, x in vars(value).items() if isinstance(x, Lists)}
    return replace(value, **moved)


def kept_density(spec: AttentionSpec, layout: TokenLayout) -> float:
    """The share of image token pairs that the spec attends to exactly on this grid, counted block list by block list."""
    return _shares(spec, layout.grids).kept


def visited_density(spec: AttentionSpec, layout: TokenLayout) -> float:
    """The share of image token pairs in the blocks that are visited: `kept_density` and what partial blocks compute in vain."""
    return _shares(spec, layout.grids).visited


class _Shares(NamedTuple):
    """Shares of image token pairs, and the number of key blocks."""

    kept: float
    visited: float
    blocks: int


@functools.lru_cache(maxsize=256)
def _shares(spec: AttentionSpec, grids: tuple[Grid, ...]) -> _Shares:
    plan = make_plan(spec, TokenLayout(grids[0], order=spec.order, references=grids[1:]), torch.device("cpu"))
    tokens, blocks = len(plan.coords), len(plan.k_blocks.count)
    # a chosen block's size depends on the content: its mean is taken where blocks differ
    visited = spared = 0
    if plan.static:
        keys = plan.k_blocks.count[plan.static.index] * plan.static.valid
        visited = int((keys.sum(-1) * plan.q_blocks.count).sum())
        spared = visited - _static_pairs(plan, plan.static)
    chosen = plan.top * tokens * tokens / blocks
    return _Shares(min(1.0, (visited - spared + chosen) / tokens**2), min(1.0, (visited + chosen) / tokens**2), blocks)


def _static_pairs(plan: Plan, static: BlockMap) -> int:
    """Pairs of tokens in the static lists that are kept: all of a whole block, of a partial one those that the predicate allows."""
    partial = torch.zeros_like(static.valid) if static.partial is None else static.partial & static.valid
    whole = plan.k_blocks.count[static.index] * (static.valid & ~partial)
    pairs = int((whole.sum(-1) * plan.q_blocks.count).sum())
    row, place = partial.nonzero(as_tuple=True)
    if plan.predicate is None or not len(row):
        return pairs
    column = static.index[row, place]
    together = max(1, COUNTED_PAIRS // (plan.q_blocks.index.shape[1] * plan.k_blocks.index.shape[1]))
    for rows, columns in zip(row.split(together), column.split(together), strict=True):
        allowed = plan.predicate(plan.coords[plan.q_blocks.index[rows]], plan.coords[plan.k_blocks.index[columns]])
        tokens = plan.q_blocks.valid[rows][..., :, None] & plan.k_blocks.valid[columns][..., None, :]
        pairs += int((allowed & tokens).sum())
    return pairs


def multiply_adds(spec: AttentionSpec, layout: TokenLayout, head_dim: int) -> float:
    """Multiply-adds of image queries over image keys as a share of dense attention's 2·N²·D: visited pairs, and what the rest costs."""
    tokens, (_, share, blocks) = layout.image, _shares(spec, layout.grids)
    match spec.rest:
        case Linear(_, "all"):  # states once, then one product with each query
            share += head_dim / tokens
        case Linear():  # and the sum of states for each query block
            share += head_dim / tokens + blocks * blocks * head_dim / (2 * tokens * tokens)
        case Pooled(_, variance, _):  # logits from q and q², one value
            share += (3 if variance else 2) / 2 * blocks / tokens
        case Downsampled(factor):
            share += 1 / factor**2
        case None:
            pass
        case _:
            raise unknown(spec.rest, "multiply_adds")
    return share + (blocks * blocks / (2 * tokens * tokens) if spec.density is not None else 0.0)
