"""Whether float32 on tensor cores is float32: three products of TF32 parts (`input_precision="tf32x3"`), done by arithmetic in torch.

As Triton compiles it for NVIDIA: high = x to TF32, to nearest, ties away from zero; low = x − high, of which the hardware drops what TF32
does not hold; a·b = high·low + low·high + high·high, summed in float32. The budget is the kernels' own: at most twice the error of an
eager float32 run against float64, plus one rounding, for the output, the lse and every gradient. A card's sums err more than float32's do:
toward zero, at each step of eight products. That is in `on_device.card_product`, and is what tests on a card allow.
"""

from typing import Any

import on_device
import pytest
import torch
from helpers import Shape, assert_close_as_eager, gradients, oracle, random_parameters
from on_device import KEPT, CardProducts, Product, attention_by, card_product, rounded, truncated
from torch import Tensor

from dit_accel.method import AttentionSpec, Mass, Pooled, TopK
from dit_accel.method.presets import Fovea


def three_products(a: Tensor, b: Tensor) -> Tensor:
    a_high, b_high = rounded(a), rounded(b)
    a_low, b_low = truncated(a - a_high), truncated(b - b_high)
    return (a_low @ b_high + a_high @ b_low) + a_high @ b_high


def one_product(a: Tensor, b: Tensor) -> Tensor:
    return rounded(a) @ rounded(b)


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


# The sums of a card


@pytest.mark.parametrize(("head_dim", "measured"), [(128, 1.020e-6), (160, 1.435e-6), (256, 2.053e-6)])
def test_sums_toward_zero_err_as_a_card_does(head_dim: int, measured: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """`measured`: the root mean square error of the lse on an H100 (Triton 3.6.0) of this case, tiles kept by the product of means."""
    spec, shape = AttentionSpec((TopK(0.2, correct_short=True),), Pooled(), Mass()), Shape(1, 1, head_dim, (1, 6, 9), 3)
    given = (*shape.inputs(), spec, shape.layout, random_parameters(spec, shape).requires_grad_(False))
    exact, plain = (oracle(*given, dtype=dtype)[1].double() for dtype in (torch.float64, torch.float32))
    monkeypatch.setattr(on_device, "tensor_cores", True)
    assert torch.equal(oracle(*given)[1], exact)  # float64 is as it was
    error, torchs = ((x.double() - exact).square().mean().sqrt().item() for x in (oracle(*given, dtype=torch.float32)[1], plain))
    assert 0.75 * measured < error < 1.1 * measured
    assert measured > 2 * torchs + torch.finfo(torch.float32).eps / 2 * exact.square().mean().sqrt().item()


def test_products_and_their_gradients_are_the_cards() -> None:
    seed = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=seed, requires_grad=True) for size in ((2, 3, 5, 40), (40, 7)))
    with CardProducts():
        found = a @ b
        torch.testing.assert_close(a.double() @ b.double(), torch.einsum("hijk,kl->hijl", a.double(), b.double()), rtol=1e-12, atol=1e-12)
    assert torch.equal(found, card_product(a, b))
    assert not torch.equal(found, a @ b)
    torch.testing.assert_close(found, a @ b, rtol=1e-5, atol=1e-5)
    pull = torch.randn(found.shape, generator=seed)
    grads = torch.autograd.grad(found, (a, b), pull)
    assert torch.equal(grads[0], card_product(pull, b.mT))
    assert torch.equal(grads[1], card_product(a.mT, pull).sum((0, 1)))


def test_one_sum_is_cut_and_not_rounded() -> None:
    big, small = torch.tensor([[2.0**24, 3.0]]), torch.ones(2, 1)  # 2²⁴ + 3 is between two numbers of float32
    assert card_product(big, small).item() == 2**24 + 2
    assert card_product(-big, small).item() == -(2**24 + 2)
    assert (big @ small).item() == 2**24 + 4


def test_the_references_gradients_are_of_the_cards_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes parts of its forward pass again in the backward pass."""
    spec, shape = Fovea(0.2), Shape(1, 1, 24, (1, 6, 9), 3)
    plain, own = [], []
    for found, card in ((plain, False), (own, True)):
        monkeypatch.setattr(on_device, "tensor_cores", card)
        found += gradients(attention_by("reference", spec, shape.layout), spec, shape, torch.float32).values()
    assert not any(torch.equal(a, b) for a, b in zip(plain[:3], own[:3], strict=True))
    torch.testing.assert_close(own, plain, rtol=1e-4, atol=1e-5)


def test_products_over_no_channels_are_zero() -> None:
    a, b = (torch.randn(2, 3, *shape, requires_grad=True) for shape in ((0, 5), (5, 4)))
    out = Product.apply(a, b, card_product)
    out.sum().backward()
    assert out.shape == (2, 3, 0, 4)
    assert a.grad is not None
    assert a.grad.shape == a.shape
    assert b.grad is not None
    assert torch.equal(b.grad, torch.zeros_like(b))
