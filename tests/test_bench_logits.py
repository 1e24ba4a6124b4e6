"""`dit-accel bench logits`: statistics of a softmax that are known, and which keys a method keeps."""

import json
import math
from pathlib import Path

import pytest
import torch
from oracles import local_linear_attention
from torch import Tensor

from dit_accel import CLEAR, SLA, Fovea, TokenLayout, attention, builtin_pipeline
from dit_accel.errors import ArgumentError
from dit_accel.measure.capture import Captured
from dit_accel.measure.logits import (
    LINEAR_RIDGE,
    ORDERS,
    _sample,
    bench_logits,
    kept_weights,
    local_linear,
    recalls,
    statistics_of,
    straightened,
    taylor_order,
)
from dit_accel.method import AttentionSpec, Disc, ErrorProduct, Raster, Tiles, TopK

LAYOUTS = {
    "ragged": TokenLayout((1, 11, 30), 5),
    "video-text-last": TokenLayout((3, 5, 20), 3, False),
    "reference": TokenLayout((1, 6, 25), 0, True, Raster(), ((1, 7, 20),)),
}
KEPT = {
    "disc": AttentionSpec((Disc(3.5),), order=Tiles((4, 4)), block=(16, 16)),
    "top": AttentionSpec((TopK(0.3),), order=Raster(), block=(16, 16)),
    "by-values": AttentionSpec((TopK(0.3, score=ErrorProduct()),), order=Tiles((4, 4)), block=(16, 16)),
}


def captured(layout: TokenLayout, *, wide: float = 1.0, bias: bool = False) -> Captured:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.tokens, 16) for _ in range(3))
    text_bias = torch.zeros(1, layout.text) if bias else None
    if text_bias is not None:
        text_bias[:, -1] = -math.inf
    return Captured(wide * q, k, v, layout, "layer", None, text_bias)


def dense_weights(c: Captured) -> Tensor:
    """The whole softmax `[BH, N, N]`, float64."""
    logits = (c.query.double() @ c.key.double().mT).flatten(0, 1) / 4
    return (logits if c.key_bias is None else logits + c.key_bias.double()).softmax(-1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_columns_are_what_they_say(layout: TokenLayout, bias: bool) -> None:
    if bias and not layout.text:
        return
    c = captured(layout, bias=bias)
    found, weights = statistics_of(c), dense_weights(c)
    rows = [round(i) for i in torch.linspace(0, layout.image - 1, 128).long().tolist()]
    some = weights[:, layout.image_slice][:, rows]
    assert found["text_mass"] == pytest.approx(float(some[:, :, layout.text_slice].sum(-1).mean()))
    entropy = -(some * some.clamp_min(1e-300).log()).sum(-1)
    assert found["keys"] == pytest.approx(float(entropy.exp().mean()))
    assert found["share"] == pytest.approx(found["keys"] / layout.tokens)
    places = [(i, t, y, x) for i, (f, h, w) in enumerate(layout.grids) for t in range(f) for y in range(h) for x in range(w)]
    far = torch.tensor([[a[0] == b[0] and math.dist(a[1:], b[1:]) > 16 for b in places] for a in (places[row] for row in rows)])
    assert far.any()
    assert found["far_mass"] == pytest.approx(float((some[:, :, layout.image_slice] * far).sum(-1).mean()))


def test_flat_logits_need_one_term_and_one_step() -> None:
    layout = TokenLayout((1, 8, 8))
    flat, narrow, wide = (statistics_of(captured(layout, wide=size)) for size in (0.0, 0.05, 3.0))
    assert (flat["taylor"], flat["logit_median"], flat["logit_99"]) == (1, 0, 0)
    assert flat["keys"] == pytest.approx(64)
    assert flat["linear_error"] < 1e-12
    assert flat["taylor"] < narrow["taylor"] < wide["taylor"]
    assert narrow["linear_error"] < 0.02 < 0.5 < wide["linear_error"]
    assert wide["keys"] < narrow["keys"] < 64


def test_the_series_is_that_of_the_exponential() -> None:
    logits, value = torch.tensor([[[0.5, -1.0, 2.0, -math.inf]]]).double(), torch.tensor([[[1.0], [3.0], [-2.0], [100.0]]]).double()
    out = logits.softmax(-1) @ value
    for order in range(1, 12):
        terms = [sum(x**m / math.factorial(m) for m in range(order)) for x in (0.5, -1.0, 2.0)]
        error = abs(sum(t * v for t, v in zip(terms, (1.0, 3.0, -2.0), strict=True)) / sum(terms) - float(out)) / abs(float(out))
        if error < 0.01:
            break
    assert taylor_order(logits, value, out) == order > 2
    low = torch.tensor([[[-90.0, -91.0, -89.0, -math.inf]]]).double()  # its terms are huge, and cancel
    assert taylor_order(low, value, low.softmax(-1) @ value) == ORDERS + 1


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("spec", KEPT.values(), ids=KEPT)
def test_kept_weights_are_the_softmaxs_where_something_is_kept(spec: AttentionSpec, layout: TokenLayout) -> None:
    c = captured(layout, bias=layout.text > 0)
    weights, rows = dense_weights(c), torch.arange(0, layout.image, 7)
    lse = ((c.query @ c.key.mT).double() / 4 + (0 if c.key_bias is None else c.key_bias.double())).logsumexp(-1).flatten(0, 1)
    found = kept_weights(c, spec, rows, lse[:, layout.image_slice][:, rows])
    whole = weights[:, layout.image_slice][:, rows][:, :, layout.image_slice]
    kept = found > 0
    assert 0.02 < kept.float().mean() < 0.9
    torch.testing.assert_close(found[kept], whole[kept], rtol=1e-4, atol=1e-9)
    text = weights[:, layout.image_slice][:, rows][:, :, layout.text_slice].sum(-1)
    _, own = attention(c.query, c.key, c.value, spec, layout, text_bias=c.text_bias, return_lse=True)
    mass = (own.double().flatten(0, 1)[:, layout.image_slice][:, rows] - lse[:, layout.image_slice][:, rows]).exp()
    torch.testing.assert_close(found.sum(-1) + text, mass, rtol=1e-4, atol=1e-7)


def test_all_far_keys_are_kept_by_everything_and_none_by_a_small_disc() -> None:
    c = captured(LAYOUTS["ragged"])
    specs = {"all": Fovea(1.0), "near": CLEAR(8), "half": SLA(0.5, block=(16, 16))}
    found = recalls(c, specs)
    assert found["all"] == pytest.approx(1, abs=1e-5)
    assert found["near"] == 0
    assert 0.3 < found["half"] < 1


@pytest.mark.parametrize("bias", [False, True])
def test_the_oracle_is_local_linear_attention(bias: bool) -> None:
    c = captured(LAYOUTS["ragged"], bias=bias)
    rows, weights = _sample(c), dense_weights(c)[:, c.layout.image_slice]
    right = weights[:, rows] @ c.value.double().flatten(0, 1)
    query, key, value = (x.double().flatten(0, 1) for x in (c.query[:, :, c.layout.image_slice], c.key, c.value))
    seen = torch.arange(c.layout.tokens) != (c.layout.text - 1 if bias else -1)
    expected = right.clone()
    for head in range(2):
        for number, row in enumerate(rows.tolist()):
            away = key[head, seen] - query[head, row]
            spread = away.T @ (weights[head, row, seen, None] * away)
            ridge = LINEAR_RIDGE * float(spread.diagonal().mean())
            q = query[head, row : row + 1]
            expected[head, number] = local_linear_attention(q, key[head, seen], value[head, seen], 0.25, ridge)[0]
    found = local_linear(weights[:, rows], query[:, rows], key, value)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert straightened(c) == pytest.approx(float((expected - right).norm() / right.norm()), rel=1e-6)


def test_the_command_on_a_model(tmp_path: Path) -> None:
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    given = {"size": (256, 256), "prompts": ["a panda"], "steps": 2, "levels": 1, "max_sequence_length": 8}
    table = bench_logits(pipe, **given, specs={"keys": Fovea(0.5)}, oracle=True, out=tmp_path / "l.json")
    assert len(table) == 6
    assert all(0 < row["far_mass"] + row["text_mass"] < 1 and 0 < row["far kept: keys"] < 1 < row["keys"] for row in table.values())
    assert all(0 < row["local_linear"] < 10 for row in table.values())
    assert json.loads((tmp_path / "l.json").read_text())["layers"] == table
    with pytest.raises(ArgumentError, match="steps must be more than the 2 noise levels that are looked at, not 2"):
        bench_logits(pipe, **given | {"levels": 2})
