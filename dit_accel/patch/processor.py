"""How an accelerated attention gets into a diffusers attention module, for every family alike.

diffusers keeps the attention primitive inside a *processor*, after q/k norm and rotary embedding. For each processor class a subclass is
built once whose `__call__` is the class's own source with the one call to the primitive,

    dispatch_attention_fn(...)            ->  self._dit_accel_dispatch(attn, ...)      [B, N, H, D]
    F.scaled_dot_product_attention(...)   ->  self._dit_accel_sdpa(attn, ...)          [B, H, N, D]

rebound and compiled with the original function's globals and closure (`rewriting`). Signature, isinstance checks, LoRA, IP-Adapter,
attention backends and pickling go on working, and no processor is copied by hand. Tracebacks show the rewritten source. The operator itself
is an nn.Module that hangs on the attention module as `attn.dit_accel`, so that devices, optimizers, offloading and state dicts see its
parameters.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel.errors import UnsupportedModelError
from dit_accel.method.assignment import Group
from dit_accel.method.parameters import Values
from dit_accel.method.parts.base import Fit
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attend as attend  # `compiled` calls it by this name, too
from dit_accel.operator.attention import autocast
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel import balance
from dit_accel.parallel.halo import Spread
from dit_accel.patch import masks
from dit_accel.patch.bands import by_bands, original
from dit_accel.patch.context import Context
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import Layer, by_groups, joint_fit, joint_parameters, of_heads, values_of
from dit_accel.patch.interception import intercepted, register_like, through_modes
from dit_accel.patch.rewriting import rewritten
from dit_accel.patch.sharing import COMPILED, shared


class AcceleratedAttention(nn.Module):
    """The operator on one attention module: what it learns, and the context shared with the other layers, which has the assignment.

    `number`: the layer's in the context, for compiled graphs; a tensor, so that layers share a graph.
    """

    def __init__(self, context: Context, layer: Layer, number: int) -> None:
        super().__init__()
        self.context, self.layer, self.number = context, layer, torch.tensor(number)
        self.params = joint_parameters(self.specs, layer)

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """The specs that it may run."""
        return self.context.assignment.specs_of(self.layer.name)

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def heads(self) -> int:
        return self.layer.heads

    @property
    def head_dim(self) -> int:
        return self.layer.head_dim

    @property
    def fit(self) -> dict[str, Fit | None]:
        """How the first stage of a distillation finds each learned tensor, by its name in `params`; see `Part.fit`."""
        return joint_fit(self.specs, self.layer)

    @property
    def solved(self) -> bool:
        """Whether the first stage finds some of them by least squares."""
        return bool({"least_squares", "least_squares_by_channel"} & set(self.fit.values()))

    def takes(self, q_len: int, kv_len: int, mask: object, special: str | None) -> bool:
        """Whether a call is accelerated; one that should be and can't is recorded. `special`: why it can't, whatever its shapes."""
        return self.context.takes(self.context.forward(), self.layer, q_len, kv_len, mask, special)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None, held: tuple[int, ...] | None = None
    ) -> Tensor:
        """`[B, H, N, D]`, image tokens in the forward's order; `mask`: one that `takes` accepted; `held`: the numbers of the heads, all
        unless given."""
        forward = self.context.forward()
        if forward is None:
            raise RuntimeError("an accelerated attention module's operator was called outside its transformer's forward")
        method = self.attend if held is None else functools.partial(self.attend, held=held)
        return arranged(query, key, value, scale, mask, forward, self.layer.image_only, method)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None, forward: Forward,
        held: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """The layer's specs, once every token of the layout has a query; `bias` `[B, text]` on the text's keys."""
        params = self.params(query.device)
        return by_specs(query, key, value, layout, scale, bias, forward, self.layer, params, self.context.backend, held)


def arranged(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None, forward: Forward, image_only: bool,
    method: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """A call of a forward `[B, H, N, D]`, with a mask that `route` accepted, by a method with `AcceleratedAttention.attend`'s arguments.

    Every token of the layout gets a query, and the text is brought before or behind all images.
    """
    layout = forward.layout(image_only, key.shape[2])
    if forward.family.mask == "ones":
        mask = None
    history, absent = forward.history, key.shape[2] - query.shape[2]
    before = absent if layout.text_first or history else 0
    if absent:  # queries of zeros for text that has none; their rows are dropped
        query = F.pad(query, (0, 0, before, absent - before))
    if history:  # the order of keys does not matter: those before the image are moved behind it, to the text
        query, key, value = (x.roll(-history, 2) for x in (query, key, value))
        mask = None if mask is None else masks.rolled(mask, -history)
    bias = None if mask is None else masks.text_bias(mask, layout, len(query))
    out = method(query, key, value, layout, scale, bias, forward)
    if mask is not None and masks.differs_by_row(mask):
        out = masks.with_text_rows(out, query, key, value, mask, layout, forward.scaled(scale, key.shape[2], query.shape[3]))
    if history:
        out = out.roll(history, 2)
    return out.narrow(2, before, out.shape[2] - absent) if absent else out


def by_specs(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None, forward: Forward,
    layer: Layer, params: Values, backend: str, held: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """`AcceleratedAttention.attend` of a layer: its heads `[B, H, N, D]` by the specs that they have in a forward.

    `held`: the numbers of the heads that are given, in ascending order, where they are not all.
    """
    groups = forward.groups(layer)
    if held is not None:
        groups = balance.of_heads(groups, held)

    def run(group: Group) -> Tensor:
        spec, heads = group
        places = heads if held is None else tuple(map(held.index, heads))
        q, k, v = (of_heads(x, places) for x in (query, key, value))
        if spec is None:
            mask = None if bias is None else masks.over_keys(bias, layout).to(q.dtype)
            return F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        plan = forward.plans.get(spec, layout, q.device)  # a transformer's layers may be spread over several devices
        own = values_of(params, spec, layer, heads)
        return attend(q, k, v, spec, layout, plan, own, forward.scaled(scale, k.shape[2], q.shape[3]), backend, text_bias=bias)[0]

    return by_groups(groups, run)


def _special(dropout_p: float, is_causal: bool) -> str | None:
    """Why a call can't be accelerated, if so."""
    return "causal attention or dropout" if is_causal or dropout_p else None


def with_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that several query heads share (GQA), once for each of them; `[B, H, N, D]`."""
    times = query.shape[1] // key.shape[1]
    return query, *(x if times == 1 else x.repeat_interleave(times, dim=1) for x in (key, value))  # type: ignore[return-value]


def _answer(
    operator: AcceleratedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, gqa: bool,
    primitive: str, held: tuple[int, ...] | None = None,
) -> Tensor:  # fmt: skip
    """The operator's output for a call that it takes, `[B, H, N, D]`, or what an active function mode makes of the call.

    `held`: the numbers of the heads, where they are not all.
    """

    def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return _traced(operator, query, key, value, mask, scale, gqa, primitive)
        more = {} if held is None else {"held": held}
        return operator(*with_all_heads(query, key, value), scale, mask, **more)

    if not intercepted(query):
        return ours(query, key, value)
    shapes = query.shape, key.shape

    def run(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        if attn_mask is mask and not dropout_p and not is_causal and (query.shape, key.shape) == shapes:
            return ours(query, key, value)
        operator.context.fall_back("a function mode that changes the mask, the tokens or the kind of the attention")
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    return through_modes(run, query, key, value, attn_mask=mask, dropout_p=0.0, is_causal=False, scale=scale, enable_gqa=gqa)


def _over_ranks(
    operator: AcceleratedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None,
    special: str | None, config: object, primitive: Callable[..., Tensor],
) -> Tensor | None:  # fmt: skip
    """A call under context parallelism `[B, own tokens, H, D]`, or None for one that diffusers' own runs. All ranks decide alike.

    The layer runs on the whole sequence of this rank's heads, or on this rank's part of the sequence. `primitive`: the original attention
    of queries, keys, values and a mask.
    """
    spread, whole = shared(operator.context, operator.layer, query, key, mask, special, config)
    if spread is None:
        return None if special else original(query, key, value, mask, config, primitive)
    q, k, v = with_all_heads(*(x.transpose(1, 2) for x in autocast(query, key, value)))
    if isinstance(spread, Spread):
        context, params = operator.context, operator.params(query.device)
        return by_bands(q, k, v, scale, whole, spread, context, operator.layer, params).transpose(1, 2)
    q, k, v = spread.to_heads(q, k, v)
    return spread.to_tokens(_answer(operator, q, k, v, whole, scale, False, "default", spread.held)).transpose(1, 2)


def _traced(
    operator: AcceleratedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, gqa: bool,
    primitive: str,
) -> Tensor:  # fmt: skip
    """A call `[B, H, N, D]` in a compiled graph, where `compiled.layer` decides when it runs."""
    params = operator.params(query.device)
    query, key, value = (x.transpose(1, 2) for x in autocast(query, key, value))
    out: Tensor = torch.ops.dit_accel.layer(
        query, key, value, mask, list(params.values()), "\n".join(params), operator.context.token, operator.number, scale, gqa, primitive
    )[0]
    return out.transpose(1, 2)


def _noted(operator: AcceleratedAttention, query: Tensor, key: Tensor, special: str | None) -> Tensor:
    """The query `[B, N, H, D]` of a call in a compiled graph that can't be accelerated, which is recorded when it runs."""
    reason = special or "arguments of an attention backend"
    noted: Tensor = torch.ops.dit_accel.noted(query, key.shape[1], operator.context.token, operator.number, reason)
    return noted


class AcceleratedProcessor:
    """Mixed into each rewritten processor class: decides call by call between the operator and the untouched primitive."""

    _dit_accel_base: type

    def _dit_accel_dispatch(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, attention_kwargs: dict[str, Any] | None = None,
        *, backend: Any = None, parallel_config: Any = None,
    ) -> Tensor:  # fmt: skip
        operator: AcceleratedAttention = attn.dit_accel
        special, compiling = _special(dropout_p, is_causal), torch.compiler.is_compiling()
        if compiling and (special is not None or attention_kwargs or parallel_config is not None):
            query = _noted(operator, query, key, special or (None if parallel_config is None else COMPILED))
        elif parallel_config is not None:

            def alone(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
                settings = (dropout_p, is_causal, scale, enable_gqa, attention_kwargs)
                found: Tensor = dispatch_attention_fn(query, key, value, mask, *settings, backend=backend)
                return found

            out = _over_ranks(operator, query, key, value, attn_mask, scale, special, parallel_config, alone)
            if out is not None:
                return out
        elif compiling or operator.takes(query.shape[1], key.shape[1], attn_mask, special):
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            primitive = str(getattr(backend, "value", backend or "default"))
            return _answer(operator, q, k, v, attn_mask, scale, enable_gqa, primitive).transpose(1, 2)
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, backend=backend,
            parallel_config=parallel_config,
        )  # fmt: skip

    def _dit_accel_sdpa(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        operator: AcceleratedAttention = attn.dit_accel
        special, compiling = _special(dropout_p, is_causal), torch.compiler.is_compiling()
        if compiling and special is not None:
            query = _noted(operator, query.transpose(1, 2), key.transpose(1, 2), special).transpose(1, 2)
        elif compiling or operator.takes(query.shape[2], key.shape[2], attn_mask, special):
            return _answer(operator, query, key, value, attn_mask, scale, enable_gqa, "sdpa")
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._dit_accel_base, dict(self.__dict__))


def _rebuild(base: type, state: dict[str, Any]) -> object:
    """Make an instance of the rewritten class, which no module holds under a name, for pickle and deepcopy."""
    processor: Any = object.__new__(accelerated_class(base))
    processor.__dict__.update(state)
    return processor


_classes: dict[type, type] = {}  # a pure function's results: processor class -> rewritten class


def accelerated_class(base: type) -> type:
    """The subclass of a processor class whose calls to the attention primitive go through its module's operator.

    Raises UnsupportedModelError where the class's source is not available, contains no call to the primitive, or can't be rewritten.
    """
    if base in _classes:
        return _classes[base]
    members = {"__call__": rewritten(base), "_dit_accel_base": base, "__module__": __name__}
    _classes[base] = type(f"Accelerated{base.__name__}", (AcceleratedProcessor, base), members)
    register_like(base, _classes[base])
    return _classes[base]


def accelerated_copy(processor: Any) -> Any:
    """A shallow copy of a processor in its rewritten class, the original left as it is. Raises UnsupportedModelError where none can be."""
    copied, ours = copy.copy(processor), accelerated_class(type(processor))
    try:
        copied.__class__ = ours
    except TypeError as error:
        raise UnsupportedModelError(f"{type(processor).__name__} has __slots__, or is not a Python class: {error}") from error
    return copied
