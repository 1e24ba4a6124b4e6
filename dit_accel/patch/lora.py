"""The LoRA that distillation trains, among those that a user has on the same layers."""

from typing import Any

from diffusers.utils.peft_utils import delete_adapter_layers
from peft.tuners.tuners_utils import BaseTunerLayer

from dit_accel.errors import DitAccelError
from dit_accel.patch.anatomy import plain_name

ADAPTER = "dit_accel"  # its name


def activate_lora(model: Any, others: list[str]) -> None:
    """Activate ours in addition to the adapters that were active; their scales stay (diffusers' set_adapters would make them 1)."""
    for module in model.modules():
        if others and isinstance(module, BaseTunerLayer):
            module.set_adapter([*others, ADAPTER])


def zero_own_lora(model: Any) -> dict[str, float]:
    """Scale ours to 0, where it adds exact zeros; returns the scales that it had, by layer. Other adapters are left alone."""
    layers = {name: module for name, module in model.named_modules() if ADAPTER in getattr(module, "scaling", {})}
    before = {name: module.scaling[ADAPTER] for name, module in layers.items()}
    scale_own_lora(model, dict.fromkeys(layers, 0.0))
    return before


def scale_own_lora(model: Any, scales: dict[str, float]) -> None:
    """Give ours these scales, by layer, where it is still there."""
    for name, module in model.named_modules():
        if name in scales and ADAPTER in getattr(module, "scaling", {}):
            module.scaling[ADAPTER] = scales[name]


def check_own_lora_unfused(model: Any) -> None:
    """Raise DitAccelError where `fuse_lora` added ours to the weights: the original can't be distinguished from what was trained then."""
    if any(ADAPTER in getattr(module, "merged_adapters", ()) for module in model.modules()):
        raise DitAccelError(
            f"fuse_lora() added the LoRA {ADAPTER!r} to the weights, so that the original can't be distinguished from what was trained: "
            "call unfuse_lora() first"
        )


def check_user_lora_unfused(model: Any, error: type[DitAccelError]) -> None:
    """Raise `error` where `fuse_lora` added a user's LoRA to the weights: PEFT would take it out when ours is added, and round them."""
    fused = sorted({str(adapter) for module in model.modules() for adapter in getattr(module, "merged_adapters", ())})
    if fused:
        raise error(
            f"the LoRA {', '.join(fused)} is fused into the weights, and would be taken out when another comes in: call unfuse_lora() "
            "before, or unload_lora_weights() to leave it in the weights for good"
        )


def without_ours(model: Any, name: str) -> str:
    """The name that a weight has without our LoRA; a level that PEFT put in for another adapter stays."""
    path, _, leaf = name.rpartition(".base_layer.")
    if not path:
        return name
    layer = model.get_submodule(path)
    return f"{path}.{leaf}" if set(getattr(layer, "scaling", {})) <= {ADAPTER} else name


def switched_off(model: Any) -> bool:
    """Whether `disable_lora` switched the model's LoRA off, and so one that is added to it."""
    return any(getattr(module, "disable_adapters", False) is True for module in model.modules())


def own_lora_is_active(model: Any) -> bool:
    """Whether ours is there and switched on, by the first layer that has it."""
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    first = next((layer for layer in layers if ADAPTER in getattr(layer, "scaling", {})), None)
    return first is not None and ADAPTER in first.active_adapters and not first.disable_adapters


def delete_lora(model: Any) -> None:
    """Remove ours, and the layers that no adapter uses any more.

    Offloading goes on as it is: diffusers' own `delete_adapters` would begin it anew and read files of weights by a numbering that changed.
    """
    flags = {plain_name(name): p.requires_grad for name, p in model.named_parameters()}
    delete_adapter_layers(model, ADAPTER)
    getattr(model, "peft_config", {}).pop(ADAPTER, None)
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not getattr(module, "scaling", None):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if not getattr(model, "peft_config", None):
        vars(model).pop("peft_config", None)
        model._hf_peft_config_loaded = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(flags[plain_name(name)])
