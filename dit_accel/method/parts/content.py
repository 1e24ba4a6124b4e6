"""A key block split by content, and its moments: what finer pooled keys and the first order of a rest are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, mean_product, pool_blocks
from dit_accel.kernels.reference import MASKED
from dit_accel.kernels.splitting import split
from dit_accel.method.parts.call import Call


class PooledKeys(NamedTuple):
    """Pooled keys and values `[BH, P, D]`, those of a block next to each other, and what is added to their logits `[BH, P]`.

    `slope` `[BH, T, D of k, D of v]`: how a block's value changes with the query, None where it was not asked for.
    """

    key: Tensor
    value: Tensor
    bias: Tensor
    slope: Tensor | None


def query_spread(call: Call, k_var: Tensor) -> Tensor:
    """Variance of the logits s·q·k within blocks, `[BH, ...]` of `[BH, ..., D]`: s² Σ_d E[q_d²] Var(k_d), E over all queries of a head."""
    return spread_of(k_var, call.q.square().mean(1), call.scale)


def spread_of(k_var: Tensor, second: Tensor, scale: float) -> Tensor:
    """The same from `second` `[BH, D]`, E[q_d²]."""
    return scale**2 * (k_var @ second.view(len(second), *[1] * (k_var.ndim - 3), -1, 1))[..., 0]


def block_variance(x: Tensor, blocks: Blocks) -> Tensor:
    """The biased variance `[BH, T, D]` of `[BH, N, D]` within each block."""
    variance = pool_blocks(x, blocks, variance=True)[1]
    if variance is None:
        raise ValueError("pool_blocks gave no variance")
    return variance


def error_bias(call: Call, cap: float) -> tuple[Tensor, Tensor]:
    """The mean key `[BH, T, D]` of each key block, and its `error_of` `[BH, T]`. No gradient."""
    with torch.no_grad():
        mean, k_var = pool_blocks(call.k, call.k_blocks, variance=True)
        v_spread = block_variance(call.v, call.k_blocks).sum(-1)
        return mean, error_of(call.k_blocks.count, query_spread(call, k_var), v_spread, cap)


def error_of(count: Tensor, spread: Tensor, v_spread: Tensor, cap: float) -> Tensor:
    """The log of the error that a unit of so many tokens would leave, less the product of the means.

    log n + min(σ²/2, cap) + log σ² + ½ log tr Var(v), σ² = `query_spread`; -inf for a unit without tokens.
    """
    tiny = torch.finfo(spread.dtype).tiny
    error = spread.clamp_min(tiny).log() + v_spread.clamp_min(tiny).log() / 2
    return count.to(error.dtype).log() + (spread / 2).clamp(max=cap) + error


def error_score(means: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """The score `[BH, Q, T]` of the error for queries `[BH, Q, D]`, of `error_bias`: its logarithm over s, float64. No gradient."""
    return mean_product(means, key) + bias.detach().double()[:, None] / scale


def split_by_content(call: Call, parts: int) -> Tensor:
    """Which of `parts` (a power of two) each place `[BH, T, width]` of a key block belongs to, int64; without a gradient."""
    blocks = call.k_blocks
    with torch.no_grad():
        keys = blocks.gather(call.k)
        return split(keys, blocks.valid.to(keys.dtype).expand(keys.shape[:3]), metric_of(call.q) if parts > 1 else None, parts)


def metric_of(q: Tensor) -> Tensor:
    """E[q qᵀ] `[BH, D, D]` of queries `[BH, N, D]`."""
    return q.transpose(-1, -2) @ q / q.shape[1]


class Moments(NamedTuple):
    """What the tokens of units are summarised to, part by part: means of keys and values `[BH, T, parts, D]`, the number of tokens, the
    variance σ² of their logits (`query_spread`) and the trace of that of their values, each `[BH, T, parts]`.

    `slope` `[BH, T, D of k, D of v]`: Σ_p (n_p / n) / (1 + σ²_p) · Cov_p(k, v), None where it was not asked for.
    """

    key: Tensor
    value: Tensor
    tokens: Tensor
    spread: Tensor
    v_spread: Tensor
    slope: Tensor | None

    def pooled(self, *, log_count: bool, cap: float) -> "PooledKeys":
        """The pooled keys, each with the bias log n_p + min(σ²_p / 2, cap)."""
        bias = (self.spread / 2).clamp(max=cap)
        bias = bias + self.tokens.log() if log_count else bias.masked_fill(self.tokens == 0, -torch.inf)
        return PooledKeys(self.key.flatten(1, 2), self.value.flatten(1, 2), bias.flatten(1), self.slope)


def moments_of(call: Call, parts: int, *, slope: bool) -> Moments:
    """Those of each key block split by content. Gradients: q, k, v, but not through the split."""
    blocks, dtype = call.k_blocks, call.k.dtype
    numbers = torch.arange(parts, device=call.k.device)
    member = ((split_by_content(call, parts)[:, :, None] == numbers[:, None]) & blocks.valid[:, None]).to(dtype)  # [BH, T, parts, width]
    count = member.sum(-1)
    share = member / count.clamp_min(1)[..., None]
    keys, values = blocks.gather(call.k), blocks.gather(call.v)
    k_mean, v_mean = share @ keys, share @ values
    k_off = keys - member.transpose(-1, -2) @ k_mean  # of a place that is no token: the token that is repeated there, with share 0
    v_off = values - member.transpose(-1, -2) @ v_mean
    spread = query_spread(call, share @ k_off.square())
    matrix = None
    if slope:
        weight = (member.transpose(-1, -2) @ damping(spread)[..., None]) / blocks.count.clamp_min(1)[:, None, None]
        matrix = k_off.transpose(-1, -2) @ (v_off * weight)
    return Moments(k_mean, v_mean, count, spread, (share @ v_off.square()).sum(-1), matrix)


def pool_parts(call: Call, parts: int, *, log_count: bool, cap: float, slope: bool) -> PooledKeys:
    """`parts` pooled keys for each key block, split by content. Gradients: q, k, v, but not through the split."""
    return moments_of(call, parts, slope=slope).pooled(log_count=log_count, cap=cap)


def damping(spread: Tensor) -> Tensor:
    """1/(1 + σ²): where logits spread too far for a straight line, the first order fades; without it, it is worse than none."""
    return 1 / (1 + spread)


def slopes_of_queries(call: Call, pooled: PooledKeys, parts: int) -> Tensor:
    """One matrix S_I `[BH, Tq, D of k, D of v]` for each query block I: to first order the rest's value changes by s q S_I.

    S_I = Σ_J ω_IJ · slope_J over the blocks that are not kept, ω_IJ their share of the pooled softmax of the block's mean query: one matrix
    product `[Tq, T] · [T, D²]` for each head.
    """
    if pooled.slope is None:
        raise ValueError("the first order requires the blocks' slopes: pool_parts(slope=True)")
    means, seen = pool_blocks(call.q, call.q_blocks)[0], (~call.kept).to(call.q.dtype)
    weights = weights_of(means, pooled.key, pooled.bias, seen, parts, call.scale)
    return (weights @ pooled.slope.flatten(-2)).unflatten(-1, pooled.slope.shape[-2:])


def weights_of(means: Tensor, key: Tensor, bias: Tensor, seen: Tensor, parts: int, scale: float) -> Tensor:
    """The share `[BH, Q, T]` of each unit in the pooled softmax of queries `means` `[BH, Q, D]`, of all parts of it together.

    `key` `[BH, T · parts, D]`, `bias` `[BH, T · parts]`; `seen` `[BH or 1, Q, T]`: what a unit's mass is multiplied by. 0 for a query that
    sees nothing.
    """
    logits = scale * means @ key.transpose(-1, -2) + bias.clamp_min(MASKED)[:, None]  # finite: so are the gradients
    logits = logits.unflatten(-1, (-1, parts)) + seen.log()[..., None]
    top = logits.detach().amax((-1, -2), keepdim=True)
    shares = (logits - top.masked_fill(top == -torch.inf, 0)).exp().sum(-1)
    return shares / shares.sum(-1, keepdim=True).clamp_min(torch.finfo(shares.dtype).tiny)


def tilted(call: Call, slopes: Tensor) -> Tensor:
    """s q S_I `[BH, N, D]` for the queries of each block I."""
    return call.scale * call.q_blocks.ungather(call.q_blocks.gather(call.q) @ slopes)
