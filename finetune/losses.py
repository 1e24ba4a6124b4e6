"""The distillation losses, each relative to the size of its target so that layers and noise levels weigh alike."""

from torch import Tensor


def relative_error(value: Tensor, target: Tensor) -> Tensor:
    """mean (value − target)² / mean target², in float32: 0 is exact, 1 is as wrong as the target is large."""
    value, target = value.float(), target.float()
    return (value - target).square().mean() / target.square().mean().clamp_min(1e-12)


def attention_loss(student: dict[str, Tensor], teacher: dict[str, Tensor]) -> Tensor:
    """Mean over layers of the relative error of the attention output."""
    losses = [relative_error(student[name], teacher[name]) for name in teacher]
    return sum(losses[1:], losses[0]) / len(losses)
