"""A user's own pictures as training data: each is encoded, noised to every level of the pipeline's schedule, and the original's
predictions there are kept in the form of self-generated runs.

The pipeline samples each caption once, and before every forward its latents are exchanged for the picture's at that level. So all other
arguments are the pipeline's own, and a run costs what sampling costs.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.finetune.data.collect import Key, Recorder, Samples, original, record_runs, write_run
from dit_accel.finetune.data.store import readable_runs
from dit_accel.finetune.flow import Flow, flow_of, in_place_of
from dit_accel.finetune.processes import writes
from dit_accel.patch.anatomy import forward_names
from dit_accel.pipelines import family_of, token_pixels
from dit_accel.pipelines.hires import latents as forms

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class Picture:
    """A file and what is to be seen in it; `digest`: SHA-256 of the file."""

    path: Path
    caption: str
    digest: str


def collect_pictures(pipe: Any, pictures: str | Path, folder: str | Path, *, seed: int = 0, **call: Any) -> Samples:
    """Record the original's predictions on pictures, noised to each level that the pipeline's call visits; `call` goes to the pipeline.

    Picture i, by the order of names, gets its noise from seed + i. Resized and cropped around the centre to the call's height and width.
    `pictures`: a folder of png, jpg or webp files, each with its caption in a text file of the same stem, or all in `metadata.jsonl`
    (a JSON object with `file_name` and `text` a line). What the samples' folder contains already is skipped.

    Raises, before anything is written: ValueError that names the file where a picture is damaged, a caption is missing or there are no
    pictures, and where height or width are no multiple of a token; UnsupportedModelError where the pipeline's autoencoder can't be used
    so; DistillationError where its scheduler is not of flow matching, or where the folder belongs to other weights or another call.
    """
    transformer = forms.check_pipeline(pipe)
    size = _size(pipe, transformer, call)
    found = read_pictures(Path(pictures))
    flow_of(pipe, _family(transformer), 1.0)  # refused here or not at all
    _check_digests(Path(folder), found, seed)

    keys = {Key(picture.caption, seed + i, size, picture.digest): picture for i, picture in enumerate(found)}

    def make(key: Key) -> None:
        _record(pipe, transformer, keys[key], key, Path(folder), call)

    rest = {name: value for name, value in call.items() if name not in ("height", "width")}
    return record_runs(pipe, folder, list(keys), make, {**rest, "pictures": True})  # in the call, so that sampled runs are not mixed in


def read_pictures(folder: Path) -> list[Picture]:
    """The pictures of a folder with their captions, by name. Raises ValueError as `collect_pictures` does."""
    if not folder.is_dir():
        raise ArgumentError(f"pictures must be a folder of {', '.join(ENDINGS)} files with captions, not {folder}")
    captions = _captions_of_metadata(folder) if (folder / METADATA).is_file() else {}
    paths = sorted({*captions, *(path for path in folder.iterdir() if path.suffix.lower() in ENDINGS)})
    if not paths:
        raise ArgumentError(f"pictures must be a folder of {', '.join(ENDINGS)} files with captions, but {folder} has none")
    found = []
    for path in paths:
        decoded(path)  # a damaged one is named before the work begins
        caption = captions.get(path) if captions else _caption_beside(path)
        if caption is None or not caption.strip():
            where = METADATA if captions else path.with_suffix(".txt").name
            raise ArgumentError(f"{path} has no caption in {where}: write one")
        found.append(Picture(path, " ".join(caption.split()), hashlib.sha256(path.read_bytes()).hexdigest()))
    return found


def _caption_beside(path: Path) -> str | None:
    """The text file of a picture's stem."""
    text = path.with_suffix(".txt")
    try:
        return text.read_text(encoding="utf-8-sig") if text.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"the caption in {text} is not UTF-8 text: {error}") from error


def _captions_of_metadata(folder: Path) -> dict[Path, str]:
    """The captions in `metadata.jsonl`, as Hugging Face datasets' imagefolder has them, by file."""
    path = folder / METADATA
    captions: dict[Path, str] = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a caption may contain other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"{path} is not UTF-8 text: {error}") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in ("file_name", "text")):
            raise ArgumentError(f"line {number} of {path} must be a JSON object with file_name and text, not {line.strip()[:80]!r}")
        captions[folder / row["file_name"]] = row["text"]
    return captions


def decoded(path: Path) -> Image.Image:
    """A picture upright, in RGB, on white where it is transparent. Raises ValueError that names it where it can't be read."""
    try:
        with Image.open(path) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ArgumentError(f"the picture {path} is damaged or missing: {error}") from error
    if picture.mode.startswith(("I", "F")):
        raise ArgumentError(f"{path} has mode {picture.mode}: convert it to 8 bits a colour")
    if "A" in picture.getbands() or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    return picture.convert("RGB")


def cropped(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """A picture as `[1, 3, H, W]` in [-1, 1], scaled to cover `size` (height, width) and cropped around its centre."""
    fitted = ImageOps.fit(picture, size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)[None].float() / 127.5 - 1


def _size(pipe: Any, transformer: Any, call: dict[str, Any]) -> tuple[int, int]:
    """The call's (height, width)."""
    height, width = call.get("height"), call.get("width")
    unit = token_pixels(pipe, transformer)
    if type(height) is not int or type(width) is not int or min(height, width) < 1 or height % unit or width % unit:
        raise ArgumentError(f"height and width must be multiples of {unit} pixels, the side of one token, not {height!r} and {width!r}")
    return height, width


def _family(transformer: Any) -> Any:
    family = family_of(transformer)
    if family is None:
        raise UnsupportedModelError(f"{type(transformer).__name__} belongs to no supported family")
    return family


def _check_digests(folder: Path, pictures: list[Picture], seed: int) -> None:
    """Raise ValueError where samples in a folder were made of another picture than the one that has its caption and place now."""
    if not (folder / "manifest.json").exists():
        return
    kept = {(run.prompt, run.seed): run.picture for run in readable_runs(folder)}
    for i, picture in enumerate(pictures):
        if kept.get((picture.caption, seed + i), picture.digest) != picture.digest:
            raise ArgumentError(f"{folder} contains samples of another picture in place of {picture.path}: name another folder")


def _record(pipe: Any, transformer: Any, picture: Picture, key: Key, folder: Path, call: dict[str, Any]) -> None:
    """Write one picture's run."""
    size, seed = (call["height"], call["width"]), key.seed
    x0 = forms.packed(pipe, forms.encode(pipe, cropped(decoded(picture.path), size))).cpu()
    generator = torch.Generator().manual_seed(seed)
    with original(pipe), Recorder(transformer, forward_names(transformer), to_write=True) as recorder, torch.no_grad():
        exchange = _Exchange(pipe, transformer, x0, seed)
        # in front of the recorder, which so sees what the denoiser gets
        hook = transformer.register_forward_pre_hook(exchange, with_kwargs=True, prepend=True)
        try:
            pipe(prompt=picture.caption, generator=generator, output_type="latent", **call)
        finally:
            hook.remove()
    if writes():
        write_run(folder, key.prompt, key.seed, recorder.forwards, x0.to(transformer.dtype), size=key.size, picture=key.picture)


class _Exchange:
    """A hook that puts a picture's latents, noised to the level that a forward is called at, in the place of the forward's own.

    Forwards at one level, as guidance makes two, get the same noise.
    """

    def __init__(self, pipe: Any, transformer: Any, x0: Tensor, seed: int) -> None:
        self.pipe, self.x0, self.names = pipe, x0, forward_names(transformer)
        self.family = _family(transformer)
        self.generator = torch.Generator().manual_seed(seed)
        self.flow: Flow | None = None
        self.mixed: dict[float, Tensor] = {}

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        if self.flow is None:
            first = torch.as_tensor(arguments[self.family.timestep]).float().max().item()
            self.flow = flow_of(self.pipe, self.family, first)
        sigma = self.flow.sigma_of(arguments)
        if sigma not in self.mixed:
            noise = torch.randn(self.x0.shape, generator=self.generator)
            self.mixed[sigma] = (1 - sigma) * self.x0 + sigma * noise
        name = self.flow.latents
        return (), arguments | {name: in_place_of(arguments[name], self.mixed[sigma])}
