"""What a family declares of sizes: how many pixels a token has, how far its positions go, where its rotary base is."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from test_families import LOOPS, NAMES, Tiny

from dit_accel.cli.models import load_pipeline
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.patch.anatomy import forward_names
from dit_accel.pipelines import FAMILIES, family_of, token_pixels
from dit_accel.pipelines.hires.recipe import rotary_embedding

PADDED = {"hidream"}  # a grid that is padded to the model's largest number of tokens tells nothing


class Begun(Exception):  # noqa: N818
    """Raised in a pipeline's first forward."""


@pytest.mark.parametrize("name", [name for name in NAMES if name not in LOOPS and name not in PADDED])
def test_a_pipelines_grid_has_tokens_of_the_declared_side(name: str) -> None:
    tiny = Tiny(name)
    (transformer, *_), family = tiny.transformers, family_of(tiny.transformers[0])
    seen: list[Any] = []

    def stop(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(family.grid(dict(zip(forward_names(transformer), args, strict=False)) | kwargs, transformer))  # type: ignore[union-attr]
        raise Begun

    transformer.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(Begun):
        tiny.pipe(**tiny.call)
    if "height" not in tiny.call:  # a class-conditional pipeline, of one size and without a factor
        assert name == "dit"
        with pytest.raises(UnsupportedModelError, match="DiTTransformer2DModel in pixels is not known"):
            token_pixels(tiny.pipe, transformer)
        return
    unit = token_pixels(tiny.pipe, transformer)
    assert seen[0][0][1:] == (tiny.call["height"] // unit, tiny.call["width"] // unit)


ROTARY = [
    "flux", "flux2", "chroma", "ovis_image", "longcat_image", "bria", "krea2", "cogview4", "hidream", "hunyuan_image", "hunyuan_video",
    "hunyuan_video15", "ltx", "ltx2", "ernie_image", "motif_video", "glm_image", "fibo", "framepack", "flux3", "prx",
]  # fmt: skip


@pytest.mark.parametrize("name", ROTARY)
def test_a_declared_rotary_base_is_read_at_every_forward(name: str) -> None:
    tiny = Tiny(name)
    before = tiny.run()
    rotary_embedding(tiny.transformers[0]).theta *= 10
    assert not torch.equal(tiny.run(), before)


def test_every_declared_rotary_base_is_tested() -> None:
    tested = {family_of(Tiny(name).transformers[0]).name for name in ROTARY}  # type: ignore[union-attr]
    assert tested == {family.name for family in FAMILIES if family.rotary}
    assert {family.name: family.rotary_factor for family in FAMILIES if family.rotary_factor != 1} == {"flux": 10.0}


LIMITED = {"sd3": 32, "auraflow": 16, "cogview3plus": 32}


@pytest.mark.parametrize(("name", "side"), LIMITED.items())
def test_positions_end_at_the_declared_side(name: str, side: int) -> None:
    tiny = Tiny(name)
    (transformer,), unit = tiny.transformers, token_pixels(tiny.pipe, tiny.transformers[0])
    family: Any = family_of(transformer)
    assert family.longest_side(transformer) == side
    tiny.run(height=side * unit, width=2 * unit, num_inference_steps=1)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        tiny.run(height=(side + 2) * unit, width=2 * unit, num_inference_steps=1)


def test_every_declared_limit_is_tested() -> None:
    assert {family_of(Tiny(name).transformers[0]).name for name in LIMITED} == {f.name for f in FAMILIES if f.longest_side}  # type: ignore[union-attr]


def test_a_size_on_the_command_line_fits_the_tokens_of_the_model_that_was_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = Tiny("ltx").pipe  # tokens of 4 pixels here, of 32 in the released model
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pipe)
    assert load_pipeline("folder", device="cpu", sizes=[(32, 44), (20, 64)]) is pipe
    with pytest.raises(ArgumentError, match="multiples of 4 pixels, the side of one token: not 30x64, but 32x64, for example"):
        load_pipeline("folder", device="cpu", sizes=[(32, 44), (64, 30)])
    pipe = Tiny("dit").pipe  # which tells no token's side
    assert load_pipeline("folder", device="cpu", sizes=[(32, 30)]) is pipe
