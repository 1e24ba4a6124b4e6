"""Feature maps of linear attention: each equals a dense oracle in float64, written from its paper's formula, and its limit cases hold."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Shape, kept_pairs, random_parameters
from torch import Tensor

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.errors import ArgumentError
from dit_accel.kernels.blocks import Blocks
from dit_accel.method import (
    Call,
    DiscBlocks,
    Features,
    Floored,
    Hedgehog,
    KVGate,
    Linear,
    Mass,
    NormPower,
    NormPreserving,
    Residual,
    Rest,
    Taylor,
    Tiles,
    TokenSoftmax,
    TopK,
)
from dit_accel.method.parameters import AttentionParameters

SHAPES = {
    "11x14-text-5": Shape(1, 2, 16, (1, 11, 14), 5),
    "video": Shape(2, 1, 24, (3, 5, 9)),
    "references-text-last": Shape(1, 2, 16, (1, 9, 6), 3, False, ((1, 7, 5),)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Learned = dict[str, Tensor]
Map = Callable[[Tensor, str, Learned], Tensor]  # of queries or keys `[B, H, N, D]`, the side and the learned tensors: `[B, H, N, F]`


def spec_of(rest: Rest, density: float = 0.3, merge: Any = None) -> AttentionSpec:
    return AttentionSpec((TopK(density),), rest, Mass(offset=False) if merge is None else merge, Tiles((4, 4)), (16, 16))


def exact_and_left(shape: Shape, spec: AttentionSpec) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Of the image's queries: the exact part's output and lse, the pairs `[B, H, N, N]` that are not kept, and the image's q, k and v."""
    layout, (q, k, v) = shape.layout, shape.inputs(torch.float64)
    at = slice(layout.text, None) if layout.text_first else slice(0, layout.image)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[at] = False
    image = [x[:, :, at] for x in (q, k, v)]
    kept = kept_pairs(image[0], image[1], spec, layout.grids, v=image[2])
    logits = shape.head_dim**-0.5 * torch.cat([image[0] @ k[:, :, text].mT, (image[0] @ image[1].mT).masked_fill(~kept, -torch.inf)], -1)
    return logits.softmax(-1) @ torch.cat([v[:, :, text], image[2]], 2), logits.logsumexp(-1), ~kept, image


def found(shape: Shape, spec: AttentionSpec, params: AttentionParameters | None = None) -> Tensor:
    """The image's rows of the operator, in float64."""
    out = attention(*shape.inputs(torch.float64), spec, shape.layout, params=params)
    return out[:, :, shape.layout.text :] if shape.layout.text_first else out[:, :, : shape.layout.image]


def joined(out: Tensor, lse: Tensor, weight: Tensor, v: Tensor) -> Tensor:
    """One softmax over the exact part and pairs whose exp(logit) is the weight `[B, H, N, N]`."""
    mass = lse.exp()[..., None]
    return (mass * out + weight @ v) / (mass + weight.sum(-1, keepdim=True))


def assert_is_the_map(part: Features, phi: Map, shape: Shape, **fields: Any) -> None:
    """Linear attention with random learned tensors has the weights phi(q)·phi(k)."""
    spec = spec_of(Linear(part, **fields))
    params = random_parameters(spec, shape, torch.float64)
    out, lse, left, (q, k, v) = exact_and_left(shape, spec)
    learned = dict(params.named_parameters())
    weight = (phi(q, "q", learned) @ phi(k, "k", learned).mT) * left
    torch.testing.assert_close(found(shape, spec, params), joined(out, lse, weight, v), rtol=1e-10, atol=1e-10)


def halves(y: Tensor) -> Tensor:
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1).clamp_min(1e-6)


# Hedgehog


def hedgehog(x: Tensor, side: str, learned: Learned) -> Tensor:
    return halves(torch.einsum("bhnd,hed->bhne", x, learned[f"hedgehog.{side}"]))


def joint_hedgehog(x: Tensor, side: str, learned: Learned) -> Tensor:
    y = torch.einsum("bhnd,hed->bhne", x, learned[f"hedgehog.{side}"]) + learned[f"hedgehog.bias_{side}"][:, None]
    return torch.cat([2 * y, -2 * y], -1).softmax(-1).clamp_min(1e-6)


@every_shape
@pytest.mark.parametrize(("part", "phi"), [(Hedgehog(), hedgehog), (Hedgehog(joint=True), joint_hedgehog)], ids=["apart", "joint"])
def test_hedgehog(part: Features, phi: Map, shape: Shape) -> None:
    assert_is_the_map(part, phi, shape)


@pytest.mark.parametrize("joint", [False, True])
def test_hedgehog_of_zero_is_the_mean_of_the_rest(joint: bool) -> None:
    shape, spec = SHAPES["11x14-text-5"], spec_of(Linear(Hedgehog(joint)))
    params = spec.make_parameters(heads=2, head_dim=16).requires_grad_(False)
    for weight in params.parameters():
        weight.zero_()
    out, lse, left, (_, _, v) = exact_and_left(shape, spec)
    weight = left.double() * (1 / 32 if joint else 2 / 16)  # of 32 features of 1/32, or of twice 16 of 1/16
    torch.testing.assert_close(found(shape, spec, params), joined(out, lse, weight, v), rtol=1e-10, atol=1e-10)


def test_the_rest_over_all_counts_every_key() -> None:
    shape, spec = SHAPES["11x14-text-5"], spec_of(Linear(Hedgehog(), "all"))
    out, lse, _, (q, k, v) = exact_and_left(shape, spec)
    learned = spec.start_values(heads=2, head_dim=16)
    weight = (
        hedgehog(q, "q", {"hedgehog.q": learned["hedgehog.q"].double()})
        @ hedgehog(k, "k", {"hedgehog.k": learned["hedgehog.k"].double()}).mT
    )
    torch.testing.assert_close(found(shape, spec), joined(out, lse, weight, v), rtol=1e-6, atol=1e-6)  # its mass has SLA's 1e-5 more


# Negligible blocks


@every_shape
@pytest.mark.parametrize("negligible", [0.0, 0.3])
def test_negligible_blocks_are_left_out(negligible: float, shape: Shape) -> None:
    spec = spec_of(Linear("elu", "marginal", negligible))
    out, lse, left, (q, k, v) = exact_and_left(shape, spec)
    opposite = spec_of(Linear(), density=negligible or 0.01)  # the blocks that the negated queries would keep
    lowest = kept_pairs(-q, k, opposite, shape.layout.grids) if negligible else torch.zeros_like(left)
    weight = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT) * (left & ~lowest)
    torch.testing.assert_close(found(shape, spec), joined(out, lse, weight, v), rtol=1e-10, atol=1e-10)
    if not negligible:
        torch.testing.assert_close(found(shape, spec), found(shape, replace(spec, rest=Linear("elu"))), rtol=1e-12, atol=1e-12)


def test_three_shares_of_twenty_blocks() -> None:
    """5 % exact, 85 % linear, 10 % negligible: a value that is 1 in the linear blocks alone shows their number."""
    shape = Shape(1, 1, 16, (1, 16, 20))
    q, k, _ = shape.inputs(torch.float64)
    rest = spec_of(Linear("elu", "marginal", 0.1), 0.05, Residual())
    params = rest.make_parameters(heads=1, head_dim=16).double().requires_grad_(False)
    params.proj.weight.copy_(torch.eye(16))  # type: ignore[union-attr, operator, arg-type]
    shares = {}
    for name, keys in (("kept", spec_of(Linear("elu"), 0.05)), ("lowest", spec_of(Linear("elu"), 0.1))):
        shares[name] = kept_pairs(q if name == "kept" else -q, k, keys, shape.layout.grids)
    assert [round(20 * share.double().mean().item(), 6) for share in shares.values()] == [1, 2]
    weight = ((F.elu(q) + 1) @ (F.elu(k) + 1).mT) * ~(shares["kept"] | shares["lowest"])
    v = shape.inputs(torch.float64)[2]
    logits = (q @ k.mT / 4).masked_fill(~shares["kept"], -torch.inf)
    expected = logits.softmax(-1) @ v + weight @ v / weight.sum(-1, keepdim=True)
    torch.testing.assert_close(attention(q, k, v, rest, shape.layout, params=params), expected, rtol=1e-10, atol=1e-10)


# NaLaFormer


def norm_power(power: float) -> Map:
    def phi(x: Tensor, side: str, learned: Learned) -> Tensor:
        both = torch.cat([x.clamp_min(0), (-x).clamp_min(0)], -1)
        if side == "k":
            return both**3
        gain, rate, middle = (learned[f"norm_power.{name}"][:, None, None] for name in ("gain", "rate", "middle"))
        length = x.square().sum(-1, keepdim=True).sqrt()
        return (both / length).clamp_min(1e-4) ** (power * (1 + gain * ((length - middle) * rate).tanh()))

    return phi


@every_shape
def test_norm_power(shape: Shape) -> None:
    assert_is_the_map(NormPower(), norm_power(3.0), shape)


def one_call(q: Tensor, part: Features, learned: Learned | None = None) -> Call:
    """A call with queries `[H, N, D]` and a part's learned tensors, those not given at their start values."""
    blocks = Blocks.from_starts(torch.tensor([0, q.shape[1]]))
    given = part.parameters(len(q), q.shape[-1]) | (learned or {})
    return Call(q, q, q, len(q), q.shape[-1] ** -0.5, torch.zeros(q.shape[1], 4), blocks, blocks, {}, given)


def random_queries(heads: int = 2, tokens: int = 7, channels: int = 16) -> Tensor:
    return torch.randn(heads, tokens, channels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def test_norm_power_is_the_papers_with_its_numbers() -> None:
    q, part = random_queries(), NormPower(1.5)
    paper = {"gain": 2.0, "rate": 1.0, "middle": 0.0}
    call = one_call(q, part, {f"norm_power.{name}": torch.full((2,), value) for name, value in paper.items()})
    length = q.norm(dim=-1, keepdim=True)
    expected = (torch.cat([q.relu(), (-q).relu()], -1) / length).clamp_min(1e-4) ** (3 * (0.5 + length.tanh()))
    torch.testing.assert_close(part(q, "q", call), expected, rtol=1e-12, atol=1e-15)
    for side in ("q", "k"):  # the features of -x are those of x with the halves exchanged
        torch.testing.assert_close(part(-q, side, call), part(q, side, call).roll(16, -1), rtol=0, atol=0)  # type: ignore[arg-type]


# STILL


def reflections(heads: int, channels: int) -> Tensor:
    """I - 2uuᵀ `[H, D, D]`."""
    found = []
    for head in range(heads):
        u = torch.tensor([math.sin((head + 1) * (d + 1)) for d in range(channels)], dtype=torch.float64)
        found.append(torch.eye(channels, dtype=torch.float64) - 2 * torch.outer(u, u) / u.square().sum())
    return torch.stack(found)


def norm_preserving(x: Tensor, side: str, learned: Learned) -> Tensor:
    y = torch.einsum("bhnd,hed->bhne", x, learned[f"norm_preserving.map_{side}"])
    return halves(x.norm(dim=-1, keepdim=True) * y / y.norm(dim=-1, keepdim=True))


@every_shape
def test_norm_preserving(shape: Shape) -> None:
    assert_is_the_map(NormPreserving(), norm_preserving, shape)


def test_norm_preserving_starts_at_reflections() -> None:
    for start in NormPreserving().parameters(3, 24).values():
        torch.testing.assert_close(start.double(), reflections(3, 24), rtol=1e-6, atol=1e-6)


def test_norm_preserving_with_the_reflection_undone_is_hedgehog() -> None:
    q = random_queries()
    hedgehog_of_q = Hedgehog()(q, "q", one_call(q, Hedgehog()))
    undone = one_call(q, NormPreserving(), {"norm_preserving.map_q": torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)})
    torch.testing.assert_close(NormPreserving()(q, "q", undone), hedgehog_of_q, rtol=1e-10, atol=1e-12)
    longer = one_call(
        q, NormPreserving(), {"norm_preserving.map_q": 7 * torch.eye(16, dtype=torch.float64).repeat(2, 1, 1)}
    )  # no length but the query's own counts
    torch.testing.assert_close(NormPreserving()(q, "q", longer), hedgehog_of_q, rtol=1e-10, atol=1e-12)


# BASED


def taylor(rank: int) -> Map:
    """The full outer product, in place of each pair of channels once."""

    def phi(x: Tensor, side: str, learned: Learned) -> Tensor:
        y = torch.einsum("bhnd,hrd->bhnr", x, learned[f"taylor.{side}"]) * x.shape[-1] ** -0.25
        pairs = (y[..., :, None] * y[..., None, :]).flatten(-2) / math.sqrt(2)
        return torch.cat([torch.ones_like(y[..., :1]), y, pairs], -1)

    return phi


@every_shape
@pytest.mark.parametrize("rank", [4, 16])
def test_taylor(rank: int, shape: Shape) -> None:
    assert_is_the_map(Taylor(rank), taylor(rank), shape)


def test_taylor_is_the_series_of_the_exponential() -> None:
    q, k = random_queries(), random_queries(tokens=9)
    part, errors = Taylor(16), []
    for size in (0.01, 0.005):
        phi_q, phi_k = (part(math.sqrt(size) * x, side, one_call(x, part)) for x, side in ((q, "q"), (k, "k")))  # type: ignore[arg-type]
        t = size * q @ k.mT / 4
        torch.testing.assert_close(phi_q @ phi_k.mT, 1 + t + t.square() / 2, rtol=1e-12, atol=1e-12)
        errors.append((phi_q @ phi_k.mT - t.exp()).norm().item())
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.05)  # of the third order
    assert part.width(64) == 153
    assert Taylor(64).width(16) == part.width(16) == phi_q.shape[-1]


# LightNet


@pytest.mark.parametrize("apart", [60.0, 95.0, 300.0])
def test_token_softmax_of_what_a_kept_key_stands_out_from(apart: float) -> None:
    """One channel of one key is far above the others: the rest of the queries that keep it is a softmax over those."""
    layout, q, k, v = TokenLayout((1, 8, 8)), *(torch.randn(1, 1, 64, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    k[0, 0, 0, 0] = apart
    spec = AttentionSpec((DiscBlocks(1),), Linear(TokenSoftmax()), Residual(), Tiles((4, 4)), (16, 16))
    params = spec.make_parameters(heads=1, head_dim=16)
    with torch.no_grad():
        params.proj.weight.copy_(torch.eye(16))
        found = attention(q, k, v, spec, layout, params=params)
        bare = attention(q, k, v, AttentionSpec((DiscBlocks(1),), order=Tiles((4, 4)), block=(16, 16)), layout)
    own = [i for i in range(64) if i // 8 < 4 and i % 8 < 4]  # the first tile
    left = [i for i in range(64) if i not in own]
    heads = k[0, 0, left].double().softmax(0).T @ v[0, 0, left].double()
    expected = F.silu(q[0, 0, own].double()) @ heads
    torch.testing.assert_close((found - bare)[0, 0, own].double(), expected, rtol=1e-4, atol=1e-4)


@every_shape
@pytest.mark.parametrize("scope", ["complement", "all"])
def test_token_softmax(scope: Any, shape: Shape) -> None:
    spec = spec_of(Linear(TokenSoftmax(), scope), merge=Residual())
    params = random_parameters(spec, shape, torch.float64)
    out, _, left, (q, k, v) = exact_and_left(shape, spec)
    if scope == "all":
        left = torch.ones_like(left)
    rest = torch.zeros_like(v)
    for b, h, i in itertools.product(*map(range, q.shape[:3])):  # every query has its own tokens, every channel its own softmax over them
        of_keys = k[b, h].masked_fill(~left[b, h, i, :, None], -torch.inf).softmax(0)
        rest[b, h, i] = F.silu(q[b, h, i]) @ (of_keys.T @ v[b, h])
    learned = dict(params.named_parameters())
    expected = out + rest @ learned["proj.weight"].T + learned["proj.bias"]
    torch.testing.assert_close(found(shape, spec, params), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: spec_of(Linear(TokenSoftmax())), "Residual"),
        (lambda: Linear(TokenSoftmax(), readout=Floored()), "readout must be None"),
        (lambda: Linear("elu", "marginal", 1.0), "negligible"),
        (lambda: Linear(Hedgehog(), weights=Hedgehog()), "weights must be one of"),
        (lambda: Linear(KVGate()), "feature_map must be one of"),
        (lambda: Linear(weights="KVGate"), "weights must be one of"),  # type: ignore[arg-type]
        (lambda: Linear(readout="Centred"), "readout must be one of"),  # type: ignore[arg-type]
        (lambda: Taylor(0), "rank must be"),
        (lambda: NormPower(0.0), "power must be"),
    ],
)
def test_refuses(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        make()
