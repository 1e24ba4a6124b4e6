"""What a part is given: the grid when a plan is made, the tokens when attention is computed, the sizes when its cost is counted."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.blocks import Blocks, pool_blocks
from dit_accel.kernels.reference import Partial

Grid = tuple[int, int, int]  # (frames, height, width) in tokens
Boxes = tuple[Tensor, Tensor, Tensor, Tensor]  # lowest and highest (t, y, x) `[T, 3]` of the query blocks and of the key blocks


class Frame(NamedTuple):
    """Attention as a system with a state (arXiv 2405.15731), in a few words: what is held of the tokens, what weighs it, how a query
    reads it."""

    state: str = ""
    gate: str = ""
    readout: str = ""


@dataclass(frozen=True)
class Ground:
    """One grid, cut into blocks: all that a plan depends on, on the CPU.

    `grids`: the image and its references. `coords` `[N, 4]`: (t, y, x, image) of each token, in the order that calls have. `block`: the
    most tokens of a query block and of a key block.
    """

    grids: tuple[Grid, ...]
    coords: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    block: tuple[int, int]


class Moments(NamedTuple):
    """What some rests know of the keys and values: of each block its number of tokens `[T]`, the mean key and value `[BH, T, D]`, and the
    variances of its keys `[BH, T, D]`."""

    tokens: Tensor
    key: Tensor
    value: Tensor
    variance: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, blocks: Blocks) -> "Moments":
        """Of keys and values `[BH, N, D]`."""
        key, variance = pool_blocks(k, blocks, variance=True)
        return cls(blocks.count, key, pool_blocks(v, blocks)[0], variance)


class Visited(Protocol):
    """Lists of the key blocks that each query block visits."""

    def kept(self, key_blocks: int) -> Tensor:
        """The same as a mask `[..., Tq, Tk]`."""
        ...

    def listed(self) -> tuple[Tensor, Tensor]:
        """The key blocks `[..., Tq, n]`, and which of these entries count."""
        ...


class FarBlocks(NamedTuple):
    """Key blocks whose tokens a call has in part or not at all: their `moments`, which of them each query block keeps `[..., Tq, T]`, and
    which of them each of the call's key blocks is, `slots` `[Tk]` int32."""

    moments: Moments
    kept: Tensor
    slots: Tensor


class FarSums(NamedTuple):
    """Of keys that a call does not have, and no query block of it keeps, the sums `[BH, F, D + 1]` of the products of what `Rest.factors`
    gives of each: its features with its value, and in the last column its features."""

    sums: Tensor


class FarKeys(NamedTuple):
    """Keys and values `[BH, M, D]` that are made of all tokens, those that a call does not have among them."""

    key: Tensor
    value: Tensor


Far = FarBlocks | FarSums | FarKeys  # what a call is given of keys that it does not have


@dataclass(frozen=True)
class Call:
    """One call of the operator: its image tokens `[BH, N, D]` (float32, or float64), batch and heads folded, and what is kept of them.

    `coords`, `q_blocks`, `k_blocks`: as in `Ground`, on the tokens' device; where the queries are other tokens than the keys, `q_blocks`
    are of q's and all else is of k's. `prepared`: what `Part.prepare` of the spec's parts made of the grid. `learned`: the spec's learned
    tensors by name. `visited`: the kept blocks, None while they are chosen. `grids`: as in `Ground`. `dense`: the softmax of every
    query over a few further keys, as `kernels.reference.dense_attention`.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    heads: int
    scale: float
    coords: Tensor
    q_blocks: Blocks
    k_blocks: Blocks
    prepared: Mapping[str, Tensor]
    learned: Mapping[str, Tensor]
    visited: Visited | None = None
    dense: Callable[..., Partial] = reference.dense_attention
    grids: tuple[Grid, ...] = ()

    @property
    def kept(self) -> Tensor:
        """Which key blocks each query block keeps, `[..., Tq, Tk]`."""
        return self._chosen().kept(len(self.k_blocks.count))

    @property
    def listed(self) -> tuple[Tensor, Tensor]:
        """The key blocks `[..., Tq, n]` that each query block keeps, and which of these entries count."""
        return self._chosen().listed()

    def _chosen(self) -> Visited:
        if self.visited is None:
            raise ValueError("a call's kept blocks are known once they are chosen: a score can't depend on them")
        return self.visited

    def key_means(self, x: Tensor) -> Tensor:
        """The mean `[BH, Tk, D]` of `[BH, N, D]` over the tokens of each key block."""
        return pool_blocks(x, self.k_blocks)[0]

    def own(self, name: str) -> Tensor:
        """A learned tensor in the tokens' dtype."""
        return self.learned[name].to(self.q.dtype)

    def per_head(self, name: str) -> Tensor:
        """A learned tensor `[H, ...]` in the tokens' dtype, once for each sample: `[BH, ...]`."""
        own = self.own(name)
        return own.repeat(len(self.q) // self.heads, *[1] * (own.ndim - 1))

    def of_heads(self, x: Tensor) -> Tensor:
        """Tokens `[BH, N, D]` of all samples by head, `[H, B·N, D]`, float64, without a gradient."""
        return x.detach().double().unflatten(0, (-1, self.heads)).transpose(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class Sizes:
    """What a cost depends on: image tokens, blocks of queries and of keys, channels per head."""

    tokens: int
    q_blocks: int
    k_blocks: int
    head_dim: int


@dataclass(frozen=True)
class Cost:
    """Of one head. `multiply_adds`: on image tokens. `passes`: tensors of N × D that are read or written in addition to q, k, v and out."""

    multiply_adds: float = 0.0
    passes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.multiply_adds + other.multiply_adds, self.passes + other.passes)


def total(costs: list[Cost]) -> Cost:
    """The sum."""
    return functools.reduce(lambda a, b: a + b, costs, Cost())
