"""What a rest of pooled keys and a choice by the error take from whole key blocks, in one pass over keys and values: the formulas of
method/parts/content.py and scores.py."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import TINY, head, placed, put, tile, vector, wide_dot
from dit_accel.kernels.triton.tuples import kernel


@triton.jit
def halved(part, mine, key, mapped, level):
    """Parts `[K]` of tokens with those that are `mine` (1, else 0) cut in two: the ones with a positive projection move on by `level`.

    With X the centred keys and M the metric, four steps of power iteration on M Xᵀ X from (1, ..., 1) leave u; of it only X u is ever made,
    from X (`key`) and X M (`mapped`), both still to be centred.
    """
    share = mine / tl.maximum(tl.sum(mine, 0), 1.0)
    centre = tl.sum(key.to(tl.float32) * share[:, None], 0)
    centre_mapped = tl.sum(mapped * share[:, None], 0)
    along = tl.sum(key.to(tl.float32) - centre[None, :], 1) * mine
    for _ in range(4):
        along *= 1.0 / tl.maximum(tl.max(tl.abs(along), 0), TINY)
        pull = tl.sum((key.to(tl.float32) - centre[None, :]) * along[:, None], 0)
        pull *= 1.0 / tl.maximum(tl.max(tl.abs(pull), 0), TINY)
        along = tl.sum((mapped - centre_mapped[None, :]) * pull[None, :], 1) * mine
    return part + tl.where(along > 0, level, 0)


@kernel("D DP BK PARTS COUNT SLOPES PRECISION")
def summarise_parts(
    k, v, metric, second, found, starts, places, scale, cap, score_cap, heads, image_start_k, k_blocks, k_width, C: tl.constexpr
):  # fmt: skip
    """One key block of at most BK tokens, cut in PARTS: all that `tuples.Parts` has. Grid: (key blocks, batch · heads).

    `metric` `[BH, D, D]` and its diagonal `second` `[BH, D]`: the means of q qᵀ and of q² over a head's queries, float32.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    k_base = head(k, bh, heads) + image_start_k.to(tl.int64) * k.n
    v_base = head(v, bh, heads) + image_start_k.to(tl.int64) * v.n
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    offset = tl.arange(0, C.BK)
    valid = begin + offset < end
    place = placed(places, begin + offset, valid)
    key = tile(k_base, place, k.n, valid, C)
    part = tl.zeros([C.BK], tl.int32)
    if C.PARTS > 1:
        mapped = tl.zeros([C.BK, C.DP], tl.float32)
        mapped = wide_dot(mapped, k_base, place, k.n, valid, None, metric + bh * C.D * C.D, False, 1, C)
        for step in range(C.PARTS - 1):  # the whole, then each half
            mine = tl.where(valid & (part == tl.maximum(step - 1, 0)), 1.0, 0.0)
            part = halved(part, mine, key, mapped, tl.minimum(step + 1, 2))
    at_block = bh * k_blocks + block
    tl.store(found.part + at_block * k_width + offset, part.to(tl.uint8), mask=offset < k_width)
    value = tile(v_base, place, v.n, valid, C)
    moments = vector(second + bh * C.D, C)
    channel = tl.arange(0, C.DP)
    of_score(key, value, valid, moments, found, at_block, scale, score_cap, C)
    weight = tl.zeros([C.BK], tl.float32)  # of each token's covariance
    off = value.to(tl.float32)
    for number in range(C.PARTS):
        mine = tl.where(valid & (part == number), 1.0, 0.0)
        size = tl.sum(mine, 0)
        share = mine / tl.maximum(size, 1.0)
        mean = tl.sum(key.to(tl.float32) * share[:, None], 0)
        gap = key.to(tl.float32) - mean[None, :]
        spread = scale * scale * tl.sum(tl.sum(gap * gap * share[:, None], 0) * moments, 0)
        bias = tl.minimum(spread * 0.5, cap)
        if C.COUNT:
            bias += tl.log(tl.maximum(size, 1.0))
        at = at_block * C.PARTS + number
        v_mean = tl.sum(value.to(tl.float32) * share[:, None], 0)
        tl.store(found.pooled_k + at * C.D + channel, mean, mask=channel < C.D)
        tl.store(found.pooled_v + at * C.D + channel, v_mean, mask=channel < C.D)
        tl.store(found.bias + at, tl.where(size > 0, bias, float("-inf")))
        v_gap = value.to(tl.float32) - v_mean[None, :]
        tl.store(found.tokens + at, size)
        tl.store(found.spread + at, spread)
        tl.store(found.v_spread + at, tl.sum(tl.sum(v_gap * v_gap * share[:, None], 0), 0))
        weight += mine / (1.0 + spread)
        off -= mine[:, None] * v_mean[None, :]
    if C.SLOPES:
        low = (off * weight[:, None]).to(key.dtype)
        inverse = 1.0 / tl.maximum(end - begin, 1).to(tl.float32)
        slope = found.slope + (bh * C.D * k_blocks + block) * C.D
        STEP: tl.constexpr = 64 if C.DP > 64 else C.DP
        for first in tl.range(0, C.DP, STEP, num_stages=1):
            inner = first + tl.arange(0, STEP)
            some = tl.load(
                k_base + place.to(tl.int64)[:, None] * k.n + inner[None, :], mask=valid[:, None] & (inner < C.D)[None, :], other=0.0
            )
            away = some.to(tl.float32)
            for number in range(C.PARTS):
                member = tl.where(valid & (part == number), 1.0, 0.0)
                middle = tl.sum(some.to(tl.float32) * (member / tl.maximum(tl.sum(member, 0), 1.0))[:, None], 0)
                away -= member[:, None] * middle[None, :]
            product = tl.dot(tl.trans(away.to(key.dtype)), low, input_precision=C.PRECISION) * inverse
            put(slope, inner, k_blocks.to(tl.int64) * C.D, inner < C.D, product, C)


@triton.jit
def of_score(key, value, valid, moments, found, at, scale, cap, C):
    """The block's mean key, and what joins its score: log n + min(σ²/2, cap) + log σ² + ½ log tr Var(v)."""
    size = tl.sum(tl.where(valid, 1.0, 0.0), 0)
    share = tl.where(valid, 1.0 / tl.maximum(size, 1.0), 0.0)
    mean = tl.sum(key.to(tl.float32) * share[:, None], 0)
    channel = tl.arange(0, C.DP)
    tl.store(found.k_mean + at * C.D + channel, mean, mask=channel < C.D)
    gap = key.to(tl.float32) - mean[None, :]
    spread = scale * scale * tl.sum(tl.sum(gap * gap * share[:, None], 0) * moments, 0)
    gap = value.to(tl.float32) - tl.sum(value.to(tl.float32) * share[:, None], 0)[None, :]
    of_values = tl.sum(tl.sum(gap * gap * share[:, None], 0), 0)
    error = tl.log(tl.maximum(spread, TINY)) + tl.log(tl.maximum(of_values, TINY)) * 0.5
    tl.store(found.score_bias + at, tl.log(size) + tl.minimum(spread * 0.5, cap) + error)
