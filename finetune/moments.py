"""The moments of recorded forwards in their runs, at which they are replayed: see `Moment`."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.finetune.data.collect import Samples
from dit_accel.method.assignment import Moment
from dit_accel.patch.anatomy import forward_names, require_family
from dit_accel.patch.steps import TRAINING_STEPS, Steps, noise_of
from dit_accel.pipelines.family import Family


def moments_of(timesteps: Sequence[Tensor], *, rising: bool, order: int = 1) -> list[Moment]:
    """The moment of each forward of one run, by their timestep arguments. `rising`: see `Family`; `order`: evaluations a step of the
    scheduler.

    Passes of guidance follow each other with one timestep: as many as divide the number of equal ones everywhere, because steps may round
    to one value in half precision.
    """
    whole = TRAINING_STEPS if any(not t.is_floating_point() or float(t.max()) > 1 for t in timesteps) else 1.0
    levels = [noise_of(timestep, rising=rising, whole=whole) for timestep in timesteps]
    passes = math.gcd(*(len(list(equal)) for _, equal in itertools.groupby(levels)))
    return [Moment(number // passes // order, level) for number, level in enumerate(levels)]


@contextlib.contextmanager
def recorded_moments(models: Sequence[Any]) -> Iterator[list[list[Moment]]]:
    """Collects the moment of every forward of each model, which take the steps of runs in turn; hooks end with the block."""
    steps, found = Steps(), [[] for _ in models]  # type: tuple[Steps, list[list[Moment]]]

    def recording(model: Any, moments: list[Moment]) -> Callable[..., None]:
        names, family = forward_names(model), require_family(model)

        def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
            latents = arguments[family.latents]
            while isinstance(latents, list | tuple):
                latents = latents[0]
            timestep = arguments.get(family.timestep)
            moments.append(steps.moment(timestep, latents, rising=family.timestep_rises))

        return before

    hooks = [model.register_forward_pre_hook(recording(model, own), with_kwargs=True) for model, own in zip(models, found, strict=True)]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


class Moments:
    """The moment of each forward of samples, by its position; a run is read when one of its forwards is asked for."""

    def __init__(self, samples: Samples, pipe: Any, family: Family) -> None:
        self.samples, self.family, self.order = samples, family, order_of(pipe)
        self._runs = {position: run for run in samples.runs() for position in run}
        self._known: dict[int, list[Moment]] = {}  # by the first position of a run

    def __getitem__(self, position: int) -> Moment:
        first, *_ = self._runs[position]
        if first not in self._known:
            times = [torch.as_tensor(value) for value in self.samples.argument(position, self.family.timestep)]
            self._known[first] = moments_of(times, rising=self.family.timestep_rises, order=self.order)
        return self._known[first][position - first]


def order_of(pipe: Any) -> int:
    """How many evaluations of the model a pipeline's scheduler makes in one step."""
    return max(1, getattr(getattr(pipe, "scheduler", None), "order", 1))
