"""Train the built-in model from scratch on a CPU, within a time budget, resumable.

    npm pack @iconify-json/fluent-emoji      (MIT; unpack it, the folder is FLUENT)
    python -m dit_accel.pipelines.builtin.train FLUENT OUT --minutes 95

The recipe: latents from the PCA encoder; flow matching with a noise shift that grows with the size; sizes 128 -> 256 -> 512 -> 1024 px,
earlier sizes mixed into later phases; text encoders trained jointly; Muon on the block matrices, AdamW on the rest; then guidance
distillation: the guidance embedding learns to give in one pass what classifier-free guidance gives in two. OUT/state.safetensors is the
training state, OUT/log.jsonl the log, OUT/model the pipeline with averaged weights. A run that was stopped goes on where its state was
written, with the same numbers as if it had not been.
"""

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor

from dit_accel.files import append_text
from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.components import make_pipeline
from dit_accel.pipelines.builtin.drawings import Renderings, compose, render
from dit_accel.pipelines.training import LOG, STATE, Run, load_state, new_run, save, train, update

GUIDANCE_FROM = 0.75  # share of the budget after which the guidance embedding is trained
BATCH = {128: 32, 256: 12, 512: 3, 1024: 1}
SHIFT = {128: 1.5, 256: 2.2, 512: 3.2, 1024: 4.5}  # sigma' = s·sigma / (1 + (s - 1)·sigma)
RATES = (2e-3, 1e-3)  # Muon's and AdamW's learning rates
# (share of the budget at which the phase ends, how often each size is drawn)
PHASES = [
    (0.20, {128: 1.0}),
    (0.55, {256: 0.75, 128: 0.25}),
    (0.82, {512: 0.5, 256: 0.4, 128: 0.1}),
    (1.01, {1024: 0.15, 512: 0.5, 256: 0.35}),
]


@dataclass
class Batch:
    """Latent tokens `[B, h·w, 64]`, their grid, the captions and the padded text length."""

    tokens: Tensor
    grid: tuple[int, int]
    captions: list[str]
    text: int
    size: int


def pack(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` latents as FLUX tokens `[B, H/2·W/2, 4C]`."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def draw_batch(run: Run, renderings: Renderings, progress: float) -> Batch:
    """A batch of one size and shape for this point of the schedule."""
    rng = run.rng
    mix = next(sizes for end, sizes in PHASES if progress < end)
    size = rng.choices(list(mix), list(mix.values()))[0]
    text, count = 16, BATCH[size]
    if size >= 256 and rng.random() < 0.10:  # FluxPipeline pads text to 512 unless told otherwise
        text = rng.choice([32, 64, 128, 512])
        count = max(1, count // 2) if text == 512 else count
    side, ratio = size // 16, rng.choice([1, 1, 1, 1.5, 1 / 1.5])
    height, width = round(side / math.sqrt(ratio)), round(side * math.sqrt(ratio))
    share = 0.2 if size >= 256 else 0.0  # two drawings on 8×8 tokens only confuse what each looks like
    pairs = [compose(rng, renderings, height * 16, width * 16, pairs=share) for _ in range(count)]
    with torch.no_grad():
        latents = run.pipe.vae.encode(torch.stack([pixels for pixels, _ in pairs])).latents
    captions = ["" if rng.random() < 0.1 else caption for _, caption in pairs]
    return Batch(pack(latents), (height, width), captions, text, size)


def embed(pipe: FluxPipeline, captions: list[str], text: int) -> tuple[Tensor, Tensor]:
    """Sequence and pooled text embeddings, as FluxPipeline computes them, with gradient."""
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    pooled = pipe.text_encoder(pipe.tokenizer(captions, max_length=32, **pad).input_ids).pooler_output
    sequence = pipe.text_encoder_2(pipe.tokenizer_2(captions, max_length=text, **pad).input_ids)[0]
    return sequence, pooled


def velocity(pipe: FluxPipeline, x: Tensor, sigma: Tensor, batch: Batch, captions: list[str], guidance: Tensor) -> Tensor:
    """The transformer's prediction for noisy tokens `x` at noise levels `sigma` [B]."""
    height, width = batch.grid
    sequence, pooled = embed(pipe, captions, batch.text)
    ids = FluxPipeline._prepare_latent_image_ids(1, height, width, x.device, torch.float32)
    return pipe.transformer(
        hidden_states=x, timestep=sigma, guidance=guidance, encoder_hidden_states=sequence, pooled_projections=pooled,
        img_ids=ids, txt_ids=torch.zeros(batch.text, 3), return_dict=False,
    )[0]  # fmt: skip


def loss_of(run: Run, batch: Batch, progress: float) -> Tensor:
    """Flow-matching loss; once guidance is trained, most samples match the averaged model's guided prediction instead."""
    count = len(batch.captions)
    noise = torch.randn_like(batch.tokens)
    shift = SHIFT[batch.size]
    sigma = torch.sigmoid(torch.randn(count))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    x = (1 - sigma[:, None, None]) * batch.tokens + sigma[:, None, None] * noise
    target, guidance = noise - batch.tokens, torch.ones(count)
    if progress >= GUIDANCE_FROM and run.rng.random() < 0.65:
        guidance = torch.empty(count).uniform_(1.0, 5.0)
        with torch.no_grad():
            one = torch.ones(count)
            conditional = velocity(run.average, x, sigma, batch, batch.captions, one)
            free = velocity(run.average, x, sigma, batch, [""] * count, one)
        target = guided(conditional.float(), free.float(), x, sigma, guidance)
    return F.mse_loss(velocity(run.pipe, x, sigma, batch, batch.captions, guidance).float(), target)


def guided(conditional: Tensor, free: Tensor, x: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance without its share along the clean prediction, which is what oversaturates.

    Velocities and `x` are `[B, N, C]`, `sigma` and `scale` [B]. Source: Sadat et al. 2024, "Eliminating oversaturation", eq. 8-9 (η = 0).
    """
    clean = (x - sigma[:, None, None] * conditional).flatten(1)
    pull = (conditional - free).flatten(1)
    along = (pull * clean).sum(1, keepdim=True) / clean.square().sum(1, keepdim=True).clamp_min(1e-8)
    return conditional + (scale[:, None, None] - 1) * (pull - along * clean).view_as(conditional)


def begin(renderings: Renderings, seed: int, start: Path | None = None) -> Run:
    """The run before its first step. `start`: a folder of saved weights to train further; unless given, random ones."""
    rng = random.Random(seed)
    if start is not None:
        return new_run(FluxPipeline.from_pretrained(start, torch_dtype=torch.float32), rng, RATES)
    pipe = make_pipeline(seed)
    fit_encoder(pipe, renderings, rng)
    return new_run(pipe, rng, RATES)


def fit_encoder(pipe: FluxPipeline, renderings: Renderings, rng: random.Random) -> None:
    """PCA of 8×8 patches of pictures of all sizes."""
    patches = []
    for size in [128, 256, 512, 1024] * 24:
        pixels, _ = compose(rng, renderings, size, size)
        found = F.pixel_unshuffle(pixels[None], 8).flatten(2)[0].T
        edges = found.std(1) > 0.02  # flat background patches would drown everything else
        patches.append(found[edges][torch.randperm(int(edges.sum()))[:1500]])
    pipe.vae.fit(torch.cat(patches))


def train_decoder(vae: PatchAutoencoder, renderings: Renderings, minutes: float, rng: random.Random, log: Path, *, bf16: bool) -> None:
    """Train the decoder's network to invert the fixed encoder on random crops."""
    optimizer = torch.optim.AdamW(vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.98))
    start, step = time.time(), 0
    while (progress := (time.time() - start) / (60 * minutes)) < 1:
        crops = []
        for _ in range(6):
            size = rng.choice([128, 256, 512, 1024])
            pixels, _ = compose(rng, renderings, size, size)
            y, x = (rng.randrange(0, size - 127, 8) for _ in range(2))
            crops.append(pixels[:, y : y + 128, x : x + 128])
        target = torch.stack(crops)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            (decoded,) = vae.decode(vae.encode(target).latents, return_dict=False)
        difference = decoded.float() - target
        loss = difference.abs().mean() + 2 * difference.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / difference.square().mean().item())
            append_text(log, json.dumps({"decoder_step": step, "loss": round(loss.item(), 4), "psnr": round(psnr, 2)}) + "\n")
        step += 1


def train_step(run: Run, renderings: Renderings, progress: float, *, bf16: bool) -> tuple[str, float, float]:
    """One batch, one update; `progress` is the share of the budget that is spent. Gives the batch's size, loss, gradient norm."""
    batch = draw_batch(run, renderings, progress)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(run, batch, progress)
    return str(batch.size), *update(run, loss, progress, bf16=bf16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fluent", type=Path, help="folder of the unpacked @iconify-json/fluent-emoji package")
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=95.0, help="time for the transformer; the decoder takes 4 % more")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast, for CPUs that multiply it (AVX-512 BF16, AMX)")
    parser.add_argument(
        "--start", type=Path, help="a folder of saved weights to train further, by the same schedule; unless given, random ones"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    renderings = render(args.fluent)
    run = begin(renderings, args.seed, args.start)
    if (args.out / STATE).exists():
        load_state(run, args.out / STATE)
    train(run, lambda progress: train_step(run, renderings, progress, bf16=args.bf16), args.out, args.minutes)
    train_decoder(run.pipe.vae, renderings, args.minutes * 0.04, run.rng, args.out / LOG, bf16=args.bf16)
    run.average.vae.load_state_dict(run.pipe.vae.state_dict())
    save(run, args.out)


if __name__ == "__main__":
    main()
