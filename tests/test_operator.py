"""`attention` against the dense oracle: every method, forward and backward, on sizes that divide nothing; and what it promises besides."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Largest, Shape, assert_close_as_eager, disc_pairs, flat, gradients, oracle, random_parameters, spread
from torch import Tensor

from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch, reference
from dit_accel.kernels.cpu import native
from dit_accel.method import AttentionSpec, Disc, DiscBlocks, Linear, Mass, Pooled, Raster, Tiles, TopK, Window
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.cost import kept_density
from dit_accel.operator.layout import TokenLayout, memory_order, raster_order

SMALL = Tiles((4, 4))
SPECS = {
    "top-k-and-disc": AttentionSpec((TopK(0.1), Disc(4.5)), order=SMALL, block=(16, 16)),
    "top-k-and-disc-blocks-pooled": AttentionSpec((TopK(0.1, True), DiscBlocks(3)), Pooled(), Mass(), SMALL, (16, 16)),
    "window-and-disc-raster": AttentionSpec((Window((5, 9), 2), Disc(6)), order=Raster(), block=(32, 16)),
    "fovea": Fovea(),
    "fovea-small-tiles": AttentionSpec((TopK(0.2, True),), Pooled(), Mass(), SMALL, (16, 16)),
    "fovea-3d-tiles": AttentionSpec((TopK(0.1, True),), Pooled(), Mass(), Tiles((2, 4, 4)), (32, 32)),
    "fovea-radius": Fovea(radius=3),
    "fovea-blocks": Fovea(blocks=2, tile=(4, 4)),
    "share-and-blocks": AttentionSpec((TopK(0.1, blocks=1),), Pooled(), Mass(), SMALL, (16, 16)),
    "pooled-no-variance": AttentionSpec((TopK(0.2),), Pooled(variance=False), Mass(offset=False), SMALL, (16, 16)),
    "pooled-no-count": AttentionSpec((TopK(0.2),), Pooled(log_count=False, cap=0.3), Mass(), Raster(), (32, 32)),
    "clear": CLEAR(4),
    "clear-raster": AttentionSpec((Disc(5.5),), order=Raster()),
    "clear-downsample": CLEAR(3, downsample=4),
    "sla": SLA(0.2),
    "sla-blocks": SLA(0.3, "elu", block=(128, 16)),
    "sla-relu": SLA(0.3, "relu", block=(16, 32)),
    "sla-all": SLA(0.2, "relu", "all"),
    "sla-none": SLA(0.2, scope="none"),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("elu"), Mass(), SMALL, (16, 16)),
    "linear-all-mass": AttentionSpec((TopK(0.2),), Linear("softmax", "all"), Mass(), SMALL, (16, 16)),
    "clear-box": CLEAR((2, 3, 4)),
    "clear-box-and-frame": CLEAR((2, 3), tile=(2, 4, 4), first_frames=1),
    "sla-tiles": SLA(0.2, tile=(2, 4, 4), first_frames=2),
    "fovea-and-frame": Fovea(0.1, tile=(4, 4), first_frames=1),
    "gna": GNA(5),
    "gna-even": GNA((4, 6), stride=(2, 3)),
    "gna-dilated": GNA((3, 3, 5), stride=(1, 2, 2), dilation=(2, 3, 2)),
}
SHAPES = {
    "video-text-last": Shape(2, 3, 40, (3, 5, 9), 7, False),
    "17x23-text-77": Shape(1, 2, 72, (1, 17, 23), 77),
    "65-text-1-last": Shape(2, 1, 8, (1, 5, 13), 1, False),
    "300": Shape(1, 1, 128, (1, 3, 100)),
    "references-text": Shape(1, 2, 16, (1, 9, 11), 5, references=((1, 7, 13), (1, 9, 11))),
    "video-and-references": Shape(1, 1, 24, (3, 6, 7), 2, False, ((1, 9, 5),)),
    "63": Shape(1, 2, 40, (1, 7, 9)),
    "one": Shape(8, 4, 8, (1, 1, 1)),  # one token, but enough numbers for a mean error
}
RAGGED, VIDEO = Shape(1, 2, 8, (1, 11, 14), 5), SHAPES["video-text-last"]

TARGETS = native.TARGETS[: native.TARGETS.index(native.best_target()) + 1]


IMPLEMENTATIONS = {name: name for name in ("reference", *TARGETS)}


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every implementation that this machine runs, under backend="auto"."""
    if request.param == "reference":
        monkeypatch.setattr(dispatch, "CPU_TARGET", "none")
    else:
        monkeypatch.setenv(native.TARGET_VARIABLE, request.param)


every_implementation = pytest.mark.usefixtures("implementation")
# what test_cpu_kernels.py asks of every instruction set under a bias
reference_and_best = pytest.mark.parametrize("implementation", ["reference", *TARGETS[-1:]], indirect=True)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_method = pytest.mark.parametrize(
    "name", ["top-k-and-disc", "fovea-small-tiles", "clear-downsample", "sla-blocks", "gna-dilated", "linear-mass"]
)


def run(
    qkv: list[Tensor], spec: AttentionSpec, layout: TokenLayout, params: AttentionParameters | None = None, **how: Any
) -> tuple[Tensor, Tensor]:
    out, lse = attention(*qkv, spec, layout, params=params, return_lse=True, **how)
    assert isinstance(out, Tensor)
    return out, lse


def own_gradients(spec: AttentionSpec, shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    return gradients(lambda qkv, params: run(qkv, spec, shape.layout, params), spec, shape, dtype)


def dense_gradients(spec: AttentionSpec, shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    return gradients(lambda qkv, params: oracle(*qkv, spec, shape.layout, params, dtype=dtype), spec, shape, dtype)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("spec", "shape", "implementation"), spread(4, SPECS, SHAPES, IMPLEMENTATIONS), indirect=["implementation"])
def test_equals_the_oracle(spec: AttentionSpec, shape: Shape) -> None:
    qkv, params = shape.inputs(), random_parameters(spec, shape)
    exact = oracle(*qkv, spec, shape.layout, params)
    eager = oracle(*qkv, spec, shape.layout, params, dtype=torch.float32)
    with torch.no_grad():
        got = run(qkv, spec, shape.layout, params)
    assert_close_as_eager(got[0], exact[0].detach(), eager[0].detach())
    assert_close_as_eager(got[1], exact[1].detach(), eager[1].detach(), "lse")


@pytest.mark.parametrize("shape", [VIDEO, RAGGED], ids=["video-text-last", "11x14-text-5"])
@every_spec
def test_equals_the_oracle_in_float64(spec: AttentionSpec, shape: Shape) -> None:
    qkv, params = shape.inputs(torch.float64), random_parameters(spec, shape).double()
    torch.testing.assert_close(run(qkv, spec, shape.layout, params), oracle(*qkv, spec, shape.layout, params), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        own_gradients(spec, shape, torch.float64), dense_gradients(spec, shape, torch.float64), rtol=1e-11, atol=1e-11
    )


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(
    ("spec", "shape", "implementation"),
    spread(2, SPECS, {"video-text-last": VIDEO, "11x14-text-5": RAGGED}, IMPLEMENTATIONS),
    indirect=["implementation"],
)
def test_gradients_equal_the_oracles(spec: AttentionSpec, shape: Shape) -> None:
    exact, eager = (dense_gradients(spec, shape, dtype) for dtype in (torch.float64, torch.float32))
    got = own_gradients(spec, shape)
    assert got.keys() == exact.keys()
    assert_close_as_eager(flat(got), flat(exact), flat(eager), f"gradients of {', '.join(got)}")


@every_spec
def test_chunks_change_nothing(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv, whole = VIDEO.inputs(torch.float64), own_gradients(spec, VIDEO, torch.float64)
    expected = run(qkv, spec, VIDEO.layout)
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 1)
    torch.testing.assert_close(run(qkv, spec, VIDEO.layout), expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(own_gradients(spec, VIDEO, torch.float64), whole, rtol=1e-11, atol=1e-11)


@every_spec
def test_gradcheck(spec: AttentionSpec) -> None:
    shape = Shape(1, 2, 8, (1, 5, 6), 2)
    params = random_parameters(spec, shape, torch.float64)
    learned = [*shape.inputs(torch.float64, grad=True), *params.parameters()]
    assert torch.autograd.gradcheck(lambda *x: run(list(x[:3]), spec, shape.layout, params), learned, fast_mode=True)


def biased(shape: Shape, spec: AttentionSpec, bias: Tensor, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output, lse and gradients under a bias of the text's keys: ours in `dtype`, and the oracle's."""
    params = random_parameters(spec, shape).to(dtype)

    def ours(qkv: list[Tensor], params: AttentionParameters) -> tuple[Tensor, Tensor]:
        return run(qkv, spec, shape.layout, params, text_bias=bias)

    def dense(qkv: list[Tensor], params: AttentionParameters) -> tuple[Tensor, Tensor]:
        return oracle(*qkv, spec, shape.layout, params, text_bias=bias, dtype=dtype)

    found = []
    for function in (ours, dense):
        out, lse = function(shape.inputs(dtype), params)
        found.append({"out": out.detach(), "lse": lse.detach(), "gradients": flat(gradients(function, spec, shape, dtype))})
    return found[0], found[1]


BIASED = {
    "two-masks-text-first": (Shape(2, 2, 24, (1, 11, 14), 5), False),
    "two-masks-text-last": (Shape(2, 1, 8, (3, 5, 9), 70, False), False),
    "all-masked": (Shape(1, 2, 16, (1, 7, 9), 33), True),
}
every_bias = pytest.mark.parametrize(("shape", "masked"), BIASED.values(), ids=BIASED)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize(("spec", "biased_shape", "implementation"), spread(3, SPECS, BIASED, IMPLEMENTATIONS), indirect=["implementation"])
def test_a_bias_of_the_texts_keys(spec: AttentionSpec, biased_shape: tuple[Shape, bool]) -> None:
    shape, masked = biased_shape
    bias = shape.text_bias(masked=masked)
    got, eager = biased(shape, spec, bias, torch.float32)
    _, exact = biased(shape, spec, bias, torch.float64)
    for name in got:
        assert_close_as_eager(got[name], exact[name], eager[name], name)


@every_bias
@every_spec
def test_a_bias_of_the_texts_keys_in_float64(spec: AttentionSpec, shape: Shape, masked: bool) -> None:
    got, expected = biased(shape, spec, shape.text_bias(masked=masked), torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


@every_implementation
@every_method
def test_masked_text_might_as_well_be_absent(name: str) -> None:
    """With all text masked the image's rows are those of a call without text."""
    shape, spec = Shape(1, 2, 16, (1, 7, 9), 33), SPECS[name]
    qkv, alone = shape.inputs(), dataclasses.replace(shape, text=0)
    exact, eager = (
        oracle(*(x[:, :, shape.text :] for x in qkv), spec, alone.layout, dtype=d)[0].detach() for d in (torch.float64, torch.float32)
    )
    out, _ = run(qkv, spec, shape.layout, text_bias=shape.text_bias(masked=True))
    assert_close_as_eager(out[:, :, shape.text :], exact, eager)


@reference_and_best
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@every_spec
def test_masked_keys_change_no_bit(spec: AttentionSpec, dtype: torch.dtype) -> None:
    shape = BIASED["two-masks-text-first"][0]
    bias = shape.text_bias()
    first, second = shape.inputs(dtype), shape.inputs(dtype)
    for sample, gone in enumerate(bias == -torch.inf):
        for x, other in zip(second[1:], (-50.0, 70.0), strict=True):
            x[sample][:, : shape.text][:, gone] = other
    found = []
    for qkv in (first, second):
        leaves = [x.requires_grad_() for x in qkv]
        out, lse = run(leaves, spec, shape.layout, text_bias=bias)
        (out.float().square().sum() + lse.sin().sum()).backward()
        found.append([out.detach(), lse.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    for grad in found[0][3:]:
        assert not grad[:, :, : shape.text].transpose(1, 2)[bias == -torch.inf].any()


@reference_and_best
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_method
def test_a_bias_of_any_floating_dtype(name: str, dtype: torch.dtype) -> None:
    bias, qkv = RAGGED.text_bias().to(dtype), RAGGED.inputs()
    lowest = bias.clamp_min(torch.finfo(dtype).min)  # masks as -inf does
    found = [run(qkv, SPECS[name], RAGGED.layout, text_bias=x) for x in (bias.float(), bias, lowest)]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


def test_an_empty_bias_is_none() -> None:
    shape, spec = Shape(1, 2, 8, (1, 9, 10)), SPECS["clear"]
    got = run(shape.inputs(), spec, shape.layout, text_bias=torch.zeros(1, 0))
    torch.testing.assert_close(got, run(shape.inputs(), spec, shape.layout), rtol=0, atol=0)


@reference_and_best
@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_spec
def test_low_precision_under_a_bias(spec: AttentionSpec, dtype: torch.dtype) -> None:
    shape = BIASED["two-masks-text-first"][0]
    qkv, params, bias = shape.inputs(dtype), random_parameters(spec, shape).requires_grad_(False), shape.text_bias()
    exact, eager = (oracle(*qkv, spec, shape.layout, params, text_bias=bias, dtype=d) for d in (torch.float64, dtype))
    out, lse = run(qkv, spec, shape.layout, params, text_bias=bias)
    assert_close_as_eager(out, exact[0], eager[0])
    assert_close_as_eager(lse, exact[1], eager[1], "lse")


@every_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@every_spec
def test_low_precision(spec: AttentionSpec, dtype: torch.dtype) -> None:
    qkv, params = RAGGED.inputs(dtype), random_parameters(spec, RAGGED).requires_grad_(False)
    exact, eager = (oracle(*qkv, spec, RAGGED.layout, params, dtype=d) for d in (torch.float64, dtype))
    out, lse = run(qkv, spec, RAGGED.layout, params)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_close_as_eager(out, exact[0], eager[0])
    assert_close_as_eager(lse, exact[1], eager[1], "lse")


@every_implementation
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param(AttentionSpec((TopK(1.0), Disc(3)), order=SMALL, block=(16, 16)), id="top-k-density-1-and-disc"),
        pytest.param(AttentionSpec((TopK(1.0), DiscBlocks(3)), Pooled(), Mass(), SMALL, (16, 16)), id="fovea-density-1-and-disc-blocks"),
        pytest.param(Fovea(1.0), id="fovea-density-1"),
        pytest.param(Fovea(radius=50), id="fovea-radius-past-the-grid"),
        pytest.param(Fovea(blocks=10_000), id="more-blocks-than-there-are"),
        pytest.param(CLEAR(50), id="clear-past-the-grid"),
        pytest.param(SLA(1.0), id="sla-density-1"),
        pytest.param(SLA(1.0, "relu", "all"), id="sla-all-density-1"),
        pytest.param(SLA(1, scope="none"), id="sla-none-density-1"),
        pytest.param(GNA(50), id="gna-past-the-grid"),
        pytest.param(GNA(50, stride=7), id="gna-stride-past-the-grid"),
        pytest.param(AttentionSpec((TopK(1.0),), Linear(), Mass(), SMALL, (16, 16)), id="linear-mass-density-1"),
    ],
)
@pytest.mark.parametrize("shape", [VIDEO, RAGGED], ids=["video-text-last", "11x14-text-5"])
def test_everything_kept_is_dense(spec: AttentionSpec, shape: Shape) -> None:
    qkv = shape.inputs()
    exact, eager = F.scaled_dot_product_attention(*(x.double() for x in qkv)), F.scaled_dot_product_attention(*qkv)
    assert_close_as_eager(run(qkv, spec, shape.layout)[0], exact, eager)


@every_implementation
@pytest.mark.parametrize("spec", [Fovea(1e-9), SLA(1e-9), SLA(1e-9, scope="none")], ids=["fovea", "sla", "sla-none"])
def test_some_block_is_always_kept(spec: AttentionSpec) -> None:
    one_of_six = dataclasses.replace(spec, keep=(dataclasses.replace(spec.keep[0], density=0.17),))
    got, expected = (run(RAGGED.inputs(), s, RAGGED.layout) for s in (spec, one_of_six))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@every_spec
def test_no_parameters_mean_their_start_values(spec: AttentionSpec) -> None:
    qkv, start = RAGGED.inputs(), spec.make_parameters(heads=RAGGED.heads, head_dim=RAGGED.head_dim)
    torch.testing.assert_close(run(qkv, spec, RAGGED.layout), run(qkv, spec, RAGGED.layout, start), rtol=0, atol=0)


@every_implementation
@pytest.mark.parametrize("scale", [0.0, 0.7], ids=str)
@every_method
def test_scale_is_that_of_the_logits(name: str, scale: float) -> None:
    qkv = RAGGED.inputs()
    exact, eager = (oracle(*qkv, SPECS[name], RAGGED.layout, scale=scale, dtype=d)[0].detach() for d in (torch.float64, torch.float32))
    assert_close_as_eager(run(qkv, SPECS[name], RAGGED.layout, scale=scale)[0], exact, eager)


@pytest.mark.parametrize("shape", [VIDEO, RAGGED], ids=["video-text-last", "11x14-text-5"])
@pytest.mark.parametrize("order", [Tiles((2, 3, 5)), SMALL], ids=["other-tiles", "own-tiles"])
@every_method
def test_memory_order_is_only_an_order(name: str, order: Tiles, shape: Shape) -> None:
    spec, qkv, image = SPECS[name], shape.inputs(torch.float64), slice(shape.text, None) if shape.text_first else slice(0, -shape.text)

    def permuted(x: Tensor, to: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, image] = x[:, :, image][:, :, to]
        return x

    there, back = memory_order(shape.grid, order), raster_order(shape.grid, order)
    got = run([permuted(x, there) for x in qkv], spec, dataclasses.replace(shape.layout, order=order))
    torch.testing.assert_close(tuple(permuted(x, back) for x in got), run(qkv, spec, shape.layout), rtol=1e-11, atol=1e-11)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New uninitialised tensors are full of NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return filled

    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@every_implementation
@pytest.mark.usefixtures("poisoned")
@every_spec
def test_reads_no_uninitialised_memory(spec: AttentionSpec) -> None:
    assert torch.empty(1).isnan().all()
    found = own_gradients(spec, VIDEO)
    out, lse = run(VIDEO.inputs(), spec, VIDEO.layout)
    assert [name for name, x in {**found, "out": out, "lse": lse}.items() if not x.isfinite().all()] == []


@every_implementation
@every_spec
def test_two_calls_are_bitwise_equal_with_another_size_between(spec: AttentionSpec) -> None:
    first, _, again = ((run(s.inputs(), spec, s.layout), own_gradients(spec, s)) for s in (RAGGED, VIDEO, RAGGED))
    torch.testing.assert_close(again, first, rtol=0, atol=0)


@every_method
def test_trains_after_inference_mode(name: str) -> None:
    shape = Shape(1, 1, 8, (1, 9, 10), 3)
    with torch.inference_mode():
        run(shape.inputs(), SPECS[name], shape.layout)
    assert own_gradients(SPECS[name], shape)["key"].any()


Q = torch.zeros(1, 2, 20, 8)
GOOD = {"query": Q, "key": Q, "value": Q, "spec": SLA(0.1), "layout": TokenLayout((1, 4, 4), text=4)}


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        pytest.param({"key": Q[:, :, :-1]}, "(1, 2, 19, 8)", id="key-shorter"),
        pytest.param({"value": Q[..., :4]}, "(1, 2, 20, 4)", id="value-narrower"),
        pytest.param(dict.fromkeys(("query", "key", "value"), Q[0]), "(2, 20, 8)", id="three-dimensions"),
        pytest.param({"layout": TokenLayout((1, 4, 4))}, "requires 16 tokens, not 20", id="text-forgotten"),
        pytest.param({name: Q.long() for name in ("query", "key", "value")}, "torch.int64", id="integers"),
        pytest.param({"value": Q.double()}, "torch.float64", id="mixed-dtypes"),
        pytest.param({"value": Q.to("meta")}, "meta", id="mixed-devices"),
        pytest.param({"params": Fovea().make_parameters(heads=2, head_dim=8)}, "offset", id="parameters-of-another-spec"),
        pytest.param({"params": SLA(0.1).make_parameters(heads=2, head_dim=16)}, "(16, 16)", id="parameters-of-another-head-dim"),
        pytest.param({"spec": Fovea(), "params": Fovea().make_parameters(heads=3, head_dim=8)}, "(3,)", id="parameters-of-other-heads"),
        pytest.param({"params": AttentionParameters()}, "proj.weight", id="parameters-missing"),
        pytest.param({"text_bias": torch.zeros(1, 3)}, "here (1, 4), not (1, 3)", id="bias-shorter"),
        pytest.param({"text_bias": torch.zeros(2, 4)}, "here (1, 4), not (2, 4)", id="bias-of-another-batch"),
        pytest.param({"text_bias": torch.zeros(4)}, "here (1, 4), not (4,)", id="bias-of-one-dimension"),
        pytest.param({"text_bias": torch.ones(1, 4, dtype=torch.bool)}, "not torch.bool on cpu", id="boolean-bias"),
        pytest.param({"text_bias": torch.zeros(1, 4, device="meta")}, "not torch.float32 on meta", id="bias-elsewhere"),
        pytest.param({"text_bias": torch.zeros(1, 4, requires_grad=True)}, "detach it", id="bias-with-gradient"),
    ],
)
def test_refuses(change: dict[str, Any], shown: str) -> None:
    with pytest.raises(ValueError, match=re.escape(shown)):
        attention(**(GOOD | change))


@pytest.mark.parametrize("backend", ["tritonn", "", None], ids=repr)
def test_refuses_an_unknown_backend(backend: str) -> None:
    with pytest.raises(BackendError, match=repr(backend)):
        attention(**GOOD, backend=backend)


@pytest.mark.parametrize(("radius", "published"), [(8, 63.5), (16, 86.6), (32, 154.1)], ids=str)
def test_clear_keeps_as_many_pairs_as_published(radius: int, published: float) -> None:
    side, text, width = 64, 512, 3072
    near = [(dy, dx) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1) if dy**2 + dx**2 < radius**2]
    pairs = sum((side - abs(dy)) * (side - abs(dx)) for dy, dx in near)
    assert disc_pairs(((1, side, side),), radius).sum() == pairs
    assert round(kept_density(CLEAR(radius), TokenLayout((1, side, side), text)) * side**4) == pairs
    assert round(4 * width * (text * (side**2 + text) + side**2 * text + pairs) / 1e9, 1) == published


@pytest.mark.parametrize("name", ["fovea", "fovea-radius", "clear", "clear-downsample", "sla", "sla-all", "gna", "linear-mass"])
def test_makes_nothing_quadratic(name: str) -> None:
    shape = Shape(1, 1, 8, (1, 32, 64), 5)
    with Largest() as seen:
        own_gradients(SPECS[name], shape)
    assert 0 < seen.elements < shape.layout.image**2


def test_a_quadratic_tensor_would_be_seen() -> None:
    shape = Shape(1, 1, 8, (1, 8, 8))
    with Largest() as seen:
        oracle(*shape.inputs(), SPECS["clear"], shape.layout)
    assert seen.elements >= shape.layout.image**2
