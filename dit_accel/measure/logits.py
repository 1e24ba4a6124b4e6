"""`dit-accel bench logits`: what a model's softmax is like, layer by layer, and which far keys methods keep."""

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from dit_accel.console import console
from dit_accel.files import write_json
from dit_accel.measure.capture import Captured, capture_qkv
from dit_accel.measure.quality import recorded
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import coordinates, memory_order

ROWS = 128  # image queries of a layer that are looked at, evenly spread
FAR = 16  # tokens: keys farther than this, in a straight line over frames, rows and columns, are far
LINEAR_RIDGE = 0.1  # of local linear attention
LINEAR_ROWS = 4  # queries at once: each takes keys x channels, and once more
ORDERS = 80  # of the Taylor series that is tried at most; enough for logits of 20
TAYLOR_ERROR = 0.01  # relative error of the output that is asked of it
Row = dict[str, float]
COLUMNS = {
    "logit_median": "|logit|, median", "logit_99": "99 %", "keys": "effective keys", "share": "of all", "taylor": "Taylor terms",
    "linear_error": "linear step's error", "far_mass": "far mass", "text_mass": "text mass",
}  # fmt: skip


def bench_logits(
    pipe: Any,
    *,
    size: tuple[int, int] = (1024, 1024),
    prompts: Sequence[str],
    steps: int = 8,
    levels: int = 2,
    out: Path | None = None,
    max_sequence_length: int | None = None,
    specs: dict[str, AttentionSpec] | None = None,
    oracle: bool = False,
) -> dict[str, dict[str, float]]:
    """Statistics of the original's softmax by layer, means over heads, rows and forwards, and for each spec its recall of the far keys.

    `size` is (height, width) in pixels. Prints a table; writes it as JSON where `out` is given. The columns, all of a sample of the image's
    queries: the size of the logits; exp of the softmax's entropy, as a number and as a share of the keys; the terms of exp's Taylor series
    that bring every head's output within 1 % (softmax as a recurrence of all orders, arXiv 2507.23632); the error of v̄ + Cov(v, k) q for
    the output, one step of in-context linear regression; the share of the mass on image keys farther than 16 tokens, and on text.
    Recall: the share of that far mass which a spec keeps exactly. `oracle`: also how far `local_linear` attention is from the output, which
    is as much as a slope of the values around each query could change.
    """
    forwards = recorded(pipe, prompts, size, steps, levels, max_sequence_length)
    found: dict[str, list[Row]] = defaultdict(list)
    with torch.no_grad():
        for forward in forwards:
            for captured in capture_qkv(pipe, forward):
                shares = recalls(captured, specs or {})
                straight = {"local_linear": straightened(captured)} if oracle else {}
                found[captured.layer].append(statistics_of(captured) | straight | {_recall(name): share for name, share in shares.items()})
    table = {layer: {name: statistics.mean(row[name] for row in rows) for name in rows[0]} for layer, rows in found.items()}
    _show(table, list(specs or {}), f"{size[1]}×{size[0]} px, {len(prompts)} prompts, {levels} noise levels")
    if out is not None:
        write_json(out, {"machine": machine(), "size": size, "prompts": list(prompts), "levels": levels, "layers": table})
    return table


def _recall(method: str) -> str:
    """The column of a method, which may have the name of another column."""
    return f"far kept: {method}"


def _sample(captured: Captured) -> Tensor:
    """Numbers of the image's queries that are looked at, within the image."""
    image = captured.layout.image
    return torch.linspace(0, image - 1, min(ROWS, image), device=captured.query.device).long()


def _logits(captured: Captured, rows: Tensor) -> Tensor:
    """Scaled logits `[BH, rows, N]` of the sampled image queries over all keys, float64."""
    q = captured.query[:, :, captured.layout.image_slice][:, :, rows].double().flatten(0, 1)
    scale = captured.query.shape[-1] ** -0.5 if captured.scale is None else captured.scale
    logits = scale * q @ captured.key.double().flatten(0, 1).mT
    bias = captured.key_bias
    return logits if bias is None else logits + bias.double().repeat_interleave(captured.query.shape[1], 0)[:, None]


def _far(captured: Captured, rows: Tensor) -> Tensor:
    """Which keys of its own image are far from each sampled query, `[rows, image]`."""
    grids, order = captured.layout.grids, captured.layout.order
    places = torch.cat([coordinates(grid, memory_order(grid, order)) for grid in grids]).double().to(rows.device)
    number = torch.cat([torch.full((math.prod(grid),), i) for i, grid in enumerate(grids)]).to(rows.device)
    apart = (places[rows, None] - places).square().sum(-1)
    return (apart > FAR**2) & (number[rows, None] == number)


def statistics_of(captured: Captured) -> Row:
    """The columns of `bench_logits` for one layer in one forward."""
    rows = _sample(captured)
    logits, value = _logits(captured, rows), captured.value.double().flatten(0, 1)
    weights = logits.softmax(-1)
    out = weights @ value
    finite = logits[logits.isfinite()].abs()
    keys = torch.special.entr(weights).sum(-1).exp()
    of_image = weights[:, :, captured.layout.image_slice]
    return {
        "logit_median": float(finite.median()),
        "logit_99": float(finite.kthvalue(max(1, round(0.99 * len(finite)))).values),
        "keys": float(keys.mean()),
        "share": float(keys.mean()) / logits.shape[-1],
        "taylor": float(taylor_order(logits, value, out)),
        "linear_error": float((_linear_step(logits, value) - out).norm() / out.norm()),
        "far_mass": float((of_image * _far(captured, rows)).sum(-1).mean()),
        "text_mass": float(weights[:, :, captured.layout.text_slice].sum(-1).mean()),
    }


def taylor_order(logits: Tensor, value: Tensor, out: Tensor) -> int:
    """The least n for which the first n terms of exp's series in the place of exp give the output within 1 % in every head; `ORDERS` + 1
    where so many are not enough. Masked keys have a logit of -inf."""
    masked = logits.isinf()
    logits = logits.masked_fill(masked, 0)
    term = torch.ones_like(logits).masked_fill(masked, 0)
    series, size = term.clone(), out.flatten(1).norm(dim=1)
    for order in range(1, ORDERS + 1):
        if bool(((series @ value / series.sum(-1, keepdim=True) - out).flatten(1).norm(dim=1) < TAYLOR_ERROR * size).all()):
            return order
        term = term * logits / order
        series = series + term
    return ORDERS + 1


def _linear_step(logits: Tensor, value: Tensor) -> Tensor:
    """v̄ + mean of (v - v̄) times the logit's deviation: the softmax to first order around the mean of all keys, as in-context regression
    by one step of gradient descent makes it."""
    seen = logits.isfinite().to(value.dtype)
    logits, count = logits.masked_fill(seen == 0, 0), seen.sum(-1, keepdim=True)
    deviation = (logits - logits.sum(-1, keepdim=True) / count) * seen
    return (seen @ value + deviation @ value) / count


def straightened(captured: Captured) -> float:
    """How far `local_linear` attention of the sampled queries is from the softmax's output, relative to that."""
    rows = _sample(captured)
    weights = _logits(captured, rows).softmax(-1)
    query = captured.query[:, :, captured.layout.image_slice][:, :, rows].double().flatten(0, 1)
    key, value = (x.double().flatten(0, 1) for x in (captured.key, captured.value))
    out = weights @ value
    return float((local_linear(weights, query, key, value) - out).norm() / out.norm())


def local_linear(weights: Tensor, query: Tensor, key: Tensor, value: Tensor, ridge: float = LINEAR_RIDGE) -> Tensor:
    """Local linear attention (LLA, arXiv 2510.01450) `[BH, R, D]`: softmax attention is the mean of the values by its weights
    `[BH, R, N]`; this is the value at q of the straight line through them, by the same weights, with a ridge on its slope.

    o = Σ_j a_j (1 - ρ·(k_j - q)) v_j / (1 - μ·ρ) with μ = Σ a_j (k_j - q), ρ = (Σ a_j (k_j - q)(k_j - q)ᵀ + λ I)⁻¹ μ, and λ the share
    `ridge` of the mean diagonal of what it is added to.
    """
    found, identity = [], torch.eye(key.shape[-1], dtype=key.dtype, device=key.device)
    for a, q in zip(weights.split(LINEAR_ROWS, 1), query.split(LINEAR_ROWS, 1), strict=True):
        away = key[:, None] - q[:, :, None]  # [BH, rows, N, D]
        mean = (a[:, :, None] @ away)[:, :, 0]
        spread = away.mT @ (a[..., None] * away)
        size = spread.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None].clamp_min(1e-12)
        slope = torch.cholesky_solve(mean[..., None], torch.linalg.cholesky(spread + ridge * size * identity))
        left = a * (1 - (away @ slope)[..., 0])
        found.append(left @ value / (1 - (mean[:, :, None] @ slope)[..., 0]))
    return torch.cat(found, 1)


def recalls(captured: Captured, specs: dict[str, AttentionSpec]) -> Row:
    """For each spec the share of the far mass of the sampled queries that it keeps exactly."""
    if not specs:
        return {}
    rows = _sample(captured)
    logits, far = _logits(captured, rows), _far(captured, rows)
    lse = logits.logsumexp(-1)
    true = (logits.softmax(-1)[:, :, captured.layout.image_slice] * far).sum().clamp_min(1e-12)
    return {name: float((kept_weights(captured, spec, rows, lse) * far).sum() / true) for name, spec in specs.items()}


def kept_weights(captured: Captured, spec: AttentionSpec, rows: Tensor, lse: Tensor) -> Tensor:
    """The weights `[BH, rows, image]` in the whole softmax, of log mass `lse`, of what the spec keeps exactly; 0 where it keeps nothing.

    They are the derivatives of the output by the values, a row for each channel of a head at once: a channel depends on its own alone.
    """
    exact, image, width = (
        AttentionSpec(spec.keep, order=spec.order, block=spec.block),
        captured.layout.image_slice,
        captured.value.shape[-1],
    )
    value, found = captured.value.detach().clone().requires_grad_(True), []
    with torch.enable_grad():
        out, own = attention(
            captured.query, captured.key, value, exact, captured.layout, scale=captured.scale, text_bias=captured.text_bias, return_lse=True
        )
    for some in rows.split(width):
        chosen = torch.zeros_like(out)
        chosen[:, :, image][:, :, some, torch.arange(len(some), device=some.device)] = 1
        (weights,) = torch.autograd.grad(out, value, chosen, retain_graph=True)
        found.append(weights[:, :, image, : len(some)].flatten(0, 1).mT.double())
    shares = (own[:, :, image][:, :, rows].detach().double().flatten(0, 1) - lse).exp()
    return torch.cat(found, 1) * shares[..., None]


def _show(table: dict[str, Row], methods: Sequence[str], title: str) -> None:
    further = ["local linear attention"] if any("local_linear" in row for row in table.values()) else []
    view = Table("layer", *COLUMNS.values(), *further, *map(_recall, methods), title=title)
    for layer, row in table.items():
        cells = [f"{row[name]:.0f}" if name in ("keys", "taylor") else f"{row[name]:.3g}" for name in COLUMNS]
        cells += [f"{row['local_linear']:.3g}"] if further else []
        view.add_row(layer, *cells, *(f"{row[_recall(name)]:.1%}" for name in methods))
    console().print(view)
