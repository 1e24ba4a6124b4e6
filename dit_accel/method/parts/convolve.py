"""Convolutions on the raster of each image or frame: what is near each token, whatever the blocks."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.method.checks import is_int, require
from dit_accel.method.parts.base import Extra
from dit_accel.method.parts.call import Call, Cost, Ground, Sizes


def raster_tables(ground: Ground) -> dict[str, Tensor]:
    """`raster_places` `[N]`: the place of each token in the rasters of the images, which follow each other; `raster_tokens`: the
    inverse."""
    t, y, x, image = ground.coords.unbind(-1)
    sizes = torch.tensor(ground.grids)
    before = F.pad(sizes.prod(-1).cumsum(0), (1, 0))
    places = before[image] + (t * sizes[image, 1] + y) * sizes[image, 2] + x
    return {"raster_places": places, "raster_tokens": places.argsort()}


def convolved(x: Tensor, weight: Tensor, call: Call) -> Tensor:
    """Each channel of `[BH, N, D]` by a kernel of its own `[BH, D, frames, rows, columns]`, on the raster of each image; zeros around."""
    rasters = x.index_select(1, call.prepared["raster_tokens"]).split([math.prod(grid) for grid in call.grids], 1)
    images = [_of_image(raster, grid, weight) for raster, grid in zip(rasters, call.grids, strict=True)]
    return torch.cat(images, 1).index_select(1, call.prepared["raster_places"])


def _of_image(x: Tensor, grid: tuple[int, int, int], weight: Tensor) -> Tensor:
    """The same on one raster `[BH, T·H·W, D]`: frame by frame, the sum over the frames before and after of what their kernels make."""
    (heads, _, channels), (frames, height, width) = x.shape, grid
    pictures = x.unflatten(1, (frames, height, width)).permute(1, 0, 4, 2, 3).flatten(1, 2)  # [T, BH·D, H, W]
    depth, sides = weight.shape[2] // 2, tuple(side // 2 for side in weight.shape[3:])
    pictures = F.pad(pictures, (0, 0) * 3 + (depth, depth))
    kernels = weight.flatten(0, 1)
    found = [
        F.conv2d(pictures[n : n + frames], kernels[:, n, None], padding=sides, groups=heads * channels) for n in range(weight.shape[2])
    ]
    return functools.reduce(torch.add, found).unflatten(1, (heads, channels)).permute(1, 0, 3, 4, 2).flatten(1, 3)


def check_kernel(kernel: int, frames: int = 1) -> None:
    """Raise ArgumentError unless a kernel has a middle."""
    require(is_int(kernel) and kernel >= 3 and kernel % 2 == 1, "kernel must be an odd number of tokens from 3 on", kernel)
    require(is_int(frames) and frames >= 1 and frames % 2 == 1, "frames must be an odd number from 1 on", frames)


@dataclass(frozen=True)
class DepthwiseConv(Extra):
    """out += convolution of V on the raster + b, each channel of each head by a kernel of its own; weights and b zero at start.

    `kernel`: rows and columns of tokens; `frames` of a video: those before and after that are seen, the frame itself among them. Zeros
    are around the raster; references have rasters of their own. Source: the local branch of LINA (arXiv 2601.22630), there of the layer's
    input; V is its one image here that is not rotated. Also named LePE (arXiv 2107.00652, eq. 10).
    """

    kernel: int = 5
    frames: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel, self.frames)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        weight = torch.zeros(heads, head_dim, self.frames, self.kernel, self.kernel)
        return {"conv.weight": weight, "conv.bias": torch.zeros(heads, head_dim)}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        return raster_tables(ground)

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        return out + convolved(call.v, call.per_head("conv.weight"), call) + call.per_head("conv.bias")[:, None]

    def cost(self, sizes: Sizes) -> Cost:
        """V is read once more, and the output read and written."""
        return Cost(sizes.tokens * sizes.head_dim * self.frames * self.kernel**2, 3)
