"""Train the built-in model from scratch on a CPU, within a time budget, resumable.

    npm pack @iconify-json/fluent-emoji      (MIT; unpack it, the folder is FLUENT)
    python -m dit_accel.pipelines.builtin.train FLUENT OUT --minutes 95

The recipe: latents from the PCA encoder; flow matching with a noise shift that grows with the size; sizes 128 -> 256 -> 512 -> 1024 px,
earlier sizes mixed into later phases; text encoders trained jointly; Muon on the block matrices, AdamW on the rest; then guidance
distillation: the guidance embedding learns to give in one pass what classifier-free guidance gives in two. OUT/state.pt is the training
state (this script alone reads it), OUT/log.jsonl the log, OUT/model the pipeline with averaged weights.
"""

import argparse
import copy
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

from dit_accel.finetune.muon import Muon
from dit_accel.pipelines.builtin.components import make_pipeline
from dit_accel.pipelines.builtin.drawings import Renderings, compose, render

GUIDANCE_FROM = 0.75  # share of the budget after which the guidance embedding is trained
BATCH = {128: 32, 256: 12, 512: 3, 1024: 1}
SHIFT = {128: 1.5, 256: 2.2, 512: 3.2, 1024: 4.5}  # sigma' = s·sigma / (1 + (s - 1)·sigma)
EMA_DECAY = 0.99
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


def draw_batch(rng: random.Random, renderings: Renderings, pipe: FluxPipeline, progress: float) -> Batch:
    """A batch of one size and shape for this point of the schedule."""
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
        latents = pipe.vae.encode(torch.stack([pixels for pixels, _ in pairs])).latents
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


def loss_of(pipe: FluxPipeline, average: FluxPipeline, batch: Batch, progress: float, rng: random.Random) -> Tensor:
    """Flow-matching loss; once guidance is trained, most samples match the averaged model's guided prediction instead."""
    count = len(batch.captions)
    noise = torch.randn_like(batch.tokens)
    shift = SHIFT[batch.size]
    sigma = torch.sigmoid(torch.randn(count))
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    x = (1 - sigma[:, None, None]) * batch.tokens + sigma[:, None, None] * noise
    target, guidance = noise - batch.tokens, torch.ones(count)
    if progress >= GUIDANCE_FROM and rng.random() < 0.65:
        guidance = torch.empty(count).uniform_(1.0, 5.0)
        with torch.no_grad():
            one = torch.ones(count)
            conditional = velocity(average, x, sigma, batch, batch.captions, one)
            free = velocity(average, x, sigma, batch, [""] * count, one)
        target = guided(conditional.float(), free.float(), x, sigma, guidance)
    return F.mse_loss(velocity(pipe, x, sigma, batch, batch.captions, guidance).float(), target)


def guided(conditional: Tensor, free: Tensor, x: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance without its share along the clean prediction, which is what oversaturates.

    Velocities and `x` are `[B, N, C]`, `sigma` and `scale` [B]. Source: Sadat et al. 2024, "Eliminating oversaturation", eq. 8-9 (η = 0).
    """
    clean = (x - sigma[:, None, None] * conditional).flatten(1)
    update = (conditional - free).flatten(1)
    along = (update * clean).sum(1, keepdim=True) / clean.square().sum(1, keepdim=True).clamp_min(1e-8)
    return conditional + (scale[:, None, None] - 1) * (update - along * clean).view_as(conditional)


def trained_modules(pipe: FluxPipeline) -> dict[str, nn.Module]:
    """The modules that learn here; the autoencoder's decoder has a loop of its own."""
    return {"transformer": pipe.transformer, "text_encoder": pipe.text_encoder, "text_encoder_2": pipe.text_encoder_2}


def make_optimizers(pipe: FluxPipeline) -> list[torch.optim.Optimizer]:
    """Muon for the transformer blocks' matrices, AdamW for everything else."""
    named = [(f"{key}.{name}", p) for key, module in trained_modules(pipe).items() for name, p in module.named_parameters()]
    is_matrix = [p.ndim == 2 and "transformer_blocks" in name and "norm" not in name for name, p in named]
    matrices = [p for (_, p), m in zip(named, is_matrix, strict=True) if m]
    others = [p for (_, p), m in zip(named, is_matrix, strict=True) if not m]
    return [
        Muon(matrices, lr=2e-3),
        torch.optim.AdamW(others, lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate(step: int, progress: float) -> float:
    """Learning-rate factor: 100 steps of warm-up, constant to 50 % of the budget, then linear to 3 %."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < 0.5 else 1 - 0.97 * min(1.0, (progress - 0.5) / 0.5))


def update_average(average: FluxPipeline, pipe: FluxPipeline, step: int) -> None:
    """Exponential moving average of the trained weights, with a shorter memory at the start."""
    decay = min(EMA_DECAY, (1 + step) / (10 + step))
    for key, module in trained_modules(average).items():
        with torch.no_grad():
            torch._foreach_lerp_(list(module.parameters()), list(getattr(pipe, key).parameters()), 1 - decay)


def fit_encoder(pipe: FluxPipeline, renderings: Renderings, rng: random.Random) -> None:
    """PCA of 8×8 patches of pictures of all sizes."""
    patches = []
    for size in [128, 256, 512, 1024] * 24:
        pixels, _ = compose(rng, renderings, size, size)
        found = F.pixel_unshuffle(pixels[None], 8).flatten(2)[0].T
        edges = found.std(1) > 0.02  # flat background patches would drown everything else
        patches.append(found[edges][torch.randperm(int(edges.sum()))[:1500]])
    pipe.vae.fit(torch.cat(patches))


def train_decoder(pipe: FluxPipeline, renderings: Renderings, minutes: float, rng: random.Random, log: Path, *, bf16: bool) -> None:
    """Train the decoder's network to invert the fixed encoder on random crops."""
    optimizer = torch.optim.AdamW(pipe.vae.decoder.parameters(), lr=1e-3, betas=(0.9, 0.98))
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
            (decoded,) = pipe.vae.decode(pipe.vae.encode(target).latents, return_dict=False)
        difference = decoded.float() - target
        loss = difference.abs().mean() + 2 * difference.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pipe.vae.decoder.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            psnr = 10 * math.log10(4 / difference.square().mean().item())
            with log.open("a") as file:
                file.write(json.dumps({"decoder_step": step, "loss": round(loss.item(), 4), "psnr": round(psnr, 2)}) + "\n")
        step += 1


def save_pipeline(pipe: FluxPipeline, folder: Path) -> None:
    """Write the pipeline with a bfloat16 transformer: half the size, and read back as float32.

    Everything else stays float32, because transformers reads text encoders in the dtype they were written in.
    """
    half = copy.copy(pipe)
    half.transformer = copy.deepcopy(pipe.transformer).to(torch.bfloat16)
    half.save_pretrained(folder)


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
    state_file, log = args.out / "state.pt", args.out / "log.jsonl"

    rng = random.Random(args.seed)
    renderings = render(args.fluent)
    pipe = FluxPipeline.from_pretrained(args.start, torch_dtype=torch.float32) if args.start else make_pipeline(args.seed)
    optimizers = make_optimizers(pipe)
    step, spent = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        for key, module in trained_modules(pipe).items():
            module.load_state_dict(state["weights"][key])
        pipe.vae.load_state_dict(state["vae"])
        average = copy.deepcopy(pipe)
        for key, module in trained_modules(average).items():
            module.load_state_dict(state["average"][key])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        rng.seed(args.seed + step)
        torch.manual_seed(args.seed + step)
    else:
        if args.start is None:
            fit_encoder(pipe, renderings, rng)
        average = copy.deepcopy(pipe)

    start, saved_at, recent = time.time() - spent, spent, []
    while (progress := (time.time() - start) / (60 * args.minutes)) < 1:
        batch = draw_batch(rng, renderings, pipe, progress)
        for optimizer, base in zip(optimizers, (2e-3, 1e-3), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = base * rate(step, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
            loss = loss_of(pipe, average, batch, progress, rng)
        loss.backward()
        parameters = [p for module in trained_modules(pipe).values() for p in module.parameters()]
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        update_average(average, pipe, step)
        step += 1
        recent.append(loss.item())
        spent = time.time() - start
        if step % 20 == 0:
            row = {"step": step, "minutes": round(spent / 60, 2), "size": batch.size, "loss": round(sum(recent) / len(recent), 4)}
            with log.open("a") as file:
                file.write(json.dumps({**row, "grad_norm": round(norm.item(), 3)}) + "\n")
            recent = []
        if spent - saved_at > 120:
            state = {"weights": {k: m.state_dict() for k, m in trained_modules(pipe).items()}, "vae": pipe.vae.state_dict()}
            state |= {"average": {k: m.state_dict() for k, m in trained_modules(average).items()}, "step": step, "spent": spent}
            torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").replace(state_file)
            save_pipeline(average, args.out / "model")
            saved_at = spent
    train_decoder(average, renderings, args.minutes * 0.04, rng, log, bf16=args.bf16)
    save_pipeline(average, args.out / "model")


if __name__ == "__main__":
    main()
