"""Backward of mixtures of units' matrices, and of what spans of query blocks see of the units of all levels (`seen_units`)."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import put
from dit_accel.kernels.triton.seen_units import span_means
from dit_accel.kernels.triton.tuples import kernel


@kernel("D DP BQ BK BD SPLITS STAGES PRECISION")
def gradient_mixed_weights(pull, slope, slope_above, dweight, spans, slots, above, C: tl.constexpr):
    """Gradients of the weights of `seen_units.mix_units`: `dweight` `[SPLITS, BH, spans, slots + above]`, Σ over a part of the matrices'
    rows of `pull` `[BH, spans, D, D]` · `slope`. Grid: (tiles of units of `slope` and then of `slope_above`, tiles of spans · SPLITS, BH).
    """
    bh = tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(slots, C.BK)
    of_above = tl.program_id(0) >= tiles
    unit = tl.where(of_above, tl.program_id(0) - tiles, tl.program_id(0)) * C.BK + tl.arange(0, C.BK)
    split = tl.program_id(1) % C.SPLITS
    span = tl.program_id(1) // C.SPLITS * C.BQ + tl.arange(0, C.BQ)
    acc = tl.zeros([C.BQ, C.BK], tl.float32)
    if slope_above is None:
        acc = row_products(acc, pull, slope, bh, span, unit, spans, slots, split, C)
    elif of_above:
        acc = row_products(acc, pull, slope_above, bh, span, unit, spans, above, split, C)
    else:
        acc = row_products(acc, pull, slope, bh, span, unit, spans, slots, split, C)
    to = dweight + ((split * tl.num_programs(2) + bh) * spans + span)[:, None] * (slots + above)
    column = tl.where(of_above, slots, 0) + unit
    inside = (span < spans)[:, None] & (unit < tl.where(of_above, above, slots))[None, :]
    tl.store(to + column[None, :], acc, mask=inside)


@triton.jit
def row_products(acc, pull, matrices, bh, span, unit, spans, units, split, C):
    """acc `[BQ, BK]` plus the products of some rows of the spans' matrices with those of units, `[BH, D, units, D]`."""
    STEPS: tl.constexpr = C.DP // C.BD
    ROWS: tl.constexpr = C.D // C.SPLITS  # of matrices, to each part as many
    spans_there, units_there = span < spans, unit < units
    from_spans = pull + (bh * spans + span)[:, None] * C.D * C.D
    from_units = matrices + (bh * C.D * units + unit)[:, None] * C.D
    for n in tl.range(0, ROWS * STEPS, num_stages=C.STAGES):
        row = split * ROWS + n // STEPS
        channel = (n % STEPS) * C.BD + tl.arange(0, C.BD)
        real = channel < C.D
        left = tl.load(from_spans + row * C.D + channel[None, :], mask=spans_there[:, None] & real[None, :], other=0.0)
        at_row = row.to(tl.int64) * units * C.D
        right = tl.load(from_units + at_row + channel[None, :], mask=units_there[:, None] & real[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=C.PRECISION)
    return acc


@kernel("D DP BQ BK STAGES PRECISION")
def gradient_mixed_slopes(weight, pull, dslope, dslope_above, spans, slots, above, C: tl.constexpr):
    """Row c of the gradients of the matrices of `seen_units.mix_units`: Σ weight `[BH, spans, slots + above]` · `pull` `[BH, spans, D, D]`,
    to `dslope` `[BH, D, slots, D]` and `dslope_above` `[BH, D, above, D]` (or None).
    Grid: (tiles of units of `dslope` and then of `dslope_above`, D, BH)."""
    row, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tiles = tl.cdiv(slots, C.BQ)
    of_above = tl.program_id(0) >= tiles
    unit = tl.where(of_above, tl.program_id(0) - tiles, tl.program_id(0)) * C.BQ + tl.arange(0, C.BQ)
    there = unit < tl.where(of_above, above, slots)
    column = unit + tl.where(of_above, slots, 0)
    channel = tl.arange(0, C.DP)
    acc = tl.zeros([C.BQ, C.DP], tl.float32)
    for first in tl.range(0, spans, C.BK, num_stages=C.STAGES):
        span = first + tl.arange(0, C.BK)
        at = bh * spans + span
        left = tl.load(
            weight + at[:, None] * (slots + above) + column[None, :], mask=(span < spans)[:, None] & there[None, :], other=0.0
        )  # fmt: skip
        right = tl.load(
            pull + (at * C.D + row)[:, None] * C.D + channel[None, :], mask=(span < spans)[:, None] & (channel < C.D)[None, :], other=0.0
        )  # fmt: skip
        acc = tl.dot(tl.trans(left), right, acc, input_precision=C.PRECISION)
    if dslope_above is None:
        put(dslope + (bh * C.D + row) * slots * C.D, unit, C.D, there, acc, C)
    elif of_above:
        put(dslope_above + (bh * C.D + row) * above * C.D, unit, C.D, there, acc, C)
    else:
        put(dslope + (bh * C.D + row) * slots * C.D, unit, C.D, there, acc, C)


@triton.jit
def numbers_of(numbers, unit, inside, C):
    """The sums `[R]` over the parts of units of one number for each."""
    part = tl.arange(0, C.PARTS)
    return tl.sum(tl.load(numbers + unit[:, None] * C.PARTS + part[None, :], mask=inside[:, None], other=0.0), 1)


@triton.jit
def put_own(shares, tokens, own, slots, W: tl.constexpr, C):
    """What each unit's slope was multiplied by, as `seen_units.weigh_units` has it, of one span's `shares` `[units, PARTS]`."""
    n, first = slots, 0
    for level in range(C.LEVELS):
        for at in range(0, n, W):
            j = at + tl.arange(0, W)
            inside = j < n
            size = numbers_of(tokens, first + j, inside, C)
            weight = numbers_of(shares, first + j, inside, C)
            group, above, of_level = j, first, n
            for _ in range(level + 1, C.LEVELS):
                group, above, of_level = group // 4, above + of_level, of_level // 4
                of_group = tl.maximum(numbers_of(tokens, above + group, inside, C), 1.0)
                weight += numbers_of(shares, above + group, inside, C) * size / of_group
            tl.store(own + first + j, weight, mask=inside)
        first, n = first + n, n // 4


@triton.jit
def add_members(down, tokens, slots, W: tl.constexpr, C):
    """To what came back to the matrix of each group joins that of its members, by their shares of its tokens; level after level."""
    n, below, first = slots // 4, 0, slots
    for _ in range(1, C.LEVELS):
        for at in range(0, n, W):
            j = at + tl.arange(0, W)
            inside = j < n
            total = tl.load(down + first + j, mask=inside, other=0.0)
            inverse = 1.0 / tl.maximum(numbers_of(tokens, first + j, inside, C), 1.0)
            for member in tl.static_range(4):
                unit = below + 4 * j + member
                total += tl.load(down + unit, mask=inside, other=0.0) * numbers_of(tokens, unit, inside, C) * inverse
            tl.store(down + first + j, total, mask=inside)
        tl.debug_barrier()  # the next level reads what other threads of this program wrote
        below, first, n = first, first + n, n // 4


@kernel("PARTS LEVELS W")
def gradient_shares(
    shares, pool_lists, pool_counts, tokens, dweight, dlogits, own, spans, slots, units, pool_width, C: tl.constexpr
):  # fmt: skip
    """One span: gradients `dlogits` `[BH, spans, units · PARTS]` of the logits of all pooled keys, 0 where it does not see them, from those
    of what each unit's matrix is multiplied by (`dweight` `[BH, spans, units]`, which is written over), and what that is: `own`, in the
    same shape. `shares`, `pool_lists` and `pool_counts` as the forward pass made them. Grid: (spans, batch · heads)."""
    span, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = bh * spans + span
    tokens += bh * units * C.PARTS
    mine, down = dlogits + row * units * C.PARTS, dweight + row * units
    part = tl.arange(0, C.PARTS)
    for at in range(0, units, C.W):
        j = at + tl.arange(0, C.W)
        tl.store(mine + j[:, None] * C.PARTS + part[None, :], tl.zeros([C.W, C.PARTS], tl.float32), mask=(j < units)[:, None])
    tl.debug_barrier()
    count = tl.load(pool_counts + row)
    for at in range(0, count, C.W):
        n = at + tl.arange(0, C.W)
        unit = tl.load(pool_lists + row * pool_width + n, mask=n < count, other=0)
        share = tl.load(shares + (row * pool_width + n)[:, None] * C.PARTS + part[None, :], mask=(n < count)[:, None], other=0.0)
        tl.store(mine + unit[:, None] * C.PARTS + part[None, :], share, mask=(n < count)[:, None])
    tl.debug_barrier()
    put_own(mine, tokens, own + row * units, slots, C.W, C)
    if C.LEVELS > 1:
        add_members(down, tokens, slots, C.W, C)
    total = tl.zeros([C.W], tl.float32)
    for at in range(0, units, C.W):
        j = at + tl.arange(0, C.W)
        total += numbers_of(mine, j, j < units, C) * tl.load(down + j, mask=j < units, other=0.0)
    whole = tl.sum(total, 0)
    tl.debug_barrier()
    for at in range(0, units, C.W):
        j = at + tl.arange(0, C.W)
        to = mine + j[:, None] * C.PARTS + part[None, :]
        share = tl.load(to, mask=(j < units)[:, None], other=0.0)
        back = tl.load(down + j, mask=j < units, other=0.0) - whole
        tl.store(to, share * back[:, None], mask=(j < units)[:, None])


@kernel("D DP SPAN BQ BK STAGES PRECISION")
def gradient_joined(
    joined, given, dlogits, q_mean, q_starts, grads, scale, cap, q_blocks, spans, pools, C: tl.constexpr
):  # fmt: skip
    """The gradients of the keys, values and variances of BK pooled keys of all levels (`grads`, `tuples.UnitGradients`), as far as nothing
    comes from groups that they are in: those that are `given` and, where there are any, through the logits of the spans' mean queries.
    Grid: (tiles of pooled keys, batch · heads)."""
    bh = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * C.BK + tl.arange(0, C.BK)
    inside = column < pools
    at = bh * pools + column
    of_bias = tl.zeros([C.BK], tl.float32)
    if given.bias is not None:
        of_bias += tl.load(given.bias + at, mask=inside, other=0.0)
    acc = tl.zeros([C.BK, C.DP], tl.float32)
    channel = tl.arange(0, C.DP)
    if dlogits is not None:
        for first in tl.range(0, spans, C.BQ, num_stages=C.STAGES):
            span = first + tl.arange(0, C.BQ)
            mean = span_means(q_mean + bh * q_blocks * C.D, q_starts, span, channel, q_blocks, C)
            pull = tl.load(
                dlogits + (bh * spans + span)[:, None] * pools + column[None, :], mask=(span < spans)[:, None] & inside[None, :], other=0.0
            )  # fmt: skip
            of_bias += tl.sum(pull, 0)
            acc = tl.dot(tl.trans(pull), mean, acc, input_precision=C.PRECISION)
        acc *= scale
    real = inside[:, None] & (channel < C.D)[None, :]
    rows = at[:, None] * C.D + channel[None, :]
    if given.key is not None:
        acc += tl.load(given.key + rows, mask=real, other=0.0)
    tl.store(grads.key + rows, acc, mask=real)
    value = tl.zeros([C.BK, C.DP], tl.float32)
    if given.value is not None:
        value = tl.load(given.value + rows, mask=real, other=0.0)
    tl.store(grads.value + rows, value, mask=real)
    below = (tl.load(joined.spread + at, mask=inside, other=0.0) * 0.5 <= cap) & (tl.load(joined.tokens + at, mask=inside, other=0.0) > 0)
    tl.store(grads.spread + at, tl.where(below, of_bias * 0.5, 0.0), mask=inside)


@kernel("D DP SPAN BQ BK STAGES PRECISION")
def gradient_mean_queries(joined, dlogits, dq_mean, q_starts, scale, q_blocks, spans, pools, C: tl.constexpr):
    """The gradients of the query blocks' means `[BH, q blocks, D]`, through the logits of their spans'. Grid: (tiles of spans, BH)."""
    bh = tl.program_id(1).to(tl.int64)
    span = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    channel = tl.arange(0, C.DP)
    acc = tl.zeros([C.BQ, C.DP], tl.float32)
    for first in tl.range(0, pools, C.BK, num_stages=C.STAGES):
        column = first + tl.arange(0, C.BK)
        pull = tl.load(
            dlogits + (bh * spans + span)[:, None] * pools + column[None, :], mask=(span < spans)[:, None] & (column < pools)[None, :],
            other=0.0,
        )  # fmt: skip
        key = tl.load(
            joined.key + (bh * pools + column)[:, None] * C.D + channel[None, :],
            mask=(column < pools)[:, None] & (channel < C.D)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(pull, key, acc, input_precision=C.PRECISION)
    tokens = tl.load(q_starts + tl.minimum((span + 1) * C.SPAN, q_blocks)) - tl.load(q_starts + tl.minimum(span * C.SPAN, q_blocks))
    acc *= (scale / tl.maximum(tokens, 1).to(tl.float32))[:, None]
    for number in tl.static_range(C.SPAN):
        block = span * C.SPAN + number
        inside = block < q_blocks
        size = tl.load(q_starts + block + 1, mask=inside, other=0) - tl.load(q_starts + block, mask=inside, other=0)
        put(dq_mean + bh * q_blocks * C.D, block, C.D, inside, acc * size.to(tl.float32)[:, None], C)
