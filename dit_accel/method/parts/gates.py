"""Gates of the output."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.method.checks import require
from dit_accel.method.parts.base import Extra
from dit_accel.method.parts.call import Call, Cost, Sizes


@dataclass(frozen=True)
class OutputGate(Extra):
    """out ⊙ 2σ(w_h·q), one number for each query and head, or out ⊙ (1 + W_h v), one for each channel; w and W zero at start.

    Sources: the output gates of MiniCPM-SALA and LT2 (arXiv 2605.20670), and by channel of RALA (arXiv 2411.07635), there of the layer's
    input; q and v are its images here, q after norm and rotary embedding.
    """

    fit = "descent"
    per: Literal["head", "channel"] = "head"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.per in ("head", "channel"), "per must be 'head' or 'channel'", self.per)

    @property
    def own_tokens(self) -> bool:  # type: ignore[override]  # v is of the keys' tokens
        return self.per == "channel"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"output_gate.weight": torch.zeros(heads, head_dim, *(head_dim,) * (self.per == "channel"))}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"output_gate.weight": 1 / head_dim}

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        weight = call.per_head("output_gate.weight")
        return out * (2 * (call.q @ weight[..., None]).sigmoid() if self.per == "head" else 1 + call.v @ weight.mT)

    def cost(self, sizes: Sizes) -> Cost:
        """A query or a value is read once more, and the output read and written."""
        work = sizes.tokens * sizes.head_dim
        return Cost(work * (sizes.head_dim if self.per == "channel" else 1), 3)
