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
    height, width = (int(n) + 1 for n in ids[:, 1:].amax(0).tolist())
    if height * width != len(ids):
        return "img_ids is not one raster of rows and columns"
    index = torch.arange(len(ids), device=ids.device)
    if bool((ids[:, 1] != index // width).any() or (ids[:, 2] != index % width).any()):
        return "img_ids is not one raster of rows and columns"
    return (1, height, width)


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
