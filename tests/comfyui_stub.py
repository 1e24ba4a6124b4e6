"""The interface of ComfyUI that the nodes use, as its documentation has it, for machines without ComfyUI.

A model's options, wrappers and callbacks, the attention that an override replaces, and a transformer with FLUX's class name and attributes.
"""

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import fill_randomly, normal
from torch import Tensor

HEADS, WIDTH, CHANNELS = 2, 24, 16


def dense(
    q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, attn_precision: Any = None, skip_reshape: bool = False,
    skip_output_reshape: bool = False, **options: Any,
) -> Tensor:  # fmt: skip
    """The original attention."""
    if not skip_reshape:
        q, k, v = (x.reshape(len(x), x.shape[1], -1, q.shape[-1] // heads).transpose(1, 2) for x in (q, k, v))
    if mask is not None and mask.ndim < 4:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None]
    out = F.scaled_dot_product_attention(q, k, v, mask, scale=options.get("scale"), enable_gqa=q.shape[1] != k.shape[1])
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def attention(*args: Any, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
    """What models call: the override of the options where there is one."""
    override = transformer_options.get("optimized_attention_override")
    if override is None:
        return dense(*args, transformer_options=transformer_options, **kwargs)
    return override(dense, *args, transformer_options=transformer_options, **kwargs)


class Block(nn.Module):
    """Joint attention of text and image, text first; `slice`: what it says of where the image is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.slice: list[int] | None = None

    def forward(self, x: Tensor, mask: Tensor | None, transformer_options: dict[str, Any]) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(F.layer_norm(x, x.shape[-1:])).chunk(3, -1))
        options = transformer_options if self.slice is None else {**transformer_options, "img_slice": self.slice}
        out = attention(q, k, v, HEADS, mask=mask, skip_reshape=True, transformer_options=options)
        return x + self.out(out)


class Flux(nn.Module):
    """The names that `hosts` reads, around two blocks of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_size, self.num_heads, self.hidden_size = 2, HEADS, HEADS * WIDTH
        self.img_in, self.final = nn.Linear(4 * CHANNELS, self.hidden_size), nn.Linear(self.hidden_size, 4 * CHANNELS)
        self.double_blocks = nn.ModuleList(Block(self.hidden_size) for _ in range(2))
        self.single_blocks = nn.ModuleList(Block(self.hidden_size) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        height, width = (-(-n // 2) for n in x.shape[2:])
        padded = F.pad(x, (0, 2 * width - x.shape[3], 0, 2 * height - x.shape[2]))
        tokens = F.pixel_unshuffle(padded, 2).flatten(2).transpose(1, 2)
        joint, text = torch.cat([context, self.img_in(tokens)], 1), context.shape[1]
        for block in (*self.double_blocks, *self.single_blocks):
            joint = block(joint, kwargs.get("attention_mask"), transformer_options)
        out = self.final(joint[:, text:]).transpose(1, 2).unflatten(2, (height, width))
        return F.pixel_shuffle(out, 2)[:, :, : x.shape[2], : x.shape[3]]


class Executor:
    """Wrappers around a method, the first one outermost."""

    def __init__(self, original: Callable[..., Tensor], class_obj: Any, wrappers: list[Any]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, wrappers

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class Patcher:
    """A model with options, wrappers and callbacks; a clone shares its weights."""

    def __init__(self, transformer: nn.Module) -> None:
        self.model = SimpleNamespace(diffusion_model=transformer)
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.callbacks: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> "Patcher":
        other = Patcher(self.model.diffusion_model)
        other.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        for name in ("wrappers", "callbacks"):
            setattr(other, name, {kind: {key: list(x) for key, x in held.items()} for kind, held in getattr(self, name).items()})
        return other

    def get_model_object(self, name: str) -> Any:
        return SimpleNamespace(percent_to_sigma=lambda percent: 1 - percent)

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def add_callback_with_key(self, kind: str, key: str, callback: Any) -> None:
        self.callbacks.setdefault(kind, {}).setdefault(key, []).append(callback)

    def remove_callbacks_with_key(self, kind: str, key: str) -> None:
        self.callbacks.get(kind, {}).pop(key, None)

    def call(self, kind: str, *args: Any) -> None:
        for held in self.callbacks.get(kind, {}).values():
            for callback in held:
                callback(self, *args)


def flux(seed: int = 0) -> Patcher:
    """A random model."""
    torch.manual_seed(seed)
    transformer = Flux()
    fill_randomly(transformer, seed, scale=0.1)
    return Patcher(transformer.eval())


def run(
    patcher: Patcher, size: tuple[int, int] = (34, 47), *, text: int = 13, batch: int = 1, steps: int = 1, mask: Tensor | None = None,
    dtype: torch.dtype = torch.float32, sigmas: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Steps of denoising as ComfyUI makes them: callbacks before each, wrappers around the model, a copy of the options for each run."""
    options = {"transformer_options": copy.copy(patcher.model_options["transformer_options"])}
    model, sigmas = patcher.model, torch.linspace(1, 0, steps + 1) if sigmas is None else sigmas
    x, context = normal(batch, CHANNELS, *size, seed=1).to(dtype), normal(batch, text, HEADS * WIDTH, seed=2).to(dtype)
    model.diffusion_model.to(dtype)

    def apply_model(
        x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, control: Any, transformer_options: Any, **more: Any
    ) -> Tensor:
        return model.diffusion_model(x, t, context=c_crossattn, control=control, transformer_options=transformer_options, **more)

    with torch.inference_mode():
        for step in range(steps):
            sigma = sigmas[step : step + 1]
            now = {**options["transformer_options"], "sigmas": sigma, "sample_sigmas": sigmas, "wrappers": patcher.wrappers}
            wrappers = [wrapper for held in patcher.wrappers.get("apply_model", {}).values() for wrapper in held]
            more = {} if mask is None else {"attention_mask": mask}
            velocity = Executor(apply_model, model, wrappers)(x, sigma, None, context, None, now, **more)
            x = x + (sigmas[step + 1] - sigmas[step]).to(dtype) * velocity
    patcher.call("on_cleanup")
    return x
