"""Where the original attention is clearly the faster one: measured once per machine and shape, so that accelerating slows no model down.

The decision is kept in the user's cache folder (`decisions`): the same seed draws the same picture in every process. The text's length is
no part of it, so that both passes of guidance decide alike.
"""

import functools
import importlib.metadata
import json
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import __version__
from dit_accel.kernels import dispatch
from dit_accel.kernels.cpu import native, sources
from dit_accel.kernels.precision import get_float32_attention_precision, get_query_key_products
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import decisions, lowering
from dit_accel.operator.attention import attend, start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

MARGIN = 1.25  # a size is left to the original where the method takes more than so many times its time: what is close may turn over
ROUNDS = 3
HEADS_ON_GPU = (8, 24)  # at least, at most: few heads of few tokens leave most of a GPU idle, and those of many fill its memory
FULL = 24 << 14  # tokens of all heads that fill a GPU many times over
AHEAD = 8192  # the side of a product that keeps a GPU busy for a millisecond or more, in which the processor launches what is timed
PAIRS = {"cpu": 1 << 22, "cuda": 1 << 30}  # query-key pairs of the original that are timed; its time is proportional to them
FEWEST_ROWS = 256  # fewer query rows than that run at another speed per row


@dataclass(frozen=True)
class Crossover:
    """Seconds that the heads measured took, accelerated and by PyTorch's attention (extrapolated from a part of its rows).

    `file`: where the decision is kept, or None where it is for this process alone.
    """

    accelerated: float
    original: float
    file: Path | None = None

    @property
    def loses(self) -> bool:
        return self.accelerated > MARGIN * self.original

    def __str__(self) -> str:
        times = f"measured {self.accelerated * 1e3:.2f} ms against {self.original * 1e3:.2f} ms of the original attention"
        return f"{times}, decided {f'once, kept in {self.file}' if self.file else 'for this process alone'}"


_known: dict[str, Crossover | None] = {}
_lock = threading.Lock()


def measured(spec: AttentionSpec, layout: TokenLayout, head_dim: int, dtype: torch.dtype, device: torch.device) -> Crossover | None:
    """The crossover of a grid on this machine's CPU or GPU; the second call costs nothing.

    None where nothing can be measured, and the method runs: on other devices, where the environment has it off, while a CUDA graph is
    captured, and in a process whose device had no memory left for it, which is warned of. Raises ValueError as `decisions.enabled`.
    """
    if not decisions.enabled() or device.type not in PAIRS:
        return None
    question = _question(spec, layout, head_dim, dtype, device)
    name = json.dumps(question, sort_keys=True)
    with _lock:
        if name not in _known:
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                return None
            image = TokenLayout(layout.grid, order=layout.order, references=layout.references)
            try:
                times, file = decisions.decided(question, lambda: _measure(spec, image, head_dim, dtype, device))
            except torch.OutOfMemoryError as error:  # a run that fits must not end by what is measured in addition to it
                warnings.warn(f"dit_accel: whether {spec} is faster at {layout.grids} was not measured, and it runs: {error}", stacklevel=2)
                _known[name] = None
            else:
                _known[name] = Crossover(times[0], times[1], file)
        return _known[name]


def _question(spec: AttentionSpec, layout: TokenLayout, head_dim: int, dtype: torch.dtype, device: torch.device) -> decisions.Question:
    backend = dispatch.choose("auto", device, dtype, head_dim, linear=lowering.has_states(spec))[0]
    precision = get_float32_attention_precision()
    rounds = device.type == "cpu" and dtype != torch.bfloat16 and precision != "highest"
    return {
        "version": __version__,
        **({"float32": precision} if rounds else {}),
        "torch": torch.__version__,
        **(_gpu(device) if device.type == "cuda" else _cpu(dtype)),
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "head_dim": head_dim,
        "grids": [list(grid) for grid in layout.grids],
        "order": layout.order.to_dict(),
        "spec": spec.to_dict(),
    }


def _cpu(dtype: torch.dtype) -> dict[str, Any]:
    built = native.library() is not None
    return {
        "device": decisions.cpu_name(),
        "threads": torch.get_num_threads(),
        "target": native.TARGETS[native.target(bfloat16=dtype == torch.bfloat16)] if built else "none",
        "kernels": sources.fingerprint(Path(native.__file__).parent) if built else "none",
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    triton = Path(native.__file__).parents[1] / "triton"
    return {
        "device": torch.cuda.get_device_name(device),
        "triton": importlib.metadata.version("triton") if dispatch.TRITON else "none",
        "kernels": sources.fingerprint(triton, (".py",)),
        **({} if get_query_key_products() == "input" else {"products": get_query_key_products()}),
    }


@torch.no_grad()
def _measure(spec: AttentionSpec, layout: TokenLayout, head_dim: int, dtype: torch.dtype, device: torch.device) -> decisions.Seconds:
    seed, heads = torch.Generator(device).manual_seed(0), heads_on_gpu(layout.tokens) if device.type == "cuda" else 1
    q, k, v = (torch.randn(1, heads, layout.tokens, head_dim, generator=seed, device=device).to(dtype) for _ in range(3))
    plan, params = make_plan(spec, layout, device), start_values(spec, q)()
    rows = min(layout.tokens, max(FEWEST_ROWS, PAIRS[device.type] // layout.tokens))
    clock = _seconds if device.type == "cpu" else functools.partial(_seconds_on_gpu, device)

    def accelerated() -> None:
        attend(q, k, v, spec, layout, plan, params, None, "auto")

    def original() -> None:
        F.scaled_dot_product_attention(q[:, :, :rows], k, v)

    accelerated()  # allocations, compilation and first uses
    original()
    rounds = [(clock(accelerated), clock(original)) for _ in range(ROUNDS)]
    # the least disturbed run of each
    return min(a for a, _ in rounds), min(b for _, b in rounds) * layout.tokens / rows


def heads_on_gpu(tokens: int) -> int:
    """Heads that are timed on a GPU."""
    least, most = HEADS_ON_GPU
    return max(least, min(most, FULL // tokens))


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _seconds_on_gpu(device: torch.device, function: Callable[[], None]) -> float:
    """By events on the device's current stream; only what was recorded there is waited for.

    The GPU is given something to do before: a model's other layers keep it busy while the processor launches ahead, so that the gaps
    between the kernels of a call by itself are no part of what it costs there.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    side = torch.ones(AHEAD, AHEAD, dtype=torch.float16, device=device)
    for _ in range(2):
        torch.mm(side, side)
    with torch.cuda.device(device):  # events are recorded on the current device's stream, and a model may be on another
        start.record()
        function()
        end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3
