"""Backward of summaries and groups: from what is known of a unit's parts to the elements that they are made of, the tokens of a key block
or the parts of a group's members. The formulas are those of method/parts/content.py and groups.py.

Distances of elements from their part's mean add up to 0, so that nothing comes back through that mean but what is its own.
"""

import torch

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import head, placed, put, times, vector
from dit_accel.kernels.triton.tuples import Cut, Keys, Pair, kernel


def channels_at_once(d: int, padded: int, rows: int, arch: str, dtype: torch.dtype | None = None) -> dict[str, int]:
    """CW and BD of the kernels below, of so many elements with heads of `d`: what spills no register. Masks of channels take some, and so
    do the parts of float32 tokens (`dtype`; None: of the few elements of a group)."""
    wide = dtype == torch.float32 and padded >= 128
    whole = 128 if padded == 128 and arch != "sm_80" and not wide else 64
    return {"CW": min(padded, 32 if d < padded else min(whole, max(16, 8192 // rows))), "BD": 16 if wide else min(32, padded)}


@triton.jit
def gaps(base, stride, means, e, channel, AGAIN: tl.constexpr, C):
    """Some channels of the elements' keys or values less the means of their parts, float32 `[R, channels]`. AGAIN: another read of the
    same, which would be held in between if it were taken for that."""
    inside = e.valid[:, None] & (channel < C.D)[None, :]
    pointers = base + e.rows.to(tl.int64)[:, None] * stride + channel[None, :]
    x = tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first" if AGAIN else "")
    return x.to(tl.float32) - tl.load(means + e.part[:, None] * C.D + channel[None, :], mask=inside, other=0.0)


@triton.jit
def through_slope(base, stride, means, e, slope, slope_stride, outer, TRANSPOSED: tl.constexpr, C):
    """`gaps` of all channels times some columns (TRANSPOSED: rows) of a unit's matrix, of which a row is `slope_stride` after the one
    before, `[R, outer]`; BD channels at a time."""
    acc = tl.zeros([e.rows.shape[0], outer.shape[0]], tl.float32)
    for first in tl.range(0, C.DP, C.BD, num_stages=C.STAGES):
        inner = first + tl.arange(0, C.BD)
        if TRANSPOSED:
            inside = (outer < C.D)[:, None] & (inner < C.D)[None, :]
            matrix = tl.trans(tl.load(slope + outer.to(tl.int64)[:, None] * slope_stride + inner[None, :], mask=inside, other=0.0))
        else:
            inside = (inner < C.D)[:, None] & (outer < C.D)[None, :]
            matrix = tl.load(slope + inner.to(tl.int64)[:, None] * slope_stride + outer[None, :], mask=inside, other=0.0)
        acc = times(acc, gaps(base, stride, means, e, inner, False, C).to(base.dtype.element_ty), matrix, C)
    return acc


@triton.jit
def of_their_part(x, e, C):
    """Of each element the sum of `x` `[R]` over its part."""
    found = tl.zeros_like(x)
    for number in tl.static_range(C.PARTS):
        mine = e.part == number
        found += tl.where(mine, tl.sum(tl.where(mine, x, 0.0), 0), 0.0)
    return found


@triton.jit
def add_of_mean(gradient, of_mean, e, channel, C):
    """A gradient `[R, channels]` and what comes back to each element from the mean of its part."""
    if of_mean is None:
        return gradient
    inside = e.valid[:, None] & (channel < C.D)[None, :]
    return gradient + tl.load(of_mean + e.part[:, None] * C.D + channel[None, :], mask=inside, other=0.0) * e.of_part[:, None]


@triton.jit
def put_rows(base, stride, e, channel, x, JOIN: tl.constexpr, C):
    """Store some channels of the elements' rows; JOIN: added to what there is, which no other program writes."""
    pointers = base + e.rows.to(tl.int64)[:, None] * stride + channel[None, :]
    inside = e.valid[:, None] & (channel < C.D)[None, :]
    if JOIN:
        x += tl.load(pointers, mask=inside, other=0.0)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def put_gradients(e, of_spread, of_mean, slope, slope_stride, second, square, to, of_second, JOIN: tl.constexpr, C):
    """Store the gradients of the elements' keys and values (`to`: where their rows are, as `e` has them), and `of_second` `[D]`, that of
    E[q²], of which `second` is and `square` is scale²; that of each element's own variance is returned `[R]`.

    `of_spread` `[R]`: what comes back to the variance of an element's part; `of_mean` (a Pair): to the means of the unit's parts; `slope`:
    to its matrix. None where nothing does. CW channels at once: the first product is made twice where those are not all.
    """
    damp = 1.0 / (1.0 + e.spread)
    if slope is not None:
        joint = tl.zeros([e.rows.shape[0]], tl.float32)
        for first in tl.static_range(0, C.DP, C.CW):
            channel = first + tl.arange(0, C.CW)
            gradient = through_slope(e.v, e.v_n, e.v_mean, e, slope, slope_stride, channel, True, C)
            gap = gaps(e.k, e.k_n, e.k_mean, e, channel, False, C)
            joint += tl.sum(gap * gradient, 1)
        of_spread -= damp * damp * of_their_part(joint * e.of_unit, e, C)
    of_spread *= e.of_part
    for first in tl.static_range(0, C.DP, C.CW):
        channel = first + tl.arange(0, C.CW)
        if slope is None:
            gradient = tl.zeros([e.rows.shape[0], C.CW], tl.float32)
            gap = gaps(e.k, e.k_n, e.k_mean, e, channel, False, C)
        else:
            if C.CW < C.DP:
                gradient = through_slope(e.v, e.v_n, e.v_mean, e, slope, slope_stride, channel, True, C)
                gap = gaps(e.k, e.k_n, e.k_mean, e, channel, True, C)
            gradient *= (damp * e.of_unit)[:, None]
        moments = tl.load(second + channel, mask=channel < C.D, other=0.0) * square
        weighted = gap * of_spread[:, None]
        gradient += 2.0 * moments[None, :] * weighted
        put_rows(to.k, to.k_n, e, channel, add_of_mean(gradient, of_mean.k, e, channel, C), JOIN, C)
        tl.store(of_second + channel, tl.sum(gap * weighted, 0) * square, mask=channel < C.D)
    for first in tl.static_range(0, C.DP, C.CW):
        channel = first + tl.arange(0, C.CW)
        gradient = tl.zeros([e.rows.shape[0], C.CW], tl.float32)
        if slope is not None:
            gradient = through_slope(e.k, e.k_n, e.k_mean, e, slope, slope_stride, channel, False, C) * (damp * e.of_unit)[:, None]
        put_rows(to.v, to.v_n, e, channel, add_of_mean(gradient, of_mean.v, e, channel, C), JOIN, C)
    return of_spread


@kernel("D DP BK BD CW PARTS STAGES PRECISION")
def gradient_parts(
    k, v, cut, second, grads, dk, dv, dsecond, starts, places, scale, cap, heads, image_start_k, k_blocks, k_width, C: tl.constexpr
):  # fmt: skip
    """One key block of at most BK tokens: the gradients of its tokens' keys and values, and its summand of that of E[q²], `dsecond`
    `[BH, Tk, D]`. `cut` (`tuples.CutBlocks`): what the forward pass made; `grads` (`tuples.PartGradients`).
    Grid: (key blocks, batch · heads).
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    offset = tl.arange(0, C.BK)
    valid = begin + offset < end
    rows = placed(places, begin + offset, valid) + image_start_k
    at_block = bh * k_blocks + block
    part = tl.load(cut.part + at_block * k_width + offset, mask=valid, other=0).to(tl.int32)
    at = at_block * C.PARTS
    size = tl.load(cut.tokens + at + part, mask=valid, other=1.0)
    spread = tl.load(cut.spread + at + part, mask=valid, other=0.0)
    of_spread = tl.zeros([C.BK], tl.float32)
    if grads.bias is not None:
        of_bias = tl.load(grads.bias + at + part, mask=valid, other=0.0)
        of_spread += tl.where(spread * 0.5 < cap, of_bias * 0.5, 0.0)
    if grads.spread is not None:
        of_spread += tl.load(grads.spread + at + part, mask=valid, other=0.0)
    one = tl.where(valid, 1.0, 0.0)
    of_unit = one / tl.maximum((end - begin).to(tl.float32), 1.0)
    e = Cut(
        head(k, bh, heads), head(v, bh, heads), k.n, v.n, rows, valid, part, cut.k_mean + at * C.D, cut.v_mean + at * C.D, one / size,
        of_unit, spread,
    )  # fmt: skip
    of_mean = Pair(None if grads.key is None else grads.key + at * C.D, None if grads.value is None else grads.value + at * C.D)
    of_slope = None if grads.slope is None else grads.slope + (bh * C.D * k_blocks + block) * C.D
    to = Keys(head(dk, bh, heads), head(dv, bh, heads), dk.n, dv.n)
    put_gradients(
        e, of_spread, of_mean, of_slope, k_blocks * C.D, second + bh * C.D, scale * scale, to, dsecond + at_block * C.D, False, C
    )  # fmt: skip


@kernel("D DP BQ SUB_Q")
def gradient_queries(q, dq, q_mean, second, starts, places, share, heads, image_start_q, q_blocks, C: tl.constexpr):
    """dq of the image's queries, from the gradients of the mean of q² (`second` `[BH, D]`; `share` is 2 over the number of queries) and of
    the means of blocks (`q_mean` `[BH, Tq, D]` or None). Grid: (query blocks · SUB_Q, batch · heads)."""
    block, sub = tl.program_id(0) // C.SUB_Q, tl.program_id(0) % C.SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    token = begin + sub * C.BQ + tl.arange(0, C.BQ)
    valid = token < end
    rows = placed(places, token, valid) + image_start_q
    channel = tl.arange(0, C.DP)
    inside = valid[:, None] & (channel < C.D)[None, :]
    x = tl.load(head(q, bh, heads) + rows.to(tl.int64)[:, None] * q.n + channel[None, :], mask=inside, other=0.0).to(tl.float32)
    gradient = x * (vector(second + bh * C.D, C) * share)[None, :]
    if q_mean is not None:
        gradient += (vector(q_mean + (bh * q_blocks + block) * C.D, C) / tl.maximum(end - begin, 1).to(tl.float32))[None, :]
    put(head(dq, bh, heads), rows, dq.n, valid, gradient, C)


@kernel("D DP BD CW PARTS MEMBERS STAGES PRECISION")
def gradient_level(joined, part, second, grads, slope, dsecond, scale, first_below, members, slots, units, C: tl.constexpr):
    """One group: what comes back to its parts joins the gradients of its members' parts (`grads`, `tuples.UnitGradients`, of the units of
    all levels), and its summand of the gradient of E[q²] is stored, `dsecond` `[BH, groups, D]`. Grid: (groups of the level, BH).

    `slope` `[BH, D, groups, D]`: the gradients of what lies between the members of each group, or None; see `block_parts.group_level`.
    """
    group, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    element = tl.arange(0, 16)
    used = element < C.MEMBERS * C.PARTS
    unit = first_below + members + group
    above = units - slots
    at_group = bh * above + unit - slots
    from_ = (bh * units + first_below + C.MEMBERS * group) * C.PARTS
    at = (bh * units + unit) * C.PARTS
    tokens = tl.load(joined.tokens + from_ + element, mask=used, other=0.0)
    number = tl.load(part + at_group * C.MEMBERS * C.PARTS + element, mask=used, other=0).to(tl.int32)
    size = tl.maximum(tl.load(joined.tokens + at + number), 1.0)
    e = Cut(
        joined.key + from_ * C.D, joined.value + from_ * C.D, C.D, C.D, element, tokens > 0, number, joined.key + at * C.D,
        joined.value + at * C.D, tokens / size, tokens / tl.maximum(tl.sum(tokens, 0), 1.0), tl.load(joined.spread + at + number),
    )  # fmt: skip
    of_slope = None if slope is None else slope + (bh * C.D * above + unit - slots) * C.D
    of_spread = put_gradients(
        e, tl.load(grads.spread + at + number), Pair(grads.key + at * C.D, grads.value + at * C.D), of_slope, above * C.D,
        second + bh * C.D, scale * scale, Keys(grads.key + from_ * C.D, grads.value + from_ * C.D, C.D, C.D), dsecond + at_group * C.D,
        True, C,
    )  # fmt: skip
    own = tl.load(grads.spread + from_ + element, mask=used, other=0.0)
    tl.store(grads.spread + from_ + element, own + of_spread, mask=used)
