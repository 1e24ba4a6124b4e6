"""Least squares for what the layers' outputs are linear in: what its fitters share, and convolutions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.errors import DistillationError
from dit_accel.finetune.processes import summed
from dit_accel.method.parts.base import Fit
from dit_accel.patch.processor import AcceleratedAttention

SOLVED: tuple[Fit, ...] = ("least_squares", "least_squares_by_channel")
# of the sums of earlier steps, where what a projection multiplies changes from step to step: about five steps count. Planted temperature
# and projection, 48 steps at 0.1: relative error 0.0006, at 0.5 0.0006, at 0.9 0.0008, at 1 (all alike) 0.0014, projection alone 0.0028
KEPT = 0.8
CHANNEL_RIDGE = 0.1  # of a few numbers for a channel, which are not sensitive to it (0.003 to 0.3)


def _changes(operator: AcceleratedAttention) -> bool:
    """Whether a spec of a layer has tensors that are solved for, and others that change meanwhile."""
    layer = operator.layer
    ways = [set(spec.fit(heads=layer.heads, head_dim=layer.head_dim).values()) - {None} for spec in operator.specs]
    return any(len(found) > 1 and bool(found & set(SOLVED)) for found in ways)


def _alternates(operator: AcceleratedAttention) -> bool:
    """Whether a layer has a projection and a convolution, which are solved for in turn."""
    return set(SOLVED) <= set(operator.fit.values())


def _waits(operator: AcceleratedAttention, step: int, way: Fit) -> bool:
    """Whether it is the other's turn in a step."""
    return _alternates(operator) and SOLVED[step % len(SOLVED)] != way


def _solved_tensors(operator: AcceleratedAttention, way: Fit) -> dict[str, nn.Parameter]:
    """A layer's tensors that are found in a way, by the layer's name and their own."""
    ways = operator.fit
    return {f"{operator.name}.{name}": tensor for name, tensor in operator.params.named_parameters() if ways[name] == way}


def solved(sums: Tensor, ridge: float) -> Tensor:
    """`[..., P, K]` of normal equations `[..., P, P + K]`, the ridge a share of the regressors' mean square; zeros where all of them are.

    By Cholesky's method: the batched `solve` of some CPUs' libraries hangs.
    """
    width = sums.shape[-2]
    left, right = sums[..., :width], sums[..., width:]
    mean = left.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping = torch.where(mean > 0, ridge * mean, 1.0)[..., None, None]
    identity = torch.eye(width, dtype=left.dtype, device=left.device)
    return torch.cholesky_solve(right, torch.linalg.cholesky(left + damping * identity))


class Solver(ABC):
    """Least squares over all calls so far, layer by layer. `sums`: of each layer, float64 normal equations Xᵀ[X, Y]; `kept`: the share of
    them that a step leaves."""

    way: ClassVar[Fit]

    def __init__(self, operators: Mapping[str, AcceleratedAttention]) -> None:
        self.operators = operators
        self.kept = {name: KEPT if _changes(operator) else 1.0 for name, operator in operators.items()}
        self.sums = {name: self._zeros(operator) for name, operator in operators.items()}
        self._batch = {name: torch.zeros_like(total) for name, total in self.sums.items()}

    @staticmethod
    @abstractmethod
    def _zeros(operator: AcceleratedAttention) -> Tensor:
        """Of a layer's shape."""

    @abstractmethod
    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        """Add one call to the step's sums, see `fit.Fitter`."""

    @staticmethod
    @abstractmethod
    def _solve(operator: AcceleratedAttention, sums: Tensor) -> None:
        """Set the layer's tensors to what sums, of which not all are zero, lead to."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        for name, total in zip(self.sums, summed(list(self._batch.values())), strict=True):
            self.sums[name].mul_(self.kept[name]).add_(total)
            self._batch[name].zero_()
            if self.sums[name].any() and not _waits(self.operators[name], step, self.way):  # else the layer was never called
                self._solve(self.operators[name], self.sums[name])

    def tensors(self) -> dict[str, Tensor]:
        """The sums by layer, and what they do not tell: what was solved for in another step than the last."""
        found = dict(self.sums)
        for operator in self.operators.values():
            if _alternates(operator):
                found |= {name: tensor.detach() for name, tensor in _solved_tensors(operator, self.way).items()}
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse. Raises DistillationError where the sums are another version's."""
        for name, total in self.sums.items():
            if (shape := tensors[name].shape) != total.shape:
                shapes = f"{tuple(shape)}, not {tuple(total.shape)}"
                raise DistillationError(f"the checkpoint's sums of {name} have the shape {shapes}: another version made it; delete it")
            total.copy_(tensors[name])
            own = _solved_tensors(self.operators[name], self.way)
            if _alternates(self.operators[name]):
                for key, tensor in own.items():
                    tensor.copy_(tensors[key])
            elif total.any():
                self._solve(self.operators[name], total)


class ChannelLeastSquares(Solver):
    """The tensors `[H, D, ...]` of a part of which each channel of the output is linear in its own numbers alone: each channel by
    ridge-regularised least squares, weighted as a projection's. `sums`: of each layer, Xᵀ[X, Y] `[H, D, P, P + 1]`, P numbers a channel.
    """

    way = "least_squares_by_channel"

    @staticmethod
    def _zeros(operator: AcceleratedAttention) -> Tensor:
        own = list(_solved_tensors(operator, "least_squares_by_channel").values())
        numbers = sum(tensor[0, 0].numel() for tensor in own)
        return torch.zeros(*own[0].shape[:2], numbers, numbers + 1, dtype=torch.float64, device=own[0].device)

    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        own = list(_solved_tensors(operator, "least_squares_by_channel").values())
        regressors = _regressors(operator, arguments, own)
        if regressors is None:
            return
        values = torch.cat([tensor.detach().reshape(*tensor.shape[:2], -1) for tensor in own], 2).double()  # [H, D, P]
        size = target.double().square().sum().clamp_min(1e-12)
        for head in range(values.shape[0]):  # float64 is large
            x = torch.stack([r[:, head].flatten(0, 1) for r in regressors], -1).double().transpose(0, 1)  # [D, B·N, P]
            missing = (target - out.detach())[:, head].double().flatten(0, 1).T[..., None] + x @ values[head, :, :, None]
            self._batch[operator.name][head] += x.mT @ torch.cat([x, missing], -1) / size

    @staticmethod
    def _solve(operator: AcceleratedAttention, sums: Tensor) -> None:
        own = list(_solved_tensors(operator, "least_squares_by_channel").values())
        found = solved(sums, CHANNEL_RIDGE)[..., 0].split([tensor[0, 0].numel() for tensor in own], -1)
        for tensor, numbers in zip(own, found, strict=True):
            tensor.copy_(numbers.reshape(tensor.shape))


def _regressors(operator: AcceleratedAttention, arguments: tuple[Any, ...], own: list[nn.Parameter]) -> list[Tensor] | None:
    """How the operator's output `[B, H, N, D]` changes with each of a channel's numbers, in all channels at once; None where the call's
    specs have none of the tensors.

    The derivative's derivative by what it is multiplied with, so that the attention itself is computed once.
    """
    asked = {parameter: parameter.requires_grad for parameter in operator.params.parameters()}
    try:
        for parameter in asked:
            parameter.requires_grad_(any(parameter is tensor for tensor in own))
        with torch.enable_grad():
            out = operator.forward(*_detached(arguments))
            if not out.requires_grad:
                return None
            pull = torch.zeros_like(out, requires_grad=True)
            pulled = torch.autograd.grad(out, own, pull, create_graph=True, materialize_grads=True)
            return [column for gradient in pulled for column in _columns(gradient, pull)]
    finally:
        for parameter, asks in asked.items():
            parameter.requires_grad_(asks)


def _columns(gradient: Tensor, pull: Tensor) -> list[Tensor]:
    """Of a gradient `[H, D, ...]`, linear in `pull`, the derivative by it of each number of a channel, summed over channels."""
    if not gradient.requires_grad:
        return [torch.zeros_like(pull)] * gradient[0, 0].numel()
    flat, found = gradient.reshape(*gradient.shape[:2], -1), []
    for number in range(flat.shape[2]):
        direction = torch.zeros_like(flat)
        direction[..., number] = 1
        found.append(torch.autograd.grad(flat, pull, direction, retain_graph=True)[0])
    return found


def _detached(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
