"""The arguments of `plan`, checked before anything is loaded, drawn or written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_accel.errors import AlreadyAcceleratedError, ArgumentError, PlanError, UnsupportedModelError
from dit_accel.measure.evaluation import check_arguments, check_json
from dit_accel.method import AttentionSpec
from dit_accel.method.checks import is_int, is_real
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.state import CONTEXT
from dit_accel.pipelines import token_pixels
from dit_accel.planner.candidates import Candidates, CostUnit
from dit_accel.planner.measuring import SIZE_ARGUMENTS, Request
from dit_accel.planner.trained import Trained

MEASURED, HELD_OUT = 6, 4  # prompts of those given, at most


def check_asked(budget: float | None, speed: float | None) -> None:
    """Raise ArgumentError unless they are one finite number, a budget above 0 or a speed above 1, or neither."""
    if budget is not None and speed is not None:
        raise ArgumentError(f"give a budget or a speed, not both: {budget=}, {speed=}")
    for name, value, low in (("budget", budget, 0.0), ("speed", speed, 1.0)):
        if value is not None and (not is_real(value) or value <= low):
            raise ArgumentError(f"{name} must be a number above {low:g}, and finite, not {value!r}")


def check_folder_name(folder: object) -> None:
    """Raise ArgumentError unless it is None or a path."""
    if folder is not None and not isinstance(folder, str | Path):
        raise ArgumentError(f"folder must be a path, not {folder!r}")


def checked_request(
    pipe: Any, prompts: Sequence[str], held_out: Sequence[str] | None, specs: Sequence[AttentionSpec | None] | None, unit: CostUnit,
    ranges: int, seed: int, progress: bool | None, call: dict[str, Any], trained: str | Path | None = None,
) -> Request:  # fmt: skip
    """The arguments, checked."""
    transformer, *others = find_transformers(pipe)
    if others:
        raise PlanError(f"a plan is of one transformer, but the pipeline has {1 + len(others)}")
    if hasattr(transformer, CONTEXT):
        raise AlreadyAcceleratedError(f"{type(transformer).__name__} is accelerated already: call restore(...) before planning")
    _check_texts("prompts", prompts)
    if held_out is None:
        if len(prompts) < 2:
            raise ArgumentError(f"a plan requires at least two prompts, one of them to verify on, not {len(prompts)}")
        count = min(HELD_OUT, max(1, len(prompts) // 3))
        prompts, held_out = list(prompts)[:-count], list(prompts)[-count:]
    _check_texts("held_out", held_out)
    chosen = None if specs is None else _checked_specs(specs)
    if unit not in ("multiply-adds", "seconds"):
        raise ArgumentError(f"unit must be 'multiply-adds' or 'seconds', not {unit!r}")
    if not is_int(ranges) or ranges < 1:
        raise ArgumentError(f"ranges must be a number of ranges of noise levels >= 1, not {ranges!r}")
    if not is_int(seed) or not 0 <= seed < 2**63:
        raise ArgumentError(f"seed must be an int from 0 to 2**63 - 1, not {seed!r}")
    if progress is not None and not isinstance(progress, bool):
        raise ArgumentError(f"progress must be True, False or None, not {progress!r}")
    if both := sorted(set(prompts[:MEASURED]) & set(held_out)):
        raise ArgumentError(f"held-out prompts must not be measured, but {both[:3]} are: remove them from one side")
    _check_pipeline_call(pipe, transformer, call)
    if trained is not None and not isinstance(trained, str | Path):
        raise ArgumentError(f"trained must be the folder or the hub id of an adapter, not {trained!r}")
    known = None if trained is None else _trained(transformer, trained, chosen)
    return Request(pipe, tuple(prompts[:MEASURED]), tuple(held_out[:HELD_OUT]), chosen, unit, ranges, seed, progress, call, known)


def _trained(transformer: Any, path_or_repo: str | Path, specs: Candidates | None) -> Trained:
    """What an adapter has learned; raise where it can't be used for the candidates."""
    found = Trained.read(transformer, path_or_repo)
    if specs is not None:
        found.check(transformer, specs)
    return found


def _check_texts(name: str, texts: object) -> None:
    if not isinstance(texts, list | tuple) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ArgumentError(f"{name} must be a non-empty list of non-empty strings, not {texts!r}")


def _checked_specs(specs: object) -> Candidates:
    if not isinstance(specs, list | tuple):
        raise ArgumentError(f"specs must be a list of AttentionSpecs, not {specs!r}: pass a list, as in specs=[None, Fovea(0.1)]")
    given = [spec for spec in specs if spec is not None]
    if not given or not all(isinstance(spec, AttentionSpec) for spec in given):
        raise ArgumentError(f"specs must contain AttentionSpecs, at least one, and may contain None for the original attention: {specs!r}")
    if other := next((spec for spec in given if spec.order != given[0].order), None):
        raise ArgumentError(f"the specs of a plan must have one order, but {other} has not {given[0].order}: give it that order")
    return tuple(dict.fromkeys(specs))


def _check_pipeline_call(pipe: Any, transformer: Any, call: dict[str, Any]) -> None:
    """Raise ArgumentError unless the pipeline's call takes these arguments and draws at the size that they say."""
    if "sizes" in call:
        raise ArgumentError("a plan is made at one size: give height and width in the place of sizes")
    check_arguments(pipe, call)
    check_json(call)
    for name in (*SIZE_ARGUMENTS, "num_inference_steps"):
        value = call.get(name)
        if value is not None and (not is_int(value) or value < 1):
            raise ArgumentError(f"{name} must be an int >= 1, not {value!r}")
    try:
        unit = token_pixels(pipe, transformer)
    except UnsupportedModelError:
        return  # the pipeline itself checks it
    for name in ("height", "width"):
        side = call.get(name)
        if side is not None and side % unit:
            near = max(1, round(side / unit)) * unit
            raise ArgumentError(f"{name} must be a multiple of {unit} pixels, the side of one token: not {side}, but {near}, for example")
