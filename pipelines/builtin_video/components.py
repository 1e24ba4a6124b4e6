"""The parts of the built-in video model as they stand before training; text encoder and frame autoencoder come from the image model."""

import torch
import torch.nn as nn
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from transformers import T5EncoderModel

from dit_accel.pipelines.builtin import WEIGHTS as IMAGE_WEIGHTS
from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.components import TEXT_WIDTH, make_tokenizer
from dit_accel.pipelines.builtin_video.autoencoder import CHANNELS, ClipAutoencoder
from dit_accel.pipelines.builtin_video.motion import vocabulary
from dit_accel.pipelines.builtin_video.transformer import FEATURES, BuiltinWanTransformer3DModel


def make_transformer(num_layers: int = 6) -> BuiltinWanTransformer3DModel:
    """Blocks with 4 heads of 64, 1.05 million parameters each.

    It starts by handing nearly half of its input through: a velocity is mostly the noise that came in, all 128 numbers of a token, which
    a random start has to learn first. Tokens enter by an isometry and leave by its transpose, their places beside them; what time and
    text add to the blocks starts at zero.
    """
    transformer = BuiltinWanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=4, attention_head_dim=64, in_channels=CHANNELS, out_channels=CHANNELS,
        text_dim=TEXT_WIDTH, freq_dim=256, ffn_dim=1024, num_layers=num_layers, cross_attn_norm=True,
    )  # fmt: skip
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            start = nn.init.zeros_ if name.endswith(("time_proj", "attn2.to_out.0")) else nn.init.xavier_uniform_
            start(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedding = transformer.patch_embedding
    inner, values = embedding.weight.flatten(1).shape
    with torch.no_grad():
        for parameter in embedding.parameters():
            parameter.zero_()
        axes = nn.init.orthogonal_(torch.empty(inner, values + FEATURES))
        embedding.weight.copy_(axes[:, :values].view_as(embedding.weight))
        embedding.place.weight.copy_(2 * axes[:, values:])
        # a patch goes in as (channel, row, column) and comes out as (row, column, channel), from norm inner ** 0.5 back to values ** 0.5
        leave = axes[:, :values].view(inner, CHANNELS, 4).transpose(1, 2).reshape(inner, values).T
        transformer.proj_out.weight.copy_(0.5 * (values / inner) ** 0.5 * leave)
    return transformer


def make_autoencoder() -> ClipAutoencoder:
    """The image model's autoencoder within the video model's; the projection over time is still to be fitted."""
    frames = PatchAutoencoder.from_pretrained(IMAGE_WEIGHTS / "vae")
    config = frames.config
    vae = ClipAutoencoder(frame_channels=config.latent_channels, width=config.width, num_blocks=config.num_blocks)
    vae.frames.load_state_dict(frames.state_dict())
    return vae.requires_grad_(False)


def make_pipeline(seed: int = 0, num_layers: int = 6) -> WanPipeline:
    """An untrained video pipeline: a random transformer from `seed`, the image model's T5 encoder with rows for the words of motion."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(512, vocabulary(), begin=False)
    text_encoder = T5EncoderModel.from_pretrained(IMAGE_WEIGHTS / "text_encoder_2")
    text_encoder.resize_token_embeddings(len(tokenizer))
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=make_autoencoder(), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=make_transformer(num_layers),
    )  # fmt: skip
