"""`dit-accel estimate --devices`: what devices that share a sequence send each other, and the least time. Nothing is measured."""

from typing import Any

from rich.table import Table

from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.measure.estimate import MODELS, estimate, find, layout_of
from dit_accel.method.assignment import Assignment
from dit_accel.method.spec import AttentionSpec
from dit_accel.parallel import traffic
from dit_accel.parallel.halo import refusal

# GB/s in one direction of one device, and where it is from
LINKS = {
    "nvlink": (450.0, "NVLink 4 of an H100: 900 GB/s in both directions together"),
    "pcie": (63.0, "PCI Express 5.0, 16 lanes"),
    "ethernet": (12.5, "100 Gbit/s"),
}
MOST = 4096  # devices


def estimate_devices(
    gpu: str, model: str, size: tuple[int, int], spec: AttentionSpec | Assignment | None, *, devices: int, link: str, frames: int = 1
) -> list[dict[str, Any]]:
    """Rows of one method on so many devices, of one layer's forward: megabytes that a device sends, and the least times in ms.

    By `how`: heads are exchanged ("ulysses"), or, of a method, border tokens ("halo", of the device that sends most). The figures are
    None where it can't be done, and `why` says so. Raises ValueError as `estimate`.
    """
    bandwidth, _ = find("link", link, LINKS)
    if not 2 <= devices <= MOST:
        raise ArgumentError(f"devices must be from 2 to {MOST}, not {devices}")
    row, shape, layout = estimate(gpu, model, size, spec, frames=frames), MODELS[model], layout_of(model, size, frames)
    compute = row["floor_ms"] / len(shape.layers) / devices
    found = []
    for how in ("ulysses",) if spec is None else ("ulysses", "halo"):
        sent: float | None = None
        if how == "ulysses":
            why = f"{shape.heads} heads are not divisible by {devices}" if shape.heads % devices else ""
            sent = None if why else traffic.ulysses(layout.tokens, shape.heads, shape.head_dim, devices)
        else:
            only = spec if isinstance(spec, AttentionSpec) else None if spec is None else spec.spec
            reason = None if only is None else refusal(only)
            why = "its layers and heads have several methods" if only is None else str(reason)
            by_rank = None if only is None or reason else traffic.halo(only, layout, shape.heads, shape.head_dim, devices)
            sent = None if by_rank is None else max(by_rank)
        exchange = None if sent is None else sent / bandwidth / 1e6
        found.append(
            {
                "method": row["method"],
                "how": how,
                "tokens": layout.tokens,
                "megabytes_sent": None if sent is None else sent / 1e6,
                "exchange_ms": exchange,
                "compute_ms": None if exchange is None else compute,
                "total_ms": None if exchange is None else compute + exchange,
                "one_device_ms": compute * devices,
                "why": why if sent is None else "",
            }
        )
    return found


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
        "exchange not hidden behind arithmetic. ulysses: heads are exchanged (ulysses_degree). halo: border tokens are (ring_degree)."
    )
