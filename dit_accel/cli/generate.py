"""`dit-accel generate`: its options, and the checks of them, all made before anything is loaded."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dit_accel import files
from dit_accel.cli import launched, options
from dit_accel.errors import ArgumentError

if TYPE_CHECKING:
    from PIL.Image import Image

EPILOG = 'Example: dit-accel generate "a panda on a blue background" --method clear:16 --size 1024x768 --out panda.png'


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture or the video shows.")],
    model: options.Model = "builtin",
    method: Annotated[str | None, typer.Option(help=f"{options.METHOD_FORMS}. Unless given: fovea, or the adapter's.")] = None,
    size: Annotated[str | None, typer.Option(help=options.SIZE, show_default="1024x1024, with --video 512x512")] = None,
    steps: options.Steps = 16,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    adapter: Annotated[
        str | None, typer.Option(help="Folder of save_adapter, its hub id, or a published file; it names the method itself.")
    ] = None,
    dense_steps: Annotated[int, typer.Option(min=0, help="First steps that keep the original attention.")] = 0,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Run the method even where it is slower; fail where it can't run."),
    ] = False,
    video: Annotated[bool, typer.Option("--video", help="Make a video; builtin is then the built-in video model.")] = False,
    frames: Annotated[int | None, typer.Option(min=1, help="With --video: frames, 4k + 1 for most models.", show_default="17")] = None,
    fps: Annotated[int | None, typer.Option(min=1, max=100, help="With --video: frames a second.", show_default="8")] = None,
    hires: options.Hires = False,
    base: options.Base = None,
    strength: options.Strength = None,
    ntk: options.Ntk = None,
    proportional: options.Proportional = False,
    out: Annotated[
        Path | None, typer.Option(help="File to write; its ending names the format.", show_default="image.png, with --video video.mp4")
    ] = None,
) -> None:
    """Draw one picture or video with an accelerated pipeline, and show what ran in each layer.

    A video: dit-accel generate "a panda moving left" --video --size 512x512 --out panda.mp4

    Several processes that torchrun starts, one for each GPU, share the sequence; their number must divide the heads of each layer.
    """
    if adapter is not None and (method is not None or dense_steps):
        raise ArgumentError("--adapter names method and dense steps itself: leave --method and --dense-steps out")
    if not video and (frames is not None or fps is not None):
        raise ArgumentError("--frames and --fps require --video")
    if video and hires:
        raise ArgumentError("--hires draws pictures: give it or --video, not both")
    pixels = options.parse_size(size or ("512x512" if video else "1024x1024"), model)
    call = options.call_arguments(model, pixels, steps, guidance, max_sequence_length)
    recipe = options.hires_arguments(hires, base, strength, ntk, proportional)
    spec = options.parse_any(method or "fovea")
    out = out or Path("video.mp4" if video else "image.png")
    (options.check_clip if video else options.check_picture)(out)
    stages = out.with_name(f"{out.stem}-stages")
    keeps = hires and launched.processes() == 1  # what one process finds finished, the others would wait for
    if keeps:
        files.check_folder(stages)
    import torch

    from dit_accel import accelerate, generate_hires, load_adapter, summary
    from dit_accel.cli.models import frames_call, load_pipeline

    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call), video=video)
    call |= frames_call(pipe, (frames or 17) if video else None)
    if adapter is not None:
        load_adapter(pipe, adapter, strict=strict)
    elif spec is not None:
        accelerate(pipe, spec, dense_steps=dense_steps, strict=strict)
    writes = launched.spread(pipe)
    generator = torch.Generator("cpu").manual_seed(seed)
    if hires:
        drawn: Any = generate_hires(pipe, prompt, seed=seed, folder=stages if keeps else None, **recipe, **call)
    else:
        drawn = pipe(prompt=prompt, generator=generator, **({"output_type": "pt"} if video else {}), **call)
    if not writes:
        return
    if video:
        _write_video(drawn, out, fps or 8)
    else:
        _write_picture(drawn if hires else drawn.images[0], out)
    if adapter is not None or spec is not None:
        summary(pipe)
    else:
        typer.echo("the original attention in every layer")
    typer.echo(f"wrote {out}")


def _write_picture(image: "Image", path: Path) -> None:
    """Write a picture in the format that its name says."""
    from PIL import Image

    data = io.BytesIO()
    image.save(data, Image.registered_extensions()[path.suffix.lower()])
    files.write_bytes(path, data.getvalue())


def _write_video(output: Any, path: Path, fps: int) -> None:
    """Write the frames of a pipeline's output."""
    from dit_accel.pipelines.video import save_video

    save_video(output.frames[0], path, fps)
