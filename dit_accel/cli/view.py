"""`dit-accel view`: its options, and the checks of them, all made before anything is loaded."""

import math
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli import options
from dit_accel.errors import ArgumentError

EPILOG = 'Example: dit-accel view --prompt "a panda" --size 512x512 --method fovea:0.05 --layer 3 --head 0 --step 4 --out view.html'


def view(
    prompt: Annotated[str, typer.Option(help="What is drawn.")],
    out: Annotated[Path, typer.Option(help="HTML file to write, which opens in any browser and loads nothing.")] = Path("view.html"),
    model: options.Model = "builtin",
    method: Annotated[str | None, typer.Option(help="A method as in generate. Unless given: fovea, or the adapter's.")] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of save_adapter, its hub id, or a published file; it names the method itself.")
    ] = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Number of an accelerated layer, its name, or a pattern of names; may be repeated.", show_default="the middle"),
    ] = None,
    head: Annotated[list[int] | None, typer.Option(min=0, help="A head of these layers; may be repeated.", show_default="0")] = None,
    step: Annotated[
        list[int] | None, typer.Option(min=0, help="A denoising step, from 0; may be repeated.", show_default="the middle")
    ] = None,
    size: options.Size = "512x512",
    frames: options.Frames = None,
    steps: options.Steps = 8,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    megabytes: Annotated[float, typer.Option(help="The largest file that is written.")] = 8.0,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
) -> None:
    """Draw a prompt and write a page that shows what the method keeps for each token that is clicked, next to its true attention."""
    if adapter is not None and method is not None:
        raise ArgumentError("--adapter names the method itself: leave --method out")
    if not prompt.strip():
        raise ArgumentError("a prompt must not be empty")
    if not 0 < megabytes < math.inf:
        raise ArgumentError(f"--megabytes must be a number > 0, not {megabytes}")
    if step and max(step) >= steps:
        raise ArgumentError(f"the run has {steps} steps, numbered from 0, and no step {max(step)}: name an earlier one, or raise --steps")
    call = options.call_arguments(model, options.parse_size(size, model), steps, guidance, max_sequence_length)
    spec = None if adapter is not None else options.parse_accelerated(method or "fovea", reason="view requires an accelerated method")
    options.check_file(out)
    from dit_accel import accelerate, load_adapter, view_attention
    from dit_accel.cli.models import frames_call, load_pipeline

    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call), video=frames is not None)
    call |= frames_call(pipe, frames)
    if adapter is not None:
        load_adapter(pipe, adapter)
    else:
        accelerate(pipe, spec)
    layers = None if not layer else [int(name) if name.isdecimal() else name for name in layer]
    view_attention(pipe, prompt, out, layers=layers, heads=head or 0, steps=step or None, seed=seed, megabytes=megabytes, **call)
    typer.echo(f"wrote {out}")
