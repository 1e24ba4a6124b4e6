"""Few tokens of the whole image in the place of many, as a rest: one that every query sees, or landmarks between queries and keys."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.blocks import pool_blocks
from dit_accel.kernels.reference import Partial
from dit_accel.method.checks import is_real, require
from dit_accel.method.parts.base import Rest
from dit_accel.method.parts.call import Call, Cost, Frame, Ground, Sizes

CAP = 4.0  # what half the variance of a block's logits adds to its estimated log mass at most
LANDMARKS = 256  # at most
LEAST = 1e-12  # a row of landmarks whose mass is less than this share of its terms, some of which are negative, is rounding


@dataclass(frozen=True)
class Token(Rest):
    """One value for all queries of a block: the mean of v over the tokens that the block does not keep, by weights of the whole image.

    "energy": a_j = relu(q̄·k_j), q̄ the mean of the queries weighted by their lengths ‖q‖; the mass is the number of tokens (InfSA, arXiv
    2603.00175, its linear form). "estimated": the tokens of key block J have ā_J/n_J, ā_J the mean over all queries of softmax_J(e_IJ), and
    e_IJ = s·q̄_I·k̄_J + log n_J + min(σ²/2, 4) the estimated log mass of J for query block I, with σ² = s² Σ_d E_I[q_d²] Var_J(k_d); the mass
    is the sum of exp(e_IJ) over the blocks not kept (SEA, 2310.01777: the column means of its estimated map times v).
    """

    frame = Frame(
        "a weighted mean of v of each block", "weights of the whole image, of blocks not kept", "the same for all queries of a block"
    )
    own_tokens = True  # the weights are means over all queries
    kind: Literal["energy", "estimated"] = "energy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.kind in ("energy", "estimated"), "kind must be 'energy' or 'estimated'", self.kind)

    @property
    def whole_blocks(self) -> bool:
        return True

    def __call__(self, call: Call) -> Partial:
        weight, value, logits = self._energy(call) if self.kind == "energy" else self._estimated(call)
        left = (~call.kept).to(value.dtype)
        total = (left @ weight[..., None])[..., 0]
        some = total > 0
        out = left @ value / total.masked_fill(~some, 1)[..., None]
        mass = reference.softmax_weights(torch.where(call.kept, -torch.inf, logits))[1].masked_fill(~some, -torch.inf)
        width = call.q_blocks.index.shape[1]
        out, mass = (call.q_blocks.ungather(x[:, :, None].expand(-1, -1, width, -1)) for x in (out, mass[..., None]))
        return out, mass[..., 0]

    @staticmethod
    def _energy(call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """Of each key block the sum of its tokens' weights `[BH, Tk]`, the weighted sum of its values, and its log mass `[BH, 1, Tk]`."""
        length = call.q.norm(dim=-1, keepdim=True)
        mean = (length * call.q).sum(1, keepdim=True) / length.sum(1, keepdim=True).clamp_min(torch.finfo(length.dtype).tiny)
        weight = (call.k @ mean.mT).relu()
        count = call.k_blocks.count.to(call.q.dtype)
        sums, values = (count[:, None] * call.key_means(x) for x in (weight, weight * call.v))
        return sums[..., 0], values, count.log().expand(len(sums), 1, -1)

    @staticmethod
    def _estimated(call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """The same; log masses `[BH, Tq, Tk]`."""
        (q_mean, q_var), (k_mean, k_var) = (
            pool_blocks(x, blocks, variance=True) for x, blocks in ((call.q, call.q_blocks), (call.k, call.k_blocks))
        )
        spread = call.scale**2 * (q_mean.square() + q_var) @ k_var.mT
        logits = call.scale * q_mean @ k_mean.mT + call.k_blocks.count.to(call.q.dtype).log() + (spread / 2).clamp(max=CAP)
        queries = call.q_blocks.count.to(call.q.dtype)
        weight = (queries / queries.sum()) @ logits.softmax(-1)
        return weight, weight[..., None] * call.key_means(call.v), logits

    def cost(self, sizes: Sizes) -> Cost:
        """The weights, the products of blocks' means, and one mean value for each query block."""
        n, d, pairs = sizes.tokens, sizes.head_dim, sizes.q_blocks * sizes.k_blocks
        return Cost(3 * n * d + pairs * d if self.kind == "energy" else 5 * n * d + 3 * pairs * d, 2)


@dataclass(frozen=True)
class Landmarks(Rest):
    """Softmax through landmarks: out = W V / W 1 over the keys not kept, W = κ(q', L) (κ(L, L) + r I)⁻¹ κ(L, k') · exp(‖k'‖²/2).

    κ(a, b) = exp(-‖a - b‖²/2), q' = √s q, k' = √s k, L the means of k' in each key block, above 256 blocks in 4, 16, ... of one image that
    follow each other, r = `ridge`; the log mass is log W 1 + ‖q'‖²/2 (SOFT, arXiv 2207.03341, with separate queries and keys). exp(s q·k) =
    κ(q', k') exp(‖q'‖²/2 + ‖k'‖²/2), so with all keys as landmarks and r → 0 it is the exact softmax. In float64; what is kept is taken off
    the sum over all blocks, and a query whose W 1 comes out negative has no rest.
    """

    frame = Frame("values and masses at landmarks, the blocks' mean keys", "1 for blocks not kept", "a Gaussian kernel of q and landmarks")
    ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(is_real(self.ridge) and self.ridge >= 1e-8, "ridge must be a number >= 1e-8, below which float64 may not solve", self.ridge)

    @property
    def whole_blocks(self) -> bool:
        return True

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        """`landmark_share` `[M, Tk]`: the share of each key block in the tokens of each landmark."""
        count, image = ground.k_blocks.count, ground.coords[ground.k_blocks.index[:, 0], 3]
        size = 1
        while len(count) > LANDMARKS * size:
            size *= 4
        place = torch.arange(len(image)) - torch.searchsorted(image, image)  # among its image's blocks
        group = torch.stack([image, place // size]).unique_consecutive(dim=1, return_inverse=True)[1]
        tokens = torch.nn.functional.one_hot(group).T * count.double()
        return {"landmark_share": tokens / tokens.sum(1, keepdim=True)}

    def __call__(self, call: Call) -> Partial:
        index, counts = call.listed
        index, counts = (x.expand(len(call.q), *x.shape[-2:]) for x in (index, counts))
        states = call.prepared["landmark_share"].numel() * (call.v.shape[-1] + 1)
        given = (call.q, call.k, call.v, index, counts)
        heads = [reference.run_again(self._of_heads, call, *(x[part] for x in given)) for part in reference.slices(len(call.q), 2 * states)]
        out, mass = (torch.cat(x).to(call.q.dtype) for x in zip(*heads, strict=True))
        return out, mass[..., 0]

    def _of_heads(self, call: Call, q: Tensor, k: Tensor, v: Tensor, index: Tensor, counts: Tensor) -> Partial:
        (q, k), v = (x.double() * call.scale**0.5 for x in (q, k)), v.double()
        marks = call.prepared["landmark_share"] @ pool_blocks(k, call.k_blocks)[0]
        half = marks.square().sum(-1)[:, None] / 2  # exp(q'·l - ‖l‖²/2) is κ(q', l) without the query's own factor
        from_q, from_k, between = (x @ marks.mT - half for x in (q, k, marks))
        top, high = from_k.detach().amax((1, 2), keepdim=True), from_q.detach().amax(-1, keepdim=True)
        eye = torch.eye(marks.shape[1], dtype=marks.dtype, device=marks.device)
        root = torch.linalg.cholesky_ex((between - half.mT).exp() + self.ridge * eye).L  # without a wait for the card
        weights = torch.cholesky_solve((from_k - top).exp().mT, root).mT
        blocks = call.k_blocks
        values = blocks.gather(torch.cat([v, torch.ones_like(v[..., :1])], -1))
        states = (blocks.gather(weights) * blocks.valid[..., None]).mT @ values  # [BH, Tk, M, D + 1]
        rest = states.sum(1, keepdim=True) - _sum_of_listed(states, index, counts)
        queries = call.q_blocks.gather((from_q - high).exp())
        num, terms = queries @ rest, queries @ states[..., -1].abs().sum(1)[:, None, :, None]
        some = num[..., -1:] > LEAST * terms
        whole = num[..., -1:].masked_fill(~some, 1)
        out, mass = (call.q_blocks.ungather(x.masked_fill(~some, y)) for x, y in ((num[..., :-1] / whole, 0), (whole.log(), -torch.inf)))
        return out, mass + high + top

    def cost(self, sizes: Sizes) -> Cost:
        """Products with the landmarks and the states; those of kept blocks that are taken off are not counted: sizes don't say how many."""
        n, d, marks = sizes.tokens, sizes.head_dim, min(sizes.k_blocks, LANDMARKS)
        return Cost(2 * n * marks * d + 2 * n * marks * (d + 1) + n * marks**2 + marks**3 / 3, 2)


def _sum_of_listed(states: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    """The sum of the states `[BH, Tk, ...]` of the blocks that each query block lists; one entry of all lists at a time."""
    heads = torch.arange(len(states), device=states.device)[:, None]
    total = torch.zeros_like(states[:, :1])
    for place in range(index.shape[-1]):
        total = total + states[heads, index[..., place]] * counts[..., place, None, None]
    return total
