"""Keep patterns that choose key blocks by a score."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, best_blocks
from dit_accel.method.checks import flag, is_real, require
from dit_accel.method.parts.base import Score, Selection, check_part
from dit_accel.method.parts.call import Call, Ground
from dit_accel.method.parts.scores import MeanProduct


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
        require(is_real(self.density) and 0 < self.density <= 1, "density is a share of key blocks in (0, 1]", self.density)
        flag("correct_short", self.correct_short)
        check_part(self.score, Score, "score")

    @property
    def share(self) -> float:
        return self.density

    def count(self, blocks: int) -> int:
        """How many of so many key blocks are kept; 0.29 of 100 are 29, although the product of floats is a little less."""
        return max(1, math.floor(self.density * blocks + 1e-9))

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
