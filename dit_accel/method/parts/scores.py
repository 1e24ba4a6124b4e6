"""Scores: how much each key block matters to a query block."""

from dataclasses import dataclass

from torch import Tensor

from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.method.parts.base import Score
from dit_accel.method.parts.call import Call, Cost, Sizes


@dataclass(frozen=True)
class MeanProduct(Score):
    """The product of the blocks' means, q̄·k̄ (SLA, arXiv 2509.24006, section 3)."""

    def __call__(self, call: Call) -> Tensor:
        return mean_product(pool_blocks(call.q, call.q_blocks)[0], call.key_means(call.k))

    def cost(self, sizes: Sizes) -> Cost:
        """The products; queries and keys are read once more."""
        return Cost(sizes.q_blocks * sizes.k_blocks * sizes.head_dim, 2)
