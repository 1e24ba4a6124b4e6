"""Where in its run a forward is, its denoising step and noise level: read from the scheduler that runs it, else from timesteps.

A run is one `set_timesteps` of one scheduler. The scheduler is looked up where the forward is called from, so nothing is hooked: pipelines
that share a transformer, a scheduler put in later, a run inside another one and runs in several threads each count by themselves, and two
transformers of one pipeline count together. A transformer in a loop without a scheduler is counted by its timesteps, thread by thread.
"""

import sys
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dit_accel.method.assignment import Moment

TRAINING_STEPS = 1000.0  # of schedulers that do not give theirs
OWNERS = {"self", "components"}  # what methods of pipelines and blocks of modular pipelines call the object that has the scheduler


def running_scheduler() -> Any | None:
    """The scheduler of the innermost pipeline whose method is running in this thread, or None."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        owners = OWNERS.intersection(code.co_varnames[: code.co_argcount])
        if owners and not frame.f_globals.get("__name__", "").startswith("torch."):
            values = frame.f_locals
            for name in owners:
                scheduler = getattr(values.get(name), "__dict__", {}).get("scheduler")
                if hasattr(scheduler, "set_timesteps") and hasattr(scheduler, "timesteps"):
                    return scheduler
        frame = frame.f_back  # type: ignore[assignment]
    return None


@dataclass(frozen=True)
class Timesteps:
    """Evaluations counted from the timesteps that a transformer is called with.

    `direction`: 1 where they rise, -1 where they fall, 0 before the second one. `latents`: of the last forward, kept where its timestep is
    so coarse that those of two steps can be equal.
    """

    timestep: Tensor
    first: Tensor
    index: int = 0
    direction: int = 0
    latents: Tensor | None = None

    @classmethod
    def begin(cls, timestep: Tensor, latents: Tensor | None) -> "Timesteps":
        timestep = timestep.detach().clone()
        return cls(timestep, timestep, latents=latents)

    def next(self, timestep: Tensor, latents: Tensor | None, *, known_run: bool) -> "Timesteps":
        """The count after one more forward.

        An equal timestep is the same evaluation (guidance in two passes), unless it is half precision and the latents differ. Another one
        is the next, or the first of a new run: where it turns back, or, in a `known_run`, is the first again.
        """
        if _equal(timestep, self.timestep):
            moved = latents is not None and self.latents is not None and not _equal(latents, self.latents)
            return replace(self, index=self.index + moved, latents=latents)
        change = _level(timestep) - _level(self.timestep)
        direction = (change > 0) - (change < 0)
        again = _equal(timestep, self.first) if known_run else direction * self.direction < 0
        if again:
            return Timesteps.begin(timestep, latents)
        timestep = timestep.detach().clone()
        return Timesteps(timestep, self.first, self.index + 1, self.direction or direction, latents)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.to(b.device), b)


def _level(timestep: Tensor) -> float:
    """One number for all samples and tokens; those that are given, as the first frame of a video, keep a timestep of their own."""
    low, high = timestep.double().aminmax()
    return float(low + high)


def _coarse(timestep: Tensor, latents: Tensor) -> Tensor | None:
    """The latents where timesteps in the timestep's dtype round to one value, as neighbours in bfloat16 do."""
    return latents if timestep.is_floating_point() and timestep.element_size() < 4 else None


def noise_of(timestep: Tensor, *, rising: bool, whole: float | None = None) -> float:
    """The noise level of a transformer's timestep argument, the noisiest token's where they differ: see `Moment`.

    `rising`: it is 1 − the noise level. `whole`: what it counts to, unless given the scheduler's usual thousand for integers and for more
    than 1, else 1.
    """
    value = float(timestep.double().min() if rising else timestep.double().max())
    if whole is None:
        whole = TRAINING_STEPS if not timestep.is_floating_point() or value > 1 else 1.0
    level = 1 - value / whole if rising else value / whole
    return min(1.0, max(0.0, level))


def noise_levels(scheduler: Any) -> list[float]:
    """The noise level before each evaluation of a scheduler's run, from its start: see `Moment`."""
    config = getattr(scheduler, "config", {})
    sigmas = getattr(scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and len(sigmas) and bool(((sigmas >= 0) & (sigmas <= 1)).all()):  # flow matching's; others exceed 1
        levels = (1 - sigmas if config.get("invert_sigmas", False) else sigmas).tolist()
        return [float(level) for level in levels]
    times = torch.as_tensor(scheduler.timesteps).double() / config.get("num_train_timesteps", TRAINING_STEPS)
    return [float(level) for level in times.clamp(0, 1).tolist()]


def _nearest(times: Sequence[float], timestep: Tensor, whole: float) -> int:
    """The place among a scheduler's timesteps of the one that a transformer was called with: as it is, or as a share of the whole, or as
    1 − that share."""
    value = float(timestep.double().max())
    candidates = (value, value * whole, (1 - value) * whole)
    return min(range(len(times)), key=lambda n: min(abs(times[n] - candidate) for candidate in candidates))


@dataclass
class SchedulerRun:
    """One `set_timesteps` of a scheduler, and how far it has come.

    `timesteps`: the scheduler's, by whose identity the run is recognised. `levels`: noise levels before each evaluation. `begin`: the
    scheduler's `step_index` at the first step, once that is known; `last`: at the last forward. `counted`: where it has none.
    """

    timesteps: Any
    levels: list[float]
    counted: Timesteps | None = None
    begin: int | None = None
    last: int | None = None

    def evaluation(self, scheduler: Any, timestep: Tensor, latents: Tensor) -> int:
        """How many evaluations of the run came before this forward."""
        stepped = getattr(scheduler, "step_index", None)
        if stepped is None:  # before the first step; or it has none, as DDIM's; or copies of it make the steps
            indexed = hasattr(scheduler, "step_index")
            kept = None if indexed else _coarse(timestep, latents)
            if self.counted is None:
                self.counted = Timesteps.begin(timestep, kept)
            else:
                self.counted = self.counted.next(timestep, kept, known_run=True)
            return self.counted.index
        if self.begin is None:
            begin = getattr(scheduler, "begin_index", None)
            self.begin = begin if begin is not None else 0 if self.counted is None else stepped - 1
            self.counted = None
        self.last = stepped
        return max(0, stepped - self.begin)

    def noise(self, scheduler: Any, timestep: Tensor, evaluation: int) -> float:
        """The noise level of a forward, which so many evaluations of the run came before."""
        stepped = getattr(scheduler, "step_index", None)
        begin = getattr(scheduler, "begin_index", None)
        if stepped is not None:
            place = stepped
        elif begin is not None:
            place = begin + evaluation
        else:
            times = [float(t) for t in torch.as_tensor(scheduler.timesteps).double().tolist()]
            place = _nearest(times, timestep, getattr(scheduler, "config", {}).get("num_train_timesteps", TRAINING_STEPS))
        return self.levels[min(place, len(self.levels) - 1)]

    def is_over(self, scheduler: Any) -> bool:
        """Whether the scheduler has begun another run since."""
        stepped = getattr(scheduler, "step_index", None)
        return self.timesteps is not scheduler.timesteps or (self.last is not None and (stepped is None or stepped < self.last))


_counted: ContextVar["WeakKeyDictionary[Steps, Timesteps] | None"] = ContextVar("counted", default=None)


class Steps:
    """The steps of all runs of the transformers that were accelerated together. A copy starts without any."""

    def __init__(self) -> None:
        self._runs: WeakKeyDictionary[Any, SchedulerRun] = WeakKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def moment(self, timestep: Tensor | None, latents: Tensor, *, rising: bool = False) -> Moment:
        """Where in its run a forward with these arguments is; to be called once per forward. `rising`: see `Family`.

        Schedulers that evaluate the model more than once a step (Heun's) say so in `order`. Forwards without a timestep are one step,
        unless a scheduler counts them.
        """
        timestep = latents.new_zeros(1) if timestep is None else timestep
        scheduler = running_scheduler()
        if scheduler is None:
            return Moment(self._bare(timestep, latents), noise_of(timestep, rising=rising))
        run = self._runs.get(scheduler)
        if run is None or run.is_over(scheduler):
            run = self._runs[scheduler] = SchedulerRun(scheduler.timesteps, noise_levels(scheduler))
        evaluation = run.evaluation(scheduler, timestep, latents)
        return Moment(evaluation // max(1, getattr(scheduler, "order", 1)), run.noise(scheduler, timestep, evaluation))

    def _bare(self, timestep: Tensor, latents: Tensor) -> int:
        before, kept = _counted.get(), _coarse(timestep, latents)
        last = before.get(self) if before is not None else None
        now = Timesteps.begin(timestep, kept) if last is None else last.next(timestep, kept, known_run=False)
        _counted.set(WeakKeyDictionary({**(before or {}), self: now}))  # another object: threads may have inherited this one
        return now.index
