"""Error of the accelerated model's prediction against the original's, on recorded forwards."""

import contextlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.data.collect import Forward, Samples, as_one
from dit_accel.finetune.moments import Moments
from dit_accel.method.assignment import Moment
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.modes import at_moment
from dit_accel.patch.state import CONTEXT


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


def velocity_errors(pipe_or_transformer: Any, forwards: Iterable[Forward], moments: Sequence[Moment] | None = None) -> list[float]:
    """Relative error ‖student − teacher‖ / ‖teacher‖ of the prediction, one per forward, against the recorded teacher.

    `moments`: of the forwards in their runs, for assignments that depend on them.
    """
    (transformer,) = find_transformers(pipe_or_transformer)
    errors = []
    with torch.no_grad():
        for number, forward in enumerate(forwards):
            with contextlib.nullcontext() if moments is None else at_moment(transformer, moments[number]):
                prediction = predict(transformer, forward.arguments)
            difference = prediction.cpu().float() - forward.prediction.float()
            errors.append((difference.norm() / forward.prediction.float().norm()).item())
    return errors


def velocity_error(pipe_or_transformer: Any, samples: Samples) -> float:
    """Mean of `velocity_errors` over the samples."""
    (transformer,) = find_transformers(pipe_or_transformer)
    patch, moments = getattr(transformer, CONTEXT, None), None  # the original has an error as well, in other arithmetic
    if patch is not None and patch.context.assignment.of_moments:
        by_position = Moments(samples, pipe_or_transformer, patch.context.family)
        moments = [by_position[i] for i in range(len(samples))]
    return sum(velocity_errors(pipe_or_transformer, (samples[i] for i in range(len(samples))), moments)) / len(samples)
