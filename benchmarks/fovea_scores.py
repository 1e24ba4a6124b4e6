"""Scores by which Fovea of order 0 may keep its tiles, untrained, against dense attention on what `fovea_captures.py` captured.

    python benchmarks/fovea_scores.py CAPTURES image-1024:8x8:0.05:1 video-512:2x8x8:0.05:2

A condition is a file, a tile, a density, and what the logits are multiplied by. Prints the relative error of the image's output with tiles
kept by the product of means, the mean over the layers; then of each score the mean and the largest ratio to it.
"""

import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.method import Call, Cost, Mass, Pooled, Score, Sizes, Tiles, TopK
from dit_accel.method.parts.content import block_variance, query_spread

KINDS = {
    "error": "log σ² + ½ log tr Var(v), the product's `ErrorProduct`",
    "deviation": "½ log σ² + ½ log tr Var(v)",
    "euclid": "½ log tr Var(k) + ½ log tr Var(v)",
    "covariance": "log of the norm of Cov(v, k)",
}  # what joins the log of the mass


@dataclass(frozen=True)
class Candidate(Score):
    """Log mass and one of KINDS, in the units of q·k."""

    kind: str
    counts = True

    def cost(self, sizes: Sizes) -> Cost:
        return Cost()

    def __call__(self, call: Call) -> Tensor:
        blocks = call.k_blocks
        k_mean, k_var = pool_blocks(call.k, blocks, variance=True)
        spread, values = query_spread(call, k_var).double(), block_variance(call.v, blocks).sum(-1).double()
        if self.kind == "covariance":
            keys, vals = (blocks.gather(x - x.mean(1, keepdim=True)) * blocks.valid[..., None] for x in (call.k, call.v))
            n = blocks.count[:, None, None]
            means = [x.sum(2) / blocks.count[:, None] for x in (keys, vals)]
            term = (vals.mT @ keys / n - means[1][..., None] * means[0][:, :, None]).flatten(2).norm(dim=-1).log()
        else:
            of_keys = {"error": spread, "deviation": spread.sqrt(), "euclid": k_var.sum(-1).double().sqrt()}[self.kind]
            term = of_keys.log() + values.log() / 2
        bias = blocks.count.double().log() + (spread / 2).clamp(max=2) + term
        return mean_product(pool_blocks(call.q, call.q_blocks)[0], k_mean) + bias[:, None] / call.scale


def measure(item: tuple[Any, ...], tile: str, density: float, stress: float) -> dict[str, float]:
    """The error of each choice in one layer."""
    _, grid, text, text_first, scale, *qkv = item
    qkv, layout, order = [x[None] for x in qkv], TokenLayout(tuple(grid), text, text_first), Tiles(tuple(map(int, tile.split("x"))))
    scale, image = stress * (scale or qkv[0].shape[-1] ** -0.5), layout.image_slice
    exact = F.scaled_dot_product_attention(*qkv, scale=scale)[:, :, image]
    chosen = {"mean": TopK(density, correct_short=True)} | {kind: TopK(density, score=Candidate(kind)) for kind in KINDS}
    found = {}
    for name, keep in chosen.items():
        spec = AttentionSpec((keep,), Pooled(), Mass(), order, (order.block, order.block))
        found[name] = float((attention(*qkv, spec, layout, scale=scale)[:, :, image] - exact).norm() / exact.norm())
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    folder, conditions = Path(sys.argv[1]), sys.argv[2:]
    print("| set | tile | kept | logits × | product of means |", " | ".join(KINDS), "|\n|", " | ".join(["---"] * (5 + len(KINDS))), "|")
    for condition in conditions:
        name, tile, density, stress = condition.split(":")
        layers = [measure(item, tile, float(density), float(stress)) for item in torch.load(folder / f"{name}.pt")]
        ratios = {kind: [layer[kind] / layer["mean"] for layer in layers] for kind in KINDS}
        cells = [f"{statistics.mean(each):.2f}, {max(each):.2f}" for each in ratios.values()]
        error = statistics.mean(layer["mean"] for layer in layers)
        print(f"| {name} | {tile} | {density} | {stress} | {error:.3f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
