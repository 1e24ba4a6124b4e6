"""A key block split by content, and its moments: what finer pooled keys and the first order of a rest are made of."""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.blocks import Blocks, mean_product, pool_blocks
from dit_accel.kernels.reference import softmax_partial
from dit_accel.method.parts.call import Call

STEPS = 4  # of the power iteration that finds a block's principal direction


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


def split(keys: Tensor, weight: Tensor, metric: Tensor | None, parts: int) -> Tensor:
    """Which of `parts` (a power of two) each key `[BH, T, n, D]` of a unit belongs to, `[BH, T, n]` int64; `weight` `[BH, T, n]`: 0 leaves
    a key out. `metric` (`metric_of`): read where there is more than one part.

    A unit is cut in two where the projection of its keys onto one direction is that of their mean, each part again. The direction u is the
    one along which the head's logits vary most: the first eigenvector of M C, C = Σ w (k - k̄)(k - k̄)ᵀ, M = E[q qᵀ], by power iteration
    from (1, ..., 1). A key on the border may change sides by rounding.
    """
    part = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    level = 1
    while level < parts:
        for number in range(level):
            mine = torch.where(part == number, weight, 0)[..., None]
            side = _projected(keys, mine, metric) > 0  # type: ignore[arg-type]
            part = part + level * (side & (mine[..., 0] > 0))
        level *= 2
    return part


def _projected(keys: Tensor, weight: Tensor, metric: Tensor) -> Tensor:
    """Keys `[BH, T, n, D]` less their mean by `weight` `[BH, T, n, 1]`, along their principal direction; 0 for those without weight."""
    mean = (keys * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
    centred = (keys - mean) * (weight > 0)
    direction = torch.ones_like(mean).transpose(-1, -2)  # [BH, T, D, 1]
    for _ in range(STEPS):
        direction = metric[:, None] @ (centred.transpose(-1, -2) @ (weight * (centred @ direction)))
        direction = direction / direction.norm(dim=2, keepdim=True).clamp_min(torch.finfo(keys.dtype).tiny)
    return (centred @ direction)[..., 0]


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
    mean = pool_blocks(call.q, call.q_blocks)[0]
    logits = (call.scale * mean @ pooled.key.transpose(-1, -2) + pooled.bias[:, None]).unflatten(-1, (-1, parts)).logsumexp(-1)
    state, _ = softmax_partial(logits.masked_fill(call.kept, -torch.inf), pooled.slope.flatten(-2))
    return state.unflatten(-1, pooled.slope.shape[-2:])


def tilted(call: Call, slopes: Tensor) -> Tensor:
    """s q S_I `[BH, N, D]` for the queries of each block I."""
    return call.scale * call.q_blocks.ungather(call.q_blocks.gather(call.q) @ slopes)
