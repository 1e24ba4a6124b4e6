"""What block_parts.py does, of key blocks too long for a program to hold (groups of blocks): by several passes over a block's tokens, which
are in the second-level cache, in three kernels, each of which reads what the one before wrote.
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import TINY, head, placed, put, tile, vector
from dit_accel.kernels.triton.tuples import kernel


@triton.jit
def place_of_step(starts, places, at, end, C):
    """Where the tokens of a step are among the image's, and which there are."""
    token = at + tl.arange(0, C.BK)
    valid = token < end
    return placed(places, token, valid), valid


@triton.jit
def of_part(part, valid, number, C):
    """Which of a step's tokens are of a part; number PARTS is all of them."""
    mine = tl.load(part + tl.arange(0, C.BK), mask=valid, other=0).to(tl.int32)
    return valid & (mine >= number % C.PARTS) & (mine <= tl.minimum(number, C.PARTS - 1))


@triton.jit
def applied(metric, x, C):
    """A symmetric float32 matrix `[D, D]` times `[DP]`, some rows at a time: all of it does not fit the registers."""
    ROWS: tl.constexpr = 16
    channel = tl.arange(0, C.DP)
    by_rows = x.reshape(C.DP // ROWS, ROWS)
    result = tl.zeros([C.DP], tl.float32)
    for step in tl.range(0, C.DP // ROWS, num_stages=1):
        row = step * ROWS + tl.arange(0, ROWS)
        some = tl.sum(tl.where((tl.arange(0, C.DP // ROWS) == step)[:, None], by_rows, 0.0), 0)
        inside = (row < C.D)[:, None] & (channel < C.D)[None, :]
        matrix = tl.load(metric + row[:, None] * C.D + channel[None, :], mask=inside, other=0.0)
        result += tl.sum(matrix * some[:, None], 0)
    return result


@kernel("D DP BK PARTS LEVEL STAGES")
def halve_runs(k, metric, part, starts, places, heads, image_start_k, k_blocks, k_width, C: tl.constexpr):
    """Cut a part of a block in two, as `block_parts.halved` does: in `part` its tokens with a positive projection move on by LEVEL.

    LEVEL 1: it is the whole block, and `part` is not read. Grid: (key blocks, batch · heads, parts that there are).
    """
    block, number = tl.program_id(0), tl.program_id(2)
    bh = tl.program_id(1).to(tl.int64)
    base = head(k, bh, heads) + image_start_k.to(tl.int64) * k.n
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    mine_at = part + (bh * k_blocks + block) * k_width
    centre = tl.zeros([C.DP], tl.float32)
    size = 0.0
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        place, mine = place_of_step(starts, places, at, end, C)
        if C.LEVEL > 1:
            mine = of_part(mine_at + at - begin, mine, number, C)
        centre += tl.sum(tile(base, place, k.n, mine, C).to(tl.float32), 0)
        size += tl.sum(tl.where(mine, 1.0, 0.0), 0)
    centre /= tl.maximum(size, 1.0)
    direction = tl.where(tl.arange(0, C.DP) < C.D, 1.0, 0.0)
    for _ in tl.range(0, 4, num_stages=1):
        pull = tl.zeros([C.DP], tl.float32)
        for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
            place, mine = place_of_step(starts, places, at, end, C)
            if C.LEVEL > 1:
                mine = of_part(mine_at + at - begin, mine, number, C)
            gap = tl.where(mine[:, None], tile(base, place, k.n, mine, C).to(tl.float32) - centre[None, :], 0.0)
            pull += tl.sum(gap * tl.sum(gap * direction[None, :], 1)[:, None], 0)
        direction = applied(metric + bh * C.D * C.D, pull * (1.0 / tl.maximum(tl.max(tl.abs(pull), 0), TINY)), C)
        direction *= 1.0 / tl.maximum(tl.max(tl.abs(direction), 0), TINY)
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        place, mine = place_of_step(starts, places, at, end, C)
        offset = at - begin + tl.arange(0, C.BK)
        if C.LEVEL > 1:
            mine = of_part(mine_at + at - begin, mine, number, C)
        gap = tile(base, place, k.n, mine, C).to(tl.float32) - centre[None, :]
        side = tl.where(tl.sum(gap * direction[None, :], 1) > 0, C.LEVEL, 0) + number
        tl.store(mine_at + offset, side.to(tl.uint8), mask=mine)


@kernel("D DP BK PARTS COUNT STAGES")
def moments_of_runs(
    k, v, second, found, damping, starts, places, scale, cap, score_cap, heads, image_start_k, k_blocks, k_width, C: tl.constexpr
):  # fmt: skip
    """Of one part of a block, or of the whole block, all that `tuples.Parts` has but slopes. Grid: (key blocks, batch · heads, PARTS + 1).

    `damping` `[BH, Tk · PARTS]`: 1 / (1 + σ²) of each part. PARTS > 1: `found.part` is read.
    """
    block, number = tl.program_id(0), tl.program_id(2)
    bh = tl.program_id(1).to(tl.int64)
    k_base = head(k, bh, heads) + image_start_k.to(tl.int64) * k.n
    v_base = head(v, bh, heads) + image_start_k.to(tl.int64) * v.n
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    at_block = bh * k_blocks + block
    mine_at = found.part + at_block * k_width
    whole = number == C.PARTS
    mean = tl.zeros([C.DP], tl.float32)
    v_mean = tl.zeros([C.DP], tl.float32)
    size = 0.0
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        place, mine = place_of_step(starts, places, at, end, C)
        if C.PARTS > 1:
            mine = of_part(mine_at + at - begin, mine, number, C)
        mean += tl.sum(tile(k_base, place, k.n, mine, C).to(tl.float32), 0)
        v_mean += tl.sum(tile(v_base, place, v.n, mine, C).to(tl.float32), 0)
        size += tl.sum(tl.where(mine, 1.0, 0.0), 0)
    inverse = 1.0 / tl.maximum(size, 1.0)
    mean *= inverse
    v_mean *= inverse
    squares = tl.zeros([C.DP], tl.float32)
    v_squares = tl.zeros([C.DP], tl.float32)
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        place, mine = place_of_step(starts, places, at, end, C)
        if C.PARTS > 1:
            mine = of_part(mine_at + at - begin, mine, number, C)
        gap = tl.where(mine[:, None], tile(k_base, place, k.n, mine, C).to(tl.float32) - mean[None, :], 0.0)
        squares += tl.sum(gap * gap, 0)
        gap = tl.where(mine[:, None], tile(v_base, place, v.n, mine, C).to(tl.float32) - v_mean[None, :], 0.0)
        v_squares += tl.sum(gap * gap, 0)
    spread = scale * scale * tl.sum(squares * inverse * vector(second + bh * C.D, C), 0)
    of_values = tl.sum(v_squares, 0) * inverse
    channel = tl.arange(0, C.DP)
    real = channel < C.D
    if whole:
        error = tl.log(tl.maximum(spread, TINY)) + tl.log(tl.maximum(of_values, TINY)) * 0.5
        tl.store(found.k_mean + at_block * C.D + channel, mean, mask=real)
        tl.store(found.score_bias + at_block, tl.log(size) + tl.minimum(spread * 0.5, score_cap) + error)
    else:
        bias = tl.minimum(spread * 0.5, cap)
        if C.COUNT:
            bias += tl.log(tl.maximum(size, 1.0))
        at_part = at_block * C.PARTS + number
        tl.store(found.pooled_k + at_part * C.D + channel, mean, mask=real)
        tl.store(found.pooled_v + at_part * C.D + channel, v_mean, mask=real)
        tl.store(found.bias + at_part, tl.where(size > 0, bias, float("-inf")))
        tl.store(damping + at_part, 1.0 / (1.0 + spread))


@kernel("D DP BQ BK PARTS STAGES PRECISION")
def slopes_of_runs(k, v, found, damping, starts, places, heads, image_start_k, k_blocks, k_width, C: tl.constexpr):
    """BQ rows of a block's slope. Grid: (key blocks, batch · heads, tiles of D rows)."""
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    k_base = head(k, bh, heads) + image_start_k.to(tl.int64) * k.n
    v_base = head(v, bh, heads) + image_start_k.to(tl.int64) * v.n
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    at_block = bh * k_blocks + block
    row = tl.program_id(2) * C.BQ + tl.arange(0, C.BQ)
    inside = (row < C.D)[None, :]
    slope = tl.zeros([C.BQ, C.DP], tl.float32)
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        place, valid = place_of_step(starts, places, at, end, C)
        part = tl.load(found.part + at_block * k_width + at - begin + tl.arange(0, C.BK), mask=valid, other=0).to(tl.int32)
        mine = at_block * C.PARTS + part
        key = tl.load(k_base + place.to(tl.int64)[:, None] * k.n + row[None, :], mask=valid[:, None] & inside, other=0.0)
        mean = tl.load(found.pooled_k + mine[:, None] * C.D + row[None, :], mask=valid[:, None] & inside, other=0.0)
        off = tile(v_base, place, v.n, valid, C).to(tl.float32) - tile(found.pooled_v, mine, C.D, valid, C)
        off *= tl.load(damping + mine, mask=valid, other=0.0)[:, None]
        away = (key.to(tl.float32) - mean).to(key.dtype)
        slope = tl.dot(tl.trans(away), off.to(key.dtype), slope, input_precision=C.PRECISION)
    slope *= 1.0 / tl.maximum(end - begin, 1).to(tl.float32)
    put(found.slope + (bh * C.D * k_blocks + block) * C.D, row, k_blocks.to(tl.int64) * C.D, row < C.D, slope, C)
