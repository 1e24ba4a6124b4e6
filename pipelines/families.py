"""The families of diffusers: which modules are image or video self-attention, where the grid comes from, where the text stands."""

import math

from dit_accel.pipelines import grids
from dit_accel.pipelines.family import Arguments, Family

BOTH = r"(single_)?transformer_blocks\.\d+\.attn"
FIRST = r"transformer_blocks\.\d+\.attn1"


def text_states(arguments: Arguments) -> int:
    """Text tokens of a joint sequence."""
    return int(arguments["encoder_hidden_states"].shape[1])


def text_and_image_states(arguments: Arguments) -> int:
    """Text tokens of a joint sequence, and embeddings of an image beside them."""
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


FLUX = Family("flux", ("FluxTransformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids=("img_ids",))
FLUX2 = Family("flux2", ("Flux2Transformer2DModel",), BOTH, grids.of_image_ids_uncached, text=text_states, ids=("img_ids",))
CHROMA = Family("chroma", ("ChromaTransformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids=("img_ids",), mask="pairs")
FLUX_LIKE = Family(
    "flux-like", ("BriaTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"), BOTH, grids.of_image_ids,
    text=text_states, ids=("img_ids",),
)  # fmt: skip
KREA2 = Family(
    "krea2", ("Krea2Transformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_trailing_ids, ids=("position_ids",), mask="keys"
)
QWEN_IMAGE = Family(
    "qwen-image", ("QwenImageTransformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_image_shapes, text=text_states,
    mask="keys",
)  # fmt: skip
Z_IMAGE = Family(
    "z-image", ("ZImageTransformer2DModel",), r"layers\.\d+\.attention", grids.of_image_list, text_first=False, timestep="t", rising=True,
    latents="x", mask="keys",
)  # fmt: skip
SD3 = Family(
    "sd3", ("SD3Transformer2DModel",), r"transformer_blocks\.\d+\.attn2?", grids.of_latents, text_first=False, text=text_states,
    alone=r"transformer_blocks\.\d+\.attn2",
)  # fmt: skip
AURAFLOW = Family("auraflow", ("AuraFlowTransformer2DModel",), r"(joint|single)_transformer_blocks\.\d+\.attn", grids.of_latents)
PIXART = Family("pixart", ("PixArtTransformer2DModel", "DiTTransformer2DModel"), FIRST, grids.of_latents, text=no_text)
HUNYUAN_DIT = Family("hunyuan-dit", ("HunyuanDiT2DModel",), r"blocks\.\d+\.attn1", grids.of_latents, text=no_text)
LUMINA2 = Family("lumina2", ("Lumina2Transformer2DModel",), r"layers\.\d+\.attn", grids.of_latents, rising=True)
COGVIEW = Family(
    "cogview", ("CogView4Transformer2DModel", "CogView3PlusTransformer2DModel"), FIRST, grids.of_latents, text=text_states,
    mask="pairs",
)  # fmt: skip
HIDREAM = Family(
    "hidream", ("HiDreamImageTransformer2DModel",), r"(double|single)_stream_blocks\.\d+\.block\.attn1", grids.of_capacity,
    text_first=False, timestep="timesteps",
)  # fmt: skip
HUNYUAN = Family(
    "hunyuan", ("HunyuanVideoTransformer3DModel", "HunyuanImageTransformer2DModel"), BOTH, grids.of_latents, text_first=False, mask="keys"
)
HUNYUAN15 = Family(
    "hunyuan-1.5", ("HunyuanVideo15Transformer3DModel",), r"transformer_blocks\.\d+\.attn", grids.of_latents, text_first=False,
    mask="pairs",
)  # fmt: skip
WAN = Family(
    "wan",
    ("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel", "ChronoEditTransformer3DModel",
     "SkyReelsV2Transformer3DModel"),
    r"(vace_)?blocks\.\d+\.attn1", grids.of_latents, text=no_text,
)  # fmt: skip
COGVIDEOX = Family(
    "cogvideox", ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"), FIRST, grids.of_frames_first, text=text_states
)
LTX = Family("ltx", ("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"), FIRST, grids.of_numbers, text=no_text)
MOCHI = Family("mochi", ("MochiTransformer3DModel",), FIRST, grids.of_latents, text_first=False)
COSMOS = Family("cosmos", ("CosmosTransformer3DModel", "AllegroTransformer3DModel"), FIRST, grids.of_latents, text=no_text)
EASYANIMATE = Family("easyanimate", ("EasyAnimateTransformer3DModel",), FIRST, grids.of_latents)
LATTE = Family("latte", ("LatteTransformer3DModel",), FIRST, grids.of_each_frame, text=no_text)
KANDINSKY5 = Family(
    "kandinsky5", ("Kandinsky5Transformer3DModel",), r"visual_transformer_blocks\.\d+\.self_attention", grids.of_channels_last, text=no_text
)

KANDINSKY6 = Family(
    "kandinsky6", ("Kandinsky6Transformer3DModel",), r"visual_transformer_blocks\.\d+\.video_dec_block\.self_attention",
    grids.of_channels_last, text=no_text,
)  # fmt: skip
ERNIE_IMAGE = Family(
    "ernie-image", ("ErnieImageTransformer2DModel",), r"layers\.\d+\.self_attention", grids.of_latents, text_first=False, text=text_bth,
    mask="keys",
)  # fmt: skip
MOTIF_VIDEO = Family(
    "motif-video", ("MotifVideoTransformer3DModel",), BOTH, grids.of_latents, text_first=False, text=text_and_image_states, twice=True,
    mask="keys",
)  # fmt: skip
GLM_IMAGE = Family("glm-image", ("GlmImageTransformer2DModel",), FIRST, grids.of_latents, text=text_states, mask="pairs")
HELIOS = Family("helios", ("HeliosTransformer3DModel",), r"blocks\.\d+\.attn1", grids.of_latents)  # earlier frames, then the video
ANYFLOW = Family("anyflow", ("AnyFlowTransformer3DModel",), r"blocks\.\d+\.attn1", grids.of_frames_first, text=no_text)
LUMINA = Family("lumina", ("LuminaNextDiT2DModel",), r"layers\.\d+\.attn1", grids.of_latents, text=no_text, rising=True, mask="ones")
JOY_IMAGE = Family(
    "joy-image", ("JoyImageEditTransformer3DModel",), r"double_blocks\.\d+\.attn", grids.of_items, text_first=False, text=text_states
)
JOY_IMAGE_PLUS = Family(
    "joy-image-plus", ("JoyImageEditPlusTransformer3DModel",), r"double_blocks\.\d+\.attn", grids.of_shape_list, text_first=False,
    text=text_states, mask="keys",
)  # fmt: skip
FIBO = Family("fibo", ("BriaFiboTransformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids=("img_ids",), mask="keys")
# in a batch of prompts of several lengths its text stands behind the image, under a mask: those calls run their original attention
FIBO2 = Family("fibo2", ("BriaFibo2Transformer2DModel",), r"layers\.\d+\.attention", grids.of_context_latents)
FRAMEPACK = Family(
    "framepack", ("HunyuanVideoFramepackTransformer3DModel",), BOTH, grids.of_latents, text_first=False,
    history=grids.history_of_framepack, mask="keys",
)  # fmt: skip
FLUX3 = Family(
    "flux3", ("Flux3Transformer2DModel",), r"(mode_blocks\.image|single_transformer_blocks)\.\d+\.attn", grids.of_condition_ids,
    text=text_states, alone=r"mode_blocks\..*", ids=("img_ids", "image_cond_ids"),
)  # fmt: skip
PRX = Family("prx", ("PRXTransformer2DModel",), r"blocks\.\d+\.attention", grids.of_latents, text=text_states, keys_only=True, mask="keys")
NUCLEUS = Family(
    "nucleus", ("NucleusMoEImageTransformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_image_shapes, text_first=False,
    text=text_states, keys_only=True, mask="keys",
)  # fmt: skip
# text whose own attention is causal, then the video, then sound or actions
COSMOS3 = Family(
    "cosmos3", ("Cosmos3OmniTransformer",), r"layers\.\d+\.self_attn", grids.of_vision_tokens, text_first=False, text=no_vision,
    history=grids.text_of_packed, keys_only=True, timestep="vision_timesteps", latents="vision_tokens",
)  # fmt: skip

FAMILIES: list[Family] = [
    FLUX, FLUX2, CHROMA, FLUX_LIKE, KREA2, QWEN_IMAGE, Z_IMAGE, SD3, AURAFLOW, PIXART, HUNYUAN_DIT, LUMINA2, COGVIEW, HIDREAM,
    HUNYUAN, HUNYUAN15, WAN, COGVIDEOX, LTX, MOCHI, COSMOS, EASYANIMATE, LATTE, KANDINSKY5, KANDINSKY6, ERNIE_IMAGE, MOTIF_VIDEO,
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
    "SanaWMTransformer3DModel": "self-attention is linear or stands in modules without a processor",
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
