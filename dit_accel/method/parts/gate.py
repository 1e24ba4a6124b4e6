"""A learned score of key blocks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.method.checks import require
from dit_accel.method.parts.base import Score
from dit_accel.method.parts.call import Call, Cost, Sizes
from dit_accel.method.parts.choices import TARGETS, Chooser, Target, worth


@dataclass(frozen=True)
class Gate(Chooser, Score):
    """q̄·(f W) with f = [mean | largest | smallest] of a block's keys, channel by channel, and W `[3D, D]` learned for each head.

    SeerAttention's released gate (arXiv 2410.13276), with keys after rotary embedding. At the start W is the identity for the mean and 0
    for the others: `MeanProduct`. The first stage of `distill` fits W: softmax(s·score) to what blocks are worth to the original's
    attention, see `choices.worth`, `target` of it.
    """

    target: Target = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target in TARGETS, f"target must be one of {TARGETS}", self.target)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        start = torch.eye(3 * head_dim, head_dim)
        return {"gate.weight": start.expand(heads, -1, -1).clone()}

    def rates(self, head_dim: int) -> dict[str, float]:
        """Each number is multiplied with a feature and a channel of the query, and with the scale of the logits."""
        return {"gate.weight": 1 / (3 * head_dim**1.5)}

    def __call__(self, call: Call) -> Tensor:
        query, key = self._sides(call)
        return mean_product(query, key)

    def _sides(self, call: Call) -> tuple[Tensor, Tensor]:
        """Mean queries `[BH, Tq, D]`, and the blocks' features times W `[BH, Tk, D]`."""
        keys = call.k_blocks.gather(call.k)  # a short block repeats its last token, which changes no extreme
        features = torch.cat([call.key_means(call.k), keys.amax(-2), keys.amin(-2)], -1)
        return pool_blocks(call.q, call.q_blocks)[0], features @ call.per_head("gate.weight")

    def said(self, call: Call) -> Tensor:
        query, key = self._sides(call)
        return (call.scale * query.double() @ key.double().mT).log_softmax(-1)

    def goal(self, call: Call) -> Tensor:
        """What blocks are worth, by `target`."""
        return worth(call, self.target)

    def cost(self, sizes: Sizes) -> Cost:
        """The features times W, and the products; queries and keys are read once more."""
        return Cost(sizes.k_blocks * sizes.head_dim * (3 * sizes.head_dim + sizes.q_blocks), 2)
