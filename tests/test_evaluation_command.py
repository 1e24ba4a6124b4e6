"""`evaluate` as users meet it: what is refused before anything runs, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
from distill_fixtures import CALL, PROMPTS, SPARSE, perturb, picture_pipe
from typer.testing import CliRunner, Result

from dit_accel import CLEAR, accelerate, restore, save_adapter
from dit_accel.cli import models, options
from dit_accel.cli.app import app
from dit_accel.errors import FallbackError, NotAcceleratedError
from dit_accel.measure import evaluation
from dit_accel.measure.evaluation import evaluate

METHOD = CLEAR(2)


@pytest.fixture
def idle() -> Any:
    """An accelerated pipeline that must not draw."""
    pipe = accelerate(picture_pipe(), METHOD)
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("something was drawn before the arguments were checked"))
    return pipe


def test_refusals(idle: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written to"):
        evaluate(idle, PROMPTS, tmp_path / "file" / "out", **CALL)
    for prompts in ([], [" "], "a panda"):
        with pytest.raises(ValueError, match="prompts must be a non-empty list of non-empty strings"):
            evaluate(idle, prompts, tmp_path / "out", **CALL)
    with pytest.raises(ValueError, match="FluxTransformer2DModel draws no pictures: pass a pipeline"):
        evaluate(idle.transformer, PROMPTS, tmp_path / "out", **CALL)
    for call, message in (
        ({"num_frames": 9}, "FluxPipeline takes no num_frames"),
        ({"output_type": "pil"}, "set for every run: leave output_type out"),
        ({"sigmas": {1, 2}}, "call arguments must be numbers, strings, lists or None, which .*'sigmas'"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(idle, PROMPTS, tmp_path / "out", **(CALL | call))
    with pytest.raises(NotAcceleratedError):
        evaluate(restore(idle), PROMPTS, tmp_path / "out", **CALL)
    assert not (tmp_path / "out").exists()


def test_a_method_that_runs_nowhere_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.patch import context

    monkeypatch.setattr(context.Context, "grids", lambda *_: "no grid today")
    with pytest.warns(UserWarning, match="no grid today"), pytest.raises(FallbackError, match="calls have no grid today"):
        evaluate(accelerate(picture_pipe(), METHOD), PROMPTS, tmp_path, **CALL)
    assert list(tmp_path.iterdir()) == []


def test_an_interruption_leaves_an_earlier_result_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "results.json").write_text("earlier")
    monkeypatch.setattr(evaluation, "write_page", interrupt)
    with pytest.raises(KeyboardInterrupt):
        evaluate(accelerate(picture_pipe(), METHOD), PROMPTS[:1], tmp_path, **CALL)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("results.json", "earlier")]


# The command


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


SMALL = ["--size", "144x112", "--steps", 2, "--max-sequence-length", 8]


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: picture_pipe())


@pytest.mark.usefixtures("numbers_only", "tiny_model")
def test_the_same_command_gives_the_same_results(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS[:2]))
    results = []
    for name, prompts in (("a", ["--prompts", file]), ("b", PROMPTS[:2])):
        done = run(*prompts, "--method", "clear:2", *SMALL, "--seed", 5, "--out", tmp_path / name)
        assert done.exit_code == 0, (done.output, done.exception)
        assert "Disc(radius=2)" in done.stdout
        assert "95% intervals, paired bootstrap over prompts" in done.stdout
        assert f"wrote {tmp_path / name / 'report.html'}" in done.stdout
        results.append((tmp_path / name / "results.json").read_text())
    assert results[0] == results[1]
    assert str(tmp_path) not in results[0]


@pytest.mark.usefixtures("numbers_only", "tiny_model")
def test_an_adapter_is_evaluated_with_what_it_learned(tmp_path: Path) -> None:
    pipe = accelerate(picture_pipe(), SPARSE)
    perturb(pipe)
    save_adapter(pipe, tmp_path / "adapter")
    done = run(PROMPTS[0], "--adapter", tmp_path / "adapter", *SMALL, "--out", tmp_path / "out")
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert record["adapter"] == str(tmp_path / "adapter")
    learned = evaluate(pipe, PROMPTS[:1], tmp_path / "learned", **record["call"])
    untrained = evaluate(accelerate(restore(pipe), SPARSE), PROMPTS[:1], tmp_path / "untrained", **record["call"])
    assert record["measures"] == learned["measures"]
    for measure in ("velocity_error", "attention_error"):
        assert record["measures"]["method"][measure]["mean"] != pytest.approx(untrained["measures"]["method"][measure]["mean"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give prompts as arguments or as --prompts FILE"),
        (["a cat", "--prompts", "x.txt"], "give prompts as arguments or as --prompts FILE, not both"),
        ([" "], "a prompt must not be empty"),
        (
            ["--prompts", "missing.txt"],
            "prompts must be a text file with one prompt per line, but missing.txt can't be read: No such file or directory",
        ),
        (["--prompts", "empty.txt"], "prompts must be a text file with one prompt per line, but empty.txt has none"),
        (["a cat", "--method", "none"], "evaluate requires an accelerated method, not 'none'"),
        (["a cat", "--method", "fovea", "--adapter", "x"], "--adapter names the method itself: leave --method out"),
        (
            ["a cat", "--size", "100x64"],
            "width and height must be multiples of 16 pixels, the side of one token: not 100x64, but 96x64, for example",
        ),
        (["a cat", "--out", "empty.txt/below"], "the folder empty.txt/below can't be written to: Not a directory"),
    ],
)
def test_the_command_checks_before_it_loads(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n \n")
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded before the arguments were checked"))
    done = run(*arguments)
    assert done.exit_code == 2
    assert done.stderr.strip() == f"error: {message}"
    assert [file.name for file in tmp_path.iterdir()] == ["empty.txt"]


@pytest.mark.parametrize(
    ("arguments", "limits"),
    [
        (["a cat", "--size", "176x160"], [evaluation.ONE_PROMPT, evaluation.NO_DISTANCE]),
        (["a cat", "a dog", "--size", "176x192"], []),
    ],
)
def test_limits_are_said_before_the_work(arguments: list[str], limits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise ValueError("stopped")

    monkeypatch.setattr(models, "load_pipeline", stop)
    assert run(*arguments, "--out", tmp_path).stdout.splitlines() == limits


@pytest.mark.usefixtures("tiny_model")
def test_frames_go_to_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr("dit_accel.pipelines.video.frames_argument", lambda pipe: "num_frames")
    monkeypatch.setattr(evaluation, "evaluate", lambda pipe, prompts, out, **settings: calls.append(settings))
    assert run("a cat", "--frames", 9, "--size", "64x32", "--model", "other", "--out", tmp_path).exit_code == 0
    (settings,) = calls
    assert settings == {
        "seed": 0, "adapter": None, "height": 32, "width": 64, "num_inference_steps": 8, "num_frames": 9,
    }  # fmt: skip


def test_a_guidance_scale_goes_to_others_where_it_is_asked_for() -> None:
    """Some pipelines take none (HunyuanVideo 1.5, HunyuanImage), and others have a default of their own."""
    assert options.call_arguments("builtin", (64, 64), 2, None, None)["guidance_scale"] == 3.5
    assert set(options.call_arguments("owner/name", (64, 64), 2, None, None)) == {"height", "width", "num_inference_steps"}
    assert options.call_arguments("owner/name", (64, 64), 2, 5.0, None)["guidance_scale"] == 5.0
