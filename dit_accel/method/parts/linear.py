"""Linear attention as a rest."""

from dataclasses import dataclass
from typing import Literal

from dit_accel.kernels import reference
from dit_accel.kernels.reference import FEATURE_MAPS, Partial
from dit_accel.method.checks import require
from dit_accel.method.parts.base import Rest
from dit_accel.method.parts.call import Call, Cost, Sizes


@dataclass(frozen=True)
class Linear(Rest):
    """Linear attention phi(q)·(phi(K)ᵀV) / phi(q)·sum phi(K), over the blocks not kept or over all (SLA, arXiv 2509.24006, eq. 5)."""

    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    scope: Literal["complement", "all"] = "complement"

    def __post_init__(self) -> None:
        require(self.feature_map in tuple(FEATURE_MAPS), f"feature_map must be one of {tuple(FEATURE_MAPS)}", self.feature_map)
        require(self.scope in ("complement", "all"), "scope must be 'complement' or 'all'", self.scope)

    @property
    def whole_blocks(self) -> bool:
        return self.scope == "complement"

    def __call__(self, call: Call) -> Partial:
        phi = FEATURE_MAPS[self.feature_map]
        if self.scope == "all":
            return reference.linear_attention(phi(call.q), phi(call.k), call.v)
        return reference.linear_attention_rest(phi(call.q), phi(call.k), call.v, ~call.kept, call.q_blocks, call.k_blocks)

    def cost(self, sizes: Sizes) -> Cost:
        """States once and one product with each query; of the complement also the sum of states for each query block."""
        work = 2 * sizes.tokens * sizes.head_dim**2
        if self.scope == "complement":
            work += sizes.q_blocks * sizes.k_blocks * sizes.head_dim**2
        return Cost(work, 2)
