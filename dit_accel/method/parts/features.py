"""Feature maps of linear attention, of any width; all run in torch."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.method.checks import flag, is_int, is_real, require
from dit_accel.method.parts.base import Features
from dit_accel.method.parts.call import Call, Cost, Sizes

LEAST = 1e-6  # of a feature that is a softmax: in float32 it rounds to 0 far from the largest, and then has no gradient


def _half(x: Tensor) -> Tensor:
    """The lower triangular half of the second moments of tokens `[H, N, D]`, kept from being singular."""
    moments = x.mT @ x / x.shape[1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None].clamp_min(1e-12)
    return torch.linalg.cholesky(moments + 1e-6 * mean * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device))


def _both_signs(x: Tensor) -> Tensor:
    """[softmax(x) | softmax(-x)] over the channels."""
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1).clamp_min(LEAST)


@dataclass(frozen=True)
class Hedgehog(Features):
    """phi(x) = [softmax(Wx) | softmax(-Wx)] over the channels, F = 2D (Hedgehog, arXiv 2402.04347, as LoLCATs' code has it).

    W `[D, D]` is learned for each head, apart for queries and keys, the identity at start. `joint`: one softmax over [2y | -2y] with
    y = Wx + b, b zero at start, as in the flash-linear-attention library.
    """

    fit, by_token = "descent", True
    joint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("joint", self.joint)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        found = {f"hedgehog.{side}": torch.eye(head_dim).repeat(heads, 1, 1) for side in "qk"}
        return found | ({f"hedgehog.bias_{side}": torch.zeros(heads, head_dim) for side in "qk"} if self.joint else {})

    def rates(self, head_dim: int) -> dict[str, float]:
        return {f"hedgehog.{side}": 1 / head_dim for side in "qk"}

    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        y = x @ call.per_head(f"hedgehog.{side}").mT
        if not self.joint:
            return _both_signs(y)
        y = 2 * (y + call.per_head(f"hedgehog.bias_{side}")[:, None])
        return torch.cat([y, -y], -1).softmax(-1).clamp_min(LEAST)

    def cost(self, sizes: Sizes) -> Cost:
        """W of queries and keys; the features are written, twice as wide."""
        return Cost(2 * sizes.tokens * sizes.head_dim**2, 4)


@dataclass(frozen=True)
class NormPower(Features):
    """phi(q) = [max(q, 0)/‖q‖ | max(-q, 0)/‖q‖]^p, phi(k) = [max(k, 0)³ | max(-k, 0)³], F = 2D (NaLaFormer, arXiv 2506.21137).

    p = `power` · (1 + a·tanh(r·(‖q‖ - m))): the longer the query, the sharper. a, r, m are learned for each head, untrained 0, 1 and √D,
    the length of a query after a norm without gain; a distillation starts at the first queries' mean length m and 1/r, its deviation. The
    paper's p, 3 · (1/2 + tanh ‖q‖), is power 1.5, a = 2, r = 1, m = 0. Bases of q are
    at least 1e-4.
    """

    fit, starts, by_token = "descent", True, True
    power: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.power) and self.power > 0, "power must be a number > 0", self.power)

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        start = {"gain": 0.0, "rate": 1.0, "middle": head_dim**0.5}
        return {f"norm_power.{name}": torch.full((heads,), value) for name, value in start.items()}

    def start(self, call: Call) -> dict[str, Tensor]:
        length = torch.linalg.vector_norm(call.of_heads(call.q), dim=-1)
        return {"norm_power.middle": length.mean(-1), "norm_power.rate": 1 / length.std(-1, correction=0).clamp_min(0.01)}

    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        both = torch.relu(torch.cat([x, -x], -1))
        if side == "k":
            return both**3
        gain, rate, middle = (call.per_head(f"norm_power.{name}")[:, None, None] for name in ("gain", "rate", "middle"))
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(LEAST)
        return (both / length).clamp_min(1e-4) ** (self.power * (1 + gain * torch.tanh(rate * (length - middle))))

    def cost(self, sizes: Sizes) -> Cost:
        """The features are written, twice as wide; powers and lengths of each token."""
        return Cost(2 * sizes.tokens * sizes.head_dim, 4)


@dataclass(frozen=True)
class NormPreserving(Features):
    """phi(x) = [softmax(u) | softmax(-u)], u = ‖x‖·y/‖y‖, y = Mx (STILL, arXiv 2602.02180).

    A learned map that keeps the length of each query and key, F = 2D. M `[D, D]` is learned for each head, apart for queries and keys, and
    starts as a reflection I - 2uuᵀ. The unit vector, random in the paper, is u for each head: component d of head h is proportional to
    sin((h + 1)(d + 1)). The paper multiplies each M by that reflection, which M contains here: a call does not know which of a layer's
    heads it has, where others have another method or another process.
    """

    fit, by_token = "descent", True

    def width(self, head_dim: int) -> int:
        return 2 * head_dim

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        axis = F.normalize(torch.sin(torch.arange(1.0, heads + 1)[:, None] * torch.arange(1.0, head_dim + 1)), dim=-1)
        return {f"norm_preserving.map_{side}": torch.eye(head_dim) - 2 * axis[:, :, None] * axis[:, None] for side in "qk"}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {f"norm_preserving.map_{side}": 1 / head_dim for side in "qk"}

    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        y = x @ call.per_head(f"norm_preserving.map_{side}").mT
        length, changed = (torch.linalg.vector_norm(z, dim=-1, keepdim=True) for z in (x, y))
        return _both_signs(length / changed.clamp_min(LEAST) * y)

    def cost(self, sizes: Sizes) -> Cost:
        """M of queries and keys; the features are written, twice as wide."""
        return Cost(2 * sizes.tokens * sizes.head_dim**2, 4)


@dataclass(frozen=True)
class Taylor(Features):
    """phi(x) = [1 | x' | x'_a²/√2 | x'_a x'_b, a < b] with x' = Px `[rank]`: phi(q)·phi(k) = 1 + t + t²/2, t = q'·k' (BASED).

    The exponential's Taylor series to second order in few channels (arXiv 2402.18668), F = 1 + rank · (rank + 3) / 2: 153 of 16. P of
    queries and of keys is learned for each head. Untrained it takes `rank` channels at even distances, and t is their logit scaled up to
    all channels: t = s · D/rank · Σ q_d k_d. A distillation starts where t is nearest to the logits of the first queries and keys, in the
    mean square over all pairs.
    """

    fit, starts, by_token = "descent", True, True
    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.rank) and self.rank >= 1, "rank must be a number of channels >= 1", self.rank)

    def width(self, head_dim: int) -> int:
        rank = min(self.rank, head_dim)
        return 1 + rank * (rank + 3) // 2

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        rank = min(self.rank, head_dim)
        taken = torch.eye(head_dim)[torch.arange(rank) * head_dim // rank] * math.sqrt(head_dim / rank)
        return {f"taylor.{side}": taken.repeat(heads, 1, 1) for side in "qk"}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {f"taylor.{side}": 1 / head_dim for side in "qk"}

    def start(self, call: Call) -> dict[str, Tensor]:
        """E[q qᵀ] = A Aᵀ and E[k kᵀ] = B Bᵀ; of Aᵀ B = U Σ Vᵀ the largest: P_q = √Σ Uᵀ A⁻¹, P_k = √Σ Vᵀ B⁻¹."""
        halves = [_half(call.of_heads(x)) for x in (call.q, call.k)]
        left, size, right = torch.linalg.svd(halves[0].mT @ halves[1])
        rank = min(self.rank, left.shape[-1])
        chosen = [side[..., :rank] * size[:, None, :rank].sqrt() for side in (left, right.mT)]
        solved = [torch.linalg.solve_triangular(half.mT, x, upper=True) for half, x in zip(halves, chosen, strict=True)]
        return {f"taylor.{side}": x.mT for side, x in zip("qk", solved, strict=True)}

    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        x = call.scale**0.5 * x @ call.per_head(f"taylor.{side}").mT
        a, b = torch.triu_indices(x.shape[-1], x.shape[-1], 1, device=x.device)
        return torch.cat([torch.ones_like(x[..., :1]), x, x.square() / math.sqrt(2), x[..., a] * x[..., b]], -1)

    def cost(self, sizes: Sizes) -> Cost:
        """P of queries and keys and the products; the features are written."""
        rank, width = min(self.rank, sizes.head_dim), self.width(sizes.head_dim)
        return Cost(2 * sizes.tokens * (rank * sizes.head_dim + width), 2 * math.ceil(width / sizes.head_dim))


@dataclass(frozen=True)
class TokenSoftmax(Features):
    """phi(q) = SiLU(q), phi(k) = softmax(k) over the tokens of the rest, channel by channel (LightNet, arXiv 2405.21022), F = D.

    Every channel holds a weighted mean of the values, of which each query takes a sum; no mass says how much the rest counts, so the merge
    must be one that reads none. In float64, for keys whose channels are up to 700 apart. The paper's scan is causal; here all tokens of the
    rest are seen, and its rotation is already in q and k.
    """

    over_tokens = True

    def width(self, head_dim: int) -> int:
        return head_dim

    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        x = x.double()
        return F.silu(x) if side == "q" else (x - x.detach().amax(1, keepdim=True)).exp()  # `Linear` divides

    def cost(self, sizes: Sizes) -> Cost:
        """Sums of the keys' features for each query block, and a second product for features below 0; the features are written."""
        own = sizes.tokens * sizes.head_dim * (2 + 2 * sizes.head_dim)
        return Cost(own + sizes.q_blocks * sizes.k_blocks * sizes.head_dim * (1 + sizes.head_dim), 2)
