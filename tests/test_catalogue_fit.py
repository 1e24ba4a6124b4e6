"""The first stage of a distillation on what the output is linear in: convolutions channel by channel."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import PROMPTS, fit_stops, learn, prompt_pipe, same, state
from helpers import Shape, random_parameters
from torch import Tensor

from dit_accel import CLEAR, SLA, Assignment, AttentionSpec, Fovea, Rule, accelerate, attention
from dit_accel.errors import DistillationError
from dit_accel.finetune import distill as distillation
from dit_accel.finetune import fit as fitting
from dit_accel.finetune import least_squares, teacher
from dit_accel.finetune.session import PARAMETER_STEPS
from dit_accel.method import DepthwiseConv
from dit_accel.patch.state import operators_of, patches_of

CONV = (DepthwiseConv(3),)
SPECS: dict[str, AttentionSpec] = {
    "clear": dataclasses.replace(CLEAR(2.0, tile=(4, 4)), extras=CONV),
    "fovea": dataclasses.replace(Fovea(0.25, tile=(4, 4)), extras=CONV),
    "sla": dataclasses.replace(SLA(0.25, tile=(4, 4)), extras=CONV),
}
STAGE: dict[str, Any] = {"parameter_steps": 8, "parameter_learning_rate": 0.02, "train": "parameters"}
no_second_stage = pytest.mark.usefixtures("_no_second_stage")


@pytest.fixture
def _no_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)


def plant(monkeypatch: pytest.MonkeyPatch, pipe: Any, spec: AttentionSpec) -> Any:
    """Make the original attention what the spec computes at other values of its tensors, which are given back."""
    planted, context = random_parameters(spec, Shape(1, 2, 16, (1, 8, 8))), patches_of(pipe)[0][1].context

    def original(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return attention(q, k, v, spec, context.layout, params=planted).detach()

    monkeypatch.setattr(teacher, "_original", original)
    return planted


@no_second_stage
def test_a_planted_convolution_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(least_squares, "CHANNEL_RIDGE", 1e-9)
    pipe, spec = accelerate(prompt_pipe(), SPECS["clear"]), SPECS["clear"]
    planted = plant(monkeypatch, pipe, spec)
    rows = learn(pipe, tmp_path, **STAGE | {"parameter_steps": 2}).parameter_history
    assert rows[1]["attention"] < 1e-4 * rows[0]["attention"]
    for operator in operators_of(pipe).values():
        for name, value in operator.params.named_parameters():
            torch.testing.assert_close(value.detach(), planted.get_parameter(name).detach(), rtol=1e-3, atol=1e-3)


def test_regressors_are_what_a_step_of_each_number_changes() -> None:
    pipe = accelerate(prompt_pipe(), SPECS["fovea"])
    operator = next(iter(operators_of(pipe).values()))
    asked = {name: p.requires_grad for name, p in operator.params.named_parameters()}
    found: list[list[Tensor]] = []

    def hook(operator: Any, arguments: tuple[Any, ...], out: Tensor) -> None:
        own = list(least_squares._solved_tensors(operator, "least_squares_by_channel").values())
        got = least_squares._regressors(operator, arguments, own)
        assert got is not None
        expected = []
        with torch.no_grad():
            for numbers in (tensor.view(*tensor.shape[:2], -1) for tensor in own):
                for number in range(numbers.shape[2]):
                    numbers[..., number] = 1
                    expected.append(operator.forward(*arguments) - out)
                    numbers.zero_()
        found.append([torch.stack(got), torch.stack(expected)])

    handle = operator.register_forward_hook(hook)
    with torch.no_grad():
        pipe(prompt=PROMPTS[0], num_inference_steps=1, height=128, width=128, output_type="latent")
    handle.remove()
    for got, expected in found:
        assert got.abs().max() > 0.1
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert {name: p.requires_grad for name, p in operator.params.named_parameters()} == asked


@no_second_stage
@pytest.mark.parametrize("name", ["fovea", "sla"])
def test_what_else_a_method_learns_is_found_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A merge's offset by descent, and SLA's projection in turn with the convolution: all together come nearer than each alone."""
    monkeypatch.setattr(least_squares, "CHANNEL_RIDGE", 1e-6)
    monkeypatch.setattr(fitting, "RIDGE", 1e-6)
    ends, spec = {}, SPECS[name]
    for kind, each in {"both": spec, "convolution": dataclasses.replace(spec, rest=None, merge=None)}.items():
        pipe = accelerate(prompt_pipe(), each)
        plant(monkeypatch, pipe, spec)
        rows = learn(pipe, tmp_path / kind, **STAGE | {"parameter_steps": 16}).parameter_history
        ends[kind] = [row["attention"] for row in rows]
    assert sum(ends["both"][-4:]) < 0.1 * sum(ends["both"][:2]) * 2
    assert sum(ends["both"][-4:]) < 0.5 * sum(ends["convolution"][-4:])


@no_second_stage
def test_heads_of_several_specs_have_convolutions_of_their_own(tmp_path: Path) -> None:
    """As no head sees another, each learns what it learns where it is alone; a spec without the tensor takes no part in it."""
    learned = {}
    rules = {
        "first": (Rule(SPECS["clear"], heads=(0,)),),
        "both": (Rule(SPECS["clear"], heads=(0,)), Rule(CLEAR(1.0, tile=(4, 4)), heads=(1,))),
    }
    for name, given in rules.items():
        pipe = accelerate(prompt_pipe(), Assignment(given))
        learn(pipe, tmp_path / name, **STAGE)
        learned[name] = torch.cat([operator.params.get_parameter("conv.weight") for operator in operators_of(pipe).values()], 1)
    assert learned["first"][0].any()
    assert not learned["first"][1].any()
    torch.testing.assert_close(learned["both"], learned["first"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_an_interrupted_fit_resumes_to_the_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settings = STAGE | {"parameter_steps": 5, "checkpoint_every": 1, "steps": 1}
    whole, stopped, resumed = (accelerate(prompt_pipe(), SPECS[name]) for _ in range(3))
    learn(whole, tmp_path / "whole", **settings)
    with fit_stops(monkeypatch, 2), pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **settings)
    learn(resumed, tmp_path / "stopped", **settings)
    assert same(state(resumed.transformer), state(whole.transformer))


def test_sums_of_another_shape_are_refused() -> None:
    solver = fitting.LeastSquares(operators_of(accelerate(prompt_pipe(), SLA(0.25, tile=(4, 4)))))
    tensors = {name: total[0] for name, total in solver.tensors().items()}
    with pytest.raises(DistillationError, match="another version made it; delete it"):
        solver.load(tensors)


def test_a_fit_runs_by_default_where_least_squares_do_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(distillation, "fit", lambda run, progress: asked.append(run.parameter_steps))
    learn(accelerate(prompt_pipe(), SPECS["fovea"]), tmp_path, steps=1, parameter_steps=None)
    assert asked == [PARAMETER_STEPS]
