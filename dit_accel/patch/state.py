"""The patch of one transformer, kept in an attribute of it, and what finds it: `patches_of`, `operators_of`."""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import NotAcceleratedError, UnsupportedModelError
from dit_accel.patch.anatomy import check_unfused, find_transformers
from dit_accel.patch.context import Context
from dit_accel.patch.lora import ADAPTER, own_lora_is_active
from dit_accel.patch.processor import AcceleratedAttention, AcceleratedProcessor, accelerated_copy

CONTEXT = "_dit_accel"  # attribute of an accelerated transformer


@dataclass
class Patch:
    """The patch of one transformer, with what removing it requires: original processors, hooks, weights that distillation changed."""

    context: Context
    originals: dict[str, list[tuple[Any, Any]]]  # module name -> (original processor, ours), the newest last
    hooks: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> its other value: the original, or in dense() the trained
    swapped: bool = False  # whether the originals are in the model, as in dense()
    fused: set[tuple[str, str]] = field(default_factory=set)  # (name in `weights`, LoRA in it) when the original was kept
    inseparable: list[str] = field(default_factory=list)  # LoRA that were unloaded while fused into trained weights, or that are ours
    lora: bool = False  # whether a LoRA of ours belongs to the patch
    warned: bool = False  # that it is switched off, once

    def accelerate_new_processors(self, model: Any, args: Any = None) -> None:
        """Forward pre-hook: accelerate processors that were set since, as fuse_qkv_projections and loading an IP-Adapter do."""
        if torch.compiler.is_compiling():
            return
        if self.context.trained:
            check_unfused(model, self.originals, UnsupportedModelError)
        if self.lora and not self.warned and not own_lora_is_active(model):
            self.warned = True
            warnings.warn(
                f"what was trained is switched off: the LoRA {ADAPTER!r} is not among the active adapters; name it in set_adapters(...)",
                stacklevel=2,
            )
        for name, pairs in self.originals.items():
            module = model.get_submodule(name)
            if isinstance(module.processor, AcceleratedProcessor):
                continue
            try:
                ours = accelerated_copy(module.processor)
            except UnsupportedModelError as error:
                self.context.fall_back(f"a processor that was set after accelerate(...): {error}")
                continue
            pairs.append((module.processor, ours))
            module.processor = ours


def patches_of(pipe_or_transformer: object) -> list[tuple[Any, Patch]]:
    """The accelerated transformers and their patches. Raises NotAcceleratedError if there is none."""
    found = [(model, getattr(model, CONTEXT)) for model in find_transformers(pipe_or_transformer) if hasattr(model, CONTEXT)]
    if not found:
        raise NotAcceleratedError(f"{type(pipe_or_transformer).__name__} is not accelerated: call accelerate(...) first")
    return found


def operators_of(pipe_or_transformer: object) -> dict[str, AcceleratedAttention]:
    """The operators of all accelerated layers by the name of their attention module."""
    return {name: model.get_submodule(name).dit_accel for model, patch in patches_of(pipe_or_transformer) for name in patch.originals}
