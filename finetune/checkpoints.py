"""Checkpoints of both stages: written whole or not at all by the main process, read by all, refused to any other run."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.files import replace_folder
from dit_accel.finetune.processes import is_main
from dit_accel.finetune.session import Distillation

STEPS, PARAMETERS = "checkpoint", "parameters"  # how the folders of each stage begin
KEPT = (
    "history",
    "parameter_history",
    "parameter_steps",
    "error_before",
    "error_fitted",
    "seconds",
)  # of a run, next to what it trains


def save(run: Distillation, stage: str, step: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the state after `step` finished steps of a stage; the two newest are kept."""
    if not is_main():
        return
    for left in run.folder.glob(f".{stage}-*"):  # a process that was killed while it wrote one; no other writes here
        shutil.rmtree(left)
    record = {**_identity(run), **{name: getattr(run, name) for name in KEPT}}
    replace_folder(run.folder / f"{stage}-{step:07d}", {"state.safetensors": tensors, "record.json": record})
    for old in _found(run, stage)[:-2]:
        shutil.rmtree(old)


def newest(run: Distillation, stage: str) -> Path | None:
    """The newest checkpoint of a stage. Raises DistillationError where it belongs to another run."""
    found = _found(run, stage)
    if not found:
        return None
    record = json.loads((found[-1] / "record.json").read_text())
    for name, value in _identity(run).items():
        kept = record.get(name)
        if kept != json.loads(json.dumps(value)):
            raise DistillationError(f"{found[-1]} belongs to another run: its {name} is {kept}, not {value}. Name another output_dir")
    return found[-1]


def load(run: Distillation, checkpoint: Path) -> dict[str, Tensor]:
    """Its tensors; what else it contains of a run goes back into it."""
    try:
        tensors = load_file(checkpoint / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise DistillationError(f"{checkpoint} is damaged: {error}; delete it to resume from the one before") from error
    record = json.loads((checkpoint / "record.json").read_text())
    for name in KEPT:
        setattr(run, name, record[name])
    return tensors


def _found(run: Distillation, stage: str) -> list[Path]:
    return sorted(p for p in run.folder.glob(f"{stage}-*") if (p / "record.json").exists())


def _identity(run: Distillation) -> dict[str, Any]:
    """The settings that two runs must share to be one. The number of processes is not one of them: the batches are the same."""
    config = {k: v for k, v in run.config.to_dict().items() if k not in ("output_dir", "checkpoint_every", "evaluate_every")}
    parts = (run.samples, run.held_out)
    prompts = [[[r.prompt, r.seed, r.size, r.picture] for r in part.entries] for part in parts]
    return {
        "config": config, "spec": run.patch.context.assignment.record(),
        "layers": sorted(run.patch.originals), "teacher": run.samples.teacher, "prompts": prompts,
        "calls": [part.manifest["call"] for part in parts], "contents": [part.contents for part in parts],
    }  # fmt: skip
