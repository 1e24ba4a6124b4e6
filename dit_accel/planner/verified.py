"""The real error of an assignment: of the prediction, on recorded forwards of held-out prompts."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dit_accel.finetune.data.collect import Forward
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.bootstrap import Bootstrap
from dit_accel.method.assignment import Assignment, Moment
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.planner.record import Interval


@dataclass(frozen=True)
class HeldOut:
    """Recorded forwards with their moments, the range of each, and the number of its prompt."""

    forwards: Sequence[Forward]
    moments: Sequence[Moment]
    ranges: Sequence[int]
    prompts: Sequence[int]

    def errors(self, transformer: Any, assignment: Assignment) -> list[float]:
        """The relative error of the prediction in each forward."""
        accelerate(transformer, assignment)
        try:
            with always(transformer):
                return velocity_errors(transformer, self.forwards, self.moments)
        finally:
            restore(transformer)

    def interval(self, errors: Sequence[float]) -> Interval:
        """The mean, ranges of noise weighing alike, with its interval over prompts."""
        by_prompt = [self.of_prompt(errors, prompt) for prompt in sorted(set(self.prompts))]
        if len(by_prompt) < 2:
            return Interval(by_prompt[0], None, None)
        low, high = Bootstrap().interval(by_prompt)
        return Interval(statistics.mean(by_prompt), low, high)

    def by_range(self, errors: Sequence[float]) -> tuple[float, ...]:
        """The mean in each range of noise levels."""
        return tuple(statistics.mean(e for e, k in zip(errors, self.ranges, strict=True) if k == n) for n in sorted(set(self.ranges)))

    def of_prompt(self, errors: Sequence[float], prompt: int) -> float:
        """The mean of one prompt, ranges of noise weighing alike."""
        own = [(k, e) for k, e, p in zip(self.ranges, errors, self.prompts, strict=True) if p == prompt]
        return statistics.mean(statistics.mean(e for k, e in own if k == n) for n in sorted({k for k, _ in own}))
