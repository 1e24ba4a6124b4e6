"""What the operator is measured against: FlexAttention's blocks and NATTEN's windows mean the same pairs as the operator's own."""

import dataclasses
import re
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, oracle
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_accel.measure import rivals as bench_rivals
from dit_accel.method import AttentionSpec, Disc, DiscBlocks, ErrorProduct, Linear, Pooled, Raster, Tiles, TopK, Window
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout

CPU = torch.device("cpu")
SPECS = {
    "clear": CLEAR(4.5, tile=(4, 4)),
    "top-k": AttentionSpec((TopK(0.2),), order=Tiles((4, 4)), block=(16, 16)),
    "top-k-and-disc": AttentionSpec((TopK(0.1), Disc(5)), order=Tiles((4, 4)), block=(16, 16)),
    "gna-strided": GNA((5, 6), stride=(2, 3), tile=(4, 4)),
    "gna-dilated": GNA((3, 3), dilation=(2, 3), tile=(4, 4)),
    "disc-and-window-raster": AttentionSpec((Disc(3), Window((3, 9))), order=Raster(), block=(32, 16)),
    "all": AttentionSpec((TopK(1.0),), order=Tiles((4, 4)), block=(16, 16)),
}


def everywhere(mask: BlockMask) -> BlockMask:
    """The same blocks with a predicate that knows them: eager FlexAttention asks it alone, for every pair."""
    rows, columns = mask.BLOCK_SIZE

    def blocks(counts: Tensor, index: Tensor) -> Tensor:
        listed = torch.arange(index.shape[-1]) < counts[..., None]
        return torch.zeros(index.shape, dtype=torch.bool).scatter(-1, index.long(), listed)

    partial = blocks(mask.kv_num_blocks, mask.kv_indices)
    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    whole = blocks(mask.full_kv_num_blocks, mask.full_kv_indices)
    assert not bool((partial & whole).any())
    shared = partial.shape[:2] == (1, 1)

    def kept(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        place = (b * 0, h * 0, q // rows, k // columns) if shared else (b, h, q // rows, k // columns)
        return whole[place] | (partial[place] & mask.mask_mod(b, h, q, k))

    return BlockMask.from_kv_blocks(
        mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices, mask.BLOCK_SIZE, kept, mask.seq_lengths
    )


def eager_flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        out: Tensor = flex_attention(q, k, v, block_mask=everywhere(mask))
    return out


@pytest.mark.parametrize(("text", "text_first"), [(0, True), (32, True), (64, False)], ids=["no-text", "text-first", "text-last"])
@pytest.mark.parametrize("name", SPECS)
def test_flex_attention_computes_the_operators_pairs(name: str, text: int, text_first: bool) -> None:
    spec = SPECS[name]
    shape = Shape(2, 2, 16, (1, 16, 12), text, text_first)
    layout = dataclasses.replace(shape.layout, order=spec.order)
    q, k, v = shape.inputs()
    mask = bench_rivals.block_mask(q, k, v, spec, layout)
    got = eager_flex(q, k, v, mask)
    own, exact = (attention(*(x.to(d) for x in (q, k, v)), spec, layout, backend="reference") for d in (torch.float32, torch.float64))
    assert_close_as_eager(got, exact, own)
    computed = mask.kv_num_blocks + mask.full_kv_num_blocks
    assert (name == "all") == bool((computed == mask.kv_indices.shape[-1]).all())


@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        (SLA(0.2, block=(16, 16)), AttentionSpec((TopK(0.2),), order=Raster(), block=(16, 16))),
        (Fovea(0.2, tile=(4, 4)), AttentionSpec((TopK(0.2, score=ErrorProduct()),), order=Tiles((4, 4)), block=(16, 16))),
        (Fovea(radius=4, tile=(4, 4)), AttentionSpec((DiscBlocks(4),), order=Tiles((4, 4)), block=(16, 16))),
    ],
    ids=str,
)
def test_flex_attention_leaves_the_rest_out(spec: AttentionSpec, kept: AttentionSpec) -> None:
    assert isinstance(spec.rest, Linear | Pooled)
    shape = Shape(1, 2, 16, (1, 16, 12))
    layout = dataclasses.replace(shape.layout, order=spec.order)
    q, k, v = shape.inputs()
    got = eager_flex(q, k, v, bench_rivals.block_mask(q, k, v, spec, layout))
    own, exact = (attention(*(x.to(d) for x in (q, k, v)), kept, layout, backend="reference") for d in (torch.float32, torch.float64))
    assert_close_as_eager(got, exact, own)


def test_flex_attention_is_compiled_for_kinds_of_cases_not_for_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor would take minutes here: what torch hands to it is counted, and run as it is."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    flexible = torch.compile(flex_attention, fullgraph=True, dynamic=True, backend=count)
    monkeypatch.setattr(bench_rivals, "compiled", lambda: flexible)
    made = []
    cases = [(CLEAR(3, tile=(4, 4)), 16), (CLEAR(5, tile=(4, 4)), 20), (CLEAR(7, tile=(4, 4)), 24), (Fovea(radius=4, tile=(4, 4)), 28),
             (Fovea(radius=2, tile=(4, 4)), 32), (GNA((5, 5), tile=(4, 4)), 16), (GNA((7, 7), stride=2, tile=(4, 4)), 20)]  # fmt: skip
    for spec, side in cases:
        layout = TokenLayout((1, side, 12), 16, order=spec.order)
        q, k, v = (torch.randn(1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(side)) for _ in range(3))
        made.append(bench_rivals.flex(q, k, v, spec, layout)(q, k, v).shape == q.shape)
        if len(made) == 6:
            fresh = len(graphs)
    assert all(made)
    assert fresh == len(graphs) <= 3  # one for discs and blocks, one for windows, one more where torch first sees two lengths


def test_flex_attention_wants_even_blocks_in_the_methods_order() -> None:
    spec = CLEAR(3, tile=(4, 4))
    for grid, text, order, says in (
        ((1, 17, 12), 0, spec.order, "blocks of one size, but"),
        ((1, 16, 12), 5, spec.order, "whole blocks of 16 queries and 16 keys, not 5"),
        ((1, 16, 12), 0, Raster(), "must be in the method's order"),
    ):
        layout = TokenLayout(grid, text, order=order)
        q = torch.zeros(1, 1, layout.tokens, 8)
        with pytest.raises(ValueError, match=says):
            bench_rivals.block_mask(q, q, q, spec, layout)


class Natten(types.ModuleType):
    """`natten.functional` by the oracle: `[B, height, width, H, D]` and `[B, T, height, width, H, D]`, one value per axis."""

    def __init__(self) -> None:
        super().__init__("natten.functional")
        self.asked: list[dict[str, Any]] = []

    def na2d(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return self.windows((1, *q.shape[1:3]), q, k, v, given)

    def na3d(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        return self.windows(tuple(q.shape[1:4]), q, k, v, given)

    def windows(self, grid: Any, q: Tensor, k: Tensor, v: Tensor, given: dict[str, Any]) -> Tensor:
        self.asked.append(given)
        spec = GNA(given["kernel_size"], given["stride"], given["dilation"])
        rows = [x.flatten(1, -3).transpose(1, 2) for x in (q, k, v)]
        return oracle(*rows, spec, TokenLayout(grid), dtype=q.dtype)[0].transpose(1, 2).reshape(q.shape)


@pytest.mark.parametrize(
    ("window", "grid"), [(Window((5, 4), (2, 3)), (1, 9, 11)), (Window(3, 2, (1, 2, 2)), (3, 7, 8)), (Window(3), (1, 9, 11))], ids=str
)
def test_natten_gets_its_own_layout(window: Window, grid: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    module = Natten()
    monkeypatch.setitem(sys.modules, "natten", types.ModuleType("natten"))
    monkeypatch.setitem(sys.modules, "natten.functional", module)
    spec, shape = AttentionSpec((window,)), Shape(2, 2, 8, grid)
    assert bench_rivals.natten_refusal(spec, shape.layout, CPU) == "NATTEN's kernels require a CUDA device"
    q, k, v = shape.inputs()
    got = bench_rivals.natten(window, shape.layout)(q, k, v)
    torch.testing.assert_close(got, attention(q, k, v, spec, shape.layout, backend="reference"))
    assert [{len(value) for value in asked.values()} for asked in module.asked] == [{2 if grid[0] == 1 else 3}]


@pytest.mark.parametrize(
    ("spec", "layout", "says"),
    [
        (CLEAR(3), TokenLayout((1, 16, 16)), "windows .* alone"),
        (GNA(5, first_frames=1), TokenLayout((2, 16, 16)), "windows .* alone"),
        (GNA(5), TokenLayout((1, 16, 16), 4), "without text"),
        (GNA(17), TokenLayout((1, 16, 16)), "within the grid"),
    ],
    ids=str,
)
def test_natten_is_refused_what_it_does_not_compute(spec: AttentionSpec, layout: TokenLayout, says: str) -> None:
    assert re.search(says, str(bench_rivals.natten_refusal(spec, layout, torch.device("cuda"))))


def test_rivals_say_why_they_are_missing() -> None:
    layout = TokenLayout((1, 16, 16))
    assert "compiled on CUDA devices" in str(bench_rivals.flex_refusal(CLEAR(3), layout, CPU))
    assert "require a CUDA device" in str(bench_rivals.natten_refusal(GNA(5), layout, CPU))
