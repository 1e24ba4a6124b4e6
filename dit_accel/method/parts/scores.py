"""Scores: how much each key block matters to a query block."""

from dataclasses import dataclass

from torch import Tensor

from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.method.checks import is_real, require
from dit_accel.method.parts.base import Score
from dit_accel.method.parts.call import Call, Cost, Sizes
from dit_accel.method.parts.content import error_bias, error_score


@dataclass(frozen=True)
class MeanProduct(Score):
    """The product of the blocks' means, q̄·k̄ (SLA, arXiv 2509.24006, section 3)."""

    def __call__(self, call: Call) -> Tensor:
        return mean_product(pool_blocks(call.q, call.q_blocks)[0], call.key_means(call.k))

    def cost(self, sizes: Sizes) -> Cost:
        """The products; queries and keys are read once more."""
        return Cost(sizes.q_blocks * sizes.k_blocks * sizes.head_dim, 2)


@dataclass(frozen=True)
class ErrorProduct(Score):
    """The error that a block's pooled key would leave: s·q̄·k̄ + log n + min(σ²/2, cap) + log σ² + ½ log tr Var(v), divided by s.

    The log of the block's softmax mass, of the variance σ² = s² Σ_d E[q_d²] Var(k_d) of its logits (E over the head's queries), and of the
    spread of its values. All but the first term is one number for each head and key block.
    """

    cap: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.cap) and self.cap >= 0, "cap must be a number >= 0", self.cap)

    def __call__(self, call: Call) -> Tensor:
        k_mean, bias = error_bias(call, self.cap)
        return error_score(pool_blocks(call.q, call.q_blocks)[0], k_mean, bias, call.scale)

    def cost(self, sizes: Sizes) -> Cost:
        """The products; queries, keys and values are read once more."""
        return Cost((sizes.q_blocks + 1) * sizes.k_blocks * sizes.head_dim, 3)
