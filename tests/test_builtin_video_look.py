"""Sheets of the built-in video models, and the measurement of their motions, on clips whose motion is known."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builtin_fixtures import clip, discs, film, scene_of
from PIL import Image
from torch import Tensor

from dit_accel.pipelines.builtin_video import look
from dit_accel.pipelines.builtin_video.motion import MOTIONS

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def camera(said: str = "", shown: str = "") -> look.Callable[[str, int], Tensor]:
    """Films clips of the training with the motion that a prompt asks for, or another in place of one, until one is plain to see."""
    renderings = discs()

    def clip_of(prompt: str, seed: int) -> Tensor:
        rng, motion = random.Random(seed), next(m for m in MOTIONS if m in prompt)
        motion = shown if motion == said else motion
        while True:
            pixels = film(renderings, replace(scene_of(rng), motion=motion), 5, 48, 48)
            contrast = float((pixels[:, :, 24, 24] - pixels[:, :, 0, 0]).abs().sum(0).min())
            if contrast > 1:
                return pixels.transpose(0, 1) / 2 + 0.5

    return clip_of


def test_every_motion_of_the_training_is_recognised() -> None:
    counts, missed = look.measure(camera(), 40)
    assert missed == []
    assert counts == {"clips": 40, "right": 40, "by_motion": dict.fromkeys(MOTIONS, 8)}


@pytest.mark.parametrize("word", list(OPPOSITE))
def test_the_other_way_is_not_what_was_asked(word: str) -> None:
    counts, missed = look.measure(camera(f"moving {word}", f"moving {OPPOSITE[word]}"), 10)
    assert counts["by_motion"] == {motion: 0 if motion == f"moving {word}" else 2 for motion in MOTIONS}
    assert {row["seen"] for row in missed} == {f"moving {OPPOSITE[word]}"}


def test_what_does_not_move_or_is_not_there_is_no_motion() -> None:
    pixels = clip(0, discs(), 1, 48, 48)
    assert look.motion_of(pixels.transpose(0, 1).expand(5, -1, -1, -1) / 2 + 0.5) is None
    assert look.motion_of(torch.zeros(5, 3, 48, 48)) is None


def test_a_sheet_has_a_row_for_each_motion_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shades = {"builtin": 0.2, "other": 0.8}
    monkeypatch.setattr(look, "open_model", lambda name, _: shades[name])
    ramp = torch.linspace(0, 1, look.FRAMES).view(-1, 1, 1, 1)
    monkeypatch.setattr(look, "draw", lambda shade, *_: (ramp * shade).expand(-1, 3, 16, 16))
    look.main(["sheet", str(tmp_path / "new" / "a.png"), "builtin", "other", "--device", "cpu"])
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        assert sheet.size == (5 * look.CELL, 10 * (look.CELL + 18))
        seen = [[sheet.getpixel((column * look.CELL + 20, row * (look.CELL + 18) + 100))[0] for column in range(5)] for row in (0, 1)]
    for row, shade in zip(seen, shades.values(), strict=True):
        assert row == pytest.approx([255 * shade * share for share in (0, 0.25, 0.5, 0.75, 1)], abs=0.6)
