"""What only chooses blocks is fitted by a loss of its own, a few parts start from the first tokens that are recorded, and a search."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import fit_stops, learn, prompt_pipe, same, state, stop_training
from helpers import Shape
from test_catalogue_patterns import under_mask
from test_catalogue_scores import SHAPES, TILE, call_of, every_shape, image_tokens, mask_of, random_weight, scored, tiles_of
from test_parts import instances
from torch import Tensor
from typer.testing import CliRunner

from dit_accel import Assignment, AttentionSpec, Rule, accelerate, attention
from dit_accel.cli import app as cli
from dit_accel.finetune import distill as distillation
from dit_accel.finetune.session import PARAMETER_STEPS
from dit_accel.method import (
    Among,
    Columns,
    DiscBlocks,
    ErrorProduct,
    Extra,
    Gate,
    KeyWeight,
    Linear,
    Mass,
    MeanProduct,
    Merge,
    NormPower,
    Pattern,
    Pooled,
    Readout,
    Rest,
    Routed,
    Score,
    Stripes,
    Taylor,
    TopK,
)
from dit_accel.method.parts import part_types
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call
from dit_accel.patch.state import operators_of

KEPT: dict[str, Any] = {"gate": TopK(0.3, score=Gate()), "mass-gate": TopK(0.3, score=Gate("mass")), "columns": Columns(0.3)}
STARTING: dict[str, Rest] = {"taylor": Linear(Taylor(4)), "power": Linear(NormPower()), "routed": Routed(3)}
STAGE: dict[str, Any] = {"parameter_steps": 12, "parameter_learning_rate": 0.3, "train": "parameters", "steps": 1}


def choosing(name: str) -> AttentionSpec:
    return AttentionSpec((KEPT[name],), Pooled(), Mass(), TILE, (16, 16))


def starting(name: str) -> AttentionSpec:
    return AttentionSpec((TopK(0.3),), STARTING[name], Mass(), TILE, (16, 16))


def learned(pipe: Any) -> dict[str, Tensor]:
    return {f"{layer}.{name}": x.detach().clone() for layer, op in operators_of(pipe).items() for name, x in op.params.named_parameters()}


# Choices


@every_shape
@pytest.mark.parametrize("name", ["gate", "columns"])
def test_the_loss_is_the_divergence_from_what_blocks_are_worth(name: str, shape: Shape) -> None:
    part: Any = KEPT[name].score if name == "gate" else KEPT[name]
    values = {"gate.weight": random_weight(shape)} if name == "gate" else {"columns.weight": torch.ones(shape.heads, shape.head_dim)}
    call = call_of(shape, KEPT[name], None, values)
    rows = (
        [round(i) for i in torch.linspace(0, len(call.q_blocks.count) - 1, 16).tolist()] if len(call.q_blocks.count) > 16 else slice(None)
    )
    whole, (_, k, _), scale = Gate().goal(call), image_tokens(shape), shape.head_dim**-0.5
    goal = whole[:, rows] if name == "gate" else whole[:, rows].mean(1, keepdim=True)
    torch.testing.assert_close(goal.sum(-1), torch.ones_like(goal[..., 0]))
    if name == "gate":
        logits = scale * scored(shape, part, None, values)[:, rows]
    else:
        share = (scale * scored(shape, part.score)).softmax(-1).mean(1, keepdim=True)
        logits = share.log() + torch.stack([k[:, j].mean(1) for j in tiles_of(shape)], 1).sum(-1)[:, None]
    expected = (goal * (goal.clamp_min(1e-300) / logits.softmax(-1)).log()).sum(-1).mean()
    torch.testing.assert_close(part.loss(call), expected, rtol=1e-9, atol=1e-12)
    assert expected > 0.01


@pytest.mark.parametrize("name", KEPT)
def test_the_first_stage_fits_it_and_shows_the_held_out_loss(name: str, tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), choosing(name))
    before = learned(pipe)
    result = learn(pipe, tmp_path, **STAGE)
    rows = result.parameter_history
    assert result.choice_loss == (rows[0]["held_out_choice_before"], rows[-1]["held_out_choice"])
    assert all(row["choice"] > 0 for row in rows)
    assert rows[-1]["held_out_choice"] < 0.98 * rows[0]["held_out_choice_before"]
    assert ["held_out_choice" in row for row in rows] == [False] * 11 + [True]
    changed = [key for key, value in learned(pipe).items() if not torch.equal(value, before[key])]
    assert [key for key in changed if "gate.weight" in key or "columns.weight" in key]
    assert (tmp_path / "parameters.jsonl").read_text().count("held_out_choice") == 2


@pytest.mark.parametrize("name", ["gate", "columns"])
def test_a_first_stage_runs_by_default_where_it_alone_can_fit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(distillation, "fit", lambda run, progress: asked.append(run.parameter_steps))
    learn(accelerate(prompt_pipe(), choosing(name)), tmp_path, steps=1, parameter_steps=None)
    assert asked == [PARAMETER_STEPS]


def test_a_number_summed_over_channels_moves_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of AdamW moves every number by its rate."""
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)
    pipe = accelerate(prompt_pipe(), AttentionSpec((TopK(0.3),), Pooled(), Mass("query"), TILE, (16, 16)))
    learn(pipe, tmp_path, **STAGE | {"parameter_steps": 1, "parameter_learning_rate": 0.16})
    moved = {name.rsplit(".", 1)[-1]: value.abs() for name, value in learned(pipe).items()}
    torch.testing.assert_close(moved["offset"], torch.full_like(moved["offset"], 0.16), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["offset_query"], torch.full_like(moved["offset_query"], 0.01), rtol=1e-3, atol=0)


# Start values


def rest_call(shape: Shape, rest: Rest) -> Any:
    spec = AttentionSpec((TopK(0.3),), rest, Mass(), TILE, (16, 16))
    values = spec.start_values(heads=shape.heads, head_dim=shape.head_dim)
    return image_call(*shape.inputs(torch.float64), shape.layout, make_plan(spec, shape.layout, torch.device("cpu")), values, 0.25)


def by_head(shape: Shape) -> list[Tensor]:
    """q and k of all samples `[H, B·N, D]`."""
    return [x.unflatten(0, (-1, shape.heads)).transpose(0, 1).flatten(1, 2) for x in image_tokens(shape)[:2]]


@every_shape
def test_taylors_start_is_the_best_form_of_its_rank(shape: Shape) -> None:
    """What it leaves of all products q·k, in the mean square, are the singular values that were dropped."""
    found = Taylor(4).start(rest_call(shape, Linear(Taylor(4))))
    for head, (q, k) in enumerate(zip(*by_head(shape), strict=True)):
        products = q @ k.mT
        left = products - (q @ found["taylor.q"][head].mT) @ (k @ found["taylor.k"][head].mT).mT
        dropped = torch.linalg.svdvals(products)[4:].square().sum()
        torch.testing.assert_close(left.square().sum(), dropped, rtol=1e-3, atol=0)


@every_shape
def test_the_powers_start_is_the_length_of_the_queries(shape: Shape) -> None:
    found = NormPower().start(rest_call(shape, Linear(NormPower())))
    length = by_head(shape)[0].norm(dim=-1)
    torch.testing.assert_close(found["norm_power.middle"], length.mean(-1))
    torch.testing.assert_close(1 / found["norm_power.rate"], length.std(-1, correction=0))


def test_routes_start_as_the_centres_of_the_keys() -> None:
    """Keys around three directions: those of a direction have a state of their own."""
    shape = Shape(1, 1, 16, (1, 12, 12))
    call, kind = rest_call(shape, Routed(3)), torch.arange(144) % 3
    call.k.mul_(0.1).add_(3 * torch.eye(16, dtype=torch.float64)[kind])
    chosen = (call.k[0] @ Routed(3).start(call)["routes"][0].mT).argmax(-1)
    states = {(int(kind[i]), int(chosen[i])) for i in range(144)}
    assert len(states) == 3
    assert len({state for _, state in states}) == 3


@pytest.mark.parametrize("name", STARTING)
def test_a_distillation_starts_from_the_first_forward(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)
    pipe, part = accelerate(prompt_pipe(), starting(name)), next(p for p in starting(name).parts() if p.starts)
    seen: list[dict[str, Tensor]] = []
    real = type(part).start
    monkeypatch.setattr(type(part), "start", lambda self, call: seen.append(real(self, call)) or seen[-1])
    learn(pipe, tmp_path / "a", parameter_steps=0)
    operators = list(operators_of(pipe).values())
    assert len(seen) == len(operators) == 2
    for operator, values in zip(operators, seen, strict=True):
        for key, value in values.items():
            torch.testing.assert_close(operator.params.get_parameter(key).detach(), value.float())
    with torch.no_grad():
        for operator in operators:
            for key in seen[0]:
                operator.params.get_parameter(key).mul_(0.5)
    before = learned(pipe)
    learn(pipe, tmp_path / "b", parameter_steps=0)  # what was learned stays
    assert same(learned(pipe), before)


@pytest.mark.parametrize("low", [True, False])
def test_a_part_of_one_noise_range_starts_too(low: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever forward is drawn first, the start values are those of one that runs the part."""
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)
    fovea = AttentionSpec((TopK(0.3),), Pooled(), Mass(), TILE, (16, 16))
    ranges = [(0.0, 0.7), (0.7, 1.0)]
    rules = tuple(Rule(spec, noise=noise) for spec, noise in zip((starting("routed"), fovea), ranges if low else ranges[::-1], strict=True))
    pipe = accelerate(prompt_pipe(), Assignment(rules))
    learn(pipe, tmp_path, parameter_steps=0)
    routes = [x for name, x in learned(pipe).items() if name.endswith("routes")]
    assert len(routes) == 2
    assert all(bool(x.any()) for x in routes)


# A killed run


@pytest.mark.parametrize("name", ["gate", "columns", *STARTING])
def test_an_interrupted_run_resumes_to_the_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = starting(name) if name in STARTING else choosing(name)
    settings = STAGE | {"parameter_steps": 4, "checkpoint_every": 2, "steps": 3}
    whole, stopped, again, resumed = (accelerate(prompt_pipe(), spec) for _ in range(4))
    learn(whole, tmp_path / "whole", **settings)
    with fit_stops(monkeypatch, 3), pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **settings)
    stop_training(again, 2)
    with pytest.raises(KeyboardInterrupt):
        learn(again, tmp_path / "stopped", **settings)
    learn(resumed, tmp_path / "stopped", **settings)
    assert same(state(resumed.transformer), state(whole.transformer))


# A search among places


@every_shape
@pytest.mark.parametrize("score", [MeanProduct(), ErrorProduct()], ids=["product", "error"])
def test_the_best_of_a_patterns_blocks_are_kept(score: Score, shape: Shape) -> None:
    pattern, place = Stripes(span=0), AttentionSpec((Stripes(span=0),), order=TILE, block=(16, 16))
    plan = make_plan(place, shape.layout, torch.device("cpu"))
    candidates = plan.static.kept(len(plan.k_blocks.count))
    scores = scored(shape, score)
    count = max(1, int(0.4 * scores.shape[-1] + 1e-9))
    best = scores.masked_fill(~candidates, -torch.inf).topk(count, -1)
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best.indices, best.values > -torch.inf)
    spec = AttentionSpec((Among(0.4, pattern, score),), order=TILE, block=(16, 16))
    with torch.no_grad():
        found = attention(*shape.inputs(torch.float64), spec, shape.layout)
    torch.testing.assert_close(found, under_mask(shape.inputs(torch.float64), mask_of(kept, shape), shape.layout), rtol=1e-9, atol=1e-9)


def test_a_search_among_all_is_a_choice_of_the_best() -> None:
    shape = SHAPES["11x14-text-5"]
    specs = [AttentionSpec((keep,), Pooled(), Mass(), TILE, (16, 16)) for keep in (Among(0.3, DiscBlocks(100.0)), TopK(0.3))]
    first, second = (attention(*shape.inputs(torch.float64), spec, shape.layout) for spec in specs)
    torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)


# The common frame


def test_every_part_of_a_method_says_what_it_holds_weighs_or_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    result = CliRunner().invoke(cli.app, ["info", "--method", "fovea:order=1", "--method", "sla:0.1"])
    assert result.exit_code == 0, result.output
    for text in ("4 mean keys and values of each block and Cov(v, k)", "Σ φ(k) vᵀ and Σ φ(k) of each block, φ = softmax", "4,160"):
        assert text in result.output
    for slot in (Pattern, Rest, Merge, KeyWeight, Readout, Extra):
        for name, kind in part_types(slot).items():
            if kind.__module__.startswith("dit_accel."):
                assert any(next(instances(kind)).frame), name


def test_a_method_is_shown_alone() -> None:
    result = CliRunner().invoke(cli.app, ["info", "--method", "fovea", "--model", "builtin"])
    assert result.exit_code == 2
    assert "--method shows a method alone: leave --model and --adapter out" in result.stderr
