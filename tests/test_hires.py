"""High resolution on a tiny FLUX with a tiny autoencoder: sizes, the start of each stage, resuming, refusals, and what is left behind."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_image import chroma, flux, pixart_sigma, qwen_image, sd3
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, Fovea, accelerate, generate_hires, restore
from dit_accel.context import Context
from dit_accel.errors import NotAcceleratedError, StageError, UnsupportedModelError
from dit_accel.patch import CONTEXT, operators_of
from dit_accel.pipelines import hires
from dit_accel.pipelines.hires import forecast, latents
from dit_accel.pipelines.hires.recipe import NTK, Recipe
from dit_accel.plan import multiply_adds

SIZE: dict[str, Any] = {"height": 32, "width": 48}
ASKED: dict[str, Any] = {**SIZE, "base": 24, "num_inference_steps": 4, "forecast": False}
TEXT = 12


def make(builder: Any = flux, seed: int = 0, **parts: Any) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline, and the embeddings that stand for its prompt."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe, call = builder()
    pipe.register_modules(**parts)
    pipe.set_progress_bar_config(disable=True)
    sizes = ("height", "width", "num_inference_steps", "output_type")
    return pipe, {name: value for name, value in call.items() if name not in sizes}


def in_large_tiles(pipe: Any) -> None:
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 128, 64


def draw(pipe: Any, call: dict[str, Any], **asked: Any) -> Image.Image:
    return generate_hires(pipe, **{**ASKED, **call, **asked})


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and a.tobytes() == b.tobytes()


class Forwards:
    """What a pipeline's transformer is called with, forward by forward."""

    def __init__(self, pipe: Any) -> None:
        self.tokens: list[int] = []
        self.latents: list[Tensor] = []
        self.times: list[float] = []
        self.thetas: list[float] = []
        self.fail_at = -1
        pipe.transformer.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if len(self.tokens) == self.fail_at:
            raise KeyboardInterrupt
        self.tokens.append(kwargs["hidden_states"].shape[1])
        self.latents.append(kwargs["hidden_states"].clone())
        self.times.append(float(kwargs["timestep"][0]))
        self.thetas.append(module.pos_embed.theta)


# Sizes


@pytest.mark.parametrize(
    ("size", "base", "unit", "wanted"),
    [
        ((272, 400), 128, 4, [(68, 100), (136, 200), (272, 400)]),
        ((272, 400), 128, 16, [(64, 96), (128, 192), (272, 400)]),
        ((2048, 4096), 1024, 16, [(512, 1024), (1024, 2048), (2048, 4096)]),
        ((1536, 1536), 1024, 16, [(768, 768), (1536, 1536)]),
        ((1024, 512), 1024, 16, [(1024, 512)]),
        ((16, 4096), 512, 16, [(16, 512), (16, 1024), (16, 2048), (16, 4096)]),
    ],
)
def test_sizes_double_from_below_the_base(size: tuple[int, int], base: int, unit: int, wanted: list[tuple[int, int]]) -> None:
    recipe = Recipe(*size, base, strength=0.7, num_inference_steps=4, seed=0, ntk=None, proportional=False)
    assert recipe.sizes(unit) == wanted


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


def test_the_base_is_the_pipelines_own_picture() -> None:
    pipe, call = make()
    wanted = pipe(**call, **SIZE, num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    accelerate(pipe, CLEAR(2.0))
    assert same(draw(pipe, call, base=48, seed=5), wanted)


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
    wanted = pipe._pack_latents((1 - sigma) * clean + sigma * noise, 1, 4, 16, 24)
    torch.testing.assert_close(seen.latents[4], wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


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
    assert seen.thetas == [10000] * 4 + [10000 * NTK] * 2
    seen.thetas.clear()
    draw(pipe, call, strength=0.5, ntk=3.0)
    assert seen.thetas == [10000] * 4 + [30000.0] * 2
    assert pipe.transformer.pos_embed.theta == 10000


def test_rotary_base_elsewhere() -> None:
    from dit_accel.pipelines.builtin.transformer import BuiltinTransformer2DModel
    from dit_accel.pipelines.hires.recipe import rotary_factor

    transformer = make()[0].transformer
    assert rotary_factor(transformer, None) == NTK
    transformer.__class__ = BuiltinTransformer2DModel
    assert (rotary_factor(transformer, None), rotary_factor(transformer, 2.0)) == (1.0, 2.0)
    assert rotary_factor(make(chroma)[0].transformer, None) == 1.0
    pipe, call = make(sd3)
    assert rotary_factor(pipe.transformer, None) == 1.0
    with pytest.raises(UnsupportedModelError, match="SD3Transformer2DModel does not have: leave ntk out"):
        draw(pipe, call, ntk=4.0)


# The scale of the logits


def scales(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """Grows by (tokens, scale) at every call of an operator."""
    from dit_accel import processor

    found: list[tuple[int, float | None]] = []
    original: Any = processor.attend

    def noted(
        query: Tensor, key: Tensor, value: Tensor, spec: Any, layout: Any, plan: Any, params: Any, scale: Any, *more: Any, **k: Any
    ) -> Any:
        found.append((query.shape[2], scale))
        return original(query, key, value, spec, layout, plan, params, scale, *more, **k)

    monkeypatch.setattr(processor, "attend", noted)
    return found


def test_proportional_scale_is_clears_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    found = scales(pipe, monkeypatch)
    draw(pipe, call, strength=0.5, proportional=True)
    trained, tokens = 4 * 6 + TEXT, 8 * 12 + TEXT
    assert {n for n, _ in found} == {tokens}
    assert [scale for _, scale in found] == pytest.approx([math.sqrt(math.log(tokens, trained) / 16)] * len(found))
    assert getattr(pipe.transformer, CONTEXT).context.trained_tokens is None


def test_accelerate_scales_the_logits_as_the_operator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    run = {**call, **SIZE, "num_inference_steps": 2, "output_type": "latent"}

    def latents_with(**settings: Any) -> Tensor:
        accelerate(pipe, CLEAR(30.0), **settings)  # all of the picture: dense attention
        try:
            found: Tensor = pipe(**run, generator=torch.Generator().manual_seed(0)).images
        finally:
            restore(pipe)
        return found

    with pytest.MonkeyPatch.context() as patch:
        off = scales(pipe, patch)
        plain = latents_with()
        assert {scale for _, scale in off} == {None}  # the operator's own: not one bit changes
    tokens = 8 * 12 + TEXT
    assert torch.equal(latents_with(trained_tokens=tokens), plain)  # sqrt(log N / log N) is 1
    scaled = latents_with(trained_tokens=30)
    factor = math.sqrt(math.log(tokens) / math.log(30))
    for module in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        for name in ("norm_q", "norm_added_q"):  # what multiplies the queries multiplies the logits
            if getattr(module.attn, name, None) is not None:
                getattr(module.attn, name).weight.data *= factor
    assert not torch.allclose(scaled, plain, rtol=1e-3)
    torch.testing.assert_close(latents_with(), scaled, rtol=0, atol=1e-5 * float(scaled.abs().max()))


@pytest.mark.parametrize("tokens", [1, 0, -3, True, 4608.0, "4608"])
def test_wrong_trained_tokens_are_refused(tokens: Any) -> None:
    pipe, _ = make()
    with pytest.raises(ValueError, match="trained_tokens is a number of tokens >= 2 or None"):
        accelerate(pipe, trained_tokens=tokens)
    assert not hasattr(pipe.transformer, CONTEXT)


@pytest.mark.crossover
def test_scaled_logits_are_not_left_to_the_original() -> None:
    pipe, _ = make()
    context: Context = getattr(accelerate(pipe, Fovea(), trained_tokens=30).transformer, CONTEXT).context

    class Loses:
        loses = True

    context.crossover = Loses()  # type: ignore[assignment]
    with torch.no_grad():
        assert not context.leaves
        context.trained_tokens = None
        assert context.leaves


# Stopping and resuming


def test_the_same_arguments_draw_the_same_picture() -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    torch.manual_seed(1)
    first = draw(pipe, call)
    torch.manual_seed(2)
    assert same(draw(pipe, call), first)
    assert not same(draw(pipe, call, seed=1), first)
    assert not same(draw(pipe, call, strength=0.3), first)


def test_a_stopped_picture_continues_to_the_same_bits(tmp_path: Path) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    asked = {"base": 12, "folder": tmp_path / "stages", "strength": 0.75}  # three stages of 4, 3 and 3 steps
    wanted = draw(pipe, call, **{**asked, "folder": None})
    seen = Forwards(pipe)
    seen.fail_at = 5  # in the second stage
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, call, **asked)
    assert sorted(file.name for file in (tmp_path / "stages").iterdir()) == [
        "settings.json",
        "stage-0-12x8.json",
        "stage-0-12x8.safetensors",
    ]
    assert pipe.transformer.pos_embed.theta == 10000
    again, call = make()  # another process
    accelerate(again, CLEAR(3.0))
    seen = Forwards(again)
    assert same(draw(again, call, **asked), wanted)
    assert len(seen.tokens) == 6
    seen.tokens.clear()
    assert same(draw(again, call, **asked), wanted)  # all of it is there
    assert seen.tokens == []


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    seen = Forwards(pipe)
    for changed, words in [
        ({"strength": 0.6}, "strength: wanted 0.7 as before, got 0.6"),
        ({"seed": 3}, "seed: wanted 0 as before, got 3"),
        ({"ntk": 2.0}, "ntk: wanted 10.0 as before, got 2.0"),
        ({"guidance_scale": 5.0}, "call: wanted"),
        ({"prompt_embeds": call["prompt_embeds"] + 1}, "call: wanted"),
    ]:
        with pytest.raises(StageError, match="other settings") as error:
            draw(pipe, {**call, **changed}, folder=tmp_path)
        assert words in str(error.value)
        assert str(error.value).count("as before") == 1
    accelerate(pipe, CLEAR(3.0))
    with pytest.raises(StageError, match="method: wanted None as before"):
        draw(pipe, call, folder=tmp_path)
    restore(pipe)
    pipe.transformer.proj_out.weight.data[0, 0] += 1
    with pytest.raises(StageError, match=r"weights: wanted '[0-9a-f]+' as before"):
        draw(pipe, call, folder=tmp_path)
    assert seen.tokens == []
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "record", "settings"])
def test_a_damaged_stage_is_named(damage: str, tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    file = tmp_path / {"record": "stage-1-48x32.json", "settings": "settings.json"}.get(damage, "stage-1-48x32.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-1] ^= 1
    file.write_bytes(data if damage == "bit" else data[: len(data) // 2])
    if damage == "missing":
        file.unlink()
    seen = Forwards(pipe)
    with pytest.raises(StageError, match=file.name):
        draw(pipe, call, folder=tmp_path)
    assert seen.tokens == []


def test_stages_without_their_settings_are_refused(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StageError, match=r"settings.json is missing, but \['stage-0"):
        draw(pipe, call, folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pipe, call = make()
    seen = Forwards(pipe)
    with pytest.raises(ValueError, match="wanted a folder that can be written to"):
        draw(pipe, call, folder=tmp_path / "file")
    assert seen.tokens == []


# What is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_the_pipeline_is_left_as_it_was(fails: bool) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0), dense_steps=1)
    context = getattr(pipe.transformer, CONTEXT).context
    operators, parts, bar = operators_of(pipe), dict(pipe.components), dict(pipe._progress_bar_config)
    settings = {k: v for k, v in vars(context).items() if k in ("enabled", "in_order", "always", "trained_tokens", "dense_steps", "spec")}
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


@pytest.mark.parametrize("builder", [sd3, chroma], ids=lambda b: b.__name__)
def test_other_flow_families(builder: Any) -> None:
    pipe, call = make(builder)
    accelerate(pipe, CLEAR(2.0))
    unit = latents.token_pixels(pipe, pipe.transformer)
    picture = draw(pipe, call, height=8 * unit, width=12 * unit, base=6 * unit)
    assert picture.size == (12 * unit, 8 * unit)
    assert picture.convert("L").getextrema()[0] < picture.convert("L").getextrema()[1]


@pytest.mark.parametrize(
    ("builder", "words"),
    [(pixart_sigma, "a FlowMatchEulerDiscreteScheduler"), (qwen_image, "an autoencoder with encode, latent_channels and scaling_factor")],
    ids=["pixart_sigma", "qwen_image"],
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
        ({"height": 30}, "height and width are multiples of 4 pixels, one token's side, got 30 and 48"),
        ({"base": 3}, "base is at least 4 pixels"),
        ({"strength": 0}, r"strength is a share of the steps in \(0, 1\], got 0"),
        ({"strength": 1.5}, r"strength is a share of the steps in \(0, 1\], got 1.5"),
        ({"num_inference_steps": 0}, "num_inference_steps is an int >= 1, got 0"),
        ({"ntk": 0.0}, "ntk is a factor > 0 or None, got 0.0"),
        ({"ntk": float("nan")}, "ntk is a factor > 0 or None, got nan"),
        ({"seed": -1}, "seed is an int >= 0, got -1"),
        ({"proportional": 1}, "proportional is True or False, got 1"),
        ({"guidance": 3.5}, r"wanted arguments of FluxPipeline's call, got \['guidance'\]"),
        ({"sigmas": [1.0]}, r"generate_hires sets \['sigmas'\] itself"),
        ({"prompt": ["a", "b"]}, "prompt is one text or None, got"),
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
    with pytest.raises(NotAcceleratedError, match="proportional wants a pipeline patched"):
        draw(pipe, call, proportional=True)


# The forecast


def test_the_forecast_names_what_is_to_come(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    seen = Forwards(pipe)
    draw(pipe, call, forecast=True, strength=0.5, folder=tmp_path)
    text = capsys.readouterr().out
    assert "Forecast, not a measurement" in text
    assert "24×16" in text
    assert "48×32" in text
    assert seen.tokens == [24, 24] + [24] * 4 + [96] * 2  # two forwards, then the stages
    (tmp_path / "stage-1-48x32.json").unlink()
    draw(pipe, call, forecast=True, strength=0.5, folder=tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if "×" in line and "│" in line]
    assert len(rows) == 1
    assert "48×32" in rows[0]


def test_forecast_counts_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    pipe, call = make()
    shape = forecast.Shape.of(pipe.transformer, 4, TEXT)

    def first(size: tuple[int, int]) -> tuple[Any, Any]:
        return latents.first_forward(pipe, pipe.transformer, {**call, "height": size[0], "width": size[1], "num_inference_steps": 1})

    timed = forecast.timed_forward(pipe.transformer, *first((16, 24)))
    counts = []
    for size in ((16, 24), (32, 48)):
        args, kwargs = first(size)
        # torch counts no fused attention on a CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            pipe.transformer(*args, **kwargs)
        counts.append(counter.get_total_flops())
    wanted = counts[1] / counts[0]
    assert forecast.forward_seconds(timed, shape, (16, 24), (32, 48), None) / timed.seconds == pytest.approx(wanted, rel=1e-6)
    original, method = (forecast.forward_seconds(timed, shape, (16, 24), (128, 128), spec) for spec in (None, CLEAR(2.0)))
    share = multiply_adds(CLEAR(2.0), shape.layout((128, 128)), 16)
    saved = (1 - share) * 2 * 1024**2 * 32 * 4 / (counts[0] / 2)
    assert (original - method) / timed.seconds == pytest.approx(saved, rel=1e-6)
    assert 0 < share < 1


def test_memory_grows_with_the_picture_and_shrinks_with_tiles() -> None:
    pipe, _ = make()
    shape = forecast.Shape.of(pipe.transformer, 4, 0)
    small, large, tiled = (
        forecast.memory_bytes(pipe, pipe.transformer, shape, (side, side), tile, 1) for side, tile in ((32, None), (64, None), (64, 32))
    )
    assert large["denoising"] == 4 * small["denoising"] == 4 * forecast.LIVE * 64 * 32 * 4
    assert large["autoencoder"] == 4 * small["autoencoder"] == 64 * 64 * (3 * 8 * 4 + 24)
    assert tiled["autoencoder"] == 32 * 32 * 3 * 8 * 4 + 64 * 64 * 24
    wanted = sum(p.numel() * 4 for part in (pipe.transformer, pipe.vae) for p in part.parameters())
    assert small["weights"] == large["weights"] == wanted


def test_settings_are_readable_json(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path, strength=0.5)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["height"], settings["width"], settings["strength"], settings["version"]) == (32, 48, 0.5, hires.VERSION)
    record = json.loads((tmp_path / "stage-1-48x32.json").read_text())
    assert (record["height"], record["width"], record["steps"], record["sigma"], record["seed"]) == (32, 48, 2, 0.5, 1)


def test_the_public_name() -> None:
    assert dit_accel.generate_hires is hires.generate_hires
