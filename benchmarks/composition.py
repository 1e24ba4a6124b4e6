"""How close methods are to the original where other things change the model or its run: few steps, guidance, caches, quantised weights.

    python benchmarks/composition.py --out benchmarks/composition.json

The built-in image model draws `PROMPTS` with seeds 0, 1, ...: the original and each method, untrained, in each setting. "same" is a method
against the original in the same setting, "plain" against the original without it (more steps, no cache, float32). Errors of the velocity
are on forwards of the original's own run in that setting; a run with a cache has none, because what a forward gives depends on those before
it. The file is written after each setting. No time is measured, so that a busy machine changes nothing.
"""

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig
from diffusers.models.transformers import transformer_flux
from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from dit_accel import CLEAR, SLA, Assignment, AttentionSpec, Fovea, Rule, builtin_pipeline
from dit_accel.files import write_json
from dit_accel.finetune.data.collect import Forward, Recorder
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.demo import HELD_OUT
from dit_accel.measure.evaluation import draw
from dit_accel.measure.similarity import compare
from dit_accel.measure.timing import machine
from dit_accel.method.assignment import AnyMethod
from dit_accel.patch.anatomy import forward_names
from dit_accel.patch.modes import always
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.pipelines.builtin import TEXT_TOKENS

PROMPTS = ("a panda on a blue background", HELD_OUT[1])
METHODS: dict[str, AttentionSpec] = {
    "Fovea 5 %": Fovea(0.05), "Fovea radius 8": Fovea(radius=8), "CLEAR radius 8": CLEAR(8), "SLA 10 %": SLA(0.1),
}  # fmt: skip
MORE = {"Fovea 5 %": Fovea(0.2), "Fovea radius 8": Fovea(radius=16), "CLEAR radius 8": CLEAR(16), "SLA 10 %": SLA(0.4)}
TWO = {name: METHODS[name] for name in ("Fovea 5 %", "CLEAR radius 8")}  # one that needs no training, one that does
USUAL, FEW = 6, 4  # steps
FIRST, LAST = (0.95, 1.0), (0.0, 0.7)  # noise levels of the first and the last of four steps
FORWARDS = 4  # of a run in which the velocity is compared


@dataclass(frozen=True)
class Setting:
    """What runs together with the methods: arguments of the pipeline's call, a cache of diffusers, other weights."""

    name: str
    methods: Mapping[str, AnyMethod] = field(default_factory=lambda: TWO)
    call: Mapping[str, Any] = field(default_factory=dict)
    cache: Callable[[Any], Any] | None = None  # the cache's settings, from the pipeline
    weights: Callable[[Any], Any] | None = None  # changes the pipeline's weights


def dense_at(noise: tuple[float, float]) -> dict[str, AnyMethod]:
    """The methods, with the original attention at these noise levels."""
    return {name: Assignment((Rule(spec), Rule(None, noise=noise))) for name, spec in METHODS.items()}


def broadcast(pipe: Any) -> PyramidAttentionBroadcastConfig:
    """Attention of every other step, but for the first steps and the end."""
    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 951),
        current_timestep_callback=lambda: pipe.current_timestep,
    )  # fmt: skip


def faster(pipe: Any) -> FasterCacheConfig:
    """Attention of every other step, but for the first steps; what it leaves out is extrapolated."""
    return FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 951), is_guidance_distilled=True,
        spatial_attention_block_identifiers=("transformer_blocks.*attn",), tensor_format="BCHW",
        current_timestep_callback=lambda: pipe.current_timestep, attention_weight_callback=lambda module: 0.3,
    )  # fmt: skip


def taylor(pipe: Any) -> TaylorSeerCacheConfig:
    """Attention of every other step from the third on; the others by their straight line."""
    return TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)


def float8(pipe: Any) -> None:
    """Weights kept in float8, computed with in float32."""
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def two_passes(scale: float) -> dict[str, Any]:
    """Arguments of guidance between a forward with the prompt and one without."""
    return {"guidance_scale": 1.0, "true_cfg_scale": scale, "negative_prompt": ""}


PLAIN = Setting("nothing else", METHODS)
SETTINGS = (
    PLAIN,
    Setting("4 steps", METHODS, {"num_inference_steps": FEW}),
    Setting("4 steps, the first dense", dense_at(FIRST), {"num_inference_steps": FEW}),
    Setting("4 steps, the last dense", dense_at(LAST), {"num_inference_steps": FEW}),
    Setting("4 steps, more kept", MORE, {"num_inference_steps": FEW}),
    Setting("no guidance", call={"guidance_scale": 1.0}),
    Setting("high guidance, 5", call={"guidance_scale": 5.0}),
    Setting("guidance in two passes, 3.5", call=two_passes(3.5)),
    Setting("FirstBlockCache", cache=lambda pipe: FirstBlockCacheConfig(threshold=0.3)),
    Setting("TaylorSeer", cache=taylor),
    Setting("PyramidAttentionBroadcast", cache=broadcast),
    Setting("FasterCache", cache=faster),
    Setting("bfloat16", weights=lambda pipe: pipe.to(torch.bfloat16)),
    Setting("float8 weights", weights=float8),
    Setting("int8 weights", weights=lambda pipe: quantize_(pipe.transformer, Int8WeightOnlyConfig())),
)


@contextlib.contextmanager
def cached(pipe: Any, cache: Callable[[Any], Any] | None) -> Iterator[None]:
    """The pipeline with a cache."""
    if cache is None:
        yield
        return
    pipe.transformer.enable_cache(cache(pipe))
    try:
        yield
    finally:
        pipe.transformer.disable_cache()


@dataclass
class Original:
    """The original in a setting: its pictures `[P, 3, H, W]`, some forwards of each run, and the share of attention that a cache left."""

    pictures: Tensor
    forwards: list[Forward]
    attention: float


def original(pipe: Any, setting: Setting, prompts: Sequence[str], call: dict[str, Any]) -> Original:
    """Draw with the original attention, and keep `FORWARDS` forwards of each run: every n-th from the first on."""
    pictures, forwards, calls, runs = [], [], 0, 0
    for seed, prompt in enumerate(prompts):
        counted = mock.patch.object(transformer_flux, "dispatch_attention_fn", wraps=transformer_flux.dispatch_attention_fn)
        recorder = Recorder(pipe.transformer, forward_names(pipe.transformer))
        with cached(pipe, setting.cache), counted as attention, recorder:
            pictures.append(draw(pipe, prompt, seed, call))
        kept = recorder.forwards[:: max(1, len(recorder.forwards) // FORWARDS)][:FORWARDS]
        forwards += [Forward(*forward, forward[1], prompt, seed, index) for index, forward in enumerate(kept)]
        calls, runs = calls + attention.call_count, runs + len(recorder.forwards)
    layers = len(pipe.transformer.transformer_blocks) + len(pipe.transformer.single_transformer_blocks)
    return Original(torch.cat(pictures), forwards, calls / (layers * runs))


def measured(pipe: Any, setting: Setting, prompts: Sequence[str], call: dict[str, Any], plain: Tensor | None) -> dict[str, Any]:
    """A row of the file, and under "pictures" the original's; `plain`: the original's pictures without the setting."""
    call = call | dict(setting.call)
    ours = original(pipe, setting, prompts, call)
    plain = ours.pictures if plain is None else plain
    row: dict[str, Any] = {"name": setting.name, "attention": ours.attention, "original": closeness(ours.pictures, plain), "methods": {}}
    for name, method in setting.methods.items():
        with always(accelerate(pipe, method)):
            with cached(pipe, setting.cache):
                drawn = torch.cat([draw(pipe, prompt, seed, call) for seed, prompt in enumerate(prompts)])
            found: dict[str, Any] = {"method": str(method), "same": closeness(drawn, ours.pictures), "plain": closeness(drawn, plain)}
            if setting.cache is None and isinstance(method, AttentionSpec):
                errors = velocity_errors(pipe, ours.forwards)
                count = len(errors) // len(prompts)
                found["velocity_error"] = statistics.mean(errors)
                found["by_forward"] = [statistics.mean(errors[n::count]) for n in range(count)]
        restore(pipe)
        row["methods"][name] = found
        print(f"{setting.name}, {name}: {found}", flush=True)
    return row | {"pictures": ours.pictures}


def closeness(pictures: Tensor, others: Tensor) -> dict[str, float] | None:
    """`compare`, None for equal pictures, whose PSNR is infinite."""
    return None if torch.equal(pictures, others) else compare(pictures, others)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1024)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="so many of them")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    prompts = PROMPTS[: given.prompts]
    call = {"height": given.size, "width": given.size, "num_inference_steps": USUAL, "max_sequence_length": TEXT_TOKENS}
    record: dict[str, Any] = {"machine": machine(), "prompts": prompts, "call": call, "rows": []}
    plain: Tensor | None = None
    pipe = quiet()
    for setting in SETTINGS:
        if setting.weights is not None:
            pipe = quiet()
            setting.weights(pipe)
        row = measured(pipe, setting, prompts, call, plain)
        pictures = row.pop("pictures")
        plain = pictures if plain is None else plain
        record["rows"].append(row)
        write_json(given.out, record)


def quiet() -> Any:
    """The built-in pipeline, without a bar of its progress."""
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


if __name__ == "__main__":
    main()
