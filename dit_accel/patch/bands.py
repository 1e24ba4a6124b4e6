"""A layer under a ring degree: its heads by the specs that they have, each on this process's part of the sequence."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.method.assignment import Group
from dit_accel.method.parameters import Values
from dit_accel.parallel import halo
from dit_accel.parallel.exchange import gathered_mask, joined
from dit_accel.parallel.halo import Spread
from dit_accel.parallel.ranks import Ranks
from dit_accel.patch import masks
from dit_accel.patch.context import Context
from dit_accel.patch.heads import Layer, by_groups, of_heads, values_of
from dit_accel.patch.sharing import gathers


def by_bands(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None, spread: Spread, context: Context, layer: Layer,
    params: Values,
) -> Tensor:  # fmt: skip
    """The output `[B, H, own tokens, D]` of a call that is taken; `mask`: over the whole sequence."""
    forward, layout = context.forward(), spread.layout
    if forward is None:
        raise RuntimeError("an accelerated attention module's operator was called outside its transformer's forward")
    bias = None if mask is None or forward.family.mask == "ones" else masks.text_bias(mask, layout, len(query))
    scale = forward.scaled(scale, layout.tokens, query.shape[3])

    def run(group: Group) -> Tensor:
        spec, heads = group
        q, k, v = (of_heads(x, heads) for x in (query, key, value))
        if spec is None:
            return _dense(q, k, v, scale, bias, spread)
        own = values_of(params, spec, layer, heads)
        return halo.attend_bands(q, k, v, spec, spread, forward.plans, own, scale, context.backend, bias)

    return by_groups(forward.groups(layer), run)


def _dense(query: Tensor, key: Tensor, value: Tensor, scale: float | None, bias: Tensor | None, spread: Spread) -> Tensor:
    """Heads `[B, some, own tokens, D]` with the original attention."""
    streams = list(zip(spread.texts, spread.images, strict=True))
    if not spread.layout.text_first:
        streams = [(image, text) for text, image in streams]
    tokens = [sum(sizes) for sizes in streams]
    keys, values = halo.gathered(key, value, spread.group, spread.rank, tokens)
    if bias is None:
        return F.scaled_dot_product_attention(query, keys, values, scale=scale)
    keys, values = (joined(x.split(tokens, 2), streams, 2) for x in (keys, values))
    return F.scaled_dot_product_attention(query, keys, values, masks.over_keys(bias, spread.layout).to(query.dtype), scale=scale)


def original(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, config: object, primitive: Callable[..., Tensor]
) -> Tensor | None:
    """The original attention of this process's queries `[B, own tokens, H, D]` over all keys, by `primitive`; None for a call that
    diffusers runs in parallel itself.

    Under a ring degree its own requires a backend that returns the mass of the softmax, which the default one does not (0.42.1).
    """
    ranks, tokens = Ranks.of(config), key.shape[1]
    if ranks is None or not ranks.bands or query.shape[1] != tokens or not (mask is None or gathers(mask, tokens)):
        return None
    counts = ranks.counts(tokens, query.device)
    keys, values = halo.gathered(key.transpose(1, 2), value.transpose(1, 2), ranks.group, ranks.rank, counts)
    over = None if mask is None else torch.cat(gathered_mask(mask, counts, ranks.group), -1)
    return primitive(query, keys.transpose(1, 2), values.transpose(1, 2), over)
