"""`summary`: what runs where in an accelerated pipeline, and why."""

import re
from dataclasses import dataclass
from typing import Any

import torch

from dit_accel.console import console
from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch
from dit_accel.kernels.precision import get_query_key_products
from dit_accel.method.assignment import in_words
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import lowering
from dit_accel.operator.cost import kept_density
from dit_accel.patch.anatomy import attention_layers
from dit_accel.patch.context import Context
from dit_accel.patch.processor import AcceleratedAttention, AcceleratedProcessor
from dit_accel.patch.state import Patch, patches_of


@dataclass(frozen=True)
class LayerSummary:
    """One spec of one accelerated layer, and what it did in the last forward (None before the first).

    Later rows of a layer come first.

    Attributes:
        layer: the attention module's name.
        where: the heads, steps, noise levels and sizes that it applies to, in words, empty where that is all.
        method: the spec in short.
        tokens: of the last forward's sequence, text and image.
        density_asked: the share of key blocks that the spec names, where it names one.
        density_kept: the share of pairs of image tokens that were attended to exactly.
        parameters: how many learned numbers the layer has, which its specs share.
        backend: "original" where the layer runs its original attention, "none" where the named backend can't run it.
        why: the reason.
    """

    layer: str
    where: str
    method: str
    tokens: int | None
    density_asked: float | None
    density_kept: float | None
    parameters: int
    backend: str
    why: str


def summary(pipe_or_transformer: object, *, show: bool = True) -> list[LayerSummary]:
    """What runs where: one row per accelerated layer, and per spec of it where an assignment gives it several; printed as tables, equal
    rows as one, unless `show` is false.

    `density_kept` is the share of image token pairs that the last forward attended to exactly. Raises NotAcceleratedError, nothing else: a
    backend that can't run is a row that says so.
    """
    rows, notes = [], []
    for model, patch in patches_of(pipe_or_transformer):
        context = patch.context
        for name in patch.originals:
            rows += _rows(model, context, model.get_submodule(name))
        notes += [f"{count} calls ran the original attention: {reason}" for reason, count in context.fallbacks.items()]
        notes += _original(model, patch)
    if show:
        _print(rows, notes)
    return rows


def _rows(model: Any, context: Context, module: Any) -> list[LayerSummary]:
    """Of one layer, one per rule that gives it a spec."""
    operator: AcceleratedAttention = module.dit_accel
    replaced = not isinstance(module.processor, AcceleratedProcessor)
    rows = []
    for rule in context.assignment.rules_of(operator.name):
        if (spec := rule.spec) is None:
            continue
        backend, why = _backend(model, context, operator, spec)
        rows.append(
            LayerSummary(
                layer=operator.name,
                where=rule.where,
                method=str(spec),
                tokens=context.layout.tokens if context.layout else None,
                density_asked=spec.density,
                density_kept=kept_density(spec, context.layout) if context.layout else None,
                parameters=sum(p.numel() for p in operator.parameters()),
                backend="original" if replaced else backend,
                why="its processor was replaced since the last forward, or can't be accelerated" if replaced else why,
            )
        )
    return rows


def _original(model: Any, patch: Patch) -> list[str]:
    """What keeps the original attention by the assignment, and which layers of the model are not accelerated."""
    assignment, notes = patch.context.assignment, []
    if assignment.dense_steps:
        notes.append(f"the first {assignment.dense_steps} steps of every run keep the original attention")
    for rule in assignment.after_dense_steps.rules:
        names = [name for name in patch.originals if rule in assignment.rules_of(name)]
        if rule.spec is None and names:
            notes.append(f"the original attention runs in {_names(names)}{f' for {rule.where}' if rule.where else ''}")
    left = [name for name in attention_layers(model) if name not in patch.originals]
    return [*notes, f"not accelerated: {_names(left)}"] if left else notes


def _backend(model: Any, context: Context, operator: AcceleratedAttention, spec: AttentionSpec) -> tuple[str, str]:
    """What a layer runs for a spec and why."""
    crossover = context.crossovers.get(spec)
    with torch.no_grad():  # as in a pipeline
        if context.left_to_original(spec):
            return "original", f"faster here: {crossover}"
        guarded = f"; {crossover}" if crossover is not None and context.backend == "auto" else ""
    linear = lowering.has_states(spec)
    parameters = list(model.parameters())
    parameter = next((p for p in parameters if p.is_floating_point()), parameters[0])
    # weights on the meta device are offloaded; the tokens' device is where the layer runs
    device = context.device if context.device and parameter.device.type == "meta" else parameter.device
    try:
        dtype = getattr(model, "dtype", parameter.dtype)
        backend, why = dispatch.choose(context.backend, device, dtype, operator.head_dim, linear=linear)
        parts = lowering.in_torch(spec) if backend in lowering.COMPILED else []
        named = " and ".join(type(part).__name__ for part in parts)
        return backend, why + (f", {named} in torch" if named else "") + _products(backend, device, dtype, operator.head_dim) + guarded
    except BackendError as error:
        return "none", f"every call will raise BackendError: {error}"


def _products(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Whether queries and keys are multiplied in 8 bits, where the user asks for that."""
    if backend != "triton" or get_query_key_products() == "input":
        return ""
    refusal = dispatch.int8_refusal(device, dtype, head_dim)
    return ", products of queries and keys in 8 bits" if refusal is None else f", no products in 8 bits because {refusal}"


def _print(rows: list[LayerSummary], notes: list[str]) -> None:
    from rich.table import Table  # here, as in console.py

    out = console()
    shown = any(row.where for row in rows)
    for method, backend, why in dict.fromkeys((row.method, row.backend, row.why) for row in rows):
        titles = ["layer", *(["where"] if shown else []), "tokens", "density asked", "density kept", "parameters"]
        table = Table(*titles, title=f"{method}\nbackend: {backend} ({why})", title_justify="left")
        equal: dict[tuple[str, ...], list[str]] = {}
        for row in rows:
            if (row.method, row.backend, row.why) == (method, backend, why):
                share = [f"{x:.2%}" if x is not None else "-" for x in (row.density_asked, row.density_kept)]
                cells = (*([row.where or "always"] if shown else []), str(row.tokens or "-"), *share, str(row.parameters))
                equal.setdefault(cells, []).append(row.layer)
        for cells, names in equal.items():
            table.add_row(_names(names), *cells)
        out.print(table)
    for note in notes:
        out.print(note)


def _names(names: list[str]) -> str:
    """Layers' names, those that differ by one number as one: `blocks.0-3.attn1 (4 layers)`."""
    ranges: dict[tuple[str, str], list[int]] = {}
    for name in names:
        match = re.match(r"(.*?)(\d+)(.*)", name)
        before, number, after = match.groups() if match else (name, "-1", "")
        ranges.setdefault((before, after), []).append(int(number))
    words = [name if numbers == [-1] else f"{name}{in_words(sorted(numbers))}{after}" for (name, after), numbers in ranges.items()]
    return f"{', '.join(words)} ({len(names)} layers)" if len(names) > 1 else words[0]
