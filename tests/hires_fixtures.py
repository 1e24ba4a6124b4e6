"""Tiny pipelines to draw in stages, and what they are called with."""

from typing import Any

import torch
from PIL import Image
from tiny_image import flux
from torch import Tensor

from dit_accel import generate_hires

SIZE: dict[str, Any] = {"height": 32, "width": 48}
ASKED: dict[str, Any] = {**SIZE, "base": 24, "num_inference_steps": 4, "forecast": False}
TEXT = 12


def make(builder: Any = flux, seed: int = 0, **parts: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and the embeddings in the place of its prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe, call = builder()
    pipe.register_modules(**parts)
    pipe.set_progress_bar_config(disable=True)
    sizes = ("height", "width", "num_inference_steps", "output_type")
    return pipe, {name: value for name, value in call.items() if name not in sizes}


def in_large_tiles(pipe: Any) -> None:
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 128, 64


def draw(pipe: Any, call: dict[str, Any], **asked: Any) -> Image.Image:
    return generate_hires(pipe, **{**ASKED, **call, **asked})


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


class Forwards:
    """What a pipeline's transformer is called with, forward by forward."""

    def __init__(self, pipe: Any) -> None:
        self.tokens: list[int] = []
        self.latents: list[Tensor] = []
        self.times: list[float] = []
        self.thetas: list[float] = []
        self.fail_at = -1
        pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(self.tokens) == self.fail_at:
            raise KeyboardInterrupt
        self.tokens.append(kwargs["hidden_states"].shape[1])
        self.latents.append(kwargs["hidden_states"].clone())
        self.times.append(float(kwargs["timestep"][0]))
        self.thetas.append(module.pos_embed.theta)
