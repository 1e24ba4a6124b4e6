"""`summary`: what runs where in an accelerated pipeline, and why."""

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from dit_accel.console import console
from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch
from dit_accel.operator import lowering
from dit_accel.operator.cost import kept_density
from dit_accel.patch.context import Context
from dit_accel.patch.processor import AcceleratedAttention, AcceleratedProcessor
from dit_accel.patch.state import patches_of


@dataclass(frozen=True)
class LayerSummary:
    """One accelerated layer: what it computes and what it did in the last forward (None before the first).

    `backend`: "original" where the layer runs its original attention, "none" where the named backend can't run it; `why` says the reason.
    """

    layer: str
    method: str
    tokens: int | None
    density_asked: float | None
    density_kept: float | None
    parameters: int
    backend: str
    why: str


def summary(pipe_or_transformer: object, *, show: bool = True) -> list[LayerSummary]:
    """What runs where: one row per accelerated layer, printed as a table unless `show` is false.

    `density_kept` is the share of image token pairs that the last forward attended to exactly. Raises NotAcceleratedError, nothing else: a
    backend that can't run is a row that says so.
    """
    rows, notes = [], []
    for model, patch in patches_of(pipe_or_transformer):
        context = patch.context
        for name in patch.originals:
            operator: AcceleratedAttention = model.get_submodule(name).dit_accel
            backend, why = _backend(model, context, operator)
            replaced = not isinstance(model.get_submodule(name).processor, AcceleratedProcessor)
            rows.append(
                LayerSummary(
                    layer=name,
                    method=str(operator.spec),
                    tokens=context.layout.tokens if context.layout else None,
                    density_asked=operator.spec.density,
                    density_kept=kept_density(operator.spec, context.layout) if context.layout else None,
                    parameters=sum(p.numel() for p in operator.parameters()),
                    backend="original" if replaced else backend,
                    why="its processor was replaced since the last forward, or can't be accelerated" if replaced else why,
                )
            )
        notes += [f"{count} calls ran the original attention: {reason}" for reason, count in context.fallbacks.items()]
        if context.dense_steps:
            notes.append(f"the first {context.dense_steps} steps of every run keep the original attention")
    if show:
        _print(rows, notes)
    return rows


def _backend(model: Any, context: Context, operator: AcceleratedAttention) -> tuple[str, str]:
    """What a layer runs and why."""
    with torch.no_grad():  # as in a pipeline
        if context.leaves:
            return "original", f"faster here: {context.crossover}"
        guarded = f"; {context.crossover}" if context.crossover is not None and context.backend == "auto" else ""
    linear = lowering.has_states(context.spec)
    parameters = list(model.parameters())
    parameter = next((p for p in parameters if p.is_floating_point()), parameters[0])
    # weights on the meta device are offloaded; the tokens' device is where the layer runs
    device = context.device if context.device and parameter.device.type == "meta" else parameter.device
    try:
        dtype = getattr(model, "dtype", parameter.dtype)
        backend, why = dispatch.choose(context.backend, device, dtype, operator.head_dim, linear=linear)
        return backend, why + guarded
    except BackendError as error:
        return "none", f"every call will raise BackendError: {error}"


def _print(rows: list[LayerSummary], notes: list[str]) -> None:
    out = console()
    for method, backend, why in dict.fromkeys((row.method, row.backend, row.why) for row in rows):
        table = Table(
            "layer",
            "tokens",
            "density asked",
            "density kept",
            "parameters",
            title=f"{method}\nbackend: {backend} ({why})",
            title_justify="left",
        )
        for row in rows:
            if (row.method, row.backend, row.why) == (method, backend, why):
                share = [f"{x:.2%}" if x is not None else "-" for x in (row.density_asked, row.density_kept)]
                table.add_row(row.layer, str(row.tokens or "-"), *share, str(row.parameters))
        out.print(table)
    for note in notes:
        out.print(note)
