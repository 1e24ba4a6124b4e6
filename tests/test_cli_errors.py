"""Whose fault an error is: what a user got wrong is told in one line, anything else keeps its traceback."""

import ast
from pathlib import Path

import pytest
from diffusers import FluxPipeline
from test_cli import SMALL, fail, make_tiny, run

import dit_accel

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
    """It may be a bug: the user is not told to change an argument."""

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
    wanted = f"roof.json can't be written in {tmp_path}: No space left on device"
    assert fail("estimate", "--out", tmp_path / "roof.json") == wanted


@pytest.mark.parametrize("name", READ_BY_COMMANDS)
def test_what_a_user_got_wrong_is_told_in_a_class_of_ours(name: str) -> None:
    """A plain ValueError would be shown with a traceback."""
    tree = ast.parse((FOLDER / name).read_text())
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    assert [node.lineno for node in raised if ast.unparse(node.exc.func) == "ValueError"] == []  # type: ignore[attr-defined]
