"""Few keys in the place of many, as a rest: one softmax over them and the kept keys."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.blocks import pool_blocks
from dit_accel.kernels.grouping import MEMBERS
from dit_accel.kernels.reference import Partial
from dit_accel.kernels.splitting import STEPS
from dit_accel.method.checks import flag, is_int, is_real, require
from dit_accel.method.parts import groups
from dit_accel.method.parts.base import Rest
from dit_accel.method.parts.call import Call, Cost, Far, FarBlocks, FarKeys, Frame, Ground, Moments, Sizes
from dit_accel.method.parts.content import PooledKeys, moments_of, pool_parts, slopes_of_queries, tilted
from dit_accel.method.parts.merges import Mass

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec


@dataclass(frozen=True)
class Pooled(Rest):
    """Pooled keys and values for each block not kept (Fovea): logit s·q·k̄ + log n + min(σ²/2, cap), σ² = s² · Σ_d q_d² Var(k_d).

    The second-order cumulant expansion of the block's true softmax mass. `log_count` and `variance` switch the last two terms.

    `parts`: 1, 2 or 4 pooled keys for a block, split by content (`content.split_by_content`). `order`: 1 adds the first order of the
    block's value in the query, s S_I q (`content.tilted`); 0 is the mean value alone. `opened`: blocks are summarised in groups, and groups
    of groups, and of each level four query blocks in a row see the members of this many in their place, those that would leave the largest
    error (`groups`); None: every block is summarised by itself. With any of the three q_d² in σ² is its mean over the head's queries, so
    that the term is one number for each pooled key. Relatives: docs/methods.md.
    """

    log_count: bool = True
    variance: bool = True
    cap: float = 2.0
    parts: int = 1
    order: int = 0
    opened: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.cap) and self.cap >= 0, "cap must be a number >= 0", self.cap)
        flag("log_count", self.log_count)
        flag("variance", self.variance)
        require(is_int(self.parts) and self.parts in (1, 2, 4), "parts must be 1, 2 or 4 pooled keys for a block", self.parts)
        require(
            is_int(self.order) and self.order in (0, 1), "order must be 0, the mean value, or 1, its slope in the query too", self.order
        )
        grouped = self.opened is None or (is_int(self.opened) and self.opened >= 1)
        require(grouped, "opened must be a number of groups >= 1, or None for no groups", self.opened)

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        """By the numbers of keys and the order."""
        keys = "a mean key and value" if self.parts == 1 else f"{self.parts} mean keys and values"
        held = f"{keys} of each block" + (" and Cov(v, k)" if self.order else "") + (", of far ones by group" if self.opened else "")
        reads = "in one softmax with the kept keys" + (", and s·Cov q" if self.order else "")
        return Frame(held, "blocks not kept: n · exp(σ²/2)", reads)

    @property
    def whole_blocks(self) -> bool:
        return True

    @property
    def plain(self) -> bool:
        """One pooled key for every block, and nothing but its mean value."""
        return self.parts == 1 and self.order == 0 and self.opened is None

    def check(self, spec: "AttentionSpec") -> None:
        super().check(spec)
        require(isinstance(spec.merge, Mass), "the merge of pooled keys must be Mass()", spec.merge)

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        return {} if self.opened is None else groups.group_blocks(ground, 2 * self.opened)

    def __call__(self, call: Call) -> Partial:
        if self.opened is not None:
            return self._grouped(call, self.opened)
        kept = call.kept
        if self.plain:
            return self._of_moments(call, Moments.of(call.k, call.v, call.k_blocks), kept)
        pooled = self.pooled(call)
        rest = self._over(call, pooled, kept.repeat_interleave(self.parts, -1))
        return (rest[0] + tilted(call, slopes_of_queries(call, pooled, self.parts)), rest[1]) if self.order else rest

    @property
    def far(self) -> type[Far] | None:
        return FarBlocks if self.plain else None

    def over(self, call: Call, far: Far) -> Partial:
        if not isinstance(far, FarBlocks) or not self.plain:
            return super().over(call, far)
        return self._of_moments(call, far.moments, far.kept)

    def _of_moments(self, call: Call, moments: Moments, kept: Tensor) -> Partial:
        log_n = moments.tokens.to(call.q.dtype).log() if self.log_count else None
        variance = moments.variance if self.variance else None
        return reference.pooled_attention(
            call.q, moments.key, moments.value, variance, log_n, kept, call.q_blocks, scale=call.scale, cap=self.cap
        )

    def _grouped(self, call: Call, opened: int) -> Partial:
        queries, roots = groups.Queries.of(call, self.parts), len(call.prepared["far_roots"])
        lowest = moments_of(groups.key_slots(call), self.parts, slope=self.order > 0)
        by_level = groups.moments_by_level(lowest, roots, self.parts, queries)
        means = groups.span_means(pool_blocks(call.q, call.q_blocks)[0], call.q_blocks)
        scores = groups.scores_of(means, by_level[1:], self.cap, queries)
        seen = groups.listed(call.kept.expand(len(call.q), -1, -1), scores, call.prepared, opened)
        blocks = len(call.q_blocks.count)
        pooled = groups.joined([level.pooled(log_count=self.log_count, cap=self.most) for level in by_level])
        rest = self._over(call, pooled, groups.hidden(seen, self.parts, blocks))
        if not self.order:
            return rest
        weights = groups.weights_of_spans(means, pooled, seen, self.parts, call.scale)
        slopes = groups.of_blocks(groups.slopes_of_spans(weights, by_level), blocks)
        return rest[0] + tilted(call, slopes), rest[1]

    def _over(self, call: Call, pooled: PooledKeys, without: Tensor) -> Partial:
        """The softmax over the pooled keys but those that a query block is `without` `[..., Tq, P]`."""
        bias = pooled.bias[:, None, None]  # in place of log n: of each head
        return reference.pooled_attention(
            call.q, pooled.key, pooled.value, None, bias, without, call.q_blocks, scale=call.scale, cap=self.cap
        )

    @property
    def most(self) -> float:
        """What half the variance of the logits adds to a pooled key's bias at most."""
        return self.cap if self.variance else 0.0

    def pooled(self, call: Call) -> PooledKeys:
        """The pooled keys of all blocks."""
        return pool_parts(call, self.parts, log_count=self.log_count, cap=self.most, slope=self.order > 0)

    def cost(self, sizes: Sizes) -> Cost:
        """One block in one part to order 0: logits from q and q², one value for each pooled key.

        Else logits and values of the pooled keys that are seen, and the split and the moments of the parts; to order 1 also the slopes, the
        logits of mean queries, the states S and their products with the queries. The states, at most about N × D numbers, are written and
        read. Groups that are opened because of a kept block are not counted: the choice knows them, not the sizes.
        """
        n, d = sizes.tokens, sizes.head_dim
        if self.plain:
            return Cost((3 if self.variance else 2) * n * sizes.k_blocks * d, 2)
        units, states = self._units(sizes), sizes.q_blocks if self.opened is None else -(-sizes.q_blocks // SPAN)
        seen = units[-1] + sum((MEMBERS - 1) * min(self.opened or 0, above) for above in units[1:])
        halves = self.parts - 1  # blocks and parts that are cut in two
        split = n * d**2 + sum(halves * (STEPS * (2 * n * d + count * d**2) + n * d) for count in units) if halves else 0
        adds = 2 * n * self.parts * seen * d + split + 4 * len(units) * self.parts * n * d
        if not self.order:
            return Cost(adds, 2)
        return Cost(adds + n * d**2 + len(units) * (n * d**2 + self.parts * n * d) + states * seen * (self.parts * d + d**2), 4)

    def _units(self, sizes: Sizes) -> list[int]:
        """About how many units each level has."""
        units = [sizes.k_blocks]
        while self.opened is not None and -(-units[-1] // MEMBERS) >= 2 * self.opened:
            units.append(-(-units[-1] // MEMBERS))
        return units


@dataclass(frozen=True)
class Downsampled(Rest):
    """CLEAR's learned pooled keys: each factor × factor patch of K and V summed with learned weights (1/factor² at start), seen by every
    image query as one ordinary key (arXiv 2412.16112)."""

    frame = Frame("one key and value for each few places", "learned weights of these places", "in one softmax with the kept keys")
    fit = "descent"
    factor: int

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.factor) and self.factor >= 2, "downsample must be None or an int >= 2", self.factor)

    def check(self, spec: "AttentionSpec") -> None:
        super().check(spec)
        plain_mass = isinstance(spec.merge, Mass) and not spec.merge.offset
        require(plain_mass, "the merge of down-sampled keys, whose learned weights scale them, must be Mass(offset=False)", spec.merge)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"spatial_weight": torch.full((self.factor, self.factor), 1 / self.factor**2)}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        """`cells` `[N]`: the place of each token among the factor² of each patch, through all frames of all images; `patch_tokens` `[M]`:
        the tokens of each patch."""
        t, y, x, image = ground.coords.unbind(-1)
        sizes = [(t, -(-h // self.factor), -(-w // self.factor)) for t, h, w in ground.grids]
        before = torch.tensor([0, *(math.prod(size) for size in sizes)]).cumsum(0)
        rows, columns = torch.tensor(sizes)[image, 1:].unbind(-1)
        patch = before[image] + (t * rows + y // self.factor) * columns + x // self.factor
        cells = (patch * self.factor + y % self.factor) * self.factor + x % self.factor
        return {"cells": cells, "patch_tokens": patch.bincount(minlength=int(before[-1]))}

    @property
    def far(self) -> type[Far] | None:
        return FarKeys

    def over(self, call: Call, far: Far) -> Partial:
        if not isinstance(far, FarKeys):
            return super().over(call, far)
        return call.dense(call.q, far.key, far.value, scale=call.scale)

    def in_part(self, prepared: Mapping[str, Tensor], tokens: slice) -> tuple[dict[str, Tensor], Tensor]:
        cells, area = prepared["cells"][tokens], self.factor**2
        numbers, patch = (cells // area).unique(return_inverse=True)
        return {"cells": patch * area + cells % area, "patch_tokens": prepared["patch_tokens"][numbers]}, numbers

    def keys_of(self, x: Tensor, prepared: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> Tensor:
        """The weighted sums `[BH, M, D]` of the patches of keys or values `[BH, N, D]`.

        A patch cut off by the border is scaled by factor² over its number of tokens, so that weights of 1/factor² average it.
        """
        counts = prepared["patch_tokens"].to(x.dtype)
        weight = learned["spatial_weight"].to(x.dtype).flatten() * (self.factor**2 / counts)[:, None]  # [M, factor²]
        # each token goes to a cell of its own and each sum has one order: the same to the bit each time, on a GPU too, backward as forward
        cells = x.new_zeros(x.shape[0], weight.numel(), x.shape[2]).index_copy(1, prepared["cells"], x)
        return (cells.unflatten(1, weight.shape) * weight[..., None]).sum(2)

    def __call__(self, call: Call) -> Partial:
        keys, values = (self.keys_of(x, call.prepared, call.learned) for x in (call.k, call.v))
        return call.dense(call.q, keys, values, scale=call.scale)

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(2 * sizes.tokens**2 * sizes.head_dim / self.factor**2, 2)
