"""Memories of all image tokens as a rest, each with its formula in float64: a regression, and a scan token by token."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Shape, block_of, random_parameters
from torch import Tensor

from dit_accel import AttentionSpec, attention
from dit_accel.method import DeltaScan, DiscBlocks, Mass, Norm, Raster, Residual, Rest, Ridge, Tiles, TopK
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call

SHAPES = {
    "text-first": Shape(1, 2, 16, (1, 11, 14), 5),
    "video-text-last": Shape(2, 1, 8, (3, 5, 9), 4, False),
    "references": Shape(1, 2, 16, (1, 9, 6), 3, False, ((1, 7, 5),)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
ORDERS = {"tiles": (Tiles((4, 4)), (16, 16)), "raster": (Raster(), (16, 32))}
every_order = pytest.mark.parametrize(("order", "block"), ORDERS.values(), ids=ORDERS)
FEW = Shape(1, 2, 16, (1, 4, 4), 3)  # no more keys than channels
SCALE = 0.3


def added(rest: Rest, order: Any = ORDERS["tiles"][0], block: tuple[int, int] = (16, 16)) -> AttentionSpec:
    return AttentionSpec((TopK(0.3),), rest, Residual(), order, block)


def image(shape: Shape, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q and k of length 1, and v: `[B, H, N, D]` of the image's tokens in raster order."""
    q, k, v = (x[:, :, shape.layout.image_slice] for x in shape.inputs(dtype))
    return [q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v]


def rest_of(spec: AttentionSpec, shape: Shape, qkv: list[Tensor], **learned: Tensor) -> Tensor:
    """What the spec's rest adds, of tokens `[B, H, N, D]`."""
    assert spec.rest is not None
    plan = make_plan(spec, shape.layout, torch.device("cpu"))
    own = spec.rest.parameters(shape.heads, shape.head_dim) | learned
    out, mass = spec.rest(image_call(*qkv, shape.layout, plan, own, SCALE))
    assert mass.shape == out.shape[:2]
    return out.unflatten(0, qkv[0].shape[:2])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def check_sum(spec: AttentionSpec, shape: Shape, expected: Tensor, params: Any) -> None:
    """The operator is the exact part, plus the projection of what is expected of the rest, of the image's rows."""
    exact = dataclasses.replace(spec, rest=None, merge=None)
    found, without = (
        attention(*shape.inputs(torch.float64), s, shape.layout, params=p, scale=SCALE, backend="reference")
        for s, p in ((spec, params), (exact, None))
    )
    own, text = shape.layout.image_slice, shape.layout.text_slice
    close(found[:, :, own], without[:, :, own] + expected @ params.proj.weight.T + params.proj.bias)
    assert found[:, :, text].equal(without[:, :, text])


# Ridge


def regression(k: Tensor, v: Tensor, ridge: float) -> Tensor:
    """The least squares of v from k and of 0 from √(r tr(KᵀK)/D) I."""
    extra = (ridge * k.square().sum() / k.shape[-1]).sqrt() * torch.eye(k.shape[-1], dtype=k.dtype)
    return torch.linalg.lstsq(torch.cat([k, extra]), torch.cat([v, torch.zeros_like(extra)])).solution


@every_order
@every_shape
def test_ridge_is_a_regression_of_all_values_on_all_keys(shape: Shape, order: Any, block: tuple[int, int]) -> None:
    spec = added(Ridge(0.2), order, block)
    q, k, v = image(shape)
    states = [regression(a, b, 0.2) for a, b in zip(k.flatten(0, 1), v.flatten(0, 1), strict=True)]
    check_sum(spec, shape, q @ torch.stack(states).unflatten(0, q.shape[:2]), random_parameters(spec, shape, torch.float64))


def test_a_small_ridge_recalls_the_values_of_few_keys() -> None:
    _, k, v = image(FEW)
    close(rest_of(added(Ridge(1e-8)), dataclasses.replace(FEW, text=0), [3 * k, 2 * k, v]), v, 1e-4)


def test_the_delta_rule_comes_to_the_ridge_after_many_passes() -> None:
    """β = 1 over a few keys again and again: what it holds in the end is the regression of the values on them."""
    shape = Shape(1, 1, 16, (1, 2, 4))
    q, k, v = image(shape)
    state = torch.zeros(16, 16, dtype=torch.float64)
    for _, (key, value) in itertools.product(range(600), zip(k[0, 0], v[0, 0], strict=True)):
        state = state + torch.outer(key, value - key @ state)
    spec = AttentionSpec((TopK(0.3),), Ridge(1e-8), Residual(), Raster(), (16, 16))
    close(rest_of(spec, shape, [q, k, v])[0, 0], q[0, 0] @ state, 1e-5)


def test_equal_keys_are_solved_for() -> None:
    """One direction for all keys: the product KᵀK has rank one. Without any key, there is nothing to read."""
    shape = dataclasses.replace(FEW, text=0)
    q, k, v = image(shape)
    found = rest_of(added(Ridge()), shape, [q, k[:, :, :1].expand_as(k), v])
    along = (q * k[:, :, :1]).sum(-1, keepdim=True)
    close(found, along * v.mean(2, keepdim=True) / (1 + 0.1 / 16))
    assert rest_of(added(Ridge()), shape, [q, torch.zeros_like(k), v]).eq(0).all()


# DeltaScan


def scanned(q: Tensor, k: Tensor, v: Tensor, write: Tensor, fade: Tensor) -> Tensor:
    """S ← diag(e^g) S; S ← S + β k (v - kᵀS)ᵀ; qᵀS, token by token `[N, ...]`."""
    state, rows = torch.zeros(k.shape[-1], v.shape[-1], dtype=k.dtype), []
    for a, b, c, beta, g in zip(q, k, v, write, fade, strict=True):
        state = g.exp()[:, None] * state
        state = state + beta * torch.outer(b, c - b @ state)
        rows.append(a @ state)
    return torch.stack(rows)


def both_ways(shape: Shape, spec: AttentionSpec, qkv: list[Tensor], write: Tensor, fade: Tensor) -> Tensor:
    """The sum of the scans through the blocks in their order and from the last to the first, tokens in raster order."""
    order = block_of(shape.layout.grids, spec.order, spec.block[1]).argsort(stable=True)
    found = torch.zeros_like(qkv[2])
    for sample, head in itertools.product(range(shape.batch), range(shape.heads)):
        rows = [x[sample, head] for x in (*qkv, write, fade)]
        for way in (order, order.flip(0)):
            found[sample, head, way] += scanned(*(x[way] for x in rows))
    return SCALE * found


@every_order
@every_shape
@pytest.mark.parametrize("decay", [False, True])
def test_the_scan_is_the_delta_rule_both_ways(shape: Shape, decay: bool, order: Any, block: tuple[int, int]) -> None:
    spec = added(DeltaScan(decay), order, block)
    params = random_parameters(spec, shape, torch.float64)
    q, k, v = image(shape)
    learned = {name: x.detach()[:, None] for name, x in params.named_parameters() if name.startswith("delta.")}
    write = (learned["delta.bias"] + (k * learned["delta.weight"]).sum(-1)).sigmoid()
    fade = -F.softplus(learned["delta.fade_bias"] + learned["delta.fade_weight"] * k) if decay else torch.zeros_like(k)
    check_sum(spec, shape, both_ways(shape, spec, [q, k, v], write, fade), params)


def test_a_scan_that_writes_little_is_linear_attention_both_ways() -> None:
    """What a token reads of itself, it reads twice."""
    shape = dataclasses.replace(SHAPES["text-first"], text=0)
    qkv = image(shape)
    q, k, v = qkv
    little = 1e-7
    found = rest_of(added(DeltaScan()), shape, qkv, **{"delta.bias": torch.full((2,), little, dtype=torch.float64).logit()})
    close(found / little, SCALE * (q @ k.mT @ v + (q * k).sum(-1, keepdim=True) * v), 1e-4)


def test_a_scan_recalls_the_values_of_orthonormal_keys() -> None:
    shape = dataclasses.replace(FEW, text=0)
    v = image(shape)[2]
    k = torch.linalg.qr(torch.randn(1, 2, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    found = rest_of(added(DeltaScan()), shape, [5 * k, 2 * k, v], **{"delta.bias": torch.full((2,), 60.0)})
    close(found, SCALE * 2 * v)


def test_a_memory_that_fades_at_once_holds_the_newest_token() -> None:
    """Logarithms of fades of -500 for each token, whose sums no exponential holds."""
    shape = dataclasses.replace(SHAPES["text-first"], text=0)
    q, k, v = image(shape)
    found = rest_of(added(DeltaScan(decay=True)), shape, [q, k, v], **{"delta.fade_bias": torch.full((2, 16), 500.0)})
    close(found, SCALE * 2 * 0.5 * (q * k).sum(-1, keepdim=True) * v)


# What they go with


@pytest.mark.parametrize("rest", [Ridge(), DeltaScan()])
def test_a_memory_has_no_mass(rest: Rest) -> None:
    with pytest.raises(ValueError, match=f"the merge of {type(rest).__name__}, which has no softmax mass, must be Residual"):
        AttentionSpec((TopK(0.3),), rest, Mass(), Tiles((4, 4)), (16, 16))
    for merge in (Residual(), Norm()):
        AttentionSpec((DiscBlocks(2),), rest, merge, Tiles((4, 4)), (16, 16))


def test_nothing_is_added_at_the_start() -> None:
    shape = SHAPES["text-first"]
    found, exact = (
        attention(*shape.inputs(), spec, shape.layout, backend="reference")
        for spec in (added(Ridge()), dataclasses.replace(added(DeltaScan()), rest=None, merge=None))
    )
    assert found.equal(exact)
    assert attention(*shape.inputs(), added(DeltaScan(decay=True)), shape.layout, backend="reference").equal(exact)


@pytest.mark.parametrize("make", [lambda: Ridge(1e-9), lambda: Ridge(float("nan")), lambda: DeltaScan("yes")])
def test_other_values_are_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"must be (a number >= 1e-8|True or False)"):
        make()
