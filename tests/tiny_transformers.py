"""Tiny random transformers of families, each in a loop of steps that takes the place of its pipeline.

So that what pipelines seldom do is tested too: padded text in a batch, reference images, earlier frames. Each builder returns the loop and
the arguments of a call, which are those of the transformer's forward.
"""

from typing import Any

import diffusers as D
import torch
from tiny_parts import Tiny, builder, emb
from torch import Tensor


class Loop:
    """A transformer whose output is taken off its latents, step by step, under timesteps that fall from 1 (or rise to it).

    `frames`: each sample has so many timesteps.
    """

    def __init__(self, transformer: Any, *, rising: bool = False, frames: int | None = None) -> None:
        self.transformer, self.rising, self.frames = transformer, rising, frames
        self.components = {"transformer": transformer}

    def set_progress_bar_config(self, **_: Any) -> None:
        """There is none."""

    @torch.no_grad()
    def __call__(
        self, *, generator: torch.Generator, hidden_states: Tensor, num_inference_steps: int = 2, **arguments: Any
    ) -> tuple[Tensor]:
        for step in range(num_inference_steps):
            time = (step if self.rising else num_inference_steps - step) / num_inference_steps
            timestep = torch.full((len(hidden_states), self.frames) if self.frames else (len(hidden_states),), time)
            hidden_states = hidden_states - self.predict(hidden_states, timestep, arguments) / num_inference_steps
        return (hidden_states,)

    def predict(self, latents: Tensor, timestep: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The transformer's output."""
        out: Tensor = self.transformer(hidden_states=latents, timestep=timestep, return_dict=False, **arguments)[0]
        return out


class PackedLoop(Loop):
    """A loop around a transformer that is given where in its sequence the tokens of each kind are."""

    def predict(self, latents: Tensor, timestep: Tensor, arguments: dict[str, Any]) -> Tensor:
        times = timestep.expand(len(arguments["vision_mse_loss_indexes"]))
        out: Tensor = self.transformer(vision_tokens=latents, vision_timesteps=times, return_dict=False, **arguments)[0][0]
        return out


# fmt: off
# configurations, many numbers on few lines

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {}  # name -> class and configuration


def describe(name: str, kind: str, **config: Any) -> None:
    CONFIGS[name] = kind, config


describe(
    "ernie_image", "ErnieImageTransformer2DModel",
    hidden_size=32, num_attention_heads=2, num_layers=2, ffn_hidden_size=32, in_channels=16, out_channels=16, patch_size=1,
    text_in_dim=16, rope_axes_dim=(4, 6, 6),
)
describe(
    "motif_video", "MotifVideoTransformer3DModel",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=2,
    num_decoder_layers=1, text_embed_dim=16, image_embed_dim=8, rope_axes_dim=(4, 4, 4), enable_text_cross_attention_dual=True,
)
describe(
    "glm_image", "GlmImageTransformer2DModel",
    patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
    time_embed_dim=8, condition_dim=4, prior_vq_quantizer_codebook_size=16,
)
describe(
    "helios", "HeliosTransformer3DModel",
    num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
    rope_dim=(4, 4, 4), is_amplify_history=True,
)
describe(
    "anyflow", "AnyFlowTransformer3DModel",
    num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
    rope_max_seq_len=32,
)
describe(
    "lumina", "LuminaNextDiT2DModel",
    sample_size=16, patch_size=2, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=4, num_kv_heads=2, multiple_of=16,
    learn_sigma=False, cross_attention_dim=16,
)
describe(
    "joy_image", "JoyImageEditTransformer3DModel",
    in_channels=16, hidden_size=24, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 4, 4],
)
describe(
    "joy_image_plus", "JoyImageEditPlusTransformer3DModel",
    in_channels=16, hidden_size=24, num_attention_heads=2, text_dim=16, num_layers=2, rope_dim_list=[4, 4, 4],
)
describe(
    "fibo", "BriaFiboTransformer2DModel",
    in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=12, num_attention_heads=2, joint_attention_dim=16,
    axes_dims_rope=[4, 4, 4], text_encoder_dim=8,
)
describe(
    "fibo2", "BriaFibo2Transformer2DModel",
    in_channels=16, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, cap_feat_dim=16, injection_layer_ids=(1,),
    perceiver_num_layers=1, min_num_gist_tokens=4, max_num_gist_tokens=8, gist_step=4, gist_min_text_len=4, gist_max_text_len=16,
    axes_dims=(8, 12, 12), axes_lens=(32, 32, 32),
)
describe(
    "framepack", "HunyuanVideoFramepackTransformer3DModel",
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=2,
    num_refiner_layers=1, guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4),
    has_image_proj=True, image_proj_dim=8, has_clean_x_embedder=True,
)
describe(
    "flux3", "Flux3Transformer2DModel",
    in_channels=8, cond_in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
    joint_attention_dim=16, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4),
)
describe(
    "prx", "PRXTransformer2DModel",
    in_channels=4, patch_size=2, context_in_dim=16, hidden_size=32, mlp_ratio=2.0, num_heads=2, depth=2, axes_dim=[8, 8],
)
describe(
    "nucleus", "NucleusMoEImageTransformer2DModel",
    patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4, num_key_value_heads=2,
    joint_attention_dim=16, axes_dims_rope=(4, 6, 6), dense_moe_strategy="leave_first_block_dense", num_experts=4,
    moe_intermediate_dim=16, capacity_factors=2.0,
)
describe(
    "kandinsky6", "Kandinsky6Transformer3DModel",
    in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, model_dim=24, ff_dim=32, num_text_blocks=1,
    num_visual_blocks=2, axes_dims=(4, 4, 4), visual_cond=False, in_audio_dim=4, out_audio_dim=4,
)


describe(
    "cosmos3", "Cosmos3OmniTransformer",
    head_dim=16, hidden_size=32, intermediate_size=32, latent_channel=4, patch_latent_dim=16, num_attention_heads=4,
    num_hidden_layers=2, num_key_value_heads=2, vocab_size=16, rope_axes_dim=(4, 2, 2), sound_dim=4, sound_gen=True,
)


def make(name: str, **changes: Any) -> Any:
    """A tiny transformer."""
    kind, config = CONFIGS[name]
    transformer = getattr(D, kind)(**config | changes)
    for key, parameter in transformer.named_parameters():
        if key.endswith(("pad_token", "gate_up_proj", "down_proj")):
            torch.nn.init.normal_(parameter)  # created with torch.empty
    return transformer


def ids(height: int, width: int, image: int = 0, columns: int = 4) -> Tensor:
    """(image, row, column, 0 ...) of a raster."""
    rows, places = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    found = torch.zeros(height * width, columns)
    found[:, 0], found[:, 1], found[:, 2] = image, rows.flatten(), places.flatten()
    return found


def kept(batch: int, text: int, *padded: int) -> Tensor:
    """A mask with so many padded tokens in each sample."""
    mask = torch.ones(batch, text, dtype=torch.bool)
    for sample, number in enumerate(padded):
        mask[sample, text - number :] = False
    return mask


@builder
def ernie_image() -> Tiny:
    return Loop(make("ernie_image")), {
        "hidden_states": emb(2, 16, 9, 14), "text_bth": emb(2, 12, 16), "text_lens": torch.tensor([12, 7]),
    }


@builder
def motif_video() -> Tiny:
    return Loop(make("motif_video")), {
        "hidden_states": emb(2, 4, 3, 10, 14), "encoder_hidden_states": emb(2, 12, 16), "image_embeds": emb(2, 3, 8),
        "encoder_attention_mask": kept(2, 12, 0, 5),
    }


@builder
def glm_image() -> Tiny:
    size = torch.tensor([[18.0, 28.0]])
    return Loop(make("glm_image")), {
        "hidden_states": emb(1, 4, 18, 28), "encoder_hidden_states": emb(1, 7, 32), "prior_token_id": torch.arange(126)[None] % 16,
        "prior_token_drop": torch.zeros(1, 126, dtype=torch.bool), "target_size": size, "crop_coords": 0 * size,
        "attention_mask": kept(1, 7, 3),
    }


@builder
def helios() -> Tiny:
    return Loop(make("helios")), {
        "hidden_states": emb(1, 16, 3, 10, 14), "encoder_hidden_states": emb(1, 12, 16),
        "indices_hidden_states": torch.arange(8, 11)[None],
        "latents_history_short": emb(1, 16, 2, 10, 14), "indices_latents_history_short": torch.arange(6, 8)[None],
        "latents_history_mid": emb(1, 16, 2, 10, 14), "indices_latents_history_mid": torch.arange(4, 6)[None],
        "latents_history_long": emb(1, 16, 4, 10, 14), "indices_latents_history_long": torch.arange(4)[None],
    }


@builder
def anyflow() -> Tiny:
    return Loop(make("anyflow"), frames=3), {
        "hidden_states": emb(1, 3, 16, 10, 14), "encoder_hidden_states": emb(1, 12, 16), "r_timestep": torch.zeros(1, 3),
    }


@builder
def lumina() -> Tiny:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
    return Loop(make("lumina"), rising=True), {
        "hidden_states": emb(1, 4, 18, 28), "encoder_hidden_states": emb(1, 12, 16), "encoder_mask": kept(1, 12, 4),
        "image_rotary_emb": get_2d_rotary_pos_embed_lumina(8, 32, 32), "cross_attention_kwargs": {},
    }


@builder
def joy_image() -> Tiny:
    return Loop(make("joy_image")), {"hidden_states": emb(1, 2, 16, 1, 14, 22), "encoder_hidden_states": emb(1, 12, 16)}


@builder
def joy_image_plus() -> Tiny:
    return Loop(make("joy_image_plus")), {
        "hidden_states": emb(1, 9 * 11 + 6 * 5, 16, 1, 2, 2), "encoder_hidden_states": emb(1, 12, 16),
        "encoder_hidden_states_mask": kept(1, 12, 4), "shape_list": [[(1, 9, 11), (1, 6, 5)]],
    }


@builder
def fibo() -> Tiny:
    mask = torch.cat([kept(1, 12, 4), kept(1, 9 * 14)], dim=1)[:, None, None]
    return Loop(make("fibo")), {
        "hidden_states": emb(1, 9 * 14, 8), "encoder_hidden_states": emb(1, 12, 16), "text_encoder_layers": [emb(1, 12, 8)] * 3,
        "img_ids": ids(9, 14, columns=3), "txt_ids": torch.zeros(12, 3), "joint_attention_kwargs": {"attention_mask": mask},
    }


@builder
def fibo2() -> Tiny:
    return Loop(make("fibo2")), {
        "hidden_states": emb(1, 16, 18, 28), "encoder_hidden_states": emb(1, 2, 12, 16),
        "context_latents": [emb(1, 16, 10, 12), emb(1, 16, 8, 18)],
    }


@builder
def framepack() -> Tiny:
    return Loop(make("framepack")), {
        "hidden_states": emb(2, 4, 3, 10, 14), "encoder_hidden_states": emb(2, 12, 16), "encoder_attention_mask": kept(2, 12, 0, 5),
        "pooled_projections": emb(2, 8), "image_embeds": emb(2, 3, 8), "guidance": torch.ones(2), "indices_latents": torch.arange(8, 11),
        "latents_clean": emb(2, 4, 1, 10, 14), "indices_latents_clean": torch.tensor([7]),
        "latents_history_2x": emb(2, 4, 2, 10, 14), "indices_latents_history_2x": torch.tensor([5, 6]),
        "latents_history_4x": emb(2, 4, 5, 10, 14), "indices_latents_history_4x": torch.arange(5),
    }


@builder
def flux3() -> Tiny:
    return Loop(make("flux3")), {
        "hidden_states": emb(1, 9 * 14, 8), "encoder_hidden_states": emb(1, 12, 16), "img_ids": ids(9, 14), "txt_ids": torch.zeros(12, 4),
    }


@builder
def flux3_with_reference() -> Tiny:
    loop, call = flux3()
    return loop, call | {"image_cond_hidden_states": emb(1, 7 * 5, 8), "image_cond_ids": ids(7, 5, image=10)}


@builder
def prx() -> Tiny:
    return Loop(make("prx")), {
        "hidden_states": emb(2, 4, 18, 28), "encoder_hidden_states": emb(2, 12, 16), "attention_mask": kept(2, 12, 0, 5),
    }


@builder
def nucleus() -> Tiny:
    return Loop(make("nucleus")), {
        "hidden_states": emb(2, 9 * 14, 16), "img_shapes": [(1, 9, 14)] * 2, "encoder_hidden_states": emb(2, 12, 16),
        "encoder_hidden_states_mask": kept(2, 12, 0, 5),
    }


@builder
def kandinsky6() -> Tiny:
    return Loop(make("kandinsky6")), {
        "hidden_states": emb(1, 3, 10, 14, 4), "encoder_hidden_states": emb(1, 12, 16), "pooled_projections": emb(1, 8),
        "audio_hidden_states": emb(1, 6, 4), "encoder_attention_mask": kept(1, 12, 4),
    }


@builder
def cosmos3() -> Tiny:
    text, video, sound = torch.arange(127).split([12, 105, 10])  # places in the sequence
    return PackedLoop(make("cosmos3")), {
        "hidden_states": emb(1, 4, 3, 10, 14), "input_ids": text % 16, "text_indexes": text, "und_len": 12, "sequence_length": 127,
        "position_ids": torch.arange(127).expand(3, -1), "vision_token_shapes": [(3, 5, 7)], "vision_sequence_indexes": video,
        "vision_mse_loss_indexes": video, "vision_noisy_frame_indexes": [torch.arange(3)], "sound_tokens": [emb(4, 10)],
        "sound_token_shapes": [(10, 1, 1)], "sound_sequence_indexes": sound, "sound_mse_loss_indexes": sound,
        "sound_timesteps": torch.ones(10), "sound_noisy_frame_indexes": [torch.arange(10)],
    }
