"""Training clips for the built-in video model: Fluent emoji drawings (Microsoft, MIT) in motion over coloured backgrounds, with captions.

A clip is (pixels, caption): "a panda moving left on a blue background", "a star spinning", "a car moving right above a still cactus on a
green background". What moves follows a path of centre, side and angle, one entry per frame, and is resampled from the vector drawing's
renderings for each frame, so motion is smooth to a fraction of a pixel and any length, size and shape of clip can be made. A clip of one
frame is a picture, whose caption says nothing of motion.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, Renderings, article, background
from dit_accel.pipelines.builtin.drawings import vocabulary as picture_vocabulary

# few, with plain outlines and colours of their own: a small budget is better spent on how they move
NOUNS = (
    "balloon", "cactus", "car", "cat", "frog", "ghost", "heart", "panda", "pumpkin", "rocket", "star", "strawberry",
)  # fmt: skip

DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}  # word -> (rows, columns)
MOTIONS = (*(f"moving {word}" for word in DIRECTIONS), "jumping", "spinning", "growing", "shrinking", "still")
WORDS = ("moving", "jumping", "spinning", "growing", "shrinking", "still", "left", "right", "up", "down", "above", "below", "of")


def vocabulary() -> list[str]:
    """The image model's words, in their order, then the words for motion that it lacks."""
    words = picture_vocabulary()
    return words + [word for word in WORDS if word not in words]


def held_out(noun: str, motion: str) -> bool:
    """Whether the pair is kept from training, to test composition (about 1 in 12)."""
    return (sum(map(ord, noun)) * 7 + sum(map(ord, motion)) * 13) % 12 == 0


@dataclass(frozen=True)
class Path:
    """Where a drawing is in each frame: centre (row, column) and side in pixels, angle in radians, clockwise; all `[F]`."""

    rows: Tensor
    columns: Tensor
    sides: Tensor
    angles: Tensor


def still(frames: int, centre: tuple[float, float], side: float) -> Path:
    """A path that stays at `centre` with one side, in pixels."""
    row, column = centre
    return Path(torch.full((frames,), row), torch.full((frames,), column), torch.full((frames,), side), torch.zeros(frames))


def moving(rng: random.Random, motion: str, frames: int, centre: tuple[float, float], side: float, room: tuple[float, float]) -> Path:
    """The path of one of MOTIONS about `centre`; `side` is the largest side, `room` the (height, width) it moves in, in pixels."""
    path = still(frames, centre, side)
    time = torch.linspace(0, 1, frames)
    match motion:
        case "spinning":
            return Path(path.rows, path.columns, path.sides, time * rng.uniform(0.85, 1.15) * math.pi)
        case "growing" | "shrinking":
            sides = side * torch.lerp(torch.tensor(rng.uniform(0.36, 0.46)), torch.tensor(1.0), time)
            return Path(path.rows, path.columns, sides if motion == "growing" else sides.flip(0), path.angles)
        case "jumping":
            height = rng.uniform(0.30, 0.38) * room[0]
            return Path(path.rows + height * (0.5 - 4 * time * (1 - time)), path.columns, path.sides, path.angles)
        case "still":
            return path
    down, right = DIRECTIONS[motion.removeprefix("moving ")]
    way = (time - 0.5) * rng.uniform(0.34, 0.46)
    return Path(path.rows + down * room[0] * way, path.columns + right * room[1] * way, path.sides, path.angles)


def lay(canvas: Tensor, renderings: Renderings, index: int, path: Path) -> None:
    """Draw one drawing along its path over the frames `canvas` `[F, 3, H, W]`, in [0, 1]."""
    height, width = canvas.shape[-2:]
    sizes = [math.ceil(side) for side in path.sides.tolist()]
    drawings = {size: renderings.pick(index, size)[None] for size in set(sizes)}
    cos, sin = path.angles.cos(), path.angles.sin()
    half = path.sides / 2
    # from the frame's coordinates in [-1, 1] to the drawing's
    across = torch.stack([width / 2 * cos, height / 2 * sin, (width / 2 - path.columns) * cos + (height / 2 - path.rows) * sin], 1)
    along = torch.stack([-width / 2 * sin, height / 2 * cos, (path.columns - width / 2) * sin + (height / 2 - path.rows) * cos], 1)
    maps = (torch.stack([across, along], 1) / half[:, None, None]).to(canvas.device)
    for frame, size in enumerate(sizes):
        grid = F.affine_grid(maps[frame : frame + 1], [1, 4, height, width], align_corners=False)
        drawn = F.grid_sample(drawings[size], grid, align_corners=False)[0]
        canvas[frame] = canvas[frame] * (1 - drawn[3:]) + drawn[:3]


def film(rng: random.Random, renderings: Renderings, frames: int, height: int, width: int, *, pairs: float = 0.15) -> tuple[Tensor, str]:
    """One clip `[3, frames, height, width]` in [-1, 1] and its caption; `pairs` is the share with two drawings."""
    nouns = rng.sample(NOUNS, 2)
    colour = rng.choice(list(BACKGROUNDS))
    canvas = background(colour, height, width, renderings.device).repeat(frames, 1, 1, 1)
    scene = two_things if rng.random() < pairs else one_thing
    caption = scene(rng, renderings, canvas, nouns)
    if colour != "white" or rng.random() < 0.3:
        caption += f" on {article(colour)} background"
    return canvas.transpose(0, 1) * 2 - 1, caption


def near(rng: random.Random, canvas: Tensor, row: float, column: float) -> tuple[float, float]:
    """A point close to (row, column), which are shares of the frame, in pixels."""
    height, width = canvas.shape[-2:]
    return (row + rng.uniform(-0.03, 0.03)) * height, (column + rng.uniform(-0.03, 0.03)) * width


def one_thing(rng: random.Random, renderings: Renderings, canvas: Tensor, nouns: list[str]) -> str:
    """Lay one drawing in motion over the canvas; the caption without its background."""
    frames, _, height, width = canvas.shape
    motion = rng.choice([m for m in MOTIONS if not held_out(nouns[0], m)])
    if frames == 1:
        motion = "still"
    travels = motion.startswith("moving") or motion == "jumping"
    share = rng.uniform(0.44, 0.54) if travels else rng.uniform(0.62, 0.74) if motion == "spinning" else rng.uniform(0.70, 0.90)
    path = moving(rng, motion, frames, near(rng, canvas, 0.5, 0.5), share * min(height, width), (height, width))
    lay(canvas, renderings, renderings.nouns.index(nouns[0]), path)
    if frames == 1:
        return article(nouns[0])
    return f"a still {nouns[0]}" if motion == "still" else f"{article(nouns[0])} {motion}"


def two_things(rng: random.Random, renderings: Renderings, canvas: Tensor, nouns: list[str]) -> str:
    """Lay one drawing that moves past another over the canvas; the caption without its background."""
    frames, _, height, width = canvas.shape
    across = rng.random() < 0.5
    relation = rng.choice(("above", "below") if across else ("left of", "right of"))
    direction = rng.choice(("left", "right") if across else ("up", "down"))
    first = 0.27 if relation in ("above", "left of") else 0.73
    side = rng.uniform(0.38, 0.44) * min(height, width)
    spots = [near(rng, canvas, place, 0.5) if across else near(rng, canvas, 0.5, place) for place in (first, 1 - first)]
    path = moving(rng, f"moving {direction}", frames, spots[0], side, (height, width))
    for noun, laid in ((nouns[1], still(frames, spots[1], side)), (nouns[0], path)):
        lay(canvas, renderings, renderings.nouns.index(noun), laid)
    if frames == 1:
        return f"{article(nouns[0])} {relation} {article(nouns[1])}"
    return f"{article(nouns[0])} moving {direction} {relation} a still {nouns[1]}"
