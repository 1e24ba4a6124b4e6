"""Files of plans and of plans in the making: damaged ones are named, times are those of this machine, and a plan knows its model."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_transformer
from distill_fixtures import CALL, prompt_pipe
from typer.testing import CliRunner

import dit_accel
from dit_accel import Assignment, Fovea
from dit_accel.cli import models, options
from dit_accel.cli.app import app
from dit_accel.errors import ArgumentError, PlanError
from dit_accel.measure.capture import Captured
from dit_accel.method.assignment import read_method
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch import verbs
from dit_accel.patch.anatomy import attention_layers
from dit_accel.patch.fingerprint import known_hash
from dit_accel.planner import candidates, curves, measuring
from dit_accel.planner.record import LayerHeads, Plan

EXAMPLE = Path(__file__).with_name("plan_example.json")
PROMPTS = ["a cat on a blue background", "a panda on a red background"]
SPECS = [None, Fovea(0.05, tile=(4, 4)), Fovea(0.35, tile=(4, 4))]
ARGUMENTS: dict[str, Any] = {"speed": 1.2, "specs": SPECS, "progress": False, **CALL}


# The folder of a plan in the making


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    dit_accel.plan(prompt_pipe(), PROMPTS, folder=folder, **ARGUMENTS)
    return folder


@pytest.mark.parametrize("contents", ["", "[]", "{", "null", "\xff"])
@pytest.mark.parametrize("name", ["settings.json", "errors-*.json"])
def test_a_damaged_file_is_named(name: str, contents: str, finished: Path) -> None:
    (path,) = finished.glob(name)
    whole = path.read_bytes()
    path.write_bytes(contents.encode("latin-1"))
    try:
        with pytest.raises(PlanError, match=rf"{path.name} is damaged: delete it and run again"):
            dit_accel.plan(prompt_pipe(), PROMPTS, folder=finished, **ARGUMENTS)
    finally:
        path.write_bytes(whole)


def test_nothing_is_reused_with_other_settings_after_they_are_deleted(finished: Path) -> None:
    (finished / "settings.json").unlink()
    before = {path.name for path in finished.glob("*.*")}
    dit_accel.plan(prompt_pipe(), PROMPTS, folder=finished, **ARGUMENTS)
    assert {path.name for path in finished.glob("*.*")} == before | {"settings.json"}
    (finished / "settings.json").unlink()
    dit_accel.plan(prompt_pipe(), PROMPTS, folder=finished, **ARGUMENTS, ranges=1)
    assert len(list(finished.glob("curves-*"))) == 3  # of two ranges, and of one


def test_an_error_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = curves.measure

    def broken(*args: Any, **kwargs: Any) -> Any:
        found = measured(*args, **kwargs)
        found.curves["single_transformer_blocks.0.attn"][1, 2] = float("nan")
        return found

    monkeypatch.setattr(measuring, "measure", broken)
    with pytest.raises(PlanError, match=r"the error of .*0\.35.* in single_transformer_blocks\.0\.attn at noise level 1 is not a finite"):
        dit_accel.plan(prompt_pipe(), PROMPTS, **ARGUMENTS)


def test_a_model_whose_numbers_overflow_is_refused() -> None:
    pipe = prompt_pipe()
    pipe.transformer.proj_out.weight.data.fill_(float("inf"))
    with pytest.raises(PlanError, match="the original model's prediction is not finite at noise level 1: load the pipeline in a dtype"):
        dit_accel.plan(pipe, PROMPTS, **ARGUMENTS)


def test_a_verified_error_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_accel.planner.verified.velocity_errors", lambda *_: [0.1, float("nan")])
    with pytest.raises(PlanError, match="the prediction on held-out prompts is not finite with"):
        dit_accel.plan(prompt_pipe(), PROMPTS, **ARGUMENTS)


def test_times_are_of_one_machine_and_list_of_candidates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = measuring.measured_seconds
    monkeypatch.setattr(measuring, "measured_seconds", lambda *a: calls.append(1) or real(*a))

    def run(folder: str) -> None:
        dit_accel.plan(prompt_pipe(), PROMPTS, folder=tmp_path / folder, unit="seconds", **{**ARGUMENTS, "speed": 1.0001})

    monkeypatch.setattr(measuring.Measurements, "gentlest", lambda _: None)  # what is chosen is not of interest
    for count, machine in [(1, {"threads": 1}), (1, {"threads": 1}), (2, {"threads": 2}), (3, {"threads": 1, "gpu": "H100"})]:
        monkeypatch.setattr(measuring, "machine", lambda machine=machine: machine)
        with pytest.raises(PlanError, match="no candidate costs less"):
            run("work")
        assert len(calls) == count
    for path in (tmp_path / "work").glob("times-*.json"):
        path.write_text("[]")
    with pytest.raises(PlanError, match=r"times-.*\.json is damaged: delete it and run again"):
        run("work")


def test_the_original_is_timed_with_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    real = torch.nn.functional.scaled_dot_product_attention

    def attend(q: Any, k: Any, v: Any, mask: Any = None, **arguments: Any) -> Any:
        masks.append(mask)
        return real(q, k, v, mask, **arguments)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    layout = TokenLayout((1, 4, 4), 3)
    bias = torch.tensor([[0.0, 0.0, -torch.inf]])
    x = torch.randn(1, 2, layout.tokens, 8, generator=torch.Generator().manual_seed(0))
    candidates.seconds((None,), Captured(x, x, x, layout, "layer", None, bias))
    expected = torch.zeros(1, 1, 1, layout.tokens)
    expected[..., layout.text_slice] = bias
    assert masks
    assert all(torch.equal(mask, expected) for mask in masks)


# The file of a plan


def written(path: Path, change: Any) -> Path:
    data = json.loads(EXAMPLE.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return path


WRONG: dict[str, tuple[Any, str]] = {
    "candidate": (lambda p: p["chosen"][0][0].__setitem__(0, 999), "chosen must contain places in the 9 candidates, from 0, not 999"),
    "negative": (lambda p: p["chosen"][0][0].__setitem__(0, -1), "chosen must contain places in the 9 candidates, from 0, not -1"),
    "heads": (
        lambda p: p["chosen"][0][0].pop(),
        "chosen must have a list for each of 3 ranges, in it one for each of 6 layers, in it an entry",
    ),
    "layers": (lambda p: p["errors"][0].pop(), "errors must have a list for each of 3 ranges"),
    "ranges": (lambda p: p["ranges"].pop(), "chosen must have a list for each of 2 ranges"),
    "by-range": (lambda p: p["outcome"]["by_range"].pop(), "outcome.by_range must have 3 entries"),
    "order-of-range": (lambda p: p["ranges"][0].update(low=0.9), "a range must have 0 <= low < high <= 1"),
    "unit": (lambda p: p.update(unit="flops"), "unit must be one of multiply-adds, seconds"),
    "nan": (lambda p: p["errors"][0][0].__setitem__(0, float("nan")), "errors must be float, not 'nan'"),
    "below-zero": (lambda p: p["errors"][0][0].__setitem__(0, -1.0), "errors must be >= 0"),
    "scaling": (lambda p: p["scaling"]["rules"][0].update(candidate=9), "a rule of scaling must name one of the candidates and ranges"),
    "asked": (lambda p: p["asked"].update(speed=2.0), "asked must be a budget or a speed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_lengths_and_ranges_of_a_plan_are_checked(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    path = written(tmp_path / "plan.json", lambda data: change(data["plan"]))
    with pytest.raises(ArgumentError, match=f"plan.json contains no plan: {message}"):
        Plan.load(path)


@pytest.mark.parametrize(
    "change", [lambda d: d.update(more=1), lambda d: d.pop("plan"), lambda d: d.update(format="other"), lambda d: d.pop("format")]
)
def test_what_only_looks_like_a_plan_is_no_method(change: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "plan.json", change)
    for read in (read_method, Assignment.load, Plan.load, lambda path: options.parse_any(str(path))):
        with pytest.raises(
            ArgumentError, match=r"plan.json must have the format 'dit_accel plan 1' and the keys format, assignment and plan"
        ):
            read(path)


def test_a_plan_equals_plans_of_its_rules() -> None:
    plan = Plan.load(EXAMPLE)
    other = dataclasses.replace(plan, version="another")
    assert plan == other
    assert hash(plan) == hash(other)
    assert plan != Assignment(plan.rules)


# The model that it was made for


def plan_of(transformer: Any, **changes: Any) -> Plan:
    layers = tuple(LayerHeads(name, module.heads) for name, module in attention_layers(transformer).items())
    plan = Plan.load(EXAMPLE)
    model = dataclasses.replace(plan.model, transformer=type(transformer).__name__, weights=known_hash(transformer))
    rules = Assignment.of(Fovea(0.3, tile=(8, 8))).rules
    return dataclasses.replace(plan, rules=rules, layers=layers, **{"model": model, **changes})


OTHER: dict[str, tuple[Any, str]] = {
    "class": (
        lambda plan: {"model": dataclasses.replace(plan.model, transformer="SD3Transformer2DModel")},
        "it was made for SD3Transformer2DModel, not FluxTransformer2DModel",
    ),
    "heads": (
        lambda plan: {"layers": (LayerHeads(plan.layers[0].name, 4), *plan.layers[1:])},
        r"a model whose transformer_blocks\.0\.attn has 4 heads, not 2",
    ),
    "layers": (lambda plan: {"layers": (LayerHeads("blocks.0", 2), *plan.layers)}, r"a model with a layer blocks\.0, which this one lacks"),
    "weights": (
        lambda plan: {"model": dataclasses.replace(plan.model, weights="0" * 64)},
        "with other weights, or with the same in another",
    ),
}


def test_a_plan_of_the_model_is_accepted() -> None:
    transformer = tiny_transformer()
    plan = plan_of(transformer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (transformer, tiny_transformer()):
            dit_accel.accelerate(model, plan, strict=True)


@pytest.mark.parametrize("case", OTHER)
def test_a_plan_of_another_model_is_told(case: str) -> None:
    change, message = OTHER[case]
    transformer = tiny_transformer()
    plan = plan_of(transformer)
    plan = dataclasses.replace(plan, **change(plan))
    with pytest.raises(ArgumentError, match=rf"the promised error of this plan is not valid here: .*{message}.*, or leave strict out"):
        dit_accel.accelerate(transformer, plan, strict=True)
    assert not any(hasattr(module, "dit_accel") for module in transformer.modules())
    with pytest.warns(UserWarning, match=rf"dit_accel: the promised error of this plan is not valid here: .*{message}"):
        dit_accel.accelerate(transformer, plan)
    assert any(hasattr(module, "dit_accel") for module in transformer.modules())


def test_weights_are_read_for_plans_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verbs, "known_hash", lambda _: pytest.fail("weights were read"))
    transformer = tiny_transformer()
    for method in (Fovea(0.3), Assignment.of(Fovea(0.3))):
        dit_accel.restore(dit_accel.accelerate(transformer, method))
    monkeypatch.undo()
    plan = plan_of(transformer, model=Plan.load(EXAMPLE).model)
    monkeypatch.setattr(verbs, "known_hash", lambda _: pytest.fail("weights were read"))
    dit_accel.restore(dit_accel.accelerate(transformer, Assignment(plan.rules)))
    with pytest.raises(pytest.fail.Exception, match="weights were read"):
        dit_accel.accelerate(transformer, plan)


def test_the_command_takes_a_plan_as_a_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(options.parse_any(str(EXAMPLE)), Plan)
    assert type(options.parse_any(str(Assignment.of(SPECS[1]).save(tmp_path / "rules.json")))) is Assignment  # type: ignore[arg-type]
    pipe = prompt_pipe()
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pipe)
    plan = plan_of(pipe.transformer)
    rows = tuple((0,) * layer.heads for layer in plan.layers)
    plan = dataclasses.replace(plan, chosen=(rows,) * 3, errors=(rows,) * 3)
    path = dataclasses.replace(plan, **OTHER["weights"][0](plan)).save(tmp_path / "plan.json")
    given = ["--method", str(path), "--size", "144x112", "--max-sequence-length", "8", "--strict", "--out", str(tmp_path / "x.png")]
    result = CliRunner().invoke(app, ["generate", "a cat", *given], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 2
    assert "the promised error of this plan is not valid here: it was made for a FluxTransformer2DModel with other weights" in " ".join(
        result.output.split()
    )
