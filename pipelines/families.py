"""The families of diffusers: which modules are image or video self-attention, where the grid comes from, where the text is placed."""

import math
from typing import Any

from dit_accel.pipelines import grids
from dit_accel.pipelines.family import Arguments, Family

BOTH = r"(single_)?transformer_blocks\.\d+\.attn"
FIRST = r"transformer_blocks\.\d+\.attn1"

QKV = ("to_q", "to_k", "to_v")
SELF = (*QKV, "to_out.0")
JOINT = (*SELF, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # the text has projections of its own
KANDINSKY = ("to_query", "to_key", "to_value", "out_layer")
JOY = ("img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj")


def text_states(arguments: Arguments) -> int:
    """Text tokens of a joint sequence."""
    return int(arguments["encoder_hidden_states"].shape[1])


def text_and_image_states(arguments: Arguments) -> int:
    """Text tokens of a joint sequence, and the embeddings of an image that follow them."""
    image = arguments.get("image_embeds")
    return text_states(arguments) + (0 if image is None else int(image.shape[1]))


def no_text(arguments: Arguments) -> int:
    """The text is in cross-attention."""
    return 0


def text_bth(arguments: Arguments) -> int:
    """Text tokens under ERNIE-Image's name."""
    return int(arguments["text_bth"].shape[1])


def no_vision(arguments: Arguments) -> int:
    """All tokens of a packed sequence but those of images and videos."""
    return int(arguments["sequence_length"]) - sum(math.prod(shape) for shape in arguments["vision_token_shapes"])


def heads_by_to_q(module: Any) -> tuple[int, int]:
    """Heads from `heads`, their width from `to_q`."""
    return module.heads, module.to_q.out_features // module.heads


def num_heads_by_to_q(module: Any) -> tuple[int, int]:
    """Heads from `num_heads`, their width from `to_q`."""
    return module.num_heads, module.to_q.out_features // module.num_heads


def num_heads_by_to_query(module: Any) -> tuple[int, int]:
    """Heads from `num_heads`, their width from `to_query`."""
    return module.num_heads, module.to_query.out_features // module.num_heads


def num_attention_heads_by_to_q(module: Any) -> tuple[int, int]:
    """Heads from `num_attention_heads`, their width from `to_q`."""
    return module.num_attention_heads, module.to_q.out_features // module.num_attention_heads


def heads_by_head_dim(module: Any) -> tuple[int, int]:
    """Heads from `heads`, their width from `head_dim`."""
    return module.heads, module.head_dim


def side_of_learned_positions(transformer: Any) -> int | None:
    """Side of the square table of learned positions `[1, side², C]`, of which the middle or a scaled part is used."""
    return math.isqrt(transformer.pos_embed.pos_embed.shape[1])


def side_of_patch_positions(transformer: Any) -> int | None:
    """Side of the table `[side, side, C]` of positions that are added to the patches."""
    return int(transformer.patch_embed.pos_embed_max_size)


FLUX = Family(
    "flux", ("FluxTransformer2DModel",), BOTH, grids.of_image_ids, projections=JOINT, text=text_states, ids=("img_ids",), patch=2,
    rotary="pos_embed", sharded="streams", rotary_factor=10.0,  # CLEAR's factor at every size above 1024 (arXiv 2412.16112, released code)
)  # fmt: skip
FLUX2 = Family(
    "flux2", ("Flux2Transformer2DModel",), BOTH, grids.of_image_ids_uncached,
    projections=(*JOINT, "to_qkv_mlp_proj", "to_out"),  # of the parallel blocks, with their MLP's first and last layers in them
    text=text_states, ids=("img_ids",), patch=2, rotary="pos_embed", sharded="streams",
)  # fmt: skip
CHROMA = Family(
    "chroma", ("ChromaTransformer2DModel",), BOTH, grids.of_image_ids, projections=JOINT, text=text_states, ids=("img_ids",),
    mask="pairs", patch=2, rotary="pos_embed",
)  # fmt: skip
FLUX_LIKE = Family(
    "flux-like", ("OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"), BOTH, grids.of_image_ids, projections=JOINT,
    text=text_states, ids=("img_ids",), patch=2, rotary="pos_embed",
)  # fmt: skip
BRIA = Family(
    "bria", ("BriaTransformer2DModel",), BOTH, grids.of_image_ids, projections=JOINT, text=text_states, ids=("img_ids",),
    rotary="pos_embed",  # no patch: the pipeline's own factor is that of a token
)  # fmt: skip
KREA2 = Family(
    "krea2", ("Krea2Transformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_trailing_ids, projections=(*SELF, "to_gate"),
    heads=num_heads_by_to_q, ids=("position_ids",), mask="keys", patch=2, rotary="rotary_emb",
)  # fmt: skip
QWEN_IMAGE = Family(
    "qwen-image", ("QwenImageTransformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_image_shapes, projections=JOINT,
    text=text_states, mask="keys", sharded="streams",
)  # fmt: skip
Z_IMAGE = Family(
    "z-image", ("ZImageTransformer2DModel",), r"layers\.\d+\.attention", grids.of_image_list, projections=SELF, text_first=False,
    latents="x", timestep="t", timestep_rises=True, prompt_first=True, mask="keys",
)  # fmt: skip
SD3 = Family(
    "sd3", ("SD3Transformer2DModel",), r"transformer_blocks\.\d+\.attn2?", grids.of_latents, projections=JOINT, text_first=False,
    text=text_states, image_only=r"transformer_blocks\.\d+\.attn2", longest_side=side_of_learned_positions,
)  # fmt: skip
AURAFLOW = Family(
    "auraflow", ("AuraFlowTransformer2DModel",), r"(joint|single)_transformer_blocks\.\d+\.attn", grids.of_latents, projections=JOINT,
    longest_side=side_of_learned_positions,
)  # fmt: skip
# DiT's pipeline, which takes classes and no prompt, places them first
PIXART = Family("pixart", ("PixArtTransformer2DModel", "DiTTransformer2DModel"), FIRST, grids.of_latents, projections=SELF, text=no_text)
HUNYUAN_DIT = Family("hunyuan-dit", ("HunyuanDiT2DModel",), r"blocks\.\d+\.attn1", grids.of_latents, projections=SELF, text=no_text)
LUMINA2 = Family("lumina2", ("Lumina2Transformer2DModel",), r"layers\.\d+\.attn", grids.of_latents, projections=SELF, timestep_rises=True)
COGVIEW4 = Family(
    "cogview4", ("CogView4Transformer2DModel",), FIRST, grids.of_latents, projections=SELF, text=text_states, mask="pairs", rotary="rope"
)
COGVIEW3 = Family(
    "cogview3", ("CogView3PlusTransformer2DModel",), FIRST, grids.of_latents, projections=SELF, text=text_states, mask="pairs",
    longest_side=side_of_patch_positions,
)  # fmt: skip
HIDREAM = Family(
    "hidream", ("HiDreamImageTransformer2DModel",), r"(double|single)_stream_blocks\.\d+\.block\.attn1", grids.of_capacity,
    projections=(*QKV, "to_out", "to_q_t", "to_k_t", "to_v_t", "to_out_t"), text_first=False, timestep="timesteps", rotary="pe_embedder",
)  # fmt: skip
HUNYUAN = Family(
    "hunyuan", ("HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel"), BOTH, grids.of_latents, projections=JOINT,
    text_first=False, mask="keys", rotary="rope",
)  # fmt: skip
HUNYUAN15 = Family(
    "hunyuan-1.5", ("HunyuanVideo15Transformer3DModel",), r"transformer_blocks\.\d+\.attn", grids.of_latents, projections=JOINT,
    text_first=False, mask="pairs", rotary="rope",
)  # fmt: skip
WAN = Family(
    "wan",
    ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "ChronoEditTransformer3DModel",
     "SkyReelsV2Transformer3DModel"),
    r"(vace_)?blocks\.\d+\.attn1", grids.of_latents, projections=SELF, text=no_text, sharded="sequence",
)  # fmt: skip
COGVIDEOX = Family(
    "cogvideox", ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"), FIRST, grids.of_frames_first, projections=SELF,
    text=text_states,
)  # fmt: skip
LTX = Family(
    "ltx", ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"), FIRST, grids.of_numbers, projections=SELF, text=no_text,
    rotary="rope", sharded="sequence",
)  # fmt: skip
MOCHI = Family("mochi", ("MochiTransformer3DModel",), FIRST, grids.of_latents, projections=JOINT, text_first=False)
COSMOS = Family(
    "cosmos", ("CosmosTransformer3DModel", "AllegroTransformer3DModel"), FIRST, grids.of_latents, projections=SELF, text=no_text
)
EASYANIMATE = Family("easyanimate", ("EasyAnimateTransformer3DModel",), FIRST, grids.of_latents, projections=JOINT)
LATTE = Family("latte", ("LatteTransformer3DModel",), FIRST, grids.of_each_frame, projections=SELF, text=no_text)
KANDINSKY5 = Family(
    "kandinsky5", ("Kandinsky5Transformer3DModel",), r"visual_transformer_blocks\.\d+\.self_attention", grids.of_channels_last,
    projections=KANDINSKY, heads=num_heads_by_to_query, text=no_text,
)  # fmt: skip
KANDINSKY6 = Family(
    "kandinsky6", ("Kandinsky6Transformer3DModel",), r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    grids.of_channels_last, projections=KANDINSKY, heads=num_heads_by_to_query, text=no_text,
)  # fmt: skip
ERNIE_IMAGE = Family(
    "ernie-image", ("ErnieImageTransformer2DModel",), r"layers\.\d+\.self_attention", grids.of_latents, projections=SELF,
    text_first=False, text=text_bth, mask="keys", rotary="pos_embed",
)  # fmt: skip
MOTIF_VIDEO = Family(
    "motif-video", ("MotifVideoTransformer3DModel",), BOTH, grids.of_latents, projections=JOINT, doubled=True, text_first=False,
    text=text_and_image_states, mask="keys", rotary="rope",
)  # fmt: skip
GLM_IMAGE = Family(
    "glm-image", ("GlmImageTransformer2DModel",), FIRST, grids.of_latents, projections=SELF, text=text_states, mask="pairs", rotary="rope"
)
# earlier frames, then the video
HELIOS = Family("helios", ("HeliosTransformer3DModel",), r"blocks\.\d+\.attn1", grids.of_latents, projections=SELF, sharded="sequence")
ANYFLOW = Family("anyflow", ("AnyFlowTransformer3DModel",), r"blocks\.\d+\.attn1", grids.of_frames_first, projections=SELF, text=no_text)
LUMINA = Family(
    "lumina", ("LuminaNextDiT2DModel",), r"layers\.\d+\.attn1", grids.of_latents, projections=QKV, text=no_text, timestep_rises=True,
    prompt_first=True, mask="ones",
)  # fmt: skip
JOY_IMAGE = Family(
    "joy-image", ("JoyImageEditTransformer3DModel",), r"double_blocks\.\d+\.attn", grids.of_items, projections=JOY,
    heads=heads_by_head_dim, text_first=False, text=text_states,
)  # fmt: skip
JOY_IMAGE_PLUS = Family(
    "joy-image-plus", ("JoyImageEditPlusTransformer3DModel",), r"double_blocks\.\d+\.attn", grids.of_shape_list, projections=JOY,
    heads=heads_by_head_dim, text_first=False, text=text_states, mask="keys",
)  # fmt: skip
FIBO = Family(
    "fibo", ("BriaFiboTransformer2DModel",), BOTH, grids.of_image_ids, projections=JOINT, text=text_states, ids=("img_ids",), mask="keys",
    rotary="pos_embed",
)  # fmt: skip
# in a batch of prompts of several lengths its text follows the image, under a mask: those calls run their original attention
FIBO2 = Family(
    "fibo2", ("BriaFibo2Transformer2DModel",), r"layers\.\d+\.attention", grids.of_context_latents, projections=SELF, heads=heads_by_to_q
)
FRAMEPACK = Family(
    "framepack", ("HunyuanVideoFramepackTransformer3DModel",), BOTH, grids.of_latents, projections=JOINT, text_first=False,
    history=grids.history_of_framepack, mask="keys", rotary="rope",
)  # fmt: skip
FLUX3 = Family(
    "flux3", ("Flux3Transformer2DModel",), r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn", grids.of_condition_ids,
    projections=SELF, image_only=r"mode_blocks\..*", text=text_states, ids=("img_ids", "image_cond_ids"), rotary="pos_embed",
)  # fmt: skip
PRX = Family(
    "prx", ("PRXTransformer2DModel",), r"blocks\.\d+\.attention", grids.of_latents,
    projections=("img_qkv_proj", "txt_kv_proj", "to_out.0"), text=text_states, keys_only=True, mask="keys", rotary="pe_embedder",
)  # fmt: skip
NUCLEUS = Family(
    "nucleus", ("NucleusMoEImageTransformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_image_shapes,
    projections=(*SELF, "add_k_proj", "add_v_proj"), text_first=False, text=text_states, keys_only=True, mask="keys",
)  # fmt: skip
# text whose own attention is causal, then the video, then sound or actions
COSMOS3 = Family(
    "cosmos3", ("Cosmos3OmniTransformer",), r"layers\.\d+\.self_attn", grids.of_vision_tokens,
    projections=(*QKV, "to_out", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"), heads=num_attention_heads_by_to_q,
    text_first=False, text=no_vision, history=grids.text_of_packed, keys_only=True, latents="vision_tokens", timestep="vision_timesteps",
)  # fmt: skip

FAMILIES: list[Family] = [
    FLUX, FLUX2, CHROMA, FLUX_LIKE, BRIA, KREA2, QWEN_IMAGE, Z_IMAGE, SD3, AURAFLOW, PIXART, HUNYUAN_DIT, LUMINA2, COGVIEW4, COGVIEW3,
    HIDREAM, HUNYUAN, HUNYUAN15, WAN, COGVIDEOX, LTX, MOCHI, COSMOS, EASYANIMATE, LATTE, KANDINSKY5, KANDINSKY6, ERNIE_IMAGE, MOTIF_VIDEO,
    GLM_IMAGE, HELIOS, ANYFLOW, LUMINA, JOY_IMAGE, JOY_IMAGE_PLUS, FIBO, FIBO2, FRAMEPACK, FLUX3, PRX, NUCLEUS,
    COSMOS3,
]  # fmt: skip

LINEAR = "self-attention is linear already: there is nothing to accelerate"
AUDIO = "sequence is audio, not an image or a video"
INNER = "attention modules are a part of a U-Net, which is no diffusion transformer"
# why a transformer class of diffusers has no family; read after "<class>'s"
UNSUPPORTED: dict[str, str] = {
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": "self-attention is linear or in modules without a processor",
    "SanaWMLTX2RefinerTransformer3DModel": "forward is given rotary embeddings in place of a grid, and cached keys of earlier frames",
    "AnyFlowFARTransformer3DModel": "self-attention is causal from chunk to chunk of frames",
    "QwenImage21Transformer2DModel": "self-attention is causal from block to block of its packed sequence",
    "OmniGenTransformer2DModel": "self-attention has a mask of its own between text, time and each image",
    "Ideogram4Transformer2DModel": "self-attention has a mask over the segments of its packed sequence",
    "MiniMaxH3Transformer3DModel": "sequence packs text, video and audio in any order",
    "WanAnimate2Transformer3DModel": "self-attention has a block mask of its own, over cached keys of a reference",
    "Kandinsky6SRTransformer3DModel": "self-attention is sparse already, with blocks that the model itself chooses",
    "AceStepTransformer1DModel": AUDIO,
    "LongCatAudioDiTTransformer": AUDIO,
    "LongCatAudioDiTVae": AUDIO,
    "MiniMaxMusic3Transformer1DModel": AUDIO,
    "StableAudioDiTModel": AUDIO,
    "StableAudio3DiTModel": AUDIO,
    "PriorTransformer": "sequence is an embedding of an image, not its tokens",
    "RFD4ProteinaTransformer": "sequence is a protein, not an image or a video",
    "Transformer2DModel": INNER,
    "TransformerTemporalModel": INNER,
    "DreamLiteTransformer2DModel": INNER,
}
