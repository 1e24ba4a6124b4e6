"""Tile order: a permutation whose inverse is exact, whose tiles are boxes, never larger than asked for, never slivers; lists of blocks."""

import math
from typing import Any

import pytest
import torch
from helpers import Grid, Largest, block_of

from dit_accel.kernels.blocks import BlockMap
from dit_accel.method import Order, Raster, Tiles
from dit_accel.operator.blocks_of_grid import with_chosen
from dit_accel.operator.layout import TokenLayout, coordinates, memory_order, partition, raster_order

GRIDS = [(1, 1, 1), (1, 3, 50), (1, 17, 23), (5, 9, 7), (1, 64, 64)]
ORDERS = [Tiles((2, 4, 4)), Tiles((4, 16)), Tiles(), Raster()]

every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: "x".join(map(str, g)))
every_order = pytest.mark.parametrize("order", ORDERS, ids=str)
every_tiling = pytest.mark.parametrize("order", ORDERS[:-1], ids=str)


def tile_extents(grid: Grid, order: Order) -> torch.Tensor:
    """Side lengths `[T, 3]` of the box around each tile."""
    part = partition(grid, order, 64)
    places = coordinates(grid, part.order).split((part.starts[1:] - part.starts[:-1]).tolist())
    return torch.stack([place.amax(0) - place.amin(0) + 1 for place in places])


def test_text_and_image_share_the_sequence() -> None:
    for text in (0, 7):
        first, last = TokenLayout((1, 3, 5), text), TokenLayout((1, 3, 5), text, text_first=False, references=((1, 2, 2),))
        places = list(range(first.tokens))
        assert places[first.text_slice] + places[first.image_slice] == places
        places = list(range(last.tokens))
        assert places[last.image_slice] + places[last.text_slice] == places
        assert (len(places[last.text_slice]), len(places[last.image_slice])) == (text, 19)


@every_order
@every_grid
def test_to_memory_and_back_is_exact(grid: Grid, order: Order) -> None:
    x = torch.randn(2, math.prod(grid), 3)
    torch.testing.assert_close(x[:, memory_order(grid, order)][:, raster_order(grid, order)], x, rtol=0, atol=0)


@every_order
@every_grid
def test_every_token_has_one_place(grid: Grid, order: Order) -> None:
    assert memory_order(grid, order).sort().values.tolist() == list(range(math.prod(grid)))


@every_order
@every_grid
def test_blocks_are_consecutive_in_memory(grid: Grid, order: Order) -> None:
    part = partition(grid, order, 64)
    expected = block_of((grid,), order, 64)[part.order]
    sizes = part.starts[1:] - part.starts[:-1]
    assert torch.equal(torch.arange(len(sizes)).repeat_interleave(sizes), expected)


@every_tiling
@every_grid
def test_tiles_are_full_boxes_no_larger_than_the_shape(grid: Grid, order: Tiles) -> None:
    starts = partition(grid, order, 64).starts
    extents = tile_extents(grid, order)
    assert torch.equal(extents.prod(-1), starts[1:] - starts[:-1])
    assert (extents <= torch.tensor(order.sides)).all()


@every_tiling
@every_grid
def test_tile_sizes_differ_by_at_most_one_per_axis(grid: Grid, order: Tiles) -> None:
    extents = tile_extents(grid, order)
    assert (extents.amax(0) - extents.amin(0) <= 1).all()


@every_tiling
@every_grid
def test_there_are_no_more_tiles_than_needed(grid: Grid, order: Tiles) -> None:
    needed = math.prod(math.ceil(n / side) for n, side in zip(grid, order.sides, strict=True))
    assert len(tile_extents(grid, order)) == needed


def test_tile_order_where_tiles_divide_the_grid() -> None:
    expected = torch.arange(64 * 48).view(8, 8, 6, 8).permute(0, 2, 1, 3).reshape(-1)
    assert torch.equal(memory_order((1, 64, 48), Tiles((8, 8))), expected)


def test_raster_blocks_end_with_a_short_one() -> None:
    assert partition((1, 17, 23), Raster(), 64).starts.tolist() == [0, 64, 128, 192, 256, 320, 384, 391]


@every_grid
def test_coordinates_are_those_of_the_raster(grid: Grid) -> None:
    t, y, x = coordinates(grid, torch.arange(math.prod(grid))).unbind(-1)
    assert torch.equal(torch.arange(math.prod(grid)).view(grid)[t, y, x], torch.arange(math.prod(grid)))


def test_layout_counts_its_tokens() -> None:
    layout = TokenLayout((5, 9, 7), text=77)
    assert (layout.image, layout.tokens) == (315, 392)


def test_layout_takes_a_grid_from_json() -> None:
    assert hash(TokenLayout([1, 2, 3])) == hash(TokenLayout((1, 2, 3)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        pytest.param({"grid": (1, 0, 4)}, r"\(1, 0, 4\)", id="empty-axis"),
        pytest.param({"grid": (1, -3, 4)}, r"\(1, -3, 4\)", id="negative-axis"),
        pytest.param({"grid": (4, 4)}, r"\(4, 4\)", id="two-axes"),
        pytest.param({"grid": (1, 4.0, 4)}, r"\(1, 4\.0, 4\)", id="float-axis"),
        pytest.param({"grid": (1, 4, 4), "text": -1}, "-1", id="negative-text"),
        pytest.param({"grid": (1, 4, 4), "text": 1.5}, r"1\.5", id="float-text"),
        pytest.param({"grid": (1, 4, 4), "text": None}, "None", id="no-text"),
    ],
)
def test_layout_refuses(arguments: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        TokenLayout(**arguments)


def test_frames_beside_chosen_blocks_make_no_mask_of_all_pairs() -> None:
    """Lists of 4 + 4 among 1,000 blocks."""
    chosen = torch.rand(2, 1000, 1000, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :4]
    fixed = torch.arange(4).expand(1000, -1)
    static = BlockMap(fixed, torch.ones_like(fixed, dtype=torch.bool))
    with Largest() as seen:
        both = with_chosen(static, chosen)
    assert 0 < seen.elements < 2 * 1000 * 1000 // 10
    twice = (fixed[..., None] == chosen[..., None, :]).any(-1)
    assert twice.any()
    assert torch.equal(both.valid, torch.cat([~twice, torch.ones_like(chosen, dtype=torch.bool)], -1))
    assert torch.equal(both.index, torch.cat([fixed.expand(2, -1, -1), chosen], -1))
