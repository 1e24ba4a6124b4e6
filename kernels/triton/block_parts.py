"""Units cut by content, and the moments of their parts: key blocks from their tokens, groups from the parts of their members. The formulas
of method/parts/content.py and groups.py."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import TINY, head, placed, put, tile, times, vector, wide_dot
from dit_accel.kernels.triton.tuples import kernel


@triton.jit
def bounded(x, KIND: tl.constexpr):
    """x in the type KIND; float16, which ends early, over its largest entry."""
    if KIND == tl.float16:  # noqa: SIM300
        x *= 1.0 / tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0), TINY)
    return x.to(KIND)


@triton.jit
def positive(gram, sums, weight, half, FIRST: tl.constexpr):
    """Whether each element's projection onto the principal direction of its `half` is positive, all `[R]`; FIRST: all are one half.

    `gram` `[R, R]`: X M Xᵀ over some number, X the elements less their mean and M the metric; `sums`: Σ_d X; `weight`: 0 leaves one out.
    The direction is what four steps of power iteration on M Xᵀ w X, X now less the half's mean, leave of (1, ..., 1). Only projections are
    made. Those of a half have the mean 0, so that of the Gram matrix only the means of its columns have to be taken, and there is nothing
    between the halves, which are cut at once. Sums are over rows alone: in a product's result a row is in one warp.
    """
    if FIRST:
        steps = gram * weight[None, :]
        along = sums
    else:
        mine = tl.where(half[:, None] == half[None, :], weight[None, :], 0.0)
        inverse = 1.0 / tl.maximum(tl.sum(mine, 1), 1.0)
        means = tl.sum(gram * mine, 1) * inverse
        along = sums - tl.sum(mine * sums[None, :], 1) * inverse
        steps = (gram - means[None, :]) * mine
    for _ in range(4):
        along = tl.sum(steps * along[None, :], 1)
    return (along > 0) & (weight > 0)


@triton.jit
def mapped_by(metric, base, rows, stride, valid, share, C):
    """Rows of a matrix, less their mean by their `share`, times the metric, in its own type; 0 where not `valid`."""
    mapped = tl.zeros([rows.shape[0], C.DP], tl.float32)
    mapped = wide_dot(mapped, base, rows, stride, valid, None, metric, C.DP, False, 1, C)
    mapped = tl.where(valid[:, None], mapped - tl.sum(mapped * share[:, None], 0)[None, :], 0.0)
    return bounded(mapped, base.dtype.element_ty)


@triton.jit
def parts_of(gap, mapped, size, weight, KIND: tl.constexpr, C):
    """`parts_by` of `gap`: X, 0 for what has no `weight`, and `mapped`: X M."""
    gram = tl.dot(bounded(gap, KIND), tl.trans(mapped), input_precision=C.PRECISION)
    return parts_by(gram, tl.sum(gap, 1), size, weight, KIND, C)


@triton.jit
def parts_by(gram, sums, size, weight, KIND: tl.constexpr, C):
    """The part `[R]` of each element, int32: all are cut in two and, of four parts, each half again.

    `gram`, `sums`, `weight`: see `positive`; `size`: about the trace of X M Xᵀ, by which it is divided so that no step leaves the numbers.
    """
    if KIND == tl.float16:  # noqa: SIM300
        size = tl.max(tl.max(tl.abs(gram), 1), 0)
    gram *= 1.0 / tl.maximum(size, TINY)
    part = tl.where(positive(gram, sums, weight, weight, True), 1, 0)
    if C.PARTS > 2:
        part += tl.where(positive(gram, sums, weight, part, False), 2, 0)
    return part


@triton.jit
def members_of(part, filled):
    """Which part (row) each element is in: 1, else 0; `[16, R]`. Rows 0 to 3 are the parts, rows 4 to 7 they again (see `within`)."""
    number = tl.arange(0, 16)
    return tl.where((part[None, :] == (number % 4)[:, None]) & (number < 8)[:, None] & filled[None, :], 1.0, 0.0)


@triton.jit
def means_of(member, weight, size, x, to, KIND: tl.constexpr, C):
    """The means of the weighted elements x `[R, DP]` by part `[16, DP]`, which are stored from `to` on; 0 where there is none."""
    total = tl.dot((member * weight[None, :]).to(KIND), x.to(KIND), input_precision=C.PRECISION)
    means = total / tl.maximum(size, 1.0)[:, None]
    number = tl.arange(0, 16)
    put(to, number, C.D, number < C.PARTS, means, C)
    return means


@triton.jit
def within(gap, member, size, means, mean, KIND: tl.constexpr, C):
    """`gap`, elements less the mean of all, less how far their part's mean is from that: in the type KIND, and what that leaves of it."""
    number = tl.arange(0, 16)
    shifts = tl.where((size > 0)[:, None], mean[None, :] - means, 0.0)
    high = shifts.to(KIND)
    low = (shifts - high.to(tl.float32)).to(KIND)
    return tl.dot(tl.trans(member).to(KIND), tl.where((number < 4)[:, None], high, low), gap, input_precision=C.PRECISION)


@triton.jit
def put_parts(found, at, member, weight, size, spreads, v_spreads, cap, C):
    """Store the numbers of parts from those of their elements `[R]`; how much each element's covariance is damped."""
    share = member * weight[None, :] / tl.maximum(size, 1.0)[:, None]
    spread = tl.sum(share * spreads[None, :], 1)
    number = tl.arange(0, 16)
    put_numbers(found, at + number, number < C.PARTS, size, spread, tl.sum(share * v_spreads[None, :], 1), cap, C)
    return tl.sum(member * tl.where(number < 4, 1.0 / (1.0 + spread), 0.0)[:, None], 0)


@triton.jit
def put_numbers(found, at, used, tokens, spreads, v_spreads, cap, C):
    """Store numbers of tokens, variances and biases of parts, at `at` `[R]`."""
    bias = tl.minimum(spreads * 0.5, cap)
    if C.COUNT:
        bias += tl.log(tl.maximum(tokens, 1.0))
    tl.store(found.bias + at, tl.where(tokens > 0, bias, float("-inf")), mask=used)
    tl.store(found.tokens + at, tokens, mask=used)
    tl.store(found.spread + at, spreads, mask=used)
    tl.store(found.v_spread + at, v_spreads, mask=used)


@triton.jit
def error_of(size, spread, v_spread, cap):
    """What joins a unit's score: log n + min(σ²/2, cap) + log σ² + ½ log tr Var(v)."""
    error = tl.log(tl.maximum(spread, TINY)) + tl.log(tl.maximum(v_spread, TINY)) * 0.5
    return tl.where(size > 0, tl.log(tl.maximum(size, 1.0)) + tl.minimum(spread * 0.5, cap) + error, float("-inf"))


@triton.jit
def once_more(base, rows, stride, valid, C):
    """`tile`, a third read of the same: as another of the second's kind it would be taken for that, and held in between."""
    channel = tl.arange(0, C.DP)
    pointers = base + rows.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(pointers, mask=valid[:, None] & (channel < C.D)[None, :], other=0.0, eviction_policy="evict_last")


@triton.jit
def halves_of(x):
    """The first and the second half of the columns."""
    return tl.split(x.reshape(x.shape[0], 2, x.shape[1] // 2).trans(0, 2, 1))


@triton.jit
def put_rows(to, units, off, low, first, factor, C):
    """Some rows of a unit's matrix, from `first` on: of these channels `off`."""
    row = first + tl.arange(0, off.shape[1])
    product = tl.dot(tl.trans(off), low, input_precision=C.PRECISION) * factor
    put(to, row, units.to(tl.int64) * C.D, row < C.D, product, C)


@triton.jit
def put_slope(to, units, off, low, factor, C):
    """Store Σ off ⊗ low over elements, times `factor`, at `to`: row c of a unit's matrix is `units` · D from row c - 1.

    ROWS at once, or a quarter: all of a large matrix are more than the registers hold.
    """
    if C.DP <= C.ROWS:
        put_rows(to, units, off, low, 0, factor, C)
    else:
        SIZE: tl.constexpr = C.DP // 2
        first, second = halves_of(off)
        if C.DP <= 2 * C.ROWS:
            put_rows(to, units, first, low, 0, factor, C)
            put_rows(to, units, second, low, SIZE, factor, C)
        else:
            put_halves(to, units, first, low, 0, factor, C)
            put_halves(to, units, second, low, SIZE, factor, C)


@triton.jit
def put_halves(to, units, off, low, first, factor, C):
    """`put_rows` of more rows than it can hold."""
    SIZE: tl.constexpr = off.shape[1] // 2
    one, two = halves_of(off)
    put_rows(to, units, one, low, first, factor, C)
    put_rows(to, units, two, low, first + SIZE, factor, C)


@triton.jit
def some_channels(base, rows, stride, valid, channel, C):
    """Some channels of rows `[R, channels]`."""
    inside = valid[:, None] & (channel < C.D)[None, :]
    return tl.load(base + rows.to(tl.int64)[:, None] * stride + channel[None, :], mask=inside, other=0.0)


@triton.jit
def gaps_of(base, rows, stride, valid, channel, C):
    """Some channels of a block's rows `[R, channels]`; in float32 their mean, and the rows less it, 0 where there are none."""
    x = some_channels(base, rows, stride, valid, channel, C)
    mean = tl.sum(x.to(tl.float32), 0) / tl.maximum(tl.sum(tl.where(valid, 1.0, 0.0), 0), 1.0)
    return x, mean, tl.where(valid[:, None], x.to(tl.float32) - mean[None, :], 0.0)


@triton.jit
def off_of(base, rows, stride, valid, member, size, channel, C):
    """Of some channels of a block's rows the mean, the rows less it, the means by part `[16, channels]`, and `within` of all that."""
    x, mean, gap = gaps_of(base, rows, stride, valid, channel, C)
    KIND: tl.constexpr = x.dtype
    means = tl.dot(member.to(KIND), x, input_precision=C.PRECISION) / tl.maximum(size, 1.0)[:, None]
    return mean, gap, means, within(gap, member, size, means, mean, KIND, C)


@triton.jit
def gram_by_channels(metric, second, found, at_block, base, rows, stride, valid, C):
    """What `parts_by` has of a block's keys, and the sum of their gaps' squares by the means of q² (`second`). Stores the mean key."""
    share = tl.where(valid, 1.0, 0.0) / tl.maximum(tl.sum(tl.where(valid, 1.0, 0.0), 0), 1.0)
    gram = tl.zeros([C.BK, C.BK], tl.float32)
    sums = tl.zeros([C.BK], tl.float32)
    whole = tl.zeros([C.BK], tl.float32)
    for first in tl.range(0, C.DP, C.CW, num_stages=1):
        channel = first + tl.arange(0, C.CW)
        x, mean, gap = gaps_of(base, rows, stride, valid, channel, C)
        KIND: tl.constexpr = x.dtype
        tl.store(found.k_mean + at_block * C.D + channel, mean, mask=channel < C.D)
        whole += tl.sum(gap * gap * tl.load(second + channel, mask=channel < C.D, other=0.0)[None, :], 1)
        if C.PARTS > 1:
            mapped = tl.zeros([C.BK, C.CW], tl.float32)
            for at in tl.range(0, C.DP, C.STEP, num_stages=1):
                inner = at + tl.arange(0, C.STEP)
                inside = (inner < C.D)[:, None] & (channel < C.D)[None, :]
                matrix = tl.load(metric + inner[:, None] * C.D + channel[None, :], mask=inside, other=0.0)
                mapped = times(mapped, some_channels(base, rows, stride, valid, inner, C), matrix, C)
            mapped = tl.where(valid[:, None], mapped - tl.sum(mapped * share[:, None], 0)[None, :], 0.0)
            unit = 1.0
            if KIND == tl.float16:  # noqa: SIM300
                unit = tl.max(tl.max(tl.abs(gap), 1), 0) * tl.max(tl.max(tl.abs(mapped), 1), 0)  # see `bounded`
            gram += tl.dot(bounded(gap, KIND), tl.trans(bounded(mapped, KIND)), input_precision=C.PRECISION) * unit
            sums += tl.sum(gap, 1)
    return gram, sums, tl.sum(whole, 0)


@triton.jit
def spreads_by_channels(base, rows, stride, valid, member, size, to, moments, C):
    """Stores the means of a block's rows by part from `to` on; of each row the square of what is off its part's mean, by the `moments` of
    channels or, where that is None, as it is, and of all the sum of squares of the gaps."""
    number = tl.arange(0, 16)
    spreads = tl.zeros([C.BK], tl.float32)
    of_all = tl.zeros([C.BK], tl.float32)
    for first in tl.range(0, C.DP, C.CW, num_stages=1):
        channel = first + tl.arange(0, C.CW)
        _, gap, means, off = off_of(base, rows, stride, valid, member, size, channel, C)
        inside = (number < C.PARTS)[:, None] & (channel < C.D)[None, :]
        tl.store(to + number[:, None] * C.D + channel[None, :], means, mask=inside)
        squares = off * off
        if moments is not None:
            squares *= tl.load(moments + channel, mask=channel < C.D, other=0.0)[None, :]
        spreads += tl.sum(squares, 1)
        of_all += tl.sum(gap * gap, 1)
    return spreads, tl.sum(of_all, 0)


@triton.jit
def slopes_by_channels(to, units, k_base, v_base, rows, k_stride, v_stride, valid, member, size, damped, inverse, C):
    """Stores a block's slope, `put_slope` of rows that are read anew for each of its tiles."""
    for first in tl.range(0, C.DP, C.CW, num_stages=1):
        column = first + tl.arange(0, C.CW)
        _, _, _, v_off = off_of(v_base, rows, v_stride, valid, member, size, column, C)
        low = (v_off * damped[:, None]).to(v_base.dtype.element_ty)
        for at in tl.range(0, C.DP, C.CW, num_stages=1):
            row = at + tl.arange(0, C.CW)
            _, _, _, off = off_of(k_base, rows, k_stride, valid, member, size, row, C)
            product = tl.dot(tl.trans(off.to(low.dtype)), low, input_precision=C.PRECISION)
            pointers = to + row.to(tl.int64)[:, None] * units * C.D + column[None, :]
            tl.store(pointers, product * inverse, mask=(row < C.D)[:, None] & (column < C.D)[None, :])


@triton.jit
def summarise_by_channels(
    k_base, v_base, k_stride, v_stride, metric, second, found, place, valid, bh, block, scale, cap, score_cap, k_blocks, k_width, C
):  # fmt: skip
    """`summarise_parts` of a block of which not all channels fit the registers: CW at once, read anew wherever they are needed."""
    one = tl.where(valid, 1.0, 0.0)
    tokens = tl.sum(one, 0)
    inverse = 1.0 / tl.maximum(tokens, 1.0)
    at_block = bh * k_blocks + block
    gram, sums, whole = gram_by_channels(metric, second, found, at_block, k_base, place, k_stride, valid, C)
    part = tl.zeros([C.BK], tl.int32)
    if C.PARTS > 1:
        part = parts_by(gram, sums, whole, one, k_base.dtype.element_ty, C)
    offset = tl.arange(0, C.BK)
    tl.store(found.part + at_block * k_width + offset, part.to(tl.uint8), mask=offset < k_width)
    member = members_of(part, valid)
    size = tl.sum(member, 1)
    at = at_block * C.PARTS
    of_key, _ = spreads_by_channels(k_base, place, k_stride, valid, member, size, found.pooled_k + at * C.D, second, C)
    of_value, of_all = spreads_by_channels(v_base, place, v_stride, valid, member, size, found.pooled_v + at * C.D, None, C)
    square = scale * scale
    tl.store(found.score_bias + at_block, error_of(tokens, whole * square * inverse, of_all * inverse, score_cap))
    damped = put_parts(found, at, member, one, size, of_key * square, of_value, cap, C)
    if C.SLOPES:
        to = found.slope + (bh * C.D * k_blocks + block) * C.D
        slopes_by_channels(to, k_blocks, k_base, v_base, place, k_stride, v_stride, valid, member, size, damped, inverse, C)


@triton.jit
def summarise_at_once(
    k_base, v_base, k_stride, v_stride, metric, second, found, place, valid, count, bh, block, scale, cap, score_cap, k_blocks, k_width, C
):  # fmt: skip
    """`summarise_parts` of a block of `count` tokens all of whose channels fit the registers."""
    offset = tl.arange(0, C.BK)
    tokens = count.to(tl.float32)
    inverse = 1.0 / tl.maximum(tokens, 1.0)
    one = tl.where(valid, 1.0, 0.0)
    at_block = bh * k_blocks + block
    channel = tl.arange(0, C.DP)
    moments = vector(second, C) * (scale * scale)

    key = tile(k_base, place, k_stride, valid, C)
    KIND: tl.constexpr = key.dtype
    mean = tl.sum(key.to(tl.float32), 0) * inverse
    tl.store(found.k_mean + at_block * C.D + channel, mean, mask=channel < C.D)
    part = tl.zeros([C.BK], tl.int32)
    if C.PARTS > 1:
        mapped = mapped_by(metric, k_base, place, k_stride, valid, one * inverse, C)
        key = tile(k_base, place, k_stride, valid, C, True)  # not held meanwhile: there would be no registers for both
    gap = (key.to(tl.float32) - mean[None, :]) * one[:, None]
    whole = tl.sum(tl.sum(gap * gap * moments[None, :], 1), 0)
    if C.PARTS > 1:
        part = parts_of(gap, mapped, whole / (scale * scale), one, KIND, C)
        key = once_more(k_base, place, k_stride, valid, C)
        gap = (key.to(tl.float32) - mean[None, :]) * one[:, None]
    tl.store(found.part + at_block * k_width + offset, part.to(tl.uint8), mask=offset < k_width)
    member = members_of(part, valid)
    size = tl.sum(member, 1)
    means = means_of(member, one, size, key, found.pooled_k + at_block * C.PARTS * C.D, KIND, C)
    off = within(gap, member, size, means, mean, KIND, C)
    of_key = tl.sum(off * off * moments[None, :], 1)
    left = off.to(KIND)

    value = tile(v_base, place, v_stride, valid, C)
    means = means_of(member, one, size, value, found.pooled_v + at_block * C.PARTS * C.D, KIND, C)
    mean = tl.sum(value.to(tl.float32), 0) * inverse
    v_gap = (value.to(tl.float32) - mean[None, :]) * one[:, None]
    of_all = tl.sum(tl.sum(v_gap * v_gap, 1), 0) * inverse
    tl.store(found.score_bias + at_block, error_of(tokens, whole * inverse, of_all, score_cap))
    v_off = within(v_gap, member, size, means, mean, KIND, C)
    damped = put_parts(found, at_block * C.PARTS, member, one, size, of_key, tl.sum(v_off * v_off, 1), cap, C)
    if C.SLOPES:
        to = found.slope + (bh * C.D * k_blocks + block) * C.D
        put_slope(to, k_blocks, left, (v_off * damped[:, None]).to(KIND), inverse, C)


@kernel("D DP BK PARTS COUNT SLOPES ROWS CW STEP PRECISION")
def summarise_parts(
    k, v, metric, second, found, starts, places, scale, cap, score_cap, heads, image_start_k, k_blocks, k_width, C: tl.constexpr
):  # fmt: skip
    """One key block of at most BK tokens, cut in PARTS: all that `tuples.Parts` has. Grid: (key blocks, batch · heads).

    `metric` `[BH, D, D]` and its diagonal `second` `[BH, D]`: the means of q qᵀ and of q² over a head's queries, float32. CW: channels at
    once, DP where a program holds all of them.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    k_base = head(k, bh, heads) + image_start_k.to(tl.int64) * k.n
    v_base = head(v, bh, heads) + image_start_k.to(tl.int64) * v.n
    begin, end = tl.load(starts + block), tl.load(starts + block + 1)
    valid = begin + tl.arange(0, C.BK) < end
    place = placed(places, begin + tl.arange(0, C.BK), valid)
    of_head = metric if metric is None else metric + bh * C.D * C.D
    if C.CW < C.DP:
        summarise_by_channels(
            k_base, v_base, k.n, v.n, of_head, second + bh * C.D, found, place, valid, bh, block, scale, cap, score_cap, k_blocks,
            k_width, C,
        )  # fmt: skip
    else:
        summarise_at_once(
            k_base, v_base, k.n, v.n, of_head, second + bh * C.D, found, place, valid, end - begin, bh, block, scale, cap, score_cap,
            k_blocks, k_width, C,
        )  # fmt: skip


@kernel("D DP PARTS MEMBERS COUNT SLOPES ROWS LOWEST PRECISION")
def group_level(
    below, of_below, found, groups, metric, second, scale, cap, score_cap, first_below, slots, members, units, C: tl.constexpr
):  # fmt: skip
    """One group: the moments of its parts, whose elements are the parts of its MEMBERS members. Grid: (groups of the level, batch · heads).

    `below` (`tuples.Elements`): where the `of_below` units' parts of the members' level are, from unit `first_below` on; LOWEST: they are
    the key blocks', and are written to `found` (`tuples.Joined`) too, which has those of all levels' `units`. `groups` (`tuples.Groups`).
    """
    group, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    element = tl.arange(0, 16)
    used = element < C.MEMBERS * C.PARTS
    unit = first_below + members + group
    above = units - slots
    at_group = bh * above + unit - slots
    from_ = (bh * of_below + first_below + C.MEMBERS * group) * C.PARTS
    tokens = tl.load(below.tokens + from_ + element, mask=used, other=0.0)
    spreads = tl.load(below.spread + from_ + element, mask=used, other=0.0)
    v_spreads = tl.load(below.v_spread + from_ + element, mask=used, other=0.0)
    total = tl.sum(tokens, 0)
    share = tokens / tl.maximum(total, 1.0)
    filled = tokens > 0
    real = tl.where(filled, 1.0, 0.0)
    to = bh * units + unit
    tl.store(groups.total + to, total)

    k_base = below.key + from_ * C.D
    key, value = tile(k_base, element, C.D, used, C), tile(below.value + from_ * C.D, element, C.D, used, C)
    if C.LOWEST:
        same = bh * units + C.MEMBERS * group
        copied = same * C.PARTS
        put(found.key + copied * C.D, element, C.D, used, key, C)
        put(found.value + copied * C.D, element, C.D, used, value, C)
        put_numbers(found, copied + element, used, tokens, spreads, v_spreads, cap, C)
        for member in tl.static_range(C.MEMBERS):
            tl.store(groups.total + same + member, tl.sum(tl.where(element // C.PARTS == member, tokens, 0.0), 0))
    moments = vector(second + bh * C.D, C) * (scale * scale)
    channel = tl.arange(0, C.DP)
    mean, v_mean = tl.sum(key * share[:, None], 0), tl.sum(value * share[:, None], 0)
    tl.store(groups.middle + at_group * C.D + channel, mean, mask=channel < C.D)
    gap, v_gap = (key - mean[None, :]) * real[:, None], (value - v_mean[None, :]) * real[:, None]
    of_key = tl.sum(gap * gap * moments[None, :], 1)
    whole, of_all = tl.sum(share * (spreads + of_key), 0), tl.sum(share * (v_spreads + tl.sum(v_gap * v_gap, 1)), 0)
    tl.store(groups.score_bias + at_group, error_of(total, whole, of_all, score_cap))
    part = tl.zeros([16], tl.int32)
    if C.PARTS > 1:
        mapped = mapped_by(metric + bh * C.D * C.D, k_base, element, C.D, filled, share, C)
        part = parts_of(gap, mapped, tl.sum(tokens * of_key, 0) / (scale * scale), tokens, tl.float32, C)
    tl.store(groups.part + at_group * C.MEMBERS * C.PARTS + element, part.to(tl.uint8), mask=used)
    member = members_of(part, filled)
    size = tl.sum(member * tokens[None, :], 1)
    means = means_of(member, tokens, size, key, found.key + to * C.PARTS * C.D, tl.float32, C)
    off = within(gap, member, size, means, mean, tl.float32, C)
    means = means_of(member, tokens, size, value, found.value + to * C.PARTS * C.D, tl.float32, C)
    v_off = within(v_gap, member, size, means, v_mean, tl.float32, C)
    spreads += tl.sum(off * off * moments[None, :], 1)
    damped = put_parts(found, to * C.PARTS, member, tokens, size, spreads, v_spreads + tl.sum(v_off * v_off, 1), cap, C)
    if C.SLOPES:
        put_slope(groups.slope + (bh * C.D * above + unit - slots) * C.D, above, off, v_off * (damped * share)[:, None], 1.0, C)
