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
    """An accelerated attention module. `image_only`: its sequence is the drawn image's, without text."""

    name: str
    heads: int
    head_dim: int
    image_only: bool


def joint_parameters(specs: Sequence[AttentionSpec], layer: Layer) -> AttentionParameters:
    """The parameters of all specs at their start values, each name once: specs that learn a tensor of one name share it.

    Raises ValueError where one name has two shapes.
    """
    joint: dict[str, Tensor] = {}
    for spec in specs:
        for name, parameter in spec.make_parameters(heads=layer.heads, head_dim=layer.head_dim).named_parameters():
            if joint.setdefault(name, parameter.detach()).shape != parameter.shape:
                raise ArgumentError(
                    f"the specs of {layer.name} share what they learn by name, but {spec} has {name} of the shape "
                    f"{tuple(parameter.shape)} and another of them {tuple(joint[name].shape)}: give the layer specs of one shape"
                )
    return AttentionParameters(joint)


def joint_fit(specs: Sequence[AttentionSpec], layer: Layer) -> str | None:
    """How the first stage of a distillation finds what a layer learns: by least squares where one of its specs is found so."""
    ways = {spec.fit(heads=layer.heads, head_dim=layer.head_dim) for spec in specs}
    return next((way for way in ("least_squares", "descent") if way in ways), None)


@functools.lru_cache(maxsize=1024)
def _shapes(spec: AttentionSpec, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    made = spec.make_parameters(heads=heads, head_dim=head_dim)
    return {name: tuple(parameter.shape) for name, parameter in made.named_parameters()}


def _axis(spec: AttentionSpec, layer: Layer, name: str) -> int | None:
    """Which axis of a parameter is that of the heads: the one that grows with them."""
    shape, longer = (_shapes(spec, heads, layer.head_dim)[name] for heads in (layer.heads, layer.heads + 1))
    return next((axis for axis, (a, b) in enumerate(zip(shape, longer, strict=True)) if a != b), None)


def values_of(values: Values, spec: AttentionSpec, layer: Layer, heads: Sequence[int]) -> Values:
    """What one spec uses of a layer's learned tensors; of those with an axis of heads, the rows of these heads."""
    own = {name: values[name] for name in _shapes(spec, layer.heads, layer.head_dim)}
    if len(heads) == layer.heads:
        return own
    axes = {name: _axis(spec, layer, name) for name in own}
    return {name: value if (axis := axes[name]) is None else of_heads(value, heads, axis) for name, value in own.items()}


def parameters_of(params: AttentionParameters, spec: AttentionSpec, layer: Layer, heads: Sequence[int]) -> AttentionParameters:
    """The parameters of one spec on some heads of a layer, copied."""
    return AttentionParameters({name: value.detach() for name, value in values_of(params(), spec, layer, heads).items()})


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
