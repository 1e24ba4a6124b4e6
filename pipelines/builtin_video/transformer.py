"""The built-in video model's transformer: Wan's own class with its rows and columns stretched over a fixed canvas.

Wan numbers rows and columns 0, 1, 2, ...; a model trained at one size then reads a larger clip as a larger scene. Here row and column k of
a grid whose longer side has n tokens stand at (k + 1/2)·32/n − 1/2, as in the built-in image model. At 512 pixels (n = 32) and in time the
positions are unchanged, and the model is the stock class, bit for bit.
"""

import functools
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel  # noqa: F401  diffusers looks ModelMixin up in a component's own module
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

CANVAS = 32
THETA = 10000.0


class StretchedRotary(WanRotaryPosEmbed):
    """Wan's rotary embedding at stretched positions; a grid has no largest size."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[1, T·H·W, 1, head_dim]`, float32, for latents `[B, C, F, H', W']`."""
        grid = [size // patch for size, patch in zip(hidden_states.shape[2:], self.patch_size, strict=True)]
        step = CANVAS / max(grid[1:])
        parts = []
        for axis, (size, width) in enumerate(zip(grid, (self.t_dim, self.h_dim, self.w_dim), strict=True)):
            # float64 on the CPU, as the stock tables are made: not every device has it
            places = torch.arange(size, dtype=torch.float64)
            places = places if axis == 0 else (places + 0.5) * step - 0.5
            frequencies = 1.0 / THETA ** (torch.arange(0, width, 2, dtype=torch.float64) / width)
            shape = [1, 1, 1, width]
            shape[axis] = size
            parts.append(torch.outer(places, frequencies).repeat_interleave(2, 1).view(shape).expand(*grid, width))
        angles = torch.cat(parts, -1).reshape(1, -1, 1, self.attention_head_dim)
        return angles.cos().float().to(hidden_states.device), angles.sin().float().to(hidden_states.device)


class BuiltinWanTransformer3DModel(WanTransformer3DModel):
    """`WanTransformer3DModel` with `StretchedRotary` for its positions; everything else is inherited."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rope = StretchedRotary(self.config.attention_head_dim, self.config.patch_size, self.config.rope_max_seq_len)

    functools.update_wrapper(__init__, WanTransformer3DModel.__init__)  # diffusers reads the configuration's keys from the signature
