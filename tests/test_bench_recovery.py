"""`dit-accel bench recovery`: what a training of so many minutes brings back, by method and by what is trained, at toy scale."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from distill_fixtures import CALL, PROMPTS, same, state
from PIL import Image
from test_cli import make_tiny
from typer.testing import CliRunner

from dit_accel import CLEAR, SLA, Fovea, accelerate
from dit_accel.cli import app as cli
from dit_accel.finetune import curve
from dit_accel.finetune import session as runs
from dit_accel.finetune.data.collect import Samples
from dit_accel.finetune.velocity import velocity_error
from dit_accel.measure import recovery as bench_recovery
from dit_accel.measure.evaluation import draw
from dit_accel.measure.recovery import Recovery
from dit_accel.measure.similarity import compare
from dit_accel.patch.modes import always
from dit_accel.patch.state import patches_of

METHODS = {"clear:2": CLEAR(2.0), "sla:0.25": SLA(0.25, block=(16, 16))}  # without parameters of its own, and with
SECONDS = 12  # steps of a second fit the minutes


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step takes a second."""
    now = iter(range(1_000_000))
    monkeypatch.setattr(runs.time, "perf_counter", lambda: float(next(now)))


def recovery(folder: Path, **settings: Any) -> Recovery:
    base: dict[str, Any] = {
        "pipe": tiny.picture_pipe(), "prompts": PROMPTS[:2], "held_out": PROMPTS[2:], "pictures": PROMPTS[2:], "minutes": SECONDS / 60,
        "call": CALL, "seed": 0, "optimizer": "adamw", "folder": folder / "runs",
    }  # fmt: skip
    return Recovery(**base | settings)


def bench(folder: Path, methods: Any = METHODS, trains: Any = ("parameters", "lora", "attention"), **settings: Any) -> dict[str, Any]:
    return bench_recovery.bench_recovery(recovery(folder, **settings), methods, trains, out=folder / "out.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        now = iter(range(1_000_000))
        patch.setattr(runs.time, "perf_counter", lambda: float(next(now)))
        return bench(folder), folder


def rows_of(record: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["method"], row["train"]): row for row in record["rows"]}


def test_every_combination_has_a_row(whole: tuple[dict[str, Any], Path]) -> None:
    record, folder = whole
    assert json.loads((folder / "out.json").read_text()) == json.loads(json.dumps(record))
    rows = rows_of(record)
    assert list(rows) == [(name, train) for name in METHODS for train in ("parameters", "lora", "attention")]
    assert rows["clear:2", "parameters"]["impossible"] == "the method has no parameters"
    assert [key for key, row in rows.items() if "impossible" in row] == [("clear:2", "parameters")]


def test_steps_are_as_many_as_fit_the_minutes(whole: tuple[dict[str, Any], Path]) -> None:
    for (name, _), row in rows_of(whole[0]).items():
        if "impossible" not in row:
            fitted = 6 if name == "sla:0.25" else 0  # its 48 steps would take the whole time: half of it is theirs
            assert (row["parameter_steps"], row["steps"]) == (fitted, SECONDS - fitted)
            assert row["minutes"] == pytest.approx(SECONDS / 60)


def test_errors_and_the_curve_are_the_trainings_own(whole: tuple[dict[str, Any], Path]) -> None:
    record, folder = whole
    held_out = Samples(folder / "runs" / "held-out")
    for (name, train), row in rows_of(record).items():
        if "impossible" in row:
            continue
        pipe = accelerate(tiny.picture_pipe(), METHODS[name])
        with always(pipe):
            assert row["error_untrained"] == pytest.approx(velocity_error(pipe, held_out), rel=1e-5)
        assert row["recovered"] == pytest.approx(1 - row["error_after"] / row["error_untrained"])
        assert (row["error_fitted"] is None) == (name != "sla:0.25")
        curve = row["curve"]
        ends = {"step": row["steps"], "minutes": row["minutes"], "recovered": row["recovered"]}
        assert (curve[0], curve[-1]) == ({"step": 0, "minutes": 0, "recovered": 0}, ends)
        assert len(curve) >= 7
        run = folder / "runs" / f"{name.replace(':', '-')}-{train}"
        assert {path.name for path in run.iterdir()} >= {"log.jsonl", "curve.png", "steps.json"}
        assert not list(run.glob("checkpoint-*"))
    assert rows_of(record)["clear:2", "attention"]["recovered"] > 0.01


def test_the_floor_and_the_pictures_are_of_the_same_noise(whole: tuple[dict[str, Any], Path]) -> None:
    record, folder = whole
    pipe = tiny.picture_pipe()
    original = draw(pipe, PROMPTS[2], 0, CALL)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = draw(pipe, PROMPTS[2], 0, CALL)
        error = velocity_error(pipe, Samples(folder / "runs" / "held-out"))
    assert record["floor"]["psnr"] == pytest.approx(compare(rounded, original)["psnr"], abs=1e-3)
    assert record["floor"]["error"] == pytest.approx(error, rel=1e-5)
    accelerate(pipe, METHODS["clear:2"])
    with always(pipe):
        untrained = compare(draw(pipe, PROMPTS[2], 0, CALL), original)["psnr"]
    rows = rows_of(record)
    for train in ("lora", "attention"):
        psnr = rows["clear:2", train]["psnr"]
        assert psnr["untrained"] == pytest.approx(untrained, abs=1e-3)
        assert psnr["after"] != psnr["untrained"]
        assert psnr["untrained"] < record["floor"]["psnr"]


def test_the_table_says_all_of_it(whole: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    bench_recovery.show(whole[0])
    text = capsys.readouterr().out
    assert "recovery in 0.2 minutes, 144×112 px" in text
    assert text.count("the method has no parameters") == 1
    row = rows_of(whole[0])["clear:2", "attention"]
    for value in (f"{row['error_untrained']:.4f}", f"{row['error_after']:.4f}", f"{row['recovered']:.1%}", f"{row['psnr']['after']:.2f}"):
        assert value in text
    assert "original in bfloat16" in text


def test_a_log_has_room_for_the_table(whole: tuple[dict[str, Any], Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    bench_recovery.show(whole[0])
    assert "…" not in capsys.readouterr().out


def test_the_curves_are_drawn_by_method(whole: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    record, folder = whole
    with Image.open(folder / "out.png") as picture:
        assert picture.format == "PNG"
    figures: list[Any] = []
    monkeypatch.setattr(curve, "as_png", lambda figure: figures.append(figure) or b"")
    curve.draw_recovery(record)
    panels = figures[0].axes
    assert [panel.get_title() for panel in panels] == list(METHODS)
    for panel in panels:
        rows = [row for (name, _), row in rows_of(record).items() if name == panel.get_title() and "impossible" not in row]
        *lines, floor = panel.lines
        for line, row in zip(lines, rows, strict=True):
            assert line.get_label() == f"{row['train']}: {row['recovered']:.0%}"
            assert line.get_xydata().tolist() == [[point["minutes"], point["recovered"]] for point in row["curve"]]
        assert floor.get_ydata()[0] == pytest.approx(1 - record["floor"]["error"] / rows[0]["error_untrained"])


def test_curves_of_as_many_steps_are_drawn_over_steps(whole: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes say nothing where the machine was busy with other things."""
    figures: list[Any] = []
    monkeypatch.setattr(curve, "as_png", lambda figure: figures.append(figure) or b"")
    curve.draw_recovery(whole[0] | {"settings": whole[0]["settings"] | {"minutes": None, "train_steps": 12}})
    row = rows_of(whole[0])["clear:2", "attention"]
    panel = next(panel for panel in figures[0].axes if panel.get_title() == "clear:2")
    line = next(line for line in panel.lines if line.get_label().startswith("attention"))
    assert panel.get_xlabel() == "training steps"
    assert line.get_xydata().tolist() == [[point["step"], point["recovered"]] for point in row["curve"]]
    assert line.get_xdata()[-1] == row["steps"]


def test_methods_without_a_curve_are_left_out(whole: tuple[dict[str, Any], Path]) -> None:
    none = [row for row in whole[0]["rows"] if "impossible" in row]
    assert curve.draw_recovery(whole[0] | {"rows": none}).startswith(b"\x89PNG")


def test_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = tiny.picture_pipe()
    before = state(pipe.transformer)
    bench(tmp_path, {"clear:2": METHODS["clear:2"]}, ["lora", "attention"], pipe=pipe, minutes=2 / 60)
    assert same(state(pipe.transformer), before)
    with pytest.raises(ValueError, match="accelerate"):
        patches_of(pipe)


def test_steps_in_place_of_minutes_are_the_same_for_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is timed: a busy machine trains no less."""
    record = bench(tmp_path, trains=["attention"], train_steps=2)
    assert [(row["parameter_steps"], row["steps"]) for row in record["rows"]] == [(0, 2), (runs.PARAMETER_STEPS, 2)]
    assert (record["settings"]["minutes"], record["settings"]["train_steps"]) == (None, 2)
    assert not list((tmp_path / "runs").glob("*/steps.json"))
    bench_recovery.show(record)
    assert "recovery in 2 steps, 144×112 px" in capsys.readouterr().out
    with pytest.raises(ValueError, match="contains a measurement with minutes None, not"):
        bench(tmp_path)


# Continuing


def test_what_is_finished_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"clear:2": METHODS["clear:2"]}
    first = bench(tmp_path, one, ["attention"], minutes=2 / 60)
    monkeypatch.setattr(bench_recovery, "collect", lambda *_, **__: pytest.fail("something was sampled"))
    assert bench(tmp_path, one, ["attention"], minutes=2 / 60)["rows"] == first["rows"]
    monkeypatch.undo()
    more = bench(tmp_path, one | {"fovea:0.25": Fovea(0.25, tile=(4, 4))}, ["attention"], minutes=2 / 60)
    assert more["rows"][0] == first["rows"][0]
    assert [row["method"] for row in more["rows"]] == ["clear:2", "fovea:0.25"]


def test_an_interrupted_training_continues_with_its_steps(tmp_path: Path, whole: tuple[dict[str, Any], Path]) -> None:
    pipe = tiny.picture_pipe()
    tiny.stop_training(pipe, bench_recovery.TIMED + 8)
    one = {"clear:2": METHODS["clear:2"]}
    with pytest.raises(KeyboardInterrupt):
        bench(tmp_path, one, ["attention"], pipe=pipe)
    assert json.loads((tmp_path / "out.json").read_text())["rows"] == []
    assert not list((tmp_path / "runs").glob(".timed-*"))
    restarted = bench(tmp_path, one, ["attention"])
    expected = rows_of(whole[0])["clear:2", "attention"]
    assert rows_of(restarted)["clear:2", "attention"] == expected


DIFFERENT: dict[str, dict[str, Any]] = {
    "minutes": {"minutes": 1.0}, "call": {"call": CALL | {"num_inference_steps": 3}}, "prompts": {"prompts": ["a burger"]},
    "optimizer": {"optimizer": "muon"},
}  # fmt: skip


@pytest.mark.parametrize(("name", "settings"), DIFFERENT.items(), ids=DIFFERENT)
def test_other_settings_are_refused(tmp_path: Path, whole: tuple[dict[str, Any], Path], name: str, settings: dict[str, Any]) -> None:
    (tmp_path / "out.json").write_text((whole[1] / "out.json").read_text())
    with pytest.raises(ValueError, match=f"contains a measurement with {name}"):
        bench(tmp_path, **settings)


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "out.json").write_text(text)
    with pytest.raises(ValueError, match="was not written by bench recovery"):
        bench(tmp_path)


def test_muon_trains_the_attentions_weights_alone(tmp_path: Path) -> None:
    measured = recovery(tmp_path, optimizer="muon")
    optimizers = [measured.config(train, 3, 0, tmp_path).optimizer for train in ("parameters", "lora", "attention")]
    assert optimizers == ["adamw", "adamw", "muon"]


# The command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, ["bench", "recovery", *(str(a) for a in arguments)])


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    out = tmp_path / "out.json"
    make_tiny().save_pretrained(tmp_path / "model")
    arguments: list[object] = ["--method", "clear:2", "--train", "parameters", "--train", "attention", "--minutes", "0.05"]
    arguments += ["--model", tmp_path / "model", "--max-sequence-length", 16]
    arguments += ["--prompts", tmp_path / "prompts.txt", "--size", "128x128", "--steps", 2, "--optimizer", "muon", "--out", out]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert f"wrote {out}" in result.output
    record = json.loads(out.read_text())
    assert [row["train"] for row in record["rows"]] == ["parameters", "attention"]
    assert record["rows"][1]["steps"] == 3
    assert record["settings"]["held_out"] == record["settings"]["pictures"] == PROMPTS[2:]
    assert (tmp_path / "out-runs" / "clear-2-attention" / "curve.png").is_file()


REFUSED: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "minutes": (lambda _: ["--minutes", 0], "minutes must be a number > 0, not 0.0"),
    "both": (lambda _: ["--minutes", 1, "--train-steps", 10], "--minutes and --train-steps both say how long to train: give one"),
    "train": (lambda _: ["--train", "all"], "train must be one of parameters, lora, attention, not 'all'"),
    "model": (lambda _: ["--model", "somewhere"], "model 'somewhere' requires --prompts"),
    "one-prompt": (lambda path: ["--prompts", path], "at least two different prompts"),
    "picture": (lambda path: ["--out", path.with_suffix(".png")], "--out must name a JSON file, next to which the curves are drawn"),
    "original": (lambda _: ["--method", "none"], "bench recovery requires accelerated methods, not 'none'"),
}


@pytest.mark.parametrize(("arguments", "says"), REFUSED.values(), ids=REFUSED)
def test_the_command_refuses(tmp_path: Path, arguments: Callable[[Path], list[object]], says: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na cat\n")
    result = run("--out", tmp_path / "out.json", *arguments(tmp_path / "prompts.txt"))
    assert result.exit_code == 2
    assert says in result.stderr


def test_its_help_has_an_example() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert "Example: dit-accel bench recovery" in result.output
