"""What the GPU kernels compile to, without a GPU. Every table entry and architecture is checked by `.ci/aot`; here is one of each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.kernels import dispatch
from dit_accel.kernels.dispatch import LINEAR_LIMIT
from dit_accel.kernels.triton import aot
from dit_accel.kernels.triton.tables import ARCHITECTURES, KERNELS, SHARED_LIMIT, Machine, tile_for
from dit_accel.measure.gpu_compile import EVERY, INT8, STATES, jobs

OTHERS = {
    "block_moments", "choose_by_means", "sum_states", "hidden_bits", "summarise", "summarise_parts", "tilted_deltas", "gradient_slopes",
    "group_level", "span_logits", "see_units", "weigh_units", "mix_units", "gradient_parts", "gradient_queries", "gradient_level",
    "gradient_mixed_weights", "gradient_mixed_slopes", "gradient_shares", "gradient_joined", "gradient_mean_queries",
}  # fmt: skip


def bench(out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: this one interprets the kernels."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dit_accel.cli", "bench", "kernels", "--aot", "--out", str(out), *options]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("aot") / "aot.json"
    done = bench(
        out, "--arch", "sm_90", "--arch", "gfx942", "--head-dim", "64", "--dtype", "bfloat16", "--method", "fovea", "--method", "sla",
        "--method", "fovea, groups",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found: list[dict[str, Any]] = json.loads(out.read_text())["rows"]
    return found


def test_every_kernel_is_there(rows: list[dict[str, Any]]) -> None:
    for arch in ("sm_90", "gfx942"):
        assert {row["kernel"] for row in rows if row["arch"] == arch} >= aot.MATRIX_KERNELS | OTHERS


def test_nothing_is_spilled(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"]: row["spilled"] for row in rows if row["spilled"]} == {}


def test_shared_memory_fits_with_two_stages(rows: list[dict[str, Any]]) -> None:
    assert [row for row in rows if row["shared"] > SHARED_LIMIT[row["arch"]]] == []
    assert {row["stages"] for row in rows if row["kernel"] in aot.MATRIX_KERNELS} <= {2, 3}


def test_loops_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    """On Hopper the main loops on warp-group instructions, which require 64 rows; on CDNA all on matrix instructions."""
    for row in rows:
        if row["kernel"] in aot.MATRIX_KERNELS:
            assert aot.TENSOR_CORES[row["arch"]] in row["looped"], row
            assert 0 < row["occupancy"] <= 1


KERNELS_OF_A_SIZE = """
import sys, torch
from dit_accel.operator import composition
from dit_accel.kernels.triton import aot, calls
from dit_accel.kernels.triton.tables import Machine
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.method.presets import CLEAR, Fovea, SLA

MORE = {
    "block_moments", "sum_states", "summarise", "summarise_parts", "deltas", "tilted_deltas", "gradient_slopes", "mix_units",
    "gradient_parts", "gradient_queries", "gradient_mixed_weights", "gradient_mixed_slopes",
}  # fmt: skip
for height, width, text in (map(int, size.split(",")) for size in sys.argv[1:]):
    print("size")
    for spec in (Fovea(0.2), CLEAR(4), SLA(0.2), Fovea(0.2, order=1, parts=2)):
        layout = TokenLayout((1, height, width), text)
        q, k, v = (torch.zeros(2, 3, layout.tokens, 64, requires_grad=True) for _ in range(3))
        with calls.recorded(Machine("sm_90", 132)) as launches:
            plan, params = make_plan(spec, layout, q.device), start_values(spec, q).requires_grad_()
            composition.attend(q, k, v, spec, layout, plan, params(), 0.125, "triton")[0].sum().backward()
        for launch in launches:
            if launch.kernel.__name__ in aot.MATRIX_KERNELS | MORE:
                source = aot.source(launch)
                print(launch.kernel.__name__, source.signature, source.constants, source.attrs)
"""


def test_another_size_compiles_nothing_anew() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", KERNELS_OF_A_SIZE, "32,32,64", "33,40,77", "24,47,1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = done.stdout.split("size\n")[1:]
    assert len(found) == 3
    assert len(found[0].splitlines()) > 20
    assert found[1] == found[0]
    assert found[2] == found[0]


CHOICES = """
import sys, torch
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import aot, launch_choice
from dit_accel.kernels.triton.tables import Machine

for arch in sys.argv[1:]:
    for blocks in (launch_choice.TOGETHER // 2, launch_choice.TOGETHER, launch_choice.TOGETHER + 1):
        x = torch.empty(1, 2, 64 * blocks, 128, dtype=torch.bfloat16, device="meta")
        starts = torch.empty(blocks + 1, dtype=torch.int32, device="meta")
        a = SelectionArguments(x, x, starts, starts, 64, 64, blocks // 20, v=x, scale=0.1, score_cap=2.0, pooled=True)
        launches = []
        launch_choice.select_blocks(a, Machine(arch, 132), launches.append)
        for one in launches:
            compiled = aot.compile_launch(one, arch)
            print(arch, compiled.kernel, *compiled.faults(), sep=": ")
"""


def test_a_choice_among_any_number_of_blocks_spills_nothing() -> None:
    archs = ["sm_90", "sm_120", "gfx942"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", CHOICES, *archs], env=environment, capture_output=True, text=True, check=False)
    kernels = ["block_moments", "choose_by_means"] * 2 + ["block_moments", "score_biases", "multiply", "choose_blocks"]
    assert done.stdout.splitlines() == [f"{arch}: {kernel}" for arch in archs for kernel in kernels], done.stderr


PTX = """
$L__BB0_1:
  wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16
$L__BB0_2:
  mma.sync.aligned.m16n8k16
  @%p1 bra $L__BB0_2;
  @%p2 bra $L__BB0_1;
  bra.uni $L__BB0_3;
  mma.sync.aligned.m16n8k16
$L__BB0_3:
"""


def test_only_loops_count() -> None:
    assert aot.looped(PTX) == (2, {"wgmma.mma_async": 1, "mma.sync": 1})


def test_faults_are_named() -> None:
    bad = aot.Compiled("attend_rows", "sm_120", 4, 1, 255, 8, 150_000, 1, {}, 1)
    found = " ".join(bad.faults())
    assert all(word in found for word in ("8 bytes of stack", "150000 bytes of shared", "1 pipeline stage", "no tensor-core"))
    assert aot.Compiled("attend_rows", "sm_90", 4, 2, 128, 0, 65536, 1, {"wgmma.mma_async": 8}, 1).faults() == []


def test_occupancy_by_hand() -> None:
    # 4 warps of 128 registers: 65536 / (128 · 128) = 4 programs; 65,536 + 1,024 bytes: 233,472 / 66,560 = 3 programs of 128 threads
    assert aot.Compiled("attend_rows", "sm_90", 4, 2, 128, 0, 65536, 1, {}, 1).occupancy == 3 * 128 / 2048


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_rows_that_a_float32_program_holds_fit_with_those_of_one_step(arch: str) -> None:
    """Query rows and key rows once, of which a pipeline holds more: what exceeds that at the start compiles to nothing that runs."""
    for kernel in KERNELS:
        for head_dim in (16, 64, 128):
            tile = tile_for(kernel, Machine(arch, 1), head_dim, torch.float32, 64, 64)
            assert (tile.queries + tile.keys) * head_dim * 4 <= SHARED_LIMIT[arch]


def test_jobs() -> None:
    wide = [job for job in jobs() if job.method not in INT8]
    states = [name for name in STATES if name not in INT8]
    assert len(wide) == ((len(EVERY) - len(INT8)) * 3 - len(states)) * len(ARCHITECTURES) * 3
    assert {(job.arch, job.dtype) for job in jobs() if job.method in INT8} == {
        (arch, dtype) for arch in ("sm_80", "sm_90", "sm_120") for dtype in ("bfloat16", "float16")
    }
    assert jobs(["clear, 8 bits"], ["sm_89"], [64], ["bfloat16"])
    assert {job.method for job in jobs() if job.head_dim > LINEAR_LIMIT} == EVERY.keys() - STATES
    with pytest.raises(ValueError, match=r"arch must be one of .*not 'sm_75'"):
        jobs(archs=["sm_75"])


def test_the_interpreter_is_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", True)  # on a card tests interpret nothing
    done = CliRunner().invoke(app, ["bench", "kernels", "--aot", "--out", str(tmp_path / "aot.json")])
    assert done.exit_code != 0
    assert "TRITON_INTERPRET=1 interprets" in done.output
