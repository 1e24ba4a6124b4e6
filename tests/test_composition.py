"""The operator as a composition: what the compiled kernels don't know in full has its exact part there and the rest in torch, and the call
that is one kernel equals it."""

from dataclasses import dataclass

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import CPU, attention_by
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, SLA, AttentionSpec, Fovea, attention
from dit_accel.kernels import reference
from dit_accel.kernels.reference import Partial
from dit_accel.method import (
    Call,
    Cost,
    ErrorProduct,
    FirstFrames,
    Linear,
    Mass,
    MeanProduct,
    Merge,
    Pooled,
    Residual,
    Rest,
    Score,
    Sizes,
    Tiles,
    TopK,
    TopP,
)
from dit_accel.operator import lowering
from dit_accel.operator.attention import attend
from dit_accel.operator.blocks_of_grid import make_plan, with_chosen
from dit_accel.operator.composition import image_call

SMALL = Tiles((4, 4))
RAGGED, VIDEO, TEXTLESS = Shape(1, 2, 16, (1, 11, 14), 5), Shape(2, 2, 24, (3, 5, 9), 7, False), Shape(1, 2, 16, (1, 9, 11))
TINY = Shape(1, 1, 16, (1, 6, 9), 3)  # the interpreter takes a thousand times as long


@dataclass(frozen=True)
class Spread(Score):
    """The product of block means times how much the keys of a block differ."""

    def __call__(self, call: Call) -> Tensor:
        keys = call.k_blocks.gather(call.k) * call.k_blocks.valid[..., None]
        return MeanProduct()(call) * keys.square().sum((-1, -2))[:, None].double()

    def cost(self, sizes: Sizes) -> Cost:
        return MeanProduct().cost(sizes)


@dataclass(frozen=True)
class Wide(Rest):
    """Linear attention of the rest with twice as many features as channels, each block weighted by what was learned."""

    fit = "descent"

    @property
    def whole_blocks(self) -> bool:
        return True

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"wide.scale": torch.ones(heads)}

    def __call__(self, call: Call) -> Partial:
        scale = call.per_head("wide.scale")[:, None, None].square()
        q, k = (torch.cat([x.relu() + 0.1, (-x).relu() + 0.1], -1) for x in (call.q, call.k))
        return reference.linear_attention_rest(q, k, call.v, ~call.kept * scale, call.q_blocks, call.k_blocks)

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(4 * sizes.tokens * sizes.head_dim**2, 2)


@dataclass(frozen=True)
class Gain(Merge):
    """out = exact + g · rest, g one number per head, zero at start."""

    fit = "descent"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"gain": torch.zeros(heads)}

    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        return exact[0] + call.per_head("gain")[:, None, None] * rest[0], exact[1]


KNOWN = {
    "pooled": AttentionSpec((TopK(0.2, True),), Pooled(), Mass(), SMALL, (16, 16)),
    "first-order": AttentionSpec((TopK(0.3, score=ErrorProduct()),), Pooled(parts=2, order=1), Mass(), SMALL, (16, 16)),
    "top-p-first-order": AttentionSpec((TopP(0.4, 0.3),), Pooled(parts=4, order=1), Mass(), SMALL, (16, 16)),
    "linear": SLA(0.3, "relu", block=(16, 32)),
    "linear-all": SLA(0.2, "elu", "all", tile=(4, 4)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("softmax"), Mass(), SMALL, (16, 16)),
    "downsampled": CLEAR(3, downsample=4, tile=(4, 4)),
    "grouped": AttentionSpec((TopK(0.2, score=ErrorProduct()),), Pooled(parts=2, order=1, opened=1), Mass(), SMALL, (16, 16)),
}
FOREIGN = {
    "top-p": AttentionSpec((TopP(0.6, 0.5),), order=SMALL, block=(16, 16)),
    "top-p-and-frame": AttentionSpec((TopP(0.5, 0.4), FirstFrames(1)), Linear("elu"), Residual(), SMALL, (16, 16)),
    "top-p-pooled": AttentionSpec((TopP(0.4, 0.3),), Pooled(), Mass(), SMALL, (16, 16)),
    "score": AttentionSpec((TopK(0.2, True, Spread()),), Pooled(), Mass(), SMALL, (16, 16)),
    "rest": AttentionSpec((TopK(0.2),), Wide(), Mass(), SMALL, (16, 16)),
    "rest-and-merge": AttentionSpec((TopK(0.2),), Wide(), Gain(), SMALL, (16, 16)),
    "merge": AttentionSpec((TopK(0.2),), Linear("elu", "all"), Gain(), SMALL, (16, 16)),
}


def cases(specs: dict[str, AttentionSpec], *on_gpu: str) -> pytest.MarkDecorator:
    """A backend and a spec: all of them on the CPU, some of them in Triton too; what runs in torch is the same."""
    chosen = [pytest.param("cpu", spec, id=f"cpu-{name}") for name, spec in specs.items()]
    chosen += [pytest.param("triton", specs[name], id=f"triton-{name}", marks=pytest.mark.gpu) for name in on_gpu]
    return pytest.mark.parametrize(("backend", "spec"), chosen)


def compare(backend: str, spec: AttentionSpec, shape: Shape, bias: Tensor | None = None) -> None:
    """A backend's output, lse and gradients with those of the reference."""
    own, expected = (attention_by(name, spec, shape.layout, text_bias=bias) for name in (backend, "reference"))
    results = []
    for function, dtype in ((own, torch.float32), (expected, torch.float64), (expected, torch.float32)):
        params = random_parameters(spec, shape, dtype)
        with torch.no_grad():
            found = function(shape.inputs(dtype), params)
        results.append([*found, flat(gradients(function, spec, shape, dtype))])
    for got, exact, eager, name in zip(*results, ("output", "lse", "gradients"), strict=True):
        assert_close_as_eager(got, exact.double(), eager, name)


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels know no rest and no merge; notes each exact part that they run."""
    ran, exact = [], lowering.exact
    monkeypatch.setattr(lowering, "fuses", lambda spec, *_: spec.rest is None)
    monkeypatch.setattr(lowering, "exact", lambda *args: (ran.append("exact"), exact(*args))[1])
    return ran


@cases(KNOWN, "linear-mass")
def test_the_composition_equals_the_reference(spec: AttentionSpec, backend: str, composed: list[str]) -> None:
    compare(backend, spec, RAGGED if backend == "cpu" else TINY, RAGGED.text_bias() if backend == "cpu" else None)
    assert len(composed) == 2


@pytest.mark.parametrize("spec", KNOWN.values(), ids=KNOWN)
def test_one_call_equals_the_composition(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers by one kernel, and by an exact part and torch, on the same inputs."""
    params, function = random_parameters(spec, VIDEO), attention_by("cpu", spec, VIDEO.layout)
    whole = [*function(VIDEO.inputs(), params), flat(gradients(function, spec, VIDEO, torch.float32))]
    monkeypatch.setattr(lowering, "fuses", lambda spec, *_: False)
    parts = [*function(VIDEO.inputs(), params), flat(gradients(function, spec, VIDEO, torch.float32))]
    torch.testing.assert_close(whole, parts, rtol=2e-4, atol=2e-5)
    assert not torch.equal(whole[0], parts[0])


@pytest.mark.gpu
def test_the_first_order_by_the_gpu_kernels_equals_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "exact", None)  # not called: all but the summaries is one kernel
    compare("triton", KNOWN["first-order"], TINY)


@cases(FOREIGN, "top-p-and-frame", "rest-and-merge")
def test_what_the_kernels_do_not_know_equals_the_reference(spec: AttentionSpec, backend: str) -> None:
    compare(backend, spec, RAGGED if backend == "cpu" else TINY)


@pytest.mark.parametrize("shape", [VIDEO, TEXTLESS], ids=["video-text-last", "no-text"])
@pytest.mark.parametrize("spec", FOREIGN.values(), ids=FOREIGN)
def test_what_the_kernels_do_not_know_on_other_sequences(spec: AttentionSpec, shape: Shape) -> None:
    compare("cpu", spec, shape, shape.text_bias() if shape.text else None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_composition_in_low_precision(dtype: torch.dtype) -> None:
    spec, params = FOREIGN["rest-and-merge"], random_parameters(FOREIGN["rest-and-merge"], RAGGED)
    inputs = RAGGED.inputs(dtype)
    with torch.no_grad():
        exact = attention_by("reference", spec, RAGGED.layout)([x.double() for x in inputs], params.double())[0]
        got = attention_by("cpu", spec, RAGGED.layout)(inputs, params.float())[0]
    assert got.dtype == dtype
    error = (got.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 2 * torch.finfo(dtype).eps  # the exact part is rounded, its weights are, and the sum


@pytest.mark.parametrize("shape", [RAGGED, VIDEO], ids=["11x14", "video"])
@pytest.mark.parametrize("spec", [FOREIGN["top-p"], FOREIGN["top-p-and-frame"], FOREIGN["top-p-pooled"]], ids=["alone", "frame", "pooled"])
def test_top_p_equals_the_oracle(spec: AttentionSpec, shape: Shape) -> None:
    qkv, params = shape.inputs(torch.float64), random_parameters(spec, shape, torch.float64)
    expected = oracle(*qkv, spec, shape.layout, params)
    torch.testing.assert_close(attention_by("reference", spec, shape.layout)(qkv, params), expected, rtol=1e-11, atol=1e-11)


def chosen(top: TopP) -> Tensor:
    """How many blocks each query block keeps, on inputs whose query blocks differ."""
    spec, shape = AttentionSpec((top,), order=SMALL, block=(16, 16)), Shape(1, 2, 16, (1, 32, 32))
    q, k, v = shape.inputs()
    plan = make_plan(spec, shape.layout, CPU)
    return top.choose(image_call(q * torch.linspace(0, 6, 1024)[:, None], k, v, shape.layout, plan, {}, 0.25)).valid.sum(-1)


def test_top_p_keeps_as_many_blocks_as_the_mass_needs() -> None:
    some, more, most = chosen(TopP(0.3, 1.0)), chosen(TopP(0.6, 1.0)), chosen(TopP(1.0, 1.0))
    assert len(some.unique()) > 5
    assert (some <= more).all()
    assert (some < more).any()
    assert (most == 64).all()
    assert chosen(TopP(0.6, 0.25)).equal(more.clamp_max(16))
    assert (chosen(TopP(1e-9)) == 1).all()


def test_everything_kept_is_dense_attention() -> None:
    spec = AttentionSpec((TopP(1.0, 1.0),), Pooled(), Mass(), SMALL, (16, 16))
    q, k, v = RAGGED.inputs(torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attention(q, k, v, spec, RAGGED.layout), expected, rtol=1e-11, atol=1e-11)


def test_a_block_that_is_not_held_hides_no_listed_one() -> None:
    from dit_accel.kernels.blocks import BlockMap

    static = BlockMap(torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool))
    both = with_chosen(static, torch.tensor([[[1, 3, 0]]]), torch.tensor([[[True, True, False]]]))
    assert both.valid.tolist() == [[[True, False, True, True, False]]]
    assert both.kept(4).tolist() == [[[True, True, False, True]]]


def test_a_composition_compiles_without_a_break() -> None:
    spec, layout = FOREIGN["rest-and-merge"], RAGGED.layout
    plan, params = make_plan(spec, layout, CPU), random_parameters(spec, RAGGED)
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: attend(q, k, v, spec, layout, plan, params(), None, "cpu"), backend="aot_eager", fullgraph=True
    )
    qkv, again = RAGGED.inputs(grad=True), RAGGED.inputs(grad=True)
    out, expected = compiled(*qkv)[0], attention_by("cpu", spec, layout)(again, params)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close([x.grad for x in qkv], [x.grad for x in again], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (Fovea(0.2), "compiled kernels, "),
        (Fovea(0.2, order=1), "compiled kernels, "),
        (FOREIGN["top-p"], "TopP in torch"),
        (FOREIGN["rest"], "Wide and Mass in torch"),
        (AttentionSpec((TopK(0.2, score=Spread()),), Wide(), Gain()), "TopK and Wide and Gain in torch"),
    ],
    ids=["known", "first-order", "selection", "rest", "all"],
)
def test_the_summary_says_what_runs_in_torch(spec: AttentionSpec, words: str) -> None:
    from conftest import tiny_pipe

    rows = dit_accel.summary(dit_accel.accelerate(tiny_pipe(), spec), show=False)
    assert all(words in row.why and ("in torch" in row.why) == ("in torch" in words) for row in rows)
