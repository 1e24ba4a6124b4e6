"""From a budget or a speed to a choice: predicted, verified on held-out prompts, and corrected until the promise holds."""

from dataclasses import dataclass

from dit_accel.errors import PlanError
from dit_accel.planner.measuring import Choice, Measurements
from dit_accel.planner.record import Asked, Interval, Round

ROUNDS = 6  # of verification, at most
TRIES = 30  # of aims, most of which lead to choices that are verified already
CLOSE = 1.02  # between what is enough and what is too much there is nothing worth a round
NEAR = 0.93  # of the budget: from there on no round is spent on coming nearer
ALONE = 1.05  # what the error of a single held-out prompt may be exceeded by on others


@dataclass(frozen=True)
class Got:
    """The choice, its errors on the held-out forwards, and how it was come to."""

    choice: Choice
    errors: list[float]
    verified: Interval
    factor: float
    rounds: tuple[Round, ...]


def upper(verified: Interval) -> float:
    """The error that is promised: the upper end of the interval over held-out prompts."""
    return ALONE * verified.mean if verified.high is None else verified.high


def _factor(choice: Choice, verified: Interval) -> float:
    return verified.mean / max(choice.predicted, 1e-30)


def aim(found: Measurements, asked: Asked) -> Got:
    """The choice that is asked for. Raises PlanError where there is none, and says which budget or speed is reachable."""
    if asked.budget is None:
        speed = asked.speed or 1.0
        choice = found.at_cost(1 / speed)
        if choice is None or not found.accelerates(choice.chosen):
            raise PlanError(f"no candidate reaches the speed {speed:g}: the fastest choice has {1 / found.least_cost:.3g}")
        errors = found.verify(choice.chosen)
        verified = found.held_out.interval(errors)
        rounds = (Round(choice.predicted, choice.cost, verified),)
        return Got(choice, errors, verified, _factor(choice, verified), rounds)
    return _within(found, asked.budget)


def _within(found: Measurements, budget: float) -> Got:
    """The cheapest choice whose promised error is within the budget.

    Errors of layers do not add as squares exactly: what to aim at is corrected by what the last verification found, between what has shown
    to be enough and what to be too much, down to the choice that accelerates nothing.
    """
    rounds: list[Round] = []
    best: Got | None = None
    aimed, enough, excess = budget, 0.0, float("inf")
    known: dict[float, float] = {}  # promised error by predicted error
    for _ in range(TRIES):
        choice = found.within(aimed)
        if choice is None or not found.accelerates(choice.chosen):
            enough = max(enough, aimed)
        else:
            if choice.predicted not in known:
                if len(rounds) == ROUNDS:
                    break
                errors = found.verify(choice.chosen)
                verified = found.held_out.interval(errors)
                rounds.append(Round(choice.predicted, choice.cost, verified))
                known[choice.predicted] = upper(verified)
                if upper(verified) <= budget and (best is None or choice.cost < best.choice.cost):
                    best = Got(choice, errors, verified, _factor(choice, verified), ())
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
    if best is None:
        raise PlanError(_unreachable(budget, min(known.values(), default=None)))
    return Got(best.choice, best.errors, best.verified, best.factor, tuple(rounds))


def _unreachable(budget: float, least: float | None) -> str:
    if least is None:
        return (
            f"no choice of the candidates that accelerates anything is predicted within the budget {budget:g}: give a larger budget, or "
            "specs that keep more"
        )
    return f"no choice of the candidates is within the budget {budget:g}; the smallest that was reached is {least:.3g}: give that or more"
