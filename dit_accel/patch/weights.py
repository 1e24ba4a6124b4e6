"""The values of a transformer's weights: exchanging trained ones with the user's own, and hashes."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn as nn
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.patch.anatomy import plain_name
from dit_accel.patch.holders import Holders, placed_by_others
from dit_accel.patch.lora import ADAPTER, check_own_lora_unfused, without_ours
from dit_accel.patch.state import CONTEXT


def replace_weights(model: Any, patch: Any, values: Mapping[str, Tensor]) -> None:
    """Put trained values in, and keep the user's own on the CPU, from where `dense` and `restore` take them.

    Raises DitAccelError where a weight takes no value (quantised ones don't), before anything is changed.
    """
    patch.weights = Holders(model).exchange({name: value.cpu() for name, value in values.items()})
    patch.fused = fused_into(model, patch.weights)


def keep_weight(model: Any, patch: Any, name: str) -> None:
    """Keep the user's own value of a weight that is to be trained in place, on its device: a teacher swaps it in at every step."""
    parameter = model.get_parameter(name)
    patch.weights[name] = patch.weights.get(name, parameter).detach().to(parameter.device, copy=True)
    patch.fused |= fused_into(model, [name])


def swap_weights(model: Any, patch: Any) -> None:
    """Exchange the trained values of fully trained weights with the original ones; without them, nothing.

    Raises DitAccelError where that can't be done, before anything is changed.
    """
    if patch.weights:
        patch.weights = Holders(model).exchange(patch.weights)
    patch.swapped = not patch.swapped


def check_original(model: nn.Module) -> None:
    """Raise DitAccelError where the user's own weights can't be distinguished from what was trained, or can't be restored."""
    check_own_lora_unfused(model)
    patch = getattr(model, CONTEXT, None)
    if patch is None:
        return
    if patch.inseparable:
        raise DitAccelError(
            f"the LoRA {', '.join(patch.inseparable)} was fused into the weights and then unloaded, so that the original weights "
            "are no longer known: load the pipeline again, and call unfuse_lora() before unload_lora_weights()"
        )
    now = fused_into(model, patch.weights)
    if changed := now ^ patch.fused:
        name, adapter = min(changed)
        way = "fuse_lora() added to" if (name, adapter) in now else "unfuse_lora() took out of"
        undo = "unfuse_lora()" if (name, adapter) in now else "fuse_lora()"
        raise DitAccelError(
            f"the LoRA {adapter!r} is one that {way} trained weights ({name} the first) since they were loaded, so that the original can't "
            f"be restored: call {undo} first"
        )


def check_removal(model: nn.Module) -> None:
    """Raise DitAccelError where the layers that our LoRA is in can't be taken out of it."""
    if ADAPTER in getattr(model, "peft_config", {}) and placed_by_others(model):
        raise DitAccelError(
            "accelerate offloads whole blocks by the names that their weights have with the LoRA, which is to be removed: call "
            "accelerate.hooks.remove_hook_from_submodules(transformer) first"
        )


def check_exchange(model: Any, patch: Any) -> None:
    """Raise DitAccelError unless `swap_weights` will work."""
    check_original(model)
    if patch.weights:
        Holders(model).check(patch.weights)


def fused_into(model: nn.Module, names: Iterable[str]) -> set[tuple[str, str]]:
    """(weight, adapter) for each LoRA that was added to one of these weights."""
    found = set()
    for name in names:
        layer = model.get_submodule(name.rpartition(".")[0])
        if isinstance(layer, BaseTunerLayer):
            found |= {(name, str(adapter)) for adapter in getattr(layer, "merged_adapters", ())}
    return found


def record_inseparable(model: nn.Module) -> None:
    """Record which LoRA can't be taken out of the weights once its layers are removed: ours, or one that is in trained weights."""
    patch: Any = getattr(model, CONTEXT)
    names = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    merged = {(plain_name(name), adapter) for name, adapter in fused_into(model, names)}
    patch.inseparable += sorted({adapter for name, adapter in merged - patch.fused if adapter == ADAPTER or name in patch.weights})


def tolerate(model: nn.Module, keys: Any) -> None:
    """Hook after `load_state_dict`: a state dict of the original lacks what acceleration added, which keeps its values."""
    keys.missing_keys[:] = [name for name in keys.missing_keys if not _ours(name)]


def rename(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`: weights that our LoRA is on are found by the names that they have without it."""
    if ADAPTER in getattr(model, "peft_config", {}):
        for name, _parameter in model.named_parameters():
            plain = without_ours(model, name)
            if plain != name and f"{prefix}{plain}" in state:
                state[f"{prefix}{name}"] = state.pop(f"{prefix}{plain}")


def hide(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Hook after `state_dict`: within `dense` it is the original's, and loads into a plain model."""
    patch: Any = getattr(model, CONTEXT)
    if patch.swapped:
        inside = [name for name in state if name.startswith(prefix)]
        kept = {prefix + without_ours(model, n.removeprefix(prefix)): state.pop(n) for n in inside if not _ours(n)}
        for name in [name for name in inside if _ours(name)]:
            del state[name]
        state.update(kept)


def _ours(name: str) -> bool:
    """Whether a name in a state dict is a method's own parameter or of the LoRA that distillation trains."""
    return f".{ADAPTER}." in name


def _original_weights(model: nn.Module) -> dict[str, Tensor]:
    """The user's own values of weights that are changed in the model. Raises DitAccelError where they aren't known."""
    check_original(model)
    patch = getattr(model, CONTEXT, None)
    return patch.weights if patch and not patch.swapped else {}


def only_original(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an accelerated transformer as it would be without `accelerate` and `distill`; a user's own LoRA stays in it.

    Offloaded values are brought in. Raises DitAccelError where the model was quantised over trained weights.
    """
    originals, holders = _original_weights(model), Holders(model)
    holders.check(originals)
    kept = {}
    for name, held in state.items():
        if not _ours(name):
            original = originals.get(plain_name(name))
            kept[without_ours(model, name)] = holders.value(name) if original is None else original.to(held.dtype)
    return kept


def weights_hash(transformer: nn.Module) -> str:
    """SHA-256 of all weights that a forward uses, a method's own and every LoRA's among them, wherever they are offloaded.

    Raises DitAccelError where they can't be read.
    """
    holders = Holders(transformer)
    return _hash((name, holders.value(name)) for name in sorted(transformer.state_dict()))


def teacher_hash(transformer: nn.Module) -> str:
    """SHA-256 of the original weights: all parameters but those that acceleration and distillation add or change back.

    Raises DitAccelError where they can't be read.
    """
    return _hash((name, read()) for name, read in teacher_values(transformer).items())


def teacher_values(transformer: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Plain name -> a function that reads the value, of the original weights: one at a time, because offloaded ones are brought in.

    Raises DitAccelError where they can't be distinguished from what was trained; the functions, where a value can't be read.
    """
    originals, holders = _original_weights(transformer), Holders(transformer)

    def reader(name: str) -> Callable[[], Tensor]:
        return lambda: originals[plain] if (plain := plain_name(name)) in originals else holders.value(name)

    return {plain_name(name): reader(name) for name in sorted(transformer.state_dict()) if not _ours(name)}


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Of (name, tensor) in this order."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in stored(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def stored(tensor: Any) -> Iterator[Tensor]:
    """A tensor itself, or the plain tensors that a quantised one is made of: torchao's refuse to be seen as bytes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))
