"""Bit masks of partial blocks: what they say is what the patterns say, and there are few of them however many tokens there are."""

from dataclasses import dataclass

import pytest
import torch
from helpers import Grids, Shape, box_pairs, coordinates, disc_pairs, image_of, window_pairs
from torch import Tensor

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.kernels.blocks import unpacked
from dit_accel.method import Box, Disc, Raster, Tiles, Tokenwise, Window
from dit_accel.method.parts import Boxes, Grid
from dit_accel.operator import bit_masks
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.cost import kept_density

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Chess(Tokenwise):
    """Keys on squares of the query's colour, on a board of each image: not the same under translation of one of the two."""

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        every = torch.ones(len(boxes[0]), len(boxes[2]), dtype=torch.bool)
        return every, torch.zeros_like(every)

    def allowed(self, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        return q.sum(-1)[..., :, None] % 2 == k.sum(-1)[..., None, :] % 2


def chess_pairs(grids: Grids) -> Tensor:
    colour = (coordinates(grids).sum(-1) + image_of(grids)) % 2
    return colour[:, None] == colour


def kept_by(plan: Plan) -> Tensor:
    """`[N, N]` in raster order: what lists and masks keep."""
    lists, g, tokens = plan.geometry.lists, plan.geometry, len(plan.coords)
    assert lists is not None
    assert lists.mask_of is not None
    assert g.masks is not None
    kept = torch.zeros(tokens, tokens, dtype=torch.bool)
    bits = unpacked(g.masks, plan.k_blocks.index.shape[1])
    for row in range(len(lists.counts)):
        q = plan.q_blocks.index[row, plan.q_blocks.valid[row]]
        for place, column in enumerate(lists.index[row, : lists.counts[row]].tolist()):
            k = plan.k_blocks.index[column, plan.k_blocks.valid[column]]
            whole = place < int(lists.full[row])
            kept[q[:, None], k] |= whole | bits[lists.mask_of[row, place]][: len(q), : len(k)]
    return kept


PATTERNS = {
    "disc": ((Disc(2.5),), lambda grids: disc_pairs(grids, 2.5)),
    "disc-and-window": ((Disc(3), Window((1, 7))), lambda grids: disc_pairs(grids, 3) | window_pairs(grids, Window((1, 7)))),
    "disc-and-box": ((Disc(3), Box((1, 4))), lambda grids: disc_pairs(grids, 3) | box_pairs(grids, (1, 1, 4))),
    "chess": ((Chess(),), chess_pairs),
}
ORDERS = {"tiles": (Tiles((4, 4)), (16, 16)), "raster": (Raster(), (32, 128))}


@pytest.mark.parametrize("grids", [((1, 9, 7),), ((3, 5, 6),), ((1, 7, 6), (1, 9, 3))], ids=str)
@pytest.mark.parametrize("order", ["tiles", "raster"])
@pytest.mark.parametrize("name", PATTERNS)
def test_masks_say_what_the_patterns_say(name: str, order: str, grids: Grids) -> None:
    patterns, pairs = PATTERNS[name]
    spec = AttentionSpec(patterns, order=ORDERS[order][0], block=ORDERS[order][1])
    layout = TokenLayout(grids[0], references=grids[1:])
    plan, expected = make_plan(spec, layout, CPU), pairs(grids)
    assert kept_by(plan).equal(expected)
    g = plan.geometry
    assert g.masks is not None
    assert g.masks_t is not None
    widths = [blocks.index.shape[1] for blocks in (plan.q_blocks, plan.k_blocks)]
    assert unpacked(g.masks_t, widths[0]).mT.equal(unpacked(g.masks, widths[1]))
    assert len(g.masks.flatten(1).unique(dim=0)) == len(g.masks)
    assert kept_density(spec, layout) == pytest.approx(float(expected.double().mean()), abs=1e-12)


@dataclass(frozen=True)
class Everything(Chess):
    """Chess of one colour, which cuts no block."""

    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        every, _ = super().visits(grid, boxes)
        return every, every

    def allowed(self, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        return torch.ones(*q.shape[:-1], k.shape[-2], dtype=torch.bool)


def test_a_pattern_that_cuts_no_block_needs_no_masks() -> None:
    spec, shape = AttentionSpec((Everything(),), order=Tiles((4, 4)), block=(16, 16)), Shape(1, 1, 16, (1, 9, 7))
    q, k, v = shape.inputs()
    assert make_plan(spec, shape.layout, CPU).geometry.masks is None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for backend in ("cpu", "reference"):
        torch.testing.assert_close(attention(q, k, v, spec, shape.layout, backend=backend), expected, rtol=1e-5, atol=1e-5)


def test_windows_alone_need_no_masks() -> None:
    g = make_plan(AttentionSpec((Window(5), Box(3))), TokenLayout((1, 17, 23)), CPU).geometry
    assert g.masks is None
    assert g.windows is not None
    assert len(g.windows) == 2


@pytest.mark.parametrize("order", [Tiles((8, 8)), Raster()], ids=["tiles", "raster"])
def test_the_number_of_masks_does_not_grow_with_the_grid(order: Tiles | Raster, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    allowed = Disc.allowed

    def counted(self: Disc, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        looked.append(len(q))
        return allowed(self, q, k, grids)

    monkeypatch.setattr(Disc, "allowed", counted)
    found = []
    for side in (64, 128, 192):
        looked.clear()
        plan = make_plan(AttentionSpec((Disc(9),), order=order), TokenLayout((1, side, side), order=order), CPU)
        assert plan.geometry.masks is not None
        found.append((len(plan.geometry.masks), sum(looked)))
    assert found[1] == found[2]
    assert found[1][1] < 200


def test_masks_of_all_pairs_are_made_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, layout = AttentionSpec((Chess(),), order=Tiles((4, 4)), block=(16, 16)), TokenLayout((1, 24, 24))
    whole = make_plan(spec, layout, CPU).geometry
    sizes: list[int] = []
    real = bit_masks._allowed
    monkeypatch.setattr(bit_masks, "TOGETHER", 5 * 256)
    monkeypatch.setattr(bit_masks, "_allowed", lambda *args: (sizes.append(len(args[-1])), real(*args))[1])
    from dit_accel.operator import blocks_of_grid

    pieces = blocks_of_grid._new_plan(blocks_of_grid.plan_key(spec, layout, CPU)).geometry
    assert max(sizes) == 5
    assert sum(sizes) == 36 * 36
    assert whole.masks is not None
    assert pieces.masks is not None
    assert whole.masks.equal(pieces.masks)
    assert len(whole.masks) == 1  # tiles of even sides are alike


@pytest.mark.parametrize("alike", [False, True], ids=["sums", "one-sum"])
def test_rows_are_told_apart_whatever_their_sums(alike: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    top = -(2**63)
    rows = torch.tensor([[top, 0], [0, top], [top, top], [0, 0], [top, 0], [1, -1], [-1, 1]])
    if alike:
        monkeypatch.setattr(bit_masks, "_sums", lambda flat: torch.zeros(len(flat), dtype=torch.int64))
    first, number = bit_masks.distinct(rows)
    assert len(first) == 6
    assert rows[first][number].equal(rows)
