"""Backward of the linear rest: what each query pulls at the rest's numerator and mass, and what follows for queries, keys and values.

Apart from the exact keys' kernels, because both together would not fit the registers.

A pull is a gradient divided by a mass: at a loss scale of 2¹⁶ it exceeds float16. So each row is stored with a largest entry of 1 and its
`size` next to it, and where rows are summed the products of features carry the sizes, relative to the largest of the head: no operand of a
product in float16 is larger than its features or values make it, and every product is accumulated in float32.
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.forward import linear_visit, mapped_keys, rest_of
from dit_accel.kernels.triton.primitives import (
    LOG2E,
    TINY,
    feature,
    feature_gradient,
    head,
    listed_at,
    listed_keys,
    listed_queries,
    placed,
    put,
    split_dot,
    tile,
    vector,
)  # fmt: skip
from dit_accel.kernels.triton.tuples import Keys, Row, kernel


@kernel("D DP BQ BK SUB_Q SUB_K OWN MAP ALL LEFT RESIDUAL STAGES PRECISION")
def linear_gradient(
    q, k, v, pull, rest_pull, more, mean, doffset, lists, states, learned, heads, tokens_q, image_q, image_k, image_start_q, image_start_k,
    k_blocks, width, C: tl.constexpr,
):  # fmt: skip
    """`rest_pull`: gradients of the rest's numerator and mass, times the number of keys, over their row's size (0: no gradient), and
    phi(q); `more` `[BH, image_q, D]` float32: what they add to dq.

    Under the residual merge also the rest's `mean` `[BH, image_q, D]`, and delta without the residual's share; else doffset
    `[BH, programs]`.
    `states` are without the projection; LEFT as in `attend_rows`. Grid: (query blocks · SUB_Q, batch · heads).
    """
    block, sub = tl.program_id(0) // C.SUB_Q, tl.program_id(0) % C.SUB_Q
    bh = tl.program_id(1).to(tl.int64)
    start = image_start_k.to(tl.int64)
    image_keys = Keys(head(k, bh, heads) + start * k.n, head(v, bh, heads) + start * v.n, k.n, v.n)
    token = tl.load(lists.q_starts + block) + sub * C.BQ + tl.arange(0, C.BQ)
    valid = token < tl.load(lists.q_starts + block + 1)
    place = placed(lists.q_places, token, valid)
    q_base = head(q, bh, heads)
    phi_low = feature(tile(q_base, place + image_start_q, q.n, valid, C), C).to(q.base.dtype.element_ty)
    put(rest_pull.mapped + bh * image_q * C.D, place, C.D, valid, phi_low, C)
    taken = tl.zeros([C.BQ, C.DP], tl.float32)
    taken_mass = tl.zeros([C.BQ], tl.float32)
    at_list = listed_at(block, bh, tl.num_programs(0) // C.SUB_Q, C)
    row = Row(lists.blocks + at_list * width, None, None, 0, token, valid, 0, 0, None, None)
    listed = tl.load(lists.counts + at_list)
    first = listed if C.LEFT else listed * 0
    last = k_blocks if C.LEFT else listed
    of_keys = states.mapped
    if states.mapped is not None:
        of_keys += bh * image_k * C.D
    if not C.ALL:
        taken, taken_mass = linear_visit(taken, taken_mass, phi_low, image_keys, of_keys, row, first, last, lists, C)
    num, den = rest_of(phi_low, taken, taken_mass, states, bh, listed, k_blocks, image_k, C)
    real = den > 0
    safe = tl.where(real, den, 1.0)
    rest = num / safe[:, None]
    keys = image_k.to(tl.float32)
    at = bh * tokens_q + image_start_q + place
    mine = tl.load(pull.delta + at, mask=valid, other=0.0)
    dout = tile(head(pull.dout, bh, heads), place + image_start_q, pull.dout.n, valid, C)
    wide = dout.to(tl.float32)
    if C.RESIDUAL:
        residual = split_dot(rest.to(dout.dtype), learned.weight, 0, True, C) + vector(learned.bias, C)[None, :]
        tl.store(pull.delta + at, mine - tl.sum(wide * residual, 1), mask=valid)
        back = split_dot(dout, learned.weight, 0, False, C)
        numerator = tl.where(real[:, None], back * (keys / safe)[:, None], 0.0)
        mass = tl.where(real, -tl.sum(back * rest, 1) * (keys / safe), 0.0)
        put(mean + bh * image_q * C.D, place, C.D, valid, tl.where(real[:, None], rest, 0.0), C)
    else:
        shift = 0.0 if learned.offset is None else tl.load(learned.offset + bh % heads) * LOG2E
        weights = tl.where(real & valid, tl.exp2(shift - tl.load(pull.lse + at, mask=valid, other=0.0) * LOG2E), 0.0)
        numerator = wide * (weights * keys)[:, None]
        mass = -mine * weights * keys
        if learned.offset is not None:
            shifted = tl.sum(weights * den * (tl.sum(wide * rest, 1) - mine), 0)
            tl.store(doffset + bh * tl.num_programs(0) + tl.program_id(0), shifted)
    largest = tl.maximum(tl.max(tl.abs(numerator), 1), tl.abs(mass))
    shrink = 1.0 / tl.maximum(largest, TINY)
    mass *= shrink
    low = (numerator * shrink[:, None]).to(rest_pull.num.dtype.element_ty)
    put(rest_pull.num + bh * image_q * C.D, place, C.D, valid, low, C)
    tl.store(rest_pull.den + bh * image_q + place, mass, mask=valid)
    tl.store(rest_pull.size + bh * image_q + place, largest, mask=valid)
    dphi = tl.zeros([C.BQ, C.DP], tl.float32)
    if not C.ALL:
        for n in tl.range(first * C.SUB_K, last * C.SUB_K, num_stages=C.STAGES):
            _, k_valid, k_place = listed_keys(row, n, lists, C)
            value = tile(image_keys.v, k_place, v.n, k_valid, C).to(low.dtype)
            change = tl.where(k_valid[None, :], tl.dot(low, tl.trans(value), input_precision=C.PRECISION) + mass[:, None], 0.0)
            mapped = mapped_keys(image_keys, of_keys, k_place, k_valid, low.dtype, C)
            dphi = tl.dot(change.to(low.dtype), mapped, dphi, input_precision=C.PRECISION)
    dphi *= 1.0 / keys if C.LEFT else -1.0 / keys
    if states.state is not None:
        dphi += split_dot(low, states.state, bh, True, C) + mass[:, None] * vector(states.total + bh * C.D, C)[None, :]
    dphi *= largest[:, None]
    tl.store(rest_pull.most + bh * tl.num_programs(0) + tl.program_id(0), tl.max(tl.where(valid, largest, 0.0), 0))
    again = tile(q_base, place + image_start_q, q.n, valid, C)
    # nothing left means no mass and no pull
    put(more + bh * image_q * C.D, place, C.D, valid, feature_gradient(again, feature(again, C), dphi, C), C)


@triton.jit
def largest_size(rest_pull, bh, programs):
    """The largest size of one head's rows, but not 0."""
    found = tl.zeros([256], tl.float32)
    for at in range(0, programs, 256):
        place = at + tl.arange(0, 256)
        found = tl.maximum(found, tl.load(rest_pull.most + bh * programs + place, mask=place < programs, other=0.0))
    return tl.maximum(tl.max(found, 0), TINY)


@kernel("D DP BQ BK SUB_Q SUB_K OWN MAP ALL LEFT STAGES PRECISION")
def linear_columns(
    k, v, rest_pull, more, transposed, lists, states, unit, heads, image_q, image_k, image_start_k, entries, programs, C: tl.constexpr
):  # fmt: skip
    """What the linear rest adds to dk and dv: `more`, a pair of `[BH, image_k, D]` float32. Sums over all queries, less those that visit
    the block; LEFT: the entries are the query blocks that do not visit it, and the sums are those over them, without `states`.

    `transposed` as in `gradient_columns`; `programs`: of `linear_gradient` for each head. `states`: sums of phi(q)·dnum and phi(q)·dden
    over all queries, in units of the head's largest size, the first over `unit` `[BH]`. Grid: (key blocks · SUB_K, batch · heads).
    """
    block, sub = tl.program_id(0) // C.SUB_K, tl.program_id(0) % C.SUB_K
    bh = tl.program_id(1).to(tl.int64)
    token = tl.load(lists.k_starts + block) + sub * C.BK + tl.arange(0, C.BK)
    valid = token < tl.load(lists.k_starts + block + 1)
    place = placed(lists.k_places, token, valid)
    k_base = head(k, bh, heads)
    key = tile(k_base, place + image_start_k, k.n, valid, C)
    value = tile(head(v, bh, heads), place + image_start_k, v.n, valid, C)
    dphi = tl.zeros([C.BK, C.DP], tl.float32)
    taken = tl.zeros([C.BK, C.DP], tl.float32)
    largest = largest_size(rest_pull, bh, programs)
    if not C.ALL:
        shrink = 1.0 / largest
        kind = rest_pull.num.dtype.element_ty
        wide = value.to(kind)
        phi = feature(key, C).to(kind)
        entry = transposed.entries
        indptr = transposed.indptr + 2 * block
        if C.OWN:
            entry += bh * entries
            indptr += bh * (2 * (tl.num_programs(0) // C.SUB_K) + 1)
        begin, end = tl.load(indptr), tl.load(indptr + 2)
        column = Row(entry, None, None, 0, token, valid, 0, 0, None, None)
        for n in tl.range(begin * C.SUB_Q, end * C.SUB_Q, num_stages=C.STAGES):
            _, inside, row = listed_queries(column, n, lists, C)
            num = tile(rest_pull.num + bh * image_q * C.D, row, C.D, inside, C)
            den = tl.load(rest_pull.den + bh * image_q + row, mask=inside, other=0.0)
            weight = tl.load(rest_pull.size + bh * image_q + row, mask=inside, other=0.0) * shrink
            mapped = tile(rest_pull.mapped + bh * image_q * C.D, row, C.D, inside, C)
            product = tl.dot(phi, tl.trans(mapped), input_precision=C.PRECISION) * weight[None, :]
            taken = tl.dot(product.to(kind), num, taken, input_precision=C.PRECISION)
            change = (tl.dot(wide, tl.trans(num), input_precision=C.PRECISION) + den[None, :]) * weight[None, :]
            dphi = tl.dot(change.to(kind), mapped, dphi, input_precision=C.PRECISION)
    share = 1.0 / image_k.to(tl.float32)  # dnum and dden carry it
    # read again, and said to be another read: held through the loop, the features would cost registers
    again = tile(k_base, place + image_start_k, k.n, valid, C, True)
    mapped_again = feature(again, C)
    dphi *= share
    dv = taken * share
    if not C.LEFT:
        scale = tl.load(unit + bh)
        dphi = split_dot(value, states.state, bh, True, C) * scale + vector(states.total + bh * C.D, C)[None, :] - dphi
        dv = split_dot(mapped_again.to(value.dtype), states.state, bh, False, C) * scale - dv
    put(more.k + bh * image_k * C.D, place, C.D, valid, feature_gradient(again, mapped_again, dphi * largest, C), C)
    put(more.v + bh * image_k * C.D, place, C.D, valid, dv * largest, C)


@kernel("D DP BQ MAP STAGES PRECISION")
def outer_sums(a, b, rest_pull, states, most, further, share, heads, rows, first, chunk, programs, C: tl.constexpr):
    """Over one chunk of rows: Σ f(a)·bᵀ `[chunks, BH, D, D]` and Σ den·f(a) `[chunks, BH, D]` (`states`), times `share`, and the largest
    entry of the first (`most`, or None); f is phi times the row's relative size, or nothing where there is no `rest_pull`.

    `a` is read from row `first` on, b `[B, H, rows, D]` and the pull from row 0; `programs` as in `linear_columns`. `further`
    (`tuples.Outer`): another sum, in the second half of a third axis. Grid: (chunks, batch · heads, 2 with a further one).
    """
    bh = tl.program_id(1).to(tl.int64)
    if further.states.state is not None and tl.program_id(2) > 0:
        outer_part(further.a, further.b, None, None, further.states, None, 1.0, bh, heads, rows, first, chunk, C)
        return
    shrink = None if rest_pull is None else 1.0 / largest_size(rest_pull, bh, programs)
    outer_part(a, b, rest_pull, shrink, states, most, share, bh, heads, rows, first, chunk, C)


@triton.jit
def outer_part(a, b, rest_pull, shrink, states, most, share, bh, heads, rows, first, chunk, C):
    """One sum of `outer_sums`."""
    a_base, b_base = head(a, bh, heads), head(b, bh, heads)
    begin = tl.program_id(0) * chunk
    product = tl.zeros([C.DP, C.DP], tl.float32)
    total = tl.zeros([C.DP], tl.float32)
    for at in tl.range(begin, tl.minimum(begin + chunk, rows), C.BQ, num_stages=C.STAGES):
        row = at + tl.arange(0, C.BQ)
        valid = row < rows
        right = tile(b_base, row, b.n, valid, C)
        left = tile(a_base, row + first, a.n, valid, C)
        if rest_pull is None:
            total += tl.sum(left.to(tl.float32), 0)
        else:
            size = tl.load(rest_pull.size + bh * rows + row, mask=valid, other=0.0) * shrink
            left = feature(left, C) * size[:, None]
            total += tl.sum(left * tl.load(rest_pull.den + bh * rows + row, mask=valid, other=0.0)[:, None], 0)
        product = tl.dot(tl.trans(left.to(right.dtype)), right, product, input_precision=C.PRECISION)
    place = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + bh
    channel = tl.arange(0, C.DP)
    tl.store(states.total + place * C.D + channel, total * share, mask=channel < C.D)
    if most is not None:
        tl.store(most + place, tl.max(tl.max(tl.abs(product), 1), 0) * share)
    put(states.state + place * C.D * C.D, channel, C.D, channel < C.D, product * share, C)
