"""Where the values of a model's weights are: in its parameters, or with whoever offloads them between forwards.

accelerate leaves tensors on the meta device and keeps the values in a map from names (`cpu_offload`, `disk_offload`). diffusers' group
offload to disk leaves tensors of the right shape and no values, and keeps those in safetensors files; with streams it keeps pinned copies.
A value that is written to the parameter alone is lost there at the next forward, and one that is read from it is anything.
"""

import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.nn as nn
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from diffusers.hooks.group_offloading import GroupOffloadingHook, ModuleGroup
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.files import write_tensors


@dataclass(frozen=True)
class Place:
    """A tensor of a model, and who has its value: accelerate's map under a key, a group of diffusers', or itself where neither is given."""

    tensor: Tensor
    mapping: Any = None
    key: str = ""
    group: ModuleGroup | None = None

    @property
    def file(self) -> Path | None:
        """The safetensors file that has the value."""
        on_disk = self.group is not None and self.group.offload_to_disk_path is not None
        return Path(self.group.safetensors_file_path) if on_disk else None  # type: ignore[union-attr]


class Holders:
    """Reads and exchanges values of one model's weights, wherever they are. To be made anew for each use: offloading comes and goes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._groups = {id(tensor): group for group in _groups(model) for tensor in _tensors(group)}

    def value(self, name: str) -> Tensor:
        """The value of a parameter or buffer, on whatever device it is. Raises DitAccelError where nobody is known to have it."""
        place = self.place(name)
        if place.file is not None:
            with safe_open(place.file, framework="pt") as file:
                found: Tensor = file.get_tensor(place.group.tensor_to_key[place.tensor])  # type: ignore[union-attr]
            return found
        if place.tensor.device.type != "meta":
            return place.tensor.detach()
        if place.mapping is None or place.key not in place.mapping:
            raise DitAccelError(f"the value of {name} can't be read: it is offloaded in a way that is not supported; remove the offloading")
        held: Tensor = place.mapping[place.key].detach()
        return held.to(place.tensor.dtype)

    def exchange(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give parameters these values and return the values that they had, each on the device of the new one; all or none.

        Values are taken in the parameters' dtype. Raises DitAccelError where a value can't be put, before anything is changed.
        """
        places = self.check(values)
        staged = self._stage(places, values)
        before: dict[str, Tensor] = {}
        try:
            for name, place in places.items():
                before[name] = self._put(name, place, values[name])
            for temporary, file in staged:
                temporary.replace(file)
        except BaseException:
            for name, value in before.items():
                self._put(name, places[name], value)
            raise
        finally:
            for temporary, _ in staged:
                temporary.unlink(missing_ok=True)
        return before

    def check(self, values: Mapping[str, Tensor]) -> dict[str, Place]:
        """Where each value goes. Raises DitAccelError where one can't be put."""
        places = {}
        for name, value in values.items():
            try:
                place = self.place(name)
            except AttributeError as error:
                raise DitAccelError(f"the model has no weight {name} any more, so that its value can't be put back") from error
            tensor = place.tensor
            if not is_plain(tensor):
                raise DitAccelError(
                    f"the original and the trained value of {name} can't be exchanged, because it is a {type(tensor).__name__} of "
                    f"{tensor.dtype}: load the adapter, or call restore(...), before the model is quantised or sharded"
                )
            if tensor.shape != value.shape:
                raise DitAccelError(f"{name} has the shape {tuple(tensor.shape)}, and its other value has {tuple(value.shape)}")
            if tensor.device.type == "meta" and not _can_write(place):
                raise DitAccelError(f"the value of {name} is offloaded in a way that is not supported: remove the offloading first")
            places[name] = place
        return places

    def place(self, name: str) -> Place:
        """Where a parameter or buffer is; the name may lack the level that PEFT puts in. Raises AttributeError where there is none."""
        path, _, leaf = name.rpartition(".")
        module: Any = self._model.get_submodule(path)
        while leaf not in module._parameters and leaf not in module._buffers and hasattr(module, "base_layer"):
            module, path = module.base_layer, f"{path}.base_layer"
        tensor: Tensor = getattr(module, leaf)
        mapping, key = self._map(path, leaf) if tensor.device.type == "meta" else (None, "")
        return Place(tensor, mapping, key, self._groups.get(id(tensor)))

    def _map(self, path: str, leaf: str) -> tuple[Any, str]:
        """The map and key under which accelerate has a tensor: with its own module, or with one above that places all below it."""
        parts = path.split(".") if path else []
        for depth in range(len(parts), -1, -1):
            for hook in _align_hooks(self._model.get_submodule(".".join(parts[:depth]))):
                if hook.offload and hook.weights_map is not None and (depth == len(parts) or hook.place_submodules):
                    mapping, key = hook.weights_map, ".".join([*parts[depth:], leaf])
                    while isinstance(mapping, PrefixedDataset):
                        mapping, key = mapping.dataset, f"{mapping.prefix}{key}"
                    return mapping, key
        return None, ""

    def _put(self, name: str, place: Place, value: Tensor) -> Tensor:
        """Set one value; returns the one before. A file is not written here."""
        before = self.value(name).to(value.device)
        tensor, value = place.tensor, value.detach()
        if place.mapping is not None:
            value = value.to("cpu", tensor.dtype)
            if isinstance(place.mapping, OffloadedWeightsLoader):
                place.mapping.state_dict[place.key] = value  # goes before what is on the disk
            else:
                place.mapping[place.key] = value
        elif place.file is None:
            tensor.data = value.to(tensor.device, tensor.dtype)
            pinned = place.group.cpu_param_dict if place.group is not None else {}
            if tensor in pinned:  # the copy that a stream loads from
                pinned[tensor] = ModuleGroup._to_cpu(tensor, place.group.low_cpu_mem_usage)  # type: ignore[union-attr]
        return before

    def _stage(self, places: Mapping[str, Place], values: Mapping[str, Tensor]) -> list[tuple[Path, Path]]:
        """Write the files of offloaded groups with their new values under temporary names; (temporary, file) of each."""
        changes: dict[Path, dict[str, Tensor]] = {}
        for name, place in places.items():
            if place.file is not None:
                key = place.group.tensor_to_key[place.tensor]  # type: ignore[union-attr]
                changes.setdefault(place.file, {})[key] = values[name].detach().to("cpu", place.tensor.dtype)
        staged: list[tuple[Path, Path]] = []
        try:
            for file, changed in changes.items():
                temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
                staged.append((write_tensors(temporary, load_file(file) | changed), file))
        except BaseException:
            for temporary, _ in staged:
                temporary.unlink(missing_ok=True)
            raise
        return staged


def is_plain(tensor: Tensor) -> bool:
    """Whether a weight is an ordinary parameter of floating point: not quantised, not sharded."""
    return type(tensor) is nn.Parameter and tensor.dtype.is_floating_point and type(tensor.data) is Tensor


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights come and go with every forward, so that nothing may change them in place or add layers to them."""
    return next(_groups(model), None) is not None or any(p.device.type == "meta" for p in model.parameters())


def placed_by_others(model: nn.Module) -> bool:
    """Whether accelerate has offloaded weights with a module above their own, by names that are right as long as no module is renamed."""
    return any(hook.offload and hook.place_submodules for module in model.modules() for hook in _align_hooks(module))


def _groups(model: nn.Module) -> Iterator[ModuleGroup]:
    """The groups that diffusers offloads."""
    seen = set()
    for module in model.modules():
        for hook in getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values():
            if isinstance(hook, GroupOffloadingHook) and id(hook.group) not in seen:
                seen.add(id(hook.group))
                yield hook.group


def _tensors(group: ModuleGroup) -> list[Tensor]:
    """The tensors whose values a group has, apart from themselves."""
    return list(group.tensor_to_key if group.offload_to_disk_path is not None else group.cpu_param_dict)


def _align_hooks(module: nn.Module) -> list[AlignDevicesHook]:
    """accelerate's hooks of a module that place its weights."""
    hook = getattr(module, "_hf_hook", None)
    return [h for h in getattr(hook, "hooks", [hook]) if isinstance(h, AlignDevicesHook)]


def _can_write(place: Place) -> bool:
    return isinstance(place.mapping, dict | OffloadedWeightsLoader) and place.key in place.mapping
