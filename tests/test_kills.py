"""Processes killed for good, at any moment and in the middle of writing a file: what is left continues to the same bits."""

import dataclasses
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import hires_fixtures as stages
import pytest
from distill_fixtures import CALL, PROMPTS, learn, prompt_pipe, state

from dit_accel import CLEAR, AttentionSpec, Fovea, accelerate, files
from dit_accel.finetune.data.collect import Samples, collect, damaged_runs

MANY = [f"{prompt} {number}" for number in range(4) for prompt in PROMPTS]
RUN: dict[str, Any] = {"steps": 6, "parameter_steps": 6, "checkpoint_every": 2}
SERVER = multiprocessing.get_context("forkserver")  # one process imports everything, and those that are killed are forked from it


def _collect(folder: Path, before: Callable[..., None]) -> dict[str, bytes]:
    pipe = prompt_pipe()
    pipe.transformer.register_forward_pre_hook(before)
    samples = collect(pipe, MANY, folder, **CALL)
    assert [entry.prompt for entry in samples.entries] == MANY
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def _distill(folder: Path, before: Callable[..., None], spec: AttentionSpec = tiny.SPARSE) -> tuple[Any, dict[str, list[Any]]]:
    pipe = accelerate(prompt_pipe(), spec)
    pipe.transformer.register_forward_pre_hook(before)
    result = learn(pipe, folder, train="lora", **RUN)
    logs = {name: len((folder / name).read_text().splitlines()) for name in ("log.jsonl", "parameters.jsonl")}
    assert not any(path.name.startswith(".") for path in folder.iterdir())
    weights = {name: tensor.flatten().tolist() for name, tensor in state(pipe.transformer).items()}
    return dataclasses.replace(tiny.untimed(result), resumed_from=0), {"logs": list(logs.items()), **weights}


def _descend(folder: Path, before: Callable[..., None]) -> Any:
    return _distill(folder, before, Fovea(0.25, tile=(4, 4)))


def _draw(folder: Path, before: Callable[..., None]) -> bytes:
    pipe, call = stages.make()
    accelerate(pipe, CLEAR(3.0))
    pipe.transformer.register_forward_pre_hook(before)
    return stages.draw(pipe, call, base=12, folder=folder, strength=0.75).tobytes()


@dataclass(frozen=True)
class Program:
    """What runs in a folder; `begun`: the file after which it may be killed; `half`: in the name of the file that it is killed within."""

    run: Callable[[Path, Callable[..., None]], Any]
    begun: str
    half: str


PROGRAMS = {
    "collect": Program(_collect, "run-*", ".run-"),
    "least-squares": Program(_distill, "parameters-0000002", ".parameters-0000004"),
    "descent": Program(_descend, "parameters-0000002", ".parameters-0000004"),
    "second-stage": Program(_distill, "checkpoint-0000002", ".checkpoint-0000004"),
    "hires": Program(_draw, "stage-0-*.json", ".stage-1-"),
}


def errors_of(folder: Path) -> Path:
    """What the processes that work in a folder write to their stderr."""
    return folder.with_name("stderr.txt")


def child(name: str, folder: str, half: bool) -> None:
    """Run a program to be killed: slowly once it has begun, or stopping for ever within a file that is half written."""
    os.dup2(os.open(errors_of(Path(folder)), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    program, real = PROGRAMS[name], files._save

    def slowly(*_: Any) -> None:
        time.sleep(0.1 * (not half and any(Path(folder).glob(program.begun))))

    def stopping(path: Path, *arguments: Any) -> None:
        real(path, *arguments)
        if half and program.half in str(path) and any(Path(folder).glob(program.begun)):
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
            (Path(folder).parent / "half").touch()
            time.sleep(600)

    files._save = stopping
    program.run(Path(folder), slowly)


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    """The process that the others are forked from finds this module."""
    tests = Path(__file__).parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]))
        SERVER.set_forkserver_preload([__name__])
        yield


def start(name: str, folder: Path, *, half: bool = False) -> BaseProcess:
    process = SERVER.Process(target=child, args=(name, str(folder), half))
    process.start()
    return process


def kill(process: BaseProcess, folder: Path, ready: Callable[[], bool], delay: float) -> None:
    """SIGKILL so long after it is ready."""
    try:
        deadline = time.monotonic() + 120
        while not ready() and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(delay)
    finally:
        process.kill()
        process.join(60)
    assert process.exitcode == -signal.SIGKILL, errors_of(folder).read_text()[-3000:]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """What each program gives that nobody kills."""
    results = {run: run(tmp_path_factory.mktemp("whole") / "run", lambda *_: None) for run in {p.run for p in PROGRAMS.values()}}
    return {name: results[program.run] for name, program in PROGRAMS.items()}


@pytest.mark.parametrize("half", [False, True], ids=["any-moment", "half-written"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_what_a_killed_process_left_continues_to_the_bit(tmp_path: Path, expected: dict[str, Any], name: str, half: bool) -> None:
    program, folder, delay = PROGRAMS[name], tmp_path / "run", 0.0 if half else random.uniform(0, 0.4)
    kill(start(name, folder, half=half), folder, lambda: any((tmp_path if half else folder).glob("half" if half else program.begun)), delay)
    left = [path for path in folder.iterdir() if path.name.startswith(".")]
    assert len(left) == 1 or not half
    assert "parameters" not in program.half or not any(folder.glob("checkpoint-*"))
    assert "checkpoint" not in program.half or not (folder / "checkpoint-0000006").exists()
    assert program.run(folder, lambda *_: None) == expected[name], delay


def test_two_processes_fill_a_folder_and_both_are_killed(tmp_path: Path, expected: dict[str, Any]) -> None:
    folder = tmp_path / "run"
    delays = [random.uniform(0, 0.2), random.uniform(0, 0.2)]
    first, second = start("collect", folder), start("collect", folder)
    try:
        kill(first, folder, lambda: len(list(folder.glob("run-*"))) >= 2, delays[0])
        kill(second, folder, lambda: len(list(folder.glob("run-*"))) >= 4, delays[1])
    finally:
        for process in (first, second):
            process.kill()
    assert damaged_runs(folder) == {}, delays
    assert 4 <= len(Samples(folder).entries) < len(MANY), delays
    third, fourth = start("collect", folder), start("collect", folder)
    try:
        for process in (third, fourth):
            process.join(120)
    finally:
        for process in (third, fourth):
            process.kill()
    assert [process.exitcode for process in (third, fourth)] == [0, 0], errors_of(folder).read_text()[-3000:]
    got = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    assert got == expected["collect"], delays
