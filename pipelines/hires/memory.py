"""The memory that a stage of a high-resolution picture requires at once, from shapes alone."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.pipelines.hires import latents as forms

# Tensors of tokens × width that live together in a block: its input and residual, q, k, v, the output, and the MLP's hidden layer
# (four widths) before and after its activation. Nothing here knows a family's true count.
LIVE = 14


def memory_bytes(pipe: Any, transformer: Any, width: int, tokens: int, size: tuple[int, int], tile: int | None) -> dict[str, int]:
    """Peak bytes of the parts of a stage: weights, one denoising step, the autoencoder both ways.

    `width`: channels of a token; `tokens`: of the whole batch; `tile`: the side in pixels of the autoencoder's tiles, None without.
    """
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    weights = sum(t.numel() * t.element_size() for m in modules for t in (*m.parameters(), *m.buffers()))
    shown = size if tile is None else (min(size[0], tile), min(size[1], tile))
    # a tiled picture is assembled in addition to the tile at work, as float32
    whole = 0 if shown == size else 2 * 3 * size[0] * size[1] * 4
    return {
        "weights": weights,
        "denoising": LIVE * tokens * width * transformer.dtype.itemsize,
        "autoencoder": autoencoder_bytes(pipe, shown) + whole,
    }


def autoencoder_bytes(pipe: Any, size: tuple[int, int]) -> int:
    """Peak bytes of tensors while a picture of this size is decoded or encoded, whichever is more, without scratch memory of kernels."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:  # made anew: the hooks of an offloaded one would move its own weights here, where they lose their values
        vae = type(pipe.vae).from_config(pipe.vae.config)

    def decode() -> None:
        vae.decode(torch.empty(forms.latent_shape(pipe, size), dtype=vae.dtype), return_dict=False)

    def encode() -> None:
        vae.encode(torch.empty(1, 3, *size, dtype=vae.dtype)).latent_dist.mode()

    return max(peak_bytes(decode, fake), peak_bytes(encode, fake)) * pipe.vae.dtype.itemsize // vae.dtype.itemsize


def peak_bytes(run: Callable[[], None], fake: FakeTensorMode) -> int:
    """Most bytes that the tensors made by `run` hold together. It runs on tensors without memory: nothing is computed."""
    with torch.no_grad(), fake, _Peak() as count:
        run()
    return count.peak


class _Peak(TorchDispatchMode):
    """Follows the storages that operators return, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known | given:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
