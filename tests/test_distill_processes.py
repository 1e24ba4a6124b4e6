"""Distillation in two processes over gloo, as `accelerate launch --cpu --num_processes 2` starts them, against one alone."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
from distill_fixtures import learn, prompt_pipe, state
from safetensors.torch import load_file

from dit_accel import accelerate
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.distill import DistillResult

RUN: dict[str, Any] = {
    "steps": 4, "batch_size": 4, "parameter_steps": 2, "checkpoint_every": 2, "evaluate_every": 3, "flow_weight": 0.5,
}  # fmt: skip

# One of the processes: it learns, learns again from the checkpoint before the last, tries a batch that two can't share, and leaves what
# it got. Whoever would write what is the main process's to write fails.
CHILD = """
import dataclasses, json, shutil, sys
from pathlib import Path
import torch
from accelerate import PartialState
from distill_fixtures import learn, prompt_pipe, state, SPARSE
from safetensors.torch import save_file
import dit_accel.files
from dit_accel import accelerate
from dit_accel.errors import DistillationError
from test_distill_processes import RUN
torch.set_num_threads(1)
folder = Path(sys.argv[1])
main = PartialState(cpu=True).is_main_process
if not main:
    import dit_accel.finetune.checkpoints, dit_accel.finetune.data.collect
    dit_accel.finetune.checkpoints.replace_folder = dit_accel.finetune.data.collect.write_index = None
whole = learn(pipe := accelerate(prompt_pipe(), SPARSE), folder / "run", train="lora", **RUN)
if main:
    shutil.rmtree(folder / "run" / "checkpoint-0000004")
PartialState().wait_for_everyone()
resumed = learn(again := accelerate(prompt_pipe(), SPARSE), folder / "run", train="lora", **RUN)
try:
    learn(accelerate(prompt_pipe(), SPARSE), folder / "odd", batch_size=3)
    refused = ""
except DistillationError as error:
    refused = str(error)
rank = PartialState().process_index
for name, model in (("whole", pipe.transformer), ("resumed", again.transformer)):
    save_file({k: v.contiguous() for k, v in state(model).items()}, folder / f"{name}-{rank}.safetensors")
results = {"whole": dataclasses.asdict(whole), "resumed": dataclasses.asdict(resumed), "refused": refused}
(folder / f"result-{rank}.json").write_text(json.dumps(results))
PartialState().destroy_process_group()
"""


def launch(folder: Path, count: int = 2, child: str = CHILD) -> None:
    """Run a program in so many processes, in the environment that `accelerate launch` gives them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    shared = {
        "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    children = [
        subprocess.Popen(
            [sys.executable, "-c", child, str(folder)], env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip
    try:
        errors = [child.communicate(timeout=240)[1] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0] * count, "\n".join(text[-3000:] for text in errors)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in two processes."""
    folder = tmp_path_factory.mktemp("two")
    launch(folder)
    return folder


@pytest.fixture(scope="module")
def results(two: Path) -> list[dict[str, Any]]:
    """What each process got."""
    return [json.loads((two / f"result-{rank}.json").read_text()) for rank in (0, 1)]


def close(left: Any, right: Any) -> bool:
    """Equal structures, their numbers to the rounding of sums in another order."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(close(a, b) for a, b in zip(left, right, strict=True))
    return left == (pytest.approx(right, rel=1e-4) if isinstance(right, float) else right)


def untimed(result: dict[str, Any]) -> dict[str, Any]:
    """A result read back from JSON, without the seconds."""
    return vars(tiny.untimed(DistillResult(**result)))


def test_two_processes_learn_what_one_does(tmp_path: Path, two: Path, results: list[dict[str, Any]]) -> None:
    one = learn(pipe := accelerate(prompt_pipe(), tiny.SPARSE), tmp_path, train="lora", **RUN)
    assert close(untimed(results[0]["whole"]), vars(tiny.untimed(one)))
    assert len({row["loss"] for row in tiny.steps_of(one)}) > 1
    start, theirs = state(accelerate(prompt_pipe(), tiny.SPARSE).transformer), load_file(two / "whole-0.safetensors")
    moved = 0
    for name, expected in state(pipe.transformer).items():
        step = float((expected - start.get(name.replace(".base_layer", ""), torch.zeros(()))).abs().max())
        moved += step > 0
        assert float((theirs[name] - expected).abs().max()) <= 1e-3 * step, name
    assert moved > 10


def test_the_processes_agree_to_the_bit(two: Path, results: list[dict[str, Any]]) -> None:
    assert results[0] == results[1]
    first, second = (load_file(two / f"whole-{rank}.safetensors") for rank in (0, 1))
    assert tiny.same(first, second)


def test_all_resume(two: Path, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert untimed(result["resumed"]) == untimed(result["whole"]) | {"resumed_from": 2}
    assert tiny.same(load_file(two / "resumed-1.safetensors"), load_file(two / "whole-0.safetensors"))


def test_one_process_continues_what_two_began(tmp_path: Path, two: Path, results: list[dict[str, Any]]) -> None:
    shutil.copytree(two / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-0000004")
    got = learn(accelerate(prompt_pipe(), tiny.SPARSE), tmp_path / "run", train="lora", **RUN)
    assert got.resumed_from == 2
    assert close(vars(tiny.untimed(got)), untimed(results[0]["whole"]) | {"resumed_from": 2})


def test_the_main_process_alone_writes_logs_and_checkpoints(two: Path, results: list[dict[str, Any]]) -> None:
    for name, key in (("log.jsonl", "history"), ("parameters.jsonl", "parameter_history")):
        assert [json.loads(line) for line in (two / "run" / name).read_text().splitlines()] == results[0]["resumed"][key]
    names = sorted(p.name for p in (two / "run").iterdir())
    assert names == [
        "checkpoint-0000002", "checkpoint-0000004", "curve.png", "held-out", "log.jsonl", "parameters-0000002", "parameters.jsonl",
        "samples",
    ]  # fmt: skip


def test_prompts_are_shared_and_recorded_as_by_one(tmp_path: Path, two: Path) -> None:
    for name, prompts, seed in (("samples", tiny.PROMPTS[:2], 0), ("held-out", tiny.PROMPTS[2:], 1_000_000)):
        alone = collect(prompt_pipe(), prompts, tmp_path / name, seed=seed, **tiny.CALL)
        shared = Samples(two / "run" / name)
        assert shared.manifest == alone.manifest
        assert [(e.file, e.prompt, e.forwards) for e in shared.entries] == [(e.file, e.prompt, e.forwards) for e in alone.entries]
        assert sorted(p.name for p in shared.folder.iterdir()) == sorted(p.name for p in alone.folder.iterdir())
        for i in range(len(alone)):
            assert torch.allclose(shared[i].prediction, alone[i].prediction, atol=1e-5)


def test_a_batch_that_the_processes_cannot_share_is_refused(results: list[dict[str, Any]]) -> None:
    assert [result["refused"] for result in results] == [
        "batch_size must be a multiple of 2, the number of processes that share it, not 3"
    ] * 2  # fmt: skip
