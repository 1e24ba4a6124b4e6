"""The curve of error against cost as an SVG that takes its colours from the page."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 70, 30, 20, 55  # margins


@dataclass(frozen=True)
class Mark:
    """A point: `kind` is its class in the style; `error` with the ends of its interval; `label` next to it, `tip` when pointed at."""

    kind: str
    cost: float
    error: float
    low: float | None
    high: float | None
    label: str
    tip: str


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis: from `low` to `high` along pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float) -> "Axis":
        return cls(min(values) / 1.15, max(values) * 1.15, start, end)

    def at(self, value: float) -> float:
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """1, 2 and 5 times the powers of ten that are on it."""
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        return [value for value in every if self.low <= value <= self.high]


def percent(value: float) -> str:
    """A share as a short text that is not broken."""
    return f"{100 * value:.3g}\N{NO-BREAK SPACE}%"


def curve_chart(marks: Sequence[Mark], budget: float | None, x_label: str, y_label: str) -> str:
    """Marks by cost and error, both logarithmic; those of the kind "planned" are joined. `budget`: a line at this error.

    Errors and costs of 0, which a logarithm does not show, are left out.
    """
    shown = [mark for mark in marks if mark.cost > 0 and mark.error > 0]
    if not shown:
        return ""
    errors = [value for mark in shown for value in (mark.error, mark.low, mark.high) if value] + ([budget] if budget else [])
    x, y = Axis.around([mark.cost for mark in shown], LEFT, WIDTH - RIGHT), Axis.around(errors, HEIGHT - BOTTOM, TOP)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(y_label)} against {html.escape(x_label)}">',
        *_grid(x, y, x_label, y_label),
    ]
    if budget:
        place = y.at(budget)
        parts.append(f'<line class="budget" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text class="budget" x="{LEFT + 6}" y="{place - 6:.1f}">asked for: {percent(budget)}</text>')
    line = sorted((mark for mark in shown if mark.kind == "planned"), key=lambda mark: mark.cost)
    points = " ".join(f"{x.at(mark.cost):.1f},{y.at(mark.error):.1f}" for mark in line)
    parts.append(f'<polyline class="planned" points="{points}"/>')
    parts += [_mark(mark, x, y) for mark in shown]
    return "".join([*parts, "</svg>"])


def _grid(x: Axis, y: Axis, x_label: str, y_label: str) -> list[str]:
    parts = []
    for value in x.ticks():
        place = x.at(value)
        parts.append(f'<line class="grid" x1="{place:.1f}" x2="{place:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text text-anchor="middle" x="{place:.1f}" y="{HEIGHT - BOTTOM + 18}">{percent(value)}</text>')
    for value in y.ticks():
        place = y.at(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        parts.append(f'<text text-anchor="end" x="{LEFT - 8}" y="{place + 4:.1f}">{percent(value)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text text-anchor="middle" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 12}">{html.escape(x_label)}</text>')
    parts.append(f'<text text-anchor="middle" transform="translate(16 {middle}) rotate(-90)">{html.escape(y_label)}</text>')
    return parts


def _mark(mark: Mark, x: Axis, y: Axis) -> str:
    across, up = x.at(mark.cost), y.at(mark.error)
    ends = ""
    if mark.low and mark.high:
        ends = f'<line x1="{across:.1f}" x2="{across:.1f}" y1="{y.at(mark.low):.1f}" y2="{y.at(mark.high):.1f}"/>'
    shape = f'<circle cx="{across:.1f}" cy="{up:.1f}" r="5"/>'
    place = f'x="{across + 11:.1f}" y="{up - 7:.1f}"'
    if mark.kind in ("chosen", "forecast"):  # its label is below the line of the others
        place = f'text-anchor="end" x="{across - 10:.1f}" y="{up + 18:.1f}"'
        shape = f'<path d="M{across:.1f} {up - 10:.1f}l10 10l-10 10l-10-10z"/>'
    words = f"<text {place}>{html.escape(mark.label)}</text>"
    return f'<g class="{mark.kind}"><title>{html.escape(mark.tip)}</title>{ends}{shape}{words}</g>'
