"""Two neighbouring query blocks in one program: the union of their lists, so that each key block on either is read once for both."""

import triton.language as tl
from dit_accel.kernels.triton.tuples import kernel


@kernel("W N PARTIAL")
def pair_lists(lists, counts, full, mask_of, found, q_blocks, width, C: tl.constexpr):
    """`found` (`tuples.Paired`): the key blocks that both of two query blocks keep whole, then all others that one of them visits.

    The code of an entry is that of the first block plus 4 times that of the second: 0 not visited, 1 in part, 2 whole. Where PARTIAL,
    `full` says how many of a list are whole, else all are. W: a power of two, at least `width`. Grid: (pairs, lists of q_blocks blocks).
    """
    pair, pairs, of_head = tl.program_id(0), tl.num_programs(0), tl.program_id(1).to(tl.int64)
    first = of_head * q_blocks + 2 * pair
    both = 2 * pair + 1 < q_blocks
    n_first = tl.load(counts + first)
    n_second = tl.load(counts + first + 1, mask=both, other=0)
    whole_first, whole_second = n_first, n_second
    if C.PARTIAL:
        whole_first = tl.load(full + first)
        whole_second = tl.load(full + first + 1, mask=both, other=0)
    at, at_second, to = first * width, (first + 1) * width, (of_head * pairs + pair) * 2 * width
    i = tl.arange(0, C.W)
    of_first, of_second = i < n_first, i < n_second
    mine = tl.load(lists + at + i, mask=of_first, other=-1)
    other = tl.load(lists + at_second + i, mask=of_second, other=-1)
    code = tl.where(i < whole_first, 2, 1)
    mask = tl.zeros([C.W], tl.int32)
    for start in range(0, n_second, C.N):
        n = start + tl.arange(0, C.N)
        entry = tl.load(lists + at_second + n, mask=n < n_second, other=-2)
        same = mine[:, None] == entry[None, :]
        code += tl.sum(tl.where(same, tl.where(n < whole_second, 8, 4)[None, :], 0), 1)
        if mask_of is not None:
            of_entry = tl.load(mask_of + at_second + n, mask=n < n_second, other=0)
            mask += tl.sum(tl.where(same, of_entry[None, :], 0), 1)
    known = tl.zeros([C.W], tl.int32)
    for start in range(0, n_first, C.N):
        n = start + tl.arange(0, C.N)
        entry = tl.load(lists + at + n, mask=n < n_first, other=-2)
        known += tl.sum((other[:, None] == entry[None, :]).to(tl.int32), 1)
    shared = (of_first & (code == 10)).to(tl.int32)
    left = (of_first & (code != 10)).to(tl.int32)
    alone = (of_second & (known == 0)).to(tl.int32)
    n_shared = tl.sum(shared, 0)
    place = to + tl.where(shared > 0, tl.cumsum(shared, 0), n_shared + tl.cumsum(left, 0)) - 1
    tl.store(found.blocks + place, mine, mask=of_first)
    tl.store(found.codes + place, code, mask=of_first)
    further = to + n_first + tl.cumsum(alone, 0) - 1
    tl.store(found.blocks + further, other, mask=alone > 0)
    tl.store(found.codes + further, tl.where(i < whole_second, 8, 4), mask=alone > 0)
    if mask_of is not None:
        tl.store(found.mask_of + 2 * place, tl.load(mask_of + at + i, mask=of_first, other=0), mask=of_first)
        tl.store(found.mask_of + 2 * place + 1, mask, mask=of_first)
        tl.store(found.mask_of + 2 * further, tl.zeros([C.W], tl.int32), mask=alone > 0)
        tl.store(found.mask_of + 2 * further + 1, tl.load(mask_of + at_second + i, mask=alone > 0, other=0), mask=alone > 0)
    tl.store(found.counts + of_head * pairs + pair, n_first + tl.sum(alone, 0))
    tl.store(found.full + of_head * pairs + pair, n_shared)
