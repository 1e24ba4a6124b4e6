"""`dit-accel evaluate`: how close an accelerated pipeline, untrained or distilled, is to its own original.

Every prompt is drawn from the same noise by the original, by the original again, by the original in bfloat16 arithmetic and by the method.
Compared with the first are the pictures; the denoiser's predictions, replayed on what the original called it with while drawing; and in
every layer and head the method's output against exact attention over the same queries, keys and values. The second must be equal to
the first, and the third is the noise floor: differences below it can't be distinguished from rounding.
"""

import contextlib
import dataclasses
import inspect
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from dit_accel import __version__
from dit_accel.errors import ArgumentError, FallbackError
from dit_accel.files import check_folder, write_json
from dit_accel.finetune.data.collect import Forward, Recorder, original
from dit_accel.finetune.moments import recorded_moments
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.bootstrap import Bootstrap
from dit_accel.measure.capture import Captured, Deviation, Exact, capture_inputs, deviation, exact_attention
from dit_accel.measure.evaluation_page import show, write_page
from dit_accel.measure.similarity import DISTANCE_SIDE, compare, save_picture
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import Moment
from dit_accel.patch.anatomy import find_transformers, forward_names
from dit_accel.patch.heads import parameters_of
from dit_accel.patch.modes import always, at_moment, without_dense_steps
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import operators_of, patches_of
from dit_accel.patch.verbs import dense
from dit_accel.pipelines.video import compare_motion, frames_argument

Side = Callable[[], contextlib.AbstractContextManager[Any]]  # makes a pipeline draw as one side of the comparison
ONE_PROMPT = "One prompt: there is no interval over prompts."
NO_DISTANCE = f"No 1 − MS-SSIM: multi-scale SSIM requires sides of {DISTANCE_SIDE} pixels or more."
ATTENTION_FORWARDS = 3  # of each prompt: the first, the last and one between


@dataclass
class PromptResult:
    """The measurements of one prompt. Sides are "method", "bfloat16" (where there is one) and "again"."""

    pictures: dict[str, dict[str, float]] = field(default_factory=dict)  # side -> measure -> value
    velocity: dict[str, dict[float, float]] = field(default_factory=dict)  # side -> timestep -> relative error
    attention: dict[str, list[Deviation]] = field(default_factory=dict)  # layer -> one for each of its calls

    def values(self, side: str) -> dict[str, float]:
        """Every measure of a side as one number."""
        found = self.pictures[side] | {"velocity_error": statistics.mean(self.velocity[side].values())}
        if side == "method":
            calls = [call for calls in self.attention.values() for call in calls]
            found["attention_error"] = statistics.mean(_relative(call.error.sum(), call.size.sum()).item() for call in calls)
            found["kept_mass"] = statistics.mean(call.mass.mean().item() for call in calls)
        return found


def _relative(error: Tensor, size: Tensor) -> Tensor:
    return (error / size.clamp_min(1e-30)).sqrt()


def evaluate(pipe: Any, prompts: Sequence[str], out: Path, *, seed: int = 0, adapter: str | None = None, **call: Any) -> dict[str, Any]:
    """Compare an accelerated pipeline with its own original, into the folder `out`; returns what `results.json` contains there.

    Args:
        pipe: after `accelerate` or `load_adapter`.
        prompts: what to draw.
        out: a folder, made if need be: `results.json`, `report.html`, the plots, and the pictures (of a video the middle frame) are
            written there, all of them at the end.
        seed: of the first prompt's noise; prompt i is drawn with seed + i.
        adapter: what was loaded, for the record.
        call: arguments of the pipeline's call.

    The method runs even where the original attention is faster. Raises ValueError, or a class of dit_accel.errors, before anything is drawn
    where prompts are missing, the folder can't be written to, the pipeline is not accelerated, or it doesn't take these arguments;
    FallbackError where no layer runs the method.
    """
    check_call(pipe, prompts, call)
    check_json(call)
    check_folder(out)
    bootstrap = Bootstrap()
    with tempfile.TemporaryDirectory(prefix=".work-", dir=out) as folder:
        work = Path(folder)
        rows = []
        for index, prompt in enumerate(tqdm(prompts, desc="evaluate", disable=None)):
            row, pictures = measure(pipe, prompt, seed + index, call)
            for side, frames in pictures.items():
                save_picture(frames[len(frames) // 2], work / f"{side}-{index}.png")
            rows.append(row)
        record = {
            "version": __version__, "machine": machine(), **_describe(pipe), "adapter": adapter, "prompts": list(prompts), "seed": seed,
            "call": call, "interval": vars(bootstrap) | {"over": "prompts"} if len(rows) > 1 else None,
            "notes": _notes(pipe, rows), **_results(rows, bootstrap),
        }  # fmt: skip
        write_page(work, record)
        write_json(work / "results.json", record)
        for file in sorted(work.iterdir()):
            file.replace(out / file.name)
    show(record)
    return record


def check_call(pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> None:
    """Raise ValueError, or a class of dit_accel.errors, unless it is an accelerated pipeline that draws these prompts with this call."""
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ArgumentError(f"prompts must be a non-empty list of non-empty strings, not {prompts!r}")
    patches_of(pipe)
    check_arguments(pipe, call)


def check_arguments(pipe: Any, call: dict[str, Any]) -> None:
    """Raise ArgumentError unless it is a pipeline whose call takes these arguments, and those that are set for every run."""
    kind = type(pipe)
    if not isinstance(getattr(pipe, "components", None), dict):
        raise ArgumentError(f"{kind.__name__} draws no pictures: pass a pipeline")
    if ours := sorted({"prompt", "generator", "output_type"} & set(call)):
        raise ArgumentError(f"prompts, seed and output type are set for every run: leave {', '.join(ours)} out")
    taken = inspect.signature(kind.__call__).parameters
    missing = sorted({"prompt", "generator", "output_type", *call} - set(taken))
    if missing and not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        raise ArgumentError(f"{kind.__name__} takes no {', '.join(missing)}")


def check_json(call: dict[str, Any]) -> None:
    """Raise ArgumentError unless the arguments of a call can be written down as JSON."""
    try:
        json.dumps(call)
    except TypeError as error:
        raise ArgumentError(f"call arguments must be numbers, strings, lists or None, which {sorted(call)} are not: {error}") from error


def _sides(pipe: Any) -> dict[str, Side]:
    """The sides that are compared with the original's first run, as ways to run the pipeline."""
    sides: dict[str, Side] = {"method": lambda: always(pipe), "bfloat16": lambda: in_bfloat16(pipe), "again": lambda: dense(pipe)}
    if not is_wide(pipe):
        del sides["bfloat16"]
    return sides


@contextlib.contextmanager
def in_bfloat16(pipe: Any) -> Iterator[None]:
    """The original, whether or not the pipeline is accelerated, in bfloat16 arithmetic."""
    with original(pipe), torch.autocast(find_transformers(pipe)[0].device.type, torch.bfloat16):
        yield


def is_wide(pipe: Any) -> bool:
    """Whether bfloat16 arithmetic is less than what the pipeline computes in."""
    return all(transformer.dtype == torch.float32 for transformer in find_transformers(pipe))


def measure(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> tuple[PromptResult, dict[str, Tensor]]:
    """One prompt: what all sides gave, and their pictures `[F, 3, H, W]` with those of "original"."""
    row = PromptResult()
    models = patches_of(pipe)
    with dense(pipe), contextlib.ExitStack() as stack:
        moments = stack.enter_context(recorded_moments([model for model, _ in models]))
        recorders = [stack.enter_context(Recorder(model, forward_names(model))) for model, _ in models]
        pictures = {"original": draw(pipe, prompt, seed, call)}
    names = component_names(pipe)
    nowhere = torch.empty(0)  # final latents, which nothing here asks for
    runs = [
        (name, model, patch.context.family, own, [Forward(a, p, nowhere, prompt, seed, i) for i, (a, p) in enumerate(recorder.forwards)])
        for name, (model, patch), own, recorder in zip(names, models, moments, recorders, strict=True)
    ]
    for name, model, _, own, forwards in runs:
        for layer, calls in attention_deviations(model, forwards, own).items():
            row.attention[name + layer] = calls
    if not row.attention:
        reasons = ", ".join(_fallbacks(pipe)) or "no accelerated layer"
        raise FallbackError(f"the method runs in no layer: calls have {reasons}")
    for side, enter in _sides(pipe).items():
        errors: dict[float, list[float]] = {}
        with enter(), without_dense_steps(pipe):
            for _, model, family, own, forwards in runs:
                for forward, error in zip(forwards, velocity_errors(model, forwards, own), strict=True):
                    timestep = forward.arguments[family.timestep]
                    errors.setdefault(float(timestep.min() if family.timestep_rises else timestep.max()), []).append(error)
        # guidance in two passes has two forwards at each level
        row.velocity[side] = {timestep: statistics.mean(found) for timestep, found in errors.items()}
        with enter():
            pictures[side] = draw(pipe, prompt, seed, call)
        row.pictures[side] = compare(pictures[side], pictures["original"])
        if frames_argument(pipe) is not None and len(pictures[side]) > 1:
            row.pictures[side] |= compare_motion(pictures[side], pictures["original"])
    return row, {side: pictures[side] for side in pictures if side != "again"}


def draw(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> Tensor:
    """The picture, or the frames of the video, that a pipeline draws: `[F, 3, H, W]` in [0, 1], float32 on the CPU."""
    with torch.no_grad():
        output = pipe(prompt=prompt, generator=torch.Generator("cpu").manual_seed(seed), output_type="pt", **call)
    made = output.images if hasattr(output, "images") else getattr(output, "frames", None)
    if not isinstance(made, Tensor) or made.ndim not in (4, 5) or made.shape[-3] != 3:
        got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
        raise ArgumentError(f"the pipeline must return pictures or frames of three colours as a tensor, not {got}")
    frames = made.flatten(0, -4).float().cpu().clamp(0, 1)
    if not bool(frames.isfinite().all()):
        raise ArgumentError(f"{type(pipe).__name__} drew NaN or infinity for {prompt!r}")
    return frames


def component_names(pipe: Any) -> list[str]:
    """The prefix of a layer's name, for each accelerated transformer: empty where there is one."""
    models = [model for model, _ in patches_of(pipe)]
    if len(models) == 1:
        return [""]
    names = {id(getattr(part, "_orig_mod", part)): name for name, part in pipe.components.items()}
    return [f"{names[id(model)]}." for model in models]


def attention_deviations(
    transformer: Any, forwards: Sequence[Forward], moments: Sequence[Moment] | None = None
) -> dict[str, list[Deviation]]:
    """For each accelerated layer, its method against exact attention over its own queries, keys and values, in some of the forwards.

    They are what the layer gets from the weights as they are, with exact attention in all layers before it.
    """
    operators = operators_of(transformer)
    found: dict[str, list[Deviation]] = {}
    with torch.no_grad(), without_dense_steps(transformer):
        for index in attention_forwards(len(forwards)):
            with contextlib.nullcontext() if moments is None else at_moment(transformer, moments[index]):
                inputs = capture_inputs(transformer, forwards[index])
            for captured in inputs:
                there = _deviation(captured, operators[captured.layer])
                found.setdefault(captured.layer, []).append(Deviation(there.error.cpu(), there.size.cpu(), there.mass.cpu()))
    return found


def _deviation(captured: Captured, operator: AcceleratedAttention) -> Deviation:
    """Of a layer whose heads may run several specs, or the original attention, in the last forward."""
    exact, layer = exact_attention(captured), operator.layer
    size = exact.output.square().sum((0, 2, 3))
    found = Deviation(torch.zeros_like(size), size, torch.ones_like(size))
    for spec, heads in operator.context.last.groups(layer):  # type: ignore[union-attr]
        if spec is None:
            continue
        own = list(heads)
        part = dataclasses.replace(captured, query=captured.query[:, own], key=captured.key[:, own], value=captured.value[:, own])
        params = parameters_of(operator.params, spec, layer, heads)
        there = deviation(part, Exact(exact.output[:, own], exact.lse[:, own]), spec, params)
        found.error[own], found.mass[own] = there.error, there.mass
    return found


def attention_forwards(count: int) -> list[int]:
    """Which of a run's forwards the layers are measured in: evenly spread, the first and the last among them."""
    return sorted({round(i * (count - 1) / (ATTENTION_FORWARDS - 1)) for i in range(ATTENTION_FORWARDS)}) if count else []


def _describe(pipe: Any) -> dict[str, Any]:
    """The pipeline and method that were evaluated."""
    models = patches_of(pipe)
    context = models[0][1].context
    return {
        "pipeline": type(pipe).__name__,
        "transformers": [type(model).__name__ for model, _ in models],
        "dtype": str(models[0][0].dtype).removeprefix("torch."),
        "method": str(context.assignment.after_dense_steps),
        "spec": context.assignment.record(),
        "dense_steps": context.assignment.dense_steps,
        "layers": len(operators_of(pipe)),
        "guard": "never asked: the method runs where the original attention is faster, too",
    }


def _fallbacks(pipe: Any) -> Counter[str]:
    return sum((patch.context.fallbacks for _, patch in patches_of(pipe)), Counter())


def _notes(pipe: Any, rows: list[PromptResult]) -> list[str]:
    """The limits of the numbers, and why."""
    notes = []
    if len(rows) == 1:
        notes.append(ONE_PROMPT)
    if not is_wide(pipe):
        notes.append("The weights are in half precision already: there is no run in bfloat16 to compare with.")
    if "distance" not in rows[0].pictures["method"]:
        notes.append(NO_DISTANCE)
    if steps := patches_of(pipe)[0][1].context.assignment.dense_steps:
        notes.append(f"The first {steps} steps of every picture keep the original attention; other errors are of the method itself.")
    if any(row.velocity["again"][t] for row in rows for t in row.velocity["again"]) or any(r.pictures["again"]["difference"] for r in rows):
        notes.append("The original differs from itself when it is run again: this machine's arithmetic is not repeatable.")
    return notes + [f"Calls that ran the original attention: {reason}." for reason in _fallbacks(pipe)]


def _results(rows: list[PromptResult], bootstrap: Bootstrap) -> dict[str, Any]:
    """All measures with their intervals, for JSON."""
    sides = list(rows[0].pictures)
    values = {side: [row.values(side) for row in rows] for side in sides}
    measures = {side: {name: bootstrap.summary([row[name] for row in values[side]]) for name in values[side][0]} for side in sides}
    above = None
    if "bfloat16" in sides:
        pairs = list(zip(values["method"], values["bfloat16"], strict=True))
        above = {name: bootstrap.summary([ours[name] - floor[name] for ours, floor in pairs]) for name in values["bfloat16"][0]}
    levels = [
        {"timestep": timestep} | {side: bootstrap.summary([row.velocity[side][timestep] for row in rows]) for side in sides}
        for timestep in sorted(rows[0].velocity["method"])
    ]
    layers = []
    for layer in rows[0].attention:
        calls = [call for row in rows for call in row.attention[layer]]
        errors, masses = (torch.stack(x).mean(0).tolist() for x in zip(*((_relative(c.error, c.size), c.mass) for c in calls), strict=True))
        layers.append({"layer": layer, "error": errors, "kept_mass": masses})
    return {"measures": measures, "method_minus_bfloat16": above, "noise_levels": levels, "heads": layers}
