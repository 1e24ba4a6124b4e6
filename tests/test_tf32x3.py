"""Whether float32 on tensor cores is float32: three products of TF32 parts (`input_precision="tf32x3"`), done by arithmetic in torch.

As Triton compiles it for NVIDIA: high = x to TF32, to nearest, ties away from zero; low = x − high, of which the hardware drops what TF32
does not hold; a·b = high·low + low·high + high·high, summed in float32. The budget is the kernels' own: at most twice the error of an
eager float32 run against float64, plus one rounding, for the output, the lse and every gradient.
"""

from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager
from torch import Tensor

KEPT = -1 << 13  # TF32 holds 10 of float32's 23 bits of mantissa


def truncated(x: Tensor) -> Tensor:
    return (x.view(torch.int32) & KEPT).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + (1 << 12)) & KEPT).view(torch.float32)


def three_products(a: Tensor, b: Tensor) -> Tensor:
    a_high, b_high = rounded(a), rounded(b)
    a_low, b_low = truncated(a - a_high), truncated(b - b_high)
    return (a_low @ b_high + a_high @ b_low) + a_high @ b_high


def one_product(a: Tensor, b: Tensor) -> Tensor:
    return rounded(a) @ rounded(b)


class Product(torch.autograd.Function):
    """a `[.., M, K]` times b `[.., K, N]` by a rule, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rule: Any) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rule = rule
        return rule(a.contiguous(), b.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        a, b = ctx.saved_tensors
        return ctx.rule(grad.contiguous(), b.mT.contiguous()), ctx.rule(a.mT.contiguous(), grad.contiguous()), None


def results(head_dim: int, dtype: torch.dtype, rule: Any) -> dict[str, Tensor]:
    """Output, lse and gradients of softmax attention over 256 tokens whose products follow the rule."""
    q, k, v = (x.to(dtype).requires_grad_() for x in Shape(1, 2, head_dim, (1, 16, 16)).inputs())
    logits = Product.apply(q, k.mT, rule) * head_dim**-0.5
    out, lse = Product.apply(logits.softmax(-1), v, rule), logits.logsumexp(-1)
    seed = torch.Generator().manual_seed(5)
    sum((x * torch.randn(x.shape, generator=seed).to(dtype)).sum() for x in (out, lse)).backward()
    found = {"output": out.detach(), "lse": lse.detach()}
    return found | {name: x.grad for name, x in (("query", q), ("key", k), ("value", v)) if x.grad is not None}


@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
def test_three_products_stay_within_float32s_budget(head_dim: int) -> None:
    exact, eager = (results(head_dim, dtype, torch.matmul) for dtype in (torch.float64, torch.float32))
    found = results(head_dim, torch.float32, three_products)
    assert found.keys() == {"output", "lse", "query", "key", "value"}
    for name in found:
        assert_close_as_eager(found[name], exact[name], eager[name], name)


def test_one_product_does_not() -> None:
    exact, eager, found = (
        results(64, dtype, rule)
        for dtype, rule in ((torch.float64, torch.matmul), (torch.float32, torch.matmul), (torch.float32, one_product))
    )
    for name in found:
        with pytest.raises(AssertionError, match="exceeds"):
            assert_close_as_eager(found[name], exact[name], eager[name], name)


def test_the_parts_hold_float32() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    high = rounded(x)
    low = truncated(x - high)
    for part in (high, low):
        assert not (part.view(torch.int32) & ~KEPT).any()
    assert ((x - high).abs() <= x.abs() * 2**-11).all()
    assert ((x.double() - high.double() - low.double()).abs() <= x.double().abs() * 2**-21).all()
