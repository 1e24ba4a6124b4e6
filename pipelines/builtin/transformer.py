"""The built-in model's transformer: FLUX.1's own class on a fixed canvas, that may predict the clean picture.

FLUX numbers rows and columns 0, 1, 2, ...; a model trained at one size then reads a larger picture as a larger scene. Here row and
column k of a grid whose longer side has n tokens are at (k + 1/2)·64/n − 1/2, so that one small model serves all sizes (position
interpolation). At 1024 pixels (n = 64) the ids are unchanged.

With `predicts_clean` two things are added around the inherited forward. Each token is given where it is and how fine the grid is: rotary
positions tell tokens only where they are from one another, which takes a large model to make a scene of. And the blocks predict the clean
latents c of x = (1 − σ)·c + σ·noise, from which the velocity (x − c)/σ follows: clean pictures have flat areas and few edges, and a
narrow model has room for those, but not for the noise that a velocity holds (Li and He 2025, "Back to basics: let denoising generative
models denoise"). The pipeline, the blocks and their attention are FLUX's.
"""

import math
from typing import Any

import torch
import torch.nn as nn
from diffusers import FluxTransformer2DModel, ModelMixin  # noqa: F401  diffusers looks ModelMixin up in a component's own module
from diffusers.configuration_utils import register_to_config
from diffusers.hooks.context_parallel import ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

CANVAS = 64
WAVES = (128.0, 64.0, 32.0, 16.0, 8.0)  # lengths, in places on the canvas
FEATURES = 2 * 2 * len(WAVES) + 3
LEAST_SIGMA = 0.05  # a velocity divides by no less


def stretch_ids(img_ids: Tensor) -> Tensor:
    """Position ids `[N, 3]` or `[B, N, 3]` of a raster of any size, stretched so that its longer side spans the canvas.

    The first id, 0 in FLUX, may hold the side of a larger raster that this one is cut from, in tokens; it is 0 in what is given back.
    """
    whole = img_ids[..., :1].amax()
    side = torch.where(whole > 0, whole, img_ids[..., 1:].amax() + 1)
    axes = (img_ids[..., 1:] + 0.5) * (CANVAS / side) - 0.5
    return torch.cat([torch.zeros_like(img_ids[..., :1]), axes.to(img_ids.dtype)], dim=-1)


def place_features(img_ids: Tensor) -> Tensor:
    """What each token is given of its place, `[N, FEATURES]` float32, of ids `[N, 3]`: waves of its row and column from the middle of the
    picture, the picture's height and width as shares of the canvas, and the logarithm of its tokens a side."""
    whole = img_ids[..., :1].amax()
    extent = torch.where(whole > 0, whole, img_ids[..., 1:].amax(0) + 1)  # of both axes, in tokens
    side = extent.amax()
    centred = (img_ids[..., 1:] + 0.5 - extent / 2) * (CANVAS / side)
    angles = (centred[..., None] * (2 * math.pi / torch.tensor(WAVES, device=img_ids.device))).flatten(1)
    about = torch.cat([extent / side, (side / 32).log2()[None]])
    return torch.cat([angles.sin(), angles.cos(), about.expand(len(img_ids), -1)], 1)


class BuiltinTransformer2DModel(FluxTransformer2DModel):
    """`FluxTransformer2DModel` with `stretch_ids` applied to the image's position ids; see above for `predicts_clean`.

    What is added around the inherited forward requires the whole picture: under context parallelism the image's tokens are split within.
    """

    _cp_plan = {  # noqa: RUF012  as diffusers declares it
        "": {name: FluxTransformer2DModel._cp_plan[""][name] for name in ("encoder_hidden_states", "txt_ids")},
        "x_embedder": {0: ContextParallelInput(split_dim=1, expected_dims=3, split_output=True)},
        "proj_out": FluxTransformer2DModel._cp_plan["proj_out"],
    }

    @register_to_config
    def __init__(
        self, patch_size: int = 1, in_channels: int = 64, out_channels: int | None = None, num_layers: int = 19,
        num_single_layers: int = 38, attention_head_dim: int = 128, num_attention_heads: int = 24, joint_attention_dim: int = 4096,
        pooled_projection_dim: int = 768, guidance_embeds: bool = False, axes_dims_rope: tuple[int, int, int] = (16, 56, 56),
        predicts_clean: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(
            patch_size, in_channels, out_channels, num_layers, num_single_layers, attention_head_dim, num_attention_heads,
            joint_attention_dim, pooled_projection_dim, guidance_embeds, axes_dims_rope,
        )  # fmt: skip
        if predicts_clean:
            self.x_embedder = nn.Linear(in_channels + FEATURES, self.inner_dim)

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Any = None, pooled_projections: Any = None, timestep: Any = None,
        img_ids: Any = None, *args: Any, return_dict: bool = True, **kwargs: Any,
    ) -> Any:  # fmt: skip
        # float32 ids even in a bfloat16 pipeline: 8 bits can't tell neighbours apart at 4096 pixels
        ids, x = img_ids.float(), hidden_states
        if clean := getattr(self.config, "predicts_clean", False):
            flat = ids if ids.ndim == 2 else ids[0]
            x = torch.cat([x, place_features(flat).to(x.dtype).expand(len(x), -1, -1)], -1)
        placed = self._own_part(stretch_ids(ids))
        out = super().forward(x, encoder_hidden_states, pooled_projections, timestep, placed, *args, return_dict=False, **kwargs)[0]
        if clean:
            sigma = timestep.float().clamp_min(LEAST_SIGMA).view(-1, 1, 1)
            out = ((hidden_states.float() - out.float()) / sigma).to(hidden_states.dtype)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)

    def _own_part(self, ids: Tensor) -> Tensor:
        """The ids `[N, 3]` or `[B, N, 3]` of the tokens that this process holds."""
        config = getattr(getattr(self, "_parallel_config", None), "context_parallel_config", None)
        if config is None:
            return ids
        plan = ContextParallelInput(split_dim=ids.ndim - 2)
        part: Tensor = ContextParallelSplitHook({}, config)._prepare_cp_input(ids, plan)
        return part
