"""Muon with its orthogonalisation in float32.

`torch.optim.Muon` orthogonalises in bfloat16, which a CPU without bfloat16 instructions multiplies hundreds of times slower than float32.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic of Jordan et al. 2024, "Muon: an optimizer for hidden layers"
TOGETHER = 1 << 24  # elements that are orthogonalised at once: small matrices alone leave a CPU waiting, large ones fill memory


def orthogonalise(matrices: Tensor, steps: int = 4) -> Tensor:
    """The semi-orthogonal matrices nearest `matrices` `[B, M, N]`, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised Nesterov momentum for matrices, scaled to the root mean square of an AdamW update.

    Takes parameters `[M, N]`, float32. `lr` means what it means for AdamW (factor 0.2·sqrt(max(M, N)), Liu et al. 2025, eq. 4). A step
    changes nothing where `found_inf` (a tensor, as torch's fused optimizers know it) is 1, and the host need not know.
    """

    found_inf: Tensor | None = None

    def __init__(
        self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure: one gradient, one step
        for group in self.param_groups:
            shapes: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes.setdefault(parameter.shape, []).append((parameter, parameter.grad))
            for shape, pairs in shapes.items():
                count = max(1, TOGETHER // shape.numel())
                for first in range(0, len(pairs), count):
                    self._move(pairs[first : first + count], group)

    def _move(self, pairs: Sequence[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        """Step with parameters of one shape and their gradients, as one tensor: alone, each would be a dozen small kernels."""
        parameters = [parameter for parameter, _ in pairs]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        gradient, before, values = torch.stack([g for _, g in pairs]), torch.stack(momenta), torch.stack(parameters)
        after = before.lerp(gradient, 1 - group["momentum"])
        update = orthogonalise(gradient.lerp(after, group["momentum"]))  # of Nesterov's step
        moved = values.mul(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * 0.2 * max(values.shape[1:]) ** 0.5)
        if self.found_inf is not None:
            left_out = self.found_inf.bool()
            after, moved = torch.where(left_out, before, after), torch.where(left_out, values, moved)
        torch._foreach_copy_(momenta, list(after.unbind()))
        torch._foreach_copy_(parameters, list(moved.unbind()))
