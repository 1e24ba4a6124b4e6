"""What one layer's forward sends between processes, in bytes that one process sends, by formula; a backward pass sends as many again.

N tokens of H heads of D channels, n processes. A process receives as many bytes as it sends.
"""

import torch

from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import lowering
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

ROWS_OF_A_BLOCK = 3  # that stand for the keys of a block: mean key, mean value, variance
FLOAT32 = 4  # bytes


def ulysses(tokens: int, heads: int, head_dim: int, ranks: int, width: int = 2) -> float:
    """q, k, v and the output of a process's N/n tokens, but for the heads that are its own: 4·N·H·D·(n − 1)/n², `width` bytes each."""
    return 4 * tokens * heads * head_dim * width * (ranks - 1) / ranks**2


def halo(spec: AttentionSpec, layout: TokenLayout, heads: int, head_dim: int, ranks: int, width: int = 2) -> float | None:
    """Of a method under which each process keeps a band of consecutive blocks; None where blocks are chosen by what they contain.

    Keys and values of the tokens beyond its band that its queries keep, counted from the plan's block lists (the most of any process). Of
    a rest that pools blocks, its own blocks' rows to all others; of a linear rest, the sum of its states over all. Of the text, which all
    have, the output of its queries and their softmax mass, summed over all.
    """
    if spec.selection is not None:
        return None
    size = heads * head_dim
    sent = 2.0 * size * width * halo_tokens(spec, layout, ranks)
    if lowering.has_states(spec):
        sent += _summed(size * (head_dim + 1), ranks)
    elif spec.rest is not None:
        sent += ROWS_OF_A_BLOCK * size * width * layout.image / spec.block[1] * (ranks - 1) / ranks
    return sent + _summed(layout.text * heads * (head_dim + 1), ranks)


def halo_tokens(spec: AttentionSpec, layout: TokenLayout, ranks: int) -> int:
    """The key tokens of the image outside of its own band that a process requires for the static patterns, the most of any."""
    plan = make_plan(spec, TokenLayout(layout.grid, order=spec.order, references=layout.references), torch.device("cpu"))
    if plan.static is None:
        return 0
    q_rank, k_rank = (_ranks_of(blocks.count, ranks) for blocks in (plan.q_blocks, plan.k_blocks))
    needed = torch.zeros(ranks, len(k_rank), dtype=torch.bool)
    row, place = plan.static.valid.nonzero(as_tuple=True)
    needed[q_rank[row], plan.static.index[row, place].long()] = True
    needed[k_rank, torch.arange(len(k_rank))] = False
    return int((needed * plan.k_blocks.count).sum(1).max())


def _ranks_of(counts: torch.Tensor, ranks: int) -> torch.Tensor:
    """Whose band each block is in: that in which its first token is, where every process has as many tokens."""
    first = counts.cumsum(0) - counts
    return first * ranks // counts.sum()


def _summed(numbers: int, ranks: int) -> float:
    """Bytes that one process sends to add up so many float32 numbers over all, in a ring."""
    return 2 * (ranks - 1) / ranks * numbers * FLOAT32
