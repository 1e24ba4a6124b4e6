"""Fovea to first order and in content parts: against dense formulas in float64, what it costs, how much memory it takes.

Specs come from the preset, by text or JSON: nothing here calls the parts.
"""

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Shape, block_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dit_accel import AttentionSpec, Fovea, TokenLayout, attention
from dit_accel.method import Mass, Pooled, Sizes, Tiles, TopK, TopP
from dit_accel.method.text import parse_method

TEXTS = {
    "first-order": "fovea:0.3,tile=4x4,order=1,parts=2",
    "one-part": "fovea:0.3,tile=4x4,order=1,parts=1",
    "four-parts": "fovea:0.3,tile=4x4,order=1,parts=4",
    "parts-alone": "fovea:0.3,tile=4x4,parts=2",
    "radius": "fovea:radius=2,tile=4x4,order=1,parts=2",
}
SHAPES = {
    "9x11-text-5": Shape(1, 2, 16, (1, 9, 11), 5),
    "video-text-last": Shape(2, 1, 24, (3, 4, 7), 3, False),
    "references": Shape(1, 2, 16, (1, 9, 6), 0, True, ((1, 7, 5),)),
}


# The oracle, one head at a time, one block at a time


def moments(k: Tensor, v: Tensor, second: Tensor, scale: float) -> dict[str, Any]:
    """Of the tokens of one part: number, means, σ² = s² Σ_d E[q_d²] Var(k_d), covariance `[D of v, D of k]`."""
    k_off, v_off = k - k.mean(0), v - v.mean(0)
    return {
        "n": len(k), "k": k.mean(0), "v": v.mean(0), "sigma2": scale**2 * (second * k_off.square().mean(0)).sum(),
        "cov": v_off.T @ k_off / len(k), "v_var": v_off.square().sum(1).mean(),
    }  # fmt: skip


def cut(k: Tensor, metric: Tensor, parts: int) -> list[Tensor]:
    """The tokens of each part: a block is cut where k·u is its mean, u = (M C)⁴ (1, ..., 1); then each half again."""
    found = [torch.arange(len(k))]
    while len(found) < parts:
        halves = []
        for mine in found:
            off = k[mine] - k[mine].mean(0)
            mc = metric @ (off.T @ off)
            z = off @ torch.linalg.matrix_power(mc / mc.norm(), 4).sum(1)
            halves += [mine[~(z > 0)], mine[z > 0]]  # of equal keys z is NaN
        found = halves
    return [mine for mine in found if len(mine)]


def dense(
    q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], number: Tensor, spec: dict[str, Any], near: Tensor | None
) -> Tensor:
    """Output `[N, D]` of one head's image queries; `number`: block of each token; `near` `[T, T]`: blocks kept by place."""
    s, blocks, cap = q.shape[1] ** -0.5, int(number.max()) + 1, 2.0
    second, metric = q.square().mean(0), q.T @ q / len(q)
    whole = [moments(k[number == j], v[number == j], second, s) for j in range(blocks)]
    pieces = [
        [moments(k[number == j][m], v[number == j][m], second, s) for m in cut(k[number == j], metric, spec["parts"])]
        for j in range(blocks)
    ]
    bias = [[math.log(p["n"]) + min(p["sigma2"] / 2, cap) for p in parts] for parts in pieces]
    out = torch.empty_like(q)
    for i in range(blocks):
        mean = q[number == i].mean(0)
        if near is None:
            score = torch.stack([
                s * mean @ m["k"] + math.log(m["n"]) + min(m["sigma2"] / 2, cap) + m["sigma2"].log() + m["v_var"].log() / 2
                for m in whole
            ])  # fmt: skip
            kept = set(score.topk(max(1, int(spec["density"] * blocks))).indices.tolist())
        else:
            kept = set(near[i].nonzero().flatten().tolist())
        rest = [j for j in range(blocks) if j not in kept]
        omega = [float(sum((s * mean @ p["k"] + b).exp() for p, b in zip(pieces[j], bias[j], strict=True))) for j in rest]
        damped = [sum(p["n"] * p["cov"] / (1 + p["sigma2"]) for p in pieces[j]) / whole[j]["n"] for j in rest]
        state = sum((w / sum(omega) * h for w, h in zip(omega, damped, strict=True)), torch.zeros(q.shape[1], q.shape[1]).double())
        exact, mine = torch.isin(number, torch.tensor(sorted(kept))), q[number == i]
        far = [(p, b) for j in rest for p, b in zip(pieces[j], bias[j], strict=True)]
        logits = torch.cat([s * mine @ text[0].T, s * mine @ k[exact].T, *((s * mine @ p["k"] + b)[:, None] for p, b in far)], 1)
        weights = logits.softmax(1)
        share = weights[:, len(text[0]) + int(exact.sum()) :].sum(1, keepdim=True)
        values = torch.cat([text[1], v[exact], *(p["v"][None] for p, _ in far)])
        out[number == i] = weights @ values + spec["order"] * share * s * mine @ state.T
    return out


def oracle(q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, shape: Shape, near: Tensor | None) -> Tensor:
    layout, number = shape.layout, block_of(shape.layout.grids, spec.order, spec.block[1])
    rest: Any = spec.rest
    say = {"parts": rest.parts, "order": rest.order, "density": spec.density}
    out = F.scaled_dot_product_attention(q, k, v)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            qi, ki, vi = (x[b, h, layout.image_slice] for x in (q, k, v))
            text = k[b, h, layout.text_slice], v[b, h, layout.text_slice]
            out[b, h, layout.image_slice] = dense(qi, ki, vi, text, number, say, near)
    return out


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_it_is_its_formula(text: str, shape: Shape) -> None:
    spec: Any = parse_method(text)
    qkv = shape.inputs(torch.float64)
    near = None
    if spec.selection is None:
        from dit_accel.operator.blocks_of_grid import make_plan

        plan = make_plan(spec, shape.layout, torch.device("cpu"))
        near = plan.static.kept(len(plan.k_blocks.count))  # type: ignore[union-attr]
        if bool(near.all()):
            pytest.skip("nothing is left for the rest")
    expected = oracle(*qkv, spec, shape, near)
    assert not torch.allclose(expected, F.scaled_dot_product_attention(*qkv), rtol=1e-3)
    for backend in ("reference", "cpu"):
        inputs = qkv if backend == "reference" else [x.float() for x in qkv]
        tolerance = 1e-10 if backend == "reference" else 2e-5
        torch.testing.assert_close(
            attention(*inputs, spec, shape.layout, backend=backend).double(), expected, rtol=tolerance, atol=tolerance
        )


def affine(strength: float, order: int) -> float:
    """Error where values are affine in keys inside every tile: of the smallest share that is kept, relative to the output."""
    seed = torch.Generator().manual_seed(0)
    q, k, a = (torch.randn(1, 1, n, 16, generator=seed, dtype=torch.float64) for n in (1024, 1024, 16))
    v = k @ a / 4
    spec, layout = Fovea(0.02, tile=(8, 8), order=order, parts=1), TokenLayout((1, 32, 32))
    expected = F.scaled_dot_product_attention(strength * q, k, v)
    return float((attention(strength * q, k, v, spec, layout) - expected).norm() / v.norm())


def test_the_error_falls_with_the_square_of_the_logits() -> None:
    zeroth, first = (affine(0.01, order) / affine(0.02, order) for order in (0, 1))
    assert zeroth == pytest.approx(0.5, rel=0.1)
    assert first == pytest.approx(0.25, rel=0.15)
    assert affine(0.02, 1) < 0.15 * affine(0.02, 0)


@pytest.mark.parametrize("text", ["fovea:1,tile=4x4,order=1", "fovea:1,tile=4x4,parts=4", "fovea:radius=40,tile=4x4,order=1"])
def test_everything_kept_is_dense_attention(text: str) -> None:
    shape, spec = SHAPES["9x11-text-5"], parse_method(text)
    qkv = shape.inputs(torch.float64, grad=True)
    out = attention(*qkv, spec, shape.layout)  # type: ignore[arg-type]
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*qkv), rtol=1e-11, atol=1e-11)
    out.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)


def test_equal_keys_are_one_part() -> None:
    """No direction to cut along, no spread, no slope: the pooled keys are exact, and nothing is NaN."""
    layout, seed = TokenLayout((1, 16, 16)), torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 2, 256, 16, generator=seed, dtype=torch.float64) for _ in range(2))
    k = torch.ones_like(q)
    for tensors in (qkv := [q, k, v]):
        tensors.requires_grad_()
    out = attention(*qkv, Fovea(0.1, tile=(4, 4), order=1), layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-10, atol=1e-10)
    out.square().sum().backward()
    assert all(x.grad.isfinite().all() for x in qkv if x.grad is not None)


# What it is in a spec


def test_the_zeroth_order_in_one_part_is_the_default() -> None:
    assert Fovea(order=0, parts=1) == Fovea() == parse_method("fovea:order=0,parts=1")
    assert Fovea(order=1) == parse_method("fovea:0.05,order=1")
    assert Fovea(radius=8, order=1).rest == Fovea(order=1).rest == Pooled(parts=4, order=1, opened=8)
    assert Fovea(order=1, parts=2).rest == Pooled(parts=2, order=1)
    shape = SHAPES["9x11-text-5"]
    before = {"type": "Pooled", "log_count": True, "variance": True, "cap": 2.0}  # as adapters have it that know nothing of parts
    data = json.loads(json.dumps(Fovea(0.3, tile=(4, 4)).to_dict())) | {"rest": before}
    assert AttentionSpec.from_dict(data) == Fovea(0.3, tile=(4, 4))
    assert AttentionSpec.from_dict(json.loads(json.dumps(Fovea(order=1).to_dict()))) == Fovea(order=1)
    chosen = data["keep"][0] | {"correct_short": True, "score": {"type": "MeanProduct"}}
    older = AttentionSpec((TopK(0.3, correct_short=True),), Pooled(), Mass(), Tiles((4, 4)), (16, 16))
    assert AttentionSpec.from_dict(data | {"keep": [chosen]}) == older
    del chosen["score"]  # as adapters have it that know nothing of scores
    assert AttentionSpec.from_dict(data | {"keep": [chosen]}) == older
    assert not torch.equal(*(attention(*shape.inputs(), spec, shape.layout) for spec in (older, Fovea(0.3, tile=(4, 4)))))
    assert not torch.equal(*(attention(*shape.inputs(), Fovea(0.3, tile=(4, 4), order=n), shape.layout) for n in (0, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rest": {"parts": 3}}, "parts must be 1, 2 or 4 pooled keys for a block, not 3"),
        ({"rest": {"parts": True}}, "parts must be 1, 2 or 4 pooled keys for a block, not True"),
        ({"rest": {"order": 2}}, "order must be 0, the mean value, or 1, its slope in the query too, not 2"),
        ({"score": {"cap": -1.0}}, "cap must be a number >= 0, not -1.0"),
    ],
)
def test_what_is_refused(change: dict[str, dict[str, Any]], message: str) -> None:
    data = Fovea(order=1).to_dict()
    data["rest"] |= change.get("rest", {})
    data["keep"][0]["score"] |= change.get("score", {})
    with pytest.raises(ValueError, match=message):
        AttentionSpec.from_dict(data)


def test_the_score_of_the_error_goes_with_a_count_of_blocks_alone() -> None:
    score = Fovea(order=1).keep[0].score  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"correct_short must be False with ErrorProduct\(\), which counts a block's tokens already"):
        TopK(0.1, correct_short=True, score=score)
    with pytest.raises(ValueError, match="the score of TopP must be one of the softmax mass"):
        TopP(0.5, score=score)
    with pytest.raises(ValueError, match="parts must be 1, 2 or 4"):
        Fovea(parts=8)


# What it costs


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_the_states_take_no_more_memory_than_the_keys(grad: bool, backend: str) -> None:
    """One matrix for each block of queries and of keys: at most N × D²/64 numbers; never one for each pair of them, or for each query."""
    tokens, d = 4096, 64
    q, k, v = (torch.randn(1, 1, tokens, d, generator=torch.Generator().manual_seed(n)).requires_grad_(grad) for n in range(3))
    with Largest() as largest:
        out = attention(q, k, v, Fovea(0.05, order=1, parts=2), TokenLayout((1, 64, 64)), backend=backend)
        if grad:
            out.sum().backward()
    chunk = 1 << 20  # of the reference's exact part and of its pooled logits
    assert largest.elements <= max(2 * chunk, 4 * tokens * d)
    assert tokens * d * d > 8 * largest.elements  # a state for each query
    assert 64 * 64 * d * d > 8 * largest.elements  # a state for each pair of blocks


@pytest.mark.parametrize(("order", "parts"), [(0, 2), (1, 1), (1, 2), (1, 4)])
@pytest.mark.parametrize("d", [64, 128])
def test_the_cost_is_what_runs(order: int, parts: int, d: int) -> None:
    """Multiply-adds of matrix products, against those that run."""
    from dit_accel.operator.blocks_of_grid import make_plan
    from dit_accel.operator.composition import image_call, visited_blocks

    spec, layout = Fovea(0.05, order=order, parts=parts), TokenLayout((1, 64, 64))
    q, k, v = (torch.randn(1, 1, 4096, d, generator=torch.Generator().manual_seed(n)) for n in range(3))
    plan = make_plan(spec, layout, torch.device("cpu"))
    call = image_call(q, k, v, layout, plan, {}, d**-0.5)
    with FlopCounterMode(display=False) as score:
        blocks = visited_blocks(call, spec, plan)
    with FlopCounterMode(display=False) as rest:
        spec.rest(dataclasses.replace(call, visited=blocks))  # type: ignore[misc]
    sizes = Sizes(4096, 64, 64, d)
    assert spec.rest.cost(sizes).multiply_adds == pytest.approx(rest.get_total_flops() / 2, rel=0.02)  # type: ignore[union-attr]
    assert spec.keep[0].cost(sizes).multiply_adds == pytest.approx(score.get_total_flops() / 2, rel=0.02)


def test_the_merge_is_by_mass() -> None:
    assert isinstance(Fovea(order=1).merge, Mass)
