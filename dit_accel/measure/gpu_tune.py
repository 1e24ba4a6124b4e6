"""`dit-accel bench kernels --tune`: the GPU kernels' tiles timed on this machine's GPU, kept in the user's cache folder.

A tile changes how sums are grouped, nothing else. Candidates come from a short list per kernel: what a program holds (query rows, or
key rows where keys are summed into) is wide, because it is loaded once; what it streams is narrow where registers run out; more warps hold
larger tiles, more stages overlap more loads. The table's own tile is always among them and stays where none is faster.

It is to fit in five minutes for one head dimension on 16 processors: about 200 tiles are 350 compilations (a tile for each method), all at
once (`gpu_tune_ahead`): three quarters of a minute next to an H100. Then as many timings of a sixth of a second, and passes around them.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from dit_accel import files
from dit_accel.console import console
from dit_accel.errors import ArgumentError, BackendError
from dit_accel.kernels import dispatch
from dit_accel.kernels.triton.tables import Machine, Tile
from dit_accel.measure import gpu_tune_ahead
from dit_accel.measure.gpu_candidates import (
    GRID,
    HEAD_DIMS,
    HEADS,
    KERNELS,
    TEXT,
    TUNED,
    Work,
    candidates,
    forward_backward,
    kernels_of,
    methods_of,
    table_tile,
)

if TYPE_CHECKING:
    from dit_accel.kernels.triton.launch import Launch
    from dit_accel.kernels.triton.tuned import Entry, Gpu

Measure = Callable[["Launch"], float | str]  # runs a launch: its seconds, or why its tile is of no use
FASTER = 0.97  # what a tile may take of the table's time to be preferred: less is noise


@dataclass
class Result:
    """Seconds of each tile that is of use (over all of the kernel's methods, forward and backward), and why the others are not."""

    work: Work
    table: Tile
    seconds: dict[Tile, float] = field(default_factory=dict)
    skipped: dict[Tile, str] = field(default_factory=dict)

    @property
    def chosen(self) -> Tile | None:
        """The fastest tile, the table's where none is clearly faster; None where no tile is of use."""
        best = min(self.seconds, key=self.seconds.__getitem__, default=None)
        own = self.seconds.get(self.table)
        return best if best is None or own is None or self.seconds[best] <= FASTER * own else self.table


def work_of(dtypes: Sequence[str] | None = None, head_dims: Sequence[int] | None = None) -> list[Work]:
    """Every kernel for these dtypes and head dimensions, unless given bfloat16 and 64, 128. Raises ValueError at one that is not known."""
    dtypes = ["bfloat16"] if dtypes is None else dtypes
    head_dims = [64, 128] if head_dims is None else head_dims
    for dtype in dtypes:
        if dtype not in TUNED:
            raise ArgumentError(f"dtype must be one of {list(TUNED)}, not {dtype!r}")
    for head_dim in head_dims:
        if head_dim not in HEAD_DIMS:
            raise ArgumentError(f"head_dim must be one of {list(HEAD_DIMS)}, not {head_dim!r}")
    return [
        Work(kernel, dtype, head_dim)
        for dtype in dtypes
        for head_dim in head_dims
        for kernel in kernels_of(dtype)
        if methods_of(kernel, head_dim)
    ]


def tune(work: Work, machine: Machine, trial: Callable[[Work, Tile], float | str]) -> Result:
    """Try every candidate; `trial` gives a tile's seconds, or why it is of no use."""
    result = Result(work, table_tile(work, machine))
    for tile in candidates(work, machine):
        found = trial(work, tile)
        if isinstance(found, str):
            result.skipped[tile] = found
        else:
            result.seconds[tile] = found
    return result


class Unusable(Exception):  # noqa: N818
    """Leaves a pass whose kernel could not be measured; its text is the reason."""


def run_trial(work: Work, tile: Tile, *, machine: Machine, measure: Measure, device: torch.device, grid: tuple[int, int, int] = GRID,
              text: int = TEXT, heads: int = HEADS) -> float | str:  # fmt: skip
    """Seconds of one kernel with a tile in a forward and backward of each of its methods, on real values; or why it is of no use.

    Raises BackendError where another kernel of these passes fits the device with no tile.
    """
    from dit_accel.kernels.triton import calls, fallback, launch

    kernel = KERNELS[work.kernel]
    own = Machine(machine.arch, machine.units, {**machine.tuned, work.key: tile})
    total = 0.0

    def run(one: "Launch") -> None:
        nonlocal total
        if one.kernel.__name__ not in kernel.functions:
            launch.execute(one)
            return
        found = measure(one)
        if isinstance(found, str):
            raise Unusable(found)
        total += found

    while True:
        try:
            # in one thread, where the redirection holds
            with torch.autograd.set_multithreading_enabled(False), calls.redirected(own, run):
                for method in methods_of(work.kernel, work.head_dim):
                    forward_backward(method, work, device, grid, text, heads)
        except Unusable as reason:
            return str(reason)
        except fallback.TooLargeError as refused:  # another kernel, whose tile is not the question
            own, total = fallback.lowered(own, refused), 0.0
        else:
            return total


def bench_tune(work: Sequence[Work], *, out: Path | None = None) -> list[Result]:
    """Tune, print, and keep what is faster than the table where launches look for it; also as JSON where `out` is given.

    Raises BackendError without a CUDA device, and where it has no products in 8 bits that are to be tuned; ValueError where the file of
    tiles is damaged or can't be written: before any work.
    """
    device = _device()
    refusal = dispatch.int8_refusal_here() if any(one.dtype == "int8" for one in work) else None
    if refusal:
        raise BackendError(f"products in 8 bits are for NVIDIA GPUs, and {refusal}: leave dtype int8 out")
    from dit_accel.kernels.triton import ahead, calls, timing, tuned

    path = tuned.cache_file()
    files.check_folder(path.parent)
    try:
        old = tuned.read(path)
    except ValueError as error:
        raise ArgumentError(f"{error}; delete the file to tune anew") from error
    machine, gpu = Machine(calls.machine_of(device).arch, calls.machine_of(device).units), calls.gpu_of(device)
    shown = console()

    def trial(one: Work, tile: Tile) -> float | str:
        return run_trial(one, tile, machine=machine, measure=timing.seconds, device=device)

    gpu_tune_ahead.compile_ahead(work, machine, ahead.current_target(), shown)
    results: list[Result] = []
    for one in work:
        shown.print(f"{one.kernel}, {one.dtype}, head dimension {one.head_dim}: {len(candidates(one, machine))} tiles")
        results.append(tune(one, machine, trial))
        # after each, so that an interruption loses no more than one
        files.write_json(path, tuned.merged(old, entries(results, gpu), gpu, {result.work.key for result in results}))
    show(results, shown)
    shown.print(f"wrote {path}; new processes read it")
    if out is not None:
        files.write_json(out, {"gpu": gpu._asdict(), "rows": [_plain(result) for result in results]})
    return results


def _device() -> torch.device:
    """The GPU to tune. Raises BackendError where there is none that Triton compiles for."""
    if not dispatch.TRITON:
        raise BackendError("tuning requires triton, which is not installed: pip install triton")
    if dispatch.INTERPRETED:
        raise BackendError("tuning times a GPU, but TRITON_INTERPRET=1 interprets its kernels: unset it")
    if not torch.cuda.is_available():
        raise BackendError("tuning times the kernels on a CUDA device, and there is none here")
    return torch.device("cuda", torch.cuda.current_device())


def entries(results: Sequence[Result], gpu: "Gpu") -> list["Entry"]:
    """The tiles that are kept: those that are faster than the table's."""
    from dit_accel.kernels.triton.tuned import Entry

    chosen = [(result.work, result.chosen) for result in results if result.chosen not in (None, result.table)]
    return [Entry(**gpu._asdict(), **asdict(work), **asdict(tile)) for work, tile in chosen if tile is not None]


def _plain(result: Result) -> dict[str, Any]:
    """A result for JSON."""
    return {
        **asdict(result.work),
        "table": asdict(result.table),
        "chosen": None if result.chosen is None else asdict(result.chosen),
        "tried": [{**asdict(tile), "seconds": seconds} for tile, seconds in result.seconds.items()],
        "skipped": [{**asdict(tile), "reason": reason} for tile, reason in result.skipped.items()],
    }


def _written(tile: Tile | None) -> str:
    return "-" if tile is None else f"{tile.queries}×{tile.keys}, {tile.warps} warps, {tile.stages} stages"


def show(results: Sequence[Result], shown: Console) -> None:
    """Print the table's tile and the chosen one of each kernel, and the tiles that are of no use."""
    view = Table("kernel", "dtype", "D", "table", "ms", "chosen", "ms", "ratio")
    for result in results:
        work, own, best = result.work, result.seconds.get(result.table), result.seconds.get(result.chosen) if result.chosen else None
        times = ["-" if seconds is None else f"{seconds * 1e3:.3f}" for seconds in (own, best)]
        ratio = f"{own / best:.2f}×" if own and best else "-"
        view.add_row(
            work.kernel, work.dtype, str(work.head_dim), _written(result.table), times[0], _written(result.chosen), times[1], ratio
        )  # fmt: skip
    shown.print(view)
    for result in results:
        for tile, reason in result.skipped.items():
            shown.print(f"skipped: {result.work.kernel}, {result.work.dtype}, D {result.work.head_dim}, {_written(tile)}: {reason}")
