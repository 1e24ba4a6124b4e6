"""Distillation: the accelerated pipeline learns from the original, which is the same weights with the patch switched off.

    record (once)    the pipeline samples prompts with its original attention; arguments and predictions of every forward are kept
    replay (a step)  teacher: operators and LoRA off, no gradient · student: on · loss = prediction + attention outputs (+ flow matching)

Nothing here knows a model family. The order of samples depends on the seed and the step alone, so a killed run resumes exactly.
"""

import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.utils.logging import tqdm
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.finetune.capture import capture
from dit_accel.finetune.config import DistillConfig
from dit_accel.finetune.evaluate import on_device, predict, velocity_error
from dit_accel.finetune.losses import attention_loss, relative_error
from dit_accel.finetune.samples import Forward, Samples, collect
from dit_accel.finetune.trainables import load_state, make_optimizer, save_state, set_trainable
from dit_accel.patch import ADAPTER, Patch, always, dense, operators_of, patches_of, plain_name, teacher_hash


@dataclass
class DistillResult:
    """Held-out relative velocity error before and after, every logged row, and the step it resumed from (0: none)."""

    error_before: float
    error_after: float
    history: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0


@dataclass
class _Run:
    """One distillation under way."""

    pipe: Any
    transformer: Any
    patch: Patch
    config: DistillConfig
    samples: Samples
    held_out: Samples
    accelerator: Accelerator
    folder: Path
    history: list[dict[str, float]] = field(default_factory=list)
    error_before: float = 0.0


def distill(
    pipe: Any,
    prompts_or_dataset: Sequence[str] | str | Path | Samples,
    config: DistillConfig | None = None,
    *,
    held_out: Sequence[str] | str | Path | Samples | None = None,
    progress: bool = True,
    **call: Any,
) -> DistillResult:
    """Fine-tune an accelerated pipeline towards its own original attention; the pipeline is changed in place.

    Args:
        prompts_or_dataset: prompts, which the pipeline samples first (cached in the output folder), or samples made by `collect`: a
            `Samples` object or the path of its folder.
        held_out: the same for evaluation, never trained on; unless given, a tenth of the prompts (at least one) is set aside.
        call: arguments of the pipeline's call while it samples (height, width, num_inference_steps, ...).

    Continues from the newest checkpoint in `config.output_dir`, on a pipeline loaded afresh. `dense_steps` are not replayed: every
    recorded forward is learned from. Raises NotAcceleratedError, or DistillationError where teacher and student agree to rounding before
    the first step, where the samples come from other weights, or where the folder belongs to another run.
    """
    config = DistillConfig() if config is None else config
    run = _prepare(pipe, prompts_or_dataset, held_out, config, call)
    context = run.patch.context
    dense_steps, context.dense_steps = context.dense_steps, 0  # a replayed forward stands alone: it has no place in a run
    try:
        with always(run.transformer):
            return _distill(run, progress)
    finally:
        context.dense_steps = dense_steps


def _distill(run: _Run, progress: bool) -> DistillResult:
    """Check, train, evaluate; flags and modes of the model are put back whatever happens."""
    config = run.config
    if config.train == "parameters" and not any(list(op.parameters()) for op in operators_of(run.transformer).values()):
        raise DistillationError(f"train={config.train!r} leaves nothing to train: {run.patch.context.spec} has no parameters of its own")
    checkpoint = _newest(run)
    if checkpoint is None:
        run.error_before = _first_error(run)
    flags = {plain_name(name): p.requires_grad for name, p in run.transformer.named_parameters()}
    before = (run.transformer.training, run.transformer.is_gradient_checkpointing)
    try:
        start = _train(run, checkpoint, progress)
    finally:
        for name, parameter in run.transformer.named_parameters():
            parameter.requires_grad_(flags.get(plain_name(name), False))
        run.transformer.train(before[0])
        if not before[1]:
            run.transformer.disable_gradient_checkpointing()
    error_after = velocity_error(run.transformer, run.held_out)
    return DistillResult(run.error_before, error_after, run.history, start)


def _train(run: _Run, checkpoint: Path | None, progress: bool) -> int:
    """The loop, from the start or from a checkpoint; returns the step it started at."""
    config = run.config
    parameters = set_trainable(run.transformer, run.patch, config)
    optimizer = make_optimizer(parameters, config)
    optimizer.zero_grad()  # an interrupted run leaves its last gradients
    start = 0
    if checkpoint is not None:
        load_state(checkpoint, parameters, optimizer)
        record = json.loads((checkpoint / "record.json").read_text())
        run.history, run.error_before, start = record["history"], record["error_before"], int(record["step"])
    (run.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.history))
    if config.gradient_checkpointing:
        run.transformer.enable_gradient_checkpointing()
    prepared = run.accelerator.prepare(optimizer)
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="distill", disable=None if progress else True)
    for step in bar:
        losses = _train_step(run, list(parameters.values()), prepared, step)
        bar.set_postfix(loss=f"{losses['loss']:.4f}")
        _after_step(run, parameters, optimizer, step + 1, losses)
    return start


def _prepare(pipe: Any, source: Any, held_out: Any, config: DistillConfig, call: dict[str, Any]) -> _Run:
    """Check everything that can be checked, and collect what has to be sampled."""
    patches = patches_of(pipe)
    if len(patches) != 1:
        raise DistillationError(f"wanted one accelerated transformer, got {len(patches)}")
    transformer, patch = patches[0]
    if any(p.device.type == "meta" for p in transformer.parameters()):
        raise DistillationError(f"{type(transformer).__name__} is offloaded layer by layer: distil before offloading")
    present = getattr(transformer, "peft_config", {}).get(ADAPTER)
    if config.train == "lora" and present is not None and present.r != config.lora_rank:
        raise DistillationError(f"the model has our LoRA of rank {present.r} already: wanted lora_rank={present.r}, got {config.lora_rank}")
    AcceleratorState._reset_state()  # or a second run could not have another precision
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=next(transformer.parameters()).device.type == "cpu")
    if accelerator.num_processes > 1:
        raise DistillationError(f"wanted one process, got {accelerator.num_processes}")
    folder = Path(config.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DistillationError(f"wanted a folder that can be written, got output_dir={config.output_dir!r}: {error}") from error
    if held_out is None:
        if isinstance(source, Samples | str | Path):
            raise DistillationError("samples on disk want held_out samples beside them, got none")
        source = list(source)
        count = max(1, len(source) // 10)
        if len(source) < 2:
            raise DistillationError(f"wanted at least two prompts, one to hold out, got {len(source)}")
        source, held_out = source[:-count], source[-count:]
    samples = _samples(pipe, source, folder / "samples", config.seed, call)
    aside = _samples(pipe, held_out, folder / "held-out", config.seed + 1_000_000, call)
    teacher = teacher_hash(transformer)
    for part in (samples, aside):
        if part.teacher != teacher:
            raise DistillationError(f"{part.folder} was made by other weights: wanted teacher {teacher[:12]}, got {part.teacher[:12]}")
    both = {run["prompt"] for run in samples.manifest["runs"]} & {run["prompt"] for run in aside.manifest["runs"]}
    if both:
        raise DistillationError(f"held-out prompts are never trained on, got {sorted(both)[:3]} on both sides")
    return _Run(pipe, transformer, patch, config, samples, aside, accelerator, folder)


def _samples(pipe: Any, source: Any, folder: Path, seed: int, call: dict[str, Any]) -> Samples:
    if isinstance(source, Samples):
        return source
    return Samples(source) if isinstance(source, str | Path) else collect(pipe, list(source), folder, seed=seed, **call)


def _first_error(run: _Run) -> float:
    """Held-out error before the first step. Raises DistillationError where there is nothing to learn."""
    error = velocity_error(run.transformer, run.held_out)
    dtype = run.held_out[0].prediction.dtype
    rounding = torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 32)
    if not error > rounding:
        raise DistillationError(
            f"student and teacher agree to rounding before the first step (relative error {error:.1e}): wanted a method that changes the "
            f"output at this size, got {run.patch.context.spec}"
        )
    return error


def _train_step(run: _Run, parameters: list[Tensor], optimizer: Any, step: int) -> dict[str, float]:
    """One optimizer step over `batch_size` recorded forwards; returns the mean of each loss."""
    config = run.config
    draw = random.Random(f"{config.seed} {step}")
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    factor = warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / config.steps)))  # cosine to 2 %
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    totals: dict[str, float] = {}
    run.transformer.train()
    for _ in range(config.batch_size):
        losses = _losses(run, draw.randrange(len(run.samples)), draw)
        run.accelerator.backward(losses["loss"] / config.batch_size)
        totals = {k: totals.get(k, 0.0) + v.item() / config.batch_size for k, v in losses.items()}
    run.transformer.eval()
    if not math.isfinite(totals["loss"]):
        raise DistillationError(f"the loss at step {step} is {totals['loss']}; lower the learning rate or resume from a checkpoint")
    run.accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return totals


def _losses(run: _Run, position: int, draw: random.Random) -> dict[str, Tensor]:
    """The weighted losses of one recorded forward, `loss` their sum."""
    config, forward = run.config, run.samples[position]
    arguments, flow_target = forward.arguments, None
    if config.flow_weight > 0:
        arguments, flow_target = _flow_inputs(run, forward, position, draw)
    target, taught = _teach(run, arguments, forward.prediction if flow_target is None else None)
    with run.accelerator.autocast(), capture(run.transformer) as learnt:
        prediction = predict(run.transformer, arguments)
    losses = {"prediction": relative_error(prediction, target)}
    total = config.prediction_weight * losses["prediction"]
    if config.attention_weight > 0:
        losses["attention"] = attention_loss(learnt, taught)
        total = total + config.attention_weight * losses["attention"]
    if flow_target is not None:
        losses["flow"] = relative_error(prediction, flow_target.to(prediction.device))
        total = total + config.flow_weight * losses["flow"]
    return {"loss": total, **{k: v.detach() for k, v in losses.items()}}


def _teach(run: _Run, arguments: dict[str, Any], recorded: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The teacher's prediction and attention outputs; the recorded prediction is enough where attention is not compared."""
    if recorded is not None and run.config.attention_weight == 0:
        return recorded.to(next(run.transformer.parameters()).device), {}
    with torch.no_grad(), run.accelerator.autocast(), dense(run.transformer, in_order=True), capture(run.transformer) as taught:
        prediction = predict(run.transformer, arguments)
    return prediction, dict(taught)


def _flow_inputs(run: _Run, forward: Forward, position: int, draw: random.Random) -> tuple[dict[str, Any], Tensor]:
    """Arguments for x_t = (1 − σ)·x0 + σ·noise of the run's final latents, and the flow-matching target noise − x0.

    σ is drawn between the levels that the run itself visited, so it follows the shift used at inference.
    """
    name = run.patch.context.family.timestep
    levels = [*sorted(run.samples.timesteps(position, name), reverse=True), 0.0]
    place = draw.uniform(0, len(levels) - 1)
    low = int(place)
    sigma = levels[low] + (place - low) * (levels[low + 1] - levels[low])
    noise = torch.randn(forward.latents.shape, generator=torch.Generator().manual_seed(draw.getrandbits(62)))
    x0 = forward.latents.float()
    arguments = on_device(forward.arguments, torch.device("cpu"))
    arguments["hidden_states"] = ((1 - sigma) * x0 + sigma * noise).to(forward.latents.dtype)
    arguments[name] = torch.full_like(arguments[name], sigma)
    return arguments, noise - x0


def _after_step(run: _Run, parameters: Any, optimizer: torch.optim.Optimizer, step: int, losses: dict[str, float]) -> None:
    """Log, evaluate and checkpoint where the config says so. `step` counts finished steps."""
    config = run.config
    row = {"step": step, **losses}
    if config.evaluate_every and step % config.evaluate_every == 0 and step < config.steps:
        row["held_out_error"] = velocity_error(run.transformer, run.held_out)
    run.history.append(row)
    with (run.folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    if step % config.checkpoint_every == 0 or step == config.steps:
        record = {**_identity(run), "step": step, "history": run.history, "error_before": run.error_before}
        save_state(run.folder / f"checkpoint-{step:07d}", parameters, optimizer, record)
        for old in _checkpoints(run.folder)[:-2]:
            shutil.rmtree(old)


def _identity(run: _Run) -> dict[str, Any]:
    """What two runs must share to be one."""
    config = {k: v for k, v in run.config.to_dict().items() if k not in ("output_dir", "checkpoint_every", "evaluate_every")}
    parts = (run.samples, run.held_out)
    prompts = [[[r["prompt"], r["seed"]] for r in part.manifest["runs"]] for part in parts]
    return {
        "config": config, "spec": run.patch.context.spec.to_dict(), "layers": sorted(run.patch.originals),
        "teacher": run.samples.teacher, "prompts": prompts, "calls": [part.manifest["call"] for part in parts],
    }  # fmt: skip


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("checkpoint-*") if (p / "record.json").exists())


def _newest(run: _Run) -> Path | None:
    """The newest checkpoint of this run."""
    found = _checkpoints(run.folder)
    if not found:
        return None
    record = json.loads((found[-1] / "record.json").read_text())
    for name, value in _identity(run).items():
        if record[name] != json.loads(json.dumps(value)):
            raise DistillationError(
                f"{found[-1]} belongs to another run: wanted {name} {value}, got {record[name]}; name another output_dir"
            )
    return found[-1]
