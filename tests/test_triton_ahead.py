"""Tuning's candidates compiled before they are timed: how many there are, in which processes, and into which cache."""

import os
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from dit_accel.kernels.triton.tables import Machine
from dit_accel.measure import gpu_tune, gpu_tune_ahead
from dit_accel.measure.gpu_tune import Work

HOPPER = Machine("sm_90", 132)
ROWS = Work("rows", "bfloat16", 64)


def test_the_trials_are_at_a_size_at_which_the_loop_over_kept_blocks_is_long() -> None:
    """5 % of the blocks, as many as are tried: 12 here, where 64 x 64 tokens had 3."""
    assert gpu_tune.GRID[1] * gpu_tune.GRID[2] // 64 * 0.05 > 12


def test_a_tuning_of_one_head_size_is_as_many_compilations_as_said() -> None:
    """Five minutes on 16 processors: compilations of 2.6 seconds shared by them, and timings one after the other."""
    for head_dim in gpu_tune.HEAD_DIMS:
        work = gpu_tune.work_of(None, [head_dim])
        jobs = gpu_tune_ahead.jobs_of(work, HOPPER, "a target")
        assert len(jobs) == len(set(jobs)) <= 400
        assert len(jobs) * 2.6 / 16 + 1.5 * len(jobs) * (0.17 + 0.05) < 200
        assert {(job.work, job.tile) for job in jobs} == {(one, tile) for one in work for tile in gpu_tune.candidates(one, HOPPER)}


class Pool:
    """Runs jobs here, or loses a process, as an executor of many does."""

    breaks = False
    started: ClassVar[list[int]] = []

    def __init__(self, processes: int, mp_context: Any) -> None:
        self.started.append(processes)

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, function: Any, jobs: list[Any], chunksize: int) -> Any:
        if self.breaks:
            raise BrokenProcessPool("killed")
        return map(function, jobs)


@pytest.mark.parametrize("breaks", [False, True])
def test_candidates_are_compiled_on_all_processors_unless_the_cache_has_them(
    breaks: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[gpu_tune_ahead.Job] = []
    taken = [9.0]
    monkeypatch.setattr(gpu_tune_ahead.Job, "run", lambda job: done.append(job) or list(taken))
    monkeypatch.setattr(gpu_tune_ahead.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(gpu_tune_ahead, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(gpu_tune_ahead.os, "cpu_count", lambda: 16)
    monkeypatch.setattr(Pool, "breaks", breaks)
    monkeypatch.setattr(Pool, "started", [])
    work = [ROWS, Work("merge", "bfloat16", 64)]
    jobs = gpu_tune_ahead.jobs_of(work, HOPPER, "a target")
    assert gpu_tune_ahead.compile_ahead(work, HOPPER, "a target", Console(width=200)) == 16
    assert set(done) == (set(jobs[-1:]) if breaks else set(jobs))
    assert ("compiled when they are timed" in capsys.readouterr().out) == breaks
    taken[0] = 0.01
    assert gpu_tune_ahead.compile_ahead(work, HOPPER, "a target", Console(width=200)) == 0
    assert gpu_tune_ahead.compile_ahead([], HOPPER, "a target", Console(width=200)) == 0
    assert Pool.started == [16]


AHEAD = """
import sys, time
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from dit_accel.measure import gpu_tune
from dit_accel.measure import gpu_tune_ahead
from dit_accel.kernels.triton import backward
from dit_accel.kernels.triton.tables import Machine, Tile
torch.set_num_threads(1)
work, tile, target = gpu_tune.Work("merge", "bfloat16", 64), Tile(64, 32, 4, 2), GPUTarget("cuda", 90, 32)
job = gpu_tune_ahead.Job(work, tile, "clear", Machine("sm_90", 132), target)
found = []
for again in range(2):
    seconds = job.run()
    found.append((len(seconds), len(list(Path(sys.argv[1]).rglob("*.cubin")))))
    backward.deltas.device_caches.clear()
print(found, torch.cuda.is_initialized(), triton.runtime.driver._active)
"""


def test_a_candidate_is_compiled_into_the_shared_cache_without_a_card(tmp_path: Path) -> None:
    """In a process of its own: this one interprets the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", AHEAD, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["[(1, 1), (1, 1)] False None"], done.stdout + done.stderr
