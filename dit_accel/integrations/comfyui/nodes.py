"""The nodes: "Accelerate attention (dit_accel)", "Load dit_accel adapter" and "Plan".

ComfyUI imports this at its start: nothing of diffusers is imported before a node runs. A node changes a clone of the model that it is
given. Names of nodes and of their inputs are saved in users' workflows, so they stay.
"""

import math
from pathlib import Path
from typing import Any

from dit_accel.method.assignment import Assignment, read_method
from dit_accel.method.checks import require
from dit_accel.method.spec import AttentionSpec
from dit_accel.method.text import FILE, parse_method

METHOD = "DIT_ACCEL_METHOD"  # type of a connection
CATEGORY = "model/patch"
PERCENT = {"default": 0.0, "min": 0.0, "max": 1.0, "step": 0.01}
STRICT = {"default": False, "tooltip": "Stop with an error where a layer would run its original attention, and never leave a size to it."}
START = "The part of the sampling at which the method begins; the original attention runs before."
END = "The part of the sampling at which it ends."

Inputs = dict[str, dict[str, tuple[Any, ...]]]
Stamp = tuple[tuple[str, int, int], ...]
UNKNOWN = math.nan  # equal to nothing: ComfyUI runs the node again


class Accelerate:
    """A method on a model, or the one that a plan says."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "apply", CATEGORY
    DESCRIPTION = "Faster self-attention for FLUX, Stable Diffusion 3, Qwen-Image, HunyuanVideo and Wan, by sparse attention of dit_accel."
    SEARCH_ALIASES = ("sparse attention", "fovea", "speed up")

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        text = "fovea:0.05 keeps 5 % and needs no training. clear:16, sla:0.1 and gna:80 require an adapter. Or a JSON file with a method."
        return {
            "required": {
                "model": ("MODEL",),
                "method": ("STRING", {"default": "fovea:0.05", "tooltip": text}),
                "start_percent": ("FLOAT", {**PERCENT, "tooltip": START}),
                "end_percent": ("FLOAT", {**PERCENT, "default": 1.0, "tooltip": END}),
                "strict": ("BOOLEAN", STRICT),
            },
            "optional": {"plan": (METHOD, {"tooltip": "From the node Plan; in the place of the method."})},
        }

    @classmethod
    def IS_CHANGED(cls, method: str | None = "", **others: Any) -> Stamp | float:  # noqa: N802
        """The state of the method's file, so that a file that was written anew is read anew; empty where the method is a text."""
        return () if method is not None and not method.strip().lower().endswith(FILE) else stamp(method)

    def apply(
        self, model: Any, method: str, start_percent: float, end_percent: float, strict: bool, plan: Assignment | None = None
    ) -> tuple[Any]:
        """Returns a clone of the model with the method."""
        from dit_accel.integrations.comfyui.install import accelerated, removed, sigma_range

        found = plan if plan is not None else _read(method.strip()) if method.strip().lower().endswith(FILE) else parse_method(method)
        if found is None:  # "none"
            return (removed(model),)
        return (accelerated(model, Assignment.of(found), sigmas=sigma_range(model, start_percent, end_percent), strict=strict),)


class LoadAdapter:
    """A model with the method and the weights of an adapter."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "apply", CATEGORY
    DESCRIPTION = "A method that was distilled for this model by dit_accel in diffusers: its own parameters and its LoRA."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        place = "A folder made by dit_accel.save_adapter, or owner/name on the hub."
        weight = {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05, "tooltip": "Of the adapter's LoRA; it was trained at 1."}
        return {
            "required": {
                "model": ("MODEL",), "adapter": ("STRING", {"default": "", "tooltip": place}), "lora_strength": ("FLOAT", weight),
                "strict": ("BOOLEAN", STRICT),
            }
        }  # fmt: skip

    @classmethod
    def IS_CHANGED(cls, adapter: str | None = "", **others: Any) -> Stamp | float:  # noqa: N802
        """The state of the adapter's files, so that an adapter that was saved anew is loaded anew; empty for one on the hub."""
        return stamp(adapter)

    def apply(self, model: Any, adapter: str, lora_strength: float, strict: bool) -> tuple[Any]:
        """Returns a clone of the model with the adapter. Raises AdapterError where it does not fit."""
        from dit_accel.integrations.comfyui.adapter import read_adapter
        from dit_accel.integrations.comfyui.install import accelerated

        require(bool(adapter.strip()), "adapter must be a folder or owner/name on the hub", adapter)
        found = read_adapter(adapter.strip(), model.model.diffusion_model)
        patched = found.with_lora(model, lora_strength)
        return (accelerated(patched, found.assignment, parameters=found.parameters, strict=strict),)


class Plan:
    """A method for layers, heads and steps from a file."""

    RETURN_TYPES, RETURN_NAMES, FUNCTION, CATEGORY = (METHOD, "STRING"), ("plan", "text"), "read", CATEGORY
    DESCRIPTION = "The JSON file of dit-accel plan, of an assignment or of one method."

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:  # noqa: N802
        return {"required": {"file": ("STRING", {"default": "plan.json", "tooltip": "Where the file is."})}}

    @classmethod
    def IS_CHANGED(cls, file: str | None = "") -> Stamp | float:  # noqa: N802
        """The state of the file, so that a file that was written anew is read anew."""
        return stamp(file)

    def read(self, file: str) -> tuple[Assignment, str]:
        """Returns the assignment, and what it says. Raises ArgumentError that names the file."""
        found = Assignment.of(_read(file))
        return found, str(found)


def _read(file: str) -> AttentionSpec | Assignment:
    """A file's method; of a plan's file the whole plan, which knows the model that it was made for."""
    from dit_accel.planner import record

    found = read_method(file)
    return record.Plan.load(file) if isinstance(found, Assignment) and record.is_plan(file) else found


def stamp(place: str | None) -> Stamp | float:
    """Name, time and size of a file, or of each file of a folder; empty where there is none.

    ComfyUI runs a node again when what its `IS_CHANGED` gives differs from the time before. It gives None for an input that another node
    makes, whose value it knows later: UNKNOWN then.
    """
    if place is None:
        return UNKNOWN
    path = Path(place.strip())
    files = sorted(path.iterdir()) if place.strip() and path.is_dir() else [path]
    states = [(file.name, file.stat()) for file in files if file.is_file()]
    return tuple((name, state.st_mtime_ns, state.st_size) for name, state in states)


NODE_CLASS_MAPPINGS = {"DitAccelAccelerate": Accelerate, "DitAccelLoadAdapter": LoadAdapter, "DitAccelPlan": Plan}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DitAccelAccelerate": "Accelerate attention (dit_accel)",
    "DitAccelLoadAdapter": "Load dit_accel adapter",
    "DitAccelPlan": "Plan",
}
