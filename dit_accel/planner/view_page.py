"""The viewer's page: one HTML file with the pictures, and the heads' numbers as base64, which `view.js` shows.

Queries and keys are in it, rounded to 16 bits channel by channel, in the place of all pairs' weights: the page computes the softmax of the
token that is clicked. For N tokens of D channels that is 4·N·D bytes in the place of N².
"""

import base64
import hashlib
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from dit_accel import __version__
from dit_accel.errors import ArgumentError
from dit_accel.measure.pages import table
from dit_accel.operator.layout import TokenLayout
from dit_accel.planner.kept import Head, KeptPairs
from dit_accel.planner.names import short_name

SIDE, FRAME_SIDE = 1024, 512  # pixels of the picture, and of a video's frames, at most
UNIT = 65535  # of shares and errors
KINDS = {"int16": "i16", "uint16": "u16", "uint32": "u32", "uint8": "u8", "float32": "f32"}
# nothing is loaded from anywhere
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def asset(name: str) -> str:
    """The text of a file next to this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def about_bytes(layout: TokenLayout, head_dim: int) -> float:
    """Of a page for each head in it, pictures not counted."""
    return 4 / 3 * (2 * head_dim * (layout.image + layout.tokens) + 8 * layout.image + 2 * (layout.image / 64) ** 2)


class Arrays:
    """The page's arrays as base64, each once: heads share the blocks, and often the pairs."""

    def __init__(self) -> None:
        self.kept: dict[str, list[str]] = {}

    def add(self, array: np.ndarray | None) -> str | None:
        """The name of an array by which the page finds it."""
        if array is None:
            return None
        data = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
        name = hashlib.sha256(data.dtype.str.encode() + data.tobytes()).hexdigest()[:12]
        self.kept.setdefault(name, [KINDS[array.dtype.name], base64.b64encode(data.tobytes()).decode()])
        return name


def rounded(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """`[N, D]` as 16-bit integers, and the size of their unit in each channel, `[D]` float32."""
    unit = (x.double().abs().amax(0) / 32767).clamp_min(1e-30)
    return (x.double() / unit).round().numpy().astype(np.int16), unit.float().numpy()


def _shares(x: Tensor | None) -> np.ndarray | None:
    """Numbers from 0 to 1 in units of 1 / `UNIT`; more is 1."""
    return None if x is None else (x.clamp(0, 1) * UNIT).round().numpy().astype(np.uint16)


def _pairs(pairs: KeptPairs | None, arrays: Arrays) -> dict[str, Any] | None:
    if pairs is None:
        return None
    cut = [[arrays.add(side.order.astype(np.uint32)), arrays.add(side.counts.astype(np.uint32))] for side in (pairs.queries, pairs.keys)]
    _, rows, row_bytes = pairs.masks.shape
    visits, masks = arrays.add(pairs.visits.astype(np.uint32 if pairs.visits.max() > UNIT else np.uint16)), arrays.add(pairs.masks)
    return {"queries": cut[0], "keys": cut[1], "visits": visits, "masks": masks, "mask_row": rows, "mask_bytes": row_bytes}


def _check_finite(head: Head) -> None:
    """Raise ArgumentError where a number is NaN or infinite, as which no integer of the page could be read."""
    captured = head.captured
    query = captured.query[:, :, captured.layout.image_slice]
    numbers = {"queries": query, "keys": captured.key, "kept": head.kept, "estimated": head.estimated, "error": head.error}
    for name, x in numbers.items():
        if x is not None and not bool(x.isfinite().all()):
            raise ArgumentError(
                f"{name} of {head.layer}, head {head.head}, step {head.step}: NaN or infinity, which can't be shown. Look at another step, "
                "layer or head, or use a wider dtype"
            )


def _view(head: Head, layout: int, labels: Sequence[str] | None, arrays: Arrays) -> dict[str, Any]:
    """One head for the page."""
    captured = head.captured
    _check_finite(head)
    (query, query_unit), (key, key_unit) = rounded(captured.query[0, 0, captured.layout.image_slice]), rounded(captured.key[0, 0])
    bias = None if captured.text_bias is None else captured.text_bias[0].float().clamp_min(-1e30).numpy()
    return {
        "layer": head.layer, "head": head.head, "step": head.step, "noise": round(head.noise, 4), "layout": layout,
        "method": short_name(head.spec), "rest": head.spec is None or head.spec.rest is not None,
        "q": arrays.add(query), "q_scale": arrays.add(query_unit), "k": arrays.add(key), "k_scale": arrays.add(key_unit),
        "width": captured.query.shape[-1], "scale": captured.query.shape[-1] ** -0.5 if captured.scale is None else captured.scale,
        "bias": arrays.add(bias), "pairs": _pairs(head.pairs, arrays), "kept": arrays.add(_shares(head.kept)),
        "estimated": arrays.add(_shares(head.estimated)), "error": arrays.add(_shares(head.error)),
        "labelled": labels is not None and len(labels) == captured.layout.text,
    }  # fmt: skip


def pictures_of(pictures: Tensor, frames: int) -> list[str]:
    """The picture, or as many frames of a video `[F, 3, H, W]` as its tokens have, as data URLs of JPEGs."""
    made = []
    for number in range(frames):
        place = round(number * (len(pictures) - 1) / max(1, frames - 1)) if frames > 1 else len(pictures) // 2
        image = Image.fromarray((pictures[place] * 255).round().byte().permute(1, 2, 0).numpy())
        image.thumbnail((SIDE, SIDE) if frames == 1 else (FRAME_SIDE, FRAME_SIDE), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "JPEG", quality=88)
        made.append("data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode())
    return made


def _data(heads: Sequence[Head], pictures: list[str], labels: Sequence[str] | None) -> str:
    """The page's data as JSON that a script element can contain."""
    arrays, layouts = Arrays(), list(dict.fromkeys(head.captured.layout for head in heads))
    views = [_view(head, layouts.index(head.captured.layout), labels, arrays) for head in heads]
    places = [
        {
            "grids": layout.grids,
            "image": layout.image,
            "image_start": layout.image_slice.start or 0,
            "text_start": layout.text_slice.start or 0,
        }
        for layout in layouts
    ]
    data = {"views": views, "layouts": places, "arrays": arrays.kept, "pictures": pictures, "text": labels}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _options(values: Sequence[Any]) -> str:
    return "".join(f'<option value="{html.escape(str(value))}">{html.escape(str(value))}</option>' for value in dict.fromkeys(values))


def _summary(heads: Sequence[Head]) -> str:
    """The means of all views as a table."""
    several = len({head.spec for head in heads}) > 1
    rows = []
    for head in heads:
        left = 1 - float(head.kept.mean())
        estimated, lost = (left, 0.0) if head.spec is None or head.spec.rest is not None else (0.0, left)
        given = "–" if head.estimated is None else f"{head.estimated.mean():.1%}"
        cells = [f"{head.noise:.2f}", *(f"{share:.1%}" for share in (1 - left, estimated, lost)), given, f"{head.error.mean():.1%}"]
        name = f"{head.layer}, head {head.head}, step {head.step}"
        rows.append([f"{name}: {short_name(head.spec)}" if several else name, *cells])
    head_row = ["", "noise level", "kept", "estimated", "lost", "given to the estimated", "error of the output"]
    return f'<div class="scroll">{table(head_row, rows)}</div>'


def view_page(heads: Sequence[Head], pictures: Tensor, labels: Sequence[str] | None, facts: dict[str, Any]) -> str:
    """The page for some heads of one run, whose picture or frames are `[F, 3, H, W]` in [0, 1].

    `labels`: of the text's tokens, where they are known. `facts`: pipeline, prompt, seed, and the call's other arguments.
    """
    drawn = pictures_of(pictures, heads[0].captured.layout.grid[0])
    call = ", ".join(f"{name} {value}" for name, value in facts["call"].items())
    picks = {name: _options([getattr(head, name) for head in heads]) for name in ("layer", "head", "step")}
    return Template(asset("view.html")).substitute(
        policy=POLICY, css=asset("page.css") + asset("view.css"), js=asset("view.js"), prompt=html.escape(facts["prompt"]),
        about=html.escape(f"{facts['pipeline']}, {call}, seed {facts['seed']}; dit_accel {__version__}."),
        fields="".join(f'<label>{name}<select id="{name}">{options}</select></label>' for name, options in picks.items()),
        picture=drawn[0], summary=_summary(heads), data=_data(heads, drawn, labels),
    )  # fmt: skip
