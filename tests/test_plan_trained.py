"""Plans whose candidates learn, with what an adapter has learned."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import CALL, draw, learn, perturb, prompt_pipe, same, state
from typer.testing import CliRunner

import dit_accel
from dit_accel import Assignment, AttentionSpec, Fovea, Rule
from dit_accel.cli import models
from dit_accel.cli.app import app
from dit_accel.errors import AdapterError, ArgumentError, PlanError
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.method import TopK
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of
from dit_accel.planner import measuring, trained
from dit_accel.planner.record import Plan
from dit_accel.planner.trained import Trained
from dit_accel.planner.work import Work

PROMPTS = ["a cat on a blue background", "a panda on a red background", "a frog left of a cactus"]
LEARNS = Fovea(0.3, tile=(4, 4), conv=3)
TILES = AttentionSpec((TopK(0.3),), order=LEARNS.order, block=LEARNS.block)  # learns nothing
SPECS = (None, TILES, LEARNS, replace(LEARNS, keep=Fovea(0.6, tile=(4, 4)).keep))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolution that is far from nothing."""
    pipe = dit_accel.accelerate(prompt_pipe(), LEARNS)  # nothing at start
    perturb(pipe)
    return dit_accel.save_adapter(pipe, tmp_path_factory.mktemp("trained") / "conv", training={"steps": 1})


def measured(pipe: Any, folder: Path, trained: Trained | None) -> measuring.Measurements:
    request = measuring.Request(pipe, tuple(PROMPTS[:2]), tuple(PROMPTS[2:]), SPECS, "multiply-adds", 2, 0, False, CALL, trained)
    return measuring.measured(request, Work.begin(folder, request.settings()))


def test_candidates_are_measured_with_what_was_learned(adapter: Path, tmp_path: Path) -> None:
    pipe = prompt_pipe()
    before = state(pipe.transformer)
    start, found = measured(pipe, tmp_path / "start", None), measured(pipe, tmp_path / "trained", Trained.read(pipe.transformer, adapter))
    for name, own in found.curves.items():
        assert (own[..., :2] == start.curves[name][..., :2]).all()
        assert (own[..., 2:] > start.curves[name][..., 2:]).all()
    assert found.uniform(2) > 1.2 * start.uniform(2)
    chosen = tuple(tuple((2, 3) for _ in found.heads) for _ in found.ranges)  # the heads of a layer differ
    errors = found.verify(chosen)
    assert same(state(pipe.transformer), before)
    dit_accel.load_adapter(pipe, adapter, spec=found.assignment(chosen))
    with always(pipe.transformer):
        assert errors == velocity_errors(pipe, found.held_out.forwards, found.held_out.moments)
    dit_accel.restore(pipe)
    assert min(errors) > max(start.verify(chosen))


def made(adapter: Path, folder: Path | None = None, **more: Any) -> Plan:
    arguments = {"speed": 1.3, "specs": SPECS[2:], "trained": adapter, "folder": folder, "progress": False, **CALL}
    return dit_accel.plan(prompt_pipe(), PROMPTS, **(arguments | more))


def test_a_plan_runs_with_its_adapter(adapter: Path, tmp_path: Path) -> None:
    plan = made(adapter, tmp_path / "work")
    assert plan.trained is not None
    assert plan.trained.adapter == "conv"
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert (loaded, loaded.trained) == (plan, plan.trained)
    pipe = prompt_pipe()
    with pytest.warns(UserWarning, match=r"what the adapter conv has learned; load both, load_adapter\(pipe, 'conv', spec=plan\)"):
        dit_accel.accelerate(pipe, loaded)
    start = draw(dit_accel.restore(pipe)), draw(dit_accel.accelerate(pipe, Assignment(loaded.rules)))
    dit_accel.restore(pipe)
    with pytest.raises(ArgumentError, match="made with what the adapter conv has learned"):
        dit_accel.accelerate(pipe, loaded, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        dit_accel.load_adapter(pipe, adapter, spec=loaded, strict=True)
    picture = draw(pipe)
    assert not any(torch.equal(picture, other) for other in start)
    dit_accel.save_adapter(pipe, tmp_path / "both")
    assert torch.equal(draw(dit_accel.load_adapter(prompt_pipe(), tmp_path / "both")), picture)
    with pytest.raises(PlanError, match="contains the work on a plan with other trained: name another folder"):
        made(adapter, tmp_path / "work", trained=None)


def test_its_specs_are_among_the_default_candidates(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"the adapter conv is of .*, whose order is not that of the default candidates"):
        made(adapter, specs=None)
    spec = Fovea(blocks=1, conv=3)
    dit_accel.save_adapter(dit_accel.accelerate(prompt_pipe(), spec), tmp_path / "tiles")
    plan = made(tmp_path / "tiles", specs=None, speed=1.05, height=256, width=256)
    assert [candidate.spec for candidate in plan.candidates][-1] == spec
    assert len(plan.candidates) > 4


def test_what_the_adapter_lacks_keeps_its_start_values(tmp_path: Path) -> None:
    """A candidate of another method than the adapter's is measured untrained, and loads so."""
    first, pipe = Fovea(0.3, tile=(4, 4)), prompt_pipe()
    perturb(dit_accel.accelerate(pipe, first))
    dit_accel.save_adapter(pipe, tmp_path / "offset")
    plan = made(tmp_path / "offset", specs=(first, LEARNS))
    pipe = dit_accel.load_adapter(prompt_pipe(), tmp_path / "offset", spec=Assignment((Rule(first), Rule(LEARNS, heads=(0,)))))
    for operator in operators_of(pipe).values():
        assert operator.params.get_parameter("offset").abs().min() > 0
        assert not operator.params.get_parameter("conv.weight").any()
    assert plan.trained is not None
    known = Trained.read(prompt_pipe().transformer, tmp_path / "offset")
    assert [known.serves(Assignment((Rule(spec),))) for spec in (TILES, first, LEARNS)] == [False, True, True]


def other_adapter(folder: Path, spec: AttentionSpec = LEARNS, **arguments: Any) -> Path:
    return dit_accel.save_adapter(dit_accel.accelerate(prompt_pipe(), spec, **arguments), folder)


def test_what_can_not_be_used_is_refused(adapter: Path, tmp_path: Path) -> None:
    lora = dit_accel.accelerate(prompt_pipe(), LEARNS)
    learn(lora, tmp_path / "run", train="lora", steps=1)
    dit_accel.save_adapter(lora, tmp_path / "lora")
    other_adapter(tmp_path / "single", layers=lambda name, _: name.startswith("single"))
    other_adapter(tmp_path / "wide", Fovea(0.3, tile=(4, 4), conv=5))
    refused = {
        "lora": r"changes a LoRA of the attention's projections too.*distilled with train='parameters'",
        "single": r"transformer_blocks.0.attn requires offset of the shape \(2,\), which the adapter in single has for other layers alone",
        "wide": r"which the adapter in wide has in the shape \(2, 16, 1, 5, 5\): name specs that it was",
        "missing": "neither a folder made by save_adapter nor a hub id",
    }
    for name, message in refused.items():
        with pytest.raises((PlanError, AdapterError), match=message):
            made(tmp_path / name, tmp_path / "work")
    with pytest.raises(PlanError, match="nothing that the adapter conv has learned is of a candidate"):
        made(adapter, specs=SPECS[:2])
    with pytest.raises(ArgumentError, match="trained must be the folder or the hub id of an adapter, not 5"):
        made(adapter, trained=5)
    assert not (tmp_path / "work").exists()  # nothing was drawn


def test_a_plan_is_refused_with_another_adapter(adapter: Path, tmp_path: Path) -> None:
    plan, pipe = made(adapter), prompt_pipe()
    before = state(pipe.transformer)
    with pytest.raises(AdapterError, match="the plan was made with another adapter than that in"):
        dit_accel.load_adapter(pipe, other_adapter(tmp_path / "other"), spec=plan)
    wide = Assignment((Rule(Fovea(0.3, tile=(4, 4), conv=5)),))
    with pytest.raises(AdapterError, match=r"conv.weight of the shape \(2, 16, 1, 5, 5\), which the adapter in .* has in the shape"):
        dit_accel.load_adapter(pipe, adapter, spec=wide)
    with pytest.raises(AdapterError, match=r"nothing that the adapter in .* has learned is of TopK"):
        dit_accel.load_adapter(pipe, adapter, spec=Assignment((Rule(TILES),)))
    (tmp_path / "attn_weights.safetensors").write_bytes(b"")
    with pytest.raises(AdapterError, match="an assignment requires an adapter that save_adapter wrote"):
        dit_accel.load_adapter(pipe, tmp_path / "attn_weights.safetensors", spec=plan)
    assert same(state(pipe.transformer), before)


def test_a_plan_of_start_values_says_so_with_an_adapter(adapter: Path, tmp_path: Path) -> None:
    plan, pipe = made(adapter, trained=None), prompt_pipe()
    assert plan.trained is None
    before = state(pipe.transformer)
    with pytest.raises(ArgumentError, match=r"was made without what the adapter in .*conv has learned; make it with trained="):
        dit_accel.load_adapter(pipe, adapter, spec=plan, strict=True)
    assert same(state(pipe.transformer), before)
    with pytest.warns(UserWarning, match="the promised error of this plan is not valid here: it was made without what"):
        dit_accel.load_adapter(pipe, adapter, spec=plan)


def test_a_plan_names_its_adapter_as_it_is_loaded(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder by its own name, wherever the program runs, and all of an id on the hub."""
    transformer = prompt_pipe().transformer
    monkeypatch.chdir(adapter)
    assert Trained.read(transformer, ".").record.adapter == "conv"
    monkeypatch.setattr(trained, "local_folder", lambda _: adapter)
    assert Trained.read(transformer, "someone/their-adapter").record.adapter == "someone/their-adapter"


def test_the_command_does_not_write_over_its_adapter(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    folder = other_adapter(tmp_path / "plan-adapter")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = ["plan", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "plan.json", "--trained", folder]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 2
    assert "is --trained itself: name another --out" in result.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_the_command_writes_an_adapter(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, out = prompt_pipe(), tmp_path / "plan.json"
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pipe)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    words = ["plan", "--prompts", tmp_path / "prompts.txt", "--size", "144x112", "--steps", 2, "--max-sequence-length", 8, "--out", out]
    words += ["--method", "fovea:0.3,conv=3,tile=4x4", "--speed", 1.3, "--trained", adapter]
    before = state(pipe.transformer)
    result = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    assert same(state(pipe.transformer), before)
    assert "plan-adapter" in result.output
    config = json.loads((tmp_path / "plan-adapter" / "dit_accel_config.json").read_text())
    plan = Plan.load(out)
    assert config["training"] == {"steps": 1}
    assert Assignment.from_dict(config["assignment"]) == Assignment(plan.rules)
    expected = draw(dit_accel.load_adapter(prompt_pipe(), adapter, spec=plan))
    assert torch.equal(draw(dit_accel.load_adapter(prompt_pipe(), tmp_path / "plan-adapter")), expected)
    files = {path.name: path.read_bytes() for path in (tmp_path / "plan-adapter").iterdir()}
    words = [*words[: words.index("--method")], "--method", "fovea:0.3,tile=4x4", "--budget", 5, "--folder", tmp_path / "other"]
    result = CliRunner().invoke(app, list(map(str, words)))
    assert result.exit_code == 0, result.output
    assert "plan-adapter, which was there before, is not of this plan: run" in " ".join(result.stderr.split())
    assert {path.name: path.read_bytes() for path in (tmp_path / "plan-adapter").iterdir()} == files
