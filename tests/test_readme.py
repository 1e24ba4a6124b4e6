"""What the documentation tells users to type: every `dit-accel` command is understood, every piece of Python runs."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from test_cli import ROOT

import dit_accel
from dit_accel.cli.app import app

PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "*/README.md", "pipelines/*/weights/README.md")
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


def shell_lines() -> list[str]:
    """The commands of CONTRIBUTING.md: whole lines between fences, and what is between backticks."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    fenced = [line.split("#")[0].strip() for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
    inline = [" ".join(line.split()) for line in re.findall(r"`((?:\.venv/bin|\.ci|git|make|tests)[ /][^`]+)`", text)]
    return [line for line in [*fenced, *inline] if line]


@pytest.mark.parametrize("line", shell_lines())
def test_every_command_for_contributors_finds_what_it_names(line: str) -> None:
    """Programs are installed, files and make's targets are there, and tests that are chosen by a word exist."""
    program, *words = shlex.split(line)
    if program == "make":
        assert set(words) <= {target.split(":")[0] for target in (ROOT / "Makefile").read_text().splitlines() if ":" in target}
    elif program == "git":
        assert words[0] in ("config", "checkout")
    elif program.startswith(".venv/bin/"):
        assert Path(sys.executable).with_name(program.removeprefix(".venv/bin/")).exists()
    else:
        assert (ROOT / program).exists()
    files = [word for word in [program, *words] if word.startswith("tests/") or word.endswith((".py", ".md"))]
    assert [word for word in files if not (ROOT / word).is_file()] == []
    if "-k" in words:
        named = [text for word in files for text in (ROOT / word).read_text().splitlines() if text.startswith("def test_") or '"' in text]
        assert any(words[words.index("-k") + 1] in text for text in named)


def test_commands_for_contributors_are_found() -> None:
    assert len(shell_lines()) > 8


def test_every_file_that_contributors_are_pointed_to_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    named = {*re.findall(r"\]\(([^)#]+)\)", text), *re.findall(r"`((?:dit_accel|kernels|pipelines|finetune|tests|docs)/[\w./]*)`", text)}
    assert len(named) > 10
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.S)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_piece_of_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each on a pipeline as it comes, with small pictures and few steps."""
    monkeypatch.chdir(tmp_path)
    for text in blocks(page):
        small = re.sub(r"\b(height|width)=\d+", r"\1=128", text)
        names = {"dit_accel": dit_accel, "pipe": dit_accel.builtin_pipeline(), "prompts": ["a cat", "a dog"]}
        exec(re.sub(r"\b(num_inference_)?steps=\d+", r"\1steps=1", small), names)
