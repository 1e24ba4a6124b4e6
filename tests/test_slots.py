"""Slot values: what is no whole part is refused, and numbers are numbers whoever made them."""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, TokenLayout
from dit_accel.method import (
    Blockwise,
    Box,
    Call,
    FirstFrames,
    Intervals,
    Mass,
    MeanProduct,
    Merge,
    Order,
    Part,
    Pooled,
    Raster,
    Rest,
    Score,
    Selection,
    Tokenwise,
    TopK,
)
from dit_accel.method.parts import part_types
from dit_accel.operator.blocks_of_grid import make_plan

CPU, LAYOUT = torch.device("cpu"), TokenLayout((1, 8, 8))


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A type of no slot."""

    radius: int = 3


@pytest.mark.parametrize("slot", ["keep", "rest", "merge", "order"])
def test_what_is_no_part_is_refused_in_every_slot(slot: str) -> None:
    value = (Foreign(),) if slot == "keep" else Foreign()
    with pytest.raises(ValueError, match=rf"{slot} .*not .*Foreign\(radius=3\)"):
        dataclasses.replace(with_rest(), **{slot: value})


@pytest.mark.parametrize("slot", [Blockwise, Tokenwise, Intervals, Selection, Score, Rest, Merge, Order], ids=lambda slot: slot.__name__)
def test_a_part_that_lacks_its_formula_can_not_be_made(slot: type[Part]) -> None:
    """So that nothing is ever computed, planned or counted as nothing."""
    lacking = dataclasses.dataclass(frozen=True)(type(f"Lacking{slot.__name__}", (slot,), {"__module__": __name__}))
    with pytest.raises(TypeError, match="abstract"):
        lacking()
    assert lacking.__name__ not in part_types()


def test_a_part_is_frozen() -> None:
    class Loose(MeanProduct):
        def __call__(self, call: Call) -> torch.Tensor:
            return -super().__call__(call)

    with pytest.raises(ValueError, match=r"score must be a frozen dataclass.*decorate its class with @dataclass\(frozen=True\)"):
        TopK(0.3, score=Loose())
    assert "Loose" not in part_types()


def test_a_name_is_one_parts() -> None:
    with pytest.raises(ValueError, match=r"Pooled is dit_accel.method.parts.far's: give it another name"):
        type("Pooled", (Blockwise,), {"__module__": __name__})
    assert part_types()["Pooled"] is Pooled


def test_two_parts_do_not_share_a_learned_tensor() -> None:
    @dataclasses.dataclass(frozen=True)
    class Shifted(MeanProduct):
        def parameters(self, heads: int, head_dim: int) -> dict[str, torch.Tensor]:
            return {"offset": torch.zeros(heads)}

    with pytest.raises(ValueError, match=r"both name a learned tensor 'offset': use one of them, or rename it in a part of your own"):
        AttentionSpec((TopK(0.3, score=Shifted()),), Pooled(), Mass())


def with_rest(rest: Any = None, merge: Any = None) -> AttentionSpec:
    return AttentionSpec((TopK(0.3),), rest or Pooled(), merge or Mass(offset=False), Raster(), (16, 16))


def test_a_type_that_is_not_registered_is_not_read() -> None:
    data = with_rest().to_dict() | {"rest": {"type": "NeverDefined"}}
    with pytest.raises(ValueError, match=r"module is imported first, not {'type': 'NeverDefined'}"):
        AttentionSpec.from_dict(data)


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


@pytest.mark.parametrize(("make", "expected"), NUMPY.values(), ids=NUMPY)
def test_numbers_of_numpy_are_numbers(make: Callable[[], AttentionSpec], expected: AttentionSpec) -> None:
    made = make()
    assert made == expected
    assert hash(made) == hash(expected)
    assert str(made) == str(expected)
    assert json.dumps(made.to_dict()) == json.dumps(expected.to_dict())


def test_a_layout_takes_numbers_of_numpy() -> None:
    made = TokenLayout(tuple(np.array([2, 3, 4])), np.int64(5), references=(tuple(np.array([1, 2, 2])),))
    expected = TokenLayout((2, 3, 4), 5, references=((1, 2, 2),))
    assert made == expected
    assert repr(made) == repr(expected)


@pytest.mark.parametrize(
    "make",
    [lambda: CLEAR(np.bool_(True)), lambda: GNA(np.float64(3)), lambda: Box(np.int64(0)), lambda: FirstFrames(np.float32(1)),
     lambda: TopK(np.float64("nan")), lambda: CLEAR(np.array([8]))],
    ids=["bool", "float-window", "zero", "float-count", "nan", "array"],
)  # fmt: skip
def test_what_is_no_such_number_is_refused_from_numpy_as_well(make: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match=r"must be .*, not "):
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
