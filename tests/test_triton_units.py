"""What the Triton kernels make of groups: against the formulas, as test_group_units.py has it of the CPU's; and how much a call does."""

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import Largest, assert_close_as_eager
from on_device import CPU, DEVICE, attention_by, eager, moved
from test_group_units import CHOSEN, DISC, arguments, composed, gradients, leaves_of
from test_groups import grouped, inputs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel import TokenLayout, attention
from dit_accel.kernels import ops
from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.cpu import native
from dit_accel.kernels.grouping import DIFFERENTIABLE_GROUPING, GRADIENTS_OF_UNITS, GroupingArguments, Units, levels_of
from dit_accel.kernels.triton import calls, launch_parts, launch_units, units_gradients
from dit_accel.kernels.triton.launch import Launch, execute
from dit_accel.kernels.triton.tables import Machine
from dit_accel.method import Pooled, TopK
from dit_accel.method.parts import groups

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")]

FOUR = Pooled(cap=0.1, parts=4, order=1, opened=1)
TWO = Pooled(log_count=False, cap=0.1, parts=2, order=1, opened=2)
LEVELS, SMALL = TokenLayout((1, 15, 26), 3), TokenLayout((1, 8, 9), 2)
# layout, rest, what is kept, size of a head
CASES: dict[str, tuple[TokenLayout, Pooled, Any, int]] = {
    "levels": (LEVELS, FOUR, CHOSEN, 16),
    "shared-lists": (LEVELS, TWO, DISC, 8),
    "video": (TokenLayout((3, 8, 9), 0, False), FOUR, CHOSEN, 24),
    "order-0": (LEVELS, Pooled(cap=0.1, opened=1), CHOSEN, 8),
    "no-variance": (SMALL, Pooled(variance=False, cap=0.1, order=1, opened=1), CHOSEN, 8),
    "no-groups": (SMALL, dataclasses.replace(TWO, opened=50), CHOSEN, 8),
    "all-opened": (SMALL, FOUR, TopK(1.0), 8),
    **{f"head-{d}": (SMALL, FOUR, CHOSEN, d) for d in (64, 72, 128)},
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def units(a: GroupingArguments) -> Units:
    """By the Triton kernels, of and on the CPU."""
    found: Units = moved(ops.group_units(moved(a), "triton"), CPU)
    return found


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isfinite(), x, 0)


@every_case
def test_it_is_the_formula(case: tuple[TokenLayout, Pooled, Any, int]) -> None:
    """Results, lists and gradients; the formulas are given the kernels' parts."""
    a = arguments(*case)
    own, own_leaves = leaves_of(a, torch.float32)
    made = units(own)
    exact_of, seen = composed(leaves_of(a, torch.float64)[0], made.part, None)
    assert_lists(made, seen)
    several = 5 if case[-1] < 64 else 2  # as an error over few numbers would be luck
    loss = {name: torch.randn(several, *x.shape, generator=torch.Generator().manual_seed(3)) for name, x in exact_of.items()}
    found, names = [], [name for name in DIFFERENTIABLE_GROUPING if getattr(a, name) is not None]
    for dtype in (None, torch.float64, torch.float32):
        mine, leaves = (own, own_leaves) if dtype is None else leaves_of(a, dtype)
        if dtype is None:
            given = made._asdict()
        elif dtype == torch.float32:
            with eager():
                given = composed(mine, made.part, seen)[0]
        else:
            given = composed(mine, made.part, seen)[0]
        given = {name: finite(given[name]) for name in loss}
        found.append([*(x.detach() for x in given.values()), *gradients(given, loss, leaves)])
    for got, exact, naive, name in zip(*found, [*loss, *(f"d{name}" for name in names)], strict=True):
        assert_close_as_eager(got, exact, naive, name)


def assert_lists(made: Units, seen: groups.Listed) -> None:
    index, counts = groups.unit_lists(seen)
    assert torch.equal(made.pool_counts.flatten(0, 1), counts)
    shown, lists = torch.arange(index.shape[-1]) < counts[..., None], made.pool_lists.flatten(0, 1)
    assert torch.equal(lists[..., : index.shape[-1]][shown[..., : lists.shape[-1]]], index[shown])
    behind = torch.arange(lists.shape[-1]) >= counts[..., None]
    assert not lists[behind].any()
    if made.shares.numel():
        shares = made.shares.flatten(0, 1)
        assert not shares[behind].any()
        mass = shares.sum((-1, -2))
        assert bool(((mass - 1).abs() < 1e-5)[mass != 0].all())  # 0: all of a span's query blocks keep all that it sees


def test_the_parts_and_the_cpus_are_the_same() -> None:
    a = arguments(*CASES["levels"])
    assert len(levels_of(a.tokens.shape[-1] // a.parts, a.roots)) >= 3
    mine, theirs = units(a).part, ops.group_units(a, "cpu").part
    assert float((mine == theirs).float().mean()) > 0.99  # one on the border of a cut may change sides


def everything(a: GroupingArguments) -> list[Tensor]:
    mine, leaves = leaves_of(a, torch.float32)
    made = units(mine)
    loss = sum(finite(getattr(made, name)).square().sum() for name in GRADIENTS_OF_UNITS)
    return [*made, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


def test_several_samples_are_as_each_alone() -> None:
    a = arguments(*CASES["head-64"])
    pairs = {name: x.transpose(0, 1) for name, x in a._asdict().items() if isinstance(x, Tensor) and x.is_floating_point()}
    found, expected = everything(a._replace(**{name: x.contiguous() for name, x in pairs.items()})), everything(a)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y.transpose(0, 1))


@pytest.mark.parametrize("case", ["levels", "shared-lists", "order-0", "no-groups"])
def test_a_few_heads_at_a_time_are_as_all_together(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    a = arguments(*CASES[case])
    a = a._replace(
        **{
            name: torch.cat([x, x.flip(1), x[:, :1]], 1)
            for name, x in a._asdict().items()
            if isinstance(x, Tensor) and x.ndim > 2 and name != "lists"
        }
    )
    if a.lists.ndim == 3:
        a = a._replace(**{name: torch.cat([x, x.flip(0), x[:1]]) for name, x in (("lists", a.lists), ("counts", a.counts))})
    expected, heads = units(a), a.q_mean.shape[1]
    for held, parts in ((1, heads), (2 * of_head(a), -(-heads // 2))):
        monkeypatch.setattr(launch_units, "SEEN", held)
        calls._records.clear()
        grids: list[int] = []

        def note(one: Launch, grids: list[int] = grids) -> None:
            grids.extend([one.grid[2]] if one.kernel.__name__ == "span_logits" else [])
            execute(one)

        with calls.redirected(calls.machine_of(DEVICE), note):
            found = units(a)
        assert len(grids) == parts
        assert sum(grids) == heads
        for name, x, y in zip(Units._fields, found, expected, strict=True):
            assert torch.equal(x, y), name


def of_head(a: GroupingArguments) -> int:
    """Numbers of what one head's spans see."""
    slots, spans = a.tokens.shape[-1] // a.parts, -(-a.q_mean.shape[2] // SPAN)
    return int(spans * (sum(levels_of(slots, a.roots)) * (a.parts + 3) - slots))


def test_what_memory_held_before_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and places that there are not, twice: the same to the bit."""
    a, new = arguments(*CASES["levels"]), Tensor.new_empty
    expected = everything(a)

    def poisoned(*given: Any, **named: Any) -> Tensor:
        x = new(*given, **named)
        return x.fill_(math.nan if x.is_floating_point() else 255 if x.dtype == torch.uint8 else 1 << 30)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    for x, y in zip(everything(a), expected, strict=True):
        assert torch.equal(x, y)


def test_a_head_of_nan_leaves_the_others_alone() -> None:
    a = arguments(*CASES["head-64"])
    poisoned = {name: x.detach().clone() for name, x in a._asdict().items() if isinstance(x, Tensor)}
    for name in ("q_mean", "pooled_k", "pooled_v", "slope", "second", "metric", "spread", "v_spread"):
        poisoned[name][:, 0] = math.nan
    for x, y in zip(everything(a), everything(a._replace(**poisoned)), strict=True):
        assert torch.equal(x[:, 1], y[:, 1])


def test_what_does_not_fit_is_refused() -> None:
    a = arguments(*CASES["no-groups"])
    with pytest.raises(ValueError, match="roots must be slots over a power of 4, not 3"):
        ops.group_units(moved(a._replace(roots=3)), "triton")


def test_with_everything_kept_it_is_dense() -> None:
    q, k, v = inputs(SMALL, torch.float32, 16)
    exact, naive = (F.scaled_dot_product_attention(*(x.to(dtype) for x in (q, k, v))) for dtype in (torch.float64, torch.float32))
    got = attention_by("triton", grouped(dataclasses.replace(FOUR, cap=2.0), TopK(1.0)), SMALL)([q, k, v])[0]
    assert_close_as_eager(got, exact, naive)


class Operations(TorchDispatchMode):
    """Counts torch's operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def counted() -> tuple[Counter[str], Counter[str]]:
    """The operators that a call without gradients runs, once its plan is made, ours as one each; and the launches."""
    layout, spec = TokenLayout((1, 64, 64), 8), grouped(FOUR, CHOSEN)
    q, k, v = (torch.zeros(1, 2, layout.tokens, 16, device=DEVICE) for _ in range(3))
    with torch.no_grad(), calls.recorded(Machine("sm_90", 132)) as first:
        attention(q, k, v, spec, layout, backend="triton")
    assert first
    with torch.no_grad(), calls.recorded(Machine("sm_90", 132)) as launches, Operations() as operations:
        attention(q, k, v, spec, layout, backend="triton")
    return operations.found, Counter(launch.kernel.__name__ for launch in launches)


def test_a_call_is_few_operators_and_launches() -> None:
    """Of 933 operators, when torch made the groups, 16 are left."""
    operations, launches = counted()
    of_groups = {"group_level": 3, "span_logits": 1, "see_units": 1, "weigh_units": 1, "mix_units": 1}
    assert {name: launches[name] for name in of_groups} == of_groups
    assert sum(operations.values()) <= 20, operations


def test_the_gradients_are_few_launches_and_hold_no_more_than_slopes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call of order 1 in groups: no product is torch's, and nothing is larger than the slopes of all blocks and groups."""
    layout, spec = TokenLayout((1, 64, 64), 8), grouped(FOUR, CHOSEN)
    q, k, v = (torch.zeros(1, 2, layout.tokens, 64, device=DEVICE, requires_grad=True) for _ in range(3))
    operations, largest = Operations(), Largest()

    def watched(function: Any) -> Any:
        def run(*given: Any) -> Any:
            with operations, largest:
                return function(*given)

        return run

    for module, name in ((units_gradients, "gradients_of_units"), (launch_parts, "gradients_of_summaries")):
        monkeypatch.setattr(module, name, watched(getattr(module, name)))
    with torch.autograd.set_multithreading_enabled(False), calls.recorded(Machine("sm_90", 132)) as launches:
        out = attention(q, k, v, spec, layout, backend="triton")
        forward = len(launches)
        out.sum().backward()
    found = Counter(launch.kernel.__name__ for launch in launches[forward:])
    expected = {
        "gradient_mixed_weights": 1, "gradient_shares": 1, "gradient_mixed_slopes": 1, "gradient_joined": 1, "gradient_mean_queries": 1,
        "gradient_level": 3, "gradient_parts": 1, "gradient_queries": 1,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert {name.split(".")[1] for name in operations.found} <= {
        "new_empty", "empty", "empty_like", "slice", "zero_", "sum", "add_", "reshape", "contiguous", "clone", "flatten",
    }, operations.found  # fmt: skip
    assert sum(operations.found.values()) <= 40
    slots = 256
    assert q.numel() <= largest.elements <= 2 * 64 * slots * 64


@pytest.mark.parametrize("rest", [FOUR, Pooled(cap=0.1, parts=2, order=1)], ids=["groups", "tiles"])
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float16, "tf32"), (torch.float32, "tf32x3")], ids=str)
def test_slopes_are_mixed_as_exactly_as_tokens_are(rest: Pooled, dtype: torch.dtype, precision: str) -> None:
    """Forward and backward by one TF32 product where tokens have 16 bits, else by three; what is chosen by is as exact as float32."""
    layout, spec = TokenLayout((1, 32, 32), 8), grouped(rest, CHOSEN)
    q, k, v = (torch.zeros(1, 2, layout.tokens, 16, device=DEVICE, dtype=dtype, requires_grad=True) for _ in range(3))
    with torch.autograd.set_multithreading_enabled(False), calls.recorded(Machine("sm_90", 132)) as launches:
        attention(q, k, v, spec, layout, backend="triton").sum().backward()
    found: dict[str, set[str]] = {}
    for launch in launches:
        found.setdefault(launch.kernel.__name__, set()).add(launch.constants.get("PRECISION", ""))
    for name in ("mix_units", "gradient_mixed_weights", "gradient_mixed_slopes"):
        assert found[name] == {precision}
    assert found.get("span_logits", {"tf32x3"}) == {"tf32x3"}
