"""The output of `dit-accel evaluate`: plots, a self-contained page, and a table on the console."""

import base64
import html
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.console import console
from dit_accel.files import write_bytes, write_text
from dit_accel.finetune.curve import as_png
from dit_accel.measure.pages import STYLE, picture, table

SIDES = {"method": "method", "bfloat16": "original in bfloat16", "again": "original again"}
# measure -> (its name for readers, how its numbers are written)
MEASURES = {
    "psnr": ("PSNR, dB", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "distance": ("1 − MS-SSIM", ".4f"),
    "difference": ("RMS difference of pixels", ".5f"),
    "change": ("change from frame to frame, of the original's", ".3f"),
    "change_difference": ("RMS difference of that change", ".5f"),
    "velocity_error": ("velocity error", ".5f"),
    "attention_error": ("attention error", ".5f"),
    "kept_mass": ("softmax mass kept exactly", ".4f"),
}


def _cell(summary: dict[str, Any] | None, form: str, infinite: str) -> str:
    """A mean with its interval. PSNR alone has infinite values."""
    if summary is None:
        return "–"
    if summary["mean"] is None:
        return infinite
    ends = "" if summary["low"] is None else f" [{summary['low']:{form}}, {summary['high']:{form}}]"
    return f"{summary['mean']:{form}}{ends}"


def measure_rows(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of all measures."""
    sides, above = record["measures"], record["method_minus_bfloat16"]
    head = ["", *(SIDES[side] for side in sides), *([] if above is None else ["method − bfloat16"])]
    rows = []
    for name, (words, form) in MEASURES.items():
        if name in sides["method"]:
            cells = [_cell(side.get(name), form, "∞") for side in sides.values()]
            rows.append([words, *cells, *([] if above is None else [_cell(above.get(name), form, "–")])])
    return head, rows


def interval_words(record: dict[str, Any]) -> str:
    """The text in brackets."""
    interval = record["interval"]
    if interval is None:
        return "One prompt, so there are no intervals."
    return (
        f"Means over {len(record['prompts'])} prompts; in brackets {interval['level']:.0%} intervals, paired bootstrap over prompts "
        f"({interval['resamples']:,} resamples, seed {interval['seed']})."
    )


def plot_noise_levels(record: dict[str, Any]) -> bytes:
    """The velocity error of every side by the timestep that the denoiser is called with, as PNG."""
    from matplotlib.figure import Figure  # here, as in finetune/curve.py

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    levels = record["noise_levels"]
    for side in record["measures"]:
        means = [level[side]["mean"] for level in levels]
        if not any(means):
            continue  # a logarithm shows no zeros: equal to the original at every level
        times = [level["timestep"] for level in levels]
        (line,) = axes.plot(times, means, marker="o", label=SIDES[side])
        if record["interval"] is not None:
            low, high = ([level[side][end] for level in levels] for end in ("low", "high"))
            axes.fill_between(times, low, high, alpha=0.2, color=line.get_color())
    if axes.lines:
        axes.set_yscale("log")
        axes.legend()
    axes.set(xlabel="timestep that the denoiser is given", ylabel="‖velocity − original‖ / ‖original‖")
    axes.grid(alpha=0.3)
    return as_png(figure)


def plot_heads(record: dict[str, Any]) -> bytes:
    """Attention error and kept mass of every layer (rows) and head (columns), as PNG; layers with fewer heads end early."""
    from matplotlib.figure import Figure

    layers = record["heads"]
    width = max(len(layer["error"]) for layer in layers)
    figure = Figure(figsize=(4 + 0.4 * width, 2 + 0.22 * len(layers)), layout="constrained")
    for axes, name, title in zip(figure.subplots(1, 2), ("error", "kept_mass"), ("attention error", "softmax mass kept"), strict=True):
        values = np.full((len(layers), width), np.nan)
        for row, layer in enumerate(layers):
            values[row, : len(layer[name])] = layer[name]
        shown = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=None if name == "error" else 1)
        axes.set(title=title, xlabel="head")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yticks(range(len(layers)), [layer["layer"] if name == "error" else "" for layer in layers], fontsize=6)
        figure.colorbar(shown, ax=axes)
    return as_png(figure)


def _plot(data: bytes, caption: str) -> str:
    words = html.escape(caption)
    source = base64.b64encode(data).decode()
    image = f'<img alt="{words}" src="data:image/png;base64,{source}" style="max-width:60rem">'
    return f"<figure>{image}<figcaption>{words}</figcaption></figure>"


def write_page(out: Path, record: dict[str, Any]) -> None:
    """Write the plots and `report.html` into `out`, where the pictures are: SIDE-INDEX.png."""
    noise, heads = plot_noise_levels(record), plot_heads(record)
    write_bytes(out / "noise-levels.png", noise)
    write_bytes(out / "heads.png", heads)
    rows = []
    for index, prompt in enumerate(record["prompts"]):
        files = {"original": "original", "method": record["method"], "bfloat16": SIDES["bfloat16"]}
        shown = [picture(path, words) for side, words in files.items() if (path := out / f"{side}-{index}.png").exists()]
        rows.append(f"<h3>“{html.escape(prompt)}”</h3><div class='row'>{''.join(shown)}</div>")
    made = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    call = ", ".join(f"{name} {value}" for name, value in record["call"].items())
    adapter = "untrained" if record["adapter"] is None else f"adapter {record['adapter']}"
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in record["notes"])
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>dit_accel evaluation</title><style>{STYLE}</style>
<h1>{html.escape(record["method"])}, {html.escape(adapter)}</h1>
<p>{html.escape(record["pipeline"])} against its own original: same prompts, same noise (prompt i from seed {record["seed"]} + i),
{html.escape(call)}.</p>
<h2>Measures</h2><p class="small">{html.escape(interval_words(record))} Velocity error: ‖accelerated − original‖ / ‖original‖ of the
denoiser's prediction, on what the original called it with. Attention error: the same of a layer's output for image tokens, against exact
attention over the same queries, keys and values, mean over layers. “Original in bfloat16” is the noise floor: what is closer than that
can't be distinguished from rounding. “Original again” must be equal.</p>{table(*measure_rows(record))}<ul class="small">{notes}</ul>
<h2>Where the error is</h2>{_plot(noise, "Velocity error by noise level")}{_plot(heads, "By layer and head, mean over prompts")}
<h2>Pictures</h2>{"".join(rows)}
<p class="small">dit_accel {record["version"]}; {html.escape(made)}.</p></html>"""
    write_text(out / "report.html", page)


def show(record: dict[str, Any]) -> None:
    """Print the measures as a table, and the notes."""
    from rich.table import Table

    head, rows = measure_rows(record)
    view = Table(*head, title=f"{record['method']} against the original, {len(record['prompts'])} prompts")
    for row in rows:
        view.add_row(*row)
    shown = console()
    shown.print(view)
    for line in [interval_words(record), *record["notes"]]:
        shown.print(line)
