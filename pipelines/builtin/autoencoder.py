"""The built-in model's autoencoder: a linear encoder found by PCA, and a decoder that refines its exact inverse.

The encoder projects each 8×8 patch of pixels onto the 16 directions of largest variance and scales them, the coarsest to unit
variance, so latents need no training. The decoder adds a small sub-pixel network to the transposed projection; its last layer starts
at zero, so an untrained decoder is plain PCA. It is cheap at 4096 pixels and has the surface that `FluxPipeline` expects of a VAE.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

PATCH = 8


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), width unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class PatchAutoencoder(ModelMixin, ConfigMixin):
    """8×8-patch PCA encoder and residual sub-pixel decoder.

    Pixels are `[B, 3, H, W]` in [-1, 1], latents `[B, latent_channels, H/8, W/8]` with zero mean, coarse channels first.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 16,
        width: int = 128,
        num_blocks: int = 3,
        block_out_channels: tuple[int, ...] = (32, 64, 128, 128),  # four entries: FluxPipeline reads the factor of 8 from them
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
    ) -> None:
        super().__init__()
        values = 3 * PATCH * PATCH
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(latent_channels, values))
        self.register_buffer("deviation", torch.ones(latent_channels))
        last = nn.Conv2d(width // 4, 3 * 4, 3, padding=1)
        nn.init.zeros_(last.weight)
        last.bias = nn.Parameter(torch.zeros(3 * 4))
        self.decoder = nn.Sequential(
            nn.Conv2d(latent_channels, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(num_blocks)),
            nn.Conv2d(width, width * 2, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width // 2),
            nn.Conv2d(width // 2, width, 1),
            nn.PixelShuffle(2),
            ResidualBlock(width // 4),
            last,
            nn.PixelShuffle(2),
        )

    def fit(self, patches: Tensor) -> None:
        """Set the projection from sample patches `[M, 192]` (channel, row, column order), by PCA.

        The coarsest channel gets unit variance, the others the square root of their share of its deviation: whitened, fine channels
        would take most of a diffusion loss, and noise would drown coarse and fine detail at the same level.
        """
        self.mean.copy_(patches.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((patches - self.mean).T.double()))
        top = values.argsort(descending=True)[: self.config.latent_channels]
        self.basis.copy_(vectors[:, top].T)
        deviation = values[top].clamp_min(1e-8).sqrt()
        self.deviation.copy_((deviation * deviation[0]).sqrt())

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Latents of pixels; `.latents`, and `.latent_dist` with `sample()` and `mode()` (the encoder is deterministic)."""
        patches = F.pixel_unshuffle(x, PATCH)
        latents = torch.einsum("kp,bphw->bkhw", self.basis, patches - self.mean.view(1, -1, 1, 1))
        latents = latents / self.deviation.view(1, -1, 1, 1)
        dist = SimpleNamespace(sample=lambda generator=None: latents, mode=lambda: latents)
        return SimpleNamespace(latents=latents, latent_dist=dist)

    def decode(self, z: Tensor, return_dict: bool = True, generator: torch.Generator | None = None) -> DecoderOutput | tuple[Tensor]:
        """Pixels of latents. `generator` is part of the interface of diffusers' autoencoders; nothing here is random."""
        patches = torch.einsum("kp,bkhw->bphw", self.basis, z * self.deviation.view(1, -1, 1, 1))
        pixels = F.pixel_shuffle(patches + self.mean.view(1, -1, 1, 1), PATCH) + self.decoder(z)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
