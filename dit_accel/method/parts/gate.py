"""A learned score, and what it is fitted to: which key blocks matter, by the map of the original attention."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.method.checks import require
from dit_accel.method.parts.base import Score
from dit_accel.method.parts.call import Call, Cost, Sizes
from dit_accel.method.parts.content import PooledKeys, moments_of

TARGETS = ("mass", "error")


@dataclass(frozen=True)
class Gate(Score):
    """q̄·(f W) with f = [mean | largest | smallest] of a block's keys, channel by channel, and W `[3D, D]` learned for each head.

    SeerAttention's released gate (arXiv 2410.13276), with keys after rotary embedding. At the start W is the identity for the mean and 0
    for the others: `MeanProduct`. A choice of blocks has no gradient, so that `distill` leaves W as it is: to fit it, make the divergence
    of softmax(s·score) from `goal` small; `target` says what that counts.
    """

    target: Literal["mass", "error"] = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.target in TARGETS, f"target must be one of {TARGETS}", self.target)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        start = torch.eye(3 * head_dim, head_dim)
        return {"gate.weight": start.expand(heads, -1, -1).clone()}

    def __call__(self, call: Call) -> Tensor:
        keys = call.k_blocks.gather(call.k)  # a short block repeats its last token, which changes no extreme
        features = torch.cat([call.key_means(call.k), keys.amax(-2), keys.amin(-2)], -1)
        return mean_product(pool_blocks(call.q, call.q_blocks)[0], features @ call.per_head("gate.weight"))

    @torch.no_grad()
    def goal(self, call: Call) -> Tensor:
        """What softmax(s·score) is to be, `[BH, Tq, Tk]`: rows that add up to 1, of the softmax over the image's keys.

        "mass": the largest weight of a pair of the two blocks' tokens. "error": the root of the squared error that a pooled key in the
        block's place makes in the output, its mean over the query block.
        """
        blocks, pooled = call.k_blocks, moments_of(call, 1, slope=False).pooled(log_count=True, cap=2.0)
        keys, values = blocks.gather(call.k), blocks.gather(call.v)
        rows = []
        for query, valid in zip(call.q_blocks.gather(call.q).unbind(1), call.q_blocks.valid, strict=True):
            logits = call.scale * torch.einsum("bqd,btkd->bqtk", query, keys).masked_fill(~blocks.valid, -torch.inf)
            lse = logits.flatten(-2).logsumexp(-1)[..., None]
            weights = (logits - lse[..., None]).exp()  # [BH, width, Tk, width]
            if self.target == "mass":
                rows.append((weights.amax(-1) * valid[:, None]).amax(1))
                continue
            error = _error(weights, (call.scale * query @ pooled.key.mT + pooled.bias[:, None] - lse).exp(), values, pooled)
            rows.append((error.square().sum(-1) * valid[:, None]).sum(1).div(valid.sum()).sqrt())
        goal = torch.stack(rows, 1)
        return goal / goal.sum(-1, keepdim=True).clamp_min(torch.finfo(goal.dtype).tiny)

    def cost(self, sizes: Sizes) -> Cost:
        """The features times W, and the products; queries and keys are read once more."""
        return Cost(sizes.k_blocks * sizes.head_dim * (3 * sizes.head_dim + sizes.q_blocks), 2)


def _error(weights: Tensor, shares: Tensor, values: Tensor, pooled: PooledKeys) -> Tensor:
    """What each block's pooled key, of weight `shares` `[BH, Q, T]`, does to the output of Q queries: `[BH, Q, T, D]` to first order.

    Σ_j a_j v_j - p v̄ - o (Σ_j a_j - p), j over the block's tokens, o the output.
    """
    exact = torch.einsum("bqtk,btkd->bqtd", weights, values)
    off = (weights.sum(-1) - shares)[..., None]
    return exact - shares[..., None] * pooled.value[:, None] - exact.sum(2, keepdim=True) * off
