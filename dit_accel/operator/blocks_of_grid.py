"""From a spec and a layout to tensors: blocks, the static part of the block lists, and what decides token by token. `plans` keeps them."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad

from dit_accel.kernels import capture
from dit_accel.kernels.blocks import BlockMap, Blocks, map_from_masks
from dit_accel.kernels.replay import Records
from dit_accel.method.parts import Grid, Ground, Intervals, Order, Static
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.bit_masks import bit_masks
from dit_accel.operator.layout import TokenLayout, coordinates, joint_memory_order, joint_partition
from dit_accel.operator.lists import FARTHEST, Geometry, Lists, make_geometry

Key = tuple[AttentionSpec, tuple[Grid, ...], Order, torch.device]
RECORDS = 64  # calls by a plan that are remembered: of so many lengths of text
TOGETHER = 32  # query blocks, neighbours in memory, that have one box around them
T = TypeVar("T", Blocks, BlockMap, Geometry, Lists)


@dataclass(frozen=True)
class Plan:
    """What a spec means on one grid, on one device.

    `q_blocks`, `k_blocks`: the spec's blocks of the image tokens, which are in the layout's order. `coords` `[N, 4]`: (t, y, x, image) of
    those tokens; `image` counts the grids of the layout. `static`: the visited blocks of the patterns that depend on coordinates alone.
    `top`: the most blocks that are chosen for a query block in addition. `prepared`: what the spec's parts keep of the grid (`Call`).
    `geometry`: the same for compiled kernels, in the blocks' order. `key`: see `plan_key`. `records`: of calls by it.
    """

    key: Key
    q_blocks: Blocks
    k_blocks: Blocks
    coords: Tensor
    static: BlockMap | None
    top: int
    prepared: dict[str, Tensor]
    geometry: Geometry
    records: Records = field(default_factory=lambda: Records(RECORDS), init=False, compare=False, repr=False)


def _joined(masks: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    visited, full = (functools.reduce(torch.logical_or, mask) for mask in zip(*masks, strict=True))
    return visited, full


def _static_lists(fixed: Sequence[Static], grids: tuple[Grid, ...], coords: Tensor, blocks: tuple[Blocks, Blocks]) -> BlockMap:
    """The block lists of the patterns that depend on coordinates alone.

    Query blocks are looked at some at a time, over the key blocks that a box around all of them may visit: to look at every pair of blocks
    takes minutes at a million tokens.
    """
    corners = [coords[side.index] for side in blocks]
    q_boxes, k_boxes = ((corner.amin(1), corner.amax(1)) for corner in corners)
    k_corners = tuple(corner[:, :3] for corner in k_boxes)
    blocks_of = torch.bincount(q_boxes[0][:, 3], minlength=len(grids)).tolist()  # no block contains tokens of two images

    def chunks() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for grid, *bounds in zip(grids, *(bound[:, :3].split(blocks_of) for bound in q_boxes), strict=True):
            for low, high in zip(*(bound.split(TOGETHER) for bound in bounds), strict=True):
                columns = _may_be_visited(fixed, grid, low, high, k_corners)
                boxes = (low, high, *(corner[columns] for corner in k_corners))
                visited, full = _joined([pattern.visits(grid, boxes) for pattern in fixed])
                yield visited, full, columns

    return map_from_masks(chunks())


def _may_be_visited(fixed: Sequence[Static], grid: Grid, low: Tensor, high: Tensor, keys: tuple[Tensor, ...]) -> Tensor:
    """The key blocks, of all, that any of the query blocks `low` to `high` may visit."""
    if not all(pattern.nested_boxes for pattern in fixed):
        return torch.arange(len(keys[0]))
    around = (low.amin(0, keepdim=True), high.amax(0, keepdim=True), *keys)
    return _joined([pattern.visits(grid, around) for pattern in fixed])[0][0].nonzero().flatten()  # type: ignore[arg-type]


_alive: WeakValueDictionary[Key, Plan] = WeakValueDictionary()  # so that models and layers share a plan; whoever uses one keeps it alive


def plan_key(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> Key:
    """All that a plan depends on: not the text, which has no place in it."""
    return spec, layout.grids, layout.order, device


def make_plan(spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> Plan:
    """The plan of a spec on a layout: the one that is in use already (`plans` keeps them), or a new one.

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
    raster = torch.cat([pad(coordinates(grid, torch.arange(math.prod(grid))), (0, 1), value=n) for n, grid in enumerate(grids)])
    in_blocks = raster[q_part.order]  # coordinates in the blocks' order
    blocks = Blocks.from_starts(q_part.starts), Blocks.from_starts(k_part.starts)
    static = _static_lists(spec.static, grids, in_blocks, blocks) if spec.static else None
    to_memory = None if layout_order == spec.order else joint_memory_order(grids, layout_order).argsort()[q_part.order]
    masks = None
    if static is not None and static.partial is not None and not all(pattern.intervals for pattern in spec.tokenwise):
        masks = bit_masks(spec.tokenwise, grids, in_blocks, *blocks, static)
        static = replace(static, mask_of=masks.mask_of)
    geometry = make_geometry(
        q_part.starts, k_part.starts, in_blocks[:, :3], static,
        [_window(pattern, grids, in_blocks) for pattern in spec.tokenwise if pattern.intervals],  # type: ignore[arg-type]
        to_memory, masks, bits=spec.rest is not None and spec.selection is None,
    )  # fmt: skip
    coords = in_blocks
    if to_memory is not None:
        coords, blocks = in_blocks[to_memory.argsort()], (blocks[0].among(to_memory), blocks[1].among(to_memory))
    ground = Ground(grids, coords, *blocks, spec.block)
    prepared = {name: tensor for part in spec.parts() for name, tensor in part.prepare(ground).items()}
    return Plan(
        key=key,
        q_blocks=moved(blocks[0], device),
        k_blocks=moved(blocks[1], device),
        coords=ground.coords.to(device),
        static=moved(static, device) if static else None,
        top=spec.selection.count(len(k_part.starts) - 1) if spec.selection else 0,
        prepared={name: tensor.to(device) for name, tensor in prepared.items()},
        geometry=moved(geometry, device),
    )


def _window(pattern: Intervals, grids: tuple[Grid, ...], coords: Tensor) -> Tensor:
    """`[3 axes, 3, N]`: the first and the last coordinate that a query sees, and the residue that its keys share."""
    rows = torch.empty(3, 3, len(coords), dtype=coords.dtype)
    for axis in range(3):
        for number, grid in enumerate(grids):
            mine = coords[:, 3] == number
            table, dilation = pattern.bounds(grid, axis)
            place = coords[mine, axis]
            rows[axis, :, mine] = torch.stack([*table[place].unbind(-1), place % dilation])
    return rows


def with_chosen(static: BlockMap, chosen: Tensor, given: Tensor | None = None) -> BlockMap:
    """Static lists and the chosen blocks `[BH, Tq, n]`, all or those `given`; a block on both is visited once, as a chosen one: whole.

    Memory is that of the lists: a mask of all pairs of blocks would grow with the square of the tokens.
    """
    listed = static.index.expand(len(chosen), -1, -1).contiguous()
    mine = torch.ones_like(chosen, dtype=torch.bool) if given is None else given
    ordered = chosen.masked_fill(~mine, FARTHEST).sort(-1).values
    place = torch.searchsorted(ordered, listed).clamp_max(chosen.shape[-1] - 1)
    index = torch.cat([listed, chosen], -1)
    valid = torch.cat([static.valid & (ordered.gather(-1, place) != listed), mine], -1)
    if static.partial is None:
        return BlockMap(index, valid)
    partial = torch.cat([static.partial.expand(len(chosen), -1, -1), torch.zeros_like(mine)], -1)
    if static.mask_of is None:
        return BlockMap(index, valid, partial)
    mask_of = torch.cat([static.mask_of.expand(len(chosen), -1, -1), torch.zeros_like(chosen, dtype=torch.int32)], -1)
    return BlockMap(index, valid, partial, mask_of=mask_of)


def moved(value: T, device: torch.device) -> T:
    """The dataclass with its tensors, and those of dataclasses in it, on a device."""
    there: dict[str, Any] = {k: x.to(device) for k, x in vars(value).items() if isinstance(x, Tensor)}
    there |= {k: moved(x, device) for k, x in vars(value).items() if isinstance(x, Lists)}
    return replace(value, **there)
