"""The catalogue's keep patterns that depend on places alone: each is dense attention under a mask written from its paper's rule."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import Grid, Shape, block_of, coordinates, image_of, membership, window_pairs
from torch import Tensor

from dit_accel import GNA, AttentionSpec, TokenLayout, attention
from dit_accel.errors import ArgumentError
from dit_accel.method import DiscBlocks, Mass, Pattern, Pooled, PowerTiles, Raster, Stripes, Tiles, TopK, Window
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.cost import kept_density

TILE = Tiles((4, 4))
SHAPES = {
    "29x14-text-5": Shape(1, 1, 16, (1, 29, 14), 5),
    "video": Shape(1, 1, 8, (3, 5, 33)),
    "references-text-last": Shape(1, 1, 16, (1, 17, 10), 3, False, ((1, 9, 15), (1, 3, 3))),
    "one-row": Shape(1, 1, 16, (1, 1, 90), 2),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def under_mask(qkv: list[Tensor], kept: Tensor, layout: TokenLayout) -> Tensor:
    """Dense attention in float64 where image queries see the image keys `kept` `[..., N, N]` and all text, and text sees everything."""
    before = (layout.text, 0) if layout.text_first else (0, layout.text)
    return F.scaled_dot_product_attention(*(x.double() for x in qkv), attn_mask=F.pad(kept, before * 2, value=True))


def tile_of(place: Tensor, length: int, side: int) -> Tensor:
    """An axis of L tokens is cut into P = ceil(L / side) parts, part p from ⌊L·p/P⌋ on; further on they repeat."""
    parts = math.ceil(length / side)
    first = torch.tensor([length * p // parts for p in range(parts)])
    return place // length * parts + (place % length >= first[:, None]).sum(0) - 1


def whole_tiles(shape: Shape, order: Tiles, rule: Callable[[Tensor], Tensor]) -> Tensor:
    """`[N, N]`: all pairs of the tiles in which some pair of tokens is at an offset in tiles `[n, 3]` that the rule keeps `[n]`."""
    grids, places = shape.layout.grids, coordinates(shape.layout.grids)
    near = torch.zeros(len(places), len(places), dtype=torch.bool)
    for number, grid in enumerate(grids):
        mine = image_of(grids) == number
        cut = torch.stack([tile_of(x, n, side) for x, n, side in zip(places.unbind(-1), grid, order.sides, strict=True)], -1)
        offsets = cut[None] - cut[mine][:, None]
        code, inverse = ((offsets + 100) @ torch.tensor([1000_000, 1000, 1])).unique(return_inverse=True)
        near[mine] = rule(torch.stack([code // 1000_000, code // 1000 % 1000, code % 1000], -1) - 100)[inverse]
    m = membership(block_of(grids, order, 16))
    return m @ (m.T @ near.double() @ m > 0).double() @ m.T > 0


def power_rule(near: int) -> Callable[[Tensor], Tensor]:
    """Near along all axes, or exactly one axis differs, by a power of two."""

    def rule(offset: Tensor) -> Tensor:
        size = offset.abs()
        one = ((size > 0).sum(-1) == 1) & torch.isin(size.sum(-1), 2 ** torch.arange(12))
        return (size.amax(-1) <= near) | one

    return rule


def stripes_rule(power: float, span: int) -> Callable[[Tensor], Tensor]:
    """Within `span` of an anchor ⌈i^(1/p)⌉ · d, d one of the directions (-1, 0 or 1 along each axis)."""

    def rule(offset: Tensor) -> Tensor:
        kept = torch.zeros(offset.shape[:-1], dtype=torch.bool)
        for i in range(40):
            for direction in itertools.product((-1, 0, 1), repeat=3):
                anchor = math.ceil(round(i ** (1 / power), 6)) * torch.tensor(direction)
                kept |= (offset - anchor).abs().amax(-1) <= span
        return kept

    return rule


PATTERNS: dict[str, tuple[Pattern, Callable[[Tensor], Tensor]]] = {
    "powers": (PowerTiles(), power_rule(1)),
    "powers-alone": (PowerTiles(near=0), power_rule(0)),
    "stripes": (Stripes(), stripes_rule(0.5, 1)),
    "stripes-without-span": (Stripes(span=0), stripes_rule(0.5, 0)),
    "cubes": (Stripes(power=1 / 3, span=0), stripes_rule(1 / 3, 0)),
    "between": (Stripes(power=0.7, span=0), stripes_rule(0.7, 0)),
}


@every_shape
@pytest.mark.parametrize(("pattern", "rule"), PATTERNS.values(), ids=PATTERNS)
def test_offsets_of_tiles(pattern: Pattern, rule: Callable[[Tensor], Tensor], shape: Shape) -> None:
    order = Tiles((2, 2, 4)) if shape.grid[0] > 1 else TILE
    spec = AttentionSpec((pattern,), order=order, block=(16, 16))
    kept = whole_tiles(shape, order, rule)
    assert 0.02 < kept.double().mean() < 1
    found = attention(*shape.inputs(torch.float64), spec, shape.layout)
    torch.testing.assert_close(found, under_mask(shape.inputs(), kept, shape.layout), rtol=1e-6, atol=1e-6)
    assert kept_density(spec, shape.layout) == pytest.approx(float(kept.double().mean()))


def tiles_kept(pattern: Pattern, grid: Grid) -> Tensor:
    """`[T, T]`: the tiles that each tile keeps."""
    plan = make_plan(AttentionSpec((pattern,), order=TILE, block=(16, 16)), TokenLayout(grid), torch.device("cpu"))
    assert plan.static is not None
    return plan.static.kept(len(plan.k_blocks.count))


def test_powers_reach_every_tile_in_as_many_layers_as_the_logarithms_add_up_to() -> None:
    kept = tiles_kept(PowerTiles(near=0), (1, 4 * 9, 4 * 6)).double()
    layers = math.ceil(math.log2(9)) + math.ceil(math.log2(6))
    assert bool((torch.linalg.matrix_power(kept, layers) > 0).all())
    assert not bool((torch.linalg.matrix_power(kept, 2) > 0).all())


def test_powers_keep_few_tiles_of_a_large_picture() -> None:
    """At 32 × 32 tiles 3 · 3 around the query and 4 powers in 4 directions, of which the border cuts off some."""
    kept = tiles_kept(PowerTiles(), (1, 128, 128)).sum(-1).view(32, 32)
    assert int(kept.max()) == 9 + 2 * 2 * 3 + 2  # from a tile in the middle 16 away is inside the picture on one side of each axis
    assert int(kept[0, 0]) == 4 + 2 * 4


def test_stripes_are_sparse_and_a_wide_span_is_everything() -> None:
    row = tiles_kept(Stripes(span=0), (1, 1, 400))[0]
    assert row.nonzero().flatten().tolist() == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
    assert bool(tiles_kept(Stripes(power=1.0, span=0), (1, 1, 90)).all())
    assert bool(tiles_kept(Stripes(span=9), (1, 37, 22)).all())
    anchors = 1 + 8 * 4  # at most 16 tiles away
    assert int(tiles_kept(Stripes(), (1, 68, 68)).sum(-1).max()) <= 9 * anchors


def test_a_grid_within_reach_is_dense() -> None:
    shape = Shape(1, 2, 16, (1, 11, 8), 5)
    for pattern in (PowerTiles(near=2), Stripes(span=2)):
        qkv = shape.inputs(torch.float64)
        found = attention(*qkv, AttentionSpec((pattern,), Pooled(), Mass(), TILE, (16, 16)), shape.layout)
        torch.testing.assert_close(found, F.scaled_dot_product_attention(*qkv), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("pattern", [PowerTiles(), Stripes()], ids=str)
def test_runs_of_tokens_have_no_offsets(pattern: Pattern) -> None:
    with pytest.raises(ArgumentError, match="requires an order of boxes, as Tiles"):
        AttentionSpec((pattern,), order=Raster())


@pytest.mark.parametrize(
    "make", [lambda: PowerTiles(-1), lambda: PowerTiles(1.5), lambda: Stripes(0), lambda: Stripes(2.0), lambda: Stripes(span=-1)]
)
def test_fields_out_of_range_are_refused(make: Callable[[], Pattern]) -> None:
    with pytest.raises(ArgumentError, match="must be a number"):
        make()


# Methods whose pattern is one that exists


@every_shape
def test_transnormers_diagonal_attention_is_the_own_tile(shape: Shape) -> None:
    """TransNormer (arXiv 2210.10340): softmax inside each block alone, `DiscBlocks(1)`."""
    order = Tiles((2, 2, 4)) if shape.grid[0] > 1 else TILE
    single = Shape(shape.batch, shape.heads, shape.head_dim, shape.grid, shape.text, shape.text_first)
    number = block_of((shape.grid,), order, 16)
    found = attention(*single.inputs(torch.float64), AttentionSpec((DiscBlocks(1),), order=order, block=(16, 16)), single.layout)
    expected = under_mask(single.inputs(), number[:, None] == number, single.layout)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("own", [False, True], ids=["chosen alone", "own tile too"])
def test_the_own_tile_is_kept_in_addition_to_the_chosen(own: bool) -> None:
    shape = Shape(1, 2, 16, (1, 13, 18), 5)
    qkv = shape.inputs()
    number = block_of((shape.grid,), TILE, 16)
    m = membership(number)
    q, k = (x[:, :, 5:].double() for x in qkv[:2])
    score = (m.T @ q / m.sum(0)[:, None]) @ (m.T @ k / m.sum(0)[:, None]).mT
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(4, -1).indices, True)
    diagonal = torch.eye(len(m.T), dtype=torch.bool)
    assert not bool((kept & diagonal).any(-1).all())
    kept = kept | diagonal if own else kept
    keep = (TopK(0.2), DiscBlocks(1)) if own else (TopK(0.2),)
    found = attention(*(x.double() for x in qkv), AttentionSpec(keep, order=TILE, block=(16, 16)), shape.layout)
    expected = under_mask(qkv, kept[..., number, :][..., number], shape.layout)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_l2vits_windows_are_a_window_that_moves_by_its_size() -> None:
    """L²ViT (arXiv 2501.16182): the picture is cut into windows of 7 × 7, softmax inside each."""
    shape = Shape(1, 2, 16, (1, 14, 21), 3)
    y, x = coordinates(shape.layout.grids)[:, 1:].unbind(-1)
    number = y // 7 * 3 + x // 7
    found = attention(*shape.inputs(torch.float64), GNA((7, 7), stride=7, tile=(4, 4)), shape.layout)
    expected = under_mask(shape.inputs(), number[:, None] == number, shape.layout)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


WINDOWS = {
    "neighbourhood, arXiv 2403.04690": GNA((5, 7), tile=(4, 4)),
    "dilated neighbourhood, arXiv 2403.04690": GNA((3, 5), dilation=(2, 3), tile=(4, 4)),
    "generalised, arXiv 2504.16922": GNA((6, 6), stride=(2, 3), tile=(4, 4)),
    "sliding tiles, arXiv 2502.04507": GNA((12, 12), stride=4, tile=(4, 4)),
}


@pytest.mark.parametrize("spec", WINDOWS.values(), ids=WINDOWS)
def test_neighbourhood_attention(spec: AttentionSpec) -> None:
    shape = Shape(1, 2, 16, (1, 17, 14), 5)
    (window,) = spec.keep
    assert isinstance(window, Window)
    found = attention(*shape.inputs(torch.float64), spec, shape.layout)
    expected = under_mask(shape.inputs(), window_pairs(shape.layout.grids, window), shape.layout)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
