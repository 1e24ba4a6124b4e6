"""`dit-accel bench recovery`: how much of the original's quality a training of so many minutes, or steps, brings back.

Every combination of a method and of what is trained learns from the same self-generated samples, collected once. Minutes: a few steps are
timed first, and the training has as many as fit, so that its learning rate has fallen when they are over. Steps: all have the same number,
which says what each method can learn, whatever else the machine does.
"""

import contextlib
import itertools
import json
import math
import shutil
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from dit_accel import __version__
from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.files import check_folder, write_bytes, write_json
from dit_accel.finetune.config import DistillConfig, OptimizerName, Trainable
from dit_accel.finetune.curve import draw_recovery, recovered
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.distill import DistillResult, distill
from dit_accel.finetune.session import PARAMETER_STEPS
from dit_accel.finetune.velocity import velocity_error
from dit_accel.measure.evaluation import draw, in_bfloat16, is_wide
from dit_accel.measure.similarity import compare
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import AnyMethod
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of
from dit_accel.patch.verbs import accelerate, restore

TIMED = 6  # steps that are timed; the first makes plans and caches and does not count
POINTS = 10  # of a curve
# full weights take smaller steps than a LoRA does
RATES: dict[Trainable, float] = {"parameters": 1e-3, "lora": 1e-3, "attention": 6e-4}


@dataclass
class Recovery:
    """The measurement: what is the same for all combinations. `train_steps`: how many, whatever the minutes; `call`: arguments of
    the pipeline's call."""

    pipe: Any
    prompts: Sequence[str]
    held_out: Sequence[str]
    pictures: Sequence[str]
    minutes: float
    call: Mapping[str, Any]
    seed: int
    optimizer: OptimizerName
    folder: Path
    train_steps: int | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that two runs must share for the one to continue the other, JSON-ready."""
        minutes = self.minutes if self.train_steps is None else None
        return {
            "pipeline": type(self.pipe).__name__, "minutes": minutes, "prompts": list(self.prompts), "held_out": list(self.held_out),
            "pictures": list(self.pictures), "call": dict(self.call), "seed": self.seed, "optimizer": self.optimizer,
            "train_steps": self.train_steps,
        }  # fmt: skip

    def collect(self) -> tuple[Samples, Samples]:
        """The original sampling the training and the held-out prompts; what is there is kept."""
        parts = (("samples", self.prompts, self.seed), ("held-out", self.held_out, self.seed + 1_000_000))
        samples, held_out = (collect(self.pipe, prompts, self.folder / name, seed=seed, **self.call) for name, prompts, seed in parts)
        return samples, held_out

    def draw(self) -> list[Tensor]:
        """The pictures as the pipeline draws them now, `[1, 3, H, W]` each."""
        return [draw(self.pipe, prompt, self.seed + i, dict(self.call)) for i, prompt in enumerate(self.pictures)]

    def config(self, train: Trainable, steps: int, parameter_steps: int, folder: Path) -> DistillConfig:
        """One training. The recorded predictions alone are learned from, which needs no forward of the teacher."""
        return DistillConfig(
            steps=steps, parameter_steps=parameter_steps, train=train, learning_rate=RATES[train], attention_weight=0.0,
            optimizer=self.optimizer if train == "attention" else "adamw", evaluate_every=max(1, steps // POINTS),
            checkpoint_every=max(1, steps // 5), warmup_steps=min(20, steps // 10), seed=self.seed, output_dir=str(folder),
        )  # fmt: skip


def bench_recovery(recovery: Recovery, methods: Mapping[str, AnyMethod], trains: Sequence[Trainable], *, out: Path) -> dict[str, Any]:
    """Measure every combination that the JSON file `out` lacks, draw the curves next to it as PNG, print the table, and return what the
    file holds.

    Samples and the runs' logs and curves go to the recovery's folder, where an interrupted training continues too. Raises ValueError
    where the file contains a measurement with other settings.
    """
    record = _begun(out, recovery.settings())
    check_folder(recovery.folder)
    todo = [(name, train) for name in methods for train in trains if not _row(record, name, train)]
    if todo:
        samples, held_out = recovery.collect()
        originals = recovery.draw()
        if "floor" not in record:
            record["floor"] = _floor(recovery, held_out, originals)
            write_json(out, record)
    for name, train in todo:
        row = _measure(recovery, name, methods[name], train, samples, held_out, originals)
        record["rows"].append(row)
        write_json(out, record)
    write_bytes(out.with_suffix(".png"), draw_recovery(record))
    show(record)
    return record


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The record in a file, or a new one."""
    if not out.exists():
        return {"version": __version__, "machine": machine(), "settings": settings, "rows": []}
    try:
        record = json.loads(out.read_text())
        kept = record["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(f"{out} was not written by bench recovery ({error}): name another file") from error
    differs = [name for name, value in json.loads(json.dumps(settings)).items() if kept.get(name) != value]
    if differs:
        name = differs[0]
        raise ArgumentError(f"{out} contains a measurement with {name} {kept.get(name)!r}, not {settings[name]!r}: name another file")
    return dict(record)


def _row(record: dict[str, Any], name: str, train: str) -> dict[str, Any] | None:
    return next((row for row in record["rows"] if (row["method"], row["train"]) == (name, train)), None)


def _floor(recovery: Recovery, held_out: Samples, originals: Sequence[Tensor]) -> dict[str, Any] | None:
    """The error of the original in bfloat16: what is below can't be distinguished from rounding. None for weights of fewer bits."""
    if not is_wide(recovery.pipe):
        return None
    with in_bfloat16(recovery.pipe):
        return {"error": velocity_error(recovery.pipe, held_out), "psnr": _psnr(recovery.draw(), originals)}


def _psnr(pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> float | None:
    """Mean over the pictures, dB; None means infinity."""
    found = [compare(*pair)["psnr"] for pair in zip(pictures, originals, strict=True)]
    mean = statistics.mean(found)
    return mean if math.isfinite(mean) else None


def _measure(
    recovery: Recovery, name: str, spec: AnyMethod, train: Trainable, samples: Samples, held_out: Samples, originals: Sequence[Tensor]
) -> dict[str, Any]:
    """One combination, trained from the start or its newest checkpoint; the pipeline is restored afterwards."""
    pipe, row = recovery.pipe, {"method": name, "spec": spec.to_dict(), "train": train}
    folder = recovery.folder / f"{_slug(name)}-{train}"
    with _accelerated(pipe, spec):
        operators = operators_of(pipe).values()
        if train == "parameters" and not any(list(operator.parameters()) for operator in operators):
            return row | {"impossible": "the method has no parameters"}
        projected = any(operator.solved for operator in operators)
    steps, parameter_steps = _planned(recovery, spec, train, samples, held_out, folder, PARAMETER_STEPS if projected else 0)
    with _accelerated(pipe, spec), always(pipe):
        untrained = _psnr(recovery.draw(), originals)
        result = distill(pipe, samples, recovery.config(train, steps, parameter_steps, folder), held_out=held_out)
        row |= _results(result) | {"steps": steps, "parameter_steps": parameter_steps}
        row["psnr"] = {"untrained": untrained, "after": _psnr(recovery.draw(), originals)}
    for checkpoint in (*folder.glob("checkpoint-*"), *folder.glob("parameters-*")):
        shutil.rmtree(checkpoint)  # the logs and the curve stay
    return row


@contextlib.contextmanager
def _accelerated(pipe: Any, spec: AnyMethod) -> Any:
    """The pipeline with a method, for the length of a `with` block."""
    accelerate(pipe, spec)
    try:
        yield
    finally:
        restore(pipe)


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in name)


def _planned(
    recovery: Recovery, spec: AnyMethod, train: Trainable, samples: Samples, held_out: Samples, folder: Path, parameter_steps: int
) -> tuple[int, int]:
    """The number of steps of both stages: `train_steps` of the second, all `parameter_steps` of the first; or as many as fit the minutes,
    at most `parameter_steps` of the first, kept, so that a continued run has as many."""
    if recovery.train_steps is not None:
        return recovery.train_steps, parameter_steps
    kept = folder / "steps.json"
    if kept.exists():
        plan = json.loads(kept.read_text())
        return plan["steps"], plan["parameter_steps"]
    with tempfile.TemporaryDirectory(prefix=".timed-", dir=recovery.folder) as work, _accelerated(recovery.pipe, spec):
        config = recovery.config(train, TIMED, TIMED if parameter_steps else 0, Path(work))
        one = Samples(held_out.folder, held_out.entries[:1])
        result = distill(recovery.pipe, samples, config, held_out=one, progress=False)
    seconds, budget = _seconds(result.history), 60 * recovery.minutes
    if parameter_steps:
        each = _seconds(result.parameter_history)
        parameter_steps = max(1, min(parameter_steps, int(budget / 2 / each)))
        budget -= parameter_steps * each
    folder.mkdir(parents=True, exist_ok=True)
    plan = {"steps": max(1, int(budget / seconds)), "parameter_steps": parameter_steps, "seconds_of_a_step": seconds}
    write_json(kept, plan)
    return plan["steps"], parameter_steps


def _seconds(rows: Sequence[dict[str, float]]) -> float:
    """Seconds of a step, by the median of all but the first."""
    times = [row["seconds"] for row in rows if row["step"] >= 1]
    return max(1e-6, statistics.median(b - a for a, b in itertools.pairwise(times)))


def _results(result: DistillResult) -> dict[str, Any]:
    """The result of a training, JSON-ready."""
    return {
        "error_untrained": result.error_before, "error_fitted": result.error_fitted, "error_after": result.error_after,
        "recovered": 1 - result.error_after / result.error_before, "minutes": result.history[-1]["seconds"] / 60,
        "curve": [{"step": step, "minutes": minutes, "recovered": share} for step, minutes, share in recovered(result.history)],
    }  # fmt: skip


def show(record: dict[str, Any]) -> None:
    """Print a line per combination, and the noise floor."""
    settings = record["settings"]
    length = f"{settings['train_steps']} steps" if settings["minutes"] is None else f"{settings['minutes']:g} minutes"
    title = f"recovery in {length}, {settings['call']['width']}×{settings['call']['height']} px"
    heads = ("untrained", "first stage", "after", "recovered", "minutes", "steps", "PSNR untrained, dB", "PSNR after, dB")
    view = Table("method", "trained", *heads, title=title)
    for row in record["rows"]:
        if "impossible" in row:
            view.add_row(row["method"], row["train"], row["impossible"])
            continue
        fitted = "–" if row["error_fitted"] is None else f"{row['error_fitted']:.4f}"
        cells = [f"{row['error_untrained']:.4f}", fitted, f"{row['error_after']:.4f}", f"{row['recovered']:.1%}"]
        cells += [f"{row['minutes']:.1f}", str(row["steps"]), *(_decibel(row["psnr"][when]) for when in ("untrained", "after"))]
        view.add_row(row["method"], row["train"], *cells)
    floor = record.get("floor")
    if floor is not None:
        view.add_section()
        view.add_row("original in bfloat16", "", "", "", f"{floor['error']:.4f}", *("",) * 4, _decibel(floor["psnr"]))
    console().print(view)


def _decibel(psnr: float | None) -> str:
    return "∞" if psnr is None else f"{psnr:.2f}"
