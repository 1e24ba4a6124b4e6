"""Error of Fovea's rest by block and in groups, untrained, against dense attention on what `fovea_captures.py` captured.

    python benchmarks/fovea_groups.py CAPTURES image-1024:8x8:0.05 video-512:2x8x8:0.05 image-1024:8x8:r8

A condition is a file, a tile, and a density or the radius of a disc. Prints a table: the relative error of the output of order 0 with tiles
kept by the product of means, the mean over the layers; of each other form the mean and the largest ratio to it, the pooled keys that a span
of query blocks sees, and the ratio of processor time to that of order 0 with tiles kept by their error (forward, one thread; the forms take
turns, medians of three, the mean over the layers). `bfloat16` as the last argument: the times of inputs in bfloat16.
"""

import dataclasses
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.kernels.blocks import pool_blocks
from dit_accel.method import DiscBlocks, ErrorProduct, Mass, Pooled, Tiles, TopK
from dit_accel.method.parts import groups
from dit_accel.method.parts.content import moments_of
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call, visited_blocks

FORMER = "product of means"
FORMS = {
    "order 0": Pooled(),
    "order 1, two parts": Pooled(parts=2, order=1),
    "two parts, 8 opened": Pooled(parts=2, order=1, opened=8),
    "four parts": Pooled(parts=4, order=1),
    "four parts, 4 opened": Pooled(parts=4, order=1, opened=4),
    "four parts, 6 opened": Pooled(parts=4, order=1, opened=6),
    "four parts, 8 opened": Pooled(parts=4, order=1, opened=8),
    "four parts, 16 opened": Pooled(parts=4, order=1, opened=16),
}


def spec_of(tile: str, keep: str, rest: Pooled, former: bool) -> AttentionSpec:
    order = Tiles(tuple(int(side) for side in tile.split("x")))
    if keep.startswith("r"):
        chosen: Any = DiscBlocks(float(keep[1:]))
    else:
        chosen = TopK(float(keep), correct_short=True) if former else TopK(float(keep), score=ErrorProduct())
    return AttentionSpec((chosen,), rest, Mass(), order, (order.block, order.block))


def pooled_keys(spec: AttentionSpec, layout: TokenLayout, qkv: list[torch.Tensor], scale: float) -> float:
    """How many pooled keys a query block has to do with, the mean over query blocks and heads."""
    rest: Any = spec.rest
    plan = make_plan(spec, layout, torch.device("cpu"))
    if rest.opened is None:
        return float(rest.parts * len(plan.k_blocks.count))
    call = image_call(*qkv, layout, plan, {}, scale)
    call = dataclasses.replace(call, visited=visited_blocks(call, spec, plan))
    queries, roots = groups.Queries.of(call, rest.parts), len(plan.prepared["far_roots"])
    by_level = groups.moments_by_level(moments_of(groups.key_slots(call), rest.parts, slope=False), roots, rest.parts, queries)
    means = groups.span_means(pool_blocks(call.q, call.q_blocks)[0], call.q_blocks)
    scores = groups.scores_of(means, by_level[1:], rest.cap, queries)
    seen = groups.listed(call.kept.expand(len(call.q), -1, -1), scores, plan.prepared, rest.opened)
    return float(groups.unit_lists(seen)[1].float().mean()) * rest.parts


def measure(item: tuple[Any, ...], tile: str, keep: str, dtype: torch.dtype) -> dict[str, tuple[float, float, float]]:
    """Error, pooled keys and processor time of each form in one layer."""
    _, grid, text, text_first, scale, *qkv = item
    qkv, layout = [x[None] for x in qkv], TokenLayout(tuple(grid), text, text_first)
    scale = scale or qkv[0].shape[-1] ** -0.5
    exact, rounded = F.scaled_dot_product_attention(*qkv, scale=scale), [x.to(dtype) for x in qkv]
    specs = {name: spec_of(tile, keep, rest, name == FORMER) for name, rest in {FORMER: Pooled(), **FORMS}.items()}
    errors: dict[str, float] = {}
    times: dict[str, list[float]] = {name: [] for name in specs}
    for _ in range(4):  # the first makes the plans
        for name, spec in specs.items():
            if name not in errors:
                errors[name] = float((attention(*qkv, spec, layout, scale=scale) - exact).norm() / exact.norm())
            start = time.thread_time()
            attention(*rounded, spec, layout, scale=scale)
            times[name].append(time.thread_time() - start)
    return {name: (errors[name], pooled_keys(spec, layout, qkv, scale), statistics.median(times[name][1:])) for name, spec in specs.items()}


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    folder, conditions, dtype = Path(sys.argv[1]), sys.argv[2:], torch.float32
    if conditions[-1] == "bfloat16":
        conditions, dtype = conditions[:-1], torch.bfloat16
    print(f"| set | tile | kept | {FORMER} |", " | ".join(FORMS), "|\n|", " | ".join(["---"] * (4 + len(FORMS))), "|")
    for condition in conditions:
        name, tile, keep = condition.split(":")
        layers = [measure(item, tile, keep, dtype) for item in torch.load(folder / f"{name}.pt")]
        cells = []
        for form in FORMS:
            ratios = [layer[form][0] / layer[FORMER][0] for layer in layers]
            pools = statistics.mean(layer[form][1] for layer in layers)
            times = statistics.mean(layer[form][2] / layer["order 0"][2] for layer in layers)
            cells.append(f"{statistics.mean(ratios):.2f}, {max(ratios):.2f} ({pools:.0f}; {times:.2f})")
        error = statistics.mean(layer[FORMER][0] for layer in layers)
        print(f"| {name} | {tile} | {keep} | {error:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
