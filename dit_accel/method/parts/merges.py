"""Merges: how the exact part and the rest become one."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.reference import Partial, merge_partials
from dit_accel.method.checks import flag
from dit_accel.method.parts.base import Merge
from dit_accel.method.parts.call import Call


@dataclass(frozen=True)
class Residual(Merge):
    """out = exact + rest · Wᵀ + b with W, b learned, zero at start and shared by the heads (SLA). The lse is that of the exact part."""

    fit = "least_squares"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"proj.weight": torch.zeros(head_dim, head_dim), "proj.bias": torch.zeros(head_dim)}

    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        return exact[0] + rest[0] @ call.own("proj.weight").T + call.own("proj.bias"), exact[1]


@dataclass(frozen=True)
class Mass(Merge):
    """The two parts weighted by their softmax mass, exp(lse) and exp(log mass of the rest + c): one softmax over both.

    `offset`: c is learned, one per head, zero at start; without it c = 0.
    """

    fit = "descent"
    offset: bool = True

    def __post_init__(self) -> None:
        flag("offset", self.offset)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"offset": torch.zeros(heads)} if self.offset else {}

    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        out, mass = rest
        return merge_partials([exact, (out, mass + call.per_head("offset")[:, None] if self.offset else mass)])
