"""A unit's keys split by content: what decides which part of a key block, or of a group of them, each key belongs to."""

import torch
from torch import Tensor

STEPS = 4  # of the power iteration that finds a unit's principal direction


def split(keys: Tensor, weight: Tensor, metric: Tensor | None, parts: int) -> Tensor:
    """Which of `parts` (a power of two) each key `[BH, T, n, D]` of a unit belongs to, `[BH, T, n]` int64; `weight` `[BH, T, n]`: 0 leaves
    a key out. `metric` (`metric_of`): read where there is more than one part.

    A unit is cut in two where the projection of its keys onto one direction is that of their mean, each part again. The direction u is the
    one along which the head's logits vary most: the first eigenvector of M C, C = Σ w (k - k̄)(k - k̄)ᵀ, M = E[q qᵀ], by power iteration
    from (1, ..., 1). A key on the border may change sides by rounding.
    """
    part = torch.zeros(keys.shape[:3], dtype=torch.int64, device=keys.device)
    level = 1
    while level < parts:
        for number in range(level):
            mine = torch.where(part == number, weight, 0)[..., None]
            side = projected(keys, mine, metric) > 0  # type: ignore[arg-type]
            part = part + level * (side & (mine[..., 0] > 0))
        level *= 2
    return part


def projected(keys: Tensor, weight: Tensor, metric: Tensor) -> Tensor:
    """Keys `[BH, T, n, D]` less their mean by `weight` `[BH, T, n, 1]`, along their principal direction; 0 for those without weight."""
    mean = (keys * weight).sum(2, keepdim=True) / weight.sum(2, keepdim=True).clamp_min(1)
    centred = (keys - mean) * (weight > 0)
    direction = torch.ones_like(mean).transpose(-1, -2)  # [BH, T, D, 1]
    for _ in range(STEPS):
        direction = metric[:, None] @ (centred.transpose(-1, -2) @ (weight * (centred @ direction)))
        direction = direction / direction.norm(dim=2, keepdim=True).clamp_min(torch.finfo(keys.dtype).tiny)
    return (centred @ direction)[..., 0]
