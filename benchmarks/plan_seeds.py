"""Whether plans hold their budget on prompts that they have not seen, and what planning takes, on the built-in image model.

    python benchmarks/plan_seeds.py --work WORK --out benchmarks/plan-seeds.json

Each seed draws its own prompts and noise and makes a plan of each budget with the defaults of `dit-accel plan`. Its error is then measured
on further prompts, the same for all seeds, none of which any plan has seen. A seed's plan of the first budget is timed between pictures,
in processor time of one thread. WORK keeps every recorded run and measurement, and --out every seed that is finished, so that a stopped
run continues; a plan that was stopped halfway has no time.
"""

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dit_accel import builtin_pipeline, plan
from dit_accel.errors import PlanError
from dit_accel.files import write_json
from dit_accel.finetune.data.collect import collect
from dit_accel.finetune.moments import Moments
from dit_accel.measure.demo import HELD_OUT, training_prompts
from dit_accel.measure.timing import machine
from dit_accel.patch.anatomy import require_family
from dit_accel.planner import levels
from dit_accel.planner.record import Plan
from dit_accel.planner.verified import HeldOut

PROMPTS = 6  # of a plan
POOL = 60  # captions that they are drawn from
PICTURES = 1  # that is timed before a plan, and another after it
FAR = 50_000_000  # the seed of the other prompts' noise: no plan has it


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """The processor's seconds that a call takes, and what it gives."""
    start = time.process_time()
    found = work()
    return time.process_time() - start, found


class Others:
    """The original's runs on prompts that no plan has seen."""

    def __init__(self, pipe: Any, prompts: list[str], folder: Path, call: dict[str, Any]) -> None:
        self.pipe, self.prompts = pipe, prompts
        self.samples = collect(pipe, prompts, folder, seed=FAR, **call)
        self.moments = Moments(self.samples, pipe, require_family(pipe.transformer))

    def errors(self, made: Plan, each: int) -> list[float]:
        """The error of each prompt, `each` forwards of every range of noise levels."""
        held = levels.spread(self.samples, self.moments, [(own.low, own.high) for own in made.ranges], each)
        numbers = {position: number for number, run in enumerate(self.samples.runs()) for position in run}
        forwards, moments = [self.samples[p] for _, p in held], [self.moments[p] for _, p in held]
        found = HeldOut(forwards, moments, [k for k, _ in held], [numbers[p] for _, p in held])
        errors = found.errors(self.pipe.transformer, made)
        return [found.of_prompt(errors, number) for number in range(len(self.prompts))]


def of_seed(pipe: Any, seed: int, given: argparse.Namespace, others: Others, call: dict[str, Any]) -> dict[str, Any]:
    """The plans of one seed, and their errors on the other prompts."""
    prompts = random.Random(seed).sample(training_prompts(POOL, [*HELD_OUT, *others.prompts]), PROMPTS)
    folder = given.work / f"seed-{seed}"
    fresh = not folder.exists()

    def picture(number: int) -> float:
        generator = torch.Generator().manual_seed(number)
        return seconds(lambda: pipe(prompts[number % PROMPTS], generator=generator, **call))[0]

    pictures, rows, planning = [picture(n) for n in range(PICTURES)], [], None
    for budget in given.budgets:
        try:
            asked = {"budget": budget, "seed": 1000 * seed, "folder": folder, "progress": False, **call}
            taken, made = seconds(functools.partial(plan, pipe, prompts, **asked))
        except PlanError as error:
            rows.append({"budget": budget, "refused": str(error)})
            continue
        planning = taken if fresh and planning is None and not rows else planning
        found = others.errors(made, given.each)
        row = {"budget": budget, "cost": made.outcome.cost, "verified": vars(made.outcome.verified), "others": found}
        rows.append(row | {"within": statistics.fmean(found) <= budget})
        print(f"seed {seed}, budget {budget:g}: cost {made.outcome.cost:.3f}, verified {made.outcome.verified.mean:.4f} (promised "
              f"{made.outcome.verified.high or 0:.4f}), others {statistics.fmean(found):.4f}", flush=True)  # fmt: skip
    pictures += [picture(n) for n in range(PICTURES, 2 * PICTURES)]
    picture_seconds = statistics.median(pictures)
    times = {} if planning is None else {"planning_seconds": planning, "pictures": planning / picture_seconds}
    print(f"seed {seed}: {times}", flush=True)
    return {"seed": seed, "prompts": prompts, "plans": rows, "picture_seconds": picture_seconds, **times}


def main() -> None:
    """One seed after the other; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.05, 0.1])
    parser.add_argument("--others", type=int, default=12)
    parser.add_argument("--each", type=int, default=1, help="forwards of every other prompt and range of noise levels")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    call = {"height": given.size, "width": given.size, "num_inference_steps": given.steps}
    call |= {"max_sequence_length": 32, "guidance_scale": 3.5}
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = [*HELD_OUT, *training_prompts(given.others, HELD_OUT)][: given.others]
    others = Others(pipe, prompts, given.work / "others", call)
    pipe(prompts[0], generator=torch.Generator().manual_seed(0), **call)  # what is made once is made
    record: dict[str, Any] = {"machine": machine(), "others": prompts, "call": call, "seeds": []}
    if given.out.exists():
        record = json.loads(given.out.read_text())
    done = {row["seed"] for row in record["seeds"]}
    for seed in range(given.seeds):
        if seed not in done:
            record["seeds"].append(of_seed(pipe, seed, given, others, call))
            write_json(given.out, record)


if __name__ == "__main__":
    main()
