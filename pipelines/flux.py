"""FLUX.1: `FluxTransformer2DModel`, double and single blocks, all its pipelines (fill, control, img2img, ControlNet, IP-Adapter)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.family import Family, Grid


def grid_from_ids(arguments: Mapping[str, Any]) -> Grid | str:
    """The grid of one image from its position ids `[N, 3]` (or `[B, N, 3]`): (image, row, column), row by row. Reads device memory."""
    ids: Tensor = arguments["img_ids"]
    ids = ids[0] if ids.ndim == 3 else ids
    if bool((ids[:, 0] != ids[0, 0]).any()):
        return "the sequence holds several images (reference images)"
    width = int((ids[:, 1] == 0).sum())
    if width == 0 or len(ids) % width:
        return "img_ids is not one raster of rows and columns"
    index = torch.arange(len(ids), device=ids.device)
    raster = torch.stack([index // width, index % width], dim=1).to(ids.dtype)  # bfloat16 rounds ids above 256
    if not torch.equal(ids[:, 1:], raster):
        return "img_ids is not one raster of rows and columns"
    return (1, len(ids) // width, width)


def text_length(arguments: Mapping[str, Any]) -> int:
    """Text tokens in the joint sequence."""
    return int(arguments["encoder_hidden_states"].shape[1])


FLUX = Family(
    name="flux",
    model_class="FluxTransformer2DModel",
    modules=r"(single_)?transformer_blocks\.\d+\.attn",
    text_first=True,
    per_token=("hidden_states", "img_ids", "controlnet_block_samples", "controlnet_single_block_samples"),
    grid=grid_from_ids,
    text=text_length,
)
