"""One distillation for several densities or radii: a spec is drawn for each step."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import learn, prompt_pipe, same, state, steps_of, unchanged, untimed

from dit_accel import CLEAR, SLA, AttentionSpec, DistillConfig, accelerate
from dit_accel.errors import DistillationError
from dit_accel.finetune import distill as distillation
from dit_accel.finetune.data.collect import Samples
from dit_accel.finetune.losses import relative_error
from dit_accel.finetune.velocity import predict, velocity_error
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of

DENSITIES = tuple(SLA(share, block=(16, 16)) for share in (0.25, 0.5, 1.0))
RADII = (CLEAR(2.0), CLEAR(4.0))
RUN: dict[str, Any] = {"steps": 8, "parameter_steps": 6, "checkpoint_every": 2, "train": "parameters", "specs": DENSITIES}


def test_each_step_runs_the_spec_that_it_drew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "set_trainable", lambda transformer, patch, config: {"none": torch.nn.Parameter(torch.zeros(1))})
    monkeypatch.setattr(distillation, "sum_gradients", lambda parameters: None)
    monkeypatch.setattr("accelerate.Accelerator.backward", lambda self, loss: None)  # nothing is learned: the weights stay
    pipe = accelerate(prompt_pipe(), RADII[0])
    rows = steps_of(learn(pipe, tmp_path, steps=8, specs=RADII))
    assert {row["spec"] for row in rows} == {0, 1}
    samples = Samples(tmp_path / "samples")
    for number, spec in enumerate(RADII):
        other = accelerate(prompt_pipe(), spec)
        with torch.no_grad(), always(other):
            found = [float(relative_error(predict(other.transformer, f.arguments), f.prediction)) for f in samples]
        for row in (row for row in rows if row["spec"] == number):
            assert min(abs(row["prediction"] - error) for error in found) < 1e-6 * max(found)


def test_the_pipeline_keeps_its_own_spec(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), DENSITIES[0])
    result = learn(pipe, tmp_path, **RUN)
    assert {op.specs for op in operators_of(pipe).values()} == {(pipe.transformer._dit_accel.context.assignment.spec,)} == {(DENSITIES[0],)}
    assert result.error_after == velocity_error(pipe, Samples(tmp_path / "held-out"))
    assert {row["spec"] for row in result.parameter_history} > {0}


@pytest.mark.parametrize("stage", ["parameters", "checkpoint"])
def test_a_run_resumes_to_the_bit(tmp_path: Path, stage: str) -> None:
    whole, stopped, resumed = (accelerate(prompt_pipe(), DENSITIES[0]) for _ in range(3))
    expected = learn(whole, tmp_path / "whole", **RUN)
    calls = iter(range(1000))
    last = 3 if stage == "parameters" else 6 + 5

    def stop(module: Any, args: Any) -> None:
        if torch.is_grad_enabled() and next(calls) == last:
            raise KeyboardInterrupt

    stopped.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **RUN)
    assert {op.specs for op in operators_of(stopped).values()} == {(DENSITIES[0],)}
    got = learn(resumed, tmp_path / "stopped", **RUN)
    assert got.resumed_from == (0 if stage == "parameters" else 4)
    assert untimed(got) == dataclasses.replace(untimed(expected), resumed_from=got.resumed_from)
    assert same(state(whole.transformer), state(resumed.transformer))


OTHERS: dict[str, AttentionSpec] = {
    "order": SLA(0.25, tile=(4, 4)),
    "block": SLA(0.25),
    "parameters": SLA(0.5, scope="none", block=(16, 16)),
}


@pytest.mark.parametrize("spec", OTHERS.values(), ids=OTHERS)
def test_a_spec_that_does_not_fit_is_refused(tmp_path: Path, spec: AttentionSpec) -> None:
    pipe = accelerate(prompt_pipe(), DENSITIES[0])
    with unchanged(pipe), pytest.raises(DistillationError, match="specs must have"):
        learn(pipe, tmp_path, specs=(DENSITIES[1], spec))


@pytest.mark.parametrize("value", [0.5, "sla:0.1", (0.1, 0.2), None, (SLA,)])
def test_what_is_no_spec_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="specs must be a tuple of AttentionSpec"):
        DistillConfig(specs=value)


def test_the_config_names_them() -> None:
    assert [AttentionSpec.from_dict(spec) for spec in DistillConfig(specs=DENSITIES).to_dict()["specs"]] == list(DENSITIES)
    assert DistillConfig().to_dict()["specs"] == []
