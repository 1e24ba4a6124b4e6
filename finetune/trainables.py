"""What a distillation trains, and where it is kept between steps and between runs."""

from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from dit_accel.finetune.config import DistillConfig
from dit_accel.patch import ADAPTER, OWN, Patch, activate_lora, plain_name, projection_names


def set_trainable(transformer: Any, patch: Patch, config: DistillConfig) -> dict[str, nn.Parameter]:
    """Freeze everything, then open what the config trains; returns it by name. A LoRA and the method's own
    parameters are float32; full weights keep the model's dtype, see `Masters`.

    A LoRA's first values come from the config's seed. Full weights keep their originals in the patch, for `dense` and `restore`.
    """
    names = projection_names(transformer, patch.originals)
    patch.context.trained |= config.train != "parameters"
    if config.train == "lora" and ADAPTER not in getattr(transformer, "peft_config", {}):
        active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
        lora = LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=names)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            transformer.add_adapter(lora, adapter_name=ADAPTER)
        activate_lora(transformer, active)
    transformer.requires_grad_(False)
    for name, parameter in transformer.named_parameters():
        ours = OWN in name or (config.train == "lora" and f".{ADAPTER}." in name)
        plain = plain_name(name)
        full = config.train == "attention" and plain.rsplit(".", 1)[0] in names
        if full and plain not in patch.weights:
            patch.weights[plain] = parameter.detach().clone()
        if ours:
            parameter.data = parameter.data.float()
        if ours or full:
            parameter.requires_grad_(True)
    return {name: p for name, p in transformer.named_parameters() if p.requires_grad}


class Masters:
    """What the optimizer trains: float32 copies of weights of fewer bits, in which a small step is not lost, and the other parameters
    themselves. `parameters` holds them by name."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for parameter in parameters.values():
            parameter.grad = None  # an interrupted run leaves its last gradients
        wide = {name: p if p.dtype.itemsize >= 4 else nn.Parameter(p.detach().float()) for name, p in parameters.items()}
        self.parameters = wide
        self._copies = [(p, wide[name]) for name, p in parameters.items() if wide[name] is not p]

    def take_gradients(self) -> None:
        """Add the gradients of the model's weights to their copies'; to be called after each backward."""
        for parameter, master in self._copies:
            if parameter.grad is not None:
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    @torch.no_grad()
    def give_values(self) -> None:
        """Round the copies to the model's weights; to be called after each step and after loading."""
        for parameter, master in self._copies:
            parameter.copy_(master)


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: DistillConfig, parameter_rate: float) -> torch.optim.AdamW:
    """AdamW with one group for the method's own parameters, at a rate of theirs, and one for the rest."""
    own = [p for name, p in parameters.items() if OWN in name]
    rest = [p for name, p in parameters.items() if OWN not in name]
    rates = ((own, parameter_rate), (rest, config.learning_rate))
    groups = [{"params": params, "lr": rate, "initial_lr": rate} for params, rate in rates if params]
    return torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=config.weight_decay)


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters and the optimizer's moments by name, as `put_back` takes them."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return tensors


def put_back(tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Restore what `optimizer_tensors` gave, exactly."""
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(tensors[f"value/{name}"])
        keys = [key.split("/", 1)[0] for key in tensors if key.endswith(f"/{name}") and not key.startswith("value/")]
        optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].to(parameter.device if key != "step" else "cpu") for key in keys}
