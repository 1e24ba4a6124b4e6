"""From one call's gradients to kernel launches. Nothing here waits for the device, and every sum has a fixed order."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.triton import backward, backward_linear
from dit_accel.kernels.triton.launch import STATE_GROUPS, Call, Rests, Run, execute, halves, strides, up
from dit_accel.kernels.triton.tables import Machine

TINY = torch.finfo(torch.float32).tiny


class Gradients(NamedTuple):
    """Gradients by argument; None where there is none."""

    q: Tensor
    k: Tensor
    v: Tensor
    extra_k: Tensor | None
    extra_v: Tensor | None
    offset: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments, machine: Machine, run: Run = execute) -> Gradients:
    """Gradients of `attend`, summed in an order that depends on the shapes alone."""
    call = Call(a, machine, run)
    delta = torch.empty_like(lse)
    call.start(
        backward.deltas, "merge", (up(call.tokens, call.tile("merge").queries), call.bh), out=out, dout=dout, dlse=dlse, delta=delta,
        **strides("o", out), **strides("g", dout), tokens=call.tokens,
    )  # fmt: skip
    rests = call.rest()
    pull = {"dout": dout, "lse": lse, "delta": delta, **strides("g", dout)}
    turned = columns(a.lists, a.counts, a.full, call.k_blocks)
    linear = _linear(call, pull, rests, turned) if call.linear else Linear()
    pooled = _pooled(call, pull, rests) if call.pooled else Pooled()
    dq, dk, dv = (torch.empty(a.q.shape, dtype=a.q.dtype, device=a.q.device) for _ in range(3))
    _rows(call, pull, rests, linear, dq)
    _columns(call, pull, rests, turned, linear, pooled, dk, dv)
    if a.text:
        _dense_gradient(call, pull, dq)
        for full, part in zip((dk, dv), _shared(call, pull, a.k, a.v, call.key_bias, call.text_start, a.text, 0, call.tokens), strict=True):
            full[:, :, call.text_start : call.text_start + a.text] = part
    extra: tuple[Tensor | None, Tensor | None] = (None, None)
    if a.extra_k is not None and a.extra_v is not None:
        extra = _shared(call, pull, a.extra_k, a.extra_v, None, 0, a.extra_k.shape[2], call.image_start, call.image)
    doffset = linear.doffset if call.linear else pooled.doffset
    return Gradients(dq, dk, dv, *extra, doffset, linear.dweight, linear.dbias)


Columns = tuple[Tensor, Tensor]  # entries and borders


class Linear(NamedTuple):
    """What the linear rest adds to dq, dk and dv `[BH, image, D]`, and the gradients of what is learned."""

    dq: Tensor | None = None
    dk: Tensor | None = None
    dv: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    doffset: Tensor | None = None


class Pooled(NamedTuple):
    """Gradients `[BH, Tk, D]` of the pooled keys, values and half variances, `[H]` of the offset."""

    dk_mean: Tensor | None = None
    dv_mean: Tensor | None = None
    dk_half: Tensor | None = None
    doffset: Tensor | None = None


def _linear(call: Call, pull: dict[str, Any], rests: Rests, turned: Columns) -> Linear:
    """`turned`: the lists by key block."""
    a = call.a
    dnum, mean = (call.empty(call.bh, call.image, call.channels, dtype=a.q.dtype) for _ in range(2))
    dden, size = (call.empty(call.bh, call.image) for _ in range(2))
    more_q, more_k, more_v = (call.empty(call.bh, call.image, call.channels) for _ in range(3))
    programs = call.q_blocks * up(call.q_width, call.tile("linear").queries)
    doffset = None if a.offset is None else call.empty(call.bh, programs)
    call.start(
        backward_linear.linear_gradient, "linear", (programs, call.bh), **call.rows("q", "k", "v"), **pull, dnum=dnum, dden=dden,
        size=size, more=more_q, mean=mean, doffset=doffset, **call.listed(), offset=a.offset, total=rests.total, bias=a.bias,
        state=halves(rests.state, a.q.dtype), weight=halves(a.weight, a.q.dtype),
        tokens=call.tokens, image=call.image, image_start=call.image_start, k_blocks=call.k_blocks, RESIDUAL=call.residual,
    )  # fmt: skip
    unit = size.amax(1).clamp_min(TINY)
    relative = size / unit[:, None]
    state = total = largest = None
    if call.flags["LEFT"]:
        left = call.k_blocks - a.counts
        turned = columns(call.lists.flip(-1), left, left, call.k_blocks)
    else:
        state, total = _outer(call, a.q, dnum, relative, dden, call.flags["MAP"], 1 / call.image)
        largest = state.abs().amax((1, 2)).clamp_min(TINY)  # halves of a small matrix would be no normal numbers in float16
        state = state / largest[:, None, None]
    call.start(
        backward_linear.linear_columns, "linear_columns", (call.k_blocks * up(call.k_width, call.tile("linear_columns").keys), call.bh),
        **call.rows("q", "k", "v"), dnum=dnum, dden=dden, relative=relative, more_k=more_k, more_v=more_v, **_turned(turned),
        q_starts=a.q_starts, k_starts=a.k_starts, pull_state=halves(state, a.q.dtype), pull_total=total,
        pull_size=largest, pull_unit=unit, image=call.image, image_start=call.image_start,
    )  # fmt: skip
    shared: tuple[Tensor | None, Tensor | None] = (None, None)
    if call.residual:
        products, sums = _outer(call, pull["dout"], mean, None, None, -1, 1.0)
        shared = (products.sum(0), sums.sum(0))
    per_head = None if doffset is None else doffset.view(call.batch, call.heads, -1).sum((0, 2))
    return Linear(more_q, more_k, more_v, *shared, per_head)


def _outer(
    call: Call, x: Tensor, y: Tensor, relative: Tensor | None, factor: Tensor | None, feature_map: int, share: float
) -> tuple[Tensor, Tensor]:
    """Σ f(x)·yᵀ `[BH, D, D]` and Σ factor·f(x) `[BH, D]` over the image's rows, times `share`; see `outer_sums`."""
    tile = call.tile("outer")
    chunk = up(up(call.image, STATE_GROUPS), tile.queries) * tile.queries
    chunks = up(call.image, chunk)
    products, sums = call.empty(chunks, call.bh, call.channels, call.channels), call.empty(chunks, call.bh, call.channels)
    y = y.view(call.batch, call.heads, call.image, call.channels)
    call.start(
        backward_linear.outer_sums, "outer", (chunks, call.bh), a=x, b=y, relative=relative, factor=factor, products=products, sums=sums,
        **strides("a", x), **strides("b", y), first=call.image_start, rows=call.image, chunk=chunk, share=share, MAP=feature_map,
    )  # fmt: skip
    return products.sum(0), sums.sum(0)


def _pooled(call: Call, pull: dict[str, Any], rests: Rests) -> Pooled:
    a = call.a
    dk_mean, dv_mean, dk_half = (call.empty(call.bh, call.k_blocks, call.channels) for _ in range(3))
    tiles = up(call.k_blocks, call.tile("pooled").keys)
    doffset = None if a.offset is None else call.empty(call.bh, tiles)
    given = call.pooled_arguments(rests)
    names = ("k_mean", "v_mean", "k_half", "bits", "bits_bh", "bits_row", "offset", "k_blocks", "cap")
    call.start(
        backward.gradient_pooled, "pooled", (tiles, call.bh), **call.rows("q"), **pull, **{name: given[name] for name in names},
        dk_mean=dk_mean, dv_mean=dv_mean, dk_half=dk_half, doffset=doffset, q_starts=a.q_starts, k_starts=a.k_starts, tokens=call.tokens,
        image_start=call.image_start, q_blocks=call.q_blocks,
    )  # fmt: skip
    return Pooled(dk_mean, dv_mean, dk_half, None if doffset is None else doffset.view(call.batch, call.heads, -1).sum((0, 2)))


def _rows(call: Call, pull: dict[str, Any], rests: Rests, linear: Linear, dq: Tensor) -> None:
    a = call.a
    call.start(
        backward.gradient_rows, "gradient_rows", (call.q_blocks * up(call.q_width, call.tile("gradient_rows").queries), call.bh),
        **call.rows("q", "k", "v"), extra_k=a.extra_k, extra_v=a.extra_v, **pull, more=linear.dq, dq=dq,
        **call.listed(), full=a.full, **call.predicate(), **call.pooled_arguments(rests), key_bias=call.key_bias,
        tokens=call.tokens, image=call.image, image_start=call.image_start, text=a.text, text_start=call.text_start,
        extra=0 if a.extra_k is None else a.extra_k.shape[2], EXTRA=a.extra_k is not None,
    )  # fmt: skip


def _columns(
    call: Call, pull: dict[str, Any], rests: Rests, turned: Columns, linear: Linear, pooled: Pooled, dk: Tensor, dv: Tensor
) -> None:
    a = call.a
    call.start(
        backward.gradient_columns, "gradient_columns", (call.k_blocks * up(call.k_width, call.tile("gradient_columns").keys), call.bh),
        **call.rows("q", "k", "v"), **pull, more_k=linear.dk, more_v=linear.dv, dk=dk, dv=dv, **_turned(turned), q_starts=a.q_starts,
        k_starts=a.k_starts, **call.predicate(), k_mean=rests.k_mean, dk_mean=pooled.dk_mean, dv_mean=pooled.dv_mean,
        dk_half=pooled.dk_half, tokens=call.tokens, image=call.image, image_start=call.image_start, text=a.text, text_start=call.text_start,
        k_blocks=call.k_blocks, POOLED=call.pooled,
    )  # fmt: skip


def _turned(turned: Columns) -> dict[str, Any]:
    """The lists by key block and their strides (0: shared by the heads)."""
    entries, borders = turned
    shared = len(entries) == 1
    return {
        "entries": entries, "borders": borders, "entry_bh": 0 if shared else entries.stride(0),
        "border_bh": 0 if shared else borders.stride(0),
    }  # fmt: skip


def columns(lists: Tensor, counts: Tensor, full: Tensor, key_blocks: int) -> tuple[Tensor, Tensor]:
    """The lists turned around: for each key block the query blocks that visit it, those that visit it whole first.

    `entries` `[1 or BH, Tq · n]` int32 and `borders` `[1 or BH, 2·Tk + 1]` int32. A stable sort: no atomics, no wait for the device.
    """
    lists, counts, full = (x if x.ndim == y else x[None] for x, y in ((lists, 3), (counts, 2), (full, 2)))
    place = torch.arange(lists.shape[-1], device=lists.device)
    key = lists * 2 + (place >= full[..., None])
    key = torch.where(place < counts[..., None], key, 2 * key_blocks).flatten(1)
    ordered, position = key.sort(dim=1, stable=True)
    sought = torch.arange(2 * key_blocks + 1, device=lists.device, dtype=ordered.dtype).expand(len(lists), -1).contiguous()
    borders = torch.searchsorted(ordered.contiguous(), sought)
    return (position // lists.shape[-1]).to(torch.int32), borders.to(torch.int32)


def _dense_gradient(call: Call, pull: dict[str, Any], dq: Tensor) -> None:
    """dq of the text's queries."""
    a, tile = call.a, call.tile("gradient_dense")
    tiles = up(a.text, tile.queries)
    splits, chunk = call.splits(tiles, call.tokens, tile.keys)
    part = call.empty(splits, call.bh, a.text, call.channels)
    call.start(
        backward.gradient_dense_rows, "gradient_dense", (tiles, call.bh, splits), **call.rows("q", "k", "v"),
        key_bias=call.key_bias, **pull, part=part, rows=a.text, first=call.text_start, tokens=call.tokens, chunk=chunk,
    )  # fmt: skip
    dq[:, :, call.text_start : call.text_start + a.text] = part.sum(0).view(call.batch, call.heads, a.text, call.channels)


def _shared(
    call: Call, pull: dict[str, Any], k: Tensor, v: Tensor, key_bias: Tensor | None, first: int, keys: int, begin: int, rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients `[B, H, keys, D]` float32 of keys that all rows from `begin` on see, under a bias `[BH, N]` or none."""
    tile = call.tile("gradient_shared")
    tiles = up(keys, tile.keys)
    splits, chunk = call.splits(tiles, rows, tile.queries)
    parts = [call.empty(splits, call.bh, keys, call.channels) for _ in range(2)]
    call.start(
        backward.gradient_shared_keys, "gradient_shared", (tiles, call.bh, splits), **call.rows("q"), k=k, v=v, **strides("k", k),
        **strides("v", v), key_bias=key_bias, **pull, dk=parts[0], dv=parts[1], keys=keys, first=first, begin=begin, rows=rows,
        tokens=call.tokens, chunk=chunk,
    )  # fmt: skip
    dk, dv = (part.sum(0).view(call.batch, call.heads, keys, call.channels) for part in parts)
    return dk, dv
