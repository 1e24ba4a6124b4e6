"""Sums of parts that the programs of another launch wrote, in the order of their numbers: matrices of a linear rest."""

import triton
import triton.language as tl
from dit_accel.kernels.triton.primitives import TINY
from dit_accel.kernels.triton.tuples import kernel


@triton.jit
def put_parts(base, number, place, x, inside, size):
    """Store some entries of a float32 matrix of `size` entries, the `number`th of `base`: as they are or, in a narrower type, as the sums
    of two of them, for the tensor cores: 16 bits of them instead of 8 or 11."""
    if base.dtype.element_ty == tl.float32:
        tl.store(base + number * size + place, x, mask=inside)
    else:
        high = x.to(base.dtype.element_ty)
        tl.store(base + 2 * number * size + place, high, mask=inside)
        tl.store(base + (2 * number + 1) * size + place, (x - high.to(tl.float32)).to(base.dtype.element_ty), mask=inside)


@triton.jit
def sum_tile(parts, found, scaled, number, tile_number, groups, heads, E: tl.constexpr, N: tl.constexpr, C):
    """E entries of one head's sums over the first axis of `parts` (`tuples.States` `[groups, BH, ..]`, `heads` = BH), matrices as
    `put_parts` stores them. Totals that are None are left out.

    `scaled`: None, or the largest entry of each part `[groups, BH]` and where to write `[BH]` over what the sum is divided: so that none of
    it exceeds 2¹⁰, and in float16 little of it is no normal number.
    """
    place = tile_number * E + tl.arange(0, E)
    size: tl.constexpr = C.D * C.D
    inside = place < size
    acc = tl.zeros([E], tl.float32)
    few = tl.zeros([E], tl.float32)
    most = tl.zeros([N], tl.float32)
    for first in range(0, groups, N):  # some at once, so that many loads are on the way
        group = first + tl.arange(0, N)
        at = ((group.to(tl.int64) * heads + number) * size)[:, None] + place[None, :]
        acc += tl.sum(tl.load(parts.state + at, mask=(group < groups)[:, None] & inside[None, :], other=0.0), 0)
        if parts.total is not None:
            at = ((group.to(tl.int64) * heads + number) * C.D)[:, None] + place[None, :]
            few += tl.sum(tl.load(parts.total + at, mask=(group < groups)[:, None] & (place < C.D)[None, :], other=0.0), 0)
        if scaled is not None:
            most += tl.load(scaled.k + group.to(tl.int64) * heads + number, mask=group < groups, other=0.0)
    if scaled is not None:
        unit = tl.maximum(tl.sum(most, 0) * 2.0**-10, TINY)
        acc *= 1.0 / unit
        if tile_number == 0:
            tl.store(scaled.v + number, unit)
    put_parts(found.state, number, place, acc, inside, size)
    if parts.total is not None:
        tl.store(found.total + number * C.D + place, few, mask=place < C.D)


@triton.jit
def weight_tile(weight, of_weight, number, tile_number, E: tl.constexpr, C):
    """E entries of a matrix `[D, D]` as the `number`th of those that `put_parts` stores."""
    place = tile_number * E + tl.arange(0, E)
    inside = place < C.D * C.D
    put_parts(of_weight, number, place, tl.load(weight + place, mask=inside, other=0.0), inside, C.D * C.D)


@kernel("D E N")
def sum_states(parts, weight, found, of_weight, groups, heads, C: tl.constexpr):
    """`sum_tile` of every head and, after them, `weight` `[D, D]` stored so. What is None is left out.

    Grid: (tiles of E entries, batch · heads and one more of a weight).
    """
    number = tl.program_id(1).to(tl.int64)
    if number < heads:
        if parts.state is not None:
            sum_tile(parts, found, None, number, tl.program_id(0), groups, heads, C.E, C.N, C)
    else:
        if weight is not None:
            weight_tile(weight, of_weight, 0, tl.program_id(0), C.E, C)
