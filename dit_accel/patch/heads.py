"""A layer whose heads run several specs: what it learns is shared by their names, and each spec runs on the heads that it has."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.method.assignment import Group
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.method.spec import AttentionSpec


@dataclass(frozen=True)
class Layer:
    """An accelerated attention module. `alone`: its sequence is the drawn image's alone."""

    name: str
    heads: int
    head_dim: int
    alone: bool


def joint_parameters(specs: Sequence[AttentionSpec], layer: Layer) -> AttentionParameters:
    """The parameters of all specs at their start values, each name once: specs that learn a tensor of one name share it.

    Raises ValueError where one name has two shapes.
    """
    joint = specs[0].make_parameters(heads=layer.heads, head_dim=layer.head_dim)
    for spec in specs[1:]:
        own = spec.make_parameters(heads=layer.heads, head_dim=layer.head_dim)
        shapes = {name: tuple(parameter.shape) for name, parameter in joint.named_parameters()}
        for name, parameter in own.named_parameters():
            if shapes.get(name, tuple(parameter.shape)) != tuple(parameter.shape):
                raise ArgumentError(
                    f"the specs of {layer.name} share what they learn by name, but {spec} has {name} of the shape "
                    f"{tuple(parameter.shape)} and another of them {shapes[name]}: give the layer specs of one shape"
                )
        for name in Values._fields:
            if getattr(joint, name) is None:
                setattr(joint, name, getattr(own, name))
    return joint


@functools.lru_cache(maxsize=1024)
def _shapes(spec: AttentionSpec, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    made = spec.make_parameters(heads=heads, head_dim=head_dim)
    return {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}


def _axis(spec: AttentionSpec, layer: Layer, name: str) -> int | None:
    """Which axis of a parameter is that of the heads: the one that grows with them."""
    shape, longer = (_shapes(spec, heads, layer.head_dim)[name] for heads in (layer.heads, layer.heads + 1))
    return next((axis for axis, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b), None)


def values_of(values: Values, spec: AttentionSpec, layer: Layer, heads: Sequence[int]) -> Values:
    """What one spec uses of a layer's parameters; of those with an axis of heads, the rows of these heads."""
    names = {name.partition(".")[0]: name for name in _shapes(spec, layer.heads, layer.head_dim)}

    def own(name: str) -> object:
        value = getattr(values, name)
        if name not in names:
            return None
        axis = _axis(spec, layer, names[name])
        return value if axis is None else of_heads(value, heads, axis)

    return Values(*(own(name) for name in Values._fields))  # type: ignore[arg-type]


@torch.no_grad()
def parameters_of(params: AttentionParameters, spec: AttentionSpec, layer: Layer, heads: Sequence[int]) -> AttentionParameters:
    """The parameters of one spec on some heads of a layer, copied."""
    own = spec.make_parameters(heads=len(heads), head_dim=layer.head_dim)
    for name, parameter in own.named_parameters():
        value, axis = params.get_parameter(name), _axis(spec, layer, name)
        parameter.data = (value if axis is None else of_heads(value, heads, axis)).clone()
    return own


@functools.lru_cache(maxsize=1024)
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it must serve training as well
        return torch.tensor(heads, device=device)


def of_heads(x: Tensor, heads: Sequence[int], axis: int = 1) -> Tensor:
    """Some heads of a tensor, in ascending order: a view where they follow each other, else a copy."""
    if len(heads) == x.shape[axis]:
        return x
    if heads[-1] - heads[0] + 1 == len(heads):
        return x.narrow(axis, heads[0], len(heads))
    return x.index_select(axis, _index(tuple(heads), x.device))


def by_groups(groups: Sequence[Group], run: Callable[[Group], Tensor]) -> Tensor:
    """The output `[B, H, N, D]` of a layer, `run` giving that of each group's heads."""
    if len(groups) == 1:
        return run(groups[0])
    out = torch.cat([run(group) for group in groups], 1)
    order = [head for group in groups for head in group.heads]
    if order == sorted(order):
        return out
    places = tuple(sorted(range(len(order)), key=order.__getitem__))
    return out.index_select(1, _index(places, out.device))
