"""The model that ships with the package: its files, its loading by unmodified diffusers, its size, its pieces."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

from dit_accel import Fovea, accelerate, restore
from dit_accel.pipelines.builtin import WEIGHTS, builtin_pipeline
from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
from dit_accel.pipelines.builtin.components import make_pipeline
from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, CONCEPTS, article, vocabulary
from dit_accel.pipelines.builtin.transformer import FEATURES, BuiltinTransformer2DModel, place_features, stretch_ids
from dit_accel.pipelines.training import save_pipeline


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    loaded = builtin_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_the_folder_is_small_and_holds_no_pickle() -> None:
    files = [p for p in WEIGHTS.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 40e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".md", ".jsonl", ".jpg"}


def test_it_is_a_stock_pipeline(pipe: FluxPipeline) -> None:
    assert type(pipe) is FluxPipeline
    assert isinstance(pipe.transformer, FluxTransformer2DModel)
    assert json.loads((WEIGHTS / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}


@pytest.mark.parametrize("words", ["zzz qqq !!", "", "a panda " * 60], ids=["unknown", "empty", "too-long"])
def test_any_words_make_a_picture(pipe: FluxPipeline, words: str) -> None:
    call = {"height": 48, "width": 80, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "pt"}
    picture = pipe(words, generator=torch.Generator().manual_seed(0), **call).images
    assert picture.shape == (1, 3, 48, 80)
    assert bool(picture.isfinite().all())


def test_the_prompt_matters(pipe: FluxPipeline) -> None:
    call = {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 16, "output_type": "pt"}
    colours = {}
    for name in ("red", "blue", "green"):
        picture = pipe(f"a cat on a {name} background", generator=torch.Generator().manual_seed(0), **call).images
        colours[name] = picture[0, :, :8, :8].mean((1, 2))
    for index, name in enumerate(("red", "green", "blue")):
        assert int(colours[name].argmax()) == index, f"the corner on {name} is {colours[name]}"


def test_at_1024_pixels_the_ids_are_flux_own() -> None:
    ids = FluxPipeline._prepare_latent_image_ids(1, 64, 64, torch.device("cpu"), torch.float32)
    assert torch.equal(stretch_ids(ids), ids)


def test_ids_of_any_size_span_the_same_canvas() -> None:
    small = stretch_ids(FluxPipeline._prepare_latent_image_ids(1, 16, 16, torch.device("cpu"), torch.float32))
    large = stretch_ids(FluxPipeline._prepare_latent_image_ids(1, 32, 32, torch.device("cpu"), torch.float32))
    means = large.view(16, 2, 16, 2, 3).mean((1, 3)).view(-1, 3)
    assert torch.allclose(small, means)


def test_a_window_is_told_the_places_of_the_whole() -> None:
    whole = FluxPipeline._prepare_latent_image_ids(1, 12, 12, torch.device("cpu"), torch.float32)
    window = whole.view(12, 12, 3)[2:6, 5:11].reshape(-1, 3) + torch.tensor([12.0, 0, 0])
    for places in (stretch_ids, place_features):
        assert torch.allclose(places(window), places(whole).view(12, 12, -1)[2:6, 5:11].flatten(0, 1), atol=1e-6)
    assert place_features(whole).shape == (144, FEATURES)


def test_places_tell_the_middle_and_the_size() -> None:
    wide = FluxPipeline._prepare_latent_image_ids(1, 4, 9, torch.device("cpu"), torch.float32)
    told = place_features(wide).view(4, 9, -1)
    waves = (FEATURES - 3) // 2
    sines = told[..., : waves // 2]  # of rows
    assert torch.allclose(sines[:2], -sines[2:].flip(0), atol=1e-5)
    assert float(told[:, 4, waves // 2 : waves].abs().max()) < 1e-5  # the middle column
    assert torch.allclose(told[0, 0, -3:], torch.tensor([4 / 9, 1.0, math.log2(9 / 32)]))


def test_the_velocity_is_that_of_the_clean_prediction() -> None:
    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    text = {"joint_attention_dim": 8, "pooled_projection_dim": 8, "guidance_embeds": False}
    model = BuiltinTransformer2DModel(in_channels=4, **sizes, **text, predicts_clean=True)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.proj_out.bias.copy_(torch.arange(4.0))  # whatever comes in, this is clean
    x, sigma = torch.randn(2, 6, 4), torch.tensor([0.5, 0.01])
    ids = FluxPipeline._prepare_latent_image_ids(1, 2, 3, torch.device("cpu"), torch.float32)
    call = {
        "encoder_hidden_states": torch.randn(2, 5, 8), "pooled_projections": torch.randn(2, 8), "timestep": sigma, "img_ids": ids,
        "txt_ids": torch.zeros(5, 3),
    }  # fmt: skip
    with torch.no_grad():
        (velocity,) = model(x, **call, return_dict=False)
        assert torch.equal(model(x, **call).sample, velocity)
    wanted = (x - torch.arange(4.0)) / torch.tensor([0.5, 0.05]).view(2, 1, 1)  # no velocity divides by less than 0.05
    assert torch.allclose(velocity, wanted, atol=1e-6)


def test_a_model_of_clean_predictions_loads_and_is_accelerated(tmp_path: Path) -> None:
    made = make_pipeline(0, num_single_layers=1)
    made.vae.fit(torch.randn(500, 192, generator=torch.Generator().manual_seed(0)))
    fill_randomly(made.transformer)
    save_pipeline(made, tmp_path / "model")
    loaded = FluxPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 192, "num_inference_steps": 2, "max_sequence_length": 8, "output_type": "latent"}

    def draw(**more: Any) -> Tensor:
        return loaded("a cat", generator=torch.Generator().manual_seed(0), **call | more).images

    before = draw()
    assert float((draw(guidance_scale=1.0) - before).norm() / before.norm()) > 1e-3
    accelerate(loaded, Fovea(1.0))
    assert float((draw() - before).norm() / before.norm()) < 1e-4
    restore(loaded)
    assert torch.equal(draw(), before)


def test_untrained_decoder_inverts_the_encoder_on_its_subspace() -> None:
    torch.manual_seed(0)
    vae = PatchAutoencoder()
    patches = torch.randn(500, 16) @ torch.randn(16, 192)
    vae.fit(patches)
    x = torch.nn.functional.pixel_shuffle(patches[:4].T.reshape(1, 192, 2, 2), 8)
    with torch.no_grad():
        (decoded,) = vae.decode(vae.encode(x).latents, return_dict=False)
    assert torch.allclose(decoded, x, atol=1e-3)
    latents = vae.encode(torch.nn.functional.pixel_shuffle(patches.T.reshape(1, 192, 20, 25), 8)).latents
    spread = latents.std((0, 2, 3))
    assert spread[0] == pytest.approx(1.0, abs=1e-2)
    assert bool((spread.diff() <= 1e-3).all())


def test_every_caption_word_is_known() -> None:
    words = set(vocabulary())
    for noun in CONCEPTS.values():
        assert set(article(noun).split()) <= words
    assert set(" ".join(BACKGROUNDS).split()) <= words


def test_the_licence_note_and_log_are_there() -> None:
    assert "MIT" in (WEIGHTS / "README.md").read_text()
    assert len(Path(WEIGHTS / "training-log.jsonl").read_text().splitlines()) > 10
