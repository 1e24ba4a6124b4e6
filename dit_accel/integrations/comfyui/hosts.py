"""The transformers of ComfyUI that are accelerated: in which modules the image attends to itself, and which of its tokens are where.

In all of them the sequence is: text, then the drawn image or video in raster order, then reference images. What comes before the image
is "text" here, whatever it is (registers, embeddings of an image, a reference in front of the video): every query keeps it, and its own
queries are dense. Layers have the names that they have in diffusers, so that plans and adapters made there fit.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dit_accel.pipelines.family import Grid, Grids

Arguments = Mapping[str, Any]  # a forward's arguments by name


@dataclass(frozen=True)
class Host:
    """Classes of ComfyUI's transformers, by their exact names: a class derived from one may change its sequence.

    `modules`: regular expressions of the modules whose forward calls the attention, each with the layer's name in diffusers. `grids`: from
    a forward's arguments and the transformer, the grids of the image and of the references, or why they are not known. `text`: from the
    same, how many tokens come before the image. `heads`: number of heads and channels per head. `twin`: whether one of these modules
    calls the attention a second time, for the image alone; that layer's name has a 2 at its end.
    """

    classes: tuple[str, ...]
    modules: tuple[tuple[str, str], ...]
    grids: Callable[[Arguments, Any], Grids | str]
    text: Callable[[Arguments, Any], int]
    heads: Callable[[Any], tuple[int, int]]
    twin: Callable[[Any], bool] = lambda module: False

    def layers(self, transformer: Any) -> dict[str, tuple[str, ...]]:
        """Name of a module -> the names of its layers."""
        found: dict[str, tuple[str, ...]] = {}
        for name, module in transformer.named_modules():
            for pattern, layer in self.modules:
                if match := re.fullmatch(pattern, name):
                    first = match.expand(layer)
                    found[name] = (first, f"{first}2") if self.twin(module) else (first,)
        return found


def arguments_of(transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """A forward's arguments by name, those that it takes as **kwargs among them. Raises TypeError where they don't fit."""
    signature = inspect.signature(transformer.forward)
    found = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            found |= found.pop(name, {})
    return found


def _sides(transformer: Any) -> tuple[int, ...]:
    """Latents per token along each axis, (height, width) or (frames, height, width)."""
    size = transformer.patch_size
    return tuple(size) if isinstance(size, list | tuple) else (size, size)


def _grid(latents: Any, sides: tuple[int, ...]) -> Grid:
    """Of latents `[B, C, H, W]` or `[B, C, T, H, W]`, which are padded to whole tokens."""
    sizes = (1, *latents.shape[2:])[-3:]
    frames, height, width = (-(-size // side) for size, side in zip(sizes, (1, *sides)[-3:], strict=True))
    return frames, height, width


def of_pictures(arguments: Arguments, transformer: Any) -> Grids:
    """Of the drawn picture and of `ref_latents`."""
    return tuple(_grid(x, _sides(transformer)) for x in (arguments["x"], *(arguments.get("ref_latents") or ())))


def of_embedded(arguments: Arguments, transformer: Any) -> Grids:
    """Of the drawn picture, by the patches of the embedding."""
    return (_grid(arguments["x"], tuple(transformer.x_embedder.patch_size)),)


def of_video(arguments: Arguments, transformer: Any) -> Grids | str:
    """Of the drawn video, where the text is before it."""
    if getattr(transformer.double_blocks[0], "flipped_img_txt", False):
        return "text behind the video, as in versions of ComfyUI before 2026: use a newer one"
    return (_grid(arguments["x"], _sides(transformer)),)


def of_wan(arguments: Arguments, transformer: Any) -> Grids | str:
    """Of the drawn video, the frames that are put behind it, and `context_latents`."""
    sides = _sides(transformer)
    frames, height, width = _grid(arguments["x"], sides)
    more = arguments.get("time_dim_concat")
    if more is not None:
        extra = _grid(more, sides)
        if extra[1:] != (height, width):
            return "frames of another size behind the video"
        frames += extra[0]
    return ((frames, height, width), *(_grid(x, sides) for x in arguments.get("context_latents") or ()))


def of_context(arguments: Arguments, transformer: Any) -> int:
    """Text in the sequence: `context` `[B, N, C]`."""
    context = arguments.get("context")
    return 0 if context is None else int(context.shape[1])


def of_context_and_registers(arguments: Arguments, transformer: Any) -> int:
    """The same, behind learned registers."""
    return int(transformer.register_length) + of_context(arguments, transformer)


def of_reference_in_front(arguments: Arguments, transformer: Any) -> int:
    """The text is in cross-attention; a picture in front of the video, where the model takes one."""
    reference = arguments.get("reference_latent")
    if reference is None or getattr(transformer, "ref_conv", None) is None:
        return 0
    side_y, side_x = _sides(transformer)[-2:]
    return int(reference.shape[-2]) // side_y * (int(reference.shape[-1]) // side_x)  # its convolution does not pad


def of_hunyuan(arguments: Arguments, transformer: Any) -> int:
    """Text, glyphs (ByT5), embeddings of a picture, and the reference in front of the video."""
    text = of_context(arguments, transformer)
    if transformer.byt5_in is not None and (glyphs := arguments.get("txt_byt5")) is not None:
        text += int(glyphs.shape[1])
    if (picture := arguments.get("clip_fea")) is not None:
        text += int(picture.shape[1])
    if (reference := arguments.get("ref_latent")) is not None:
        frames, height, width = _grid(reference, _sides(transformer))
        text += frames * height * width
    return text


def _by_hidden_size(transformer: Any) -> tuple[int, int]:
    return transformer.num_heads, transformer.hidden_size // transformer.num_heads


def _by_dim(transformer: Any) -> tuple[int, int]:
    return transformer.num_heads, transformer.dim // transformer.num_heads


def _by_first_attention(transformer: Any) -> tuple[int, int]:
    attention = transformer.transformer_blocks[0].attn
    return attention.heads, attention.dim_head


def _by_first_block(transformer: Any) -> tuple[int, int]:
    attention = transformer.joint_blocks[0].x_block.attn
    return attention.num_heads, attention.head_dim


def _has_second(block: Any) -> bool:
    return bool(block.x_block.x_block_self_attn)


STREAMS = ((r"double_blocks\.(\d+)", r"transformer_blocks.\1.attn"), (r"single_blocks\.(\d+)", r"single_transformer_blocks.\1.attn"))

HOSTS = (
    Host(("Flux", "Chroma"), STREAMS, of_pictures, of_context, _by_hidden_size),  # FLUX.1, FLUX.2, Kontext, Fill and Chroma
    Host(
        ("OpenAISignatureMMDITWrapper",), ((r"joint_blocks\.(\d+)", r"transformer_blocks.\1.attn"),), of_embedded, of_context_and_registers,
        _by_first_block, _has_second,
    ),  # Stable Diffusion 3 and 3.5
    Host(
        ("QwenImageTransformer2DModel",), ((r"(transformer_blocks\.\d+\.attn)", r"\1"),), of_pictures, of_context, _by_first_attention
    ),
    Host(("HunyuanVideo",), STREAMS, of_video, of_hunyuan, _by_hidden_size),  # the video models and HunyuanImage
    Host(
        ("WanModel", "VaceWanModel", "CameraWanModel"), ((r"((?:vace_)?blocks\.\d+)\.self_attn", r"\1.attn1"),), of_wan,
        of_reference_in_front, _by_dim,
    ),
)  # fmt: skip

# class of ComfyUI -> its classes in diffusers; by names and sizes alone, FLUX's layers are also layers of Chroma and HunyuanVideo
SOURCES: dict[str, tuple[str, ...]] = {
    "Flux": ("FluxTransformer2DModel", "Flux2Transformer2DModel"),
    "Chroma": ("ChromaTransformer2DModel",),
    "OpenAISignatureMMDITWrapper": ("SD3Transformer2DModel",),
    "QwenImageTransformer2DModel": ("QwenImageTransformer2DModel",),
    "HunyuanVideo": ("HunyuanVideoTransformer3DModel", "HunyuanVideo15Transformer3DModel", "HunyuanImageTransformer2DModel"),
    "WanModel": ("WanTransformer3DModel",),
    "VaceWanModel": ("WanVACETransformer3DModel",),
    "CameraWanModel": ("WanTransformer3DModel",),
}


def host_of(transformer: Any) -> Host | None:
    """The declaration of a transformer's class, or None."""
    name = type(transformer).__name__
    return next((host for host in HOSTS if name in host.classes), None)
