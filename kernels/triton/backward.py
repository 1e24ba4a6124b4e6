"""Backward: gradients of queries over rows of the block lists, of keys and values over columns; sums in a fixed order, no atomics.

With p = exp(s − lse) and delta = Σ out·dout − dlse, a key with logit s and value v gives ds = p·(dout·v − delta).
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.block_sums import sum_tile
from dit_accel.kernels.triton.primitives import (
    GONE,
    LOG2E,
    delta_tile,
    head,
    kept_in_part,
    listed_at,
    listed_keys,
    listed_queries,
    placed,
    pooled_logits,
    pools_of_step,
    pools_seen,
    program_of,
    put,
    row_again,
    rows_of_program,
    scaled_squares,
    span_of,
    tile,
    unkept,
    vector,
    wide_dot,
    words_of,
)  # fmt: skip
from dit_accel.kernels.triton.tuples import Keys, Queries, Row, kernel


@kernel("D DP BQ")
def deltas(out, dout, dlse, delta, heads, tokens_q, C: tl.constexpr):
    """`delta_tile`. Grid: (tiles of tokens, batch · heads)."""
    delta_tile(out, dout, dlse, delta, tl.program_id(1).to(tl.int64), tl.program_id(0), heads, tokens_q, C)


@triton.jit
def score_gradient(q, k, v, dout, lse2, delta, shift, kept, factor, C):
    """Weights and their logits' gradients `[Q, K]` of exact keys; 0 where not `kept`. `shift`: the keys' bias `[K]` in log2, or None."""
    logits = tl.dot(q, tl.trans(k), input_precision=C.PRECISION) * factor
    if shift is not None:
        logits += shift[None, :]
    weights = tl.where(kept, tl.exp2(logits - lse2[:, None]), 0.0)
    return weights, weights * (tl.dot(dout, tl.trans(v), input_precision=C.PRECISION) - delta[:, None])


@triton.jit
def sweep_rows(dq, q, dout, lse2, delta, keys, bias, begin, end, factor, C):
    """What the keys from `begin` to `end`, under their `bias` or None, add to the gradient of the queries, but for the scale."""
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        rows = at + tl.arange(0, C.BK)
        valid = rows < end
        shift = bias if bias is None else tl.load(bias + rows, mask=valid, other=0.0)
        read = valid if bias is None else valid & (shift > GONE)
        key = tile(keys.k, rows, keys.k_n, read, C)
        _, ds = score_gradient(q, key, tile(keys.v, rows, keys.v_n, read, C), dout, lse2, delta, shift, valid[None, :], factor, C)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=C.PRECISION)
    return dq


@triton.jit
def visit_rows(dq, q, dout, lse2, delta, keys, row, begin, end, lists, predicate, factor, MASKED: tl.constexpr, C):
    """What the listed key blocks from `begin` to `end` add to the gradient of the queries, but for the scale."""
    for n in tl.range(begin * C.SUB_K, end * C.SUB_K, num_stages=C.STAGES):
        token, valid, place = listed_keys(row, n, lists, C)
        key = tile(keys.k, place, keys.k_n, valid, C)
        kept = valid[None, :]
        if MASKED:
            kept &= kept_in_part(predicate, row, n, token, valid, True, C)
        _, ds = score_gradient(q, key, tile(keys.v, place, keys.v_n, valid, C), dout, lse2, delta, None, kept, factor, C)
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=C.PRECISION)
    return dq


@triton.jit
def sum_gradients(sums, bh, number, groups, heads, C):
    """The `number`th of the programs of one head that sum parts (`tuples.Sums`): first those of its states, then its share of those of the
    projection, which are smaller, as each goes through all heads."""
    tiles = 0
    if sums.parts.state is not None:
        tiles = tl.cdiv(C.D * C.D, C.E)
        if number < tiles:
            sum_tile(sums.parts, sums.found, sums.scaled, bh, number, groups, heads, C.E, C.N, C)
    if sums.of_weight.state is not None and number >= tiles:
        place = (number - tiles) * heads + bh
        sum_tile(sums.of_weight, sums.weight, None, 0, place, groups * heads, 1, C.E // 8, C.N * 8, C)


@kernel("D DP BQ BK BP SUB_Q SUB_K OWN PARTIAL WINDOWS WORDS EXTRA POOLED PARTS SPAN COUNT VARIANCE E N STAGES PRECISION")
def gradient_rows(
    q, k, v, extra, pull, more, tilt, dq, lists, predicate, pooled, learned, logits, heads, tokens_q, tokens_k, image_q, image_start_q,
    image_start_k, text, text_start, text_q, text_start_q, text_tiles, extra_keys, q_blocks, width, length_q, length_k, mask_size, units,
    pool_width, sums, summing, groups, C: tl.constexpr,
):  # fmt: skip
    """dq `[B, H, Nq, D]` (contiguous) of the image's queries, and of the text's in `text_tiles` tiles; arguments as in `attend_rows`.

    `more` `[BH, image_q, D]`: what the linear rest adds (`linear_gradient`). `tilt`: where there are slopes, `tilted_deltas` and the share,
    which is written here. `sums`: what the last `summing` programs of each head sum, of `groups` parts.

    Grid: (text_tiles + query blocks · SUB_Q + summing, batch · heads).
    """
    if (sums.parts.state is not None or sums.of_weight.state is not None) and tl.program_id(0) >= tl.num_programs(0) - summing:
        number = tl.program_id(0) - (tl.num_programs(0) - summing)
        sum_gradients(sums, tl.program_id(1).to(tl.int64), number, groups, tl.num_programs(1), C)
        return
    number, bh, of_text = program_of(text_tiles, tl.num_programs(0) - summing)
    block, sub = tl.where(of_text, 0, number) // C.SUB_Q, tl.where(of_text, 0, number) % C.SUB_Q
    h = bh % heads
    keys = Keys(head(k, bh, heads), head(v, bh, heads), k.n, v.n)
    start = image_start_k.to(tl.int64)
    image_keys = Keys(keys.k + start * k.n, keys.v + start * v.n, k.n, v.n)
    q_token = tl.load(lists.q_starts + block) + sub * C.BQ + tl.arange(0, C.BQ)
    q_valid = q_token < tl.load(lists.q_starts + block + 1)
    q_token, q_valid, q_row = rows_of_program(lists.q_places, q_token, q_valid, number, of_text, image_start_q, text_start_q, text_q, C.BQ)
    queries = tile(head(q, bh, heads), q_row, q.n, q_valid, C)
    dout = tile(head(pull.dout, bh, heads), q_row, pull.dout.n, q_valid, C)
    at_row = bh * tokens_q + q_row
    lse2 = tl.load(pull.lse + at_row, mask=q_valid, other=0.0) * LOG2E
    mine = tl.load(pull.delta + at_row, mask=q_valid, other=0.0)
    factor = logits.scale * LOG2E
    at_list = listed_at(block, bh, q_blocks, C)
    whole = tl.where(of_text, 0, tl.load(lists.full + at_list))
    listed = tl.where(of_text, 0, tl.load(lists.counts + at_list))
    mask_of, masks = predicate.mask_of, predicate.masks
    if predicate.masks is not None:
        mask_of += at_list * width
        masks += (sub * C.BQ + tl.arange(0, C.BQ)) * C.WORDS
    row = Row(lists.blocks + at_list * width, mask_of, masks, mask_size, q_token, q_valid, length_q, length_k, None, None)
    grad = tl.zeros([C.BQ, C.DP], tl.float32)
    grad = visit_rows(
        grad, queries, dout, lse2, mine, image_keys, row, 0, whole if C.PARTIAL else listed, lists, predicate, factor, False, C
    )  # fmt: skip
    if C.PARTIAL:
        grad = visit_rows(grad, queries, dout, lse2, mine, image_keys, row, whole, listed, lists, predicate, factor, True, C)
    grad = sweep_rows(
        grad, queries, dout, lse2, mine, keys, logits.bias if logits.bias is None else logits.bias + bh * tokens_k,
        tl.where(of_text, 0, text_start), tl.where(of_text, tokens_k, text_start + text), factor, C,
    )  # fmt: skip
    if C.EXTRA:
        at = bh * extra_keys * C.D
        further = Keys(extra.k + at, extra.v + at, C.D, C.D)
        grad = sweep_rows(grad, queries, dout, lse2, mine, further, None, 0, tl.where(of_text, 0, extra_keys), factor, C)
    if C.POOLED:
        squares = scaled_squares(queries, logits.scale)
        second = tl.zeros([C.BQ, C.DP], tl.float32)
        first = bh * units * C.PARTS
        at_head = first * C.D
        share = tl.zeros([C.BQ], tl.float32)
        if tilt.delta is not None:
            mine = tl.load(tilt.delta + at_row, mask=q_valid, other=0.0)
        at_units, pools, bits = pools_seen(pooled, block, bh, q_blocks, units, pool_width, C)
        pools = tl.where(of_text, 0, pools)
        shift = 0.0 if learned.offset is None else tl.load(learned.offset + h) * LOG2E
        for at in tl.range(0, pools, C.BP, num_stages=C.STAGES):
            j, valid = pools_of_step(pooled, at_units, at, pools, C)
            x, mean, half, term = pooled_logits(
                queries, squares, pooled, first, at_head, bits, None, None, lists.k_starts, j, valid, factor, shift, logits.cap, C
            )
            value = tile(pooled.v_mean + at_head, j, C.D, valid, C)
            weights = tl.exp2(x - lse2[:, None])
            if tilt.share is not None and C.DP > 128:  # before the product where it spills after it, and after it where it spills before
                share += tl.sum(weights, 1)
            ds = weights * (tl.dot(dout, tl.trans(value), input_precision=C.PRECISION) - mine[:, None])
            if tilt.share is not None and C.DP <= 128:
                share += tl.sum(weights, 1)
            grad = tl.dot(ds.to(mean.dtype), mean, grad, input_precision=C.PRECISION)
            if C.VARIANCE:
                second = tl.dot(tl.where(term <= logits.cap, ds, 0.0).to(half.dtype), half, second, input_precision=C.PRECISION)
        if C.VARIANCE:
            grad += 2.0 * logits.scale * queries.to(tl.float32) * second
        if tilt.share is not None:
            again = row_again(lists.q_places, q_token, q_valid, of_text, image_start_q, text_start_q)
            tl.store(tilt.share + bh * tokens_q + again, share, mask=q_valid)
            slope = pooled.slopes + span_of(block, bh, q_blocks, C) * C.D * C.D
            of_dout = head(pull.dout, bh, heads)
            grad = wide_dot(grad, of_dout, again, pull.dout.n, q_valid, share, slope, tl.where(of_text, 0, C.DP), True, 1, C)
    grad *= logits.scale
    q_row = row_again(lists.q_places, q_token, q_valid, of_text, image_start_q, text_start_q)
    if more is not None:
        grad += tile(more + bh * image_q * C.D, q_row - image_start_q, C.D, q_valid & (not of_text), C)
    put(dq + bh * tokens_q * C.D, q_row, C.D, q_valid, grad, C)


@kernel("D DP BQ BK STAGES PRECISION")
def gradient_dense_rows(q, k, v, pull, part, logits, heads, tokens_q, tokens_k, rows, first, chunk, C: tl.constexpr):
    """dq of the query rows `first` to `first + rows` from one chunk of all keys: part `[splits, BH, rows, D]`.

    Grid: (tiles of rows, batch · heads, splits).
    """
    bh, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    valid = row < rows
    begin = tl.program_id(2) * chunk
    grad = sweep_rows(
        tl.zeros([C.BQ, C.DP], tl.float32), tile(head(q, bh, heads), row + first, q.n, valid, C),
        tile(head(pull.dout, bh, heads), row + first, pull.dout.n, valid, C),
        tl.load(pull.lse + bh * tokens_q + first + row, mask=valid, other=0.0) * LOG2E,
        tl.load(pull.delta + bh * tokens_q + first + row, mask=valid, other=0.0),
        Keys(head(k, bh, heads), head(v, bh, heads), k.n, v.n), logits.bias if logits.bias is None else logits.bias + bh * tokens_k,
        begin, tl.minimum(begin + chunk, tokens_k), logits.scale * LOG2E, C,
    )  # fmt: skip
    put(part + (split * tl.num_programs(1) + bh) * rows * C.D, row, C.D, valid, grad * logits.scale, C)


@triton.jit
def column_gradient(key, value, q, dout, lse2, delta, shift, kept, factor, C):
    """`score_gradient` with keys as rows: `[K, Q]`, ready to be multiplied from the left."""
    logits = tl.dot(key, tl.trans(q), input_precision=C.PRECISION) * factor
    if shift is not None:
        logits += shift[:, None]
    weights = tl.where(kept, tl.exp2(logits - lse2[None, :]), 0.0)
    return weights, weights * (tl.dot(value, tl.trans(dout), input_precision=C.PRECISION) - delta[None, :])


@triton.jit
def sweep_columns(dk, dv, key, value, shift, k_valid, source, begin, end, factor, C):
    """What the queries from `begin` to `end` add to the gradients of keys (but for the scale), whose bias is `shift`, and values."""
    for at in tl.range(begin, end, C.BQ, num_stages=C.STAGES):
        rows = at + tl.arange(0, C.BQ)
        valid = rows < end
        queries = tile(source.q, rows, source.q_n, valid, C)
        pull = tile(source.dout, rows, source.g_n, valid, C)
        lse2 = tl.load(source.lse + rows, mask=valid, other=0.0) * LOG2E
        mine = tl.load(source.delta + rows, mask=valid, other=0.0)
        kept = k_valid[:, None] & valid[None, :]
        weights, ds = column_gradient(key, value, queries, pull, lse2, mine, shift, kept, factor, C)
        dv = tl.dot(weights.to(pull.dtype), pull, dv, input_precision=C.PRECISION)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=C.PRECISION)
    return dk, dv


@triton.jit
def visit_columns(dk, dv, key, value, source, row, begin, end, lists, predicate, factor, MASKED: tl.constexpr, C):
    """What the query blocks on a column add to the gradients of one key tile."""
    for n in tl.range(begin * C.SUB_Q, end * C.SUB_Q, num_stages=C.STAGES):
        token, valid, place = listed_queries(row, n, lists, C)
        queries = tile(source.q, place, source.q_n, valid, C)
        pull = tile(source.dout, place, source.g_n, valid, C)
        lse2 = tl.load(source.lse + place, mask=valid, other=0.0) * LOG2E
        mine = tl.load(source.delta + place, mask=valid, other=0.0)
        kept = row.valid[:, None] & valid[None, :]
        if MASKED:
            kept &= kept_in_part(predicate, row, n, token, valid, False, C)
        weights, ds = column_gradient(key, value, queries, pull, lse2, mine, None, kept, factor, C)
        dv = tl.dot(weights.to(pull.dtype), pull, dv, input_precision=C.PRECISION)
        dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=C.PRECISION)
    return dk, dv


@kernel("D DP BQ BK SUB_Q SUB_K OWN PARTIAL WINDOWS WORDS POOLED VARIANCE STAGES PRECISION")
def gradient_columns(
    q, k, v, pull, more, grads, transposed, lists, predicate, pooled, pooled_grads, logits, heads, tokens_q, tokens_k, image_k,
    image_start_q, image_start_k, text, text_start, text_q, text_start_q, text_tiles, k_blocks, entries, length_q, length_k, mask_size,
    C: tl.constexpr,
):  # fmt: skip
    """dk, dv (`grads`) `[B, H, Nk, D]` (contiguous) of one tile of the image's keys, from the query blocks that visit it and from the
    text's queries; and of the text's keys in `text_tiles` tiles, from every query.

    `transposed`: a head's `entries` entries and an indptr of 2·Tk + 1; for key block j the query blocks that visit it whole are
    entries[indptr[2j]:indptr[2j + 1]], those that visit it partly entries[indptr[2j + 1]:indptr[2j + 2]]. `more`: pairs
    `[BH, image_k, D]`, what the linear rest adds (`linear_columns`). Grid: (text_tiles + key blocks · SUB_K, batch · heads).
    """
    number, bh, of_text = program_of(text_tiles, tl.num_programs(0))
    block, sub = tl.where(of_text, 0, number) // C.SUB_K, tl.where(of_text, 0, number) % C.SUB_K
    first = tl.load(lists.k_starts + block)
    end = tl.load(lists.k_starts + block + 1)
    token = first + sub * C.BK + tl.arange(0, C.BK)
    valid = token < end
    token, valid, place = rows_of_program(lists.k_places, token, valid, number, of_text, image_start_k, text_start, text, C.BK)
    shift, read = logits.bias, valid
    if logits.bias is not None:
        shift = tl.load(logits.bias + bh * tokens_k + place, mask=valid, other=0.0)
        read = valid & (shift > GONE)
    key = tile(head(k, bh, heads), place, k.n, read, C)
    value = tile(head(v, bh, heads), place, v.n, read, C)
    factor = logits.scale * LOG2E
    grad_k = tl.zeros([C.BK, C.DP], tl.float32)
    grad_v = tl.zeros([C.BK, C.DP], tl.float32)
    every = Queries(
        head(q, bh, heads), head(pull.dout, bh, heads), pull.lse + bh * tokens_q, pull.delta + bh * tokens_q, q.n, pull.dout.n
    )  # fmt: skip
    start = image_start_q.to(tl.int64)
    image_queries = Queries(
        every.q + start * q.n, every.dout + start * pull.dout.n, every.lse + start, every.delta + start, q.n, pull.dout.n
    )  # fmt: skip
    entry = transposed.entries
    indptr = transposed.indptr + 2 * block
    mask_of, masks = transposed.mask_of, predicate.masks
    if predicate.masks is not None:
        mask_of += bh * entries if C.OWN else 0
        masks += (sub * C.BK + tl.arange(0, C.BK)) * C.WORDS
    if C.OWN:
        entry += bh * entries
        indptr += bh * (2 * k_blocks + 1)
    whole, partial, stop = tl.load(indptr), tl.load(indptr + 1), tl.load(indptr + 2)
    partial, stop = tl.where(of_text, whole, partial), tl.where(of_text, whole, stop)  # on no list
    row = Row(entry, mask_of, masks, mask_size, token, valid, length_q, length_k, None, None)
    grad_k, grad_v = visit_columns(
        grad_k, grad_v, key, value, image_queries, row, whole, partial, lists, predicate, factor, False, C
    )  # fmt: skip
    if C.PARTIAL:
        grad_k, grad_v = visit_columns(grad_k, grad_v, key, value, image_queries, row, partial, stop, lists, predicate, factor, True, C)
    grad_k, grad_v = sweep_columns(
        grad_k, grad_v, key, value, shift, valid, every, tl.where(of_text, 0, text_start_q),
        tl.where(of_text, tokens_q, text_start_q + text_q), factor, C,
    )  # fmt: skip
    grad_k *= logits.scale
    if more.k is not None:
        grad_k += tile(more.k + bh * image_k * C.D, place - image_start_k, C.D, valid & (not of_text), C)
        grad_v += tile(more.v + bh * image_k * C.D, place - image_start_k, C.D, valid & (not of_text), C)
    if C.POOLED:
        count = tl.where(of_text, 0.0, 1.0 / (end - first).to(tl.float32))
        at = (bh * k_blocks + block) * C.D
        grad_k += vector(pooled_grads.k_mean + at, C)[None, :] * count
        grad_v += vector(pooled_grads.v_mean + at, C)[None, :] * count
        if C.VARIANCE:
            mean = vector(pooled.k_mean + at, C).to(tl.float32)
            grad_k += vector(pooled_grads.k_half + at, C)[None, :] * (key.to(tl.float32) - mean[None, :]) * count
    put(grads.k + bh * tokens_k * C.D, place, C.D, valid, grad_k, C)
    put(grads.v + bh * tokens_k * C.D, place, C.D, valid, grad_v, C)


@kernel("D DP BQ BK STAGES PRECISION")
def gradient_shared_keys(q, k, v, pull, grads, logits, heads, tokens_q, tokens_k, keys, first, begin, end, chunk, C: tl.constexpr):
    """Gradients of the keys `first` to `first + keys`, which every query row from `begin` to `end` sees: one chunk of those rows.

    `grads`: parts `[splits, BH, keys, D]` float32. Grid: (tiles of keys, batch · heads, splits).
    """
    bh, split = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    at = tl.program_id(0) * C.BK + tl.arange(0, C.BK)
    valid = at < keys
    shift = logits.bias if logits.bias is None else tl.load(logits.bias + bh * tokens_k + first + at, mask=valid, other=0.0)
    read = valid if logits.bias is None else valid & (shift > GONE)
    key = tile(head(k, bh, heads), at + first, k.n, read, C)
    value = tile(head(v, bh, heads), at + first, v.n, read, C)
    start = begin + tl.program_id(2) * chunk
    every = Queries(
        head(q, bh, heads), head(pull.dout, bh, heads), pull.lse + bh * tokens_q, pull.delta + bh * tokens_q, q.n, pull.dout.n
    )  # fmt: skip
    grad_k, grad_v = sweep_columns(
        tl.zeros([C.BK, C.DP], tl.float32), tl.zeros([C.BK, C.DP], tl.float32), key, value, shift, valid, every, start,
        tl.minimum(start + chunk, end), logits.scale * LOG2E, C,
    )  # fmt: skip
    place = (split * tl.num_programs(1) + bh) * keys * C.D
    put(grads.k + place, at, C.D, valid, grad_k * logits.scale, C)
    put(grads.v + place, at, C.D, valid, grad_v, C)


@kernel("D DP BQ BK SUB_Q OWN PARTS SPAN COUNT VARIANCE STAGES PRECISION")
def gradient_pooled(
    q, pull, pooled, grads, transposed, lists, learned, logits, heads, tokens_q, image_start_q, q_blocks, entries, units, C: tl.constexpr
):  # fmt: skip
    """Gradients of a tile of pooled keys, values and half variances or biases, and of the offset.

    `transposed`: where query blocks see units of lists, the spans of them that see some unit of a tile (`list_order.spans_by_tile`).
    `grads` have a first axis of parts, of the query blocks. Grid: (tiles of pooled keys, batch · heads, parts).
    """
    bh = tl.program_id(1).to(tl.int64)
    j = tl.program_id(0) * C.BK + tl.arange(0, C.BK)
    inside = j < units * C.PARTS
    first = bh * units * C.PARTS
    at_head = first * C.D
    mean, value = tile(pooled.k_mean + at_head, j, C.D, inside, C), tile(pooled.v_mean + at_head, j, C.D, inside, C)
    factor = logits.scale * LOG2E
    bias = tl.zeros([C.BK], tl.float32)
    if C.COUNT:
        size = tl.load(lists.k_starts + j + 1, mask=inside, other=1) - tl.load(lists.k_starts + j, mask=inside, other=0)
        bias += tl.log2(size.to(tl.float32))
    if pooled.bias is not None:
        bias += tl.load(pooled.bias + first + j, mask=inside, other=0.0) * LOG2E
    if learned.offset is not None:
        bias += tl.load(learned.offset + bh % heads) * LOG2E
    half = mean
    if C.VARIANCE:
        half = tile(pooled.k_half + at_head, j, C.D, inside, C)
    grad_k = tl.zeros([C.BK, C.DP], tl.float32)
    grad_v = tl.zeros([C.BK, C.DP], tl.float32)
    grad_h = tl.zeros([C.BK, C.DP], tl.float32)
    grad_o = tl.zeros([C.BK], tl.float32)
    q_base = head(q, bh, heads) + image_start_q.to(tl.int64) * q.n
    g_base = head(pull.dout, bh, heads) + image_start_q.to(tl.int64) * pull.dout.n
    row = bh * tokens_q + image_start_q
    begin, end = 0, q_blocks
    spans = pooled.lists
    if pooled.lists is not None:
        spans = transposed.entries + bh * entries
        indptr = transposed.indptr + bh * (2 * tl.num_programs(0) + 1) + 2 * tl.program_id(0)
        begin, end = tl.load(indptr) * C.SPAN, tl.load(indptr + 2) * C.SPAN
    chunk = tl.cdiv(end - begin, tl.num_programs(2))
    begin += tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, end)
    for n in tl.range(begin * C.SUB_Q, end * C.SUB_Q, num_stages=C.STAGES):
        i = n // C.SUB_Q
        stop = i + 1
        row_of_bits = listed_at(i, bh, q_blocks, C)
        if spans is not None:  # the last span may be short: past its end are no tokens
            i = tl.minimum(tl.load(spans + i // C.SPAN) * C.SPAN + i % C.SPAN, q_blocks)
            stop = tl.minimum(i + 1, q_blocks)
            row_of_bits = bh * q_blocks + tl.minimum(i, q_blocks - 1)
        token = tl.load(lists.q_starts + i) + (n % C.SUB_Q) * C.BQ + tl.arange(0, C.BQ)
        valid = token < tl.load(lists.q_starts + stop)
        place = placed(lists.q_places, token, valid)
        queries, dout = tile(q_base, place, q.n, valid, C), tile(g_base, place, pull.dout.n, valid, C)
        lse2 = tl.load(pull.lse + row + place, mask=valid, other=0.0) * LOG2E
        mine = tl.load(pull.delta + row + place, mask=valid, other=0.0)
        x = tl.dot(mean, tl.trans(queries), input_precision=C.PRECISION) * factor + bias[:, None]
        if C.VARIANCE:
            squares = scaled_squares(queries, logits.scale)
            term = tl.dot(half, tl.trans(squares), input_precision=C.PRECISION)
            x += tl.minimum(term, logits.cap) * LOG2E
        free = unkept(pooled.bits + row_of_bits * words_of(units), j // C.PARTS, inside)[:, None] & valid[None, :]
        weights = tl.where(free, tl.exp2(x - lse2[None, :]), 0.0)
        ds = weights * (tl.dot(value, tl.trans(dout), input_precision=C.PRECISION) - mine[None, :])
        grad_v = tl.dot(weights.to(dout.dtype), dout, grad_v, input_precision=C.PRECISION)
        grad_k = tl.dot(ds.to(queries.dtype), queries, grad_k, input_precision=C.PRECISION)
        grad_o += tl.sum(ds, 1)
        if C.VARIANCE:
            grad_h = tl.dot(tl.where(term <= logits.cap, ds, 0.0).to(squares.dtype), squares, grad_h, input_precision=C.PRECISION)
    row = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + bh
    first = row * units * C.PARTS
    put(grads.k_mean + first * C.D, j, C.D, inside, grad_k * logits.scale, C)
    put(grads.v_mean + first * C.D, j, C.D, inside, grad_v, C)
    if C.VARIANCE:
        put(grads.k_half + first * C.D, j, C.D, inside, grad_h, C)
    if grads.bias is not None:
        tl.store(grads.bias + first + j, grad_o, mask=inside)
    if learned.offset is not None:
        tl.store(grads.offset + row * tl.num_programs(0) + tl.program_id(0), tl.sum(grad_o, 0))
