"""ComfyUI itself, where the environment's DIT_ACCEL_COMFYUI says where its source code is, and tiny random models of its own classes."""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import fill_randomly, normal
from torch import Tensor

VARIABLE = "DIT_ACCEL_COMFYUI"
TEXT, STEPS, SEED = 13, 2, 3


def comfyui() -> Any:
    """ComfyUI's `comfy` package, on the CPU; the test is skipped without it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"requires ComfyUI's source code and what it imports: name its folder in {VARIABLE}")
    if folder not in sys.path:
        sys.path.append(folder)
        stand_in_for_torchvision()
    importlib.import_module("comfy.cli_args").args.cpu = True
    for name in ("samplers", "sample", "model_patcher", "supported_models", "patcher_extension", "lora", "lora_convert"):
        importlib.import_module(f"comfy.{name}")
    return sys.modules["comfy"]


def stand_in_for_torchvision() -> None:
    """Names that ComfyUI imports and nothing here calls, where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    import dit_accel.patch.verbs  # noqa: F401  diffusers and transformers have seen that it is not installed

    for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional", "torchvision.ops"):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = lambda name: None if not name.startswith("__") else (_ for _ in ()).throw(AttributeError(name))
        sys.modules[name] = module


@dataclass(frozen=True)
class Kind:
    """A supported model of ComfyUI, the tiny configuration of its transformer, the shape of latents, and what its conditioning has."""

    model: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    width: int
    pooled: int | None = None
    extra: tuple[tuple[str, Any], ...] = ()


def embedder(width: int) -> dict[str, Any]:
    """Stable Diffusion 3's configuration of what brings text to so many channels."""
    return {"target": "torch.nn.Linear", "params": {"in_features": 32, "out_features": width}}


FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 32, "hidden_size": 48,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 8, 8], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True, "txt_ids_dims": [],
}  # fmt: skip
FLUX2 = {
    **FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "patch_size": 1, "vec_in_dim": None, "txt_ids_dims": [3],
    "global_modulation": True, "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "axes_dim": [4, 4, 8, 8],
}  # fmt: skip
CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "vec_in_dim": 24, "context_in_dim": 32, "hidden_size": 48,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 8, 8], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "txt_ids_dims": [], "in_dim": 64, "out_dim": 48, "hidden_dim": 32, "n_layers": 1,
}  # fmt: skip
SD3 = {
    "in_channels": 16, "pos_embed_scaling_factor": None, "patch_size": 2, "depth": 2, "input_size": None, "adm_in_channels": 24,
    "pos_embed_max_size": 64, "num_patches": 4096, "qk_norm": "rms", "x_block_self_attn_layers": [0],
    "context_embedder_config": embedder(128),
}  # fmt: skip
QWEN = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 2, "attention_head_dim": 24, "num_attention_heads": 2,
    "joint_attention_dim": 32, "axes_dims_rope": (8, 8, 8),
}  # fmt: skip
HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 32, "hidden_size": 48,
    "mlp_ratio": 2.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [8, 8, 8], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
    "meanflow_sum": False,
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "text_len": 16, "in_dim": 16, "dim": 48, "ffn_dim": 64,
    "freq_dim": 32, "text_dim": 32, "out_dim": 16, "num_heads": 2, "num_layers": 2,
}  # fmt: skip
KINDS = {
    "flux": Kind("Flux", FLUX, (1, 16, 34, 47), 32, 24),
    "flux2": Kind("Flux2", FLUX2, (1, 128, 17, 23), 32),
    "chroma": Kind("Chroma", CHROMA, (1, 16, 34, 46), 32),
    "sd3": Kind("SD3", SD3, (1, 16, 34, 46), 32, 24),
    "qwen-image": Kind("QwenImage", QWEN, (1, 16, 1, 34, 47), 32),
    "hunyuan-video": Kind("HunyuanVideo", HUNYUAN, (1, 16, 3, 18, 22), 32, 24),
    "wan": Kind("WAN21_T2V", WAN, (1, 16, 3, 18, 21), 32),
}


def tiny_model(name: str, **changes: Any) -> Any:
    """A `ModelPatcher` of a random model."""
    comfy, kind = comfyui(), KINDS[name]
    torch.manual_seed(SEED)
    config = getattr(comfy.supported_models, kind.model)({**kind.config, **changes})
    config.unet_config["dtype"] = torch.float32
    model = config.get_model({}, "", device="cpu")
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.copy_(0.2 * torch.randn_like(parameter) if parameter.ndim > 1 else torch.ones_like(parameter))
        for own, buffer in model.diffusion_model.named_buffers():
            if own == "pos_embed":  # made without values, for a checkpoint to fill
                buffer.copy_(normal(*buffer.shape, seed=SEED))
    fill_randomly(model.diffusion_model, SEED, scale=0.1)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def conditioning(name: str, text: int = TEXT, seed: int = 5, **extra: Any) -> list[Any]:
    """What ComfyUI's text encoders give: embeddings and what belongs to them."""
    kind = KINDS[name]
    more = dict(extra) if kind.pooled is None else {"pooled_output": normal(1, kind.pooled, seed=seed + 1), **extra}
    return [[normal(1, text, kind.width, seed=seed), more]]


def sampled(
    model: Any, name: str, *, latents: tuple[int, ...] | None = None, steps: int = STEPS, cfg: float = 1.0, text: int = TEXT,
    sampler: str = "euler", noise: Tensor | None = None, **extra: Any,
) -> Tensor:  # fmt: skip
    """What ComfyUI's own sampling draws from fixed noise."""
    comfy, shape = comfyui(), latents or KINDS[name].latents
    positive, negative = conditioning(name, text, **extra), conditioning(name, text, 50, **extra)
    noise = normal(*shape, seed=1) if noise is None else noise
    out = comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, negative, torch.zeros(shape), disable_pbar=True, seed=SEED
    )
    assert bool(out.isfinite().all()), "the model drew NaN or infinity"
    return out


def pack(latents: Tensor) -> Tensor:
    """Latents `[B, C, H, W]` as FLUX's tokens `[B, N, 4C]`."""
    return torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)


def with_weights_of(name: str) -> tuple[Any, Any]:
    """ComfyUI's FLUX with the weights of a random one of diffusers, and that."""
    from diffusers import FluxTransformer2DModel

    comfy = comfyui()
    torch.manual_seed(SEED)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(8, 8, 8),
    ).eval()  # fmt: skip
    fill_randomly(transformer, SEED, scale=0.2)
    patcher = tiny_model(name, mlp_ratio=4.0)
    own, theirs = patcher.model.diffusion_model.state_dict(), transformer.state_dict()
    places = comfy.utils.flux_to_diffusers({**KINDS[name].config, "mlp_ratio": 4.0})
    assert theirs.keys() <= places.keys()
    for source, target in ((name, places[name]) for name in theirs):
        key, part, change = (*target, None, None)[:3] if isinstance(target, tuple) else (target, None, None)
        value = theirs[source] if change is None else change(theirs[source])
        (own[key] if part is None else own[key].narrow(*part)).copy_(value)
    return patcher, transformer
