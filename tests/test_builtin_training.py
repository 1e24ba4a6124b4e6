"""The trainers of both built-in models, on toy models and toy pictures: they learn, they resume, they outlive a step that is not finite,
and their commands run from prepared drawings to a pipeline that loads."""

import contextlib
import copy
import functools
import json
import math
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from builtin_fixtures import clip, discs
from diffusers import FluxPipeline, WanPipeline
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.pipelines import training
from dit_accel.pipelines.builtin import WEIGHTS, decoder
from dit_accel.pipelines.builtin import train as pictures
from dit_accel.pipelines.builtin.drawings import CONCEPTS, Renderings, compose, render
from dit_accel.pipelines.builtin_video import WEIGHTS as VIDEO_WEIGHTS
from dit_accel.pipelines.builtin_video import train as videos
from dit_accel.pipelines.training import Run, Step, parameters

RATES = (2e-3, 1e-3)
PICTURE_KINDS: dict[Any, float] = {(32, 32): 0.5, (48, 32): 0.5}  # whole pictures, and windows of larger ones
TOY_PICTURES = {"BATCH": dict.fromkeys(PICTURE_KINDS, 2), "SHIFT": {32: 1.5, 48: 1.5}, "PHASES": [(1.01, PICTURE_KINDS)]}
CLIP_KINDS: dict[Any, float] = {(1, 32): 0.5, (5, 32): 0.5}
CLIP_PLAN = videos.Plan(dict.fromkeys(CLIP_KINDS, 2), [(1.01, CLIP_KINDS)], RATES)
TOY_CLIPS = {"PLANS": dict.fromkeys(videos.PLANS, CLIP_PLAN), "SHIFT": dict.fromkeys(CLIP_KINDS, 1.5)}


@dataclass
class Trainer:
    """One of the two trainers with batches of toy size."""

    module: Any
    begin: Callable[[Renderings, int], Run]
    loads: Any

    def take_step(self, run: Run, renderings: Renderings, progress: float = 0.0) -> Step:
        if self.module is pictures:
            return pictures.train_step(run, renderings, progress, bf16=False)
        return videos.train_step(videos.Training(run, renderings, CLIP_PLAN, bf16=False), progress)

    def step(self, run: Run, renderings: Renderings, progress: float = 0.0) -> tuple[str, float, float]:
        kind, loss, norm = self.take_step(run, renderings, progress)
        return kind, float(loss), float(norm)

    def draw_loss(self, run: Run, renderings: Renderings, progress: float = 0.0) -> Tensor:
        if self.module is pictures:
            return pictures.loss_of(run, pictures.draw_batch(run, renderings, progress), progress)
        training = videos.Training(run, renderings, CLIP_PLAN, bf16=False)
        return videos.loss_of(training.model, videos.draw_batch(training, progress))

    def loss(self, run: Run, renderings: Renderings) -> float:
        """Of one batch with its noise, the same at every call."""
        state, run.rng = run.rng, random.Random(7)
        torch.manual_seed(5)
        with torch.no_grad():
            value = self.draw_loss(run, renderings)
        run.rng = state
        return float(value)


def begin_pictures(renderings: Renderings, seed: int) -> Run:
    pipe = pictures.make_pipeline(seed, num_single_layers=1)
    made = torch.stack([compose(random.Random(i), renderings, 32, 32)[0] for i in range(32)])
    pipe.vae.fit(torch.nn.functional.pixel_unshuffle(made, 8).flatten(2).transpose(1, 2).flatten(0, 1))
    return training.new_run(pipe, random.Random(seed), RATES)


def begin_videos(renderings: Renderings, seed: int) -> Run:
    pipe = videos.make_pipeline(seed, num_layers=1)
    clips = torch.stack([clip(i, renderings, 5, 32, 32) for i in range(8)])
    pipe.vae.fit(pipe.vae.group(clips).transpose(0, 1).flatten(1).T)
    return training.new_run(pipe, random.Random(seed), RATES)


@pytest.fixture(scope="module")
def renderings() -> Renderings:
    return discs()


@pytest.fixture(params=["pictures", "videos"])
def trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    if request.param == "pictures":
        toy: dict[str, Any] = TOY_PICTURES
        made = Trainer(pictures, begin_pictures, FluxPipeline)
    else:
        toy = TOY_CLIPS
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
    training.save_state(run, tmp_path / training.STATE)  # over one that is there
    there = [trainer.step(run, renderings, 0.8) for _ in range(2)]

    other = trainer.begin(renderings, 1)
    training.load_state(other, tmp_path / training.STATE)
    assert (other.step, other.spent) == (2, 12.5)
    assert [trainer.step(other, renderings, 0.8) for _ in range(2)] == there
    for pipe, resumed in ((run.pipe, other.pipe), (run.average, other.average)):
        pairs = zip(parameters(pipe).items(), parameters(resumed).values(), strict=True)
        assert [name for (name, left), right in pairs if not torch.equal(left, right)] == []


def test_training_lowers_the_loss(trainer: Trainer, renderings: Renderings) -> None:
    run = trainer.begin(renderings, 0)
    before, run.step = trainer.loss(run, renderings), 100  # past the warm-up
    for _ in range(13):
        trainer.step(run, renderings)
    assert trainer.loss(run, renderings) < 0.9 * before


def test_a_whole_run_leaves_a_pipeline_that_loads(trainer: Trainer, renderings: Renderings, tmp_path: Path) -> None:
    run = trainer.begin(renderings, 0)
    training.train(run, lambda progress: trainer.take_step(run, renderings, progress), tmp_path, minutes=0.02)
    assert run.step > 0
    assert run.spent >= 60 * 0.02
    assert [p.name for p in tmp_path.iterdir() if p.name != training.LOG] == [training.STATE]
    training.save_pipeline(run.average, tmp_path / "model")
    loaded = parameters(trainer.loads.from_pretrained(tmp_path / "model"))
    for name, average in parameters(run.average).items():
        assert loaded[name].dtype == torch.float32
        wanted = average if average.numel() < training.LARGE else average.bfloat16().float()
        assert torch.equal(loaded[name], wanted), name


def test_learning_rate(trainer: Trainer, renderings: Renderings) -> None:
    assert training.rate(0, 0.0) == pytest.approx(0.01)
    assert training.rate(500, 0.3) == 1.0
    assert training.rate(5000, 1.0) == pytest.approx(0.03)
    assert training.rate(500, 0.6, 0.2) == pytest.approx(1 - 0.97 / 2)
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
    states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in run.optimizers]
    for _ in range(3):
        assert all(math.isnan(value) for value in trainer.step(run, renderings)[1:])
    after = [p for pipe in (run.pipe, run.average) for p in parameters(pipe).values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    for optimizer, state in zip(run.optimizers, states, strict=True):
        for index, values in optimizer.state_dict()["state"].items():
            assert all(torch.equal(value, state[index][name]) for name, value in values.items()), index
    monkeypatch.setattr(trainer.module, "loss_of", good)
    assert all(math.isfinite(value) for value in trainer.step(run, renderings)[1:])
    assert all(bool(p.isfinite().all()) for p in parameters(run.pipe).values())
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


# Guidance


def test_the_guidance_embedding_is_trained_at_the_end(renderings: Renderings, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TOY_PICTURES.items():
        monkeypatch.setattr(pictures, name, value)
    seen: list[tuple[bool, Tensor]] = []
    predict = pictures.clean

    def watched(pipe: FluxPipeline, *args: Any) -> Tensor:
        seen.append((pipe is run.average, args[-1]))
        return predict(pipe, *args)

    monkeypatch.setattr(pictures, "clean", watched)
    monkeypatch.setattr(pictures, "update", lambda run, loss, progress, bf16: (loss, loss))  # what is predicted is seen before it
    run = begin_pictures(renderings, 0)
    trainer_step(run, renderings, 0.5)
    assert not any(teacher for teacher, _ in seen)
    assert all(bool((scale > 1).all()) for _, scale in seen)
    seen.clear()
    for _ in range(6):
        trainer_step(run, renderings, 0.9)
    assert {teacher for teacher, _ in seen} == {True, False}
    assert all(bool((scale == 1).all()) for teacher, scale in seen if teacher)


def trainer_step(run: Run, renderings: Renderings, progress: float) -> Step:
    return pictures.train_step(run, renderings, progress, bf16=False)


def test_guidance_by_one_changes_nothing_and_by_more_keeps_the_share_along_the_prediction() -> None:
    torch.manual_seed(0)
    conditional, free = torch.randn(2, 2, 6, 4).unbind()
    assert torch.allclose(pictures.guided(conditional, free, torch.ones(2)), conditional)
    pulled = pictures.guided(conditional, free, torch.tensor([3.0, 5.0])) - conditional
    assert bool((pulled.flatten(1).norm(dim=1) > 1).all())
    assert float((pulled * conditional).sum((1, 2)).abs().max()) < 1e-4


# Commands


@pytest.fixture
def prepared(renderings: Renderings, tmp_path: Path) -> Path:
    """A folder of toy drawings as `prepare` writes it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name, image in zip(CONCEPTS, renderings.levels[64], strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")
    return folder


def test_the_commands_make_a_pipeline_from_prepared_drawings(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = functools.partial(pictures.make_pipeline, num_single_layers=1)
    for name, value in (TOY_PICTURES | {"FITTED_ON": (32,) * 4, "SIZES": (64,), "make_pipeline": small}).items():
        monkeypatch.setattr(pictures, name, value)
    for name, value in {"SIZES": (48,), "CROP": 32, "COUNT": 2}.items():
        monkeypatch.setattr(decoder, name, value)
    out = tmp_path / "out"
    for command in ("run", "decoder"):
        pictures.main([command, str(prepared), str(out), "--minutes", "0.02", "--device", "cpu", "--bf16", "--factor", "2"])
    made = [p for p in out.rglob("*") if p.is_file()]
    assert all(p.stat().st_size <= training.SHARD for p in made)
    state, _ = training.read_state(out / training.STATE)
    assert len([p for p in made if p.parent.name == training.STATE]) <= training.SHARDS
    pictures.main(["run", str(prepared), str(out), "--minutes", "0.02", "--device", "cpu"])  # a budget that is spent takes no step
    again, _ = training.read_state(out / training.STATE)
    assert all(torch.equal(x, again[name]) for name, x in state.items())
    pictures.main(["export", str(out), str(tmp_path / "model")])
    loaded = FluxPipeline.from_pretrained(tmp_path / "model")
    for name, parameter in parameters(loaded).items():
        if parameter.numel() < training.LARGE:
            assert torch.equal(parameter, state[f"average.{name}"]), name
    assert torch.equal(loaded.vae.basis, state["vae.basis"])
    trained = load_file(out / decoder.DECODER)["decoder.0.bias"]
    assert torch.equal(loaded.vae.decoder[0].bias, trained)
    assert bool(trained.any())


def test_the_video_commands_make_a_pipeline_with_the_image_models_autoencoder(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image, other, out = tmp_path / "image", tmp_path / "other", tmp_path / "out"
    for folder, seed in ((image, 0), (other, 1)):
        made = pictures.make_pipeline(seed, num_single_layers=1)
        made.vae.fit(torch.rand(400, 192, generator=torch.Generator().manual_seed(seed)))
        training.save_pipeline(made, folder)
    small = functools.partial(videos.make_pipeline, num_layers=1)
    for name, value in (TOY_CLIPS | {"FITTED_ON": (32,) * 4, "SIZES": (64,), "make_pipeline": small}).items():
        monkeypatch.setattr(videos, name, value)
    command = ["run", str(prepared), str(out), "--minutes", "0.02", "--device", "cpu", "--bf16", "--factor", "2", "--image"]
    for _ in range(2):  # the second takes no step
        videos.main([*command, str(image)])
    assert all(p.stat().st_size <= training.SHARD for p in out.rglob("*") if p.is_file())
    state, numbers = training.read_state(out / training.STATE)
    assert numbers["step"] > 0
    videos.main(["export", str(out), str(tmp_path / "model"), "--image", str(image)])
    loaded = WanPipeline.from_pretrained(tmp_path / "model")
    for name, parameter in parameters(loaded).items():
        if parameter.numel() < training.LARGE:
            assert torch.equal(parameter, state[f"average.{name}"]), name
    frames = FluxPipeline.from_pretrained(image).vae.state_dict()
    assert all(torch.equal(value, frames[name]) for name, value in loaded.vae.frames.state_dict().items())
    assert torch.equal(loaded.vae.basis, state["vae.basis"])
    further = tmp_path / "further"
    leg = ["run", str(prepared), str(further), "--minutes", "0.01", "--device", "cpu", "--image", str(image), "--start"]
    with pytest.raises(ValueError, match="contains no pipeline: --start takes a folder that the command `export` wrote"):
        videos.main([*leg, str(out)])
    monkeypatch.setattr(videos, "LARGE", [(1.01, {(5, 32): 1.0})])
    videos.main([*leg, str(tmp_path / "model"), "--large"])
    rows = [json.loads(line) for line in (further / training.LOG).read_text().splitlines()]
    assert {kind for row in rows for kind in row["loss"]} == {"5x32"}
    assert torch.equal(training.read_state(further / training.STATE)[0]["vae.basis"], state["vae.basis"])
    started = videos.begin(discs(), 0, CLIP_PLAN, start=tmp_path / "model")
    for pipe in (started.pipe, started.average):
        assert all(torch.equal(p, parameters(loaded)[name]) for name, p in parameters(pipe).items())
    for refused in (command, ["export", str(out), str(tmp_path / "none"), "--image"]):
        with pytest.raises(ValueError, match="the state was made with another image model: name that one's folder with --image"):
            videos.main([*refused, str(other)])


@pytest.mark.parametrize("module", [pictures, videos], ids=["pictures", "videos"])
def test_every_command_of_the_notes_is_understood(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("prepare", "run_training", "run_decoder", "export"):
        monkeypatch.setattr(module, name, lambda *args, name=name: called.append(name), raising=False)
    folder = WEIGHTS.parent
    pages = [folder / "TRAINING.md", WEIGHTS / "README.md", VIDEO_WEIGHTS / "README.md"]
    text = "\n".join([module.__doc__, *(page.read_text() for page in pages)])
    program = f"python -m {module.__name__} "
    commands = [line.strip().removeprefix(program) for line in text.splitlines() if line.strip().startswith(program)]
    for command in commands:
        module.main(re.split(r"\s{2,}[#(]", command)[0].split())
    assert len(called) == len(commands) >= 6
    assert {"run_training", "export"} <= set(called)


def test_a_decoder_whose_training_was_stopped_goes_on_as_if_it_had_not_been(
    renderings: Renderings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"SIZES": (48,), "CROP": 32, "COUNT": 2}.items():
        monkeypatch.setattr(decoder, name, value)
    ticks = iter(range(1000))
    monkeypatch.setattr(decoder, "clock_of", lambda _: lambda: float(next(ticks)))  # a second a step

    def trained(folder: Path, *minutes: float) -> dict[str, Tensor]:
        folder.mkdir()
        for budget in minutes:
            vae = begin_pictures(renderings, 0).pipe.vae
            monkeypatch.setattr(decoder, "factor_of", lambda step, _: 0.5)
            torch.manual_seed(0)
            decoder.train_decoder(vae, renderings, folder, budget, 0, bf16=False)
        return load_file(folder / decoder.DECODER)

    once, twice = trained(tmp_path / "a", 0.1), trained(tmp_path / "b", 0.05, 0.1)
    assert [name for name in once if not torch.equal(once[name], twice[name])] == []


def test_pictures_models_and_losses_stay_on_one_device(trainer: Trainer, renderings: Renderings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of the device "meta" have no numbers, but refuse to meet those of the CPU, as a GPU's do."""
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta") + torch.ones(3)
    elsewhere = Renderings({size: [x.to("meta") for x in level] for size, level in renderings.levels.items()}, renderings.nouns)
    made = trainer.begin(renderings, 0)
    run = training.new_run(made.pipe, random.Random(0), RATES, "meta")
    assert run.device.type == "meta"
    monkeypatch.setattr(videos, "generator_of", lambda *_: None)  # there is none for this device
    for _ in range(4):  # both kinds, with guidance and without
        loss = trainer.draw_loss(run, elsewhere, 0.9)
        loss.backward()
        assert loss.device.type == "meta"
    assert {p.grad.device.type for p in parameters(run.pipe).values() if p.grad is not None} == {"meta"}
    if trainer.module is pictures:
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no such device
        monkeypatch.setattr(decoder, "SIZES", (48,))
        monkeypatch.setattr(decoder, "CROP", 32)
        crops = decoder.draw_crops(random.Random(0), elsewhere)
        assert {x.device.type for x in decoder.decoder_loss(run.pipe.vae, crops, bf16=False)} == {"meta"}


def test_drawings_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the drawings of red-apple, balloon, .* are missing"):
        render(tmp_path)


# Files


@pytest.mark.parametrize("module", [pictures, videos], ids=["pictures", "videos"])
def test_a_state_of_the_real_size_fits_its_files(module: Any) -> None:
    run = training.new_run(module.make_pipeline(0), random.Random(0), RATES)
    tensors = {f"{part}.{n}": p for part in ("model", "average") for n, p in parameters(run.pipe).items()}
    for number, optimizer in enumerate(run.optimizers):
        for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            tensors |= {f"optimizer.{number}.{index}.{name}": p for name in (("momentum",), ("exp_avg", "exp_avg_sq"))[number]}
    shards = training._shards(tensors)
    assert len(shards) <= training.SHARDS
    assert sum(len(shard) for shard in shards) == len(tensors)


def test_a_state_that_is_mixed_or_of_another_model_is_refused(
    renderings: Renderings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SHARD", 12 << 20)
    run = begin_pictures(renderings, 0)
    for name in ("a", "b"):
        training.save_state(run, tmp_path / name)
        run.step += 1
    shutil.copytree(tmp_path / "a", tmp_path / "c")
    shutil.copy(tmp_path / "a" / "0.safetensors", tmp_path / "b" / "0.safetensors")
    (tmp_path / "c" / "1.safetensors").unlink()
    before = {name: p.clone() for name, p in parameters(run.pipe).items()}
    for name in ("b", "c", "nothing"):
        with pytest.raises(ValueError, match="does not contain one whole state: copy all files of one"):
            training.load_state(run, tmp_path / name)
    larger = training.new_run(pictures.make_pipeline(0, num_single_layers=2), random.Random(0), RATES)
    with pytest.raises(ValueError, match=r"the state lacks \d+ tensors of this model, like average.transformer.single"):
        training.load_state(larger, tmp_path / "a")
    assert all(torch.equal(p, before[name]) for name, p in parameters(run.pipe).items())


def test_a_saved_pipeline_is_half_the_size_and_its_autoencoder_loads_as_float32(tmp_path: Path) -> None:
    made = pictures.make_pipeline(0)
    training.save_pipeline(made, tmp_path / "model")
    stored: dict[torch.dtype, int] = {}
    for file in (tmp_path / "model").rglob("*.safetensors"):
        for x in load_file(file).values():
            stored[x.dtype] = stored.get(x.dtype, 0) + x.numel()
    assert stored[torch.float32] < 0.012 * stored[torch.bfloat16]  # norms, biases, the decoder's last convolutions
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
