"""How the Triton kernels choose key blocks: the moments of all blocks, scores, and the best of these; and in how few steps."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, random_parameters
from on_device import CPU, DEVICE, Poison, moved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.blocks import Blocks, pool_blocks, select_blocks
from dit_accel.kernels.choosing import SELECTION, SelectionArguments
from dit_accel.kernels.triton import block_choice, calls, launch, launch_choice, replay
from dit_accel.kernels.triton.tables import Machine
from dit_accel.kernels.triton.tuples import Taken, constants_of
from dit_accel.method import AttentionSpec, ErrorProduct, Mass, Pooled, Tiles, TopK
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator import lowering
from dit_accel.operator.attention import attention
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call, visited_blocks
from dit_accel.operator.layout import Layouts
from dit_accel.operator.plans import RECENT

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])  # the interpreter can't multiply bfloat16
SHAPES = {
    "ragged": Shape(2, 2, 16, (1, 9, 11), 5),
    "video-text-last": Shape(1, 2, 24, (3, 4, 7), 3, False),
    **{f"head-{d}": Shape(1, 2, d, (1, 10, 9), 0) for d in (8, 64, 72, 128, 256)},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(params=[True, False], ids=["at-once", "through-memory"])
def together(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Scores that a program holds, and more key blocks than that."""
    if not request.param:
        monkeypatch.setattr(launch_choice, "TOGETHER", 0)
        calls._records.clear()  # on a card a call would follow the record of one before
        RECENT.clear()
    return bool(request.param)


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """No record of a test's own settings serves another."""
    yield
    calls._records.clear()
    RECENT.clear()


def by_error(cap: float = 2.0, **rest: Any) -> AttentionSpec:
    return AttentionSpec((TopK(0.3, score=ErrorProduct(cap)),), Pooled(**rest), Mass(), Tiles((4, 4)), (16, 16))


def selection(shape: Shape, qkv: list[Tensor], spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> SelectionArguments:
    """The arguments with which a call chooses its blocks."""
    found: list[SelectionArguments] = []
    select = ops.select_blocks
    monkeypatch.setattr(ops, "select_blocks", lambda a, name: (found.append(a), select(a, name))[1])
    layouts, plan = Layouts(shape.layout, shape.layout), make_plan(spec, shape.layout, DEVICE)
    lowering.lists(*moved(qkv), spec, layouts, plan, {}, 0.3, "triton", None)
    monkeypatch.setattr(ops, "select_blocks", select)
    return found[0]


# By the error of pooled keys


@every_shape
@every_dtype
@pytest.mark.usefixtures("together")
def test_the_kernels_choose_by_the_error(shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = by_error(2.0 if dtype == torch.float32 else 0.02)
    qkv = shape.inputs(dtype)
    a = selection(shape, qkv, spec, monkeypatch)
    assert a.v is not None
    assert a.pooled
    with Poison():
        got = moved(calls.select_blocks(a), CPU)
    plan = make_plan(spec, shape.layout, CPU)
    call = image_call(*(x.double() for x in qkv), shape.layout, plan, {}, 0.3)
    score = spec.selection.score(call)  # type: ignore[union-attr]
    best = score.sort(-1, descending=True).values
    clear = (best[..., a.top - 1] - best[..., a.top]) > 1e-4 * score.abs().amax(-1)  # elsewhere float32's own rounding decides
    assert clear.float().mean() > 0.9
    expected = visited_blocks(call, spec, plan).index.sort(-1).values
    assert torch.equal(got.lists.long()[clear], expected[clear])
    assert (got.counts == a.top).all()
    kept = torch.zeros(*got.lists.shape[:2], len(a.k_starts) - 1).scatter(-1, got.lists.long(), 1).bool()
    bits = ((got.bits[..., None] >> torch.arange(32)) & 1).flatten(-2).bool()
    assert torch.equal(bits[..., : kept.shape[-1]], kept)
    assert not bits[..., kept.shape[-1] :].any()


@every_shape
@every_dtype
def test_the_means_of_a_choice_are_those_of_the_blocks(shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, qkv = by_error(), shape.inputs(dtype)
    with Poison():
        got = moved(calls.select_blocks(selection(shape, qkv, spec, monkeypatch)), CPU).means
    assert got.dtype == dtype
    blocks = make_plan(spec, shape.layout, CPU).k_blocks
    exact, eager = [], []
    for found, kind in ((exact, torch.float64), (eager, torch.float32)):
        k, v = (x[:, :, shape.layout.image_slice].to(kind).flatten(0, 1) for x in qkv[1:])
        mean, variance = pool_blocks(k, blocks, variance=True)
        found += [mean, pool_blocks(v, blocks)[0], variance / 2]
    for mine, one, other, name in zip(got, exact, eager, ("keys", "values", "half variances"), strict=True):
        assert_close_as_eager(mine, one, other.to(dtype), name)


def test_keys_far_from_the_origin_are_chosen_by_their_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variances of keys that are near to each other and far from 0 are not lost to rounding."""
    shape, spec = Shape(1, 2, 24, (1, 16, 16)), by_error()
    q, k, v = shape.inputs()
    qkv = [q / 100, k / 100 + 30, v / 100 - 30]
    got = calls.select_blocks(selection(shape, qkv, spec, monkeypatch))
    plan = make_plan(spec, shape.layout, CPU)
    expected = visited_blocks(image_call(*(x.double() for x in qkv), shape.layout, plan, {}, 0.3), spec, plan)
    assert torch.equal(moved(got.lists, CPU).long(), expected.index.sort(-1).values)


@pytest.mark.parametrize("count", [1, 31, 33, 65])
@pytest.mark.usefixtures("together")
def test_a_block_without_tokens_is_chosen_last(count: int) -> None:
    """And numbers of blocks around those of a word's bits."""
    q, k, v = moved([torch.randn(1, 2, 4 * count, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    starts = torch.arange(0, 4 * count + 1, 4, dtype=torch.int32, device=DEVICE)
    empty = torch.cat([starts[:1], starts])  # the first key block has no token
    a = SelectionArguments(q=q, k=k, v=v, q_starts=starts, k_starts=empty, q_width=4, k_width=4, top=count, scale=0.3, pooled=True)
    with Poison():
        got = calls.select_blocks(a)
    assert got.lists.tolist() == [[list(range(1, count + 1))] * count] * 2
    assert bool(got.means[:, :, 0].isfinite().all())


def test_what_a_choice_made_is_what_the_attention_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists as bits and the means of key blocks, handed on: to the bit the same output and gradients."""
    shape, spec, found = SHAPES["ragged"], Fovea(0.3, tile=(4, 4)), []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda a, name: (found.append(a), attend(a, name))[1])
    with torch.no_grad():
        attention(*moved(shape.inputs()), spec, shape.layout, params=moved(random_parameters(spec, shape)), backend="triton")
    a: Arguments = found[0]
    assert a.bits is not None
    assert a.means is not None
    results = []
    for given in (a, a._replace(bits=None, means=None)):
        out, lse = calls.attend(given)
        results.append([out, lse, *calls.gradients(out, None, out, lse, given)])
    for mine, own in zip(*results, strict=True):
        assert torch.equal(mine, own)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": torch.zeros(4, 9, 2, dtype=torch.int32)}, r"bits must be torch.int32 \(4, 9, 1\) and contiguous"),
        ({"means": torch.zeros(3, 4, 9, 16, dtype=torch.float64)}, r"means must be torch.float32 \(3, 4, 9, 16\) and contiguous"),
    ],
    ids=["bits", "means"],
)
def test_what_does_not_fit_the_blocks_is_refused(change: dict[str, Tensor], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, spec, found = Shape(2, 2, 16, (1, 12, 12), 5), Fovea(0.3, tile=(4, 4)), []
    attend = ops.attention
    monkeypatch.setattr(ops, "attention", lambda a, name: (found.append(a), attend(a, name))[1])
    with torch.no_grad():
        attention(*moved(shape.inputs()), spec, shape.layout, backend="triton")
    with pytest.raises(ValueError, match=message):
        calls.attend(found[0]._replace(**moved(change)))


def test_the_choice_obeys_the_rules_of_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    a = selection(SHAPES["ragged"], SHAPES["ragged"].inputs(), by_error(), monkeypatch)
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.select_blocks_op, ("triton", *SELECTION.pack(a)), test_utils=tests)


# By the product of means


@pytest.mark.usefixtures("together")
def test_scores_that_tie_keep_the_first_blocks() -> None:
    q, starts = torch.ones(1, 2, 96, 8, device=DEVICE), torch.arange(0, 97, 16, dtype=torch.int32, device=DEVICE)
    a = SelectionArguments(q=q, k=q, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=3)
    assert calls.select_blocks(a).lists.tolist() == [[[0, 1, 2]] * 6] * 2


@pytest.mark.parametrize("top", [1, 4, 10])
@every_dtype
@pytest.mark.usefixtures("together")
def test_selection_equals_the_reference(dtype: torch.dtype, top: int) -> None:
    q, k, _ = moved(Shape(2, 2, 24, (1, 10, 30)).inputs(dtype))
    starts = moved(torch.cat([torch.arange(0, 300, 32), torch.tensor([300])]))
    cut = Blocks.from_starts(starts)
    weight = cut.count.sqrt()
    means = [pool_blocks(x.flatten(0, 1), cut)[0] for x in (q, k)]
    expected = select_blocks(*means, top, key_weight=weight).index.sort(-1).values
    a = SelectionArguments(q=q, k=k, q_starts=starts.int(), k_starts=starts.int(), q_width=32, k_width=32, top=top, weight=weight)
    with Poison():
        got = calls.select_blocks(a)
    assert got.lists.dtype == torch.int32
    assert got.lists.tolist() == expected.tolist()
    assert got.means.numel() == 0


@pytest.mark.usefixtures("together")
def test_means_are_not_averaged_again() -> None:
    seed = torch.Generator().manual_seed(0)
    q, k, bias = (torch.randn(2, 3, *size, generator=seed) for size in ((20, 24), (70, 24), (70,)))
    starts = [torch.arange(n + 1, dtype=torch.int32) for n in (20, 70)]
    a = moved(SelectionArguments(q, k, *starts, q_width=1, k_width=1, top=7, bias=bias))
    score = q.double() @ k.double().mT + bias.double()[:, :, None]
    expected = score.topk(7).indices.sort(-1).values.flatten(0, 1)
    with calls.redirected(calls.machine_of(DEVICE), lambda one: (launched.append(one.kernel.__name__), launch.execute(one))):
        launched: list[str] = []
        got = calls.select_blocks(a)
    assert torch.equal(moved(got.lists, CPU).long(), expected)
    assert launched in (["choose_by_means"], ["multiply", "choose_blocks"])


@pytest.mark.parametrize("held", [4 * 36 + 35, 36, 4 * 6 + 5], ids=["four-heads", "a-head", "four-rows"])
def test_scores_are_held_for_some_heads_or_rows_at_a_time(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, v = moved(Shape(2, 3, 8, (1, 8, 12)).inputs())
    starts = torch.arange(0, 97, 16, dtype=torch.int32, device=DEVICE)
    for given in ({}, {"v": v, "scale": 0.3}):
        a = SelectionArguments(q=q, k=q, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=2, **given)
        monkeypatch.setattr(launch_choice, "TOGETHER", 512)
        expected = calls.select_blocks(a)
        monkeypatch.setattr(launch_choice, "TOGETHER", 0)
        monkeypatch.setattr(launch_choice, "SCORES", held)  # of six heads' 6 by 6: heads in fours, alone, and in parts of four rows and two
        calls._records.clear()
        seen: list[int] = []

        def note(one: launch.Launch, seen: list[int] = seen) -> None:
            seen.extend([one.arguments["scores"].numel()] if "scores" in one.arguments else [])
            launch.execute(one)

        with calls.redirected(calls.machine_of(DEVICE), note):
            torch.testing.assert_close(calls.select_blocks(a), expected, rtol=0, atol=0)
        assert sum(seen) == 6 * 36
        assert max(seen) <= held


@pytest.mark.parametrize("blocks", [15625, 40000])
def test_scores_of_a_long_video_fit(blocks: int) -> None:
    """80 heads of a million tokens and more: the scores of all pairs of blocks would be 78 and 512 GB, of one head of the latter 6.4."""
    q = torch.empty(2, 40, 64 * blocks, 128, dtype=torch.bfloat16, device="meta")
    starts = torch.empty(blocks + 1, dtype=torch.int32, device="meta")
    found: list[launch.Launch] = []
    a = SelectionArguments(q=q, k=q, q_starts=starts, k_starts=starts, q_width=64, k_width=64, top=781)
    chosen = launch_choice.select_blocks(a, Machine("sm_90", 132), found.append)
    choices = [one for one in found if one.kernel is block_choice.choose_blocks]
    assert chosen.lists.shape == (80, blocks, 781)
    assert sum(one.grid[0] for one in choices) == 80 * blocks
    assert max(one.arguments["scores"].numel() for one in choices) <= 2**28


def test_choice_among_extremes() -> None:
    scores = torch.tensor([[0.0, -0.0, math.inf, -math.inf, 1e-45, -3.0, 5.0]], device=DEVICE)
    for top in range(1, 8):
        lists, counts, bits = (torch.full((1, n), 77, dtype=torch.int32, device=DEVICE) for n in (top, 1, 1))
        arguments = {
            "scores": scores, "weight": None, "bias": None, "chosen": Taken(lists, counts, bits), "rows": 1, "blocks": 7, "top": top,
            "C": constants_of(block_choice.choose_blocks, {"W": 32}),
        }  # fmt: skip
        launch.execute(launch.Launch(block_choice.choose_blocks, (1,), arguments, 1))
        expected = sorted([2, 6, 4, 0, 1, 5, 3][:top])
        assert lists.tolist() == [expected]
        assert counts.tolist() == [[top]]
        assert bits.tolist() == [[sum(1 << j for j in expected)]]


# In how few steps


class Seen(TorchDispatchMode):
    """Counts torch's operators, those of ours left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


ROWS = ["dense_rows", "attend_rows"]
STEPS = {
    "fovea": (Fovea(0.2), ["block_moments", "choose_by_means", *ROWS], 4, 15),
    "fovea-radius": (Fovea(radius=3), ["summarise", *ROWS], 1, 8),
    "sla": (SLA(0.3, block=(32, 32)), ["summarise", "choose_by_means", *ROWS], 5, 14),
    "clear": (CLEAR(3), ROWS, 0, 4),
}


@pytest.mark.parametrize(("spec", "kernels", "outside", "inside"), STEPS.values(), ids=STEPS)
def test_what_a_forward_puts_on_the_stream(
    spec: AttentionSpec, kernels: list[str], outside: int, inside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launches of a call, and at most so many of torch's operators between our own and in them: each takes some microseconds."""
    shape = Shape(1, 1, 16, (1, 16, 16), 5)
    params, qkv = moved(random_parameters(spec, shape)), moved(shape.inputs())

    def run() -> None:
        with torch.no_grad():
            attention(*qkv, spec, shape.layout, params=params, backend="triton")

    with calls.recorded(Machine("sm_90", 132)) as found:
        run()
    assert [one.kernel.__name__ for one in found] == kernels
    recorded: list[str] = []
    note = replay.Recorder.__torch_dispatch__
    monkeypatch.setattr(replay, "possible", lambda device: True)
    monkeypatch.setattr(
        replay.Recorder, "__torch_dispatch__",
        lambda self, function, *rest: (None if self._paused else recorded.append(function.name()), note(self, function, *rest))[1],
    )  # fmt: skip
    run()
    assert len(recorded) <= outside + inside, Counter(recorded)
    # nothing that computes
    assert {*recorded} <= {f"aten::{name}" for name in ("new_empty", "empty_like", "split_with_sizes", "unbind.int", "slice.Tensor")}
    recorded.clear()
    run()
    assert recorded == []
    for _ in range(2):  # watched, each operator has a record of its own
        recorded.clear()
        with Seen() as seen:
            run()
    assert recorded == []
    assert seen.count.total() <= outside, seen.count


def test_a_finer_rest_reads_its_queries_once() -> None:
    """Of one pooled key for a block no product of queries is made, and no mean of means."""
    shape = Shape(1, 1, 16, (1, 16, 16), 5)
    for parts, products in ((1, 0), (2, 1)):
        spec = dataclasses.replace(Fovea(0.2), rest=Pooled(parts=parts, order=1))
        with calls.recorded(Machine("sm_90", 132)) as found, torch.no_grad():
            attention(*moved(shape.inputs()), spec, shape.layout, params=moved(random_parameters(spec, shape)), backend="triton")
        count = Counter(one.kernel.__name__ for one in found)
        assert count["outer_sums"] == products
        assert (count["block_moments"], count["choose_by_means"], count["summarise"], count["multiply"]) == (1, 1, 0, 0)
