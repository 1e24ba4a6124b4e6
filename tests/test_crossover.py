"""Never slower: a patch leaves a grid to the original attention where that is faster, and nowhere else."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from conftest import LAYERS, forward_arguments, run, tiny_pipe

import dit_accel
from dit_accel import CLEAR, SLA, Fovea, TokenLayout
from dit_accel.operator import decisions, guard
from dit_accel.operator.guard import Crossover
from dit_accel.patch.modes import always
from dit_accel.patch.state import CONTEXT

CPU = torch.device("cpu")
SLOWER, FASTER = Crossover(accelerated=2e-3, original=1e-3), Crossover(accelerated=1e-3, original=2e-3)
pytestmark = [pytest.mark.crossover, pytest.mark.filterwarnings("ignore:dit_accel. the original attention runs")]


def raising(*_: object) -> None:
    raise AssertionError("nothing is to be measured")


@pytest.fixture
def slower(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every shape measures as slower; grows by the arguments of each measurement."""
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(guard, "measured", lambda *shape: asked.append(shape) or SLOWER)
    return asked


def test_a_slower_size_runs_the_original_to_the_bit_and_says_so(slower: list[Any], sparse_calls: list[Any]) -> None:
    expected = run(tiny_pipe())
    pipe = dit_accel.accelerate(tiny_pipe(), CLEAR(2))
    with pytest.warns(UserWarning, match=r"original attention runs at 17×25 tokens.*2\.00 ms against 1\.00 ms"):
        assert torch.equal(run(pipe), expected)
    assert sparse_calls == []
    rows = dit_accel.summary(pipe, show=False)
    assert {row.backend for row in rows} == {"original"}
    assert all("faster here: measured 2.00 ms against 1.00 ms" in row.why for row in rows)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(pipe)


def test_a_faster_size_runs_the_method(monkeypatch: pytest.MonkeyPatch, sparse_calls: list[Any]) -> None:
    sizes = {17 * 25: FASTER, 4 * 5: SLOWER}
    monkeypatch.setattr(guard, "measured", lambda spec, layout, *_: sizes[layout.image])
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2))
    run(pipe, steps=2)
    assert len(sparse_calls) == 2 * LAYERS
    run(pipe, 64, 80, steps=2)
    assert len(sparse_calls) == 2 * LAYERS
    run(pipe, steps=1)
    assert len(sparse_calls) == 3 * LAYERS
    assert {row.backend for row in dit_accel.summary(pipe, show=False)} == {"cpu"}


def test_a_method_that_runs_says_what_was_decided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "measured", lambda *_: dataclasses.replace(FASTER, file=Path("/cache/a.json")))
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2))
    run(pipe, steps=1)
    words = "measured 1.00 ms against 2.00 ms of the original attention, decided once, kept in /cache/a.json"
    assert all(row.why.endswith(f"; {words}") for row in dit_accel.summary(pipe, show=False))


def test_only_what_is_clearly_slower_is_left_to_the_original() -> None:
    assert [Crossover(ratio, 1.0).loses for ratio in (0.5, 1.0, 1.2, 1.25, 1.26, 3.0)] == [False] * 4 + [True] * 2


def test_the_environment_turns_it_off(slower: list[Any], sparse_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(guard, "_measure", raising)
    monkeypatch.setenv(decisions.VARIABLE, "off")
    assert guard.measured(Fovea(0.2), TokenLayout((1, 8, 8)), 16, torch.float32, CPU) is None
    pipe = dit_accel.accelerate(tiny_pipe(), Fovea(0.2))
    run(pipe, steps=1)
    assert {row.backend for row in dit_accel.summary(pipe, show=False)} == {"cpu"}


@pytest.mark.parametrize("value", ["no", "OFF", "0", ""], ids=repr)
def test_the_environment_is_refused_in_plain_words(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(decisions.VARIABLE, value)
    pipe = tiny_pipe()
    with pytest.raises(ValueError, match=f"DIT_ACCEL_GUARD must be 'on' or 'off', not {value!r}"):
        dit_accel.accelerate(pipe)
    assert not hasattr(pipe.transformer, CONTEXT)


@pytest.mark.parametrize("choice", [{"strict": True}, {"backend": "reference"}, {"backend": "cpu"}], ids=str)
def test_strict_or_a_named_backend_measures_nothing(choice: dict[str, Any], slower: list[Any], sparse_calls: list[Any]) -> None:
    run(dit_accel.accelerate(tiny_pipe(), Fovea(0.2), **choice), steps=1)
    assert slower == []
    assert len(sparse_calls) == LAYERS


def test_training_and_measuring_run_the_method(slower: list[Any], sparse_calls: list[Any]) -> None:
    pipe = dit_accel.accelerate(tiny_pipe(), SLA(0.2))
    with always(pipe):
        run(pipe, steps=1)
    assert slower == []
    assert len(sparse_calls) == LAYERS
    with torch.enable_grad():
        pipe.transformer(**forward_arguments())
    assert len(sparse_calls) == 2 * LAYERS
    run(pipe, steps=1)
    assert len(sparse_calls) == 2 * LAYERS


@pytest.mark.parametrize("train", ["parameters", "lora", "attention"])
def test_weights_trained_for_a_method_run_with_it(train: Any, slower: list[Any], sparse_calls: list[Any], tmp_path: Path) -> None:
    pipe = tiny.student(train)
    result = tiny.learn(pipe, tmp_path / "run", steps=2, train=train)
    assert result.error_before > 1e-5
    dit_accel.save_adapter(pipe, tmp_path / "adapter")
    ready = dit_accel.load_adapter(tiny.prompt_pipe(), tmp_path / "adapter")
    for each in (pipe, ready):
        sparse_calls.clear()
        tiny.draw(each)
        assert bool(sparse_calls) == (train != "parameters")


def test_a_shape_is_measured_once_and_leaves_no_trace() -> None:
    state = torch.random.get_rng_state()
    shape = (Fovea(0.2), TokenLayout((1, 12, 20), 5), 16, torch.float32, CPU)
    first = guard.measured(*shape)
    assert first is not None
    assert first.accelerated > 0
    assert first.original > 0
    assert guard.measured(*shape) is first
    assert guard.measured(Fovea(0.2), TokenLayout((1, 20, 12), 5), 16, torch.float32, CPU) is not first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_extrapolation_counts_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 0.5, 3.0, 0.25, 2.0, 0.75])  # accelerated, original, in turns
    monkeypatch.setattr(guard, "_seconds", lambda _: next(times))
    found = guard.measured(CLEAR(3), TokenLayout((1, 64, 80)), 8, torch.float32, CPU)  # 5,120 tokens, of which 819 rows are timed
    assert found is not None
    assert (found.accelerated, found.original) == (1.0, 0.25 * 5120 / 819)


@pytest.mark.parametrize(("tokens", "heads"), [(256, 24), (4608, 24), (16384, 24), (30000, 13), (76000, 8), (10**6, 8)])
def test_long_sequences_are_timed_on_a_gpu_with_fewer_heads(tokens: int, heads: int) -> None:
    assert guard.heads_on_gpu(tokens) == heads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")
def test_a_card_is_measured_without_the_processors_share() -> None:
    found = guard.measured(CLEAR(8), TokenLayout((1, 64, 64), 512), 128, torch.bfloat16, torch.device("cuda"))
    assert found is not None
    assert 0 < found.accelerated < 0.01  # seconds; a call from an idle card would hold what the processor takes too
    assert 0 < found.original < 0.01
