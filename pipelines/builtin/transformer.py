"""The built-in model's transformer: FLUX.1's own class with its position ids stretched over a fixed canvas.

FLUX numbers rows and columns 0, 1, 2, ...; a model trained at one size then reads a larger picture as a larger scene. Here row and
column k of a grid whose longer side has n tokens stand at (k + 1/2)·64/n − 1/2, so that one small model serves all sizes (position
interpolation). At 1024 pixels (n = 64) the ids are unchanged and the model is the stock class, bit for bit.
"""

from typing import Any

import torch
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks ModelMixin up in a component's own module
from torch import Tensor

CANVAS = 64


def stretch_ids(img_ids: Tensor) -> Tensor:
    """Position ids `[N, 3]` or `[B, N, 3]` of a raster of any size, stretched so that its longer side spans the canvas."""
    side = img_ids[..., 1:].max() + 1
    axes = (img_ids[..., 1:] + 0.5) * (CANVAS / side) - 0.5
    return torch.cat([img_ids[..., :1], axes.to(img_ids.dtype)], dim=-1)


class BuiltinTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel` with `stretch_ids` applied to the image's position ids; everything else is inherited."""

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, pooled_projections: Any = None, timestep: Any = None,
        img_ids: Any = None, *args: Any, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # float32 ids even in a bfloat16 pipeline: 8 bits can't tell neighbours apart at 4096 pixels
        ids = stretch_ids(img_ids.float())
        return super().forward(hidden_states, encoder_hidden_states, pooled_projections, timestep, ids, *args, **kwargs)
