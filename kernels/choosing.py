"""The arguments of the choice of key blocks and what it gives, declared as those of the other operators are (`arguments`)."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import ChosenFrom, Mark, Transport


class SelectionArguments(NamedTuple):
    """The arguments of `dit_accel::select_blocks`, but for the implementation's name.

    `q`, `k` `[B, H, N, D]`: image tokens; starts, widths and places as in `Arguments`. `top`: key blocks per query block. `weight`
    `[k blocks]` float32: a factor of each block's score, or None; `bias` `[B, H, k blocks]` float32: joins it, or None. `v` as `k`, in the
    place of a bias: then the score is that of the error which a block's pooled key would leave, of logits of this `scale`; `score_cap` as
    in `SummaryArguments`. `pooled`: whether what a rest of pooled keys reads of k and v is made as well, by the GPU's kernels.
    """

    q: ChosenFrom
    k: ChosenFrom
    q_starts: Tensor
    k_starts: Tensor
    q_width: int
    k_width: int
    top: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    places_q: Tensor | None = None
    places_k: Tensor | None = None
    v: Annotated[Tensor | None, Mark(strided=True)] = None
    scale: float = 1.0
    score_cap: float = 0.0
    pooled: Annotated[bool, Mark(gpu=True)] = False


class Chosen(NamedTuple):
    """The blocks that were chosen, and what else was made of all blocks.

    `lists` int32 `[B·H, q blocks, top]`, ascending, and `counts` int32 `[B·H, q blocks]`, `top` of each. By the GPU's kernels alone, else
    of no elements: `bits` int32 `[B·H, q blocks, words]`, bit j % 32 of word j // 32 for block j; `means` as in `Arguments`.
    """

    lists: Tensor
    counts: Tensor
    bits: Tensor
    means: Tensor


SELECTION = Transport(SelectionArguments)


def new_chosen(a: SelectionArguments, *, gpu: bool) -> Chosen:
    """Empty tensors for the results of `dit_accel::select_blocks`; `gpu`: whether the GPU's kernels give them."""
    (batch, heads, _, channels), queries, keys = a.q.shape, len(a.q_starts) - 1, len(a.k_starts) - 1
    of_rows = (batch * heads, queries)
    sizes = (*of_rows, a.top), of_rows, (*of_rows, -(-keys // 32)) if gpu else (0,)
    lists, counts, bits = (a.q.new_empty(size, dtype=torch.int32) for size in sizes)
    return Chosen(lists, counts, bits, a.q.new_empty((3, batch * heads, keys, channels) if gpu and a.pooled else 0))


def check_selection(a: SelectionArguments) -> None:
    """Raise ValueError at values that do not fit the keys."""
    if a.pooled and a.v is None:
        raise ValueError("what pooled keys read is made of k and v: give v, or leave pooled out")
    if a.v is None:
        return
    if a.v.shape != a.k.shape:
        raise ValueError(f"v must have k's shape {tuple(a.k.shape)}, not {tuple(a.v.shape)}")
    if a.bias is not None:
        raise ValueError("a choice takes values or a bias, not both: leave v or bias out")
