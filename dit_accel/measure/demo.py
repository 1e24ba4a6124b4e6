"""`dit-accel demo`: the whole job on the built-in model, with pictures, measurements and a report.

Original pictures; the same prompts and seeds through each method, untrained; a short distillation of each from the original; the same
again; then the time of one step at high resolution. Everything is written to one folder, the report last.
"""

import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from dit_accel.files import check_folder, write_json
from dit_accel.finetune.config import DistillConfig
from dit_accel.finetune.data.collect import Forward, collect
from dit_accel.finetune.distill import distill
from dit_accel.measure.capture import Captured, capture_qkv, record_step
from dit_accel.measure.pages import write_report, write_sheet
from dit_accel.measure.similarity import compare, save_picture
from dit_accel.measure.step import step_times
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec, TopK
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import raster_order
from dit_accel.patch.modes import always
from dit_accel.patch.summary import summary
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.pipelines.builtin import TEXT_TOKENS, builtin_pipeline
from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, CONCEPTS, RELATIONS, article

METHODS = {"Fovea 5 %": Fovea(0.05), "CLEAR radius 8": CLEAR(8), "SLA 10 %": SLA(0.1)}


@dataclass(frozen=True)
class Scale:
    """The amount of work of the demo. Sizes are pixels of square pictures."""

    size: int
    steps: int
    prompts: tuple[str, ...]
    train_size: int
    train_prompts: int
    train_sampling_steps: int
    train_steps: int
    speed_size: int
    speed_repeats: int


FULL = Scale(1024, 8, ("a panda on a blue background", "a burger on a yellow background"), 512, 60, 6, 300, 2048, 3)
QUICK = Scale(512, 6, ("a panda on a blue background",), 256, 8, 4, 30, 1024, 1)

HELD_OUT = ("a frog on a pink background", "a turtle left of a mushroom on a blue background")


def training_prompts(count: int, excluded: Sequence[str]) -> list[str]:
    """Prompts of the distillation: captions as the built-in model knows them, one in four with two things, none of the excluded ones."""
    draw, nouns, found = random.Random(0), list(CONCEPTS.values()), dict[str, None]()
    draw.shuffle(nouns)
    while len(found) < count:
        caption = article(nouns[len(found) % len(nouns)])
        if draw.random() < 0.25:
            caption += f" {draw.choice(RELATIONS)} {article(draw.choice(nouns))}"
        if draw.random() < 0.85:
            caption += f" on a {draw.choice(list(BACKGROUNDS))} background"
        if caption not in excluded:
            found[caption] = None
    return list(found)


@dataclass
class MethodResult:
    """One method's results; pictures are file names, one per prompt. Quality is the mean against the original's pictures."""

    name: str
    method: str
    untrained: list[str]
    distilled: list[str]
    density: float
    seconds: float  # per picture
    quality: dict[str, dict[str, float]]  # "untrained" and "distilled" -> psnr, ssim, distance
    velocity: tuple[float, float]  # held-out relative error, before and after
    distill_seconds: float
    mask: str


def run_demo(out: Path, *, quick: bool = False, seed: int = 0) -> Path:
    """Run the demo into the folder `out`; returns the report's path. Raises ValueError where `out` can't be written."""
    check_folder(out)
    start = time.perf_counter()
    scale = QUICK if quick else FULL
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    bar = tqdm(total=3 + 3 * len(METHODS), desc="original", disable=None)
    originals, seconds = generate(pipe, scale, seed, out, "original")
    bar.update()
    with tempfile.TemporaryDirectory(prefix=".work-", dir=out) as work:  # every demo distils anew
        training = prepare_training(pipe, scale, Path(work))
        attention_inputs = inputs_for_masks(pipe, scale)
        bar.update()
        rows = [
            run_method(pipe, name, spec, scale, seed, out, originals, training, attention_inputs, bar) for name, spec in METHODS.items()
        ]
    bar.set_description("speed")
    step = record_step(pipe, (scale.speed_size,) * 2, TEXT_TOKENS)
    times = step_times(pipe, step, list(METHODS.values()), scale.speed_repeats)
    bar.update()
    bar.close()
    mask = mask_picture(attention_inputs, AttentionSpec((TopK(1.0),)), out / "mask-original.png")
    methods = [vars(row) | {"step": time} for row, time in zip(rows, times, strict=True)]
    record = {
        "machine": machine(), "quick": quick, "seed": seed, "scale": vars(scale), "original_seconds": seconds,
        "minutes": (time.perf_counter() - start) / 60, "methods": methods,
    }  # fmt: skip
    write_json(out / "demo.json", record)
    names = [f"original-{i}.png" for i in range(len(scale.prompts))]
    write_sheet(out, record, names, out / "sheet.jpg")
    return write_report(out, record, names, mask)


def generate(pipe: Any, scale: Scale, seed: int, out: Path, name: str) -> tuple[Tensor, float]:
    """The scale's prompts as pictures `[P, 3, H, W]` in [0, 1], written as PNG, and seconds per picture."""
    pictures, start = [], time.perf_counter()
    for index, prompt in enumerate(scale.prompts):
        generator = torch.Generator().manual_seed(seed + index)
        call = {"height": scale.size, "width": scale.size, "num_inference_steps": scale.steps, "max_sequence_length": TEXT_TOKENS}
        pictures.append(pipe(prompt, generator=generator, output_type="pt", **call).images)
    seconds = (time.perf_counter() - start) / len(scale.prompts)
    for index, picture in enumerate(pictures):
        save_picture(picture[0], out / f"{name}-{index}.png")
    return torch.cat(pictures).float(), seconds


def prepare_training(pipe: Any, scale: Scale, work: Path) -> tuple[Path, Path]:
    """Record the original sampling the training and held-out prompts; every method learns from the same samples."""
    call: dict[str, Any] = {"height": scale.train_size, "width": scale.train_size, "num_inference_steps": scale.train_sampling_steps}
    folders = (work / "samples", work / "held-out")
    prompts = (training_prompts(scale.train_prompts, [*HELD_OUT, *scale.prompts]), HELD_OUT)
    for folder, captions, seed in zip(folders, prompts, (1000, 2000), strict=True):
        collect(pipe, captions, folder, seed=seed, max_sequence_length=TEXT_TOKENS, **call)
    return folders


def inputs_for_masks(pipe: Any, scale: Scale) -> Captured:
    """Queries, keys and values of the middle layer in the first prompt's first step at the demo's size."""
    arguments = record_step(pipe, (scale.size, scale.size), TEXT_TOKENS)
    captured = list(capture_qkv(pipe, Forward(arguments, torch.empty(0), torch.empty(0), "", 0, 0)))
    return captured[len(captured) // 2]


def mask_picture(captured: Captured, spec: AttentionSpec, path: Path) -> str:
    """Write what one query sees: its weight on each image token's value, by differentiating the output; black is unseen.

    Weights are shown on a fourth-root scale, mean over heads; the query is a third from the top left. Returns the file's name.
    """
    value = captured.value.clone().requires_grad_(True)
    with torch.enable_grad():
        out, _ = attention(captured.query, captured.key, value, spec, captured.layout, return_lse=True)
    _, height, width = captured.layout.grid
    places = raster_order(captured.layout.grid, captured.layout.order)
    token = captured.layout.text + int(places[(height // 3) * width + width // 3])
    (weight,) = torch.autograd.grad(out[:, :, token].sum(), value)
    weight = weight[0, :, captured.layout.text :].mean((0, 2))[places].view(height, width).clamp_min(0)
    shade = (weight / weight.max()).pow(0.25)
    picture = torch.stack([shade, shade**1.5, shade**3 * 0.6 + 0.12 * (shade > 0)])
    picture[:, height // 3, width // 3] = torch.tensor([0.2, 0.9, 1.0])
    save_picture(picture.repeat_interleave(512 // height, 1).repeat_interleave(512 // width, 2), path)
    return path.name


def run_method(
    pipe: Any, name: str, spec: AttentionSpec, scale: Scale, seed: int, out: Path, originals: Tensor, training: tuple[Path, Path],
    attention_inputs: Captured, bar: Any,
) -> MethodResult:  # fmt: skip
    """Everything the demo shows of one method; the pipeline is restored afterwards."""
    slug = name.lower().replace(" %", "").replace(" ", "-")
    bar.set_description(f"{name}, untrained")
    with always(accelerate(pipe, spec)):
        first, seconds = generate(pipe, scale, seed, out, f"{slug}-untrained")
    density = summary(pipe, show=False)[0].density_kept or 0.0
    bar.update()
    bar.set_description(f"{name}, distillation")
    start = time.perf_counter()
    # the attention's own weights learn faster than a LoRA in so few steps, and the recorded predictions alone need no teacher's forward
    config = DistillConfig(
        train="attention",
        learning_rate=6e-4,
        attention_weight=0.0,
        steps=scale.train_steps,
        output_dir=str(training[0].parent / f"distill-{slug}"),
        checkpoint_every=scale.train_steps,
        seed=seed,
    )
    result = distill(pipe, training[0], config, held_out=training[1], progress=False)
    distill_seconds = time.perf_counter() - start
    bar.update()
    bar.set_description(f"{name}, distilled")
    second, _ = generate(pipe, scale, seed, out, f"{slug}-distilled")
    restore(pipe)
    bar.update()
    mask = mask_picture(attention_inputs, spec, out / f"mask-{slug}.png")
    bar.update()
    return MethodResult(
        name=name,
        method=str(spec),
        untrained=_names(slug, "untrained", scale.prompts),
        distilled=_names(slug, "distilled", scale.prompts),
        density=density,
        seconds=seconds,
        quality={"untrained": compare(first, originals), "distilled": compare(second, originals)},
        velocity=(result.error_before, result.error_after),
        distill_seconds=distill_seconds,
        mask=mask,
    )


def _names(slug: str, state: str, prompts: Sequence[str]) -> list[str]:
    return [f"{slug}-{state}-{i}.png" for i in range(len(prompts))]
