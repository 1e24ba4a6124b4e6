"""Some rows of tensors from each process to each other that requires them, in one message, and their gradients back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Route:
    """Which rows of a tensor `[B, H, rows, D]` go where.

    `sent[r]`: the rows that this rank sends to rank r, each at most once; to itself those that it keeps. `received[r]`: how many rows rank
    r sends to it.
    """

    sent: tuple[Tensor, ...]
    received: tuple[int, ...]


def to_all(counts: Sequence[int], rank: int, device: torch.device) -> Route:
    """Of ranks with so many rows each, all rows to everyone."""
    own = torch.arange(counts[rank], device=device)
    return Route((own,) * len(counts), tuple(counts))


def to_owners(counts: Sequence[int], rank: int, device: torch.device) -> Route:
    """Of ranks that all have a row for every row of everyone, to each those of its own: what is received are its rows, once from each."""
    rows = torch.arange(sum(counts), device=device)
    return Route(rows.split(list(counts)), (counts[rank],) * len(counts))


def exchanged(group: Any, routes: Sequence[Route], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Tensors `[B, H, rows, D]` of one dtype, the rows of each those that arrive by its route, in the order of the ranks. Differentiable.

    What goes to ranks that require nothing is nothing: a collective operation of which only messages between ranks that share rows are
    sent.
    """
    found: tuple[Tensor, ...] = _Exchanged.apply(group, routes, *tensors)
    return found


def _swapped(group: Any, sent: list[list[Tensor]], shapes: list[list[tuple[int, ...]]]) -> list[list[Tensor]]:
    """`sent[r]`: the tensors for rank r; `shapes[r]`: of those that come from rank r, which are returned."""
    outgoing = [sum(x.numel() for x in parts) for parts in sent]
    incoming = [[torch.Size(shape).numel() for shape in of_rank] for of_rank in shapes]
    buffer = torch.cat([x.reshape(-1) for parts in sent for x in parts])
    received = buffer.new_empty(sum(map(sum, incoming)))
    dist.all_to_all_single(received, buffer, [sum(sizes) for sizes in incoming], outgoing, group=group)
    pieces = iter(received.split([size for sizes in incoming for size in sizes]))
    return [[next(pieces).view(shape) for shape in of_rank] for of_rank in shapes]


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Any, routes: Sequence[Route], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.routes, ctx.shapes, ctx.dtype = group, routes, [x.shape for x in tensors], tensors[0].dtype
        ranks = range(len(routes[0].sent))
        sent = [[x.index_select(2, route.sent[rank]) for route, x in zip(routes, tensors, strict=True)] for rank in ranks]
        shapes = [
            [(*x.shape[:2], route.received[rank], x.shape[3]) for route, x in zip(routes, tensors, strict=True)] for rank in ranks
        ]  # fmt: skip
        found = _swapped(group, sent, shapes)
        return tuple(torch.cat(parts, 2) for parts in zip(*found, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        parts = [x.split(list(route.received), 2) for route, x in zip(ctx.routes, gradients, strict=True)]
        shapes = [
            [(*shape[:2], len(rows), shape[3]) for shape, rows in zip(ctx.shapes, of_rank, strict=True)]
            for of_rank in zip(*(route.sent for route in ctx.routes), strict=True)
        ]
        found = _swapped(ctx.group, [list(of_rank) for of_rank in zip(*parts, strict=True)], shapes)
        wide = torch.promote_types(ctx.dtype, torch.float32)  # a row's gradients of several ranks are added up
        totals = [gradients[0].new_zeros(shape, dtype=wide) for shape in ctx.shapes]
        for rank, of_rank in enumerate(found):
            for total, route, part in zip(totals, ctx.routes, of_rank, strict=True):
                total.index_add_(2, route.sent[rank], part.to(wide))
        return None, None, *(total.to(ctx.dtype) for total in totals)
