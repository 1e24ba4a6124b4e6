"""Backward of the linear rest: what each query pulls at the rest's numerator and mass, and sums of outer products over tokens."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.forward import rest_of
from dit_accel.kernels.triton.primitives import LOG2E, feature, put, split_dot, tile, vector


@triton.jit
def linear_gradient(
    q, k, v, dout, lse, delta, dnum, dden, mean, doffset, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    lists, counts, list_bh, list_row, count_bh, q_starts, k_starts, offset, state, state_low, total, weight, weight_low, bias,
    heads, tokens, image, image_start, k_blocks,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    MAP: tl.constexpr, ALL: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dnum `[BH, image, D]` and dden `[BH, image]`: gradients of the rest's numerator and mass, times the number of keys.

    Under the residual merge also the rest's `mean` `[BH, image, D]`, and delta without the residual's share; else doffset `[BH, programs]`.
    `state` is without the projection. Grid: (query blocks · SUB_Q, batch · heads).
    """
    block, sub = tl.program_id(0) // SUB_Q, tl.program_id(0) % SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    start = image_start.to(tl.int64)
    k_base, v_base = k + b * k_b + h * k_h + start * k_n, v + b * v_b + h * v_h + start * v_n
    token = tl.load(q_starts + block) + sub * BQ + tl.arange(0, BQ)
    valid = token < tl.load(q_starts + block + 1)
    queries = tile(q + b * q_b + h * q_h, token + image_start, q_n, valid, D, DP)
    pull = tile(dout + b * g_b + h * g_h, token + image_start, g_n, valid, D, DP)
    phi = feature(queries, D, DP, MAP)
    phi_low = phi.to(queries.dtype)
    taken = tl.zeros([BQ, DP], tl.float32)
    taken_mass = tl.zeros([BQ], tl.float32)
    row = lists + bh * list_bh + block.to(tl.int64) * list_row
    listed = tl.load(counts + bh * count_bh + block)
    if not ALL:
        for n in tl.range(0, listed * SUB_K, num_stages=STAGES):
            j = tl.load(row + n // SUB_K)
            k_token = tl.load(k_starts + j) + (n % SUB_K) * BK + tl.arange(0, BK)
            k_valid = k_token < tl.load(k_starts + j + 1)
            mapped = feature(tile(k_base, k_token, k_n, k_valid, D, DP), D, DP, MAP).to(queries.dtype)
            value = tile(v_base, k_token, v_n, k_valid, D, DP)
            product = tl.where(k_valid[None, :], tl.dot(phi_low, tl.trans(mapped), input_precision=PRECISION), 0.0)
            taken_mass += tl.sum(product, 1)
            taken = tl.dot(product.to(value.dtype), value, taken, input_precision=PRECISION)
    num, den = rest_of(phi, phi_low, taken, taken_mass, state, state_low, total, bh, listed, k_blocks, image, ALL, D, DP, PRECISION)
    real = den > 0
    safe = tl.where(real, den, 1.0)
    rest = num / safe[:, None]
    keys = image.to(tl.float32)
    at = bh * tokens + image_start + token
    mine = tl.load(delta + at, mask=valid, other=0.0)
    wide = pull.to(tl.float32)
    if RESIDUAL:
        residual = split_dot(rest.to(queries.dtype), weight, weight_low, True, D, DP, PRECISION) + vector(bias, D, DP)[None, :]
        tl.store(delta + at, mine - tl.sum(wide * residual, 1), mask=valid)
        back = split_dot(pull, weight, weight_low, False, D, DP, PRECISION)
        numerator = tl.where(real[:, None], back * (keys / safe)[:, None], 0.0)
        mass = tl.where(real, -tl.sum(back * rest, 1) * (keys / safe), 0.0)
        put(mean + bh * image * D, token, D, valid, tl.where(real[:, None], rest, 0.0), D, DP)
    else:
        shift = 0.0 if offset is None else tl.load(offset + h) * LOG2E
        weights = tl.where(real & valid, tl.exp2(shift - tl.load(lse + at, mask=valid, other=0.0) * LOG2E), 0.0)
        numerator = wide * (weights * keys)[:, None]
        mass = -mine * weights * keys
        if offset is not None:
            change = tl.sum(weights * (tl.sum(wide * num, 1) - mine * den), 0)
            tl.store(doffset + bh * tl.num_programs(0) + tl.program_id(0), change)
    put(dnum + bh * image * D, token, D, valid, numerator, D, DP)
    tl.store(dden + bh * image + token, mass, mask=valid)


@triton.jit
def outer_sums(
    a, b, factor, products, sums, a_b, a_h, a_n, b_b, b_h, b_n, heads, first, rows, chunk, share,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, MAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over one chunk of rows: Σ f(a)·bᵀ `[chunks, BH, D, D]` and Σ factor·f(a) `[chunks, BH, D]`, times `share`; f is phi, or nothing at
    MAP -1.

    `a` is read from row `first` on, b `[BH, rows, D]` and factor `[BH, rows]` (None: 1) from row 0. Grid: (chunks, batch · heads).
    """
    bh = tl.program_id(1).to(tl.int64)
    a_base, b_base = a + (bh // heads) * a_b + (bh % heads) * a_h, b + (bh // heads) * b_b + (bh % heads) * b_h
    begin = tl.program_id(0) * chunk
    product = tl.zeros([DP, DP], tl.float32)
    total = tl.zeros([DP], tl.float32)
    for at in tl.range(begin, tl.minimum(begin + chunk, rows), BQ, num_stages=STAGES):
        row = at + tl.arange(0, BQ)
        valid = row < rows
        right = tile(b_base, row, b_n, valid, D, DP)
        left = tile(a_base, row + first, a_n, valid, D, DP)
        if MAP >= 0:
            left = tl.where(valid[:, None], feature(left, D, DP, MAP), 0.0)
        wide = left.to(tl.float32)
        if factor is not None:
            total += tl.sum(wide * tl.load(factor + bh * rows + row, mask=valid, other=0.0)[:, None], 0)
        else:
            total += tl.sum(wide, 0)
        product = tl.dot(tl.trans(left.to(right.dtype)), right, product, input_precision=PRECISION)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + bh
    channel = tl.arange(0, DP)
    put(products + place * D * D, channel, D, channel < D, product * share, D, DP)
    tl.store(sums + place * D + channel, total * share, mask=channel < D)
