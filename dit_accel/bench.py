"""Measurements that stay with the project: quality of every method on captured queries, keys and values, and time of a denoising step.

Times are medians of runs that alternate between the original and the accelerated model in one process; only their ratio means something
on a shared machine.
"""

import contextlib
import dataclasses
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dit_accel.files import write_json
from dit_accel.finetune.evaluate import predict, velocity_errors
from dit_accel.finetune.samples import Forward, Recorder, Samples, collect
from dit_accel.kernels import reference
from dit_accel.layout import TokenLayout
from dit_accel.operator import attention
from dit_accel.patch import accelerate, always, find_transformers, forward_names, operators_of, patches_of, restore
from dit_accel.plan import kept_density, multiply_adds
from dit_accel.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.spec import AttentionSpec, Mass, Pooled, Raster, Tiles, TopK

PRESETS: dict[str, AttentionSpec] = {
    "top-k 5 %, tiles": AttentionSpec((TopK(0.05),)),
    "top-k 10 %, tiles": AttentionSpec((TopK(0.1),)),
    "SLA 5 % (raster top-k while untrained)": SLA(0.05),
    "SLA 10 %": SLA(0.1),
    "CLEAR radius 8": CLEAR(8),
    "CLEAR radius 8, downsample 4": CLEAR(8, downsample=4),
    "CLEAR radius 16": CLEAR(16),
    "GNA window 17": GNA(17),
    "Fovea 2 %": Fovea(0.02),
    "Fovea 5 %": Fovea(0.05),
    "Fovea 10 %": Fovea(0.1),
    "Fovea radius 8": Fovea(radius=8),
    "Fovea radius 16": Fovea(radius=16),
    "Fovea 5 % without variance": AttentionSpec((TopK(0.05, True),), Pooled(variance=False), Mass()),
    "Fovea 5 % without log n": AttentionSpec((TopK(0.05, True),), Pooled(log_count=False), Mass()),
    "Fovea 5 %, raster order": AttentionSpec((TopK(0.05, True),), Pooled(), Mass(), Raster()),
}


def cpu_name() -> str:
    """The processor's name; Python itself knows it on some systems only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """What a measurement was made with."""
    return {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Captured:
    """Queries, keys and values `[B, H, N, D]` of one layer in one forward, and the layout they lie in."""

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    layer: str


def capture_qkv(pipe: Any, forward: Forward) -> Iterator[Captured]:
    """The attention inputs of every layer while the original model runs one recorded forward."""
    accelerate(pipe, AttentionSpec((TopK(1.0),), order=Tiles()))
    found: list[tuple[str, tuple[Tensor, Tensor, Tensor]]] = []

    def dense_instead(layer: str) -> Callable[..., Tensor]:
        def forward(query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
            found.append((layer, (query, key, value)))
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)

        return forward

    try:
        for name, operator in operators_of(pipe).items():
            operator.forward = dense_instead(name)  # type: ignore[method-assign]
        with torch.no_grad(), always(pipe):
            predict(find_transformers(pipe)[0], forward.arguments)
        ((_, patch),) = patches_of(pipe)
        layout, _ = patch.context.current()
    finally:
        restore(pipe)
    for name, (query, key, value) in found:
        yield Captured(query, key, value, layout, name)


def attention_errors(captured: Captured, specs: dict[str, AttentionSpec]) -> dict[str, tuple[float, float]]:
    """For each spec: relative error of the image tokens' output against dense attention, and the softmax mass of what it keeps exactly."""
    q, k, v, layout = captured.query, captured.key, captured.value, captured.layout
    image = slice(layout.text, None) if layout.text_first else slice(0, layout.image)
    full, lse = reference.dense_attention(*(x.float().flatten(0, 1) for x in (q, k, v)), scale=q.shape[-1] ** -0.5)
    full, lse = full.unflatten(0, q.shape[:2])[:, :, image], lse.unflatten(0, q.shape[:2])[:, :, image]
    result = {}
    for name, spec in specs.items():
        out, kept = attention(q, k, v, spec, layout, return_lse=True)
        if spec.rest is not None:
            _, kept = attention(q, k, v, dataclasses.replace(spec, rest=None, merge=None), layout, return_lse=True)
        error = (out[:, :, image] - full).norm() / full.norm()
        result[name] = (error.item(), (kept[:, :, image] - lse).exp().mean().item())
    return result


def spread(samples: Samples, levels: int) -> list[Forward]:
    """`levels` forwards of each run, evenly spread over its steps from the second on."""
    chosen = [p[round(1 + i * (len(p) - 2) / max(1, levels - 1))] for p in samples.runs() for i in range(levels)]
    return [samples[p] for p in chosen]


def bench_quality(
    pipe: Any,
    *,
    size: tuple[int, int] = (1024, 1024),
    prompts: Sequence[str],
    steps: int = 8,
    levels: int = 3,
    out: Path | None = None,
    max_sequence_length: int | None = None,
    specs: dict[str, AttentionSpec] | None = None,
) -> dict[str, dict[str, float]]:
    """Every preset, untrained, against dense attention: layer by layer on captured q, k, v, and through the whole model.

    `size` is (height, width) in pixels. Prints a table; writes it as JSON where `out` is given.
    """
    specs = PRESETS if specs is None else specs
    if steps <= levels:
        raise ValueError(f"steps is more than the {levels} noise levels compared, got {steps}")
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    with tempfile.TemporaryDirectory() as folder:
        forwards = spread(collect(pipe, prompts, folder, **call), levels)
    rows: dict[str, list[tuple[float, float]]] = {name: [] for name in specs}
    head_dim, layout = 0, TokenLayout((1, 1, 1))
    with torch.no_grad():
        for forward in forwards:
            for captured in capture_qkv(pipe, forward):
                head_dim, layout = captured.query.shape[-1], TokenLayout(captured.layout.grid)
                for name, pair in attention_errors(captured, specs).items():
                    rows[name].append(pair)
    table: dict[str, dict[str, float]] = {}
    for name, spec in specs.items():
        with always(accelerate(pipe, spec)):
            velocity = velocity_errors(pipe, forwards)
        restore(pipe)
        table[name] = {
            "attention_error": statistics.mean(error for error, _ in rows[name]),
            "kept_mass": statistics.mean(mass for _, mass in rows[name]),
            "velocity_error": statistics.mean(velocity),
            "density_kept": kept_density(spec, layout),
            "multiply_adds": multiply_adds(spec, layout, head_dim),
        }
    _show_quality(table, f"{size[1]}×{size[0]} px, {len(prompts)} prompts, {levels} noise levels, untrained")
    if out is not None:
        write_json(out, {"machine": machine(), "size": size, "prompts": list(prompts), "levels": levels, "presets": table})
    return table


def _show_quality(table: dict[str, dict[str, float]], title: str) -> None:
    view = Table("method", "attention error", "velocity error", "kept mass", "density kept", "multiply-adds", title=title)
    for name, row in table.items():
        shares = [f"{row[key]:.2%}" for key in ("density_kept", "multiply_adds")]
        view.add_row(name, f"{row['attention_error']:.4f}", f"{row['velocity_error']:.4f}", f"{row['kept_mass']:.3f}", *shares)
    Console().print(view)


def record_step(pipe: Any, size: tuple[int, int], max_sequence_length: int | None = None) -> dict[str, Any]:
    """The denoiser's arguments in the first step of a run at `size` (height, width); the step itself is not computed."""
    (transformer,) = find_transformers(pipe)
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "latent"}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    recorder = Recorder(transformer, forward_names(transformer))
    with recorder, contextlib.suppress(_Recorded), torch.no_grad(), _stop_before_forward(transformer):
        pipe("a panda on a blue background", generator=torch.Generator().manual_seed(0), **call)
    return recorder.arguments


class _Recorded(Exception):  # noqa: N818
    """Raised to leave the pipeline once its first step's arguments are known."""


@contextlib.contextmanager
def _stop_before_forward(transformer: Any) -> Iterator[None]:
    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _Recorded

    hook = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def clock() -> float:
    """Seconds, after all work given to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def timed(function: Callable[[], Any]) -> float:
    """Seconds that one call takes."""
    start = clock()
    function()
    return clock() - start
