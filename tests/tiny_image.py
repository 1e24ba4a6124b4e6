"""Tiny random pipelines of image families, built without any download: real pipeline classes around transformers of a few channels.

Text comes as embeddings, so that no text encoder or tokenizer is needed. Each builder returns the pipeline and the arguments of a call.
"""

import diffusers as D
import torch
from tiny_parts import STEPS, Tiny, builder, emb, flow, flux2_vae, kl, qwen_vae

# fmt: off
# configurations, many numbers on few lines

@builder
def flux() -> Tiny:
    t = D.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                 num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
                                 guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    p = D.FluxPipeline(scheduler=flow(), vae=kl(latent=4), text_encoder=None, tokenizer=None, text_encoder_2=None,
                       tokenizer_2=None, transformer=t)
    return p, dict(prompt_embeds=emb(1, 12, 32), pooled_prompt_embeds=emb(1, 24), height=32, width=48, **STEPS)


@builder
def flux_kontext() -> Tiny:
    t = D.FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                 num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
                                 guidance_embeds=True, axes_dims_rope=(4, 6, 6))
    p = D.FluxKontextPipeline(scheduler=flow(), vae=kl(latent=4), text_encoder=None, tokenizer=None, text_encoder_2=None,
                              tokenizer_2=None, transformer=t)
    return p, dict(prompt_embeds=emb(1, 12, 32), pooled_prompt_embeds=emb(1, 24), image=torch.rand(1, 3, 32, 64),
                   height=32, width=48, max_area=32 * 48, _auto_resize=False, **STEPS)


@builder
def flux2() -> Tiny:
    t = D.Flux2Transformer2DModel(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16,
                                  num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32,
                                  axes_dims_rope=(4, 4, 4, 4))
    p = D.Flux2Pipeline(scheduler=flow(use_dynamic_shifting=True), vae=flux2_vae(), text_encoder=None, tokenizer=None, transformer=t)
    return p, dict(prompt_embeds=emb(1, 12, 32), height=32, width=48, **STEPS)


@builder
def flux2_with_reference() -> Tiny:
    from PIL import Image
    p, k = flux2()
    k["image"] = [Image.new("RGB", (64, 64), (90, 20, 200))]
    return p, k


@builder
def chroma() -> Tiny:
    t = D.ChromaTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16,
                                   num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6),
                                   approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1)
    p = D.ChromaPipeline(scheduler=flow(), vae=kl(latent=4), text_encoder=None, tokenizer=None, transformer=t)
    m = torch.ones(1, 12)
    m[:, 9:] = 0
    return p, dict(prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 32),
                   negative_prompt_attention_mask=torch.ones(1, 12), height=32, width=48, **STEPS)


@builder
def ovis_image() -> Tiny:
    t = D.OvisImageTransformer2DModel(patch_size=1, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1,
                                      attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6))
    p = D.OvisImagePipeline(scheduler=flow(), vae=kl(latent=4), text_encoder=None, tokenizer=None, transformer=t)
    return p, dict(negative_prompt=None, prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48,
                   **STEPS)


@builder
def bria() -> Tiny:
    t = D.BriaTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
                                 num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=None, axes_dims_rope=[0, 4, 4])
    p = D.BriaPipeline(transformer=t, scheduler=flow(), vae=kl(latent=4, shift_factor=0.0), text_encoder=None, tokenizer=None)
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), height=32, width=48, **STEPS)


@builder
def longcat_image() -> Tiny:
    t = D.LongCatImageTransformer2DModel(patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                         num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                                         axes_dims_rope=[4, 6, 6])
    p = D.LongCatImagePipeline(scheduler=flow(), vae=kl(latent=16, factor_log2=3), text_encoder=None, tokenizer=None,
                             text_processor=None, transformer=t)
    encode = p.encode_prompt  # 0.42.1 calls len(prompt) even when prompt_embeds is given
    p.encode_prompt = lambda prompt=None, **k: encode(prompt=[""], **k)
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32),
                   enable_prompt_rewrite=False, height=64, width=96, **STEPS)


@builder
def krea2() -> Tiny:
    t = D.Krea2Transformer2DModel(in_channels=16, num_layers=2, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
                                  intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3,
                                  text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16,
                                  num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(2, 4, 2))
    p = D.Krea2Pipeline(scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=None, tokenizer=None, transformer=t,
                        text_encoder_select_layers=(0, 1, 2))
    m = torch.ones(1, 12, dtype=torch.bool)
    n = {"prompt_embeds": emb(1, 12, 3, 16), "prompt_embeds_mask": m}
    return p, dict(**n, **{"negative_" + k: v for k, v in n.items()}, height=32, width=48, **STEPS)


@builder
def qwen_image() -> Tiny:
    t = D.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                      num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    p = D.QwenImagePipeline(scheduler=flow(), vae=qwen_vae(), text_encoder=None, tokenizer=None, transformer=t)
    m = torch.ones(1, 12, dtype=torch.long)
    return p, dict(prompt_embeds=emb(1, 12, 16), prompt_embeds_mask=m, negative_prompt_embeds=emb(1, 7, 16),
                   negative_prompt_embeds_mask=torch.ones(1, 7, dtype=torch.long), true_cfg_scale=3.0, height=32, width=48, **STEPS)


@builder
def qwen_image_edit_plus() -> Tiny:
    from PIL import Image
    t = D.QwenImageTransformer2DModel(patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16,
                                      num_attention_heads=2, joint_attention_dim=16, axes_dims_rope=(4, 6, 6))
    p = D.QwenImageEditPlusPipeline(scheduler=flow(), vae=qwen_vae(), text_encoder=None, tokenizer=None, processor=None, transformer=t)
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as mod
    mod.VAE_IMAGE_SIZE = mod.CONDITION_IMAGE_SIZE = 32 * 32  # module constants: the reference is resized to 1024x1024 otherwise
    return p, dict(image=[Image.new("RGB", (64, 32), (200, 80, 10))], prompt_embeds=emb(1, 12, 16),
                   prompt_embeds_mask=torch.ones(1, 12, dtype=torch.long), true_cfg_scale=1.0, height=32, width=64, **STEPS)


@builder
def z_image() -> Tiny:
    t = D.ZImageTransformer2DModel(all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=32, n_layers=2, n_refiner_layers=1,
                                   n_heads=2, n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64])
    torch.nn.init.normal_(t.x_pad_token), torch.nn.init.normal_(t.cap_pad_token)  # created with torch.empty
    p = D.ZImagePipeline(scheduler=flow(), vae=kl(latent=4), text_encoder=None, tokenizer=None, transformer=t)
    return p, dict(prompt=None, prompt_embeds=[emb(12, 16)], negative_prompt_embeds=[emb(12, 16)], guidance_scale=3.0,
                   height=32, width=48, **STEPS)


@builder
def sd3() -> Tiny:
    t = D.SD3Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
                                num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32,
                                pooled_projection_dim=24, out_channels=4, pos_embed_max_size=32, qk_norm="rms_norm",
                                dual_attention_layers=(0,))  # SD3.5-medium style second image-only attention
    p = D.StableDiffusion3Pipeline(scheduler=flow(), vae=kl(latent=4), transformer=t, text_encoder=None, tokenizer=None,
                                   text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None)
    return p, dict(prompt_embeds=emb(1, 12, 32), negative_prompt_embeds=emb(1, 12, 32), pooled_prompt_embeds=emb(1, 24),
                   negative_pooled_prompt_embeds=emb(1, 24), height=32, width=48, **STEPS)


@builder
def pixart_sigma() -> Tiny:
    t = D.PixArtTransformer2DModel(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
                                   caption_channels=32, in_channels=4, cross_attention_dim=16, out_channels=8,
                                   norm_type="ada_norm_single", num_embeds_ada_norm=1000, norm_elementwise_affine=False,
                                   norm_eps=1e-6, use_additional_conditions=False)
    p = D.PixArtSigmaPipeline(tokenizer=None, text_encoder=None, vae=kl(latent=4), transformer=t, scheduler=D.DDIMScheduler())
    m = torch.ones(1, 12)
    return p, dict(negative_prompt=None, prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m,
                   negative_prompt_embeds=emb(1, 12, 32), negative_prompt_attention_mask=m, height=32, width=48,
                   use_resolution_binning=False, **STEPS)


@builder
def dit() -> Tiny:
    t = D.DiTTransformer2DModel(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2,
                                in_channels=4, out_channels=8, num_embeds_ada_norm=1000)
    p = D.DiTPipeline(transformer=t, vae=kl(latent=4), scheduler=D.DDIMScheduler())
    return p, {"class_labels": [1], "num_inference_steps": 2, "output_type": "np"}


@builder
def auraflow() -> Tiny:
    t = D.AuraFlowTransformer2DModel(sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1,
                                     attention_head_dim=8, num_attention_heads=4, caption_projection_dim=32,
                                     joint_attention_dim=32, out_channels=4, pos_embed_max_size=256)
    p = D.AuraFlowPipeline(tokenizer=None, text_encoder=None, vae=kl(latent=4), transformer=t, scheduler=flow())
    m = torch.ones(1, 12)
    return p, dict(prompt_embeds=emb(1, 12, 32), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 32),
                   negative_prompt_attention_mask=m, height=32, width=32, **STEPS)


@builder
def hidream() -> Tiny:
    t = D.HiDreamImageTransformer2DModel(patch_size=2, in_channels=4, out_channels=4, num_layers=1, num_single_layers=1,
                                         attention_head_dim=8, num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64,
                                         num_routed_experts=2, num_activated_experts=2, axes_dims_rope=(2, 4, 2),
                                         max_resolution=(32, 32), llama_layers=(0, 1), force_inference_output=True)
    p = D.HiDreamImagePipeline(scheduler=flow(), vae=kl(latent=4), transformer=t, text_encoder=None, tokenizer=None,
                               text_encoder_2=None, tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
                               text_encoder_4=None, tokenizer_4=None)
    p.default_sample_size = 26  # the pipeline scales pictures to this side, in latents: 13 x 13 tokens
    n = {"prompt_embeds_t5": emb(1, 12, 32), "prompt_embeds_llama3": emb(2, 1, 12, 16), "pooled_prompt_embeds": emb(1, 64)}
    return p, dict(**n, **{"negative_" + k: v for k, v in n.items()}, height=32, width=32, **STEPS)


@builder
def lumina2() -> Tiny:
    t = D.Lumina2Transformer2DModel(sample_size=16, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
                                    num_attention_heads=3, num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 2, 2),
                                    axes_lens=(64, 64, 64), cap_feat_dim=8)
    p = D.Lumina2Pipeline(transformer=t, scheduler=flow(), vae=kl(latent=4, factor_log2=3), text_encoder=None, tokenizer=None)
    m = torch.ones(1, 12, dtype=torch.long)
    return p, dict(prompt_embeds=emb(1, 12, 8), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 8),
                   negative_prompt_attention_mask=m, height=64, width=96, **STEPS)


@builder
def cogview4() -> Tiny:
    t = D.CogView4Transformer2DModel(patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
                                     out_channels=4, text_embed_dim=32, time_embed_dim=8, condition_dim=4)
    p = D.CogView4Pipeline(tokenizer=None, text_encoder=None, vae=kl(latent=4), transformer=t,
                           scheduler=flow(base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True,
                                          time_shift_type="linear"))
    return p, dict(prompt_embeds=emb(1, 16, 32), negative_prompt_embeds=emb(1, 16, 32), height=32, width=48, **STEPS)


@builder
def cogview3plus() -> Tiny:
    t = D.CogView3PlusTransformer2DModel(patch_size=2, in_channels=4, num_layers=1, attention_head_dim=4, num_attention_heads=2,
                                         out_channels=4, text_embed_dim=32, time_embed_dim=8, condition_dim=2,
                                         pos_embed_max_size=32, sample_size=16)
    p = D.CogView3PlusPipeline(tokenizer=None, text_encoder=None, vae=kl(latent=4), transformer=t, scheduler=D.CogVideoXDDIMScheduler())
    return p, dict(prompt_embeds=emb(1, 16, 32), negative_prompt_embeds=emb(1, 16, 32), height=32, width=32, **STEPS)


@builder
def hunyuan_dit() -> Tiny:
    t = D.HunyuanDiT2DModel(sample_size=16, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
                            cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
                            activation_fn="gelu-approximate", text_len=12, text_len_t5=12)
    p = D.HunyuanDiTPipeline(vae=kl(latent=4, factor_log2=3), text_encoder=None, tokenizer=None, transformer=t, scheduler=D.DDPMScheduler(),
                             safety_checker=None, feature_extractor=None, requires_safety_checker=False, text_encoder_2=None,
                             tokenizer_2=None)
    m = torch.ones(1, 12)
    n = {"prompt_embeds": emb(1, 12, 32), "prompt_embeds_2": emb(1, 12, 32), "prompt_attention_mask": m, "prompt_attention_mask_2": m}
    return p, dict(**n, **{"negative_" + k: v for k, v in n.items()}, height=64, width=64, use_resolution_binning=False, **STEPS)


@builder
def hunyuan_image() -> Tiny:
    t = D.HunyuanImageTransformer2DModel(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
                                         num_single_layers=1, num_refiner_layers=1, patch_size=(1, 1), guidance_embeds=True,
                                         text_embed_dim=16, text_embed_2_dim=8, rope_axes_dim=(4, 4))
    v = D.AutoencoderKLHunyuanImage(in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 64, 64, 64),
                                    layers_per_block=1, scaling_factor=0.47, spatial_compression_ratio=8, sample_size=128)
    p = D.HunyuanImagePipeline(scheduler=flow(shift=7.0), vae=v, text_encoder=None, tokenizer=None, text_encoder_2=None,
                               tokenizer_2=None, transformer=t, guider=None, ocr_guider=None)
    n = {"prompt_embeds": emb(1, 12, 16), "prompt_embeds_mask": torch.ones(1, 12), "prompt_embeds_2": emb(1, 6, 8),
             "prompt_embeds_mask_2": torch.ones(1, 6)}
    return p, dict(**n, distilled_guidance_scale=3.5, height=64, width=96, **STEPS)


@builder
def sana() -> Tiny:
    t = D.SanaTransformer2DModel(patch_size=1, in_channels=4, out_channels=4, num_layers=1, num_attention_heads=2,
                                 attention_head_dim=4, num_cross_attention_heads=2, cross_attention_head_dim=4,
                                 cross_attention_dim=8, caption_channels=8, sample_size=32)
    v = D.AutoencoderDC(in_channels=3, latent_channels=4, attention_head_dim=2,
                        encoder_block_types=("ResBlock", "EfficientViTBlock"), decoder_block_types=("ResBlock", "EfficientViTBlock"),
                        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), encoder_qkv_multiscales=((), (5,)),
                        decoder_qkv_multiscales=((), (5,)), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
                        downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
                        decoder_act_fns="silu", scaling_factor=0.41)
    p = D.SanaPipeline(tokenizer=None, text_encoder=None, vae=v, transformer=t, scheduler=flow(shift=3.0))
    m = torch.ones(1, 12, dtype=torch.long)
    return p, dict(negative_prompt=None, prompt_embeds=emb(1, 12, 8), prompt_attention_mask=m, negative_prompt_embeds=emb(1, 12, 8),
                   negative_prompt_attention_mask=m, height=32, width=32, use_resolution_binning=False, **STEPS)
