"""Keep patterns that choose key blocks by a score."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, best_blocks, mean_product
from dit_accel.method.checks import flag, is_real, require
from dit_accel.method.parts.base import Score, Selection, check_part
from dit_accel.method.parts.call import Call, Cost, Ground, Sizes
from dit_accel.method.parts.scores import Estimated, MeanProduct


@dataclass(frozen=True)
class TopK(Selection):
    """The n = max(1, floor(density · key blocks)) key blocks with the largest score (SLA, arXiv 2509.24006, eq. 2).

    `correct_short`: multiply a block's score by sqrt(tokens / block), because the mean over fewer tokens is noisier and wins too often.
    """

    density: float
    correct_short: bool = False
    score: Score = MeanProduct()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.density) and 0 < self.density <= 1, "density must be a share of key blocks in (0, 1]", self.density)
        flag("correct_short", self.correct_short)
        check_part(self.score, Score, "score")
        twice = self.correct_short and self.score.counts
        require(not twice, f"correct_short must be False with {self.score}, which counts a block's tokens already", True)

    @property
    def share(self) -> float:
        return self.density

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        blocks = ground.k_blocks
        if not self.correct_short or blocks.even:
            return {}
        return {"short_weight": (blocks.count.float() / ground.block[1]).sqrt()}

    def choose(self, call: Call) -> BlockMap:
        weight = call.prepared.get("short_weight")
        with torch.no_grad():
            score = self.score(call)
            return best_blocks(score if weight is None else score * weight.to(call.q.dtype), self.count(len(call.k_blocks.count)))


@dataclass(frozen=True)
class TopP(Selection):
    """For each query block the fewest key blocks, best first, whose share of its pooled softmax reaches `mass`; at least one, and no more
    than the share `at_most` of all.

    The pooled softmax is that of scale · score + log n over key blocks of n tokens; a score that counts tokens has log n in it. Budgets
    by coverage are among those that The Sparse Frontier (arXiv 2504.17768) compares.
    """

    mass: float
    at_most: float = 0.25
    score: Score = MeanProduct()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.mass) and 0 < self.mass <= 1, "mass must be a share of the softmax in (0, 1]", self.mass)
        require(is_real(self.at_most) and 0 < self.at_most <= 1, "at_most must be a share of key blocks in (0, 1]", self.at_most)
        check_part(self.score, Score, "score")
        require(self.score.mass, "the score of TopP must be one of the softmax mass, as MeanProduct()", self.score)

    @property
    def share(self) -> float:
        return self.at_most

    def choose(self, call: Call) -> BlockMap:
        with torch.no_grad():
            best = _shares(self.score, call).topk(self.count(len(call.k_blocks.count)), dim=-1)
            before = best.values.cumsum(-1) - best.values
            held = (before < self.mass) | (self.mass == 1)  # what is left of 1 may round to nothing
            held[..., 0] = True
            return BlockMap(best.indices, held)


@dataclass(frozen=True)
class Columns(Selection):
    """The same n = max(1, floor(density · key blocks)) key blocks for all queries of a head: those with the largest mean share + w·k̄.

    The mean, over query blocks, of the softmax of scale · score (+ log n, as in `TopP`); w `[D]` is one for each head, zero at start (a
    choice has no gradient: `distill` leaves it as it is). NAtS-L (arXiv 2602.03681) decides so which chunks of keys go to softmax, by a
    learned product with the layer's input, which an operator has not; STILL (arXiv 2602.02180) by the score `SelfSaliency`.
    """

    own_tokens = True  # the choice is one of all queries
    density: float
    score: Score = Estimated()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.density) and 0 < self.density <= 1, "density must be a share of key blocks in (0, 1]", self.density)
        check_part(self.score, Score, "score")

    @property
    def share(self) -> float:
        return self.density

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"columns.weight": torch.zeros(heads, head_dim)}

    def choose(self, call: Call) -> BlockMap:
        with torch.no_grad():
            learned = mean_product(call.per_head("columns.weight")[:, None], call.key_means(call.k))
            best = best_blocks(_shares(self.score, call).mean(-2, keepdim=True) + learned, self.count(len(call.k_blocks.count)))
            index = best.index.expand(-1, len(call.q_blocks.count), -1)
            return BlockMap(index, torch.ones_like(index, dtype=torch.bool), complete=True)

    def cost(self, sizes: Sizes) -> Cost:
        return self.score.cost(sizes) + Cost(sizes.k_blocks * sizes.head_dim)


def _shares(score: Score, call: Call) -> Tensor:
    """The softmax `[BH, Tq, Tk]` of a score over key blocks, float64: of a score of mass, each block's share of the attention."""
    logits = call.scale * score(call).double()
    return (logits + call.k_blocks.count.log() if score.mass and not score.counts else logits).softmax(-1)
