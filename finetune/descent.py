"""What the first stage finds by gradient descent: of the layers' outputs, and of what is learned to choose blocks."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.finetune.calls import calls_of
from dit_accel.finetune.losses import cosine_factor, relative_error
from dit_accel.finetune.processes import sum_gradients, summed
from dit_accel.finetune.session import Distillation
from dit_accel.finetune.trainables import load_optimizer_tensors, optimizer_tensors
from dit_accel.method.parts.base import Fit
from dit_accel.method.parts.choices import Chooser
from dit_accel.patch.processor import AcceleratedAttention


def rates_of(operator: AcceleratedAttention) -> dict[str, float]:
    """Of a layer's tensors the rates that their parts name, see `Part.rates`."""
    return {name: rate for spec in operator.specs for part in spec.parts() for name, rate in part.rates(operator.head_dim).items()}


class Descent:
    """AdamW on the relative error of each layer's output; the layers' parameters are apart, so one optimizer serves all."""

    way: Fit = "descent"

    def __init__(self, operators: Mapping[str, AcceleratedAttention], run: Distillation) -> None:
        self.run = run
        self.parameters: dict[str, nn.Parameter] = {}
        groups: dict[float, list[nn.Parameter]] = {}
        for layer, operator in operators.items():
            ways, rates = operator.fit, rates_of(operator)
            for name, parameter in operator.params.named_parameters():
                if ways[name] == self.way:
                    parameter.requires_grad_(True)
                    self.parameters[f"{layer}.{name}"] = parameter
                    groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        given = [{"params": params, "factor": factor} for factor, params in (groups or {1.0: []}).items()]
        self.optimizer = torch.optim.AdamW(given, run.parameter_rate, betas=(0.9, 0.99), weight_decay=0.0)
        self.optimizer.zero_grad()  # an interrupted run leaves its last gradients

    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        if out.requires_grad:  # else nothing of this layer descends
            (relative_error(out, target) / self.run.config.batch_size).backward()

    def update(self, step: int) -> None:
        sum_gradients(self.parameters.values())
        rate = self.run.parameter_rate * cosine_factor(step, self.run.parameter_steps, warmup=0)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> dict[str, Tensor]:
        return optimizer_tensors(self.parameters, [self.optimizer])

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        load_optimizer_tensors(tensors, self.parameters, [self.optimizer])


class ChoiceDescent(Descent):
    """The same on the loss of the parts that choose blocks. `losses`: of the calls since they were last taken out."""

    way: Fit = "choice"

    def __init__(self, operators: Mapping[str, AcceleratedAttention], run: Distillation) -> None:
        super().__init__({name: operator for name, operator in operators.items() if self.way in operator.fit.values()}, run)
        self.losses: list[Tensor] = []

    def learn(self, operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        for loss in choice_losses(operator, arguments):
            (loss / self.run.config.batch_size).backward()
            self.losses.append(loss.detach())


def choice_losses(operator: AcceleratedAttention, arguments: tuple[Any, ...]) -> list[Tensor]:
    """The loss of each part of a layer that chooses blocks, in the forward under way."""
    if "choice" not in operator.fit.values():
        return []
    return [part.loss(call) for part, _, call in calls_of(operator, arguments) if isinstance(part, Chooser)]


def mean_of(losses: Sequence[Tensor], device: torch.device) -> float | None:
    """Of all processes' losses; None where there are none. Sent from the model's device: not all backends send from elsewhere."""
    total = torch.stack(list(losses)).double().sum() if losses else torch.zeros((), dtype=torch.float64, device=device)
    (found,) = summed([torch.stack([total, total.new_tensor(float(len(losses)))])])
    return float(found[0] / found[1]) if found[1] else None
