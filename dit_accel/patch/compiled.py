"""Accelerated attention under torch.compile: operators that look up what they need when they run.

A graph that contains a grid, a plan, or whether a step is dense is compiled anew for each, until PyTorch gives up. So a graph has operators
that are opaque to the compiler, and a number in a tensor, the token, by which they find the state of the forward when they run. Where the
blocks of a transformer are compiled, its hooks run outside of the graphs and make its forward the current one; the token names the context.
Where a transformer is compiled as a whole, `dit_accel::begin` takes the place of the hook, and its token names the forward. Any number of
sizes, dense steps and switched-off patches run in the graphs that the original model has.

A backward pass computes the layer once more: which of the kernels ran is not known to the graph.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor

from dit_accel.errors import DitAccelError
from dit_accel.kernels import capture
from dit_accel.method.assignment import Rules
from dit_accel.method.parameters import Values
from dit_accel.patch import processor, tokens
from dit_accel.patch.context import Context
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import Layer

ORIGINAL = 0  # in the place of a token: the call ran its original attention


@torch.library.custom_op("dit_accel::begin", mutates_args=(), **capture.ALWAYS_RUNS)
def begin(
    tag: Tensor, latents: Tensor, timestep: Tensor | None, ids: Sequence[Tensor], names: str, words: str, sides: Sequence[int],
    unknown: str, text: int | None, history: int, masks: Sequence[Tensor], gradient: bool,
) -> Tensor:  # fmt: skip
    """The token of a forward that begins: what `Context.before` does.

    `tag`: the context. `sides`: T, H and W of one grid after the other, or `unknown` why there is none. For families with ids the grids are
    read from those, `names` theirs, one a line, from the latents, and from `words`, the arguments that are words, one `name=value` a line.
    """
    context, _ = tokens.find(tag)
    family = context.family
    if not context.enabled:
        off = Forward(family, Rules(), (), text, history, context.trained_tokens, context.plans, active=False)
        return tokens.begin(context, off).clone()
    if family.ids:
        arguments: dict[str, Any] = dict(line.split("=", 1) for line in words.splitlines())
        arguments |= {family.latents: latents, **dict(zip(names.splitlines(), ids, strict=True))}
        grids = context.grids(arguments, None)
    else:
        grids = unknown or tuple(tuple(sides[n : n + 3]) for n in range(0, len(sides), 3))
    return tokens.begin(context, context.begin(grids, text, history, timestep, latents, list(masks), gradient=gradient)).clone()


@begin.register_fake
def _(tag: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(tag)


@torch.library.custom_op("dit_accel::noted", mutates_args=(), **capture.ALWAYS_RUNS)
def noted(query: Tensor, keys: int, token: Tensor, number: Tensor, reason: str) -> Tensor:
    """A copy of a query `[B, N, H, D]` whose call runs its original attention for a reason, which is recorded."""
    context, forward = tokens.find(token)
    context.takes(forward, context.layers[int(number)], query.shape[1], keys, None, reason)
    return query.clone(memory_format=torch.contiguous_format)


@noted.register_fake
def _(query: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


noted.register_autograd(lambda ctx, gradient: (gradient, None, None, None, None))


@torch.library.custom_op("dit_accel::layer", mutates_args=(), **capture.ALWAYS_RUNS)
def layer(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, learned: Sequence[Tensor], names: str, token: Tensor, number: Tensor,
    scale: float | None, gqa: bool, primitive: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A layer's attention `[B, N, H, D]`, accelerated or original as `Context.takes` decides, and what tells the backward pass which.

    `learned`: the method's learned tensors, `names` theirs, one a line. `number`: of the layer in its context. `primitive`: "sdpa", or the
    backend of diffusers' dispatcher ("default" for its own choice).
    """
    context, forward = tokens.find(token)
    own = context.layers[int(number)]
    taken = context.takes(forward, own, query.shape[1], key.shape[1], mask, None)
    params = dict(zip(names.splitlines(), learned, strict=True))
    out = _attention(query, key, value, mask, params, context, forward if taken else None, own, scale, gqa, primitive)
    ran = tokens.token_of(context, forward).clone() if taken else torch.full_like(token, ORIGINAL)
    return out.contiguous(), ran


@layer.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, learned: Sequence[Tensor], names: str, token: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[3]), torch.empty_like(token)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, params: Values, context: Context | None, forward: Forward | None,
    own: Layer | None, scale: float | None, gqa: bool, primitive: str,
) -> Tensor:  # fmt: skip
    """The method within a forward of a context, or the primitive without them; `[B, N, H, D]`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):  # the graph has cast what autocast casts
        if forward is not None and context is not None and own is not None:
            method = functools.partial(processor.by_specs, layer=own, params=params, backend=context.backend)
            return processor.arranged(*processor.with_all_heads(q, k, v), scale, mask, forward, own.image_only, method).transpose(1, 2)
        if mask is not None and mask.is_floating_point():
            mask = mask.to(query.dtype)
        if primitive == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=gqa).transpose(1, 2)
        backend = None if primitive == "default" else AttentionBackendName(primitive)
        return dispatch_attention_fn(query, key, value, mask, scale=scale, enable_gqa=gqa, backend=backend)


@torch.library.custom_op("dit_accel::layer_backward", mutates_args=(), **capture.ALWAYS_RUNS)
def layer_backward(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, learned: Sequence[Tensor], names: str, ran: Tensor,
    needed: Sequence[bool], number: Tensor, scale: float | None, gqa: bool, primitive: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of query, key, value and the learned tensors; those that are not needed are empty."""
    inputs = [query, key, value, *learned]
    context, forward = (None, None) if int(ran) == ORIGINAL else tokens.find(ran)
    layer = None if context is None else context.layers[int(number)]
    autograd = torch._C.DispatchKey.AutogradFunctionality  # an operator runs below autograd
    with torch._C._SetExcludeDispatchKeyGuard(autograd, False), torch.enable_grad():
        copies = [x.detach().requires_grad_(needs) for x, needs in zip(inputs, needed, strict=True)]
        q, k, v, *own = copies
        params = dict(zip(names.splitlines(), own, strict=True))
        out = _attention(q, k, v, mask, params, context, forward, layer, scale, gqa, primitive)
        learn = [x for x in copies if x.requires_grad]
        found = iter(torch.autograd.grad(out, learn, dout, allow_unused=True))
    grads = [next(found) if x.requires_grad else None for x in copies]
    return [
        query.new_empty(0) if not needs else torch.zeros_like(x) if g is None else g.contiguous()
        for x, g, needs in zip(inputs, grads, needed, strict=True)
    ]


@layer_backward.register_fake
def _(
    dout: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, learned: Sequence[Tensor], names: str, ran: Tensor,
    needed: Sequence[bool], *args: Any,
) -> list[Tensor]:  # fmt: skip
    return [x.new_empty(x.shape if needs else 0) for x, needs in zip((query, key, value, *learned), needed, strict=True)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    query, key, value, mask, learned, names, _, number, *settings = inputs
    ctx.save_for_backward(query, key, value, mask, output[1], number, *learned)
    ctx.names, ctx.settings = names, settings


def _gradients(ctx: Any, dout: Tensor | None, _: Tensor | None) -> tuple[Tensor | list[Tensor | None] | None, ...]:
    query, key, value, mask, ran, number, *learned = ctx.saved_tensors
    if ctx.needs_input_grad[3]:
        raise DitAccelError("an attention mask that requires a gradient is not supported in a compiled model: pass mask.detach()")
    needed = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[4]]
    after = (None,) * (3 + len(ctx.settings))
    if dout is None or not any(needed):
        return (None, None, None, None, [None] * len(learned), *after)
    grads = torch.ops.dit_accel.layer_backward(dout, query, key, value, mask, learned, ctx.names, ran, needed, number, *ctx.settings)
    given: list[Tensor | None] = [grad if needs else None for grad, needs in zip(grads, needed, strict=True)]
    return (*given[:3], None, given[3:], *after)


layer.register_autograd(_gradients, setup_context=_save)
