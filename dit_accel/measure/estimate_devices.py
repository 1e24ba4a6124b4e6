"""`dit-accel estimate --devices`: what devices that share a sequence send each other, and the least time. Nothing is measured."""

from dataclasses import replace
from typing import Any

from rich.table import Table

from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.measure.estimate import GPUS, MODELS, DataSheet, Model, estimate, find, layout_of
from dit_accel.method.assignment import Assignment
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.cost import TENSORS, block_count, image_pairs
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel import traffic
from dit_accel.parallel.halo import refusal

# GB/s in one direction of one device, and where it is from
LINKS = {
    "nvlink": (450.0, "NVLink 4 of an H100: 900 GB/s in both directions together"),
    "pcie": (63.0, "PCI Express 5.0, 16 lanes"),
    "ethernet": (12.5, "100 Gbit/s"),
}
MOST = 4096  # devices
# how often a softmax in PyTorch reads or writes each logit at least: written, read for the maximum, both for the difference and for its
# exponential, read for the sum and for the product with the values
SOFTMAX = 8
FLOAT32 = 4  # bytes of a logit


def estimate_devices(
    gpu: str, model: str, size: tuple[int, int], spec: AttentionSpec | Assignment | None, *, devices: int, link: str, frames: int = 1
) -> list[dict[str, Any]]:
    """Rows of one method on so many devices, of one layer's forward: megabytes that a device sends, and the least times in ms.

    By `how`: heads are exchanged ("ulysses"), or, of a method, border tokens ("halo", of the device that sends most), where `compute_ms`
    counts what PyTorch computes in the place of compiled kernels as such. The figures are None where it can't be done, and `why` says so.
    Raises ValueError as `estimate`.
    """
    bandwidth, _ = find("link", link, LINKS)
    if not 2 <= devices <= MOST:
        raise ArgumentError(f"devices must be from 2 to {MOST}, not {devices}")
    row, shape, layout = estimate(gpu, model, size, spec, frames=frames), MODELS[model], layout_of(model, size, frames)
    chip = GPUS[gpu]
    compute = row["floor_ms"] / len(shape.layers) / devices
    found = []
    for how in ("ulysses",) if spec is None else ("ulysses", "halo"):
        sent, own = None, compute  # type: float | None, float
        if how == "ulysses":
            why = f"{shape.heads} heads are not divisible by {devices}" if shape.heads % devices else ""
            sent = None if why else traffic.ulysses(layout.tokens, shape.heads, shape.head_dim, devices)
        else:
            only = spec if isinstance(spec, AttentionSpec) else None if spec is None else spec.spec
            reason = None if only is None else refusal(only)
            why = "its layers and heads have several methods" if only is None else str(reason)
            by_rank = None if only is None or reason else traffic.halo(only, layout, shape.heads, shape.head_dim, devices)
            if only is not None and by_rank is not None:
                sent, own = max(by_rank), _milliseconds_in_band(only, layout, shape, chip) / devices
        exchange = None if sent is None else sent / bandwidth / 1e6
        found.append(
            {
                "method": row["method"],
                "how": how,
                "tokens": layout.tokens,
                "megabytes_sent": None if sent is None else sent / 1e6,
                "exchange_ms": exchange,
                "compute_ms": None if exchange is None else own,
                "total_ms": None if exchange is None else own + exchange,
                "one_device_ms": compute * devices,
                "why": why if sent is None else "",
            }
        )
    return found


def _milliseconds_in_band(spec: AttentionSpec, layout: TokenLayout, shape: Model, chip: DataSheet) -> float:
    """The least time of one layer in bands, of all devices together: the image's queries over the kept keys in a compiled kernel, then its
    rest and the text's queries in PyTorch, by the logits that those keep in memory (`parallel.halo`)."""
    size = shape.heads * shape.head_dim
    pairs = image_pairs(replace(spec, rest=None, merge=None), layout, shape.head_dim) + layout.image * layout.text
    kernel = max(4 * pairs * size / 1e9 / chip.tflops, TENSORS * layout.tokens * size * 2 / 1e6 / chip.bandwidth)
    logits = layout.text * layout.tokens + (0 if spec.rest is None else layout.image * block_count(spec, layout))
    return kernel + shape.heads * logits * SOFTMAX * FLOAT32 / 1e6 / chip.bandwidth


def show(gpu: str, devices: int, link: str, rows: list[dict[str, Any]]) -> None:
    """Print the table, with what its figures are and are not."""
    view = Table("method", "how", "MB sent", "exchange, ms", "arithmetic, ms", "both, ms", "one device, ms", "gain")
    for row in rows:
        if row["total_ms"] is None:
            view.add_row(row["method"], row["how"], row["why"], "-", "-", "-", f"{row['one_device_ms']:,.3f}", "-")
            continue
        times = (f"{row[name]:,.3f}" for name in ("exchange_ms", "compute_ms", "total_ms", "one_device_ms"))
        gain = f"{row['one_device_ms'] / row['total_ms']:.1f}×"
        view.add_row(row["method"], row["how"], f"{row['megabytes_sent']:,.1f}", *times, gain)
    shown = console()
    shown.print(view)
    bandwidth, source = LINKS[link]
    shown.print(
        f"One layer's forward, {rows[0]['tokens']:,} tokens in bfloat16 on {devices} {gpu}, {bandwidth} GB/s from each ({source}), the "
        "exchange not hidden behind arithmetic. ulysses: heads are exchanged (ulysses_degree). halo: border tokens are (ring_degree), and "
        "PyTorch computes the text's queries and pooled keys, by their logits in float32."
    )
