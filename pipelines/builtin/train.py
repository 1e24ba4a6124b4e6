"""Train the built-in model from scratch within a time budget, resumable, on a CPU or a CUDA device. TRAINING.md has the commands.

    npm pack @iconify-json/fluent-emoji      (MIT; unpack it, the folder is FLUENT)
    python -m dit_accel.pipelines.builtin.train prepare FLUENT DATA
    python -m dit_accel.pipelines.builtin.train run DATA OUT --minutes 600 --bf16
    python -m dit_accel.pipelines.builtin.train decoder DATA OUT --minutes 60 --bf16
    python -m dit_accel.pipelines.builtin.train export OUT MODEL

The recipe: latents from the PCA encoder; flow matching with a noise shift that grows with the size; sizes 128 -> 256 -> 512 -> 1024 px,
earlier sizes mixed into later phases, and windows of large pictures, which teach edges at a fraction of the price; text encoders trained
jointly; Muon on the block matrices, AdamW on the rest; then guidance distillation: the guidance embedding learns to give in one pass what
classifier-free guidance gives in two. OUT/state is the training state, OUT/log.jsonl the log, MODEL the pipeline with averaged weights. A
run that was stopped goes on where its state was written, with the same numbers as if it had not been.
"""

import argparse
import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from torch import Tensor

from dit_accel.pipelines.builtin.components import make_pipeline
from dit_accel.pipelines.builtin.decoder import DECODER, load_decoder, train_decoder
from dit_accel.pipelines.builtin.drawings import SIZES, Renderings, compose, prepare, render
from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA
from dit_accel.pipelines.training import (
    STATE,
    Run,
    Step,
    add_run_arguments,
    load_state,
    load_weights,
    new_run,
    read_state,
    save_pipeline,
    train,
    update,
)  # fmt: skip

Kind = tuple[int, int]  # pixels of a picture's longer side, and of the window of it that is trained on
GUIDANCE_FROM = 0.85  # share of the budget after which the guidance embedding is trained, unless a command says so
BATCH: dict[Kind, int] = {(128, 128): 48, (256, 256): 14, (512, 512): 4, (1024, 512): 4, (1024, 1024): 1}
SHIFT = {128: 1.5, 256: 2.2, 512: 3.2, 1024: 4.5}  # sigma' = s·sigma / (1 + (s - 1)·sigma)
FITTED_ON = (128, 256, 512, 1024) * 24  # sides of the pictures that the projection is fitted to
RATES = (2e-3, 1e-3)  # Muon's and AdamW's learning rates
# (share of the budget at which the phase ends, how often each kind is drawn)
PHASES: list[tuple[float, dict[Kind, float]]] = [
    (0.04, {(128, 128): 0.6, (256, 256): 0.4}),
    (0.28, {(128, 128): 0.12, (256, 256): 0.53, (512, 512): 0.3, (1024, 512): 0.05}),
    (0.60, {(128, 128): 0.05, (256, 256): 0.28, (512, 512): 0.35, (1024, 512): 0.22, (1024, 1024): 0.1}),
    (1.01, {(256, 256): 0.15, (512, 512): 0.33, (1024, 512): 0.3, (1024, 1024): 0.22}),
]


@dataclass
class Batch:
    """Latent tokens `[B, h·w, 4C]`, their position ids `[h·w, 3]`, the captions, the padded text length and the kind."""

    tokens: Tensor
    ids: Tensor
    captions: list[str]
    text: int
    kind: Kind


def pack(latents: Tensor) -> Tensor:
    """`[B, C, H, W]` latents as FLUX tokens `[B, H/2·W/2, 4C]`."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def draw_batch(run: Run, renderings: Renderings, progress: float, factor: float = 1.0) -> Batch:
    """A batch of one kind and shape for this point of the schedule, `factor` times as many pictures as BATCH says."""
    rng = run.rng
    mix = next(kinds for end, kinds in PHASES if progress < end)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    size, window = kind
    text, count = 16, max(1, round(BATCH[kind] * factor))
    if size >= 256 and rng.random() < 0.10:  # FluxPipeline pads text to 512 unless it is given another length
        text = rng.choice([32, 64, 128, 512])
        count = max(1, count // 2) if text == 512 else count
    side, ratio = size // 16, rng.choice([1] * 8 + [1.5, 1 / 1.5]) if window == size else 1
    height, width = round(side / math.sqrt(ratio)), round(side * math.sqrt(ratio))
    share = 0.25 if size >= 256 else 0.0  # two drawings on 8×8 tokens only confuse what each looks like
    pairs = [compose(rng, renderings, height * 16, width * 16, pairs=share) for _ in range(count)]
    pixels, ids = torch.stack([pixels for pixels, _ in pairs]), raster(height, width)
    if window < size:
        cut = window // 16
        top, left = rng.randrange(height - cut + 1), rng.randrange(width - cut + 1)
        ids = raster(cut, cut) + torch.tensor([height, top, left])
        pixels = pixels[:, :, top * 16 : top * 16 + window, left * 16 : left * 16 + window]
    with torch.no_grad():
        latents = run.pipe.vae.encode(pixels).latents
    captions = ["" if rng.random() < 0.1 else caption for _, caption in pairs]
    return Batch(pack(latents), ids.to(latents), captions, text, kind)


def raster(height: int, width: int) -> Tensor:
    """FLUX's position ids `[height·width, 3]`."""
    return FluxPipeline._prepare_latent_image_ids(1, height, width, torch.device("cpu"), torch.float32)


def embed(pipe: FluxPipeline, captions: list[str], text: int) -> tuple[Tensor, Tensor]:
    """Sequence and pooled text embeddings, as FluxPipeline computes them, with gradient."""
    pad = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    device = pipe.transformer.device
    pooled = pipe.text_encoder(pipe.tokenizer(captions, max_length=32, **pad).input_ids.to(device)).pooler_output
    sequence = pipe.text_encoder_2(pipe.tokenizer_2(captions, max_length=text, **pad).input_ids.to(device))[0]
    return sequence, pooled


def clean(pipe: FluxPipeline, x: Tensor, sigma: Tensor, batch: Batch, captions: list[str], guidance: Tensor) -> Tensor:
    """The transformer's prediction of the clean tokens, from noisy ones `x` at noise levels `sigma` [B]; float32."""
    sequence, pooled = embed(pipe, captions, batch.text)
    velocity = pipe.transformer(
        hidden_states=x, timestep=sigma, guidance=guidance, encoder_hidden_states=sequence, pooled_projections=pooled,
        img_ids=batch.ids, txt_ids=torch.zeros(batch.text, 3, device=x.device), return_dict=False,
    )[0]  # fmt: skip
    return x - sigma.clamp_min(LEAST_SIGMA)[:, None, None] * velocity.float()


def loss_of(run: Run, batch: Batch, progress: float, guidance_from: float = GUIDANCE_FROM) -> Tensor:
    """Flow-matching loss, of the velocity; once guidance is trained, some samples match the averaged model's guided prediction instead.

    Before that the guidance embedding sees all scales with the same target, and learns to say nothing.
    """
    count, device = len(batch.captions), batch.tokens.device
    # random numbers are the CPU's, so that its state is all that a resumed run needs
    noise = torch.randn(batch.tokens.shape).to(device)
    shift = SHIFT[batch.kind[0]]
    sigma = torch.sigmoid(torch.randn(count)).to(device)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    x = (1 - sigma[:, None, None]) * batch.tokens + sigma[:, None, None] * noise
    target, guidance = batch.tokens, torch.empty(count).uniform_(1.0, 5.0).to(device)
    if progress >= guidance_from:
        if run.rng.random() < 0.5:
            with torch.no_grad():
                one = torch.ones_like(guidance)
                conditional = clean(run.average, x, sigma, batch, batch.captions, one)
                free = clean(run.average, x, sigma, batch, [""] * count, one)
            target = guided(conditional, free, guidance)
        else:
            guidance = torch.ones_like(guidance)
    error = clean(run.pipe, x, sigma, batch, batch.captions, guidance) - target
    return (error / sigma.clamp_min(LEAST_SIGMA)[:, None, None]).square().mean()


def guided(conditional: Tensor, free: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance of clean predictions `[B, N, C]` without its share along the prediction, which is what oversaturates.

    `scale` is [B]. Source: Sadat et al. 2024, "Eliminating oversaturation", eq. 8-9 (η = 0).
    """
    pull, along = (conditional - free).flatten(1), conditional.flatten(1)
    share = (pull * along).sum(1, keepdim=True) / along.square().sum(1, keepdim=True).clamp_min(1e-8)
    return conditional + (scale[:, None, None] - 1) * (pull - share * along).view_as(conditional)


def begin(renderings: Renderings, seed: int) -> Run:
    """The run before its first step, where the renderings are."""
    rng = random.Random(seed)
    pipe = make_pipeline(seed)
    pipe.vae.fit(sample_patches(renderings, rng).cpu())
    return new_run(pipe, rng, RATES, renderings.device)


def sample_patches(renderings: Renderings, rng: random.Random) -> Tensor:
    """8×8 patches `[M, 192]` with an edge, of pictures of all sizes; flat ones would drown everything else."""
    patches = []
    for size in FITTED_ON:
        pixels, _ = compose(rng, renderings, size, size)
        found = F.pixel_unshuffle(pixels[None], 8).flatten(2)[0].T
        found = found[found.std(1) > 0.02]
        patches.append(found[torch.randperm(len(found))[:1500].to(found.device)])
    return torch.cat(patches)


def train_step(
    run: Run, renderings: Renderings, progress: float, *, bf16: bool, factor: float = 1.0, guidance_from: float = GUIDANCE_FROM
) -> Step:
    """One batch, one update; `progress` is the share of the budget that is spent. Gives the batch's kind, loss, gradient norm."""
    batch = draw_batch(run, renderings, progress, factor)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        loss = loss_of(run, batch, progress, guidance_from)
    return "/".join(map(str, batch.kind)), *update(run, loss, progress, bf16=bf16)


# Commands


def run_training(args: argparse.Namespace) -> None:
    """Train the transformer and the text encoders until the budget is spent."""
    args.out.mkdir(parents=True, exist_ok=True)
    renderings = render(args.data, SIZES, args.device)
    run = begin(renderings, args.seed)
    if (args.out / STATE).exists():
        load_state(run, args.out / STATE)
    bf16 = args.bf16 or run.device.type == "cuda"

    def take_step(progress: float) -> Step:
        return train_step(run, renderings, progress, bf16=bf16, factor=args.factor, guidance_from=args.guidance_from)

    train(run, take_step, args.out, args.minutes)


def run_decoder(args: argparse.Namespace) -> None:
    """Train the autoencoder's decoder for the projection of a run that has begun."""
    args.out.mkdir(parents=True, exist_ok=True)
    vae = make_pipeline(args.seed).vae
    saved, _ = read_state(args.out / STATE)
    for name, value in vae.named_buffers():
        value.copy_(saved[f"vae.{name}"])
    renderings = render(args.data, SIZES, args.device)
    train_decoder(vae.to(args.device), renderings, args.out, args.minutes, args.seed, bf16=args.bf16 or args.device.startswith("cuda"))


def export(args: argparse.Namespace) -> None:
    """Write the pipeline with averaged weights, and the decoder where one was trained."""
    run = new_run(make_pipeline(0), random.Random(0), RATES)
    load_weights(run, read_state(args.out / STATE)[0])
    if (args.out / DECODER).exists():
        load_decoder(run.average.vae, args.out / DECODER)
    save_pipeline(run.average, args.model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("prepare", help="write the drawings as PNG")
    command.add_argument("fluent", type=Path, help="folder of the unpacked @iconify-json/fluent-emoji package")
    command.add_argument("data", type=Path)
    command.set_defaults(call=lambda args: prepare(args.fluent, args.data))
    for name, call, minutes in (("run", run_training, 600.0), ("decoder", run_decoder, 60.0)):
        command = commands.add_parser(name, help=call.__doc__)
        add_run_arguments(command, minutes)
        if call is run_training:
            command.add_argument(
                "--guidance-from", type=float, default=GUIDANCE_FROM,
                help="share of the budget after which guidance is learned as well (%(default)s; 1: never, for short budgets)",
            )  # fmt: skip
        command.set_defaults(call=call)
    command = commands.add_parser("export", help=export.__doc__)
    command.add_argument("out", type=Path)
    command.add_argument("model", type=Path)
    command.set_defaults(call=export)
    args = parser.parse_args(arguments)
    args.call(args)


if __name__ == "__main__":
    main()
