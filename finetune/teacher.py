"""The original model with the accelerated layers next to it, and which of two states of a layer's parameters is nearer to it."""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.finetune.losses import relative_error
from dit_accel.finetune.processes import is_main, share, summed
from dit_accel.finetune.session import Distillation
from dit_accel.finetune.velocity import predict
from dit_accel.patch.processor import AcceleratedAttention
from dit_accel.patch.state import operators_of
from dit_accel.patch.verbs import dense

Learn = Callable[[AcceleratedAttention, tuple[Any, ...], Tensor, Tensor], None]
COMPARED = 16  # held-out forwards by which the two states of a layer are compared


@contextlib.contextmanager
def comparing_with_teacher(run: Distillation, learn: Learn) -> Iterator[None]:
    """The original model, whose accelerated layers also run their operators: `learn` gets each with its arguments, its output and the
    original's, with which the forward goes on."""

    def hook(operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        target = _original(*arguments)
        learn(operator, arguments, out, target)
        return target

    context = run.patch.context
    with dense(run.transformer):
        hooks = [operator.register_forward_hook(hook) for operator in operators_of(run.transformer).values()]
        context.enabled = True  # the operators are called; weights and LoRA stay the teacher's
        try:
            with torch.compiler.set_stance("force_eager"):  # graphs do not call the operators' modules
                yield
        finally:
            context.enabled = False
            for handle in hooks:
                handle.remove()


def _original(query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """What the original attention makes of an operator's arguments."""
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def values_of(operators: Mapping[str, AcceleratedAttention]) -> dict[str, Tensor]:
    """Copies of the layers' parameters, by the layer's name and their own."""
    return {f"{layer}.{name}": p.detach().clone() for layer, op in operators.items() for name, p in op.params.named_parameters()}


def compared_positions(run: Distillation) -> list[int]:
    """Held-out forwards in which the assignment runs a spec, COMPARED of them, drawn by the seed: evenly spread ones could all be of one
    noise level, as those of 16 runs of 28 forwards each."""
    positions: Sequence[int] = range(len(run.held_out))
    if run.patch.context.assignment.of_moments:
        moments = ((n, run.held_out_moment(n)) for n in positions)
        positions = [n for n, moment in moments if moment is not None and run.runs_at(moment)]
    drawn = random.Random(f"{run.config.seed} compared").sample(positions, min(COMPARED, len(positions)))
    return sorted(drawn)


@torch.no_grad()
def keep_better(run: Distillation, before: Mapping[str, Tensor]) -> list[str]:
    """Give those layers their parameters of before back whose attention was nearer to the original's with them, on held-out forwards, and
    warn of them; returns their names. Of several specs that take turns, the mean of the errors under each decides.

    Args:
        before: as `values_of` gives them.
    """
    operators = operators_of(run.transformer)
    errors = {name: torch.zeros(3, dtype=torch.float64, device=run.device) for name in operators}  # before, after; and of how many calls

    def learn(operator: AcceleratedAttention, arguments: tuple[Any, ...], out: Tensor, target: Tensor) -> None:
        with _given(operator, before):
            other = operator.forward(*arguments)
        found = [relative_error(x, target).double() for x in (other, out)]
        errors[operator.name] += torch.stack([*found, torch.ones_like(found[0])])

    chosen = compared_positions(run)
    for number in share(len(chosen)):
        position = chosen[number]
        for method in run.methods():
            with method, run.replayed(run.held_out_moment(position)), run.autocast(), comparing_with_teacher(run, learn):
                predict(run.transformer, run.held_out[position].arguments)
    totals = dict(zip(errors, summed(list(errors.values())), strict=True))
    worse = [name for name, (first, last, _) in totals.items() if not last <= first]
    for name in worse:
        _set(operators[name], before)
    if worse and is_main():
        first, last = (float(torch.stack([totals[name][i] / totals[name][2] for name in worse]).mean()) for i in (0, 1))
        warnings.warn(
            f"dit_accel: the first stage left {len(worse)} of {len(operators)} layers further from the original's attention on held-out "
            f"prompts (squared relative error {first:.3g} before, {last:.3g} after); these keep their start values. More prompts, or "
            "parameter_steps=0, may serve better",
            stacklevel=2,
        )
    return worse


@contextlib.contextmanager
def _given(operator: AcceleratedAttention, values: Mapping[str, Tensor]) -> Iterator[None]:
    """A layer with other parameters, for the length of a `with` block."""
    own = values_of({operator.name: operator})
    _set(operator, values)
    try:
        yield
    finally:
        _set(operator, own)


@torch.no_grad()
def _set(operator: AcceleratedAttention, values: Mapping[str, Tensor]) -> None:
    for name, parameter in operator.params.named_parameters():
        parameter.copy_(values[f"{operator.name}.{name}"])
