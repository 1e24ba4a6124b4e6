"""Parts of tiny random pipelines that several families share."""

from collections.abc import Callable
from typing import Any

import diffusers as D
import torch
from torch import Tensor

Tiny = tuple[Any, dict[str, Any]]  # a pipeline, and the arguments of a call
BUILDERS: dict[str, Callable[[], Tiny]] = {}
STEPS = {"num_inference_steps": 2, "output_type": "latent"}

# fmt: off
# configurations, many numbers on few lines

def builder(function: Callable[[], Tiny]) -> Callable[[], Tiny]:
    """Add a function that builds a tiny pipeline to BUILDERS."""
    BUILDERS[function.__name__] = function
    return function


def emb(*shape: int) -> Tensor:
    """The same normal numbers at each call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def kl(latent: int = 4, factor_log2: int = 1, **kw: Any) -> Any:
    """AutoencoderKL with spatial factor 2**factor_log2."""
    n = factor_log2 + 1
    cfg = {"in_channels": 3, "out_channels": 3, "latent_channels": latent, "block_out_channels": (8,) * n, "layers_per_block": 1,
               "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n,
               "sample_size": 32, "scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}
    cfg.update(kw)
    return D.AutoencoderKL(**cfg)


def wan_vae() -> Any:
    return D.AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                              temperal_downsample=[False, True, True])


def hunyuan_vae(latent: int = 4) -> Any:
    return D.AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=latent, block_out_channels=(8, 8, 8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True)


def qwen_vae() -> Any:
    return D.AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1,
                                    temperal_downsample=[False, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)


def flux2_vae() -> Any:
    return D.AutoencoderKLFlux2(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
                                norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                                up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32)


def flow(**kw: Any) -> Any:
    return D.FlowMatchEulerDiscreteScheduler(**kw)
