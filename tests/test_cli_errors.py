"""Whose fault an error is: what a user got wrong is said in one line, anything else keeps its traceback."""

import ast
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from test_cli import SMALL, fail, make_tiny, run, succeed

import dit_accel
from dit_accel import CLEAR, Assignment, Rule

FOLDER = Path(dit_accel.__file__).parent
# the modules that check what a command's user typed or named
READ_BY_COMMANDS = sorted(
    str(path.relative_to(FOLDER))
    for pattern in ("cli*.py", "bench*.py", "evaluation*.py", "estimate.py", "files.py", "method_text.py", "presets.py", "spec.py",
                    "finetune/config.py", "finetune/pictures.py", "pipelines/hires/*.py", "pipelines/video.py")
    for path in FOLDER.glob(pattern)
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(folder)
    return str(folder)


def test_a_value_error_of_a_library_keeps_its_traceback(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be a bug: the user is not asked to change an argument."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("a library's own")

    monkeypatch.setattr(FluxPipeline, "__call__", fails)
    result = run("generate", "x", "--model", model, *SMALL, "--out", tmp_path / "a.png")
    assert (result.exit_code, type(result.exception), result.stderr.count("error: ")) == (1, ValueError, 0)
    monkeypatch.setattr(FluxPipeline, "to", fails)
    assert type(run("generate", "x", "--model", model, *SMALL, "--out", tmp_path / "a.png").exception) is ValueError


def test_a_full_disk_is_told_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    expected = f"roof.json can't be written in {tmp_path}: No space left on device"
    assert fail("estimate", "--out", tmp_path / "roof.json") == expected


def test_a_file_is_a_method(model: str, tmp_path: Path) -> None:
    """The same picture as of the spec by its name; and one of the original where no rule fits."""
    shown, pictures = [], []
    Assignment.of(CLEAR(2)).save(tmp_path / "one.json")
    Assignment((Rule(CLEAR(2), steps=(1, None)),)).save(tmp_path / "late.json")
    for method in ("clear:2", tmp_path / "one.json", tmp_path / "late.json", "none"):
        file = tmp_path / "a.png"
        shown.append(succeed("generate", "a panda", "--model", model, "--method", method, "--steps", 1, *SMALL, "--out", file))
        pictures.append(file.read_bytes())
    assert pictures[0] == pictures[1] != pictures[2] == pictures[3]
    assert "steps from 1" in shown[2]


def test_files_that_hold_no_method_are_named(tmp_path: Path) -> None:
    file, out = tmp_path / "plan.json", tmp_path / "a.png"
    assert "plan.json can't be read as the JSON of a spec or an assignment" in fail("generate", "x", "--method", file, "--out", out)
    file.write_text("{}")
    assert "plan.json contains neither a spec nor an assignment" in fail("estimate", "--method", file)
    Assignment((Rule(CLEAR(2), steps=(1, None)),)).save(file)
    assert "an estimate is of one forward" in fail("estimate", "--method", file)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    arguments = ["distill", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "out", "--method", "clear:2"]
    assert "contains an assignment of several specs: name one spec here" in fail(*arguments, "--vary", file)


@pytest.mark.parametrize("name", READ_BY_COMMANDS)
def test_what_a_user_got_wrong_is_told_in_a_class_of_ours(name: str) -> None:
    """A plain ValueError would be shown with a traceback."""
    tree = ast.parse((FOLDER / name).read_text())
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    assert [node.lineno for node in raised if ast.unparse(node.exc.func) == "ValueError"] == []  # type: ignore[attr-defined]
