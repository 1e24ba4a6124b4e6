"""Curves as pictures: a training's loss, and how much of the quality is back, of one training or of several next to each other.

matplotlib is imported where something is drawn: `distill` imports this module, and matplotlib takes half a second.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTHED = 40  # windows' worth of rows over the whole training: the loss of one step is mostly of which forward it drew


def recovered(history: Sequence[dict[str, float]]) -> list[tuple[float, float, float]]:
    """(step, minutes, share recovered) of every row with a held-out error: 1 − error / the first one, which is the untrained method's."""
    rows = [row for row in history if "held_out_error" in row]
    return [(row["step"], row["seconds"] / 60, 1 - row["held_out_error"] / rows[0]["held_out_error"]) for row in rows]


def draw_curve(history: Sequence[dict[str, float]]) -> bytes:
    """The rows of log.jsonl as PNG: loss over steps next to the share recovered over minutes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_loss(left, [row for row in history if "loss" in row])
    _, minutes, shares = zip(*recovered(history), strict=True)
    right.plot(minutes, shares, marker="o", markersize=4)
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(xlabel="minutes of training", ylabel="1 − held-out error / untrained", title=f"recovered: {shares[-1]:.1%}", ylim=(None, 1))
    right.grid(alpha=0.3)
    return as_png(figure)


def draw_recovery(record: Mapping[str, Any]) -> bytes:
    """A record of `bench recovery` as PNG: a panel per method with the share recovered over minutes, or over steps where all had the same
    number, a line for each of what is trained, and the share that the original in bfloat16 has. Methods that nothing was trained for are
    left out."""
    from matplotlib.figure import Figure

    unit, label = ("minutes", "minutes of training") if record["settings"]["minutes"] is not None else ("step", "training steps")
    methods: dict[str, list[dict[str, Any]]] = {}
    for row in record["rows"]:
        if "impossible" not in row:
            methods.setdefault(row["method"], []).append(row)
    count, trained = max(1, len(methods)), list(dict.fromkeys(row["train"] for row in record["rows"]))
    figure = Figure(figsize=(4 * count, 3.6), layout="constrained")
    panels = figure.subplots(1, count, sharey=True, squeeze=False)[0]
    for axes, (method, rows) in zip(panels, methods.items(), strict=False):
        for row in rows:
            lengths, shares = ([point[key] for point in row["curve"]] for key in (unit, "recovered"))
            colour = f"C{trained.index(row['train'])}"  # the same in every panel
            axes.plot(lengths, shares, color=colour, marker="o", markersize=3, label=f"{row['train']}: {shares[-1]:.0%}")
        if record.get("floor") is not None:
            share = 1 - record["floor"]["error"] / rows[0]["error_untrained"]
            axes.axhline(share, color="gray", linestyle="--", linewidth=0.8, label="original in bfloat16")
        axes.set(title=method, xlabel=label, ylim=(None, 1))
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("1 − held-out error / untrained")
    return as_png(figure)


def _draw_loss(axes: "Axes", rows: Sequence[dict[str, float]]) -> None:
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
    axes.plot(steps, losses, alpha=0.3, linewidth=0.8)
    width = max(1, len(rows) // SMOOTHED)
    if width > 1:
        means = np.convolve(losses, np.full(width, 1 / width), "valid")
        axes.plot(steps[width - 1 :], means, color="C0", label=f"mean of {width} steps")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
    axes.grid(alpha=0.3)


def as_png(figure: "Figure") -> bytes:
    """A figure's picture."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
