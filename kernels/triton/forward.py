"""Forward: image queries over their listed key blocks, text, pooled or linear rest, in one kernel; dense rows split over the keys."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.int8 import key_logits
from dit_accel.kernels.triton.primitives import (
    GONE,
    LOG2E,
    absorb,
    feature,
    head,
    kept_by_halves,
    kept_in_part,
    listed_at,
    listed_keys,
    pooled_logits,
    pools_of_step,
    pools_seen,
    program_of,
    put,
    rows_of_program,
    scaled_squares,
    span_of,
    split_dot,
    tile,
    tokens_together,
    vector,
    wide_dot,
    words_of,
)  # fmt: skip
from dit_accel.kernels.triton.tuples import Keys, Row, kernel


@triton.jit
def queries_of(q, int8, bh, heads, tokens, row, valid, scale, C):
    """Some queries `[Q, DP]` of one head and what makes logits, in log2, of their products with the keys."""
    if int8.q is None:
        queries = tile(head(q, bh, heads), row, q.n, valid, C)
        factor = scale * LOG2E
    else:
        queries = tile(int8.q + bh * tokens * C.D, row, C.D, valid, C)
        factor = tl.load(int8.q_scale + bh * tokens + row, mask=valid, other=0.0)
    return queries, factor


@triton.jit
def sweep(acc, top, mass, q, keys, bias, begin, end, factor, C):
    """All keys from `begin` to `end` join the softmax; `bias`, a number per key or None, joins their logits."""
    for at in tl.range(begin, end, C.BK, num_stages=C.STAGES):
        rows = at + tl.arange(0, C.BK)
        valid = rows < end
        read = valid
        if bias is not None:
            shift = tl.load(bias + rows, mask=valid, other=0.0)
            read = valid & (shift > GONE)  # what is padded may hold anything, and 0 times NaN is NaN
        scales = None if keys.scale is None else tl.load(keys.scale + rows, mask=read, other=0.0)
        logits = key_logits(q, keys, rows, read, scales, factor, C)
        if bias is not None:
            logits += shift[None, :]
        logits = tl.where(valid[None, :], logits, float("-inf"))
        acc, top, mass = absorb(acc, top, mass, logits, tile(keys.v, rows, keys.v_n, read, C), C)
    return acc, top, mass


@triton.jit
def visit(acc, top, mass, queries, keys, row, begin, end, lists, predicate, factor, MASKED: tl.constexpr, C):
    """The listed key blocks from `begin` to `end` join the softmax."""
    for n in tl.range(begin * C.SUB_K, end * C.SUB_K, num_stages=C.STAGES):
        token, valid, place = listed_keys(row, n, lists, C)
        # past a short block's end too, where no logit is kept: with a mask it would hold predicates through the loop
        scales = None if keys.scale is None else tl.load(keys.scale + token)
        logits = key_logits(queries, keys, place, valid, scales, factor, C)
        value = tile(keys.v, place, keys.v_n, valid, C)
        kept = valid[None, :]
        if MASKED:
            if C.TOGETHER > 1:
                kept = kept_by_halves(predicate, row, n, token, valid, C)
            else:
                kept &= kept_in_part(predicate, row, n, token, valid, True, C)
        acc, top, mass = absorb(acc, top, mass, tl.where(kept, logits, float("-inf")), value, C)
    return acc, top, mass


@triton.jit
def linear_visit(sums, mass, phi, keys, mapped, row, begin, end, lists, C):
    """The linear attention's sums `[R, DP]` and mass `[R]` over the listed key blocks from `begin` to `end`.

    `mapped`: phi of all the keys, or None, and it is computed here.
    """
    for n in tl.range(begin * C.SUB_K, end * C.SUB_K, num_stages=C.STAGES):
        _, valid, place = listed_keys(row, n, lists, C)
        features = mapped_keys(keys, mapped, place, valid, phi.dtype, C)
        value = tile(keys.v, place, keys.v_n, valid, C)
        product = tl.where(valid[None, :], tl.dot(phi, tl.trans(features), input_precision=C.PRECISION), 0.0)
        mass += tl.sum(product, 1)
        sums = tl.dot(product.to(value.dtype), value, sums, input_precision=C.PRECISION)
    return sums, mass


@triton.jit
def mapped_keys(keys, mapped, place, valid, kind: tl.constexpr, C):
    """phi of the keys at some places, read from `mapped` or, where that is None, computed."""
    return feature(tile(keys.k, place, keys.k_n, valid, C), C).to(kind) if mapped is None else tile(mapped, place, C.D, valid, C)


@triton.jit
def merge_tile(split, out, lse, bh, number, heads, tokens_q, rows, first, splits, C):
    """The softmax over all keys from those over parts of them, of the `number`th tile of the `rows` from `first` on."""
    row = number * C.BQ + tl.arange(0, C.BQ)
    valid = row < rows
    step = tl.num_programs(1).to(tl.int64) * rows
    top = tl.full([C.BQ], float("-inf"), tl.float32)
    mass = tl.zeros([C.BQ], tl.float32)
    acc = tl.zeros([C.BQ, C.DP], tl.float32)
    for part in range(splits):
        at = part * step + bh * rows
        x = tl.load(split.lse + at + row, mask=valid, other=0.0)
        new = tl.maximum(top, x)
        fade, gain = tl.exp2(top - new), tl.exp2(x - new)
        acc = acc * fade[:, None] + tile(split.part + at * C.D, row, C.D, valid, C) * gain[:, None]
        mass = mass * fade + gain
        top = new
    put(head(out, bh, heads), row + first, out.n, valid, acc / mass[:, None], C)
    tl.store(lse + bh * tokens_q + first + row, (top + tl.log2(mass)) / LOG2E, mask=valid)


@kernel(
    "D DP BQ BK BP SUB_Q SUB_K TOGETHER OWN PARTIAL WINDOWS WORDS EXTRA POOLED PARTS SPAN COUNT VARIANCE LINEAR MAP ALL LEFT RESIDUAL "
    "STAGES PRECISION"
)
def attend_rows(
    q, k, v, int8, extra, out, lse, lists, predicate, pooled, states, learned, logits, heads, tokens_q, tokens_k, image_k, image_start_q,
    image_start_k, text, text_start, text_q, text_start_q, text_tiles, extra_keys, q_blocks, k_blocks, width, length_q, length_k, mask_size,
    units, pool_width, split, splits, merging, C: tl.constexpr,
):  # fmt: skip
    """One tile of a query block of one head; writes its output and lse `[BH, Nq]` (natural log) once.

    The first programs have `text_tiles` tiles of the text's queries of each head (`primitives.program_of`), whose list is empty and which
    see every key as a text's: no loop is another for them, only where it ends. Else, if there are queries of the text, `dense_rows` ran
    before, and the last `merging` programs of each head have tiles of what it `split`.

    TOGETHER: query blocks that a program holds, 1, or 2 neighbours; these have one list (`block_pairs.pair_lists`), and SUB_Q is 1.
    Grid: (text_tiles + query blocks · SUB_Q / TOGETHER + merging, batch · heads). `states`: sums over the image's keys and those of
    `Arguments.far_states`, over the number of the image's. LEFT: the lists go on with the key blocks that are not visited, and the linear
    attention is summed over these, with a state of `far_states` alone or none; else it is that over all less that over the visited.
    """
    place, bh, of_text = program_of(text_tiles, tl.num_programs(0))
    if split.part is not None and place >= tl.num_programs(0) - merging:
        number = place - (tl.num_programs(0) - merging)
        merge_tile(split, out, lse, bh, number, heads, tokens_q, text_q, text_start_q, splits, C)
        return
    number, sub = tl.where(of_text, 0, place) // C.SUB_Q, tl.where(of_text, 0, place) % C.SUB_Q
    block = number * C.TOGETHER
    h = bh % heads
    if int8.k is None:  # here, as Triton 3.6 returns no None from a function
        keys = Keys(head(k, bh, heads), head(v, bh, heads), k.n, v.n, None)
    else:
        keys = Keys(int8.k + bh * tokens_k * C.D, head(v, bh, heads), C.D, v.n, int8.k_scale + bh * tokens_k)
    start = image_start_k.to(tl.int64)
    image_keys = Keys(
        keys.k + start * keys.k_n, keys.v + start * v.n, keys.k_n, v.n, None if int8.k is None else int8.block_scale + bh * image_k
    )  # fmt: skip
    of_tile = tl.arange(0, C.BQ)
    half = of_tile // (C.BQ // C.TOGETHER)  # which of the blocks each row is of
    if C.TOGETHER > 1:
        q_token, q_valid = tokens_together(lists.q_starts, block + half, of_tile % (C.BQ // C.TOGETHER), q_blocks)
    else:
        q_token = tl.load(lists.q_starts + block) + sub * C.BQ + of_tile
        q_valid = q_token < tl.load(lists.q_starts + block + 1)
    q_token, q_valid, q_row = rows_of_program(lists.q_places, q_token, q_valid, place, of_text, image_start_q, text_start_q, text_q, C.BQ)
    queries, factor = queries_of(q, int8, bh, heads, tokens_q, q_row, q_valid, logits.scale, C)
    acc = tl.zeros([C.BQ, C.DP], tl.float32)
    top = tl.full([C.BQ], float("-inf"), tl.float32)
    mass = tl.zeros([C.BQ], tl.float32)
    at_list = listed_at(number, bh, tl.cdiv(q_blocks, C.TOGETHER), C)
    whole = tl.where(of_text, 0, tl.load(lists.full + at_list))
    listed = tl.where(of_text, 0, tl.load(lists.counts + at_list))
    mask_of, masks = predicate.mask_of, predicate.masks
    if predicate.masks is not None:
        mask_of += at_list * width * C.TOGETHER
        masks += (of_tile % (C.BQ // C.TOGETHER) if C.TOGETHER > 1 else sub * C.BQ + of_tile) * C.WORDS
    codes = lists.codes if lists.codes is None else lists.codes + at_list * width
    row = Row(lists.blocks + at_list * width, mask_of, masks, mask_size, q_token, q_valid, length_q, length_k, codes, half)
    acc, top, mass = visit(
        acc, top, mass, queries, image_keys, row, 0, whole if C.PARTIAL or C.TOGETHER > 1 else listed, lists, predicate, factor,
        False, C,
    )  # fmt: skip
    if C.PARTIAL or C.TOGETHER > 1:
        acc, top, mass = visit(acc, top, mass, queries, image_keys, row, whole, listed, lists, predicate, factor, True, C)
    acc, top, mass = sweep(
        acc, top, mass, queries, keys, logits.bias if logits.bias is None else logits.bias + bh * tokens_k,
        tl.where(of_text, 0, text_start), tl.where(of_text, tokens_k, text_start + text), factor, C,
    )  # fmt: skip
    if int8.k is not None:  # what follows has 16 bits, and read before it would take registers
        top += tl.load(int8.shift + bh * tokens_q + q_row, mask=q_valid, other=0.0)
        queries = tile(head(q, bh, heads), q_row, q.n, q_valid, C)
        factor = logits.scale * LOG2E
        image_keys = Keys(head(k, bh, heads) + start * k.n, image_keys.v, k.n, v.n)
    if C.EXTRA:
        at = bh * extra_keys * C.D
        further = Keys(extra.k + at, extra.v + at, C.D, C.D)
        acc, top, mass = sweep(acc, top, mass, queries, further, None, 0, tl.where(of_text, 0, extra_keys), factor, C)
    if C.POOLED:
        squares = scaled_squares(queries, logits.scale)
        first = bh * units * C.PARTS
        at_head = first * C.D
        exact_top = top
        exact_mass = mass
        at_units, pools, bits = pools_seen(pooled, block, bh, q_blocks, units, pool_width, C)
        further_bits = None if C.TOGETHER == 1 else bits + tl.where(block + 1 < q_blocks, words_of(units), 0)
        shift = 0.0 if learned.offset is None else tl.load(learned.offset + h) * LOG2E
        pools = tl.where(of_text, 0, pools)
        for at in tl.range(0, pools, C.BP, num_stages=C.STAGES):
            j, valid = pools_of_step(pooled, at_units, at, pools, C)
            x, _, _, _ = pooled_logits(
                queries, squares, pooled, first, at_head, bits, further_bits, half, lists.k_starts, j, valid, factor, shift, logits.cap, C
            )
            acc, top, mass = absorb(acc, top, mass, x, tile(pooled.v_mean + at_head, j, C.D, valid, C), C)
    if C.LINEAR:
        # read again, and said to be another read: held through the loops, the features would cost registers
        mapped = feature(tile(head(q, bh, heads), q_row, q.n, q_valid, C, True), C).to(queries.dtype)
        of_keys = states.mapped
        if states.mapped is not None:
            of_keys += bh * image_k * C.D
        taken = tl.zeros([C.BQ, C.DP], tl.float32)  # what the visited blocks (LEFT: the others) contribute to the linear attention
        taken_mass = tl.zeros([C.BQ], tl.float32)
        if not C.ALL:  # a second visit: both softmax and linear attention in one would not fit the registers
            first, last = listed * 0, whole if C.PARTIAL else listed
            if C.LEFT:
                first, last = listed, tl.where(of_text, 0, k_blocks)
            taken, taken_mass = linear_visit(taken, taken_mass, mapped, image_keys, of_keys, row, first, last, lists, C)
        rest, rest_mass = rest_of(mapped, taken, taken_mass, states, bh, listed, k_blocks, image_k, C)
        rest_mass = tl.where(of_text, 0.0, rest_mass)
        mean = rest / tl.where(rest_mass > 0, rest_mass, 1.0)[:, None]
        if not C.RESIDUAL:
            shift = 0.0 if learned.offset is None else tl.load(learned.offset + h) * LOG2E
            logit = tl.where(rest_mass > 0, tl.log2(tl.where(rest_mass > 0, rest_mass, 1.0)) + shift, float("-inf"))
            new = tl.maximum(top, logit)
            acc = acc * tl.exp2(top - new)[:, None] + mean * tl.exp2(logit - new)[:, None]
            mass = mass * tl.exp2(top - new) + tl.exp2(logit - new)
            top = new
    result = acc / mass[:, None]
    if C.POOLED and pooled.slopes is not None:
        share = 1.0 - exact_mass * tl.exp2(exact_top - top) / mass
        slope = pooled.slopes + span_of(block, bh, q_blocks, C) * C.D * C.D
        tilt = tl.zeros([C.BQ, C.DP], tl.float32)
        tilt = wide_dot(tilt, head(q, bh, heads), q_row, q.n, q_valid, None, slope, tl.where(of_text, 0, C.DP), False, 1, C)
        result += tilt * (share * logits.scale)[:, None]
    if C.LINEAR and C.RESIDUAL:
        rest = vector(learned.bias, C)[None, :]
        if C.ALL:  # the state holds the projection already
            rest += mean
        else:
            rest += split_dot(mean.to(queries.dtype), learned.weight, 0, True, C)
        result += tl.where(of_text, 0.0, rest)
    put(head(out, bh, heads), q_row, out.n, q_valid, result, C)
    tl.store(lse + bh * tokens_q + q_row, (top + tl.log2(mass)) / LOG2E, mask=q_valid)


@triton.jit
def rest_of(phi, taken, taken_mass, states, bh, listed, k_blocks, keys, C):
    """Numerator `[R, DP]` and mass `[R]` of the linear attention over the rest. Mass 0: nothing left.

    LEFT: `taken` is summed over the rest itself, but for what is far; else over the visited blocks, and subtracted from the sums over all.
    Both masses then are sums of the same rounded features, so that their difference holds to float32; the numerators' hold to the products'
    own type.
    """
    count = keys.to(tl.float32)
    if C.LEFT:  # no early return: what follows one is compiled all the same, and may have no state here
        if states.state is None:
            real = (listed < k_blocks) & (taken_mass > 0)
            rest, left = tl.where(real[:, None], taken, 0.0), tl.where(real, taken_mass, 0.0)
        else:
            rest = split_dot(phi, states.state, bh, False, C) * count + taken
            left = tl.sum(phi.to(tl.float32) * vector(states.total + bh * C.D, C)[None, :], 1) * count + taken_mass
            rest, left = tl.where((left > 0)[:, None], rest, 0.0), tl.where(left > 0, left, 0.0)
    else:
        rest = split_dot(phi, states.state, bh, False, C) * count
        left = tl.sum(phi.to(tl.float32) * vector(states.total + bh * C.D, C)[None, :], 1) * count
        if C.ALL:
            left += 1e-5
        else:
            rounding: tl.constexpr = 2.0**-11 if phi.dtype == tl.float16 else 2.0**-8 if phi.dtype == tl.bfloat16 else 1e-6
            least = left * rounding  # a rest below the rounding of the difference is none (relu features can vanish)
            left -= taken_mass
            real = (listed < k_blocks) & (left > least)
            rest, left = tl.where(real[:, None], rest - taken, 0.0), tl.where(real, left, 0.0)
    return rest, left


@kernel("D DP BQ BK STAGES PRECISION")
def dense_rows(q, k, v, int8, split, logits, heads, tokens_q, tokens_k, rows, first, chunk, C: tl.constexpr):
    """Query rows `first` to `first + rows` over one chunk of all the keys (`split`).

    Grid: (tiles of rows, batch · heads, splits).
    """
    bh, number = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    valid = row < rows
    queries, factor = queries_of(q, int8, bh, heads, tokens_q, row + first, valid, logits.scale, C)
    if int8.k is None:  # here, as Triton 3.6 returns no None from a function
        keys = Keys(head(k, bh, heads), head(v, bh, heads), k.n, v.n, None)
    else:
        keys = Keys(int8.k + bh * tokens_k * C.D, head(v, bh, heads), C.D, v.n, int8.k_scale + bh * tokens_k)
    begin = tl.program_id(2) * chunk
    acc, top, mass = sweep(
        tl.zeros([C.BQ, C.DP], tl.float32), tl.full([C.BQ], float("-inf"), tl.float32), tl.zeros([C.BQ], tl.float32), queries,
        keys, logits.bias if logits.bias is None else logits.bias + bh * tokens_k, begin, tl.minimum(begin + chunk, tokens_k), factor, C,
    )  # fmt: skip
    if int8.q is not None:
        top += tl.load(int8.shift + bh * tokens_q + row + first, mask=valid, other=0.0)
    at = (number * tl.num_programs(1) + bh) * rows
    put(split.part + at * C.D, row, C.D, valid, acc / mass[:, None], C)
    tl.store(split.lse + at + row, top + tl.log2(mass), mask=valid)
