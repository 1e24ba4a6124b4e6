"""Training of the built-in autoencoder's decoder: the fixed encoder's inverse, sharp where the transformer's latents are not quite right.

Crops of large renderings are encoded, noise of up to NOISE is added to their latents, and the decoder learns to give the crops back:
the absolute difference of pixels, and of their differences across and down, which are edges.
"""

import json
import math
import random
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor

from dit_accel.files import append_text, write_tensors
from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.drawings import Renderings, compose
from dit_accel.pipelines.training import LOG, clock_of

DECODER = "decoder.safetensors"
CROP, COUNT = 128, 8  # pixels of a side, and crops of a batch; a few of each picture
SIZES = (256, 512, 1024)
NOISE = 0.25
RATE = 1e-3


def draw_crops(rng: random.Random, renderings: Renderings, each: int = 4) -> Tensor:
    """`[COUNT, 3, CROP, CROP]` in [-1, 1]."""
    crops: list[Tensor] = []
    while len(crops) < COUNT:
        size = rng.choice(SIZES)
        pixels, _ = compose(rng, renderings, size, size)
        for _ in range(each):
            y, x = (8 * rng.randrange((size - CROP) // 8 + 1) for _ in range(2))
            crops.append(pixels[:, y : y + CROP, x : x + CROP])
    return torch.stack(crops[:COUNT])


def decoder_loss(vae: PatchAutoencoder, target: Tensor, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """The loss of one batch of crops, and their mean squared error."""
    with torch.no_grad():
        latents = vae.encode(target).latents
        level = NOISE * torch.rand(len(latents), 1, 1, 1)
        latents = latents + (level * torch.randn(latents.shape)).to(latents)
    with torch.autocast(target.device.type, torch.bfloat16, enabled=bf16):
        (decoded,) = vae.decode(latents.contiguous(memory_format=torch.channels_last), return_dict=False)
    difference = decoded.float() - target
    loss = difference.abs().mean() + difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    return loss, difference.detach().square().mean()


def train_decoder(vae: PatchAutoencoder, renderings: Renderings, out: Path, minutes: float, seed: int, *, bf16: bool) -> None:
    """Train until the budget is spent, from where `out`/DECODER was written, which is every three minutes."""
    vae.to(memory_format=torch.channels_last)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=RATE, betas=(0.9, 0.98), weight_decay=0.0)
    step, spent = 0, 0.0
    if (out / DECODER).exists():
        step, spent = load_decoder(vae, out / DECODER, optimizer, rng)
    clock = clock_of(vae.device)
    start, saved_at, errors = clock() - spent, spent, []
    while (progress := spent / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * factor_of(step, progress)
        loss, error = decoder_loss(vae, draw_crops(rng, renderings), bf16=bf16)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        step, spent = step + 1, clock() - start
        errors.append(error.item())
        if step % 50 == 0:
            psnr = round(10 * math.log10(4 / (sum(errors) / len(errors))), 2)
            append_text(out / LOG, json.dumps({"decoder_step": step, "minutes": round(spent / 60, 2), "psnr": psnr}) + "\n")
            errors = []
        if spent - saved_at > 180:
            save_decoder(vae, out / DECODER, optimizer, rng, step, spent)
            saved_at = spent
    save_decoder(vae, out / DECODER, optimizer, rng, step, spent)


def factor_of(step: int, progress: float) -> float:
    """Learning-rate factor: 50 steps of warm-up, and linear to 1 % over the budget."""
    return min(1.0, (step + 1) / 50) * (1 - 0.99 * progress)


def save_decoder(vae: PatchAutoencoder, path: Path, optimizer: torch.optim.Optimizer, rng: random.Random, step: int, spent: float) -> None:
    """Write all that the training needs to go on, as safetensors."""
    tensors = {"torch_rng": torch.get_rng_state()} | {f"decoder.{name}": p for name, p in vae.decoder.named_parameters()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
    write_tensors(path, tensors, {"numbers": json.dumps({"step": step, "spent": spent, "rng": rng.getstate()})})


def load_decoder(
    vae: PatchAutoencoder, path: Path, optimizer: torch.optim.Optimizer | None = None, rng: random.Random | None = None
) -> tuple[int, float]:
    """Bring a decoder, and its training where that is given, to where `save_decoder` left it: its step and the seconds spent."""
    with safe_open(path, "pt") as file:
        saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
        numbers = json.loads(file.metadata()["numbers"])
    with torch.no_grad():
        for name, parameter in vae.decoder.named_parameters():
            parameter.copy_(saved[f"decoder.{name}"])
    if optimizer is not None and rng is not None:
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        version, internal, gauss = numbers["rng"]
        rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(saved["torch_rng"])
    return numbers["step"], numbers["spent"]
