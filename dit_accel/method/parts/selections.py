"""Keep patterns that choose key blocks by a score."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, best_blocks
from dit_accel.method.checks import flag, is_real, require
from dit_accel.method.parts.base import Score, Selection, check_part
from dit_accel.method.parts.call import Call, Ground
from dit_accel.method.parts.scores import ErrorProduct, MeanProduct


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
        twice = self.correct_short and isinstance(self.score, ErrorProduct)
        require(not twice, "correct_short must be False with ErrorProduct(), which counts a block's tokens already", True)

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

    The pooled softmax is that of scale · score + log n over key blocks of n tokens.
    """

    mass: float
    at_most: float = 0.25
    score: Score = MeanProduct()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.mass) and 0 < self.mass <= 1, "mass must be a share of the softmax in (0, 1]", self.mass)
        require(is_real(self.at_most) and 0 < self.at_most <= 1, "at_most must be a share of key blocks in (0, 1]", self.at_most)
        check_part(self.score, Score, "score")
        error = isinstance(self.score, ErrorProduct)
        require(not error, "the score of TopP must be one of the softmax mass, as MeanProduct()", self.score)

    @property
    def share(self) -> float:
        return self.at_most

    def choose(self, call: Call) -> BlockMap:
        with torch.no_grad():
            logits = call.scale * self.score(call).double() + call.k_blocks.count.log()
            best = logits.softmax(-1).topk(self.count(len(call.k_blocks.count)), dim=-1)
            before = best.values.cumsum(-1) - best.values
            held = (before < self.mass) | (self.mass == 1)  # what is left of 1 may round to nothing
            held[..., 0] = True
            return BlockMap(best.indices, held)
