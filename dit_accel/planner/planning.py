"""`plan`: measure, choose, verify, until the promise holds."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel import __version__
from dit_accel.errors import AlreadyAcceleratedError, ArgumentError, PlanError
from dit_accel.finetune.surroundings import process_kept
from dit_accel.method import AttentionSpec
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.state import CONTEXT
from dit_accel.planner.aim import aim
from dit_accel.planner.candidates import Candidates, CostUnit
from dit_accel.planner.measuring import Measurements, Request, measured
from dit_accel.planner.record import (
    Asked,
    Candidate,
    LayerHeads,
    Outcome,
    Plan,
    Point,
    Prompts,
    Scaling,
)
from dit_accel.planner.work import Work, digest

MEASURED, HELD_OUT = 6, 4  # prompts of those given, at most


def plan(
    pipe: Any,
    prompts: Sequence[str],
    *,
    budget: float | None = None,
    speed: float | None = None,
    specs: Sequence[AttentionSpec | None] | None = None,
    held_out: Sequence[str] | None = None,
    unit: CostUnit = "multiply-adds",
    ranges: int = 3,
    seed: int = 0,
    folder: str | Path | None = None,
    progress: bool | None = None,
    **call: Any,
) -> Plan:
    """Find which spec each layer and head should run at which noise levels: the least attention within a quality budget, or the least error
    at a speed. Returns an `Assignment`, for `accelerate`, that contains the record of how it was found; `save` writes both.

    Args:
        prompts: a few, in the words that the model will be used with: the first 6 at most are measured, the last third of them, 4 at most,
            are held out.
        budget: the largest mean relative error of the prediction, ‖accelerated − original‖ / ‖original‖, on the held-out prompts: the
            upper end of its 95 % interval over them is within it. 0.05 unless budget or speed is given.
        speed: how many times less the attention shall cost, in `unit`, in the place of a budget.
        specs: the candidates, specs of one order, None for the original attention; by default that, Fovea at several densities and
            radii, CLEAR and GNA.
        held_out: prompts to verify on, in the place of the last ones.
        unit: of costs: "multiply-adds", counted, or "seconds", kernels timed on this machine.
        ranges: of noise levels that have a choice of their own, at most.
        seed: of the first prompt's noise; the n-th has seed + n.
        folder: where the work is kept: the same call continues there after a stop.
        progress: whether to show progress; by default where there is a terminal.
        call: arguments of the pipeline's call: height, width, num_frames, num_inference_steps, guidance_scale, ...

    The pipeline must not be accelerated, and is not changed; LoRA that are loaded are part of the model. Raises PlanError where no plan
    is within the budget or reaches the speed, saying which is reachable, ValueError or a class of dit_accel.errors for what can't be used.
    """
    if budget is None and speed is None:
        budget = 0.05
    request = _request(pipe, prompts, held_out, specs, unit, ranges, seed, progress, call)
    check_asked(budget, speed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_kept())
        path = Path(folder) if folder is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-accel-plan-")))
        work = Work.begin(path, request.settings())
        found = measured(request, work)
        return _planned(found, Asked(budget, speed))


def check_asked(budget: float | None, speed: float | None) -> None:
    """Raise ArgumentError unless they are one number, a budget above 0 or a speed above 1, or neither."""
    if budget is not None and speed is not None:
        raise ArgumentError(f"give a budget or a speed, not both: {budget=}, {speed=}")
    for name, value, low in (("budget", budget, 0.0), ("speed", speed, 1.0)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > low):
            raise ArgumentError(f"{name} must be a number above {low:g}, not {value!r}")


def _request(
    pipe: Any, prompts: Sequence[str], held_out: Sequence[str] | None, specs: Sequence[AttentionSpec | None] | None, unit: CostUnit,
    ranges: int, seed: int, progress: bool | None, call: dict[str, Any],
) -> Request:  # fmt: skip
    """The arguments, checked."""
    transformer, *others = find_transformers(pipe)
    if others:
        raise PlanError(f"a plan is of one transformer, but the pipeline has {1 + len(others)}")
    if hasattr(transformer, CONTEXT):
        raise AlreadyAcceleratedError(f"{type(transformer).__name__} is accelerated already: call restore(...) before planning")
    for name, texts in (("prompts", prompts), ("held_out", held_out)):
        if texts is not None and (isinstance(texts, str) or not texts or not all(isinstance(p, str) and p.strip() for p in texts)):
            raise ArgumentError(f"{name} must be a non-empty list of non-empty strings, not {texts!r}")
    if held_out is None:
        if len(prompts) < 2:
            raise ArgumentError(f"a plan requires at least two prompts, one of them to verify on, not {len(prompts)}")
        count = min(HELD_OUT, max(1, len(prompts) // 3))
        prompts, held_out = list(prompts)[:-count], list(prompts)[-count:]
    chosen = None if specs is None else _checked_specs(specs)
    if unit not in ("multiply-adds", "seconds"):
        raise ArgumentError(f"unit must be 'multiply-adds' or 'seconds', not {unit!r}")
    if isinstance(ranges, bool) or not isinstance(ranges, int) or ranges < 1:
        raise ArgumentError(f"ranges must be a number of ranges of noise levels >= 1, not {ranges!r}")
    if both := sorted(set(prompts[:MEASURED]) & set(held_out)):
        raise ArgumentError(f"held-out prompts must not be measured, but {both[:3]} are: remove them from one side")
    return Request(pipe, tuple(prompts[:MEASURED]), tuple(held_out[:HELD_OUT]), chosen, unit, ranges, seed, progress, call)


def _checked_specs(specs: Sequence[AttentionSpec | None]) -> Candidates:
    found = tuple(dict.fromkeys(specs))
    given = [spec for spec in found if spec is not None]
    if not given or not all(isinstance(spec, AttentionSpec) for spec in given):
        raise ArgumentError(f"specs must contain AttentionSpecs, at least one, and may contain None for the original attention: {specs!r}")
    if other := next((spec for spec in given if spec.order != given[0].order), None):
        raise ArgumentError(f"the specs of a plan must have one order, but {other} has not {given[0].order}: give it that order")
    return found


def _planned(found: Measurements, asked: Asked) -> Plan:
    """The plan that is asked for, from what was measured."""
    got = aim(found, asked)
    chosen = got.choice.chosen
    rules = found.assignment(chosen)
    return Plan(
        rules.rules,
        rules.order,
        version=__version__,
        model=found.model,
        asked=asked,
        unit=found.request.unit,
        steps=found.steps,
        sizes=(found.size,),
        prompts=Prompts(
            len(found.request.prompts), len(found.request.held_out), digest([found.request.prompts, found.request.held_out]),
            found.request.seed,
        ),
        ranges=found.ranges,
        layers=tuple(LayerHeads(name, heads) for name, heads in found.heads.items()),
        candidates=tuple(Candidate(spec, found.relative_cost(n)) for n, spec in enumerate(found.specs)),
        chosen=chosen,
        errors=found.errors_of(chosen),
        curve=_curve(found),
        rounds=got.rounds,
        outcome=Outcome(
            got.choice.cost, 1 / got.choice.cost, got.choice.predicted, got.factor, got.verified, found.held_out.by_range(got.errors)
        ),
        scaling=Scaling((found.size.tokens,), ()),
    )  # fmt: skip


POINTS = 12  # of the plans' curve


def _curve(found: Measurements) -> tuple[Point, ...]:
    """Plans evenly spread over the logarithm of the cost, and every candidate everywhere."""
    points = [Point("planned", "plan", c.cost, c.predicted, None) for c in found.frontier(POINTS)]
    for number, spec in enumerate(found.specs):
        if spec is not None:
            points.append(Point("uniform", str(spec), found.relative_cost(number), found.uniform(number), None))
    return tuple(points)
