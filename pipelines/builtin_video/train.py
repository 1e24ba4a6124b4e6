"""Train the built-in video model from scratch within a time budget, resumable, on a CPU or a CUDA device.

    python -m dit_accel.pipelines.builtin_video.train run DATA OUT --minutes 300 --bf16            (on a CPU)
    python -m dit_accel.pipelines.builtin_video.train run DATA OUT --minutes 4 --device cuda
    python -m dit_accel.pipelines.builtin_video.train export OUT VIDEO
    python -m dit_accel.pipelines.builtin_video.train run DATA NEXT --minutes 2 --device cuda --start VIDEO --large

DATA is the folder of drawings of the image model's training (`builtin/TRAINING.md`). The image model (`--image`, the one that ships) gives
its autoencoder, frame by frame, and its text encoder, which learns on. The recipe is the image model's where it can be: clean latents
predicted, flow matching with a noise shift that grows with the number of tokens, Muon on the block matrices, AdamW on the rest, captions
dropped for guidance. Single frames teach what things look like at a fifth of a clip's price, clips of 17 frames at 128 pixels how they
move; 256 and 512 pixels come last. On a CUDA device batches are some thirty times larger, made on the device, and nothing waits for it but
the log. `--start` begins with the weights of a pipeline that `export` wrote, for a further leg; `--large` is for one that knows the things.
OUT/state is the training state, OUT/log.jsonl the log, VIDEO the pipeline with averaged weights. A run that was stopped goes on where its
state was written, with the same numbers as if it had not been.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.pipelines.builtin import WEIGHTS as IMAGE_WEIGHTS
from dit_accel.pipelines.builtin.drawings import Renderings, render
from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, builtin_video_pipeline
from dit_accel.pipelines.builtin_video.autoencoder import GROUP
from dit_accel.pipelines.builtin_video.components import make_pipeline
from dit_accel.pipelines.builtin_video.fast import Grid, TokenModel, to_tokens
from dit_accel.pipelines.builtin_video.studio import Studio
from dit_accel.pipelines.training import (
    LEVEL,
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

Kind = tuple[int, int]  # frames, pixels of a side
Phases = list[tuple[float, dict[Kind, float]]]  # (share of the budget at which the phase ends, how often each kind is drawn)
# sigma' = s·sigma / (1 + (s - 1)·sigma) of a uniform sigma; four frames of a token tell of one another, so more noise than for a picture
SHIFT: dict[Kind, float] = {(1, 128): 1.8, (1, 256): 2.6, (1, 512): 3.8, (17, 128): 2.6, (17, 256): 3.6, (17, 512): 5.0}
SIZES = (128, 256, 512)  # of the renderings, in pixels
TEXTS = (16, 32, 64, 128, 512)  # lengths that text is padded to now and then: WanPipeline pads it to 512 unless it is given another
FITTED_ON = (128, 256) * 24  # sides of the clips that the axes over time are fitted to


@dataclass(frozen=True)
class Plan:
    """How many clips of each kind a batch has, the phases, Muon's and AdamW's learning rates, the share of the budget at which these begin
    to fall."""

    batch: dict[Kind, int]
    phases: Phases
    rates: tuple[float, float]
    level: float = LEVEL


PLANS = {
    "cpu": Plan(
        {(1, 128): 32, (1, 256): 12, (1, 512): 3, (17, 128): 8, (17, 256): 3, (17, 512): 1},
        [
            (0.08, {(1, 128): 0.4, (1, 256): 0.2, (17, 128): 0.4}),
            (0.45, {(1, 256): 0.15, (17, 128): 0.55, (17, 256): 0.3}),
            (0.75, {(1, 512): 0.08, (17, 128): 0.2, (17, 256): 0.6, (17, 512): 0.12}),
            (1.01, {(17, 256): 0.6, (17, 512): 0.4}),
        ],
        (2e-3, 1e-3),
    ),
    # a step of each kind takes an H100 (80 GB) about 55 ms: less would leave it waiting for launches, more would leave few steps
    "cuda": Plan(
        {(1, 256): 304, (1, 512): 96, (17, 128): 280, (17, 256): 80, (17, 512): 16},
        [
            (0.08, {(1, 256): 0.2, (17, 128): 0.4, (17, 256): 0.4}),
            (0.25, {(1, 256): 0.1, (17, 128): 0.2, (17, 256): 0.7}),
            (0.65, {(1, 512): 0.06, (17, 256): 0.84, (17, 512): 0.1}),
            (1.01, {(17, 256): 0.5, (17, 512): 0.5}),
        ],
        (3e-3, 1.5e-3),
    ),
}
LARGE: Phases = [(1.01, {(1, 512): 0.05, (17, 128): 0.03, (17, 256): 0.5, (17, 512): 0.42})]
LARGE_LEVEL = 0.35


@dataclass
class Batch:
    """Clean tokens `[B, N, 4C]` of one kind, noise of that shape, noise levels `[B]`, the captions' numbers `[B]`, the padded text length
    and the grid of tokens."""

    tokens: Tensor
    noise: Tensor
    sigma: Tensor
    captions: Tensor
    text: int
    grid: Grid
    kind: Kind


class Training:
    """A run with what it takes to make its steps; nothing of it but the run changes."""

    def __init__(self, run: Run, renderings: Renderings, plan: Plan, *, bf16: bool, factor: float = 1.0) -> None:
        self.run, self.plan, self.bf16, self.factor = run, plan, bf16, factor
        self.studio = Studio(renderings)
        self.model = TokenModel(run.pipe, self.studio, torch.bfloat16 if bf16 else torch.float32)


def begin(renderings: Renderings, seed: int, plan: Plan, image: Path = IMAGE_WEIGHTS, start: Path | None = None) -> Run:
    """The run before its first step, where the renderings are; from a pipeline in the folder `start` where one is named.

    Raises ArgumentError where there is none in it.
    """
    rng = random.Random(seed)
    if start is None:
        pipe = make_pipeline(seed, image=image)
        fit_encoder(pipe, renderings, rng)
    elif (start / "model_index.json").exists():
        pipe = builtin_video_pipeline(start)
    else:
        raise ArgumentError(f"{start} contains no pipeline: --start takes a folder that the command `export` wrote")
    run = new_run(pipe, rng, plan.rates, renderings.device)
    run.level = plan.level
    return run


def fit_encoder(pipe: WanPipeline, renderings: Renderings, rng: random.Random) -> None:
    """PCA over time of clips of several sizes; patches without an edge would drown everything else."""
    studio = Studio(renderings)
    found = []
    for size in FITTED_ON:
        pixels = studio.pixels(studio.choose(1, generator_of(rng, studio.device)), 17, size, size, size)
        with torch.no_grad():
            groups = pipe.vae.group(pixels.cpu())[0].flatten(1).T
        detail = groups.view(len(groups), 4, -1)[:, :, 3:].abs().amax((1, 2))  # the first three coefficients are about the colour
        groups = groups[detail > 0.05]
        found.append(groups[torch.randperm(len(groups))[:1500]])
    pipe.vae.fit(torch.cat(found))


def generator_of(rng: random.Random, device: torch.device) -> torch.Generator:
    """Random numbers on a device that follow from the run's, which are all that a resumed run needs."""
    return torch.Generator(device).manual_seed(rng.getrandbits(63))


def draw_batch(training: Training, progress: float) -> Batch:
    """A batch of one kind and shape for this point of the schedule, its noise and noise levels with it."""
    run, plan, studio = training.run, training.plan, training.studio
    mix = next(kinds for end, kinds in plan.phases if progress < end)
    kind = run.rng.choices(list(mix), list(mix.values()))[0]
    frames, size = kind
    text, count = TEXT_TOKENS, max(1, round(plan.batch[kind] * training.factor))
    if run.rng.random() < 0.10:
        text = run.rng.choice(TEXTS)
    side, ratio = size // 16, run.rng.choice([1] * 8 + [4 / 3, 3 / 4])
    rows, columns = round(side / ratio**0.5), round(side * ratio**0.5)
    generator = generator_of(run.rng, run.device)
    with torch.no_grad():
        choices = studio.choose(count, generator)
        pixels = studio.pixels(choices, frames, size, rows * 16, columns * 16)
        tokens = to_tokens(run.pipe.vae.encode(pixels).latents)
        noise = torch.randn(tokens.shape, device=run.device, generator=generator)
        # uniform: a logit-normal hardly ever shows noise below a tenth, where the last steps clean up
        sigma = torch.rand(count, device=run.device, generator=generator)
    sigma = SHIFT[kind] * sigma / (1 + (SHIFT[kind] - 1) * sigma)
    return Batch(tokens, noise, sigma, studio.numbers(choices, frames), text, (-(-frames // GROUP), rows, columns), kind)


def loss_of(model: TokenModel, batch: Batch) -> Tensor:
    """Flow-matching loss, of the velocity, at one noise level per clip; that of the clean tokens over the noise level is the same."""
    sigma = batch.sigma[:, None, None]
    noisy = (1 - sigma) * batch.tokens + sigma * batch.noise
    clean = model.clean(noisy, batch.sigma, model.embed(batch.captions, batch.text), batch.grid)
    return ((clean - batch.tokens) / sigma.clamp_min(LEAST_SIGMA)).square().mean()


def train_step(training: Training, progress: float) -> Step:
    """One batch, one update; `progress` is the share of the budget that is spent."""
    batch = draw_batch(training, progress)
    loss = loss_of(training.model, batch)
    return "x".join(map(str, batch.kind)), *update(training.run, loss, progress, bf16=training.bf16)


# Commands


def run_training(args: argparse.Namespace) -> None:
    """Train the transformer and the text encoder until the budget is spent."""
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    plan = PLANS["cpu" if device.type == "cpu" else "cuda"]
    if args.large:
        plan = replace(plan, phases=LARGE, level=LARGE_LEVEL)
    renderings = render(args.data, SIZES, device)
    run = begin(renderings, args.seed, plan, args.image, args.start)
    if (args.out / STATE).exists():
        check_image(run, read_state(args.out / STATE)[0])
        load_state(run, args.out / STATE)
    training = Training(run, renderings, plan, bf16=args.bf16 or device.type == "cuda", factor=args.factor)
    train(run, lambda progress: train_step(training, progress), args.out, args.minutes)


def check_image(run: Run, saved: dict[str, Tensor]) -> None:
    """Raise ValueError where a state was made with another image model's autoencoder: its decoder could not read these latents."""
    mine = run.pipe.vae.frames.basis
    theirs = saved.get("vae.frames.basis")
    if theirs is None or not torch.equal(theirs, mine.to(theirs)):
        raise ArgumentError("the state was made with another image model: name that one's folder with --image")


def export(args: argparse.Namespace) -> None:
    """Write the pipeline with averaged weights, the image model's decoder in it."""
    run = new_run(make_pipeline(image=args.image), random.Random(0), PLANS["cpu"].rates)
    saved, _ = read_state(args.out / STATE)
    check_image(run, saved)
    load_weights(run, saved)
    save_pipeline(run.average, args.model)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help=run_training.__doc__)
    add_run_arguments(command, 300.0)
    command.add_argument("--start", type=Path, help="folder of a pipeline that `export` wrote, whose weights a new run begins with")
    command.add_argument("--large", action="store_true", help="mostly 256 and 512 pixels from the first step on: a further leg of --start")
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
