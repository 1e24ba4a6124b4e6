"""What the logs of a training say: the seconds that it took, the errors from which its curve is drawn, and the curve."""

import json
import signal
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from distill_fixtures import learn
from PIL import Image

from dit_accel.finetune import curve
from dit_accel.finetune import session as runs
from dit_accel.finetune.curve import recovered

RUN: dict[str, Any] = {"steps": 5, "parameter_steps": 3, "evaluate_every": 2, "checkpoint_every": 2, "train": "parameters"}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that goes on by 100 seconds in every evaluation and by 1 whenever it is read, so that a step takes one second."""
    now = [1000.0]

    def read() -> float:
        now[0] += 1
        return now[0]

    real = runs.Distillation.held_out_error

    def slow(run: Any) -> float:
        now[0] += 100
        return real(run)

    monkeypatch.setattr(runs.time, "perf_counter", read)
    monkeypatch.setattr(runs.Distillation, "held_out_error", slow)
    return now


def logged(folder: Path, name: str = "log.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.mark.usefixtures("clock")
def test_rows_say_how_long_the_training_took(tmp_path: Path) -> None:
    result = learn(tiny.student(), tmp_path, **RUN)
    assert [(row["step"], row["seconds"]) for row in logged(tmp_path, "parameters.jsonl")] == [(1, 1), (2, 2), (3, 3)]
    rows = logged(tmp_path)
    assert [(row["step"], row["seconds"]) for row in rows] == [(0, 0), (0, 3), (1, 4), (2, 5), (3, 6), (4, 7), (5, 8)]
    errors = {(row["step"], row["seconds"]): row["held_out_error"] for row in rows if "held_out_error" in row}
    assert list(errors) == [(0, 0), (0, 3), (2, 5), (4, 7), (5, 8)]
    assert (errors[0, 0], errors[0, 3], errors[5, 8]) == (result.error_before, result.error_fitted, result.error_after)
    assert result.history == rows


@pytest.mark.parametrize("forward", [1, 3, 6, 7], ids=["parameters", "first-step", "fourth-step", "last-step"])
def test_the_clock_goes_on_after_a_kill(tmp_path: Path, clock: list[float], forward: int) -> None:
    """`forward`: which of both stages is interrupted, one a step; steps since the last checkpoint count anew."""
    pipe, calls = tiny.student(), iter(range(100))

    def stop(module: Any, args: Any) -> None:
        if torch.is_grad_enabled() and next(calls) == forward:  # evaluation, sampling and the second stage's teacher have none
            raise KeyboardInterrupt

    pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        learn(pipe, tmp_path, **RUN)
    clock[0] += 5000  # the time until it is started again
    learn(tiny.student(), tmp_path, **RUN)
    assert [row["seconds"] for row in logged(tmp_path)] == [0, 3, 4, 5, 6, 7, 8]
    assert [row["seconds"] for row in logged(tmp_path, "parameters.jsonl")] == [1, 2, 3]


# The curve

ROWS = [
    {"step": 0, "held_out_error": 0.5, "seconds": 0.0},
    {"step": 0, "held_out_error": 0.4, "seconds": 30.0},
    {"step": 1, "loss": 0.3, "seconds": 60.0},
    {"step": 2, "loss": 0.2, "held_out_error": 0.1, "seconds": 90.0},
]


def test_recovery_is_a_share_of_the_untrained_error() -> None:
    assert recovered(ROWS) == [(0, 0, 0), (0, 0.5, pytest.approx(0.2)), (2, 1.5, pytest.approx(0.8))]


@pytest.mark.parametrize("count", [1, 2, 400])
def test_the_curve_shows_loss_and_recovery(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(curve, "as_png", lambda figure: figures.append(figure) or b"")
    steps = [{"step": i, "loss": 1 / i, "seconds": 30.0 + i} for i in range(1, count + 1)]
    curve.draw_curve([*ROWS[:2], *steps[:-1], steps[-1] | {"held_out_error": 0.1}])
    left, right = figures[0].axes
    assert left.lines[0].get_xydata().tolist() == [[i, 1 / i] for i in range(1, count + 1)]
    assert len(left.lines) == (2 if count == 400 else 1)
    if count == 400:
        assert left.lines[1].get_xydata()[0].tolist() == [10, pytest.approx(sum(1 / i for i in range(1, 11)) / 10)]
    assert right.lines[0].get_xydata().tolist() == [[0, 0], [0.5, pytest.approx(0.2)], [(30 + count) / 60, pytest.approx(0.8)]]


def test_it_is_drawn_at_every_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drawn_curves: Any) -> None:
    drawn: list[int] = []

    def watched(history: Any) -> bytes:
        drawn.append(int(history[-1]["step"]))
        return drawn_curves(history)

    monkeypatch.setattr(runs, "draw_curve", watched)
    learn(tiny.student(), tmp_path, **RUN)
    assert drawn == [2, 4, 5]
    with Image.open(tmp_path / "curve.png") as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 10


def test_an_interrupt_while_it_is_drawn_comes_when_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def drawn(history: Any) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return b"drawn"

    monkeypatch.setattr(runs, "draw_curve", drawn)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            learn(tiny.student(), tmp_path, **RUN)
        assert (tmp_path / "curve.png").read_bytes() == b"drawn"
        with pytest.raises(KeyboardInterrupt):  # as before
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_error_of_the_drawing_is_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(history: Any) -> bytes:
        raise RuntimeError("no backend")

    monkeypatch.setattr(runs, "draw_curve", broken)
    with pytest.raises(RuntimeError, match="no backend"):
        learn(tiny.student(), tmp_path, **RUN)
