"""The forecast of a high-resolution picture, shown before it starts: memory from shapes, time from one forward at the base size."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from dit_accel.clock import timed
from dit_accel.console import console
from dit_accel.method.assignment import Assignment, Moment, Rules, groups
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import attention_layers, heads_of
from dit_accel.pipelines import family_of
from dit_accel.pipelines.hires.memory import memory_bytes

Size = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """One stage to come: its size in pixels, the noise level of each forward, and the method, or None for the original attention."""

    size: Size
    noise: tuple[float, ...]
    method: Assignment | None

    def rules(self, tokens: int) -> list[Rules | None]:
        """What each forward runs, None for the original attention everywhere."""
        if self.method is None:
            return [None] * len(self.noise)
        return [self.method.at(Moment(step, level), tokens) for step, level in enumerate(self.noise)]


@dataclass(frozen=True)
class Shape:
    """What the figures are made of. `layers`: name, heads and channels per head of each attention module; `unit`: side of a token in
    pixels; `text`: tokens in addition to the image's; `text_first`: whether they are placed before it."""

    layers: tuple[tuple[str, int, int], ...]
    unit: int
    text: int
    text_first: bool

    @classmethod
    def of(cls, transformer: Any, unit: int, text: int) -> "Shape":
        family: Any = family_of(transformer)
        layers = tuple((name, *heads_of(transformer, name, module)) for name, module in attention_layers(transformer).items())
        return cls(layers, unit, text, family.text_first)

    @property
    def width(self) -> int:
        """Channels of a token within the blocks."""
        return max(heads * head_dim for _, heads, head_dim in self.layers)

    def layout(self, size: Size) -> TokenLayout:
        """The sequence of a picture of this size."""
        return TokenLayout((1, size[0] // self.unit, size[1] // self.unit), self.text, self.text_first)

    def attention(self, size: Size, rules: Rules | None) -> float:
        """Multiply-adds of all layers' attention in one forward."""
        layout, total = self.layout(size), 0.0
        pairs: dict[tuple[AttentionSpec | None, int], float] = {}
        for name, heads, head_dim in self.layers:
            for spec, some in groups(rules or Rules(), name, heads):
                if (spec, head_dim) not in pairs:
                    pairs[spec, head_dim] = computed_pairs(spec, layout, head_dim)
                total += 2 * pairs[spec, head_dim] * len(some) * head_dim
        return total


@dataclass(frozen=True)
class Timed:
    """One forward of the original model at the base size: its seconds, and its linear layers' multiply-adds by the rows they saw."""

    seconds: float
    linear: dict[int, float]


def timed_forward(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Timed:
    """The faster of two forwards; the caller switches acceleration off."""
    linear: Counter[int] = Counter()
    with _counting(transformer, linear):
        first = _seconds(transformer, args, kwargs)
    return Timed(min(first, _seconds(transformer, args, kwargs)), dict(linear))


@contextlib.contextmanager
def _counting(transformer: Any, linear: "Counter[int]") -> Iterator[None]:
    def count(module: Any, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        linear[x.shape[-2] if x.ndim > 2 else 1] += math.prod(x.shape[:-1]) * module.in_features * module.out_features

    hooks = [module.register_forward_pre_hook(count) for module in transformer.modules() if isinstance(module, nn.Linear)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _seconds(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    fresh = {name: dict(value) if isinstance(value, dict) else value for name, value in kwargs.items()}  # models take entries out
    with torch.no_grad():
        return timed(lambda: transformer(*args, **fresh))


def forward_seconds(timed: Timed, shape: Shape, base: Size, size: Size, rules: Rules | None) -> float:
    """Seconds of one forward at another size, were every multiply-add as fast as at the base size: too many where that one is tiny."""
    before, after = shape.layout(base), shape.layout(size)
    grown = {before.image: after.image / before.image, before.tokens: after.tokens / before.tokens}
    linear = sum(work * grown.get(rows, 1.0) for rows, work in timed.linear.items())
    work = sum(timed.linear.values()) + shape.attention(base, None)
    return timed.seconds * (linear + shape.attention(size, rules)) / work


def show(
    pipe: Any, transformer: Any, shape: Shape, timed: Timed, base: Size, stages: Sequence[Stage], tile: int | None, batch: int
) -> None:
    """Print the forecast of the stages to come."""
    from rich.table import Table  # here, as in console.py

    view = Table(
        "stage", "attention", "tokens", "forwards", "seconds", "denoising GB", "autoencoder GB", title="Forecast, not a measurement"
    )
    total, peak, weights = 0.0, 0, 0
    for stage in stages:
        running = Counter(stage.rules(shape.layout(stage.size).image))
        seconds = sum(count * forward_seconds(timed, shape, base, stage.size, rules) for rules, count in running.items())
        tokens, side = batch * shape.layout(stage.size).tokens, tile if stage.size != base else None
        memory = memory_bytes(pipe, transformer, shape.width, tokens, stage.size, side)
        weights, total = memory["weights"], total + seconds
        peak = max(peak, weights + max(memory["denoising"], memory["autoencoder"]))
        view.add_row(
            f"{stage.size[1]}×{stage.size[0]}", "original" if stage.method is None else "method",
            f"{shape.layout(stage.size).tokens:,}", str(len(stage.noise)), f"{seconds:,.1f}",
            f"{memory['denoising'] / 1e9:.2f}", f"{memory['autoencoder'] / 1e9:.2f}",
        )  # fmt: skip
    out = console()
    out.print(view)
    if method := next((stage.method for stage in stages if stage.method), None):
        out.print(f"method: {method}")
    out.print(
        f"Forecast: {total:,.0f} s of denoising, {peak / 1e9:.1f} GB in tensors at the peak, {weights / 1e9:.1f} GB of them weights. "
        f"One forward took {timed.seconds:.2f} s at {base[1]}×{base[0]}; other sizes follow by multiply-adds, with one forward a step: "
        "guidance in two passes takes twice that. Encoding text and pictures comes on top."
    )
