"""All that a choice is made from: recorded forwards, error curves and costs, on one pipeline at one size."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm
from peft.tuners.tuners_utils import BaseTunerLayer

from dit_accel.errors import PlanError
from dit_accel.finetune.data.collect import Forward, Samples, collect
from dit_accel.finetune.moments import Moments
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import Assignment, Rule
from dit_accel.patch.anatomy import find_transformers, require_family
from dit_accel.patch.fingerprint import known_hash
from dit_accel.planner import levels
from dit_accel.planner.candidates import Candidates, Costs, CostUnit, default_candidates, multiply_adds
from dit_accel.planner.choose import Array, Knapsack, Unit
from dit_accel.planner.curves import Measured, check_finite, first_grid, measure, measured_seconds, prepared
from dit_accel.planner.record import Interval, Model, NoiseRange, Size
from dit_accel.planner.trained import Trained
from dit_accel.planner.verified import HeldOut, interval_of
from dit_accel.planner.work import Work, is_errors, is_times

PROBES = 2  # of each forward
VERIFIED = 2  # forwards of each held-out prompt and range, at most
OTHERS = 1_000_000  # between the seeds of measured prompts and those of held-out ones
SIZE_ARGUMENTS = ("height", "width", "num_frames")
Chosen = tuple[tuple[tuple[int, ...], ...], ...]  # [range][layer][head]


@dataclass(frozen=True)
class Request:
    """The checked arguments of `plan`."""

    pipe: Any
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    specs: Candidates | None
    unit: CostUnit
    ranges: int
    seed: int
    progress: bool | None
    call: dict[str, Any]
    trained: Trained | None = None

    @property
    def transformer(self) -> Any:
        return find_transformers(self.pipe)[0]

    @property
    def hidden(self) -> bool | None:
        """Whether tqdm hides its bar; None: where there is no terminal."""
        return None if self.progress is None else not self.progress

    def settings(self) -> dict[str, Any]:
        """What the work in a folder depends on."""
        specs = None if self.specs is None else [None if spec is None else spec.to_dict() for spec in self.specs]
        more = {} if self.trained is None else {"trained": self.trained.record.sha256}
        return more | {
            "model": vars(model_of(self.pipe)), "prompts": list(self.prompts), "held-out prompts": list(self.held_out), "specs": specs,
            "unit": self.unit, "ranges": self.ranges, "seed": self.seed, "call": self.call, "probes": PROBES,
        }  # fmt: skip


def model_of(pipe: Any) -> Model:
    """Classes and weights, those of active LoRA among them."""
    (transformer,) = find_transformers(pipe)
    digests: dict[str, Any] = {}
    for name, module in transformer.named_modules():
        if not isinstance(module, BaseTunerLayer) or module.disable_adapters:
            continue
        layer: Any = module
        for adapter in layer.active_adapters:
            sha = digests.setdefault(adapter, hashlib.sha256())
            sha.update(f"{name} {getattr(layer, 'scaling', {}).get(adapter)}".encode())
            for key, value in layer.named_parameters():
                if f".{adapter}." in f".{key}.":
                    sha.update(key.encode() + value.detach().cpu().float().numpy().tobytes())
    loras = {adapter: sha.hexdigest() for adapter, sha in sorted(digests.items())}
    return Model(type(pipe).__name__, type(transformer).__name__, known_hash(transformer), loras)


@dataclass(frozen=True)
class Choice:
    """A candidate for every head, its cost as a share of the original attention's, and its predicted relative error."""

    chosen: Chosen
    cost: float
    predicted: float


class Measurements:
    """What was measured. `specs`: the original attention first, whether or not it may be chosen (`free`), then the candidates.
    `by_prompt` `[P, K, H, C]` by layer, for P measured prompts and K ranges of noise levels, and `curves`, its mean over prompts;
    `costs` of a layer's heads by layer."""

    def __init__(
        self, request: Request, work: Work, specs: Candidates, size: Size, ranges: tuple[NoiseRange, ...], by_prompt: dict[str, Array],
        costs: dict[str, Costs], held_out: HeldOut, steps: int,
    ) -> None:  # fmt: skip
        self.request, self.work, self.specs, self.size, self.ranges, self.steps = request, work, specs, size, ranges, steps
        self.by_prompt, self.costs, self.held_out = by_prompt, costs, held_out
        self.curves = curves = {name: own.mean(0) for name, own in by_prompt.items()}
        self.model = model_of(request.pipe)
        self.heads = {name: own.shape[1] for name, own in curves.items()}
        self._free = 0 if request.specs is None or None in request.specs else 1
        units = [
            Unit(curves[name][k][:, self._free :], own.each[self._free :], own.start[self._free :], own.split)
            for k in range(len(ranges))
            for name, own in costs.items()
        ]
        self._knapsack = Knapsack(units)
        self._whole = len(ranges) * sum(self._cost(name, 0) for name in costs)

    def _cost(self, layer: str, number: int) -> float:
        """Of a layer that runs one candidate in all heads."""
        own = self.costs[layer]
        return float(own.each[number] * self.heads[layer] + own.start[number])

    def relative_cost(self, number: int) -> float:
        """Of a candidate everywhere, as a share of the original attention's."""
        return len(self.ranges) * sum(self._cost(name, number) for name in self.costs) / self._whole

    def uniform(self, number: int) -> float:
        """The predicted error of a candidate everywhere."""
        return float(np.sqrt(sum(own[:, :, number].sum() for own in self.curves.values()) / len(self.ranges)))

    def _choice(self, point: int) -> Choice:
        flat = [tuple(int(n) + self._free for n in choice) for choice in self._knapsack.solution(point)]
        layers = len(self.costs)
        chosen = tuple(tuple(flat[k * layers : (k + 1) * layers]) for k in range(len(self.ranges)))
        cost, error = self._knapsack.costs[point], self._knapsack.errors[point]
        return Choice(chosen, float(cost / self._whole), float(np.sqrt(error / len(self.ranges))))

    def within(self, error: float) -> Choice | None:
        """The cheapest choice of no more predicted error."""
        point = self._knapsack.cheapest(len(self.ranges) * error**2)
        return None if point is None else self._choice(point)

    def at_cost(self, cost: float) -> Choice | None:
        """The choice of least error that costs no more than a share of the original attention."""
        point = self._knapsack.best(cost * self._whole * (1 + 1e-9))
        return None if point is None else self._choice(point)

    def saves(self, choice: Choice) -> bool:
        """Whether it accelerates anything and costs less than the original attention."""
        return choice.cost < 1 - 1e-9 and self.accelerates(choice.chosen)

    def gentlest(self) -> Choice | None:
        """The choice of least predicted error that saves anything; None where none does."""
        points = (self._choice(point) for point in reversed(range(len(self._knapsack.costs))))
        return next((choice for choice in points if self.saves(choice)), None)

    @property
    def least_cost(self) -> float:
        return float(self._knapsack.costs[0] / self._whole)

    def frontier(self, count: int) -> list[Choice]:
        """Up to `count` choices evenly spread over the logarithm of the cost."""
        costs = self._knapsack.costs
        points = np.searchsorted(costs, np.geomspace(costs[0], costs[-1], count)).clip(max=len(costs) - 1)
        return [self._choice(int(point)) for point in np.unique(points)]

    def errors_of(self, chosen: Chosen) -> tuple[tuple[tuple[float, ...], ...], ...]:
        """What each head is predicted to add, in the form of `chosen`."""
        return tuple(
            tuple(tuple(float(own[k, head, n]) for head, n in enumerate(row)) for own, row in zip(self.curves.values(), rows, strict=True))
            for k, rows in enumerate(chosen)
        )

    def accelerates(self, chosen: Chosen) -> bool:
        """Whether any head runs a spec."""
        return any(self.specs[n] is not None for rows in chosen for row in rows for n in row)

    def assignment(self, chosen: Chosen) -> Assignment:
        """The rules of a choice: one for each spec and set of heads in a range of noise levels, or in all where they are alike."""
        rules: dict[tuple[int, tuple[int, ...] | None, tuple[float, float] | None], list[str]] = {}
        for place, name in enumerate(self.heads):
            rows = [rows[place] for rows in chosen]
            alike = len(set(rows)) == 1
            for k, row in enumerate(rows[:1] if alike else rows):
                noise = None if alike else (self.ranges[k].low, self.ranges[k].high)
                for number in sorted(set(row)):
                    heads = tuple(head for head, n in enumerate(row) if n == number)
                    rules.setdefault((number, None if len(heads) == len(row) else heads, noise), []).append(name)
        order = lambda item: (item[0][2] is not None, item[0][2] or (), item[1], item[0][0])  # noqa: E731
        found = sorted(rules.items(), key=order)
        return Assignment(
            tuple(Rule(self.specs[n], tuple(names), heads, noise=noise) for (n, heads, noise), names in found if self.specs[n] is not None)
        )

    def interval(self, errors: Sequence[float]) -> Interval:
        """The mean error of the held-out prompts with its interval; `errors`: what `verify` found."""
        squares = sum(own.sum(2).mean(1) for own in self.by_prompt.values())
        return interval_of(self.held_out.by_prompt(errors), np.sqrt(squares))

    def verify(self, chosen: Chosen) -> list[float]:
        """The error on every held-out forward, measured once."""
        assignment = self.assignment(chosen)

        def make() -> list[float]:
            errors = self.held_out.errors(self.request.transformer, assignment, self.request.trained)
            if not all(map(math.isfinite, errors)):
                raise PlanError(
                    f"the prediction on held-out prompts is not finite with {assignment}: leave candidates out of specs, or load the "
                    "pipeline in a dtype with a larger range, bfloat16 or float32"
                )
            return errors

        count = len(self.held_out.forwards)
        return list(self.work.json("errors", assignment.to_dict(), make, lambda found: is_errors(found, count)))


def measured(request: Request, work: Work) -> Measurements:
    """Record, measure and count; what the folder has of it is read."""
    pipe, transformer, folder = request.pipe, request.transformer, work.folder
    samples = collect(pipe, request.prompts, folder / "measured", seed=request.seed, **request.call)
    others = collect(pipe, request.held_out, folder / "held-out", seed=request.seed + OTHERS, **request.call)
    family = require_family(transformer)
    moments, others_moments = Moments(samples, pipe, family), Moments(others, pipe, family)
    run = [moments[position] for position in samples.runs()[0]]
    bounds = levels.ranges_of(run, request.ranges)
    chosen = levels.spread(samples, moments, bounds, 1)
    specs, found, costs = _measure(request, work, samples, moments, chosen)
    by_prompt = {  # forwards are those of a prompt after those of another, one in each range
        name: np.stack([m.curves[name].double().numpy() for m in found]).reshape(-1, len(bounds), *found[0].curves[name].shape)
        for name in found[0].curves
    }
    held = levels.spread(others, others_moments, bounds, VERIFIED)
    prompts = {position: number for number, own in enumerate(others.runs()) for position in own}
    held_out = HeldOut(
        [others[p] for _, p in held], [others_moments[p] for _, p in held], [k for k, _ in held], [prompts[p] for _, p in held]
    )
    shape = next(iter(found[0].shapes.values()))
    size = Size({name: n for name in SIZE_ARGUMENTS if (n := request.call.get(name)) is not None}, shape.layout.grid, shape.layout.text)
    ranges = levels.described(bounds, chosen, moments)
    return Measurements(request, work, specs, size, ranges, by_prompt, costs, held_out, 1 + max(moment.step for moment in run))


def _measure(
    request: Request, work: Work, samples: Samples, moments: Moments, chosen: Sequence[tuple[int, int]]
) -> tuple[Candidates, list[Measured], dict[str, Costs]]:
    """Candidates, the original attention first; the curves of each forward; the costs of each layer."""
    transformer, specs = request.transformer, request.specs
    if specs is None:
        specs = default_candidates(first_grid(transformer, samples[chosen[0][1]]))
        if request.trained is not None:
            specs = request.trained.among(specs)
            request.trained.check(transformer, specs)
    specs = (None, *(spec for spec in specs if spec is not None))
    found: list[Measured] = []
    with prepared(transformer, next(spec for spec in specs if spec is not None)):
        for number, (_, position) in enumerate(tqdm(chosen, desc="measure", disable=request.hidden)):
            key = [samples.entries[0].file, samples.contents, position, [spec and spec.to_dict() for spec in specs]]
            seed = request.seed + number

            def make(position: int = position, seed: int = seed) -> Measured:
                made = measure(transformer, samples[position], specs, probes=PROBES, seed=seed, trained=request.trained)
                check_finite(made, specs, moments[position].noise)
                return made

            found.append(work.curves(key, make))
        shapes = found[0].shapes
        if request.unit == "seconds":
            times = _times(work, transformer, samples[chosen[0][1]], specs, list(shapes))
            return specs, found, {name: Costs.read(times[name]) for name in shapes}
    return specs, found, {name: multiply_adds(specs, shape.layout, shape.head_dim, shape.calls) for name, shape in shapes.items()}


def _times(work: Work, transformer: Any, forward: Forward, specs: Candidates, layers: Sequence[str]) -> dict[str, list[Any]]:
    """Measured costs by layer: those of this machine, device, number of threads and dtype, and of these candidates in this order."""
    weights = next(transformer.parameters())
    device = torch.cuda.get_device_name(weights.device) if weights.device.type == "cuda" else weights.device.type
    key = [machine(), device, str(weights.dtype), [spec and spec.to_dict() for spec in specs]]
    make = lambda: measured_seconds(transformer, forward, specs)  # noqa: E731
    found: dict[str, list[Any]] = work.json("times", key, make, lambda times: is_times(times, layers, len(specs)))
    return found
