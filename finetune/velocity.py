"""Error of the accelerated model's prediction against the original's, on recorded forwards."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.data.collect import Forward, Samples, as_one
from dit_accel.patch.anatomy import find_transformers


def on_device(value: Any, device: torch.device) -> Any:
    """Nested arguments with all tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, list | tuple):
        moved = [on_device(v, device) for v in value]
        return tuple(moved) if isinstance(value, tuple) else moved
    return {k: on_device(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def predict(transformer: Any, arguments: dict[str, Any]) -> Tensor:
    """The denoiser's prediction for recorded arguments."""
    moved = on_device(arguments, next(transformer.parameters()).device)
    return as_one(transformer(**moved, return_dict=False)[0])


def velocity_errors(pipe_or_transformer: Any, forwards: Iterable[Forward]) -> list[float]:
    """Relative error ‖student − teacher‖ / ‖teacher‖ of the prediction, one per forward, against the recorded teacher."""
    (transformer,) = find_transformers(pipe_or_transformer)
    errors = []
    with torch.no_grad():
        for forward in forwards:
            difference = predict(transformer, forward.arguments).cpu().float() - forward.prediction.float()
            errors.append((difference.norm() / forward.prediction.float().norm()).item())
    return errors


def velocity_error(pipe_or_transformer: Any, samples: Samples) -> float:
    """Mean of `velocity_errors` over the samples."""
    return sum(velocity_errors(pipe_or_transformer, (samples[i] for i in range(len(samples))))) / len(samples)
