"""What spans of query blocks see of the units of all levels, the weights of it, and the mixtures of the units' slopes: the formulas of
method/parts/groups.py.

Units are counted by their slots, level after level. `codes` say of each unit what a span sees of it: -1 nothing, else its place on the
span's list times CODE, plus, of a key block, how many of the span's query blocks keep it.
"""

import triton
import triton.language as tl
from dit_accel.kernels.triton.block_choice import ordered
from dit_accel.kernels.triton.primitives import GONE
from dit_accel.kernels.triton.tuples import kernel

CODE = tl.constexpr(8)


@kernel("D DP SPAN BQ BK BD PRECISION")
def span_logits(
    q_mean, q_starts, joined, middle, score_bias, logits, scale, q_blocks, spans, pools, above, C: tl.constexpr
):  # fmt: skip
    """s · q · k + bias `[BH, spans, pools + above]` of the spans' mean queries and all pooled keys, and after these of the mean keys of the
    groups with what joins their scores. Grid: (tiles of spans, tiles of pooled keys and then of groups, batch · heads).

    No bias is less than GONE: what is made of it stays a number.
    """
    bh = tl.program_id(2).to(tl.int64)
    span = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    tiles = tl.cdiv(pools, C.BK)
    of_groups = tl.program_id(1) >= tiles
    first = tl.where(of_groups, tl.program_id(1) - tiles, tl.program_id(1)) * C.BK
    column = first + tl.arange(0, C.BK)
    pool, group = column < tl.where(of_groups, 0, pools), column < tl.where(of_groups, above, 0)
    acc = tl.zeros([C.BQ, C.BK], tl.float32)
    for at in tl.static_range(0, C.DP, C.BD):
        channel = at + tl.arange(0, C.BD)
        mean = span_means(q_mean + bh * q_blocks * C.D, q_starts, span, channel, q_blocks, C)
        offset = column.to(tl.int64)[:, None] * C.D + channel[None, :]
        real = (channel < C.D)[None, :]
        key = tl.load(joined.key + bh * pools * C.D + offset, mask=pool[:, None] & real, other=0.0)
        key += tl.load(middle + bh * above * C.D + offset, mask=group[:, None] & real, other=0.0)
        acc = tl.dot(mean, tl.trans(key), acc, input_precision=C.PRECISION)
    bias = tl.load(joined.bias + bh * pools + column, mask=pool, other=0.0)
    bias += tl.load(score_bias + bh * above + column, mask=group, other=0.0)
    found = acc * scale + tl.maximum(bias, GONE)[None, :]
    to = logits + (bh * spans + span)[:, None] * (pools + above) + (tl.where(of_groups, pools, 0) + column)[None, :]
    tl.store(to, found, mask=(span < spans)[:, None] & (pool | group)[None, :])


@triton.jit
def span_means(q_mean, q_starts, span, channel, q_blocks, C):
    """The mean queries `[R, channels]` of spans, from those of their query blocks."""
    total = tl.zeros([span.shape[0], channel.shape[0]], tl.float32)
    tokens = tl.zeros([span.shape[0]], tl.float32)
    for number in tl.static_range(C.SPAN):
        block = span * C.SPAN + number
        inside = block < q_blocks
        size = tl.load(q_starts + block + 1, mask=inside, other=0) - tl.load(q_starts + block, mask=inside, other=0)
        mean = tl.load(
            q_mean + block.to(tl.int64)[:, None] * C.D + channel[None, :], mask=inside[:, None] & (channel < C.D)[None, :], other=0.0
        )
        total += size.to(tl.float32)[:, None] * mean
        tokens += size.to(tl.float32)
    return total / tl.maximum(tokens, 1.0)[:, None]


@triton.jit
def largest(x, j, n, top):
    """Whether an entry of `x` `[W]`, of which the first `n` count, is among the `top` largest; ties to the first.

    Bisection on the bits of the threshold, as in `block_choice.take_best`.
    """
    key = tl.where(j < n, ordered(x + 0.0), -2147483648)  # + 0.0: -0 ties with 0
    threshold = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= top, 0, -2147483648)
    for bit in tl.static_range(31):
        trial = threshold | (1 << (30 - bit))
        threshold = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= top, trial, threshold)
    above = key > threshold
    tied = ((key == threshold) & (j < n)).to(tl.int32)
    spare = top - tl.sum(above.to(tl.int32), 0)
    return above | ((tied > 0) & (tl.cumsum(tied, 0) <= spare))


@triton.jit
def kept_slots(lists, counts, place, span, bh, q_blocks, width, W: tl.constexpr, C):
    """How many of a span's query blocks keep the key block of each slot `[W]`."""
    slot = tl.arange(0, W)
    found = tl.zeros([W], tl.int32)
    for number in range(C.SPAN):
        block = tl.minimum(span * C.SPAN + number, q_blocks - 1)
        row = (bh * q_blocks if C.OWN else 0) + block
        count = tl.where(span * C.SPAN + number < q_blocks, tl.load(counts + row), 0)
        for at in range(0, count, C.N):
            n = at + tl.arange(0, C.N)
            entry = tl.load(lists + row.to(tl.int64) * width + n, mask=n < count, other=0)
            mine = tl.load(place + entry, mask=n < count, other=-1)
            found += tl.sum((mine[:, None] == slot[None, :]).to(tl.int32), 0)
    return found


@triton.jit
def members_seen(candidates, kept, scores, total, codes, slots, opened, UP: tl.constexpr, C):
    """One level: which of its `candidates` `[units]` are opened, as the candidates of the level below. The code of one that is seen itself
    is 0 until its place is known. UP: how many levels are above it; `kept`: see `kept_slots`."""
    LEVEL: tl.constexpr = C.LEVELS - 1 - UP
    W: tl.constexpr = C.ROOTS * 4**UP
    n = slots // 4**LEVEL
    j = tl.arange(0, W)
    unit = (slots - n) // 3 * 4 + j  # those of the levels below come first
    size = tl.load(total + unit, mask=j < n, other=0.0)
    candidate = (candidates > 0) & (size > 0)
    score = tl.load(scores + unit, mask=j < n, other=float("-inf"))
    best = largest(tl.where(candidate, score, float("-inf")), j, n, tl.minimum(opened, n))
    held = tl.max(tl.reshape(kept, [W, 4**LEVEL]), 1) > 0
    open_ = candidate & (best | held)
    tl.store(codes + unit, tl.where(candidate & ~open_, 0, -1), mask=j < n)
    return tl.reshape(tl.broadcast_to(open_.to(tl.int32)[:, None], [W, 4]), [W * 4])


@kernel("PARTS SPAN OWN ROOTS LEVELS N LIST")
def see_units(
    logits, total, lists, counts, place, codes, pool_lists, pool_counts, shares, q_blocks, width, spans, pools, slots, units, opened,
    pool_width, C: tl.constexpr,
):  # fmt: skip
    """What one span sees: `codes` `[BH, spans, units]`, its list, ascending, and how long that is; behind it there are zeros, in `shares`
    `[BH, spans, n, PARTS]` (or None) too. Grid: (spans, batch · heads).

    From the last level down a unit is opened, so that its members are seen in its place, if some query block keeps one of its key blocks or
    if it is among the `opened` of its level with the largest score. The levels are in registers, 4ⁿ times ROOTS units of which the first
    are real: a unit's members are the next level's in its place.
    """
    span, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    W: tl.constexpr = C.ROOTS * 4 ** (C.LEVELS - 1)
    row = bh * spans + span
    scores = logits + row * (pools + units - slots) + pools - slots
    mine = codes + row * units
    kept = kept_slots(lists, counts, place, span, bh, q_blocks, width, W, C)
    candidates = tl.full([C.ROOTS], 1, tl.int32)
    for up in tl.static_range(C.LEVELS - 1):
        candidates = members_seen(candidates, kept, scores, total + bh * units, mine, slots, opened, up, C)
    slot = tl.arange(0, W)
    size = tl.load(total + bh * units + slot, mask=slot < slots, other=0.0)
    seen = ((candidates > 0) & (size > 0)).to(tl.int32)
    at = tl.cumsum(seen, 0) - 1
    tl.store(pool_lists + row * pool_width + at, slot, mask=(seen > 0) & (at < pool_width))
    tl.store(mine + slot, tl.where(seen > 0, at * CODE + kept, -1), mask=slot < slots)
    count = tl.sum(seen, 0)
    if C.LEVELS > 1:
        tl.debug_barrier()  # what follows reads what other threads of this program wrote
        j = tl.arange(0, W // 4)
        n, first = slots // 4, slots
        for _ in range(C.LEVELS - 1):
            group = (tl.load(mine + first + j, mask=j < n, other=-1) >= 0).to(tl.int32)  # also if another thread wrote it meanwhile
            at_list = count + tl.cumsum(group, 0) - 1
            tl.store(pool_lists + row * pool_width + at_list, first + j, mask=(group > 0) & (at_list < pool_width))
            tl.store(mine + first + j, at_list * CODE, mask=group > 0)
            count += tl.sum(group, 0)
            first, n = first + n, n // 4
    tl.store(pool_counts + row, count)
    entry = tl.arange(0, C.LIST)
    tl.store(pool_lists + row * pool_width + entry, tl.zeros([C.LIST], tl.int32), mask=(entry >= count) & (entry < pool_width))
    if shares is not None:
        for part in tl.static_range(C.PARTS):
            to = shares + (row * pool_width + entry) * C.PARTS + part
            tl.store(to, tl.zeros([C.LIST], tl.float32), mask=(entry >= count) & (entry < pool_width))


@triton.jit
def logits_of(logits, codes, unit, inside, mates, C):
    """The logits `[R, PARTS]` of the parts of units, -inf where a span does not see them, and their codes. A key block counts by the share
    of the span's `mates` query blocks that do not keep it."""
    code = tl.load(codes + unit, mask=inside, other=-1)
    seen = code >= 0
    part = tl.arange(0, C.PARTS)
    found = tl.load(logits + unit[:, None] * C.PARTS + part[None, :], mask=seen[:, None], other=float("-inf"))
    left = 1.0 - tl.where(seen, code % CODE, 0).to(tl.float32) / mates
    return tl.where((seen & (left > 0))[:, None], found + tl.log(tl.maximum(left, 1e-9))[:, None], float("-inf")), code


@kernel("PARTS SPAN LEVELS W")
def weigh_units(logits, total, codes, shares, own, q_blocks, spans, pools, slots, units, pool_width, C: tl.constexpr):
    """The share of each pooled key that a span sees in the softmax of its mean query, `shares` `[BH, spans, n, PARTS]` as on its list; and
    `own` `[BH, spans, units]`: what each unit's slope is multiplied by: its parts' shares together, and those of the groups that it is in,
    by its share of their tokens. Grid: (spans, batch · heads).
    """
    span, bh = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row = bh * spans + span
    logits += row * (pools + units - slots)
    codes += row * units
    total += bh * units
    mates = tl.minimum(q_blocks - span * C.SPAN, C.SPAN).to(tl.float32)
    top = tl.full([C.W], float("-inf"), tl.float32)
    mass = tl.zeros([C.W], tl.float32)
    for at in range(0, units, C.W):
        unit = at + tl.arange(0, C.W)
        found, _ = logits_of(logits, codes, unit, unit < units, mates, C)
        new = tl.maximum(top, tl.max(found, 1))
        finite = tl.where(new == float("-inf"), 0.0, new)
        mass = mass * tl.exp(top - finite) + tl.sum(tl.exp(found - finite[:, None]), 1)
        top = new
    highest = tl.max(top, 0)
    highest = tl.where(highest == float("-inf"), 0.0, highest)
    whole = tl.sum(mass * tl.exp(top - highest), 0)
    inverse = 1.0 / tl.maximum(whole, 1.1754944e-38)
    n, first = slots, 0
    for level in range(C.LEVELS):
        for at in range(0, n, C.W):
            j = at + tl.arange(0, C.W)
            inside = j < n
            found, code = logits_of(logits, codes, first + j, inside, mates, C)
            share = tl.exp(found - highest) * inverse
            entry = row * pool_width + code // CODE
            part = tl.arange(0, C.PARTS)
            tl.store(shares + entry[:, None] * C.PARTS + part[None, :], share, mask=((code >= 0) & inside)[:, None])
            weight = tl.sum(share, 1)
            size = tl.load(total + first + j, mask=inside, other=0.0)
            group, above, of_level = j, first, n
            for _ in range(level + 1, C.LEVELS):
                group, above, of_level = group // 4, above + of_level, of_level // 4
                of_group, _ = logits_of(logits, codes, above + group, inside, mates, C)
                of_all = tl.load(total + above + group, mask=inside, other=1.0)
                weight += tl.sum(tl.exp(of_group - highest), 1) * inverse * size / tl.maximum(of_all, 1.0)
            tl.store(own + row * units + first + j, weight, mask=inside)
        first, n = first + n, n // 4


@triton.jit
def mixed(acc, weight, at, valid, rows, base, units, C):
    """acc `[BQ, DP]` plus weights `[BQ]` rows of them from `weight` on, times a row of each of `units` matrices, `[units, D]`."""
    channel = tl.arange(0, C.DP)
    for first in tl.range(0, units, C.BK, num_stages=C.STAGES):
        unit = first + tl.arange(0, C.BK)
        left = tl.load(weight + at[:, None] * rows + unit[None, :], mask=valid[:, None] & (unit < units)[None, :], other=0.0)
        right = tl.load(base + unit[:, None] * C.D + channel[None, :], mask=(unit < units)[:, None] & (channel < C.D)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=C.PRECISION)
    return acc


@kernel("D DP BQ BK STAGES PRECISION")
def mix_units(weight, slope, slope_above, out, spans, slots, above, C: tl.constexpr):
    """Row c of the mixtures of matrices: out `[BH, spans, D, D]` = Σ weight `[BH, spans, slots + above]` · slope, of `slope`
    `[BH, D, slots, D]` and then `slope_above` `[BH, D, above, D]` (or None). Grid: (tiles of mixtures, D, batch · heads).
    """
    row, bh = tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = tl.program_id(0) * C.BQ + tl.arange(0, C.BQ)
    valid = span < spans
    at = bh * spans + span
    units = slots + above
    acc = tl.zeros([C.BQ, C.DP], tl.float32)
    acc = mixed(acc, weight, at, valid, units, slope + (bh * C.D + row) * slots * C.D, slots, C)
    if slope_above is not None:
        acc = mixed(acc, weight + slots, at, valid, units, slope_above + (bh * C.D + row) * above * C.D, above, C)
    channel = tl.arange(0, C.DP)
    tl.store(out + (at[:, None] * C.D + row) * C.D + channel[None, :], acc, mask=valid[:, None] & (channel < C.D)[None, :])
