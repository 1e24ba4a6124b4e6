"""What is aimed at, on simulated measurements: promises hold, and what a refusal says can be had can be had."""

import math
import re
from typing import Any

import numpy as np
import pytest

from dit_accel.errors import PlanError
from dit_accel.planner import aim
from dit_accel.planner.measuring import Choice
from dit_accel.planner.record import Asked, Interval

SEEDS = 1500


class Simulated:
    """Choices of rising cost and falling predicted error, whose promised errors are the predictions times a factor that scatters."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        count = int(random.integers(1, 60))
        self.predicted = np.sort(np.exp(random.uniform(-5, -1, count)))[::-1]
        self.cost = np.sort(random.uniform(0.05, 0.99, count))
        factors = np.exp(random.normal(random.normal(0, 0.4), random.choice([0.05, 0.15, 0.4]), count))
        self.promised = self.predicted * factors * (1 + random.uniform(0, 3) * self.predicted) + random.choice([0, 0.02])
        self.budget = math.exp(random.uniform(-6, -1.5))
        self.held_out = self

    def _choice(self, number: int) -> Choice:
        return Choice(number, float(self.cost[number]), float(self.predicted[number]))  # type: ignore[arg-type]

    def within(self, error: float) -> Choice | None:
        found = np.flatnonzero(self.predicted <= error)
        return self._choice(int(found[0])) if len(found) else None

    def at_cost(self, cost: float) -> Choice | None:
        found = np.flatnonzero(self.cost <= cost)
        return self._choice(int(found[-1])) if len(found) else None

    def gentlest(self) -> Choice:
        return self._choice(len(self.predicted) - 1)

    @property
    def least_cost(self) -> float:
        return float(self.cost[0])

    def saves(self, choice: Choice) -> bool:
        return True

    def accelerates(self, chosen: Any) -> bool:
        return True

    def verify(self, chosen: Any) -> list[float]:
        return [float(self.promised[chosen])]

    def interval(self, errors: list[float]) -> Interval:
        return Interval(0.8 * errors[0], 0.6 * errors[0], errors[0])


def named(error: PlanError, words: str) -> float:
    found = re.search(rf"{words} ([\d.e+-]*\d)", str(error))
    assert found is not None, error
    return float(found.group(1))


def test_a_budget_that_a_refusal_names_is_accepted() -> None:
    refusals = later = 0
    for seed in range(SEEDS):
        found: Any = Simulated(seed)
        try:
            assert aim.aim(found, Asked(found.budget, None)).verified.promised <= found.budget
        except PlanError as error:
            enough = named(error, "reached is")
            got = aim.aim(found, Asked(enough, None))
            assert got.verified.promised <= enough
            refusals, later = refusals + 1, later + (got.choice.predicted > found.predicted[-1])
    assert refusals > SEEDS / 5
    assert later > 0  # some name another than the choice of least predicted error


def test_a_speed_that_a_refusal_names_is_reached() -> None:
    for seed in range(200):
        found: Any = Simulated(seed)
        with pytest.raises(PlanError) as refused:
            aim.aim(found, Asked(None, 1000.0))
        fastest = named(refused.value, "fastest choice has")
        if fastest > 1:
            assert aim.aim(found, Asked(None, fastest)).choice.cost <= 1 / fastest
        else:
            assert "plan at a larger size" in str(refused.value)


@pytest.mark.parametrize("error", [1e-30, 0.1, 0.0999999999, 0.07, 0.123, 0.1230000001, 0.9999, 1.0, 12.34])
def test_errors_are_rounded_up(error: float) -> None:
    found = aim._rounded_up(error)
    assert error <= found <= error * 1.01
    assert float(f"{found:.3g}") == found
