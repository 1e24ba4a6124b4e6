"""An adapter that was made in diffusers, on a model of ComfyUI: its method, the method's own parameters, and its LoRA."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dit_accel.adapters.folder import LORA, WEIGHTS, local_folder, parse_assignment, read_config, read_tensors
from dit_accel.errors import AdapterError, UnsupportedModelError
from dit_accel.integrations.comfyui.accelerator import layers_of
from dit_accel.integrations.comfyui.hosts import SOURCES, host_of
from dit_accel.method.assignment import Assignment
from dit_accel.method.parameters import AttentionParameters
from dit_accel.patch.heads import Layer, joint_parameters


@dataclass(frozen=True)
class AdapterForHost:
    """`parameters`: of the method, by the layer's name; `lora`: tensors in diffusers' own format, none where there is no LoRA."""

    assignment: Assignment
    parameters: dict[str, AttentionParameters]
    lora: dict[str, Tensor]

    def with_lora(self, model: Any, strength: float) -> Any:
        """The model (a `ModelPatcher`), or a clone of it with the LoRA. Raises AdapterError unless ComfyUI finds every layer of it."""
        if not self.lora:
            return model
        import comfy.lora  # ComfyUI's own, which knows how a model's layers are named in diffusers
        import comfy.lora_convert

        places = comfy.lora.model_lora_keys_unet(model.model, {})
        patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(self.lora), places, log_missing=False)
        clone = model.clone()
        applied, layers = clone.add_patches(patches, strength), sum(".lora_A." in name for name in self.lora)
        if not len(applied) == len(patches) == layers:
            raise AdapterError(
                f"ComfyUI finds places for {len(applied)} of the {layers} layers of the adapter's LoRA in this "
                f"{type(model.model.diffusion_model).__name__}, under the names of diffusers: use the adapter in diffusers"
            )
        return clone


def read_adapter(place: str, transformer: Any) -> AdapterForHost:
    """The adapter in a folder or on the hub, checked against a transformer. Raises AdapterError where it does not fit."""
    host = host_of(transformer)
    if host is None:
        raise UnsupportedModelError(f"the model is a {type(transformer).__name__}, for which dit_accel has no adapters in ComfyUI")
    folder, kind = local_folder(place), type(transformer).__name__
    config = read_config(folder)
    if config["base_model_class"] not in SOURCES[kind]:
        expected = " or a ".join(SOURCES[kind])
        raise AdapterError(f"the adapter is for a {config['base_model_class']}, but a {kind} of ComfyUI is a {expected} in diffusers")
    if full := sorted(set(config["files"]) - {WEIGHTS, LORA}):
        raise AdapterError(f"{folder} has weights of the model itself ({', '.join(full)}), not supported in ComfyUI: train a LoRA")
    assignment = parse_assignment(folder, config)
    tensors = {name: read_tensors(folder / name, digest) for name, digest in config["files"].items()}
    layers = {layer.name: layer for pair in layers_of(transformer, host).values() for layer in pair}
    for name, (heads, width) in config["layers"].items():
        found = layers.get(name)
        if found is None or (found.heads, found.head_dim) != (heads, width):
            got = "no such layer" if found is None else f"{found.heads} of {found.head_dim}"
            raise AdapterError(f"the adapter is for {name} with {heads} heads of {width}, but this {kind} has {got}")
    parameters = {name: _parameters(layers[name], assignment, tensors[WEIGHTS]) for name in config["layers"]}
    if extra := sorted(set(tensors[WEIGHTS]) - {"format"} - {_key(name, p) for name, own in parameters.items() for p in own.state_dict()}):
        raise AdapterError(f"{folder / WEIGHTS} has tensors that its method does not have: {', '.join(extra[:4])}")
    return AdapterForHost(assignment, parameters, tensors.get(LORA, {}))


def _key(layer: str, parameter: str) -> str:
    return f"layers.{layer.replace('.', '__')}.{parameter}"


def _parameters(layer: Layer, assignment: Assignment, tensors: dict[str, Tensor]) -> AttentionParameters:
    made = joint_parameters(assignment.specs_of(layer.name), layer)
    for name, start in made.state_dict().items():
        value = tensors.get(_key(layer.name, name))
        if value is None or value.shape != start.shape:
            got = "nothing" if value is None else tuple(value.shape)
            raise AdapterError(f"the adapter has {got} for {name} of {layer.name}, not {tuple(start.shape)}")
    made.load_state_dict({name: tensors[_key(layer.name, name)] for name in made.state_dict()})
    return made.requires_grad_(False)
