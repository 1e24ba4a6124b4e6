"""Memories as a rest: states of linear attention that fade with distance or that tokens choose among, and states that fit v to k."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.blocks import Blocks
from dit_accel.kernels.reference import FEATURE_MAPS, Partial
from dit_accel.method.checks import flag, is_int, is_real, require
from dit_accel.method.parts.base import Rest
from dit_accel.method.parts.call import Call, Cost, Far, FarSums, Frame, Ground, Sizes
from dit_accel.method.parts.merges import Mass
from dit_accel.method.parts.searches import Clusters

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec

Map = Literal["softmax", "elu", "relu"]


@dataclass(frozen=True)
class Decayed(Rest):
    """Linear attention over the blocks not kept, block J with weight w_IJ = exp(-a_h · distance) for query block I; a_h >= 0 is learned.

    out = Σ_J w_IJ phi(q)·H_J / Σ_J w_IJ phi(q)·z_J with H_J = Σ phi(k)vᵀ and z_J = Σ phi(k) over the block: the decay λ^(t-s) between two
    tokens of a text (TransNormerLLM, arXiv 2307.14995; Lightning Attention, 2405.17381 and 2401.04658), here between tiles on all sides.

    Distance: between the blocks' centres, the sum over the axes, each in units of the key blocks' mean length along it; even tiles are as
    many apart as there are steps from tile to tile. References lie over the image, as for patterns. `slopes`: a_h starts at "zero", which
    is `Linear`, or at "alibi", 2^(-8(h + 1)/H); the released slopes also fall with the layer's depth, which a part does not know.
    """

    frame = Frame("Σ φ(k) vᵀ and Σ φ(k) of each block", "exp(-a · distance) of blocks not kept", "φ(q)·Σ / φ(q)·Σ")
    fit, own_tokens = "descent", True  # the plan has the places of its own queries
    feature_map: Map = "softmax"
    slopes: Literal["zero", "alibi"] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.feature_map in tuple(FEATURE_MAPS), f"feature_map must be one of {tuple(FEATURE_MAPS)}", self.feature_map)
        require(self.slopes in ("zero", "alibi"), "slopes must be 'zero' or 'alibi'", self.slopes)

    @property
    def whole_blocks(self) -> bool:
        return True

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        alibi = 2.0 ** (-8 * torch.arange(1, heads + 1) / heads)
        return {"decay.slope": alibi if self.slopes == "alibi" else torch.zeros(heads)}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        """`decay_q` and `decay_k` `[T, 3]`: the centres of the query blocks and of the key blocks, in the distance's units."""
        corners = ground.coords[ground.k_blocks.index, :3].float()
        sides = (corners.amax(1) - corners.amin(1) + 1).mean(0)
        return {name: _centres(ground.coords, x) / sides for name, x in (("decay_q", ground.q_blocks), ("decay_k", ground.k_blocks))}

    def __call__(self, call: Call) -> Partial:
        phi = FEATURE_MAPS[self.feature_map]
        distance = torch.cdist(call.prepared["decay_q"], call.prepared["decay_k"], p=1).to(call.q.dtype)
        weights = torch.exp(-call.per_head("decay.slope").clamp_min(0)[:, None, None] * distance) * ~call.kept
        return reference.linear_attention_rest(phi(call.q), phi(call.k), call.v, weights, call.q_blocks, call.k_blocks)

    def cost(self, sizes: Sizes) -> Cost:
        return _states(sizes, sizes.head_dim)


@dataclass(frozen=True)
class Routed(Rest):
    """Linear attention with one state for all tokens and `states` more, of which each token writes one and reads one.

    e = softmax(E_h x) of a token, x = k to write and q to read; p is the place of its largest entry, e_p. A pair's weight is
    phi(q_i)·phi(k_j) (1 + [p_i = p_j] e_ip e_jp) over the blocks not kept, divided by 1 + 1/states², so that E = 0, the start, is `Linear`
    (SSE, arXiv 2507.16577, the form without a recurrence; the paper's gates are of the layer's input, which the operator doesn't see, and
    are shared by the heads). At E = 0 all extra states but the first are alike, and part slowly: a distillation starts with the centres of
    the first keys as rows of E, unit vectors by k-means as `Clusters` has them.
    """

    frame = Frame(
        "Σ φ(k) vᵀ and Σ φ(k) of each block, for all tokens and for each route",
        "softmax(E k) of the route",
        "φ(q)·Σ, its own route's times softmax(E q)",
    )
    fit, starts = "descent", True
    states: int = 4
    feature_map: Map = "softmax"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_int(self.states) and 2 <= self.states <= 64, "states must be an int from 2 to 64", self.states)
        require(self.feature_map in tuple(FEATURE_MAPS), f"feature_map must be one of {tuple(FEATURE_MAPS)}", self.feature_map)

    @property
    def whole_blocks(self) -> bool:
        return True

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"routes": torch.zeros(heads, self.states, head_dim)}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"routes": 1 / head_dim}

    def start(self, call: Call) -> dict[str, Tensor]:
        return {"routes": Clusters(self.states).centres(F.normalize(call.of_heads(call.k), dim=-1))}

    @property
    def far(self) -> type[Far] | None:
        return FarSums

    def over(self, call: Call, far: Far) -> Partial:
        return self._of(call, far.sums) if isinstance(far, FarSums) else super().over(call, far)

    def factors(self, call: Call) -> tuple[Tensor, Tensor]:
        return self._routed(call.k, call.per_head("routes")), call.v

    def features(self, head_dim: int) -> int:
        return (self.states + 1) * head_dim

    def __call__(self, call: Call) -> Partial:
        return self._of(call, None)

    def _of(self, call: Call, sums: Tensor | None) -> Partial:
        """`sums`: as in `FarSums`."""
        q, (k, v) = self._routed(call.q, call.per_head("routes")), self.factors(call)
        out, mass = reference.linear_attention_rest(q, k, v, ~call.kept, call.q_blocks, call.k_blocks, sums)
        return out, mass - math.log1p(self.states**-2)

    def _routed(self, x: Tensor, routes: Tensor) -> Tensor:
        """Features `[BH, N, (states + 1) · D]`: phi(x), and phi(x) · e_p at the place of p, whose products are the pairs' weights."""
        features = FEATURE_MAPS[self.feature_map](x)
        share, chosen = (x @ routes.mT).softmax(-1).max(-1)
        gates = (chosen[..., None] == torch.arange(self.states, device=x.device)) * share[..., None]
        return torch.cat([features, (gates[..., None] * features[..., None, :]).flatten(-2)], -1)

    def cost(self, sizes: Sizes) -> Cost:
        """The gates, and states of so many features."""
        return Cost(2 * sizes.tokens * self.states * sizes.head_dim) + _states(sizes, self.features(sizes.head_dim))


class _Memory(Rest):
    """A rest of all image tokens, which is no share of the softmax: it is added, and never weighted by a mass."""

    def check(self, spec: "AttentionSpec") -> None:
        super().check(spec)
        weighted = isinstance(spec.merge, Mass)
        require(not weighted, f"the merge of {type(self).__name__}, which has no softmax mass, must be Residual() or Norm()", spec.merge)


@dataclass(frozen=True)
class Ridge(_Memory):
    """v as a linear function of k: out = q S, S = (KᵀK + r tr(KᵀK)/D · I)⁻¹ KᵀV over all image tokens, q and k of length 1, r = `ridge`.

    What the delta rule S ← S + β k (v - kᵀS)ᵀ comes to after many passes over the keys, without their order (DeltaNet, arXiv 2406.06484).
    In float64. The log mass is 0.
    """

    frame = Frame("Σ k kᵀ and Σ k vᵀ of all tokens", "1", "q (Σ k kᵀ + r)⁻¹ Σ k vᵀ")
    ridge: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.ridge) and self.ridge >= 1e-8, "ridge must be a number >= 1e-8, below which float64 may not solve", self.ridge)

    def __call__(self, call: Call) -> Partial:
        read = [q @ self._state(k, v).to(q.dtype) for q, k, v in zip(_unit(call.q), _unit(call.k), call.v, strict=True)]
        return torch.stack(read), torch.zeros_like(call.q[..., 0])

    def _state(self, k: Tensor, v: Tensor) -> Tensor:
        """Of one head."""
        k = k.double()
        gram = k.mT @ k
        ridge = self.ridge * gram.trace().clamp_min(torch.finfo(k.dtype).eps) / len(gram)
        root = torch.linalg.cholesky_ex(gram + ridge * torch.eye(len(gram), dtype=k.dtype, device=k.device)).L  # no wait for the card
        return torch.cholesky_solve(k.mT @ v.double(), root)

    def cost(self, sizes: Sizes) -> Cost:
        n, d = sizes.tokens, sizes.head_dim
        return Cost(3 * n * d**2 + d**3 / 3 + d**3, 2)


@dataclass(frozen=True)
class DeltaScan(_Memory):
    """The delta rule over the image's tokens, block after block in the spec's order, and once more from the last to the first, summed.

    S ← diag(e^g) S; S ← S + β k (v - kᵀS)ᵀ; out = s qᵀS, q and k of length 1, β = sigmoid(b_h + w_h·k), g = -softplus(c_h + u_h ⊙ k) per
    channel, g = 0 without `decay` (DeltaNet, arXiv 2406.06484; with decay Kimi Linear, 2510.26692). b, w, u start at 0, c at -4. Text is no
    part of a rest: where the papers' scans begin with a prompt, this one begins empty. The queries must be the keys' own tokens.
    """

    frame = Frame("a D × D matrix S, token after token, both ways", "β = σ(b + w·k) writes v - Sᵀk", "s·Sᵀq")
    fit, own_tokens = "descent", True
    decay: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        flag("decay", self.decay)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        found = {"delta.bias": torch.zeros(heads), "delta.weight": torch.zeros(heads, head_dim)}
        if not self.decay:
            return found
        shape = heads, head_dim
        return found | {"delta.fade_bias": torch.full(shape, -4.0), "delta.fade_weight": torch.zeros(shape)}

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"delta.weight": 1 / head_dim, "delta.fade_weight": 0.1}

    def __call__(self, call: Call) -> Partial:
        blocks, k = call.k_blocks, _unit(call.k)
        write = (call.per_head("delta.bias")[:, None, None] + k @ call.per_head("delta.weight")[..., None]).sigmoid()
        rows = [_unit(call.q), k, call.v, write]
        if self.decay:
            rows.append(-F.softplus(call.per_head("delta.fade_bias")[:, None] + call.per_head("delta.fade_weight")[:, None] * k))
        q, k, v, *rates = (blocks.gather(x) for x in rows)
        parts = (q, k, v, *(x * blocks.valid[..., None] for x in rates))  # a place without a token writes nothing and doesn't fade
        out = _scan(*parts) + _scan(*(x.flip(1, 2) for x in parts)).flip(1, 2)
        return call.scale * blocks.ungather(out), torch.zeros_like(call.q[..., 0])

    def cost(self, sizes: Sizes) -> Cost:
        """Of each direction the products within blocks, the triangular systems, and reading and writing the state."""
        n, d = sizes.tokens, sizes.head_dim
        width = n / sizes.k_blocks
        return Cost(2 * n * (width * d * (4 if self.decay else 2) + width * d * 1.5 + 3 * d**2), 2)


def _scan(q: Tensor, k: Tensor, v: Tensor, write: Tensor, fade: Tensor | None = None) -> Tensor:
    """The rows qᵀS `[BH, T, width, D]` of one direction, block after block."""
    state, read = k.new_zeros(len(k), k.shape[-1], v.shape[-1]), []
    for block in range(k.shape[1]):
        own = [None if x is None else x[:, block] for x in (q, k, v, write, fade)]
        out, state = reference.run_again(_scan_block, state, *own)
        read.append(out)
    return torch.stack(read, 1)


def _scan_block(state: Tensor, q: Tensor, k: Tensor, v: Tensor, write: Tensor, fade: Tensor | None) -> tuple[Tensor, Tensor]:
    """One block `[BH, width, D]` at once: its rows, and the state after it (the WY form of DeltaNet, section 3.2).

    new_i = β_i (v_i - (the state before token i, faded)ᵀ k_i) solve a unit lower triangular system; fades are multiplied as differences of
    their sums, which are <= 0, so that none overflows.
    """
    if fade is None:
        since = left = k.new_ones(1, 1, 1)
        of_q, of_k = (x @ k.mT for x in (q, k))
    else:
        total = fade.cumsum(1)  # [BH, width, D], of the logarithms
        since, left = total.exp(), (total[:, -1:] - total).exp()
        between = (total[:, :, None] - total[:, None]).clamp_max(0).exp()
        of_q, of_k = ((x[:, :, None] * k[:, None] * between).sum(-1) for x in (q, k))
    lacking = write * (v - (k * since) @ state)
    new = torch.linalg.solve_triangular((write * of_k).tril(-1), lacking, upper=False, unitriangular=True)
    out = (q * since) @ state + of_q.tril() @ new
    return out, since[:, -1:].mT * state + (k * left).mT @ new


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def _centres(coords: Tensor, blocks: Blocks) -> Tensor:
    """The mean place (t, y, x) `[T, 3]` of each block's tokens."""
    return (coords[blocks.index, :3] * blocks.valid[..., None]).sum(1) / blocks.count.clamp_min(1)[:, None]


def _states(sizes: Sizes, features: int) -> Cost:
    """Of linear attention with so many features over the blocks not kept: as `Linear.cost`."""
    return Cost(features * sizes.head_dim * (2 * sizes.tokens + sizes.q_blocks * sizes.k_blocks), 2)
