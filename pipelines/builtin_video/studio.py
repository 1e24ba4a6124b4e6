"""Training clips for the built-in video model: Fluent emoji drawings (Microsoft, MIT) in motion over coloured backgrounds, with captions.

The clips of a batch are made at once, on the device of the drawings' renderings, and nothing waits for that device. What moves follows a
path of centre and side, one entry per frame, and is resampled from the vector drawing's renderings for each frame, so motion is smooth to a
fraction of a pixel and any length, size and shape of clip can be made. A clip of one frame is a picture, whose caption says nothing of
motion.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, SHARES, SHIFT, UNNAMED, Renderings, article
from dit_accel.pipelines.builtin_video.motion import DIRECTIONS, MOTIONS, NOUNS, START, TRAVELLING, WAY, held_out

RISE = 1.03  # of the sides that drawings are kept at, from one to the next
NARROWEST = 0.86  # of the side of a square, that the shorter side of a clip of its area is: 3 to 4
DROPPED = 0.1  # share of clips without a caption, for guidance
PLAIN = len(BACKGROUNDS)  # the number of "no background named", which is white


@dataclass(frozen=True)
class Choices:
    """What is random of clips, each `[B]`: the numbers of things, motions and backgrounds, whether a caption is left out, and where in
    their ranges, from 0 to 1, the row and column of the middle, the side and the length of the way (or the first side) are."""

    noun: Tensor
    motion: Tensor
    colour: Tensor
    dropped: Tensor
    row: Tensor
    column: Tensor
    side: Tensor
    way: Tensor


class Studio:
    """Makes clips where the renderings are, and knows all of their captions by number."""

    def __init__(self, renderings: Renderings) -> None:
        self.renderings, self.device = renderings, renderings.device
        grounds = [*BACKGROUNDS.values(), BACKGROUNDS["white"]]
        self.grounds = torch.tensor(grounds, device=self.device) / 255 * 2 - 1
        allowed = [[i for i, motion in enumerate(MOTIONS) if not held_out(noun, motion)] for noun in NOUNS]
        self.counts = torch.tensor([len(found) for found in allowed], device=self.device)
        self.allowed = torch.tensor([(found * len(MOTIONS))[: len(MOTIONS)] for found in allowed], device=self.device)
        ways = [DIRECTIONS.get(motion.removeprefix("moving "), (0.0, 0.0)) for motion in MOTIONS]
        self.ways = torch.tensor(ways, device=self.device)
        self.ladders: dict[int, tuple[Tensor, Tensor]] = {}
        colours = [*(f" on {article(colour)} background" for colour in BACKGROUNDS), ""]
        motions = [*(f" {motion}" for motion in MOTIONS), ""]
        self.captions = [*(article(noun) + motion + colour for noun in NOUNS for motion in motions for colour in colours), ""]

    def choose(self, count: int, generator: torch.Generator | None) -> Choices:
        """Choices for `count` clips, from a generator on the studio's device."""
        u = torch.rand(9, count, device=self.device, generator=generator)
        noun = (u[0] * len(NOUNS)).long()
        motion = self.allowed[noun, (u[1] * self.counts[noun]).long()]
        colour = torch.where(u[2] < UNNAMED, PLAIN, (u[3] * len(BACKGROUNDS)).long())
        return Choices(noun, motion, colour, u[4] < DROPPED, *u[5:])

    def numbers(self, choices: Choices, frames: int) -> Tensor:
        """The numbers `[B]` of the clips' captions."""
        motion = choices.motion if frames > 1 else torch.full_like(choices.motion, len(MOTIONS))
        number = (choices.noun * (len(MOTIONS) + 1) + motion) * (PLAIN + 1) + choices.colour
        return torch.where(choices.dropped, len(self.captions) - 1, number)

    def pixels(self, choices: Choices, frames: int, size: int, height: int, width: int) -> Tensor:
        """The clips `[B, 3, frames, height, width]` in [-1, 1]; `size` is the side of a square of about their area, in pixels."""
        rows, columns, sides = self._paths(choices, frames, height, width)
        levels, fields = self._ladder(size)
        level = torch.bucketize(sides.contiguous(), levels).clamp_max(len(levels) - 1)  # the next larger one, as a sharp edge takes
        drawn = fields[(level * len(NOUNS) + choices.noun[:, None]).flatten()]
        shrink = (levels[level] / fields.shape[-1]).flatten()
        # from the frame's pixels to the coordinates of the field, in whose corner the drawing is
        x, y = (
            ((torch.arange(n, device=self.device) + 0.5 - at.flatten()[:, None]) / (sides / 2).flatten()[:, None] + 1) * shrink[:, None] - 1
            for n, at in ((width, columns), (height, rows))
        )
        grid = torch.stack([x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)], 3)
        drawn = F.grid_sample(drawn, grid, align_corners=False)
        ground = self.grounds[choices.colour].repeat_interleave(frames, 0)[:, :, None, None]
        alpha = drawn[:, 3:]
        return torch.addcmul(drawn[:, :3] * 2 - alpha, 1 - alpha, ground).unflatten(0, (-1, frames)).transpose(1, 2)

    def _paths(self, choices: Choices, frames: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the drawings are in each frame: rows and columns of their middles, and their sides, in pixels, each `[B, frames]`."""
        grows = choices.motion == MOTIONS.index("growing")
        share = _between(choices.side, SHARES)
        rows, columns = (
            ((0.5 + _between(at, (-SHIFT, SHIFT))) * side)[:, None].repeat(1, frames)
            for at, side in ((choices.row, height), (choices.column, width))
        )
        if frames == 1:
            return rows, columns, (min(height, width) * share)[:, None]
        sides = min(height, width) * torch.where(grows, share, _between(choices.side, TRAVELLING))[:, None]
        moment = torch.linspace(0, 1, frames, device=self.device)
        first = _between(choices.way, START)[:, None]
        way = (moment - 0.5) * _between(choices.way, WAY)[:, None]
        down, right = self.ways[choices.motion].unbind(1)
        return (
            rows + down[:, None] * height * way,
            columns + right[:, None] * width * way,
            torch.where(grows[:, None], sides * (first + (1 - first) * moment), sides),
        )

    def _ladder(self, size: int) -> tuple[Tensor, Tensor]:
        """The sides `[L]` that drawings are kept at, and each drawing `[L·nouns, 4, S, S]` at each, in the corner of a field of zeros.

        Made at the first clip of a size; at 512 pixels it takes 1.2 GB.
        """
        if size not in self.ladders:
            least, most = math.ceil(START[0] * SHARES[0] * NARROWEST * size), math.ceil(SHARES[1] * size)
            levels = [least]
            while levels[-1] < most:
                levels.append(min(most, max(levels[-1] + 1, math.ceil(levels[-1] * RISE))))
            fields = torch.zeros(len(levels), len(NOUNS), 4, most, most, device=self.device)
            for row, side in zip(fields, levels, strict=True):
                for field, noun in zip(row, NOUNS, strict=True):
                    field[:, :side, :side] = self.renderings.pick(self.renderings.nouns.index(noun), side)
            self.ladders[size] = torch.tensor(levels, dtype=torch.float32, device=self.device), fields.flatten(0, 1)
        return self.ladders[size]


def _between(share: Tensor, ends: tuple[float, float]) -> Tensor:
    """Numbers of a range, given how far from its first end to its last."""
    return ends[0] + (ends[1] - ends[0]) * share
