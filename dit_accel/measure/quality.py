"""`dit-accel bench quality`: methods, untrained, against dense attention: on captured queries, keys and values, and in the model."""

import contextlib
import dataclasses
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.files import write_json
from dit_accel.finetune.data.collect import Forward, Samples, collect
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.capture import attention_errors, capture_qkv
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec, ErrorProduct, Mass, Pooled, Raster, TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.cost import kept_density, multiply_adds
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore

BY_ERROR = TopK(0.05, score=ErrorProduct())
PRESETS: dict[str, AttentionSpec] = {
    "top-k 5 %, tiles": AttentionSpec((TopK(0.05),)),
    "top-k 10 %, tiles": AttentionSpec((TopK(0.1),)),
    "SLA 5 % (raster top-k while untrained)": SLA(0.05),
    "SLA 10 %": SLA(0.1),
    "CLEAR radius 8": CLEAR(8),
    "CLEAR radius 8, downsample 4": CLEAR(8, downsample=4),
    "CLEAR radius 16": CLEAR(16),
    "GNA window 17": GNA(17),
    "Fovea 2 %": Fovea(0.02),
    "Fovea 5 %": Fovea(0.05),
    "Fovea 10 %": Fovea(0.1),
    "Fovea radius 8": Fovea(radius=8),
    "Fovea radius 16": Fovea(radius=16),
    "Fovea 5 % without variance": AttentionSpec((BY_ERROR,), Pooled(variance=False), Mass()),
    "Fovea 5 % without log n": AttentionSpec((BY_ERROR,), Pooled(log_count=False), Mass()),
    "Fovea 5 %, raster order": AttentionSpec((BY_ERROR,), Pooled(), Mass(), Raster()),
}


def spread(samples: Samples, levels: int) -> list[Forward]:
    """`levels` forwards of each run, evenly spread over its steps from the second on."""
    chosen = [p[round(1 + i * (len(p) - 2) / max(1, levels - 1))] for p in samples.runs() for i in range(levels)]
    return [samples[p] for p in chosen]


@contextlib.contextmanager
def _rounded_weights(transformer: torch.nn.Module) -> Iterator[None]:
    """The model's weights and buffers in bfloat16; afterwards what they were, to the bit."""
    tensors = [x for x in (*transformer.parameters(), *transformer.buffers()) if x.is_floating_point()]
    before = [x.data for x in tensors]
    try:
        for x in tensors:
            x.data = x.data.bfloat16()
        yield
    finally:
        for x, data in zip(tensors, before, strict=True):
            x.data = data


def rounding_errors(pipe: Any, forwards: Sequence[Forward]) -> list[float] | None:
    """Relative error of the original's prediction in bfloat16, weights and inputs, one per forward; None unless it is in float32."""
    (transformer,) = find_transformers(pipe)
    if next(transformer.parameters()).dtype != torch.float32:
        return None

    def rounded(value: Any) -> Any:  # as a pipeline in bfloat16 gives them: what has no channels, as a timestep, stays what it is
        if isinstance(value, list | tuple):
            return type(value)(map(rounded, value))
        return value.bfloat16() if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 else value

    given = [dataclasses.replace(f, arguments={name: rounded(x) for name, x in f.arguments.items()}) for f in forwards]
    with _rounded_weights(transformer):
        return velocity_errors(pipe, given)


def recorded(
    pipe: Any, prompts: Sequence[str], size: tuple[int, int], steps: int, levels: int, max_sequence_length: int | None
) -> list[Forward]:
    """Forwards of the original at `levels` noise levels of each prompt's run. Raises ArgumentError where the steps are too few."""
    if steps <= levels:
        raise ArgumentError(f"steps must be more than the {levels} noise levels that are looked at, not {steps}")
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    with tempfile.TemporaryDirectory() as folder:
        return spread(collect(pipe, prompts, folder, **call), levels)


def bench_quality(
    pipe: Any,
    *,
    size: tuple[int, int] = (1024, 1024),
    prompts: Sequence[str],
    steps: int = 8,
    levels: int = 3,
    out: Path | None = None,
    max_sequence_length: int | None = None,
    specs: dict[str, AttentionSpec] | None = None,
) -> dict[str, dict[str, float]]:
    """Specs by name, untrained, against dense attention: layer by layer on captured q, k, v, and through the whole model.

    `size` is (height, width) in pixels; `specs`: `PRESETS` unless given. Prints a table of means over layers and forwards, with what a
    float32 model errs in bfloat16 under it; writes it, with the worst layer and forward, as JSON where `out` is given.
    """
    specs = PRESETS if specs is None else specs
    forwards = recorded(pipe, prompts, size, steps, levels, max_sequence_length)
    table = compared(pipe, forwards, specs)
    rounding = rounding_errors(pipe, forwards)
    _show_quality(table, rounding, f"{size[1]}×{size[0]} px, {len(prompts)} prompts, {levels} noise levels, untrained")
    if out is not None:
        record = {"machine": machine(), "size": size, "prompts": list(prompts), "levels": levels, "presets": table}
        write_json(out, record | ({} if rounding is None else {"bfloat16": {"velocity_error": statistics.mean(rounding)}}))
    return table


def compared(pipe: Any, forwards: Sequence[Forward], specs: dict[str, AttentionSpec]) -> dict[str, dict[str, float]]:
    """Errors and cost of each spec, at its start values, on recorded forwards of the original model."""
    errors: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in specs}  # by layer
    masses: dict[str, list[float]] = defaultdict(list)
    head_dim, layout = 0, TokenLayout((1, 1, 1))
    with torch.no_grad():
        for forward in forwards:
            for captured in capture_qkv(pipe, forward):
                head_dim, layout = captured.query.shape[-1], TokenLayout(captured.layout.grid)
                for name, (error, mass) in attention_errors(captured, specs).items():
                    errors[name][captured.layer].append(error)
                    masses[name].append(mass)
    table: dict[str, dict[str, float]] = {}
    for name, spec in specs.items():
        with always(accelerate(pipe, spec)):
            velocity = velocity_errors(pipe, forwards)
        restore(pipe)
        by_layer = [statistics.mean(of_layer) for of_layer in errors[name].values()]
        table[name] = {
            "attention_error": statistics.mean(by_layer),
            "worst_layer": max(by_layer),
            "kept_mass": statistics.mean(masses[name]),
            "velocity_error": statistics.mean(velocity),
            "worst_forward": max(velocity),
            "density_kept": kept_density(spec, layout),
            "multiply_adds": multiply_adds(spec, layout, head_dim),
        }
    return table


def _show_quality(table: dict[str, dict[str, float]], rounding: list[float] | None, title: str) -> None:
    head = ("method", "attention error", "worst layer", "velocity error", "worst forward", "kept mass", "density kept", "multiply-adds")
    caption = None if rounding is None else f"The original in bfloat16: velocity error {statistics.mean(rounding):.4f}."
    view = Table(*head, title=title, caption=caption)
    for name, row in table.items():
        errors = [f"{row[key]:.4f}" for key in ("attention_error", "worst_layer", "velocity_error", "worst_forward")]
        shares = [f"{row[key]:.2%}" for key in ("density_kept", "multiply_adds")]
        view.add_row(name, *errors, f"{row['kept_mass']:.3f}", *shares)
    console().print(view)
