"""The moment of every forward in its run: the noise level under each kind of scheduler, and the step next to it."""

import copy
import itertools
from typing import Any

import diffusers as D
import pytest
import torch
from conftest import forward_arguments, normal, tiny_transformer
from test_families import SPARSE, Tiny
from test_steps import Heun

import dit_accel
from dit_accel import Assignment, Rule
from dit_accel.finetune.moments import recorded_moments
from dit_accel.method.assignment import Moment
from dit_accel.patch.steps import Steps, noise_of

NOISY = Assignment((Rule(SPARSE["fovea"], noise=(0.0, 1.0)),))


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[Moment]:
    """Grows by the moment of every forward."""
    found: list[Moment] = []
    real = Steps.moment

    def recorded(self: Steps, *args: Any, **kwargs: Any) -> Moment:
        found.append(real(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Steps, "moment", recorded)
    return found


def accelerated(name: str) -> Tiny:
    tiny = Tiny(name)
    dit_accel.accelerate(tiny.pipe, NOISY)
    return tiny


def once_each(moments: list[Moment]) -> list[Moment]:
    """Without the second pass of guidance, which must be at the moment of the first."""
    return [moment for moment, _ in itertools.groupby(moments)]


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "z_image", "lumina2", "qwen_image", "ltx", "hunyuan_video", "mochi"])
def test_flow_matching_tells_sigma(name: str, moments: list[Moment]) -> None:
    tiny = accelerated(name)
    tiny.run(num_inference_steps=4)
    scheduler = tiny.pipe.scheduler
    sigmas = scheduler.sigmas[:4].double().cpu()
    if scheduler.config.get("invert_sigmas", False):
        sigmas = 1 - sigmas
    found = once_each(moments)
    assert [moment.step for moment in found][-4:] == [0, 1, 2, 3]
    assert [moment.noise for moment in found][-4:] == pytest.approx(sigmas.tolist(), abs=1e-6)
    assert found[-4].noise > 0.9  # as the run begins with noise, whichever way its timesteps go


@pytest.mark.parametrize("name", ["pixart_sigma", "cogvideox", "hunyuan_dit", "dit", "latte", "allegro"])
def test_others_tell_the_share_of_training_timesteps(name: str, moments: list[Moment]) -> None:
    tiny = accelerated(name)
    tiny.run(num_inference_steps=3)
    times = [float(t) / tiny.pipe.scheduler.config.num_train_timesteps for t in tiny.pipe.scheduler.timesteps]
    found = once_each(moments)
    assert [moment.step for moment in found] == [0, 1, 2]
    assert [moment.noise for moment in found] == pytest.approx(times, abs=1e-9)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_two_evaluations_of_a_step_have_noise_levels_of_their_own(name: str, moments: list[Moment]) -> None:
    tiny = accelerated(name)
    tiny.pipe.scheduler = Heun(shift=2.0)
    tiny.run(num_inference_steps=3)
    found = once_each(moments)
    assert [moment.step for moment in found] == [0, 0, 1, 1, 2]
    assert [moment.noise for moment in found] == pytest.approx(tiny.pipe.scheduler.sigmas[:5].tolist(), abs=1e-6)
    assert found[1].noise == found[2].noise < found[0].noise


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_a_late_start_has_its_own_noise_level_and_step_0(name: str, moments: list[Moment]) -> None:
    tiny = accelerated(name)
    kind = {"flux": D.FluxImg2ImgPipeline, "sd3": D.StableDiffusion3Img2ImgPipeline}[name]
    parts = {k: v for k, v in tiny.pipe.components.items() if k in kind._get_signature_keys(kind)[0]}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in tiny.call.items() if k != "num_inference_steps"}
    height, width = (call[side] // pipe.vae_scale_factor for side in ("height", "width"))
    for strength in (0.5, 1.0):
        moments.clear()
        pipe(image=normal(1, parts["vae"].config.latent_channels, height, width), strength=strength, num_inference_steps=6, **call)
        found, begun = once_each(moments), round(6 * (1 - strength))
        assert [moment.step for moment in found] == list(range(6 - begun))
        assert [moment.noise for moment in found] == pytest.approx(pipe.scheduler.sigmas[begun:6].tolist(), abs=1e-6)


@pytest.mark.parametrize("name", ["flux", "wan", "cogvideox"])
def test_interrupted_and_one_step_runs_and_runs_of_two_pipelines(name: str, moments: list[Moment]) -> None:
    tiny = accelerated(name)
    tiny.run(num_inference_steps=3)
    expected = list(moments)

    def stop(*_: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    other = type(tiny.pipe)(**{**tiny.pipe.components, "scheduler": copy.deepcopy(tiny.pipe.scheduler)})
    other.set_progress_bar_config(disable=True)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            tiny.run(num_inference_steps=5, callback_on_step_end=stop)
        moments.clear()
        tiny.run(num_inference_steps=1)
        assert {moment.step for moment in moments} == {0}
        assert moments[0].noise == pytest.approx(float(tiny.pipe.scheduler.timesteps[0]) / 1000, abs=1e-6)
        moments.clear()
        other(**{**tiny.call, "num_inference_steps": 3})
        assert moments == expected
        moments.clear()
        tiny.run(num_inference_steps=3)
        assert moments == expected


def test_a_schedule_that_is_never_stepped_is_read_by_its_timesteps(moments: list[Moment]) -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), NOISY)

    class Frames:
        """A loop that steps copies of its scheduler."""

        def __init__(self) -> None:
            self.scheduler = D.FlowMatchEulerDiscreteScheduler(shift=3.0)

        def run(self) -> None:
            self.scheduler.set_timesteps(4)
            for time in self.scheduler.timesteps:
                with torch.no_grad():
                    transformer(**forward_arguments(4, 5) | {"timestep": time[None] / 1000})

    frames = Frames()
    frames.run()
    assert [moment.step for moment in moments] == [0, 1, 2, 3]
    assert [moment.noise for moment in moments] == pytest.approx(frames.scheduler.sigmas[:4].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("timestep", "rising", "noise"),
    [
        (torch.tensor([0.7]), False, 0.7),
        (torch.tensor([1.0]), False, 1.0),
        (torch.tensor([700.0]), False, 0.7),
        (torch.tensor([1]), False, 0.001),  # integers count to the thousand
        (torch.tensor([0.3]), True, 0.7),
        (torch.tensor([0.0]), True, 1.0),
        (torch.tensor([250.0]), True, 0.75),
        (torch.tensor([[0.0, 0.6, 0.6]]), False, 0.6),  # the given first frame of a video is no noise
        (torch.tensor([[1.0, 0.4]]), True, 0.6),
    ],
)
def test_the_noise_level_of_a_timestep_by_itself(timestep: torch.Tensor, rising: bool, noise: float) -> None:
    assert noise_of(timestep, rising=rising) == pytest.approx(noise)


def test_two_transformers_of_a_pipeline_share_the_steps_of_a_run(moments: list[Moment]) -> None:
    """Noise levels tell the experts apart, and a forward that is recorded is at the moment at which it ran."""
    tiny = accelerated("wan22_two_experts")
    with recorded_moments(tiny.transformers) as recorded:
        tiny.run(num_inference_steps=4)
    both = [once_each(own) for own in recorded]
    assert [moment.step for own in both for moment in own] == [0, 1, 2, 3]
    assert all(both)
    assert min(moment.noise for moment in both[0]) > max(moment.noise for moment in both[1])
    assert set(moments) == {moment for own in both for moment in own}
