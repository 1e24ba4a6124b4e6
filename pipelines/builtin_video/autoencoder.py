"""The built-in video model's autoencoder: the image model's, frame by frame, and a projection of four frames to one by PCA.

Each 8×8 patch of a frame has 8 or 16 coefficients in the image model's encoder. Those of one place in four successive frames are turned
onto their directions of largest variance, all of them or the `z_dim` largest; the first frame of a clip is alone, as if it had been there
four times. The encoder is linear and found without training. Decoding, the transposed projection gives the coefficients back, and the
image model's decoder makes pixels of the frames. Where directions are lost, a small network (`refine_width` channels wide, none where that
is 0) adds what the neighbours in time and space tell of them. `WanPipeline` finds what it reads of a video autoencoder: the factors of time
and space in the configuration, latents that need no further scaling.
"""

from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from torch import Tensor

from dit_accel.pipelines.builtin.autoencoder import PATCH, PatchAutoencoder

GROUP = 4  # frames that become one
CHANNELS = 32


class ResidualBlock(nn.Module):
    """x + conv(silu(conv(silu(x)))), width unchanged, over time and space."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.conv1(F.silu(x))))


class ClipAutoencoder(ModelMixin, ConfigMixin):
    """Pixels are `[B, 3, F, H, W]` in [-1, 1] with F = 4k + 1; latents `[B, z_dim, k + 1, H/8, W/8]`, zero mean, coarse channels first."""

    @register_to_config
    def __init__(
        self,
        z_dim: int = CHANNELS,
        frame_channels: int = 16,
        width: int = 128,
        num_blocks: int = 3,
        refine_width: int = 96,
        latents_mean: tuple[float, ...] = (0.0,) * CHANNELS,
        latents_std: tuple[float, ...] = (1.0,) * CHANNELS,
        scale_factor_temporal: int = GROUP,
        scale_factor_spatial: int = PATCH,
    ) -> None:
        super().__init__()
        values = GROUP * frame_channels
        self.frames = PatchAutoencoder(frame_channels, width, num_blocks)
        self.register_buffer("mean", torch.zeros(values))
        self.register_buffer("basis", torch.zeros(z_dim, values))
        self.register_buffer("deviation", torch.ones(z_dim))
        self.refine: nn.Sequential | None = None
        if refine_width:
            last = nn.Conv3d(refine_width, values, 1)
            self.refine = nn.Sequential(
                nn.Conv3d(z_dim, refine_width, 3, padding=1), ResidualBlock(refine_width), ResidualBlock(refine_width), nn.SiLU(), last
            )

    def fit(self, groups: Tensor) -> None:
        """Set the projection from sample groups `[M, 4·frame_channels]` (frame, coefficient order), by PCA.

        Channels keep their share of the coarsest one's deviation to the power of 0.35, and a mean variance of one over all. With the
        image model's square root, colour would be ten times louder than detail, and the transformer's norms, which divide a token by its
        own size, would tie the noise that it must see to the colour beneath.
        """
        self.mean.copy_(groups.mean(0))
        values, vectors = torch.linalg.eigh(torch.cov((groups - self.mean).T.double()))
        top = values.argsort(descending=True)[: self.config.z_dim]
        self.basis.copy_(vectors[:, top].T)
        deviation = values[top].clamp_min(1e-8).sqrt()
        kept = (deviation / deviation[0]) ** 0.35
        self.deviation.copy_(deviation / kept * kept.square().mean().sqrt())

    def group(self, x: Tensor) -> Tensor:
        """Coefficients `[B, 4·frame_channels, k + 1, H/8, W/8]` of pixels. Raises ValueError unless there are 4k + 1 frames."""
        count = x.shape[2]
        if count % GROUP != 1:
            raise ValueError(f"the number of frames must be {GROUP}k + 1, not {count}")
        x = torch.cat([x[:, :, :1].expand(-1, -1, GROUP - 1, -1, -1), x], 2)
        latents = self.frames.encode(x.transpose(1, 2).flatten(0, 1)).latents  # [B·F, frame_channels, h, w]
        coefficients = latents * self.frames.deviation.view(1, -1, 1, 1)
        return coefficients.reshape(x.shape[0], -1, GROUP * latents.shape[1], *latents.shape[2:]).transpose(1, 2)

    def encode(self, x: Tensor) -> SimpleNamespace:
        """Latents of pixels; `.latents`, and `.latent_dist` with `sample()` and `mode()` (the encoder is deterministic)."""
        centred = self.group(x) - self.mean.view(1, -1, 1, 1, 1)
        latents = torch.einsum("kp,bpthw->bkthw", self.basis, centred) / self.deviation.view(1, -1, 1, 1, 1)
        dist = SimpleNamespace(sample=lambda generator=None: latents, mode=lambda: latents)
        return SimpleNamespace(latents=latents, latent_dist=dist)

    def ungroup(self, z: Tensor) -> Tensor:
        """Coefficients `[B, 4·frame_channels, k + 1, H/8, W/8]` of latents."""
        projected = torch.einsum("kp,bkthw->bpthw", self.basis, z * self.deviation.view(1, -1, 1, 1, 1))
        projected = projected + self.mean.view(1, -1, 1, 1, 1)
        return projected if self.refine is None else projected + self.refine(z)

    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Pixels of latents."""
        groups = self.ungroup(z).transpose(1, 2).unflatten(2, (GROUP, -1))  # [B, k + 1, 4, frame_channels, h, w]
        latents = (groups / self.frames.deviation.view(1, 1, 1, -1, 1, 1)).flatten(1, 2)[:, GROUP - 1 :]
        # one frame at a time: the decoder's widest layer takes 64 times a frame's latents
        frames = [self.frames.decode(frame).sample for frame in latents.unbind(1)]
        pixels = torch.stack(frames, 2)
        return DecoderOutput(sample=pixels) if return_dict else (pixels,)
