"""A training that does harm: the first stage gives layers their start values back, the second says so."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distill_fixtures import PROMPTS, SPECS, fit_stops, learn, perturb, prompt_pipe, same, state
from helpers import Shape, random_parameters
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel import SLA, accelerate, attention
from dit_accel.finetune import distill as distillation
from dit_accel.finetune import fit as fitting
from dit_accel.finetune import teacher
from dit_accel.patch.state import operators_of, patches_of

STAGE: dict[str, Any] = {"parameter_steps": 4, "train": "parameters", "steps": 1, "learning_rate": 1e-9, "parameter_learning_rate": 1e-9}
HARM = r"the first stage left {} of 2 layers further from the original's attention on held-out prompts \(squared relative error"


@pytest.fixture(autouse=True)
def _no_second_stage(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "second" not in request.fixturenames:
        monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)


def spoil(monkeypatch: pytest.MonkeyPatch, *layers: str) -> None:
    """Least squares find numbers that are far from right, in some layers or in all."""
    real = fitting.LeastSquares._solve

    def solve(operator: Any, sums: Tensor) -> None:
        real(operator, sums)
        if not layers or operator.name in layers:
            operator.params.proj.weight.add_(3.0)

    monkeypatch.setattr(fitting.LeastSquares, "_solve", staticmethod(solve))


def started(pipe: Any) -> dict[str, dict[str, Tensor]]:
    return {name: state(operator.params) for name, operator in operators_of(pipe).items()}


def student() -> Any:
    pipe = accelerate(prompt_pipe(), SPECS["parameters"])
    perturb(pipe)
    return pipe


def test_layers_that_are_worse_for_it_keep_their_start_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = student()
    before = started(pipe)
    spoil(monkeypatch)
    with pytest.warns(UserWarning, match=HARM.format(2)):
        result = learn(pipe, tmp_path, **STAGE)
    after = started(pipe)
    assert all(same(before[name], after[name]) for name in before)
    assert result.error_fitted == pytest.approx(result.error_before, rel=1e-6)


def test_only_they_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's attention is what the method computes at other values, which least squares find in the layer that is not spoilt."""
    pipe, spec = accelerate(prompt_pipe(), SPECS["parameters"]), SPECS["parameters"]
    planted, context = random_parameters(spec, Shape(1, 2, 16, (1, 8, 8))), patches_of(pipe)[0][1].context

    def original(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return attention(q, k, v, spec, context.layout, params=planted).detach()

    monkeypatch.setattr(teacher, "_original", original)
    before = started(pipe)
    bad, good = before
    spoil(monkeypatch, bad)
    with pytest.warns(UserWarning, match=HARM.format(1)):
        learn(pipe, tmp_path, **STAGE)
    after = started(pipe)
    assert same(before[bad], after[bad])
    assert (after[good]["proj.weight"] - planted.state_dict()["proj.weight"]).norm() < 0.5 * planted.state_dict()["proj.weight"].norm()


def test_all_specs_that_take_turns_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is found makes the pipeline's own the original, and another one, which was the original before, far from it."""
    own, other = (SLA(share, block=(16, 16)) for share in (0.5, 0.25))
    pipe, found = accelerate(prompt_pipe(), own), random_parameters(own, Shape(1, 2, 16, (1, 8, 8)))
    torch.nn.init.normal_(found.proj.weight, std=10)
    before, context = started(pipe), patches_of(pipe)[0][1].context

    def original(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        spec = context.assignment.spec
        return attention(q, k, v, spec, context.layout, params=found if spec == own else None).detach()

    monkeypatch.setattr(teacher, "_original", original)
    solved = staticmethod(lambda operator, sums: operator.params.load_state_dict(found.state_dict()))
    monkeypatch.setattr(fitting.LeastSquares, "_solve", solved)
    learn(pipe, tmp_path / "one", **STAGE)
    assert all(same(state(found), now) for now in started(pipe).values())
    pipe = accelerate(prompt_pipe(), own)
    context = patches_of(pipe)[0][1].context
    with pytest.warns(UserWarning, match=HARM.format(2)):
        learn(pipe, tmp_path / "two", specs=(own, other), **STAGE)
    after = started(pipe)
    assert all(same(before[name], after[name]) for name in before)


def test_a_stage_that_was_killed_gives_the_same_values_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch)
    pipe = student()
    before = started(pipe)
    with fit_stops(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        learn(pipe, tmp_path, **STAGE | {"checkpoint_every": 1})
    assert not any(same(before[name], now) for name, now in started(pipe).items())
    with pytest.warns(UserWarning, match=HARM.format(2)):
        learn(pipe, tmp_path, **STAGE | {"checkpoint_every": 1})
    assert all(same(before[name], now) for name, now in started(pipe).items())


def test_a_checkpoint_without_start_values_says_that_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As version 0.1.0 wrote them."""
    spoil(monkeypatch)
    pipe = student()
    with fit_stops(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        learn(pipe, tmp_path, **STAGE | {"checkpoint_every": 1})
    for file in tmp_path.glob("parameters-*/state.safetensors"):
        save_file({name: x for name, x in load_file(file).items() if not name.startswith(fitting.STARTED)}, file)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learn(pipe, tmp_path, **STAGE | {"checkpoint_every": 1})
    ours = [str(w.message) for w in caught if str(w.message).startswith("dit_accel:")]
    assert len(ours) == 1
    assert "did not keep the start values: no layer is compared" in ours[0]


def test_forwards_of_all_noise_levels_are_compared() -> None:
    """Also where there are as many runs as are compared: forwards at even distances would be the first of each."""
    context = SimpleNamespace(assignment=SimpleNamespace(of_moments=False))
    for steps in (8, 28):
        run: Any = SimpleNamespace(held_out=range(16 * steps), config=SimpleNamespace(seed=0), patch=SimpleNamespace(context=context))
        chosen = teacher.compared_positions(run)
        assert len(set(chosen)) == teacher.COMPARED
        assert len({position % steps for position in chosen}) >= 6
        assert teacher.compared_positions(run) == chosen
    run.held_out = range(3)
    assert teacher.compared_positions(run) == [0, 1, 2]


def test_forwards_that_run_no_spec_are_not_compared() -> None:
    context = SimpleNamespace(assignment=SimpleNamespace(of_moments=True))
    run: Any = SimpleNamespace(held_out=range(80), config=SimpleNamespace(seed=0), patch=SimpleNamespace(context=context))
    run.held_out_moment, run.runs_at = lambda position: position % 8, lambda moment: moment == 5
    assert teacher.compared_positions(run) == list(range(5, 80, 8))


@pytest.fixture
def second() -> None:
    """The second stage runs."""


def test_a_training_that_does_harm_says_so(tmp_path: Path, second: None) -> None:
    pipe = accelerate(prompt_pipe(), SPECS["attention"])
    with pytest.warns(UserWarning, match=r"the training made the held-out error larger, \S+ before and \S+ after 2 steps.*below 10, or"):
        result = learn(pipe, tmp_path, train="attention", steps=2, learning_rate=10.0)
    assert result.error_after > result.error_before


def test_one_that_helps_says_nothing(tmp_path: Path, second: None) -> None:
    pipe = accelerate(prompt_pipe(), SPECS["attention"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = learn(pipe, tmp_path, prompts=[*PROMPTS], train="attention", steps=6, learning_rate=1e-3)
    assert result.error_after < result.error_before
