"""A training that does harm: the first stage gives layers their start values back, the second says so."""

import warnings
from pathlib import Path
from typing import Any

import pytest
from distill_fixtures import PROMPTS, SPECS, fit_stops, learn, perturb, prompt_pipe, same, state
from helpers import Shape, random_parameters
from torch import Tensor

from dit_accel import accelerate, attention
from dit_accel.finetune import distill as distillation
from dit_accel.finetune import fit as fitting
from dit_accel.finetune import teacher
from dit_accel.patch.state import operators_of, patches_of

STAGE: dict[str, Any] = {"parameter_steps": 4, "train": "parameters", "steps": 1, "learning_rate": 1e-9, "parameter_learning_rate": 1e-9}
HARM = r"the first stage left {} of 2 layers further from the original's attention on held-out prompts \(mean squared error"


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
