"""What stands for the drawings that the built-in models were trained on, and clips of them made one frame at a time."""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, CONCEPTS, SHARES, SHIFT, UNNAMED, Renderings, article, background
from dit_accel.pipelines.builtin_video.motion import DIRECTIONS, MOTIONS, NOUNS, START, TRAVELLING, WAY, held_out


def discs() -> Renderings:
    """Discs of a colour each in place of drawings."""
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    inside = ((rows**2 + columns**2) < 0.9)[None]
    colours = torch.rand(len(CONCEPTS), 3, 1, 1, generator=torch.Generator().manual_seed(0))
    return Renderings({64: [torch.cat([c * inside, inside]).mul(255).byte() for c in colours]}, list(CONCEPTS.values()))


@dataclass(frozen=True)
class Scene:
    """What a clip shows; the last four say where in their ranges, from 0 to 1, its middle, side and way are."""

    noun: str
    motion: str
    colour: str | None  # None: none is named, and it is white
    row: float
    column: float
    side: float
    way: float


def scene_of(rng: random.Random) -> Scene:
    """One as the training draws them."""
    noun = rng.choice(NOUNS)
    motion = rng.choice([m for m in MOTIONS if not held_out(noun, m)])
    colour = None if rng.random() < UNNAMED else rng.choice(list(BACKGROUNDS))
    return Scene(noun, motion, colour, *(rng.random() for _ in range(4)))


def caption_of(scene: Scene, frames: int) -> str:
    """What a clip of so many frames is called."""
    thing = article(scene.noun) + (f" {scene.motion}" if frames > 1 else "")
    return thing + (f" on {article(scene.colour)} background" if scene.colour else "")


def film(renderings: Renderings, scene: Scene, frames: int, height: int, width: int) -> Tensor:
    """The clip `[3, frames, height, width]` in [-1, 1], frame by frame, each from a rendering of the next whole side."""
    between = lambda share, ends: ends[0] + (ends[1] - ends[0]) * share  # noqa: E731
    travels = frames > 1 and scene.motion != "growing"
    side = min(height, width) * between(scene.side, TRAVELLING if travels else SHARES)
    row, column = ((0.5 + between(at, (-SHIFT, SHIFT))) * n for at, n in ((scene.row, height), (scene.column, width)))
    down, right = DIRECTIONS.get(scene.motion.removeprefix("moving "), (0.0, 0.0)) if frames > 1 else (0.0, 0.0)
    first = 1.0 if travels or frames == 1 else between(scene.way, START)
    made = []
    for time in torch.linspace(0, 1, frames).tolist():
        way, size = (time - 0.5) * between(scene.way, WAY), side * (first + (1 - first) * time)
        y, x = row + down * height * way, column + right * width * way
        turn = torch.tensor([[width / 2, 0.0, width / 2 - x], [0.0, height / 2, height / 2 - y]]) / (size / 2)
        drawing = renderings.pick(renderings.nouns.index(scene.noun), math.ceil(size))[None]
        drawn = F.grid_sample(drawing, F.affine_grid(turn[None], [1, 4, height, width], align_corners=False), align_corners=False)[0]
        made.append(background(scene.colour or "white", height, width) * (1 - drawn[3:]) + drawn[:3])
    return torch.stack(made, 1) * 2 - 1


def clip(seed: int, renderings: Renderings, frames: int, height: int, width: int) -> Tensor:
    """A clip of the training."""
    return film(renderings, scene_of(random.Random(seed)), frames, height, width)
