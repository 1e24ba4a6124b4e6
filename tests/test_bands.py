"""Queries that are a band of the keys' grid, as each of several devices has them: rows of the whole grid's operator, on every backend."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, oracle, random_parameters
from test_composition import FOREIGN, SMALL
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, Blocks
from dit_accel.method import Linear, Mass, TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import composition, lowering
from dit_accel.operator.attention import attention
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import PADDING, Lists

CPU = torch.device("cpu")
SHAPE = Shape(1, 2, 16, (1, 11, 14), 5)
TINY = Shape(1, 2, 24, (1, 6, 9), 3)  # for the interpreter
SPECS = {
    "fovea": Fovea(0.2, tile=(4, 4)),
    "fovea-radius": Fovea(radius=4, tile=(4, 4)),
    "clear": CLEAR(3, tile=(4, 4)),
    "clear-downsample": CLEAR(3, downsample=4, tile=(4, 4)),
    "gna": GNA((3, 5), stride=(1, 2), dilation=(2, 1), tile=(4, 4)),
    "sla": SLA(0.3, "relu", block=(16, 32)),
    "sla-all": SLA(0.2, "elu", "all", tile=(4, 4)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("softmax"), Mass(), SMALL, (16, 16)),
}


def band(plan: Plan, first: int, end: int) -> tuple[Plan, Tensor]:
    """The plan with the query blocks from `first` to `end` alone, and the image tokens that are in them, ascending."""
    g, blocks = plan.geometry, slice(first, end)
    begin, stop = int(g.starts_q[first]), int(g.starts_q[end])
    places = torch.arange(len(plan.coords)) if g.places_q is None else g.places_q.long()
    rows = places[begin:stop].sort().values
    number = torch.zeros(len(places), dtype=torch.long).index_put((rows,), torch.arange(len(rows)))
    q = plan.q_blocks
    own = Blocks(
        number[q.index[blocks]], q.valid[blocks], q.count[blocks], q.place[rows] - first * q.index.shape[1], bool(q.valid[blocks].all()),
        q.consecutive,
    )  # fmt: skip
    static = None if plan.static is None else BlockMap(**{name: _rows(x, blocks) for name, x in vars(plan.static).items()})
    windows = None if g.windows is None else torch.nn.functional.pad(g.windows[..., begin:stop], (0, PADDING)).contiguous()
    geometry = replace(
        g, starts_q=g.starts_q[first : end + 1] - begin, windows=windows, places_q=number[places[begin:stop]].int(),
        lists=None if g.lists is None else Lists(**{name: _rows(x, blocks) for name, x in vars(g.lists).items()}),
        residues=None if g.windows is None else g.windows[:, :, 2].contiguous(),
    )  # fmt: skip
    return replace(plan, q_blocks=own, static=static, geometry=geometry), rows


def _rows(x: Any, blocks: slice) -> Any:
    return x[blocks].contiguous() if isinstance(x, Tensor) else x


def compare(backend: str, spec: AttentionSpec, shape: Shape, text: int, blocks: tuple[int, int]) -> None:
    """Output, lse and gradients of the band and the first `text` of the text's queries with those rows of the oracle."""
    layout = shape.layout
    plan, image = band(make_plan(spec, layout, CPU), *blocks)
    at = (layout.text_slice.start, layout.image_slice.start)
    parts = [torch.arange(text) + at[0], image + at[1]]
    rows = torch.cat(parts if layout.text_first else parts[::-1])
    queries = TokenLayout((1, 1, len(image)), text, layout.text_first)
    bias, known = shape.text_bias(), spec in SPECS.values()  # the oracle knows no part that was made in a test

    def run(dtype: torch.dtype, own: bool) -> list[Tensor]:
        q, k, v = inputs = shape.inputs(dtype, grad=True)
        params = random_parameters(spec, shape, dtype)
        if own:
            out, lse = composition.attend(
                q[:, :, rows], k, v, spec, queries, plan, params(), 0.3, backend, text_bias=bias, key_layout=layout
            )  # fmt: skip
        else:
            whole = oracle(q, k, v, spec, layout, params, scale=0.3, text_bias=bias, dtype=dtype) if known else attention(
                q, k, v, spec, layout, params=params, scale=0.3, text_bias=bias, backend="reference", return_lse=True
            )  # fmt: skip
            out, lse = (x[:, :, rows] for x in whole)
        seed = torch.Generator().manual_seed(7)
        sum((x * torch.randn(x.shape, generator=seed).to(x.dtype)).sum() for x in (out, lse)).backward()  # type: ignore[union-attr]
        learned = {name: p.grad for name, p in params.named_parameters() if p.grad is not None}
        return [out, lse, flat({name: x.grad for name, x in zip("qkv", inputs, strict=True)} | learned)]  # type: ignore[misc]

    results = (run(torch.float32, True), run(torch.float64, False), run(torch.float32, False))
    for *three, name in zip(*results, ("output", "lse", "gradients"), strict=True):
        assert_close_as_eager(*three, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("text", "blocks"), [(0, (2, 5)), (2, (0, 4))], ids=["inner", "first"])
@pytest.mark.parametrize("spec", (SPECS | FOREIGN).values(), ids=SPECS | FOREIGN)
def test_a_band_is_rows_of_the_whole(spec: AttentionSpec, text: int, blocks: tuple[int, int], backend: str) -> None:
    compare(backend, spec, SHAPE, text, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fovea", "clear-downsample", "gna", "sla", "sla-all"])
def test_a_band_in_one_kernel(name: str) -> None:
    compare("triton", SPECS[name], TINY, 0 if name == "gna" else 2, (1, 3))


@pytest.mark.gpu
def test_a_band_by_parts() -> None:
    compare("triton", FOREIGN["top-p-pooled"], TINY, 1, (1, 3))


@pytest.mark.parametrize("name", ["fovea", "sla", "linear-mass", "clear-downsample"])
def test_the_rest_of_a_band_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "fuses", lambda spec, *_: spec.rest is None)
    compare("cpu", SPECS[name], SHAPE, 2, (1, 4))


def test_text_at_two_ends_is_refused() -> None:
    spec, layout = SPECS["clear"], SHAPE.layout
    plan, (q, k, v) = make_plan(spec, layout, CPU), SHAPE.inputs()
    with pytest.raises(ValueError, match="the text is last among the queries and first among the keys: move it"):
        composition.attend(q, k, v, spec, replace(layout, text_first=False), plan, {}, 0.3, "reference", key_layout=layout)
