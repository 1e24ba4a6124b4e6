"""Scores that look for key blocks in fewer steps than one for each pair: down a tree, and by clusters."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize, one_hot, pad

from dit_accel.kernels.blocks import best_blocks, mean_product, pool_blocks
from dit_accel.method.checks import is_int, is_real, items, require
from dit_accel.method.parts.base import Score
from dit_accel.method.parts.call import Call, Cost, Sizes

STEPS = 5  # of k-means


@dataclass(frozen=True)
class Pyramid(Score):
    """The product of the blocks' means, of the key blocks that a search down a tree reaches; -inf of all others (HiP, arXiv 2406.09827).

    A node is a run of key blocks and has their mean key; `levels`: how many children each has, from the top down. Of the nodes reached at a
    level, each query block opens the share `keep` with the largest product. HiP takes keys drawn from a node in place of its mean.
    """

    levels: tuple[int, ...] = (4, 4)
    keep: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "levels", items("levels", self.levels))
        legal = len(self.levels) > 0 and all(is_int(n) and n >= 2 for n in self.levels)
        require(legal, "levels must be one or more numbers of children >= 2", self.levels)
        require(is_real(self.keep) and 0 < self.keep <= 1, "keep must be a share of nodes in (0, 1]", self.keep)

    def __call__(self, call: Call) -> Tensor:
        with torch.no_grad():
            query, key, count = pool_blocks(call.q, call.q_blocks)[0], call.key_means(call.k), call.k_blocks.count[:, None]
            tree = [key]
            for children in reversed(self.levels):
                total, parents = _runs(key * count, children), _runs(count, children)
                key, count = total / parents.clamp_min(1), parents
                tree.append(key)
            score = mean_product(query, key)
            reached = score.shape[-1]
            for children, nodes in zip(self.levels, reversed(tree[:-1]), strict=True):
                opened = math.ceil(self.keep * reached - 1e-9)
                best = best_blocks(score, opened).kept(score.shape[-1]) & (score > -torch.inf)
                inside = best.repeat_interleave(children, -1)[..., : nodes.shape[1]]
                score = mean_product(query, nodes).masked_fill(~inside, -torch.inf)
                reached = min(opened * children, nodes.shape[1])
            return score

    def cost(self, sizes: Sizes) -> Cost:
        """All products of every level, although a search would leave some out; queries and keys are read once more."""
        nodes = [sizes.k_blocks / math.prod(self.levels[level:]) for level in range(len(self.levels) + 1)]
        return Cost(sizes.q_blocks * sum(map(math.ceil, nodes)) * sizes.head_dim, 2)


def _runs(x: Tensor, length: int) -> Tensor:
    """The sums `[..., ⌈T / length⌉, D]` of runs of `[..., T, D]`, the last of which may be short."""
    return pad(x, (0, 0, 0, -x.shape[-2] % length)).unflatten(-2, (-1, length)).sum(-2)


@dataclass(frozen=True)
class Clusters(Score):
    """How likely a query and a key of two blocks are in one cluster: Σ_c h_I(c) h_J(c), h the shares of a block's tokens in each cluster.

    Routing Transformer (arXiv 2003.05997): queries and keys as unit vectors belong to the nearest of `count` centres. They are those of
    the call's keys, by k-means from seeds of which each is the key farthest from those before; nothing is learned or drawn.
    """

    mass = False
    count: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.count) and 1 <= self.count <= 1024, "count must be a number of clusters from 1 to 1024", self.count)

    def __call__(self, call: Call) -> Tensor:
        with torch.no_grad():
            query, key = (normalize(x.double(), dim=-1) for x in (call.q, call.k))  # in float64, so that all backends choose alike
            centres = self.centres(key)
            shares = [pool_blocks(self.members(x, centres), side)[0] for x, side in ((query, call.q_blocks), (key, call.k_blocks))]
            return mean_product(*shares)

    def members(self, x: Tensor, centres: Tensor) -> Tensor:
        """`[BH, N, count]`, 1 for the nearest of the centres `[BH, count, D]`."""
        return one_hot((x @ centres.transpose(-1, -2)).argmax(-1), self.count).to(x.dtype)

    def centres(self, key: Tensor) -> Tensor:
        """`[BH, count, D]` of unit vectors `[BH, N, D]`; the first seed is the key farthest from the mean of all."""
        nearest, seeds = key @ key.mean(1)[..., None], []
        for _ in range(self.count):
            seeds.append(key.gather(1, nearest.argmin(1, keepdim=True).expand(-1, -1, key.shape[-1])))
            product = key @ seeds[-1].transpose(-1, -2)
            nearest = product if len(seeds) == 1 else torch.maximum(nearest, product)
        centres = torch.cat(seeds, 1)
        for _ in range(STEPS):
            sums = self.members(key, centres).transpose(-1, -2) @ key
            centres = torch.where(sums.square().sum(-1, keepdim=True) > 0, normalize(sums, dim=-1), centres)
        return centres

    def cost(self, sizes: Sizes) -> Cost:
        """Products with centres, and of shares; queries and keys are read and written once more."""
        rounds = 2 * STEPS + 3  # the seeds, the steps, and where all queries and keys belong
        return Cost(self.count * (rounds * sizes.tokens * sizes.head_dim + sizes.q_blocks * sizes.k_blocks), 4)
