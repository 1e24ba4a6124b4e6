"""Learned choices of blocks: what they are fitted to is the original's attention, block by block, as a choice has no gradient."""

from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from dit_accel.method.parts.base import Part
from dit_accel.method.parts.call import Call
from dit_accel.method.parts.content import PooledKeys, moments_of

Target = Literal["mass", "error"]
TARGETS = ("mass", "error")


class Chooser(Part):
    """A part that chooses key blocks by something it learns. The first stage of a distillation makes `loss` small."""

    fit = "choice"

    @abstractmethod
    def said(self, call: Call) -> Tensor:
        """The logarithm `[BH, R, Tk]` of the share that each key block has by what was learned, float64, with a gradient."""

    @abstractmethod
    def goal(self, call: Call) -> Tensor:
        """What these shares should be, by the original's attention."""

    def loss(self, call: Call) -> Tensor:
        """The divergence of what is said from the goal, in nats, its mean over rows and heads: KL(goal ‖ said)."""
        goal = self.goal(call).double()
        return (torch.xlogy(goal, goal) - goal * self.said(call)).sum(-1).mean()


@torch.no_grad()
def worth(call: Call, target: Target) -> Tensor:
    """What each key block is worth to a query block `[BH, Tq, Tk]`, of the softmax over the image's keys: rows that add up to 1.

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
        if target == "mass":
            rows.append((weights.amax(-1) * valid[:, None]).amax(1))
            continue
        error = _error(weights, (call.scale * query @ pooled.key.mT + pooled.bias[:, None] - lse).exp(), values, pooled)
        rows.append((error.square().sum(-1) * valid[:, None]).sum(1).div(valid.sum()).sqrt())
    found = torch.stack(rows, 1)
    return found / found.sum(-1, keepdim=True).clamp_min(torch.finfo(found.dtype).tiny)


def _error(weights: Tensor, shares: Tensor, values: Tensor, pooled: PooledKeys) -> Tensor:
    """What each block's pooled key, of weight `shares` `[BH, Q, T]`, does to the output of Q queries: `[BH, Q, T, D]` to first order.

    Σ_j a_j v_j - p v̄ - o (Σ_j a_j - p), j over the block's tokens, o the output.
    """
    exact = torch.einsum("bqtk,btkd->bqtd", weights, values)
    off = (weights.sum(-1) - shares)[..., None]
    return exact - shares[..., None] * pooled.value[:, None] - exact.sum(2, keepdim=True) * off
