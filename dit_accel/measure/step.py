"""`dit-accel bench step`: one whole denoising step, original against every method, and how much of it is attention."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dit_accel.clock import clock, timed
from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.files import write_json
from dit_accel.finetune.velocity import predict
from dit_accel.measure.capture import record_step
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import AnyMethod, Assignment
from dit_accel.patch.anatomy import attention_layers, find_transformers
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.pipelines import family_of

LARGE = 32768  # image tokens from which one step of the original takes minutes on two cores: one round, without a warm-up of the original


def bench_step(
    pipe: Any,
    *,
    sizes: Sequence[tuple[int, int]],
    methods: Sequence[AnyMethod],
    repeats: int = 3,
    out: Path | None = None,
    max_sequence_length: int | None = None,
) -> list[dict[str, Any]]:
    """Seconds of one whole denoising step and of its attention calls, original against each method; `sizes` are (height, width) pixels.

    A call is a whole attention module, projections included. Methods run even where the original is faster. Prints a table; writes it as
    JSON where `out` is given.
    Raises ValueError for an assignment that depends on steps or noise levels.
    """
    for method in methods:
        if Assignment.of(method).of_moments:
            raise ArgumentError(f"steps differ under {method}, and one is measured here: measure a whole picture by `dit-accel bench draw`")
    rows: list[dict[str, Any]] = []
    view = Table("size", "method", "step: original s", "accelerated s", "ratio", "attention call: original s", "accelerated s", "ratio")
    for name in ("original", "accelerated"):
        view.add_column(f"attention's share: {name}")
    for size in sizes:
        arguments = record_step(pipe, size, max_sequence_length)
        for spec, row in zip(methods, step_times(pipe, arguments, methods, repeats), strict=True):
            rows.append({"size": list(size), "method": str(spec), **row})
            cells = [f"{row[k]:.3f}" for k in ("original", "accelerated")] + [f"{row['original'] / row['accelerated']:.2f}"]
            cells += [f"{row[k]:.4f}" for k in ("original_attention", "accelerated_attention")]
            cells += [f"{row['original_attention'] / row['accelerated_attention']:.2f}"]
            cells += [f"{row[k]:.0%}" for k in ("original_share", "accelerated_share")]
            view.add_row(f"{size[1]}×{size[0]}", str(spec), *cells)
    console().print(view)
    if out is not None:
        write_json(out, {"machine": machine(), "repeats": repeats, "rows": rows})
    return rows


def step_times(pipe: Any, arguments: dict[str, Any], methods: Sequence[AnyMethod], repeats: int) -> list[dict[str, float]]:
    """For each method: median seconds of a step and of one attention module's call in it, and the calls' share of the step.

    The original and all methods run in turns. `arguments`: of a forward, as `record_step` gives them. Of several transformers, which take
    the steps in turn and are of one class, the first is measured.
    """
    transformer = find_transformers(pipe)[0]
    names = list(attention_layers(transformer))

    def accelerated(spec: AnyMethod) -> tuple[float, list[float]]:
        with always(accelerate(pipe, spec)):
            measured = _step(transformer, names, arguments)
        restore(pipe)
        return measured

    large = image_tokens(transformer, arguments) >= LARGE
    for spec in methods:  # plans, allocations and caches of this size
        accelerated(spec)
    if not large:
        _step(transformer, names, arguments)
    rounds = [[_step(transformer, names, arguments), *(accelerated(spec) for spec in methods)] for _ in range(1 if large else repeats)]
    original, *others = (_medians(measured) for measured in zip(*rounds, strict=True))
    return [
        {f"{name}{part}": value for name, row in (("original", original), ("accelerated", other)) for part, value in row.items()}
        for other in others
    ]


def image_tokens(transformer: Any, arguments: dict[str, Any]) -> int:
    """Tokens of all images or videos in a forward's sequence, which its family reads off the arguments; 0 where it can't."""
    family = family_of(transformer)
    grids: Any = "no family" if family is None else family.grid(arguments, transformer)
    return 0 if isinstance(grids, str) else sum(math.prod(grid) for grid in grids)


def _medians(measured: Sequence[tuple[float, list[float]]]) -> dict[str, float]:
    step = statistics.median(seconds for seconds, _ in measured)
    calls = statistics.median(call for _, each in measured for call in each)
    return {"": step, "_attention": calls, "_share": statistics.median(sum(each) / seconds for seconds, each in measured)}


def _step(transformer: Any, names: Sequence[str], arguments: dict[str, Any]) -> tuple[float, list[float]]:
    """Seconds of one step and of each named attention module's call in it."""
    calls: list[float] = []
    starts: list[float] = []

    def before(module: Any, args: Any) -> None:
        starts.append(clock())

    def after(module: Any, args: Any, output: Any) -> None:
        calls.append(clock() - starts.pop())

    hooks = []
    for name in names:
        module = transformer.get_submodule(name)
        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        with torch.no_grad():
            return timed(lambda: predict(transformer, arguments)), calls
    finally:
        for hook in hooks:
            hook.remove()
