"""The parts of the built-in video model as they are before training; text encoder and frame autoencoder come from the image model."""

from pathlib import Path

import torch
import torch.nn as nn
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from transformers import T5EncoderModel

from dit_accel.pipelines.builtin import WEIGHTS as IMAGE_WEIGHTS
from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.components import TEXT_WIDTH, make_tokenizer
from dit_accel.pipelines.builtin_video.autoencoder import GROUP, ClipAutoencoder
from dit_accel.pipelines.builtin_video.motion import vocabulary
from dit_accel.pipelines.builtin_video.transformer import FEATURES, BuiltinWanTransformer3DModel

ZERO = ("time_proj", "attn2.to_out.0", "proj_out")


def make_transformer(channels: int, num_layers: int = 6) -> BuiltinWanTransformer3DModel:
    """Blocks with 4 heads of 64, 1.05 million parameters each, for latents of so many channels.

    Tokens enter by an isometry, their places as loud as they are; what time and text add to the blocks, and the output, start at zero.
    """
    transformer = BuiltinWanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=channels, out_channels=channels,
        text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=1024, num_layers=num_layers, cross_attn_norm=True, predicts_clean=True,
    )  # fmt: skip
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            start = nn.init.zeros_ if name.endswith(ZERO) else nn.init.xavier_uniform_
            start(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedding = transformer.patch_embedding
    inner, values = embedding.weight.flatten(1).shape
    with torch.no_grad():
        axes = nn.init.orthogonal_(torch.empty(inner, values + FEATURES))
        embedding.weight.copy_(axes[:, :values].view_as(embedding.weight))
        embedding.bias.zero_()
        embedding.place.weight.copy_(2 * axes[:, values:])
    return transformer


def make_autoencoder(image: Path) -> ClipAutoencoder:
    """The image model's autoencoder within the video model's, which loses nothing; its axes over time are still to be fitted."""
    frames = PatchAutoencoder.from_pretrained(image / "vae")
    config, channels = frames.config, GROUP * frames.config.latent_channels
    vae = ClipAutoencoder(
        z_dim=channels, frame_channels=config.latent_channels, width=config.width, num_blocks=config.num_blocks, refine_width=0,
        latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels,
    )  # fmt: skip
    vae.frames.load_state_dict(frames.state_dict())
    return vae.requires_grad_(False)


def make_pipeline(seed: int = 0, num_layers: int = 6, image: Path = IMAGE_WEIGHTS) -> WanPipeline:
    """An untrained video pipeline: a random transformer from `seed`, the T5 encoder of the image model in the folder `image` with rows for
    the words of motion, and its autoencoder."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(512, vocabulary(), begin=False)
    text_encoder = T5EncoderModel.from_pretrained(image / "text_encoder_2")
    text_encoder.resize_token_embeddings(len(tokenizer))
    vae = make_autoencoder(image)
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make_transformer(vae.config.z_dim, num_layers),
    )  # fmt: skip
