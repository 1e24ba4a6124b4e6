"""Convolutions on the raster of each image or frame: what is near each token, whatever the blocks."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.reference import Partial
from dit_accel.method.checks import is_int, require
from dit_accel.method.parts.base import Extra, Rest, check_part
from dit_accel.method.parts.call import Call, Cost, Frame, Ground, Sizes


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


def identity_kernel(heads: int, head_dim: int, kernel: int) -> Tensor:
    """`[H, D, 1, kernel, kernel]`: one in the middle, else zeros."""
    side = kernel // 2
    return F.pad(torch.ones(heads, head_dim, 1, 1, 1), (side,) * 4)


def check_kernel(kernel: int, frames: int = 1) -> None:
    """Raise ArgumentError unless a kernel has a middle."""
    require(is_int(kernel) and kernel >= 3 and kernel % 2 == 1, "kernel must be an odd number of tokens from 3 on", kernel)
    require(is_int(frames) and frames >= 1 and frames % 2 == 1, "frames must be an odd number from 1 on", frames)


@dataclass(frozen=True)
class DepthwiseConv(Extra):
    """out += convolution of V on the raster + b, each channel of each head by a kernel of its own; weights and b zero at start.

    `kernel`: rows and columns of tokens; `frames` of a video: those before and after that are seen, the frame itself among them. Zeros
    are around the raster; references have rasters of their own. Source: the local branch of LINA (arXiv 2601.22630), there of the layer's
    input; V is its one image here that is not rotated. Also named LePE (arXiv 2107.00652).
    """

    frame = Frame("V", "a learned kernel by channel", "out += the tokens around q, convolved")
    fit = "least_squares_by_channel"
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


@dataclass(frozen=True)
class DynamicConv(Extra):
    """out += convolution of V by kernels made of V's mean v̄ over all image tokens, one for each channel: W₂·gelu(W₁ v̄), each head its own.

    `kernel`: rows and columns of tokens, in each frame. W₁ starts as the identity, W₂ at zero. Source: InLine (arXiv 2412.06590),
    there of the layer's input.
    """

    frame = Frame("V and its mean v̄", "kernels made of v̄", "out += the tokens around q, convolved")
    fit = "descent"
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        second = torch.zeros(heads, head_dim, self.kernel, self.kernel, head_dim)
        return {"dynamic.first": torch.eye(head_dim).repeat(heads, 1, 1), "dynamic.second": second}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        return raster_tables(ground)

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"dynamic.first": 1 / head_dim, "dynamic.second": 1 / (head_dim * self.kernel**2)}  # a token sums so many

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        hidden = F.gelu(call.per_head("dynamic.first") @ call.v.mean(1)[..., None])  # [BH, D, 1]
        kernels = call.per_head("dynamic.second").flatten(1, 3) @ hidden
        return out + convolved(call.v, kernels.unflatten(1, (-1, 1, self.kernel, self.kernel))[..., 0], call)

    def cost(self, sizes: Sizes) -> Cost:
        """V is read twice more, and the output read and written."""
        taps, d = self.kernel**2, sizes.head_dim
        return Cost(sizes.tokens * d * taps + (1 + taps) * d**2, 4)


@dataclass(frozen=True)
class Concentration(Extra):
    """out += conv₂(rms(gelu(conv₁(V)))): convolutions of each channel by its own kernel, rms: divided by the root mean square over a head's
    channels. conv₁ starts as the identity, conv₂ at zero.

    `kernel`: rows and columns of tokens, in each frame. Source: the local concentration module of L²ViT (arXiv 2501.16182), there of the
    layer's output and with a batch norm, which a sampler can't calibrate.
    """

    frame = Frame("V", "learned kernels by channel, gelu, rms", "out += the tokens around q, convolved twice")
    fit = "descent"
    kernel: int = 7

    def __post_init__(self) -> None:
        super().__post_init__()
        check_kernel(self.kernel)

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        second = torch.zeros(heads, head_dim, 1, self.kernel, self.kernel)
        return {"concentration.first": identity_kernel(heads, head_dim, self.kernel), "concentration.second": second}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        return raster_tables(ground)

    def rates(self, head_dim: int) -> dict[str, float]:
        return {"concentration.first": 0.1, "concentration.second": 0.1}

    def __call__(self, out: Tensor, call: Call) -> Tensor:
        hidden = F.gelu(convolved(call.v, call.per_head("concentration.first"), call))
        hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return out + convolved(hidden, call.per_head("concentration.second"), call)

    def cost(self, sizes: Sizes) -> Cost:
        """V is read once more, what is between the convolutions written and read, and the output read and written."""
        return Cost(2 * sizes.tokens * sizes.head_dim * self.kernel**2, 5)


@dataclass(frozen=True)
class PreConv(Rest):
    """Another rest, of queries and keys convolved before: each channel of each head by a kernel of its own, the identity at start.

    `rest`: the rest. `kernel`: rows and columns of tokens, in each frame. The exact part has q and k as they are. Source: LAWCAT
    (arXiv 2509.18467), there causal and before the rotary embedding; here it mixes neighbours that are rotated already.
    """

    fit = "descent"
    own_tokens = True
    rest: Rest
    kernel: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_part(self.rest, Rest, "rest")
        check_kernel(self.kernel)

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        """The other rest's."""
        state, gate, readout = self.rest.frame
        return Frame(f"{state}, k convolved", gate, f"{readout}, q convolved")

    @property
    def whole_blocks(self) -> bool:
        return self.rest.whole_blocks

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {f"pre_conv.{side}": identity_kernel(heads, head_dim, self.kernel) for side in ("q", "k")}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        return raster_tables(ground)

    def rates(self, head_dim: int) -> dict[str, float]:
        return {f"pre_conv.{side}": 0.1 for side in ("q", "k")}

    def __call__(self, call: Call) -> Partial:
        q, k = (convolved(x, call.per_head(f"pre_conv.{side}"), call) for x, side in ((call.q, "q"), (call.k, "k")))
        return self.rest(dataclasses.replace(call, q=q, k=k))

    def cost(self, sizes: Sizes) -> Cost:
        """Queries and keys are read once more, and written for the rest."""
        return self.rest.cost(sizes) + Cost(2 * sizes.tokens * sizes.head_dim * self.kernel**2, 4)
