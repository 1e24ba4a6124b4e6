"""What the documentation tells users to type: every `dit-accel` command is understood, every piece of Python runs."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import ROOT

import dit_accel
from dit_accel.cli.app import app

PLACES = ("README.md", "docs/*.md", "*/README.md", "pipelines/*/weights/README.md")
PAGES = [page for place in PLACES for page in sorted(ROOT.glob(place))]
ROOT_COMMAND = typer.main.get_command(app)


def documented() -> list[str]:
    """Commands between backticks, over line ends."""
    found = {" ".join(text.split()) for page in PAGES for text in re.findall(r"`(dit-accel [^`]+)`", page.read_text())}
    return sorted(found)


def examples(command: Any = ROOT_COMMAND) -> list[str]:
    """Those that the commands' own help shows."""
    texts = [command.epilog or "", command.help or ""]
    found = [match for text in texts for match in re.findall(r"(?:Example|A video): (dit-accel [^\n]+)", text)]
    return found + [text for sub in getattr(command, "commands", {}).values() for text in examples(sub)]


def understand(words: list[str]) -> None:
    """Parse a command's words as the command line does, without running it. Raises UsageError at an option or a value it doesn't know."""
    command: Any = ROOT_COMMAND
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    if words != ["--help"]:
        command.make_context("dit-accel", words)


@pytest.mark.parametrize("text", documented() + examples())
def test_every_command_is_understood(text: str) -> None:
    understand(shlex.split(text)[1:])


def test_a_stale_option_would_be_found() -> None:
    with pytest.raises(Exception, match=r"No such option.*--gone"):
        understand(["bench", "step", "--gone", "1"])
    assert len(documented()) > 10
    assert len(examples()) > 8


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_piece_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a pipeline as it comes, with small pictures and few steps."""
    monkeypatch.chdir(tmp_path)
    for text in blocks(page):
        small = re.sub(r"\b(height|width)=\d+", r"\1=256", text)
        names = {"dit_accel": dit_accel, "pipe": dit_accel.builtin_pipeline(), "prompts": ["a cat", "a dog"]}
        exec(re.sub(r"\b(num_inference_)?steps=\d+", r"\1steps=1", small), names)
