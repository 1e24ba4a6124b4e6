"""The interpreter as the tests have it gives what it gives without their shortcuts."""

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from helpers import Shape, gradients
from on_device import DEVICE, attention_by
from quick_interpreter import make_quick
from torch import Tensor

from dit_accel.method import AttentionSpec, Pooled
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea

pytestmark = pytest.mark.skipif(DEVICE.type != "cpu", reason="kernels are interpreted where there is no card")

SPECS = {
    "clear-downsample": CLEAR(3, downsample=2),
    "gna": GNA((4, 6), stride=(2, 3), dilation=(1, 2)),
    "sla": SLA(0.3, block=(16, 16)),
    "groups": dataclasses.replace(Fovea(0.2, tile=(4, 4)), rest=Pooled(parts=4, order=1, opened=1)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_shortcuts_change_no_bit(spec: AttentionSpec, dtype: torch.dtype, quick_interpreter: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 1, 8, (1, 5, 7), 3)

    def found() -> dict[str, Tensor]:
        """The gradients, which the results are part of."""
        return gradients(lambda qkv, params: attention_by("triton", spec, shape.layout)(qkv, params.float()), spec, shape, dtype)

    quick = found()
    quick_interpreter.undo()
    try:
        plain = found()
    finally:
        make_quick(quick_interpreter)
    assert plain.keys() == quick.keys()
    assert all(torch.equal(x, quick[name]) for name, x in plain.items())


def test_types_become_the_same_together(quick_interpreter: pytest.MonkeyPatch) -> None:
    """Asked in one order and in the other, so that nothing is remembered for other types or for a number in the place of a tensor."""
    from triton.runtime.interpreter import interpreter_semantic, tl

    types, either = (tl.int32, tl.int64, tl.float16, tl.bfloat16, tl.float32, tl.float64), (False, True)
    asked = list(itertools.product(types, either, types, either, either))

    def found(questions: list[Any]) -> list[str]:
        return [interpreter_semantic.computation_type_impl(*each).name for each in questions]

    quick, again = found(asked), found(asked[::-1])[::-1]
    quick_interpreter.undo()
    try:
        assert found(asked) == quick == again
    finally:
        make_quick(quick_interpreter)


def test_shortcuts_are_taken(quick_interpreter: pytest.MonkeyPatch) -> None:
    """A Triton that lacks what they replace would be refused by `make_quick`; one that no longer reads it would not."""
    from triton.runtime import interpreter

    tl = interpreter.tl
    assert not interpreter.interpreter_builder.options.sanitize_overflow
    assert tl.block_type(tl.float32, [16, 4]).shape is tl.block_type(tl.int1, [16, 4]).shape
    x, y = (interpreter.interpreter_semantic.full([16, 4], 1.0, tl.float32) for _ in range(2))
    assert x.shape is y.shape
    assert interpreter.interpreter_semantic.cast(x, tl.float32) is x
