"""Tiny random pipelines, built without any download, around the transformers of `tiny_transformers`."""

from types import SimpleNamespace

import diffusers as D
import torch
from tiny_parts import STEPS, Tiny, builder, emb, flow, flux2_vae, hunyuan_vae, kl, qwen_vae, wan_vae
from tiny_transformers import kept, make
from torch import Tensor

# fmt: off
# configurations, many numbers on few lines

def _texts(width: int, embeds: str = "prompt_embeds", mask: str = "prompt_attention_mask") -> dict[str, Tensor]:
    """A prompt and a negative prompt, which is padded."""
    return {embeds: emb(1, 12, width), mask: kept(1, 12), f"negative_{embeds}": emb(1, 12, width), f"negative_{mask}": kept(1, 12, 7)}


@builder
def ernie_image_pipeline() -> Tiny:
    p = D.ErnieImagePipeline(transformer=make("ernie_image"), vae=flux2_vae(), text_encoder=None, tokenizer=None, scheduler=flow())
    return p, dict(prompt_embeds=[emb(12, 16)], negative_prompt_embeds=[emb(7, 16)], height=36, width=56, **STEPS)


@builder
def prx_pipeline() -> Tiny:
    p = D.PRXPipeline(transformer=make("prx"), scheduler=flow(), text_encoder=None, tokenizer=None, vae=kl(latent=4))
    return p, dict(**_texts(16), height=36, width=56, use_resolution_binning=False, **STEPS)


@builder
def nucleus_pipeline() -> Tiny:
    p = D.NucleusMoEImagePipeline(transformer=make("nucleus"), scheduler=flow(use_dynamic_shifting=True), vae=qwen_vae(), text_encoder=None,
                                  processor=None)
    return p, dict(**_texts(16, mask="prompt_embeds_mask"), height=72, width=112, **STEPS)


@builder
def motif_video_pipeline() -> Tiny:
    from diffusers.guiders import ClassifierFreeGuidance
    t = make("motif_video", in_channels=33, out_channels=16, image_embed_dim=None)
    p = D.MotifVideoPipeline(scheduler=flow(), vae=wan_vae(), text_encoder=None, tokenizer=None, transformer=t,
                             guider=ClassifierFreeGuidance(guidance_scale=3.0))
    return p, dict(**_texts(16), height=80, width=112, num_frames=9, **STEPS)


@builder
def anyflow_pipeline() -> Tiny:
    p = D.AnyFlowPipeline(tokenizer=None, text_encoder=None, transformer=make("anyflow"), vae=wan_vae(),
                          scheduler=D.FlowMapEulerDiscreteScheduler())
    return p, dict(prompt_embeds=emb(1, 12, 16), height=80, width=112, num_frames=9, **STEPS)


@builder
def lumina_pipeline() -> Tiny:
    p = D.LuminaPipeline(transformer=make("lumina", learn_sigma=True), scheduler=flow(), vae=kl(latent=4, factor_log2=3), text_encoder=None,
                         tokenizer=None)
    return p, dict(negative_prompt=None, **_texts(16), height=144, width=224, **STEPS)


@builder
def glm_image_pipeline() -> Tiny:
    p = D.GlmImagePipeline(tokenizer=None, processor=None, text_encoder=None, vision_language_encoder=None, vae=kl(latent=4),
                           transformer=make("glm_image"), scheduler=flow(use_dynamic_shifting=True, base_shift=0.25, max_shift=0.75))
    return p, dict(prompt_embeds=emb(1, 7, 32), negative_prompt_embeds=emb(1, 7, 32), prior_token_ids=torch.arange(140)[None] % 16,
                   height=40, width=56, **STEPS)


@builder
def helios_pipeline() -> Tiny:
    p = D.HeliosPipeline(tokenizer=None, text_encoder=None, vae=wan_vae(), scheduler=D.HeliosScheduler(stages=1, stage_range=[0, 1]),
                         transformer=make("helios"))
    return p, dict(prompt_embeds=emb(1, 12, 16), negative_prompt_embeds=emb(1, 12, 16), height=80, width=112, num_frames=9,
                   num_latent_frames_per_chunk=3, **STEPS)


@builder
def fibo2_pipeline() -> Tiny:
    p = D.BriaFibo2Pipeline(transformer=make("fibo2"), scheduler=flow(use_dynamic_shifting=True), vae=flux2_vae(), text_encoder=None,
                            processor=None)
    return p, dict(prompt_embeds=emb(1, 2, 12, 16), negative_prompt_embeds=emb(1, 2, 7, 16), height=36, width=56, **STEPS)


@builder
def framepack_pipeline() -> Tiny:
    p = D.HunyuanVideoFramepackPipeline(text_encoder=None, tokenizer=None, transformer=make("framepack"), vae=hunyuan_vae(),
                                        scheduler=flow(shift=7.0), text_encoder_2=None, tokenizer_2=None, image_encoder=None,
                                        feature_extractor=None)
    p.encode_image = lambda image, device: emb(1, 3, 8)  # there is no argument for its embedding
    return p, dict(image=torch.rand(1, 3, 80, 112), prompt_embeds=emb(1, 12, 16), pooled_prompt_embeds=emb(1, 8),
                   prompt_attention_mask=kept(1, 12, 3), height=80, width=112, num_frames=9, latent_window_size=3, **STEPS)


@builder
def joy_image_pipeline() -> Tiny:
    from PIL import Image
    p = D.JoyImageEditPipeline(scheduler=flow(), vae=wan_vae(), text_encoder=None, tokenizer=None, transformer=make("joy_image"),
                               processor=None)
    p.vae_image_processor.get_default_height_width = lambda *_: (80, 112)  # a bucket of a megapixel otherwise
    posterior = p.vae.encode(emb(1, 3, 1, 80, 112)).latent_dist
    p.vae.encode = lambda _: SimpleNamespace(latent_dist=SimpleNamespace(sample=posterior.mode))  # drawn without the call's generator
    return p, dict(image=Image.new("RGB", (88, 56), (200, 80, 10)), **_texts(16, mask="prompt_embeds_mask"), height=80, width=112, **STEPS)


@builder
def kandinsky6_pipeline() -> Tiny:
    p = D.Kandinsky6TI2VAPipeline(transformer=make("kandinsky6", visual_cond=True), vae=hunyuan_vae(), text_encoder=None, tokenizer=None,
                                  text_encoder_2=None, tokenizer_2=None, scheduler=flow())
    return p, dict(prompt_embeds=emb(1, 12, 16), pooled_prompt_embeds=emb(1, 8), negative_prompt_embeds=emb(1, 7, 16),
                   negative_pooled_prompt_embeds=emb(1, 8), height=80, width=112, num_frames=9, sample_audio=False, **STEPS)
