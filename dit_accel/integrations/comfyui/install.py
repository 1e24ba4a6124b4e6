"""Putting a method on a model of ComfyUI, a `ModelPatcher`, and taking it off: always on a clone of the model."""

from collections.abc import Mapping
from typing import Any

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.integrations.comfyui.accelerator import Accelerator, Override, log
from dit_accel.method.assignment import Assignment
from dit_accel.method.parameters import AttentionParameters

KEY, OVERRIDE = "dit_accel", "optimized_attention_override"
# ComfyUI's names of when it calls: WrappersMP.APPLY_MODEL, CallbacksMP.ON_PREPARE_STATE (before each step) and ON_CLEANUP (after a run)
APPLY_MODEL, PREPARE_STATE, CLEANUP = "apply_model", "on_prepare_state", "on_cleanup"


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

    A model of an unknown class is left as it was, which is logged; under `strict` that is an error. An override that is there already is
    kept and asked for every call that is not accelerated. One that a later node puts in its place is found before each step, and is asked
    in the same way.
    """
    clone = removed(model)
    try:
        accelerator = Accelerator(model.model.diffusion_model, assignment, parameters=parameters, sigmas=sigmas, strict=strict)
    except UnsupportedModelError as error:
        if strict:
            raise
        log.warning("dit_accel: the original attention runs: %s", error)
        return clone
    _install(clone.model_options, accelerator)

    def before_step(patcher: Any, timestep: Any, model_options: dict[str, Any]) -> None:
        _install(model_options, accelerator)

    clone.add_wrapper_with_key(APPLY_MODEL, KEY, accelerator.around)
    clone.add_callback_with_key(PREPARE_STATE, KEY, before_step)
    clone.add_callback_with_key(CLEANUP, KEY, accelerator.forget)
    return clone


def removed(model: Any) -> Any:
    """A clone of a model without what an earlier node of ours gave it."""
    clone = model.clone()
    options = clone.model_options["transformer_options"] = dict(clone.model_options.get("transformer_options", {}))
    if isinstance(override := options.get(OVERRIDE), Override):
        options.pop(OVERRIDE)
        if override.previous is not None:
            options[OVERRIDE] = override.previous
    clone.remove_wrappers_with_key(APPLY_MODEL, KEY)
    clone.remove_callbacks_with_key(PREPARE_STATE, KEY)
    clone.remove_callbacks_with_key(CLEANUP, KEY)
    return clone


def _install(model_options: dict[str, Any], accelerator: Accelerator) -> None:
    """Put the accelerator's override into a model's options, before the one that is there; nothing where it is there already."""
    options = model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    if not (isinstance(previous, Override) and previous.accelerator is accelerator):
        options[OVERRIDE] = Override(accelerator, previous)
