"""What other papers say softmax and linear attention are, tried on the operator: identities that need no part of their own."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers import Shape, random_parameters
from oracles import local_linear_attention, parallax
from torch import Tensor

from dit_accel import AttentionSpec, attention
from dit_accel.method import DiscBlocks, Linear, Mass, Pooled, Residual, Rest, Tiles, TopK
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call, visited_blocks

SHAPE = Shape(1, 1, 8, (1, 9, 6))
TILES = Tiles((4, 4))
DENSE = AttentionSpec((TopK(1.0),), order=TILES, block=(16, 16))


def rows(shape: Shape = SHAPE) -> list[Tensor]:
    """Query, key and value `[N, D]` of one head."""
    return [x[0, 0] for x in shape.inputs(torch.float64)]


def operator(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The operator with every block kept."""
    return attention(*(x[None, None] for x in (q, k, v)), DENSE, SHAPE.layout, scale=scale, backend="reference")[0, 0]


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_linear_attention_is_a_scan_that_is_read_at_its_end() -> None:
    """h ← h + phi(k) vᵀ over the tokens, then phi(q) h: the state space of attention and of SSMs (arXiv 2405.15731, A = I)."""
    spec = AttentionSpec((TopK(0.3),), Linear("elu", "all"), Residual(), TILES, (16, 16))
    params = random_parameters(spec, SHAPE, torch.float64)
    q, k, v = rows()
    state, norm = torch.zeros(8, 8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for key, value in zip(F.elu(k) + 1, v, strict=True):
        state, norm = state + torch.outer(key, value), norm + key
    reader = F.elu(q) + 1
    read = (reader @ state) / (reader @ norm + 1e-5)[:, None]
    given = SHAPE.inputs(torch.float64)
    exact = attention(*given, dataclasses.replace(spec, rest=None, merge=None), SHAPE.layout, backend="reference")[0, 0]
    found = attention(*given, spec, SHAPE.layout, params=params, backend="reference")[0, 0]
    close(found, exact + read @ params.proj.weight.T + params.proj.bias)


def pooled_error(rest: Rest, scale: float) -> float:
    """Of a rest of one block, to the softmax over that block's keys: the largest, of the values."""
    shape = dataclasses.replace(SHAPE, grid=(1, 4, 8))
    spec = AttentionSpec((DiscBlocks(1),), rest, Mass(), TILES, (16, 16))
    plan, qkv = make_plan(spec, shape.layout, torch.device("cpu")), shape.inputs(torch.float64)
    call = image_call(*qkv, shape.layout, plan, {}, scale)
    found = rest(dataclasses.replace(call, visited=visited_blocks(call, spec, plan)))[0][0]
    q, k, v = rows(shape)
    right = torch.arange(32) % 8 >= 4  # two tiles next to each other, of which each query keeps its own
    logits = (scale * q @ k.T).masked_fill(right[:, None] == right, -torch.inf)
    return float((found - logits.softmax(-1) @ v).abs().max())


@pytest.mark.parametrize(("order", "power"), [(0, 1), (1, 2)])
def test_softmax_is_its_mean_and_one_step_of_regression(order: int, power: int) -> None:
    """softmax(ε q Kᵀ) V = v̄ + ε Cov(v, k) q + O(ε²): the debiased gradient step of in-context regression is a pooled key's first order."""
    coarse, fine = (pooled_error(Pooled(order=order), scale) for scale in (1e-3, 5e-4))
    assert coarse / fine == pytest.approx(2**power, rel=0.02)


def test_parallax_is_the_derivative_of_attention() -> None:
    """The output and its derivative along -r/s of the query."""
    q, k, v = rows()
    scale, step = 0.3, 1e-5
    probe = torch.randn(q.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    there, back = (operator(q - side * step * probe / scale, k, v, scale) for side in (1, -1))
    close(parallax(q, k, v, probe, scale), operator(q, k, v, scale) + (there - back) / (2 * step), 1e-8)
    close(parallax(q, k, v, torch.zeros_like(q), scale), operator(q, k, v, scale))


def test_local_linear_attention_is_a_regression_whose_ridge_leads_to_softmax() -> None:
    q, k, v = rows()
    scale, ridge = 0.3, 0.2
    weight = (scale * q @ k.T).softmax(-1).sqrt()
    for i in range(0, len(q), 9):  # least squares with an intercept, which the ridge leaves alone
        left = torch.cat([torch.ones(len(k), 1, dtype=torch.float64), k - q[i]], 1) * weight[i, :, None]
        extra = ridge**0.5 * torch.eye(9, dtype=torch.float64)[1:]
        fitted = torch.linalg.lstsq(torch.cat([left, extra]), torch.cat([weight[i, :, None] * v, torch.zeros(8, 8, dtype=torch.float64)]))
        close(local_linear_attention(q[i : i + 1], k, v, scale, ridge)[0], fitted.solution[0])
    close(local_linear_attention(q, k, v, scale, 1e9), operator(q, k, v, scale), 1e-6)


def test_local_linear_attention_continues_straight_lines() -> None:
    """Values that are affine in the keys, which softmax attention pulls to their mean."""
    q, k, _ = rows()
    slope = torch.randn(8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = local_linear_attention(q, k, k @ slope + 1, 0.3, 1e-10)
    close(found, q @ slope + 1, 1e-5)
    assert (operator(q, k, k @ slope + 1, 0.3) - found).abs().max() > 0.1
