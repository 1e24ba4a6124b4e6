"""Train the built-in video model from scratch within a time budget, resumable, on a CPU or a CUDA device.

    python -m dit_accel.pipelines.builtin_video.train run DATA OUT --image MODEL --minutes 300 --bf16
    python -m dit_accel.pipelines.builtin_video.train export OUT VIDEO --image MODEL

DATA is the folder of drawings of the image model's training, MODEL the image model (`builtin/TRAINING.md`): its autoencoder, frame by
frame, and its text encoder, which learns on. The recipe is the image model's where it can be: clean latents predicted, flow matching with a
noise shift that grows with the number of tokens, Muon on the block matrices, AdamW on the rest, captions dropped for guidance. Single
frames teach what things look like at a fifth of a clip's price, clips of 17 frames at 128 pixels how they move; 256 and 512 pixels come
last. OUT/state is the training state, OUT/log.jsonl the log, VIDEO the pipeline with averaged weights. A run that was stopped goes on
where its state was written, with the same numbers as if it had not been.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.pipelines.builtin import WEIGHTS as IMAGE_WEIGHTS
from dit_accel.pipelines.builtin.drawings import Renderings, render
from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA
from dit_accel.pipelines.builtin_video import TEXT_TOKENS
from dit_accel.pipelines.builtin_video.components import make_pipeline
from dit_accel.pipelines.builtin_video.motion import film
from dit_accel.pipelines.training import (
    STATE,
    Run,
    add_run_arguments,
    load_state,
    load_weights,
    new_run,
    read_state,
    save_pipeline,
    train,
    update,
)  # fmt: skip

Kind = tuple[int, int]  # frames, pixels of a side
BATCH: dict[Kind, int] = {(1, 128): 32, (1, 256): 12, (1, 512): 3, (17, 128): 8, (17, 256): 3, (17, 512): 1}
# sigma' = s·sigma / (1 + (s - 1)·sigma) of a uniform sigma; four frames of a token tell of one another, so more noise than for a picture
SHIFT: dict[Kind, float] = {(1, 128): 1.8, (1, 256): 2.6, (1, 512): 3.8, (17, 128): 2.6, (17, 256): 3.6, (17, 512): 5.0}
# (share of the budget at which the phase ends, how often each kind is drawn)
PHASES: list[tuple[float, dict[Kind, float]]] = [
    (0.08, {(1, 128): 0.4, (1, 256): 0.2, (17, 128): 0.4}),
    (0.45, {(1, 256): 0.15, (17, 128): 0.55, (17, 256): 0.3}),
    (0.75, {(1, 512): 0.08, (17, 128): 0.2, (17, 256): 0.6, (17, 512): 0.12}),
    (1.01, {(17, 256): 0.6, (17, 512): 0.4}),
]
RATES = (2e-3, 1e-3)  # Muon's and AdamW's learning rates
SIZES = (128, 256, 512)  # of the renderings, in pixels
FITTED_ON = (128, 256) * 24  # sides of the clips that the axes over time are fitted to


@dataclass
class Batch:
    """Latents `[B, C, T, h, w]` of one kind, their captions and the padded text length."""

    latents: Tensor
    captions: list[str]
    text: int
    kind: Kind


def begin(renderings: Renderings, seed: int, image: Path = IMAGE_WEIGHTS) -> Run:
    """The run before its first step, where the renderings are."""
    rng = random.Random(seed)
    pipe = make_pipeline(seed, image=image)
    fit_encoder(pipe, renderings, rng)
    return new_run(pipe, rng, RATES, renderings.device)


def fit_encoder(pipe: WanPipeline, renderings: Renderings, rng: random.Random) -> None:
    """PCA over time of clips of several sizes; patches without an edge would drown everything else."""
    found = []
    for size in FITTED_ON:
        pixels, _ = film(rng, renderings, 17, size, size)
        with torch.no_grad():
            groups = pipe.vae.group(pixels[None].cpu())[0].flatten(1).T
        detail = groups.view(len(groups), 4, -1)[:, :, 3:].abs().amax((1, 2))  # the first three coefficients are about the colour
        groups = groups[detail > 0.05]
        found.append(groups[torch.randperm(len(groups))[:1500]])
    pipe.vae.fit(torch.cat(found))


def draw_batch(run: Run, renderings: Renderings, progress: float, factor: int = 1) -> Batch:
    """A batch of one kind and shape for this point of the schedule, `factor` times as many clips as BATCH says."""
    rng = run.rng
    mix = next(kinds for end, kinds in PHASES if progress < end)
    kind = rng.choices(list(mix), list(mix.values()))[0]
    frames, size = kind
    text, count = TEXT_TOKENS, BATCH[kind] * factor
    if rng.random() < 0.10:  # WanPipeline pads text to 512 with zeros unless it is given another length
        text = rng.choice([16, 32, 64, 128, 512])
    side, ratio = size // 16, rng.choice([1] * 8 + [4 / 3, 3 / 4])
    height, width = round(side / ratio**0.5) * 16, round(side * ratio**0.5) * 16
    clips = [film(rng, renderings, frames, height, width) for _ in range(count)]
    with torch.no_grad():
        latents = torch.cat([run.pipe.vae.encode(pixels[None]).latents for pixels, _ in clips])
    return Batch(latents, ["" if rng.random() < 0.1 else caption for _, caption in clips], text, kind)


def loss_of(pipe: WanPipeline, batch: Batch) -> Tensor:
    """Flow-matching loss, of the velocity, at one noise level per clip."""
    # random numbers are the CPU's, so that its state is all that a resumed run needs
    noise = torch.randn(batch.latents.shape).to(batch.latents)
    shift = SHIFT[batch.kind]
    # uniform: a logit-normal hardly ever shows noise below a tenth, where the last steps clean up
    sigma = torch.rand(len(batch.captions)).to(batch.latents)
    sigma = shift * sigma / (1 + (shift - 1) * sigma)
    share = sigma[:, None, None, None, None]
    x = (1 - share) * batch.latents + share * noise
    text, _ = pipe.encode_prompt(batch.captions, do_classifier_free_guidance=False, max_sequence_length=batch.text)
    velocity = pipe.transformer(x, sigma * 1000, text, return_dict=False)[0]
    return (velocity.float() - (x - batch.latents) / share.clamp_min(LEAST_SIGMA)).square().mean()


def train_step(run: Run, renderings: Renderings, progress: float, *, bf16: bool, factor: int = 1) -> tuple[str, float, float]:
    """One batch, one update; `progress` is the share of the budget that is spent. Gives the batch's kind, loss, gradient norm."""
    batch = draw_batch(run, renderings, progress, factor)
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):
        loss = loss_of(run.pipe, batch)
    return "x".join(map(str, batch.kind)), *update(run, loss, progress, bf16=bf16)


# Commands


def run_training(args: argparse.Namespace) -> None:
    """Train the transformer and the text encoder until the budget is spent."""
    args.out.mkdir(parents=True, exist_ok=True)
    renderings = render(args.data, SIZES, args.device)
    run = begin(renderings, args.seed, args.image)
    if (args.out / STATE).exists():
        check_image(run, read_state(args.out / STATE)[0])
        load_state(run, args.out / STATE)
    bf16 = args.bf16 or run.device.type == "cuda"

    def take_step(progress: float) -> tuple[str, float, float]:
        return train_step(run, renderings, progress, bf16=bf16, factor=args.factor)

    train(run, take_step, args.out, args.minutes)


def check_image(run: Run, saved: dict[str, Tensor]) -> None:
    """Raise ValueError where a state was made with another image model's autoencoder: its decoder could not read these latents."""
    mine = run.pipe.vae.frames.basis
    theirs = saved.get("vae.frames.basis")
    if theirs is None or not torch.equal(theirs, mine.to(theirs)):
        raise ArgumentError("the state was made with another image model: name that one's folder with --image")


def export(args: argparse.Namespace) -> None:
    """Write the pipeline with averaged weights, the image model's decoder in it."""
    run = new_run(make_pipeline(image=args.image), random.Random(0), RATES)
    saved, _ = read_state(args.out / STATE)
    check_image(run, saved)
    load_weights(run, saved)
    save_pipeline(run.average, args.model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help=run_training.__doc__)
    add_run_arguments(command, 300.0)
    command.set_defaults(call=run_training)
    exported = commands.add_parser("export", help=export.__doc__)
    exported.add_argument("out", type=Path)
    exported.add_argument("model", type=Path)
    exported.set_defaults(call=export)
    for each in (command, exported):
        each.add_argument("--image", type=Path, default=IMAGE_WEIGHTS, help="folder of the image model (the one that ships)")
    args = parser.parse_args(arguments)
    args.call(args)


if __name__ == "__main__":
    main()
