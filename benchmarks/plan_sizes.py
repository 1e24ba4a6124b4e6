"""A plan that was made at one size, used at another, against uniform Fovea of its multiply-adds there, on the built-in image model.

    python benchmarks/plan_sizes.py --size 512 --at 1024 --work WORK --out plan-sizes.json

Error curves come from `--measured` prompts at `--size`; errors are those of `--held-out` others at `--at`. Each uniform setting is compared
with the plan of least predicted error that costs no more at that size; ratios are means over prompts with their 95 % intervals.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from plan import prompts

from dit_accel import Fovea, builtin_pipeline
from dit_accel.files import write_json
from dit_accel.finetune.data.collect import collect
from dit_accel.finetune.moments import Moments
from dit_accel.measure.bootstrap import Bootstrap
from dit_accel.measure.timing import machine
from dit_accel.method import Assignment
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import require_family
from dit_accel.planner import levels
from dit_accel.planner.candidates import multiply_adds
from dit_accel.planner.measuring import OTHERS, Choice, Measurements, Request, measured
from dit_accel.planner.verified import HeldOut
from dit_accel.planner.work import Work

POINTS = 200  # choices at the plan's own size, of which one is taken for each cost


class Elsewhere:
    """The original's runs of held-out prompts at another size, and what candidates cost there."""

    def __init__(self, found: Measurements, side: int, folder: Path, each: int) -> None:
        pipe, request = found.request.pipe, found.request
        self.transformer = request.transformer
        call = request.call | {"height": side, "width": side}
        samples = collect(pipe, request.held_out, folder, seed=request.seed + OTHERS, **call)
        moments = Moments(samples, pipe, require_family(self.transformer))
        held = levels.spread(samples, moments, [(own.low, own.high) for own in found.ranges], each)
        numbers = {position: number for number, run in enumerate(samples.runs()) for position in run}
        self.held_out = HeldOut(
            [samples[p] for _, p in held], [moments[p] for _, p in held], [k for k, _ in held], [numbers[p] for _, p in held]
        )
        frames, height, width = found.size.grid
        grid = frames, height * side // request.call["height"], width * side // request.call["width"]
        self.layout = TokenLayout(grid, found.size.text)
        self.costs = self.costs_of(found.specs)

    def costs_of(self, specs: Any) -> Any:
        """Of one head, as a share of the original attention's."""
        own = multiply_adds((None, *specs), self.layout, self.transformer.config.attention_head_dim).each
        return own[1:] / own[0]

    def cost(self, choice: Choice) -> float:
        """Of all heads at all noise levels."""
        return statistics.fmean(float(self.costs[n]) for rows in choice.chosen for row in rows for n in row)

    def errors(self, assignment: Assignment) -> list[float]:
        """Of each prompt."""
        return self.held_out.by_prompt(self.held_out.errors(self.transformer, assignment))


def pair(found: Measurements, there: Elsewhere, choices: list[Choice], density: float) -> dict[str, Any]:
    """A uniform setting, and the plan of its cost."""
    spec = Fovea(density)
    cost = float(there.costs_of((spec,))[0])
    chosen = min((choice for choice in choices if there.cost(choice) <= cost), key=lambda choice: choice.predicted)
    plain, planned = there.errors(Assignment.of(spec)), there.errors(found.assignment(chosen.chosen))
    ratio = Bootstrap().summary([a / b for a, b in zip(planned, plain, strict=True)])
    print(f"Fovea {density:g}: cost {cost:.4f}, error {statistics.fmean(plain):.4f}; planned {there.cost(chosen):.4f}, "
          f"{statistics.fmean(planned):.4f} (at its own size predicted {chosen.predicted:.4f}), ratio {ratio['mean']:.3f} "
          f"[{ratio['low']:.3f}, {ratio['high']:.3f}]", flush=True)  # fmt: skip
    planned_row = {"cost": there.cost(chosen), "predicted": chosen.predicted, "by_prompt": planned, "error_ratio": ratio}
    return {"density": density, "uniform": {"cost": cost, "by_prompt": plain}, "planned": planned_row}


def main() -> None:
    """Measure at one size, verify at the other; write the JSON after each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--at", type=int, default=1024)
    parser.add_argument("--measured", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--each", type=int, default=1, help="forwards of every held-out prompt and range of noise levels")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    first, others = prompts(given.measured, given.held_out, video=False)
    call = {"height": given.size, "width": given.size, "num_inference_steps": given.steps, "max_sequence_length": 32, "guidance_scale": 3.5}
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    request = Request(pipe, tuple(first), tuple(others), None, "multiply-adds", 3, 0, None, call)
    found = measured(request, Work.begin(given.work, request.settings()))
    there, choices = Elsewhere(found, given.at, given.work / f"held-out-{given.at}", given.each), found.frontier(POINTS)
    record: dict[str, Any] = {"machine": machine(), "size": given.size, "at": given.at, "measured": first, "held_out": others}
    record |= {"factor": math.prod(there.layout.grid) / found.size.tokens, "pairs": []}
    for density in given.densities:
        record["pairs"].append(pair(found, there, choices, density))
        write_json(given.out, record)


if __name__ == "__main__":
    main()
