"""Means over prompts and how sure they are: percentile bootstrap intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_accel.errors import ArgumentError


@dataclass(frozen=True)
class Bootstrap:
    """Intervals of a mean over prompts: `level` of the means of `resamples` draws of as many prompts, with replacement, are inside.

    Every measure draws the same prompts, because the seed is the same: what is compared stays paired.
    """

    level: float = 0.95
    resamples: int = 10_000
    seed: int = 0

    def interval(self, values: Sequence[float]) -> tuple[float, float]:
        """Low and high end for one value per prompt. Raises ValueError for fewer than two."""
        if len(values) < 2:
            raise ArgumentError(f"an interval requires values of at least two prompts, not {len(values)}")
        picks = np.random.default_rng(self.seed).integers(len(values), size=(self.resamples, len(values)))
        means = np.asarray(values, dtype=np.float64)[picks].mean(axis=1)
        low, high = np.quantile(means, [(1 - self.level) / 2, (1 + self.level) / 2])
        return float(low), float(high)

    def summary(self, values: Sequence[float]) -> dict[str, Any]:
        """For JSON: `mean`, `low`, `high` and `by_prompt`; None means infinity, or that there is one prompt and no interval."""
        finite = all(math.isfinite(value) for value in values)
        low, high = self.interval(values) if finite and len(values) > 1 else (None, None)
        by_prompt = [value if math.isfinite(value) else None for value in values]
        return {"mean": float(np.mean(values)) if finite else None, "low": low, "high": high, "by_prompt": by_prompt}
