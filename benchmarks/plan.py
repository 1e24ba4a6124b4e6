"""Plans against uniform settings on the built-in models: the curve of the prediction's error against multiply-adds.

    python benchmarks/plan.py --size 1024 --work WORK --out benchmarks/plan.json
    python benchmarks/plan.py --size 256 --frames 17 --densities 0.1 0.2 0.4 --work WORK --out video.json

Error curves come from `--measured` prompts; every setting is then verified on `--held-out` others, whose forwards no choice has seen. Each
uniform setting is paired with the plan of its multiply-adds and with the plan of its predicted error; ratios are means over prompts with
their 95 % intervals. Everything is kept in WORK, so that a stopped run continues.
"""

import argparse
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from dit_accel import Fovea, builtin_pipeline, builtin_video_pipeline
from dit_accel.files import write_json
from dit_accel.measure.bootstrap import Bootstrap
from dit_accel.measure.demo import HELD_OUT, training_prompts
from dit_accel.measure.timing import machine
from dit_accel.pipelines.builtin.drawings import article
from dit_accel.pipelines.builtin_video.look import questions
from dit_accel.planner.measuring import Choice, Measurements, Request, measured
from dit_accel.planner.work import Work

UNIFORM = (0.05, 0.1, 0.02, 0.2, 0.4)  # densities of Fovea; the first is the one to be beaten


def prompts(count: int, held_out: int, *, video: bool) -> tuple[list[str], list[str]]:
    """Prompts to measure on and others to verify on."""
    if video:
        drawn = list(dict.fromkeys(f"{article(noun)} {motion} on {article(colour)} background" for noun, motion, colour in questions(40)))
        return drawn[:count], drawn[count : count + held_out]
    drawn = training_prompts(count + held_out, HELD_OUT)
    return drawn[:count], [*HELD_OUT, *drawn[count:]][:held_out]


def setting(found: Measurements, choice: Choice) -> dict[str, Any]:
    """What is predicted of a choice, and verified prompt by prompt."""
    errors = found.verify(choice.chosen)
    held = found.held_out
    by_prompt = [held.of_prompt(errors, n) for n in sorted(set(held.prompts))]
    return {"cost": choice.cost, "predicted": choice.predicted, "by_prompt": by_prompt, "by_range": held.by_range(errors)}


def uniform(found: Measurements, density: float) -> Choice:
    """Fovea of a density everywhere."""
    sides = (1, 8, 8) if found.size.grid[0] == 1 else (2, 8, 8)
    blocks = math.prod(-(-length // side) for length, side in zip(found.size.grid, sides, strict=True))
    count = Fovea(density).selection.count(blocks)  # type: ignore[union-attr]
    number = next(n for n, spec in enumerate(found.specs) if spec is not None and spec.rest == Fovea(density).rest
                  and spec.selection is not None and spec.selection.count(blocks) == count)  # fmt: skip
    chosen = tuple(tuple((number,) * heads for heads in found.heads.values()) for _ in found.ranges)
    return Choice(chosen, found.relative_cost(number), found.uniform(number))


def pair(found: Measurements, density: float) -> dict[str, Any]:
    """A uniform setting, the plan of its cost, and the plan of its error."""
    plain = uniform(found, density)
    same_cost, same_error = found.at_cost(plain.cost), found.within(plain.predicted)
    rows = {"uniform": setting(found, plain)}
    for name, choice in (("same_cost", same_cost), ("same_error", same_error)):
        rows[name] = setting(found, choice)  # type: ignore[arg-type]
        ratios = [a / b for a, b in zip(rows[name]["by_prompt"], rows["uniform"]["by_prompt"], strict=True)]
        rows[name]["error_ratio"] = Bootstrap().summary(ratios)
        rows[name]["cost_ratio"] = rows[name]["cost"] / plain.cost
    print(f"Fovea {density:g}: cost {plain.cost:.4f}, error {statistics.mean(rows['uniform']['by_prompt']):.4f} "
          f"(predicted {plain.predicted:.4f})", flush=True)  # fmt: skip
    for name in ("same_cost", "same_error"):
        row = rows[name]
        print(f"  {name}: cost {row['cost']:.4f} ({row['cost_ratio']:.3f}), error {statistics.mean(row['by_prompt']):.4f} (predicted "
              f"{row['predicted']:.4f}), ratio {row['error_ratio']['mean']:.3f} [{row['error_ratio']['low']:.3f}, "
              f"{row['error_ratio']['high']:.3f}]", flush=True)  # fmt: skip
    return {"density": density, **rows}


def main() -> None:
    """Measure, choose, verify; write the JSON after each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--measured", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--frames", type=int, help="of clips of the built-in video model, in the place of pictures")
    parser.add_argument("--densities", type=float, nargs="+", default=UNIFORM)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(1)
    first, others = prompts(given.measured, given.held_out, video=given.frames is not None)
    call = {"height": given.size, "width": given.size, "num_inference_steps": given.steps}
    if given.frames is None:
        call, pipe = call | {"max_sequence_length": 32, "guidance_scale": 3.5}, builtin_pipeline()
    else:
        call |= {"max_sequence_length": 24, "guidance_scale": 3.0, "num_frames": given.frames}
        pipe = builtin_video_pipeline()
    pipe.set_progress_bar_config(disable=True)
    request = Request(pipe, tuple(first), tuple(others), None, "multiply-adds", 3, 0, None, call)
    found = measured(request, Work.begin(given.work, request.settings()))
    record: dict[str, Any] = {"machine": machine(), "size": given.size, "steps": given.steps, "measured": first, "held_out": others}
    record |= {} if given.frames is None else {"frames": given.frames}
    record["candidates"] = [str(spec) for spec in found.specs]
    record["pairs"] = []
    for density in given.densities:
        record["pairs"].append(pair(found, density))
        write_json(given.out, record)


if __name__ == "__main__":
    main()
