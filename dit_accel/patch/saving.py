"""Replacements of a few methods of a transformer while it is accelerated, so that the patch is not seen from outside.

Held by the instance; each knows its model weakly, or a deleted model would wait for the garbage collector.
"""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor


class _StandIn:
    """Replaces one method of an instance. `action`: does the work; a function of a module, so that copies and pickles find it."""

    name: str

    def __init__(self, model: Any, action: Callable[..., Any]) -> None:
        self._model, self.action = weakref.ref(model), action

    @property
    def model(self) -> Any:
        return self._model()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.model, self.action)

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The method of the class."""
        return getattr(type(self.model), self.name)(self.model, *args, **kwargs)


class SaveOriginal(_StandIn):
    """`save_pretrained` of an accelerated transformer, and so its pipeline's, writes the original model; `save_adapter` writes what
    acceleration and training added. `action` makes the original's state dict out of a model and its own."""

    name = "save_pretrained"

    @property
    def __signature__(self) -> inspect.Signature:
        """diffusers reads it to learn what it may pass."""
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def replace(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            original = self.action(model, dict(state))
            state.clear()
            state.update(original)

        handle = self.model.register_state_dict_post_hook(replace)
        try:
            return self.original(*args, **kwargs)
        finally:
            handle.remove()


class EnableParallelism(_StandIn):
    """`enable_parallelism`, which does not know what an accelerated model requires. `action` is called with the model and the configuration
    before that."""

    name = "enable_parallelism"

    def __call__(self, *, config: Any, **settings: Any) -> None:
        self.action(self.model, config)
        self.original(config=config, **settings)


class UnloadLora(_StandIn):
    """`unload_lora`, which leaves a fused LoRA in the weights for good. `action` is called with the model before that."""

    name = "unload_lora"

    def __call__(self) -> None:
        self.action(self.model)
        self.original()
