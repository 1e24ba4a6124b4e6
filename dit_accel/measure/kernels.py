"""`dit-accel bench kernels`: the operator by itself against PyTorch's attention, alternating in one run.

Times are the host's on a CPU and those of the card's events, with its second-level cache emptied before each run, on a GPU.

On a GPU also against FlexAttention over the same blocks and NATTEN (`bench_rivals`); a column that is missing says why.
"""

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

from dit_accel.console import console
from dit_accel.files import write_json
from dit_accel.kernels import dispatch
from dit_accel.measure import rivals as bench_rivals
from dit_accel.measure.timing import clock_of, machine
from dit_accel.method import AttentionSpec, Window
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 4, 64
LARGE = 32768  # tokens from which one run of PyTorch's attention takes the better part of a minute on two cores
ON_GPU: dict[str, Any] = {"heads": 24, "head_dim": 128, "dtype": torch.bfloat16}  # FLUX's
RIVALS = {"flex": "FlexAttention", "natten": "NATTEN"}


@dataclass(frozen=True)
class Case:
    """One measurement: a method on a square grid of `side` × `side` tokens in the method's own order."""

    name: str
    spec: AttentionSpec
    side: int
    text: int = 0
    dtype: torch.dtype = torch.float32
    backward: bool = False
    heads: int = HEADS
    head_dim: int = HEAD_DIM
    device: torch.device = CPU

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout((1, self.side, self.side), self.text, order=self.spec.order)


CASES = (
    Case("dense: SLA density 1, no linear branch", SLA(1, scope="none"), 64),
    Case("dense: Fovea density 1", Fovea(1.0), 64),
    Case("dense: CLEAR past the grid", CLEAR(200), 64),
    Case("SLA 5 %", SLA(0.05), 128),
    Case("Fovea 5 %", Fovea(0.05), 128),
    Case("dense: SLA density 1, bfloat16", SLA(1, scope="none"), 64, dtype=torch.bfloat16),
    Case("SLA 5 %, bfloat16", SLA(0.05), 128, dtype=torch.bfloat16),
    Case("Fovea 5 %, bfloat16", Fovea(0.05), 128, dtype=torch.bfloat16),
    Case("Fovea radius 8, bfloat16", Fovea(radius=8), 128, 64, dtype=torch.bfloat16),
    Case("CLEAR radius 8, bfloat16", CLEAR(8), 128, 64, dtype=torch.bfloat16),
    Case("SLA 5 %, bfloat16", SLA(0.05), 128, dtype=torch.bfloat16, backward=True),
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


def cases_on(device: torch.device) -> list[Case]:
    """The cases of a device: on a GPU each with FLUX's heads in bfloat16."""
    if device.type == "cpu":
        return list(CASES)
    return [replace(case, device=device, **ON_GPU) for case in CASES if case.dtype == torch.float32]


def inputs(case: Case) -> list[Tensor]:
    """Query, key and value: random, the same ones at each call."""
    seed = torch.Generator(case.device).manual_seed(0)
    size = (1, case.heads, case.layout.tokens, case.head_dim)
    made = (torch.randn(size, generator=seed, device=case.device) for _ in range(3))
    return [x.to(case.dtype).requires_grad_(case.backward) for x in made]


def runner(case: Case, function: bench_rivals.Attention) -> Callable[[], None]:
    """One forward, or forward and backward, on random inputs."""
    qkv = inputs(case)

    def run() -> None:
        with torch.set_grad_enabled(case.backward):
            out = function(*qkv)
            if case.backward:
                out.backward(torch.ones_like(out))

    return run


def accelerated(case: Case) -> Callable[[], None]:
    """The case by the library's own choice of backend, selection, linear branch and merge included."""
    params = case.spec.make_parameters(heads=case.heads, head_dim=case.head_dim).to(case.device).requires_grad_(case.backward)
    return runner(case, lambda q, k, v: attention(q, k, v, case.spec, case.layout, params=params))


def baseline(case: Case) -> tuple[Callable[[], None], torch.dtype]:
    """PyTorch's attention on as many tokens, and the dtype it runs in.

    On a CPU without AVX-512 it multiplies bfloat16 hundreds of times slower than float32, so that float32 is the fair rival there.
    """
    capable = case.device.type != "cpu" or dispatch.CPU_TARGET in ("avx512", "avx512bf16", "amx")
    dtype = case.dtype if capable else torch.float32
    return runner(replace(case, dtype=dtype), F.scaled_dot_product_attention), dtype


def rivals(case: Case) -> dict[str, Callable[[], None] | str]:
    """Other libraries' functions for a case, by the names of RIVALS, or the reason that there is none."""
    found: dict[str, Callable[[], None] | str] = {}
    refusals = {"flex": bench_rivals.flex_refusal, "natten": bench_rivals.natten_refusal}
    for name, refusal in refusals.items():
        reason = refusal(case.spec, case.layout, case.device)
        try:
            found[name] = reason or _warmed(_rival(name, case))
        except (RuntimeError, ValueError) as error:  # what their compilers raise
            found[name] = f"failed: {str(error).splitlines()[0]}"
    return found


def _rival(name: str, case: Case) -> Callable[[], None]:
    if name == "natten" and (window := case.spec.find(Window)) is not None:
        return runner(case, bench_rivals.natten(window, case.layout))
    q, k, v = inputs(case)
    return runner(case, bench_rivals.flex(q, k, v, case.spec, case.layout))


def _warmed(function: Callable[[], None]) -> Callable[[], None]:
    function()
    return function


def arithmetic(case: Case) -> float:
    """Floating-point operations that the case needs: image pairs by the method, text pairs in full; backward is 2.5 forwards."""
    pairs = computed_pairs(case.spec, case.layout, case.head_dim)
    return 4 * case.heads * case.head_dim * pairs * (3.5 if case.backward else 1)


def error_of(case: Case) -> float:
    """Relative error of the output against the reference in float64, on 24 × 20 tokens of the same method."""
    layout = TokenLayout((1, 24, 20), case.text, order=case.spec.order)
    seed = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, layout.tokens, case.head_dim, generator=seed).to(case.device, case.dtype) for _ in range(3))
    with torch.no_grad():
        exact = attention(q.double(), k.double(), v.double(), case.spec, layout, backend="reference")
        return ((attention(q, k, v, case.spec, layout).double() - exact).norm() / exact.norm()).item()


def measure(cases: Sequence[Case], repeats: int) -> list[dict[str, Any]]:
    """Rows for cases that share one baseline: all of them, it and their rivals in turns, medians."""
    dense, dtype = baseline(cases[0])
    others = [rivals(case) for case in cases]
    functions = [dense, *(accelerated(case) for case in cases), *(f for found in others for f in found.values() if callable(f))]
    large = cases[0].device.type == "cpu" and cases[0].layout.tokens >= LARGE
    for function in functions[1:] if large else functions:  # plans and allocations
        function()
    clock = clock_of(cases[0].device)
    rounds = [[clock(f) for f in functions] for _ in range(1 if large else repeats)]
    slow, *fast = (statistics.median(times) for times in zip(*rounds, strict=True))
    rival_times = iter(fast[len(cases) :])
    times = [{f"{name}_seconds": next(rival_times) if callable(f) else None for name, f in found.items()} for found in others]
    missing = [{name: f for name, f in found.items() if isinstance(f, str)} for found in others]
    return [
        _row(case, seconds, {"sdpa_seconds": slow, "sdpa_dtype": str(dtype).removeprefix("torch."), **own, "missing": reasons})
        for case, seconds, own, reasons in zip(cases, fast, times, missing, strict=False)
    ]


def _row(case: Case, seconds: float, rivals: dict[str, Any]) -> dict[str, Any]:
    """A case's line of the result; `rivals`: columns of PyTorch's attention and other libraries."""
    share = arithmetic(case) / (4 * case.heads * case.head_dim * case.layout.tokens**2 * (3.5 if case.backward else 1))
    return {
        "method": case.name,
        "spec": str(case.spec),
        "tokens": case.layout.tokens,
        "text": case.text,
        "dtype": str(case.dtype).removeprefix("torch."),
        "pass": "forward + backward" if case.backward else "forward",
        "seconds": seconds,
        **rivals,
        "ratio": rivals["sdpa_seconds"] / seconds,
        "ideal": 1 / share,
        "gflops": arithmetic(case) / seconds / 1e9,
        "error": error_of(case),
    }


def peak_bytes(function: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that a call takes beyond what was held, its result included; on a CPU the most of a few calls, None where Linux isn't."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - held
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


def growth(repeats: int, device: torch.device) -> dict[str, Any]:
    """Seconds of one method over growing grids, the exponent of the time between the first and the last, and the last one's memory."""
    spec, sides = SCALING
    cases = [Case(str(spec), spec, side, device=device, **(ON_GPU if device.type == "cuda" else {})) for side in sides]
    functions = [accelerated(case) for case in cases]
    for function in functions:
        function()
    clock = clock_of(device)
    rounds = [[clock(f) for f in functions] for _ in range(repeats)]
    seconds = [statistics.median(times) for times in zip(*rounds, strict=True)]
    tokens = [side * side for side in sides]
    exponent = math.log(seconds[-1] / seconds[0]) / math.log(tokens[-1] / tokens[0])
    peak, tensor = peak_bytes(functions[-1], device), cases[-1].dtype.itemsize * cases[-1].heads * cases[-1].head_dim * tokens[-1]
    beyond = None if peak is None else (peak - tensor) / (4 * tensor)  # the result is one of the four tensors
    return {"method": str(spec), "tokens": tokens, "seconds": seconds, "exponent": exponent, "memory_beyond_qkvo": beyond}


def bench_kernels(*, repeats: int = 5, largest: int = 1 << 20, out: Path | None = None) -> dict[str, Any]:
    """The table of CASES up to `largest` tokens, on a GPU where there is one, printed, and written as JSON where `out` is given."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock_of(device)  # which may refuse
    cases = [case for case in cases_on(device) if case.layout.tokens <= largest]
    groups: dict[tuple[Any, ...], list[Case]] = {}
    for case in cases:
        groups.setdefault((case.layout.tokens, baseline(case)[1], case.backward), []).append(case)
    rows = [row for group in groups.values() for row in measure(group, repeats)]
    heads, head_dim = (ON_GPU["heads"], ON_GPU["head_dim"]) if device.type == "cuda" else (HEADS, HEAD_DIM)
    result = {
        "machine": machine() | {"target": dispatch.CPU_TARGET},
        "heads": heads,
        "head_dim": head_dim,
        "repeats": repeats,
        "rows": rows,
        "growth": growth(repeats, device) if largest >= max(SCALING[1]) ** 2 else None,
    }
    show(result)
    if out is not None:
        write_json(out, result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table, and why a rival is missing."""
    names = [f"{name} ms" for name in RIVALS.values()]
    view = Table("method", "tokens", "dtype", "pass", "ms", "SDPA ms", *names, "ratio", "FLOP-ideal", "GFLOP/s", "error vs float64")
    for row in result["rows"]:
        rival_times = [row[f"{name}_seconds"] for name in RIVALS]
        view.add_row(
            row["method"], str(row["tokens"]), row["dtype"], row["pass"], f"{row['seconds'] * 1e3:.1f}",
            f"{row['sdpa_seconds'] * 1e3:.0f}" + ("" if row["sdpa_dtype"] == row["dtype"] else f" ({row['sdpa_dtype']})"),
            *("-" if seconds is None else f"{seconds * 1e3:.1f}" for seconds in rival_times),
            f"{row['ratio']:.2f}×", f"{row['ideal']:.1f}×", f"{row['gflops']:.0f}", f"{row['error']:.1e}",
        )  # fmt: skip
    shown = console()
    shown.print(view)
    for name, title in RIVALS.items():
        for reason in dict.fromkeys(row["missing"][name] for row in result["rows"] if name in row["missing"]):
            shown.print(f"no {title} where: {reason}")
    if result["growth"]:
        _show_growth(shown, result["growth"])


def _show_growth(shown: Console, g: dict[str, Any]) -> None:
    shown.print(f"{g['method']}: time grows as N^{g['exponent']:.3f} from {g['tokens'][0]} to {g['tokens'][-1]} tokens")
    if g["memory_beyond_qkvo"] is not None:
        shown.print(f"memory beyond query, key, value and output at {g['tokens'][-1]} tokens: {g['memory_beyond_qkvo']:.1%} of theirs")
