"""`dit-accel estimate`: arithmetic, memory traffic and the least time, for a GPU, a model and a size. Nothing here is measured."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.method import AttentionSpec, Disc, Window
from dit_accel.method.assignment import Assignment, groups
from dit_accel.operator.cost import image_pairs, kept_pairs, passes, with_text
from dit_accel.operator.layout import TokenLayout


@dataclass(frozen=True)
class DataSheet:
    """Dense bfloat16 TFLOP/s and GB/s of memory, from the vendor's data sheet."""

    tflops: float
    bandwidth: float
    source: str


GPUS = {
    "a100": DataSheet(312, 2039, "NVIDIA A100 80 GB SXM data sheet"),
    "h100": DataSheet(989, 3350, "NVIDIA H100 SXM data sheet, without sparsity"),
    "h200": DataSheet(989, 4800, "NVIDIA H200 SXM data sheet, without sparsity"),
    "b200": DataSheet(2250, 8000, "NVIDIA HGX B200 data sheet, without sparsity"),
    "rtx4090": DataSheet(165.2, 1008, "NVIDIA Ada architecture white paper, float32 accumulation"),
    "rtx5090": DataSheet(209.5, 1792, "NVIDIA RTX Blackwell architecture white paper, float32 accumulation"),
    "mi300x": DataSheet(1307.4, 5300, "AMD Instinct MI300X data sheet, without sparsity"),
}


@dataclass(frozen=True)
class Model:
    """What a model's self-attention computes; sizes from its public configuration. `frames`: how many become one token row in time.
    `blocks`: names of its layers with N for their number, and how many there are of each."""

    heads: int
    head_dim: int
    blocks: dict[str, int]
    text: int
    pixels: int = 16
    frames: int = 1

    @property
    def layers(self) -> list[str]:
        """The layers' names."""
        return [name.replace("N", str(n)) for name, count in self.blocks.items() for n in range(count)]


DOUBLE, SINGLE = "transformer_blocks.N.attn", "single_transformer_blocks.N.attn"
MODELS = {
    "flux": Model(24, 128, {DOUBLE: 19, SINGLE: 38}, 512),
    "sd3.5-large": Model(38, 64, {DOUBLE: 38}, 333),  # 77 CLIP and 256 T5 tokens
    "qwen-image": Model(24, 128, {DOUBLE: 60}, 512),
    "hunyuan-video": Model(24, 128, {DOUBLE: 20, SINGLE: 40}, 256, frames=4),
    "wan-1.3b": Model(12, 128, {"blocks.N.attn1": 30}, 0, frames=4),  # text in cross-attention
    "wan-14b": Model(40, 128, {"blocks.N.attn1": 40}, 0, frames=4),
    "builtin": Model(4, 64, {DOUBLE: 1, SINGLE: 5}, 32),
}

# Seconds per image on one H100, FLUX.1-dev, 20 steps by our reading (CLEAR, arXiv 2412.16112, table 7): None is the original attention
PUBLISHED: dict[tuple[str, str, int], dict[float | None, float]] = {
    ("flux", "h100", 1024): {None: 4.45, 8: 4.40, 16: 4.56, 32: 5.45},
    ("flux", "h100", 2048): {None: 20.90, 8: 15.67, 16: 17.19, 32: 19.95},
    ("flux", "h100", 4096): {None: 148.97, 8: 69.41, 16: 83.13, 32: 109.57},
    ("flux", "h100", 8192): {None: 1842.48, 8: 293.50, 16: 360.83, 32: 496.22},
}


def find(kind: str, name: str, known: dict[str, Any]) -> Any:
    """A GPU or a model by name. Raises ValueError at one that is not known."""
    if name not in known:
        raise ArgumentError(f"{kind} must be one of {list(known)}, not {name!r}")
    return known[name]


def tile_visits(window: Window, grid: tuple[int, int, int], q_tile: tuple[int, int, int], k_tile: tuple[int, int, int]) -> tuple[int, int]:
    """Key tiles that the busiest query tile visits, and all of them, in tile order (NATTEN's count, arXiv 2504.16922)."""
    visited, total = 1, 1
    for axis, length in enumerate(grid):
        first, last = window.bounds(grid, axis)[0].unbind(-1)
        tiles = [slice(i, i + q_tile[axis]) for i in range(0, length, q_tile[axis])]
        visited *= max(int(last[t].max()) // k_tile[axis] - int(first[t].min()) // k_tile[axis] + 1 for t in tiles)
        total *= -(-length // k_tile[axis])
    return visited, total


def _shares(spec: AttentionSpec | Assignment | None, layout: TokenLayout, shape: Model) -> dict[AttentionSpec | None, float]:
    """The share of all layers' heads that run each spec, the original attention as None."""
    if spec is None:
        return {None: 1.0}
    assignment = Assignment.of(spec)
    if assignment.of_moments:
        raise ArgumentError(f"an estimate is of one forward, and forwards differ by step under {assignment}: leave those rules out")
    assignment.check([dict.fromkeys(shape.layers, shape.heads)])
    found: Counter[AttentionSpec | None] = Counter()
    for layer in shape.layers:
        for group in groups(assignment.at(None, layout.image), layer, shape.heads):
            found[group.spec] += len(group.heads)
    return {part: count / found.total() for part, count in found.items()}


def gigaflops(pairs: float, layout: TokenLayout, model: Model) -> float:
    """Of one layer's attention over image `pairs`, text keys for every query and text queries over everything: 4·pairs·heads·head_dim.

    The count of CLEAR's tables (arXiv 2412.16112): scores and values, a multiply-add as two.
    """
    return 4 * with_text(pairs, layout) * model.heads * model.head_dim / 1e9


def layout_of(model: str, size: tuple[int, int], frames: int) -> TokenLayout:
    """The tokens of a picture or clip of a model. Raises ValueError at unknown names and sizes that don't fit."""
    shape = find("model", model, MODELS)
    if any(side < shape.pixels or side % shape.pixels for side in size):
        raise ArgumentError(f"height and width must be multiples of {shape.pixels} pixels, not {size}")
    if frames < 1 or (frames - 1) % shape.frames or (frames > 1 and shape.frames == 1):
        allowed = f"1 plus a multiple of {shape.frames}" if shape.frames > 1 else "1, as it makes images"
        raise ArgumentError(f"frames of {model} must be {allowed}, not {frames}")
    return TokenLayout(((frames - 1) // shape.frames + 1, size[0] // shape.pixels, size[1] // shape.pixels), shape.text)


def estimate(gpu: str, model: str, size: tuple[int, int], spec: AttentionSpec | Assignment | None, *, frames: int = 1) -> dict[str, Any]:
    """One row: GFLOP per layer as kept and as computed, megabytes per layer, the floor of the time of all layers' attention, in ms.

    `size`: height and width in pixels; `spec` None: the original attention. Under an assignment the figures of a layer are the mean of
    all. Raises ValueError at unknown names, sizes that don't fit, and assignments that depend on steps or noise levels.
    """
    chip, shape, layout = find("gpu", gpu, GPUS), find("model", model, MODELS), layout_of(model, size, frames)
    shares = _shares(spec, layout, shape)
    kept = sum(share * gigaflops(kept_pairs(part, layout), layout, shape) for part, share in shares.items())
    computed = sum(share * gigaflops(image_pairs(part, layout, shape.head_dim), layout, shape) for part, share in shares.items())
    megabytes = sum(share * passes(part) for part, share in shares.items()) * layout.tokens * shape.heads * shape.head_dim * 2 / 1e6
    times = (computed / chip.tflops, megabytes / chip.bandwidth)  # ms: GFLOP over TFLOP/s, MB over GB/s
    only = next(iter(shares)) if len(shares) == 1 else None
    disc = None if only is None else only.find(Disc)
    published = PUBLISHED.get((model, gpu, size[0]), {}) if size[0] == size[1] else {}
    return {
        "method": "original" if spec is None else str(spec),
        "tokens": layout.tokens,
        "gflop_kept": kept,
        "gflop_computed": computed,
        "megabytes": megabytes,
        "floor_ms": max(times) * len(shape.layers),
        "bound": "arithmetic" if times[0] >= times[1] else "memory",
        "published_seconds": published.get(disc.radius if disc else None) if spec is None or disc is not None else None,
    }


def show(gpu: str, model: str, rows: list[dict[str, Any]]) -> None:
    """Print the table, with what its figures are and are not."""
    chip, shape = find("gpu", gpu, GPUS), find("model", model, MODELS)
    view = Table("method", "GFLOP kept", "GFLOP computed", "MB", "floor, ms", "bound by", "original / method", "published, s per image")
    for row in rows:
        published = "-" if row["published_seconds"] is None else f"{row['published_seconds']}"
        view.add_row(
            row["method"], f"{row['gflop_kept']:,.1f}", f"{row['gflop_computed']:,.1f}", f"{row['megabytes']:,.0f}",
            f"{row['floor_ms']:,.2f}", row["bound"], f"{rows[0]['floor_ms'] / row['floor_ms']:.1f}×", published,
        )  # fmt: skip
    shown = console()
    shown.print(view)
    shown.print(
        f"An estimate, not a measurement: {rows[0]['tokens']:,} tokens; GFLOP and MB of one layer, floor of the attention of "
        f"all {len(shape.layers)} layers in one forward at {chip.tflops} TFLOP/s and {chip.bandwidth} GB/s ({chip.source}). No kernel "
        "reaches it. Published: seconds for a whole image by CLEAR's own implementation (arXiv 2412.16112, table 7)."
    )
