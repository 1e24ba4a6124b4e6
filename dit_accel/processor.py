"""How an accelerated attention gets into a diffusers attention module, for every family alike.

diffusers keeps the attention primitive inside a *processor*, after q/k norm and rotary embedding. For each processor class a subclass is
built once whose `__call__` is the class's own source with the one call to the primitive,

    dispatch_attention_fn(...)            ->  self._dit_accel_dispatch(attn, ...)      [B, N, H, D]
    F.scaled_dot_product_attention(...)   ->  self._dit_accel_sdpa(attn, ...)          [B, H, N, D]

rebound and compiled in the original function's globals. Signature, isinstance checks, LoRA, IP-Adapter, attention backends and pickling
go on working, and no processor is copied by hand. Tracebacks show the rewritten source. The operator itself is an nn.Module that hangs
on the attention module as `attn.dit_accel`, so that devices, optimizers, offloading and state dicts see its parameters.
"""

import ast
import copy
import inspect
import linecache
import textwrap
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel import masks
from dit_accel.context import Context
from dit_accel.errors import UnsupportedModelError
from dit_accel.forward import Forward
from dit_accel.layout import TokenLayout
from dit_accel.operator import attend as attend  # `compiled` calls it by this name, too
from dit_accel.plan import Plan
from dit_accel.spec import AttentionSpec


class AcceleratedAttention(nn.Module):
    """The operator on one attention module: its spec, its learned parameters, and the context shared with the other layers."""

    def __init__(self, spec: AttentionSpec, context: Context, name: str, *, heads: int, head_dim: int, alone: bool) -> None:
        super().__init__()
        self.spec, self.context, self.name = spec, context, name
        self.heads, self.head_dim, self.alone = heads, head_dim, alone
        self.params = spec.make_parameters(heads=heads, head_dim=head_dim)

    def takes(self, q_len: int, kv_len: int, mask: object, special: str | None) -> bool:
        """Whether a call is accelerated; one that should be and can't is recorded. `special`: why it can't, whatever its shapes."""
        return self.context.takes(self.context.forward(), self.alone, q_len, kv_len, mask, special)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
        """`[B, H, N, D]`, image tokens in the forward's order; `mask`: one that `takes` accepted."""
        forward = self.context.forward()
        if forward is None:
            raise RuntimeError("an accelerated attention module's operator was called outside its transformer's forward")
        return accelerated(query, key, value, scale, mask, forward, self.alone, self.attend)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Plan, scale: float | None, bias: Tensor | None
    ) -> Tensor:
        """The method itself, once every token of the layout has a query; `bias` `[B, text]` on the text's keys."""
        return attend(query, key, value, self.spec, layout, plan, self.params(query.device), scale, self.context.backend, text_bias=bias)[0]


def accelerated(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None, forward: Forward, alone: bool,
    method: Callable[..., Tensor],
) -> Tensor:  # fmt: skip
    """A call of a forward `[B, H, N, D]`, with a mask that `route` accepted, by a method with `AcceleratedAttention.attend`'s arguments.

    Every token of the layout gets a query, and the text is brought before or behind all images.
    """
    layout = forward.layout(alone, key.shape[2])
    plan = forward.plans.get(forward.spec, layout, query.device)  # a transformer's layers may be spread over several devices
    if forward.family.mask == "ones":
        mask = None
    scale = forward.scaled(scale, key.shape[2], query.shape[3])
    history, absent = forward.history, key.shape[2] - query.shape[2]
    before = absent if layout.text_first or history else 0
    if absent:  # queries of zeros for text that has none; their rows are dropped
        query = F.pad(query, (0, 0, before, absent - before))
    if history:  # the order of keys is no matter: what stands before the image is brought behind it, beside the text
        query, key, value = (x.roll(-history, 2) for x in (query, key, value))
        mask = None if mask is None else masks.rolled(mask, -history)
    bias = None if mask is None else masks.text_bias(mask, layout, len(query))
    out = method(query, key, value, layout, plan, scale, bias)
    if mask is not None and masks.differs_by_row(mask):
        out = masks.with_text_rows(out, query, key, value, mask, layout, scale)
    if history:
        out = out.roll(history, 2)
    return out.narrow(2, before, out.shape[2] - absent) if absent else out


def _special(dropout_p: float, is_causal: bool, parallel_config: object) -> str | None:
    """Why a call can't be accelerated, if so."""
    if is_causal or dropout_p:
        return "causal attention or dropout"
    return "context parallelism" if parallel_config is not None else None


def with_all_heads(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values that several query heads share (GQA), once for each of them; `[B, H, N, D]`."""
    times = query.shape[1] // key.shape[1]
    return query, *(x if times == 1 else x.repeat_interleave(times, dim=1) for x in (key, value))  # type: ignore[return-value]


def _traced(
    operator: AcceleratedAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, gqa: bool,
    primitive: str,
) -> Tensor:  # fmt: skip
    """A call `[B, N, H, D]` in a compiled graph, where `compiled.layer` decides when it runs."""
    params, device = operator.params(), query.device.type
    if torch.is_autocast_enabled(device):  # as the primitive itself does
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    weight, bias = (None, None) if params.proj is None else params.proj
    out: Tensor = torch.ops.dit_accel.layer(
        query, key, value, mask, weight, bias, params.offset, params.spatial_weight, operator.context.token, operator.alone, scale, gqa,
        primitive,
    )[0]  # fmt: skip
    return out


def _noted(operator: AcceleratedAttention, query: Tensor, key: Tensor, special: str | None) -> Tensor:
    """The query `[B, N, H, D]` of a call in a compiled graph that can't be accelerated, which is recorded when it runs."""
    reason = special or "arguments of an attention backend"
    noted: Tensor = torch.ops.dit_accel.noted(query, key.shape[1], operator.context.token, operator.alone, reason)
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
        special = _special(dropout_p, is_causal, parallel_config)
        if torch.compiler.is_compiling():
            if special is None and not attention_kwargs:
                primitive = str(getattr(backend, "value", backend or "default"))
                return _traced(operator, query, key, value, attn_mask, scale, enable_gqa, primitive)
            query = _noted(operator, query, key, special)
        elif operator.takes(query.shape[1], key.shape[1], attn_mask, special):
            q, k, v = with_all_heads(*(x.transpose(1, 2) for x in (query, key, value)))
            return operator(q, k, v, scale, attn_mask).transpose(1, 2)
        return dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, backend=backend,
            parallel_config=parallel_config,
        )  # fmt: skip

    def _dit_accel_sdpa(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        operator: AcceleratedAttention = attn.dit_accel
        special = _special(dropout_p, is_causal, None)
        if torch.compiler.is_compiling():
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
            if special is None:
                return _traced(operator, query, key, value, attn_mask, scale, enable_gqa, "sdpa").transpose(1, 2)
            query = _noted(operator, query, key, special)
            query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        elif operator.takes(query.shape[2], key.shape[2], attn_mask, special):
            return operator(*with_all_heads(query, key, value), scale, attn_mask)
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (self._dit_accel_base, dict(self.__dict__))


def _rebuild(base: type, state: dict[str, Any]) -> object:
    """Make an instance of the rewritten class, which no module holds under a name, for pickle and deepcopy."""
    processor: Any = object.__new__(accelerated_class(base))
    processor.__dict__.update(state)
    return processor


class _Rebind(ast.NodeTransformer):
    """Rebinds the calls to the attention primitive in a processor's `__call__`."""

    def __init__(self, attn: str) -> None:
        self.attn, self.count = attn, 0

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Name) and function.id == "dispatch_attention_fn":
            method = "_dit_accel_dispatch"
        elif isinstance(function, ast.Attribute) and function.attr == "scaled_dot_product_attention":
            method = "_dit_accel_sdpa"
        else:
            return node
        self.count += 1
        node.func = ast.Attribute(ast.Name("self", ast.Load()), method, ast.Load())
        node.args.insert(0, ast.Name(self.attn, ast.Load()))
        return node


_classes: dict[type, type] = {}  # a pure function's results: processor class -> rewritten class


def accelerated_class(base: type) -> type:
    """The subclass of a processor class whose calls to the attention primitive go through its module's operator.

    Raises UnsupportedModelError where the class's source is not to be had or holds no call to the primitive.
    """
    if base in _classes:
        return _classes[base]
    call = base.__call__
    try:
        source = textwrap.dedent(inspect.getsource(call))
    except (OSError, TypeError) as error:
        raise UnsupportedModelError(f"wanted the source of {base.__name__}.__call__, which is not available: {error}") from error
    tree = ast.parse(source)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or len(definition.args.args) < 2:
        raise UnsupportedModelError(f"wanted {base.__name__}.__call__(self, attn, ...), got {source.splitlines()[0]!r}")
    rebind = _Rebind(definition.args.args[1].arg)
    tree = ast.fix_missing_locations(rebind.visit(tree))
    if rebind.count == 0:
        raise UnsupportedModelError(f"{base.__name__} calls no attention primitive that dit_accel knows")
    filename = f"<dit_accel {base.__module__}.{base.__qualname__}>"
    text = ast.unparse(tree)
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(text, filename, "exec"), call.__globals__, namespace)
    members = {"__call__": namespace["__call__"], "_dit_accel_base": base, "__module__": __name__}
    _classes[base] = type(f"Accelerated{base.__name__}", (AcceleratedProcessor, base), members)
    return _classes[base]


def accelerated_copy(processor: Any) -> Any:
    """A shallow copy of a processor in its rewritten class; the original is left as it is."""
    twin = copy.copy(processor)
    twin.__class__ = accelerated_class(type(processor))
    return twin
