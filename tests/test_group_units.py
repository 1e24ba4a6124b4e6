"""The CPU kernels' one operator of groups against the formulas of `method.parts.groups`, forward and backward.

An element on the border of a group's cut may change sides by rounding, so the formulas are given the kernel's parts; `test_summaries`
compares the cut itself.
"""

import functools
import itertools
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers import assert_close_as_eager
from on_device import CPU
from test_groups import LAYOUTS, grouped, inputs
from test_summaries import GUARDED as GUARDED_SUMMARIES
from torch import Tensor

from dit_accel import TokenLayout, attention
from dit_accel.kernels import ops
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.cpu import native
from dit_accel.kernels.grouping import (
    DIFFERENTIABLE_GROUPING,
    GRADIENTS_OF_UNITS,
    GROUPING,
    MEMBERS,
    GroupingArguments,
    Units,
    check_grouping,
    levels_of,
)
from dit_accel.method import DiscBlocks, ErrorProduct, Pooled, TopK
from dit_accel.method.parts import groups
from dit_accel.method.parts.content import Moments
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.lists import Lists

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")

TARGETS = native.TARGETS[: native.TARGETS.index(native.best_target()) + 1] if native.library() else ()
CHOSEN, DISC = TopK(0.05, score=ErrorProduct(0.1)), DiscBlocks(8.0)
SCALE = 0.3


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that this CPU has, one after the other."""
    monkeypatch.setenv(native.TARGET_VARIABLE, request.param)
    return request.param


every_target = pytest.mark.usefixtures("target")


@functools.cache
def arguments(which: str | TokenLayout, rest: Pooled, keep: Any, dim: int) -> GroupingArguments:
    """What the operator is called with for two heads of a layout, or of that of a name."""
    layout = LAYOUTS[which] if isinstance(which, str) else which
    found, real = [], ops.group_units
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "group_units", lambda a, which: (found.append(a), real(a, which))[1])
        attention(*inputs(layout, torch.float32, dim), grouped(rest, keep), layout, scale=SCALE * (8 / dim) ** 0.5, backend="cpu")
    return found[0]


def leaves_of(a: GroupingArguments, dtype: torch.dtype) -> tuple[GroupingArguments, list[Tensor]]:
    real = {name: x.detach().to(dtype) for name, x in a._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}
    leaves = [real[name].requires_grad_() for name in DIFFERENTIABLE_GROUPING if name in real]
    return a._replace(**real), leaves


def composed(a: GroupingArguments, part: Tensor, seen: groups.Listed | None) -> tuple[dict[str, Tensor], groups.Listed]:
    """The differentiable results by the formulas, from the kernel's own parts; `seen`: what the spans see, None: it is found."""
    heads, slots = a.q_mean.shape[:2], a.tokens.shape[-1] // a.parts
    names = ("pooled_k", "pooled_v", "tokens", "spread", "v_spread")
    lowest = Moments(*(getattr(a, name).flatten(0, 1).unflatten(1, (-1, a.parts)) for name in names), slope=None)
    if a.slope is not None:
        lowest = lowest._replace(slope=a.slope.flatten(0, 1).transpose(1, 2))
    queries = groups.Queries(a.second.flatten(0, 1), None, a.scale)
    parts_of = iter(part.flatten(0, 1).long().split(levels_of(slots, a.roots)[1:], 1))
    by_level = groups.moments_by_level(lowest, a.roots, a.parts, queries, lambda *_: next(parts_of))
    blocks = Blocks.from_starts(a.q_starts.long())
    means = groups.span_means(a.q_mean.flatten(0, 1), blocks)
    starts = torch.nn.functional.pad(lowest.tokens[0].sum(-1).long().cumsum(0), (1, 0))
    if seen is None:
        kept = Lists(a.lists, a.counts, a.counts).kept(len(a.place)).expand(len(means), -1, -1)
        scores = groups.scores_of(means, by_level[1:], a.score_cap, queries)
        seen = groups.listed(kept, scores, {"far_starts": starts, "far_slot": a.place.long()}, a.opened)
    pooled = groups.joined([level.pooled(log_count=a.log_count, cap=a.cap) for level in by_level])
    found = {"joined_k": pooled.key, "joined_v": pooled.value, "joined_bias": pooled.bias}
    if a.slope is not None:
        found["slopes"] = groups.slopes_of_spans(groups.weights_of_spans(means, pooled, seen, a.parts, a.scale), by_level)
    return {name: x.unflatten(0, heads) for name, x in found.items()}, seen


def gradients(given: dict[str, Tensor], loss: dict[str, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Those of every loss, stacked by leaf."""
    found = []
    for each in range(len(next(iter(loss.values())))):
        total = torch.stack([(x * loss[name][each].to(x.dtype)).sum() for name, x in given.items()]).sum()
        grads = torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
        found.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])
    return [torch.stack(of_leaf) for of_leaf in zip(*found, strict=True)]


def compare(a: GroupingArguments) -> None:
    seed = torch.Generator().manual_seed(3)
    exact_of, seen = composed(leaves_of(a, torch.float64)[0], ops.group_units(a, "cpu").part, None)
    # several, as an error over few numbers would be luck
    loss = {name: torch.randn(5, *x.shape, generator=seed) for name, x in exact_of.items()}
    found, names = [], [name for name in DIFFERENTIABLE_GROUPING if getattr(a, name) is not None]
    for dtype in (None, torch.float64, torch.float32):
        mine, leaves = leaves_of(a, dtype or torch.float32)
        made = ops.group_units(mine, "cpu") if dtype is None else None
        given = made._asdict() if made else composed(mine, ops.group_units(a, "cpu").part, seen)[0]
        given = {
            name: torch.where(given["joined_bias"].isfinite(), given[name], 0) if name == "joined_bias" else given[name] for name in loss
        }
        found.append([*(x.detach() for x in given.values()), *gradients(given, loss, leaves)])
        if made:
            index, counts = groups.unit_lists(seen)
            assert torch.equal(made.pool_counts.flatten(0, 1), counts)
            shown = torch.arange(index.shape[-1]) < counts[..., None]
            assert torch.equal(made.pool_lists.flatten(0, 1)[..., : index.shape[-1]][shown], index[shown])
    for got, exact, eager, name in zip(*found, [*loss, *(f"d{name}" for name in names)], strict=True):
        assert_close_as_eager(got, exact, eager, name)


RESTS = [
    Pooled(cap=0.1, parts=4, order=1, opened=1),
    Pooled(log_count=False, cap=0.1, parts=2, order=1, opened=2),
    Pooled(cap=0.1, opened=1),
    Pooled(variance=False, cap=0.1, order=1, opened=3),
]


@every_target
@pytest.mark.parametrize("keep", [CHOSEN, DISC], ids=["chosen", "disc"])
@pytest.mark.parametrize("name", ["square", "ragged", "references", "few"])
def test_it_is_the_formula(name: str, keep: Any) -> None:
    compare(arguments(name, RESTS[0], keep, 8))


@every_target
@pytest.mark.parametrize("rest", RESTS[1:], ids=["no-log", "order-0", "no-variance"])
def test_it_is_the_formula_of_every_kind(rest: Pooled) -> None:
    compare(arguments("ragged", rest, CHOSEN, 8))


@every_target
@pytest.mark.parametrize("dim", [16, 40, 64, 128])
def test_it_is_the_formula_for_larger_heads(dim: int) -> None:
    compare(arguments("ragged", RESTS[0], CHOSEN, dim))


def test_the_layouts_have_what_is_difficult() -> None:
    """Groups of one member, slots of nothing, several levels, blocks that all of a span's query blocks keep, biases at their cap."""
    a = arguments("ragged", RESTS[0], CHOSEN, 8)
    filled = a.tokens.flatten(0, 1)[0].unflatten(0, (-1, a.parts)).sum(-1).unflatten(0, (-1, MEMBERS)) > 0
    assert {0, 1} & set(filled.sum(-1).tolist())
    assert len(levels_of(a.tokens.shape[-1] // a.parts, a.roots)) >= 3
    assert bool((a.spread / 2 > a.cap).any())
    assert bool((a.spread / 2 < a.cap)[a.tokens > 0].any())
    disc = arguments("ragged", RESTS[0], DISC, 8)
    assert disc.lists.ndim == 2
    kept = groups.spans_of(Lists(disc.lists, disc.counts, disc.counts).kept(len(disc.place))[None].int())
    assert bool((kept.sum(-2) == groups.SPAN).any())


@pytest.mark.parametrize("name", ["joined_k", "joined_v", "joined_bias", "slopes"])
def test_each_result_alone_has_its_gradients(name: str) -> None:
    a = arguments("ragged", RESTS[0], CHOSEN, 8)
    part, found = ops.group_units(a, "cpu").part, []
    seen = composed(leaves_of(a, torch.float64)[0], part, None)[1]
    loss = {name: torch.randn(5, *getattr(ops.group_units(a, "cpu"), name).shape, generator=torch.Generator().manual_seed(7))}
    for dtype in (None, torch.float64, torch.float32):
        mine, leaves = leaves_of(a, dtype or torch.float32)
        given = getattr(ops.group_units(mine, "cpu"), name) if dtype is None else composed(mine, part, seen)[0][name]
        found.append(gradients({name: torch.where(given.isfinite(), given, 0)}, loss, leaves))
    for got, exact, eager, what in zip(*found, DIFFERENTIABLE_GROUPING, strict=True):
        assert_close_as_eager(got, exact, eager, f"d{what} of {name}")


def everything(a: GroupingArguments) -> list[Tensor]:
    mine, leaves = leaves_of(a, torch.float32)
    made = ops.group_units(mine, "cpu")
    loss = sum(torch.where(x.isfinite(), x, 0).square().sum() for x in made if x.requires_grad)
    return [*made, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


def test_the_threads_change_nothing() -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(everything(arguments("ragged", RESTS[0], CHOSEN, 40)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_a_head_of_nan_leaves_the_others_alone() -> None:
    a = arguments("ragged", RESTS[0], CHOSEN, 8)
    poisoned = {name: x.detach().clone() for name, x in a._asdict().items() if isinstance(x, Tensor)}
    for name in ("q_mean", "pooled_k", "pooled_v", "slope", "second", "metric", "spread", "v_spread"):
        poisoned[name][:, 0] = math.nan
    for x, y in zip(everything(a), everything(a._replace(**poisoned)), strict=True):
        assert torch.equal(x[:, 1], y[:, 1])


def test_it_obeys_the_rules_of_operators() -> None:
    mine, _ = leaves_of(arguments("few", RESTS[1], CHOSEN, 8), torch.float32)
    torch.library.opcheck(ops.group_units_op, ("cpu", *GROUPING.pack(mine)))


GUARDED = (
    GUARDED_SUMMARIES.partition("for target")[0]
    + """
from dit_accel.kernels.grouping import GroupingArguments, new_units
for target in sys.argv[1:]:
    os.environ["DIT_ACCEL_CPU_TARGET"] = target
    for d in (8, 16, 64, 72):
        blocks, slots, parts = 9, 32, 2
        sizes = [(blocks, d), (slots * parts, d), (slots * parts, d), (d, slots, d), (d,), (d, d), *[(slots * parts,)] * 3]
        real = [at_the_end(torch.rand(1, 2, *size)) for size in sizes]
        real[6].copy_(real[6].mul(3).floor())
        lists = at_the_end(torch.arange(blocks).int()[:, None] + torch.tensor([0, 7]).int())
        whole = [lists, at_the_end(torch.full((blocks,), 2).int()), at_the_end(torch.randperm(slots)[:16].int())]
        starts = at_the_end(torch.arange(blocks + 1).int() * 4)
        leaves = [real[i].requires_grad_() for i in (0, 1, 2, 3, 4, 7)]
        a = GroupingArguments(*real, *whole, starts, parts, 2, 1, 0.3, 2.0, 2.0, True)
        made = ops.group_units(a, "cpu")
        with_gradients([made.joined_k, made.joined_v, made.joined_bias, made.slopes], leaves)
    print(target)
"""
)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is protected by Linux's calls")
def test_nothing_past_the_tensors_is_read() -> None:
    """The page behind each of them may not be touched."""
    done = subprocess.run([sys.executable, "-c", GUARDED, *TARGETS], capture_output=True, text=True, check=False)
    assert done.stdout.split() == list(TARGETS), done.stderr[-2000:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": 3}, "parts must be 1, 2 or 4 pooled keys for each of the slots, not 3"),
        ({"roots": 3}, "roots must be slots over a power of 4, not 3"),
        ({"roots": 0}, "roots must be slots over a power of 4, not 0"),
        ({"opened": 0}, "opened must be a number of units >= 1, not 0"),
        ({"metric": None}, "metric must be given where there is more than one part"),
        ({"second": torch.zeros(1, 2, 9)}, r"second must be torch.float32 \(1, 2, 8\) and contiguous, not torch.float32 \(1, 2, 9\)"),
        ({"place": torch.zeros(9)}, r"place must be torch.int32 \(9,\) and contiguous, not torch.float32"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    a = arguments("few", RESTS[1], CHOSEN, 8)
    check_grouping(a)
    with pytest.raises(ValueError, match=message):
        ops.group_units(a._replace(**change), "cpu")


@pytest.mark.parametrize("opened", [1, 3, 8])
def test_no_span_sees_more_than_there_is_space_for(opened: int) -> None:
    """Whatever is kept: each query block keeps blocks far apart, so that as many groups as can be are opened."""
    layout = TokenLayout((1, 64, 64), 0)
    plan = make_plan(grouped(Pooled(opened=opened)), layout, CPU)
    blocks, slots = len(plan.k_blocks.count), len(plan.prepared["far_starts"]) - 1
    seed = torch.Generator().manual_seed(0)
    lists = torch.stack([torch.randperm(blocks, generator=seed)[:2].sort().values for _ in range(blocks)]).int()
    a = GroupingArguments(
        q_mean=torch.randn(1, 1, blocks, 8, generator=seed), pooled_k=torch.randn(1, 1, slots, 8, generator=seed),
        pooled_v=torch.randn(1, 1, slots, 8, generator=seed), slope=None, second=torch.ones(1, 1, 8), metric=None,
        tokens=torch.full((1, 1, slots), 16.0), **{name: torch.rand(1, 1, slots, generator=seed) for name in ("spread", "v_spread")},
        lists=lists, counts=torch.full((blocks,), 2).int(), place=plan.prepared["far_slot"].int(), q_starts=plan.geometry.starts_q, parts=1,
        roots=len(plan.prepared["far_roots"]), opened=opened, scale=0.3, cap=2.0, score_cap=2.0, log_count=True,
    )  # fmt: skip
    made = ops.group_units(a, "cpu")
    assert made.pool_lists.shape[-1] < made.joined_bias.shape[-1]
    assert int(made.pool_counts.max()) <= made.pool_lists.shape[-1]
    for mine, n in zip(made.pool_lists.flatten(0, 2), made.pool_counts.flatten(), strict=True):
        assert not mine[int(n) :].any()
        assert all(x < y for x, y in itertools.pairwise(mine[: int(n)].tolist()))


def test_what_is_named_is_what_there_is() -> None:
    assert set(GRADIENTS_OF_UNITS) < set(Units._fields)
    assert set(DIFFERENTIABLE_GROUPING) < set(GroupingArguments._fields)
