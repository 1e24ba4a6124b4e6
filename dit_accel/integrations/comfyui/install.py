"""Putting a method on a model of ComfyUI, a `ModelPatcher`, and taking it off: always on a clone of the model."""

from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.integrations.comfyui.accelerator import Accelerator, log
from dit_accel.integrations.comfyui.hosts import SOURCES
from dit_accel.method.assignment import Assignment
from dit_accel.method.parameters import AttentionParameters

KEY = "dit_accel"
# ComfyUI's names of when it calls: WrappersMP.APPLY_MODEL (around each forward) and CallbacksMP.ON_CLEANUP (after a run)
APPLY_MODEL, CLEANUP = "apply_model", "on_cleanup"


def sigma_range(model: Any, start: float, end: float) -> tuple[float, float] | None:
    """Noise levels from parts of the sampling; None for all. Raises ArgumentError unless 0 <= start < end <= 1."""
    if not 0 <= start < end <= 1:
        raise ArgumentError(f"start_percent must be below end_percent, both from 0 to 1, not {start} and {end}")
    if (start, end) == (0, 1):
        return None
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


def accelerated(
    model: Any, assignment: Assignment, *, parameters: Mapping[str, AttentionParameters] | None = None,
    sigmas: tuple[float, float] | None = None, strict: bool = False,
) -> Any:  # fmt: skip
    """A clone of a model (ComfyUI's ModelPatcher) with an assignment, in the place of one that an earlier node gave it.

    A model of an unknown class is left as it was, which is logged, as is a plan that was made for another model; under `strict` these are
    errors. An override of the attention that
    another node gives the model, before or after, is asked for every call that is not accelerated.
    """
    clone = removed(model)
    try:
        accelerator = Accelerator(model.model.diffusion_model, assignment, parameters=parameters, sigmas=sigmas, strict=strict)
    except UnsupportedModelError as error:
        if strict:
            raise
        log.warning("dit_accel: the original attention runs: %s", error)
        return clone
    if (difference := _unlike(assignment, model.model.diffusion_model, accelerator)) is not None:
        message = f"the promised error of this plan is not valid here: {difference}"
        if strict:
            raise ArgumentError(f"{message}, or leave strict out")
        log.warning("dit_accel: %s", message)
    clone.add_wrapper_with_key(APPLY_MODEL, KEY, accelerator.around)
    clone.add_callback_with_key(CLEANUP, KEY, accelerator.forget)
    return clone


def _unlike(assignment: Assignment, transformer: Any, accelerator: Accelerator) -> str | None:
    """How a model differs from the one that a plan was made for; weights, which have other names and shapes here, are not compared."""
    from dit_accel.planner.record import Plan

    if not isinstance(assignment, Plan):
        return None
    heads = {layer.name: layer.heads for pair in accelerator.layers.values() for layer in pair}
    kinds, own = SOURCES[type(transformer).__name__], assignment.model
    found = assignment.without_learned.unlike(own.transformer if own.transformer in kinds else kinds[0], heads, lambda: own.weights)
    if found is None and assignment.trained is not None:
        adapter = assignment.trained.adapter
        return (
            f'it was made with what the adapter {adapter} has learned; give the node "Load dit_accel adapter" the folder that '
            "`dit-accel plan --trained` wrote next to the plan"
        )
    return None if found is None else f"{found}, in diffusers"


def removed(model: Any) -> Any:
    """A clone of a model without what an earlier node of ours gave it."""
    clone = model.clone()
    clone.remove_wrappers_with_key(APPLY_MODEL, KEY)
    clone.remove_callbacks_with_key(CLEANUP, KEY)
    return clone
