"""The loop that the trainers of both built-in models share: what the average covers, its log, steps that are left out."""

import itertools
import json
import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dit_accel.pipelines import training
from dit_accel.pipelines.builtin_video import train as videos
from dit_accel.pipelines.training import MOST_DROPPED, Run, Step, parameters


@pytest.mark.parametrize(("steps", "covered"), [(0, 1), (20, 1), (100, 4), (2500, 100), (100_000, 200)])
def test_the_average_covers_a_share_of_the_steps_so_far(steps: int, covered: int) -> None:
    models = [SimpleNamespace(components={"transformer": torch.nn.Linear(3, 3)}) for _ in range(2)]
    run = Run(*models, [], random.Random(0), step=steps)
    trained, before = ([p.detach().clone() for p in parameters(pipe).values()] for pipe in models)
    training._average(run, torch.tensor(False))
    assert all(torch.equal(p, old) for p, old in zip(parameters(run.average).values(), before, strict=True))
    training._average(run, torch.tensor(True))
    for average, old, new in zip(parameters(run.average).values(), before, trained, strict=True):
        torch.testing.assert_close(average.detach(), old + (new - old) / covered)


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose clock goes on by a second each time it is read, and which writes no state."""
    times = itertools.count()
    monkeypatch.setattr(training, "clock_of", lambda device: lambda: float(next(times)))
    monkeypatch.setattr(training, "save_state", lambda run, path: path.touch())
    return Run(SimpleNamespace(transformer=torch.nn.Linear(1, 1)), None, [], random.Random(0))


@pytest.mark.parametrize("first", [1, 17, 38], ids=["in-a-row-of-the-log", "over-two-rows", "at-the-end"])
@pytest.mark.parametrize("count", [MOST_DROPPED, MOST_DROPPED + 1])
def test_many_steps_in_a_row_without_a_finite_gradient_end_a_run(ticking: Run, tmp_path: Path, first: int, count: int) -> None:
    """They are counted where the log is written, and no state is after it."""

    def step(progress: float) -> Step:
        ticking.step += 1
        value = torch.tensor(math.nan if first <= ticking.step < first + count else 1.0)
        return "clip", value, value

    if count <= MOST_DROPPED:
        training.train(ticking, step, tmp_path, 0.75)
        assert (tmp_path / training.STATE).exists()
        return
    with pytest.raises(ArithmeticError, match="gradients of 6 steps in a row up to step"):
        training.train(ticking, step, tmp_path, 0.75)
    assert not (tmp_path / training.STATE).exists()


def test_the_log_names_the_kinds_that_are_left_out(ticking: Run, tmp_path: Path) -> None:
    """A kind of batch that never trains is seen there, not only by what the model can't draw."""

    def step(progress: float) -> Step:
        ticking.step += 1
        bad = ticking.step % 4 == 0
        return "large" if bad else "small", torch.tensor(math.nan if bad else 0.5), torch.tensor(math.nan if bad else 1.0)

    training.train(ticking, step, tmp_path, 0.75)
    lines = (tmp_path / training.LOG).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        *({"step": n, "minutes": round(n / 60, 2), "loss": {"small": 0.5}, "left_out": {"large": 5}} for n in (20, 40)),
        {"step": 45, "minutes": 0.75, "loss": {"small": 0.5}, "grad_norm": 1.0, "left_out": {"large": 1}},
    ]
    assert not any("NaN" in line for line in lines)


@pytest.mark.parametrize("factor", ["0", "-1", "nan", "inf"])
def test_a_factor_that_makes_no_batch_is_refused(factor: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        videos.main(["run", str(tmp_path), str(tmp_path / "out"), "--factor", factor])
    assert f"must be a finite number above 0, not {factor}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
