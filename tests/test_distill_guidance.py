"""Distillation under guidance: embedded in the arguments (FLUX), as a batch of two (SD3), as two calls (Wan) and as two lists (Z-Image)."""

import dataclasses
from pathlib import Path
from typing import Any

import diffusers
import distill_fixtures as tiny
import pytest
import tiny_image
import tiny_video
import torch
from distill_fixtures import PROMPTS, learn
from torch import Tensor

from dit_accel import CLEAR, SLA, accelerate, distill
from dit_accel.errors import DistillationError
from dit_accel.finetune import distill as distillation
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.flow import Flow, recorded_flow
from dit_accel.finetune.velocity import predict, velocity_error
from dit_accel.patch.modes import always

STEPS = 2
CALLS: dict[str, dict[str, Any]] = {
    "flux": {**tiny.CALL, "num_inference_steps": STEPS, "guidance_scale": 2.5},
    "sd3": {"height": 32, "width": 48, "num_inference_steps": STEPS, "guidance_scale": 4.0},
    "wan": {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": STEPS, "guidance_scale": 4.0},
    "z_image": {"height": 64, "width": 96, "num_inference_steps": STEPS, "guidance_scale": 4.0},
}
FORWARDS = {"flux": STEPS, "sd3": STEPS, "wan": 2 * STEPS, "z_image": STEPS}


def words(text: str, *shape: int) -> Tensor:
    """Numbers in the place of a text."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(text.encode())))


def pipeline(name: str) -> Any:
    """A tiny pipeline that takes prompts; "" is the text of the unconditional half."""
    if name == "flux":
        return tiny.prompt_pipe()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, _ = getattr(tiny_video if name == "wan" else tiny_image, name)()
    if name == "sd3":
        pipe.encode_prompt = lambda prompt, **_: tuple(words(t, *s) for s in ((1, 12, 32), (1, 24)) for t in (prompt, ""))
    elif name == "wan":
        pipe.encode_prompt = lambda prompt, **_: (words(prompt, 1, 12, 32), words("", 1, 12, 32))
    else:
        width = pipe.transformer.config.cap_feat_dim
        pipe.encode_prompt = lambda prompt, **_: ([words(prompt, 12, width)], [words("", 12, width)])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(name: str, folder: Path, **settings: Any) -> tuple[Any, Any]:
    """A distilled pipeline and the result."""
    pipe = accelerate(pipeline(name), CLEAR(1.5))
    config = tiny.quick(folder, train="attention", **settings)
    return pipe, distill(pipe, PROMPTS, config, progress=False, **CALLS[name])


# Both predictions are recorded, learned from and evaluated


@pytest.mark.parametrize("name", CALLS)
def test_both_predictions_are_recorded(tmp_path: Path, name: str) -> None:
    samples = collect(pipeline(name), PROMPTS[:1], tmp_path, **CALLS[name])
    assert len(samples) == FORWARDS[name]
    first = samples[0]
    if name == "flux":
        assert float(first.arguments["guidance"]) == 2.5
    elif name == "sd3":
        assert first.arguments["hidden_states"].shape[0] == first.prediction.shape[0] == 2 * len(first.latents)
        assert torch.equal(*first.arguments["hidden_states"].split(1))
        assert not torch.equal(*first.prediction.split(1))
    elif name == "wan":
        assert torch.equal(first.arguments["hidden_states"], samples[1].arguments["hidden_states"])
        assert not torch.equal(first.prediction, samples[1].prediction)
    else:
        assert len(first.arguments["x"]) == len(first.prediction) == 2
        assert not torch.equal(*first.prediction.split(1))


@pytest.mark.parametrize("name", CALLS)
def test_the_loss_and_the_error_see_both(tmp_path: Path, name: str) -> None:
    """The error of a step is that of the whole recorded forward; the steps draw conditional and unconditional ones alike."""
    _, result = run(name, tmp_path, steps=12, learning_rate=1e-12, attention_weight=0.0)
    samples, other = Samples(tmp_path / "samples"), accelerate(pipeline(name), CLEAR(1.5))
    with torch.no_grad(), always(other):
        pairs = [(predict(other.transformer, f.arguments), f.prediction) for f in map(samples.__getitem__, range(len(samples)))]
    errors = [float((got - expected).square().mean() / expected.square().mean()) for got, expected in pairs]
    nearest = [min(range(len(errors)), key=lambda i: abs(errors[i] - row["prediction"])) for row in tiny.steps_of(result)]
    for row, index in zip(tiny.steps_of(result), nearest, strict=True):
        assert row["prediction"] == pytest.approx(errors[index], rel=1e-3)
    assert {index % 2 for index in nearest} == {0, 1}
    with always(other):
        assert result.error_before == pytest.approx(velocity_error(other, Samples(tmp_path / "held-out")), rel=1e-5)


def test_each_half_of_a_batch_weighs_in_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Tensor, Tensor]] = []
    real = distillation.relative_error

    def watched(value: Tensor, target: Tensor) -> Tensor:
        value.retain_grad()
        seen.append((value, target))
        return real(value, target)

    monkeypatch.setattr(distillation, "relative_error", watched)
    run("sd3", tmp_path, steps=1, attention_weight=0.0)
    ((value, target),) = seen
    assert value.shape == target.shape == (2, *target.shape[1:])
    assert value.grad is not None
    assert all(float(half.abs().max()) > 0 for half in value.grad)


@pytest.mark.parametrize("name", CALLS)
def test_the_error_falls(tmp_path: Path, name: str) -> None:
    _, result = run(name, tmp_path, steps=30, learning_rate=3e-3)
    assert result.error_after < 0.97 * result.error_before


# Flow matching


@pytest.mark.parametrize("name", CALLS)
def test_flow_matching_draws_between_the_levels_of_the_run(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The denoiser gets (1 − σ)·latents + σ·noise at the timestep of σ in every item, and the target is the way between them."""
    seen: list[tuple[dict[str, Any], Tensor, Any]] = []
    real = distillation._flow_inputs
    runs: list[Any] = []

    def watched(run: Any, forward: Any, position: int, draw: Any) -> Any:
        runs.append((run, forward))
        seen.append(real(run, forward, position, draw))
        return seen[-1]

    monkeypatch.setattr(distillation, "_flow_inputs", watched)
    _, result = run(name, tmp_path, steps=16, flow_weight=0.5, attention_weight=0.0)
    levels = []
    for (arguments, target, moment), (training, forward), row in zip(seen, runs, tiny.steps_of(result), strict=True):
        assert moment is None  # no spec depends on it
        flow = training.flow
        sigma, own = flow.sigma_of(arguments), forward.arguments[flow.latents]
        levels.append(sigma)
        items = list(arguments[flow.latents])
        assert len(items) == len(list(own))
        assert all(torch.equal(item, items[0]) for item in items)
        noise = flow.sign * target + forward.latents
        expected = (1 - sigma) * forward.latents + sigma * noise
        assert torch.allclose(items[0].flatten(), expected.flatten(), atol=1e-5)
        assert 0.8 < float(noise.std()) < 1.2
        assert row["loss"] == pytest.approx(row["prediction"] + 0.5 * row["flow"], rel=1e-5)
    samples = Samples(tmp_path / "samples")
    recorded = training.flow.levels(samples, 0)
    assert len(recorded) == STEPS + 1
    assert recorded == sorted(recorded, reverse=True)
    assert (recorded[0], recorded[-1]) == (pytest.approx(1.0, abs=0.01), 0.0)
    assert 0 <= min(levels) < max(levels) <= 1
    assert len({round(level, 4) for level in levels}) > 12  # a level that two calls share is not drawn by itself


@pytest.mark.parametrize(("name", "sign"), [("flux", 1), ("sd3", 1), ("wan", 1), ("z_image", -1)])
def test_where_predictions_point_is_read_off_the_run(tmp_path: Path, name: str, sign: int) -> None:
    pipe = accelerate(pipeline(name), CLEAR(1.5))
    samples = collect(pipe, PROMPTS[:1], tmp_path, **CALLS[name])
    flow = recorded_flow(pipe, pipe.transformer._dit_accel.context.family, samples)
    whole = 1000.0 if name in ("sd3", "wan") else 1.0
    assert flow == Flow("t" if name == "z_image" else "timestep", "x" if name == "z_image" else "hidden_states", whole, sign < 0, sign)
    # Euler's last step goes from σ to the final latents along the guided prediction
    assert next(flow.sigma_of(samples[p].arguments) for p in samples.runs()[0]) == pytest.approx(1.0, abs=0.01)


# What is refused, before the first step


def not_flow() -> Any:
    pipe = pipeline("sd3")
    pipe.scheduler = diffusers.DDIMScheduler()
    return pipe


def test_a_pipeline_without_flow_matching_is_refused(tmp_path: Path) -> None:
    source, held_out = (collect(pipeline("sd3"), [p], tmp_path / p[:5], **CALLS["sd3"]) for p in PROMPTS[:2])
    pipe = accelerate(not_flow(), CLEAR(1.5))
    with pytest.raises(DistillationError, match="StableDiffusion3Pipeline with DDIMScheduler"):
        learn(pipe, tmp_path / "run", source, held_out, train="attention", flow_weight=1.0)
    assert not list((tmp_path / "run").glob("log.jsonl"))
    learn(pipe, tmp_path / "run", source, held_out, train="attention")  # recorded steps need no convention


def test_latents_beside_others_are_refused(tmp_path: Path) -> None:
    """A denoiser that gets a condition among its latents."""
    samples = collect(pipeline("sd3"), PROMPTS[:1], tmp_path, **CALLS["sd3"])
    pipe = accelerate(pipeline("sd3"), CLEAR(1.5))
    family = pipe.transformer._dit_accel.context.family

    class Wider:
        def __getitem__(self, position: int) -> Any:
            forward = samples[position]
            return dataclasses.replace(forward, latents=forward.latents[:, :2])

        def runs(self) -> Any:
            return samples.runs()

    with pytest.raises(DistillationError, match=r"have shape \(2, 4, 16, 24\), not that of the final ones, \(1, 2, 16, 24\)"):
        recorded_flow(pipe, family, Wider())  # type: ignore[arg-type]


def test_predictions_that_point_nowhere_are_refused(tmp_path: Path) -> None:
    samples = collect(pipeline("sd3"), PROMPTS[:1], tmp_path, **CALLS["sd3"])
    pipe = accelerate(pipeline("sd3"), SLA(0.3))

    class Noise:
        def __getitem__(self, position: int) -> Any:
            forward = samples[position]
            return dataclasses.replace(forward, prediction=words(str(position), *forward.prediction.shape))

        def runs(self) -> Any:
            return samples.runs()

    with pytest.raises(DistillationError, match="point from pictures to noise"):
        recorded_flow(pipe, pipe.transformer._dit_accel.context.family, Noise())  # type: ignore[arg-type]


def test_several_noise_levels_in_a_forward_are_refused() -> None:
    with pytest.raises(DistillationError, match="one noise level in a forward"):
        Flow("timestep", "hidden_states", 1000.0, False).sigma_of({"timestep": torch.tensor([0.0, 900.0])})
