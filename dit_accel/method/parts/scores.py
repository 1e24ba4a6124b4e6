"""Scores: how much each key block matters to a query block."""

from dataclasses import dataclass

import torch
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

    mass, counts = False, True
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


@dataclass(frozen=True)
class Estimated(Score):
    """The estimated map of attention, block by block: the log of a block's mass, s·q̄·k̄ + log n + min(σ²/2, cap), divided by s.

    σ² = s² Σ_d E[q_d²] Var(k_d), E over the query block: the mean of exp over logits with a normal distribution. SEA (arXiv 2310.01777)
    learns a compressed map and keeps its largest entries; this is the map of blocks without learning, both directions of the sequence.
    """

    counts = True
    cap: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.cap) and self.cap >= 0, "cap must be a number >= 0", self.cap)

    def __call__(self, call: Call) -> Tensor:
        q_mean, q_square = (pool_blocks(x, call.q_blocks)[0] for x in (call.q, call.q.square()))
        k_mean, k_var = pool_blocks(call.k, call.k_blocks, variance=True)
        spread = call.scale**2 * mean_product(q_square, k_var)
        with torch.no_grad():
            return mean_product(q_mean, k_mean) + (call.k_blocks.count.double().log() + (spread / 2).clamp(max=self.cap)) / call.scale

    def cost(self, sizes: Sizes) -> Cost:
        """The products of means and of squares; queries and keys are read once more."""
        return Cost(2 * sizes.q_blocks * sizes.k_blocks * sizes.head_dim, 2)


@dataclass(frozen=True)
class SelfSaliency(Score):
    """How much the tokens of a block attend to themselves, the same for all queries: the mean of its ⌈n/16⌉ largest p_jj.

    p_jj is the weight of token j in its own softmax over its block's keys. STILL (arXiv 2602.02180) calls a token salient by the divergence
    of that softmax from the one without the token itself, which is larger the larger p_jj is.
    """

    mass, own_tokens = False, True

    def __call__(self, call: Call) -> Tensor:
        blocks, same = call.k_blocks, call.q.shape[1] == call.k.shape[1]
        require(same, "SelfSaliency requires queries and keys of the same tokens", (call.q.shape[1], call.k.shape[1]), "take another score")
        with torch.no_grad():
            queries, keys = (blocks.gather(x.double()) for x in (call.q, call.k))
            logits = (call.scale * queries @ keys.transpose(-1, -2)).masked_fill(~blocks.valid[:, None], -torch.inf)
            own = logits.softmax(-1).diagonal(dim1=-2, dim2=-1).masked_fill(~blocks.valid, 0)  # [BH, T, width]
            best = own.topk(-(-own.shape[-1] // 16), -1).values
            taken = (blocks.count + 15) // 16
            first = torch.arange(best.shape[-1], device=best.device) < taken[:, None]
            score = (best * first).sum(-1) / taken.clamp_min(1)
            return score[:, None].expand(-1, len(call.q_blocks.count), -1)

    def cost(self, sizes: Sizes) -> Cost:
        """Each block's tokens with each other; queries and keys are read once more."""
        return Cost(sizes.tokens**2 / sizes.k_blocks * sizes.head_dim, 2)
