"""Backward of the first order of given pooled keys: s q S_I, times their share of a query's softmax, with one matrix for SPAN query blocks.

With t = s q S_I a pooled key's value is v + t for each query: its logit's gradient is p·(dout·v − (delta − dout·t)).
"""

import triton.language as tl
from dit_accel.kernels.triton.primitives import head, placed, put, span_of, tile, wide_dot
from dit_accel.kernels.triton.tuples import kernel


@kernel("D DP BQ SUB_Q SPAN STAGES PRECISION")
def tilted_deltas(q, pull, tilt, slopes, lists, logits, heads, tokens_q, image_start_q, C: tl.constexpr):
    """`tilt.delta` of the image's queries: delta − dout·t. Grid: (query blocks · SUB_Q, batch · heads)."""
    block, sub = tl.program_id(0) // C.SUB_Q, tl.program_id(0) % C.SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    token = tl.load(lists.q_starts + block) + sub * C.BQ + tl.arange(0, C.BQ)
    valid = token < tl.load(lists.q_starts + block + 1)
    row = placed(lists.q_places, token, valid) + image_start_q
    slope = slopes + span_of(block, bh, tl.num_programs(0) // C.SUB_Q, C) * C.D * C.D
    change = tl.zeros([C.BQ, C.DP], tl.float32)
    change = wide_dot(change, head(q, bh, heads), row, q.n, valid, None, slope, C.DP, False, C.STAGES, C)
    dout = tile(head(pull.dout, bh, heads), row, pull.dout.n, valid, C).to(tl.float32)
    delta = tl.load(pull.delta + bh * tokens_q + row, mask=valid, other=0.0)
    tl.store(tilt.delta + bh * tokens_q + row, delta - logits.scale * tl.sum(change * dout, 1), mask=valid)


@kernel("D DP BQ BK SUB_Q SPAN STAGES PRECISION")
def gradient_slopes(q, pull, tilt, dslopes, lists, logits, heads, tokens_q, image_start_q, q_blocks, C: tl.constexpr):
    """BK rows of the matrix of a span of query blocks: dS = s Σ q ⊗ (share · dout). Grid: (spans · tiles of D rows, batch · heads)."""
    spans = tl.cdiv(q_blocks, C.SPAN)
    tiles = tl.num_programs(0) // spans
    span, part = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    bh = tl.program_id(1).to(tl.int64)
    channel = part * C.BK + tl.arange(0, C.BK)
    inside = channel < C.D
    grad = tl.zeros([C.BK, C.DP], tl.float32)
    for n in tl.range(0, C.SPAN * C.SUB_Q, num_stages=C.STAGES):
        block = tl.minimum(span * C.SPAN + n // C.SUB_Q, q_blocks)  # the last span may be short: past its end are no tokens
        token = tl.load(lists.q_starts + block) + (n % C.SUB_Q) * C.BQ + tl.arange(0, C.BQ)
        valid = token < tl.load(lists.q_starts + tl.minimum(block + 1, q_blocks))
        row = placed(lists.q_places, token, valid) + image_start_q
        queries = tl.load(
            head(q, bh, heads) + row.to(tl.int64)[:, None] * q.n + channel[None, :], mask=valid[:, None] & inside[None, :], other=0.0
        )
        share = tl.load(tilt.share + bh * tokens_q + row, mask=valid, other=0.0)
        dout = tile(head(pull.dout, bh, heads), row, pull.dout.n, valid, C)
        weighted = (dout.to(tl.float32) * share[:, None]).to(dout.dtype)
        grad = tl.dot(tl.trans(queries), weighted.to(queries.dtype), grad, input_precision=C.PRECISION)
    put(dslopes + (bh * spans + span) * C.D * C.D, channel, C.D, inside, grad * logits.scale, C)
