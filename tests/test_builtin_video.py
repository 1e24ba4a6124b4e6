"""The small video model: its loading by unmodified diffusers, its clips, its pieces."""

import copy
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from builtin_fixtures import clip, discs
from conftest import fill_randomly
from diffusers import WanPipeline
from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed
from torch import Tensor

from dit_accel import SLA, AttentionSpec, Fovea, accelerate, restore, summary
from dit_accel.pipelines import training
from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, CONCEPTS, Renderings, article
from dit_accel.pipelines.builtin.drawings import vocabulary as picture_vocabulary
from dit_accel.pipelines.builtin.transformer import LEAST_SIGMA
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, builtin_video_pipeline, train
from dit_accel.pipelines.builtin_video.autoencoder import ClipAutoencoder
from dit_accel.pipelines.builtin_video.motion import MOTIONS, NOUNS, vocabulary
from dit_accel.pipelines.builtin_video.transformer import CANVAS, PlacedPatches, StretchedRotary

CALL = {"num_inference_steps": 2, "guidance_scale": 1.0, "max_sequence_length": TEXT_TOKENS}
SPECS = {
    "fovea-cubes": Fovea(density=0.3, tile=(4, 4, 4)),
    "fovea-slabs": Fovea(density=0.3, tile=(2, 8, 8)),
    "sla-cubes": SLA(0.3, tile=(4, 4, 4)),
    "sla-slabs": SLA(0.3, tile=(2, 8, 8)),
}


@pytest.fixture(scope="module")
def renderings() -> Renderings:
    return discs()


@pytest.fixture(scope="module", autouse=True)
def few_clips() -> Iterator[None]:
    """Axes over time are fitted to few clips."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "FITTED_ON", (128, 256) * 4)
        yield


@pytest.fixture(scope="module")
def pipe(renderings: Renderings, tmp_path_factory: pytest.TempPathFactory) -> WanPipeline:
    """Two blocks with noise in every weight, an autoencoder fitted to the discs, through a folder."""
    made = train.make_pipeline(0, num_layers=2)
    train.fit_encoder(made, renderings, random.Random(0))
    fill_randomly(made.transformer)
    folder = tmp_path_factory.mktemp("video") / "model"
    training.save_pipeline(made, folder)
    loaded = builtin_video_pipeline(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def draw(pipe: WanPipeline, prompt: str = "a cat moving left", **call: Any) -> Tensor:
    """Latents of a small clip from fixed noise."""
    call = {"height": 64, "width": 96, "num_frames": 17, "output_type": "latent"} | CALL | call
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **call).frames


# What it films


@pytest.mark.parametrize(
    ("height", "width", "frames", "grid"),
    [(48, 80, 17, (5, 6, 10)), (64, 64, 1, (1, 8, 8)), (32, 32, 9, (3, 4, 4))],
    ids=["odd-tokens", "picture", "short"],
)
def test_sizes_and_frames(pipe: WanPipeline, height: int, width: int, frames: int, grid: tuple[int, int, int]) -> None:
    latents = draw(pipe, height=height, width=width, num_frames=frames)
    assert latents.shape == (1, pipe.vae.config.z_dim, *grid)
    clip = draw(pipe, height=height, width=width, num_frames=frames, output_type="pt")
    assert clip.shape == (1, frames, 3, height, width)
    assert bool(clip.isfinite().all())


@pytest.mark.parametrize("words", ["zzz qqq !!", "", "a panda " * 60], ids=["unknown", "empty", "too-long"])
def test_any_words_make_a_clip(pipe: WanPipeline, words: str) -> None:
    assert bool(draw(pipe, words, guidance_scale=2.0).isfinite().all())


def test_the_same_noise_gives_the_same_clip(pipe: WanPipeline) -> None:
    assert torch.equal(draw(pipe), draw(pipe))
    assert not torch.equal(draw(pipe), draw(pipe, "a cat moving right"))


@pytest.mark.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
def test_accelerated_and_restored(pipe: WanPipeline, spec: AttentionSpec) -> None:
    before = draw(pipe, height=128, width=144)
    accelerate(pipe, spec)
    try:
        changed = draw(pipe, height=128, width=144)
        layers = summary(pipe, show=False)
    finally:
        restore(pipe)
    assert len(layers) == len(pipe.transformer.blocks)
    error = float((changed - before).norm() / before.norm())
    assert 0 < error < 1
    assert torch.equal(draw(pipe, height=128, width=144), before)


@pytest.mark.parametrize("spec", [Fovea(1.0, tile=(4, 4, 4)), Fovea(radius=1000.0, tile=(2, 8, 8))], ids=["density", "radius"])
def test_all_keys_kept_is_the_original(pipe: WanPipeline, spec: AttentionSpec) -> None:
    before = draw(pipe)
    accelerate(pipe, spec)
    try:
        after = draw(pipe)
    finally:
        restore(pipe)
    assert float((after - before).norm() / before.norm()) < 1e-4


# Positions


def rotations(rope: WanRotaryPosEmbed, frames: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    cos, sin = rope(torch.empty(1, 1, frames, 2 * height, 2 * width))
    return cos, sin


@pytest.mark.parametrize(("height", "width"), [(CANVAS, CANVAS), (CANVAS, 20), (7, CANVAS)])
def test_on_the_canvas_positions_are_wans_own(height: int, width: int) -> None:
    ours, stock = (rotations(cls(64, (1, 2, 2), 1024), 5, height, width) for cls in (StretchedRotary, WanRotaryPosEmbed))
    assert torch.equal(ours[0], stock[0])
    assert torch.equal(ours[1], stock[1])


def test_sizes_span_the_same_canvas() -> None:
    rope = StretchedRotary(64, (1, 2, 2), 1024)

    def angle(side: int) -> Tensor:
        """Angles of the fastest row frequency along the first column, which stay below π between neighbours of the larger grid."""
        cos, sin = (x.view(side, side, 64)[:, 0, 24 + 2] for x in rotations(rope, 1, side, side))
        steps = torch.atan2(sin[1:] * cos[:-1] - cos[1:] * sin[:-1], cos[1:] * cos[:-1] + sin[1:] * sin[:-1])
        return torch.cat([torch.atan2(sin[:1], cos[:1]), steps]).cumsum(0)

    assert torch.allclose(angle(64).view(32, 2).mean(1), angle(32), atol=1e-4)


def test_the_patch_embedding_is_a_convolution_and_learns_in_bfloat16() -> None:
    """Its gradients are finite at 512 pixels, where those of torch's convolution are not on every CPU."""
    torch.manual_seed(0)
    embedding = PlacedPatches(32, 64, (1, 2, 2)).double()
    nn.init.zeros_(embedding.place.weight)
    latents = torch.randn(2, 32, 2, 6, 10, dtype=torch.float64)
    expected = F.conv3d(latents, embedding.weight, embedding.bias, stride=(1, 2, 2))
    torch.testing.assert_close(embedding(latents), expected, rtol=1e-12, atol=1e-12)
    embedding = embedding.float()
    with torch.autocast("cpu", torch.bfloat16):
        tokens = embedding(torch.randn(1, 32, 1, 64, 64)).flatten(2).transpose(1, 2)
    (tokens.float() @ torch.randn(64, 8)).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in embedding.parameters())


def test_a_token_knows_its_place(pipe: WanPipeline) -> None:
    """Places follow the axes, and a larger raster of the same shape samples the same ones more finely."""
    embedding = pipe.transformer.patch_embedding

    def added(height: int, width: int) -> Tensor:
        empty = torch.zeros(1, embedding.in_channels, 2, 2 * height, 2 * width)
        with torch.no_grad():
            return (embedding(empty) - embedding.bias.view(1, -1, 1, 1, 1))[0]  # [inner, T, H, W]

    small, large = added(8, 8), added(24, 24)
    assert torch.allclose(small, large[:, :, 1::3, 1::3], atol=1e-4)
    ends = [small[:, 1, 0, 0] - small[:, 0, 0, 0], small[:, 0, 7, 0] - small[:, 0, 0, 0], small[:, 0, 0, 7] - small[:, 0, 0, 0]]
    assert all(float(end.norm()) > 0.01 * float(small[:, 0, 0, 0].norm()) for end in ends)


def test_the_velocity_follows_from_the_clean_latents_that_are_predicted() -> None:
    """Before training they are zero, and the velocity is what comes in divided by its noise level, or by the least one."""
    transformer = train.make_pipeline(0, num_layers=1).transformer
    x = torch.randn(2, transformer.config.in_channels, 2, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        (velocity,) = transformer(x, torch.tensor([500.0, 1.0]), torch.zeros(2, 4, transformer.config.text_dim), return_dict=False)
    assert torch.allclose(velocity[0], x[0] / 0.5)
    assert torch.allclose(velocity[1], x[1] / LEAST_SIGMA)


# Words


def test_words() -> None:
    words = vocabulary()
    assert words[: len(picture_vocabulary())] == picture_vocabulary()
    assert len(set(words)) == len(words)
    for phrase in (*map(article, NOUNS), *BACKGROUNDS, *MOTIONS, "a above below left of right of an on background still spinning"):
        assert set(phrase.split()) <= set(words), phrase
    assert set(NOUNS) <= set(CONCEPTS.values())


# The autoencoder


def small_autoencoder(renderings: Renderings) -> tuple[ClipAutoencoder, Tensor]:
    vae = train.make_pipeline(0, num_layers=1).vae
    clips = torch.stack([clip(i, renderings, 9, 64, 64) for i in range(6)])
    return vae, clips


@pytest.mark.parametrize("channels", [32, 64])
def test_the_projection_inverts_on_its_subspace(channels: int) -> None:
    vae = ClipAutoencoder(z_dim=channels, refine_width=0, latents_mean=(0.0,) * channels, latents_std=(1.0,) * channels)
    torch.manual_seed(0)
    within = torch.randn(500, channels) @ torch.randn(channels, 64)
    vae.fit(within)
    spread = (within - vae.mean) @ vae.basis.T / vae.deviation
    assert float(spread.square().mean()) == pytest.approx(1.0, abs=1e-2)
    assert bool((spread.std(0).diff() <= 1e-3).all())
    latents = torch.einsum("kp,mp->mk", vae.basis, within - vae.mean) / vae.deviation
    assert torch.allclose(vae.ungroup(latents.view(500, channels, 1, 1, 1)).flatten(1), within, atol=1e-3)


def test_four_frames_in_one_lose_nothing(renderings: Renderings) -> None:
    vae, clips = small_autoencoder(renderings)
    vae.fit(vae.group(clips).transpose(0, 1).flatten(1).T)
    groups, latents = vae.group(clips), vae.encode(clips).latents
    assert groups.shape == latents.shape == (6, 4 * vae.config.frame_channels, 3, 8, 8)
    assert torch.allclose(vae.ungroup(latents), groups, atol=1e-4)


def test_the_first_frame_stands_alone(pipe: WanPipeline, renderings: Renderings) -> None:
    _, clips = small_autoencoder(renderings)
    other = copy.deepcopy(clips)
    other[:, :, 1:] = 0.0
    assert torch.equal(pipe.vae.encode(clips).latents[:, :, 0], pipe.vae.encode(other).latents[:, :, 0])
    assert torch.equal(pipe.vae.encode(clips[:, :, :1]).latents[:, :, 0], pipe.vae.encode(clips).latents[:, :, 0])


def test_decoding_gives_back_the_clip(pipe: WanPipeline, renderings: Renderings) -> None:
    filmed = clip(0, renderings, 9, 128, 128)
    with torch.no_grad():
        (decoded,) = pipe.vae.decode(pipe.vae.encode(filmed[None]).latents, return_dict=False)
    error = float((decoded[0] - filmed).square().mean() / (filmed - filmed.mean((1, 2, 3), keepdim=True)).square().mean())
    assert decoded.shape == (1, *filmed.shape)
    assert error < 0.05


def test_wrong_frames_are_refused(pipe: WanPipeline) -> None:
    with pytest.raises(ValueError, match=r"frames must be 4k \+ 1, not 8"):
        pipe.vae.encode(torch.zeros(1, 3, 8, 16, 16))
