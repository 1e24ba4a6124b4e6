"""The trainers of both built-in models, on toy models and toy pictures: they learn, they resume, they outlive a step that is not finite."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builtin_fixtures import discs
from diffusers import FluxPipeline, WanPipeline
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.pipelines import training
from dit_accel.pipelines.builtin import WEIGHTS
from dit_accel.pipelines.builtin import train as pictures
from dit_accel.pipelines.builtin.drawings import Renderings, compose
from dit_accel.pipelines.builtin_video import WEIGHTS as VIDEO_WEIGHTS
from dit_accel.pipelines.builtin_video import train as videos
from dit_accel.pipelines.builtin_video.motion import film
from dit_accel.pipelines.training import MOST_DROPPED, Run, parameters

RATES = (2e-3, 1e-3)
Step = tuple[str, float, float]


@dataclass
class Trainer:
    """One of the two trainers with batches of toy size."""

    module: Any
    begin: Callable[[Renderings, int], Run]
    loads: Any

    def step(self, run: Run, renderings: Renderings, progress: float = 0.0) -> Step:
        return tuple(self.module.train_step(run, renderings, progress, bf16=False))

    def loss(self, run: Run, renderings: Renderings) -> float:
        """Of one batch with its noise, the same at every call."""
        state, run.rng = run.rng, random.Random(7)
        torch.manual_seed(5)
        with torch.no_grad():
            batch = self.module.draw_batch(run, renderings, 0.0)
            value = self.module.loss_of(run, batch, 0.0) if self.module is pictures else self.module.loss_of(run.pipe, batch)
        run.rng = state
        return float(value)


def begin_pictures(renderings: Renderings, seed: int) -> Run:
    pipe = pictures.make_pipeline(seed)
    made = torch.stack([compose(random.Random(i), renderings, 32, 32)[0] for i in range(32)])
    pipe.vae.fit(torch.nn.functional.pixel_unshuffle(made, 8).flatten(2).transpose(1, 2).flatten(0, 1))
    return training.new_run(pipe, random.Random(seed), RATES)


def begin_videos(renderings: Renderings, seed: int) -> Run:
    pipe = videos.make_pipeline(seed, num_layers=1)
    clips = torch.stack([film(random.Random(i), renderings, 5, 32, 32)[0] for i in range(8)])
    pipe.vae.fit(pipe.vae.group(clips).transpose(0, 1).flatten(1).T)
    return training.new_run(pipe, random.Random(seed), RATES)


@pytest.fixture(scope="module")
def renderings() -> Renderings:
    return discs()


@pytest.fixture(params=["pictures", "videos"])
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    if request.param == "pictures":
        toy: dict[str, Any] = {"BATCH": {32: 2}, "SHIFT": {32: 1.5}, "PHASES": [(1.01, {32: 1.0})]}
        made = Trainer(pictures, begin_pictures, FluxPipeline)
    else:
        kinds: dict[Any, float] = {(1, 32): 0.5, (5, 32): 0.5}
        toy = {"BATCH": dict.fromkeys(kinds, 2), "SHIFT": dict.fromkeys(kinds, 1.5), "PHASES": [(1.01, kinds)]}
        made = Trainer(videos, begin_videos, WanPipeline)
    for name, value in toy.items():
        monkeypatch.setattr(made.module, name, value)
    return made


def test_a_resumed_run_is_the_same_run(trainer: Trainer, renderings: Renderings, tmp_path: Path) -> None:
    run = trainer.begin(renderings, 0)
    for _ in range(2):
        trainer.step(run, renderings, 0.3)
    run.spent = 12.5
    training.save_state(run, tmp_path / training.STATE)
    there = [trainer.step(run, renderings, 0.8) for _ in range(3)]

    other = trainer.begin(renderings, 1)
    training.load_state(other, tmp_path / training.STATE)
    assert (other.step, other.spent) == (2, 12.5)
    assert [trainer.step(other, renderings, 0.8) for _ in range(3)] == there
    for pipe, resumed in ((run.pipe, other.pipe), (run.average, other.average)):
        pairs = zip(parameters(pipe).items(), parameters(resumed).values(), strict=True)
        assert [name for (name, left), right in pairs if not torch.equal(left, right)] == []


def test_training_lowers_the_loss(trainer: Trainer, renderings: Renderings) -> None:
    run = trainer.begin(renderings, 0)
    before, run.step = trainer.loss(run, renderings), 100  # past the warm-up
    for _ in range(25):
        trainer.step(run, renderings)
    assert trainer.loss(run, renderings) < 0.9 * before


def test_a_whole_run_leaves_a_pipeline_that_loads(trainer: Trainer, renderings: Renderings, tmp_path: Path) -> None:
    run = trainer.begin(renderings, 0)
    training.train(run, lambda progress: trainer.step(run, renderings, progress), tmp_path, minutes=0.02)
    assert run.step > 0
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != training.LOG) == ["model", training.STATE]
    loaded = parameters(trainer.loads.from_pretrained(tmp_path / "model"))
    for name, average in parameters(run.average).items():
        assert loaded[name].dtype == torch.float32
        wanted = average if average.numel() < training.LARGE else average.bfloat16().float()
        assert torch.equal(loaded[name], wanted), name


def test_learning_rate(trainer: Trainer, renderings: Renderings) -> None:
    assert training.rate(0, 0.0) == pytest.approx(0.01)
    assert training.rate(500, 0.3) == 1.0
    assert training.rate(5000, 1.0) == pytest.approx(0.03)
    run = trainer.begin(renderings, 0)
    run.step = 49
    trainer.step(run, renderings, 0.0)
    assert [group["lr"] for o in run.optimizers for group in o.param_groups] == pytest.approx([r / 2 for r in RATES])


def test_a_step_without_a_finite_gradient_changes_no_weight(
    trainer: Trainer, renderings: Renderings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trainer.begin(renderings, 0)
    trainer.step(run, renderings)
    before = [p.detach().clone() for pipe in (run.pipe, run.average) for p in parameters(pipe).values()]
    good = trainer.module.loss_of

    def broken(*args: Any) -> Tensor:
        return good(*args) * math.nan

    monkeypatch.setattr(trainer.module, "loss_of", broken)
    for _ in range(MOST_DROPPED):
        assert all(math.isnan(value) for value in trainer.step(run, renderings)[1:])
    after = [p for pipe in (run.pipe, run.average) for p in parameters(pipe).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    with pytest.raises(ArithmeticError, match="wanted finite gradients, got 6 steps in a row without"):
        trainer.step(run, renderings)
    monkeypatch.setattr(trainer.module, "loss_of", good)
    trainer.step(run, renderings)
    assert run.dropped == 0
    assert all(bool(p.isfinite().all()) for p in parameters(run.pipe).values())


# Files


def test_a_saved_pipeline_is_half_the_size_and_its_autoencoder_loads_as_float32(tmp_path: Path) -> None:
    made = pictures.make_pipeline(0)
    training.save_pipeline(made, tmp_path / "model")
    stored: dict[torch.dtype, int] = {}
    for file in (tmp_path / "model").rglob("*.safetensors"):
        for x in load_file(file).values():
            stored[x.dtype] = stored.get(x.dtype, 0) + x.numel()
    assert stored[torch.float32] < 0.01 * stored[torch.bfloat16]
    loaded, wanted = FluxPipeline.from_pretrained(tmp_path / "model").vae.state_dict(), made.vae.state_dict()
    assert loaded.keys() == wanted.keys()
    for name, x in wanted.items():
        assert loaded[name].dtype == torch.float32, name
        assert torch.equal(loaded[name], x if x.numel() < training.LARGE else x.bfloat16().float()), name


@pytest.mark.parametrize("folder", [WEIGHTS, VIDEO_WEIGHTS], ids=["image", "video"])
def test_the_weights_that_ship_are_narrow(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        wide = [name for name, x in load_file(file).items() if x.dtype == torch.float32 and x.numel() >= training.LARGE]
        assert not wide, f"{file.parent.name}: {wide}"
