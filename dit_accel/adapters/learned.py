"""What an adapter has learned, for another assignment than its own."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.adapters.importers import Checkpoint
from dit_accel.errors import AdapterError
from dit_accel.method.assignment import Assignment
from dit_accel.patch.anatomy import OWN, attention_layers, heads_of
from dit_accel.patch.heads import Layer, joint_parameters


def under(assignment: Assignment, found: Checkpoint, model: Any, folder: str | Path) -> Checkpoint:
    """A folder's tensors for another assignment than its own. Raises AdapterError where they do not fit it or it learns none of them, and
    for a plan that was made with another adapter."""
    if assignment.learned not in (None, found.digest):
        raise AdapterError(f"the plan was made with another adapter than that in {folder}, or it was trained further since: load that one")
    layers = {name: heads_of(model, name, module) for name, module in attention_layers(model).items() if assignment.specs_of(name)}
    own: dict[str, Tensor] = {}
    for name, (heads, width) in layers.items():
        start = joint_parameters(assignment.specs_of(name), Layer(name, heads, width, image_only=False)).state_dict()
        own |= {f"{name}{OWN}{key}": value for key, value in taken(name, start, found.own, folder).items()}
    if not own:
        raise AdapterError(f"nothing that the adapter in {folder} has learned is of {assignment}: give an assignment of its specs")
    return dataclasses.replace(found, assignment=assignment.without_learned, layers=tuple(layers), own=own)


def names_of(own: Mapping[str, Tensor]) -> set[str]:
    """What an adapter's tensors are called within their layers."""
    return {key.partition(OWN)[2] for key in own}


def taken(layer: str, start: Mapping[str, Tensor], own: Mapping[str, Tensor], folder: str | Path) -> dict[str, Tensor]:
    """What an adapter has learned in the place of a layer's start values; `own`: all that it has.

    What it has in no layer is left out, and keeps its start value. Raises AdapterError for what it has in other layers alone, or in another
    shape.
    """
    known, found = names_of(own), {}
    for name in (name for name in start if name in known):
        value = own.get(f"{layer}{OWN}{name}")
        if value is None or value.shape != start[name].shape:
            has = "has for other layers alone" if value is None else f"has in the shape {tuple(value.shape)}"
            raise AdapterError(
                f"{layer} requires {name} of the shape {tuple(start[name].shape)}, which the adapter in {folder} {has}: name specs that it "
                "was distilled for, or distil it in all layers"
            )
        found[name] = value
    return found
