"""Weights of keys in linear attention, and what is made of its weighted mean; all run in torch."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.reference import Partial
from dit_accel.method.checks import is_real, require
from dit_accel.method.parts.base import KeyWeight, Readout
from dit_accel.method.parts.call import Call, Cost, Frame, Sizes

MOST = 20.0  # of the logarithm of a gate: exp(20) is 5e8


@dataclass(frozen=True)
class RankAugmented(KeyWeight):
    """Features of key j times a_j = N · softmax_j(τ·s·mean_i phi(q_i)·phi(k_j)) (RALA, arXiv 2411.07635).

    The weights' mean is 1. τ is learned for each head, zero at start, where all are 1; the paper's is 1. The softmax is over all N image
    tokens, those kept among them, and the mean over all queries.
    """

    frame = Frame("", "N · softmax(τ s mean φ(q) · φ(k))", "")
    fit, own_tokens = "descent", True  # of a part of the queries the mean is another

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"rank_augmented.temperature": torch.zeros(heads)}

    def __call__(self, phi_q: Tensor, phi_k: Tensor, call: Call) -> Partial:
        logits = (phi_k @ phi_q.mean(1, keepdim=True).mT) * (call.scale * call.per_head("rank_augmented.temperature"))[:, None, None]
        return phi_k * (phi_k.shape[1] * logits.softmax(1)), call.v

    def cost(self, sizes: Sizes) -> Cost:
        """The mean of the queries' features and a product with each key's; both are read, and the keys' are written."""
        return Cost(3 * sizes.tokens * sizes.head_dim, 3)


@dataclass(frozen=True)
class KVGate(KeyWeight):
    """Features of key j times exp(w·k_j), its value times exp(u·k_j), w and u learned for each head and zero at start.

    The gates on keys and values of LINA (arXiv 2601.22630), which learns a number for each of 320 places; here it comes from the key, so
    that any number of tokens will do. Exponents are cut off at 20 on both sides.
    """

    frame = Frame("", "exp(w·k) of a key, exp(u·k) of a value", "")
    fit, by_token = "descent", True

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {f"kv_gate.{name}": torch.zeros(heads, head_dim) for name in ("key", "value")}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {f"kv_gate.{name}": 1 / head_dim for name in ("key", "value")}

    def __call__(self, phi_q: Tensor, phi_k: Tensor, call: Call) -> Partial:
        of_key, of_value = ((call.k @ call.per_head(f"kv_gate.{name}")[..., None]).clamp(-MOST, MOST).exp() for name in ("key", "value"))
        return phi_k * of_key, call.v * of_value

    def cost(self, sizes: Sizes) -> Cost:
        """Two products with each key and the gates themselves; keys are read, features and values written."""
        return Cost(4 * sizes.tokens * sizes.head_dim, 3)


@dataclass(frozen=True)
class Centred(Readout):
    """out = v̄ + g·(LA - v̄): how far linear attention LA may move from v̄, the plain mean of the rest's values.

    With z = s·phi(q)·mean phi(k), the mean over the n keys of the rest, and its mean z̄ over the queries, `gain` "learned" is
    g = e^a·(1 + c·z/z̄) with a, c for each head, zero at start, where out = LA. "inline" is g = z: the weights s/n·phi(q)·phi(k) + (1 - z)/n
    of InLine (arXiv 2412.06590), whose sum is 1 without a division. "mala" is g = 1 + z: (1 + 1/z)·s/n·phi(q)·phi(k) - z/n (MALA,
    arXiv 2507.00698). The log mass is that of the weights phi(q)·phi(k).
    """

    frame = Frame("", "", "v̄ + g (read - v̄)")
    fit, by_token = "descent", True
    gain: Literal["learned", "inline", "mala"] = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.gain in ("learned", "inline", "mala"), "gain must be 'learned', 'inline' or 'mala'", self.gain)

    @property
    def own_tokens(self) -> bool:  # type: ignore[override]
        """Where it reads the mean over all queries."""
        return self.gain == "learned"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {f"centred.{name}": torch.zeros(heads) for name in ("log_gain", "slope")} if self.gain == "learned" else {}

    def __call__(self, rest: Partial, mean: Partial, call: Call) -> Partial:
        (out, mass), (v_mean, log_count) = rest, mean
        z = call.scale * (mass - log_count).masked_fill(log_count == -torch.inf, -torch.inf).exp()
        if self.gain == "learned":
            log_gain, slope = (call.per_head(f"centred.{name}")[:, None] for name in ("log_gain", "slope"))
            g = log_gain.exp() * (1 + slope * z / z.mean(-1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny))
        else:
            g = z if self.gain == "inline" else 1 + z
        return v_mean + g[..., None] * (out - v_mean), mass

    def cost(self, sizes: Sizes) -> Cost:
        """Of every query's output; the mean is written and read."""
        return Cost(2 * sizes.tokens * sizes.head_dim, 2)


@dataclass(frozen=True)
class Floored(Readout):
    """The weighted sum divided by max(phi(q)·Σ phi(k), `floor` · n), times e^t (L²ViT, arXiv 2501.16182): n keys of the rest.

    A query that is like no key gives a small output, not one of great weights. The denominator is the rest's mass. t is learned for each
    head, zero at start; the paper cuts off at 100 whatever the number of tokens, and starts its factor at 1/sqrt(D).
    """

    frame = Frame("", "", "divided by a floor at least, times exp(t)")
    fit, by_token = "descent", True
    floor: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.floor) and self.floor >= 0, "floor must be a number >= 0, the least mean weight of a key", self.floor)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"floored.log_factor": torch.zeros(heads)}

    def __call__(self, rest: Partial, mean: Partial, call: Call) -> Partial:
        (out, mass), (_, log_count) = rest, mean
        divisor = torch.maximum(mass, (self.floor * log_count.exp()).log())
        share = (mass - divisor).masked_fill(mass == -torch.inf, -torch.inf).exp()
        return out * (share * call.per_head("floored.log_factor").exp()[:, None])[..., None], divisor

    def cost(self, sizes: Sizes) -> Cost:
        """Of every query's output."""
        return Cost(sizes.tokens * sizes.head_dim, 2)
