"""`dit-accel bench kernels --aot`: what the GPU kernels compile to, for GPUs that need not be here."""

import dataclasses
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

from dit_accel.console import console
from dit_accel.errors import ArgumentError, BackendError
from dit_accel.files import write_json
from dit_accel.kernels import dispatch
from dit_accel.kernels.precision import int8_products
from dit_accel.kernels.triton.tables import ARCHITECTURES, TIMED, TOGETHER, Machine, Tile, tile_of_two
from dit_accel.method import AttentionSpec, Linear, Mass, Tiles, TopK
from dit_accel.method.parts import Pooled
from dit_accel.method.parts.call import Far, FarBlocks, FarSums, Moments
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator import composition
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout

if TYPE_CHECKING:
    from dit_accel.kernels.triton.launch import Launch

METHODS: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.05),
    "fovea, radius": Fovea(radius=8),
    "fovea, order 1": Fovea(0.05, order=1, parts=2),
    "fovea, groups": dataclasses.replace(Fovea(0.05, order=1), rest=Pooled(parts=4, order=1, opened=1)),
    "clear": CLEAR(8),
    "clear + pooled keys": CLEAR(8, downsample=4),
    "gna": GNA(9),
    "sla": SLA(0.1),
    "sla, all": SLA(0.1, "elu", "all"),
    "linear, mass": AttentionSpec((TopK(0.1),), Linear("relu"), Mass(), Tiles((8, 8)), (64, 64)),
}
# with a number added to each text key's logit, as where prompts of a batch are padded
PADDED = {f"{name}, padded text": METHODS[name] for name in ("fovea", "clear", "sla")}
# more blocks visited than left, so that the linear rest is summed block by block
MOST = {"sla, most kept": SLA(0.6)}
# two query blocks in a program, which no table says yet
TWO = {f"{name}, two blocks": METHODS[name] for name in ("fovea", "fovea, radius", "clear")}
# with pooled keys that are given, or the sums of far keys, as one process of several has those of all
BANDS = {"fovea, bands": METHODS["fovea, radius"], "sla, bands": MOST["sla, most kept"]}
# forward, with products of queries and keys in 8 bits
INT8 = {f"{name}, 8 bits": METHODS[name] for name in ("fovea", "fovea, radius", "fovea, order 1", "fovea, groups", "clear", "gna", "sla")}
INT8_SPILLED = 16  # bytes a thread that are no fault: the tiles are those that spill none with 16 bits
INT8_ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_120")  # those of `dispatch.INT8_CAPABILITIES`
EVERY = METHODS | PADDED | MOST | TWO | BANDS | INT8
# a linear rest, for which the kernels take heads up to LINEAR_LIMIT
STATES = tuple(name for name in EVERY if name.startswith(("sla", "linear")))
HEAD_DIMS = (64, 128, 256)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILED = DTYPES | {"float32": torch.float32}
SPILLED = {"float32": 64}  # bytes a thread that are no fault: three products of parts take registers
UNITS = (132, 1)  # multiprocessors: many leave the text to launches of its own, few put it among other programs, as large calls do


@dataclasses.dataclass(frozen=True)
class Job:
    """All kernels of one method, forward and backward, for one architecture."""

    method: str
    arch: str
    head_dim: int
    dtype: str

    @property
    def spilled(self) -> int | None:
        """Bytes a thread that are no fault; None: any, because a clock chose the tiles."""
        if self.dtype in SPILLED:
            return SPILLED[self.dtype]
        if (self.arch, self.head_dim) in TIMED:
            return None
        return INT8_SPILLED if self.method in INT8 else 0

    def _tuned(self) -> dict[tuple[str, str, int], Tile]:
        """Of a method of TWO the tiles of two blocks, where the architecture has any."""
        found = {} if self.method not in TWO else {kernel: tile_of_two(kernel, self.arch, self.head_dim) for kernel in TOGETHER}
        return {(kernel, self.dtype, self.head_dim): tile for kernel, tile in found.items() if tile is not None}

    def launches(self) -> list["Launch"]:
        """One of each kernel that is compiled."""
        from dit_accel.kernels.triton import aot, calls

        spec = EVERY[self.method]
        layout = TokenLayout((1, 32, 32), 64)
        bias = torch.zeros(1, layout.text) if self.method in PADDED else None
        q, k, v = (torch.zeros(1, 2, layout.tokens, self.head_dim, dtype=COMPILED[self.dtype], requires_grad=True) for _ in range(3))
        params, plan = start_values(spec, q).requires_grad_(), make_plan(spec, layout, q.device)
        narrow, of_tiles = self.method in INT8, aot.TILES_OF.get(self.arch, self.arch)
        found: dict[tuple[str, int], Launch] = {}
        for units in UNITS:
            machine, products = Machine(of_tiles, units, self._tuned()), int8_products() if narrow else nullcontext()
            with calls.recorded(machine) as launches, products, torch.set_grad_enabled(not narrow):
                far = _far(spec, plan, q) if self.method in BANDS else None
                given = (q, k, v, spec, layout, plan, params(), self.head_dim**-0.5, "triton")
                out, _ = composition.attend(*given, text_bias=bias, far=far)
                if not narrow:
                    out.sum().backward()
            found |= {(aot.source(launch).hash(), launch.warps): launch for launch in launches}
        return list(found.values())

    def run(self) -> list[dict[str, Any]]:
        """A row per kernel."""
        torch.set_num_threads(1)  # as many jobs run as there are processors
        from dit_accel.kernels.triton import aot

        rows = []
        for launch in self.launches():
            compiled = aot.compile_launch(launch, self.arch)
            tile = {"queries": launch.constants.get("BQ"), "keys": launch.constants.get("BK")}
            report = {"occupancy": compiled.occupancy, "faults": compiled.faults(self.spilled), **tile}
            rows.append({**dataclasses.asdict(self), **dataclasses.asdict(compiled), **report})
        return rows


def _far(spec: AttentionSpec, plan: Plan, query: Tensor) -> Far:
    """What a process knows of keys in addition to its own."""
    batch, heads, _, head_dim = query.shape
    if spec.rest is not None and spec.rest.far is FarSums:
        return FarSums(torch.zeros(batch * heads, head_dim, head_dim + 1, requires_grad=True))
    own = len(plan.k_blocks.count)
    blocks = own + 7
    moments = (torch.zeros(batch * heads, blocks, head_dim, requires_grad=True) for _ in range(3))
    kept = torch.zeros(len(plan.q_blocks.count), blocks, dtype=torch.bool)
    return FarBlocks(Moments(torch.ones(blocks, dtype=torch.int64), *moments), kept, torch.arange(own, dtype=torch.int32))


def jobs(
    methods: Sequence[str] | None = None,
    archs: Sequence[str] | None = None,
    head_dims: Sequence[int] | None = None,
    dtypes: Sequence[str] | None = None,
) -> list[Job]:
    """Every combination that the kernels take; None is all of them. Raises ValueError at one that is not known."""
    alike = tuple(arch for arch in INT8_ARCHITECTURES if arch not in ARCHITECTURES)  # with another's tiles, compiled where it is named
    known: tuple[Sequence[Any], ...] = (tuple(EVERY), (*ARCHITECTURES, *alike), HEAD_DIMS, tuple(COMPILED))
    archs = ARCHITECTURES if archs is None else archs
    given = [list(every if some is None else some) for some, every in zip((methods, archs, head_dims, dtypes), known, strict=True)]
    for name, some, every in zip(("method", "arch", "head_dim", "dtype"), given, known, strict=True):
        wrong = [x for x in some if x not in every]
        if wrong:
            raise ArgumentError(f"{name} must be one of {list(every)}, not {wrong[0]!r}")
    every = [Job(*combination) for combination in itertools.product(*given)]
    return [job for job in every if (job.head_dim <= dispatch.LINEAR_LIMIT or job.method not in STATES) and _has_int8(job)]


def _has_int8(job: Job) -> bool:
    """Whether the kernels have products in 8 bits for a job, if it is one of them."""
    return job.method not in INT8 or (job.arch in INT8_ARCHITECTURES and job.dtype in DTYPES)


def bench_aot(work: Sequence[Job], *, out: Path | None = None) -> list[dict[str, Any]]:
    """Compile, print the table, and write it as JSON where `out` is given. Raises BackendError where triton can't
    compile here, or where a kernel spills registers, fits no multiprocessor or leaves the tensor cores idle."""
    if not dispatch.TRITON:
        raise BackendError("compiling the GPU kernels requires triton, which is not installed: pip install triton")
    if dispatch.INTERPRETED:
        raise BackendError("TRITON_INTERPRET=1 interprets the GPU kernels instead of compiling them: unset it")
    # as many as this process may use: `taskset` limits them
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        rows = [row for found in pool.map(Job.run, work) for row in found]
    if out is not None:
        write_json(out, {"triton": _triton_version(), "rows": rows})
    show(rows)
    faults = [f"{row['kernel']} ({row['method']}, {row['arch']}, D {row['head_dim']}): {fault}" for row in rows for fault in row["faults"]]
    if faults:
        raise BackendError("the kernels compiled, but not as they should: " + "; ".join(faults))
    return rows


def _triton_version() -> str:
    from importlib.metadata import version

    return version("triton")


def show(rows: list[dict[str, Any]]) -> None:
    """Print a line per kernel, and the largest of its figures over the methods."""
    view = Table(
        "kernel", "method", "arch", "D", "dtype", "warps", "registers", "spilled", "shared", "occupancy", "tensor cores in loops", "code"
    )
    for row in rows:
        looped = ", ".join(f"{count} {kind}" for kind, count in row["looped"].items()) or "-"
        view.add_row(
            row["kernel"], row["method"], row["arch"], str(row["head_dim"]), row["dtype"], str(row["warps"]), str(row["registers"]),
            str(row["spilled"]), f"{row['shared']:,}", f"{row['occupancy']:.0%}", looped, f"{row['code']:,}",
        )  # fmt: skip
    console().print(view)
