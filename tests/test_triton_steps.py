"""Pooled keys a few at a time, and reductions cut into parts: what large calls do, at small sizes."""

import math

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import attention_by

from dit_accel.kernels.triton.launch import MOST_PARTS, full_rounds
from dit_accel.kernels.triton.tables import POOLS
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.layout import TokenLayout

MANY = Shape(1, 1, 128, (1, 23, 26), 5)  # 42 tiles of 4 x 4, ragged ones too: several steps


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [Fovea(0.1, tile=(4, 4)), Fovea(radius=4, tile=(4, 4))], ids=["selection", "disc"])
def test_several_steps_of_pooled_keys(spec: AttentionSpec) -> None:
    assert MANY.layout.image // 16 > max(POOLS.values())
    qkv, params = MANY.inputs(), random_parameters(spec, MANY)
    exact, eager = (oracle(*qkv, spec, MANY.layout, params, dtype=d)[0].detach() for d in (torch.float64, torch.float32))
    own = attention_by("triton", spec, MANY.layout)
    with torch.no_grad():
        assert_close_as_eager(own(qkv, params)[0], exact, eager)
    exact, eager = (
        flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, MANY.layout, p, dtype=d), spec, MANY, d))
        for d in (torch.float64, torch.float32)
    )
    assert_close_as_eager(flat(gradients(own, spec, MANY, torch.float32)), exact, eager, "gradients")


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [Fovea(0.2), Fovea(0.2, order=1), SLA(0.2), CLEAR(4)], ids=str)
def test_an_empty_batch(spec: AttentionSpec) -> None:
    layout = TokenLayout((1, 8, 8), 5)
    qkv = [torch.randn(0, 2, layout.tokens, 16, requires_grad=True) for _ in range(3)]
    out, lse = attention_by("triton", spec, layout)(qkv)
    assert (out.shape, lse.shape) == (qkv[0].shape, qkv[0].shape[:3])
    out.sum().backward()
    assert [None if x.grad is None else x.grad.shape for x in qkv] == [x.shape for x in qkv]


@pytest.mark.parametrize(
    ("programs", "slots", "parts"), [(192, 264, 4), (96, 132, 4), (8, 264, 33), (1, 264, 115), (264, 264, 1), (10**5, 264, 1)]
)
def test_a_devices_last_round_is_filled(programs: int, slots: int, parts: int) -> None:
    assert full_rounds(programs, slots) == parts


def test_no_more_parts_than_fill_the_device() -> None:
    assert full_rounds(0, 264) >= 1  # an empty batch
    for programs in (1, 3, 24, 100, 131, 132, 133, 500, 4096):
        for slots in (1, 2, 8, 132, 264):
            parts = full_rounds(programs, slots)
            assert 1 <= parts <= max(MOST_PARTS, math.ceil(slots / programs))
            rounds = math.ceil(programs * parts / slots) / parts
            assert rounds <= math.ceil(programs / slots)  # never later than uncut
