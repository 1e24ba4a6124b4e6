"""Parts that change the output or the rest's inputs, each against its formula in float64 on all pairs of tokens."""

import dataclasses
from typing import Any

import pytest
import torch
from helpers import Shape, random_parameters
from on_device import attention_by
from torch import Tensor

from dit_accel import CLEAR, SLA, AttentionSpec, Fovea, TokenLayout
from dit_accel.errors import ArgumentError
from dit_accel.method import (
    Call,
    Concentration,
    Cost,
    DepthwiseConv,
    Disc,
    Downsampled,
    DynamicConv,
    Extra,
    Linear,
    Mass,
    OutputGate,
    Pooled,
    PreConv,
    Residual,
    Rest,
    Sizes,
    Tiles,
    TopK,
)  # fmt: skip
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call
from dit_accel.operator.cost import multiply_adds, passes
from dit_accel.operator.layout import joint_memory_order

SHAPES = {
    "11x14-text-5": Shape(2, 2, 16, (1, 11, 14), 5),
    "video-text-last": Shape(1, 2, 8, (3, 5, 9), 7, False),
    "references": Shape(1, 2, 8, (2, 9, 6), 3, True, ((1, 7, 5), (1, 3, 11))),
}
SPARSE: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.3, tile=(4, 4)), "sla": SLA(0.3, block=(16, 16)), "clear": CLEAR(3, tile=(4, 4)),
    "top-k": AttentionSpec((TopK(0.3),), order=Tiles((4, 4)), block=(16, 16)),
}  # fmt: skip
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def places(layout: TokenLayout) -> Tensor:
    """(image, t, y, x) of each token of the image in raster order."""
    rasters = [torch.cartesian_prod(torch.tensor([n]), *map(torch.arange, grid)) for n, grid in enumerate(layout.grids)]
    return torch.cat(rasters)


def neighbours(layout: TokenLayout, kernel: tuple[int, int, int]) -> Tensor:
    """`[taps, N, N]`: which token is seen from which at each place of a kernel, in the order of its numbers."""
    at = places(layout)
    steps = torch.cartesian_prod(torch.tensor([0]), *(torch.arange(side) - side // 2 for side in kernel))
    return (at[None, :, None] + steps[:, None, None] == at[None, None]).all(-1).double()


def convolution(x: Tensor, weight: Tensor, layout: TokenLayout) -> Tensor:
    """`[B, H, N, D]` by kernels `[..., H, D, frames, rows, columns]`, tap by tap."""
    taps = neighbours(layout, tuple(weight.shape[-3:]))  # type: ignore[arg-type]
    seen = torch.einsum("tij,bhjd->bhitd", taps, x)
    kernels = weight.flatten(-3)  # [..., H, D, taps]
    return torch.einsum("bhitd,bhdt->bhid", seen, kernels.expand(len(x), -1, -1, -1))


def run(spec: AttentionSpec, shape: Shape, params: Any = None) -> tuple[Tensor, Tensor]:
    """Output and lse in float64."""
    return attention_by("reference", spec, shape.layout)(shape.inputs(torch.float64), params)


def with_and_without(spec: AttentionSpec, shape: Shape) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Tensor]]:
    """Image rows of the output with the spec's extras and without, what they have learned, and image rows of q, k and v.

    The text's rows and the lse must be the same.
    """
    params, plain = random_parameters(spec, shape, torch.float64), dataclasses.replace(spec, extras=())
    kept = plain.make_parameters(heads=shape.heads, head_dim=shape.head_dim).double()
    for name, value in kept.named_parameters():
        value.data.copy_(params.get_parameter(name))
    (out, lse), (bare, bare_lse) = run(spec, shape, params), run(plain, shape, kept)
    assert lse.equal(bare_lse)
    words, image = shape.layout.text_slice, shape.layout.image_slice
    assert out[:, :, words].equal(bare[:, :, words])
    learned = {name: value.detach() for name, value in params.named_parameters()}
    return out[:, :, image], bare[:, :, image], learned, [x[:, :, image] for x in shape.inputs(torch.float64)]


def assert_off_at_start(extra: Extra) -> None:
    """To the bit, on the compiled kernels too, after any of the methods."""
    shape = SHAPES["11x14-text-5"]
    for spec in SPARSE.values():
        with_it = dataclasses.replace(spec, extras=(extra,))
        for backend in ("reference", "cpu"):
            for got, expected in zip(*(attention_by(backend, each, shape.layout)(shape.inputs()) for each in (with_it, spec)), strict=True):
                assert got.equal(expected)


# The slot


@dataclasses.dataclass(frozen=True)
class Doubled(Extra):
    def __call__(self, out: Tensor, call: Call) -> Tensor:
        return 2 * out

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(passes=2)


def test_extras_are_applied_in_turn() -> None:
    one, two = DepthwiseConv(3), Doubled()
    shape, spec = SHAPES["11x14-text-5"], dataclasses.replace(SPARSE["top-k"], extras=[one, two])
    assert spec.extras == (one, two)
    out, bare, learned, (_, _, v) = with_and_without(spec, shape)
    expected = convolution(v, learned["conv.weight"], shape.layout) + learned["conv.bias"][:, None]
    torch.testing.assert_close(out, 2 * (bare + expected), rtol=1e-12, atol=1e-12)


def test_extras_are_checked_and_old_files_have_none() -> None:
    plain = SPARSE["top-k"]
    data = plain.to_dict()
    assert "extras" not in data
    assert AttentionSpec.from_dict(data) == plain == AttentionSpec.from_dict(data | {"extras": []})
    with_it = dataclasses.replace(plain, extras=(DepthwiseConv(7, 3),))
    assert str(with_it).endswith("+ DepthwiseConv(kernel=7, frames=3)")
    assert AttentionSpec.from_dict(with_it.to_dict()) == with_it != plain
    with pytest.raises(ArgumentError, match="each of extras must be one of"):
        dataclasses.replace(plain, extras=(TopK(0.5),))
    with pytest.raises(ArgumentError, match="extras must be a tuple"):
        dataclasses.replace(plain, extras=DepthwiseConv())
    with pytest.raises(ArgumentError, match="both name a learned tensor 'conv"):
        dataclasses.replace(plain, extras=(DepthwiseConv(), DepthwiseConv(3)))
    with pytest.raises(ArgumentError, match="exactly the keys"):
        AttentionSpec.from_dict(data | {"extra": []})


# Convolutions


@every_shape
@pytest.mark.parametrize("spec", SPARSE.values(), ids=SPARSE)
def test_depthwise_conv(spec: AttentionSpec, shape: Shape) -> None:
    for extra in (DepthwiseConv(), DepthwiseConv(3, frames=3)):
        out, bare, learned, (_, _, v) = with_and_without(dataclasses.replace(spec, extras=(extra,)), shape)
        expected = convolution(v, learned["conv.weight"], shape.layout) + learned["conv.bias"][:, None]
        torch.testing.assert_close(out - bare, expected, rtol=1e-10, atol=1e-10)


def test_depthwise_conv_does_not_depend_on_the_order_in_memory() -> None:
    shape, spec = SHAPES["references"], dataclasses.replace(SPARSE["fovea"], extras=(DepthwiseConv(),))
    params, layout = random_parameters(spec, shape, torch.float64), shape.layout
    q, k, v = shape.inputs(torch.float64)
    moved = dataclasses.replace(layout, order=spec.order)
    order = torch.cat([torch.arange(layout.text), layout.text + joint_memory_order(layout.grids, spec.order)])
    out = attention_by("reference", spec, moved)([x[:, :, order] for x in (q, k, v)], params)[0]
    torch.testing.assert_close(out, run(spec, shape, params)[0][:, :, order], rtol=1e-12, atol=1e-12)


def test_depthwise_conv_starts_as_nothing_and_is_counted() -> None:
    assert_off_at_start(DepthwiseConv())
    layout, spec = TokenLayout((1, 32, 32), 7), SPARSE["fovea"]
    with_it = dataclasses.replace(spec, extras=(DepthwiseConv(5),))
    added = multiply_adds(with_it, layout, 64) - multiply_adds(spec, layout, 64)
    assert added == pytest.approx(25 / (2 * 1024))
    assert passes(with_it) == passes(spec) + 3
    for wrong in ({"kernel": 4}, {"kernel": 1}, {"kernel": 3.5}, {"frames": 2}, {"frames": 0}):
        with pytest.raises(ArgumentError, match="must be an odd number"):
            DepthwiseConv(**wrong)  # type: ignore[arg-type]


@every_shape
def test_dynamic_conv(shape: Shape) -> None:
    spec = dataclasses.replace(SPARSE["fovea"], extras=(DynamicConv(),))
    out, bare, learned, (_, _, v) = with_and_without(spec, shape)
    hidden = torch.einsum("hde,bhe->bhd", learned["dynamic.first"], v.mean(2))
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    kernels = torch.einsum("hdyxe,bhe->bhdyx", learned["dynamic.second"], hidden)[..., None, :, :]
    expected = torch.stack([convolution(x[None], kernel, shape.layout)[0] for x, kernel in zip(v, kernels, strict=True)])
    torch.testing.assert_close(out - bare, expected, rtol=1e-10, atol=1e-10)
    assert len(v) == 1 or not torch.allclose(kernels[0], kernels[1], atol=0.01)  # each sample has kernels of its own


@every_shape
def test_concentration(shape: Shape) -> None:
    spec = dataclasses.replace(SPARSE["fovea"], extras=(Concentration(5),))
    out, bare, learned, (_, _, v) = with_and_without(spec, shape)
    hidden = convolution(v, learned["concentration.first"], shape.layout)
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    hidden = hidden / (hidden.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(out - bare, convolution(hidden, learned["concentration.second"], shape.layout), rtol=1e-9, atol=1e-9)


@every_shape
@pytest.mark.parametrize("rest", [Linear("elu"), Pooled()], ids=["linear", "pooled"])
def test_pre_conv_changes_what_the_rest_is_given(rest: Rest, shape: Shape) -> None:
    """The whole is the exact part of q and k, merged by mass with the rest of theirs that are convolved."""
    spec = AttentionSpec((TopK(0.3),), PreConv(rest, 5), Mass(), Tiles((4, 4)), (16, 16))
    params, layout = random_parameters(spec, shape, torch.float64), shape.layout
    learned = {name: value.detach() for name, value in params.named_parameters()}
    q, k, v = shape.inputs(torch.float64)
    calls = []
    for convolve in (False, True):
        image = [x[:, :, layout.image_slice] for x in (q, k)]
        if convolve:
            image = [convolution(x, learned[f"pre_conv.{side}"], layout) for x, side in zip(image, "qk", strict=True)]
        plan = make_plan(spec, layout, torch.device("cpu"))
        whole = [x.clone() for x in (q, k)]
        for x, part in zip(whole, image, strict=True):
            x[:, :, layout.image_slice] = part
        calls.append(image_call(*whole, v, layout, plan, params(), shape.head_dim**-0.5))
    kept = spec.selection.choose(calls[0])  # type: ignore[union-attr]
    mean, mass = rest(dataclasses.replace(calls[1], visited=kept))
    mass = mass + learned["offset"].repeat(shape.batch)[:, None]
    exact, lse = attention_by("reference", dataclasses.replace(spec, rest=None, merge=None), layout)([q, k, v])
    exact, lse = (x[:, :, layout.image_slice].flatten(0, 1) for x in (exact, lse))
    share = torch.sigmoid(mass - lse)[..., None]
    found = run(spec, shape, params)[0][:, :, layout.image_slice].flatten(0, 1)
    torch.testing.assert_close(found, (1 - share) * exact + share * mean, rtol=1e-9, atol=1e-9)


def test_pre_conv_starts_as_the_rest() -> None:
    for rest, merge in ((Linear(), Residual()), (Pooled(parts=2, order=1), Mass()), (Downsampled(2), Mass(offset=False))):
        plain = AttentionSpec((TopK(0.3),), rest, merge, Tiles((4, 4)), (16, 16))
        convolved = dataclasses.replace(plain, rest=PreConv(rest))
        for got, expected in zip(*(run(spec, SHAPES["references"]) for spec in (convolved, plain)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    with pytest.raises(ArgumentError, match="a rest of the blocks not kept requires patterns of whole blocks"):
        AttentionSpec((Disc(2.0),), PreConv(Linear()), Mass())
    with pytest.raises(ArgumentError, match="merge of pooled keys must be Mass"):
        AttentionSpec((TopK(0.3),), PreConv(Pooled()), Residual())
    with pytest.raises(ArgumentError, match="rest must be one of"):
        PreConv(Mass())  # type: ignore[arg-type]


# Gates


@every_shape
def test_output_gates(shape: Shape) -> None:
    for per in ("head", "channel"):
        spec = dataclasses.replace(SPARSE["sla"], extras=(OutputGate(per),))
        out, bare, learned, (q, _, v) = with_and_without(spec, shape)
        weight = learned["output_gate.weight"]
        if per == "head":
            factor = 2 / (1 + (-torch.einsum("hd,bhid->bhi", weight, q)).exp()[..., None])
        else:
            factor = 1 + torch.einsum("hde,bhie->bhid", weight, v)
        torch.testing.assert_close(out, bare * factor, rtol=1e-10, atol=1e-10)
    with pytest.raises(ArgumentError, match="per must be 'head' or 'channel'"):
        OutputGate("token")  # type: ignore[arg-type]


@pytest.mark.parametrize("extra", [DynamicConv(), Concentration(), OutputGate(), OutputGate("channel")], ids=str)
def test_what_is_learned_starts_as_nothing_and_has_a_gradient(extra: Extra) -> None:
    assert_off_at_start(extra)
    shape, spec = SHAPES["11x14-text-5"], dataclasses.replace(SPARSE["clear"], extras=(extra,))
    params = spec.make_parameters(heads=shape.heads, head_dim=shape.head_dim)
    attention_by("cpu", spec, shape.layout)(shape.inputs(), params)[0].square().sum().backward()
    assert any(bool(p.grad.any()) for p in params.parameters() if p.grad is not None)


def test_fovea_takes_a_convolution() -> None:
    assert Fovea(0.1, conv=5) == dataclasses.replace(Fovea(0.1), extras=(DepthwiseConv(5),))
    assert Fovea(radius=8, conv=3, tile=(4, 4, 4)).extras == (DepthwiseConv(3, frames=3),)
    with pytest.raises(ArgumentError, match="conv must be None or an odd number"):
        Fovea(0.1, conv=4)
