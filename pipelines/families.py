"""The families of diffusers: which modules are image or video self-attention, where the grid comes from, where the text stands."""

from dit_accel.pipelines import grids
from dit_accel.pipelines.family import Arguments, Family

BOTH = r"(single_)?transformer_blocks\.\d+\.attn"
FIRST = r"transformer_blocks\.\d+\.attn1"


def text_states(arguments: Arguments) -> int:
    """Text tokens of a joint sequence."""
    return int(arguments["encoder_hidden_states"].shape[1])


def no_text(arguments: Arguments) -> int:
    """The text is in cross-attention."""
    return 0


CONTROL = ("controlnet_block_samples", "controlnet_single_block_samples")

FLUX = Family(
    "flux", ("FluxTransformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids="img_ids",
    per_token=("hidden_states", "img_ids", *CONTROL),
)  # fmt: skip
FLUX2 = Family(
    "flux2", ("Flux2Transformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids="img_ids", per_token=("hidden_states", "img_ids")
)
CHROMA = Family(
    "chroma", ("ChromaTransformer2DModel",), BOTH, grids.of_image_ids, text=text_states, ids="img_ids",
    per_token=("hidden_states", "img_ids", *CONTROL), mask="pairs",
)  # fmt: skip
FLUX_LIKE = Family(
    "flux-like", ("BriaTransformer2DModel", "OvisImageTransformer2DModel", "LongCatImageTransformer2DModel"), BOTH, grids.of_image_ids,
    text=text_states, ids="img_ids",
)  # fmt: skip
KREA2 = Family(
    "krea2", ("Krea2Transformer2DModel",), r"transformer_blocks\.\d+\.attn", grids.of_trailing_ids, ids="position_ids", mask="keys"
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

FAMILIES: list[Family] = [
    FLUX, FLUX2, CHROMA, FLUX_LIKE, KREA2, QWEN_IMAGE, Z_IMAGE, SD3, AURAFLOW, PIXART, HUNYUAN_DIT, LUMINA2, COGVIEW, HIDREAM,
    HUNYUAN, HUNYUAN15, WAN, COGVIDEOX, LTX, MOCHI, COSMOS, EASYANIMATE, LATTE, KANDINSKY5,
]  # fmt: skip
# transformers whose self-attention is linear: there is nothing to gain
LINEAR = ("SanaTransformer2DModel", "SanaVideoTransformer3DModel")
