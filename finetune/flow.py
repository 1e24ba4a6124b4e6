"""Where recorded forwards are between a picture and noise: x = (1 − σ)·x0 + σ·noise, as flow-matching pipelines call their denoiser.

What differs between pipelines is read off what they called: timesteps count to 1 or to the scheduler's thousand and fall or rise; guidance
doubles the batch or calls twice; a prediction points from the picture to the noise or back.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.finetune.data.collect import Samples
from dit_accel.pipelines.family import Family

LEAST_COSINE = 0.1  # of predictions with the way from the final latents to the noisy ones; a trained model's is above a half


@dataclass(frozen=True)
class Flow:
    """How one pipeline names noise levels: the `timestep` argument is σ·`whole`, or `whole` − σ·`whole` where it is `rising`; the
    `latents` argument is x, as a tensor or as a list of its items. `sign`: 1 where predictions are noise − x0, −1 where x0 − noise.
    """

    timestep: str
    latents: str
    whole: float
    rising: bool
    sign: float = 1.0

    def sigma(self, timestep: float) -> float:
        """The noise level of a timestep."""
        return 1 - timestep / self.whole if self.rising else timestep / self.whole

    def sigma_of(self, arguments: dict[str, Any]) -> float:
        """The noise level of a forward. Raises DistillationError where its items have several."""
        values = torch.as_tensor(arguments[self.timestep]).float().flatten()
        if not bool((values == values[0]).all()):
            raise DistillationError(
                f"flow matching requires one noise level in a forward, not {self.timestep} from {values.min()} to {values.max()}"
            )
        return self.sigma(values[0].item())

    def levels(self, samples: Samples, position: int) -> list[float]:
        """The noise levels of the run that a forward belongs to, each once, falling, and 0."""
        return [*sorted({self.sigma(t) for t in samples.timesteps(position, self.timestep)}, reverse=True), 0.0]

    def at(self, arguments: dict[str, Any], sigma: float, x: Tensor) -> dict[str, Any]:
        """A forward's arguments with latents `x` at a noise level in the place of its own."""
        own, time = arguments[self.latents], torch.as_tensor(arguments[self.timestep])
        level = (1 - sigma if self.rising else sigma) * self.whole
        level = level if time.is_floating_point() else round(level)
        return arguments | {self.latents: in_place_of(own, x), self.timestep: torch.full_like(time, level)}


def in_place_of(own: Tensor | Sequence[Tensor], x: Tensor) -> Any:
    """Latents `[B, ...]` in the form of a forward's own: repeated over a batch that guidance doubles, or as a list of items."""
    if isinstance(own, Tensor):
        return repeated(x, own.shape).to(own)
    return list(repeated(x, (len(own), *own[0].shape)).to(own[0]).unbind(0))


def repeated(x: Tensor, shape: Sequence[int]) -> Tensor:
    """`[B, ...]` as a tensor of `shape`, whose first size is a multiple of B. Raises DistillationError where other sizes than 1 differ."""
    sizes = [[n for n in s[1:] if n != 1] for s in (x.shape, shape)]
    if shape[0] % x.shape[0] or sizes[0] != sizes[1]:
        raise DistillationError(f"a forward's latents have shape {tuple(shape)}, not that of the final ones, {tuple(x.shape)}")
    return torch.cat([x] * (shape[0] // x.shape[0])).reshape(tuple(shape))


def flow_of(pipe: Any, family: Family, first: float) -> Flow:
    """How a pipeline names noise levels; `first`: the timestep of a run's first forward. Raises DistillationError where its scheduler is
    not of flow matching."""
    scheduler = getattr(pipe, "scheduler", None)
    config = getattr(scheduler, "config", {})
    flows = isinstance(scheduler, FlowMatchEulerDiscreteScheduler | FlowMatchHeunDiscreteScheduler) or config.get("use_flow_sigmas", False)
    if not flows or config.get("invert_sigmas", False):
        raise DistillationError(
            f"mixing pictures with noise requires a scheduler of flow matching, not a {type(pipe).__name__} with {type(scheduler).__name__}"
        )
    whole = float(config.get("num_train_timesteps", 1000)) if first > 1 else 1.0
    return Flow(family.timestep, family.latents, whole, family.timestep_rises)


def recorded_flow(pipe: Any, family: Family, samples: Samples) -> Flow:
    """How samples name noise levels, and where their predictions point. Raises DistillationError where flow matching can't be read off
    their first run."""
    forwards = [samples[position] for position in samples.runs()[0]]
    first = torch.as_tensor(forwards[0].arguments[family.timestep]).float().max().item()
    flow = flow_of(pipe, family, first)
    cosines = []
    for forward in forwards:
        flow.sigma_of(forward.arguments)
        held = forward.arguments[flow.latents]
        x = held if isinstance(held, Tensor) else torch.stack(list(held))
        way = (x.float() - repeated(forward.latents, x.shape).float()).flatten()
        prediction = forward.prediction.float()
        repeated(forward.latents, prediction.shape)
        cosines.append(float(torch.nn.functional.cosine_similarity(way, prediction.flatten(), 0)))
    mean = math.fsum(cosines) / len(cosines)
    if not abs(mean) >= LEAST_COSINE:
        raise DistillationError(
            f"flow_weight requires predictions that point from pictures to noise, or back: their cosine with that direction is {mean:.3f}, "
            f"which must be {LEAST_COSINE} or more"
        )
    return Flow(flow.timestep, flow.latents, flow.whole, flow.rising, math.copysign(1.0, mean))
