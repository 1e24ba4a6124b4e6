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
            raise PlanError(_too_fast(speed, 1 / found.least_cost))
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

    `gentlest`: the choice of least predicted error that saves anything; no budget that it holds is ever refused. A refusal names the least
    promise that was seen, where a search for that comes to it again, else that of `gentlest`, so that what it names is accepted.
    """
    got, known = _search(found, budget, gentlest)
    if got is not None:
        return got
    least, sure = min(known.values()), known[gentlest.predicted]
    if least < sure:
        got, _ = _search(found, _rounded_up(least), gentlest)
        if got is not None and got.verified.promised <= budget:
            return got
    enough = _rounded_up(sure if got is None else least)
    raise PlanError(
        f"no choice of the candidates is within the budget {budget:g}; the smallest that was reached is {enough:.3g}: give that or more"
    )


def _search(found: Measurements, budget: float, gentlest: Choice) -> tuple[Got | None, dict[float, float]]:
    """The cheapest of the choices that were verified to be within the budget, and the promised errors of all of them by the predicted.

    Errors of layers do not add as squares exactly: what to aim at is corrected by what the last verification found, between what has shown
    to be enough and what to be too much, down to the choice that accelerates nothing. Predictions may be too high: `gentlest` is verified
    before nothing is found.
    """
    rounds: list[Round] = []
    best: Got | None = None
    known: dict[float, float] = {}

    def promised_by(choice: Choice) -> float:
        nonlocal best
        if choice.predicted not in known:
            got = _verified(found, choice)
            rounds.append(_round(got))
            known[choice.predicted] = got.verified.promised
            if got.verified.promised <= budget and (best is None or choice.cost < best.choice.cost):
                best = got
        return known[choice.predicted]

    aimed, enough, excess = max(budget, gentlest.predicted * (1 + 1e-9)), 0.0, float("inf")
    for _ in range(TRIES):
        choice = found.within(aimed)
        if choice is None or not found.saves(choice):
            enough = max(enough, aimed)
        else:
            if choice.predicted not in known and len(rounds) == ROUNDS:
                break
            promised = promised_by(choice)
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
    if best is None:
        promised_by(gentlest)
    return None if best is None else replace(best, rounds=tuple(rounds)), known


def _rounded_up(error: float) -> float:
    """To three digits."""
    digit = 10.0 ** (math.floor(math.log10(max(error, 1e-30))) - 2)
    return next(found for more in range(3) if (found := float(f"{(math.floor(error / digit) + more) * digit:.3g}")) >= error)


def _too_fast(speed: float, fastest: float) -> str:
    """What is said of a speed that no choice reaches; the one that is named is reached, rounded down."""
    named = math.floor(fastest * 1000) / 1000
    advice = "" if named > 1 else ": plan at a larger size"
    return f"no candidate reaches the speed {speed:g}: the fastest choice has {named:.3f}{advice}"
