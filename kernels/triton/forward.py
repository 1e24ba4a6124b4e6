"""Forward: image queries over their listed key blocks, text, pooled or linear rest, in one kernel; dense rows split over the keys."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import (
    GONE,
    LOG2E,
    SIZES,
    absorb,
    feature,
    kept_pairs,
    pooled_logits,
    put,
    scaled_squares,
    split_dot,
    tile,
    vector,
)  # fmt: skip


@triton.jit
def sweep(acc, top, mass, q, k, v, k_n, v_n, bias, begin, end, factor, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
          STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """All keys from `begin` to `end` join the softmax; `bias`, a number per key or None, joins their logits."""
    for at in tl.range(begin, end, BK, num_stages=STAGES):
        rows = at + tl.arange(0, BK)
        valid = rows < end
        read = valid
        if bias is not None:
            shift = tl.load(bias + rows, mask=valid, other=0.0)
            read = valid & (shift > GONE)  # what is padded may hold anything, and 0 times NaN is NaN
        logits = tl.dot(q, tl.trans(tile(k, rows, k_n, read, D, DP)), input_precision=PRECISION) * factor
        if bias is not None:
            logits += shift[None, :]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        acc, top, mass = absorb(acc, top, mass, logits, tile(v, rows, v_n, read, D, DP), PRECISION)
    return acc, top, mass


@triton.jit
def visit(
    acc, top, mass, taken, taken_mass, queries, phi, k, v, k_n, v_n, row, begin, end, k_starts, coords, windows, length, reach,
    q_token, q_valid, factor, MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr, SUB_K: tl.constexpr,
    WINDOWS: tl.constexpr, TAKE: tl.constexpr, MAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The listed key blocks from `begin` to `end` join the softmax and, where TAKE, the sums of the linear attention over them."""
    for n in tl.range(begin * SUB_K, end * SUB_K, num_stages=STAGES):
        j = tl.load(row + n // SUB_K)
        k_token = tl.load(k_starts + j) + (n % SUB_K) * BK + tl.arange(0, BK)
        k_valid = k_token < tl.load(k_starts + j + 1)
        key = tile(k, k_token, k_n, k_valid, D, DP)
        value = tile(v, k_token, v_n, k_valid, D, DP)
        logits = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * factor
        kept = k_valid[None, :]
        if MASKED:
            kept &= kept_pairs(
                coords, windows, length, reach, q_token[:, None], q_valid[:, None], k_token[None, :], k_valid[None, :], WINDOWS
            )
        acc, top, mass = absorb(acc, top, mass, tl.where(kept, logits, float("-inf")), value, PRECISION)
        if TAKE:
            product = tl.dot(phi, tl.trans(feature(key, D, DP, MAP).to(key.dtype)), input_precision=PRECISION)
            product = tl.where(k_valid[None, :], product, 0.0)
            taken_mass += tl.sum(product, 1)
            taken = tl.dot(product.to(value.dtype), value, taken, input_precision=PRECISION)
    return acc, top, mass, taken, taken_mass


@triton.jit
def linear_visit(sums, mass, phi, k, v, k_n, v_n, row, begin, end, k_starts, D: tl.constexpr, DP: tl.constexpr, BK: tl.constexpr,
                 SUB_K: tl.constexpr, MAP: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """The linear attention's sums `[R, DP]` and mass `[R]` over the listed key blocks from `begin` to `end`."""
    for n in tl.range(begin * SUB_K, end * SUB_K, num_stages=STAGES):
        j = tl.load(row + n // SUB_K)
        k_token = tl.load(k_starts + j) + (n % SUB_K) * BK + tl.arange(0, BK)
        k_valid = k_token < tl.load(k_starts + j + 1)
        mapped = feature(tile(k, k_token, k_n, k_valid, D, DP), D, DP, MAP).to(phi.dtype)
        value = tile(v, k_token, v_n, k_valid, D, DP)
        product = tl.where(k_valid[None, :], tl.dot(phi, tl.trans(mapped), input_precision=PRECISION), 0.0)
        mass += tl.sum(product, 1)
        sums = tl.dot(product.to(value.dtype), value, sums, input_precision=PRECISION)
    return sums, mass


@triton.jit(do_not_specialize=SIZES)
def attend_rows(
    q, k, v, extra_k, extra_v, out, lse, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    lists, counts, full, list_bh, list_row, count_bh, q_starts, k_starts, coords, windows, length, reach,
    k_mean, v_mean, k_half, bits, bits_bh, bits_row, offset, state, total, weight, bias, key_bias,
    heads, tokens, image_start, text, text_start, extra, k_blocks, keys, scale, cap,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, SUB_Q: tl.constexpr, SUB_K: tl.constexpr,
    PARTIAL: tl.constexpr, WINDOWS: tl.constexpr, EXTRA: tl.constexpr, POOLED: tl.constexpr, COUNT: tl.constexpr,
    VARIANCE: tl.constexpr, LINEAR: tl.constexpr, MAP: tl.constexpr, ALL: tl.constexpr, LEFT: tl.constexpr, RESIDUAL: tl.constexpr,
    BJ: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of a query block of one head; writes its output and lse (natural log) once.

    Grid: (query blocks · SUB_Q, batch · heads). q, k, v, out `[B, H, N, D]` by strides; lists as in `ops.attention`; k_mean, v_mean,
    k_half `[BH, Tk, D]`; bits `[BH or 1, Tq, words]`; state `[BH, D, D]` (in two parts, see `split_dot`) and total `[BH, D]`: means over
    the image's keys; key_bias `[BH, N]` in log2, 0 for the image's keys, or None. LEFT: the lists go on with the key blocks that are not
    visited, and the linear attention is summed over these, without a state; else it is that over all less that over the visited.
    """
    block, sub = tl.program_id(0) // SUB_Q, tl.program_id(0) % SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    k_base, v_base = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    image_k, image_v = k_base + image_start.to(tl.int64) * k_n, v_base + image_start.to(tl.int64) * v_n
    q_token = tl.load(q_starts + block) + sub * BQ + tl.arange(0, BQ)
    q_valid = q_token < tl.load(q_starts + block + 1)
    queries = tile(q + b * q_b + h * q_h, q_token + image_start, q_n, q_valid, D, DP)
    factor = scale * LOG2E
    acc = tl.zeros([BQ, DP], tl.float32)
    top = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    row = lists + bh * list_bh + block.to(tl.int64) * list_row
    whole = tl.load(full + bh * count_bh + block)
    listed = tl.load(counts + bh * count_bh + block)
    taken = tl.zeros([BQ, DP], tl.float32)  # what the visited blocks contribute to the linear attention over all
    taken_mass = tl.zeros([BQ], tl.float32)
    phi = queries
    if LINEAR and not ALL and not LEFT:
        phi = feature(queries, D, DP, MAP).to(queries.dtype)
    acc, top, mass, taken, taken_mass = visit(
        acc, top, mass, taken, taken_mass, queries, phi, image_k, image_v, k_n, v_n, row, 0, whole if PARTIAL else listed, k_starts,
        coords, windows, length, reach, q_token, q_valid, factor, False, D, DP, BK, SUB_K, WINDOWS, LINEAR and not ALL and not LEFT, MAP,
        STAGES, PRECISION,
    )  # fmt: skip
    if PARTIAL:
        acc, top, mass, taken, taken_mass = visit(
            acc, top, mass, taken, taken_mass, queries, phi, image_k, image_v, k_n, v_n, row, whole, listed, k_starts,
            coords, windows, length, reach, q_token, q_valid, factor, True, D, DP, BK, SUB_K, WINDOWS, False, MAP, STAGES, PRECISION,
        )  # fmt: skip
    acc, top, mass = sweep(
        acc, top, mass, queries, k_base, v_base, k_n, v_n, key_bias if key_bias is None else key_bias + bh * tokens, text_start,
        text_start + text, factor, D, DP, BK, STAGES, PRECISION,
    )  # fmt: skip
    if EXTRA:
        acc, top, mass = sweep(
            acc, top, mass, queries, extra_k + bh * extra * D, extra_v + bh * extra * D, D, D, None, 0, extra, factor, D, DP, BK,
            STAGES, PRECISION,
        )  # fmt: skip
    if POOLED:
        squares = scaled_squares(queries, scale)
        means, values, halves = k_mean + bh * k_blocks * D, v_mean + bh * k_blocks * D, k_half + bh * k_blocks * D
        mine = bits + bh * bits_bh + block.to(tl.int64) * bits_row
        shift = 0.0 if offset is None else tl.load(offset + h) * LOG2E
        for at in tl.range(0, k_blocks, BJ, num_stages=STAGES):
            j = at + tl.arange(0, BJ)
            logits, _, _, _ = pooled_logits(
                queries, squares, means, halves, mine, k_starts, k_blocks, j, factor, shift, cap, D, DP, COUNT, VARIANCE, PRECISION
            )
            acc, top, mass = absorb(acc, top, mass, logits, tile(values, j, D, j < k_blocks, D, DP), PRECISION)
    if LINEAR:
        # read again, and said to be another read: held through the loops, the features would cost registers
        mapped = feature(tile(q + b * q_b + h * q_h, q_token + image_start, q_n, q_valid, D, DP, True), D, DP, MAP).to(queries.dtype)
        if LEFT:
            taken, taken_mass = linear_visit(
                taken, taken_mass, mapped, image_k, image_v, k_n, v_n, row, listed, k_blocks, k_starts, D, DP, BK, SUB_K, MAP, STAGES,
                PRECISION,
            )  # fmt: skip
        rest, rest_mass = rest_of(
            mapped, taken, taken_mass, state, total, bh, listed, k_blocks, keys, ALL, LEFT, D, DP, PRECISION
        )  # fmt: skip
        mean = rest / tl.where(rest_mass > 0, rest_mass, 1.0)[:, None]
        if not RESIDUAL:
            shift = 0.0 if offset is None else tl.load(offset + h) * LOG2E
            logit = tl.where(rest_mass > 0, tl.log2(tl.where(rest_mass > 0, rest_mass, 1.0)) + shift, float("-inf"))
            new = tl.maximum(top, logit)
            acc = acc * tl.exp2(top - new)[:, None] + mean * tl.exp2(logit - new)[:, None]
            mass = mass * tl.exp2(top - new) + tl.exp2(logit - new)
            top = new
    result = acc / mass[:, None]
    if LINEAR and RESIDUAL:
        result += vector(bias, D, DP)[None, :]
        if ALL:  # the state holds the projection already
            result += mean
        else:
            result += split_dot(mean.to(queries.dtype), weight, 0, True, D, DP, PRECISION)
    put(out + b * o_b + h * o_h, q_token + image_start, o_n, q_valid, result, D, DP)
    tl.store(lse + bh * tokens + image_start + q_token, (top + tl.log2(mass)) / LOG2E, mask=q_valid)


@triton.jit
def rest_of(phi, taken, taken_mass, state, total, bh, listed, k_blocks, keys, ALL: tl.constexpr, LEFT: tl.constexpr,
            D: tl.constexpr, DP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Numerator `[R, DP]` and mass `[R]` of the linear attention over the rest. Mass 0: nothing left.

    LEFT: `taken` is summed over the rest itself; else over the visited blocks, and subtracted from the sums over all. Both masses then are
    sums of the same rounded features, so that their difference holds to float32; the numerators' hold to the products' own type.
    """
    if LEFT:  # no early return: what follows one is compiled all the same, and has no state here
        real = (listed < k_blocks) & (taken_mass > 0)
        rest, left = tl.where(real[:, None], taken, 0.0), tl.where(real, taken_mass, 0.0)
    else:
        count = keys.to(tl.float32)
        rest = split_dot(phi, state, bh, False, D, DP, PRECISION) * count
        left = tl.sum(phi.to(tl.float32) * vector(total + bh * D, D, DP)[None, :], 1) * count
        if ALL:
            left += 1e-5
        else:
            rounding: tl.constexpr = 2.0**-11 if phi.dtype == tl.float16 else 2.0**-8 if phi.dtype == tl.bfloat16 else 1e-6
            least = left * rounding  # a rest below the rounding of the difference is none (relu features can vanish)
            left -= taken_mass
            real = (listed < k_blocks) & (left > least)
            rest, left = tl.where(real[:, None], rest - taken, 0.0), tl.where(real, left, 0.0)
    return rest, left


@triton.jit(do_not_specialize=SIZES)
def dense_rows(
    q, k, v, key_bias, part, part_lse, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, heads, rows, first, tokens, chunk, scale,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Query rows `first` to `first + rows` over one chunk of all the keys: part `[splits, BH, rows, D]` and its lse, in log2.

    Grid: (tiles of rows, batch · heads, splits).
    """
    bh, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    b, h = bh // heads, bh % heads
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    valid = row < rows
    queries = tile(q + b * q_b + h * q_h, row + first, q_n, valid, D, DP)
    begin = tl.program_id(2) * chunk
    acc, top, mass = sweep(
        tl.zeros([BQ, DP], tl.float32), tl.full([BQ], float("-inf"), tl.float32), tl.zeros([BQ], tl.float32), queries,
        k + b * k_b + h * k_h, v + b * v_b + h * v_h, k_n, v_n, key_bias if key_bias is None else key_bias + bh * tokens,
        begin, tl.minimum(begin + chunk, tokens), scale * LOG2E, D, DP, BK, STAGES, PRECISION,
    )  # fmt: skip
    at = (split * tl.num_programs(1) + bh) * rows
    put(part + at * D, row, D, valid, acc / mass[:, None], D, DP)
    tl.store(part_lse + at + row, top + tl.log2(mass), mask=valid)


@triton.jit(do_not_specialize=SIZES)
def merge_rows(
    part, part_lse, out, lse, o_b, o_h, o_n, heads, rows, first, tokens, splits,
    D: tl.constexpr, DP: tl.constexpr, BQ: tl.constexpr,
):  # fmt: skip
    """The softmax over all chunks from the softmax over each. Grid: (tiles of rows, batch · heads)."""
    bh = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BQ + tl.arange(0, BQ)
    valid = row < rows
    step = tl.num_programs(1).to(tl.int64) * rows
    top = tl.full([BQ], float("-inf"), tl.float32)
    mass = tl.zeros([BQ], tl.float32)
    acc = tl.zeros([BQ, DP], tl.float32)
    for split in range(splits):
        at = split * step + bh * rows
        x = tl.load(part_lse + at + row, mask=valid, other=0.0)
        new = tl.maximum(top, x)
        fade, gain = tl.exp2(top - new), tl.exp2(x - new)
        acc = acc * fade[:, None] + tile(part + at * D, row, D, valid, D, DP) * gain[:, None]
        mass = mass * fade + gain
        top = new
    put(out + (bh // heads) * o_b + (bh % heads) * o_h, row + first, o_n, valid, acc / mass[:, None], D, DP)
    tl.store(lse + bh * tokens + first + row, (top + tl.log2(mass)) / LOG2E, mask=valid)
