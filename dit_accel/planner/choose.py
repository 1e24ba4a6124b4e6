"""The choice: which candidate each head gets in each layer and noise range, so that the errors' sum is least at each cost.

Errors add as squares. A layer in one noise range is a unit: its attention runs once for each candidate that its heads have, so what
splitting costs is a unit's own. For each set of few candidates and each price of cost, every head takes its cheapest; what no
other choice beats in both cost and error are the unit's options. A knapsack over the units, exact but for the rounding of costs to `BINS`
steps, gives the least error at every cost at once.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Numbers = NDArray[np.int64]

BINS = 4096  # steps of the whole cost
PRICES = 32  # of cost, in units of error, that a unit's options are found for
NEAR = 16  # of the sets of candidates that are tried, at each price
SPECS = 3  # different candidates in a layer, at most
ALL = 4096  # choices of a unit up to which every one is tried
OPTIONS = 96  # of a unit, at most


@dataclass(frozen=True)
class Unit:
    """A layer in a noise range. `errors` `[H, C]`; `cost` `[C]` of one head; `start` `[C]`: of a call, whatever its heads; `split`: of
    each further call of the layer."""

    errors: Array
    cost: Array
    start: Array
    split: float

    def totals(self, choices: Numbers) -> tuple[Array, Array]:
        """Costs and errors of choices `[n, H]`, a candidate for each head."""
        used = np.stack([(choices == candidate).any(1) for candidate in range(len(self.cost))], 1)
        costs = self.cost[choices].sum(1) + used @ self.start + self.split * (used.sum(1) - 1)
        return costs, self.errors[np.arange(choices.shape[1]), choices].sum(1)


@dataclass(frozen=True)
class Options:
    """A unit's choices that no other beats, by rising cost: `costs` and `errors` `[n]`, `choices` `[n, H]`."""

    costs: Array
    errors: Array
    choices: Numbers


def options_of(unit: Unit) -> Options:
    """The choices of a unit that no other beats in both cost and error."""
    heads, candidates = unit.errors.shape
    if candidates**heads <= ALL:
        choices = np.array(list(itertools.product(range(candidates), repeat=heads)))
        choices = choices[[len(set(row)) <= SPECS for row in choices.tolist()]]
    else:
        choices = _by_prices(unit)
    costs, errors = unit.totals(choices)
    kept = _unbeaten(costs, errors)
    if len(kept) > OPTIONS:  # evenly over the cost
        places = np.searchsorted(costs[kept], np.geomspace(max(costs[kept[0]], costs[kept[-1]] * 1e-6), costs[kept[-1]], OPTIONS - 1))
        kept = kept[np.unique(np.concatenate([[0], np.minimum(places, len(kept) - 1)]))]
    return Options(costs[kept], errors[kept], choices[kept])


def _unbeaten(costs: Array, errors: Array) -> Numbers:
    """The places of those that no other beats in both, by rising cost."""
    order = np.lexsort((errors, costs))
    least = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]]))
    return order[errors[order] < least]


def _by_prices(unit: Unit) -> Numbers:
    """For each set of candidates and each price of cost, the choice of least error plus price; each once."""
    heads, candidates = unit.errors.shape
    low, high = _prices(unit)
    found = []
    for count in range(1, min(SPECS, candidates) + 1):
        sets = np.array(list(itertools.combinations(range(candidates), count)))
        for price in np.concatenate([[0.0], np.geomspace(low, high, PRICES)]):
            weights = (unit.errors + price * unit.cost)[:, sets]  # [H, sets, count]
            least = weights.min(-1).sum(0) + price * (unit.start[sets].sum(-1) + unit.split * (count - 1))
            few = np.argsort(least)[:NEAR]
            found.append(
                np.take_along_axis(np.broadcast_to(sets[few], (heads, len(few), count)), weights[:, few].argmin(-1)[..., None], -1)
            )
    choices = np.concatenate([part[..., 0].T for part in found])
    return np.unique(choices, axis=0)


def _prices(unit: Unit) -> tuple[float, float]:
    """The lowest and the highest price at which a choice can change."""
    differences = np.abs(unit.cost[:, None] - unit.cost[None])
    steps = np.abs(unit.errors[:, :, None] - unit.errors[:, None]) / np.where(differences > 0, differences, np.inf)
    positive = steps[steps > 0]
    return (float(positive.min()), float(positive.max())) if len(positive) else (1e-12, 1.0)


class Knapsack:
    """The least sum of errors over units at every cost."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.options = [options_of(unit) for unit in units]
        least = sum(own.costs[0] for own in self.options)
        most = sum(own.costs[-1] for own in self.options)
        self._width = max((most - least) / BINS, 1e-12 * max(most, 1.0))
        costs = np.full(BINS + 1 + len(units), np.inf)  # with room for roundings up
        errors, self._taken = np.full_like(costs, np.inf), []
        costs[0] = errors[0] = 0.0
        for own in self.options:
            costs, errors, taken = self._add(costs, errors, own)
            self._taken.append(taken)
        self._places = _unbeaten(costs, errors)
        self.costs, self.errors = costs[self._places], errors[self._places]

    def _add(self, costs: Array, errors: Array, own: Options) -> tuple[Array, Array, Numbers]:
        """One more unit: the least errors by cost above the least cost, their true costs, and which option each takes."""
        new_costs, new_errors = np.full_like(costs, np.inf), np.full_like(costs, np.inf)
        taken = np.zeros(len(costs), dtype=np.int64)
        for number, (cost, error) in enumerate(zip(own.costs, own.errors, strict=True)):
            step = self._step(own, number)
            sums = errors[: len(costs) - step] + error
            better = sums < new_errors[step:]
            new_errors[step:][better], taken[step:][better] = sums[better], number
            new_costs[step:][better] = costs[: len(costs) - step][better] + cost
        return new_costs, new_errors, taken

    def _step(self, own: Options, number: int) -> int:
        return min(BINS, round((own.costs[number] - own.costs[0]) / self._width))

    def _numbers(self, place: int) -> list[int]:
        """The option of each unit in the solution at a place."""
        numbers = []
        for own, taken in zip(reversed(self.options), reversed(self._taken), strict=True):
            number = int(taken[place])
            numbers.append(number)
            place -= self._step(own, number)
        return numbers[::-1]

    def solution(self, number: int) -> list[Numbers]:
        """The candidate of every head, `[H]` for each unit, of a point of `costs` and `errors`."""
        chosen = self._numbers(int(self._places[number]))
        return [own.choices[n] for own, n in zip(self.options, chosen, strict=True)]

    def cheapest(self, error: float) -> int | None:
        """The cheapest point whose errors add up to no more than `error`; None where there is none."""
        found = np.flatnonzero(self.errors <= error)
        return int(found[0]) if len(found) else None

    def best(self, cost: float) -> int | None:
        """The point of least error that costs no more than `cost`; None where there is none."""
        found = np.flatnonzero(self.costs <= cost)
        return int(found[-1]) if len(found) else None
