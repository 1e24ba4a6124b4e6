"""Training clips for the built-in video model: Fluent emoji drawings (Microsoft, MIT) in motion over coloured backgrounds, with captions.

A clip is (pixels, caption): "a panda moving left on a blue background", "a star growing". What moves follows a path of centre and side,
one entry per frame, and is resampled from the vector drawing's renderings for each frame, so motion is smooth to a fraction of a pixel and
any length, size and shape of clip can be made. A clip of one frame is a picture, whose caption says nothing of motion.
"""

import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, SHARES, SHIFT, UNNAMED, Renderings, article, background
from dit_accel.pipelines.builtin.drawings import vocabulary as picture_vocabulary

# few of each: a small budget is better spent on doing them well
NOUNS = ("balloon", "car", "cat", "ghost", "heart", "panda", "rocket", "star")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}  # word -> (rows, columns)
MOTIONS = (*(f"moving {word}" for word in DIRECTIONS), "growing")
# those and what the text encoder knows of without a clip of it: room for more under the same vocabulary
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
    """Where a drawing is in each frame: centre (row, column) and side in pixels, all `[F]`."""

    rows: Tensor
    columns: Tensor
    sides: Tensor


def still(frames: int, centre: tuple[float, float], side: float) -> Path:
    """A path that stays at `centre` with one side, in pixels."""
    row, column = centre
    return Path(torch.full((frames,), row), torch.full((frames,), column), torch.full((frames,), side))


def moving(rng: random.Random, motion: str, frames: int, centre: tuple[float, float], side: float, area: tuple[float, float]) -> Path:
    """The path of one of MOTIONS about `centre`; `side` is the largest side, `area` the (height, width) it moves in, in pixels."""
    path = still(frames, centre, side)
    time = torch.linspace(0, 1, frames)
    if motion == "growing":
        return Path(path.rows, path.columns, side * torch.lerp(torch.tensor(rng.uniform(0.36, 0.42)), torch.tensor(1.0), time))
    down, right = DIRECTIONS[motion.removeprefix("moving ")]
    way = (time - 0.5) * rng.uniform(0.38, 0.44)
    return Path(path.rows + down * area[0] * way, path.columns + right * area[1] * way, path.sides)


def lay(canvas: Tensor, renderings: Renderings, index: int, path: Path) -> None:
    """Draw one drawing along its path over the frames `canvas` `[F, 3, H, W]`, in [0, 1]."""
    height, width = canvas.shape[-2:]
    sizes = [math.ceil(side) for side in path.sides.tolist()]
    drawings = {size: renderings.pick(index, size)[None] for size in set(sizes)}
    # from the frame's coordinates in [-1, 1] to the drawing's
    nothing = torch.zeros_like(path.sides)
    across = torch.stack([nothing + width / 2, nothing, width / 2 - path.columns], 1)
    along = torch.stack([nothing, nothing + height / 2, height / 2 - path.rows], 1)
    maps = (torch.stack([across, along], 1) / (path.sides / 2)[:, None, None]).to(canvas.device)
    for frame, size in enumerate(sizes):
        grid = F.affine_grid(maps[frame : frame + 1], [1, 4, height, width], align_corners=False)
        drawn = F.grid_sample(drawings[size], grid, align_corners=False)[0]
        canvas[frame] = canvas[frame] * (1 - drawn[3:]) + drawn[:3]


def film(rng: random.Random, renderings: Renderings, frames: int, height: int, width: int) -> tuple[Tensor, str]:
    """One clip `[3, frames, height, width]` in [-1, 1] and its caption."""
    noun = rng.choice(NOUNS)
    motion = rng.choice([m for m in MOTIONS if not held_out(noun, m)])
    named = rng.random() >= UNNAMED
    colour = rng.choice(list(BACKGROUNDS)) if named else "white"
    canvas = background(colour, height, width, renderings.device).repeat(frames, 1, 1, 1)
    row, column = ((0.5 + rng.uniform(-SHIFT, SHIFT)) * side for side in (height, width))
    # what travels is smaller, so that its way fits into the frame
    side = min(height, width) * (rng.uniform(0.46, 0.52) if frames > 1 and motion != "growing" else rng.uniform(*SHARES))
    path = moving(rng, motion, frames, (row, column), side, (height, width)) if frames > 1 else still(1, (row, column), side)
    lay(canvas, renderings, renderings.nouns.index(noun), path)
    caption = f"{article(noun)} {motion}" if frames > 1 else article(noun)
    return canvas.transpose(0, 1) * 2 - 1, caption + f" on {article(colour)} background" * named
