"""`dit-accel evaluate`: its options, and the checks of them, all made before anything is loaded."""

from pathlib import Path
from typing import Annotated

import typer

from dit_accel import files
from dit_accel.cli import options
from dit_accel.errors import ArgumentError

EPILOG = "Example: dit-accel evaluate --prompts prompts.txt --method clear:8 --size 512x512 --steps 8 --out evaluation"


def evaluate(
    prompt: Annotated[list[str] | None, typer.Argument(help="What is drawn; several may be given.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt per line; empty lines are skipped.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html, plots and pictures.")] = Path("evaluation"),
    model: options.Model = "builtin",
    method: Annotated[str | None, typer.Option(help="A method as in generate. Unless given: fovea, or the adapter's.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of save_adapter, its hub id, or a published file; it names the method itself.")
    ] = None,
    size: options.Size = "512x512",
    frames: options.Frames = None,
    steps: options.Steps = 8,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
) -> None:
    """Measure how close an accelerated pipeline is to its own original: pictures, predictions, and every layer and head."""
    if adapter is not None and method is not None:
        raise ArgumentError("--adapter names the method itself: leave --method out")
    if bool(prompt) == (prompts is not None):
        raise ArgumentError("give prompts as arguments or as --prompts FILE" + (", not both" if prompt else ""))
    call = options.call_arguments(model, options.parse_size(size, model), steps, guidance, max_sequence_length)
    texts = options.read_prompts(prompts) if prompts is not None else [text.strip() for text in prompt or []]
    if not all(texts):
        raise ArgumentError("a prompt must not be empty")
    spec = None if adapter is not None else options.parse_accelerated(method or "fovea", reason="evaluate requires an accelerated method")
    files.check_folder(out)
    from dit_accel import accelerate, load_adapter
    from dit_accel.cli.models import frames_call, load_pipeline
    from dit_accel.measure.evaluation import NO_DISTANCE, ONE_PROMPT
    from dit_accel.measure.evaluation import evaluate as run_evaluation
    from dit_accel.measure.similarity import DISTANCE_SIDE

    for limit in [ONE_PROMPT] * (len(texts) == 1) + [NO_DISTANCE] * (min(call["height"], call["width"]) < DISTANCE_SIDE):
        typer.echo(limit)  # before the work, so that it can be changed
    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call), video=frames is not None)
    call |= frames_call(pipe, frames)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        load_adapter(pipe, adapter)
    else:
        accelerate(pipe, spec)
    run_evaluation(pipe, texts, out, seed=seed, adapter=adapter, **call)
    typer.echo(f"wrote {out / 'report.html'}")
