"""What the parts of a layer's specs are given while the original runs."""

from typing import Any

import torch
from torch import Tensor

from dit_accel.method.parts.base import Part
from dit_accel.method.parts.call import Call
from dit_accel.operator.composition import image_call
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import of_heads, values_of
from dit_accel.patch.processor import AcceleratedAttention, arranged

Given = tuple[Part, tuple[int, ...], Call]  # a part, the heads that it runs on, and what it is given of them


def calls_of(operator: AcceleratedAttention, arguments: tuple[Any, ...]) -> list[Given]:
    """Every part of the specs that a layer's heads run in the forward under way, with its call; gradients go to the layer's parameters."""
    found: list[Given] = []

    def collect(
        query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None, forward: Forward
    ) -> Tensor:
        params, layer = operator.params(query.device), operator.layer
        scale = forward.scaled(scale, key.shape[2], query.shape[3])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        for spec, heads in forward.groups(layer):
            if spec is None:
                continue
            q, k, v = (of_heads(x.detach(), heads) for x in (query, key, value))
            own = values_of(params, spec, layer, heads)
            call = image_call(q, k, v, layout, forward.plans.get(spec, layout, q.device), own, scale)
            found.extend((part, heads, call) for part in spec.parts())
        return query

    forward = operator.context.forward()
    if forward is not None:
        with torch.autocast(arguments[0].device.type, enabled=False):
            query, key, value, scale, mask = arguments
            arranged(query, key, value, scale, mask, forward, operator.layer.image_only, collect)
    return found
