"""What the compiled CPU kernels promise besides equality with the oracle (test_operator.py): every width and odd grid, any number of
threads, strided and poisoned inputs, PyTorch's operator rules, and clear refusals."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from conftest import tiny_pipe
from helpers import Shape, assert_close_as_eager, gradients, oracle, random_parameters, spread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel import accelerate
from dit_accel.errors import BackendError
from dit_accel.kernels import blocks, dispatch, ops
from dit_accel.kernels.arguments import ATTENTION, Arguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.cpu import native
from dit_accel.method import AttentionSpec, Disc, DiscBlocks, ErrorProduct, Linear, Mass, Pooled, Raster, Tiles, TopK, Window
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attend, attention
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.plans import RECENT

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")

SPECS = {
    "fovea": Fovea(0.2),
    "fovea-radius": Fovea(radius=3),
    "clear": CLEAR(4),
    "clear-downsample": CLEAR(3, downsample=2),
    "sla": SLA(0.3, block=(32, 16)),
    "sla-all": SLA(0.3, "elu", "all"),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("relu"), Mass(), Tiles((4, 4)), (16, 16)),
    "gna": GNA((4, 6), stride=(2, 3), dilation=(1, 2)),
}
TARGETS = native.TARGETS[: native.TARGETS.index(native.best_target()) + 1] if native.library() else ()


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this CPU has, one after the other."""
    monkeypatch.setenv(native.TARGET_VARIABLE, request.param)
    return request.param


every_target = pytest.mark.usefixtures("target")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(
    qkv: list[Tensor], spec: AttentionSpec, layout: TokenLayout, params: Any = None, text_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return attention(*qkv, spec, layout, params=params, text_bias=text_bias, backend="cpu", return_lse=True)


def assert_equals_oracle(
    spec: AttentionSpec, shape: Shape, dtype: torch.dtype = torch.float32, text_bias: Tensor | None = None
) -> None:  # fmt: skip
    qkv, params = shape.inputs(dtype), random_parameters(spec, shape)
    exact, eager = (oracle(*qkv, spec, shape.layout, params, text_bias=text_bias, dtype=d) for d in (torch.float64, dtype))
    with torch.no_grad():
        got = run(qkv, spec, shape.layout, params, text_bias)
    assert_close_as_eager(got[0], exact[0].detach(), eager[0].detach())
    assert_close_as_eager(got[1], exact[1].detach(), eager[1].detach(), "lse")


def own_gradients(spec: AttentionSpec, shape: Shape) -> dict[str, Tensor]:
    return gradients(lambda qkv, params: run(qkv, spec, shape.layout, params), spec, shape, torch.float32)


@every_target
@every_dtype
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 160, 256])
@pytest.mark.parametrize("name", ["fovea", "sla", "clear"])
def test_every_head_dim(name: str, head_dim: int, dtype: torch.dtype) -> None:
    assert_equals_oracle(SPECS[name], Shape(1, 2, head_dim, (1, 9, 14), 5), dtype)


def gradients_of_rounded(dtype: torch.dtype, shape: Shape, function: Any) -> list[Tensor]:
    """Of query, key and value, which are bfloat16 before they are `dtype`; function(query, key, value) gives the output and the lse."""
    qkv, seed = [x.to(dtype).requires_grad_() for x in shape.inputs(torch.bfloat16)], torch.Generator().manual_seed(5)
    factors = torch.randn(2, *qkv[0].shape, generator=seed).to(torch.bfloat16).double()
    out, lse = function(*qkv)
    ((out.double() * factors[0]).sum() + (lse.double() * factors[1, ..., 0]).sum()).backward()
    return [x.grad for x in qkv]  # type: ignore[misc]


@every_target
@every_spec
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 2, 64, (1, 16, 24)), Shape(2, 1, 40, (1, 13, 11), 21), Shape(1, 1, 72, (3, 4, 9), 70), Shape(1, 1, 256, (1, 5, 7), 3)],
    ids=lambda shape: str(shape.head_dim),
)
def test_gradients_of_bfloat16(spec: AttentionSpec, shape: Shape) -> None:
    """Under a bias of the text's keys, some of which are masked."""
    bias = shape.text_bias() if shape.text else None
    params = random_parameters(spec, shape)

    def formula(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return oracle(*qkv, spec, shape.layout, params, text_bias=bias, dtype=qkv[0].dtype)

    def found(dtype: torch.dtype, function: Any) -> list[Tensor]:
        params.zero_grad()
        return [*gradients_of_rounded(dtype, shape, function), *(p.grad.clone() for p in params.parameters() if p.grad is not None)]

    exact, eager = (found(dtype, formula) for dtype in (torch.float64, torch.bfloat16))
    got = found(torch.bfloat16, lambda *qkv: run(list(qkv), spec, shape.layout, params, bias))
    names = ("query", "key", "value", *(name for name, _ in params.named_parameters()))
    for name, mine, true, rounded in zip(names, got, exact, eager, strict=True):
        assert_close_as_eager(mine, true.double(), rounded, name)


SUMMARISED = {
    "order-1": Fovea(0.2, order=1, parts=2),
    "parts": Fovea(0.2, parts=4),
    "groups": AttentionSpec((TopK(0.2, score=ErrorProduct()),), Pooled(opened=2), Mass(), Tiles((4, 4)), (16, 16)),
    "groups-order-1": AttentionSpec(
        (TopK(0.1, score=ErrorProduct()),), Pooled(parts=4, order=1, opened=2), Mass(), Tiles((4, 4)), (16, 16)
    ),
}


@every_target
@pytest.mark.parametrize("spec", SUMMARISED.values(), ids=SUMMARISED)
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 2, 64, (1, 32, 40), 9), Shape(2, 1, 40, (1, 21, 19), 5), Shape(1, 1, 72, (3, 8, 9), 70), Shape(1, 1, 256, (1, 17, 9))],
    ids=lambda shape: str(shape.head_dim),
)
def test_bfloat16_of_given_pooled_keys(spec: AttentionSpec, shape: Shape) -> None:
    """Eager is the reference, which rounds the output alone; its lse is float32 throughout: the exact one in bfloat16 serves."""
    qkv = shape.inputs(torch.bfloat16)
    with torch.no_grad():
        exact = attention(*(x.double() for x in qkv), spec, shape.layout, backend="reference", return_lse=True)
        eager = attention(*qkv, spec, shape.layout, backend="reference")
        got = run(qkv, spec, shape.layout)
    assert_close_as_eager(got[0], exact[0], eager)
    assert_close_as_eager(got[1], exact[1], exact[1].bfloat16(), "lse")


def named(*values: Any) -> dict[str, Any]:
    """The values by what they look like."""
    return {str(value): value for value in values}


GRIDS = named((1, 1, 1), (1, 3, 50), (1, 17, 23), (5, 9, 7), (1, 1, 65), (1, 20, 50))


@every_target
@pytest.mark.parametrize(
    ("name", "text", "grid", "dtype", "target"),
    spread(4, named("fovea", "fovea-radius", "sla", "clear", "gna"), named(0, 1, 77, 512), GRIDS, DTYPES, named(*TARGETS)),
    indirect=["target"],
)
def test_every_grid_and_text(name: str, grid: tuple[int, int, int], text: int, dtype: torch.dtype) -> None:
    assert_equals_oracle(SPECS[name], Shape(1, 2, 16, grid, text, text != 77), dtype)


BIASES = {"1": (1, False), "5": (5, False), "77": (77, False), "130": (130, False), "all-masked": (77, True)}


@every_target
@pytest.mark.parametrize(
    ("name", "text_and_masked", "head_dim", "dtype", "target"),
    spread(4, named("fovea", "sla", "clear", "clear-downsample", "gna"), BIASES, named(8, 40, 72), DTYPES, named(*TARGETS)),
    indirect=["target"],
)
def test_every_bias_of_the_texts_keys(name: str, text_and_masked: tuple[int, bool], head_dim: int, dtype: torch.dtype) -> None:
    """`test_operator.py` has the gradients: there is one code for them."""
    text, masked = text_and_masked
    shape = Shape(2, 2, head_dim, (1, 9, 14), text, text != 77)
    assert_equals_oracle(SPECS[name], shape, dtype, shape.text_bias(masked=masked))


@every_target
@every_dtype
@every_spec
def test_one_large_bias_decides(spec: AttentionSpec, dtype: torch.dtype) -> None:
    """A text key far above all others is all that any query sees: the largest logit is found among the text's too."""
    shape = Shape(1, 2, 16, (1, 7, 9), 20)
    qkv, bias = shape.inputs(dtype), torch.full((1, 20), -torch.inf)
    bias[0, 13] = 1e4
    exact, eager = (oracle(*qkv, spec, shape.layout, text_bias=bias, dtype=d)[0].detach() for d in (torch.float64, dtype))
    assert_close_as_eager(run(qkv, spec, shape.layout, text_bias=bias)[0], exact, eager)
    torch.testing.assert_close(exact[:, :, :20], qkv[2].double()[:, :, 13:14].expand(-1, -1, 20, -1))


@every_target
@every_dtype
@pytest.mark.parametrize("steepness", [0.3, 3.0, 30.0])
@pytest.mark.parametrize("name", ["fovea", "clear"])
def test_maxima_that_rise_from_block_to_block(name: str, steepness: float, dtype: torch.dtype) -> None:
    """Later keys are the longer ones: what was summed before is scaled down by little, by much, and to nothing."""
    spec, shape = SPECS[name], Shape(1, 2, 64, (1, 16, 40), 3)
    qkv = shape.inputs(dtype)
    qkv[1] = qkv[1] * torch.linspace(0, steepness, shape.layout.tokens, dtype=dtype)[:, None]
    exact, eager = (oracle(*qkv, spec, shape.layout, dtype=d) for d in (torch.float64, dtype))
    with torch.no_grad():
        got = run(qkv, spec, shape.layout)
    assert_close_as_eager(got[0], exact[0].detach(), eager[0].detach())
    assert_close_as_eager(got[1], exact[1].detach(), eager[1].detach(), "lse")


@every_target
def test_channels_of_very_different_sizes_share_a_rest() -> None:
    """A channel that is large in what is left out alone errs as eager does, while another is larger everywhere."""
    spec, shape = AttentionSpec((TopK(0.1),), Linear("elu"), Mass(), Raster(), (32, 32)), Shape(1, 1, 32, (1, 1, 1024))
    q, k, v = shape.inputs()
    q[..., -1], k[:, :, :32, -1] = 4.0, 3.0  # every query keeps the first block
    k[:, :, 5, :-1], k[:, :, 5, -1] = 0.0, -60.0  # but its large key has no weight in the softmax
    v[..., 0] *= 1e6
    v[:, :, 5, 1] = 3e5
    exact, eager = (oracle(q, k, v, spec, shape.layout, dtype=d)[0].detach() for d in (torch.float64, torch.float32))
    assert_close_as_eager(run([q, k, v], spec, shape.layout)[0][..., 1], exact[..., 1], eager[..., 1])


@every_target
@pytest.mark.parametrize("offset", [300.0, 3e4, 1e10])
def test_features_of_a_large_offset(offset: float) -> None:
    """All channels of the queries are large, and differ little: the softmax over channels does not see what they share."""
    spec, shape = dataclasses.replace(SPECS["sla"], merge=Mass()), Shape(1, 1, 32, (1, 16, 24))
    q, k, v = shape.inputs()
    q, k = q + offset, k * 1e-3
    exact, eager = (oracle(q, k, v, spec, shape.layout, dtype=d)[0].detach() for d in (torch.float64, torch.float32))
    assert_close_as_eager(run([q, k, v], spec, shape.layout)[0], exact, eager)


@every_spec
def test_threads_change_no_bit(spec: AttentionSpec) -> None:
    shape, found, threads = Shape(1, 3, 24, (1, 19, 21), 7), [], torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append((run(shape.inputs(), spec, shape.layout), own_gradients(spec, shape)))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=0, atol=0)


@every_target
@every_dtype
@every_spec
def test_strided_inputs_amid_poison(spec: AttentionSpec, dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 40, (1, 11, 13), 6)
    plain = shape.inputs(dtype)
    wide = torch.full((2, shape.layout.tokens + 4, 5, 3 * 47), math.nan, dtype=dtype)  # odd: a row may begin amid a word
    views = [wide[:, 2:-2, 1:4, 47 * i : 47 * i + 40].transpose(1, 2) for i in range(3)]  # [B, H, N, D] of a fused projection
    for view, x in zip(views, plain, strict=True):
        view.copy_(x)
    torch.testing.assert_close(run(views, spec, shape.layout), run(plain, spec, shape.layout), rtol=0, atol=0)


@every_spec
def test_one_nan_stays_in_sight(spec: AttentionSpec) -> None:
    shape = Shape(1, 1, 16, (1, 8, 8))
    for which in range(3):
        qkv = shape.inputs()
        qkv[which][0, 0, 9, 3] = math.nan
        assert run(qkv, spec, shape.layout)[0][0, 0, 9].isnan().any()


def test_scores_that_tie_keep_the_first_blocks() -> None:
    q = torch.ones(1, 2, 96, 8)
    starts = torch.arange(0, 97, 16, dtype=torch.int32)
    a = SelectionArguments(q=q, k=q, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=3)
    assert ops.select_blocks(a, "cpu").lists.tolist() == [[[0, 1, 2]] * 6] * 2


def test_selection_equals_the_reference() -> None:
    q, k, _ = Shape(2, 2, 24, (1, 10, 30)).inputs()
    starts = torch.cat([torch.arange(0, 300, 32), torch.tensor([300])])
    cut = blocks.Blocks.from_starts(starts)
    weight = cut.count.sqrt()
    means = [blocks.pool_blocks(x.flatten(0, 1), cut)[0] for x in (q, k)]
    expected = blocks.select_blocks(*means, 4, key_weight=weight).index.sort(-1).values
    a = SelectionArguments(q=q, k=k, q_starts=starts.int(), k_starts=starts.int(), q_width=32, k_width=32, top=4, weight=weight)
    got, counts, *others = ops.select_blocks(a, "cpu")
    assert got.dtype == torch.int32
    assert counts.tolist() == [[4] * 10] * 4
    assert [x.numel() for x in others] == [0] * 5
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@every_spec
def test_obeys_the_rules_of_operators(spec: AttentionSpec, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Arguments, str]] = []
    shape, real = Shape(1, 2, 8, (1, 7, 9), 3), ops.attention

    def record(a: Arguments, implementation: str) -> tuple[Tensor, Tensor]:
        calls.append((a, implementation))
        return real(a, implementation)

    monkeypatch.setattr(ops, "attention", record)
    run(shape.inputs(grad=True), spec, shape.layout, random_parameters(spec, shape), shape.text_bias() if biased else None)
    a, implementation = calls[0]
    given = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in ATTENTION.pack(a)]
    torch.library.opcheck(ops.attention_op, (implementation, *given))


def test_the_default_dtype_changes_nothing() -> None:
    """The compiled kernels read the weights of short blocks by address."""
    shape, spec = Shape(1, 2, 16, (1, 19, 31), 4), Fovea(0.1)
    expected = run(shape.inputs(), spec, shape.layout)
    qkv = shape.inputs()
    RECENT.clear()
    torch.set_default_dtype(torch.float64)
    try:
        got = run(qkv, spec, shape.layout)
    finally:
        torch.set_default_dtype(torch.float32)
        RECENT.clear()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_channels_apart_are_said_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile lays out what follows by the fake kernel's strides."""
    found: list[tuple[Arguments, str]] = []
    shape, spec, real = Shape(1, 2, 8, (1, 7, 9), 3), CLEAR(3), ops.attention
    layout = dataclasses.replace(shape.layout, order=spec.order)  # so that nothing is copied into order
    monkeypatch.setattr(ops, "attention", lambda *args: (found.append(args), real(*args))[1])
    run([x.mT.contiguous().mT for x in shape.inputs()], spec, layout)
    a, implementation = found[0]
    assert a.q.stride(-1) > 1
    with FakeTensorMode() as mode:
        said = real(Arguments(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in a)), implementation)
    assert [x.stride() for x in said] == [x.stride() for x in real(*found[0])]


@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@every_spec
def test_compiles_without_a_break(spec: AttentionSpec, biased: bool) -> None:
    shape = Shape(1, 2, 8, (1, 7, 9), 3)
    layout, bias = shape.layout, shape.text_bias() if biased else None
    run(shape.inputs(), spec, layout)  # the plan is made outside of the graph, as a model's hook does
    plan, params = make_plan(spec, layout, torch.device("cpu")), random_parameters(spec, shape)
    torch.compiler.reset()  # one function for every spec: compiled again too often, it would be given up
    compiled = torch.compile(
        lambda q, k, v, bias: attend(q, k, v, spec, layout, plan, params(), None, "auto", text_bias=bias),
        backend="aot_eager",
        fullgraph=True,
    )
    qkv, again = shape.inputs(grad=True), shape.inputs(grad=True)
    out, expected = compiled(*qkv, bias)[0], run(again, spec, layout, params, bias)[0]
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close([x.grad for x in qkv], [x.grad for x in again], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("inputs", "shown"),
    [
        pytest.param([torch.zeros(1, 1, 16, 12)] * 3, "head_dim of 8 to 256 in steps of 8, not 12", id="head-dim-12"),
        pytest.param([torch.zeros(1, 1, 16, 264)] * 3, "not 264", id="head-dim-264"),
        pytest.param([torch.zeros(1, 1, 16, 8, dtype=torch.float64)] * 3, "not torch.float64", id="float64"),
        pytest.param([torch.zeros(1, 1, 16, 8, device="meta")] * 3, "on meta", id="meta"),
    ],
)
def test_says_what_it_can_not_run(inputs: list[Tensor], shown: str) -> None:
    with pytest.raises(BackendError, match=re.escape(shown)):
        run(inputs, CLEAR(2), TokenLayout((1, 4, 4)))


def test_without_a_compiler_the_reference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "CPU_TARGET", "none")
    chosen, why = dispatch.choose("auto", torch.device("cpu"), torch.float32, 64)
    assert (chosen, "C++17 compiler" in why) == ("reference", True)
    with pytest.raises(BackendError, match=re.escape("C++17 compiler")):
        dispatch.choose("cpu", torch.device("cpu"), torch.float32, 64)
    with pytest.warns(UserWarning, match=re.escape("C++17 compiler (g++ or clang++); until then the slower reference runs")):
        accelerate(tiny_pipe())


@pytest.mark.parametrize("unknown", ["sse9", "", "none"], ids=repr)
def test_refuses_an_unknown_target(unknown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.TARGET_VARIABLE, unknown)
    shape = Shape(1, 1, 8, (1, 4, 4))
    with pytest.raises(ValueError, match=re.escape(f"not {unknown!r}")):
        run(shape.inputs(), CLEAR(2), shape.layout)


# Any spec on any shape


@st.composite
def specs(draw: st.DrawFn) -> AttentionSpec:
    order = draw(st.sampled_from([Raster(), Tiles((4, 4)), Tiles((2, 4, 4)), Tiles((8, 8))]))
    block = (math.prod(order.sides),) * 2 if isinstance(order, Tiles) else draw(st.sampled_from([(16, 16), (64, 32), (16, 128)]))
    top = TopK(draw(st.floats(0.01, 1.0)), draw(st.booleans()))
    disc, window = Disc(draw(st.floats(0.1, 30))), Window(draw(st.integers(1, 9)), 1, draw(st.integers(1, 3)))
    boxes = [top, DiscBlocks(draw(st.floats(0.1, 9)))] if isinstance(order, Tiles) else [top]
    keep, exact = draw(
        st.sampled_from([((top,), False), ((disc,), True), ((disc, window), True), ((top, window), True), (tuple(boxes), False)])
    )
    rest, merge = draw(
        st.sampled_from(
            [(None, None), (Linear("elu", "all"), Mass())] if exact else [(None, None), (Pooled(), Mass()), (Linear("relu"), Mass())]
        )
    )
    return AttentionSpec(keep, rest, merge, order, block)


@given(
    specs(), st.tuples(st.integers(1, 3), st.integers(1, 11), st.integers(1, 20)), st.integers(0, 40), st.sampled_from([8, 24, 40]),
    st.booleans(), st.sampled_from([1.0, 30.0]), st.booleans(),
)  # fmt: skip
@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_any_spec_on_any_shape_is_finite_and_near_the_reference(
    spec: AttentionSpec, grid: tuple[int, int, int], text: int, head_dim: int, text_first: bool, size: float, backward: bool
) -> None:
    layout = TokenLayout(grid, text, text_first)
    seed = torch.Generator().manual_seed(text)
    q, k, v = (x * torch.randn(1, 1, layout.tokens, head_dim, generator=seed) for x in (size, 1.0, 1.0))
    qkv = [x.requires_grad_(backward) for x in (q, k, v)]
    out, lse = run(qkv, spec, layout)
    assert out.isfinite().all()
    assert lse.isfinite().all()
    if backward:
        (out.sum() + lse.sum()).backward()
        assert all(x.grad is not None and x.grad.isfinite().all() for x in qkv)
    eager, exact = (attention(*(x.detach().to(d) for x in qkv), spec, layout, backend="reference") for d in (torch.float32, torch.float64))
    error, allowed, largest = ((out.detach() - exact).abs().max(), (eager - exact).abs().max(), v.detach().abs().max())
    # maxima over as few as eight numbers: eager's may be lucky, hence the roundings of a sum beside it
    assert error <= 4 * allowed + 16 * torch.finfo(torch.float32).eps * largest
