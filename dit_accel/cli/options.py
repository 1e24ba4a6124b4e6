"""Options that commands share, and the checks of their values, all made before anything is loaded or computed."""

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dit_accel import files
from dit_accel.errors import ArgumentError

if TYPE_CHECKING:
    from dit_accel.method.assignment import Assignment
    from dit_accel.method.spec import AttentionSpec

BUILTIN_GUIDANCE = 3.5

METHOD_FORMS = (
    "none (the original attention), fovea, fovea:0.05, fovea:0.05,order=1, fovea:0.05,conv=5, fovea:radius=8, "
    "fovea:blocks=3, clear:16, clear:8,downsample=4, clear:2x8x8, sla:0.1, sla:0.1,scope=all,feature_map=elu, gna:80,stride=16, "
    "gna:9x9,dilation=2, or a JSON file of a spec or an assignment; shares are of key blocks, lengths in tokens, 9x5 "
    "is height x width, 2x8x8 frames x height x width"
)

DType = Literal["auto", "float32", "bfloat16", "float16"]
Model = Annotated[str, typer.Option(help="'builtin' (ships with the package), a folder in diffusers' format, or a hub id.")]
SIZE = "WIDTHxHEIGHT in pixels, both multiples of a token's side: 16 for builtin and most models."
Size = Annotated[str, typer.Option(help=SIZE)]
Sizes = Annotated[
    list[str] | None,
    typer.Option("--size", help=f"{SIZE} May be repeated: prompts take the sizes in turn.", show_default="512x512"),
]
Steps = Annotated[int, typer.Option(min=1, help="Denoising steps.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise: the same seed gives the same result.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Guidance scale: how closely the picture follows the prompt; unless given, the pipeline's default, and 3.5 for builtin.",
    ),
]
TextLength = Annotated[
    int | None,
    typer.Option("--max-sequence-length", min=1, help="Text tokens; unless given, the pipeline's default, and 32 for builtin."),
]
Frames = Annotated[
    int | None,
    typer.Option(min=1, help="Number of frames, for a video: 4k + 1 for most models. builtin is then the built-in video model."),
]
Weights = Annotated[DType, typer.Option(help="Type of the weights; auto is bfloat16 on CUDA and float32 elsewhere.")]
Device = Annotated[str, typer.Option(help="auto (CUDA where there is one, else cpu), or a torch device, as in cuda:1.")]
Prompts = Annotated[Path, typer.Option(help="Text file with one prompt per line; empty lines are skipped.")]
Hires = Annotated[
    bool,
    typer.Option(
        "--hires", help="Draw --base first, then each doubling over it in part. Finished stages are kept in OUT-stages, by one process."
    ),
]
Base = Annotated[int | None, typer.Option(min=1, help="With --hires: the first picture's longer side, at most.", show_default="1024")]
Strength = Annotated[
    float | None,
    typer.Option(
        help="With --hires: share of the steps, above 0 to 1, that each doubling draws again: less keeps more.", show_default="0.7"
    ),
]
Ntk = Annotated[
    float | None,
    typer.Option(help="With --hires: factor of the rotary base above --base.", show_default="10 for FLUX, else 1"),
]
Proportional = Annotated[bool, typer.Option("--proportional", help="With --hires: scale logits by the number of tokens, as CLEAR does.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--method", help="A method as in generate; may be repeated. The original is always measured.", show_default="fovea"),
]
Result = Annotated[Path | None, typer.Option("--out", help="JSON file for the result; unless given, it is only printed.")]
PROMPTS_OR_SAMPLES = "Text file with one prompt per line, or a folder made by collect."


def parse_size(text: str, model: str = "") -> tuple[int, int]:
    """(height, width) in pixels of a text WIDTHxHEIGHT. Raises ArgumentError for another text, and for a size that doesn't fit the
    built-in models, the only ones whose tokens are known before they are loaded (`models.load_pipeline` checks others)."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", text.strip().lower())
    if not match:
        raise ArgumentError(f"size must be WIDTHxHEIGHT in pixels, as in 1024x768, not {text!r}")
    width, height = (int(side) for side in match.groups())
    if not width or not height:
        raise ArgumentError(f"width and height must be at least 1 pixel, not {text!r}")
    if model == "builtin":
        from dit_accel.pipelines.builtin import TOKEN_PIXELS

        check_size((height, width), TOKEN_PIXELS)
    return height, width


def check_size(size: tuple[int, int], unit: int) -> None:
    """Raise ArgumentError unless (height, width) in pixels are multiples of a token's side."""
    if any(side % unit for side in size):
        near = [max(1, round(side / unit)) * unit for side in size]
        raise ArgumentError(
            f"width and height must be multiples of {unit} pixels, the side of one token: not {size[1]}x{size[0]}, "
            f"but {near[1]}x{near[0]}, for example"
        )


def parse_accelerated(text: str, *, reason: str) -> "AttentionSpec | Assignment":
    """The spec or assignment of a method's text where the original attention makes no sense, for that reason."""
    method = parse_any(text)
    if method is None:
        raise ArgumentError(f"{reason}, not {text!r}")
    return method


def parse_any(text: str) -> "AttentionSpec | Assignment | None":
    """What `parse_method` says; of a plan's file the whole plan, which knows the model that it was made for."""
    from dit_accel.method.assignment import Assignment
    from dit_accel.method.text import FILE, parse_method

    method = parse_method(text)
    if isinstance(method, Assignment) and text.strip().lower().endswith(FILE):
        from dit_accel.planner.record import Plan, is_plan

        return Plan.load(text.strip()) if is_plan(text.strip()) else method
    return method


def parse_spec(text: str, *, reason: str) -> "AttentionSpec":
    """The same where an assignment of several specs makes no sense either."""
    from dit_accel.method.spec import AttentionSpec

    method = parse_accelerated(text, reason=reason)
    if not isinstance(method, AttentionSpec):
        raise ArgumentError(f"{text!r} contains an assignment of several specs: name one spec here")
    return method


def read_prompts(path: Path) -> list[str]:
    """The lines of a prompts file. Raises ValueError where it can't be read or contains no prompt."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ArgumentError(f"prompts must be a text file with one prompt per line, but {path} can't be read: {reason}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ArgumentError(f"prompts must be a text file with one prompt per line, but {path} has none")
    return prompts


def read_prompts_or_samples(path: Path) -> list[str] | Path:
    """The prompts of a file, or the folder itself."""
    return path if path.is_dir() else read_prompts(path)


def check_file(path: Path) -> None:
    """Raise ValueError where no file can be written at a path."""
    if path.is_dir():
        raise ArgumentError(f"--out must name a file, not the folder {path}")
    files.check_folder(path.parent)


def check_picture(path: Path) -> None:
    """Raise ValueError where no picture can be written at a path."""
    from PIL import Image

    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise ArgumentError(f"--out must name a picture, as in image.png or image.jpg, not {path}")
    check_file(path)


def check_clip(path: Path) -> None:
    """Raise ValueError where no clip can be written at a path."""
    from dit_accel.pipelines.video import check_ending

    check_ending(path)
    check_file(path)


def text_length(model: str, length: int | None) -> int | None:
    """The number of text tokens: as given, else what the built-in models' captions take, else None, the pipeline's default."""
    from dit_accel.pipelines.builtin import TEXT_TOKENS

    return TEXT_TOKENS if length is None and model == "builtin" else length


def call_arguments(model: str, size: tuple[int, int], steps: int, guidance: float | None, length: int | None) -> dict[str, Any]:
    """Arguments of the pipeline's call; without a guidance scale where none was asked for, as some pipelines take none."""
    guidance = BUILTIN_GUIDANCE if guidance is None and model == "builtin" else guidance
    further = {"guidance_scale": guidance, "max_sequence_length": text_length(model, length)}
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": steps}
    return call | {name: value for name, value in further.items() if value is not None}


def sampling_arguments(model: str, sizes: list[str] | None, steps: int, guidance: float | None, length: int | None) -> dict[str, Any]:
    """Arguments of collect: those of a call at one size, or at several in turn."""
    pixels = [parse_size(text, model) for text in sizes or ["512x512"]]
    call = call_arguments(model, pixels[0], steps, guidance, length)
    if len(pixels) == 1:
        return call
    return {**{name: value for name, value in call.items() if name not in ("height", "width")}, "sizes": pixels}


def sizes_of(call: dict[str, Any]) -> list[tuple[int, int]]:
    """The sizes (height, width) of `sampling_arguments`."""
    return call["sizes"] if "sizes" in call else [(call["height"], call["width"])]


def hires_arguments(hires: bool, base: int | None, strength: float | None, ntk: float | None, proportional: bool) -> dict[str, Any]:
    """Arguments of generate_hires beyond those of a call. Raises ValueError where they were given without --hires or are out of range."""
    given = {"base": base, "strength": strength, "ntk": ntk, "proportional": proportional or None}
    given = {name: value for name, value in given.items() if value is not None}
    if given and not hires:
        raise ArgumentError(f"{', '.join('--' + name for name in given)} requires --hires")
    if strength is not None and not 0 < strength <= 1:
        raise ArgumentError(f"strength must be a share of the steps in (0, 1], not {strength}")
    if ntk is not None and not 0 < ntk < math.inf:
        raise ArgumentError(f"ntk must be a factor > 0, not {ntk}")
    return given
