"""The reference: every operator in eager PyTorch with autograd, in float32 (float64 inputs in float64). It is the specification.

Everything here is *partial attention*: a softmax over some keys, given as its output and the natural logarithm of its mass (lse), so that
parts merge exactly. Work goes through query blocks in chunks that fit a cache; where a gradient is required each chunk is recomputed in the
backward pass, so memory stays linear in the number of tokens. No N × N mask is ever made.

Shapes: q, k, v `[BH, N, D]` (batch and heads folded), blocks `[BH, T, width, D]`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dit_accel.kernels.blocks import BlockMap, Blocks, TokenTables

# a bias that leaves a key out, as -inf does: its difference to any logit is a number, and its weight is exactly 0 next to any other key
MASKED = -1e30
GOLDEN = 2654435769  # 2³² over the golden ratio
CHUNK_ELEMENTS = 1 << 20  # scores and gathered keys of one chunk, 4 MB in float32: a few second-level caches

Partial = tuple[Tensor, Tensor]  # output [..., N, D] and lse [..., N]


def run_again(function: Callable[..., Any], *args: Any) -> Any:
    """Call it; where a gradient is required, keep only the arguments and recompute in the backward pass."""
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)
    return function(*args)


def softmax_weights(scores: Tensor) -> Partial:
    """Softmax of `scores` `[..., Nq, Nk]`, and its lse `[..., Nq]`; a row of -inf gives weights 0 and lse -inf."""
    weights, mass, lse = _exponentials(scores)
    return weights / mass[..., None], lse


def softmax_partial(scores: Tensor, values: Tensor) -> Partial:
    """Softmax of `scores` `[..., Nq, Nk]` over values `[..., Nk, D]`; a row of -inf gives output 0 and lse -inf."""
    weights, mass, lse = _exponentials(scores)
    return (weights @ values) / mass[..., None], lse


def _exponentials(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of a softmax before they are divided by their sum, that sum, at least the smallest normal number, and the lse."""
    top = scores.detach().amax(-1, keepdim=True)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (scores - top).exp_()
    mass = weights.sum(-1)
    safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
    return weights, safe, torch.where(mass > 0, safe.log() + top[..., 0], -torch.inf)


def merge_partials(parts: list[Partial]) -> Partial:
    """One softmax over the union of disjoint key sets, from the partial softmax over each (FlashAttention's merge)."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out = sum(out * (part - lse).exp()[..., None] for out, part in parts)
    return out, lse  # type: ignore[return-value]


def slices(total: int, elements_each: int) -> list[slice]:
    """Slices of `total` items, about CHUNK_ELEMENTS elements each."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    return [slice(i, min(i + step, total)) for i in range(0, total, step)]


def block_sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, blocks: BlockMap, q_blocks: Blocks, k_blocks: Blocks, *, scale: float,
    tables: TokenTables | None = None,
) -> Partial:  # fmt: skip
    """Softmax of each query over the keys of the blocks that its query block visits.

    `tables` decide token by token inside partial blocks. Gradients: q, k, v, from output and lse.
    """
    bh, _, d = q.shape
    t_k, width = k_blocks.index.shape
    queries = q_blocks.gather(q * scale)
    # one row per block, so that a visit is one contiguous copy
    rows_k, rows_v = (k_blocks.gather(x).reshape(bh * t_k, width * d) for x in (k, v))
    first = torch.arange(bh, device=q.device)[:, None, None] * t_k
    whole = k_blocks.even and blocks.partial is None and blocks.complete

    def attend(part: Tensor, rows_k: Tensor, rows_v: Tensor, chunk: slice) -> Partial:
        index = blocks.index[..., chunk, :]
        flat = (index + first).reshape(-1)
        shape = (bh, part.shape[1], index.shape[-1] * width, d)
        keys, values = (rows.index_select(0, flat).view(shape) for rows in (rows_k, rows_v))
        scores = part @ keys.transpose(-1, -2)
        if not whole:
            scores = scores.masked_fill(~_allowed(blocks, q_blocks, k_blocks, chunk, tables), -torch.inf)
        return softmax_partial(scores, values)

    visited = blocks.index.shape[-1] * width
    outs = [
        run_again(attend, queries[:, chunk], rows_k, rows_v, chunk)
        for chunk in slices(queries.shape[1], bh * visited * (2 * d + queries.shape[2]))
    ]
    return _join(outs, q_blocks)


def _allowed(blocks: BlockMap, q_blocks: Blocks, k_blocks: Blocks, chunk: slice, tables: TokenTables | None) -> Tensor:
    """Which keys `[..., C, 1 or width_q, n · width_k]` the chunk's query blocks may see."""
    index = blocks.index[..., chunk, :]
    allowed = (k_blocks.valid[index] & blocks.valid[..., chunk, :, None]).flatten(-2)[..., None, :]
    if blocks.partial is None or tables is None:
        return allowed
    rows = torch.arange(len(q_blocks.count), device=index.device)[chunk]
    mask_of = None if blocks.mask_of is None else blocks.mask_of[..., chunk, :]
    inside = tables.kept(rows, index, mask_of, q_blocks, k_blocks)
    whole = (~blocks.partial[..., chunk, :, None]).expand(*index.shape, k_blocks.index.shape[1]).flatten(-2)[..., None, :]
    return allowed & (whole | inside)


def _join(parts: list[Partial], q_blocks: Blocks) -> Partial:
    """Chunks `[BH, C, width, ...]` to tokens."""
    out = torch.cat([out for out, _ in parts], 1)
    lse = torch.cat([lse for _, lse in parts], 1)
    return q_blocks.ungather(out), q_blocks.ungather(lse[..., None])[..., 0]


def dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, *, scale: float) -> Partial:
    """Softmax of every query over all of k, in chunks of queries.

    `bias` `[BH, Nk]`, natural units, joins every query's logits and has no gradient; -inf leaves a key out, whatever it is.
    """
    if bias is not None:  # 0 times what padding may be, NaN or infinity, would be NaN
        out = (bias <= MASKED)[..., None]
        k, v = k.masked_fill(out, 0), v.masked_fill(out, 0)

    def attend(part: Tensor, k: Tensor, v: Tensor) -> Partial:
        scores = part @ k.transpose(-1, -2)
        return softmax_partial(scores if bias is None else scores + bias[:, None], v)

    q = q * scale
    outs = [run_again(attend, q[:, chunk], k, v) for chunk in slices(q.shape[1], q.shape[0] * k.shape[1])]
    return torch.cat([out for out, _ in outs], 1), torch.cat([lse for _, lse in outs], 1)


def pooled_attention(
    q: Tensor, k_mean: Tensor, v_mean: Tensor, k_var: Tensor | None, log_count: Tensor | None, kept: Tensor, q_blocks: Blocks, *,
    scale: float, cap: float,
) -> Partial:  # fmt: skip
    """Softmax of each query over the pooled keys `[BH, Tk, D]` of the blocks its query block does not keep (`kept` `[..., Tq, Tk]`).

    Logit: s·q·k̄ + log n + min(s²/2 · Σ_d q_d² Var(k_d), cap); without `k_var` or `log_count` that term is left out.
    """
    queries = q_blocks.gather(q * scale)

    def attend(part: Tensor, k_mean: Tensor, v_mean: Tensor, k_var: Tensor | None, kept: Tensor) -> Partial:
        scores = part @ k_mean[:, None].transpose(-1, -2)
        if k_var is not None:
            scores = scores + (part.square() @ (0.5 * k_var[:, None].transpose(-1, -2))).clamp(max=cap)
        if log_count is not None:
            scores = scores + log_count
        return softmax_partial(scores.masked_fill(kept[..., None, :], -torch.inf), v_mean[:, None])

    chunks = slices(queries.shape[1], q.shape[0] * queries.shape[2] * k_mean.shape[1] * 2)
    return _join([run_again(attend, queries[:, c], k_mean, v_mean, k_var, kept[..., c, :]) for c in chunks], q_blocks)


def rounded_to_int8(q: Tensor, k: Tensor, image_q: slice, image_k: slice, sample: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys `[BH, N, D]` rounded to 8 bits, and the mean key `[BH, 1, D]`: q·k is about rounded q · rounded k + q · mean.

    Of some image tokens, spread by the golden ratio: the mean m of the keys, and of each channel the balance b = √(σ(k) / √(mean of q²)),
    neither taken for less than 1/64 of the largest channel's. (k - m) / b and q·b are rounded to 127 steps of the largest size of an entry,
    token by token (SageAttention, arXiv 2410.02367, subtracts the mean; softmax does not see it).
    """
    few_q, few_k = (_spread(x[:, side], sample) for x, side in ((q, image_q), (k, image_k)))
    mean = few_k.mean(1, keepdim=True)
    spread = [x.square().mean(1, keepdim=True).sqrt() for x in (few_k - mean, few_q)]
    of_keys, of_queries = (x.maximum(x.amax(-1, keepdim=True) / 64).clamp_min(2.0**-60) for x in spread)
    balance = (of_keys / of_queries).sqrt()

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True).clamp_min(2.0**-60) / 127
        return (x / scale).round() * scale

    return rounded(q * balance), rounded((k - mean) / balance), mean


def _spread(x: Tensor, sample: int) -> Tensor:
    """So many of the tokens, some more than once where there are fewer; at an even distance they could be one column of an image."""
    return x[:, (torch.arange(sample, device=x.device) * GOLDEN & 0xFFFFFFFF) * x.shape[1] >> 32]


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
}


def linear_attention(phi_q: Tensor, phi_k: Tensor, v: Tensor, far: Tensor | None = None) -> Partial:
    """Linear attention over all keys: phi(q)·(phi(K)ᵀV) / (1e-5 + phi(q)·Σ phi(k)), as released with SLA, and the log of its mass.

    `far` `[BH, F, D + 1]`: Σ phi(k) [vᵀ | 1] of further keys.
    """
    state, total = phi_k.transpose(-1, -2) @ v, phi_k.sum(-2)
    if far is not None:
        state, total = state + far[..., :-1], total + far[..., -1]
    mass = (phi_q @ total[..., None]) + 1e-5
    return (phi_q @ state) / mass, mass[..., 0].log()


def linear_attention_rest(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, weights: Tensor, q_blocks: Blocks, k_blocks: Blocks, far: Tensor | None = None
) -> Partial:  # fmt: skip
    """Linear attention of each query block over the key blocks by `weights` `[..., Tq, Tk]` >= 0, as 1 where a block is not kept and 0
    where it is; output 0 and log mass -inf where all are 0. Features `[BH, N, F]` of any width. `far` `[BH, F, D + 1]`: Σ phi(k) [vᵀ | 1]
    of further keys, of weight 1 for every query block. Gradients: features, v, weights, far.

    The states are summed, not subtracted from a total, so that nothing cancels (SLA, eq. 5).
    """
    keys = k_blocks.gather(phi_k) * k_blocks.valid[..., None]
    states = keys.transpose(-1, -2) @ k_blocks.gather(v)
    rest = weights.to(v.dtype).expand(v.shape[0], *weights.shape[-2:])
    sums = keys.sum(-2)
    queries = q_blocks.gather(phi_q)
    width, d = phi_q.shape[-1], v.shape[-1]

    def attend(part: Tensor, rest: Tensor, states: Tensor, sums: Tensor, far: Tensor | None) -> Partial:
        state, total = (rest @ states.flatten(-2)).unflatten(-1, (width, d)), rest @ sums
        if far is not None:
            state, total = state + far[:, None, :, :-1], total + far[:, None, :, -1]
        mass = (part @ total[..., None])[..., 0]
        safe = mass.clamp_min(torch.finfo(mass.dtype).tiny)
        out = torch.where(mass[..., None] > 0, (part @ state) / safe[..., None], 0)
        return out, torch.where(mass > 0, safe.log(), -torch.inf)

    chunks = slices(queries.shape[1], v.shape[0] * width * (d + queries.shape[2]))
    return _join([run_again(attend, queries[:, c], rest[:, c], states, sums, far) for c in chunks], q_blocks)
