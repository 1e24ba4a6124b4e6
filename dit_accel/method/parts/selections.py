"""Keep patterns that choose key blocks by a score."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, best_blocks
from dit_accel.method.checks import flag, is_int, is_real, require
from dit_accel.method.parts.base import Blockwise, Score, Selection, added, check_part
from dit_accel.method.parts.call import Call, Cost, Ground, Sizes
from dit_accel.method.parts.choices import TARGETS, Chooser, Target, worth
from dit_accel.method.parts.scores import Estimated, MeanProduct


@dataclass(frozen=True)
class TopK(Selection):
    """The n = max(1, floor(density · key blocks) + blocks) key blocks with the largest score (SLA, arXiv 2509.24006, eq. 2).

    `correct_short`: multiply a block's score by sqrt(tokens / block), because the mean over fewer tokens is noisier and wins too often.
    `blocks`: so many however large the grid is, with a density that may then be 0: α + β·N tokens, the rule for spans at other lengths of
    MoA (arXiv 2406.14909).
    """

    density: float
    correct_short: bool = False
    score: Score = MeanProduct()
    blocks: int = added(0)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.blocks) and self.blocks >= 0, "blocks must be a number of key blocks >= 0", self.blocks)
        legal = is_real(self.density) and 0 <= self.density <= 1
        if self.blocks:
            require(legal, "density must be a share of key blocks in [0, 1] where blocks is given", self.density)
        else:
            advice = "or give blocks too, for a number of them that is kept at every size" if legal else ""
            require(legal and self.density > 0, "density must be a share of key blocks in (0, 1]", self.density, advice)
        flag("correct_short", self.correct_short)
        check_part(self.score, Score, "score")
        twice = self.correct_short and self.score.counts
        require(not twice, f"correct_short must be False with {self.score}, which counts a block's tokens already", True)

    @property
    def share(self) -> float:
        return self.density

    @property
    def more(self) -> int:
        return self.blocks

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
class Among(Selection):
    """The n = max(1, floor(density · key blocks)) best of the key blocks that a pattern of places keeps, fewer where it keeps fewer.

    Superlinear's search (arXiv 2601.18401) with `Stripes`: candidates are anchors ever farther apart, with the tiles next to them, so that
    what is scored grows with N^1.5 and not N²; this part scores all, and leaves out what is no candidate. The paper keeps whole spans at
    the best anchors; here each tile of a span is chosen by its own score. Without a pattern that leaves something out it is `TopK`.
    """

    own_tokens = True  # the plan has the places of its own queries
    density: float
    among: Blockwise
    score: Score = MeanProduct()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.density) and 0 < self.density <= 1, "density must be a share of key blocks in (0, 1]", self.density)
        check_part(self.among, Blockwise, "among")
        check_part(self.score, Score, "score")

    @property
    def share(self) -> float:
        return self.density

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        """`candidates` `[Tq, Tk]`: which key blocks the pattern keeps of each query block."""
        corners = [ground.coords[blocks.index] for blocks in (ground.q_blocks, ground.k_blocks)]  # short blocks repeat their last token
        (q_low, q_high), (k_low, k_high) = ((x.amin(1), x.amax(1)) for x in corners)
        found = torch.zeros(len(q_low), len(k_low), dtype=torch.bool)
        for number, grid in enumerate(ground.grids):
            rows = q_low[:, 3] == number
            found[rows] = self.among.visits(grid, (q_low[rows, :3], q_high[rows, :3], k_low[:, :3], k_high[:, :3]))[0]
        return {"candidates": found}

    def choose(self, call: Call) -> BlockMap:
        with torch.no_grad():
            score = self.score(call).masked_fill(~call.prepared["candidates"], -torch.inf)
            best = score.topk(self.count(len(call.k_blocks.count)), dim=-1)
            held = best.values > -torch.inf
            held[..., 0] = True  # a query block without a candidate keeps one all the same
            return BlockMap(best.indices, held)


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
class Columns(Chooser, Selection):
    """The same n = max(1, floor(density · key blocks)) key blocks for all queries of a head: those with the largest log share + w·k̄.

    The share is the mean, over query blocks, of the softmax of scale · score (+ log n, as in `TopP`); w `[D]` is one for each head, zero at
    start. The first stage of `distill` fits it: the softmax of log share + w·k̄ to what blocks are worth to the original's attention, see
    `choices.worth`, `target` of it, the mean over query blocks. NAtS-L (arXiv 2602.03681) decides so which chunks of keys go to softmax, by
    a learned product with the layer's input, which an operator has not; STILL (arXiv 2602.02180) by the score `SelfSaliency`.
    """

    own_tokens = True  # the choice is one of all queries
    density: float
    score: Score = Estimated()
    target: Target = "error"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.density) and 0 < self.density <= 1, "density must be a share of key blocks in (0, 1]", self.density)
        check_part(self.score, Score, "score")
        require(self.target in TARGETS, f"target must be one of {TARGETS}", self.target)

    @property
    def share(self) -> float:
        return self.density

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"columns.weight": torch.zeros(heads, head_dim)}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"columns.weight": 1 / head_dim}

    def choose(self, call: Call) -> BlockMap:
        with torch.no_grad():
            best = best_blocks(self.said(call), self.count(len(call.k_blocks.count)))
            index = best.index.expand(-1, len(call.q_blocks.count), -1)
            return BlockMap(index, torch.ones_like(index, dtype=torch.bool), complete=True)

    def said(self, call: Call, rows: Tensor | None = None) -> Tensor:
        """One row, of all query blocks together."""
        with torch.no_grad():
            share = _logits(self.score, call).log_softmax(-1).logsumexp(-2, keepdim=True)  # of so many query blocks, which matters not
        learned = call.per_head("columns.weight")[:, None].double() @ call.key_means(call.k).double().mT
        return (share + learned).log_softmax(-1)

    def goal(self, call: Call, rows: Tensor | None = None) -> Tensor:
        """What blocks are worth to a query block, by `target`, the mean over query blocks."""
        return worth(call, self.target, rows).mean(-2, keepdim=True)

    def cost(self, sizes: Sizes) -> Cost:
        return self.score.cost(sizes) + Cost(sizes.k_blocks * sizes.head_dim)


def _logits(score: Score, call: Call) -> Tensor:
    """What a score's softmax over key blocks is of, `[BH, Tq, Tk]`, float64."""
    logits = call.scale * score(call).double()
    return logits + call.k_blocks.count.log() if score.mass and not score.counts else logits


def _shares(score: Score, call: Call) -> Tensor:
    """That softmax: of a score of mass, each block's share of the attention."""
    return _logits(score, call).softmax(-1)
