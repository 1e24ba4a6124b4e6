"""What the high-resolution recipe uses of a pipeline: the form of its latents, encoding and decoding, the start of its schedule."""

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from dit_accel.errors import UnsupportedModelError
from dit_accel.patch.anatomy import find_transformers

PACK = ["latents", "batch_size", "num_channels_latents", "height", "width"]
UNPACK = ["latents", "height", "width", "vae_scale_factor"]


def check_pipeline(pipe: Any) -> Any:
    """The transformer of a pipeline that can start from noised latents. Raises UnsupportedModelError that says what is missing."""
    found = find_transformers(pipe)
    name = type(pipe).__name__
    names = list(inspect.signature(type(pipe).__call__).parameters)
    vae, scheduler = getattr(pipe, "vae", None), getattr(pipe, "scheduler", None)
    latent_channels = getattr(getattr(vae, "config", None), "latent_channels", None)
    factor = getattr(getattr(vae, "config", None), "scaling_factor", None)
    reasons = {
        "one transformer": len(found) == 1 and found[0] is not pipe,
        "a call that takes latents, sigmas, height and width": {"latents", "sigmas", "height", "width", "output_type"} <= set(names),
        "pictures, not videos": "num_frames" not in names,
        "a FlowMatchEulerDiscreteScheduler whose noise levels fall": isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        and not scheduler.config.invert_sigmas,
        "an autoencoder with encode, latent_channels and scaling_factor": hasattr(vae, "encode") and bool(latent_channels and factor),
        "latents of [B, C, H, W], or packed as FLUX packs them": _packing(pipe) is not None,
        "an image_processor": hasattr(pipe, "image_processor"),
    }
    missing = [reason for reason, there in reasons.items() if not there]
    if missing:
        raise UnsupportedModelError(f"high resolution requires a pipeline with {'; '.join(missing)}, which {name} does not have")
    return found[0]


def _packing(pipe: Any) -> bool | None:
    """Whether latents are packed 2×2 into tokens by the pipeline; None where it does that in a way of its own."""
    pack, unpack = (getattr(type(pipe), name, None) for name in ("_pack_latents", "_unpack_latents"))
    if pack is None and unpack is None:
        return False
    if pack is None or unpack is None:
        return None
    known = list(inspect.signature(pack).parameters) == PACK and list(inspect.signature(unpack).parameters) == UNPACK
    return True if known else None


def latent_shape(pipe: Any, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """`[1, C, H, W]` of a picture's latents, unpacked."""
    return (1, pipe.vae.config.latent_channels, *(side // pipe.vae_scale_factor for side in size))


def decode(pipe: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
    """The picture `[1, 3, H, W]` in [-1, 1] of a pipeline's final latents, in the autoencoder's dtype."""
    latents = latents.to(pipe._execution_device)  # first: stages read from disk must meet the same arithmetic
    if _packing(pipe):
        latents = pipe._unpack_latents(latents, *size, pipe.vae_scale_factor)
    config = pipe.vae.config
    with torch.no_grad():
        scaled = latents / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        decoded: Tensor = pipe.vae.decode(scaled.to(pipe.vae.dtype), return_dict=False)[0]
    return decoded


def encode(pipe: Any, picture: Tensor) -> Tensor:
    """Latents `[1, C, H, W]` of a picture: the mode of the autoencoder's distribution, float32."""
    config = pipe.vae.config
    with torch.no_grad():
        latents: Tensor = pipe.vae.encode(picture.to(pipe._execution_device, pipe.vae.dtype)).latent_dist.mode().float()
    return (latents - (getattr(config, "shift_factor", None) or 0.0)) * config.scaling_factor


def enlarged(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """A picture in pixels, resized by bicubic interpolation."""
    return F.interpolate(picture.float(), size, mode="bicubic", antialias=True).clamp(-1, 1)


def noised(pipe: Any, latents: Tensor, sigma: float, seed: int) -> Tensor:
    """x = (1 - sigma) x0 + sigma noise, in the form that the pipeline takes; the noise is drawn on the CPU, for any device alike."""
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents.device)
    return packed(pipe, (1 - sigma) * latents + sigma * noise)


def packed(pipe: Any, latents: Tensor) -> Tensor:
    """Latents `[1, C, H, W]` in the form that the pipeline takes."""
    return pipe._pack_latents(latents, *latents.shape) if _packing(pipe) else latents


def partial_sigmas(steps: int, strength: float) -> list[float]:
    """The end of an even schedule of so many steps: the share `strength` of them, at least one. Before the scheduler's shift."""
    done = steps - max(1, int(min(steps * strength, steps)))
    return np.linspace(1.0, 1 / steps, steps)[done:].tolist()


def scheduler_for(scheduler: Any, tokens: int) -> Any:
    """The scheduler itself, or one with its largest shift where a sequence of image tokens is longer than its shift was fitted for.

    The shift that depends on size is a line through two lengths, within an exponential: at 4096² it would be exp(11.5), with every step
    at pure noise. CLEAR's release leaves that line as well, for FLUX.1's own constant shift of 3; exp(max_shift) is 3.16 there.
    """
    config = scheduler.config
    if not config.use_dynamic_shifting or tokens <= config.max_image_seq_len:
        return scheduler
    shift = math.exp(config.max_shift) if config.time_shift_type == "exponential" else config.max_shift
    return type(scheduler).from_config(config, use_dynamic_shifting=False, shift=shift)


class _FirstForward(Exception):  # noqa: N818
    """Raised to leave a pipeline before its first forward."""


def first_forward(pipe: Any, transformer: Any, call: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the pipeline's first forward; nothing is computed but the text, and the scheduler is left ready to run."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _FirstForward

    # before all others: the hooks of an accelerated transformer must not count this as a step
    hook = transformer.register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        with _quiet(pipe), torch.no_grad(), contextlib.suppress(_FirstForward):
            pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    finally:
        hook.remove()
        pipe.maybe_free_model_hooks()
    return found[0]


@contextlib.contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Without a progress bar that would stop at 0 %."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe._progress_bar_config = before or {}
