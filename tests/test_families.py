"""Every family through its real pipeline or a loop of steps: a tiny random transformer, two steps, sizes that no block divides."""

import dataclasses
import functools
import importlib
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly, relative_error
from diffusers import Flux2KleinKVPipeline
from PIL import Image
from tiny_parts import BUILDERS
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, pipelines
from dit_accel.errors import UnsupportedModelError
from dit_accel.patch.state import patches_of
from dit_accel.pipelines import FAMILIES, UNSUPPORTED, family_of

for part in ("tiny_image", "tiny_video", "tiny_transformers", "tiny_pipelines"):
    importlib.import_module(part)
ROOT = Path(__file__).parents[1]
NAMES = [name for name in BUILDERS if name != "sana"]
LOOPS = {name for name, build in BUILDERS.items() if build.__module__ == "tiny_transformers"}
# pipelines that take no two prompts, or no two generators
ALONE = {"longcat_image", "qwen_image_edit_plus", "wan_vace", "prx_pipeline", "framepack_pipeline", "joy_image_pipeline"}
# every key kept: the original to rounding
WHOLE = {"fovea": Fovea(1.0, tile=(4, 4)), "clear": CLEAR(1000.0, tile=(2, 4, 4)), "sla": SLA(1.0, block=(16, 16))}
SPARSE = {
    "fovea": Fovea(0.2, tile=(4, 4)), "clear": CLEAR(2.0, tile=(4, 4)), "sla": SLA(0.3, tile=(2, 4, 2)), "gna": GNA(3, tile=(4, 4)),
}  # fmt: skip

every_family = pytest.mark.parametrize("name", NAMES)


class Tiny:
    """A pipeline of one family, or a loop in its place, and the way to run it."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name = name
        self.pipe, self.call = BUILDERS[name]()
        self.pipe.set_progress_bar_config(disable=True)
        for seed, transformer in enumerate(self.transformers):
            fill_randomly(transformer.eval(), seed)

    @property
    def transformers(self) -> list[Any]:
        parts = [getattr(self.pipe, name, None) for name in ("transformer", "transformer_2")]
        return [x for x in parts if x is not None]

    def run(self, **changes: Any) -> Tensor:
        """The pictures or videos, or their latents; of a list, the first."""
        out: Any = self.pipe(**{**self.call, "generator": torch.Generator().manual_seed(0), **changes})
        out = next((getattr(out, kind) for kind in ("images", "frames") if hasattr(out, kind)), out[0])
        while isinstance(out, list | tuple):
            out = out[0]
        drawn = torch.as_tensor(out)
        assert drawn.isfinite().all(), "the pipeline drew NaN or infinity"
        return drawn

    def context(self) -> Any:
        return patches_of(self.pipe)[0][1].context


@pytest.fixture
def tiny(name: str) -> Tiny:
    return Tiny(name)


@functools.lru_cache
def original(name: str) -> Tensor:
    """What the stock pipeline draws."""
    return Tiny(name).run()


@every_family
@pytest.mark.parametrize("spec", WHOLE.values(), ids=WHOLE)
def test_keeping_everything_equals_the_original(name: str, tiny: Tiny, spec: AttentionSpec) -> None:
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    assert relative_error(tiny.run(), original(name)) < 1e-5


@every_family
@pytest.mark.parametrize("spec", SPARSE.values(), ids=SPARSE)
def test_every_method_runs(name: str, tiny: Tiny, spec: AttentionSpec, sparse_calls: list[Any]) -> None:
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    first = tiny.run()
    ran = len(sparse_calls)
    assert torch.equal(tiny.run(), first)
    assert len(sparse_calls) == 2 * ran > 0
    rows = dit_accel.summary(tiny.pipe, show=False)
    assert {(row.method, row.backend in ("cpu", "reference")) for row in rows} == {(str(spec), True)}
    used = [row for row in rows if row.tokens is not None]  # a second transformer may have had no step
    assert ran % len(used) == 0
    if any(row.density_kept < 1 for row in used):  # type: ignore[operator]
        assert relative_error(first, original(name)) > 1e-5
    dit_accel.restore(tiny.pipe)
    assert torch.equal(tiny.run(), original(name))


def twice(call: dict[str, Any]) -> dict[str, Any]:
    """The call with every prompt or class twice."""

    def doubled(name: str, value: Any) -> Any:
        if isinstance(value, Tensor) and "prompt" in name:
            return torch.cat([value, value])
        return value * 2 if name == "class_labels" or (isinstance(value, list) and "prompt" in name) else value

    return {name: doubled(name, value) for name, value in call.items()}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALONE | LOOPS])
def test_two_at_a_time_are_two_alone(tiny: Tiny) -> None:
    dit_accel.accelerate(tiny.pipe, SPARSE["clear"], strict=True)
    together = tiny.run(**twice(tiny.call), generator=[torch.Generator().manual_seed(n) for n in range(2)])
    alone = [tiny.run(generator=torch.Generator().manual_seed(n)) for n in range(2)]
    assert relative_error(together, torch.cat(alone)) < 1e-5
    assert relative_error(*alone) > 1e-2


@every_family
def test_the_first_steps_are_dense(tiny: Tiny, sparse_calls: list[Any]) -> None:
    counts = {}
    for dense_steps in (0, 1, 3):
        dit_accel.accelerate(tiny.pipe, SPARSE["clear"], strict=True, dense_steps=dense_steps)
        for repetition in range(2):
            sparse_calls.clear()
            tiny.run(num_inference_steps=3)
            counts[dense_steps, repetition] = len(sparse_calls)
        dit_accel.restore(tiny.pipe)
    assert [counts[1, n] * 3 for n in range(2)] == [counts[0, n] * 2 for n in range(2)]
    assert [counts[3, n] for n in range(2)] == [0, 0]
    assert counts[0, 0] > 0


@pytest.mark.parametrize("reference", [False, True])
def test_cached_keys_of_reference_images_run_the_original(reference: bool, sparse_calls: list[Any]) -> None:
    stock = Tiny("flux2")
    parts = {name: part for name, part in stock.pipe.components.items() if name != "is_distilled"}
    stock.pipe = Flux2KleinKVPipeline(**parts)
    stock.pipe.set_progress_bar_config(disable=True)
    call = {name: value for name, value in stock.call.items() if name != "guidance_scale"}
    stock.call = call | ({"image": [Image.new("RGB", (64, 64), (90, 20, 200))]} if reference else {})
    expected = stock.run()
    dit_accel.accelerate(stock.pipe, SPARSE["clear"])
    got = stock.run()
    assert torch.equal(got, expected) == reference
    assert (len(sparse_calls) == 0) == reference
    assert list(stock.context().fallbacks) == (["a cache of the reference images' keys"] if reference else [])


def test_every_class_is_one_of_diffusers() -> None:
    import diffusers

    missing = [name for family in FAMILIES for name in family.classes if not hasattr(diffusers, name)]
    assert missing == []


def test_every_transformer_of_diffusers_has_a_family_or_a_reason_to_have_none() -> None:
    import diffusers

    known = {name for family in FAMILIES for name in family.classes} | UNSUPPORTED.keys()
    named = [name for name in dir(diffusers) if re.search("Transformer|DiT", name) and "ControlNet" not in name]
    models = [cls for name in named if isinstance(cls := getattr(diffusers, name), type) and issubclass(cls, diffusers.ModelMixin)]
    assert len(models) > 60
    assert [cls.__name__ for cls in models if not known & {base.__name__ for base in cls.__mro__}] == []
    assert not UNSUPPORTED.keys() & {name for family in FAMILIES for name in family.classes}
    assert [name for name in UNSUPPORTED if not hasattr(diffusers, name)] == []


def test_a_class_has_one_family() -> None:
    names = [name for family in FAMILIES for name in family.classes]
    assert len(names) == len(set(names))
    with pytest.raises(ValueError, match=r"these classes belong to a family already: \{'FluxTransformer2DModel': 'flux'\}"):
        pipelines.register(FAMILIES[0])


@pytest.mark.parametrize("field", ["classes", "ids"])
def test_names_are_a_tuple(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} of family 'flux' must be a tuple of names, not 'img_ids'"):
        dataclasses.replace(FAMILIES[0], **{field: "img_ids"})


def test_the_sample_adds_a_family(capsys: pytest.CaptureFixture[str]) -> None:
    known = list(FAMILIES)
    try:
        runpy.run_path(str(ROOT / "samples" / "new_family.py"), run_name="__main__")
        assert len(FAMILIES) == len(known) + 1
    finally:
        FAMILIES[:] = known
    shown = capsys.readouterr().out
    found = re.search(r"relative difference (\S+)", shown)
    assert found
    assert float(found.group(1)) < 1e-5
    assert re.search(r"blocks\.0-1 \(2 layers\) +│ 1560 +│ - +│ 10\.38%", shown)
    lines = (ROOT / "samples" / "new_family.py").read_text().split("register(\n")[1].split("\n)\n")[0].splitlines()
    assert len(lines) < 40


@every_family
def test_no_other_attention_is_touched(tiny: Tiny) -> None:
    dit_accel.accelerate(tiny.pipe, SPARSE["clear"])
    other = re.compile(r"cross|refiner|embedder|text_|txt_|audio|face_adapter|image_cond|perceiver|attn2")
    for transformer in tiny.transformers:
        family: Any = family_of(transformer)
        touched = [name.removesuffix(".dit_accel") for name, _ in transformer.named_modules() if name.endswith(".dit_accel")]
        assert touched
        assert [name for name in touched if other.search(name) and family.name != "sd3"] == []
        assert [name for name in touched if hasattr(transformer.get_submodule(name).processor, "_dit_accel_base")] == touched


def test_a_class_that_has_no_family_is_refused_with_the_reason() -> None:
    from diffusers import AnyFlowFARTransformer3DModel

    transformer = AnyFlowFARTransformer3DModel(num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8,
                                               freq_dim=8, ffn_dim=8, num_layers=1)  # fmt: skip
    with pytest.raises(UnsupportedModelError, match="AnyFlowFARTransformer3DModel's self-attention is causal"):
        dit_accel.accelerate(transformer)


def test_linear_attention_is_left_alone() -> None:
    tiny = Tiny("sana")
    assert type(tiny.pipe.transformer).__name__ in UNSUPPORTED
    with pytest.raises(UnsupportedModelError, match="SanaTransformer2DModel's self-attention is linear already"):
        dit_accel.accelerate(tiny.pipe)
