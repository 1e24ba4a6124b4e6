"""Train the built-in video model within a time budget, resumable, on a CPU or a CUDA device.

    python -m dit_accel.pipelines.builtin_video.train DATA OUT --minutes 95 --bf16 --compile      (DATA as for the image model)

The recipe is the image model's where it can be: latents by PCA, flow matching with a noise shift that grows with the number of tokens,
Muon on the block matrices, AdamW on the rest, captions dropped for guidance. Single frames teach what things look like at a fifth of a
clip's price, clips of 17 frames at 128 pixels how they move; 256 pixels and a few clips of 512 and 768 come last. The text encoder
starts from the image model's and learns on. OUT/state is the training state, OUT/log.jsonl the log, OUT/model the pipeline with averaged
weights. A run that was stopped goes on where its state was written, with the same numbers as if it had not been.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.files import append_text
from dit_accel.pipelines.builtin.drawings import Renderings, render
from dit_accel.pipelines.builtin_video import TEXT_TOKENS
from dit_accel.pipelines.builtin_video.autoencoder import ClipAutoencoder
from dit_accel.pipelines.builtin_video.components import make_pipeline
from dit_accel.pipelines.builtin_video.motion import film
from dit_accel.pipelines.training import LOG, STATE, Run, clock_of, load_state, new_run, save_pipeline, train, update

Kind = tuple[int, int]  # frames, pixels of a side
BATCH: dict[Kind, int] = {
    (1, 128): 24, (1, 256): 8, (1, 512): 2, (1, 768): 1, (17, 128): 8, (17, 256): 2, (17, 512): 1, (17, 768): 1,
}  # fmt: skip
# sigma' = s·sigma / (1 + (s - 1)·sigma) of a uniform sigma
SHIFT: dict[Kind, float] = {
    (1, 128): 1.2, (1, 256): 1.8, (1, 512): 2.5, (1, 768): 3.0, (17, 128): 1.8, (17, 256): 2.5, (17, 512): 3.5, (17, 768): 4.2,
}  # fmt: skip
# (share of the budget at which the phase ends, how often each kind is drawn)
PHASES: list[tuple[float, dict[Kind, float]]] = [
    (0.12, {(1, 128): 0.4, (1, 256): 0.2, (17, 128): 0.4}),
    (0.60, {(17, 128): 0.72, (17, 256): 0.13, (1, 256): 0.15}),
    (0.80, {(17, 128): 0.38, (17, 256): 0.45, (1, 512): 0.09, (17, 512): 0.08}),
    (1.01, {(17, 128): 0.15, (17, 256): 0.48, (1, 512): 0.06, (1, 768): 0.03, (17, 512): 0.25, (17, 768): 0.03}),
]
RATES = (1.6e-3, 8e-4)  # Muon's and AdamW's learning rates
SIZES = (128, 256, 512)


@dataclass
class Batch:
    """Latents `[B, C, T, h, w]` of one kind, their captions and the padded text length."""

    latents: Tensor
    captions: list[str]
    text: int
    kind: Kind


def begin(renderings: Renderings, seed: int) -> Run:
    """The run before its first step."""
    rng = random.Random(seed)
    pipe = make_pipeline(seed)
    fit_encoder(pipe, renderings, rng)
    return new_run(pipe, rng, RATES, renderings.device)


def fit_encoder(pipe: WanPipeline, renderings: Renderings, rng: random.Random, count: int = 48) -> None:
    """PCA over time of clips of two sizes; patches without an edge would drown everything else."""
    found = []
    for size in [128, 256] * (count // 2):
        pixels, _ = film(rng, renderings, 17, size, size)
        with torch.no_grad():
            groups = pipe.vae.group(pixels[None].cpu())[0].flatten(1).T
        detail = groups.view(len(groups), 4, -1)[:, :, 3:].abs().amax((1, 2))  # the first three coefficients are about the colour
        groups = groups[detail > 0.05]
        found.append(groups[torch.randperm(len(groups))[:1500]])
    pipe.vae.fit(torch.cat(found))


def train_decoder(vae: ClipAutoencoder, renderings: Renderings, minutes: float, rng: random.Random, log: Path) -> None:
    """Train the autoencoder's refining network to give the coefficients that the projection lost, on clips of all motions."""
    vae.refine.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.refine.parameters(), lr=1e-3, betas=(0.9, 0.98))
    clock = clock_of(vae.device)
    start, step = clock(), 0
    while (progress := (clock() - start) / (60 * minutes)) < 1:
        size, count = rng.choice([(128, 4), (256, 1)])
        with torch.no_grad():
            pixels = torch.stack([film(rng, renderings, 17, size, size)[0] for _ in range(count)])
            target, latents = vae.group(pixels), vae.encode(pixels).latents
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 50) * (1 - progress)
        loss = F.mse_loss(vae.ungroup(latents), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.refine.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            append_text(log, json.dumps({"decoder_step": step, "size": size, "coefficient_error": round(loss.item(), 6)}) + "\n")
        step += 1
    vae.refine.requires_grad_(False)


def draw_batch(run: Run, renderings: Renderings, progress: float) -> Batch:
    """A batch of one kind and shape for this point of the schedule."""
    rng = run.rng
    mix = next(kinds for end, kinds in PHASES if progress < end)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    frames, size = kind
    text, count = TEXT_TOKENS, BATCH[kind]
    if rng.random() < 0.10:  # WanPipeline pads text to 512 with zeros unless told otherwise
        text = rng.choice([16, 32, 64, 128, 512])
    side, ratio = size // 16, rng.choice([1, 1, 1, 1, 4 / 3, 3 / 4])
    height, width = round(side / ratio**0.5) * 16, round(side * ratio**0.5) * 16
    share = 0.15 if frames > 1 or size > 128 else 0.0
    clips = [film(rng, renderings, frames, height, width, pairs=share) for _ in range(count)]
    with torch.no_grad():
        latents = torch.cat([run.pipe.vae.encode(pixels[None]).latents for pixels, _ in clips])
    return Batch(latents, ["" if rng.random() < 0.1 else caption for _, caption in clips], text, kind)


def loss_of(pipe: WanPipeline, batch: Batch) -> Tensor:
    """Flow-matching loss at one noise level per clip."""
    # random numbers are the CPU's, so that its state is all that a resumed run needs
    noise = torch.randn(batch.latents.shape).to(batch.latents)
    shift = SHIFT[batch.kind]
    # uniform: a logit-normal hardly ever shows noise below a tenth, where the last steps clean up
    sigma = torch.rand(len(batch.captions)).to(batch.latents)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    share = sigma[:, None, None, None, None]
    text, _ = pipe.encode_prompt(batch.captions, do_classifier_free_guidance=False, max_sequence_length=batch.text)
    velocity = pipe.transformer((1 - share) * batch.latents + share * noise, sigma * 1000, text, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - batch.latents)


def train_step(run: Run, renderings: Renderings, progress: float, *, bf16: bool) -> tuple[str, float, float]:
    """One batch, one update; `progress` is the share of the budget that is spent. Gives the batch's kind, loss, gradient norm."""
    batch = draw_batch(run, renderings, progress)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        loss = loss_of(run.pipe, batch)
    return "x".join(map(str, batch.kind)), *update(run, loss, progress, bf16=bf16)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the drawings that the image model's training prepared, or FLUENT")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--minutes", type=float, default=90.0, help="time for the transformer, the decoder takes 7 %% more; of a CPU its work"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast: always with CUDA, else for AVX-512 BF16 or AMX")
    parser.add_argument("--compile", action="store_true", help="torch.compile the blocks, where there is a C++ compiler")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    args.out.mkdir(parents=True, exist_ok=True)
    renderings = render(args.data, SIZES, args.device)
    run = begin(renderings, args.seed)
    if (args.out / STATE).exists():
        load_state(run, args.out / STATE)
    if args.compile:
        for block in run.pipe.transformer.blocks:
            block.compile(dynamic=True)
    bf16 = args.bf16 or run.device.type == "cuda"
    train(run, lambda progress: train_step(run, renderings, progress, bf16=bf16), args.out, args.minutes)
    train_decoder(run.pipe.vae, renderings, args.minutes * 0.07, run.rng, args.out / LOG)
    run.average.vae.load_state_dict(run.pipe.vae.state_dict())
    save_pipeline(run.average, args.out / "model")


if __name__ == "__main__":
    main()
