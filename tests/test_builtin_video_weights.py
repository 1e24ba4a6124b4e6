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
from dit_accel.pipelines.builtin_video.look import motion_of
from dit_accel.pipelines.builtin_video.motion import MOTIONS


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
    legs = list(dict.fromkeys(row["leg"] for row in rows))
    assert legs == ["cpu", "h100-1", "h100-2", "h100-3"]
    last = [[row["loss"]["17x256"] for row in rows if row["leg"] == leg and "17x256" in row["loss"]][-1] for leg in legs]
    assert last == sorted(last, reverse=True)  # each leg improved on the one before


def test_the_background_is_the_prompts(pipe: WanPipeline) -> None:
    for index, name in enumerate(("red", "green", "blue")):
        corner = film(pipe, f"a cat moving up on a {name} background", num_frames=5)[:, :, :8, :8].mean((0, 2, 3))
        assert int(corner.argmax()) == index, f"the corner on {name} is {corner}"


@pytest.mark.parametrize("noun", ["panda", "star"])
@pytest.mark.parametrize("motion", MOTIONS)
def test_things_move_as_the_prompt_says(pipe: WanPipeline, noun: str, motion: str) -> None:
    assert motion_of(film(pipe, f"a {noun} {motion} on a blue background")) == motion


def test_the_command_line_films_with_it(tmp_path: Path) -> None:
    succeed("generate", "a star growing", "--video", "--size", "64x64", "--steps", 4, "--out", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.size, image.n_frames) == ((64, 64), 17)
