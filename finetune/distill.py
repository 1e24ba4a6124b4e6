"""Distillation: the accelerated pipeline learns from the original, which is the same weights with the patch switched off.

    record (once)    the pipeline samples prompts with its original attention; arguments and predictions of every forward are kept
    fit (a step)     each layer's own parameters, to the teacher's attention on the teacher's q, k, v; see `fit`
    replay (a step)  teacher: operators and LoRA off, no gradient · student: on · loss = prediction + attention outputs (+ flow matching)

Nothing here knows a model family. What is drawn depends on the seed, the step and the place in the batch alone: a killed run resumes
exactly, and several processes (`accelerate launch`) share a batch that is the same for any number of them.
"""

import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.finetune import checkpoints
from dit_accel.finetune.capture import Outputs, capture, compared
from dit_accel.finetune.config import DistillConfig
from dit_accel.finetune.data.collect import Forward, Samples
from dit_accel.finetune.fit import fit, set_start_values
from dit_accel.finetune.flow import repeated
from dit_accel.finetune.losses import cosine_factor, relative_error
from dit_accel.finetune.processes import is_main, share, sharing, sum_gradients, summed, wait_for_all
from dit_accel.finetune.session import Distillation, prepare
from dit_accel.finetune.surroundings import model_kept, process_kept
from dit_accel.finetune.trainables import MasterWeights, load_optimizer_tensors, make_optimizers, optimizer_tensors, set_trainable
from dit_accel.finetune.velocity import on_device, predict
from dit_accel.method.assignment import Moment
from dit_accel.patch.modes import always, without_dense_steps
from dit_accel.patch.state import patches_of
from dit_accel.patch.verbs import dense

DRAWS = 1000  # of noise levels, until one is found at which a spec runs


@dataclass
class DistillResult:
    """Held-out relative velocity error before and after, every logged row, and the step it resumed from (0: none).

    Attributes:
        error_before: ‖student − teacher‖ / ‖teacher‖ of the prediction on the held-out samples, before training.
        error_after: the same at the end.
        history: the rows of log.jsonl, one for each step, before them one of step 0 with the first error and, after a first stage, another
            with the error at its end. `seconds` in a row: what the steps of both stages took until then, without evaluation, sampling and
            checkpoints.
        resumed_from: the step that it continued from, 0 where it began anew.
        parameter_history: the rows of the first stage.
        error_fitted: the held-out error at the end of the first stage, None where there was none.
    """

    error_before: float
    error_after: float
    history: list[dict[str, float]] = field(default_factory=list)
    resumed_from: int = 0
    parameter_history: list[dict[str, float]] = field(default_factory=list)
    error_fitted: float | None = None

    @property
    def choice_loss(self) -> tuple[float, float] | None:
        """The held-out loss of what chooses blocks (`choices.Chooser.loss`) before and after the first stage; None where nothing does."""
        rows = self.parameter_history
        if not rows or "held_out_choice_before" not in rows[0] or "held_out_choice" not in rows[-1]:
            return None
        return rows[0]["held_out_choice_before"], rows[-1]["held_out_choice"]


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

    First the method's own parameters are fitted layer by layer (`parameter_steps`), then everything that the config trains is trained end
    to end. Under `accelerate launch` every process calls it alike: they share samples and batches, and the main one alone writes
    checkpoints and logs.
    What is done with the trained pipeline (`save_adapter`) is the main process's to do, too.

    Args:
        prompts_or_dataset: prompts, which the pipeline samples first (cached in the output folder), or samples made by `collect`: a
            `Samples` object or the path of its folder.
        held_out: the same for evaluation, never trained on; unless given, a tenth of the prompts (at least one) is set aside.
        call: arguments of `collect`: of the pipeline's call while it samples (height, width, num_inference_steps, ...), or `sizes`, several
            (height, width) that the prompts take in turn; recorded forwards of all sizes are drawn alike.

    Continues from the newest checkpoint in `config.output_dir`, on a pipeline loaded afresh. `dense_steps` are not replayed: every
    recorded forward is learned from. Raises NotAcceleratedError, or DistillationError where teacher and student agree to rounding before
    the first step, where the samples come from other weights, or where the folder belongs to another run.
    """
    config = DistillConfig() if config is None else config
    with process_kept(), sharing(patches_of(pipe)[0][0]):
        run = prepare(pipe, prompts_or_dataset, held_out, config, call)
        with without_dense_steps(run.transformer), always(run.transformer), model_kept(run.transformer):
            return _distill(run, progress)


def _distill(run: Distillation, progress: bool) -> DistillResult:
    """Check, train, evaluate."""
    checkpoint = checkpoints.newest(run, checkpoints.STEPS)
    if checkpoint is None and checkpoints.newest(run, checkpoints.PARAMETERS) is None:
        run.error_before = _first_error(run)
        run.write_log("log.jsonl", [], anew=True)
        run.add_row({"step": 0, "held_out_error": run.error_before})
        set_start_values(run)
    if checkpoint is None and run.parameter_steps:
        fit(run, progress)
        run.error_fitted = run.held_out_error()
        run.add_row({"step": 0, "held_out_error": run.error_fitted})
    start = _train(run, checkpoint, progress)
    wait_for_all()  # until the last checkpoint is written
    _warn_if_worse(run)
    return DistillResult(run.error_before, run.history[-1]["held_out_error"], run.history, start, run.parameter_history, run.error_fitted)


def _warn_if_worse(run: Distillation) -> None:
    """Say so where the second stage left the held-out error larger than it began."""
    before, after = run.error_before if run.error_fitted is None else run.error_fitted, run.history[-1]["held_out_error"]
    if not after <= before and is_main():
        warnings.warn(
            f"dit_accel: the training made the held-out error larger, {before:.4g} before and {after:.4g} after {run.config.steps} steps. "
            f"Begin anew with a learning_rate below {run.config.learning_rate:g}, or with more prompts; a method that is as close as this "
            "may need no training",
            stacklevel=3,
        )


def _train(run: Distillation, checkpoint: Path | None, progress: bool) -> int:
    """The loop, from the start or from a checkpoint; returns the step it started at."""
    config = run.config
    masters = MasterWeights(set_trainable(run.transformer, run.patch, config))
    parameters = masters.parameters
    tensors = None if checkpoint is None else checkpoints.load(run, checkpoint)
    optimizers = make_optimizers(parameters, config, run.parameter_rate)
    if tensors is not None:
        load_optimizer_tensors(tensors, parameters, optimizers)
        masters.copy_to_model()
    start = int(run.history[-1]["step"])
    run.write_log("log.jsonl", run.history, anew=True)
    if config.gradient_checkpointing and not run.transformer.is_gradient_checkpointing:
        run.transformer.enable_gradient_checkpointing()
    shown = progress and is_main()
    bar = tqdm(range(start, config.steps), initial=start, total=config.steps, desc="distill", disable=None if shown else True)
    for step in bar:
        with run.spec_drawn(checkpoints.STEPS, step) as drawn, run.timed_step():
            losses = _train_step(run, masters, optimizers, step)
        bar.set_postfix(loss=f"{losses['loss']:.4f}")
        _after_step(run, parameters, optimizers, step + 1, losses | drawn)
    return start


def _first_error(run: Distillation) -> float:
    """Held-out error before the first step. Raises DistillationError where there is nothing to learn."""
    error = run.held_out_error()
    dtype = run.held_out[0].prediction.dtype
    rounding = torch.finfo(dtype).eps * (2 if dtype.itemsize == 2 else 32)
    if not error > rounding:
        raise DistillationError(
            f"student and teacher agree to rounding before the first step (relative error {error:.1e}): there is nothing to "
            f"learn, because {run.patch.context.assignment} does not change the output at this size"
        )
    return error


def _train_step(run: Distillation, masters: MasterWeights, optimizers: Sequence[Any], step: int) -> dict[str, float]:
    """One optimizer step over `batch_size` recorded forwards, of which each process takes its share; returns the mean of each loss."""
    config = run.config
    factor = cosine_factor(step, config.steps, warmup=config.warmup_steps)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["initial_lr"] * factor
    totals: dict[str, Tensor] = {}
    run.transformer.train()
    for item in share(config.batch_size):
        draw = random.Random(f"{config.seed} {step} {item}")
        losses = _losses(run, run.positions[draw.randrange(len(run.positions))], draw)
        if not losses["loss"].requires_grad:
            method = run.patch.context.assignment
            raise DistillationError(f"{method} runs no spec in a sample of this size, so nothing is learned from it: collect other sizes")
        (losses["loss"] / config.batch_size).backward()
        masters.collect_gradients()
        totals = {k: totals.get(k, 0.0) + v.detach().double() / config.batch_size for k, v in losses.items()}
    run.transformer.eval()
    means = {k: float(v) for k, v in zip(totals, summed(list(totals.values())), strict=True)}
    if not math.isfinite(means["loss"]):
        raise DistillationError(f"the loss at step {step} is {means['loss']}; lower the learning rate or resume from a checkpoint")
    sum_gradients(masters.parameters.values())
    norm = float(torch.nn.utils.clip_grad_norm_(masters.parameters.values(), config.max_grad_norm))
    if not math.isfinite(norm):  # the weights are still as they were, and so is the newest checkpoint
        raise DistillationError(f"the gradient at step {step} is {norm}; lower the learning rate or resume from a checkpoint")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    masters.copy_to_model()
    return means


def _losses(run: Distillation, position: int, draw: random.Random) -> dict[str, Tensor]:
    """The weighted losses of one recorded forward, `loss` their sum."""
    config, forward = run.config, run.samples[position]
    arguments, flow_target, moment = forward.arguments, None, run.moment(position)
    if config.flow_weight > 0:
        arguments, flow_target, moment = _flow_inputs(run, forward, position, draw)
    target, taught = _teach(run, arguments, forward.prediction if flow_target is None else None)
    with run.replayed(moment), run.autocast(), compared(run.transformer, taught) as attention:
        prediction = predict(run.transformer, arguments)
    losses = {"prediction": relative_error(prediction, target)}
    total = config.prediction_weight * losses["prediction"]
    if config.attention_weight > 0:
        losses["attention"] = torch.stack(attention).mean()
        total = total + config.attention_weight * losses["attention"]
    if flow_target is not None:
        losses["flow"] = relative_error(prediction, repeated(flow_target, prediction.shape).to(prediction.device))
        total = total + config.flow_weight * losses["flow"]
    return {"loss": total, **{k: v.detach() for k, v in losses.items()}}


def _teach(run: Distillation, arguments: dict[str, Any], recorded: Tensor | None) -> tuple[Tensor, Outputs]:
    """The teacher's prediction and attention outputs; the recorded prediction is enough where attention is not compared."""
    if recorded is not None and run.config.attention_weight == 0:
        return recorded.to(next(run.transformer.parameters()).device), {}
    with torch.no_grad(), run.autocast(), dense(run.transformer):
        if run.config.attention_weight == 0:
            return predict(run.transformer, arguments), {}
        with capture(run.transformer) as taught:
            return predict(run.transformer, arguments), taught


def _flow_inputs(run: Distillation, forward: Forward, position: int, draw: random.Random) -> tuple[dict[str, Any], Tensor, Moment | None]:
    """Arguments for x_t = (1 − σ)·x0 + σ·noise of the run's final latents, the flow-matching target, noise − x0 or its negative, and the
    moment, where it matters.

    σ is drawn between the levels that the run itself visited, so it follows the shift used at inference; where the assignment depends on
    moments, until it runs a spec there.
    """
    levels = run.flow.levels(run.samples, position)
    by_moment = run.patch.context.assignment.of_moments
    for _ in range(DRAWS):
        place = draw.uniform(0, len(levels) - 1)
        low = int(place)
        sigma = levels[low] + (place - low) * (levels[low + 1] - levels[low])
        moment = Moment(low, sigma) if by_moment else None
        if moment is None or run.runs_at(moment):
            break
    else:
        method = run.patch.context.assignment
        raise DistillationError(f"none of {DRAWS} noise levels that were drawn is one at which {method} runs a spec: widen its ranges")
    noise = torch.randn(forward.latents.shape, generator=torch.Generator().manual_seed(draw.getrandbits(62)))
    x0 = forward.latents.float()
    arguments = run.flow.at(on_device(forward.arguments, torch.device("cpu")), sigma, (1 - sigma) * x0 + sigma * noise)
    return arguments, run.flow.sign * (noise - x0), moment


def _after_step(
    run: Distillation, parameters: Any, optimizers: Sequence[torch.optim.Optimizer], step: int, losses: dict[str, float]
) -> None:
    """Log, evaluate, checkpoint and draw the curve where the config says so. `step` counts finished steps."""
    config = run.config
    row = {"step": step, **losses}
    if step == config.steps or (config.evaluate_every and step % config.evaluate_every == 0):
        row["held_out_error"] = run.held_out_error()
    run.add_row(row)
    if step % config.checkpoint_every == 0 or step == config.steps:
        checkpoints.save(run, checkpoints.STEPS, step, optimizer_tensors(parameters, optimizers))
        run.write_curve()
