"""`dit-accel bench draw`: whole pictures or videos, text and autoencoder included, original against every method."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from dit_accel.adapters.folder import load_adapter
from dit_accel.clock import timed
from dit_accel.console import console
from dit_accel.files import write_json
from dit_accel.measure.evaluation import draw
from dit_accel.measure.similarity import compare
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import AnyMethod
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.pipelines.video import compare_motion, frames_argument


def bench_draw(
    pipe: Any, prompt: str, *, methods: Sequence[AnyMethod] = (), adapters: Sequence[str] = (), repeats: int = 3, seed: int = 0,
    out: Path | None = None, **call: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Median seconds of one call of the pipeline, the original and all methods in turns, from the same noise; `call` goes to it.

    `adapters`: folders of `save_adapter` and the like, measured as methods are. Next to the times is how close the result is to the
    original's (see `pictures.compare`, and `compare_motion` for a video). Methods run even where the original is faster. Prints a table;
    writes it as JSON where `out` is given.
    """
    made: dict[int, torch.Tensor] = {}

    def seconds(number: int, side: AnyMethod | str | None) -> float:
        def run() -> None:
            made[number] = draw(pipe, prompt, seed, call)

        if side is None:
            return timed(run)
        with always(load_adapter(pipe, side) if isinstance(side, str) else accelerate(pipe, side)):
            measured = timed(run)
        restore(pipe)
        return measured

    sides = [None, *methods, *adapters]
    rounds = [[seconds(number, side) for number, side in enumerate(sides)] for _ in range(repeats)]
    original, *others = (statistics.median(each) for each in zip(*rounds, strict=True))
    rows = []
    for number, (side, median) in enumerate(zip(sides[1:], others, strict=True), 1):
        close = compare(made[number], made[0])
        if frames_argument(pipe) is not None and len(made[0]) > 1:
            close |= compare_motion(made[number], made[0])
        rows.append({"method": str(side), "original": original, "accelerated": median, **close})
    _show(rows, f"{call['width']}×{call['height']}, {len(made[0])} frames, {call['num_inference_steps']} steps, medians of {repeats}")
    if out is not None:
        write_json(out, {"machine": machine(), "prompt": prompt, "call": call, "repeats": repeats, "rows": rows})
    return rows


def _show(rows: list[dict[str, Any]], title: str) -> None:
    motion = "change" in rows[0]
    view = Table(
        "method", "original s", "accelerated s", "ratio", "PSNR dB", *(["change, of the original's"] if motion else []), title=title
    )
    for row in rows:
        cells = [f"{row['original']:.2f}", f"{row['accelerated']:.2f}", f"{row['original'] / row['accelerated']:.2f}", f"{row['psnr']:.1f}"]
        view.add_row(row["method"], *cells, *([f"{row['change']:.3f}"] if motion else []))
    console().print(view)
