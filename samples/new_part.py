"""Two parts of one's own: a keep pattern, the tiles in the query's row and column, and a rest, one mean key for all that is left."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel import AttentionSpec, accelerate, builtin_pipeline, summary
from dit_accel.method import Blockwise, Boxes, Call, Cost, Grid, Mass, Rest, Sizes, Tiles


@dataclass(frozen=True)
class Cross(Blockwise):
    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = boxes  # corners (t, y, x) of query blocks and of key blocks
        seen = ((k_low <= q_high[:, None]) & (k_high >= q_low[:, None]))[..., 1:].any(-1)
        return seen, seen


@dataclass(frozen=True)
class MeanOfRest(Rest):
    whole_blocks, fit = True, "descent"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"mean.shift": torch.zeros(heads)}  # of the log mass

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        left = ~call.kept * call.k_blocks.count.to(call.q.dtype)  # keys of each key block that a query block leaves
        count, q = left.sum(-1, keepdim=True), call.q_blocks.gather(call.q)
        key, value = ((left @ call.key_means(x) / count.clamp_min(1))[:, :, None] for x in (call.k, call.v))
        mass = call.scale * q @ key.mT + count[..., None].log() + call.per_head("mean.shift")[:, None, None, None]
        return call.q_blocks.ungather(value.expand_as(q)), call.q_blocks.ungather(mass)[..., 0]

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(sizes.tokens * sizes.head_dim, passes=2)


SPEC = AttentionSpec((Cross(),), MeanOfRest(), Mass(offset=False), Tiles((8, 8)))
summary(accelerate(builtin_pipeline(), SPEC))
