"""`dit-accel bench kernels`: the operator by itself against PyTorch's attention, alternating in one run."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_accel.bench import machine, timed
from dit_accel.files import write_json
from dit_accel.kernels import dispatch
from dit_accel.layout import TokenLayout
from dit_accel.operator import attention
from dit_accel.plan import multiply_adds
from dit_accel.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.spec import AttentionSpec

HEADS, HEAD_DIM = 4, 64
LARGE = 32768  # tokens from which one run of PyTorch's attention takes the better part of a minute on two cores


@dataclass(frozen=True)
class Case:
    """One measurement: a method on a square grid of `side` × `side` tokens in the method's own order."""

    name: str
    spec: AttentionSpec
    side: int
    text: int = 0
    dtype: torch.dtype = torch.float32
    backward: bool = False

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout((1, self.side, self.side), self.text, order=self.spec.order)


CASES = (
    Case("dense: SLA density 1, no linear branch", SLA(1, scope="none"), 64),
    Case("dense: Fovea density 1", Fovea(1.0), 64),
    Case("dense: CLEAR past the grid", CLEAR(200), 64),
    Case("SLA 5 %", SLA(0.05), 128),
    Case("Fovea 5 %", Fovea(0.05), 128),
    Case("SLA 5 %, bfloat16", SLA(0.05), 128, dtype=torch.bfloat16),
    Case("Fovea radius 8", Fovea(radius=8), 128, 64),
    Case("CLEAR radius 8", CLEAR(8), 128, 64),
    Case("SLA 5 %", SLA(0.05), 128, backward=True),
    Case("Fovea 5 %", Fovea(0.05), 128, backward=True),
    Case("CLEAR radius 8", CLEAR(8), 128, 64, backward=True),
    Case("Fovea radius 8", Fovea(radius=8), 256, 64),
    Case("CLEAR radius 8", CLEAR(8), 256, 64),
    Case("GNA window 80, stride 16", GNA((80, 80), stride=16), 256),
)
SCALING = (CLEAR(16), (64, 128, 256, 512))  # the method and the sides over which its growth is measured


def runner(case: Case, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[], None]:
    """One forward, or forward and backward, on random inputs."""
    seed = torch.Generator().manual_seed(0)
    size = (1, HEADS, case.layout.tokens, HEAD_DIM)
    qkv = [torch.randn(size, generator=seed).to(case.dtype).requires_grad_(case.backward) for _ in range(3)]

    def run() -> None:
        with torch.set_grad_enabled(case.backward):
            out = function(*qkv)
            if case.backward:
                out.backward(torch.ones_like(out))

    return run


def accelerated(case: Case) -> Callable[[], None]:
    """The case by the library's own choice of backend, selection, linear branch and merge included."""
    params = case.spec.make_parameters(heads=HEADS, head_dim=HEAD_DIM).requires_grad_(case.backward)
    return runner(case, lambda q, k, v: attention(q, k, v, case.spec, case.layout, params=params))


def baseline(case: Case) -> tuple[Callable[[], None], torch.dtype]:
    """PyTorch's attention on as many tokens, and the dtype it runs in.

    Without AVX-512 PyTorch multiplies bfloat16 hundreds of times slower than float32, so that float32 is the fair rival there.
    """
    capable = dispatch.CPU_TARGET.startswith("avx512")
    dtype = case.dtype if capable else torch.float32
    return runner(replace(case, dtype=dtype), F.scaled_dot_product_attention), dtype


def arithmetic(case: Case) -> float:
    """Floating-point operations that the case needs: image pairs by the method, text pairs in full; backward is 2.5 forwards."""
    image, total = case.layout.image, case.layout.tokens
    pairs = multiply_adds(case.spec, case.layout, HEAD_DIM) * image**2 + total**2 - image**2
    return 4 * HEADS * HEAD_DIM * pairs * (3.5 if case.backward else 1)


def error_of(case: Case) -> float:
    """Relative error of the output against the reference in float64, on 24 × 20 tokens of the same method."""
    layout = TokenLayout((1, 24, 20), case.text, order=case.spec.order)
    seed = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, layout.tokens, HEAD_DIM, generator=seed).to(case.dtype) for _ in range(3))
    with torch.no_grad():
        exact = attention(q.double(), k.double(), v.double(), case.spec, layout, backend="reference")
        return ((attention(q, k, v, case.spec, layout).double() - exact).norm() / exact.norm()).item()


def measure(cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
    """Rows for cases that share one baseline: all of them and it in turns, medians."""
    rival, dtype = baseline(cases[0])
    functions = [rival, *(accelerated(case) for case in cases)]
    large = cases[0].layout.tokens >= LARGE
    for function in functions[1:] if large else functions:  # plans and allocations
        function()
    rounds = [[timed(f) for f in functions] for _ in range(1 if large else repeats)]
    slow, *fast = (statistics.median(times) for times in zip(*rounds, strict=True))
    rows = []
    for case, seconds in zip(cases, fast, strict=True):
        share = arithmetic(case) / (4 * HEADS * HEAD_DIM * case.layout.tokens**2 * (3.5 if case.backward else 1))
        rows.append(
            {
                "method": case.name,
                "spec": str(case.spec),
                "tokens": case.layout.tokens,
                "text": case.text,
                "dtype": str(case.dtype).removeprefix("torch."),
                "pass": "forward + backward" if case.backward else "forward",
                "seconds": seconds,
                "sdpa_seconds": slow,
                "sdpa_dtype": str(dtype).removeprefix("torch."),
                "ratio": slow / seconds,
                "ideal": 1 / share,
                "gflops": arithmetic(case) / seconds / 1e9,
                "error": error_of(case),
            }
        )
    return rows


def peak_bytes(function: Callable[[], None]) -> int | None:
    """Bytes that a call takes beyond what the process held, its result included; the most of a few calls. None where Linux isn't."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def line(name: str) -> int:
        return next(int(row.split()[1]) * 1024 for row in status.read_text().splitlines() if row.startswith(name))

    def taken() -> int:
        reset.write_text("5")
        before = line("VmRSS:")
        function()
        return line("VmHWM:") - before

    try:
        return max(taken() for _ in range(3))  # memory that was freed and kept hides what a call takes
    except OSError:
        return None


def growth(repeats: int) -> dict[str, Any]:
    """Seconds of one method over growing grids, the exponent of the time between the first and the last, and the last one's memory."""
    spec, sides = SCALING
    functions = [accelerated(Case(str(spec), spec, side)) for side in sides]
    for function in functions:
        function()
    rounds = [[timed(f) for f in functions] for _ in range(repeats)]
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    tokens = [side * side for side in sides]
    exponent = math.log(seconds[-1] / seconds[0]) / math.log(tokens[-1] / tokens[0])
    peak, tensor = peak_bytes(functions[-1]), 4 * HEADS * HEAD_DIM * tokens[-1]
    beyond = None if peak is None else (peak - tensor) / (4 * tensor)  # the result is one of the four tensors
    return {"method": str(spec), "tokens": tokens, "seconds": seconds, "exponent": exponent, "memory_beyond_qkvo": beyond}


def bench_kernels(*, repeats: int = 5, largest: int = 1 << 20, out: Path | None = None) -> dict[str, Any]:
    """The table of CASES up to `largest` tokens, printed, and written as JSON where `out` is given."""
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in CASES:
        if case.layout.tokens <= largest:
            groups.setdefault((case.layout.tokens, baseline(case)[1], case.backward), []).append(case)
    rows = [row for cases in groups.values() for row in measure(cases, repeats)]
    result = {
        "machine": machine() | {"target": dispatch.CPU_TARGET},
        "heads": HEADS,
        "head_dim": HEAD_DIM,
        "repeats": repeats,
        "rows": rows,
        "growth": growth(repeats) if largest >= max(SCALING[1]) ** 2 else None,
    }
    show(result)
    if out is not None:
        write_json(out, result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    view = Table("method", "tokens", "dtype", "pass", "ms", "SDPA ms", "ratio", "FLOP-ideal", "GFLOP/s", "error vs float64")
    for row in result["rows"]:
        view.add_row(
            row["method"], str(row["tokens"]), row["dtype"], row["pass"], f"{row['seconds'] * 1e3:.1f}",
            f"{row['sdpa_seconds'] * 1e3:.0f}" + ("" if row["sdpa_dtype"] == row["dtype"] else f" ({row['sdpa_dtype']})"),
            f"{row['ratio']:.2f}×", f"{row['ideal']:.1f}×", f"{row['gflops']:.0f}", f"{row['error']:.1e}",
        )  # fmt: skip
    console = Console()
    console.print(view)
    if result["growth"]:
        g = result["growth"]
        console.print(f"{g['method']}: time grows as N^{g['exponent']:.3f} from {g['tokens'][0]} to {g['tokens'][-1]} tokens")
        if g["memory_beyond_qkvo"] is not None:
            console.print(
                f"memory beyond query, key, value and output at {g['tokens'][-1]} tokens: {g['memory_beyond_qkvo']:.1%} of theirs"
            )
