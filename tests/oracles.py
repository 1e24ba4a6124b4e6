"""Attentions of the literature that no part computes, dense and naive in float64; test_theory.py has what they say of softmax attention."""

import torch
from torch import Tensor


def local_linear_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, ridge: float) -> Tensor:
    """LLA (arXiv 2510.01450) of q `[Nq, D]` over k and v `[Nk, D]`: softmax attention is the mean of v by weights w_j = exp(s q·k_j),
    this is the value at q of a straight line through v, fitted to (k_j - q, v_j) by these weights with a ridge λ Σ w on its slope.

    o = Σ_j w_j (1 - ρ·(k_j - q)) v_j / (ω - μ·ρ); ω = Σ w_j, μ = Σ w_j (k_j - q), ρ = (Σ w_j (k_j - q)(k_j - q)ᵀ + λ ω I)⁻¹ μ.
    """
    weight = (scale * q @ k.T).softmax(-1)  # a factor of all w_j cancels; ω is 1
    away = k - q[:, None]
    mean = (weight[..., None] * away).sum(1)
    spread = away.mT @ (weight[..., None] * away) + ridge * torch.eye(k.shape[1], dtype=k.dtype)
    slope = torch.cholesky_solve(mean[..., None], torch.linalg.cholesky(spread))
    left = weight * (1 - (away @ slope)[..., 0])
    return left @ v / (1 - (mean[:, None] @ slope)[..., 0])


def parallax(q: Tensor, k: Tensor, v: Tensor, probe: Tensor, scale: float) -> Tensor:
    """Parallax (arXiv 2605.29157) of q and its probes r `[Nq, D]`: m (1 + r·k̄) - Σ_j a_j (r·k_j) v_j, which is m - Cov(v, k) r, with
    a_j the softmax weights, m = Σ a_j v_j and k̄ = Σ a_j k_j.
    """
    weight = (scale * q @ k.T).softmax(-1)
    along = probe @ k.T
    return weight @ v * (1 + (weight * along).sum(-1, keepdim=True)) - (weight * along) @ v
