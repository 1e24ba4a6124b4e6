"""The learned part of an attention method, as one nn.Module per layer."""

from collections.abc import Mapping

import torch
import torch.nn as nn
from torch import Tensor

Values = dict[str, Tensor]  # learned tensors by name, as the parts of a spec call them


class AttentionParameters(nn.Module):
    """The learned tensors of a spec's parts by the names that the parts give them; `proj.weight` is `weight` of a module `proj`.

    The modules are of this class, no nn.Linear, so that LoRA, quantisation and casting by type leave them alone.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        groups: dict[str, dict[str, Tensor]] = {}
        for name, value in (tensors or {}).items():
            group, dot, rest = name.partition(".")
            if dot:
                groups.setdefault(group, {})[rest] = value
            else:
                self.register_parameter(name, nn.Parameter(value))
        for group, inner in groups.items():
            self.add_module(group, AttentionParameters(inner))

    def forward(self, device: torch.device | None = None) -> Values:
        """Copies of the tensors, made while offloading hooks have them in place: afterwards those change what a parameter holds.

        `device`: where they are used, unless that is where they are. A model that was offloaded before it was accelerated differs.
        """
        values = {name: parameter.to(device, copy=True) for name, parameter in self._parameters.items() if parameter is not None}
        for group, module in self._modules.items():
            if module is not None:
                values |= {f"{group}.{name}": value for name, value in module(device).items()}
        return values
