"""Which key blocks a query block keeps: the moments of all blocks in one pass over queries, keys and values, and in another launch their
scores and the best of them. The formulas are those of method/parts/scores.py."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.block_sums import sum_tile, weight_tile
from dit_accel.kernels.triton.primitives import TINY, head, placed, tile
from dit_accel.kernels.triton.tuples import kernel


@triton.jit
def moments_of(base, stride, places, begin, end, SPREAD: tl.constexpr, BLOCK: tl.constexpr, SUB: tl.constexpr, C):
    """The mean of a block's rows `[DP]` and, where SPREAD, their (biased) variance; SUB tiles of BLOCK rows."""
    count = tl.maximum(end - begin, 1).to(tl.float32)
    variance = tl.zeros([C.DP], tl.float32)
    if SUB == 1:
        token = begin + tl.arange(0, BLOCK)
        valid = token < end
        x = tile(base, placed(places, token, valid), stride, valid, C)
        mean = tl.sum(x.to(tl.float32), 0) / count
        if SPREAD:
            gap = tl.where(valid[:, None], x.to(tl.float32) - mean[None, :], 0.0)
            variance = tl.sum(gap * gap, 0) / count
    else:
        total = tl.zeros([C.DP], tl.float32)
        for sub in range(SUB):
            token = begin + sub * BLOCK + tl.arange(0, BLOCK)
            valid = token < end
            total += tl.sum(tile(base, placed(places, token, valid), stride, valid, C).to(tl.float32), 0)
        mean = total / count
        if SPREAD:
            for sub in range(SUB):  # a second look at the same rows: E[x²] − E[x]² cancels
                token = begin + sub * BLOCK + tl.arange(0, BLOCK)
                valid = token < end
                x = tile(base, placed(places, token, valid), stride, valid, C).to(tl.float32)
                gap = tl.where(valid[:, None], x - mean[None, :], 0.0)
                variance += tl.sum(gap * gap, 0) / count
    return mean, variance


@triton.jit
def query_moments(q_base, stride, found, starts, places, bh, number, groups, group, blocks, share, C):
    """Means of the `number`th `group` of query blocks and, where they are asked for, the sum of the squares of their queries."""
    channel = tl.arange(0, C.DP)
    first = number * group
    last = tl.minimum(first + group, blocks)
    square = tl.zeros([C.DP], tl.float32)
    for i in range(first, last):
        begin, end = tl.load(starts + i), tl.load(starts + i + 1)
        total = tl.zeros([C.DP], tl.float32)
        for sub in range(C.SUB_Q):
            token = begin + sub * C.BQ + tl.arange(0, C.BQ)
            valid = token < end
            x = tile(q_base, placed(places, token, valid), stride, valid, C).to(tl.float32)
            total += tl.sum(x, 0)
            if found.q_square is not None:
                square += tl.sum(x * x, 0)
        mean = total / tl.maximum(end - begin, 1).to(tl.float32)
        tl.store(found.q_mean + (bh * blocks + i) * C.D + channel, mean, mask=channel < C.D)
    if found.q_square is not None:
        tl.store(found.q_square + (bh * groups + number) * C.D + channel, square * share, mask=channel < C.D)


@triton.jit
def key_moments(k_base, v_base, k_stride, v_stride, found, starts, places, bh, block, blocks, C):
    """What is asked for of one key block."""
    channel = tl.arange(0, C.DP)
    inside = channel < C.D
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    at = (bh * blocks + block) * C.D + channel
    SPREAD: tl.constexpr = found.k_var is not None or found.k_half is not None
    mean, variance = moments_of(k_base, k_stride, places, begin, end, SPREAD, C.BK, C.SUB_K, C)
    if found.k_mean is not None:
        tl.store(found.k_mean + at, mean, mask=inside)
    if found.k_var is not None:
        tl.store(found.k_var + at, variance, mask=inside)
    if found.pooled_k is not None:
        tl.store(found.pooled_k + at, mean.to(found.pooled_k.dtype.element_ty), mask=inside)
    if found.k_half is not None:
        half = tl.minimum(variance * 0.5, 60000.0)  # float16 ends before infinity
        tl.store(found.k_half + at, half.to(found.k_half.dtype.element_ty), mask=inside)
    if found.error is not None or found.pooled_v is not None:
        mean, variance = moments_of(v_base, v_stride, places, begin, end, found.error is not None, C.BK, C.SUB_K, C)
        if found.pooled_v is not None:
            tl.store(found.pooled_v + at, mean.to(found.pooled_v.dtype.element_ty), mask=inside)
        if found.error is not None:
            of_values = tl.log(tl.maximum(tl.sum(variance, 0), TINY)) * 0.5
            tl.store(found.error + bh * blocks + block, tl.log((end - begin).to(tl.float32)) + of_values)


@kernel("D DP BQ BK SUB_Q SUB_K")
def block_moments(
    q, k, v, found, q_starts, k_starts, q_places, k_places, share, heads, q_blocks, k_blocks, group, C: tl.constexpr
):  # fmt: skip
    """Of the blocks of queries, keys and values what `tuples.Moments` names, as far as it is there; `share`: one over all queries.

    Grid: (groups of `group` query blocks, then `k_blocks` key blocks; batch · heads).
    """
    bh = tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(0) - k_blocks
    number = tl.program_id(0)
    if number < groups:
        query_moments(head(q, bh, heads), q.n, found, q_starts, q_places, bh, number, groups, group, q_blocks, share, C)
    else:
        key_moments(head(k, bh, heads), head(v, bh, heads), k.n, v.n, found, k_starts, k_places, bh, number - groups, k_blocks, C)


@triton.jit
def joined_error(spread, error, scale, cap):
    """What joins the products of means, over `scale`: log n + min(σ²/2, cap) + log σ² + ½ log tr Var(v), σ² = scale² · spread."""
    spread *= scale * scale
    return (error + tl.minimum(spread * 0.5, cap) + tl.log(tl.maximum(spread, TINY))) / scale


@kernel("D DP BK GROUPS")
def score_biases(found, bias, scale, cap, k_blocks, groups, C: tl.constexpr):
    """`joined_error` of each key block `[BH, Tk]`. Grid: (tiles of key blocks, batch · heads)."""
    bh = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * C.BK + tl.arange(0, C.BK)
    valid = block < k_blocks
    group = tl.arange(0, C.GROUPS)
    second = tl.sum(tile(found.q_square + bh * groups * C.D, group, C.D, group < groups, C), 0)
    spread = tl.sum(tile(found.k_var + bh * k_blocks * C.D, block, C.D, valid, C) * second[None, :], 1)
    error = tl.load(found.error + bh * k_blocks + block, mask=valid, other=0.0)
    tl.store(bias + bh * k_blocks + block, joined_error(spread, error, scale, cap), mask=valid)


@triton.jit
def ordered(x):
    """float32 as int32 that compare alike."""
    bits = x.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def take_best(x, chosen, first, rows, blocks, top):
    """Store the `top` largest of each row of scores `[R, W]` (of which `blocks` there are) to `chosen`, ties to the first: as ascending
    indices, as bits, and how many they are. The rows are those from `first` on (a 64-bit number) of all, and `rows` of them there are.

    Bisection on the bits of the threshold: 32 counts over a row in registers, exact and the same every time.
    """
    R: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    j = tl.arange(0, W)
    real = (j < blocks)[None, :]
    key = tl.where(real, ordered(x + 0.0), -2147483648)  # + 0.0: -0 ties with 0
    # the largest threshold that at least `top` keys reach: sign first, then bit by bit
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 1) >= top, 0, -2147483648)
    for bit in range(31):
        trial = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((key >= trial[:, None]).to(tl.int32), 1) >= top, trial, threshold)
    above = (key > threshold[:, None]).to(tl.int32)
    tied = ((key == threshold[:, None]) & real).to(tl.int32)
    spare = top - tl.sum(above, 1)
    taken = above + tl.where(tl.cumsum(tied, 1) <= spare[:, None], tied, 0)
    row = tl.arange(0, R)
    valid = row < rows
    word = tl.arange(0, W // 32)
    words = (blocks + 31) // 32
    bits = tl.sum((taken << (j % 32)[None, :]).reshape(R, W // 32, 32), 2)
    tl.store(chosen.bits + first * words + (row * words)[:, None] + word[None, :], bits, mask=valid[:, None] & (word < words)[None, :])
    tl.store(chosen.counts + first + row, top + tl.zeros([R], tl.int32), mask=valid)
    place = (row * top - 1)[:, None] + tl.cumsum(taken, 1)
    tl.store(chosen.lists + first * top + place, tl.broadcast_to(j[None, :], [R, W]), mask=(taken > 0) & valid[:, None])


@triton.jit
def sum_further(sums, projection, bh, number, groups, heads, C):
    """What the further programs of `choose_by_means` do."""
    if bh < heads:
        sum_tile(sums.parts, sums.found, None, bh, number, groups, heads, C.E, C.N, C)
    if projection is not None and bh >= heads and number >= 0:
        weight_tile(projection, sums.found.state, bh, number, C.E, C)


@kernel("D DP BQ BD W GROUPS E N PRECISION")
def choose_by_means(
    found, weight, bias, chosen, sums, projection, scale, cap, heads, q_blocks, k_blocks, groups, top, C: tl.constexpr
):  # fmt: skip
    """The best key blocks of BQ query blocks, of at most W key blocks, by the products of means; see `choose_blocks` for `weight` and
    `bias`. Where `found` has variances, `joined_error` is the bias.

    `sums` (`tuples.Sums`): `groups` parts of each head, whose sums further programs write, and with them `projection`
    `[D, D]`, or None, as one more head's (`block_sums.sum_tile`).
    Grid: (tiles of query blocks, and of D² entries; batch · heads, one more of a projection).
    """
    bh = tl.program_id(1).to(tl.int64)
    if sums.parts.state is not None and ((tl.program_id(0) >= tl.cdiv(q_blocks, C.BQ)) | (bh >= heads)):
        number = tl.program_id(0) - tl.cdiv(q_blocks, C.BQ)
        sum_further(sums, projection, bh, number, groups, heads, C)
        return
    row = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    j = tl.arange(0, C.W)
    group = tl.arange(0, C.GROUPS)
    at_keys = (bh * k_blocks + j)[:, None] * C.D
    joined = tl.zeros([C.W], tl.float32)
    if found.k_var is not None:
        spread = tl.zeros([C.W], tl.float32)
        for at in tl.range(0, C.DP, C.BD, num_stages=1):
            channel = (at + tl.arange(0, C.BD))[None, :]
            squares = tl.load(
                found.q_square + (bh * groups + group)[:, None] * C.D + channel, mask=(group < groups)[:, None] & (channel < C.D), other=0.0
            )  # fmt: skip
            variance = tl.load(found.k_var + at_keys + channel, mask=(j < k_blocks)[:, None] & (channel < C.D), other=0.0)
            spread += tl.sum(variance * tl.sum(squares, 0)[None, :], 1)
        joined = joined_error(spread, tl.load(found.error + bh * k_blocks + j, mask=j < k_blocks, other=0.0), scale, cap)
    if bias is not None:
        joined += tl.load(bias + bh * k_blocks + j, mask=j < k_blocks, other=0.0)
    acc = tl.zeros([C.BQ, C.W], tl.float32)
    for at in tl.range(0, C.DP, C.BD, num_stages=1):
        channel = (at + tl.arange(0, C.BD))[None, :]
        left = tl.load(
            found.q_mean + (bh * q_blocks + row)[:, None] * C.D + channel, mask=(row < q_blocks)[:, None] & (channel < C.D), other=0.0
        )  # fmt: skip
        right = tl.load(found.k_mean + at_keys + channel, mask=(j < k_blocks)[:, None] & (channel < C.D), other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=C.PRECISION)
    if weight is not None:
        acc *= tl.load(weight + j, mask=j < k_blocks, other=1.0)[None, :]
    acc += joined[None, :]
    first = tl.program_id(0) * C.BQ
    take_best(acc, chosen, bh * q_blocks + first, q_blocks - first, k_blocks, top)


@kernel("W")
def choose_blocks(scores, weight, bias, chosen, rows, blocks, top, C: tl.constexpr):
    """The `top` largest of each row of scores `[heads · rows, blocks]`, as `take_best` has it.

    Scores are multiplied by `weight` `[blocks]` and joined by `bias` `[heads, blocks]`, where there are any. Grid: (heads · rows,).
    """
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, C.W)
    x = tl.load(scores + row * blocks + j, mask=j < blocks, other=float("-inf"))
    if weight is not None:
        x *= tl.load(weight + j, mask=j < blocks, other=1.0)
    if bias is not None:
        x += tl.load(bias + row // rows * blocks + j, mask=j < blocks, other=0.0)
    take_best(x[None, :], chosen, row, 1, blocks, top)
