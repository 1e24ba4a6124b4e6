"""How close pictures are to others, and writing them."""

import io
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dit_accel.files import write_bytes

DISTANCE_SIDE = 176  # multi-scale SSIM halves a picture four times and still requires 11 pixels


def compare(pictures: Tensor, originals: Tensor) -> dict[str, float]:
    """How close pictures `[P, 3, H, W]` in [0, 1] are to others of the same shape, each the mean over pictures.

    `psnr` (dB, infinite between equal pictures); `ssim`; `distance`, 1 − multi-scale SSIM as a perceptual distance, left out where a side
    is below `DISTANCE_SIDE` pixels; `difference`, the root mean square of the difference.
    """
    from torchmetrics.functional import image  # which imports matplotlib; here, because `plan` imports this module

    pairs = pictures.float(), originals.float()
    psnr = image.peak_signal_noise_ratio(*pairs, data_range=1.0, dim=(1, 2, 3))
    similarity = image.structural_similarity_index_measure(*pairs, data_range=1.0)
    found = {"psnr": float(psnr), "ssim": float(torch.as_tensor(similarity))}
    if min(pictures.shape[-2:]) >= DISTANCE_SIDE:
        scales = image.multiscale_structural_similarity_index_measure(*pairs, data_range=1.0)
        found["distance"] = 1 - float(torch.as_tensor(scales))
    return found | {"difference": float((pairs[0] - pairs[1]).square().mean((1, 2, 3)).sqrt().mean())}


def save_picture(picture: Tensor, path: Path) -> None:
    """Write `[3, H, W]` in [0, 1] as PNG."""
    data = io.BytesIO()
    values = (picture.float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(values).save(data, "PNG")
    write_bytes(path, data.getvalue())
