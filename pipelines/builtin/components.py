"""The parts of the built-in model as they are before training: two tokenizers, two small text encoders, transformer, autoencoder."""

import torch
import torch.nn as nn
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.drawings import vocabulary
from dit_accel.pipelines.builtin.transformer import BuiltinTransformer2DModel

TEXT_WIDTH, POOLED_WIDTH = 256, 128
LATENTS = 8
PAD, UNK, BOS, EOS = range(4)
ZERO = ("norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")


def make_tokenizer(max_length: int, words: list[str], *, begin: bool) -> PreTrainedTokenizerFast:
    """A lower-casing word-level tokenizer over the captions' words; unknown words become one token, never an error."""
    known = ["<pad>", "<unk>", "<bos>", "<eos>", *words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    template = "<bos> $A <eos>" if begin else "$A <eos>"
    special = [("<bos>", BOS), ("<eos>", EOS)] if begin else [("<eos>", EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", model_max_length=max_length
    )


def make_text_encoders(vocab_size: int) -> tuple[CLIPTextModel, T5EncoderModel]:
    """A CLIP text model for the pooled embedding and a T5 encoder for the sequence, one layer each, 0.8 million parameters together."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocab_size, hidden_size=POOLED_WIDTH, intermediate_size=2 * POOLED_WIDTH, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=32, projection_dim=POOLED_WIDTH, pad_token_id=PAD, bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )  # fmt: skip
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=vocab_size, d_model=TEXT_WIDTH, d_kv=64, d_ff=2 * TEXT_WIDTH, num_layers=1, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        )
    )  # fmt: skip
    return clip, t5


def make_transformer(num_single_layers: int = 5) -> BuiltinTransformer2DModel:
    """1 double block and single ones, 4 heads of 64, 7.9 million parameters; modulations and output start at zero."""
    transformer = BuiltinTransformer2DModel(
        patch_size=1, in_channels=4 * LATENTS, num_layers=1, num_single_layers=num_single_layers, attention_head_dim=64,
        num_attention_heads=4, joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=True,
        axes_dims_rope=(8, 28, 28), predicts_clean=True,
    )  # fmt: skip
    for name, module in transformer.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(ZERO) and ("blocks" not in name or "norm" in name.split(".")[-2]):
            nn.init.zeros_(module.weight)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return transformer


def make_pipeline(seed: int = 0, num_single_layers: int = 5) -> FluxPipeline:
    """An untrained built-in pipeline (random weights from `seed`)."""
    torch.manual_seed(seed)
    clip_tokenizer, t5_tokenizer = make_tokenizer(32, vocabulary(), begin=True), make_tokenizer(512, vocabulary(), begin=False)
    clip, t5 = make_text_encoders(len(clip_tokenizer))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.8, max_shift=1.5
    )
    return FluxPipeline(
        scheduler=scheduler, vae=PatchAutoencoder(latent_channels=LATENTS), text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=t5,
        tokenizer_2=t5_tokenizer, transformer=make_transformer(num_single_layers),
    )  # fmt: skip
