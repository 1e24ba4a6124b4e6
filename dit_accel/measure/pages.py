"""Self-contained HTML pages: their parts, and the demo's report."""

import base64
import html
import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from dit_accel.files import write_text

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1b1b1f; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } img { width: 100%; display: block; border-radius: 6px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: .6rem 0 1.4rem; }
figure { margin: 0; } figcaption { font-size: .85rem; color: #555; } .small { color: #555; font-size: .9rem; }
"""


def picture(path: Path, caption: str) -> str:
    """The picture as a figure of at most 512 pixels, embedded."""
    image = Image.open(path).convert("RGB")
    image.thumbnail((512, 512), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=88)
    source = base64.b64encode(data.getvalue()).decode()
    words = html.escape(caption)
    return f'<figure><img alt="{words}" src="data:image/jpeg;base64,{source}"><figcaption>{words}</figcaption></figure>'


def table(head: list[str], rows: list[list[str]]) -> str:
    """Rows of text under a head."""
    cells = ["".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{html.escape(h)}</th>' for h in head)}</tr>{''.join(f'<tr>{c}</tr>' for c in cells)}</table>"


def _pictures(out: Path, record: dict[str, Any], originals: list[str]) -> str:
    parts = []
    for index, prompt in enumerate(record["scale"]["prompts"]):
        for state in ("untrained", "distilled"):
            figures = [picture(out / originals[index], "original")]
            figures += [picture(out / row[state][index], f"{row['name']}, {state}") for row in record["methods"]]
            parts.append(f"<h3>“{html.escape(prompt)}”, {state}</h3><div class='row'>{''.join(figures)}</div>")
    return "".join(parts)


def _quality(record: dict[str, Any]) -> str:
    rows = []
    for row in record["methods"]:
        for state, velocity in zip(("untrained", "distilled"), row["velocity"], strict=True):
            q = row["quality"][state]
            cells = [f"{row['density']:.1%}", f"{velocity:.4f}", f"{q['psnr']:.1f}", f"{q['ssim']:.3f}", f"{q['distance']:.3f}"]
            rows.append([f"{row['name']}, {state}", *cells])
    head = ["method", "pairs kept exactly", "held-out velocity error", "PSNR dB", "SSIM", "1 − MS-SSIM"]
    return table(head, rows)


def _speed(record: dict[str, Any]) -> str:
    rows = []
    for row in record["methods"]:
        s = row["step"]
        whole, part = s["original"] / s["accelerated"], s["original_attention"] / s["accelerated_attention"]
        cells = [f"{s['original']:.2f}", f"{s['accelerated']:.2f}", f"{whole:.2f}×"]
        cells += [f"{s['original_attention']:.3f}", f"{s['accelerated_attention']:.3f}", f"{part:.2f}×"]
        rows.append([row["name"], *cells, f"{row['seconds']:.1f}", f"{row['distill_seconds']:.0f}"])
    head = ["method", "step: original s", "accelerated s", "ratio", "attention call: original s", "accelerated s", "ratio"]
    return table([*head, "s per picture", "distillation s"], rows)


def write_sheet(out: Path, record: dict[str, Any], originals: list[str], path: Path, side: int = 256) -> None:
    """Write one JPEG of all pictures: a row per prompt; the original, then each method untrained and distilled, named above."""
    names = [("original", "")] + [(row["name"], state) for row in record["methods"] for state in ("untrained", "distilled")]
    files = [originals] + [row[state] for row in record["methods"] for state in ("untrained", "distilled")]
    sheet = Image.new("RGB", (side * len(files), 44 + side * len(originals)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (name, state) in enumerate(names):
        draw.text((side * column + 8, 4), f"{name}\n{state}", fill="black", font_size=15)
        for row, file in enumerate(files[column]):
            picture = Image.open(out / file).convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
            sheet.paste(picture, (side * column, 44 + side * row))
    sheet.save(path, "JPEG", quality=90)


def write_report(out: Path, record: dict[str, Any], originals: list[str], mask: str) -> Path:
    """Write `report.html` into `out` from the demo's record and its pictures; returns its path."""
    scale = record["scale"]
    masks = [picture(out / mask, "original: every token")] + [picture(out / row["mask"], row["name"]) for row in record["methods"]]
    made = ", ".join(f"{k} {v}" for k, v in record["machine"].items())
    page = f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>dit_accel demo</title><style>{STYLE}</style>
<h1>dit_accel demo</h1>
<p>The built-in FLUX-architecture model at {scale["size"]}×{scale["size"]} pixels, {scale["steps"]} steps, same prompts and seeds
throughout; the original takes {record["original_seconds"]:.1f} s per picture. Each method was distilled from the original at
{scale["train_size"]}×{scale["train_size"]} for {scale["train_steps"]} steps; the prompts shown were not among its training samples.</p>
{_pictures(out, record, originals)}
<h2>Quality</h2><p class="small">Against the original's pictures at {scale["size"]} px; velocity error is
‖accelerated − original‖ / ‖original‖ on held-out prompts at {scale["train_size"]} px.</p>{_quality(record)}
<h2>Time</h2><p class="small">One denoising step and one attention module's call at
{scale["speed_size"]}×{scale["speed_size"]} pixels, the two sides in turns in one process;
seconds per picture at {scale["size"]} px.</p>{_speed(record)}
<h2>What one query sees</h2><p class="small">Weight of one query (cyan) on every image token in the middle layer; black is unseen.</p>
<div class="row">{"".join(masks)}</div>
<p class="small">{html.escape(made)}; {record["minutes"]:.1f} minutes in all; seed {record["seed"]}.</p></html>"""
    path = out / "report.html"
    write_text(path, page)
    return path
