"""Linear attention as a rest."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.blocks import mean_product, pool_blocks
from dit_accel.kernels.reference import FEATURE_MAPS, Partial
from dit_accel.method.checks import is_real, require
from dit_accel.method.parts.base import Features, KeyWeight, Part, Readout, Rest, check_part
from dit_accel.method.parts.call import Call, Cost, Far, FarSums, Frame, Sizes
from dit_accel.method.parts.merges import Mass

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec

SCOPES = ("complement", "all", "marginal")


@dataclass(frozen=True)
class Linear(Rest):
    """Linear attention phi(q)·(phi(K)ᵀV) / phi(q)·sum phi(K), over the blocks not kept or over all (SLA, arXiv 2509.24006, eq. 5).

    `feature_map`: phi by name, or a part. `scope` "marginal": over the blocks not kept but those that are negligible, for each query block
    the floor(`negligible` · key blocks) ones with the smallest product of means q̄·k̄ (SLA, eq. 2 and 3). `weights`: how much each key
    counts. `readout`: what is made of the weighted mean.
    """

    feature_map: Literal["softmax", "elu", "relu"] | Features = "softmax"
    scope: Literal["complement", "all", "marginal"] = "complement"
    negligible: float = 0.1
    weights: KeyWeight | None = None
    readout: Readout | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feature_map, Features):
            check_part(self.feature_map, Features, "feature_map")
        else:
            rule = f"feature_map must be one of {tuple(FEATURE_MAPS)} or a part that is a feature map"
            require(isinstance(self.feature_map, str) and self.feature_map in tuple(FEATURE_MAPS), rule, self.feature_map)
        require(self.scope in SCOPES, "scope must be 'complement', 'all' or 'marginal'", self.scope)
        share = is_real(self.negligible) and 0 <= self.negligible < 1
        require(share, "negligible must be a share of key blocks in [0, 1)", self.negligible)
        for name, slot in (("weights", KeyWeight), ("readout", Readout)):
            if (value := getattr(self, name)) is not None:
                check_part(value, slot, name)
        massless = self.over_tokens and self.readout is not None
        require(not massless, "readout must be None with features that are divided by their sum over the tokens", self.readout)

    @property
    def whole_blocks(self) -> bool:
        return self.scope != "all"

    @property
    def plain(self) -> bool:
        """Nothing but a feature map with a name, over the blocks not kept or over all."""
        plain_map = isinstance(self.feature_map, str) and self.weights is None
        return plain_map and self.readout is None and self.scope != "marginal"

    @property
    def over_tokens(self) -> bool:
        """Whether the features are divided by their sums, so that there is no mass."""
        return isinstance(self.feature_map, Features) and self.feature_map.over_tokens

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        """With those of its fields."""
        scopes = {"all": "all blocks, kept ones too", "marginal": "blocks not kept, but for the least"}
        of_blocks = scopes.get(self.scope, "blocks not kept")
        weighs = f"{of_blocks}: 1" if self.weights is None else f"{of_blocks}: {self.weights.frame.gate}"
        reads = "φ(q)·Σ / φ(q)·Σ" if self.readout is None else f"φ(q)·Σ / φ(q)·Σ, {self.readout.frame.readout}"
        return Frame(f"Σ φ(k) vᵀ and Σ φ(k) of each block, φ = {self.feature_map}", weighs, reads)

    def check(self, spec: "AttentionSpec") -> None:
        super().check(spec)
        massless = self.over_tokens and isinstance(spec.merge, Mass)
        require(not massless, f"the merge of {self} must be one that reads no mass, as Residual()", spec.merge)

    @property
    def far(self) -> type[Far] | None:
        parts = (self.feature_map, self.weights, self.readout)
        by_token = all(part.by_token for part in parts if isinstance(part, Part))
        return FarSums if by_token and self.scope != "marginal" and not self.over_tokens else None

    def over(self, call: Call, far: Far) -> Partial:
        if not isinstance(far, FarSums) or self.far is None:
            return super().over(call, far)
        return self._of(call, far.sums)

    def factors(self, call: Call) -> tuple[Tensor, Tensor]:
        if self.far is None:
            return super().factors(call)
        phi, v = self._keys(self._features(call.q[:, :0], "q", call), call)
        return (phi if self.readout is None else torch.cat([phi, torch.ones_like(phi[..., :1])], -1)), v

    def features(self, head_dim: int) -> int:
        if self.far is None:
            return super().features(head_dim)
        return self._width(head_dim) + (self.readout is not None)

    def __call__(self, call: Call) -> Partial:
        return self._of(call, None)

    def _of(self, call: Call, sums: Tensor | None) -> Partial:
        """`sums`: as in `FarSums`."""
        phi_q = self._features(call.q, "q", call)
        phi_k, v = self._keys(phi_q, call)
        blocks = None if self.scope == "all" else self._blocks(call)
        if self.over_tokens:  # in float64: among keys that are not kept the largest feature may be far from the largest of all
            out = _undivided(_over_sums(phi_q, phi_k, blocks, call), phi_k, v.double(), blocks, call)
            return out.to(call.q.dtype), torch.zeros_like(call.q[..., 0])
        of_keys, of_ones = (None, None) if sums is None else (sums[:, : phi_k.shape[-1]], sums[:, phi_k.shape[-1] :])
        rest = _linear(phi_q, phi_k, v, blocks, call, of_keys)
        if self.readout is None:
            return rest
        mean = _linear(torch.ones_like(phi_q[..., :1]), torch.ones_like(phi_k[..., :1]), v, blocks, call, of_ones)
        return self.readout(rest, mean, call)

    def _keys(self, phi_q: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """The keys' features and the values, weighted."""
        phi_k = self._features(call.k, "k", call)
        return (phi_k, call.v) if self.weights is None else self.weights(phi_q, phi_k, call)

    def _width(self, head_dim: int) -> int:
        return head_dim if isinstance(self.feature_map, str) else self.feature_map.width(head_dim)

    def _features(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        if isinstance(self.feature_map, Features):
            return self.feature_map(x, side, call)
        return FEATURE_MAPS[self.feature_map](x)

    def _blocks(self, call: Call) -> Tensor:
        """The key blocks `[..., Tq, Tk]` whose states each query block adds up."""
        left = ~call.kept
        count = math.floor(self.negligible * len(call.k_blocks.count) + 1e-9) if self.scope == "marginal" else 0
        if not count:
            return left
        score = mean_product(pool_blocks(call.q.detach(), call.q_blocks)[0], call.key_means(call.k.detach()))
        return left.expand_as(score).scatter(-1, score.topk(count, -1, largest=False).indices, False)

    def cost(self, sizes: Sizes) -> Cost:
        """States once and one product with each query; but of all blocks, also the sum of states for each query block; and its parts."""
        phi = self.feature_map
        found = Cost(passes=2) if isinstance(phi, str) else Cost(passes=2) + phi.cost(sizes)
        width = self._width(sizes.head_dim)
        for channels in (width,) if self.readout is None else (width, 1):  # a readout requires the mean of the values too
            found += Cost(2 * sizes.tokens * channels * sizes.head_dim)
            if self.scope != "all":
                found += Cost(sizes.q_blocks * sizes.k_blocks * channels * sizes.head_dim)
        if self.scope == "marginal":
            found += Cost(sizes.q_blocks * sizes.k_blocks * sizes.head_dim, 2)
        return found + (self.weights.cost(sizes) if self.weights else Cost()) + (self.readout.cost(sizes) if self.readout else Cost())


def _linear(phi_q: Tensor, phi_k: Tensor, v: Tensor, blocks: Tensor | None, call: Call, far: Tensor | None = None) -> Partial:
    """Over the tokens of some key blocks for each query block, or of all, and in each case those of `far`."""
    if blocks is None:
        return reference.linear_attention(phi_q, phi_k, v, far)
    return reference.linear_attention_rest(phi_q, phi_k, v, blocks, call.q_blocks, call.k_blocks, far)


def _over_sums(phi_q: Tensor, phi_k: Tensor, blocks: Tensor | None, call: Call) -> Tensor:
    """The queries' features divided by the sums of the keys' over the same tokens; 0 where there are none."""
    if blocks is None:
        return phi_q / phi_k.sum(1, keepdim=True).clamp_min(torch.finfo(phi_k.dtype).tiny)
    sums = (call.k_blocks.gather(phi_k) * call.k_blocks.valid[..., None]).sum(-2)
    total = (blocks.to(sums.dtype) @ sums)[..., None, :]
    safe = total.clamp_min(torch.finfo(total.dtype).tiny)
    return call.q_blocks.ungather(torch.where(total > 0, call.q_blocks.gather(phi_q) / safe, 0))


def _undivided(phi_q: Tensor, phi_k: Tensor, v: Tensor, blocks: Tensor | None, call: Call) -> Tensor:
    """Σ (phi_q·phi_k) v, of queries' features of either sign: those above 0 and those below, each as mean times mass."""
    more, less = (_linear(torch.relu(part), phi_k, v, blocks, call) for part in (phi_q, -phi_q))
    return more[0] * more[1].exp()[..., None] - less[0] * less[1].exp()[..., None]
