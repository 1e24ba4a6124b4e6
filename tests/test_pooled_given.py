"""Pooled keys and slopes that the compiled kernels are given: forward and backward, against the formula over all pairs of tokens."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close_as_eager
from on_device import CPU, device_of, eager, moved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import dispatch, ops
from dit_accel.kernels.arguments import SPAN, Arguments, check
from dit_accel.kernels.choosing import Chosen
from dit_accel.method import Mass, MeanProduct, Pooled, Tiles, TopK
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import Lists

GIVEN = ("pooled_k", "pooled_v", "pooled_bias", "pooled_var", "slopes")
HEADS = 2
TRITON = pytest.param("triton", marks=[pytest.mark.gpu, pytest.mark.skipif(not dispatch.TRITON, reason="Triton is not installed")])
either = pytest.mark.parametrize("name", ["cpu", TRITON])


def problem(
    grid: tuple[int, int, int], text: int, dim: int, parts: int, dtype: torch.dtype = torch.float32, *, text_first: bool = True,
    all_kept: bool = False,
) -> tuple[Plan, Arguments]:  # fmt: skip
    """Random pooled keys on a grid cut into tiles of 4 × 4; one of them has nothing in it."""
    spec = AttentionSpec((TopK(0.3, score=MeanProduct()),), Pooled(), Mass(), Tiles((4, 4)), (16, 16))
    plan = make_plan(spec, TokenLayout(grid, text), torch.device("cpu"))
    seed = torch.Generator().manual_seed(dim + parts)
    tokens, blocks = text + grid[0] * grid[1] * grid[2], len(plan.k_blocks.count)
    q, k, v = (torch.randn(1, HEADS, tokens, dim, generator=seed).to(dtype) for _ in range(3))
    some = blocks if all_kept else max(1, blocks // 4)
    chosen = torch.rand(HEADS, blocks, blocks, generator=seed).argsort(-1)[..., :some].sort(-1).values.to(torch.int32)
    none, g = chosen.new_empty(0), plan.geometry
    lists = Lists.of_chosen(Chosen(chosen, torch.full(chosen.shape[:2], some, dtype=torch.int32), *[none] * 5))
    size = {"pooled_k": (parts * blocks, dim), "pooled_v": (parts * blocks, dim), "pooled_bias": (parts * blocks,)}
    given = {name: torch.randn(1, HEADS, *shape, generator=seed) for name, shape in size.items()}
    given["slopes"] = torch.randn(1, HEADS, blocks, dim, dim, generator=seed) / dim**0.5
    given["pooled_bias"][..., parts] = -torch.inf
    return plan, Arguments(
        q=q, k=k, v=v, lists=lists.index, counts=lists.counts, full=lists.full, q_starts=g.starts_q, k_starts=g.starts_k, coords=g.coords,
        text=text, text_first=text_first, scale=dim**-0.5, places_q=g.places_q, places_k=g.places_k, q_width=16, k_width=16,
        rest="pooled", **given,
    )  # fmt: skip


def on_lists(plan: Plan, a: Arguments, parts: int) -> Arguments:
    """The same with pooled keys of units, more of them than key blocks, of which each span of query blocks sees some."""
    seed, blocks, dim = torch.Generator().manual_seed(5), len(plan.k_blocks.count), a.q.shape[3]
    units, spans = blocks + 7, -(-blocks // SPAN)
    slots = torch.randperm(units, generator=seed)[:blocks]
    sees = torch.rand(1, HEADS, spans, units, generator=seed) < 0.4
    sees[0, 0, 0] = False  # nothing at all
    counts = sees.sum(-1).int()
    lists = sees.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())].int().contiguous()
    size = {"pooled_k": (parts * units, dim), "pooled_v": (parts * units, dim), "pooled_bias": (parts * units,)}
    given = {name: torch.randn(1, HEADS, *shape, generator=seed) for name, shape in size.items()}
    given["slopes"] = torch.randn(1, HEADS, spans, dim, dim, generator=seed) / dim**0.5
    given["pooled_bias"][..., parts] = -torch.inf
    return a._replace(pool_lists=lists, pool_counts=counts, pool_slots=slots.int(), pool_parts=parts, **given)


def on_slots(made: tuple[Plan, Arguments], *, slopes: bool = False, cap: float = 1.2) -> tuple[Plan, Arguments]:
    """The same with pooled keys of more units than there are key blocks, all of them seen, and their variances: many of the terms that
    these add to logits are past the cap, unless that is larger."""
    plan, a = made
    seed, blocks, dim = torch.Generator().manual_seed(6), len(plan.k_blocks.count), a.q.shape[3]
    parts = a.pooled_k.shape[2] // blocks  # type: ignore[union-attr]
    units = blocks + 7
    size = {
        "pooled_k": (parts * units, dim),
        "pooled_v": (parts * units, dim),
        "pooled_bias": (parts * units,),
        "pooled_var": (parts * units, dim),
    }
    given = {name: torch.randn(1, HEADS, *shape, generator=seed) for name, shape in size.items()}
    given["pooled_var"] = given["pooled_var"].abs() * 3
    given["pooled_bias"][..., parts] = -torch.inf
    slots = torch.randperm(units, generator=seed)[:blocks].int()
    more = {} if slopes else {"slopes": None}
    return plan, a._replace(pool_slots=slots, pool_parts=parts, variance=True, cap=cap, **given, **more)


def unseen(a: Arguments, kept: Tensor) -> Tensor:
    """Which pooled keys `[H, Tq, P]` a query block does not see, of those that it keeps `[H, Tq, Tk]` and the lists."""
    if a.pool_slots is None:
        return kept.repeat_interleave(a.pooled_k.shape[2] // kept.shape[-1], -1)  # type: ignore[union-attr]
    units = a.pooled_k.shape[2] // a.pool_parts  # type: ignore[union-attr]
    found = torch.full((HEADS, kept.shape[1], units), a.pool_lists is not None)
    for head, block in itertools.product(range(HEADS), range(kept.shape[1])):
        if a.pool_lists is not None and a.pool_counts is not None:
            count = int(a.pool_counts[0, head, block // SPAN])
            found[head, block, a.pool_lists[0, head, block // SPAN, :count].long()] = False
        found[head, block, a.pool_slots[kept[head, block]].long()] = True
    return found.repeat_interleave(a.pool_parts, -1)


@eager()
def oracle(plan: Plan, a: Arguments, x: dict[str, Tensor], offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same from masks of all tokens. `x`: what is differentiated, in any dtype."""
    if not a.text_first:
        rolled = {name: x[name].roll(a.text, 2) for name in "qkv"}
        out, lse = oracle(plan, a._replace(text_first=True), x | rolled, offset)
        return out.roll(-a.text, 2), lse.roll(-a.text, 2)
    q, k, v = x["q"], x["k"], x["v"]
    blocks, text, tokens = len(plan.k_blocks.count), a.text, a.q.shape[2]
    kept = Lists(a.lists, a.counts, a.full).kept(blocks).expand(HEADS, -1, -1)  # [H, Tq, Tk]
    block_of = torch.empty(tokens - text, dtype=torch.int64)
    for number, (index, valid) in enumerate(zip(plan.k_blocks.index, plan.k_blocks.valid, strict=True)):
        block_of[index[valid]] = number
    image = kept[:, block_of][:, :, block_of]
    see = torch.ones(HEADS, tokens, tokens, dtype=torch.bool)
    see[:, text:, text:] = image
    exact = (a.scale * q @ k.mT).masked_fill(~see, -torch.inf)
    far = a.scale * q @ x["pooled_k"].mT + x["pooled_bias"][:, :, None]
    if "pooled_var" in x:
        far = far + (a.scale**2 / 2 * q.square() @ x["pooled_var"].mT).clamp_max(a.cap)
    if offset is not None:
        far = far + offset[:, None, None]
    hidden = torch.ones(HEADS, tokens, far.shape[-1], dtype=torch.bool)
    hidden[:, text:] = unseen(a, kept)[:, block_of]
    logits = torch.cat([exact, far.masked_fill(hidden, -torch.inf)], -1)
    weight = logits.softmax(-1)
    out = weight @ torch.cat([v, x["pooled_v"]], 2)
    if "slopes" in x:
        slopes = x["slopes"][:, :, block_of if a.pool_lists is None else block_of // SPAN]
        tilt = torch.einsum("bhnc,bhncd->bhnd", q[:, :, text:], slopes) * a.scale
        share = weight[:, :, text:, tokens:].sum(-1, keepdim=True)
        out = torch.cat([out[:, :, :text], out[:, :, text:] + share * tilt], 2)
    return out, logits.logsumexp(-1)


CASES = list(itertools.product([(1, 12, 10), (2, 6, 9)], [0, 5], [16, 72], [1, 2], [True, False]))


def computed(a: Arguments, name: str) -> tuple[Tensor, Tensor]:
    """Output and lse by a backend's kernels."""
    return moved(ops.attention(moved(a, device_of(name)), name), CPU)


def loss(out: Tensor, lse: Tensor) -> Tensor:
    seed = torch.Generator().manual_seed(1)
    both = [(x * torch.randn(x.shape, generator=seed).to(x.dtype)).sum() for x in (out, lse)]
    return both[0] + both[1]


def both(plan: Plan, a: Arguments, names: list[str], offset: Tensor | None, name: str = "cpu") -> list[list[Tensor]]:
    """Output, lse and gradients of the kernels, and of the oracle in the input's dtype (at most float32) and in float64."""
    found = []
    for dtype in (None, a.q.dtype if a.q.dtype == torch.float16 else torch.float32, torch.float64):
        x = {name: getattr(a, name).detach().to(dtype or getattr(a, name).dtype).requires_grad_() for name in names}
        own = None if offset is None else offset.detach().to(dtype or offset.dtype).requires_grad_()
        out, lse = computed(a._replace(**x, offset=own), name) if dtype is None else oracle(plan, a, x, own)
        leaves = [*x.values(), *([] if own is None else [own])]
        found.append([out, lse, *torch.autograd.grad(loss(out, lse), leaves)])
    return found


@pytest.mark.parametrize("lists", [False, True], ids=["all", "lists"])
@pytest.mark.parametrize(("grid", "text", "dim", "parts", "slopes"), CASES)
def test_forward_and_backward_are_the_formula(grid: Any, text: int, dim: int, parts: int, slopes: bool, lists: bool) -> None:
    plan, a = problem(grid, text, dim, parts)
    a = on_lists(plan, a, parts) if lists else a
    a = a if slopes else a._replace(slopes=None)
    names = ["q", "k", "v", *(name for name in GIVEN if getattr(a, name) is not None)]
    kernel, eager, exact = both(plan, a, names, torch.tensor([0.3, -0.4]))
    found = {name: x for name, *x in zip(["out", "lse", *names, "offset"], kernel, eager, exact, strict=True)}
    for name, (mine, theirs, right) in found.items():
        error, allowed = ((x.double() - right).abs().max() for x in (mine, theirs))
        # an offset's gradient is one sum of gradients that nearly cancel: its rounding is that of their sizes
        size = found["pooled_bias"][2].abs().sum(-1).max() if name == "offset" else right.abs().max()
        assert error <= 2 * allowed + 1e-6 * size, (name, float(error), float(allowed))


@pytest.mark.parametrize("slopes", [False, True], ids=["no-slopes", "slopes"])
@pytest.mark.parametrize(
    ("grid", "text", "dim", "parts"), [*itertools.product([(1, 12, 10), (2, 6, 9)], [0, 5], [16, 72], [1]), ((1, 12, 10), 5, 16, 2)]
)
def test_units_with_variances_are_the_formula(grid: Any, text: int, dim: int, parts: int, slopes: bool) -> None:
    plan, a = on_slots(problem(grid, text, dim, parts), slopes=slopes)
    image = a.q[:, :, text:]
    terms = a.scale**2 / 2 * image.square() @ a.pooled_var.mT  # type: ignore[union-attr]
    assert 0.2 < (terms > a.cap).float().mean() < 0.8
    names = ["q", "k", "v", *(name for name in GIVEN if getattr(a, name) is not None)]
    kernel, eager, exact = both(plan, a, names, torch.tensor([0.3, -0.4]))
    for name, mine, theirs, right in zip(["out", "lse", *names, "offset"], kernel, eager, exact, strict=True):
        error, allowed = ((x.double() - right).abs().max() for x in (mine, theirs))
        size = exact[2 + names.index("pooled_bias")].abs().sum(-1).max() if name == "offset" else right.abs().max()
        assert error <= 2 * allowed + 1e-6 * size, (name, float(error), float(allowed))


RAGGED, VIDEO, SPANS = (1, 6, 7), (2, 4, 5), (1, 4, 18)  # the last of five query blocks, a short one, is a span of its own


def without_slopes(made: tuple[Plan, Arguments]) -> tuple[Plan, Arguments]:
    return made[0], made[1]._replace(slopes=None)


def shared(made: tuple[Plan, Arguments]) -> tuple[Plan, Arguments]:
    """With the same blocks kept in all heads."""
    own = {name: getattr(made[1], name)[0].contiguous() for name in ("lists", "counts", "full")}
    return made[0], made[1]._replace(**own)


def seen(*given: Any, slopes: bool = True, **more: Any) -> tuple[Plan, Arguments]:
    """`problem` with lists of units; what no list names is 5, and past their counts the lists name what there is not."""
    plan, a = problem(*given, **more)
    a = on_lists(plan, a, given[3])
    lists, counts, units = a.pool_lists, a.pool_counts, a.pooled_k.shape[2] // a.pool_parts  # type: ignore[union-attr]
    read = torch.zeros(1, HEADS, units, dtype=torch.bool)
    for head, span in itertools.product(range(HEADS), range(counts.shape[2])):  # type: ignore[union-attr]
        read[0, head, lists[0, head, span, : counts[0, head, span]].long()] = True  # type: ignore[index]
        lists[0, head, span, counts[0, head, span] :] = 1 << 28  # type: ignore[index]
    gone = ~read.repeat_interleave(a.pool_parts, -1)
    poison = {name: getattr(a, name).clone() for name in ("pooled_k", "pooled_v", "pooled_bias")}
    for x in poison.values():
        x[gone] = 5.0
    return plan, a._replace(**poison, **({} if slopes else {"slopes": None}))


TRITON_CASES = {
    "first-order": (problem(RAGGED, 5, 16, 2), False),
    "head-72-text-last": (problem(RAGGED, 3, 72, 2, text_first=False), True),
    "four-parts-no-text": (problem(VIDEO, 0, 16, 4), True),
    "one-part": (problem(VIDEO, 2, 24, 1), False),
    "everything-kept": (problem(RAGGED, 5, 16, 2, all_kept=True), False),
    "no-slopes": (without_slopes(problem(RAGGED, 3, 16, 4)), True),
    "no-slopes-float16": (without_slopes(problem(VIDEO, 0, 24, 2, torch.float16)), False),
    "float16": (problem(RAGGED, 5, 16, 2, torch.float16), False),
    "float16-head-72": (problem(RAGGED, 0, 72, 4, torch.float16), True),
    "lists": (seen(SPANS, 5, 16, 4), False),
    "lists-head-72-text-last": (seen(SPANS, 3, 72, 1, text_first=False), True),
    "lists-no-slopes": (seen(SPANS, 0, 24, 2, slopes=False), False),
    "lists-everything-kept": (seen(RAGGED, 2, 16, 2, all_kept=True), True),
    "lists-float16": (seen(SPANS, 5, 40, 4, torch.float16), True),
    "units": (on_slots(problem(RAGGED, 5, 16, 1)), True),
    "units-head-72-text-last": (on_slots(problem(RAGGED, 3, 72, 1, text_first=False)), False),
    "units-slopes-two-parts": (on_slots(problem(VIDEO, 0, 16, 2), slopes=True), False),
    # the side of the cap on which a rounded term lies is luck
    "units-float16": (on_slots(problem(RAGGED, 2, 24, 1, torch.float16), cap=1000.0), True),
    "units-of-all-heads": (shared(on_slots(problem(VIDEO, 2, 16, 1))), False),
    "lists-of-all-heads": (shared(seen(SPANS, 2, 16, 2)), False),
}


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("case", TRITON_CASES.values(), ids=TRITON_CASES)
def test_the_gpu_kernels_are_the_formula(case: Any) -> None:
    (plan, a), offset = case
    names = ["q", "k", "v", *(name for name in GIVEN if getattr(a, name) is not None)]
    results = both(plan, a, names, torch.tensor([0.3, -0.4]) if offset else None, "triton")
    for name, mine in zip(["out", "lse", *names], results[0], strict=False):
        assert mine.dtype == (torch.float32 if name in ("lse", *GIVEN) else a.q.dtype), name
    groups = {"out": [0], "lse": [1], "inputs": [2, 3, 4], "given": range(5, 2 + len(names))}  # the error of a few numbers is luck
    for name, places in groups.items():
        mine, eager, exact = (torch.cat([x[i].flatten() for i in places]) for x in results)
        assert_close_as_eager(mine, exact, eager, name)
    if offset:
        torch.testing.assert_close(results[0][-1].double(), results[2][-1], rtol=1e-2 if a.q.dtype == torch.float16 else 1e-4, atol=1e-4)


@either
def test_queries_of_some_blocks_are_rows_of_the_whole(name: str) -> None:
    """Other queries than keys: a band of the blocks, in the order of the blocks, without text."""
    plan, whole = problem((1, 8, 7), 3, 16, 2)
    begin, end = (int(whole.q_starts[i]) for i in (1, 3))
    rows = 3 + plan.k_blocks.index[plan.k_blocks.valid][begin:end]
    own = {key: getattr(whole, key)[:, 1:3].contiguous() for key in ("lists", "counts", "full")}
    q, slopes = whole.q[:, :, rows].requires_grad_(), whole.slopes[:, :, 1:3].contiguous().requires_grad_()  # type: ignore[index]
    band = whole._replace(q=q, slopes=slopes, q_starts=whole.q_starts[1:4] - begin, text_q=0, places_q=None, **own)
    out, lse = computed(band, name)
    leaves = whole.q.requires_grad_(), whole.slopes.requires_grad_()  # type: ignore[union-attr]
    of_all = computed(whole, name)
    for mine, all_rows in zip((out, lse), of_all, strict=True):
        torch.testing.assert_close(mine, all_rows[:, :, rows], rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(out.square().sum() + lse.sum(), (q, slopes))
    theirs = torch.autograd.grad(of_all[0][:, :, rows].square().sum() + of_all[1][:, :, rows].sum(), leaves)
    torch.testing.assert_close(mine[0], theirs[0][:, :, rows], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine[1], theirs[1][:, :, 1:3], rtol=1e-4, atol=1e-5)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New uninitialised tensors are full of NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            return x.fill_(math.nan) if x.is_floating_point() else x

        return filled

    for owner, made in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, made, poison(getattr(owner, made)))


def gradients(a: Arguments, name: str) -> list[Tensor]:
    """Of all that is given, with everything on the device that the kernels take."""
    given = [key for key in ("q", "k", "v", *GIVEN) if getattr(a, key) is not None]
    leaves = [getattr(a, key).detach().requires_grad_() for key in given]
    out, lse = computed(a._replace(**dict(zip(given, leaves, strict=True))), name)
    return list(torch.autograd.grad(out.square().sum() + lse.sum(), leaves))


@either
@pytest.mark.parametrize(
    "made", [problem(VIDEO, 3, 24, 2), seen(SPANS, 3, 24, 2), on_slots(problem(VIDEO, 3, 24, 1))], ids=["all", "lists", "units"]
)
@pytest.mark.usefixtures("poisoned")
def test_no_uninitialised_memory_is_read_and_again_is_the_same_to_the_bit(made: tuple[Plan, Arguments], name: str) -> None:
    assert torch.empty(1).isnan().all()
    first, second = gradients(made[1], name), gradients(made[1], name)
    assert [i for i, x in enumerate(first) if not x.isfinite().all()] == []
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_head_of_nan_leaves_the_others_alone(parts: int, dtype: torch.dtype) -> None:
    """A thread has the units that each head sees in one place, where the longer lists of the first left theirs."""
    plan, a = problem((1, 24, 20), 5, 64, parts, dtype)
    a = on_lists(plan, a, parts)
    assert a.pool_counts is not None
    assert a.pooled_k is not None
    a.pool_counts[:, 1] -= 4
    poisoned = a.pooled_k.clone()
    poisoned[:, 0] = math.nan
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        whole, with_nan = computed(a, "cpu"), computed(a._replace(pooled_k=poisoned), "cpu")
    finally:
        torch.set_num_threads(threads)
    assert with_nan[0][:, 0].isnan().any()
    assert all(torch.equal(x[:, 1], y[:, 1]) for x, y in zip(whole, with_nan, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.TRITON, reason="Triton is not installed")
def test_slopes_past_the_end_of_float16() -> None:
    """Covariances have the square of the values' range."""
    plan, a = problem(RAGGED, 0, 16, 2, torch.float16)
    assert a.slopes is not None
    a = a._replace(slopes=a.slopes * 2e5, q=a.q * 2e-3)
    assert a.slopes.abs().max() > 65504  # type: ignore[union-attr]
    out, _ = computed(a, "triton")
    given = {name: getattr(a, name).double() for name in ("q", "k", "v", *GIVEN) if getattr(a, name) is not None}
    exact = oracle(plan, a, given)[0]
    error, least = ((x.double() - exact).norm() / exact.norm() for x in (out, exact.half()))
    assert error <= 4 * least  # q, the slopes and the output are rounded


class Made(TorchDispatchMode):
    """Counts the tensors that any operation makes with as many matrices of these sizes as `like` has, or more."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.matrix, self.least, self.found = like.shape[-2:], like.numel(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in given and x.numel() >= self.least:
                self.found += x.shape[-2:] == self.matrix
        return made


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("made", [problem((1, 8, 8), 0, 256, 1), seen((1, 8, 8), 0, 256, 1)], ids=["all", "lists"])
def test_the_slopes_are_in_memory_once(made: tuple[Plan, Arguments]) -> None:
    """They are read where they lie: nothing of their size is made of them, and one such tensor, their gradient, in the backward pass."""
    from dit_accel.kernels.triton import calls
    from dit_accel.kernels.triton.tables import Machine

    _, a = made
    assert a.slopes is not None
    with calls.recorded(Machine("sm_90", 132)), Made(a.slopes) as forward:
        out, lse = calls.attend(a)
    with calls.recorded(Machine("sm_90", 132)), Made(a.slopes) as backward:
        calls.gradients(out, None, out, lse, a)
    assert (forward.found, backward.found) == (0, 1)


@pytest.mark.parametrize(("dim", "parts", "lists"), [(64, 2, False), (64, 2, True), (72, 4, True), (64, 1, True)])
def test_bfloat16_is_within_its_rounding(dim: int, parts: int, lists: bool) -> None:
    """Pooled keys of units on lists are pairs of bfloat16 there, where the CPU multiplies these."""
    plan, a = problem((1, 12, 10), 5, dim, parts, torch.bfloat16)
    a = on_lists(plan, a, parts) if lists else a
    names = ["q", "k", "v", *(name for name in GIVEN if getattr(a, name) is not None)]
    kernel, _, exact = both(plan, a, names, None)
    low = {name: getattr(a, name).bfloat16().requires_grad_() for name in names}
    found = oracle(plan, a, low)
    eager = [*found, *torch.autograd.grad(loss(*found), list(low.values()))]
    for name, *three in zip(("out", "lse", *names), kernel, exact, eager, strict=True):
        mine, true, rounded = (x.double() for x in three)
        error, allowed = (mine - true).norm(), (rounded - true).norm()
        assert error <= 2 * allowed, (name, float(error), float(allowed))


@either
def test_without_slopes_and_with_means_it_is_what_the_kernel_pools(name: str) -> None:
    plan, a = problem((1, 12, 10), 5, 24, 1)
    image = [x[:, :, 5:][:, :, plan.k_blocks.index] for x in (a.k, a.v)]
    mean = [(x * plan.k_blocks.valid[..., None]).sum(3) / plan.k_blocks.count[:, None] for x in image]
    bias = plan.k_blocks.count.log().expand(1, HEADS, -1).contiguous()
    given = a._replace(pooled_k=mean[0], pooled_v=mean[1], pooled_bias=bias, slopes=None)
    pooled = a._replace(pooled_k=None, pooled_v=None, pooled_bias=None, slopes=None, log_count=True)
    for mine, theirs in zip(*(computed(x, name) for x in (given, pooled)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled_v": None}, "pooled_k, pooled_v and pooled_bias"),
        ({"log_count": True}, "without log_count"),
        ({"variance": True}, "pooled_var is given with variance"),
        ({"pooled_var": torch.zeros(1, HEADS, 16, 16)}, "pooled_var is given with variance"),
        ({"variance": True, "pooled_var": torch.zeros(1, HEADS, 3, 16)}, "pooled_var must be float32"),
        ({"pool_slots": torch.zeros(4, dtype=torch.int32), "pool_parts": 3}, "units require pool_slots, and pool_parts of 1, 2 or 4"),
        ({"pool_slots": torch.zeros(3, dtype=torch.int32)}, "pool_slots must be int32"),
        ({"rest": "none"}, "of a pooled rest"),
        ({"slopes": torch.zeros(1, 1)}, "slopes must be float32"),
        ({"pooled_bias": torch.zeros(1, HEADS, 3)}, "pooled_bias must be float32"),
        ({"pool_lists": torch.zeros(1, HEADS, 1, 2, dtype=torch.int32)}, "units require pool_slots"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(problem((1, 8, 8), 0, 16, 1)[1]._replace(**change))


@pytest.mark.parametrize("slot", [-1, 23])
def test_a_unit_that_there_is_not_is_refused(slot: int) -> None:
    """It would be a write past the end of memory."""
    _, a = on_slots(problem((1, 16, 16), 0, 16, 1))
    a.pool_slots[3] = slot  # type: ignore[index]
    with pytest.raises(ValueError, match="pool_slots must be numbers of the 23 units"):
        computed(a, "cpu")
