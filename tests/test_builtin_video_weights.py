"""The video model that ships with the package: its files, its loading by unmodified diffusers, that its clips follow the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from test_cli import succeed
from torch import Tensor

from dit_accel import builtin_video_pipeline
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, WEIGHTS


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    loaded = builtin_video_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def film(pipe: WanPipeline, prompt: str, **call: Any) -> Tensor:
    """Frames `[F, 3, H, W]` in [0, 1] of a small clip from fixed noise."""
    settings = {"height": 128, "width": 128, "num_frames": 17, "num_inference_steps": 8, "guidance_scale": 3.0}
    call = settings | {"max_sequence_length": TEXT_TOKENS, "output_type": "pt"} | call
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).frames[0]


def centre(clip: Tensor) -> Tensor:
    """Where what differs from the corners is, per frame: (row, column) `[F, 2]` in shares of the side."""
    background = clip[:, :, :8, :8].mean((2, 3), keepdim=True)
    weight = (clip - background).abs().sum(1).sub(0.3).clamp_min(0)  # [F, H, W]
    places = torch.linspace(0, 1, clip.shape[-1])
    total = weight.sum((1, 2))
    return torch.stack([(weight.sum(2) * places).sum(1) / total, (weight.sum(1) * places).sum(1) / total], 1)


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert 10e6 < sum(p.stat().st_size for p in files) < 40e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".jsonl", ".jpg"}


def test_it_is_a_stock_pipeline(pipe: WanPipeline) -> None:
    assert type(pipe) is WanPipeline
    assert isinstance(pipe.transformer, WanTransformer3DModel)
    assert json.loads((WEIGHTS / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


def test_the_licence_note_and_log_are_there() -> None:
    assert "MIT" in (WEIGHTS / "README.md").read_text()
    rows = [json.loads(line) for line in (WEIGHTS / "training-log.jsonl").read_text().splitlines()]
    assert rows[-1].keys() >= {"decoder_step", "coefficient_error"}


def test_the_background_is_the_prompts(pipe: WanPipeline) -> None:
    for index, name in enumerate(("red", "green", "blue")):
        corner = film(pipe, f"a still cat on a {name} background", num_frames=5)[:, :, :8, :8].mean((0, 2, 3))
        assert int(corner.argmax()) == index, f"the corner on {name} is {corner}"


@pytest.mark.parametrize("noun", ["panda", "star"])
def test_things_move_where_the_prompt_says(pipe: WanPipeline, noun: str) -> None:
    for word, sign in (("left", -1), ("right", 1)):
        path = centre(film(pipe, f"a {noun} moving {word} on a blue background"))
        rows, columns = (path[-1] - path[0]).tolist()
        assert sign * columns > 0.2, f"moving {word} went {rows:.2f} rows, {columns:.2f} columns"
        assert abs(rows) < 0.1


def test_the_command_line_films_with_it(tmp_path: Path) -> None:
    succeed("generate", "a star spinning", "--video", "--size", "64x64", "--steps", 1, "--out", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.size, image.n_frames) == ((64, 64), 17)
