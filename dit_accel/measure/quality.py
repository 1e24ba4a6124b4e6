"""`dit-accel bench quality`: every method, untrained, against dense attention: on captured queries, keys and values, and in the model."""

import statistics
import tempfile
from collections.abc import Sequence
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
from dit_accel.method import AttentionSpec, Mass, Pooled, Raster, TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.cost import kept_density, multiply_adds
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore

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
    "Fovea 5 % without variance": AttentionSpec((TopK(0.05, True),), Pooled(variance=False), Mass()),
    "Fovea 5 % without log n": AttentionSpec((TopK(0.05, True),), Pooled(log_count=False), Mass()),
    "Fovea 5 %, raster order": AttentionSpec((TopK(0.05, True),), Pooled(), Mass(), Raster()),
}


def spread(samples: Samples, levels: int) -> list[Forward]:
    """`levels` forwards of each run, evenly spread over its steps from the second on."""
    chosen = [p[round(1 + i * (len(p) - 2) / max(1, levels - 1))] for p in samples.runs() for i in range(levels)]
    return [samples[p] for p in chosen]


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
    """Every preset, untrained, against dense attention: layer by layer on captured q, k, v, and through the whole model.

    `size` is (height, width) in pixels. Prints a table; writes it as JSON where `out` is given.
    """
    specs = PRESETS if specs is None else specs
    if steps <= levels:
        raise ArgumentError(f"steps must be more than the {levels} noise levels that are compared, not {steps}")
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    with tempfile.TemporaryDirectory() as folder:
        forwards = spread(collect(pipe, prompts, folder, **call), levels)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in specs}
    head_dim, layout = 0, TokenLayout((1, 1, 1))
    with torch.no_grad():
        for forward in forwards:
            for captured in capture_qkv(pipe, forward):
                head_dim, layout = captured.query.shape[-1], TokenLayout(captured.layout.grid)
                for name, pair in attention_errors(captured, specs).items():
                    rows[name].append(pair)
    table: dict[str, dict[str, float]] = {}
    for name, spec in specs.items():
        with always(accelerate(pipe, spec)):
            velocity = velocity_errors(pipe, forwards)
        restore(pipe)
        table[name] = {
            "attention_error": statistics.mean(error for error, _ in rows[name]),
            "kept_mass": statistics.mean(mass for _, mass in rows[name]),
            "velocity_error": statistics.mean(velocity),
            "density_kept": kept_density(spec, layout),
            "multiply_adds": multiply_adds(spec, layout, head_dim),
        }
    _show_quality(table, f"{size[1]}×{size[0]} px, {len(prompts)} prompts, {levels} noise levels, untrained")
    if out is not None:
        write_json(out, {"machine": machine(), "size": size, "prompts": list(prompts), "levels": levels, "presets": table})
    return table


def _show_quality(table: dict[str, dict[str, float]], title: str) -> None:
    view = Table("method", "attention error", "velocity error", "kept mass", "density kept", "multiply-adds", title=title)
    for name, row in table.items():
        shares = [f"{row[key]:.2%}" for key in ("density_kept", "multiply_adds")]
        view.add_row(name, f"{row['attention_error']:.4f}", f"{row['velocity_error']:.4f}", f"{row['kept_mass']:.3f}", *shares)
    console().print(view)
