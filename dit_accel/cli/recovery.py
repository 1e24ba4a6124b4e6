"""`dit-accel bench recovery`: its options, and the checks of them, all made before anything is loaded."""

import math
from pathlib import Path
from typing import Annotated, get_args

import typer

from dit_accel.cli import options
from dit_accel.errors import ArgumentError
from dit_accel.finetune.config import OptimizerName, Trainable

EPILOG = "Example: dit-accel bench recovery --method clear:8 --method sla:0.05 --train attention --minutes 5 --out recovery.json"


def recovery(
    method: Annotated[
        list[str] | None, typer.Option(help="A method as in generate; may be repeated.", show_default="fovea:0.05, clear:8 and sla:0.05")
    ] = None,
    train: Annotated[
        list[str] | None, typer.Option(help="parameters, lora or attention, as in distill; may be repeated.", show_default="all three")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes of training for each method and each of what is trained.", show_default="5")
    ] = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of training in place of minutes: the same for all, however busy the machine is.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help="Text file with one prompt per line, of which the last are held out; unless given, 62 that builtin knows."),
    ] = None,
    held_out: Annotated[
        int | None,
        typer.Option(min=1, help="Number of prompts, the last, held out for measuring.", show_default="a tenth, and 2 of the 62"),
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Held-out prompts, at most, that are drawn for the PSNR.")] = 2,
    model: options.Model = "builtin",
    size: options.Size = "512x512",
    steps: options.Steps = 8,
    optimizer: Annotated[OptimizerName, typer.Option(help="Optimizer of the attention's weights.")] = "adamw",
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    out: Annotated[
        Path,
        typer.Option(
            help="JSON file for the result, which the same command continues; the curves go next to it as PNG, samples to OUT-runs."
        ),
    ] = Path("recovery.json"),
) -> None:
    """Measure how much of the original's quality a short training brings back, and in how many minutes."""
    if minutes is not None and train_steps is not None:
        raise ArgumentError("--minutes and --train-steps both say how long to train: give one of them")
    minutes = 5.0 if minutes is None else minutes
    if not 0 < minutes < math.inf:
        raise ArgumentError(f"minutes must be a number > 0, not {minutes}")
    call = options.call_arguments(model, options.parse_size(size, model), steps, guidance, max_sequence_length)
    texts = options.read_prompts(prompts) if prompts is not None else []
    if prompts is None and model != "builtin":
        raise ArgumentError(f"model {model!r} requires --prompts: only builtin has prompts of its own")
    if prompts is not None and len(set(texts)) < 2:
        raise ArgumentError(f"{prompts} must contain at least two different prompts, one of them to hold out, not {len(set(texts))}")
    known: tuple[Trainable, ...] = get_args(Trainable)
    if wrong := sorted(set(train or []) - set(known)):
        raise ArgumentError(f"train must be one of {', '.join(known)}, not {wrong[0]!r}")
    names = method or ["fovea:0.05", "clear:8", "sla:0.05"]
    specs = {name: options.parse_accelerated(name, reason="bench recovery requires accelerated methods") for name in dict.fromkeys(names)}
    options.check_file(out)
    if out.suffix == ".png":
        raise ArgumentError(f"--out must name a JSON file, next to which the curves are drawn as .png, not {out}")
    from dit_accel.cli.models import load_pipeline
    from dit_accel.measure.demo import HELD_OUT, training_prompts
    from dit_accel.measure.recovery import Recovery, bench_recovery

    texts = list(dict.fromkeys(texts)) or [*training_prompts(60, HELD_OUT), *HELD_OUT]
    count = held_out or (max(1, len(texts) // 10) if prompts is not None else len(HELD_OUT))
    if count >= len(texts):
        raise ArgumentError(f"--held-out must be below the number of different prompts ({len(texts)}), not {count}")
    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call))
    pipe.set_progress_bar_config(disable=True)
    measurement = Recovery(
        pipe, texts[:-count], texts[-count:], texts[-count:][:pictures], minutes, call, seed, optimizer,
        out.with_name(f"{out.stem}-runs"), train_steps,
    )  # fmt: skip
    bench_recovery(measurement, specs, [name for name in known if not train or name in train], out=out)
    typer.echo(f"wrote {out}")
