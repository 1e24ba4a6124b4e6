"""High resolution on a tiny FLUX with a tiny autoencoder: sizes, the start of each stage, what is left behind, what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hires_fixtures import SIZE, TEXT, Forwards, draw, in_large_tiles, make, same
from tiny_image import (
    auraflow,
    chroma,
    flux,
    flux2,
    hunyuan_image,
    longcat_image,
    lumina2,
    ovis_image,
    pixart_sigma,
    qwen_image,
    sd3,
    z_image,
)

import dit_accel
from dit_accel import CLEAR, accelerate
from dit_accel.errors import NotAcceleratedError, UnsupportedModelError
from dit_accel.patch.state import CONTEXT, operators_of
from dit_accel.pipelines import hires, token_pixels
from dit_accel.pipelines.hires import latents
from dit_accel.pipelines.hires.recipe import Recipe

FAMILIES = [flux, chroma, ovis_image, longcat_image, z_image, sd3, auraflow, lumina2, hunyuan_image]

# Sizes


@pytest.mark.parametrize(
    ("size", "base", "unit", "expected"),
    [
        ((272, 400), 128, 4, [(68, 100), (136, 200), (272, 400)]),
        ((272, 400), 128, 16, [(64, 96), (128, 192), (272, 400)]),
        ((2048, 4096), 1024, 16, [(512, 1024), (1024, 2048), (2048, 4096)]),
        ((1536, 1536), 1024, 16, [(768, 768), (1536, 1536)]),
        ((1024, 512), 1024, 16, [(1024, 512)]),
        ((16, 4096), 512, 16, [(16, 512), (16, 1024), (16, 2048), (16, 4096)]),
    ],
)
def test_sizes_double_from_below_the_base(size: tuple[int, int], base: int, unit: int, expected: list[tuple[int, int]]) -> None:
    recipe = Recipe(*size, base, strength=0.7, num_inference_steps=4, seed=0, ntk=None, proportional=False)
    assert recipe.sizes(unit) == expected


def test_stages_run_at_their_sizes_with_the_last_share_of_the_steps(sparse_calls: list[tuple[int, ...]]) -> None:
    pipe, call = make()
    in_large_tiles(pipe)
    accelerate(pipe, CLEAR(3.0))
    seen = Forwards(pipe)
    picture = draw(pipe, call, height=272, width=400, base=128, num_inference_steps=3, strength=0.7)
    assert picture.size == (400, 272)
    assert seen.tokens == [17 * 25] * 3 + [34 * 50] * 2 + [68 * 100] * 2
    # the base is the original's, the method draws the rest
    assert {shape[2] for shape in sparse_calls} == {34 * 50 + TEXT, 68 * 100 + TEXT}
    assert len(sparse_calls) == 2 * 2 * 4


def test_the_steps_that_are_left() -> None:
    # CLEAR's notebook: 20 steps at 0.7 leave 14, the first at sigma 0.875 under FLUX.1's shift of 3
    sigmas = latents.partial_sigmas(20, 0.7)
    assert len(sigmas) == 14
    assert 3 * sigmas[0] / (1 + 2 * sigmas[0]) == pytest.approx(0.875)
    assert latents.partial_sigmas(4, 0.01) == [0.25]
    assert latents.partial_sigmas(4, 1.0) == [1.0, 0.75, 0.5, 0.25]


# What a stage starts from


@pytest.mark.parametrize("builder", FAMILIES, ids=lambda b: b.__name__)
def test_the_base_is_the_pipelines_own_picture(builder: Any) -> None:
    pipe, call = make(builder)
    if builder is auraflow:
        pipe.vae.register_to_config(shift_factor=None)  # its autoencoder has none, and its pipeline applies none
    size = {name: side * token_pixels(pipe, pipe.transformer) // 4 for name, side in SIZE.items()}
    expected = pipe(**call, **size, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    accelerate(pipe, CLEAR(2.0))
    assert same(draw(pipe, call, **size, base=size["width"], seed=5), expected)
    picture = draw(pipe, call, **size, base=size["width"] // 2)
    assert picture.size == (size["width"], size["height"])
    darkest, brightest = picture.convert("L").getextrema()
    assert darkest < brightest


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_stage_starts_from_the_enlarged_picture_and_noise(shift: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    pipe, call = make()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift=shift)
    in_large_tiles(pipe)  # one
    seen = Forwards(pipe)
    draw(pipe, call, strength=0.5, seed=7, folder=tmp_path)
    sigma = shift * 0.5 / (1 + (shift - 1) * 0.5)
    assert seen.times[4] == pytest.approx(sigma)
    before = load_file(tmp_path / "stage-0-24x16.safetensors")["latents"]
    config = pipe.vae.config
    with torch.no_grad():
        grid = pipe._unpack_latents(before, 16, 24, 2) / config.scaling_factor + config.shift_factor
        large = torch.nn.functional.interpolate(pipe.vae.decode(grid).sample, (32, 48), mode="bicubic", antialias=True).clamp(-1, 1)
        clean = (pipe.vae.encode(large).latent_dist.mean - config.shift_factor) * config.scaling_factor
    noise = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(8))
    expected = pipe._pack_latents((1 - sigma) * clean + sigma * noise, 1, 4, 16, 24)
    torch.testing.assert_close(seen.latents[4], expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_the_shift_stays_where_it_was_fitted() -> None:
    pipe, call = make()
    fitted = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64, "base_shift": 0.5, "max_shift": 1.15}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **fitted)
    seen, before = Forwards(pipe), pipe.scheduler
    draw(pipe, call, strength=0.5)  # 24, then 96 tokens
    shift = math.exp(1.15)
    assert seen.times[4] == pytest.approx(shift * 0.5 / (1 + (shift - 1) * 0.5), rel=1e-5)
    line = math.exp(0.5 + (24 - 16) * 0.65 / 48)
    assert seen.times[1] == pytest.approx(line * 0.75 / (1 + (line - 1) * 0.75), rel=1e-5)
    assert pipe.scheduler is before
    assert latents.scheduler_for(before, 64) is before


def test_rotary_base_is_rescaled_above_the_base_size() -> None:
    pipe, call = make()
    seen = Forwards(pipe)
    draw(pipe, call, strength=0.5)
    assert seen.thetas == [10000] * 4 + [100_000] * 2
    seen.thetas.clear()
    draw(pipe, call, strength=0.5, ntk=3.0)
    assert seen.thetas == [10000] * 4 + [30000.0] * 2
    assert pipe.transformer.pos_embed.theta == 10000


def test_rotary_base_elsewhere() -> None:
    from dit_accel.pipelines.builtin.transformer import BuiltinTransformer2DModel
    from dit_accel.pipelines.hires.recipe import rotary_factor

    transformer = make()[0].transformer
    assert rotary_factor(transformer, None) == 10
    transformer.__class__ = BuiltinTransformer2DModel
    assert (rotary_factor(transformer, None), rotary_factor(transformer, 2.0)) == (1.0, 2.0)
    assert rotary_factor(make(chroma)[0].transformer, None) == 1.0
    pipe, call = make(sd3)
    assert rotary_factor(pipe.transformer, None) == 1.0
    with pytest.raises(UnsupportedModelError, match="SD3Transformer2DModel does not have: leave ntk out"):
        draw(pipe, call, ntk=4.0)


@pytest.mark.parametrize(("builder", "largest"), [(sd3, 128), (auraflow, 64)])
def test_learned_positions_end_somewhere(builder: Any, largest: int) -> None:
    pipe, call = make(builder)
    forwards: list[object] = []
    pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(None))
    with pytest.raises(UnsupportedModelError, match=f"learned positions for {largest} pixels a side, fewer than {2 * largest}×{largest}"):
        draw(pipe, call, height=largest, width=2 * largest, base=32)
    assert forwards == []
    assert draw(pipe, call, height=largest, width=largest // 2, base=32).size == (largest // 2, largest)


# What is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_left_as_it_was(fails: bool) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0), dense_steps=1)
    context = getattr(pipe.transformer, CONTEXT).context
    operators, parts, bar = operators_of(pipe), dict(pipe.components), dict(pipe._progress_bar_config)
    settings = {k: v for k, v in vars(context).items() if k in ("enabled", "always", "trained_tokens", "assignment")}
    weights = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    hooks = len(pipe.transformer._forward_pre_hooks)
    seen = Forwards(pipe)
    seen.fail_at = 5 if fails else -1
    if fails:
        with pytest.raises(KeyboardInterrupt):
            draw(pipe, call, proportional=True)
    else:
        draw(pipe, call, proportional=True)
    assert {k: v for k, v in vars(context).items() if k in settings} == settings
    assert operators_of(pipe) == operators
    assert dict(pipe.components) == parts
    assert pipe.vae.use_tiling is False
    assert pipe.transformer.pos_embed.theta == 10000
    assert pipe._progress_bar_config == bar
    assert len(pipe.transformer._forward_pre_hooks) == hooks + 1  # that of `seen`
    assert all(torch.equal(value, weights[name]) for name, value in pipe.transformer.state_dict().items())


def test_dense_steps_count_from_each_stages_own_first_step(sparse_calls: list[tuple[int, ...]]) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0), dense_steps=1)
    draw(pipe, call, strength=0.75)
    assert len(sparse_calls) == 2 * 4  # two of the stage's three steps, in four layers


def test_the_autoencoder_works_in_tiles_above_the_base_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    found: list[tuple[str, bool]] = []
    for name in ("encode", "decode"):
        original = getattr(pipe.vae, name)
        monkeypatch.setattr(pipe.vae, name, lambda *a, o=original, n=name, **k: (found.append((n, pipe.vae.use_tiling)), o(*a, **k))[1])
    draw(pipe, call)
    assert found == [("decode", True), ("encode", True), ("decode", True)]
    found.clear()
    draw(pipe, call, base=48)
    assert found == [("decode", False)]


# What it runs on, and what it refuses


@pytest.mark.parametrize(
    ("builder", "words"),
    [
        (pixart_sigma, "a FlowMatchEulerDiscreteScheduler"),
        (qwen_image, "an autoencoder with encode, latent_channels and scaling_factor"),
        (flux2, "packed as FLUX packs them"),
    ],
    ids=["pixart_sigma", "qwen_image", "flux2"],
)
def test_unsupported_pipelines_are_refused_with_a_reason(builder: Any, words: str) -> None:
    pipe, call = make(builder)
    with pytest.raises(UnsupportedModelError) as error:
        draw(pipe, call)
    assert words in str(error.value)
    assert type(pipe).__name__ in str(error.value)


def test_a_bare_transformer_and_no_transformer_are_refused() -> None:
    pipe, call = make()
    with pytest.raises(UnsupportedModelError, match="one transformer"):
        draw(pipe.transformer, call)
    with pytest.raises(UnsupportedModelError, match="no family is registered for AutoencoderKL"):
        draw(pipe.vae, call)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"height": 30}, "height and width must be multiples of 4 pixels, a token's side, not 30 and 48"),
        ({"base": 3}, "base must be at least 4 pixels"),
        ({"strength": 0}, r"strength must be a share of the steps in \(0, 1\], not 0"),
        ({"strength": 1.5}, r"strength must be a share of the steps in \(0, 1\], not 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps must be an int >= 1, not 0"),
        ({"ntk": 0.0}, "ntk must be a factor > 0 or None, not 0.0"),
        ({"ntk": float("nan")}, "ntk must be a factor > 0 or None, not nan"),
        ({"seed": -1}, "seed must be an int >= 0, not -1"),
        ({"proportional": 1}, "proportional must be True or False, not 1"),
        ({"guidance": 3.5}, r"FluxPipeline's call takes no guidance: leave it out"),
        ({"sigmas": [1.0]}, "generate_hires sets sigmas itself"),
        ({"prompt": ["a", "b"]}, "prompt must be one text or None, not"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_anything_runs(changed: dict[str, Any], words: str) -> None:
    pipe, call = make()
    seen = Forwards(pipe)
    with pytest.raises(ValueError, match=words):
        draw(pipe, call, **changed)
    assert seen.tokens == []


def test_proportional_wants_a_method() -> None:
    pipe, call = make()
    with pytest.raises(NotAcceleratedError, match="proportional requires an accelerated pipeline"):
        draw(pipe, call, proportional=True)


def test_the_public_name() -> None:
    assert dit_accel.generate_hires is hires.generate_hires


def test_rising_noise_levels_are_refused() -> None:
    pipe, call = make()
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, invert_sigmas=True)
    with pytest.raises(UnsupportedModelError, match="noise levels fall"):
        draw(pipe, call)


def test_half_precision() -> None:
    pipe, call = make()
    pipe.to(torch.bfloat16)
    call = {name: value.bfloat16() for name, value in call.items()}
    expected = pipe(**call, **SIZE, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    accelerate(pipe, CLEAR(3.0))
    assert same(draw(pipe, call, base=48, seed=5), expected)
    assert same(draw(pipe, call), draw(pipe, call))
