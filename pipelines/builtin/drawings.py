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

# drawing name -> noun in the caption, where the two differ
CONCEPTS = {
    "red-apple": "red apple", "banana": "banana", "strawberry": "strawberry", "pineapple": "pineapple", "watermelon": "watermelon",
    "carrot": "carrot", "hamburger": "burger", "doughnut": "donut", "cupcake": "cupcake", "soft-ice-cream": "ice cream",
    "panda": "panda", "cat-face": "cat", "dog-face": "dog", "fox": "fox", "lion": "lion", "koala": "koala", "frog": "frog",
    "pig-face": "pig", "penguin": "penguin", "owl": "owl", "baby-chick": "chick", "elephant": "elephant", "octopus": "octopus",
    "turtle": "turtle", "butterfly": "butterfly", "lady-beetle": "ladybug", "cactus": "cactus", "sunflower": "sunflower",
    "tulip": "tulip", "mushroom": "mushroom", "evergreen-tree": "pine tree", "automobile": "car", "rocket": "rocket", "house": "house",
    "balloon": "balloon", "soccer-ball": "soccer ball", "robot": "robot", "ghost": "ghost", "jack-o-lantern": "pumpkin",
    "snowman": "snowman", "star": "star", "red-heart": "heart", "teddy-bear": "teddy bear",
}  # fmt: skip

# words that the text encoders know without a drawing of theirs: room for more concepts under the same vocabulary
SPARE_WORDS = (
    "airplane", "avocado", "bear", "castle", "cherries", "coffee", "cookie", "cow", "crab", "cream", "crown", "cup", "diamond", "fish",
    "french", "fries", "gift", "grapes", "green", "guitar", "ladybug", "leaf", "lemon", "maple", "monkey", "palm", "pizza", "rabbit",
    "rose", "sailboat", "snail", "sun", "tiger", "tree", "umbrella", "unicorn", "whale",
)  # fmt: skip

BACKGROUNDS = {
    "white": (250, 250, 250), "red": (214, 64, 60), "orange": (240, 150, 60), "yellow": (246, 217, 92), "green": (96, 176, 96),
    "blue": (66, 110, 200), "light blue": (150, 205, 238), "purple": (140, 92, 186), "pink": (244, 166, 196), "brown": (140, 100, 72),
    "gray": (140, 144, 150), "black": (36, 36, 40),
}  # fmt: skip

RELATIONS = ("left of", "above")


def article(noun: str) -> str:
    """The noun with its indefinite article; plurals take none."""
    if noun.endswith(("grapes", "cherries", "fries")):
        return noun
    return f"an {noun}" if noun[0] in "aeiou" and not noun.startswith("uni") else f"a {noun}"


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    nouns = [article(n) for n in CONCEPTS.values()]
    return sorted({*" ".join([*nouns, *BACKGROUNDS, *RELATIONS, "a an on background and the of"]).split(), *SPARE_WORDS})


def held_out(noun: str, colour: str) -> bool:
    """Whether the pair is kept from training, to test composition (about 1 in 12)."""
    return (sum(map(ord, noun)) * 7 + sum(map(ord, colour)) * 13) % 12 == 0


@dataclass(frozen=True)
class Renderings:
    """Each drawing as RGBA `[4, S, S]` uint8 at several sizes S."""

    levels: dict[int, list[Tensor]]
    nouns: list[str]

    def pick(self, index: int, side: int) -> Tensor:
        """The drawing `[4, side, side]`, float in [0, 1], colour premultiplied by alpha, from the next larger rendering."""
        size = next((s for s in sorted(self.levels) if s >= side), max(self.levels))
        image = self.levels[size][index].float().div(255)[None]
        image = torch.cat([image[:, :3] * image[:, 3:], image[:, 3:]], 1)
        return F.interpolate(image, (side, side), mode="bilinear", antialias=True)[0]


def render(folder: Path, sizes: tuple[int, ...] = (128, 256, 512, 1024)) -> Renderings:
    """Rasterise all concepts from the unpacked npm package at the given sizes (pixels)."""
    from resvg_py import svg_to_bytes

    icons = json.loads((folder / "icons.json").read_text())["icons"]
    missing = [name for name in CONCEPTS if name not in icons]
    if missing:
        raise ValueError(f"wanted the drawings of CONCEPTS in {folder}, but these are missing: {missing}")
    levels: dict[int, list[Tensor]] = {size: [] for size in sizes}
    for name in CONCEPTS:
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{icons[name]["body"]}</svg>'
        for size in sizes:
            png = svg_to_bytes(svg_string=svg, width=size, height=size)
            image = np.array(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
            levels[size].append(torch.from_numpy(image).permute(2, 0, 1).contiguous())
    return Renderings(levels, list(CONCEPTS.values()))


def background(rng: random.Random, colour: str, height: int, width: int) -> Tensor:
    """A slightly graded field of a named colour `[3, height, width]` in [0, 1]."""
    base = torch.tensor(BACKGROUNDS[colour]).float().div(255) + torch.empty(3).fill_(rng.uniform(-0.02, 0.02))
    y = torch.linspace(-1, 1, height)[:, None] * rng.uniform(-0.04, 0.04)
    x = torch.linspace(-1, 1, width)[None] * rng.uniform(-0.04, 0.04)
    return (base[:, None, None] + y + x).clamp(0, 1)


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
    colour = rng.choice([c for c in BACKGROUNDS if not held_out(names[0], c)])
    canvas = background(rng, colour, height, width)
    short = min(height, width)
    jitter = lambda: rng.uniform(-0.03, 0.03) * short  # noqa: E731
    if rng.random() < pairs:
        relation = rng.choice(RELATIONS)
        across = relation == "left of"
        spots = [(0.5, 0.27), (0.5, 0.73)] if across else [(0.27, 0.5), (0.73, 0.5)]
        side = rng.uniform(0.40, 0.46) * min(width, height) if height == width else 0.46 * min((width, height)[not across], short * 2)
        for index, (y, x) in zip((first, second), spots, strict=True):
            paste(canvas, flipped(rng, renderings.pick(index, min(int(side), 1024))), y * height + jitter(), x * width + jitter())
        caption = f"{article(names[0])} {relation} {article(names[1])}"
    else:
        side = rng.uniform(0.76, 0.94) * short
        paste(canvas, flipped(rng, renderings.pick(first, int(side))), height / 2 + jitter(), width / 2 + jitter())
        caption = article(names[0])
    if colour != "white" or rng.random() < 0.3:
        caption += f" on a {colour} background"
    return canvas * 2 - 1, caption


def flipped(rng: random.Random, drawing: Tensor) -> Tensor:
    """The drawing, or its mirror image half of the time."""
    return drawing.flip(-1) if rng.random() < 0.5 else drawing
