"""What limits a plan: predicted errors of choices from the error curves that `plan.py` measured, without a forward of the model.

    python benchmarks/plan.py --size 1024 --steps 4 --measured 6 --work WORK --out plan.json
    python benchmarks/plan_limits.py --size 1024 --steps 4 --measured 6 --work WORK --out benchmarks/plan-limits.json

Each ratio is of the predicted error of a plan to that of a uniform setting of its cost, the mean over measured prompts: of the plan from
all of them, of the plan of each prompt alone on itself, which is less than any plan can reach, and of plans from the other prompts. The
last are chosen also from curves that are drawn halfway to their mean over the ranges of noise levels, and from means of square roots.
`layer_specs`: the first with more or fewer different candidates in a layer than the planner allows.
"""

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plan import prompts, uniform

from dit_accel import builtin_pipeline
from dit_accel.files import write_json
from dit_accel.measure.timing import machine
from dit_accel.planner import choose
from dit_accel.planner.choose import Array, Knapsack, Unit
from dit_accel.planner.measuring import Chosen, Measurements, Request, measured
from dit_accel.planner.work import Work

Curves = dict[str, Array]  # by layer: [P, K, H, C], or [K, H, C]
LAYER_SPECS = (2, 3, 5)


def mean(curves: Curves) -> Curves:
    """As the planner does."""
    return {name: own.mean(0) for name, own in curves.items()}


def of_roots(curves: Curves) -> Curves:
    """The squared mean of the square roots."""
    return {name: np.square(np.sqrt(own).mean(0)) for name, own in curves.items()}


def halfway(curves: Curves) -> Curves:
    """Halfway to the mean over ranges, of shares of each range's sum."""
    found = mean(curves)
    sums = np.sum([own.sum((1, 2)) for own in found.values()], 0)[:, None, None]
    return {name: (own + (own / sums).mean(0) * sums) / 2 for name, own in found.items()}


class Limits:
    """Choices of one cost, made and judged by parts of what was measured."""

    def __init__(self, found: Measurements, density: float) -> None:
        self.found, self.plain = found, uniform(found, density)
        self.everyone = list(range(len(next(iter(found.by_prompt.values())))))

    def choice(self, curves: Curves) -> Chosen:
        """The choice of least predicted error at the uniform setting's cost."""
        costs, ranges = self.found.costs, range(len(self.found.ranges))
        knapsack = Knapsack([Unit(curves[name][k], own.each, own.start, own.split) for k in ranges for name, own in costs.items()])
        whole = len(ranges) * sum(own.each[0] * self.found.heads[name] + own.start[0] for name, own in costs.items())
        best = knapsack.best(self.plain.cost * whole * (1 + 1e-9))
        flat = [tuple(map(int, row)) for row in knapsack.solution(best or 0)]
        return tuple(tuple(flat[k * len(costs) : (k + 1) * len(costs)]) for k in ranges)

    def errors(self, chosen: Chosen, judged: list[int]) -> Array:
        """The predicted error of each prompt, ranges weighing alike."""
        squares = np.zeros((len(judged), len(chosen)))
        for k, rows in enumerate(chosen):
            for own, row in zip(self.found.by_prompt.values(), rows, strict=True):
                squares[:, k] += own[judged, k][:, np.arange(len(row)), list(row)].sum(-1)
        return np.sqrt(squares).mean(1)

    def ratio(self, given: list[int], judged: list[int], combine: Callable[[Curves], Curves] = mean) -> float:
        """Of plan to uniform setting, chosen on some prompts and judged on others."""
        chosen = self.choice(combine({name: own[given] for name, own in self.found.by_prompt.items()}))
        return float((self.errors(chosen, judged) / self.errors(self.plain.chosen, judged)).mean())

    def left_out(self, combine: Callable[[Curves], Curves] = mean) -> float:
        """Each prompt's by the plan of all others."""
        return statistics.fmean(self.ratio([n for n in self.everyone if n != left], [left], combine) for left in self.everyone)


def row(found: Measurements, density: float) -> dict[str, Any]:
    """All ratios of one uniform setting."""
    limits, most = Limits(found, density), choose.SPECS
    everyone = limits.everyone
    record: dict[str, Any] = {"density": density, "cost": limits.plain.cost, "all": limits.ratio(everyone, everyone)}
    record["own"] = statistics.fmean(limits.ratio([n], [n]) for n in everyone)
    record |= {"others": limits.left_out(), "others_halfway": limits.left_out(halfway), "others_of_roots": limits.left_out(of_roots)}
    record["layer_specs"] = {}
    for count in LAYER_SPECS:
        choose.SPECS = count
        record["layer_specs"][str(count)] = limits.ratio(everyone, everyone)
    choose.SPECS = most
    print(record, flush=True)
    return record


def main() -> None:
    """All densities; the JSON is written after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--measured", type=int, default=6)
    parser.add_argument("--held-out", type=int, default=8, help="as given to plan.py")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.05, 0.1, 0.2])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    first, others = prompts(given.measured, given.held_out, video=False)
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": given.size, "width": given.size, "num_inference_steps": given.steps}
    call |= {"max_sequence_length": 32, "guidance_scale": 3.5}
    request = Request(pipe, tuple(first), tuple(others), None, "multiply-adds", 3, 0, None, call)
    found = measured(request, Work.begin(given.work, request.settings()))
    record: dict[str, Any] = {"machine": machine(), "size": given.size, "steps": given.steps, "measured": first, "rows": []}
    for density in given.densities:
        record["rows"].append(row(found, density))
        write_json(given.out, record)


if __name__ == "__main__":
    main()
