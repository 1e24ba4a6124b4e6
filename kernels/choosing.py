"""The arguments of the choice of key blocks and what it gives, declared as those of the other operators are (`arguments`)."""

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import FEATURES, ChosenFrom, Mark, OnGpu, Transport


class SelectionArguments(NamedTuple):
    """The arguments of `dit_accel::select_blocks`, but for the implementation's name.

    `q`, `k` `[B, H, N, D]`: image tokens; starts, widths and places as in `Arguments`. `top`: key blocks per query block. `weight`
    `[k blocks]` float32: a factor of each block's score, or None; `bias` `[B, H, k blocks]` float32: joins it, or None. `v` as `k`, in the
    place of a bias: then the score is that of the error which a block's pooled key would leave, of logits of this `scale`; `score_cap` as
    in `SummaryArguments`. `pooled`: whether what a rest of pooled keys reads of k and v is made as well, by the GPU's kernels. `states`:
    the same for a linear rest of the blocks that are not chosen, by its `feature_map` and, where there is one, its `projection` `[D, D]`;
    then v is for these alone, and the score that of the means.
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
    states: Annotated[bool, Mark(gpu=True)] = False
    feature_map: Annotated[str, Mark(choices=FEATURES, gpu=True)] = FEATURES[0]
    projection: OnGpu = None

    @property
    def by_error(self) -> bool:
        """Whether the score is that of the error."""
        return self.v is not None and not self.states


class Chosen(NamedTuple):
    """The blocks that were chosen, and what else was made of all blocks.

    `lists` int32 `[B·H, q blocks, top]`, ascending, and `counts` int32 `[B·H, q blocks]`, `top` of each. By the GPU's kernels alone, else
    of no elements: `bits` int32 `[B·H, q blocks, words]`, bit j % 32 of word j // 32 for block j; `means`, `states`, `totals` and
    `mapped` as in `Arguments`.
    """

    lists: Tensor
    counts: Tensor
    bits: Tensor
    means: Tensor
    states: Tensor
    totals: Tensor
    mapped: Tensor


SELECTION = Transport(SelectionArguments)


def new_chosen(a: SelectionArguments, *, gpu: bool) -> Chosen:
    """Empty tensors for the results of `dit_accel::select_blocks`; `gpu`: whether the GPU's kernels give them."""
    (batch, heads, _, channels), queries, keys = a.q.shape, len(a.q_starts) - 1, len(a.k_starts) - 1
    of_rows = (batch * heads, queries)
    sizes = (*of_rows, a.top), of_rows, (*of_rows, -(-keys // 32)) if gpu else (0,)
    lists, counts, bits = (a.q.new_empty(size, dtype=torch.int32) for size in sizes)
    means = a.q.new_empty((3, batch * heads, keys, channels) if gpu and a.pooled else 0)
    if not (gpu and a.states):
        return Chosen(lists, counts, bits, means, *(a.q.new_empty(0) for _ in range(3)))
    matrices = (batch * heads,) if a.q.dtype == torch.float32 else (batch * heads + (a.projection is not None), 2)
    states = a.q.new_empty((*matrices, channels, channels))
    totals = a.q.new_empty((batch * heads, channels), dtype=torch.float32)
    return Chosen(lists, counts, bits, means, states, totals, a.q.new_empty((batch * heads, a.k.shape[2], channels)))


def check_selection(a: SelectionArguments) -> None:
    """Raise ValueError at values that do not fit the keys."""
    if (a.pooled or a.states) and a.v is None:
        raise ValueError("what a rest reads is made of k and v: give v, or leave pooled and states out")
    if a.pooled and a.states:
        raise ValueError("a rest is of pooled keys or linear: leave pooled or states out")
    if a.projection is not None and (a.projection.dtype != torch.float32 or not a.projection.is_contiguous()):
        raise ValueError(f"projection must be float32 and contiguous, not {a.projection.dtype} of strides {a.projection.stride()}")
    if a.v is None:
        return
    if a.v.shape != a.k.shape:
        raise ValueError(f"v must have k's shape {tuple(a.k.shape)}, not {tuple(a.v.shape)}")
    if a.bias is not None and a.by_error:
        raise ValueError("a choice takes values or a bias, not both: leave v or bias out")
