"""Candidates that learn, with what an adapter has learned."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.adapters.folder import load_adapter, local_folder, other_base, read_config, read_folder, same_base, save_adapter
from dit_accel.adapters.learned import names_of, taken
from dit_accel.errors import PlanError
from dit_accel.method.assignment import Assignment
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.method.spec import AttentionSpec
from dit_accel.patch.anatomy import attention_layers, heads_of
from dit_accel.patch.state import operators_of
from dit_accel.patch.verbs import restore
from dit_accel.planner.candidates import Candidates
from dit_accel.planner.record import Learned, Plan


@dataclass(frozen=True, eq=False)
class Trained:
    """What an adapter has learned. `specs`: its own; `values`: its tensors by their names in the transformer; `record`: which it is."""

    specs: tuple[AttentionSpec, ...]
    values: Values
    record: Learned

    @classmethod
    def read(cls, transformer: Any, path_or_repo: str | Path) -> "Trained":
        """Of a folder of `save_adapter` or its hub id. Raises AdapterError where it does not fit the model, PlanError where it changes more
        than the attention's method."""
        folder = local_folder(path_or_repo)
        found = read_folder(folder, transformer)
        if found.lora or found.weights:
            what = "a LoRA of the attention's projections" if found.lora else "weights of the transformer"
            raise PlanError(
                f"the adapter in {path_or_repo} changes {what} too, which makes all heads another model's: a plan counts what each head's "
                "method changes by itself. Plan without it, or with an adapter that was distilled with train='parameters'"
            )
        if found.base is not None and not same_base(transformer, found.base):
            warnings.warn(other_base(path_or_repo, found.base), stacklevel=4)
        name = folder.resolve().name if Path(path_or_repo).is_dir() else str(path_or_repo)  # of the hub the whole id
        return cls(found.assignment.specs, found.own, Learned(name, found.digest or ""))

    def serves(self, assignment: Assignment) -> bool:
        """Whether an assignment learns any of it."""
        known = names_of(self.values)
        return any(known & spec.make_parameters(heads=1, head_dim=16).state_dict().keys() for spec in assignment.specs)

    def check(self, transformer: Any, specs: Candidates) -> None:
        """Raise AdapterError unless what the adapter has fits the candidates, PlanError where they learn nothing of it."""
        learns = False
        for name, module in attention_layers(transformer).items():
            heads, width = heads_of(transformer, name, module)
            for spec in specs:
                if spec is not None:
                    start = spec.make_parameters(heads=heads, head_dim=width).state_dict()
                    learns |= bool(taken(name, start, self.values, self.record.adapter))
        if not learns:
            raise PlanError(
                f"nothing that the adapter {self.record.adapter} has learned is of a candidate: leave trained out, or name a spec that it "
                "was distilled for in specs"
            )

    def among(self, specs: Candidates) -> Candidates:
        """The default candidates and its own specs. Raises PlanError where these have another order."""
        order = next(spec.order for spec in specs if spec is not None)
        if other := next((spec for spec in self.specs if spec.order != order), None):
            raise PlanError(
                f"the adapter {self.record.adapter} is of {other}, whose order is not that of the default candidates, {order}: name "
                "candidates in specs that have its order"
            )
        return tuple(dict.fromkeys((*specs, *self.specs)))

    def parameters(self, spec: AttentionSpec, layer: str, heads: int, head_dim: int) -> AttentionParameters:
        """Of one layer."""
        start = spec.make_parameters(heads=heads, head_dim=head_dim).state_dict()
        return AttentionParameters(start | taken(layer, start, self.values, self.record.adapter))

    def install(self, transformer: Any) -> None:
        """In the place of an accelerated transformer's start values."""
        with torch.no_grad():
            for name, operator in operators_of(transformer).items():
                for key, value in taken(name, operator.params.state_dict(), self.values, self.record.adapter).items():
                    operator.params.get_parameter(key).copy_(value)


def write_adapter(pipe: Any, path_or_repo: str | Path, made: Plan, folder: Path) -> Path:
    """A plan and what it was trained with as one adapter, for `load_adapter` and `--adapter`; the pipeline is the same afterwards."""
    training = read_config(local_folder(path_or_repo))["training"]
    load_adapter(pipe, path_or_repo, spec=made)
    try:
        return save_adapter(pipe, folder, training=training)
    finally:
        restore(pipe)
