"""Keys that represent many others: block means, variances and linear-attention states in one pass; products of means; lists as bits."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.block_choice import query_moments
from dit_accel.kernels.triton.primitives import delta_tile, feature, head, placed, put, tile
from dit_accel.kernels.triton.tuples import SIZES, kernel


@kernel("D DP BQ BK SUB_Q SUB_K VALUES VARIANCE STATES MAP PRECISION")
def summarise(
    q, k, v, out, pull, dlse, moments, pooled, states, q_starts, starts, q_places, places, heads, tokens_q, image, image_start, q_blocks,
    blocks, group, groups, C: tl.constexpr,
):  # fmt: skip
    """`group` of the `blocks` of one head: means of keys (and values) `[BH, T, D]` and half the (biased) variance (`pooled`), and
    phi(K)ᵀV and the sum of phi(K) over the group, divided by the number of the image's keys, and phi(K) (`states`; the sums have a first
    axis of groups).

    Of the queries, in the programs after the first `groups`: with `moments` the means of a block, with `out` a tile of the deltas.
    Grid: (groups and what there is of queries, batch · heads).
    """
    bh = tl.program_id(1).to(tl.int64)
    number = tl.program_id(0)
    if (moments.q_mean is not None or out is not None) and number >= groups:
        if moments.q_mean is not None:
            query_moments(head(q, bh, heads), q.n, moments, q_starts, q_places, bh, number - groups, 1, 1, q_blocks, 1.0, C)
        else:
            delta_tile(out, pull.dout, dlse, pull.delta, bh, number - groups, heads, tokens_q, C)
        return
    k_base = head(k, bh, heads) + image_start.to(tl.int64) * k.n
    v_base = head(v, bh, heads) + image_start.to(tl.int64) * v.n
    channel = tl.arange(0, C.DP)
    real = channel < C.D
    MAPPED: tl.constexpr = C.STATES or states.mapped is not None
    if C.STATES:
        state = tl.zeros([C.DP, C.DP], tl.float32)
        total = tl.zeros([C.DP], tl.float32)
    first = number * group
    for j in range(first, tl.minimum(first + group, blocks)):
        begin, end = tl.load(starts + j), tl.load(starts + j + 1)
        count = tl.maximum(end - begin, 1).to(tl.float32)
        at = (bh * blocks + j) * C.D
        k_sum = tl.zeros([C.DP], tl.float32)
        v_sum = tl.zeros([C.DP], tl.float32)
        for sub in range(C.SUB_K):
            token = begin + sub * C.BK + tl.arange(0, C.BK)
            valid = token < end
            place = placed(places, token, valid)
            key = tile(k_base, place, k.n, valid, C)
            k_sum += tl.sum(key.to(tl.float32), 0)
            if pooled.k_mean is not None and sub == C.SUB_K - 1:  # here, as through the products it would cost registers
                tl.store(pooled.k_mean + at + channel, (k_sum / count).to(pooled.k_mean.dtype.element_ty), mask=real)
            if C.VALUES or C.STATES:
                value = tile(v_base, place, v.n, valid, C)
                v_sum += tl.sum(value.to(tl.float32), 0)
            if MAPPED:
                phi = tl.where(valid[:, None], feature(key, C), 0.0).to(k.base.dtype.element_ty)
                if states.mapped is not None:
                    put(states.mapped + bh * image * C.D, place, C.D, valid, phi, C)
            if C.STATES:
                total += tl.sum(phi.to(tl.float32), 0)  # rounded, as the state's are and those of the visited blocks
                state = tl.dot(tl.trans(phi), value, state, input_precision=C.PRECISION)
        if C.VALUES:
            tl.store(pooled.v_mean + at + channel, (v_sum / count).to(pooled.v_mean.dtype.element_ty), mask=real)
        if C.VARIANCE:
            mean = k_sum / count
            spread = tl.zeros([C.DP], tl.float32)
            for sub in range(C.SUB_K):  # a second look at the same rows: E[x²] − E[x]² cancels
                token = begin + sub * C.BK + tl.arange(0, C.BK)
                valid = token < end
                row = tile(k_base, placed(places, token, valid), k.n, valid, C)
                gap = tl.where(valid[:, None], row.to(tl.float32) - mean[None, :], 0.0)
                spread += tl.sum(gap * gap, 0)
            half = tl.minimum(spread / count * 0.5, 60000.0)  # float16 ends before infinity
            tl.store(pooled.k_half + at + channel, half.to(pooled.k_half.dtype.element_ty), mask=real)
    if C.STATES:
        at = number.to(tl.int64) * tl.num_programs(1) + bh
        share = 1.0 / image.to(tl.float32)
        put(states.state + at * C.D * C.D, channel, C.D, real, state * share, C)
        tl.store(states.total + at * C.D + channel, total * share, mask=real)


@triton.jit(do_not_specialize=SIZES)
def multiply(
    a, b, out, a_batch, b_batch, rows, columns, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """a `[batch, rows, D]` times b `[batch or 1, columns, D]` transposed: out `[batch, rows, columns]`, all float32 and contiguous.

    A product of torch's own rounds its operands where the user allows TF32. Grid: (tiles of rows, tiles of columns, batch).
    """
    batch = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    column = tl.program_id(1) * BK + tl.arange(0, BK)
    acc = tl.zeros([BQ, BK], tl.float32)
    for at in tl.static_range(0, DP, BD):
        channel = at + tl.arange(0, BD)
        left = tl.load(
            a + batch * a_batch + row.to(tl.int64)[:, None] * D + channel[None, :], mask=(row < rows)[:, None] & (channel < D)[None, :],
            other=0.0,
        )  # fmt: skip
        right = tl.load(
            b + batch * b_batch + column.to(tl.int64)[:, None] * D + channel[None, :],
            mask=(column < columns)[:, None] & (channel < D)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
    place = out + (batch * rows + row)[:, None] * columns + column[None, :]
    tl.store(place, acc, mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def bits_of(entries, count, slots, word, N: tl.constexpr):
    """The first `count` entries of a list, or their `slots`, as bits of the words `[W]`."""
    found = tl.zeros(word.shape, tl.int32)
    for at in range(0, count, N):
        n = at + tl.arange(0, N)
        j = tl.load(entries + n, mask=n < count, other=0)
        if slots is not None:
            j = tl.load(slots + j, mask=n < count, other=0)
        mine = (j[None, :] // 32 == word[:, None]) & (n < count)[None, :]
        # a block is on a list once, so that a sum of bits is their union
        found += tl.sum(tl.where(mine, 1 << (j % 32)[None, :], 0), 1)
    return found


@triton.jit(do_not_specialize=SIZES)
def list_bits(lists, counts, slots, bits, width, words, W: tl.constexpr, N: tl.constexpr):
    """Lists `[rows, width]`, or the `slots` of their entries, as bits `[rows, words]` of int32. Grid: (rows, tiles of W words)."""
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * W + tl.arange(0, W)
    found = bits_of(lists + row * width, tl.load(counts + row), slots, word, N)
    tl.store(bits + row * words + word, found, mask=word < words)


@triton.jit(do_not_specialize=SIZES)
def hidden_bits(
    lists, counts, slots, pool_lists, pool_counts, bits, width, pool_width, words, q_blocks, OWN: tl.constexpr, SPAN: tl.constexpr,
    W: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """The units that a query block does not see, as bits `[BH, Tq, words]` of int32: those that are not on the list of its span, and those
    of the key blocks on its own list. Grid: (batch · heads · Tq, tiles of W words).
    """
    row = tl.program_id(0).to(tl.int64)
    block = row % q_blocks
    word = tl.program_id(1) * W + tl.arange(0, W)
    mine = row if OWN else block
    kept = bits_of(lists + mine * width, tl.load(counts + mine), slots, word, N)
    span = row // q_blocks * tl.cdiv(q_blocks, SPAN) + block // SPAN
    seen = bits_of(pool_lists + span * pool_width, tl.load(pool_counts + span), None, word, N)
    tl.store(bits + row * words + word, kept | ~seen, mask=word < words)
