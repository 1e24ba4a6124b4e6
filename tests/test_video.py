"""Videos from the command line, their files, and how their motion compares with the original's."""

import json
import random
import runpy
import sys
from pathlib import Path
from typing import Any

import imageio.v2 as imageio
import pytest
import torch
from conftest import fill_randomly
from PIL import Image, ImageSequence
from test_builtin_video import renderings  # noqa: F401  a fixture
from test_cli import ROOT, fail, make_tiny, run, succeed
from torch import Tensor

import dit_accel
from dit_accel import SLA, Fovea, accelerate, save_adapter, save_video
from dit_accel.measure.evaluation import evaluate
from dit_accel.patch.anatomy import OWN
from dit_accel.pipelines import training
from dit_accel.pipelines.builtin.drawings import Renderings
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, builtin_video_pipeline, train
from dit_accel.pipelines.video import compare_motion, frames_argument

SMALL = ["--size", "128x96", "--max-sequence-length", TEXT_TOKENS, "--steps", 2]


@pytest.fixture(scope="module")
def model(renderings: Renderings, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    """A folder with the built-in video model's parts around one random block."""
    made = train.make_pipeline(0, num_layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "FITTED_ON", (128, 256) * 2)
        train.fit_encoder(made, renderings, random.Random(0))
    fill_randomly(made.transformer)
    folder = tmp_path_factory.mktemp("video") / "model"
    training.save_pipeline(made, folder)
    return str(folder)


def clip(frames: int = 5, height: int = 32, width: int = 48) -> Tensor:
    """A grey square that moves right over black."""
    made = torch.zeros(frames, 3, height, width)
    for index in range(frames):
        made[index, :, 8:24, 4 * index : 4 * index + 16] = 0.5
    return made


# Files


def test_a_gif_holds_the_frames(tmp_path: Path) -> None:
    path = save_video(clip(), tmp_path / "a.gif", fps=10)
    with Image.open(path) as image:
        frames = [torch.tensor(list(f.convert("RGB").tobytes())).view(32, 48, 3) for f in ImageSequence.Iterator(image)]
        assert image.info["duration"] == 100
    expected = (clip() * 255).round().permute(0, 2, 3, 1)
    assert len(frames) == 5
    assert float((torch.stack(frames) - expected).abs().max()) <= 1
    assert [file.name for file in tmp_path.iterdir()] == ["a.gif"]


def test_an_mp4_holds_the_frames(tmp_path: Path) -> None:
    path = save_video(clip(height=64, width=96), tmp_path / "a.MP4", fps=4)
    with imageio.get_reader(path, format="FFMPEG") as reader:
        assert reader.get_meta_data()["fps"] == 4
        frames = torch.stack([torch.from_numpy(frame) for frame in reader]).float() / 255
    assert frames.shape == (5, 64, 96, 3)
    assert float((frames.permute(0, 3, 1, 2) - clip(height=64, width=96)).abs().mean()) < 0.03
    assert [file.name for file in tmp_path.iterdir()] == ["a.MP4"]


@pytest.mark.parametrize(
    ("name", "frames", "fps", "words"),
    [
        ("a.webm", clip(), 8, r"the name of a clip must end in \.gif or \.mp4, not"),
        ("a.gif", clip()[0], 8, r"frames must have shape \[F, 3, H, W\] with F >= 1, not \(3, 32, 48\)"),
        ("a.gif", clip()[:0], 8, r"with F >= 1, not \(0, 3, 32, 48\)"),
        ("a.gif", clip(), 0, "fps must be 1 to 100 frames a second, not 0"),
    ],
)
def test_what_is_no_clip_is_refused(name: str, frames: Tensor, fps: int, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        save_video(frames, tmp_path / name, fps)
    assert not list(tmp_path.iterdir())


def test_mp4_without_its_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"requires imageio\[ffmpeg\], which is not installed: pip install 'dit-accel\[video\]'"):
        save_video(clip(), tmp_path / "a.mp4")
    assert save_video(clip(), tmp_path / "a.gif").exists()


# Motion


def test_motion_of_equal_and_of_still_clips() -> None:
    assert compare_motion(clip(), clip()) == {"change": 1.0, "change_difference": 0.0}
    still = clip()[:1].expand(5, -1, -1, -1)
    found = compare_motion(still, clip())
    assert found["change"] == 0.0
    assert found["change_difference"] == pytest.approx(float(clip().diff(dim=0).square().mean().sqrt()))


def test_flicker_counts_and_a_change_of_colour_does_not() -> None:
    flickering = clip() + 0.2 * torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0])[:, None, None, None]
    assert compare_motion(flickering, clip())["change"] > 1.2
    assert compare_motion(clip() + 0.2, clip())["change_difference"] == pytest.approx(0.0, abs=1e-7)


# The command line


@pytest.mark.parametrize("method", ["none", "sla:0.3", "clear:2x3x3", "fovea:0.3"])
def test_generate_a_video(model: str, method: str, tmp_path: Path) -> None:
    out = tmp_path / "a.gif"
    text = succeed("generate", "a cat moving left", "--video", "--frames", 9, "--model", model, "--method", method, *SMALL, "--out", out)
    assert f"wrote {out}" in text
    with Image.open(out) as image:
        assert (image.size, image.n_frames) == ((128, 96), 9)


def test_evaluate_a_video(model: str, tmp_path: Path) -> None:
    pipe = accelerate(builtin_video_pipeline(model), Fovea(0.3, tile=(4, 4, 4)))
    call: dict[str, Any] = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": TEXT_TOKENS}
    record = evaluate(pipe, ["a cat moving left"], tmp_path, **call)
    ours, again = (record["measures"][side] for side in ("method", "again"))
    assert ours["change_difference"]["mean"] > 0
    assert again["change_difference"]["mean"] == 0
    assert again["change"]["mean"] == 1
    assert "RMS difference of that change" in (tmp_path / "report.html").read_text()


def test_bench_draw(model: str, tmp_path: Path) -> None:
    out = tmp_path / "draw.json"
    methods = ["--method", "sla:0.3,tile=4x4x4", "--method", "fovea:1.0,tile=4x4x4"]
    text = succeed("bench", "draw", "a cat", "--frames", 9, "--model", model, *SMALL, *methods, "--repeats", 1, "--out", out)
    assert "9 frames, 2 steps, medians of 1" in text
    sparse, whole = json.loads(out.read_text())["rows"]
    assert sparse["psnr"] < 60 < whole["psnr"]
    assert whole["change"] == pytest.approx(1, abs=1e-3)
    assert min(sparse["original"], sparse["accelerated"]) > 0
    assert fail("bench", "draw", "--method", "none").startswith("bench draw requires accelerated methods")


def test_bench_draw_of_an_adapter(model: str, tmp_path: Path) -> None:
    pipe = accelerate(builtin_video_pipeline(model), SLA(0.3, tile=(4, 4, 4)))
    for name, parameter in pipe.transformer.named_parameters():
        if OWN in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapter(pipe, tmp_path / "adapter")
    out, sides = tmp_path / "draw.json", ["--method", "sla:0.3,tile=4x4x4", "--adapter", tmp_path / "adapter"]
    succeed("bench", "draw", "a cat", "--frames", 9, "--model", model, *SMALL, *sides, "--repeats", 1, "--out", out)
    untrained, adapter = json.loads(out.read_text())["rows"]
    assert adapter["method"] == str(tmp_path / "adapter")
    assert adapter["psnr"] != untrained["psnr"]
    alone = ["--adapter", tmp_path / "adapter", "--repeats", 1, "--out", out]
    succeed("bench", "draw", "a cat", "--frames", 9, "--model", model, *SMALL, *alone)
    (row,) = json.loads(out.read_text())["rows"]
    assert row["psnr"] == adapter["psnr"]


def test_errors_before_a_model_is_loaded(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.gif"]
    assert fail("generate", "x", "--frames", 9, *out) == "--frames and --fps require --video"
    assert fail("generate", "x", "--video", "--hires", *out) == "--hires draws pictures: give it or --video, not both"
    assert fail("generate", "x", "--video", "--out", tmp_path / "a.png").startswith("the name of a clip must end in .gif or .mp4, not")


def test_pictures_and_videos_are_not_taken_for_each_other(model: str, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    make_tiny().save_pretrained(pictures)
    expected = "FluxPipeline makes pictures: leave frames out, or use another model"
    assert fail("generate", "x", "--video", "--model", pictures, *SMALL, "--out", tmp_path / "a.gif") == expected
    expected = "WanPipeline makes videos: give its number of frames, or use another model"
    assert fail("generate", "x", "--model", model, *SMALL, "--out", tmp_path / "a.png") == expected
    assert expected in run("evaluate", "x", "--model", model, *SMALL, "--out", tmp_path / "evaluation").stderr


def test_frames_argument(model: str) -> None:
    assert frames_argument(builtin_video_pipeline(model)) == "num_frames"
    assert frames_argument(make_tiny()) is None


def test_the_sample_runs(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import WanPipeline

    call = WanPipeline.__call__

    def small(self: Any, prompt: str, **settings: Any) -> Any:
        return call(self, prompt, **{**settings, "height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1})

    monkeypatch.setattr(WanPipeline, "__call__", small)
    monkeypatch.setattr(dit_accel, "builtin_video_pipeline", lambda: builtin_video_pipeline(model))
    monkeypatch.setattr(sys, "argv", ["video.py", "1"])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "samples" / "video.py"), run_name="__main__")
    with Image.open(tmp_path / "video" / "video.gif") as image:
        assert (image.size, image.n_frames) == ((3 * 96, 64), 9)
    assert (tmp_path / "video" / "video.mp4").stat().st_size > 0
