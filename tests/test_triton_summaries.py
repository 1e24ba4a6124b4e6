"""What the Triton kernels make of whole blocks: against the formulas, as test_summaries.py has it of the CPU's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat
from on_device import CPU, moved
from test_summaries import GIVEN, REAL, arguments, assert_parts, call_of, formula, mixed, mixture
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import MixtureArguments, Summaries, SummaryArguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import calls, launch_parts
from dit_accel.method.parts import content

pytestmark = pytest.mark.gpu

SHAPES = {
    "ragged": Shape(1, 2, 16, (1, 6, 7), 5),
    "video-text-last": Shape(2, 1, 24, (2, 4, 5), 3, False),
    "head-72": Shape(1, 1, 72, (1, 6, 5), 0),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@pytest.fixture(params=[False, True], ids=["all-channels", "16-channels"])
def few_channels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A block whose channels a program holds all at once, and one whose it can't."""
    if request.param:
        monkeypatch.setattr(launch_parts, "_channels", lambda padded, dtype, arch: 16)
        calls._records.clear()  # on a card a call would follow the record of one before
    yield
    calls._records.clear()


@every_shape
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.usefixtures("few_channels")
def test_the_summaries_are_their_formulas(shape: Shape, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.float16 if parts == 2 and shape.text == 3 else torch.float32
    qkv = shape.inputs(dtype)
    a = arguments(shape, qkv, parts, log_count=parts != 4)
    got = moved(ops.summarize_blocks(moved(a), "triton"), CPU)
    call = call_of(shape, qkv, parts, torch.float64)
    part = got.part.flatten(0, 1)
    assert not part[:, ~call.k_blocks.valid].any()
    if dtype == torch.float32:  # of a rounded metric the direction is another
        assert_parts(call, part.long(), parts)
    else:
        assert 0.2 < float(part[:, call.k_blocks.valid].float().mean()) < 0.8
    exact, eager = (formula(call_of(shape, qkv, parts, d), part, a, monkeypatch) for d in (torch.float64, torch.float32))
    if dtype == torch.float16:  # what is multiplied is rounded to it, as the result is here
        eager["slope"] = exact["slope"].half()
    for name in REAL:
        mine = getattr(got, name).flatten(0, 1)
        nothing = exact[name] == -torch.inf
        assert torch.equal(mine == -torch.inf, nothing)
        assert_close_as_eager(*(x.masked_fill(nothing, 0) for x in (mine, exact[name], eager[name])), name)
    torch.testing.assert_close(got.second.flatten(0, 1), call.q.square().mean(1).float(), rtol=1e-5, atol=1e-6)
    if parts > 1:
        exact["metric"], eager["metric"] = content.metric_of(call.q), content.metric_of(call.q.to(dtype))
        assert_close_as_eager(got.metric.flatten(0, 1), exact["metric"], eager["metric"], "metric")


def gradients_of(qkv: list[Tensor], a: SummaryArguments, names: Sequence[str]) -> tuple[Summaries, dict[str, Tensor], list[Tensor]]:
    """What the kernels make, weights of the results of these names, and the gradients of their weighted sum."""
    got = moved(ops.summarize_blocks(moved(a), "triton"), CPU)
    seed = torch.Generator().manual_seed(2)
    weights = {name: torch.randn(getattr(got, name).flatten(0, 1).shape, generator=seed) for name in names}
    own = {name: getattr(got, name).flatten(0, 1) for name in names}
    return got, weights, list(torch.autograd.grad(weighted(own, weights), qkv, allow_unused=True, materialize_grads=True))


def weighted(found: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Any:
    return sum((found[name].masked_fill(found[name] == -torch.inf, 0) * w.to(found[name].dtype)).sum() for name, w in weights.items())


# results with a gradient, parts of a block, dtype; each shape with some
KINDS: dict[str, tuple[str, tuple[str, ...], int, torch.dtype]] = {
    "all-2": ("ragged", GIVEN, 2, torch.float32),
    "all-1": ("video-text-last", GIVEN, 1, torch.float32),
    "all-4": ("head-72", GIVEN, 4, torch.float32),
    "half": ("video-text-last", GIVEN, 2, torch.float16),
    "slope": ("ragged", ("slope",), 2, torch.float32),
    "bias": ("ragged", ("pooled_bias",), 4, torch.float32),
    "queries": ("ragged", ("q_mean", "second"), 2, torch.float32),
}


@pytest.mark.parametrize(("name", "names", "parts", "dtype"), KINDS.values(), ids=KINDS)
def test_the_gradients_are_the_formulas(
    name: str, names: tuple[str, ...], parts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = SHAPES[name]
    qkv = shape.inputs(dtype, grad=True)
    a = arguments(shape, qkv, parts)
    got, weights, mine = gradients_of(qkv, a, names)
    theirs = []
    for wide in (torch.float64, torch.float32):
        leaves = [x.detach().to(wide).requires_grad_() for x in qkv]
        found = formula(call_of(shape, leaves, parts, wide), got.part.flatten(0, 1), a, monkeypatch)
        theirs.append(torch.autograd.grad(weighted(found, weights), leaves, allow_unused=True, materialize_grads=True))
    for one, exact, eager, what in zip(mine, *theirs, "qkv", strict=True):
        assert one.dtype == dtype
        assert_close_as_eager(one, exact, eager.to(dtype), what)


def test_what_memory_held_before_has_no_part_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that end early, text, and a block of nothing: NaN in new memory, the same to the bit."""
    shape = SHAPES["ragged"]
    qkv = shape.inputs(grad=True)
    a = arguments(shape, qkv, 2)
    a = a._replace(k_starts=torch.cat([a.k_starts[:1], a.k_starts]))
    expected, empty, new = gradients_of(qkv, a, GIVEN)[2], torch.empty, Tensor.new_empty

    def poisoned(x: Tensor) -> Tensor:
        return x.fill_(math.nan if x.is_floating_point() else 3)

    monkeypatch.setattr(torch, "empty", lambda *given, **named: poisoned(empty(*given, **named)))
    monkeypatch.setattr(Tensor, "new_empty", lambda *given, **named: poisoned(new(*given, **named)))
    found = gradients_of(qkv, a, GIVEN)[2]
    assert all(x.isfinite().all() for x in found)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_the_mixture_and_its_gradients_are_the_formula() -> None:
    a = mixture(SHAPES["ragged"], 2, "triton")
    found = []
    for dtype in (None, torch.float64, torch.float32):
        leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in a[:2]]
        out = moved(ops.mix_slopes(moved(MixtureArguments(*leaves)), "triton"), CPU) if dtype is None else mixed(*leaves)
        weight = torch.randn(out.numel(), generator=torch.Generator().manual_seed(3)).to(out.dtype).view(out.shape)
        grads = torch.autograd.grad((out * weight).sum(), leaves)
        found.append([out.detach().flatten(), flat(dict(zip("ab", grads, strict=True)))])
    for mine, exact, eager, what in zip(*found, ["out", "gradients"], strict=True):
        assert_close_as_eager(mine, exact, eager, what)


def test_a_bias_joins_the_scores() -> None:
    seed, starts = torch.Generator().manual_seed(0), torch.arange(0, 65, 16, dtype=torch.int32)
    q, k, bias = (torch.randn(2, 3, n, *d, generator=seed) for n, d in ((64, (8,)), (64, (8,)), (4, ())))
    a = SelectionArguments(q=q, k=k, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=2, bias=bias)
    means = [x.double().unflatten(2, (4, 16)).mean(3) for x in (q, k)]
    expected = (means[0] @ means[1].mT + bias[:, :, None]).topk(2).indices.sort(-1).values.flatten(0, 1)
    assert torch.equal(moved(ops.select_blocks(moved(a), "triton"), CPU).lists.long(), expected)


@pytest.mark.usefixtures("few_channels")
def test_a_block_of_nothing_has_no_part_in_anything() -> None:
    shape = SHAPES["ragged"]
    a = arguments(shape, shape.inputs(), 2)
    starts = torch.cat([a.k_starts[:1], a.k_starts])  # the first block has no token
    got = ops.summarize_blocks(moved(a._replace(k_starts=starts)), "triton")
    assert (got.pooled_bias[:, :, :2] == -torch.inf).all()
    assert (got.score_bias[:, :, 0] == -torch.inf).all()
    assert not any(x.any() for x in (got.pooled_k[:, :, :2], got.pooled_v[:, :, :2], got.slope[:, :, :, 0], got.k_mean[:, :, 0]))
    assert all(x.isfinite().all() for x in (got.pooled_k, got.pooled_v, got.slope))


def test_the_arguments_are_those_of_the_operator() -> None:
    shape = SHAPES["ragged"]
    with pytest.raises(ValueError, match="parts must be 1, 2 or 4"):
        ops.summarize_blocks(moved(arguments(shape, shape.inputs(), 1)._replace(parts=3)), "triton")
    assert SummaryArguments._fields[:3] == ("q", "k", "v")
