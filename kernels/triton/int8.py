"""Products of queries and keys in 8 bits: both rounded once per call, and multiplied by the tensor cores' integer instruction.

`reference.rounded_to_int8` has the formula.
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import LOG2E, head, placed, put, tile
from dit_accel.kernels.triton.tuples import kernel

LEAST = tl.constexpr(2.0**-60)  # what is divided by and stays finite
RANGE = tl.constexpr(2.0**-6)  # of the largest channel's deviation, the least that another is taken for
GOLDEN = tl.constexpr(2654435769)  # 2³² over the golden ratio
ROUND = tl.constexpr(1.5 * 2.0**23)  # a float32 of up to 22 bits that this is added to and subtracted from is the nearest integer


@triton.jit
def sampled(x, bh, heads, start, count, C):
    """N rows `[N, DP]` of one head's image, in float32, spread by the golden ratio: at an even distance they may be one column of it."""
    row = start + (((tl.arange(0, C.N).to(tl.int64) * GOLDEN) & 0xFFFFFFFF) * count >> 32)
    return tile(head(x, bh, heads), row, x.n, row < start + count, C).to(tl.float32)


@triton.jit
def limited(spread):
    """Deviations `[DP]` of channels from squares, none of them much smaller than the largest."""
    root = tl.sqrt(spread)
    return tl.maximum(tl.maximum(root, tl.max(root, 0) * RANGE), LEAST)


@kernel("D DP BQ N")
def round_to_int8(
    q, k, found, places, scale, heads, tokens_q, tokens_k, image_q, image_k, image_start_q, image_start_k, text_start, groups,
    C: tl.constexpr,
):  # fmt: skip
    """BQ rows of the queries (the first `groups` programs) or of the keys as int8 with a scale for each (`found`, `tuples.Int8`).

    `places`: of the image's keys, in the order of whose blocks there are scales too. Every program makes the mean key and the channels'
    balance for itself, of the same N rows. Grid: (tiles of both, batch · heads).
    """
    bh = tl.program_id(1).to(tl.int64)
    keys = sampled(k, bh, heads, image_start_k, image_k, C)
    queries = sampled(q, bh, heads, image_start_q, image_q, C)
    mean = tl.sum(keys, 0) * (1.0 / C.N)
    gap = keys - mean[None, :]
    balance = tl.sqrt(limited(tl.sum(gap * gap, 0) * (1.0 / C.N)) / limited(tl.sum(queries * queries, 0) * (1.0 / C.N)))
    if tl.program_id(0) < groups:
        row = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
        valid = row < tokens_q
        x = tile(head(q, bh, heads), row, q.n, valid, C).to(tl.float32)
        at = bh * tokens_q
        tl.store(found.shift + at + row, tl.sum(x * mean[None, :], 1) * (scale * LOG2E), mask=valid)
        of_row = put_int8(found.q + at * C.D, row, valid, x * balance[None, :], C)
        tl.store(found.q_scale + at + row, of_row * (scale * LOG2E), mask=valid)
    else:
        token = (tl.program_id(0) - groups) * C.BQ + tl.arange(0, C.BQ)  # the image's in the blocks' order, then the text's
        valid, of_image = token < tokens_k, token < image_k
        row = tl.where(of_image, placed(places, token, of_image) + image_start_k, token - image_k + text_start)
        x = tile(head(k, bh, heads), row, k.n, valid, C).to(tl.float32) - mean[None, :]
        at = bh * tokens_k
        of_row = put_int8(found.k + at * C.D, row, valid, x / balance[None, :], C)
        tl.store(found.k_scale + at + row, of_row, mask=valid)
        tl.store(found.block_scale + bh * image_k + token, of_row, mask=of_image)


@triton.jit
def put_int8(base, row, valid, x, C):
    """Store rows `[R, DP]` as int8; their scales, no number where an entry of the row is none."""
    scale = tl.maximum(tl.max(tl.abs(x), 1), LEAST) * (1 / 127)
    near = (x * (1.0 / scale)[:, None] + ROUND) - ROUND
    put(base, row, C.D, valid, tl.minimum(tl.maximum(near, -127.0), 127.0).to(tl.int32), C)
    return scale + tl.sum(x * 0.0, 1)


@triton.jit
def key_logits(queries, keys, rows, valid, scales, factor, C):
    """Logits `[Q, K]` in log2 of the keys at some rows. `factor`: of the products, a number or, of keys in 8 bits, one for each query;
    `scales`: of each of these keys, or None."""
    key = tl.trans(tile(keys.k, rows, keys.k_n, valid, C))
    if scales is None:
        logits = tl.dot(queries, key, input_precision=C.PRECISION) * factor
    else:
        products = tl.dot(queries, key, out_dtype=tl.int32).to(tl.float32)
        logits = products * factor[:, None] * scales[None, :]
    return logits
