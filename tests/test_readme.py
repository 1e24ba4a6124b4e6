"""What the documentation tells users to type: every `dit-accel` command is understood, every piece of Python runs."""

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
import typer
from test_cli import ROOT

import dit_accel
from dit_accel.cli.app import app

PLACES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "*/README.md", "pipelines/*/weights/README.md", ".github/ISSUE_TEMPLATE/*.md")
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


@pytest.fixture
def small_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in models in place of those on the hub, and an adapter for the one for video in the folder that is worked in."""
    monkeypatch.chdir(tmp_path)
    for kind, builtin in ((diffusers.FluxPipeline, dit_accel.builtin_pipeline), (diffusers.WanPipeline, dit_accel.builtin_video_pipeline)):

        def opened(name: str | Path, *, load: Any = kind.from_pretrained, builtin: Any = builtin, **options: Any) -> Any:
            return load(name, **options) if Path(name).is_dir() else builtin()

        monkeypatch.setattr(kind, "from_pretrained", opened)
    pipe = dit_accel.accelerate(dit_accel.builtin_video_pipeline(), dit_accel.SLA(0.1))
    dit_accel.save_adapter(pipe, "sla-adapter")


@pytest.mark.usefixtures("small_models")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_piece_of_python_runs(page: Path) -> None:
    """Each on a pipeline as it comes, with small pictures and few steps."""
    for text in blocks(page):
        small = re.sub(r"\b(height|width)=\d+", r"\1=128", text).replace('.to("cuda")', "")
        small = re.sub(r"\bnum_frames=\d+", "num_frames=5", re.sub(r"\b(num_inference_)?steps=\d+", r"\1steps=1", small))
        names = {"dit_accel": dit_accel, "pipe": dit_accel.builtin_pipeline(), "prompts": ["a cat", "a dog"]}
        exec(small, names)


def headings(page: Path) -> set[str]:
    """Where links may lead within a page, as GitHub names them."""
    found = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page: Path) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        name, _, place = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if "://" not in link and (not target.exists() or (place and place not in headings(target))):
            broken.append(link)
    assert broken == []


def test_each_complaint_has_a_command_that_shows_it() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| **")]
    assert len(rows) >= 15
    assert [row[0] for row in rows if len(row) != 3 or not re.search(r"`(dit-accel [^`]+|dit_accel\.\w+\(pipe\))`", row[1])] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_can_be_found_from_the_readme() -> None:
    named = set(re.findall(r"\]\((docs/[^)#]+)", (ROOT / "README.md").read_text()))
    assert {str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")} == named
