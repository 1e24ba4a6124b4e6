"""Weights of a bfloat16 pipeline are trained through float32 copies."""

import dataclasses
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from distill_fixtures import learn, prompt_pipe, same, state
from torch import Tensor

from dit_accel import accelerate, dense, restore

RUN: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "train": "attention", "learning_rate": 3e-4}


def half_student() -> Any:
    return accelerate(tiny.half_pipe(), tiny.LORA_SPEC)


def moves(pipe: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """How far each projection's weight went."""
    return {name: x.double() - start[name].double() for name, x in state(pipe.transformer).items() if name.endswith(".attn.to_v.weight")}


def test_steps_too_small_for_bfloat16_add_up(tmp_path: Path) -> None:
    """One step of 3e-4 is less than half a unit of most weights in bfloat16; six of them go where they go in float32."""
    half, full = half_student(), accelerate(prompt_pipe(), tiny.LORA_SPEC)
    starts = [state(pipe.transformer) for pipe in (half, full)]
    for pipe, name in ((half, "half"), (full, "full")):
        learn(pipe, tmp_path / name, **RUN)
    got, expected = (moves(pipe, start) for pipe, start in zip((half, full), starts, strict=True))
    assert all(p.dtype == torch.bfloat16 for p in half.transformer.parameters())
    for name, move in expected.items():
        unit = starts[0][name].double().abs() * 2**-8
        lost = unit > 2 * 3e-4  # where one step rounds to nothing
        assert int(lost.sum()) > 20, name
        assert float((got[name][lost] != 0).double().mean()) > 0.2, name
        along = (got[name] * move).sum() / move.square().sum()
        assert 0.7 < float(along) < 1.3, name  # all in all the same way


def test_a_run_resumes_to_the_bit_and_is_undone(tmp_path: Path) -> None:
    whole, stopped, resumed = half_student(), half_student(), half_student()
    before = state(tiny.half_pipe().transformer)
    expected = learn(whole, tmp_path / "whole", **RUN)
    tiny.stop_training(stopped, 7)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **RUN)
    got = learn(resumed, tmp_path / "stopped", **RUN)
    assert tiny.untimed(got) == dataclasses.replace(tiny.untimed(expected), resumed_from=2)
    assert same(state(resumed.transformer), state(whole.transformer))
    with dense(whole):
        assert all(torch.equal(state(whole.transformer)[name], tensor) for name, tensor in before.items())
    restore(whole)
    assert same(state(whole.transformer), before)
