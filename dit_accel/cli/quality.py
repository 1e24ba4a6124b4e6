"""`dit-accel bench quality` and `bench logits`: their options, and the checks of them, all made before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import options
from dit_accel.errors import ArgumentError

BENCH_PROMPTS = ["a panda on a blue background", "a cat left of a cactus"]
QUALITY = "Example: dit-accel bench quality --size 1024x1024 --prompts prompts.txt --out quality.json"
LOGITS = "Example: dit-accel bench logits --size 1024x1024 --method fovea --method clear:16"
Levels = Annotated[int, typer.Option(min=1, help="Noise levels of each prompt's run that are looked at, fewer than steps.")]
Prompts = Annotated[Path | None, typer.Option(help="Text file with one prompt per line; unless given, two of our own.")]


def _check(steps: int, levels: int) -> None:
    """Raise ArgumentError where a run has too few steps."""
    if steps <= levels:
        raise ArgumentError(f"--steps must be more than the {levels} noise levels that are looked at, not {steps}")


def quality(
    model: options.Model = "builtin",
    size: options.Size = "1024x1024",
    method: Annotated[
        list[str] | None, typer.Option(help="A method as in generate; may be repeated.", show_default="16 presets and variants")
    ] = None,
    prompts: Prompts = None,
    steps: options.Steps = 8,
    levels: Levels = 3,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    out: options.Result = None,
) -> None:
    """Measure how far each method is from the original attention, on the same prompts and noise."""
    _check(steps, levels)
    reason = "bench quality requires accelerated methods"
    specs = {name: options.parse_spec(name, reason=reason) for name in dict.fromkeys(method or [])} or None
    pixels = options.parse_size(size, model)
    texts = options.read_prompts(prompts) if prompts else BENCH_PROMPTS
    if out:
        options.check_file(out)
    from dit_accel.cli.models import load_pipeline
    from dit_accel.measure.quality import bench_quality

    pipe, length = load_pipeline(model, dtype, device, sizes=[pixels]), options.text_length(model, max_sequence_length)
    bench_quality(pipe, size=pixels, prompts=texts, steps=steps, levels=levels, out=out, max_sequence_length=length, specs=specs)


def logits(
    model: options.Model = "builtin",
    size: options.Size = "1024x1024",
    method: Annotated[list[str] | None, typer.Option(help="Show what the method keeps of far keys; may be repeated.")] = None,
    prompts: Prompts = None,
    steps: options.Steps = 8,
    levels: Levels = 2,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    oracle: Annotated[bool, typer.Option("--oracle", help="Also how far local linear attention is from it, which takes minutes.")] = False,
    out: options.Result = None,
) -> None:
    """Measure what the original's softmax is like, layer by layer: how wide, how many keys, how far."""
    _check(steps, levels)
    pixels, reason = options.parse_size(size, model), "bench logits requires accelerated methods"
    specs = {name: options.parse_spec(name, reason=reason) for name in dict.fromkeys(method or [])}
    texts = options.read_prompts(prompts) if prompts else BENCH_PROMPTS
    if out:
        options.check_file(out)
    from dit_accel.cli.models import load_pipeline
    from dit_accel.measure.logits import bench_logits

    pipe, length = load_pipeline(model, dtype, device, sizes=[pixels]), options.text_length(model, max_sequence_length)
    bench_logits(
        pipe, size=pixels, prompts=texts, steps=steps, levels=levels, out=out, max_sequence_length=length, specs=specs, oracle=oracle
    )
