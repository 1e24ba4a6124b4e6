"""The operators as PyTorch knows them: functional, differentiable, with fake kernels for torch.compile; one name for every device.

`dit_accel::attention` is a whole accelerated layer's operator; `dit_accel::attention_backward` gives its gradients;
`dit_accel::select_blocks` chooses key blocks; `dit_accel::summarize_blocks` makes what a rest of pooled keys and a choice take from whole
blocks, `dit_accel::mix_slopes` the slopes of query blocks from it; `dit_accel::group_units` makes all that query blocks see of groups.
Their arguments are those of `arguments` and `grouping`, packed, after `implementation`: "cpu" (kernels/cpu) or "triton" (kernels/triton,
also on CPU tensors under Triton's interpreter).
"""

import functools
import importlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from dit_accel.kernels.arguments import (
    ATTENTION,
    DIFFERENTIABLE,
    MIXTURE,
    SUMMARY,
    Arguments,
    MixtureArguments,
    Summaries,
    SummaryArguments,
    Transport,
    dense,
    gradient_like,
    new_summaries,
)
from dit_accel.kernels.choosing import SELECTION, Chosen, SelectionArguments, new_chosen
from dit_accel.kernels.grouping import (
    DIFFERENTIABLE_GROUPING,
    GRADIENTS_OF_UNITS,
    GROUPING,
    SAVED_UNITS,
    GroupingArguments,
    Units,
    new_units,
)
from dit_accel.kernels.replay import Records

T = TypeVar("T")

_one: ContextVar[bool] = ContextVar("one", default=False)  # whether this thread is in `as_one`, which has asked already


def unwatched(*given: Tensor) -> bool:
    """Whether an operator on tensors is its implementation and nothing else: no gradient is recorded, nothing compiles, traces, transforms,
    counts or profiles it, and their memory holds their numbers, which that of a lazily negated view does not. To ask torch takes the
    processor longer than a launch, in every layer and step."""
    if torch.compiler.is_compiling():  # which knows no context variable
        return False
    return _one.get() or not (
        torch.is_grad_enabled()
        or any(type(x) is not Tensor or x.is_neg() for x in given)
        or is_in_torch_dispatch_mode()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
    )


def as_one(
    implementation: str, records: Records, about: Hashable, tensors: Sequence[Tensor | None], constants: Callable[[], Sequence[Tensor]],
    function: Callable[[], T],
) -> T:  # fmt: skip
    """What a function gives that calls several of the operators here: where nothing watches, recorded as one call.

    It depends on `tensors`, on `constants`, which live as long as `records`, on `about`, and on nothing else.
    """
    if not unwatched(*(x for x in tensors if x is not None)):
        return function()
    found: T = _implementation(implementation).together(records, about, tensors, constants, _inside(function))
    return found


def _inside(function: Callable[[], T]) -> Callable[[], T]:
    """The function, whose operators are called past PyTorch's dispatcher whatever records them."""

    def call() -> T:
        token = _one.set(True)
        try:
            return function()
        finally:
            _one.reset(token)

    return call


def attention(a: Arguments, implementation: str) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, Nq]`, float32 and natural."""
    if unwatched(a.q, a.k, a.v):
        out, lse = _implementation(implementation).attend(a)
        return out, lse
    out, lse = attention_op(implementation, *ATTENTION.pack(a))
    return out, lse


def select_blocks(a: SelectionArguments, implementation: str) -> Chosen:
    """The `top` best key blocks of each query block, ascending. Not differentiated."""
    if unwatched(*(x for x in (a.q, a.k, a.v) if x is not None)):
        chosen: Chosen = _implementation(implementation).select_blocks(a)
        return chosen
    return Chosen(*select_blocks_op(implementation, *SELECTION.pack(a)))


def summarize_blocks(a: SummaryArguments, implementation: str) -> Summaries:
    """Means, scores, pooled keys and slopes of blocks. Differentiable in q, k and v, but not through the choice of parts."""
    if unwatched(a.q, a.k, a.v):
        made: Summaries = _implementation(implementation).summarize_blocks(a)
        return made
    return Summaries(*summarize_blocks_op(implementation, *SUMMARY.pack(a)))


def mix_slopes(a: MixtureArguments, implementation: str) -> Tensor:
    """The mixtures Σ_J weight[., J] · slope_J `[B, H, n, D of k, D of v]`. Differentiable in both."""
    if unwatched(a.weight, a.slope):
        mixed: Tensor = _implementation(implementation).mix_slopes(a)
        return mixed
    slopes: Tensor = mix_slopes_op(implementation, *MIXTURE.pack(a))
    return slopes


def group_units(a: GroupingArguments, implementation: str) -> Units:
    """Pooled keys of groups, what query blocks see of them, and slopes.

    Differentiable in q_mean, pooled_k, pooled_v, slope, second and spread, but not through the choices of parts and of what is opened.
    """
    if unwatched(a.q_mean):
        units: Units = _implementation(implementation).group_units(a)
        return units
    return Units(*group_units_op(implementation, *GROUPING.pack(a)))


@functools.cache
def _implementation(name: str) -> Any:
    """The module of a backend, imported when it first runs: triton may be missing."""
    return importlib.import_module(f"dit_accel.kernels.{name}.calls")


@torch.library.custom_op("dit_accel::attention", mutates_args=(), schema=ATTENTION.schema("(Tensor, Tensor)"))
def attention_op(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    out, lse = _implementation(implementation).attend(ATTENTION.unpack(*given))
    return out, lse


@attention_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    q = ATTENTION.unpack(*given).q
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "dit_accel::attention_backward",
    mutates_args=(),
    schema=ATTENTION.schema("Tensor[]", "Tensor dout", "Tensor? dlse", "Tensor out", "Tensor lse"),
)
def attention_backward_op(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    """Gradients of the differentiable arguments, in the order of their declaration; absent ones are empty."""
    grads: list[Tensor] = _implementation(implementation).gradients(dout, dlse, out, lse, ATTENTION.unpack(*given))
    return grads


@attention_backward_op.register_fake
def _(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    return [gradient_like(name, ATTENTION.unpack(*given)) for name in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.implementation, *tensors, ctx.numbers, ctx.reals = inputs
    for place in ATTENTION.passing:
        tensors[place] = None
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = attention_backward_op(ctx.implementation, dout, dlse, out, lse, *tensors, ctx.numbers, ctx.reals)
    given = {name for name, x in zip(ATTENTION.tensors, tensors, strict=True) if x is not None}
    found = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if name in given}
    return _by_place(ATTENTION, found)


def _by_place(transport: Transport, grads: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
    """Gradients by name as autograd takes them: one for each input of an operator, None for what has none."""
    return (None, *(grads.get(name) for name in transport.tensors), None, None)


attention_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op(
    "dit_accel::select_blocks", mutates_args=(), schema=SELECTION.schema(f"({', '.join(['Tensor'] * len(Chosen._fields))})")
)
def select_blocks_op(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(_implementation(implementation).select_blocks(SELECTION.unpack(*given)))


@select_blocks_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(new_chosen(SELECTION.unpack(*given), gpu=implementation == "triton"))


@torch.library.custom_op(
    "dit_accel::summarize_blocks", mutates_args=(), schema=SUMMARY.schema(f"({', '.join(['Tensor'] * len(Summaries._fields))})")
)
def summarize_blocks_op(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(_implementation(implementation).summarize_blocks(SUMMARY.unpack(*given)))


@summarize_blocks_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(new_summaries(SUMMARY.unpack(*given)))


GRADIENTS_OF_SUMMARIES = ("q_mean", "pooled_k", "pooled_v", "pooled_bias", "slope", "second", "spread")
SAVED_SUMMARIES = ("pooled_k", "pooled_v", "second", "tokens", "spread", "part")


@torch.library.custom_op(
    "dit_accel::summarize_blocks_backward",
    mutates_args=(),
    schema=SUMMARY.schema(
        "(Tensor, Tensor, Tensor)",
        *(f"Tensor? d{name}" for name in GRADIENTS_OF_SUMMARIES),
        *(f"Tensor {name}" for name in SAVED_SUMMARIES),
    ),
)
def summarize_blocks_backward_op(implementation: str, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    grads, saved = len(GRADIENTS_OF_SUMMARIES), len(SAVED_SUMMARIES)
    from_results = dict(zip(GRADIENTS_OF_SUMMARIES, given[:grads], strict=True))
    results = dict(zip(SAVED_SUMMARIES, given[grads : grads + saved], strict=True))
    a = SUMMARY.unpack(*given[grads + saved :])
    dq, dk, dv = _implementation(implementation).gradients_of_summaries(from_results, results, a)
    return dq, dk, dv


@summarize_blocks_backward_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = SUMMARY.unpack(*given[len(GRADIENTS_OF_SUMMARIES) + len(SAVED_SUMMARIES) :])
    dq, dk, dv = (x.new_empty(x.shape) for x in (a.q, a.k, a.v))
    return dq, dk, dv


def _save_summaries(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.implementation, *tensors, ctx.numbers, ctx.reals = inputs
    found = Summaries(*output)
    ctx.save_for_backward(*(getattr(found, name) for name in SAVED_SUMMARIES), *tensors)


def _gradients_of_summaries(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    found = Summaries(*grads)  # type: ignore[arg-type]
    given = [getattr(found, name) for name in GRADIENTS_OF_SUMMARIES]
    if all(x is None for x in given):
        return _by_place(SUMMARY, {})
    qkv = summarize_blocks_backward_op(ctx.implementation, *given, *ctx.saved_tensors, ctx.numbers, ctx.reals)
    return _by_place(SUMMARY, dict(zip("qkv", qkv, strict=True)))


summarize_blocks_op.register_autograd(_gradients_of_summaries, setup_context=_save_summaries)


@torch.library.custom_op("dit_accel::mix_slopes", mutates_args=(), schema=MIXTURE.schema("Tensor"))
def mix_slopes_op(implementation: str, *given: Any) -> Tensor:
    slopes: Tensor = _implementation(implementation).mix_slopes(MIXTURE.unpack(*given))
    return slopes


@mix_slopes_op.register_fake
def _(implementation: str, *given: Any) -> Tensor:
    a = MIXTURE.unpack(*given)
    return a.weight.new_empty((*a.weight.shape[:3], a.slope.shape[-1], a.slope.shape[-1]))


@torch.library.custom_op("dit_accel::mix_slopes_backward", mutates_args=(), schema=MIXTURE.schema("(Tensor, Tensor)", "Tensor dout"))
def mix_slopes_backward_op(implementation: str, dout: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    """Gradients of weight and slope."""
    dweight, dslope = _implementation(implementation).gradients_of_mixture(dout, MIXTURE.unpack(*given))
    return dweight, dslope


@mix_slopes_backward_op.register_fake
def _(implementation: str, dout: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    a = MIXTURE.unpack(*given)
    return a.weight.new_empty(a.weight.shape), a.slope.new_empty(a.slope.shape)


def _save_mixture(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.implementation, *tensors, ctx.numbers, ctx.reals = inputs
    ctx.save_for_backward(*tensors)


def _gradients_of_mixture(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = mix_slopes_backward_op(ctx.implementation, dout, *ctx.saved_tensors, ctx.numbers, ctx.reals)
    return _by_place(MIXTURE, dict(zip(("weight", "slope"), grads, strict=True)))


mix_slopes_op.register_autograd(_gradients_of_mixture, setup_context=_save_mixture)


@torch.library.custom_op(
    "dit_accel::group_units", mutates_args=(), schema=GROUPING.schema(f"({', '.join(['Tensor'] * len(Units._fields))})")
)
def group_units_op(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(_implementation(implementation).group_units(GROUPING.unpack(*given)))


@group_units_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    return tuple(new_units(GROUPING.unpack(*given)))


@torch.library.custom_op(
    "dit_accel::group_units_backward",
    mutates_args=(),
    schema=GROUPING.schema(
        f"({', '.join(['Tensor'] * len(DIFFERENTIABLE_GROUPING))})",
        *(f"Tensor? d{name}" for name in GRADIENTS_OF_UNITS),
        *(f"Tensor {name}" for name in SAVED_UNITS),
    ),
)
def group_units_backward_op(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    """Gradients of DIFFERENTIABLE_GROUPING; of no elements where the argument is absent."""
    grads, saved = len(GRADIENTS_OF_UNITS), len(SAVED_UNITS)
    from_results = dict(zip(GRADIENTS_OF_UNITS, given[:grads], strict=True))
    results = dict(zip(SAVED_UNITS, given[grads : grads + saved], strict=True))
    return tuple(_implementation(implementation).gradients_of_units(from_results, results, GROUPING.unpack(*given[grads + saved :])))


@group_units_backward_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, ...]:
    a = GROUPING.unpack(*given[len(GRADIENTS_OF_UNITS) + len(SAVED_UNITS) :])
    return tuple(a.q_mean.new_empty(0 if x is None else x.shape) for x in (getattr(a, name) for name in DIFFERENTIABLE_GROUPING))


def _save_units(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.implementation, *tensors, ctx.numbers, ctx.reals = inputs
    found = Units(*output)
    ctx.save_for_backward(*(getattr(found, name) for name in SAVED_UNITS), *tensors)


def _gradients_of_units(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    found = Units(*grads)  # type: ignore[arg-type]
    given = [getattr(found, name) for name in GRADIENTS_OF_UNITS]
    if all(x is None for x in given):
        return _by_place(GROUPING, {})
    made = group_units_backward_op(ctx.implementation, *given, *ctx.saved_tensors, ctx.numbers, ctx.reals)
    by_name = zip(DIFFERENTIABLE_GROUPING, made, strict=True)
    return _by_place(GROUPING, {name: x if x.numel() else None for name, x in by_name})


group_units_op.register_autograd(_gradients_of_units, setup_context=_save_units)
