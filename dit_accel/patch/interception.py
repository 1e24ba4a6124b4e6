"""What others find or intercept where an attention processor is: diffusers' registry of classes, function modes on the attention."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorRegistry
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def register_like(base: type, ours: type) -> None:
    """Register a processor class in diffusers' registry with what its base is registered with, if it is: guiders look up the class."""
    try:
        metadata = AttentionProcessorRegistry.get(base)
    except ValueError:  # the registry's word for a class that it does not know
        return
    AttentionProcessorRegistry.register(ours, metadata)


def intercepted(query: Tensor) -> bool:
    """Whether a TorchFunctionMode is active, as diffusers' perturbed-attention guidance enters one, that may replace the attention.

    A default device is a mode, too, and does not.
    """
    # torch.overrides.has_torch_function says no of modes that were entered outside of a compiled graph
    if type(query) is not Tensor or not torch._C._len_torch_function_stack():
        return False
    return not all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def through_modes(run: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, **settings: Any) -> Tensor:
    """`F.scaled_dot_product_attention` of these arguments as active modes see it, with `run` in its place where they come to call it.

    Modes come before a tensor subclass: the query is made one for the length of the call, and the last to be asked.
    """

    class Query(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not F.scaled_dot_product_attention:
                return super().__torch_function__(func, types, args, kwargs)
            return run(*(plain(x) for x in args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    def plain(x: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return x.as_subclass(Tensor) if isinstance(x, Query) else x

    return plain(F.scaled_dot_product_attention(query=query.as_subclass(Query), key=key, value=value, **settings))
