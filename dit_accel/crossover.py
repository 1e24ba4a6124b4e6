"""Where the original attention is the faster one: measured once per shape on a CPU, so that accelerating never slows a model down."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from dit_accel.kernels import dispatch
from dit_accel.layout import TokenLayout
from dit_accel.operator import attend, start_values
from dit_accel.plan import make_plan
from dit_accel.spec import AttentionSpec

ROUNDS = 3
PAIRS = 1 << 22  # query-key pairs of the original that are timed; its time is proportional to them
FEWEST_ROWS = 256  # fewer query rows than that run at another speed per row


@dataclass(frozen=True)
class Crossover:
    """Seconds that one head of one picture takes, accelerated and by PyTorch's attention (extrapolated from a part of its rows)."""

    accelerated: float
    original: float

    @property
    def loses(self) -> bool:
        return self.accelerated > self.original

    def __str__(self) -> str:
        return f"measured {self.accelerated * 1e3:.2f} ms a head against {self.original * 1e3:.2f} ms of the original attention"


def measured(spec: AttentionSpec, layout: TokenLayout, head_dim: int, dtype: torch.dtype) -> Crossover:
    """The crossover of a shape on this CPU; the second call for a shape costs nothing."""
    return _measure(spec, layout, head_dim, dtype, torch.get_num_threads(), dispatch.CPU_TARGET)


@functools.lru_cache(maxsize=256)
@torch.no_grad()
def _measure(spec: AttentionSpec, layout: TokenLayout, head_dim: int, dtype: torch.dtype, threads: int, target: str) -> Crossover:
    seed = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, layout.tokens, head_dim, generator=seed).to(dtype) for _ in range(3))
    plan, params = make_plan(spec, layout, q.device), start_values(spec, q)()
    rows = min(layout.tokens, max(FEWEST_ROWS, PAIRS // layout.tokens))

    def accelerated() -> None:
        attend(q, k, v, spec, layout, plan, params, None, "auto")

    def original() -> None:
        F.scaled_dot_product_attention(q[:, :, :rows], k, v)

    accelerated()  # allocations and first uses
    original()
    rounds = [(_seconds(accelerated), _seconds(original)) for _ in range(ROUNDS)]
    # the least disturbed run of each
    return Crossover(min(a for a, _ in rounds), min(b for _, b in rounds) * layout.tokens / rows)


def _seconds(function: Callable[[], None]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
