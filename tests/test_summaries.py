"""What the CPU kernels make of whole blocks (means, scores, parts, pooled keys, slopes): against the formulas of `method.parts`.

A token on the border of a block's cut may change sides by rounding, so the formulas are given the kernel's parts; the parts themselves are
compared wherever a token is clear of the border.
"""

import dataclasses
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager
from on_device import CPU, device_of, moved
from torch import Tensor

from dit_accel.kernels import ops, splitting
from dit_accel.kernels.arguments import MIXTURE, SUMMARY, MixtureArguments, Summaries, SummaryArguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.cpu import native
from dit_accel.method import ErrorProduct, Fovea, Linear, Mass, Pooled, Tiles, TopK
from dit_accel.method.parts import Call, content
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import composition, lowering
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.composition import image_call, visited_blocks
from dit_accel.operator.layout import Layouts

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")

TARGETS = native.TARGETS[: native.TARGETS.index(native.best_target()) + 1] if native.library() else ()
CAP, SCORE_CAP = 0.7, 0.4  # some blocks are above, some below
REAL = ("q_mean", "k_mean", "score_bias", "pooled_k", "pooled_v", "pooled_bias", "slope", "tokens", "spread", "v_spread")
GIVEN = ("q_mean", "pooled_k", "pooled_v", "pooled_bias", "slope", "second", "spread")  # what has a gradient


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this CPU has, one after the other."""
    monkeypatch.setenv(native.TARGET_VARIABLE, request.param)
    return request.param


every_target = pytest.mark.usefixtures("target")


def spec_of(parts: int, order: int = 1) -> AttentionSpec:
    return Fovea(0.3, tile=(4, 4), parts=parts, order=order)


def plan_of(shape: Shape, spec: AttentionSpec) -> Plan:
    return make_plan(spec, shape.layout, CPU)


def arguments(shape: Shape, qkv: list[Tensor], parts: int, *, log_count: bool = True, first_order: bool = True) -> SummaryArguments:
    plan, layout = plan_of(shape, spec_of(parts)), shape.layout
    g, (q_width, k_width) = plan.geometry, (side.index.shape[1] for side in (plan.q_blocks, plan.k_blocks))
    return SummaryArguments(
        *qkv, q_starts=g.starts_q, k_starts=g.starts_k, q_width=q_width, k_width=k_width, parts=parts, text=layout.text,
        text_q=layout.text, text_first=layout.text_first, scale=0.3, cap=CAP, score_cap=SCORE_CAP, log_count=log_count,
        first_order=first_order, places_q=g.places_q, places_k=g.places_k,
    )  # fmt: skip


def formula(call: Call, part: Tensor, a: SummaryArguments, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The same by `method.parts`, from the kernel's own parts `[BH, T, width]`."""
    monkeypatch.setattr(content, "split_by_content", lambda call, parts: part.long())
    moments = content.moments_of(call, a.parts, slope=a.first_order)
    pooled = moments.pooled(log_count=a.log_count, cap=a.cap)
    q_mean, k_mean = content.pool_blocks(call.q, call.q_blocks)[0], call.key_means(call.k)
    score = ErrorProduct(SCORE_CAP)(dataclasses.replace(call, q=call.q))
    bias = (score - content.pool_blocks(call.q, call.q_blocks)[0].double() @ k_mean.double().mT)[:, 0] * a.scale
    found = {"q_mean": q_mean, "k_mean": k_mean, "score_bias": bias.to(call.q.dtype), "pooled_k": pooled.key, "pooled_v": pooled.value}
    found |= {name: getattr(moments, name).flatten(1) for name in ("tokens", "spread", "v_spread")} | {"second": call.q.square().mean(1)}
    return found | {"pooled_bias": pooled.bias} | ({} if pooled.slope is None else {"slope": pooled.slope.transpose(1, 2)})


def call_of(shape: Shape, qkv: list[Tensor], parts: int, dtype: torch.dtype) -> Call:
    call = image_call(*(x.to(dtype) for x in qkv), shape.layout, plan_of(shape, spec_of(parts)), {}, 0.3)
    return dataclasses.replace(call, **{name: getattr(call, name).to(dtype) for name in "qkv"})


def assert_parts(call: Call, part: Tensor, parts: int) -> None:
    """The sides of all tokens that are clear of the border, each half's cut of the tokens that the kernel has in it."""
    metric, valid, keys = call.q.mT @ call.q / call.q.shape[1], call.k_blocks.valid, call.k_blocks.gather(call.k)
    assert int(part.max()) < parts
    level, seen = 1, 0
    while level < parts:
        for number in range(level):
            mine = (part % level == number) & valid
            along = splitting.projected(keys, mine[..., None].to(keys.dtype), metric)
            clear = mine & (along.abs() > 1e-4 * along.abs().amax(-1, keepdim=True))
            assert torch.equal((part // level % 2 == 1)[clear], (along > 0)[clear])
            seen += int(clear.sum())
        level *= 2
    assert seen > 0.9 * int(valid.sum()) * len(part) * (parts // 2 if parts < 4 else 2) or parts == 1


SHAPES = {
    "ragged": Shape(1, 2, 16, (1, 9, 11), 5),
    "video-text-last": Shape(2, 2, 24, (3, 4, 7), 3, False),
    "references": Shape(1, 2, 40, (1, 9, 6), 0, True, ((1, 7, 5),)),
    **{f"head-{d}": Shape(1, 2, d, (1, 9, 7), 2) for d in (8, 64, 72, 128, 256)},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_target
@every_shape
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_the_summaries_are_their_formulas(shape: Shape, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        qkv = shape.inputs(dtype)
        a = arguments(shape, qkv, parts, log_count=dtype == torch.float32)
        got = ops.summarize_blocks(a, "cpu")
        part = got.part.flatten(0, 1)
        assert not part[:, ~call_of(shape, qkv, parts, torch.float64).k_blocks.valid].any()
        assert_parts(call_of(shape, qkv, parts, torch.float64), part.long(), parts)
        exact, eager = (formula(call_of(shape, qkv, parts, d), part, a, monkeypatch) for d in (torch.float64, torch.float32))
        for name in REAL:
            mine = getattr(got, name).flatten(0, 1)
            nothing = exact[name] == -torch.inf
            assert torch.equal(mine == -torch.inf, nothing)
            assert_close_as_eager(*(x.masked_fill(nothing, 0) for x in (mine, exact[name], eager[name])), name)
        q = call_of(shape, qkv, parts, torch.float64).q
        torch.testing.assert_close(got.second.flatten(0, 1), q.square().mean(1).float(), rtol=1e-5, atol=1e-6)
        if parts > 1:
            torch.testing.assert_close(got.metric.flatten(0, 1), content.metric_of(q).float(), rtol=1e-5, atol=1e-5)


@every_target
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", ["ragged", "video-text-last", "references", "head-72"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_gradients_are_the_formulas(dtype: torch.dtype, name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES[name]
    seed = torch.Generator().manual_seed(2)
    qkv = shape.inputs(dtype, grad=True)
    a = arguments(shape, qkv, parts)
    got = ops.summarize_blocks(a, "cpu")
    weights = {name: torch.randn(getattr(got, name).flatten(0, 1).shape, generator=seed) for name in GIVEN}

    def loss(found: dict[str, Tensor]) -> Any:
        total = 0.0
        for name, weight in weights.items():
            total = total + (found[name].masked_fill(found[name] == -torch.inf, 0) * weight.to(found[name].dtype)).sum()
        return total

    mine = torch.autograd.grad(loss({name: getattr(got, name).flatten(0, 1) for name in GIVEN}), qkv)
    theirs = []
    for other in (torch.float64, torch.float32):
        leaves = [x.detach().to(other).requires_grad_() for x in qkv]
        found = formula(call_of(shape, leaves, parts, other), got.part.flatten(0, 1), a, monkeypatch)
        theirs.append(torch.autograd.grad(loss(found), leaves))
    for own, exact, eager, what in zip(mine, *theirs, "qkv", strict=True):
        assert_close_as_eager(own, exact, eager, what)


def mixture(shape: Shape, parts: int, backend: str = "cpu") -> MixtureArguments:
    """The arguments of as many mixtures as there are query blocks, of the slopes that a backend makes."""
    a = arguments(shape, shape.inputs(), parts)
    slope = moved(ops.summarize_blocks(moved(a, device_of(backend)), backend).slope, CPU)
    blocks = len(a.q_starts) - 1
    weight = torch.rand(shape.batch, shape.heads, blocks, slope.shape[3], generator=torch.Generator().manual_seed(1))
    return MixtureArguments(weight.masked_fill(weight < 0.3, 0), slope)


def mixed(weight: Tensor, slope: Tensor) -> Tensor:
    """Its formula."""
    return torch.einsum("bhij,bhcjd->bhicd", weight, slope)


@every_target
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", ["ragged", "video-text-last", "head-8", "head-72", "head-64"])
def test_the_mixture_and_its_gradients_are_the_formula(name: str, parts: int) -> None:
    a = mixture(SHAPES[name], parts)
    found = []
    for dtype in (None, torch.float64, torch.float32):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in a[:2]]
        out = ops.mix_slopes(MixtureArguments(*leaves), "cpu") if dtype is None else mixed(*leaves)
        weight = torch.randn(out.flatten().shape, generator=torch.Generator().manual_seed(3)).to(out.dtype).view(out.shape)
        found.append([out.detach().flatten(), *(g.flatten() for g in torch.autograd.grad((out * weight).sum(), leaves))])
    for mine, exact, eager, what in zip(*found, ["out", "weight", "slope"], strict=True):
        assert_close_as_eager(mine, exact, eager, what)


@every_target
def test_blocks_of_one_token_and_equal_keys() -> None:
    """No direction to cut along and nothing that spreads: one part, no slope, nothing but numbers."""
    seed = torch.Generator().manual_seed(0)
    q, v = (torch.randn(1, 2, 12, 16, generator=seed) for _ in range(2))
    for k, each in ((torch.randn(1, 2, 12, 16, generator=seed), 1), (torch.full((1, 2, 12, 16), 0.5), 4)):
        starts = torch.arange(0, 13, each, dtype=torch.int32)
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        a = SummaryArguments(
            *leaves, q_starts=starts, k_starts=starts, q_width=each, k_width=each, parts=2, text=0, text_q=0, text_first=True, scale=0.25,
            cap=2.0, score_cap=2.0, log_count=True, first_order=True,
        )  # fmt: skip
        got = ops.summarize_blocks(a, "cpu")
        assert not got.part.any()
        assert not got.slope.any()
        bias = got.pooled_bias.unflatten(-1, (-1, 2))
        assert torch.equal(bias, torch.tensor([math.log(each), -torch.inf]).expand_as(bias))
        torch.testing.assert_close(got.pooled_k.unflatten(2, (-1, 2))[..., 0, :], k.unflatten(2, (-1, each)).mean(3))
        assert got.score_bias.isfinite().all()
        grads = torch.autograd.grad((got.pooled_k.sum() + got.pooled_v.sum() + got.pooled_bias[..., ::2].sum()), leaves)
        torch.testing.assert_close(grads[1], torch.full_like(k, 1 / each))
        assert all(x.isfinite().all() for x in grads)


@every_target
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_inputs_amid_poison(dtype: torch.dtype) -> None:
    shape = Shape(2, 3, 40, (1, 11, 13), 6)
    plain = shape.inputs(dtype)
    wide = torch.full((2, shape.layout.tokens + 4, 5, 3 * 47), math.nan, dtype=dtype)  # odd: a row may begin amid a word
    views = [wide[:, 2:-2, 1:4, 47 * i : 47 * i + 40].transpose(1, 2) for i in range(3)]
    for view, x in zip(views, plain, strict=True):
        view.copy_(x)
    for x in plain:  # nothing is read of the text
        x[:, :, shape.layout.text_slice] = math.nan
    for mine, theirs in zip(*(ops.summarize_blocks(arguments(shape, x, 4), "cpu") for x in (views, plain)), strict=True):
        assert torch.equal(mine, theirs)


def test_the_threads_change_nothing() -> None:
    def everything() -> list[Tensor]:
        qkv = SHAPES["ragged"].inputs(grad=True)
        made = ops.summarize_blocks(arguments(SHAPES["ragged"], qkv, 4), "cpu")
        loss = sum(torch.where(x.isfinite(), x, 0).square().sum() for x in made if x.requires_grad)
        leaves = [x.detach().requires_grad_() for x in mixture(SHAPES["ragged"], 4)[:2]]
        out = ops.mix_slopes(MixtureArguments(*leaves), "cpu")
        return [*made, out, *torch.autograd.grad(loss, qkv), *torch.autograd.grad(out.square().sum(), leaves)]  # type: ignore[arg-type]

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(everything())
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_they_obey_the_rules_of_operators() -> None:
    shape = Shape(1, 2, 8, (1, 7, 9), 3)
    qkv = shape.inputs(grad=True)
    torch.library.opcheck(ops.summarize_blocks_op, ("cpu", *SUMMARY.pack(arguments(shape, qkv, 2))))
    a = mixture(shape, 2)
    leaves = [x.detach().requires_grad_() for x in a[:2]]
    quick = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.mix_slopes_op, ("cpu", *MIXTURE.pack(MixtureArguments(*leaves))), test_utils=quick)


GUARDED = """
import ctypes, mmap, os, sys
import torch
from dit_accel.kernels import ops
from dit_accel.kernels.arguments import MixtureArguments, SummaryArguments
from dit_accel.kernels.choosing import SelectionArguments

libc, page = ctypes.CDLL(None), mmap.PAGESIZE
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

def at_the_end(x):
    size = x.numel() * x.element_size()
    whole = -(-size // page) * page
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    first = libc.mmap(None, whole + page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    assert libc.mprotect(first + whole, page, 0) == 0
    return torch.frombuffer((ctypes.c_char * size).from_address(first + whole - size), dtype=x.dtype).view(x.shape).copy_(x)

def with_gradients(results, leaves):
    torch.autograd.grad(results, leaves, [at_the_end(torch.randn(x.shape)) for x in results])

for target in sys.argv[1:]:
    os.environ["DIT_ACCEL_CPU_TARGET"] = target
    for d in (8, 16, 64, 72):
        for dtype in (torch.float32, torch.bfloat16):
            qkv = [at_the_end(torch.randn(1, 2, 44, d).to(dtype)).requires_grad_() for _ in range(3)]
            starts = at_the_end(torch.tensor([0, 8, 16, 24, 32, 40, 44]).int())
            made = ops.summarize_blocks(SummaryArguments(*qkv, starts, starts, 8, 8, 2, 0, 0, True, 0.3, 2.0, 2.0, True, True), "cpu")
            with_gradients([made.q_mean, *made[3:8], made.spread], qkv)
            leaves = [at_the_end(x.detach()).requires_grad_() for x in (torch.randn(1, 2, 5, 6), made.slope)]
            with_gradients([ops.mix_slopes(MixtureArguments(*leaves), "cpu")], leaves)
            q, k, v = (x.detach() for x in qkv)
            ops.select_blocks(SelectionArguments(q, k, starts, starts, 8, 8, 3, v=v), "cpu")
    print(target)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by Linux's calls")
def test_nothing_past_the_tensors_is_read() -> None:
    """The page behind each of them may not be touched."""
    done = subprocess.run([sys.executable, "-c", GUARDED, *TARGETS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(TARGETS), done.stderr[-2000:]


# The choice of blocks


def by_error(rest: Pooled | None = None, cap: float = 2.0) -> AttentionSpec:
    return AttentionSpec((TopK(0.3, score=ErrorProduct(cap)),), rest or Pooled(), Mass(), Tiles((4, 4)), (16, 16))


@every_target
@every_shape
@pytest.mark.parametrize("spec", [by_error(), by_error(cap=0.02), by_error(Pooled(parts=2, order=1))], ids=str)
def test_the_kernels_choose_by_the_error(shape: Shape, spec: AttentionSpec) -> None:
    plan = plan_of(shape, spec)
    layouts = Layouts(shape.layout, shape.layout)
    for dtype in (torch.float32, torch.bfloat16):
        qkv = shape.inputs(dtype)
        made = lowering.summaries(*qkv, spec, layouts, plan, 0.3, "cpu")
        assert (made is None) == spec.rest.plain  # type: ignore[union-attr]  # then it is one operator
        got, means = lowering.lists(*qkv, spec, layouts, plan, {}, 0.3, "cpu", made)
        assert not means  # which the CPU's kernels make where they are read
        expected = visited_blocks(image_call(*(x.double() for x in qkv), shape.layout, plan, {}, 0.3), spec, plan).index.sort(-1).values
        assert torch.equal(got.index.long(), expected)
        by_mean = dataclasses.replace(spec, keep=(TopK(0.3),))
        assert not torch.equal(got.index, lowering.lists(*qkv, by_mean, layouts, plan, {}, 0.3, "cpu", None)[0].index)


def test_the_choice_is_the_same_on_any_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, spec = SHAPES["ragged"], by_error()
    layouts, qkv, plan = Layouts(shape.layout, shape.layout), shape.inputs(), plan_of(shape, spec)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(lowering.lists(*qkv, spec, layouts, plan, {}, 0.3, "cpu", None)[0].index)
    assert torch.equal(*found)


def test_keys_far_from_the_origin_are_chosen_by_their_spread() -> None:
    """Variances of keys that are near to each other and far from 0 are not lost to rounding."""
    shape, spec = Shape(1, 2, 24, (1, 16, 16)), by_error()
    plan, (q, k, v) = plan_of(shape, spec), shape.inputs()
    q, k, v = q / 100, k / 100 + 30, v / 100 - 30
    got, _ = lowering.lists(q, k, v, spec, Layouts(shape.layout, shape.layout), plan, {}, 0.3, "cpu", None)
    expected = visited_blocks(image_call(*(x.double() for x in (q, k, v)), shape.layout, plan, {}, 0.3), spec, plan)
    assert torch.equal(got.index.long(), expected.index.sort(-1).values)


def test_a_bias_joins_the_score() -> None:
    seed = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, 96, 8, generator=seed) for _ in range(2))
    starts, bias = torch.arange(0, 97, 16, dtype=torch.int32), torch.randn(1, 2, 6, generator=seed)
    a = SelectionArguments(q=q, k=k, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=2, bias=bias)
    means = [x.unflatten(2, (6, 16)).mean(3).flatten(0, 1) for x in (q, k)]
    score = means[0].double() @ means[1].double().mT + bias.flatten(0, 1)[:, None]
    assert torch.equal(ops.select_blocks(a, "cpu").lists.long(), score.topk(2).indices.sort(-1).values)
    assert not torch.equal(ops.select_blocks(a, "cpu").lists, ops.select_blocks(a._replace(bias=None), "cpu").lists)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_of_a_call_runs_in_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is given a call of its own, and blocks are summarised once."""
    from dit_accel import attention

    made: list[Summaries] = []
    real = ops.summarize_blocks
    monkeypatch.setattr(ops, "summarize_blocks", lambda a, name: (made.append(real(a, name)), made[-1])[1])
    shape, spec = SHAPES["ragged"], Fovea(0.3, tile=(4, 4), order=1, parts=2)
    qkv = shape.inputs(dtype)
    expected = attention(*shape.inputs(torch.float64), spec, shape.layout, backend="reference")
    monkeypatch.setattr(composition, "Call", None)
    out = attention(*qkv, spec, shape.layout, backend="cpu")
    assert len(made) == 1
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol={torch.float32: 1e-5}.get(dtype, 0.05))


def test_the_score_of_the_error_with_another_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients do not pass through the choice."""
    from dit_accel import attention

    spec = AttentionSpec((TopK(0.3, score=ErrorProduct()),), Linear("relu"), Mass(), Tiles((4, 4)), (16, 16))
    shape, grads = SHAPES["ragged"], []
    params = spec.make_parameters(heads=2, head_dim=16)
    for backend in ("reference", "cpu"):
        qkv = shape.inputs(grad=True)
        attention(*qkv, spec, shape.layout, params=params, backend=backend).square().sum().backward()  # type: ignore[arg-type]
        grads.append([x.grad for x in qkv])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 3}, "parts must be 1, 2 or 4"),
        ({"v": torch.zeros(1, 2, 3, 16)}, r"k and v \[B, H, Nk, D\]"),
        ({"text": 1000}, "the text must be a part of the tokens"),
    ],
)
def test_summaries_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    a = arguments(SHAPES["ragged"], SHAPES["ragged"].inputs(), 2)
    with pytest.raises(ValueError, match=message):
        ops.summarize_blocks(a._replace(**change), "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(1, 2, 3, 4)}, "slope must be float32"),
        ({"slope": torch.zeros(1, 2, 16, 9, 16, dtype=torch.float64)}, "slope must be float32"),
        ({"weight": torch.zeros(1, 2, 9, 3).mT}, "weight must be float32"),
    ],
)
def test_mixtures_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    a = mixture(SHAPES["ragged"], 2)
    with pytest.raises(ValueError, match=message):
        ops.mix_slopes(a._replace(**change), "cpu")
