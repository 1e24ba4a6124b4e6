"""`save_pretrained` of an accelerated transformer, and so its pipeline's, writes the original model."""

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn as nn
from torch import Tensor


class SaveOriginal:
    """Stands in for a model's `save_pretrained` while it is accelerated; `save_adapter` writes what acceleration and training added."""

    def __init__(self, model: Any, only_original: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]) -> None:
        self.model, self.only_original = model, only_original

    @property
    def __signature__(self) -> inspect.Signature:
        """diffusers reads it to learn what it may pass."""
        return inspect.signature(type(self.model).save_pretrained.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        def replace(model: nn.Module, state: dict[str, Tensor], prefix: str, metadata: Any) -> None:
            original = self.only_original(model, dict(state))
            state.clear()
            state.update(original)

        handle = self.model.register_state_dict_post_hook(replace)
        try:
            return type(self.model).save_pretrained(self.model, *args, **kwargs)
        finally:
            handle.remove()
