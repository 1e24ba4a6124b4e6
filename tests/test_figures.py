"""What README and docs show is what the files of the last measurements say, and all of it is made by one command."""

import dataclasses
import importlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_cli import ROOT
from test_readme import PAGES, understand

from dit_accel.kernels.cpu import native


@pytest.fixture(scope="module")
def figures() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module("figures")
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))


WITH_TABLES = ("choose", "gpu", "measured", "methods", "models", "plans", "video")


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}.md" for page in WITH_TABLES)])
def test_the_pages_tables_are_the_files(figures: Any, name: str) -> None:
    page = (ROOT / name).read_text()
    made = {name: table(ROOT / "benchmarks") for name, table in figures.PAGES[name].items()}
    assert figures.fill(page, made) == page


def test_a_table_that_is_older_than_its_file_is_replaced(figures: Any, tmp_path: Path) -> None:
    for file in (ROOT / "benchmarks").glob("*.json"):
        shutil.copy(file, tmp_path)
    record = json.loads((tmp_path / "quality.json").read_text())
    record["presets"]["Fovea 5 %"]["attention_error"] = 0.987
    (tmp_path / "quality.json").write_text(json.dumps(record))
    page = (ROOT / "docs" / "measured.md").read_text()
    changed = figures.fill(page, {"quality": figures.TABLES["quality"](tmp_path)})
    before, after = page.splitlines(), changed.splitlines()
    assert len(before) == len(after)
    (old,) = [line for line in before if line.startswith("| **Fovea 5 %** | ")]
    new = "| **Fovea 5 %** | 0.987 | " + old.split(" | ", 2)[2]
    assert [line for line in after if line not in before] == [new]


def test_a_page_without_a_place_for_a_table_is_refused(figures: Any) -> None:
    with pytest.raises(ValueError, match=r"has 0 places for the table 'step': write '<!-- table: step -->' above it, once"):
        figures.fill("nothing", {"step": "| a |"})


@pytest.mark.parametrize(
    ("fovea", "radius", "clear", "taken"),
    [
        ((None, 2.6), (None, 3.5), (None, 4.7), "Fovea radius 8; trained: CLEAR radius 8"),
        ((1.3, 2.6), (None, 3.5), (1.2, 4.7), "Fovea radius 8; trained: CLEAR radius 8"),  # by attention, where a step is missing
        ((1.3, 2.6), (1.2, 3.5), (1.4, 4.7), "Fovea 5 %"),  # by steps, and 1.4 is not worth a training
        ((None, 0.6), (None, 0.9), (None, 1.2), "nothing; trained: CLEAR radius 8"),
        ((None, 0.6), (None, 0.9), (None, 1.05), "nothing"),
    ],
)
def test_what_is_taken_is_the_fastest_and_worth_its_training(figures: Any, fovea: Any, radius: Any, clear: Any, taken: str) -> None:
    table = sys.modules["choose_table"]
    speeds = {name: table.Speed(*speed) for name, speed in zip(table.NAMES, (fovea, radius, clear), strict=False)}
    assert table.advice(speeds) == taken


@pytest.mark.parametrize(
    ("value", "shown"), [(0.0371, "37 ms"), (0.9994, "999 ms"), (1.3359, "1.34 s"), (22.17, "22.2 s"), (193.8, "194 s")]
)
def test_seconds(figures: Any, value: float, shown: str) -> None:
    assert sys.modules["tables"].seconds(value) == shown


def test_every_picture_and_measurement_that_is_kept_is_made(figures: Any) -> None:
    made = {kept for figure in figures.FIGURES.values() for kept in figure.files.values()}
    shown = {(page.parent / name).resolve() for page in PAGES for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())}
    kept = {*shown, *(ROOT / "benchmarks").glob("*.json*"), *(ROOT / "pipelines").glob("*/weights/*.jpg")}
    assert {str(path.relative_to(ROOT)) for path in kept} == made
    assert all((ROOT / name).is_file() for name in made)


def test_every_command_is_understood(figures: Any) -> None:
    commands = [command[2:] for figure in figures.FIGURES.values() for command in figure.commands if command[1] == "dit_accel.cli"]
    assert len(commands) > 10
    for command in commands:
        understand(list(command))


def test_a_command_that_fails_replaces_nothing(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    write = ("-c", "open('a.json', 'w').write('new')")
    monkeypatch.setitem(figures.FIGURES, "good", figures.Figure((write,), {"a.json": "a.json"}))
    monkeypatch.setitem(figures.FIGURES, "bad", figures.Figure((write, ("-c", "raise SystemExit(3)")), {"a.json": "a.json"}))
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(RuntimeError, match="bad: the command above ended with status 3; its files are as they were"):
        figures.make("bad")
    assert (tmp_path / "a.json").read_text() == "old"
    figures.make("good")
    assert (tmp_path / "a.json").read_text() == "new"


def test_a_figure_about_another_cpu_stays_as_it_is(
    figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    fails = figures.Figure((("-c", "raise SystemExit(3)"),), {"a.json": "a.json"}, target="another")
    monkeypatch.setitem(figures.FIGURES, "elsewhere", fails)
    figures.make("elsewhere")
    assert capsys.readouterr().out == "elsewhere: stays as it is, it is about CPUs with another\n"
    monkeypatch.setitem(figures.FIGURES, "here", dataclasses.replace(fails, target=native.TARGETS[native.target()]))
    with pytest.raises(RuntimeError, match="ended with status 3"):
        figures.make("here")


def test_what_the_commands_leave_is_put_together(figures: Any, tmp_path: Path) -> None:
    """Errors of the adapters and evaluations, as the commands write them, come into the files that the tables are made from."""
    adapters = {"fovea": (0.06, 0.04), "sla": (0.15, 0.11)}
    for name, (before, after) in adapters.items():
        (tmp_path / name / "adapter").mkdir(parents=True)
        training = {"held_out_error_before": before, "held_out_error_after": after}
        (tmp_path / name / "adapter" / "dit_accel_config.json").write_text(json.dumps({"training": training}))
    rows = [{"original": 60.0, "accelerated": 20.0, "psnr": 30.0, "change": 1.0}] * 3
    (tmp_path / "video.json").write_text(json.dumps({"rows": rows}))
    figures.add_errors(tmp_path)
    ends = [line.split(" | ")[-1] for line in figures.TABLES["video"](tmp_path).splitlines()[3:]]
    assert ends == ["0.060 |", "0.040 |", "0.110 (untrained 0.150) |"]
    for name, error in (("fovea", 0.2), ("clear", 0.3)):
        sides = {
            side: {"velocity_error": {"mean": value, "low": 0.1, "high": 0.4}} for side, value in (("method", error), ("bfloat16", 0.05))
        }
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps({"machine": {}, "prompts": ["a"], "measures": sides}))
    figures.gather_errors(tmp_path)
    table = figures.TABLES["evaluate"](tmp_path).splitlines()
    assert table[2:] == [
        "| Fovea 5 % | 0.200 [0.100, 0.400] |", "| CLEAR radius 8 | 0.300 [0.100, 0.400] |",
        "| the original in bfloat16 | 0.050 [0.100, 0.400] |",
    ]  # fmt: skip


def test_captions_are_as_many_as_they_say(figures: Any, tmp_path: Path) -> None:
    figures.captions(tmp_path)
    figures.clips(tmp_path)
    assert {file.name: len(file.read_text().splitlines()) for file in tmp_path.iterdir()} == {
        "120.txt": 124, "4.txt": 4, "clips.txt": 12, "held-out.txt": 2,
    }  # fmt: skip


def test_rows_of_recovery_have_their_cost_and_the_curves_their_names(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel import CLEAR, Fovea
    from dit_accel.finetune import curve

    drawn: list[Any] = []
    monkeypatch.setattr(curve, "draw_recovery", lambda record: drawn.append(record) or b"PNG")
    rows = [
        {"method": name, "spec": spec.to_dict(), "train": "attention"} for name, spec in (("clear:8", CLEAR(8)), ("mine.json", Fovea()))
    ]
    settings = {"call": {"height": 512, "width": 512}, "train_steps": 5, "minutes": None}
    (tmp_path / "recovery.json").write_text(json.dumps({"rows": rows, "settings": settings}))
    figures.finish_recovery(tmp_path)
    kept = json.loads((tmp_path / "recovery.json").read_text())["rows"]
    assert [row["method"] for row in kept] == ["clear:8", "mine.json"]
    assert all(0 < row["multiply_adds"] < 1 for row in kept)
    assert [(row["method"], row["train"]) for row in drawn[0]["rows"]] == [("CLEAR radius 8", "weights")]
    assert (tmp_path / "recovery.png").read_bytes() == b"PNG"


def test_a_kept_folder_continues(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    count = "import pathlib; p = pathlib.Path('n'); p.write_text(p.read_text() + 'x' if p.exists() else 'x')"
    fails = figures.Figure((("-c", count), ("-c", "raise SystemExit(3)")), {"n": "n"})
    monkeypatch.setitem(figures.FIGURES, "long", fails)
    with pytest.raises(RuntimeError, match="status 3"):
        figures.make("long", tmp_path / "work")
    assert not (tmp_path / "n").exists()
    monkeypatch.setitem(figures.FIGURES, "long", dataclasses.replace(fails, commands=fails.commands[:1]))
    figures.make("long", tmp_path / "work")
    assert (tmp_path / "n").read_text() == "xx"


def test_the_clip_is_kept_at_half_its_size(figures: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "add_errors", lambda folder: None)
    (tmp_path / "video").mkdir()
    first, second = (Image.new("RGB", (64, 32), colour) for colour in ("red", "blue"))
    first.save(tmp_path / "video" / "video.gif", save_all=True, append_images=[second], duration=120, loop=0)
    figures.finish_video(tmp_path)
    with Image.open(tmp_path / "video" / "video.gif") as clip:
        assert (clip.size, clip.n_frames, clip.info["duration"], clip.info["loop"]) == ((32, 16), 2, 120, 0)
        pixels = []
        for frame in range(2):
            clip.seek(frame)
            pixels.append(clip.convert("RGB").getpixel((5, 5)))
    assert [max(range(3), key=pixel.__getitem__) for pixel in pixels] == [0, 2]  # red, then blue
