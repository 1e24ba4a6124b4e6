"""The built-in video model's transformer: Wan's own class that is given where its tokens are on a fixed canvas.

Wan numbers rows and columns 0, 1, 2, ...; a model trained at one size then reads a larger clip as a larger scene. Here row and column k of
a grid whose longer side has n tokens are at (k + 1/2)·32/n − 1/2, as in the built-in image model; at 512 pixels (n = 32) and in time they
are unchanged. Rotary positions tell tokens only where they are from one another, which takes a large model to make a scene of (FLUX has its
text at the origin). So the patch embedding adds a token's place. With `predicts_clean` the blocks predict the clean latents, from which the
velocity follows, as the image model's do. The blocks, and their attention, are Wan's.
"""

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401  diffusers looks ModelMixin up in a component's own module
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA

CANVAS = 32
THETA = 10000.0
WAVES = (64.0, 32.0, 16.0, 8.0)  # lengths, in places on the canvas
FEATURES = 3 * 2 * len(WAVES)


def places(grid: tuple[int, int, int]) -> list[Tensor]:
    """Where the frames, rows and columns of a grid are, float64: frames as they are numbered, rows and columns on the canvas."""
    step = CANVAS / max(grid[1:])
    frames, rows, columns = (torch.arange(size, dtype=torch.float64) for size in grid)
    return [frames, (rows + 0.5) * step - 0.5, (columns + 0.5) * step - 0.5]


def over(grid: tuple[int, int, int], axes: list[Tensor]) -> Tensor:
    """Features of each axis `[size, C_axis]`, side by side for each token: `[T, H, W, ΣC]`."""
    shapes = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))
    return torch.cat([x.view(*shape, x.shape[1]).expand(*grid, x.shape[1]) for x, shape in zip(axes, shapes, strict=True)], -1)


class StretchedRotary(WanRotaryPosEmbed):
    """Wan's rotary embedding at stretched positions; a grid has no largest size."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, T·H·W, 1, head_dim]`, float32, for latents `[B, C, F, H', W']`."""
        frames, height, width = (size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True))
        angles = []
        # float64 on the CPU, as the stock tables are made: not every device has it
        for axis, dims in zip(places((frames, height, width)), (self.t_dim, self.h_dim, self.w_dim), strict=True):
            frequencies = 1.0 / THETA ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
            angles.append(torch.outer(axis, frequencies).repeat_interleave(2, 1))
        every = over((frames, height, width), angles).reshape(1, -1, 1, self.attention_head_dim)
        return every.cos().float().to(hidden_states.device), every.sin().float().to(hidden_states.device)


class PlacedPatches(nn.Conv3d):
    """Wan's patch embedding, plus a projection of the sines and cosines of each token's place."""

    def __init__(self, in_channels: int, out_channels: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, kernel_size=patch_size, stride=patch_size)
        self.place = nn.Linear(FEATURES, out_channels, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Latents `[B, C, F, H', W']` to tokens `[B, inner, T, H, W]`."""
        # as a matrix product: torch's gradient of the convolution is not finite in bfloat16 on CPUs with AMX, from 64 x 64 latents on
        _, frame, row, column = self.weight.shape[1:]
        patches = input.unflatten(4, (-1, column)).unflatten(3, (-1, row)).unflatten(2, (-1, frame))
        tokens = F.linear(patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4), self.weight.flatten(1), self.bias).movedim(-1, 1)
        frames, height, width = tokens.shape[2:]
        waves = 2 * math.pi / torch.tensor(WAVES, dtype=torch.float64)
        angles = [torch.outer(axis, waves) for axis in places((frames, height, width))]
        features = over((frames, height, width), [torch.cat([x.sin(), x.cos()], 1) for x in angles])
        return tokens + self.place(features.to(tokens)).movedim(-1, 0)


class BuiltinWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` with `StretchedRotary` and `PlacedPatches`; see above for `predicts_clean`."""

    @register_to_config
    def __init__(
        self, patch_size: tuple[int, int, int] = (1, 2, 2), num_attention_heads: int = 40, attention_head_dim: int = 128,
        in_channels: int = 16, out_channels: int = 16, text_dim: int = 4096, freq_dim: int = 256, ffn_dim: int = 13824,
        num_layers: int = 40, cross_attn_norm: bool = True, qk_norm: str | None = "rms_norm_across_heads", eps: float = 1e-6,
        image_dim: int | None = None, added_kv_proj_dim: int | None = None, rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None, predicts_clean: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            patch_size, num_attention_heads, attention_head_dim, in_channels, out_channels, text_dim, freq_dim, ffn_dim, num_layers,
            cross_attn_norm, qk_norm, eps, image_dim, added_kv_proj_dim, rope_max_seq_len, pos_embed_seq_len,
        )  # fmt: skip
        self.rope = StretchedRotary(attention_head_dim, patch_size, rope_max_seq_len)
        self.patch_embedding = PlacedPatches(in_channels, num_attention_heads * attention_head_dim, patch_size)

    def forward(self, hidden_states: Tensor, timestep: Tensor, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Velocities of latents `[B, C, F, H', W']` at time steps [B], which are noise levels times 1000."""
        out = super().forward(hidden_states, timestep, *args, return_dict=False, **kwargs)[0]
        if getattr(self.config, "predicts_clean", False):
            sigma = (timestep.float() / 1000).clamp_min(LEAST_SIGMA).view(-1, 1, 1, 1, 1)
            out = ((hidden_states.float() - out.float()) / sigma).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)
