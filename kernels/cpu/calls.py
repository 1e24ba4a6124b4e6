"""The CPU kernels on tensors: float32 or bfloat16, parameters and gradients float32."""

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.arguments import (
    DIFFERENTIABLE,
    Arguments,
    MixtureArguments,
    Summaries,
    SummaryArguments,
    check,
    check_mixture,
    check_summary,
    dense,
    in_order,
    new_summaries,
    text_queries,
)
from dit_accel.kernels.choosing import Chosen, SelectionArguments, check_selection, new_chosen
from dit_accel.kernels.cpu import native, replay
from dit_accel.kernels.grouping import DIFFERENTIABLE_GROUPING, GroupingArguments, Units, check_grouping, new_units
from dit_accel.kernels.precision import get_float32_attention_precision
from dit_accel.kernels.replay import MovedError, Record, Records, key_of

T = TypeVar("T")

PER_HEAD = ("offset", "weight", "bias")  # whose gradients the library gives for each head of each sample, to be summed here
# every entry of whose gradients the library writes, where others are added to
WRITTEN = ("pooled_k", "pooled_v", "pooled_bias", "pooled_var", "slopes", "far_states")


def _prepared(a: Arguments) -> Arguments:
    """The arguments as the library reads them. Raises ValueError where they do not fit each other."""
    check(a)
    for name, starts, tokens in (("q", a.q_starts, a.q.shape[2] - text_queries(a)), ("k", a.k_starts, a.k.shape[2] - a.text)):
        if int(starts[-1]) != tokens:  # it would write past the end of memory
            raise ValueError(f"{name}_starts must end with the {tokens} image tokens of {name}, not with {int(starts[-1])}")
    if a.pool_slots is not None and a.pooled_k is not None:
        units = a.pooled_k.shape[2] // a.pool_parts
        if not bool(((a.pool_slots >= 0) & (a.pool_slots < units)).all()):
            raise ValueError(f"pool_slots must be numbers of the {units} units")
    return a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v), text_q=text_queries(a))


def _rounded(a: Arguments) -> Arguments:
    """Queries, keys and values in bfloat16 where the user lets them be and the CPU's matrix unit takes that."""
    if (
        a.q.dtype != torch.float32
        or get_float32_attention_precision() == "highest"
        or native.TARGETS[native.target(bfloat16=True)] != "amx"
    ):
        return a
    return a._replace(q=a.q.bfloat16(), k=a.k.bfloat16(), v=a.v.bfloat16())


def _problem(a: Arguments) -> native.Problem:
    batch, heads, queries, channels = a.q.shape
    return native.Problem(
        batch=batch, heads=heads, channels=channels, image_q=queries - text_queries(a), image_k=a.k.shape[2] - a.text,
        q_blocks=len(a.q_starts) - 1, k_blocks=len(a.k_starts) - 1,
        list_width=a.lists.shape[-1], lists_per_head=int(a.lists.ndim == 3), extra=0 if a.extra_k is None else a.extra_k.shape[2],
        n_windows=0 if a.windows is None else a.windows.shape[0], pools=0 if a.pooled_k is None else a.pooled_k.shape[2],
        pool_width=0 if a.pool_lists is None else a.pool_lists.shape[-1],
        threads=torch.get_num_threads(), **native.fields_of(a),
    )  # fmt: skip


def together(
    records: Records, about: Hashable, tensors: Sequence[Tensor | None], constants: Callable[[], Sequence[Tensor]],
    function: Callable[[], T],
) -> T:  # fmt: skip
    """What a function gives that calls several operators on `tensors` and `constants`, no gradient being recorded: recorded as one, in
    `records`, which live as long as the constants. `about`: what else it depends on."""
    q, precision = tensors[0], get_float32_attention_precision()
    narrow = (q is not None and q.dtype == torch.bfloat16) or precision != "highest"
    targets = native.target(), narrow and native.target(bfloat16=True)
    key = key_of("together", tensors, about, precision, targets, torch.get_num_threads())
    record = records.get(key, native)
    if isinstance(record, Record):
        with contextlib.suppress(MovedError):
            return record.play(tensors)
    if record is not None:
        return function()
    with replay.Recorder(tensors, constants()) as recorder:
        token = native.noting.set(recorder.note)
        try:
            result = function()
        finally:
            native.noting.reset(token)
    made = recorder.record(result)
    if made is not None or not recorder.overlapping:
        records.put(key, native, made or False)
    return result


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, N]`."""
    a = _prepared(a)
    out, lse = torch.empty_like(a.q), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    a = _rounded(a)
    problem = _problem(a)
    problem.out, problem.lse = native.rows(out), lse.data_ptr()
    native.call("forward", problem)
    return out, lse


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments) -> list[Tensor]:
    """Gradients of the differentiable arguments; absent ones are empty."""
    a, dout, out = _prepared(a), dense(dout), dense(out)
    dlse = None if dlse is None else dlse.contiguous()
    grads = {name: _space(name, a) for name in DIFFERENTIABLE if getattr(a, name) is not None}
    rounded = _rounded(a)
    problem, dout = _problem(rounded), dout.to(rounded.q.dtype)
    problem.out, problem.lse, problem.dout, problem.dlse = native.rows(out), lse.data_ptr(), native.rows(dout), native.pointer(dlse)
    for name, x in grads.items():
        setattr(problem, f"d{name}", x.data_ptr())
    native.call("backward", problem)
    summed = {name: x.sum((0, 1) if name != "offset" else 0) for name, x in grads.items() if name in PER_HEAD}
    own = {name: x.to(a.q.dtype) for name, x in grads.items() if DIFFERENTIABLE[name].mark.strided}
    return in_order(grads | summed | own, a)


def _space(name: str, a: Arguments) -> Tensor:
    """A gradient as the library takes it: float32, for each head what all heads share, zeros but where all of it is written."""
    shape = tuple(getattr(a, name).shape)
    if name in PER_HEAD:
        shape = (*a.q.shape[:2], *(shape if name != "offset" else ()))
    return (torch.empty if name in WRITTEN else torch.zeros)(shape, dtype=torch.float32)


def select_blocks(a: SelectionArguments) -> Chosen:
    """The `top` best key blocks of each query block, ascending."""
    check_selection(a)
    a = a._replace(q=dense(a.q), k=dense(a.k), v=None if a.v is None else dense(a.v))
    batch, heads, _, channels = a.q.shape
    found = new_chosen(a, gpu=False)
    found.counts.fill_(a.top)
    sizes = {"batch": batch, "heads": heads, "channels": channels, "q_blocks": len(a.q_starts) - 1, "k_blocks": len(a.k_starts) - 1}
    native.call("select", native.Selection(**sizes, chosen=found.lists.data_ptr(), threads=torch.get_num_threads(), **native.fields_of(a)))
    return found


def _summary(a: SummaryArguments, results: Mapping[str, Tensor]) -> native.Summary:
    batch, heads, _, channels = a.k.shape
    sizes = {"batch": batch, "heads": heads, "channels": channels, "q_blocks": len(a.q_starts) - 1, "k_blocks": len(a.k_starts) - 1}
    found = {name: x.data_ptr() for name, x in results.items() if x.numel()}
    return native.Summary(**sizes, **found, threads=torch.get_num_threads(), **native.fields_of(a))


def _dense_summary(a: SummaryArguments) -> SummaryArguments:
    """The arguments as the library reads them. Raises ValueError where they do not fit each other."""
    check_summary(a)
    return a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v))


def summarize_blocks(a: SummaryArguments) -> Summaries:
    """Means, scores, pooled keys and slopes of blocks."""
    a = _dense_summary(a)
    results = new_summaries(a)
    native.call("summarize", _summary(a, results._asdict()))
    return results


def gradients_of_summaries(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: SummaryArguments) -> list[Tensor]:
    """Gradients of q, k and v, in their dtypes, from those of the results, as far as something depends on them."""
    a = _dense_summary(a)
    summary = _summary(a, results)
    given = {name: x.contiguous() for name, x in grads.items() if x is not None and x.numel()}
    for name, x in given.items():
        setattr(summary, f"d{name}", x.data_ptr())
    # of the text nothing is written
    found = [(torch.zeros if text else torch.empty)(x.shape, dtype=x.dtype) for x, text in ((a.q, a.text_q), (a.k, a.text), (a.v, a.text))]
    summary.dq, summary.dk, summary.dv = (native.rows(x) for x in found)
    native.call("summarize_backward", summary)
    return found


def _mixture(a: MixtureArguments, **more: Any) -> native.Mixture:
    check_mixture(a)
    (batch, heads, mixtures, units), channels = a.weight.shape, a.slope.shape[-1]
    sizes = {"batch": batch, "heads": heads, "channels": channels, "mixtures": mixtures, "units": units}
    return native.Mixture(**sizes, threads=torch.get_num_threads(), **native.fields_of(a), **more)


def mix_slopes(a: MixtureArguments) -> Tensor:
    """The mixtures `[B, H, n, D, D]`."""
    out = a.weight.new_empty((*a.weight.shape[:3], a.slope.shape[-1], a.slope.shape[-1]))
    native.call("mix_slopes", _mixture(a, out=out.data_ptr()))
    return out


def gradients_of_mixture(dout: Tensor, a: MixtureArguments) -> list[Tensor]:
    """Gradients of weight and slope."""
    dout = dout.contiguous()
    found = [x.new_empty(x.shape) for x in (a.weight, a.slope)]
    mixture = _mixture(a, dout=dout.data_ptr(), dweight=found[0].data_ptr(), dslope=found[1].data_ptr())
    native.call("mix_slopes_backward", mixture)
    return found


def _grouping(a: GroupingArguments, results: Mapping[str, Tensor]) -> native.Grouping:
    check_grouping(a)
    batch, heads, q_blocks, channels = a.q_mean.shape
    sizes = {
        "batch": batch, "heads": heads, "channels": channels, "q_blocks": q_blocks, "k_blocks": len(a.place),
        "slots": a.tokens.shape[-1] // a.parts, "list_width": a.lists.shape[-1], "lists_per_head": int(a.lists.ndim == 3),
        "width": results["pool_lists"].shape[-1],
    }  # fmt: skip
    found = {name: x.data_ptr() for name, x in results.items() if x.numel()}
    return native.Grouping(**sizes, **found, threads=torch.get_num_threads(), **native.fields_of(a))


def group_units(a: GroupingArguments) -> Units:
    """Pooled keys of groups, what query blocks see of them, and slopes."""
    results = new_units(a)
    native.call("group_units", _grouping(a, results._asdict()))
    return results


def gradients_of_units(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: GroupingArguments) -> list[Tensor]:
    """Gradients of DIFFERENTIABLE_GROUPING; of no elements where the argument is absent."""
    grouping = _grouping(a, results)
    given = {name: x.contiguous() for name, x in grads.items() if x is not None and x.numel()}
    for name, x in given.items():
        setattr(grouping, f"d{name}", x.data_ptr())
    written = DIFFERENTIABLE_GROUPING if "slopes" in given else ("pooled_k", "pooled_v", "second", "spread")
    found = []
    for name in DIFFERENTIABLE_GROUPING:
        given_to: Tensor | None = getattr(a, name)
        made = torch.empty_like if name in written else torch.zeros_like
        found.append(a.q_mean.new_empty(0) if given_to is None else made(given_to))
        setattr(grouping, f"d{name}", found[-1].data_ptr())
    native.call("group_units_backward", grouping)
    return found
