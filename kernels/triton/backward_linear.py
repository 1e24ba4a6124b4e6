"""Backward of the linear rest: what each query pulls at the rest's numerator and mass, and what follows for queries, keys and values.

Apart from the exact keys' kernels, because both together would not fit the registers.

A pull is a gradient divided by a mass: at a loss scale of 2¹⁶ it exceeds float16. So each row is stored with a largest entry of 1 and its
`size` beside it, and where rows are summed the features carry the sizes, relative to the largest of the head: no operand of a product in
float16 is larger than its features or values make it, and every product is accumulated in float32.
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.forward import linear_visit, rest_of
from dit_accel.kernels.triton.primitives import LOG2E, SIZES, feature, feature_gradient, put, split_dot, tile, vector

TINY = tl.constexpr(1.1754944e-38)  # the least normal float32: its inverse is finite


@triton.jit(do_not_specialize=SIZES)
def linear_gradient(
    q, k, v, dout, lse, delta, dnum, dden, size, more, mean, doffset, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    lists, counts, list_bh, list_row, count_bh, q_starts, k_starts, offset, state, total, weight, bias,
    heads, tokens, image, image_start, k_blocks,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    MAP: tl.constexpr, ALL: tl.constexpr, LEFT: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dnum `[BH, image, D]` and dden `[BH, image]` float32: gradients of the rest's numerator and mass, times the number of keys, over
    their row's `size` `[BH, image]` float32 (0: no gradient); `more` `[BH, image, D]` float32: what they add to dq.

    Under the residual merge also the rest's `mean` `[BH, image, D]`, and delta without the residual's share; else doffset `[BH, programs]`.
    `state` is without the projection; LEFT as in `attend_rows`. Grid: (query blocks · SUB_Q, batch · heads).
    """
    block, sub = tl.program_id(0) // SUB_Q, tl.program_id(0) % SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    start = image_start.to(tl.int64)
    k_base, v_base = k + b * k_b + h * k_h + start * k_n, v + b * v_b + h * v_h + start * v_n
    token = tl.load(q_starts + block) + sub * BQ + tl.arange(0, BQ)
    valid = token < tl.load(q_starts + block + 1)
    q_base = q + b * q_b + h * q_h
    phi_low = feature(tile(q_base, token + image_start, q_n, valid, D, DP), D, DP, MAP).to(q.dtype.element_ty)
    taken = tl.zeros([BQ, DP], tl.float32)
    taken_mass = tl.zeros([BQ], tl.float32)
    row = lists + bh * list_bh + block.to(tl.int64) * list_row
    listed = tl.load(counts + bh * count_bh + block)
    first = listed if LEFT else listed * 0
    last = k_blocks if LEFT else listed
    if not ALL:
        taken, taken_mass = linear_visit(
            taken, taken_mass, phi_low, k_base, v_base, k_n, v_n, row, first, last, k_starts, D, DP, BK, SUB_K, MAP, STAGES, PRECISION
        )
    num, den = rest_of(phi_low, taken, taken_mass, state, total, bh, listed, k_blocks, image, ALL, LEFT, D, DP, PRECISION)
    real = den > 0
    safe = tl.where(real, den, 1.0)
    rest = num / safe[:, None]
    keys = image.to(tl.float32)
    at = bh * tokens + image_start + token
    mine = tl.load(delta + at, mask=valid, other=0.0)
    pull = tile(dout + b * g_b + h * g_h, token + image_start, g_n, valid, D, DP)
    wide = pull.to(tl.float32)
    if RESIDUAL:
        residual = split_dot(rest.to(pull.dtype), weight, 0, True, D, DP, PRECISION) + vector(bias, D, DP)[None, :]
        tl.store(delta + at, mine - tl.sum(wide * residual, 1), mask=valid)
        back = split_dot(pull, weight, 0, False, D, DP, PRECISION)
        numerator = tl.where(real[:, None], back * (keys / safe)[:, None], 0.0)
        mass = tl.where(real, -tl.sum(back * rest, 1) * (keys / safe), 0.0)
        put(mean + bh * image * D, token, D, valid, tl.where(real[:, None], rest, 0.0), D, DP)
    else:
        shift = 0.0 if offset is None else tl.load(offset + h) * LOG2E
        weights = tl.where(real & valid, tl.exp2(shift - tl.load(lse + at, mask=valid, other=0.0) * LOG2E), 0.0)
        numerator = wide * (weights * keys)[:, None]
        mass = -mine * weights * keys
        if offset is not None:
            change = tl.sum(weights * den * (tl.sum(wide * rest, 1) - mine), 0)
            tl.store(doffset + bh * tl.num_programs(0) + tl.program_id(0), change)
    largest = tl.maximum(tl.max(tl.abs(numerator), 1), tl.abs(mass))
    shrink = 1.0 / tl.maximum(largest, TINY)
    mass *= shrink
    low = (numerator * shrink[:, None]).to(dnum.dtype.element_ty)
    put(dnum + bh * image * D, token, D, valid, low, D, DP)
    tl.store(dden + bh * image + token, mass, mask=valid)
    tl.store(size + bh * image + token, largest, mask=valid)
    dphi = tl.zeros([BQ, DP], tl.float32)
    if not ALL:
        for n in tl.range(first * SUB_K, last * SUB_K, num_stages=STAGES):
            j = tl.load(row + n // SUB_K)
            k_token = tl.load(k_starts + j) + (n % SUB_K) * BK + tl.arange(0, BK)
            k_valid = k_token < tl.load(k_starts + j + 1)
            value = tile(v_base, k_token, v_n, k_valid, D, DP).to(low.dtype)
            change = tl.where(k_valid[None, :], tl.dot(low, tl.trans(value), input_precision=PRECISION) + mass[:, None], 0.0)
            mapped = feature(tile(k_base, k_token, k_n, k_valid, D, DP), D, DP, MAP).to(low.dtype)
            dphi = tl.dot(change.to(low.dtype), mapped, dphi, input_precision=PRECISION)
    if LEFT:
        dphi *= 1.0 / keys
    else:
        dphi = split_dot(low, state, bh, True, D, DP, PRECISION) - dphi * (1.0 / keys)
        dphi += mass[:, None] * vector(total + bh * D, D, DP)[None, :]
    dphi *= largest[:, None]
    again = tile(q_base, token + image_start, q_n, valid, D, DP)
    # nothing left means no mass and no pull
    put(more + bh * image * D, token, D, valid, feature_gradient(again, feature(again, D, DP, MAP), dphi, MAP), D, DP)


@triton.jit(do_not_specialize=SIZES)
def linear_columns(
    q, k, v, dnum, dden, relative, more_k, more_v, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, entries, borders, entry_bh, border_bh,
    q_starts, k_starts, pull_state, pull_total, pull_size, pull_unit, heads, image, image_start,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    MAP: tl.constexpr, ALL: tl.constexpr, LEFT: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the linear rest adds to dk and dv: more_k, more_v `[BH, image, D]` float32. Sums over all queries, less those that visit the
    block; LEFT: `entries` are the query blocks that do not visit it, and the sums are those over them, without `pull_state`.

    `entries`, `borders` as in `gradient_columns`; `relative` `[BH, image]`: the rows' sizes over the largest of the head, `pull_unit`
    `[BH]`. `pull_state` `[BH, D, D]` (in two parts, times `pull_size` `[BH]`), `pull_total` `[BH, D]`: sums of phi(q)·dnum and phi(q)·dden
    over all queries in those units. Grid: (key blocks · SUB_K, batch · heads).
    """
    block, sub = tl.program_id(0) // SUB_K, tl.program_id(0) % SUB_K
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    token = tl.load(k_starts + block) + sub * BK + tl.arange(0, BK)
    valid = token < tl.load(k_starts + block + 1)
    k_base, q_base = k + b * k_b + h * k_h, q + b * q_b + h * q_h + image_start.to(tl.int64) * q_n
    key = tile(k_base, token + image_start, k_n, valid, D, DP)
    value = tile(v + b * v_b + h * v_h, token + image_start, v_n, valid, D, DP)
    dphi = tl.zeros([BK, DP], tl.float32)
    taken = tl.zeros([BK, DP], tl.float32)
    if not ALL:
        kind = dnum.dtype.element_ty
        wide = value.to(kind)
        phi = feature(key, D, DP, MAP).to(kind)
        begin, end = tl.load(borders + bh * border_bh + 2 * block), tl.load(borders + bh * border_bh + 2 * block + 2)
        for n in tl.range(begin * SUB_Q, end * SUB_Q, num_stages=STAGES):
            i = tl.load(entries + bh * entry_bh + n // SUB_Q)
            row = tl.load(q_starts + i) + (n % SUB_Q) * BQ + tl.arange(0, BQ)
            inside = row < tl.load(q_starts + i + 1)
            num = tile(dnum + bh * image * D, row, D, inside, D, DP)
            den = tl.load(dden + bh * image + row, mask=inside, other=0.0)
            weight = tl.load(relative + bh * image + row, mask=inside, other=0.0)
            mapped = (feature(tile(q_base, row, q_n, inside, D, DP), D, DP, MAP) * weight[:, None]).to(kind)
            product = tl.dot(phi, tl.trans(mapped), input_precision=PRECISION)
            taken = tl.dot(product.to(kind), num, taken, input_precision=PRECISION)
            change = tl.dot(wide, tl.trans(num), input_precision=PRECISION) + den[None, :]
            dphi = tl.dot(change.to(kind), mapped, dphi, input_precision=PRECISION)
    share = 1.0 / image.to(tl.float32)  # dnum and dden carry it
    unit = tl.load(pull_unit + bh)
    # read again, and said to be another read: held through the loop, the features would cost registers
    again = tile(k_base, token + image_start, k_n, valid, D, DP, True)
    mapped_again = feature(again, D, DP, MAP)
    dphi *= share
    dv = taken * share
    if not LEFT:
        scale = tl.load(pull_size + bh)
        dphi = split_dot(value, pull_state, bh, True, D, DP, PRECISION) * scale + vector(pull_total + bh * D, D, DP)[None, :] - dphi
        dv = split_dot(mapped_again.to(value.dtype), pull_state, bh, False, D, DP, PRECISION) * scale - dv
    put(more_k + bh * image * D, token, D, valid, feature_gradient(again, mapped_again, dphi * unit, MAP), D, DP)
    put(more_v + bh * image * D, token, D, valid, dv * unit, D, DP)


@triton.jit(do_not_specialize=SIZES)
def outer_sums(
    a, b, relative, factor, products, sums, a_b, a_h, a_n, b_b, b_h, b_n, heads, first, rows, chunk, share,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, MAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Over one chunk of rows: Σ f(a)·bᵀ `[chunks, BH, D, D]` and Σ factor·f(a) `[chunks, BH, D]`, times `share`; f is `relative`·phi, or
    nothing at MAP -1.

    `a` is read from row `first` on, b `[BH, rows, D]`, relative and factor `[BH, rows]` (None at MAP -1) from row 0.
    Grid: (chunks, batch · heads).
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
            left = feature(left, D, DP, MAP) * tl.load(relative + bh * rows + row, mask=valid, other=0.0)[:, None]
            total += tl.sum(left * tl.load(factor + bh * rows + row, mask=valid, other=0.0)[:, None], 0)
        else:
            total += tl.sum(left.to(tl.float32), 0)
        product = tl.dot(tl.trans(left.to(right.dtype)), right, product, input_precision=PRECISION)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + bh
    channel = tl.arange(0, DP)
    put(products + place * D * D, channel, D, channel < D, product * share, D, DP)
    tl.store(sums + place * D + channel, total * share, mask=channel < D)
