"""Which parts of a transformer are what: supported transformers in a pipeline, their attention modules, heads, projections, arguments."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import torch.nn as nn
from peft import PeftModel
from torch.nn.parallel import DistributedDataParallel

from dit_accel.errors import DitAccelError, UnsupportedModelError
from dit_accel.pipelines import FAMILIES, Family, class_of, family_of, why_no_family

OWN = ".dit_accel.params."  # in the names of a method's own parameters


def find_transformers(pipe_or_transformer: object) -> list[Any]:
    """The transformers of supported families in a pipeline, each once, or the given transformer; wrappers are looked into.

    Raises UnsupportedModelError if there is none.
    """
    target = unwrapped(pipe_or_transformer)
    components = getattr(target, "components", None)
    if isinstance(target, nn.Module) or not isinstance(components, dict):
        candidates = [target]
    else:
        candidates = [unwrapped(c) for c in components.values() if isinstance(c, nn.Module)]
    found = [c for c in candidates if family_of(c)]
    if not found:
        raise UnsupportedModelError(_why_unsupported(candidates))
    return list({id(model): model for model in found}.values())


def require_family(model: Any) -> Family:
    """The family of a transformer. Raises UnsupportedModelError where there is none."""
    family = family_of(model)
    if family is None:
        raise UnsupportedModelError(_why_unsupported([model]))
    return family


def unwrapped(model: Any) -> Any:
    """What torch.compile, DistributedDataParallel or PEFT have wrapped, or the object itself."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(model, PeftModel):
            model = model.get_base_model()
        else:
            return model


def check_not_parallel(pipe_or_transformer: Any) -> None:
    """Raise UnsupportedModelError where parameters are added behind the back of a wrapper that keeps them equal between processes."""
    model = getattr(pipe_or_transformer, "_orig_mod", pipe_or_transformer)
    if isinstance(model, DistributedDataParallel | nn.DataParallel):
        name = type(model).__name__
        raise UnsupportedModelError(f"the transformer is wrapped in {name}: accelerate the transformer itself first, and wrap it then")


def _why_unsupported(candidates: list[Any]) -> str:
    """What was found instead of a supported transformer, and what is missing to support it."""
    if reasons := [reason for c in candidates if (reason := why_no_family(c))]:
        return reasons[0]
    for c in candidates:
        inside = getattr(c, "module", None) if isinstance(c, nn.Module) else None
        if inside is not None and family_of(inside):
            return (
                f"the {type(inside).__name__} is wrapped in {type(c).__name__}, which is not looked into: "
                f"pass the transformer itself (the wrapper's .module)"
            )
    names = [type(c).__name__ for c in candidates]
    found = {type(c).__name__: n for c in candidates if isinstance(c, nn.Module) and (n := _attention_modules(c))}
    if not found:
        supported = ", ".join(name for family in FAMILIES for name in family.classes)
        return f"no transformer of a supported family in {', '.join(sorted(set(names))) or 'it'}: supported are {supported}"
    kinds = "; ".join(f"{name}: {', '.join(modules)}" for name, modules in found.items())
    return (
        f"no family is registered for {' or '.join(found)}. Its attention modules are {kinds}. What is missing is a declaration of which "
        "of them are image self-attention, where the grid comes from and where the text is placed: "
        "dit_accel.pipelines.register(Family(...)), as samples/new_family.py shows"
    )


def _attention_modules(model: nn.Module) -> list[str]:
    """Names of the modules with an attention processor, numbers as N, and what processes each."""
    found = {re.sub(r"\d+", "N", name): type(m.processor).__name__ for name, m in model.named_modules() if hasattr(m, "processor")}
    return [f"{name} ({processor})" for name, processor in found.items()]


def attention_layers(model: Any) -> dict[str, Any]:
    """The attention modules that `accelerate` replaces in a transformer, by name; none where no family fits."""
    family = family_of(model)
    return {name: m for name, m in model.named_modules() if family is not None and re.fullmatch(family.modules, name)}


def projection_names(model: Any, layers: Iterable[str]) -> list[str]:
    """Full names of the linear projections of those attention modules, as the family declares them: what a LoRA or full training changes.

    Raises UnsupportedModelError for a module that has none of them.
    """
    family, modules = require_family(model), dict(model.named_modules())
    names = []
    for layer in layers:
        found = [f"{layer}.{leaf}" for leaf in family.projections if _is_linear(modules.get(f"{layer}.{leaf}"))]
        if not found:
            linear = [name for name, part in modules[layer].named_modules() if _is_linear(part)]
            raise UnsupportedModelError(
                f"{layer} ({type(modules[layer]).__name__}) has no projection to train: family {family.name!r} declares "
                f"{', '.join(family.projections) or 'none'}, its linear layers are {', '.join(linear) or 'none'}. "
                f"Name them in Family(projections=...), or train the method's own parameters alone (train='parameters')"
            )
        names += found
    return names


def _is_linear(module: object) -> bool:
    """Whether a module is a linear layer, or one that PEFT has wrapped."""
    return isinstance(module, nn.Linear) or hasattr(module, "base_layer")


def check_unfused(model: Any, layers: Iterable[str], error: type[DitAccelError]) -> None:
    """Raise `error` where the q, k and v projections of those attention modules are fused: a LoRA or trained weights would do nothing."""
    fused = [name for name in layers if getattr(model.get_submodule(name), "fused_projections", False)]
    if fused:
        raise error(
            f"{len(fused)} layers have fused projections ({fused[0]} is the first), which run neither a LoRA nor trained weights: "
            "call unfuse_qkv_projections() first"
        )


def heads_of(model: Any, name: str, module: Any) -> tuple[int, int]:
    """Number of query heads of an attention module and channels per head. Raises UnsupportedModelError where its family can't tell."""
    family = require_family(model)
    try:
        heads, head_dim = family.heads(module)
    except (AttributeError, TypeError, ZeroDivisionError) as error:
        raise UnsupportedModelError(
            f"heads and their width of {name} ({type(module).__name__}) are not where family {family.name!r} looks for them ({error}): "
            "say where in Family(heads=...)"
        ) from error
    return heads, head_dim


def forward_names(model: Any) -> list[str]:
    """Names of a supported transformer's forward arguments, from its family's class (subclasses may hide them)."""
    owner: Any = class_of(model)
    return list(inspect.signature(owner.forward).parameters)[1:]


def plain_name(name: str) -> str:
    """A parameter's name without the level that PEFT puts in."""
    return name.replace(".base_layer.", ".")
