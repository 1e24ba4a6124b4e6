"""The learned part of an attention method, as one nn.Module per layer."""

from typing import NamedTuple

import torch
import torch.nn as nn


class Affine(NamedTuple):
    """A projection's tensors."""

    weight: torch.Tensor
    bias: torch.Tensor


class Values(NamedTuple):
    """The tensors of `AttentionParameters`; absent parts are None."""

    proj: Affine | None
    offset: torch.Tensor | None
    spatial_weight: torch.Tensor | None


class Projection(nn.Module):
    """Weight `[D, D]` and bias `[D]`, zero at start. No nn.Linear, so that LoRA, quantisation and casting by type leave it alone."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(head_dim, head_dim))
        self.bias = nn.Parameter(torch.zeros(head_dim))

    def forward(self, device: torch.device | None = None) -> Affine:
        """Copies of the tensors, see `AttentionParameters.forward`."""
        return Affine(_copy(self.weight, device), _copy(self.bias, device))


class AttentionParameters(nn.Module):
    """Start values of what a method learns; absent parts are None. Shared by all heads unless `[heads]` is said.

    `proj`: SLA's projection. `offset` `[heads]`: added to the rest's log mass. `spatial_weight` `[f, f]`: CLEAR's pooling weights.
    """

    def __init__(self, projection: int | None = None, offset: int | None = None, factor: int | None = None) -> None:
        super().__init__()
        self.proj = Projection(projection) if projection is not None else None
        self.offset = nn.Parameter(torch.zeros(offset)) if offset is not None else None
        self.spatial_weight = nn.Parameter(torch.full((factor, factor), 1 / factor**2)) if factor is not None else None

    def forward(self, device: torch.device | None = None) -> Values:
        """Copies of the tensors, made while offloading hooks have them in place: afterwards those change what a parameter holds.

        `device`: where they are used, unless that is where they are. A model that was offloaded before it was accelerated differs.
        """
        parts = (None if part is None else _copy(part, device) for part in (self.offset, self.spatial_weight))
        return Values(None if self.proj is None else self.proj(device), *parts)


def _copy(tensor: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return tensor.to(device, copy=True)
