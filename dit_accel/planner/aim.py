"""From a budget or a speed to a choice: predicted, verified on held-out prompts, and corrected until the promise holds."""

import math
from dataclasses import dataclass, replace

from dit_accel.errors import PlanError
from dit_accel.planner.measuring import Choice, Measurements
from dit_accel.planner.record import Asked, Interval, Round

ROUNDS = 6  # of verification, at most
TRIES = 30  # of aims, most of which lead to choices that are verified already
CLOSE = 1.02  # between what is enough and what is too much there is nothing worth a round
NEAR = 0.93  # of the budget: from there on no round is spent on coming nearer


@dataclass(frozen=True)
class Got:
    """The choice, its errors on the held-out forwards, and how it was come to."""

    choice: Choice
    errors: list[float]
    verified: Interval
    factor: float
    rounds: tuple[Round, ...]


def upper(verified: Interval) -> float:
    """The error that is promised: the upper end of the interval of the mean over prompts."""
    return verified.mean if verified.high is None else verified.high


def _factor(choice: Choice, verified: Interval) -> float:
    return verified.mean / max(choice.predicted, 1e-30)


def aim(found: Measurements, asked: Asked) -> Got:
    """The choice that is asked for. Raises PlanError where there is none, and says which budget or speed is reachable."""
    gentlest = found.gentlest()
    if gentlest is None:
        raise PlanError("at this size no candidate costs less than the original attention: plan at a larger size")
    if asked.budget is None:
        speed = asked.speed or 1.0
        choice = found.at_cost(1 / speed)
        if choice is None or not found.accelerates(choice.chosen):
            raise PlanError(f"no candidate reaches the speed {speed:g}: the fastest choice has {1 / found.least_cost:.3g}")
        got = _verified(found, choice)
        return replace(got, rounds=(_round(got),))
    return _within(found, asked.budget, gentlest)


def _verified(found: Measurements, choice: Choice) -> Got:
    errors = found.verify(choice.chosen)
    verified = found.interval(errors)
    return Got(choice, errors, verified, _factor(choice, verified), ())


def _round(got: Got) -> Round:
    return Round(got.choice.predicted, got.choice.cost, got.verified)


def _within(found: Measurements, budget: float, gentlest: Choice) -> Got:
    """The cheapest choice whose promised error is within the budget.

    Errors of layers do not add as squares exactly: what to aim at is corrected by what the last verification found, between what has shown
    to be enough and what to be too much, down to the choice that accelerates nothing. `gentlest`: the choice of least predicted error that
    accelerates anything: predictions may be too high, so that it is verified before a budget is refused.
    """
    rounds: list[Round] = []
    best: Got | None = None
    aimed, enough, excess = max(budget, gentlest.predicted * (1 + 1e-9)), 0.0, float("inf")
    known: dict[float, float] = {}  # promised error by predicted error
    for _ in range(TRIES):
        choice = found.within(aimed)
        if choice is None or not found.saves(choice):
            enough = max(enough, aimed)
        else:
            if choice.predicted not in known:
                if len(rounds) == ROUNDS:
                    break
                got = _verified(found, choice)
                rounds.append(_round(got))
                known[choice.predicted] = upper(got.verified)
                if upper(got.verified) <= budget and (best is None or choice.cost < best.choice.cost):
                    best = got
            promised = known[choice.predicted]
            if NEAR * budget <= promised <= budget:
                break
            if promised <= budget:
                enough = max(enough, aimed)
            else:
                excess = min(excess, choice.predicted)
            aimed = choice.predicted * budget / promised * (0.98 if promised > budget else 0.995)
        if excess <= enough * CLOSE or (excess == float("inf") and aimed <= enough):
            break
        if not enough < aimed < excess:
            aimed = (enough * excess) ** 0.5 if enough else excess / 2
    if best is None and gentlest.predicted not in known:
        got = _verified(found, gentlest)
        rounds.append(_round(got))
        known[gentlest.predicted] = upper(got.verified)
        best = got if upper(got.verified) <= budget else None
    if best is None:
        raise PlanError(_unreachable(budget, min(known.values())))
    return replace(best, rounds=tuple(rounds))


def _unreachable(budget: float, least: float) -> str:
    digit = 10.0 ** (math.floor(math.log10(max(least, 1e-30))) - 2)  # the third
    enough = math.ceil(least / digit) * digit
    return f"no choice of the candidates is within the budget {budget:g}; the smallest that was reached is {enough:.3g}: give that or more"
