"""Context parallelism of a model: what it requires, checked before anything is changed, and how a call's tokens are spread over ranks."""

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.method.assignment import Assignment
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel import halo
from dit_accel.parallel.balance import heads_of_ranks
from dit_accel.parallel.exchange import Exchange, gathered_mask, joined
from dit_accel.parallel.halo import Spread
from dit_accel.parallel.ranks import Ranks, context_parallel, refusal
from dit_accel.patch.context import Context
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import Layer
from dit_accel.pipelines import class_of
from dit_accel.pipelines.family import Family

COMPILED = "context parallelism in a compiled graph"
OTHER = "parallelism of another kind than diffusers' ContextParallelConfig(ulysses_degree=...) or (ring_degree=...)"
AS_ONE = "a sequence of text and image that is split as one, under a ring degree"

# what diffusers' own plan of a class gets wrong, as of 0.42.1: the class, which of its models, and why
BROKEN: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("LTX2VideoTransformer3DModel", lambda model: True, "it does not split the rotary positions of the attention between sound and video"),
    (
        "HeliosTransformer3DModel",
        lambda model: model.config.is_amplify_history,
        "its attention finds the earlier frames, whose keys it scales, by the length of the whole sequence, and is given a part",
    ),
)


def check_sharing(model: Any, config: Any, family: Family, layers: list[Layer], assignment: Assignment) -> None:
    """Raise ValueError where these layers of a model can't run their methods under a parallel configuration, None for none."""
    context = context_parallel(config)
    if context is None:
        return
    name = type(model).__name__
    if family.sharded is None:
        raise UnsupportedModelError(
            f"context parallelism of an accelerated {name} is not supported, because family {family.name!r} does not say how its "
            "sequence is split: declare it in Family(sharded=...)"
        )
    for broken, concerned, why in BROKEN:
        if broken == class_of(model).__name__ and concerned(model):
            raise UnsupportedModelError(f"diffusers' context parallelism of {name} is wrong: {why}. Run it in one process")
    if reason := refusal(config, {layer.name: layer.heads for layer in layers}):
        raise ArgumentError(f"{name} can't be accelerated under context parallelism: {reason}")
    for spec in assignment.specs if context.ring_degree > 1 else ():
        if reason := halo.refusal(spec):
            raise ArgumentError(
                f"{name} can't be accelerated under context parallelism: a ring degree is not supported: {reason}. {halo.INSTEAD}"
            )
    for layer in layers:
        processor = model.get_submodule(layer.name).processor
        if not hasattr(processor, "_parallel_config"):
            raise UnsupportedModelError(
                f"{type(processor).__name__} of {layer.name} does not know of context parallelism: diffusers would compute attention "
                "among one process's tokens alone. Set another processor, or do without context parallelism"
            )
    _check_backends(model)


def _check_backends(model: Any) -> None:
    """Raise ValueError where an attention module has a backend that would compute attention among one process's tokens; diffusers itself
    looks at the first module alone."""
    able = sorted(AttentionBackendName(name).value for name in _AttentionBackendRegistry._supports_context_parallel)
    for name, module in model.named_modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None and AttentionBackendName(chosen).value not in able:
            raise ArgumentError(
                f"{name} has the attention backend {AttentionBackendName(chosen).value!r}, which does not support context parallelism: "
                f"call set_attention_backend(...) with one of {able}"
            )


def shared(
    context: Context, layer: Layer, query: Tensor, key: Tensor, mask: Any, special: str | None, config: object
) -> tuple[Exchange | Spread | None, Any]:
    """How the tokens of a call `[B, own tokens, H, D]` are spread over ranks, and whose heads or whose tokens each rank computes; and the
    call's mask over the whole sequence. None for a call that runs its original attention. All ranks decide alike."""
    q_len, kv_len = query.shape[1], key.shape[1]
    forward = context.forward()
    if forward is None:
        context.takes(None, layer, q_len, kv_len, mask, special)  # which records it
        return None, mask
    if not context.enabled or not forward.active or not forward.runs(layer) or q_len != kv_len:
        return None, mask
    ranks = Ranks.of(config)
    streams = None if ranks is None else _streams(forward, ranks, query)
    if ranks is None or streams is None:
        context.fall_back(OTHER if ranks is None else f"a part of {q_len} tokens, which is not this process's of the whole sequence")
        return None, mask
    tokens = sum(map(sum, streams))
    layout = forward.layout(layer.image_only, tokens)
    found = _spread(ranks, streams, layout) if ranks.bands else _exchange(forward, layer, ranks, streams, layout)
    if found is None:
        context.fall_back(AS_ONE)
        return None, mask
    whole = mask
    if gathers(mask, kv_len):
        whole = joined(gathered_mask(mask, [sum(sizes) for sizes in streams], ranks.group), streams, -1)
    if not context.takes(forward, layer, tokens, tokens, whole, special):
        return None, mask
    return found, whole


def gathers(mask: Any, tokens: int) -> bool:
    """Whether a mask is one over this rank's keys alone, the same for all queries."""
    return isinstance(mask, Tensor) and mask.shape[-1] == tokens and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[2] == 1))


def _exchange(forward: Forward, layer: Layer, ranks: Ranks, streams: tuple[tuple[int, ...], ...], layout: TokenLayout) -> Exchange:
    heads = heads_of_ranks(forward.groups(layer), layout, layer.head_dim, ranks.size)
    return Exchange(ranks.group, ranks.rank, streams, heads)


def _spread(ranks: Ranks, streams: tuple[tuple[int, ...], ...], layout: TokenLayout) -> Spread | None:
    """None where text and image are one stream."""
    columns = list(zip(*streams, strict=True))
    if len(columns) == 1:
        return None if layout.text else Spread(ranks.group, ranks.rank, (0,) * ranks.size, columns[0], layout)
    texts, images = columns if layout.text_first else columns[::-1]
    return Spread(ranks.group, ranks.rank, texts, images, layout)


def _streams(forward: Forward, ranks: Ranks, query: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """The tokens of each stream that each rank holds, this one those of the query; None where they can't be."""
    image, text, tokens = forward.image, forward.text, query.shape[1]
    if forward.family.sharded is None or (text is None and forward.family.sharded == "streams"):
        return None
    if text is None:
        found = ranks.shards(ranks.total(tokens, query.device))
    elif forward.family.sharded == "sequence" or not text:
        found = ranks.shards(image + text)
    else:
        found = ranks.shards(text, image) if forward.family.text_first else ranks.shards(image, text)
    return found if sum(found[ranks.rank]) == tokens else None
