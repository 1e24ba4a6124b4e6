"""Slot values: a type that a piece of code does not know is an error there, and numbers are numbers whoever made them."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers import Shape

from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, TokenLayout, attention
from dit_accel.errors import BackendError
from dit_accel.measure.estimate import passes
from dit_accel.method import spec
from dit_accel.method.parameters import Values
from dit_accel.method.spec import Box, Disc, FirstFrames, Linear, Mass, Pooled, Raster, TopK
from dit_accel.operator.attention import attend
from dit_accel.operator.blocks_of_grid import kept_density, make_plan, multiply_adds, visited_density
from dit_accel.operator.layout import partition

CPU, LAYOUT = torch.device("cpu"), TokenLayout((1, 8, 8))


@dataclasses.dataclass(frozen=True)
class New:
    """A type of every slot that no code has a case for."""

    radius: int = 3


@pytest.fixture(autouse=True)
def _declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The specs themselves accept the new type, as they do the moment that somebody adds one."""
    for slot in ("Pattern", "Rest", "Merge", "Order"):
        monkeypatch.setattr(spec, slot, getattr(spec, slot) | New)


def with_rest(rest: Any = None, merge: Any = None) -> AttentionSpec:
    return AttentionSpec((TopK(0.3),), rest or Pooled(), merge or Mass(offset=False), Raster(), (16, 16))


def run(method: AttentionSpec, backend: str) -> torch.Tensor:
    """The operator with parameters made elsewhere."""
    q, k, v = Shape(1, 2, 16, LAYOUT.grid).inputs()
    plan = make_plan(method, LAYOUT, CPU)
    return attend(q, k, v, method, LAYOUT, plan, Values(None, None, None), None, backend)[0]


@pytest.mark.parametrize("backend", ["cpu", "triton", "auto", "reference"])
@pytest.mark.parametrize("slot", ["rest", "merge"])
def test_no_backend_computes_an_unknown_slot_as_none(slot: str, backend: str) -> None:
    unknown = dataclasses.replace(with_rest(Linear()), **{slot: New()})
    error = ValueError if backend == "reference" else BackendError
    with pytest.raises(error, match=r"do(es)? not support New"):
        run(unknown, backend)


def with_pattern(*others: Any) -> AttentionSpec:
    return AttentionSpec((*others, New()), block=(64, 64))  # type: ignore[arg-type]


COUNTS: dict[str, Callable[[], object]] = {
    "parameters-rest": lambda: with_rest(New()).make_parameters(heads=2, head_dim=16),
    "parameters-merge": lambda: with_rest(Linear(), New()).make_parameters(heads=2, head_dim=16),
    "plan": lambda: make_plan(with_pattern(), LAYOUT, CPU),
    "plan-beside-others": lambda: make_plan(with_pattern(Disc(2)), LAYOUT, CPU),
    "kept-density": lambda: kept_density(with_pattern(), LAYOUT),
    "visited-density": lambda: visited_density(with_pattern(), LAYOUT),
    "multiply-adds": lambda: multiply_adds(with_rest(New()), LAYOUT, 16),
    "passes": lambda: passes(with_rest(New())),
    "order": lambda: partition((1, 8, 8), New(), 64),  # type: ignore[arg-type]
    "whole-layer": lambda: attention(*Shape(1, 2, 16, LAYOUT.grid).inputs(), with_rest(New()), LAYOUT),
}


@pytest.mark.parametrize("count", COUNTS.values(), ids=COUNTS)
def test_nothing_counts_or_plans_an_unknown_slot_as_nothing(count: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="does not support New"):
        count()


def test_an_unknown_pattern_is_taken_for_one_of_tokens() -> None:
    """Beside a rest of whole blocks, until somebody says that it keeps whole blocks."""
    with pytest.raises(ValueError, match="whole blocks"):
        AttentionSpec((New(),), Pooled(), Mass())  # type: ignore[arg-type]


NUMPY: dict[str, tuple[Callable[[], AttentionSpec], AttentionSpec]] = {
    "clear": (lambda: CLEAR(np.int64(8), downsample=np.int32(4)), CLEAR(8, downsample=4)),  # type: ignore[arg-type]
    "clear-float": (lambda: CLEAR(np.float32(7.5)), CLEAR(7.5)),  # type: ignore[arg-type]
    "clear-box": (lambda: CLEAR((np.int64(3), np.int64(4))), CLEAR((3, 4))),  # type: ignore[arg-type]
    "fovea": (lambda: Fovea(np.float64(0.25), tile=(np.int64(4), np.int64(8))), Fovea(0.25, tile=(4, 8))),  # type: ignore[arg-type]
    "fovea-frames": (lambda: Fovea(0.25, first_frames=np.int64(2)), Fovea(0.25, first_frames=2)),  # type: ignore[arg-type]
    "sla": (lambda: SLA(np.float32(0.5), block=(np.int64(64), np.int64(32))), SLA(0.5, block=(64, 32))),  # type: ignore[arg-type]
    "gna": (lambda: GNA(np.int16(9), (np.int64(1), 2, 2), dilation=np.uint8(2)), GNA(9, (1, 2, 2), dilation=2)),  # type: ignore[arg-type]
    "pooled": (lambda: with_rest(Pooled(cap=np.float64(3))), with_rest(Pooled(cap=3.0))),
}


@pytest.mark.parametrize(("make", "wanted"), NUMPY.values(), ids=NUMPY)
def test_numbers_of_numpy_are_numbers(make: Callable[[], AttentionSpec], wanted: AttentionSpec) -> None:
    made = make()
    assert made == wanted
    assert hash(made) == hash(wanted)
    assert str(made) == str(wanted)
    assert json.dumps(made.to_dict()) == json.dumps(wanted.to_dict())


def test_a_layout_takes_numbers_of_numpy() -> None:
    made = TokenLayout(tuple(np.array([2, 3, 4])), np.int64(5), references=(tuple(np.array([1, 2, 2])),))
    wanted = TokenLayout((2, 3, 4), 5, references=((1, 2, 2),))
    assert made == wanted
    assert repr(made) == repr(wanted)


@pytest.mark.parametrize(
    "make",
    [lambda: CLEAR(np.bool_(True)), lambda: GNA(np.float64(3)), lambda: Box(np.int64(0)), lambda: FirstFrames(np.float32(1)),
     lambda: TopK(np.float64("nan")), lambda: CLEAR(np.array([8]))],
    ids=["bool", "float-window", "zero", "float-count", "nan", "array"],
)  # fmt: skip
def test_what_is_no_such_number_is_refused_from_numpy_as_well(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize("blocks", [1, 3, 7, 16, 100, 256, 399])
def test_a_density_of_two_digits_keeps_its_exact_share(blocks: int) -> None:
    kept = [TopK(percent / 100).count(blocks) for percent in range(1, 101)]
    assert kept == [max(1, percent * blocks // 100) for percent in range(1, 101)]


def test_a_third_of_any_number_of_thirds_is_kept() -> None:
    assert [TopK(1 / 3).count(3 * n) for n in range(1, 400)] == list(range(1, 400))


def test_the_plan_keeps_the_share_asked_for() -> None:
    method = AttentionSpec((TopK(0.29),), order=Raster(), block=(16, 16))
    assert make_plan(method, TokenLayout((1, 40, 40)), CPU).top == 29
