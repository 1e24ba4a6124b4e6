"""Tiny random pipelines of video families, built without any download: real pipeline classes around transformers of a few channels.

Text comes as embeddings, so that no text encoder or tokenizer is needed. Each builder returns the pipeline and the arguments of a call.
"""

from typing import Any

import diffusers as D
import torch
from tiny_parts import STEPS, Tiny, builder, emb, flow, hunyuan_vae, kl, wan_vae

# fmt: off
# configurations, many numbers on few lines

def _wan_t(cls: Any = None, **kw: Any) -> Any:
    cfg = {"patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16,
           "text_dim": 32,
               "freq_dim": 64, "ffn_dim": 32, "num_layers": 2, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads",
               "rope_max_seq_len": 32}
    cfg.update(kw)
    return (cls or D.WanTransformer3DModel)(**cfg)


@builder
def kandinsky5() -> Tiny:
    t = D.Kandinsky5Transformer3DModel(in_visual_dim=4, in_text_dim=32, in_text_dim2=16, time_dim=16, out_visual_dim=4,
                                       patch_size=(1, 2, 2), model_dim=24, ff_dim=32, num_text_blocks=1, num_visual_blocks=2,
                                       axes_dims=(4, 4, 4), visual_cond=False, attention_type="regular")
    p = D.Kandinsky5T2VPipeline(transformer=t, vae=hunyuan_vae(), text_encoder=None, tokenizer=None, text_encoder_2=None,
                                tokenizer_2=None, scheduler=flow(shift=7.0))
    cu = torch.tensor([0, 12], dtype=torch.int32)
    return p, dict(prompt_embeds_qwen=emb(1, 12, 32), prompt_embeds_clip=emb(1, 16), prompt_cu_seqlens=cu,
                   negative_prompt_embeds_qwen=emb(1, 12, 32), negative_prompt_embeds_clip=emb(1, 16),
                   negative_prompt_cu_seqlens=cu, height=32, width=48, num_frames=5, **STEPS)


@builder
def wan() -> Tiny:
    p = D.WanPipeline(tokenizer=None, text_encoder=None, transformer=_wan_t(), transformer_2=None, vae=wan_vae(),
                      scheduler=flow(shift=7.0))
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9, **STEPS)


@builder
def wan22_two_experts() -> Tiny:  # Wan 2.2 A14B layout: `transformer` (high noise) and `transformer_2` (low noise)
    p = D.WanPipeline(tokenizer=None, text_encoder=None, transformer=_wan_t(), transformer_2=_wan_t(), vae=wan_vae(),
                      scheduler=flow(shift=7.0), boundary_ratio=0.875)
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9, **STEPS)


@builder
def wan_vace() -> Tiny:
    t = _wan_t(D.WanVACETransformer3DModel, vace_layers=[0], vace_in_channels=96)
    p = D.WanVACEPipeline(tokenizer=None, text_encoder=None, transformer=t, vae=wan_vae(), scheduler=flow(shift=7.0))
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9,
                   video=torch.rand(9, 3, 32, 48).unsqueeze(0), mask=torch.ones(1, 9, 3, 32, 48), **STEPS)


@builder
def wan_i2v() -> Tiny:  # Wan 2.2 I2V style: no CLIP image encoder
    p = D.WanImageToVideoPipeline(tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=flow(shift=7.0),
                                  image_processor=None, image_encoder=None, transformer=_wan_t(in_channels=36), transformer_2=None)
    return p, dict(image=torch.rand(1, 3, 32, 48), prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32),
                   height=32, width=48, num_frames=9, **STEPS)


@builder
def skyreels_v2() -> Tiny:
    t = D.SkyReelsV2Transformer3DModel(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16,
                                       out_channels=16, text_dim=32, freq_dim=64, ffn_dim=32, num_layers=2,
                                       cross_attn_norm=True, rope_max_seq_len=32)
    p = D.SkyReelsV2Pipeline(tokenizer=None, text_encoder=None, transformer=t, vae=wan_vae(),
                             scheduler=D.UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True, prediction_type="flow_prediction"))
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9, **STEPS)


@builder
def hunyuan_video() -> Tiny:
    t = D.HunyuanVideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=2,
                                         num_single_layers=2, num_refiner_layers=1, patch_size=1, patch_size_t=1,
                                         guidance_embeds=True, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4))
    p = D.HunyuanVideoPipeline(text_encoder=None, tokenizer=None, transformer=t, vae=hunyuan_vae(), scheduler=flow(shift=7.0),
                               text_encoder_2=None, tokenizer_2=None)
    m = torch.ones(1, 12, dtype=torch.long)
    m[:, 9:] = 0  # real prompts are padded: keys are masked
    return p, dict(prompt_embeds=emb(1, 12, 16), pooled_prompt_embeds=emb(1, 8), prompt_attention_mask=m, height=32, width=48,
                   num_frames=9, **STEPS)


@builder
def hunyuan_video15() -> Tiny:
    t = D.HunyuanVideo15Transformer3DModel(in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2,
                                           num_refiner_layers=1, mlp_ratio=2.0, patch_size=1, patch_size_t=1, text_embed_dim=16,
                                           text_embed_2_dim=8, image_embed_dim=12, rope_axes_dim=(2, 2, 4), target_size=16,
                                           task_type="t2v")
    v = D.AutoencoderKLHunyuanVideo15(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16), layers_per_block=1,
                                      spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False,
                                      upsample_match_channel=False)
    from diffusers.guiders import ClassifierFreeGuidance
    p = D.HunyuanVideo15Pipeline(text_encoder=None, tokenizer=None, transformer=t, vae=v, scheduler=flow(shift=7.0),
                                 text_encoder_2=None, tokenizer_2=None, guider=ClassifierFreeGuidance(guidance_scale=1.0))
    n = {"prompt_embeds": emb(1, 12, 16), "prompt_embeds_mask": torch.ones(1, 12), "prompt_embeds_2": emb(1, 6, 8),
             "prompt_embeds_mask_2": torch.ones(1, 6)}
    return p, dict(**n, **{"negative_" + k: v for k, v in n.items()}, height=32, width=48, num_frames=5, **STEPS)


@builder
def cogvideox() -> Tiny:
    t = D.CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
                                      time_embed_dim=8, text_embed_dim=32, num_layers=2, sample_width=6, sample_height=4,
                                      sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=12,
                                      use_rotary_positional_embeddings=True)
    v = D.AutoencoderKLCogVideoX(in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
                                 up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
                                 layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4)
    p = D.CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=v, transformer=t, scheduler=D.CogVideoXDDIMScheduler())
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9, **STEPS)


@builder
def cogvideox15() -> Tiny:  # CogVideoX 1.5: patch_size_t=2
    t = D.CogVideoXTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
                                      text_embed_dim=32, num_layers=2, sample_width=6, sample_height=4, sample_frames=9, patch_size=2,
                                      patch_size_t=2, patch_bias=False, temporal_compression_ratio=4, max_text_seq_length=12,
                                      use_rotary_positional_embeddings=True)
    p, k = cogvideox()
    p.register_modules(transformer=t)
    return p, {**k, "num_frames": 13}


@builder
def ltx() -> Tiny:
    t = D.LTXVideoTransformer3DModel(in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16,
                                     cross_attention_dim=32, num_layers=2, caption_channels=32)
    v = D.AutoencoderKLLTXVideo(in_channels=3, out_channels=3, latent_channels=8, block_out_channels=(8, 8, 8, 8),
                                decoder_block_out_channels=(8, 8, 8, 8), layers_per_block=(1, 1, 1, 1, 1),
                                decoder_layers_per_block=(1, 1, 1, 1, 1), spatio_temporal_scaling=(True, True, False, False),
                                decoder_spatio_temporal_scaling=(True, True, False, False),
                                decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4,
                                patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False)
    p = D.LTXPipeline(scheduler=flow(), vae=v, text_encoder=None, tokenizer=None, transformer=t)
    m = torch.ones(1, 12)
    return p, dict(prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 32),
                   negative_prompt_attention_mask=m, height=32, width=64, num_frames=9, **STEPS)


@builder
def ltx2() -> Tiny:
    t = D.LTX2VideoTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
                                      audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2,
                                      audio_attention_head_dim=4, audio_cross_attention_dim=8, num_layers=2, caption_channels=16,
                                      rope_double_precision=False, rope_type="split")
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
    c = LTX2TextConnectors(caption_channels=16, text_proj_in_factor=2, video_connector_num_attention_heads=2,
                           video_connector_attention_head_dim=8, video_connector_num_layers=1, video_connector_num_learnable_registers=None,
                           audio_connector_num_attention_heads=2, audio_connector_attention_head_dim=8, audio_connector_num_layers=1,
                           audio_connector_num_learnable_registers=None, connector_rope_base_seq_len=32, rope_theta=10000.0,
                           rope_double_precision=False, causal_temporal_positioning=False, rope_type="split")
    v = D.AutoencoderKLLTX2Video(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
                                 layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
                                 decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
                                 downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
                                 timestep_conditioning=False, patch_size=1, patch_size_t=1, encoder_causal=True, decoder_causal=False)
    a = D.AutoencoderKLLTX2Audio(base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2,
                                 resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", dropout=0.0,
                                 mid_block_add_attention=False, sample_rate=16000, mel_hop_length=160, is_causal=True, mel_bins=8)
    voc = LTX2Vocoder(in_channels=16, hidden_channels=32, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
                      resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000)
    p = D.LTX2Pipeline(scheduler=flow(), vae=v, audio_vae=a, text_encoder=None, tokenizer=None, connectors=c, transformer=t, vocoder=voc)
    m = torch.ones(1, 12, dtype=torch.long)
    return p, dict(prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 32),
                   negative_prompt_attention_mask=m, guidance_scale=1.0, stg_scale=0.0, modality_scale=1.0, guidance_rescale=0.0,
                   audio_guidance_scale=1.0, audio_stg_scale=0.0, audio_modality_scale=1.0, audio_guidance_rescale=0.0,
                   spatio_temporal_guidance_blocks=None, use_cross_timestep=False, height=32, width=32, num_frames=5,
                   frame_rate=25.0, **STEPS)


@builder
def mochi() -> Tiny:
    t = D.MochiTransformer3DModel(patch_size=2, num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16,
                                  in_channels=12, qk_norm="rms_norm", text_embed_dim=32, time_embed_dim=4, max_sequence_length=12)
    v = D.AutoencoderKLMochi(latent_channels=12, out_channels=3, encoder_block_out_channels=(32, 32, 32, 32),
                             decoder_block_out_channels=(32, 32, 32, 32), layers_per_block=(1, 1, 1, 1, 1))
    p = D.MochiPipeline(scheduler=flow(), vae=v, text_encoder=None, tokenizer=None, transformer=t)
    m = torch.ones(1, 12, dtype=torch.bool)
    return p, dict(prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 32),
                   negative_prompt_attention_mask=m, height=32, width=48, num_frames=7, **STEPS)


@builder
def cosmos() -> Tiny:
    t = D.CosmosTransformer3DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
                                   mlp_ratio=2, text_embed_dim=32, adaln_lora_dim=4, max_size=(4, 32, 32), patch_size=(1, 2, 2),
                                   rope_scale=(2.0, 1.0, 1.0), concat_padding_mask=False, extra_pos_embed_type=None)
    v = D.AutoencoderKLCosmos(in_channels=3, out_channels=3, latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8),
                              decode_block_out_channels=(8, 8, 8, 8), attention_resolutions=(8,), resolution=64, num_layers=2,
                              patch_size=4, patch_type="haar", scaling_factor=1.0,
                              spatial_compression_ratio=4, temporal_compression_ratio=4)

    class NoSafety(D.ModelMixin, D.ConfigMixin):  # the real checker needs `cosmos_guardrail`
        def __init__(self) -> None:
            super().__init__()
            self._p = torch.nn.Parameter(torch.zeros(1))

        def check_text_safety(self, *_: Any) -> bool:
            return True

        def check_video_safety(self, video: Any) -> Any:
            return video

    s = D.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", final_sigmas_type="sigma_min")
    p = D.CosmosTextToWorldPipeline(text_encoder=None, tokenizer=None, transformer=t, vae=v, scheduler=s, safety_checker=NoSafety())
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, num_frames=9, **STEPS)


@builder
def allegro() -> Tiny:
    t = D.AllegroTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, num_layers=2,
                                    cross_attention_dim=24, sample_width=6, sample_height=4, sample_frames=8, caption_channels=24)
    v = D.AutoencoderKLAllegro(in_channels=3, out_channels=3, down_block_types=("AllegroDownBlock3D",) * 4,
                               up_block_types=("AllegroUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
                               layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4)
    v.enable_tiling()  # required by AutoencoderKLAllegro
    p = D.AllegroPipeline(tokenizer=None, text_encoder=None, vae=v, transformer=t, scheduler=D.DDIMScheduler())
    m = torch.ones(1, 12)
    return p, dict(negative_prompt=None, prompt_embeds=emb(1, 12, 24), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 24),
                   negative_prompt_attention_mask=m, height=32, width=48, num_frames=8, **STEPS)


@builder
def easyanimate() -> Tiny:
    t = D.EasyAnimateTransformer3DModel(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
                                        text_embed_dim=16, num_layers=2, mmdit_layers=2, sample_width=16, sample_height=16, patch_size=2,
                                        time_position_encoding_type="3d_rope")
    v = D.AutoencoderKLMagvit(in_channels=3, out_channels=3,
                              down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 3,
                              up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 3, block_out_channels=(8, 8, 8, 8),
                              latent_channels=4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False)
    p = D.EasyAnimatePipeline(vae=v, text_encoder=None, tokenizer=None, transformer=t, scheduler=flow())
    m = torch.ones(1, 12, dtype=torch.long)
    return p, dict(prompt_embeds=emb(1, 12, 16), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 16),
                   negative_prompt_attention_mask=m, height=32, width=48, num_frames=5, **STEPS)


@builder
def latte() -> Tiny:
    t = D.LatteTransformer3DModel(sample_size=16, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=3,
                                  caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
                                  activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
                                  norm_elementwise_affine=False, norm_eps=1e-6, video_length=4)
    p = D.LattePipeline(tokenizer=None, text_encoder=None, vae=kl(latent=4), transformer=t, scheduler=D.DDIMScheduler())
    return p, dict(negative_prompt=None, prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=32,
                   video_length=4, clean_caption=False, **STEPS)
