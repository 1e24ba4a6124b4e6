"""Context parallelism of a model: what it requires, checked before anything is changed, and how a call's tokens are spread over ranks."""

from collections.abc import Callable
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.parallel.balance import heads_of_ranks
from dit_accel.parallel.exchange import Exchange
from dit_accel.parallel.ulysses import Ulysses, context_parallel, refusal
from dit_accel.patch.context import Context
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import Layer
from dit_accel.pipelines import class_of
from dit_accel.pipelines.family import Family

COMPILED = "context parallelism in a compiled graph"
OTHER = "parallelism of another kind than diffusers' ContextParallelConfig(ulysses_degree=...)"

# what diffusers' own plan of a class gets wrong, as of 0.42.1: the class, which of its models, and why
BROKEN: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("LTX2VideoTransformer3DModel", lambda model: True, "it does not split the rotary positions of the attention between sound and video"),
    (
        "HeliosTransformer3DModel",
        lambda model: model.config.is_amplify_history,
        "its attention finds the earlier frames, whose keys it scales, by the length of the whole sequence, and is given a part",
    ),
)


def check_sharing(model: Any, config: Any, family: Family, layers: list[Layer]) -> None:
    """Raise ValueError where these layers of a model can't run under a parallel configuration, None for none."""
    if context_parallel(config) is None:
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
    able = _AttentionBackendRegistry._supports_context_parallel
    for name, module in model.named_modules():
        chosen = getattr(getattr(module, "processor", None), "_attention_backend", None)
        if chosen is not None and not _AttentionBackendRegistry._is_context_parallel_available(AttentionBackendName(chosen)):
            raise ArgumentError(
                f"{name} has the attention backend {getattr(chosen, 'value', chosen)!r}, which does not support context parallelism: call "
                f"set_attention_backend(...) with one of {sorted(getattr(x, 'value', x) for x in able)}"
            )


def shared(
    context: Context, layer: Layer, query: Tensor, key: Tensor, mask: Any, special: str | None, config: object
) -> tuple[Exchange | None, Any]:
    """How the tokens and heads of a call `[B, own tokens, H, D]` are spread over ranks, and its mask over the whole sequence; no exchange
    for a call that runs its original attention. All ranks decide alike."""
    q_len, kv_len = query.shape[1], key.shape[1]
    forward = context.forward()
    if forward is None:
        context.takes(None, layer, q_len, kv_len, mask, special)  # which records it
        return None, mask
    if not context.enabled or not forward.active or not forward.runs(layer) or q_len != kv_len:
        return None, mask
    ulysses = Ulysses.of(config)
    streams = None if ulysses is None else _streams(forward, ulysses, query)
    if ulysses is None or streams is None:
        context.fall_back(OTHER if ulysses is None else f"a part of {q_len} tokens, which is not this process's of the whole sequence")
        return None, mask
    tokens = sum(map(sum, streams))
    layout = forward.layout(layer.image_only, tokens)
    heads = heads_of_ranks(forward.groups(layer), layout, layer.head_dim, ulysses.size)
    exchange = Exchange(ulysses.group, ulysses.rank, streams, heads)
    whole = mask
    if isinstance(mask, Tensor) and mask.shape[-1] == kv_len and (mask.ndim == 2 or (mask.ndim == 4 and mask.shape[2] == 1)):
        whole = exchange.whole_mask(mask)
    if not context.takes(forward, layer, tokens, tokens, whole, special):
        return None, mask
    return exchange, whole


def _streams(forward: Forward, ulysses: Ulysses, query: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """The tokens of each stream that each rank holds, this one those of the query; None where they can't be."""
    image, text, tokens = forward.image, forward.text, query.shape[1]
    if forward.family.sharded is None or (text is None and forward.family.sharded == "streams"):
        return None
    if text is None:
        found = ulysses.shards(ulysses.total(tokens, query.device))
    elif forward.family.sharded == "sequence" or not text:
        found = ulysses.shards(image + text)
    else:
        found = ulysses.shards(text, image) if forward.family.text_first else ulysses.shards(image, text)
    return found if sum(found[ulysses.rank]) == tokens else None
