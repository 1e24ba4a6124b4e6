"""Training pictures for the built-in model: Fluent emoji drawings (Microsoft, MIT) composed over coloured backgrounds, with captions.

Vector source, so one drawing gives a 128 px and a 1024 px picture. Every picture is (pixels, caption): "a panda", "a panda on a blue
background", "a cat left of a cactus on a pink background". Nothing is downloaded here: the caller names the folder of the unpacked npm
package `@iconify-json/fluent-emoji`.
"""

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

# drawing name -> noun in the caption, where the two differ; few, with plain outlines: a small budget is better spent on drawing them well
CONCEPTS = {
    "red-apple": "red apple", "balloon": "balloon", "hamburger": "burger", "cactus": "cactus", "automobile": "car", "cat-face": "cat",
    "frog": "frog", "ghost": "ghost", "red-heart": "heart", "mushroom": "mushroom", "panda": "panda", "jack-o-lantern": "pumpkin",
    "rocket": "rocket", "star": "star", "strawberry": "strawberry", "turtle": "turtle",
}  # fmt: skip

# words that the text encoders know without a drawing of theirs: room for more concepts under the same vocabulary, which the video model
# shares
SPARE_WORDS = (
    "airplane", "avocado", "ball", "banana", "bear", "butterfly", "carrot", "castle", "cherries", "chick", "coffee", "cookie", "cow",
    "crab", "cream", "crown", "cup", "cupcake", "diamond", "dog", "donut", "elephant", "fish", "fox", "french", "fries", "gift",
    "grapes", "guitar", "house", "ice", "koala", "ladybug", "leaf", "lemon", "lion", "maple", "monkey", "octopus", "owl", "palm",
    "penguin", "pig", "pine", "pineapple", "pizza", "rabbit", "robot", "rose", "sailboat", "snail", "snowman", "soccer", "sun",
    "sunflower", "teddy", "tiger", "tree", "tulip", "umbrella", "unicorn", "watermelon", "whale",
)  # fmt: skip

BACKGROUNDS = {
    "white": (250, 250, 250), "red": (214, 64, 60), "orange": (240, 150, 60), "yellow": (246, 217, 92), "green": (96, 176, 96),
    "blue": (66, 110, 200), "light blue": (150, 205, 238), "purple": (140, 92, 186), "pink": (244, 166, 196), "brown": (140, 100, 72),
    "gray": (140, 144, 150), "black": (36, 36, 40),
}  # fmt: skip

SIZES = (128, 256, 512, 1024)  # of the renderings, in pixels

# how much the same drawing varies; a small model draws the mean of what it can't tell apart, so more is paid for in sharpness
SHARES = (0.80, 0.88)  # of the shorter side of a picture, that a drawing takes
SHIFT = 0.015  # of the same, that it is off the middle at most
UNNAMED = 0.2  # share of captions without a background, which is then white

RELATIONS = ("left of", "above")


def article(noun: str) -> str:
    """The noun with its indefinite article; plurals take none."""
    if noun.endswith(("grapes", "cherries", "fries")):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def vocabulary() -> list[str]:
    """Every word that a caption can contain, sorted."""
    nouns = [article(n) for n in CONCEPTS.values()]
    return sorted({*" ".join([*nouns, *BACKGROUNDS, *RELATIONS, "a an on background and the of"]).split(), *SPARE_WORDS})


def held_out(noun: str, colour: str) -> bool:
    """Whether the pair is kept from training, to test composition (about 1 in 12)."""
    return (sum(map(ord, noun)) * 7 + sum(map(ord, colour)) * 13) % 12 == 0


@dataclass(frozen=True)
class Renderings:
    """Each drawing as RGBA `[4, S, S]` uint8 at several sizes S, on the device that pictures are made on."""

    levels: dict[int, list[Tensor]]
    nouns: list[str]

    def pick(self, index: int, side: int) -> Tensor:
        """The drawing `[4, side, side]`, float in [0, 1], colour premultiplied by alpha, from the next larger rendering."""
        size = next((s for s in sorted(self.levels) if s >= side), max(self.levels))
        image = self.levels[size][index].float().div(255)[None]
        image = torch.cat([image[:, :3] * image[:, 3:], image[:, 3:]], 1)
        return F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0]

    @property
    def device(self) -> torch.device:
        """Where the renderings are."""
        return next(iter(self.levels.values()))[0].device


def render(folder: Path, sizes: tuple[int, ...] = SIZES, device: str | torch.device = "cpu") -> Renderings:
    """All concepts at the given sizes (pixels), from the unpacked npm package or from a folder that `prepare` made.

    Raises ValueError where drawings are missing.
    """
    if (folder / "icons.json").exists():
        icons = json.loads((folder / "icons.json").read_text())["icons"]
        known = {name: icons[name]["body"] for name in CONCEPTS if name in icons}
        levels = {size: {name: _rasterise(body, size) for name, body in known.items()} for size in sizes}
    else:
        levels = {size: {} for size in sizes}
        for name in CONCEPTS:
            if (file := folder / f"{name}.png").exists():
                largest = Image.open(file).convert("RGBA")
                for size in sizes:
                    # RGBA is averaged premultiplied: Pillow does so for this mode
                    levels[size][name] = largest.resize((size, size), Image.Resampling.BOX)
    missing = [name for name in CONCEPTS if name not in levels[sizes[0]]]
    if missing:
        raise ValueError(
            f"the drawings of {', '.join(missing)} are missing in {folder}: name the unpacked package's folder or a prepared one"
        )
    tensors = {size: [_tensor(found[name]).to(device) for name in CONCEPTS] for size, found in levels.items()}
    return Renderings(tensors, list(CONCEPTS.values()))


def prepare(fluent: Path, folder: Path, size: int = max(SIZES)) -> None:
    """Write each concept's drawing as a PNG of `size` pixels to `folder`: all that training needs, on a machine without a network."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, image in zip(CONCEPTS, render(fluent, (size,)).levels[size], strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")


def _rasterise(body: str, size: int) -> Image.Image:
    """The body of an SVG drawing at `size` pixels."""
    from resvg_py import svg_to_bytes

    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    return Image.open(io.BytesIO(bytes(svg_to_bytes(svg_string=svg, width=size, height=size)))).convert("RGBA")


def _tensor(image: Image.Image) -> Tensor:
    """`[4, S, S]` uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def background(colour: str, height: int, width: int, device: str | torch.device = "cpu") -> Tensor:
    """A field of a named colour `[3, height, width]` in [0, 1]."""
    # flat: a shade that varies is one more thing to learn, and shows as a stain where it is learnt badly
    return (torch.tensor(BACKGROUNDS[colour], device=device) / 255)[:, None, None].repeat(1, height, width)


def paste(canvas: Tensor, drawing: Tensor, centre_y: float, centre_x: float) -> None:
    """Lay a premultiplied drawing over the canvas, centred at a point given in pixels, clipped at the borders."""
    side = drawing.shape[-1]
    top, left = round(centre_y - side / 2), round(centre_x - side / 2)
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = min(top + side, canvas.shape[1]), min(left + side, canvas.shape[2])
    part = drawing[:, y0 - top : y1 - top, x0 - left : x1 - left]
    canvas[:, y0:y1, x0:x1] = canvas[:, y0:y1, x0:x1] * (1 - part[3:]) + part[:3]


def compose(rng: random.Random, renderings: Renderings, height: int, width: int, *, pairs: float = 0.2) -> tuple[Tensor, str]:
    """One training picture `[3, height, width]` in [-1, 1] and its caption; `pairs` is the share with two drawings."""
    first, second = rng.sample(range(len(renderings.nouns)), 2)
    names = [renderings.nouns[first], renderings.nouns[second]]
    named = rng.random() >= UNNAMED
    colour = rng.choice([c for c in BACKGROUNDS if not held_out(names[0], c)]) if named else "white"
    canvas = background(colour, height, width, renderings.device)
    short = min(height, width)
    jitter = lambda: rng.uniform(-SHIFT, SHIFT) * short  # noqa: E731
    if rng.random() < pairs:
        relation = rng.choice(RELATIONS)
        across = relation == "left of"
        spots = [(0.5, 0.27), (0.5, 0.73)] if across else [(0.27, 0.5), (0.73, 0.5)]
        side = rng.uniform(0.42, 0.46) * min(width, height) if height == width else 0.46 * min((width, height)[not across], short * 2)
        for index, (y, x) in zip((first, second), spots, strict=True):
            paste(canvas, renderings.pick(index, min(int(side), 1024)), y * height + jitter(), x * width + jitter())
        caption = f"{article(names[0])} {relation} {article(names[1])}"
    else:
        side = rng.uniform(*SHARES) * short
        paste(canvas, renderings.pick(first, int(side)), height / 2 + jitter(), width / 2 + jitter())
        caption = article(names[0])
    if named:
        caption += f" on a {colour} background"
    return canvas * 2 - 1, caption
