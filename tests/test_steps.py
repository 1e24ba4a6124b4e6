"""Which steps are dense: those at the start of every run, whatever ran before, inside or next to it, under any scheduler."""

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import diffusers as D
import pytest
import torch
from conftest import LAYERS, forward_arguments, normal, tiny_transformer
from test_families import SPARSE, Tiny
from torch import Tensor

import dit_accel
from dit_accel.method.assignment import Assignment
from dit_accel.patch.steps import Steps

WITH_IDS, WITHOUT = "flux", "sd3"
FEW = ["flux", "sd3", "wan"]
MORE = ["z_image", "ltx", "qwen_image", "hunyuan_video", "cogvideox"]  # the last one's scheduler tells no index of its step


def give_dense_steps(model: Any, steps: int) -> None:
    context = model._dit_accel.context
    context.assignment = Assignment.of(context.assignment.after_dense_steps, dense_steps=steps)


class Counted:
    """A tiny accelerated pipeline whose calls of the operator are counted."""

    def __init__(self, name: str, calls: list[Any], dense_steps: int = 1) -> None:
        self.tiny, self.calls = Tiny(name), calls
        self.pipe = dit_accel.accelerate(self.tiny.pipe, SPARSE["fovea"], strict=True)
        self.layers = self.count(num_inference_steps=2)[0] // 2  # calls per step
        for model in self.tiny.transformers:
            give_dense_steps(model, dense_steps)

    def count(self, **changes: Any) -> tuple[int, Tensor]:
        """Calls of the operator in one run, and what it draws."""
        self.calls.clear()
        drawn = self.tiny.run(**changes)
        return len(self.calls), drawn

    def cancel(self, after: int = 0, **changes: Any) -> None:
        """A run that a user stops after one of its steps."""

        def stop(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if step == after:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            self.tiny.run(callback_on_step_end=stop, **changes)

    def other(self) -> Any:
        """Another pipeline around the same transformer, with a scheduler of its own."""
        parts = {**self.pipe.components, "scheduler": copy.deepcopy(self.pipe.scheduler)}
        pipe = type(self.pipe)(**{k: v for k, v in parts.items() if k in type(self.pipe)._get_signature_keys(type(self.pipe))[0]})
        pipe.set_progress_bar_config(disable=True)
        return pipe


@pytest.fixture
def counted(name: str, sparse_calls: list[Any]) -> Counted:
    return Counted(name, sparse_calls)


@pytest.mark.parametrize("name", FEW + MORE)
def test_one_step_runs_and_runs_after_a_cancelled_one(counted: Counted) -> None:
    expected, first = counted.count(num_inference_steps=3)
    assert expected == 2 * counted.layers
    seeds = [torch.Generator().manual_seed(n) for n in range(2)]
    assert [counted.count(num_inference_steps=1, generator=g)[0] for g in seeds] == [0, 0]
    counted.cancel(num_inference_steps=3, generator=torch.Generator().manual_seed(5))
    again, second = counted.count(num_inference_steps=3)
    assert again == expected
    assert torch.equal(second, first)


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("after", [0, 1])
def test_a_run_is_the_same_after_any_other(counted: Counted, after: int) -> None:
    counts = [counted.count(num_inference_steps=steps)[0] for steps in (4, 2, 1, 3)]
    assert counts == [3 * counted.layers, counted.layers, 0, 2 * counted.layers]
    counted.cancel(after, num_inference_steps=4)
    assert counted.count(num_inference_steps=2)[0] == counted.layers


@pytest.mark.parametrize("name", FEW)
def test_a_preview_inside_a_run_counts_by_itself(counted: Counted) -> None:
    expected, drawn = counted.count(num_inference_steps=4)
    preview, inner = counted.other(), []

    def show(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        before = len(counted.calls)
        preview(**{**counted.tiny.call, "generator": torch.Generator().manual_seed(9), "num_inference_steps": 2})
        inner.append(len(counted.calls) - before)
        return {}

    got, same = counted.count(num_inference_steps=4, callback_on_step_end=show)
    assert inner == [counted.layers] * 4
    assert got - sum(inner) == expected
    assert torch.equal(same, drawn)


class Heun(D.FlowMatchHeunDiscreteScheduler):
    """Two evaluations a step, for pipelines that bring noise levels of their own, too."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps or len(sigmas), device)


@pytest.mark.parametrize("name", FEW)
def test_a_step_of_two_evaluations_is_one_step(counted: Counted) -> None:
    counted.pipe.scheduler = Heun(shift=2.0)
    evaluations = [2 * counted.layers] * 2 + [counted.layers]  # the last step has one
    assert counted.count(num_inference_steps=3)[0] == sum(evaluations[1:])
    assert counted.count(num_inference_steps=1)[0] == 0
    counted.cancel(2, num_inference_steps=3)
    assert counted.count(num_inference_steps=3)[0] == sum(evaluations[1:])


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "mochi"])
def test_a_rising_schedule_is_accelerated(counted: Counted) -> None:
    config = counted.pipe.scheduler.config
    counted.pipe.scheduler = D.FlowMatchEulerDiscreteScheduler.from_config(config, invert_sigmas=True)
    assert [counted.count(num_inference_steps=3)[0] for _ in range(2)] == [2 * counted.layers] * 2


@pytest.mark.parametrize("name", ["wan", "qwen_image"])
def test_guidance_in_two_passes_counts_once(counted: Counted) -> None:
    guided = {"guidance_scale": 1.0} if counted.tiny.name == "wan" else {"true_cfg_scale": 1.0}
    single, _ = counted.count(num_inference_steps=3, **guided)
    both, _ = counted.count(num_inference_steps=3)
    assert (single, both) == (counted.layers, 2 * counted.layers)  # `layers` counts both passes


@pytest.mark.parametrize("name", ["flux", "sd3"])
@pytest.mark.parametrize("cancelled", [False, True])
def test_a_late_start_has_its_dense_steps(counted: Counted, name: str, cancelled: bool) -> None:
    kind = {"flux": D.FluxImg2ImgPipeline, "sd3": D.StableDiffusion3Img2ImgPipeline}[name]
    parts = {k: v for k, v in counted.pipe.components.items() if k in kind._get_signature_keys(kind)[0]}
    pipe = kind(**parts)
    pipe.set_progress_bar_config(disable=True)
    call = {k: v for k, v in counted.tiny.call.items() if k != "num_inference_steps"}
    height, width = (call[side] // pipe.vae_scale_factor for side in ("height", "width"))
    image = normal(1, parts["vae"].config.latent_channels, height, width)  # latents
    if cancelled:
        counted.cancel(1, num_inference_steps=6)
    for _ in range(2):
        counted.calls.clear()
        pipe(image=image, strength=0.5, num_inference_steps=6, generator=torch.Generator().manual_seed(0), **call)
        assert len(counted.calls) == 2 * counted.layers  # of the last three steps


@pytest.mark.parametrize("together", [True, False], ids=["accelerated-together", "one-by-one"])
def test_two_transformers_count_one_run(together: bool, sparse_calls: list[Any]) -> None:
    tiny, counts = Tiny("wan22_two_experts"), []
    for dense_steps in (0, 1, 2, 3):
        for target in [tiny.pipe] if together else tiny.transformers:
            dit_accel.accelerate(target, SPARSE["fovea"], strict=True, dense_steps=dense_steps)
        sparse_calls.clear()
        tiny.run(num_inference_steps=4)
        counts.append(len(sparse_calls))
        dit_accel.restore(tiny.pipe)
    assert counts == [counts[0] * n // 4 for n in (4, 3, 2, 1)]
    assert all(tiny.pipe.boundary_ratio * 1000 != t for t in tiny.pipe.scheduler.timesteps)


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_threads_count_their_own_runs(counted: Counted, name: str) -> None:
    pipes, lengths = [counted.other(), counted.other()], (3, 5)

    def draw(pipe: Any, steps: int) -> None:
        pipe(**{**counted.tiny.call, "generator": torch.Generator().manual_seed(0), "num_inference_steps": steps})

    counted.calls.clear()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(draw, *each) for each in zip(pipes, lengths, strict=True)]:
            done.result()
    assert len(counted.calls) == (2 + 4) * counted.layers


@pytest.mark.parametrize("name", ["flux", "cogvideox"])
def test_nothing_is_left_on_a_scheduler(counted: Counted, name: str) -> None:
    scheduler = counted.pipe.scheduler
    stock = Tiny(name)
    stock.run()
    counted.tiny.run()
    assert vars(scheduler).keys() == vars(stock.pipe.scheduler).keys()
    gone = weakref.ref(scheduler)
    counted.pipe.scheduler = copy.deepcopy(scheduler)
    del scheduler
    gc.collect()
    assert gone() is None, "a replaced scheduler is kept alive"
    assert counted.count(num_inference_steps=3)[0] == 2 * counted.layers


# Transformers in a loop without a scheduler


def loop(transformer: Any, times: list[float], passes: int = 1, dtype: torch.dtype = torch.float32) -> None:
    """Forwards with these timesteps and latents that differ from step to step."""
    for n, time in enumerate(times):
        arguments = forward_arguments(4, 5, seed=n) | {"timestep": torch.tensor([time], dtype=dtype)}
        for _ in range(passes):
            with torch.no_grad():
                transformer(**arguments)


FALLING, RISING = [1.0, 0.7, 0.3], [0.0, 0.3, 0.7]
LOOPS = {
    "falling": ([FALLING, FALLING, FALLING], 6),
    "rising": ([RISING, RISING], 4),
    "one-step": ([[1.0], [1.0], [1.0]], 0),
    "stopped": ([FALLING[:1], FALLING, FALLING[:2], FALLING], 5),
    "two-steps": ([FALLING[:2], FALLING[:2], FALLING], 4),
    "two-steps-rising": ([RISING[:2], RISING[:2], RISING], 4),
}


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("runs", "sparse"), LOOPS.values(), ids=LOOPS)
def test_a_bare_transformer_is_counted_by_its_timesteps(runs: list[list[float]], sparse: int, passes: int, sparse_calls: list[Any]) -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), SPARSE["fovea"], dense_steps=1)
    for times in runs:
        loop(transformer, times, passes)
    assert len(sparse_calls) == sparse * passes * LAYERS


def test_timesteps_that_bfloat16_rounds_together_are_steps() -> None:
    steps, latents = Steps(), [normal(1, 4, seed=n) for n in range(4)]
    times = [torch.tensor([t], dtype=torch.bfloat16) for t in (1.0, 0.9999, 0.9998, 0.5)]
    assert [steps.moment(t, x).step for t, x in zip(times, latents, strict=True) for _ in range(2)] == [0, 0, 1, 1, 2, 2, 3, 3]


def test_tokens_with_timesteps_of_their_own() -> None:
    """The first frame of a video is given: its timestep stays where the others' fall."""
    steps = Steps()
    times = [torch.tensor([[0.0, t, t]]) for t in (1.0, 0.6, 0.2, 1.0, 0.6)]
    assert [steps.moment(t, normal(1, 4)).step for t in times] == [0, 1, 2, 0, 1]


class Frames:
    """A loop that steps copies of its scheduler, as diffusion forcing does for each frame."""

    def __init__(self, transformer: Any) -> None:
        self.transformer, self.scheduler = transformer, D.FlowMatchEulerDiscreteScheduler()

    def run(self, steps: int, draw: Callable[..., None] = loop) -> None:
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            draw(self.transformer, [float(time)], 2)


def test_a_scheduler_that_is_never_stepped_itself(sparse_calls: list[Any]) -> None:
    frames = Frames(dit_accel.accelerate(tiny_transformer(), SPARSE["fovea"], dense_steps=2))
    for _ in range(2):
        frames.run(5)
    frames.run(1)
    assert len(sparse_calls) == 2 * 3 * 2 * LAYERS
