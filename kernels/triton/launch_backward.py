"""From one call's gradients to kernel launches. Nothing here waits for the device, and every sum has a fixed order."""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.triton import backward, backward_linear, backward_slopes
from dit_accel.kernels.triton.launch import SUMMING, Call, Rests, Run, cdiv, execute, full_rounds, mask_words, state_groups
from dit_accel.kernels.triton.list_order import columns, spans_by_tile
from dit_accel.kernels.triton.tables import Machine
from dit_accel.kernels.triton.tuples import (
    LinearPull,
    Logits,
    Outer,
    Pair,
    PooledGradients,
    Pull,
    Rows,
    States,
    Sums,
    Tilt,
    Transposed,
    rows_of,
)

TINY = torch.finfo(torch.float32).tiny
LEAST = 16  # rows of a tile


# of pooled keys, values, biases, variances; slopes
Given = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Gradients(NamedTuple):
    """Gradients by argument; None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    pooled_k: Tensor | None
    pooled_v: Tensor | None
    pooled_bias: Tensor | None
    pooled_var: Tensor | None
    slopes: Tensor | None
    far_states: Tensor | None
    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments, machine: Machine, run: Run = execute) -> Gradients:
    """Gradients of `attend`, summed in an order that depends on the shapes alone. Raises ValueError for products in 8 bits, and for
    more pairs of blocks than 32 bits count."""
    if a.int8:
        raise ValueError("products of queries and keys in 8 bits have no gradients: leave int8 out where any are required")
    entries, tiles = a.lists.shape[-2] * a.lists.shape[-1], cdiv(a.q_width, LEAST)
    if entries * tiles >= 2**31:  # kernels count them in 32 bits
        raise ValueError(
            f"gradients require less than 2³¹ pairs of a visited block and {LEAST} of its queries for each head, not {entries * tiles:,}: "
            "keep fewer key blocks, or take larger blocks"
        )
    call = Call(a, machine, run)
    pull = Pull(rows_of(dout), lse, torch.empty_like(lse))
    if call.linear and not call.flags["LEFT"]:
        rests = call.linear_rest({"out": rows_of(out), "pull": pull, "dlse": dlse})
    else:
        grid = (cdiv(call.tokens_q, call.tile("merge").queries), call.bh)
        call.start(backward.deltas, "merge", grid, out=rows_of(out), dout=pull.dout, dlse=dlse, delta=pull.delta)
        rests = call.rest()
    transposed = columns(a.lists, a.counts, a.full, call.k_blocks, a.mask_of)
    linear = _linear(call, pull, rests) if call.linear else Linear()
    tilt = Tilt() if a.slopes is None else _tilt(call, pull, a.slopes)
    pooled, doffset = _pooled(call, pull, tilt, rests) if call.pooled else (PooledGradients(), linear.doffset)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a.q, a.k, a.v))
    rows_joined, columns_joined = call.joined("gradient_rows", "gradient_dense"), call.joined("gradient_columns", "gradient_shared")
    _rows(call, pull, tilt, rests, linear, dq, rows_joined)
    given = _given(call, pull, tilt, pooled)
    more = _linear_columns(call, linear, transposed)
    _columns(call, pull, rests, transposed, more, pooled, Pair(dk, dv), columns_joined)
    if call.text_q and not rows_joined:
        _dense_gradient(call, pull, dq)
    if a.text and not columns_joined:
        own = range(call.text_start, call.text_start + a.text)
        for full, part in zip((dk, dv), _shared(call, pull, a.k, a.v, call.logits, own, range(call.tokens_q)), strict=True):
            full[:, :, call.text_start : call.text_start + a.text] = part
    extra: tuple[Tensor | None, Tensor | None] = (None, None)
    if a.extra_k is not None and a.extra_v is not None:
        seen_by = range(call.image_start_q, call.image_start_q + call.image_q)
        extra = _shared(call, pull, a.extra_k, a.extra_v, call.unbiased, range(a.extra_k.shape[2]), seen_by)
    learned = linear.sums.weight
    return Gradients(dq, dk, dv, *extra, *given, linear.dfar, doffset, learned.state, learned.total)


class Linear(NamedTuple):
    """What the linear rest adds to dq `[BH, image_q, D]`, what comes back to it, what is summed for its keys and for what is learned, and
    the gradients of far states and the offset."""

    dq: Tensor | None = None
    pull: LinearPull | None = None
    sums: Sums = Sums()
    dfar: Tensor | None = None
    doffset: Tensor | None = None


def _linear(call: Call, pull: Pull, rests: Rests) -> Linear:
    """But for what it adds to keys and values, which is made of the sums: `_rows` makes these."""
    a, of_all, rows = call.a, call.summed(rests.states), (call.bh, call.image_q)
    programs = call.q_blocks * cdiv(call.q_width, call.tile("linear").queries)
    dnum, mean, mapped = (call.empty(*rows, call.channels, dtype=a.q.dtype) for _ in range(3))
    rest_pull = LinearPull(dnum, call.empty(*rows), call.empty(*rows), mapped, call.empty(call.bh, programs))
    more = call.empty(*rows, call.channels)
    doffset = None if a.offset is None else call.empty(call.bh, programs)
    call.start(
        backward_linear.linear_gradient, "linear", (programs, call.bh), **call.rows(), pull=pull, rest_pull=rest_pull, more=more,
        mean=mean, doffset=doffset, lists=call.lists, states=of_all, learned=call.learned,
    )  # fmt: skip
    sums, dfar = _outer(call, pull, rest_pull, mean)
    per_head = None if doffset is None else doffset.view(call.batch, call.heads, -1).sum((0, 2))
    return Linear(more, rest_pull, sums, dfar, per_head)


def _outer(call: Call, pull: Pull, rest_pull: LinearPull, mean: Tensor) -> tuple[Sums, Tensor | None]:
    """Parts of the gradients of the states and of the projection, and the gradient of far states, which is of the whole sums."""
    a, d, tile, left = call.a, call.channels, call.tile("outer"), call.flags["LEFT"]
    chunk = cdiv(cdiv(call.image_q, state_groups(call.bh, call.machine)), tile.queries) * tile.queries
    chunks = cdiv(call.image_q, chunk)

    def factors(x: Rows, y: Tensor) -> Outer:
        parts = States(call.empty(chunks, call.bh, d, d), call.empty(chunks, call.bh, d))
        return Outer(x, rows_of(y.view(call.batch, call.heads, call.image_q, d)), parts)

    of_states = None if left and a.far_states is None else factors(rows_of(a.q), rest_pull.num)
    of_weight = factors(pull.dout, mean) if call.residual else None
    first, further = (of_weight, None) if of_states is None else (of_states, of_weight)
    if first is None:
        return Sums(), None
    most = None if of_states is None else call.empty(chunks, call.bh)
    call.start(
        backward_linear.outer_sums, "outer", (chunks, call.bh, 1 if further is None else 2), a=first.a, b=first.b,
        rest_pull=None if of_states is None else rest_pull, states=first.states, most=most,
        further=first._replace(states=States()) if further is None else further,
        share=1.0 if of_states is None else 1 / call.image_k, first=call.image_start_q, rows=call.image_q, chunk=chunk,
        programs=rest_pull.most.shape[1],
    )  # fmt: skip
    sums, dfar = Sums(), None
    if of_states is not None and a.far_states is not None:
        whole = torch.cat([of_states.states.state.sum(0), of_states.states.total.sum(0)[:, None]], 1)  # type: ignore[union-attr]
        dfar = (whole * rest_pull.most.amax(1).clamp_min(TINY)[:, None, None]).unflatten(0, (call.batch, call.heads))
    if of_states is not None and not left:
        two = () if a.q.dtype == torch.float32 else (2,)
        found = States(call.empty(call.bh, *two, d, d, dtype=a.q.dtype), call.empty(call.bh, d))
        sums = Sums(of_states.states, found, Pair(most, call.empty(call.bh)))
    if of_weight is not None:
        sums = sums._replace(of_weight=of_weight.states, weight=States(call.empty(d, d), call.empty(d)))
    return sums, dfar


def _linear_columns(call: Call, linear: Linear, transposed: Transposed) -> Pair:
    """What the linear rest adds to dk and dv `[BH, image_k, D]`. `transposed`: the lists by key block."""
    a = call.a
    if not call.linear or linear.pull is None:
        return Pair()
    more = Pair(*(call.empty(call.bh, call.image_k, call.channels) for _ in range(2)))
    states, unit = States(), None
    if call.flags["LEFT"]:
        left = call.k_blocks - a.counts
        transposed = columns(call.lists.blocks.flip(-1), left, left, call.k_blocks)
    elif linear.sums.found.state is not None:
        states, unit = linear.sums.found, linear.sums.scaled.v
    call.start(
        backward_linear.linear_columns, "linear_columns", (call.k_blocks * cdiv(call.k_width, call.tile("linear_columns").keys), call.bh),
        k=rows_of(a.k), v=rows_of(a.v), rest_pull=linear.pull, more=more, transposed=transposed, lists=call.lists, states=states,
        unit=unit, entries=transposed.entries.shape[-1], programs=linear.pull.most.shape[1],
    )  # fmt: skip
    return more


def _tilt(call: Call, pull: Pull, slopes: Tensor) -> Tilt:
    """The pooled keys' deltas, and room for their share of each query's softmax."""
    tilt = Tilt(*(torch.empty_like(pull.delta) for _ in range(2)))
    programs = call.q_blocks * cdiv(call.q_width, call.tile("slopes").queries)
    call.start(
        backward_slopes.tilted_deltas, "slopes", (programs, call.bh), q=rows_of(call.a.q), pull=pull, tilt=tilt, slopes=slopes,
        lists=call.lists, logits=call.unbiased,
    )  # fmt: skip
    return tilt


def _given(call: Call, pull: Pull, tilt: Tilt, pooled: PooledGradients) -> Given:
    """The gradients of the pooled keys, values, biases, variances and slopes that are given; `tilt` has the share."""
    a = call.a
    if a.pooled_k is None or pooled.k_mean is None or pooled.v_mean is None or pooled.bias is None:
        return None, None, None, None, None
    dslopes = None
    if a.slopes is not None:
        dslopes = torch.empty_like(a.slopes)
        programs = cdiv(call.q_blocks, call.span) * cdiv(call.channels, call.tile("slopes").keys)
        call.start(
            backward_slopes.gradient_slopes, "slopes", (programs, call.bh), q=rows_of(a.q), pull=pull, tilt=tilt, dslopes=dslopes,
            lists=call.lists, logits=call.unbiased,
        )  # fmt: skip
    heads = (call.batch, call.heads)
    dvar = None if pooled.k_half is None else (pooled.k_half / 2).unflatten(0, heads)
    return pooled.k_mean.unflatten(0, heads), pooled.v_mean.unflatten(0, heads), pooled.bias.unflatten(0, heads), dvar, dslopes


def _pooled(call: Call, pull: Pull, tilt: Tilt, rests: Rests) -> tuple[PooledGradients, Tensor | None]:
    """The gradients by block, and that of the offset `[H]`."""
    a, pools = call.a, call.units * call.parts
    tiles = cdiv(pools, call.tile("pooled").keys)
    parts = full_rounds(tiles * call.bh, call.machine.units)
    sums = call.empty(3 if call.flags["VARIANCE"] else 2, parts, call.bh, pools, call.channels)
    offsets = None if a.offset is None else call.empty(parts, call.batch, call.heads, tiles)
    biases = None if a.pooled_bias is None else call.empty(parts, call.bh, pools)
    grads = PooledGradients(sums[0], sums[1], sums[2] if len(sums) == 3 else None, offsets, biases)
    of_pooled = pull if tilt.delta is None else pull._replace(delta=tilt.delta)
    transposed, entries = None, 0
    if a.pool_lists is not None and a.pool_counts is not None:
        transposed = spans_by_tile(a.pool_lists, a.pool_counts, call.tile("pooled").keys // call.parts, tiles)
        entries = transposed.entries.shape[-1]
    call.start(
        backward.gradient_pooled, "pooled", (tiles, call.bh, parts), q=rows_of(a.q), pull=of_pooled, pooled=rests.pooled, grads=grads,
        transposed=transposed, entries=entries, lists=call.lists, learned=call.learned, logits=call.unbiased,
    )  # fmt: skip
    # each a tensor of its own: an operator's outputs share no memory
    k_mean, v_mean, *k_half = (x.sum(0) for x in sums)
    whole = PooledGradients(k_mean, v_mean, *k_half)._replace(bias=None if biases is None else biases.sum(0))
    return whole, None if offsets is None else offsets.sum((0, 1, 3))


def _rows(call: Call, pull: Pull, tilt: Tilt, rests: Rests, linear: Linear, dq: Tensor, joined: int | None) -> None:
    """`joined`: tiles of the text's queries. What is left to sum for the linear rest is summed in the same launch."""
    a, programs = call.a, (joined or 0) + call.q_blocks * cdiv(call.q_width, call.tile("gradient_rows").queries)
    sums, summing, groups, entries = linear.sums, 0, 0, call.channels * call.channels
    if sums.parts.state is not None:
        summing, groups = cdiv(entries, SUMMING["E"]), len(sums.parts.state)
    if sums.of_weight.state is not None:
        summing, groups = summing + cdiv(cdiv(entries, SUMMING["E"] // 8), max(1, call.bh)), len(sums.of_weight.state)
    call.start(
        backward.gradient_rows, "gradient_rows", (programs + summing, call.bh), **call.rows(), extra=Pair(a.extra_k, a.extra_v), pull=pull,
        more=linear.dq, tilt=tilt, dq=dq, lists=call.lists, predicate=call.predicate, pooled=rests.pooled, learned=call.learned,
        logits=call.logits, text_tiles=joined, sums=sums, summing=summing, groups=groups, flags=SUMMING,
    )  # fmt: skip


def _columns(
    call: Call, pull: Pull, rests: Rests, transposed: Transposed, more: Pair, pooled: PooledGradients, grads: Pair, joined: int | None
) -> None:
    """`more`: what the linear rest adds; `joined`: tiles of the text's keys, whose bias is read with them alone."""
    programs = (joined or 0) + call.k_blocks * cdiv(call.k_width, call.tile("gradient_columns").keys)
    words, size = mask_words(call.a.masks_t)
    own = call.pooled and call.a.pooled_k is None  # the keys' means are made of the keys
    call.start(
        backward.gradient_columns, "gradient_columns", (programs, call.bh), **call.rows(), pull=pull, more=more,
        grads=grads, transposed=transposed, lists=call.lists,
        predicate=call.predicate._replace(masks=call.a.masks_t, mask_of=None), flags={"WORDS": words, "POOLED": own}, mask_size=size,
        pooled=rests.pooled, pooled_grads=pooled, logits=call.logits if joined else call.unbiased, entries=transposed.entries.shape[-1],
        text_tiles=joined,
    )  # fmt: skip


def _dense_gradient(call: Call, pull: Pull, dq: Tensor) -> None:
    """dq of the text's queries."""
    rows, first, tile = call.text_q, call.text_start_q, call.tile("gradient_dense")
    tiles = cdiv(rows, tile.queries)
    splits, chunk = call.splits(tiles, call.tokens_k, tile.keys)
    part = call.empty(splits, call.bh, rows, call.channels)
    call.start(
        backward.gradient_dense_rows, "gradient_dense", (tiles, call.bh, splits), **call.rows(), pull=pull, part=part, logits=call.logits,
        first=first, rows=rows, chunk=chunk,
    )  # fmt: skip
    dq[:, :, first : first + rows] = part.sum(0).view(call.batch, call.heads, rows, call.channels)


def _shared(call: Call, pull: Pull, k: Tensor, v: Tensor, logits: Logits, own: range, seen_by: range) -> tuple[Tensor, Tensor]:
    """Gradients `[B, H, keys, D]` float32 of the keys `own`, which all rows `seen_by` see."""
    tile, keys = call.tile("gradient_shared"), len(own)
    tiles = cdiv(keys, tile.keys)
    splits, chunk = call.splits(tiles, len(seen_by), tile.queries)
    dk, dv = (call.empty(splits, call.bh, keys, call.channels) for _ in range(2))
    call.start(
        backward.gradient_shared_keys, "gradient_shared", (tiles, call.bh, splits), q=rows_of(call.a.q), k=rows_of(k), v=rows_of(v),
        pull=pull, grads=Pair(dk, dv), logits=logits, first=own.start, keys=keys, begin=seen_by.start, end=seen_by.stop, chunk=chunk,
    )  # fmt: skip
    shape = (call.batch, call.heads, keys, call.channels)
    return dk.sum(0).view(shape), dv.sum(0).view(shape)
