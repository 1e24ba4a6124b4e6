"""`plan`: measure, choose, verify, until the promise holds."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel import __version__
from dit_accel.finetune.surroundings import process_kept
from dit_accel.method import AttentionSpec
from dit_accel.planner.aim import aim
from dit_accel.planner.candidates import Candidates, CostUnit
from dit_accel.planner.checks import check_asked, check_folder_name, checked_request
from dit_accel.planner.measuring import Chosen, Measurements, measured
from dit_accel.planner.record import (
    Asked,
    Candidate,
    LayerHeads,
    Outcome,
    Plan,
    Point,
    Prompts,
    Scaling,
    SizeRule,
)
from dit_accel.planner.work import Work, digest


def plan(
    pipe: Any,
    prompts: Sequence[str],
    *,
    budget: float | None = None,
    speed: float | None = None,
    specs: Sequence[AttentionSpec | None] | None = None,
    trained: str | Path | None = None,
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
        budget: the largest mean relative error of the prediction, ‖accelerated − original‖ / ‖original‖, over prompts: the upper end of
            the interval of the held-out ones' mean is within it, which one or two of 20 plans exceed. 0.05 unless budget or speed is given.
        speed: how many times less the attention shall cost, in `unit`, in the place of a budget.
        specs: the candidates, specs of one order, None for the original attention; by default that and Fovea with several numbers of
            tiles, which stay the same at other sizes, and radii.
        trained: an adapter that `save_adapter` wrote, its folder or hub id: candidates are measured with what it has learned, and its own
            specs are among the default ones. `load_adapter(pipe, trained, spec=plan)` runs the plan; where its `trained` is None no chosen
            one learns. Refused where it has a LoRA or other weights of the model.
        held_out: prompts to verify on, in the place of the last ones.
        unit: of costs: "multiply-adds", counted, or "seconds", kernels timed on this machine.
        ranges: of noise levels that have a choice of their own, at most.
        seed: of the first prompt's noise; the n-th has seed + n.
        folder: where the work is kept: the same call continues there after a stop.
        progress: whether to show progress; by default where there is a terminal.
        call: arguments of the pipeline's call: height, width, num_frames, num_inference_steps, guidance_scale, ...; one that it does not
            take, or a size that is no multiple of a token's side, is refused.

    The pipeline must not be accelerated, and is not changed; LoRA that are loaded are part of the model. Raises PlanError where no plan
    is within the budget or reaches the speed, saying which is reachable, ValueError or a class of dit_accel.errors for what can't be used.
    """
    if budget is None and speed is None:
        budget = 0.05
    check_asked(budget, speed)
    check_folder_name(folder)
    request = checked_request(pipe, prompts, held_out, specs, unit, ranges, seed, progress, call, trained)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_kept())
        path = Path(folder) if folder is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dit-accel-plan-")))
        work = Work.begin(path, request.settings())
        found = measured(request, work)
        return _planned(found, Asked(budget, speed))


def _planned(found: Measurements, asked: Asked) -> Plan:
    """The plan that is asked for, from what was measured."""
    got = aim(found, asked)
    chosen = got.choice.chosen
    rules, trained = found.assignment(chosen), found.request.trained
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
        scaling=Scaling((found.size.tokens,), _size_rules(found.specs, chosen)),
        trained=trained.record if trained is not None and trained.serves(rules) else None,
    )  # fmt: skip


def _size_rules(specs: Candidates, chosen: Chosen) -> tuple[SizeRule, ...]:
    """Of each chosen candidate that keeps a number of blocks, however many there are."""
    found = []
    for k, rows in enumerate(chosen):
        for number in sorted({n for row in rows for n in row}):
            spec = specs[number]
            if spec is not None and spec.selection is not None and spec.selection.more:
                found.append(SizeRule(number, k, float(spec.selection.more * spec.block[1]), spec.selection.share))
    return tuple(found)


POINTS = 12  # of the plans' curve


def _curve(found: Measurements) -> tuple[Point, ...]:
    """Plans evenly spread over the logarithm of the cost, and every candidate everywhere."""
    points = [Point("planned", "plan", c.cost, c.predicted, None) for c in found.frontier(POINTS)]
    for number, spec in enumerate(found.specs):
        if spec is not None:
            points.append(Point("uniform", str(spec), found.relative_cost(number), found.uniform(number), None))
    return tuple(points)
