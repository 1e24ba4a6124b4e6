"""Backward: gradients of queries over rows of the block lists, of keys and values over columns; sums in a fixed order, no atomics.

With p = exp(s − lse) and delta = Σ out·dout − dlse, a key with logit s and value v gives ds = p·(dout·v − delta).
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import (
    GONE,
    LOG2E,
    SIZES,
    kept_pairs,
    pooled_logits,
    put,
    scaled_squares,
    tile,
    unkept,
    vector,
)  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def deltas(out, dout, dlse, delta, o_b, o_h, o_n, g_b, g_h, g_n, heads, tokens, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr):
    """delta `[BH, N]` = Σ out·dout − dlse, in float32. Grid: (tiles of tokens, batch · heads)."""
    bh = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    valid = row < tokens
    x = tile(out + (bh // heads) * o_b + (bh % heads) * o_h, row, o_n, valid, D, DP).to(tl.float32)
    g = tile(dout + (bh // heads) * g_b + (bh % heads) * g_h, row, g_n, valid, D, DP).to(tl.float32)
    result = tl.sum(x * g, 1)
    if dlse is not None:
        result -= tl.load(dlse + bh * tokens + row, mask=valid, other=0.0)
    tl.store(delta + bh * tokens + row, result, mask=valid)


@triton.jit
def score_gradient(q, k, v, dout, lse2, delta, shift, kept, factor, PRECISION: tl.constexpr):
    """Weights and their logits' gradients `[Q, K]` of exact keys; 0 where not `kept`. `shift`: the keys' bias `[K]` in log2, or None."""
    logits = tl.dot(q, tl.trans(k), input_precision=PRECISION) * factor
    if shift is not None:
        logits += shift[None, :]
    weights = tl.where(kept, tl.exp2(logits - lse2[:, None]), 0.0)
    return weights, weights * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])


@triton.jit
def sweep_rows(dq, q, dout, lse2, delta, k, v, k_n, v_n, bias, begin, end, factor, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
               STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What the keys from `begin` to `end`, under their `bias` or None, add to the gradient of the queries, but for the scale."""
    for at in tl.range(begin, end, BK, num_stages=STAGES):
        rows = at + tl.arange(0, BK)
        valid = rows < end
        shift = bias if bias is None else tl.load(bias + rows, mask=valid, other=0.0)
        read = valid if bias is None else valid & (shift > GONE)
        key = tile(k, rows, k_n, read, D, DP)
        _, ds = score_gradient(q, key, tile(v, rows, v_n, read, D, DP), dout, lse2, delta, shift, valid[None, :], factor, PRECISION)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def visit_rows(
    dq, q, dout, lse2, delta, k, v, k_n, v_n, row, begin, end, k_starts, coords, windows, length, reach, q_token, q_valid, factor,
    MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, SUB_K: tl.constexpr, WINDOWS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the listed key blocks from `begin` to `end` add to the gradient of the queries, but for the scale."""
    for n in tl.range(begin * SUB_K, end * SUB_K, num_stages=STAGES):
        j = tl.load(row + n // SUB_K)
        k_token = tl.load(k_starts + j) + (n % SUB_K) * BK + tl.arange(0, BK)
        k_valid = k_token < tl.load(k_starts + j + 1)
        key = tile(k, k_token, k_n, k_valid, D, DP)
        kept = k_valid[None, :]
        if MASKED:
            kept &= kept_pairs(
                coords, windows, length, reach, q_token[:, None], q_valid[:, None], k_token[None, :], k_valid[None, :], WINDOWS
            )
        _, ds = score_gradient(q, key, tile(v, k_token, v_n, k_valid, D, DP), dout, lse2, delta, None, kept, factor, PRECISION)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=SIZES)
def gradient_rows(
    q, k, v, extra_k, extra_v, dout, lse, delta, more, dq, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    lists, counts, full, list_bh, list_row, count_bh, q_starts, k_starts, coords, windows, length, reach,
    k_mean, v_mean, k_half, bits, bits_bh, bits_row, offset, key_bias,
    heads, tokens, image, image_start, text, text_start, extra, k_blocks, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    PARTIAL: tl.constexpr, WINDOWS: tl.constexpr, EXTRA: tl.constexpr, POOLED: tl.constexpr, COUNT: tl.constexpr,
    VARIANCE: tl.constexpr, BJ: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq `[B, H, N, D]` (contiguous) of the image's queries; arguments as in `attend_rows`.

    `more` `[BH, image, D]`: what the linear rest adds (`linear_gradient`).

    Grid: (query blocks · SUB_Q, batch · heads).
    """
    block, sub = tl.program_id(0) // SUB_Q, tl.program_id(0) % SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    image_k, image_v = k_base + image_start.to(tl.int64) * k_n, v_base + image_start.to(tl.int64) * v_n
    q_token = tl.load(q_starts + block) + sub * BQ + tl.arange(0, BQ)
    q_valid = q_token < tl.load(q_starts + block + 1)
    queries = tile(q + b * q_b + h * q_h, q_token + image_start, q_n, q_valid, D, DP)
    pull = tile(dout + b * g_b + h * g_h, q_token + image_start, g_n, q_valid, D, DP)
    at_row = bh * tokens + image_start + q_token
    lse2 = tl.load(lse + at_row, mask=q_valid, other=0.0) * LOG2E
    mine = tl.load(delta + at_row, mask=q_valid, other=0.0)
    factor = scale * LOG2E
    row = lists + bh * list_bh + block.to(tl.int64) * list_row
    whole = tl.load(full + bh * count_bh + block)
    listed = tl.load(counts + bh * count_bh + block)
    grad = tl.zeros([BQ, DP], tl.float32)
    grad = visit_rows(
        grad, queries, pull, lse2, mine, image_k, image_v, k_n, v_n, row, 0, whole if PARTIAL else listed, k_starts, coords, windows,
        length, reach, q_token, q_valid, factor, False, D, DP, BK, SUB_K, WINDOWS, STAGES, PRECISION,
    )  # fmt: skip
    if PARTIAL:
        grad = visit_rows(
            grad, queries, pull, lse2, mine, image_k, image_v, k_n, v_n, row, whole, listed, k_starts, coords, windows,
            length, reach, q_token, q_valid, factor, True, D, DP, BK, SUB_K, WINDOWS, STAGES, PRECISION,
        )  # fmt: skip
    grad = sweep_rows(
        grad, queries, pull, lse2, mine, k_base, v_base, k_n, v_n, key_bias if key_bias is None else key_bias + bh * tokens, text_start,
        text_start + text, factor, D, DP, BK, STAGES, PRECISION,
    )  # fmt: skip
    if EXTRA:
        grad = sweep_rows(
            grad, queries, pull, lse2, mine, extra_k + bh * extra * D, extra_v + bh * extra * D, D, D, None, 0, extra, factor, D, DP, BK,
            STAGES, PRECISION,
        )  # fmt: skip
    if POOLED:
        squares = scaled_squares(queries, scale)
        second = tl.zeros([BQ, DP], tl.float32)
        means, values, halves = k_mean + bh * k_blocks * D, v_mean + bh * k_blocks * D, k_half + bh * k_blocks * D
        shift = 0.0 if offset is None else tl.load(offset + h) * LOG2E
        for at in tl.range(0, k_blocks, BJ, num_stages=STAGES):
            j = at + tl.arange(0, BJ)
            logits, mean, half, term = pooled_logits(
                queries, squares, means, halves, bits + bh * bits_bh + block.to(tl.int64) * bits_row, k_starts, k_blocks, j, factor,
                shift, cap,
                D, DP, COUNT, VARIANCE, PRECISION,
            )  # fmt: skip
            value = tile(values, j, D, j < k_blocks, D, DP)
            ds = tl.exp2(logits - lse2[:, None]) * (tl.dot(pull, tl.trans(value), input_precision=PRECISION) - mine[:, None])
            grad = tl.dot(ds.to(mean.dtype), mean, grad, input_precision=PRECISION)
            if VARIANCE:
                second = tl.dot(tl.where(term <= cap, ds, 0.0).to(half.dtype), half, second, input_precision=PRECISION)
        if VARIANCE:
            grad += 2.0 * scale * queries.to(tl.float32) * second
    grad *= scale
    if more is not None:
        grad += tile(more + bh * image * D, q_token, D, q_valid, D, DP)
    put(dq + bh * tokens * D, q_token + image_start, D, q_valid, grad, D, DP)


@triton.jit(do_not_specialize=SIZES)
def gradient_dense_rows(
    q, k, v, key_bias, dout, lse, delta, part, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, rows, first, tokens, chunk, scale,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of the query rows `first` to `first + rows` from one chunk of all keys: part `[splits, BH, rows, D]`.

    Grid: (tiles of rows, batch · heads, splits).
    """
    bh, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    valid = row < rows
    begin = tl.program_id(2) * chunk
    grad = sweep_rows(
        tl.zeros([BQ, DP], tl.float32), tile(q + b * q_b + h * q_h, row + first, q_n, valid, D, DP),
        tile(dout + b * g_b + h * g_h, row + first, g_n, valid, D, DP),
        tl.load(lse + bh * tokens + first + row, mask=valid, other=0.0) * LOG2E,
        tl.load(delta + bh * tokens + first + row, mask=valid, other=0.0),
        k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_n, v_n, key_bias if key_bias is None else key_bias + bh * tokens,
        begin, tl.minimum(begin + chunk, tokens), scale * LOG2E, D, DP, BK, STAGES, PRECISION,
    )  # fmt: skip
    put(part + (split * tl.num_programs(1) + bh) * rows * D, row, D, valid, grad * scale, D, DP)


@triton.jit
def column_gradient(key, value, q, dout, lse2, delta, shift, kept, factor, PRECISION: tl.constexpr):
    """`score_gradient` with keys as rows: `[K, Q]`, ready to be multiplied from the left."""
    logits = tl.dot(key, tl.trans(q), input_precision=PRECISION) * factor
    if shift is not None:
        logits += shift[:, None]
    weights = tl.where(kept, tl.exp2(logits - lse2[None, :]), 0.0)
    return weights, weights * (tl.dot(value, tl.trans(dout), input_precision=PRECISION) - delta[None, :])


@triton.jit
def sweep_columns(dk, dv, key, value, shift, k_valid, q, dout, lse, delta, q_n, g_n, begin, end, factor, D: tl.constexpr,
                  DP: tl.constexpr, BQ: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """What the queries from `begin` to `end` add to the gradients of keys (but for the scale), whose bias is `shift`, and values."""
    for at in tl.range(begin, end, BQ, num_stages=STAGES):
        rows = at + tl.arange(0, BQ)
        valid = rows < end
        queries = tile(q, rows, q_n, valid, D, DP)
        pull = tile(dout, rows, g_n, valid, D, DP)
        lse2 = tl.load(lse + rows, mask=valid, other=0.0) * LOG2E
        mine = tl.load(delta + rows, mask=valid, other=0.0)
        kept = k_valid[:, None] & valid[None, :]
        weights, ds = column_gradient(key, value, queries, pull, lse2, mine, shift, kept, factor, PRECISION)
        dv = tl.dot(weights.to(pull.dtype), pull, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def visit_columns(
    dk, dv, key, value, k_token, k_valid, q, dout, lse, delta, q_n, g_n, entries, begin, end, q_starts, coords, windows, length, reach,
    factor, MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, SUB_Q: tl.constexpr, WINDOWS: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the query blocks on a column add to the gradients of one key tile."""
    for n in tl.range(begin * SUB_Q, end * SUB_Q, num_stages=STAGES):
        i = tl.load(entries + n // SUB_Q)
        token = tl.load(q_starts + i) + (n % SUB_Q) * BQ + tl.arange(0, BQ)
        valid = token < tl.load(q_starts + i + 1)
        queries = tile(q, token, q_n, valid, D, DP)
        pull = tile(dout, token, g_n, valid, D, DP)
        lse2 = tl.load(lse + token, mask=valid, other=0.0) * LOG2E
        mine = tl.load(delta + token, mask=valid, other=0.0)
        kept = k_valid[:, None] & valid[None, :]
        if MASKED:
            kept &= kept_pairs(coords, windows, length, reach, token[None, :], valid[None, :], k_token[:, None], k_valid[:, None], WINDOWS)
        weights, ds = column_gradient(key, value, queries, pull, lse2, mine, None, kept, factor, PRECISION)
        dv = tl.dot(weights.to(pull.dtype), pull, dv, input_precision=PRECISION)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def gradient_columns(
    q, k, v, dout, lse, delta, more_k, more_v, dk, dv, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    entries, borders, entry_bh, border_bh, q_starts, k_starts, coords, windows, length, reach,
    k_mean, dk_mean, dv_mean, dk_half,
    heads, tokens, image, image_start, text, text_start, k_blocks, scale,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    PARTIAL: tl.constexpr, WINDOWS: tl.constexpr, POOLED: tl.constexpr, VARIANCE: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv `[B, H, N, D]` (contiguous) of one tile of the image's keys, from the query blocks that visit it and from the text's queries.

    `entries`, `borders` `[.., 2·Tk + 1]`: for key block j the query blocks that visit it whole are entries[borders[2j]:borders[2j + 1]],
    those that visit it partly entries[borders[2j + 1]:borders[2j + 2]]. `more_k`, `more_v` `[BH, image, D]`: what the linear rest adds
    (`linear_columns`). Grid: (key blocks · SUB_K, batch · heads).
    """
    block, sub = tl.program_id(0) // SUB_K, tl.program_id(0) % SUB_K
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    q_base, g_base = q + b * q_b + h * q_h, dout + b * g_b + h * g_h
    first = tl.load(k_starts + block)
    end = tl.load(k_starts + block + 1)
    token = first + sub * BK + tl.arange(0, BK)
    valid = token < end
    key = tile(k + b * k_b + h * k_h, token + image_start, k_n, valid, D, DP)
    value = tile(v + b * v_b + h * v_h, token + image_start, v_n, valid, D, DP)
    factor = scale * LOG2E
    grad_k = tl.zeros([BK, DP], tl.float32)
    grad_v = tl.zeros([BK, DP], tl.float32)
    start = image_start.to(tl.int64)
    border = borders + bh * border_bh + 2 * block
    whole, partial, stop = tl.load(border), tl.load(border + 1), tl.load(border + 2)
    grad_k, grad_v = visit_columns(
        grad_k, grad_v, key, value, token, valid, q_base + start * q_n, g_base + start * g_n, lse + bh * tokens + start,
        delta + bh * tokens + start, q_n, g_n, entries + bh * entry_bh, whole, partial, q_starts, coords, windows, length, reach, factor,
        False, D, DP, BQ, SUB_Q, WINDOWS, STAGES, PRECISION,
    )  # fmt: skip
    if PARTIAL:
        grad_k, grad_v = visit_columns(
            grad_k, grad_v, key, value, token, valid, q_base + start * q_n, g_base + start * g_n, lse + bh * tokens + start,
            delta + bh * tokens + start, q_n, g_n, entries + bh * entry_bh, partial, stop, q_starts, coords, windows, length, reach, factor,
            True, D, DP, BQ, SUB_Q, WINDOWS, STAGES, PRECISION,
        )  # fmt: skip
    grad_k, grad_v = sweep_columns(
        grad_k, grad_v, key, value, None, valid, q_base, g_base, lse + bh * tokens, delta + bh * tokens, q_n, g_n, text_start,
        text_start + text, factor, D, DP, BQ, STAGES, PRECISION,
    )  # fmt: skip
    grad_k *= scale
    if more_k is not None:
        grad_k += tile(more_k + bh * image * D, token, D, valid, D, DP)
        grad_v += tile(more_v + bh * image * D, token, D, valid, D, DP)
    if POOLED:
        count = 1.0 / (end - first).to(tl.float32)
        at = (bh * k_blocks + block) * D
        grad_k += vector(dk_mean + at, D, DP)[None, :] * count
        grad_v += vector(dv_mean + at, D, DP)[None, :] * count
        if VARIANCE:
            mean = vector(k_mean + at, D, DP).to(tl.float32)
            grad_k += vector(dk_half + at, D, DP)[None, :] * (key.to(tl.float32) - mean[None, :]) * count
    put(dk + bh * tokens * D, token + image_start, D, valid, grad_k, D, DP)
    put(dv + bh * tokens * D, token + image_start, D, valid, grad_v, D, DP)


@triton.jit(do_not_specialize=SIZES)
def gradient_shared_keys(
    q, k, v, key_bias, dout, lse, delta, dk, dv, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    heads, keys, first, begin, rows, tokens, chunk, scale,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys `first` to `first + keys` that every query row `begin` to `begin + rows` sees: one chunk of those rows.

    dk, dv: parts `[splits, BH, keys, D]` float32. Grid: (tiles of keys, batch · heads, splits).
    """
    bh, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    at = tl.program_id(0) * BK + tl.arange(0, BK)
    valid = at < keys
    shift = key_bias if key_bias is None else tl.load(key_bias + bh * tokens + first + at, mask=valid, other=0.0)
    read = valid if key_bias is None else valid & (shift > GONE)
    key = tile(k + b * k_b + h * k_h, at + first, k_n, read, D, DP)
    value = tile(v + b * v_b + h * v_h, at + first, v_n, read, D, DP)
    start = begin + tl.program_id(2) * chunk
    grad_k, grad_v = sweep_columns(
        tl.zeros([BK, DP], tl.float32), tl.zeros([BK, DP], tl.float32), key, value, shift, valid, q + b * q_b + h * q_h,
        dout + b * g_b + h * g_h, lse + bh * tokens, delta + bh * tokens, q_n, g_n, start, tl.minimum(start + chunk, begin + rows),
        scale * LOG2E, D, DP, BQ, STAGES, PRECISION,
    )  # fmt: skip
    place = (split * tl.num_programs(1) + bh) * keys * D
    put(dk + place, at, D, valid, grad_k * scale, D, DP)
    put(dv + place, at, D, valid, grad_v, D, DP)


@triton.jit(do_not_specialize=SIZES)
def gradient_pooled(
    q, dout, lse, delta, k_mean, v_mean, k_half, bits, dk_mean, dv_mean, dk_half, doffset, q_b, q_h, q_n, g_b, g_h, g_n, bits_bh, bits_row,
    offset, q_starts, k_starts, heads, tokens, image_start, q_blocks, k_blocks, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BJ: tl.constexpr, SUB_Q: tl.constexpr, COUNT: tl.constexpr,
    VARIANCE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients `[BH, Tk, D]` float32 of a tile of pooled keys, values and half variances, and `[BH, tiles]` of the offset.

    Grid: (tiles of pooled keys, batch · heads).
    """
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    inside = j < k_blocks
    means, values, halves = k_mean + bh * k_blocks * D, v_mean + bh * k_blocks * D, k_half + bh * k_blocks * D
    mean, value = tile(means, j, D, inside, D, DP), tile(values, j, D, inside, D, DP)
    factor = scale * LOG2E
    bias = tl.zeros([BJ], tl.float32)
    if COUNT:
        size = tl.load(k_starts + j + 1, mask=inside, other=1) - tl.load(k_starts + j, mask=inside, other=0)
        bias += tl.log2(size.to(tl.float32))
    if offset is not None:
        bias += tl.load(offset + h) * LOG2E
    half = mean
    if VARIANCE:
        half = tile(halves, j, D, inside, D, DP)
    grad_k = tl.zeros([BJ, DP], tl.float32)
    grad_v = tl.zeros([BJ, DP], tl.float32)
    grad_h = tl.zeros([BJ, DP], tl.float32)
    grad_o = tl.zeros([BJ], tl.float32)
    q_base = q + b * q_b + h * q_h + image_start.to(tl.int64) * q_n
    g_base = dout + b * g_b + h * g_h + image_start.to(tl.int64) * g_n
    row = bh * tokens + image_start
    for n in tl.range(0, q_blocks * SUB_Q, num_stages=STAGES):
        i = n // SUB_Q
        token = tl.load(q_starts + i) + (n % SUB_Q) * BQ + tl.arange(0, BQ)
        valid = token < tl.load(q_starts + i + 1)
        queries, pull = tile(q_base, token, q_n, valid, D, DP), tile(g_base, token, g_n, valid, D, DP)
        lse2 = tl.load(lse + row + token, mask=valid, other=0.0) * LOG2E
        mine = tl.load(delta + row + token, mask=valid, other=0.0)
        logits = tl.dot(mean, tl.trans(queries), input_precision=PRECISION) * factor + bias[:, None]
        if VARIANCE:
            squares = scaled_squares(queries, scale)
            term = tl.dot(half, tl.trans(squares), input_precision=PRECISION)
            logits += tl.minimum(term, cap) * LOG2E
        free = unkept(bits + bh * bits_bh + i.to(tl.int64) * bits_row, j, inside)[:, None] & valid[None, :]
        weights = tl.where(free, tl.exp2(logits - lse2[None, :]), 0.0)
        ds = weights * (tl.dot(value, tl.trans(pull), input_precision=PRECISION) - mine[None, :])
        grad_v = tl.dot(weights.to(pull.dtype), pull, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(ds.to(queries.dtype), queries, grad_k, input_precision=PRECISION)
        grad_o += tl.sum(ds, 1)
        if VARIANCE:
            grad_h = tl.dot(tl.where(term <= cap, ds, 0.0).to(squares.dtype), squares, grad_h, input_precision=PRECISION)
    at = bh * k_blocks * D
    put(dk_mean + at, j, D, inside, grad_k * scale, D, DP)
    put(dv_mean + at, j, D, inside, grad_v, D, DP)
    if VARIANCE:
        put(dk_half + at, j, D, inside, grad_h, D, DP)
    if offset is not None:
        tl.store(doffset + bh * tl.num_programs(0) + tl.program_id(0), tl.sum(grad_o, 0))
