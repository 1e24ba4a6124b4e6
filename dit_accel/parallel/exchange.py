"""The exchange of Ulysses (arXiv 2309.14509): from some tokens of all heads to all tokens of some heads, and back.

A sequence may consist of several streams, as text and image, that are split each by itself: a rank then holds a part of the text and
behind it a part of the image. What arrives is put in the order of the whole sequence, all text before all of the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class Exchange:
    """Who has what, before and after.

    `streams[r]`: the tokens that rank r holds of each stream, in their order. `heads[r]`: the numbers of the heads that rank r computes, in
    ascending order. `rank`: this process's place in `group`.
    """

    group: Any
    rank: int
    streams: tuple[tuple[int, ...], ...]
    heads: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Of the whole sequence."""
        return sum(map(sum, self.streams))

    @property
    def held(self) -> tuple[int, ...]:
        """The heads that this rank computes."""
        return self.heads[self.rank]

    def to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors `[B, H, own tokens, D]` of one shape and dtype as `[B, own heads, N, D]`, in one message. Differentiable."""
        found: tuple[Tensor, ...] = _ToHeads.apply(self, *tensors)
        return found

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """The inverse of `to_heads`. Differentiable."""
        found: tuple[Tensor] = _ToTokens.apply(self, tensor)
        return found[0]

    def _parted(self, whole: Tensor, dim: int) -> list[Tensor]:
        """The inverse of `joined`."""
        ranks, count = range(len(self.streams)), len(self.streams[0])
        pieces = iter(whole.split([self.streams[rank][stream] for stream in range(count) for rank in ranks], dim))
        by_stream = [[next(pieces) for _ in ranks] for _ in range(count)]
        return [torch.cat([of_stream[rank] for of_stream in by_stream], dim) for rank in ranks]

    def scatter_heads(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`to_heads` without a gradient."""
        count, batch, dim = len(tensors), tensors[0].shape[0], tensors[0].shape[3]
        own, mine = sum(self.streams[self.rank]), len(self.held)
        sent = [len(heads) * count * batch * own * dim for heads in self.heads]
        buffer = tensors[0].new_empty(sum(sent))
        for part, heads in zip(buffer.split(sent), self.heads, strict=True):
            for place, tensor in zip(part.view(count, batch, len(heads), own, dim), tensors, strict=True):
                place.copy_(some_heads(tensor, heads))
        shapes = [(count, batch, mine, sum(sizes), dim) for sizes in self.streams]
        return joined(self._exchanged(buffer, sent, shapes), self.streams, 3).unbind()

    def gather_heads(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """`to_tokens` of several tensors without a gradient."""
        count, (batch, mine, _, dim), own = len(tensors), tensors[0].shape, sum(self.streams[self.rank])
        sent = [mine * count * batch * sum(sizes) * dim for sizes in self.streams]
        buffer = tensors[0].new_empty(sum(sent))
        places = [part.view(count, batch, mine, sum(sizes), dim) for part, sizes in zip(buffer.split(sent), self.streams, strict=True)]
        for number, tensor in enumerate(tensors):
            for place, piece in zip(places, self._parted(tensor, 2), strict=True):
                place[number].copy_(piece)
        whole = torch.cat(self._exchanged(buffer, sent, [(count, batch, len(heads), own, dim) for heads in self.heads]), 2)
        order = [head for heads in self.heads for head in heads]
        if order != sorted(order):
            whole = whole.index_select(2, torch.tensor(order, device=whole.device).argsort())
        return whole.unbind()

    def _exchanged(self, buffer: Tensor, sent: list[int], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """What each rank sends to this one, in these shapes; `sent`: elements of the buffer for each rank."""
        sizes = [int(torch.Size(shape).numel()) for shape in shapes]
        received = buffer.new_empty(sum(sizes))
        dist.all_to_all_single(received, buffer, sizes, sent, group=self.group)
        return [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)]


def gathered_mask(mask: Tensor, tokens: Sequence[int], group: Any) -> list[Tensor]:
    """The masks `[..., tokens]` of all ranks, which differ in their last dimension alone."""
    own = mask.contiguous()
    parts = [own.new_empty(*own.shape[:-1], count) for count in tokens]
    sent = own.flatten().view(torch.uint8)  # gloo does not gather all dtypes
    sizes = [part.numel() * part.element_size() for part in parts]
    received = sent.new_empty(sum(sizes))
    dist.all_to_all_single(received, sent.repeat(len(parts)), sizes, [len(sent)] * len(parts), group=group)
    return [piece.view(own.dtype).view(part.shape) for piece, part in zip(received.split(sizes), parts, strict=True)]


def joined(parts: Sequence[Tensor], streams: Sequence[Sequence[int]], dim: int) -> Tensor:
    """The sequence of all ranks' tokens: stream by stream, each in the order of the ranks; `streams[r]` as in `Exchange`."""
    pieces = [part.split(list(sizes), dim) for part, sizes in zip(parts, streams, strict=True)]
    return torch.cat([of_rank[stream] for stream in range(len(streams[0])) for of_rank in pieces], dim)


def some_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Heads `[B, some, N, D]`, numbers in ascending order: a view where they follow each other."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return x.narrow(1, heads[0], len(heads))
    return x[:, list(heads)]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.scatter_heads(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.gather_heads(gradients)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.exchange = exchange
        return exchange.gather_heads(tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.exchange.scatter_heads(gradients)
