"""Measurements that stay with the project: quality of every method on captured queries, keys and values, and time of a denoising step.

Times are medians of runs that alternate between the original and the accelerated model in one process; only their ratio means something
on a shared machine.
"""

import contextlib
import dataclasses
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from rich.table import Table
from torch import Tensor

from dit_accel.console import console
from dit_accel.errors import ArgumentError
from dit_accel.files import write_json
from dit_accel.finetune.data.collect import Forward, Recorder, Samples, collect
from dit_accel.finetune.velocity import predict, velocity_errors
from dit_accel.kernels import reference
from dit_accel.method import AttentionSpec, Mass, Pooled, Raster, Tiles, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.blocks_of_grid import Plan
from dit_accel.operator.cost import kept_density, multiply_adds
from dit_accel.operator.decisions import cpu_name
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import find_transformers, forward_names
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of
from dit_accel.patch.verbs import accelerate, restore

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


DRIVER = Path("/proc/driver/nvidia/version")


def graphics_card() -> dict[str, Any]:
    """The first GPU: name, memory in GiB, the driver's version where the system tells, and what torch was built for; {} without one."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    driver = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", DRIVER.read_text()) if DRIVER.is_file() else None
    built = {"cuda": torch.version.cuda} if torch.version.hip is None else {"rocm": torch.version.hip}
    return {"gpu": found.name, "gpu_memory": round(found.total_memory / 2**30, 1), "driver": driver and driver.group(1)} | built


def machine() -> dict[str, Any]:
    """What a measurement was made with."""
    return graphics_card() | {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


@dataclass(frozen=True)
class Captured:
    """Queries, keys and values `[B, H, N, D]` of one layer in one forward, and the layout they lie in.

    `scale`: of the logits, 1/sqrt(D) where None. `text_bias` `[B, text]`: added to the text keys' logits, -inf where they are padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    layer: str
    scale: float | None = None
    text_bias: Tensor | None = None

    @property
    def key_bias(self) -> Tensor | None:
        """`text_bias` over all keys, `[B, N]`."""
        image = (0, self.layout.image) if self.layout.text_first else (self.layout.image, 0)
        return None if self.text_bias is None else torch.nn.functional.pad(self.text_bias, image)


def capture_inputs(transformer: Any, forward: Forward) -> list[Captured]:
    """The attention inputs of every accelerated layer in one recorded forward, computed with exact attention in the method's place."""
    found: list[Captured] = []

    def dense_instead(layer: str) -> Callable[..., Tensor]:
        def attend(
            query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Plan, scale: float | None, bias: Tensor | None
        ) -> Tensor:
            captured = Captured(query, key, value, layout, layer, scale, bias)
            found.append(captured)
            over_keys = captured.key_bias
            mask = None if over_keys is None else over_keys[:, None, None].to(query.dtype)
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)

        return attend

    operators = operators_of(transformer)
    try:
        for name, operator in operators.items():
            operator.attend = dense_instead(name)  # type: ignore[method-assign]
        with torch.no_grad(), always(transformer), torch.compiler.set_stance("force_eager"):  # graphs do not call the operators' modules
            predict(transformer, forward.arguments)
    finally:
        for operator in operators.values():
            vars(operator).pop("attend", None)
    return found


def capture_qkv(pipe: Any, forward: Forward) -> Iterator[Captured]:
    """The attention inputs of every layer while the original model runs one recorded forward."""
    accelerate(pipe, AttentionSpec((TopK(1.0),), order=Tiles()))
    try:
        found = capture_inputs(find_transformers(pipe)[0], forward)
    finally:
        restore(pipe)
    yield from found


@dataclass(frozen=True)
class Exact:
    """Softmax attention of image queries over all keys: output `[B, H, image, D]` and log of the softmax mass `[B, H, image]`, float32."""

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Deviation:
    """A method against `Exact`, by head `[H]`: squared error and squared size of the output, and the softmax mass that is kept exactly."""

    error: Tensor
    size: Tensor
    mass: Tensor


def _image(captured: Captured) -> slice:
    layout = captured.layout
    return slice(layout.text, None) if layout.text_first else slice(0, layout.image)


def exact_attention(captured: Captured) -> Exact:
    """What the layer's image tokens get from dense attention."""
    q, k, v = (x.float().flatten(0, 1) for x in (captured.query, captured.key, captured.value))
    heads = captured.query.shape[1]
    bias = None if captured.key_bias is None else captured.key_bias.repeat_interleave(heads, 0)
    scale = captured.query.shape[-1] ** -0.5 if captured.scale is None else captured.scale
    out, lse = reference.dense_attention(q, k, v, bias, scale=scale)
    return Exact(*(x.unflatten(0, (-1, heads))[:, :, _image(captured)] for x in (out, lse)))


def deviation(captured: Captured, exact: Exact, spec: AttentionSpec, params: AttentionParameters | None = None) -> Deviation:
    """How far a method is from exact attention in one layer; `params`: what it has learned there, its start values unless given."""

    def run(spec: AttentionSpec, params: AttentionParameters | None) -> tuple[Tensor, Tensor]:
        q, k, v, more = captured.query, captured.key, captured.value, {"scale": captured.scale, "text_bias": captured.text_bias}
        out, lse = attention(q, k, v, spec, captured.layout, params=params, return_lse=True, **more)  # type: ignore[call-overload]
        return out[:, :, _image(captured)].float(), lse[:, :, _image(captured)]

    out, kept = run(spec, params)
    if spec.rest is not None:
        _, kept = run(dataclasses.replace(spec, rest=None, merge=None), None)
    error = (out - exact.output).square().sum((0, 2, 3))
    return Deviation(error, exact.output.square().sum((0, 2, 3)), (kept - exact.lse).exp().mean((0, 2)))


def attention_errors(captured: Captured, specs: dict[str, AttentionSpec]) -> dict[str, tuple[float, float]]:
    """For each spec: relative error of the image tokens' output against dense attention, and the softmax mass of what it keeps exactly."""
    exact = exact_attention(captured)
    found = {name: deviation(captured, exact, spec) for name, spec in specs.items()}
    return {name: ((d.error.sum() / d.size.sum()).sqrt().item(), d.mass.mean().item()) for name, d in found.items()}


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
        raise ArgumentError(f"steps is more than the {levels} noise levels compared, got {steps}")
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
    console().print(view)


def record_step(pipe: Any, size: tuple[int, int], max_sequence_length: int | None = None) -> dict[str, Any]:
    """The denoiser's arguments in the first step of a run at `size` (height, width); the step itself is not computed."""
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "latent"}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    recorders = [Recorder(transformer, forward_names(transformer)) for transformer in find_transformers(pipe)]
    with contextlib.ExitStack() as stack, contextlib.suppress(_Recorded), torch.no_grad():
        for recorder in recorders:
            stack.enter_context(recorder)
            stack.enter_context(_stop_before_forward(recorder.transformer))
        pipe(prompt="a panda on a blue background", generator=torch.Generator().manual_seed(0), **call)
    return next(recorder.arguments for recorder in recorders if recorder.arguments)


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
