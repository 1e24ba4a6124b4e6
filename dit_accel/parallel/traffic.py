"""What one layer's forward sends between processes, in bytes that one process sends, by formula; a backward pass sends as many again.

N tokens of H heads of D channels, n processes, one sample.
"""

import torch

from dit_accel.method.parts.call import FarBlocks, FarSums
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.bands import Grounds
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel.halo import refusal
from dit_accel.parallel.ranks import shares

MOMENTS = 3  # rows that stand for a block: mean key, mean value, variance
FLOAT32 = 4  # bytes


def ulysses(tokens: int, heads: int, head_dim: int, ranks: int, width: int = 2) -> float:
    """q, k, v and the output of a process's N/n tokens, but for the heads that are its own: 4·N·H·D·(n − 1)/n², `width` bytes each."""
    return 4 * tokens * heads * head_dim * width * (ranks - 1) / ranks**2


def halo(
    spec: AttentionSpec, layout: TokenLayout, heads: int, head_dim: int, ranks: int, width: int = 2, wide: int = FLOAT32
) -> list[int] | None:
    """Of a method on bands, by rank; None where it can't run so (`halo.refusal`).

    Keys and values of the border tokens that it sends to each other process, counted from the plan's block lists, `width` bytes each. What
    it tells all others of a rest, `wide` bytes each. Of text, queries, keys and values of its
    part to all, and for the queries of all others its part of their output and its mass, of `wide` bytes.
    """
    if refusal(spec) is not None:
        return None
    grounds, texts, size = Grounds(spec, layout, shares(layout.image, ranks)), shares(layout.text, ranks), heads * head_dim
    found = [2 * size * width * count for count in sent_tokens(grounds)]
    told = told_numbers(spec, grounds, head_dim)
    for rank, (count, text) in enumerate(zip(told, texts, strict=True)):
        found[rank] += (ranks - 1) * (heads * wide * count + 3 * size * width * text)
        found[rank] += (layout.text - text) * heads * (head_dim + 1) * wide
    return found


def told_numbers(spec: AttentionSpec, grounds: Grounds, head_dim: int) -> list[int]:
    """How many numbers of each head each band tells each other of its rest: `MOMENTS` rows of each block with tokens in it; sums of D + 1
    numbers for each feature; or a key and a value for each that its tokens take part in."""
    bands, rest = len(grounds.ranges), spec.rest
    if rest is None:
        return [0] * bands
    if rest.far is FarBlocks:
        return [MOMENTS * head_dim * count for count in grounds.pieces_of_bands()]
    if rest.far is FarSums:
        return [rest.features(head_dim) * (head_dim + 1)] * bands
    return [2 * head_dim * len(rest.in_part(grounds.whole.prepared, slice(*tokens))[1]) for tokens in grounds.ranges]


def sent_tokens(grounds: Grounds) -> list[int]:
    """How many tokens of the image each band sends to others, a token once for each of them."""
    sent = torch.zeros(len(grounds.ranges), dtype=torch.int64)
    ends = torch.tensor([end for _, end in grounds.ranges])
    for band in range(len(sent)):
        owners = torch.searchsorted(ends, grounds.keys(band), right=True)
        sent += owners[owners != band].bincount(minlength=len(sent))
    return [int(count) for count in sent]
