"""Muon for the attention's matrices: what it is, which parameters it moves, that a run under it resumes and is shared as any other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from distill_fixtures import learn, prompt_pipe, same, state
from safetensors.torch import load_file
from test_distill_processes import launch
from torch import nn
from typer.testing import CliRunner

from dit_accel import SLA, DistillConfig, accelerate
from dit_accel.cli import app as cli
from dit_accel.errors import DistillationError
from dit_accel.finetune import distill as distillation
from dit_accel.muon import Muon, orthogonalise

RUN: dict[str, Any] = {
    "steps": 6, "batch_size": 2, "checkpoint_every": 2, "train": "attention", "optimizer": "muon", "learning_rate": 3e-3,
}  # fmt: skip


# The optimizer


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 32), (2, 32, 8)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices, steps=5))
    assert float(values.min()) > 0.5
    assert float(values.max()) < 1.25


@pytest.mark.parametrize("together", [1, 24, 1 << 24], ids=["alone", "alone-exactly", "both"])
def test_one_step_is_the_formula(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    """Matrices of one shape go together and each gets what it would get alone."""
    monkeypatch.setattr("dit_accel.muon.TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    values, gradients = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    parameters = [nn.Parameter(value.clone()) for value in values]
    optimizer = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.5)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()
    for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
        momentum = 0.1 * gradient
        update = orthogonalise((0.1 * gradient + 0.9 * momentum)[None])[0]
        assert torch.allclose(parameter, value * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update, atol=1e-6)
        assert torch.allclose(optimizer.state[parameter]["momentum"], momentum, atol=1e-7)


def test_a_step_that_is_to_be_left_out_changes_nothing() -> None:
    """The optimizer is told by a tensor, as torch's fused ones are, also where the gradient is no number."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    told, other = Muon(parameters, lr=0.1), Muon([nn.Parameter(p.detach().clone()) for p in parameters], lr=0.1)
    mine = other.param_groups[0]["params"]
    for step, left_out in enumerate((0.0, 1.0, 0.0)):
        gradients = [torch.randn(4, 6) for _ in parameters]
        for parameter, same_one, gradient in zip(parameters, mine, gradients, strict=True):
            parameter.grad = gradient * (float("nan") if left_out else 1.0)
            same_one.grad = gradient
        told.found_inf = torch.tensor(left_out)
        told.step()
        if not left_out:
            other.step()
        assert all(torch.equal(a, b) for a, b in zip(parameters, mine, strict=True)), step
        assert all(torch.equal(told.state[a]["momentum"], other.state[b]["momentum"]) for a, b in zip(parameters, mine, strict=True))


# What it trains


def test_matrices_are_its_own_and_all_else_is_adamw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[dict[str, nn.Parameter], Any]] = []
    real = distillation.make_optimizers

    def watched(parameters: Any, *others: Any) -> Any:
        made.append((parameters, real(parameters, *others)))
        return made[-1][1]

    monkeypatch.setattr(distillation, "make_optimizers", watched)
    pipe = accelerate(prompt_pipe(), tiny.SPARSE)  # its projections are matrices of the method's own
    learn(pipe, tmp_path, **RUN | {"steps": 1, "weight_decay": 0.25, "parameter_learning_rate": 1e-4})
    ((parameters, optimizers),) = made
    groups = [(type(optimizer), group) for optimizer in optimizers for group in optimizer.param_groups]
    for name, parameter in parameters.items():
        ((kind, group),) = [(kind, group) for kind, group in groups if any(parameter is p for p in group["params"])]
        own = ".dit_accel.params." in name
        assert (kind is Muon) == (parameter.ndim == 2 and not own), name
        assert (group["initial_lr"], group["weight_decay"]) == (1e-4 if own else 3e-3, 0.25), name
    assert {kind for kind, _ in groups} == {Muon, torch.optim.AdamW}
    assert any(parameter.ndim == 2 and ".dit_accel.params." in name for name, parameter in parameters.items())


def test_weights_move_by_orthogonal_updates_and_the_error_falls(tmp_path: Path) -> None:
    pipe = tiny.student("attention")
    before = state(pipe.transformer)
    settings = RUN | {"steps": 1, "max_grad_norm": 1e9}
    learn(pipe, tmp_path / "one", **settings)
    moves = {n: x - before[n] for n, x in state(pipe.transformer).items() if n.endswith(".attn.to_v.weight")}
    for name, move in moves.items():
        values = torch.linalg.svdvals(move / (3e-3 * 0.2 * max(move.shape) ** 0.5))
        assert 0.9 < float(values[0]) < 1.3, name  # AdamW's first step is ±the rate everywhere
        assert float(values[: len(values) // 2].min()) > 0.3, name
    result = learn(tiny.student("attention"), tmp_path / "many", **RUN | {"steps": 24})
    assert result.error_after < 0.97 * result.error_before


# It resumes


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_a_run_resumes_to_the_bit(tmp_path: Path, half: bool) -> None:
    spec = SLA(0.25, block=(16, 16))
    whole, stopped, resumed = (accelerate(tiny.half_pipe() if half else prompt_pipe(), spec) for _ in range(3))
    expected = learn(whole, tmp_path / "whole", **RUN)
    tiny.stop_training(stopped, 7)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **RUN)
    got = learn(resumed, tmp_path / "stopped", **RUN)
    assert tiny.untimed(got) == dataclasses.replace(tiny.untimed(expected), resumed_from=2)
    assert same(state(resumed.transformer), state(whole.transformer))


def test_another_optimizer_is_another_run(tmp_path: Path) -> None:
    learn(tiny.student("attention"), tmp_path, **RUN)
    with pytest.raises(DistillationError, match=r"another run.*optimizer"):
        learn(tiny.student("attention"), tmp_path, **RUN | {"optimizer": "adamw"})


# Two processes in the place of one: each leaves what it has learned.
CHILD = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from distill_fixtures import learn, state, student
from safetensors.torch import save_file
from test_distill_muon import RUN
torch.set_num_threads(1)
PartialState(cpu=True)
folder, rank = Path(sys.argv[1]), PartialState().process_index
learn(pipe := student("attention"), folder / "run", **RUN)
save_file({k: v.contiguous() for k, v in state(pipe.transformer).items()}, folder / f"{rank}.safetensors")
PartialState().destroy_process_group()
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    launch(tmp_path, child=CHILD)
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    learn(pipe := tiny.student("attention"), tmp_path / "alone", **RUN)
    start, moved = state(prompt_pipe().transformer), 0
    for name, alone in state(pipe.transformer).items():
        step = float((alone - start[name]).norm()) if name in start else 0.0
        moved += step > 0
        assert float((first[name] - alone).norm()) <= 1e-3 * step, name
    assert moved > 10


# What is refused


@pytest.mark.parametrize("value", ["Muon", "sgd", None, True])
def test_an_unknown_optimizer_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="optimizer must be 'adamw' or 'muon'") as raised:
        DistillConfig(optimizer=value, train="attention")
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("train", ["lora", "parameters"])
def test_muon_wants_the_attentions_weights(train: Any) -> None:
    with pytest.raises(ValueError, match=f"whose matrices it trains, not train='{train}'"):
        DistillConfig(optimizer="muon", train=train)


def test_the_command_takes_it(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat on a blue background\na panda on a red background\n")
    arguments = ["distill", "--prompts", tmp_path / "prompts.txt", "--method", "clear:2", "--optimizer", "muon", "--out", tmp_path / "out"]
    small = ["--steps", "1", "--sampling-steps", "1", "--size", "256x256"]
    refused = CliRunner().invoke(cli.app, [str(a) for a in [*arguments, *small]])
    assert refused.exit_code == 2
    assert "not train='lora'" in refused.stderr
    more = ["--train", "attention", "--steps", "2", "--evaluate-every", "1", "--flow-weight", "0.5"]
    done = CliRunner().invoke(cli.app, [str(a) for a in [*arguments, *small, *more]])
    assert done.exit_code == 0, done.output
    config = json.loads((tmp_path / "out" / "adapter" / "dit_accel_config.json").read_text())["training"]["config"]
    assert (config["optimizer"], config["evaluate_every"], config["flow_weight"]) == ("muon", 1, 0.5)
    rows = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert all("held_out_error" in row for row in rows)
    assert ["flow" in row for row in rows] == [False, True, True]
    assert (tmp_path / "out" / "run" / "curve.png").is_file()
