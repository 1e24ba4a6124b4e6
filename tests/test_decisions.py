"""Timing decides no picture: one decision for all processes, kept in the cache folder, and the same for prompts of any length."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run, tiny_pipe
from test_families import Tiny

import dit_accel
from dit_accel import CLEAR, SLA, Fovea, TokenLayout
from dit_accel.kernels import dispatch
from dit_accel.kernels.cpu import native
from dit_accel.method import Tiles
from dit_accel.operator import decisions, guard

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
QUESTION = {"device": "a CPU", "grids": [[1, 8, 8]], "spec": {"keep": [1.5, None]}}
pytestmark = [pytest.mark.crossover, pytest.mark.filterwarnings("ignore:dit_accel. the original attention runs")]

# Times are random, as the worst of stopwatches would have them: only a decision that is shared is the same in all processes.
PROGRAM = """
import random, torch
from dit_accel import CLEAR, Fovea, TokenLayout
from dit_accel.operator import guard
torch.set_num_threads(1)
guard._measure = lambda *_: (random.choice((1.0, 2.0)), 1.0)
for spec in (Fovea(), CLEAR(8)):
    for side in range(16, 49, 4):
        layout = TokenLayout((1, side, side), 7, order=spec.order)
        print(guard.measured(spec, layout, 64, torch.float32, torch.device("cpu")).loses)
"""


def test_three_processes_decide_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start at once and then this one, at the built-in model's shapes from 256 to 768 pixels."""
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    printed = [process.communicate()[0].split() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(guard, "_measure", guard._measure)  # which the program replaces
    exec(PROGRAM, {})
    printed.append(capsys.readouterr().out.split())
    assert printed[0] == printed[1] == printed[2]
    assert sorted(set(printed[0])) == ["False", "True"]  # 18 coins
    assert len(list((tmp_path / "dit_accel" / "guard").glob("*.json"))) == 18


def test_one_seed_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture of the built-in model, drawn by three that share the cache folder alone: by the stopwatch, each would decide otherwise."""
    times = itertools.cycle([(2.0, 1.0), (1.0, 2.0)])
    monkeypatch.setattr(guard, "_measure", lambda *_: next(times))
    call: dict[str, Any] = {"height": 256, "width": 256, "num_inference_steps": 1, "max_sequence_length": 8, "output_type": "latent"}

    pipe = dit_accel.builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def draw() -> torch.Tensor:
        monkeypatch.setattr(guard, "_known", {})
        dit_accel.accelerate(pipe)
        latents: torch.Tensor = pipe("a panda", generator=torch.Generator().manual_seed(0), **call).images
        dit_accel.restore(pipe)
        return latents

    first, second, third = (draw() for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")  # nothing can be kept there: now the times do decide
    other, another = (draw() for _ in range(2))
    assert not torch.equal(other, another)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[TokenLayout]:
    """Every measurement gives other times; grows by the layouts measured."""
    layouts: list[TokenLayout] = []
    times: Iterator[float] = itertools.count(1.0)  # type: ignore[assignment]

    def measure(spec: Any, layout: TokenLayout, *_: object) -> tuple[float, float]:
        layouts.append(layout)
        return next(times), 0.5

    monkeypatch.setattr(guard, "_measure", measure)
    return layouts


def again(monkeypatch: pytest.MonkeyPatch, *shape: Any) -> guard.Crossover:
    """What another process would find."""
    monkeypatch.setattr(guard, "_known", {})
    found = guard.measured(*shape)
    assert found is not None
    return found


SHAPE = (Fovea(0.2), TokenLayout((1, 12, 20), 5), 16, torch.float32, CPU)


def test_the_first_decision_holds_for_all(timed: list[TokenLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [again(monkeypatch, *SHAPE) for _ in range(3)]
    assert found[0] == found[1] == found[2]
    assert len(timed) == 1
    assert found[0].file is not None
    assert found[0].file.parent == Path(os.environ["XDG_CACHE_HOME"]) / "dit_accel" / "guard"
    assert str(found[0].file) in str(found[0])


def test_the_texts_length_is_no_part_of_it(timed: list[TokenLayout]) -> None:
    spec, grid = Fovea(0.2), (1, 12, 20)
    found = {guard.measured(spec, TokenLayout(grid, text), 16, torch.float32, CPU) for text in (0, 9, 120)}
    assert len(found) == 1
    assert [layout.text for layout in timed] == [0]


@pytest.mark.parametrize("lengths", [(6, 2), (2, 6)], ids=str)
def test_both_passes_of_guidance_decide_alike(lengths: tuple[int, int], sparse_calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a stopwatch says of each sequence."""
    times = itertools.cycle([(3.0, 1.0), (1.0, 3.0)])
    monkeypatch.setattr(guard, "_measure", lambda *_: next(times))
    tiny = Tiny("qwen_image")
    dit_accel.accelerate(tiny.pipe, SLA(0.3, tile=(4, 4)))
    embeds, mask = tiny.call["prompt_embeds"], tiny.call["prompt_embeds_mask"]
    repeated = embeds.repeat(1, 6, 1)
    call: dict[str, Any] = {"true_cfg_scale": 2.0}
    for prefix, length in zip(("", "negative_"), lengths, strict=True):
        call[f"{prefix}prompt_embeds"] = repeated[:, :length]
        call[f"{prefix}prompt_embeds_mask"] = torch.ones(1, length, dtype=mask.dtype)
    tiny.run(**call)
    assert sparse_calls == []
    assert {row.backend for row in dit_accel.summary(tiny.pipe, show=False)} == {"original"}


OTHERS: dict[str, tuple[Any, ...]] = {
    "spec": (Fovea(0.3), *SHAPE[1:]),
    "grid": (SHAPE[0], TokenLayout((1, 20, 12), 5), *SHAPE[2:]),
    "references": (SHAPE[0], TokenLayout((1, 12, 20), 5, references=((1, 4, 4),)), *SHAPE[2:]),
    "order": (SHAPE[0], TokenLayout((1, 12, 20), 5, order=Tiles((8, 8))), *SHAPE[2:]),
    "head-dim": (*SHAPE[:2], 32, *SHAPE[3:]),
    "dtype": (*SHAPE[:3], torch.bfloat16, CPU),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_another_question_has_its_own_answer(other: tuple[Any, ...], timed: list[TokenLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    assert again(monkeypatch, *SHAPE) != again(monkeypatch, *other)
    assert len(timed) == 2


@pytest.mark.parametrize("what", ["threads", "target", "kernels", "version", "cpu"])
def test_another_machine_has_its_own_answer(what: str, timed: list[TokenLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    first = again(monkeypatch, *SHAPE)
    match what:
        case "threads":
            monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
        case "target":
            monkeypatch.setenv(native.TARGET_VARIABLE, "portable")
        case "kernels":
            monkeypatch.setattr(guard.sources, "fingerprint", lambda *_: "other")
        case "version":
            monkeypatch.setattr(guard, "__version__", "9.9")
        case "cpu":
            monkeypatch.setattr(decisions, "cpu_name", lambda: "another CPU")
    assert again(monkeypatch, *SHAPE) != first
    assert len(timed) == 2


# The file


def test_a_file_says_what_it_answers() -> None:
    times, path = decisions.decided(QUESTION, lambda: (2.0, 1.0))
    assert times == (2.0, 1.0)
    assert path is not None
    assert json.loads(path.read_text()) == {"format": 1, "question": QUESTION, "accelerated": 2.0, "original": 1.0}
    assert sorted(file.name for file in path.parent.iterdir()) == [".lock", path.name]
    assert decisions.decided(QUESTION, pytest.fail) == ((2.0, 1.0), path)  # type: ignore[arg-type]


GOOD = {"format": 1, "question": QUESTION, "accelerated": 2.0, "original": 1.0}
BAD: dict[str, Any] = {
    "empty": "", "half": '{"format": 1, "quest', "list": [1], "number": 7, "binary": b"\x80\xff", "deep": "[" * 100_000,
    "format": GOOD | {"format": 2}, "foreign": GOOD | {"question": QUESTION | {"device": "another CPU"}}, "unknown": GOOD | {"loses": True},
    "missing": {k: v for k, v in GOOD.items() if k != "original"}, "nan": GOOD | {"accelerated": float("nan")},
    "zero": GOOD | {"original": 0.0}, "text": GOOD | {"original": "1.0"}, "true": GOOD | {"original": True},
}  # fmt: skip


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_a_damaged_or_foreign_file_is_not_trusted(content: Any) -> None:
    _, path = decisions.decided(QUESTION, lambda: (2.0, 1.0))
    assert path is not None
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    assert decisions.decided(QUESTION, lambda: (5.0, 4.0)) == ((5.0, 4.0), path)
    assert decisions.decided(QUESTION, pytest.fail) == ((5.0, 4.0), path)  # type: ignore[arg-type]


@pytest.mark.parametrize("obstacle", ["file", "no-home", "directory"])
def test_without_a_folder_to_write_to_it_works_for_the_process(obstacle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read-only folders refuse in the same way; root, whom nothing refuses, may run this."""
    match obstacle:
        case "file":
            (tmp_path / "cache").write_text("not a folder")
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        case "no-home":
            monkeypatch.delenv("XDG_CACHE_HOME")
            monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as it does for a user whom the system does not know
            monkeypatch.chdir(tmp_path)
        case "directory":
            _, path = decisions.decided(QUESTION, lambda: (2.0, 1.0))
            assert path is not None
            path.unlink()
            path.mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert decisions.decided(QUESTION, lambda: (5.0, 4.0)) == ((5.0, 4.0), None)
    assert sorted(tmp_path.rglob("*")) == before
    assert "for this process alone" in str(guard.Crossover(5.0, 4.0))


def test_a_full_disk_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: Any) -> None:
        raise decisions.WriteError("no space left")

    monkeypatch.setattr(decisions, "create_json", full)
    assert decisions.decided(QUESTION, lambda: (5.0, 4.0)) == ((5.0, 4.0), None)


def test_whoever_is_second_waits_and_measures_nothing() -> None:
    inside, asked, found = threading.Event(), [], []

    def measure() -> tuple[float, float]:
        asked.append(1)
        inside.set()
        threading.Event().wait(0.1)
        return float(len(asked)), 1.0

    threads = [threading.Thread(target=lambda: found.append(decisions.decided(QUESTION, measure)[0])) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert inside.is_set()
    assert asked == [1]
    assert found == [(1.0, 1.0)] * 3


@pytest.mark.parametrize("reason", ["no-locks", "no-patience"])
def test_without_locks_the_first_file_holds(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that measured at the same time: the later one takes what the earlier one wrote."""
    import fcntl

    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented") if reason == "no-locks" else BlockingIOError

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(decisions, "WAIT", 0.05)

    def slow() -> tuple[float, float]:
        assert decisions.decided(QUESTION, lambda: (1.0, 2.0))[0] == (1.0, 2.0)  # another process, meanwhile
        return 3.0, 4.0

    assert decisions.decided(QUESTION, slow)[0] == (1.0, 2.0)


# On a GPU, with stand-ins for it


class Event:
    """A stand-in for torch.cuda.Event that notes what happens to it."""

    log: list[str]

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.log.append("record")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return 250.0


def test_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Event, "log", [], raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "mm", lambda *_: Event.log.append("busy"))
    monkeypatch.setattr(guard, "AHEAD", 4)

    @contextlib.contextmanager
    def on(device: torch.device) -> Iterator[None]:  # events are recorded on the current device, which may not be the model's
        Event.log.append(f"on {device}")
        yield
        Event.log.append("off")

    monkeypatch.setattr(torch.cuda, "device", on)
    assert guard._seconds_on_gpu(CPU, lambda: Event.log.append("run")) == 0.25
    assert Event.log == ["busy", "busy", "on cpu", "record", "run", "record", "off", "synchronize"]


def test_a_gpu_has_its_own_answer_and_none_while_a_graph_is_captured(timed: list[TokenLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = True
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(dispatch, "_capability", lambda _: (9, 0))
    shape = (CLEAR(2.0), TokenLayout((1, 16, 16)), 64, torch.bfloat16, CUDA)
    assert guard.measured(*shape) is None
    assert timed == []
    capturing = False
    found = guard.measured(*shape)
    assert found is not None
    assert found.file is not None
    question = json.loads(found.file.read_text())["question"]
    assert (question["device"], question["dtype"], question["head_dim"]) == ("a GPU", "bfloat16", 64)
    capturing = True
    assert guard.measured(*shape) is found  # known: nothing is to be measured
    assert len(timed) == 1


def test_a_device_without_memory_for_it_runs_the_method(timed: list[TokenLayout], monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def full(*_: Any) -> tuple[float, float]:
        tries.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(guard, "_measure", full)
    shape = (CLEAR(2.0), TokenLayout((1, 16, 16)), 64, torch.float32, CPU)
    with pytest.warns(UserWarning, match="was not measured, and it runs: CUDA out of memory"):
        assert guard.measured(*shape) is None
    assert guard.measured(*shape) is None
    assert len(tries) == 1


@pytest.mark.parametrize("kind", ["mps", "meta", "xpu"])
def test_other_devices_are_not_measured(kind: str, timed: list[TokenLayout]) -> None:
    assert guard.measured(*SHAPE[:4], torch.device(kind)) is None
    assert timed == []


def test_a_forward_asks_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(guard, "measured", lambda *shape: asked.append(shape))
    run(dit_accel.accelerate(tiny_pipe(), Fovea(0.2)), steps=1)
    assert [(shape[2], shape[3], shape[4]) for shape in asked] == [(16, torch.float32, CPU)]
