"""The clips that the built-in video model is trained on, a batch at once, held to ones made frame by frame; its fast forward, held to the
stock pipeline's; its steps, which wait for nothing."""

import copy
import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from builtin_fixtures import Scene, caption_of, discs, film, scene_of
from conftest import fill_randomly
from diffusers import WanPipeline
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, SHARES, UNNAMED, Renderings
from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, studio, train
from dit_accel.pipelines.builtin_video.fast import TokenModel, to_tokens
from dit_accel.pipelines.builtin_video.motion import MOTIONS, NOUNS, WAY, held_out
from dit_accel.pipelines.builtin_video.studio import DROPPED, Choices, Studio
from dit_accel.pipelines.training import new_run, parameters


@pytest.fixture(scope="module")
def renderings() -> Renderings:
    return discs()


@pytest.fixture(scope="module")
def made(renderings: Renderings) -> Studio:
    return Studio(renderings)


@pytest.fixture(scope="module")
def pipe(renderings: Renderings) -> WanPipeline:
    """Two blocks with noise in every weight."""
    pipe = train.make_pipeline(0, num_layers=2)
    fill_randomly(pipe.transformer)
    clips = Studio(renderings).pixels(choices_of(scenes(8)), 5, 32, 32, 32)
    pipe.vae.fit(pipe.vae.group(clips).transpose(0, 1).flatten(1).T)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scenes(count: int, **changes: Any) -> list[Scene]:
    rng = random.Random(0)
    return [replace(scene_of(rng), **changes) for _ in range(count)]


def choices_of(scenes: list[Scene]) -> Choices:
    """The same random choices."""
    colours = [*BACKGROUNDS, None]
    numbers = [[NOUNS.index(s.noun) for s in scenes], [MOTIONS.index(s.motion) for s in scenes], [colours.index(s.colour) for s in scenes]]
    shares = torch.tensor([[s.row, s.column, s.side, s.way] for s in scenes]).T
    return Choices(*map(torch.tensor, numbers), torch.zeros(len(scenes), dtype=torch.bool), *shares)


# Clips


@pytest.mark.parametrize(
    ("frames", "size", "height", "width"),
    [(17, 64, 64, 64), (5, 64, 48, 80), (9, 64, 80, 48), (1, 64, 64, 64), (1, 64, 48, 80)],
    ids=["clip", "wide", "tall", "picture", "wide-picture"],
)
def test_clips_are_the_ones_made_frame_by_frame(
    renderings: Renderings, monkeypatch: pytest.MonkeyPatch, frames: int, size: int, height: int, width: int
) -> None:
    chosen = [*scenes(6), *scenes(2, motion="growing")]
    expected = torch.stack([film(renderings, scene, frames, height, width) for scene in chosen])
    few, all_sides = Studio(renderings), Studio(renderings)
    rough = few.pixels(choices_of(chosen), frames, size, height, width)
    assert rough.shape == (8, 3, frames, height, width)
    # drawings are kept at sides three per cent apart: less than a grey level of 256 on the mean
    assert float((rough - expected).abs().mean()) < 2 / 256
    # kept at every whole side, as those frames are drawn, they are the same: up to roundings of a place, which an edge multiplies
    monkeypatch.setattr(studio, "RISE", 1.0)
    exact = all_sides.pixels(choices_of(chosen), frames, size, height, width)
    assert float((exact - expected).abs().max()) < 2e-3
    assert float((exact - expected).abs().mean()) < 1e-5
    captions = [few.captions[i] for i in few.numbers(choices_of(chosen), frames).tolist()]
    assert captions == [caption_of(scene, frames) for scene in chosen]


def test_clips_are_drawn_as_often_as_they_should_be(made: Studio) -> None:
    count = 40_000
    drawn = made.choose(count, seeded(0))
    found = torch.bincount(made.numbers(drawn, 17), minlength=len(made.captions)) / count
    expected: dict[str, float] = {"": DROPPED}
    for noun in NOUNS:
        motions = [motion for motion in MOTIONS if not held_out(noun, motion)]
        for motion in motions:
            for colour, share in [(None, UNNAMED), *((c, (1 - UNNAMED) / len(BACKGROUNDS)) for c in BACKGROUNDS)]:
                caption = caption_of(Scene(noun, motion, colour, 0, 0, 0, 0), 17)
                expected[caption] = (1 - DROPPED) * share / len(NOUNS) / len(motions)
    assert sum(expected.values()) == pytest.approx(1.0)
    for caption, share in zip(made.captions, found.tolist(), strict=True):
        often = expected.get(caption, 0.0)
        assert abs(share - often) <= 5 * math.sqrt(often * (1 - often) / count), caption
    for name in ("row", "column", "side", "way"):
        tenths = torch.histc(getattr(drawn, name), 10, 0, 1) / count
        assert float((tenths - 0.1).abs().max()) < 5 * math.sqrt(0.09 / count), name


def test_held_out_pairs_are_kept_from_training(made: Studio) -> None:
    kept = {(n, m) for n in NOUNS for m in MOTIONS if not held_out(n, m)}
    assert 0.03 < 1 - len(kept) / (len(NOUNS) * len(MOTIONS)) < 0.15
    drawn = made.choose(2000, seeded(1))
    assert {(NOUNS[n], MOTIONS[m]) for n, m in zip(drawn.noun.tolist(), drawn.motion.tolist(), strict=True)} == kept


def test_clips_are_the_seeds(made: Studio) -> None:
    first, second, other = (made.pixels(made.choose(3, seeded(seed)), 5, 32, 32, 48) for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert float(first.abs().max()) <= 1 + 1e-6


@pytest.mark.parametrize(
    ("motion", "moves", "sign"),
    [("moving left", 1, -1), ("moving right", 1, 1), ("moving up", 0, -1), ("moving down", 0, 1), ("growing", 2, 1)],
)
def test_paths_do_what_the_caption_says(made: Studio, motion: str, moves: int, sign: int) -> None:
    rows, columns, sides = made._paths(choices_of(scenes(4, motion=motion)), 17, 64, 64)
    for number, values in enumerate((rows, columns, sides)):
        steps = values.diff(dim=1)
        assert bool((steps * sign > 0).all()) if number == moves else bool((steps == 0).all()), number
    if motion != "growing":
        way = ((columns if moves else rows)[:, -1] - (columns if moves else rows)[:, 0]).abs() / 64
        assert float(way.min()) >= WAY[0] - 1e-6
        assert float(way.max()) <= WAY[1] + 1e-6
    else:
        assert bool((sides[:, -1] >= SHARES[0] * 64).all())


def test_a_drawing_lands_on_its_path(made: Studio) -> None:
    """The centre of what differs from a flat background follows the caption's direction."""
    pixels = made.pixels(choices_of(scenes(1, motion="moving right", colour="black", noun="star")), 9, 64, 64, 64)[0]
    ink = (pixels - pixels[:, :1, :1, :1]).abs().amax(0) > 0.3  # [F, H, W]
    columns = torch.arange(64.0)
    centres = [float((frame.any(0) * columns).sum() / frame.any(0).sum()) for frame in ink]
    assert centres[-1] - centres[0] > 0.25 * 64


def test_every_word_of_a_caption_is_a_token(pipe: WanPipeline, made: Studio) -> None:
    assert len(made.captions) == len(set(made.captions)) == len(NOUNS) * (len(MOTIONS) + 1) * (len(BACKGROUNDS) + 1) + 1
    for caption, ids in zip(made.captions, pipe.tokenizer(made.captions).input_ids, strict=True):
        assert pipe.tokenizer.unk_token_id not in ids, caption
        assert len(ids) <= min(TEXT_TOKENS, *train.TEXTS), caption


# The fast forward


def stock_loss(pipe: WanPipeline, latents: Tensor, noise: Tensor, sigma: Tensor, captions: list[str], length: int) -> Tensor:
    """The flow-matching loss of the velocity by the pipeline's own parts."""
    share = sigma[:, None, None, None, None]
    x = (1 - share) * latents + share * noise
    text, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=length)
    velocity = pipe.transformer(x, sigma * 1000, text, return_dict=False)[0]
    return (velocity.float() - (x - latents) / share.clamp_min(LEAST_SIGMA)).square().mean()


@pytest.mark.parametrize(
    ("frames", "rows", "columns", "length"),
    [(9, 4, 4, TEXT_TOKENS), (5, 3, 5, min(train.TEXTS)), (1, 4, 3, 128)],
    ids=["clip", "odd-tokens", "picture-long-text"],
)
def test_the_fast_forward_is_the_stock_one(pipe: WanPipeline, made: Studio, frames: int, rows: int, columns: int, length: int) -> None:
    """Loss and gradients of every parameter in float32; in bfloat16 it is no further from them than the stock one under autocast."""
    drawn = choices_of(scenes(3))
    drawn = replace(drawn, dropped=torch.tensor([False, True, False]))
    grid = (-(-frames // 4), rows, columns)
    with torch.no_grad():
        latents = pipe.vae.encode(made.pixels(drawn, frames, 64, 16 * rows, 16 * columns)).latents
    noise, sigma = torch.randn(latents.shape, generator=seeded(1)), torch.tensor([0.003, 0.4, 0.95])
    captions = [made.captions[i] for i in made.numbers(drawn, frames).tolist()]
    batch = train.Batch(to_tokens(latents), to_tokens(noise), sigma, made.numbers(drawn, frames), length, grid, (frames, 64))

    def gradients(loss: Tensor) -> dict[str, Tensor]:
        pipe.transformer.zero_grad()
        pipe.text_encoder.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in parameters(pipe).items() if p.grad is not None}

    expected = stock_loss(pipe, latents, noise, sigma, captions, length)
    got = train.loss_of(TokenModel(pipe, made, torch.float32), batch)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    theirs, mine = gradients(expected), gradients(got)
    assert mine.keys() == theirs.keys() == parameters(pipe).keys()
    every = math.sqrt(sum(float(gradient.square().sum()) for gradient in theirs.values()))
    for name, gradient in theirs.items():  # small ones are what is left of large ones
        assert float((mine[name] - gradient).norm()) <= 3e-5 * float(gradient.norm()) + 1e-8 * every, name

    with torch.autocast("cpu", torch.bfloat16):
        rounded = stock_loss(pipe, latents, noise, sigma, captions, length)
    half = train.loss_of(TokenModel(pipe, made, torch.bfloat16), batch)
    wrong, stock_wrong = (
        math.sqrt(sum(float((g - theirs[n]).square().sum()) for n, g in found.items())) for found in (gradients(half), gradients(rounded))
    )
    assert 0 < wrong <= 2 * stock_wrong


# Steps


class Watch(TorchDispatchMode):
    """Notes what would make the host wait for a device: a number that it reads, a shape that depends on numbers, tensors of two devices."""

    READS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)}
        self.calls += 1
        if len(devices) > 1 or func.overloadpacket.__name__ in self.READS:
            self.found.append(str(func))
        return out


def test_a_step_waits_for_nothing(pipe: WanPipeline, renderings: Renderings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for a number, on the CPU, and not for a copy, on a device without numbers, once the tables of a kind and shape are there."""
    with Watch() as watch:
        float(torch.ones(1))
        torch.ones(1).to("meta")
    assert len(watch.found) == 2
    kind = (5, 32)
    monkeypatch.setattr(train, "SHIFT", {kind: 1.5})
    monkeypatch.setattr(random.Random, "choice", lambda _, options: options[0])  # one shape, one length of text
    plan = train.Plan({kind: 2}, [(1.01, {kind: 1.0})], (2e-3, 1e-3))
    run = new_run(copy.deepcopy(pipe), random.Random(0), plan.rates)
    training = train.Training(run, renderings, plan, bf16=True)
    train.train_step(training, 0.0)
    with Watch() as watch:
        train.train_step(training, 0.0)
    assert watch.found == []
    assert watch.calls > 1000
    elsewhere = Renderings({size: [x.to("meta") for x in level] for size, level in renderings.levels.items()}, renderings.nouns)
    run = new_run(copy.deepcopy(pipe), random.Random(0), plan.rates, "meta")
    training = train.Training(run, elsewhere, plan, bf16=False)
    monkeypatch.setattr(train, "generator_of", lambda *_: None)  # there is none for this device
    train.draw_batch(training, 0.0)
    train.loss_of(training.model, train.draw_batch(training, 0.0))
    with Watch() as watch:
        train.loss_of(training.model, train.draw_batch(training, 0.0)).backward()
    assert watch.found == []
    assert watch.calls > 500


@pytest.mark.parametrize("name", list(train.PLANS))
def test_a_plan_says_all_of_its_kinds(name: str) -> None:
    plan = train.PLANS[name]
    for phases in (plan.phases, train.LARGE):
        assert [end for end, _ in phases] == sorted(end for end, _ in phases)
        assert phases[-1][0] > 1
        for _, mix in phases:
            assert sum(mix.values()) == pytest.approx(1)
            assert mix.keys() <= plan.batch.keys()
            assert mix.keys() <= train.SHIFT.keys()
