"""The distillation losses, each relative to the size of its target so that layers and noise levels weigh alike, and the rate's schedule."""

import math

from torch import Tensor


def cosine_factor(step: int, steps: int, *, warmup: int) -> float:
    """The factor of a learning rate at a step: rising over `warmup` steps, falling along a cosine to 2 %."""
    return min(1.0, (step + 1) / max(1, warmup)) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def relative_error(value: Tensor, target: Tensor) -> Tensor:
    """mean (value − target)² / mean target², in float32: 0 is exact, 1 is as wrong as the target is large."""
    value, target = value.float(), target.float()
    return (value - target).square().mean() / target.square().mean().clamp_min(1e-12)
