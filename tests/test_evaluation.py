"""`evaluate` on tiny pipelines: numbers against others computed independently, the noise floor, intervals, and what is refused."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_video
import torch
from conftest import fill_randomly
from distill_fixtures import CALL, LORA_SPEC, PROMPTS, draw, half_pipe, learn, picture_pipe
from helpers import oracle
from PIL import Image
from tiny_parts import emb
from torch import Tensor

from dit_accel import CLEAR, Assignment, Rule, accelerate, dense, restore
from dit_accel.finetune.data.collect import Recorder, collect
from dit_accel.measure import evaluation
from dit_accel.measure.bootstrap import Bootstrap
from dit_accel.measure.capture import Captured, capture_inputs, deviation, exact_attention
from dit_accel.measure.evaluation import attention_forwards, evaluate
from dit_accel.measure.similarity import compare
from dit_accel.operator import guard
from dit_accel.operator.layout import TokenLayout, raster_order
from dit_accel.patch.anatomy import forward_names
from dit_accel.patch.state import operators_of

METHOD = CLEAR(2)
LAYERS = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
SIDES = ["method", "bfloat16", "again"]


def paint(pipe: Any, prompt: str, seed: int) -> Tensor:
    """A picture, or the frames of a video, as the pipeline gives them: `[F, 3, H, W]`."""
    output = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **CALL)
    return torch.from_numpy(np.asarray(output.images)).permute(0, 3, 1, 2).double()


def decibels(picture: Tensor, original: Tensor) -> float:
    return -10 * math.log10(float((picture.double() - original.double()).square().mean()))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What evaluating a sparse method over three prompts returned, and the folder it wrote."""
    out = tmp_path_factory.mktemp("evaluation")
    return evaluate(accelerate(picture_pipe(), METHOD), PROMPTS, out, seed=5, **CALL), out


def test_pictures_are_compared_by_the_formulas(result: tuple[dict[str, Any], Path]) -> None:
    record, _ = result
    pipe = picture_pipe()
    originals = [paint(pipe, prompt, 5 + i) for i, prompt in enumerate(PROMPTS)]
    accelerate(pipe, METHOD)
    pictures = [paint(pipe, prompt, 5 + i) for i, prompt in enumerate(PROMPTS)]
    found = record["measures"]["method"]
    expected = [decibels(*pair) for pair in zip(pictures, originals, strict=True)]
    assert found["psnr"]["by_prompt"] == pytest.approx(expected, rel=1e-5)
    assert found["psnr"]["mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert found["difference"]["by_prompt"] == pytest.approx([10 ** (-d / 20) for d in expected], rel=1e-5)
    assert 0 < found["ssim"]["mean"] < 1
    assert "distance" not in found
    assert evaluation.NO_DISTANCE in record["notes"]


def test_velocity_errors_are_those_of_recorded_forwards(result: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    record, _ = result
    pipe = picture_pipe()
    samples = collect(pipe, PROMPTS, tmp_path, seed=5, **CALL)
    accelerate(pipe, METHOD)
    errors: dict[float, list[float]] = {}
    for i in range(len(samples)):
        forward = samples[i]
        with torch.no_grad():
            got = pipe.transformer(**forward.arguments, return_dict=False)[0].double()
        error = (got - forward.prediction.double()).norm() / forward.prediction.double().norm()
        errors.setdefault(float(forward.arguments["timestep"]), []).append(float(error))
    assert [level["timestep"] for level in record["noise_levels"]] == sorted(errors)
    for level in record["noise_levels"]:
        assert level["method"]["by_prompt"] == pytest.approx(errors[level["timestep"]], rel=1e-4)
    by_prompt = [np.mean([errors[t][i] for t in errors]) for i in range(len(PROMPTS))]
    assert record["measures"]["method"]["velocity_error"]["by_prompt"] == pytest.approx(by_prompt, rel=1e-4)


def test_the_noise_floor(result: tuple[dict[str, Any], Path]) -> None:
    record, _ = result
    again, half, method = (record["measures"][side] for side in ("again", "bfloat16", "method"))
    assert again["difference"]["by_prompt"] == again["velocity_error"]["by_prompt"] == [0.0] * 3
    assert again["psnr"]["mean"] is again["psnr"]["low"] is None  # infinite
    assert 1e-4 < half["velocity_error"]["mean"] < method["velocity_error"]["mean"]
    assert half["psnr"]["mean"] > method["psnr"]["mean"]
    above = record["method_minus_bfloat16"]["velocity_error"]
    assert above["by_prompt"] == [
        a - b for a, b in zip(method["velocity_error"]["by_prompt"], half["velocity_error"]["by_prompt"], strict=True)
    ]
    assert above["low"] > 0
    assert not any("repeatable" in note for note in record["notes"])


def original_inputs() -> list[Captured]:
    """Attention inputs of the first forward of the first prompt, by the original's layers, in raster order."""
    pipe = accelerate(picture_pipe(), METHOD)
    with dense(pipe), Recorder(pipe.transformer, forward_names(pipe.transformer)) as recorder:
        draw(pipe)
    arguments, prediction = recorder.forwards[0]
    forward = evaluation.Forward(arguments, prediction, prediction, "", 0, 0)
    return capture_inputs(pipe.transformer, forward)


def in_raster(captured: Captured) -> tuple[list[Tensor], TokenLayout]:
    layout = captured.layout
    places = torch.cat([torch.arange(layout.text), layout.text + raster_order(layout.grid, layout.order)])
    return [x[:, :, places] for x in (captured.query, captured.key, captured.value)], TokenLayout(layout.grid, layout.text)


def test_errors_and_mass_of_heads_are_those_of_dense_masks() -> None:
    found = original_inputs()
    assert [captured.layer for captured in found] == LAYERS
    for captured in found:
        qkv, layout = in_raster(captured)
        image = slice(layout.text, None)
        sparse, kept = (x[:, :, image] for x in oracle(*qkv, METHOD, layout))
        full, whole = (x[:, :, image] for x in oracle(*qkv, CLEAR(1000), layout))
        got = deviation(captured, exact_attention(captured), METHOD)
        error = (sparse - full).flatten(2).norm(dim=2)[0] / full.flatten(2).norm(dim=2)[0]
        assert (got.error / got.size).sqrt().tolist() == pytest.approx(error.tolist(), rel=1e-4)
        assert got.mass.tolist() == pytest.approx((kept - whole).exp().mean((0, 2)).tolist(), rel=1e-4)
        assert 0 < float(got.mass.max()) < 1


def test_layers_and_heads_are_means_of_all_prompts(result: tuple[dict[str, Any], Path]) -> None:
    record, _ = result
    heads, measures = record["heads"], record["measures"]["method"]
    assert [layer["layer"] for layer in heads] == LAYERS
    assert all(len(layer["error"]) == len(layer["kept_mass"]) == 2 for layer in heads)
    assert measures["kept_mass"]["mean"] == pytest.approx(np.mean([layer["kept_mass"] for layer in heads]), rel=1e-5)
    assert 0 < measures["attention_error"]["low"] < measures["attention_error"]["mean"] < measures["attention_error"]["high"]
    assert min(min(layer["error"]) for layer in heads) < measures["attention_error"]["mean"] < max(max(layer["error"]) for layer in heads)
    assert [attention_forwards(n) for n in (1, 2, 8)] == [[0], [0, 1], [0, 4, 7]]


@pytest.mark.usefixtures("numbers_only")
def test_all_of_the_attention_is_the_original_to_rounding(result: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    sparse = result[0]["measures"]["method"]
    record = evaluate(accelerate(picture_pipe(), CLEAR(1000)), PROMPTS[:2], tmp_path, seed=5, **CALL)
    found, half = (record["measures"][side] for side in ("method", "bfloat16"))
    assert found["velocity_error"]["mean"] < 1e-5
    assert found["attention_error"]["mean"] < 1e-5
    assert found["kept_mass"]["by_prompt"] == pytest.approx([1, 1], abs=1e-5)
    assert found["psnr"]["mean"] is None or found["psnr"]["mean"] > sparse["psnr"]["mean"] + 40
    assert half["velocity_error"]["mean"] > 10 * found["velocity_error"]["mean"]
    assert record["method_minus_bfloat16"]["velocity_error"]["high"] < 0


def test_the_folder_holds_what_was_returned(result: tuple[dict[str, Any], Path]) -> None:
    record, out = result
    names = {f"{side}-{i}.png" for side in ("original", "method", "bfloat16") for i in range(3)}
    assert {file.name for file in out.iterdir()} == names | {"results.json", "report.html", "noise-levels.png", "heads.png"}
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(record, allow_nan=False))
    assert record["interval"] == {"level": 0.95, "resamples": 10_000, "seed": 0, "over": "prompts"}
    assert Image.open(out / "method-1.png").size == (144, 112)
    page = (out / "report.html").read_text()
    assert page.count("data:image/") == 3 * 3 + 2
    assert "http" not in page
    assert all(text in page for text in ("95% intervals", *PROMPTS, f"{record['measures']['method']['psnr']['mean']:.2f}"))


@pytest.mark.usefixtures("numbers_only")
def test_the_pipeline_is_left_as_it_was(tmp_path: Path) -> None:
    pipe = picture_pipe()
    original = draw(pipe)
    accelerate(pipe, METHOD, dense_steps=1)
    before = draw(pipe)
    evaluate(pipe, PROMPTS[:1], tmp_path, **CALL)
    assert torch.equal(draw(pipe), before)
    assert not torch.equal(before, original)
    assert torch.equal(draw(restore(pipe)), original)


@pytest.mark.usefixtures("numbers_only")
@pytest.mark.parametrize("mode", ["lora", "attention"])
def test_a_distilled_pipeline_is_compared_with_the_weights_it_had(mode: str, tmp_path: Path) -> None:
    original = [paint(picture_pipe(), prompt, i) for i, prompt in enumerate(PROMPTS[:2])]
    pipe = accelerate(picture_pipe(), LORA_SPEC)
    learn(pipe, tmp_path / "run", PROMPTS[2:], PROMPTS[:1], train=mode)
    distilled = [paint(pipe, prompt, i) for i, prompt in enumerate(PROMPTS[:2])]
    record = evaluate(pipe, PROMPTS[:2], tmp_path / "out", **CALL)["measures"]
    expected = [decibels(*pair) for pair in zip(distilled, original, strict=True)]
    assert record["method"]["psnr"]["by_prompt"] == pytest.approx(expected, rel=1e-4)
    assert record["again"]["difference"]["mean"] == record["again"]["velocity_error"]["mean"] == 0
    assert torch.equal(paint(pipe, PROMPTS[0], 0), distilled[0])


@pytest.mark.crossover
@pytest.mark.usefixtures("numbers_only")
def test_the_method_is_measured_even_where_it_is_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(guard, "measured", lambda *shape: asked.append(shape) or guard.Crossover(accelerated=2.0, original=1.0))
    pipe = accelerate(picture_pipe(), METHOD)
    record = evaluate(pipe, PROMPTS[:1], tmp_path, **CALL)
    assert asked == []
    assert record["guard"].startswith("never asked")
    found = record["measures"]["method"]
    assert all(found[name]["mean"] > 1e-3 for name in ("difference", "velocity_error", "attention_error"))
    assert torch.equal(draw(pipe), draw(picture_pipe()))  # which is left to the original


@pytest.mark.usefixtures("numbers_only")
def test_dense_steps_are_in_the_pictures_alone(tmp_path: Path) -> None:
    record = evaluate(accelerate(picture_pipe(), METHOD, dense_steps=2), PROMPTS[:1], tmp_path, **CALL)
    assert record["measures"]["method"]["difference"]["mean"] == 0
    assert record["measures"]["method"]["velocity_error"]["mean"] > 0.01
    assert any(note.startswith("The first 2 steps") for note in record["notes"])


@pytest.mark.usefixtures("numbers_only")
def test_an_assignment_is_measured_where_it_runs(tmp_path: Path) -> None:
    """One head of the single blocks runs, and in the last step alone: there the error is, and everything else is the original's."""
    assignment = Assignment((Rule(METHOD, layers="single_*", heads=(1,), steps=(CALL["num_inference_steps"] - 1, None)),))
    record = evaluate(accelerate(picture_pipe(), assignment), PROMPTS[:1], tmp_path, **CALL)
    assert (record["method"], record["spec"], record["dense_steps"]) == (str(assignment), assignment.to_dict(), 0)
    assert [head["layer"].partition(".")[0] for head in record["heads"]] == ["single_transformer_blocks"] * len(record["heads"])
    assert [(head["error"][0], head["kept_mass"][0]) for head in record["heads"]] == [(0, 1)] * len(record["heads"])
    assert all(head["error"][1] > 1e-3 for head in record["heads"])
    assert all(0 < head["kept_mass"][1] < 1 for head in record["heads"])
    *others, (last, error) = sorted((-level["timestep"], level["method"]["mean"]) for level in record["noise_levels"])
    assert [error for _, error in others] == [0] * (CALL["num_inference_steps"] - 1)
    assert error > 1e-3
    assert -last == min(level["timestep"] for level in record["noise_levels"])


def test_one_prompt_has_no_interval(tmp_path: Path) -> None:
    record = evaluate(accelerate(picture_pipe(), METHOD), PROMPTS[:1], tmp_path, **CALL)
    assert record["interval"] is None
    summary = record["measures"]["method"]["velocity_error"]
    assert summary["low"] is summary["high"] is None
    assert summary["mean"] == summary["by_prompt"][0] > 0
    assert evaluation.ONE_PROMPT in record["notes"]
    assert "One prompt, so there are no intervals." in (tmp_path / "report.html").read_text()


@pytest.mark.usefixtures("numbers_only")
def test_weights_in_half_precision_have_no_bfloat16_floor(tmp_path: Path) -> None:
    pipe = half_pipe()
    pipe.register_modules(vae=picture_pipe().vae.to(torch.bfloat16))
    record = evaluate(accelerate(pipe, METHOD), PROMPTS[:1], tmp_path, **CALL)
    assert list(record["measures"]) == ["method", "again"]
    assert record["method_minus_bfloat16"] is None
    assert any("half precision already" in note for note in record["notes"])


# Intervals


def test_the_interval_of_a_small_sample_is_that_of_all_resamples() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    means = np.array([np.mean(draw) for draw in itertools.product(values, repeat=4)])
    low, high = Bootstrap(resamples=200_000).interval(values)
    for level, end in ((0.025, low), (0.975, high)):  # between the exact quantiles a little to either side
        assert np.quantile(means, level - 0.005) <= end <= np.quantile(means, level + 0.005)


def test_the_interval_of_a_large_sample_is_normal() -> None:
    values = np.random.default_rng(3).normal(10, 2, 400)
    low, high = Bootstrap(level=0.9).interval(list(values))
    half = 1.645 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)


def test_intervals_are_seeded_and_paired() -> None:
    first, second = [1.0, 5.0, 2.0], [0.5, 4.5, 1.5]
    assert Bootstrap().interval(first) == Bootstrap().interval(first)
    low, high = Bootstrap().interval([a - b for a, b in zip(first, second, strict=True)])
    assert (low, high) == (0.5, 0.5)  # the same prompts in both, so nothing is left of what differs between prompts
    with pytest.raises(ValueError, match="at least two prompts, not 1"):
        Bootstrap().interval([1.0])


def test_pictures_alike_and_not() -> None:
    original = torch.rand(2, 3, 192, 208, generator=torch.Generator().manual_seed(0))
    noise = 0.1 * torch.randn(original.shape, generator=torch.Generator().manual_seed(1))
    noise[1] *= 2
    same, other = compare(original, original), compare(original + noise, original)
    assert same == {"psnr": math.inf, "ssim": 1.0, "distance": 0.0, "difference": 0.0}
    assert other["psnr"] == pytest.approx(np.mean([decibels(original[i] + noise[i], original[i]) for i in range(2)]), rel=1e-5)
    assert other["difference"] == pytest.approx(float(noise.square().mean((1, 2, 3)).sqrt().mean()), rel=1e-5)
    assert 0 < other["distance"] < 1


# Videos


def video_pipe(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny video pipeline that takes prompts: their text is turned into embeddings of its own."""
    torch.manual_seed(0)
    pipe, call = getattr(tiny_video, name)()
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is not None:
            fill_randomly(model)

    def encode_prompt(prompt: str, **_: Any) -> tuple[Tensor, Tensor]:
        return (1 + len(prompt) / 100) * emb(1, 12, 32), emb(1, 12, 32)

    pipe.encode_prompt = encode_prompt
    pipe.set_progress_bar_config(disable=True)
    return pipe, {k: v for k, v in call.items() if "prompt" not in k and k != "output_type"}


@pytest.mark.usefixtures("numbers_only")
@pytest.mark.parametrize(("name", "names"), [("wan", {""}), ("wan22_two_experts", {"transformer.", "transformer_2."})])
def test_videos_are_compared_frame_by_frame(name: str, names: set[str], tmp_path: Path) -> None:
    pipe, call = video_pipe(name)

    def frames(prompt: str, seed: int) -> Tensor:
        made = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np", **call).frames
        return torch.from_numpy(made)[0]

    originals = [frames(prompt, i) for i, prompt in enumerate(PROMPTS[:2])]
    accelerate(pipe, CLEAR((1, 1, 2)))
    videos = [frames(prompt, i) for i, prompt in enumerate(PROMPTS[:2])]
    record = evaluate(pipe, PROMPTS[:2], tmp_path, **call)
    found = record["measures"]["method"]
    expected = [np.mean([decibels(a, b) for a, b in zip(*pair, strict=True)]) for pair in zip(videos, originals, strict=True)]
    assert len(originals[0]) == call["num_frames"]
    assert found["psnr"]["by_prompt"] == pytest.approx(expected, rel=1e-4)
    assert record["measures"]["again"]["difference"]["mean"] == record["measures"]["again"]["velocity_error"]["mean"] == 0
    assert len(record["noise_levels"]) == call["num_inference_steps"]  # two passes of guidance at each
    assert {layer["layer"].partition("blocks.")[0] for layer in record["heads"]} == names
    assert 0 < found["kept_mass"]["mean"] < 1
    assert Image.open(tmp_path / "method-1.png").size == (call["width"], call["height"])


def test_padded_text_is_no_part_of_the_mass() -> None:
    """HunyuanVideo masks the keys of padding: kept whole, a layer is exact attention over what is left."""
    torch.manual_seed(0)
    pipe, call = tiny_video.hunyuan_video()
    fill_randomly(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    with Recorder(pipe.transformer, forward_names(pipe.transformer)) as recorder, torch.no_grad():
        pipe(generator=torch.Generator().manual_seed(0), **(call | {"num_inference_steps": 1}))
    accelerate(pipe, CLEAR(1000))
    (arguments, prediction), *_ = recorder.forwards
    found = capture_inputs(pipe.transformer, evaluation.Forward(arguments, prediction, prediction, "", 0, 0))
    assert len(found) == len(operators_of(pipe)) == 4
    for captured in found:
        assert captured.text_bias is not None
        assert int(captured.text_bias.isinf().sum()) == 3
        layout, image = TokenLayout(captured.layout.grid, captured.layout.text, False), slice(0, captured.layout.image)
        qkv = [captured.query, captured.key, captured.value]  # a disc of one token is the same in every order
        for spec, sparse in ((CLEAR(1000), False), (CLEAR(1), True)):
            got = deviation(captured, exact_attention(captured), spec)
            assert bool((got.mass < 0.99).all()) == sparse
            assert bool(((got.error / got.size).sqrt() > 1e-5).all()) == sparse
            kept, whole = (oracle(*qkv, s, layout, text_bias=captured.text_bias)[1][:, :, image] for s in (spec, CLEAR(1000)))
            assert got.mass.tolist() == pytest.approx((kept - whole).exp().mean((0, 2)).tolist(), rel=1e-4)
