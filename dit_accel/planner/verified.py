"""The real error of an assignment: of the prediction, on recorded forwards of held-out prompts."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.finetune.data.collect import Forward
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.method.assignment import Assignment, Moment
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.planner.choose import Array
from dit_accel.planner.record import Interval
from dit_accel.planner.trained import Trained

SPREAD = 0.25  # of a plan's error between prompts, a standard deviation as a share of the mean: the built-in model's at 256 and 1024 px
KNOWN = 2  # degrees of freedom that it counts for next to what is measured
# the 95 % quantile of Student's t for 2, 3, ... degrees of freedom; of more than the last it is taken too
STUDENT = (2.92, 2.353, 2.132, 2.015, 1.943, 1.895)


def interval_of(held_out: Sequence[float], predicted: Array) -> Interval:
    """The mean of the held-out prompts' errors, and between which errors that of all prompts is: beyond either in one or two of 20.

    So few held-out prompts do not tell how much prompts differ. `predicted` `[P, C]`, the errors that are predicted of the measured prompts
    with each candidate everywhere, tells it, as shares of their means; what is common to all models, a little. It is the same for all
    choices of a plan, so that none is taken because its prompts happen to agree.
    """
    mean, means = statistics.fmean(held_out), predicted.mean(0)
    squares = np.square(predicted[:, means > 0] / means[means > 0] - 1).sum(0)
    freedom = KNOWN + len(predicted) - 1
    deviation = math.sqrt(((squares.mean() if len(squares) else 0.0) + KNOWN * SPREAD**2) / freedom)
    width = STUDENT[min(freedom - KNOWN, len(STUDENT) - 1)] * deviation / math.sqrt(len(held_out))
    return Interval(mean, mean * max(0.0, 1 - width), mean * (1 + width))


@dataclass(frozen=True)
class HeldOut:
    """Recorded forwards with their moments, the range of each, and the number of its prompt."""

    forwards: Sequence[Forward]
    moments: Sequence[Moment]
    ranges: Sequence[int]
    prompts: Sequence[int]

    def errors(self, transformer: Any, assignment: Assignment, trained: Trained | None = None) -> list[float]:
        """The relative error of the prediction in each forward; `trained`: what the assignment's specs have learned."""
        accelerate(transformer, assignment)
        try:
            if trained is not None:
                trained.install(transformer)
            with always(transformer):
                return velocity_errors(transformer, self.forwards, self.moments)
        finally:
            restore(transformer)

    def by_prompt(self, errors: Sequence[float]) -> list[float]:
        """The mean of each prompt, ranges of noise weighing alike."""
        return [self.of_prompt(errors, prompt) for prompt in sorted(set(self.prompts))]

    def by_range(self, errors: Sequence[float]) -> tuple[float, ...]:
        """The mean in each range of noise levels."""
        return tuple(statistics.mean(e for e, k in zip(errors, self.ranges, strict=True) if k == n) for n in sorted(set(self.ranges)))

    def of_prompt(self, errors: Sequence[float], prompt: int) -> float:
        """The mean of one prompt, ranges of noise weighing alike."""
        own = [(k, e) for k, e, p in zip(self.ranges, errors, self.prompts, strict=True) if p == prompt]
        return statistics.mean(statistics.mean(e for k, e in own if k == n) for n in sorted({k for k, _ in own}))
