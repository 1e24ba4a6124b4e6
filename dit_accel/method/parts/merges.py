"""Merges: how the exact part and the rest become one."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.reference import Partial, merge_partials
from dit_accel.method.checks import require
from dit_accel.method.parts.base import Merge
from dit_accel.method.parts.call import Call

EPS = 1e-6  # of the mean square


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

    `offset`: c is learned, one per head, zero at start; without it c = 0. "query": c = b_h + w_h·q, both learned and zero at start: the
    parts' weights depend on the query, as those of SEA (arXiv 2310.01777) and NAtS-L (2602.03681) do.
    """

    fit = "descent"
    offset: bool | Literal["query"] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(isinstance(self.offset, bool) or self.offset == "query", "offset must be True, False or 'query'", self.offset)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        of_query = {"offset_query": torch.zeros(heads, head_dim)} if self.offset == "query" else {}
        return {"offset": torch.zeros(heads)} | of_query if self.offset else {}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"offset_query": 1 / head_dim}

    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        out, mass = rest
        if self.offset == "query":
            mass = mass + (call.q @ call.per_head("offset_query")[..., None])[..., 0]
        return merge_partials([exact, (out, mass + call.per_head("offset")[:, None] if self.offset else mass)])


@dataclass(frozen=True)
class Norm(Merge):
    """out = exact + g · norm(rest): the length of the rest's output in place of its mass; g is learned and zero at start.

    The papers normalise the numerator num = Σ weight · v in place of dividing it: "rms" is num / RMS(num) with one g per head and channel
    (TransNormer, arXiv 2210.10340; LightNet, 2405.21022), "simple" the same with one g per head (TransNormerLLM's SRMSNorm, 2307.14995),
    "l2" num / ‖num‖ with g per head and channel (softmax attention as an RNN, 2507.23632). A norm is blind to the size of its input, and
    num is the rest's output times exp(log mass): here the output is normalised, which is the same and can't overflow. RMS(x) is
    sqrt(mean x² + 1e-6) of that output, so that an empty rest adds nothing. The lse is that of the exact part.
    """

    fit = "descent"
    kind: Literal["rms", "simple", "l2"] = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in ("rms", "simple", "l2"), "kind must be 'rms', 'simple' or 'l2'", self.kind)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"norm.gain": torch.zeros(heads, 1 if self.kind == "simple" else head_dim)}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"norm.gain": 0.3}

    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        normed = rest[0] * (rest[0].square().mean(-1, keepdim=True) + EPS).rsqrt()
        length = normed.shape[-1] ** -0.5 if self.kind == "l2" else 1.0
        return exact[0] + call.per_head("norm.gain")[:, None] * (length * normed), exact[1]
