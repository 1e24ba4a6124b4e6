"""The values of a transformer's weights: exchanging trained ones with the user's own, and hashes."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dit_accel.anatomy import CONTEXT, plain_name
from dit_accel.lora import ADAPTER, check_apart


def swap_weights(model: Any, patch: Any) -> None:
    """Exchange the trained values of fully trained weights with the original ones, in place; without them, nothing."""
    for name, other in patch.weights.items():
        parameter = model.get_parameter(name)
        patch.weights[name] = parameter.data
        parameter.data = other.to(parameter.device, parameter.dtype)


def _ours(name: str) -> bool:
    """Whether a name in a state dict is a method's own parameter or of the LoRA that distillation trains."""
    return f".{ADAPTER}." in name


def _original_weights(model: nn.Module) -> dict[str, Tensor]:
    """The user's own values of weights that stand changed in the model. Raises DitAccelError where they can't be told."""
    check_apart(model)
    patch = getattr(model, CONTEXT, None)
    return patch.weights if patch and patch.context.enabled else {}


def only_original(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an accelerated transformer as it would be without `accelerate` and `distill`; a user's own LoRA stays in it."""
    originals = _original_weights(model)
    kept = {name: value for name, value in state.items() if not _ours(name)}
    if set(getattr(model, "peft_config", {})) <= {ADAPTER}:
        kept = {plain_name(name): value for name, value in kept.items()}
    return {name: originals.get(plain_name(name), value) for name, value in kept.items()}


def weights_hash(transformer: nn.Module) -> str:
    """SHA-256 of all weights that a forward uses, a method's own and every LoRA's among them."""
    return _hash((name, name, tensor) for name, tensor in transformer.state_dict().items())


def teacher_hash(transformer: nn.Module) -> str:
    """SHA-256 of the original weights: all parameters but those that acceleration and distillation add or change back."""
    originals = _original_weights(transformer)
    own = [(name, plain_name(name), tensor) for name, tensor in transformer.state_dict().items() if not _ours(name)]
    return _hash((name, plain, originals.get(plain, tensor)) for name, plain, tensor in own)


def _hash(tensors: Iterable[tuple[str, str, Tensor]]) -> str:
    """Of (name to sort by, name, tensor)."""
    digest = hashlib.sha256()
    for _, name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _stored(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stored(tensor: Any) -> Iterator[Tensor]:
    """A tensor itself, or the plain tensors that a quantised one is made of: torchao's refuse to be seen as bytes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))
