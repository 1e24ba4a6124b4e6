"""Distillation under an assignment: every spec in use learns, at the moments at which it runs, and a stopped run resumes to the bit."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from distill_fixtures import CALL, PROMPTS, draw, learn, prompt_pipe, same, state, steps_of, stop_training, untimed
from safetensors.torch import load_file

from dit_accel import CLEAR, SLA, Assignment, Fovea, Rule, accelerate, load_adapter, save_adapter
from dit_accel.errors import DistillationError
from dit_accel.finetune import fit
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.moments import Moments, moments_of, recorded_moments
from dit_accel.finetune.velocity import velocity_error
from dit_accel.method.assignment import Moment
from dit_accel.patch.context import Context
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of

TILE = {"tile": (4, 4)}
STEPS = CALL["num_inference_steps"]
# projection and offset in one layer by heads, pooling weights in the other, and nothing in the first step
MIXED = Assignment(
    (
        Rule(SLA(0.3, **TILE), layers="single_*"),
        Rule(Fovea(0.3, **TILE), layers="single_*", heads=(1,)),
        Rule(CLEAR(2.0, downsample=2, **TILE), layers="transformer_blocks.*"),
        Rule(None, steps=(0, 1), noise=(0.0, 1.0)),
    )
)


def pupil(assignment: Assignment = MIXED, dense_steps: int = 0) -> Any:
    return accelerate(prompt_pipe(), assignment, dense_steps=dense_steps)


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[Moment | None]:
    """Grows by the moment of every forward with gradients."""
    seen: list[Moment | None] = []
    real = Context.begin

    def begin(self: Context, *args: Any, gradient: bool, **kwargs: Any) -> Any:
        if gradient:
            seen.append(self.moment)
        return real(self, *args, gradient=gradient, **kwargs)

    monkeypatch.setattr(Context, "begin", begin)
    return seen


def test_every_spec_learns_its_parameters(tmp_path: Path, moments: list[Moment | None]) -> None:
    pipe = pupil()
    before = state(pipe.transformer)
    learn(pipe, tmp_path, train="parameters", steps=8)
    changed = {name.partition(".params.")[2] for name, value in state(pipe.transformer).items() if not torch.equal(value, before[name])}
    assert changed == {"proj.weight", "proj.bias", "offset", "spatial_weight"}
    assert len(moments) == 8
    assert {moment.step for moment in moments if moment} <= set(range(1, STEPS))  # in step 0 nothing would be learned
    offset = operators_of(pipe)["single_transformer_blocks.0.attn"].params.offset
    assert (offset != 0).tolist() == [False, True]


def test_the_first_stage_fits_projections_by_least_squares_and_the_others_by_descent(tmp_path: Path) -> None:
    """As no layer sees another's error, and no head's, each learns what it learns where the others are the original's."""
    sla, fovea, pooled, pause = MIXED.rules
    parts = {
        "both": MIXED,
        "linear": Assignment((dataclasses.replace(sla, heads=(0,)), pause)),
        "others": Assignment((fovea, pooled, pause)),
    }
    learned, errors = {}, {}
    for name, assignment in parts.items():
        pipe, settings = pupil(assignment), {"parameter_steps": 6, "parameter_learning_rate": 1e-2}
        result = learn(pipe, tmp_path / name, train="lora", steps=1, learning_rate=1e-9, **settings)
        checkpoint = load_file(tmp_path / name / "parameters-0000006" / "state.safetensors")
        others = ("exp_avg", "step", fit.STARTED)
        learned[name] = {k.rpartition("/")[2]: value for k, value in checkpoint.items() if not any(other in k for other in others)}
        errors[name] = [row["attention"] for row in result.parameter_history]
    assert learned["both"].keys() == learned["linear"].keys() | learned["others"].keys()
    for name in ("linear", "others"):
        assert max(relative_error(learned["both"][key], value) for key, value in learned[name].items()) < 1e-4
    assert errors["both"][-1] < errors["both"][0]


RUN: dict[str, Any] = {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "parameter_steps": 2}


@pytest.mark.parametrize("mode", ["parameters", "lora"])
@pytest.mark.parametrize("stop", [1, 5], ids=["first-stage", "steps"])
def test_a_stopped_run_resumes_to_the_bit(tmp_path: Path, mode: Any, stop: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = learn(pipe := pupil(), tmp_path / "whole", train=mode, **RUN)
    stopped = pupil()
    if stop == 1:
        real = fit.Combined.update

        def update(self: Any, step: int) -> None:
            if step == 1:
                raise KeyboardInterrupt
            real(self, step)

        monkeypatch.setattr(fit.Combined, "update", update)
    else:
        stop_training(stopped, stop)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", train=mode, **RUN | {"checkpoint_every": 1})
    monkeypatch.undo()
    again = learn(resumed := pupil(), tmp_path / "stopped", train=mode, **RUN)
    assert again.resumed_from == (0 if stop == 1 else 2)
    assert untimed(again).history == untimed(whole).history
    assert untimed(again).parameter_history == untimed(whole).parameter_history
    assert same(state(resumed.transformer), state(pipe.transformer))
    with pytest.raises(DistillationError, match="belongs to another run: its spec is"):
        learn(pupil(Assignment(MIXED.rules[:3])), tmp_path / "stopped", train=mode, **RUN)


def test_what_was_trained_comes_back(tmp_path: Path) -> None:
    pipe = pupil(dense_steps=1)
    learn(pipe, tmp_path / "run", train="lora")
    assert pipe.transformer._dit_accel.context.assignment == Assignment.of(MIXED, dense_steps=1)
    loaded = load_adapter(prompt_pipe(), save_adapter(pipe, tmp_path / "adapter"))
    assert same(state(loaded.transformer), state(pipe.transformer))
    assert torch.equal(draw(loaded), draw(pipe))


def test_drawn_noise_levels_are_those_at_which_a_spec_runs(tmp_path: Path, moments: list[Moment | None]) -> None:
    assignment = Assignment((Rule(SLA(0.3, **TILE), noise=(0.0, 0.6)),))
    result = learn(pupil(assignment), tmp_path, train="parameters", steps=12, flow_weight=1.0, prediction_weight=0.0, attention_weight=0.0)
    assert len(steps_of(result)) == 12
    assert all(moment is not None and moment.noise <= 0.6 for moment in moments)
    assert len({moment.noise for moment in moments if moment}) == 12
    assert {moment.step for moment in moments if moment} == {n for n in range(STEPS) if n >= min(m.step for m in moments if m)}


def test_held_out_forwards_are_at_their_moments(tmp_path: Path) -> None:
    """In the last step alone: the error is that of a spec which runs there, over as many forwards as there are steps."""
    late = Assignment((Rule(Fovea(0.3, **TILE), steps=(STEPS - 1, None)),))
    samples = collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    pipes = [pupil(late), pupil(Assignment.of(Fovea(0.3, **TILE)))]
    errors = []
    for pipe in pipes:
        with always(pipe):
            errors.append(velocity_error(pipe, samples))
    assert 0 < errors[0] < errors[1]
    moments = Moments(samples, pipes[0], pipes[0].transformer._dit_accel.context.family)
    assert [moments[n].step for n in range(len(samples))] == [*range(STEPS)] * 2


NOTHING: dict[str, tuple[Assignment, str]] = {
    "no-step": (Assignment((Rule(SLA(0.3, **TILE), steps=(STEPS, None)),)), "agree to rounding before the first step"),
    "no-size": (Assignment((Rule(SLA(0.3, **TILE), tokens=(10_000, None)),)), "agree to rounding before the first step"),
}


@pytest.mark.parametrize(("assignment", "message"), NOTHING.values(), ids=NOTHING)
def test_samples_at_which_nothing_runs_are_refused(assignment: Assignment, message: str, tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match=message):
        learn(pupil(assignment), tmp_path, train="parameters")


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_moments_are_read_off_the_timesteps_of_a_run(passes: int, order: int) -> None:
    times = [1.0, 0.7, 0.7, 0.3, 0.3] if order == 2 else [1.0, 0.7, 0.3]
    found = moments_of([torch.tensor([t]) for t in times for _ in range(passes)], rising=False, order=order)
    assert found == [Moment(n // order, pytest.approx(t)) for n, t in enumerate(times) for _ in range(passes)]
    thousands = moments_of([torch.tensor([1000 * t]) for t in times for _ in range(passes)], rising=False, order=order)
    assert [moment.step for moment in thousands] == [moment.step for moment in found]
    assert [moment.noise for moment in thousands] == pytest.approx([moment.noise for moment in found])


def test_steps_that_round_to_one_timestep_are_steps() -> None:
    times = torch.tensor([1.0, 0.9999, 0.99, 0.5], dtype=torch.bfloat16)
    assert [moment.step for moment in moments_of(list(times.repeat_interleave(2)), rising=False)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_moments_of_a_run_are_those_that_were_recorded(tmp_path: Path) -> None:
    pipe = prompt_pipe()
    with recorded_moments([pipe.transformer]) as (found,), contextlib.ExitStack():
        collect(pipe, PROMPTS[:1], tmp_path, **CALL)
    accelerate(pipe, Fovea(0.3))
    read = Moments(Samples(tmp_path), pipe, pipe.transformer._dit_accel.context.family)
    assert [read[n].step for n in range(STEPS)] == [moment.step for moment in found]
    assert [read[n].noise for n in range(STEPS)] == pytest.approx([moment.noise for moment in found], abs=1e-6)
