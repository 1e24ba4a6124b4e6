"""What heads may get, and what it costs: in multiply-adds, counted, or in seconds, measured."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from dit_accel.measure.capture import Captured
from dit_accel.measure.timing import clock_of
from dit_accel.method import AttentionSpec, TopK
from dit_accel.method.presets import Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout
from dit_accel.planner.choose import Array

CostUnit = Literal["multiply-adds", "seconds"]
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
FIRST_ORDER = (0.05, 0.1, 0.2)  # densities with a rest that changes with the query
TWO_PARTS = (0.02, 0.05)  # with two pooled keys for a tile
RADII = (8, 16)
REPEATS = 3  # of a measured time
Candidates = tuple[AttentionSpec | None, ...]


@dataclass(frozen=True)
class Costs:
    """Of a layer in a forward. `each` `[C]`: of one head; `start` `[C]`: of a call, whatever its heads; `split`: of each further call."""

    each: Array
    start: Array
    split: float

    def plain(self) -> list[Any]:
        """JSON-ready."""
        return [self.each.tolist(), self.start.tolist(), self.split]

    @classmethod
    def read(cls, data: list[Any]) -> "Costs":
        each, start, split = data
        return cls(np.array(each), np.array(start), split)


def default_candidates(grid: tuple[int, int, int]) -> Candidates:
    """The original attention; one tile alone, the cheapest; Fovea with several numbers of tiles, of both orders, with one and two pooled
    keys for a tile, and at radii.

    In tiles of 8 × 8 tokens, of 2 × 8 × 8 in a video. Numbers of tiles are those of `DENSITIES` on this grid, each once, and stay the same
    on others: there they leave about the same error.
    """
    tile = (8, 8) if grid[0] == 1 else (2, 8, 8)
    blocks = math.prod(-(-length // side) for length, side in zip(grid, (1, *tile)[-3:], strict=True))
    first = Fovea(tile=tile)
    found: list[AttentionSpec | None] = [None, AttentionSpec((TopK(0.0, blocks=1),), order=first.order, block=first.block)]
    for forms, densities in (({}, DENSITIES), ({"parts": 2}, TWO_PARTS), ({"order": 1}, FIRST_ORDER)):
        counts = dict.fromkeys(TopK(density).count(blocks) for density in densities)
        found += [Fovea(blocks=count, tile=tile, **forms) for count in counts if count < blocks]
    return (*found, *(Fovea(radius=radius, tile=tile) for radius in RADII), Fovea(radius=RADII[0], tile=tile, order=1))


def multiply_adds(specs: Candidates, layout: TokenLayout, head_dim: int, calls: int = 1) -> Costs:
    """Of a head's scores and values over all tokens, text among them, and what the parts add. Splitting a layer adds no arithmetic; a
    millionth of a head is counted, so that of equal choices the one of fewer calls is taken."""
    each = np.array([calls * 2 * head_dim * computed_pairs(spec, layout, head_dim) for spec in specs])
    return Costs(each, np.zeros(len(specs)), 2e-6 * head_dim * layout.tokens**2)


def seconds(specs: Candidates, inputs: Captured) -> Costs:
    """Measured on a layer's inputs: with all heads and with half of them, and what taking heads apart and together costs."""
    clock = clock_of(inputs.query.device)
    heads = inputs.query.shape[1]
    few = max(1, heads // 2)
    mask = None if inputs.key_bias is None else inputs.key_bias[:, None, None].to(inputs.query.dtype)

    def measured(spec: AttentionSpec | None, count: int) -> float:
        q, k, v = (x[:, :count].contiguous() for x in (inputs.query, inputs.key, inputs.value))

        def run() -> None:
            if spec is None:
                torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=inputs.scale)
            else:
                attention(q, k, v, spec, inputs.layout, scale=inputs.scale, text_bias=inputs.text_bias)

        run()  # what is made once is made
        return min(clock(run) for _ in range(REPEATS))

    with torch.no_grad():
        whole, part = (np.array([measured(spec, count) for spec in specs]) for count in (heads, few))
        index = torch.arange(0, heads, 2, device=inputs.query.device)

        def take_apart() -> None:
            for x in (inputs.query, inputs.key, inputs.value):
                x.index_select(1, index)
            torch.cat([inputs.query, inputs.query[:, :1]], 1)

        split = min(clock(take_apart) for _ in range(REPEATS))
    each = np.maximum(whole - part, 0.1 * whole * (heads - few) / heads) / max(1, heads - few) if heads > few else whole
    return Costs(each, np.maximum(whole - heads * each, 0.0), split)
