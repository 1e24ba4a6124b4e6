"""The curve of a training as a picture: its loss, and how much of the quality is back."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHED = 40  # windows' worth of rows over the whole training: the loss of one step is mostly of which forward it drew


def recovered(history: Sequence[dict[str, float]]) -> list[tuple[float, float]]:
    """(minutes, share recovered) of every row with a held-out error: 1 − error / the first one, which is the untrained method's."""
    rows = [row for row in history if "held_out_error" in row]
    return [(row["seconds"] / 60, 1 - row["held_out_error"] / rows[0]["held_out_error"]) for row in rows]


def draw_curve(history: Sequence[dict[str, float]]) -> bytes:
    """The rows of log.jsonl as PNG: loss over steps beside the share recovered over minutes."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_loss(left, [row for row in history if "loss" in row])
    minutes, shares = zip(*recovered(history), strict=True)
    right.plot(minutes, shares, marker="o", markersize=4)
    right.axhline(0, color="gray", linewidth=0.8)
    right.set(xlabel="minutes of training", ylabel="1 − held-out error / untrained", title=f"recovered: {shares[-1]:.1%}", ylim=(None, 1))
    right.grid(alpha=0.3)
    return as_png(figure)


def _draw_loss(axes: Axes, rows: Sequence[dict[str, float]]) -> None:
    steps, losses = [row["step"] for row in rows], np.array([row["loss"] for row in rows])
    axes.plot(steps, losses, alpha=0.3, linewidth=0.8)
    width = max(1, len(rows) // SMOOTHED)
    if width > 1:
        means = np.convolve(losses, np.full(width, 1 / width), "valid")
        axes.plot(steps[width - 1 :], means, color="C0", label=f"mean of {width} steps")
        axes.legend()
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="loss")
    axes.grid(alpha=0.3)


def as_png(figure: Figure) -> bytes:
    """A figure's picture."""
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return data.getvalue()
