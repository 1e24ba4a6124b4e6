"""Where each family's image is in its sequence: what an accelerated layer computes is compared with attention under a mask, whose
places are written down here once more."""

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_randomly, relative_error
from tiny_parts import BUILDERS
from torch import Tensor

import dit_accel
from dit_accel import AttentionSpec
from dit_accel.errors import FallbackError
from dit_accel.method import Disc, Raster
from dit_accel.patch.processor import AcceleratedAttention

importlib.import_module("tiny_transformers")
Grids = list[tuple[int, int, int]]
RADIUS = 2.5
DISC = AttentionSpec((Disc(RADIUS),), order=Raster(), block=(16, 16))
# tokens before the image, and the grids of the images
PLACES: dict[str, tuple[int, Grids]] = {
    "ernie_image": (0, [(1, 9, 14)]),
    "motif_video": (0, [(3, 5, 7)]),
    "glm_image": (7, [(1, 9, 14)]),
    "helios": (2 * 5 * 7 + 1 * 3 * 4 + 1 * 2 * 2, [(3, 5, 7)]),
    "anyflow": (0, [(3, 5, 7)]),
    "lumina": (0, [(1, 9, 14)]),
    "joy_image": (0, [(1, 7, 11)] * 2),
    "joy_image_plus": (0, [(1, 9, 11), (1, 6, 5)]),
    "fibo": (12, [(1, 9, 14)]),
    "fibo2": (8, [(1, 9, 14), (1, 5, 6), (1, 4, 9)]),
    "framepack": (1 * 5 * 7 + 1 * 3 * 4 + 2 * 2 * 2, [(3, 5, 7)]),
    "flux3": (12, [(1, 9, 14)]),
    "flux3_with_reference": (12, [(1, 9, 14), (1, 7, 5)]),
    "prx": (12, [(1, 9, 14)]),
    "nucleus": (0, [(1, 9, 14)]),
    "kandinsky6": (0, [(3, 5, 7)]),
    "cosmos3": (12, [(3, 5, 7)]),
}

TWICE = {"motif_video": ("single_transformer_blocks.1.attn",)}  # modules with the image's tokens twice over


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """The loop around a tiny transformer of random weights, and the arguments of a call."""
    torch.manual_seed(0)
    loop, call = BUILDERS[name]()
    fill_randomly(loop.transformer.eval())
    return loop, call


def allowed(start: int, grids: Grids, tokens: int) -> Tensor:
    """Which pairs of tokens `[N, N]` attend: whatever is not in an image to all and from all, image tokens within the disc."""
    pair = torch.ones(tokens, tokens, dtype=torch.bool)
    places = torch.cat([torch.cartesian_prod(*(torch.arange(n) for n in grid)) for grid in grids]).float()
    image = slice(start, start + len(places))
    pair[image, image] = torch.cdist(places, places) < RADIUS
    return pair


def as_bias(mask: Tensor, like: Tensor) -> Tensor:
    """A mask in any of the families' shapes as what it adds to logits, broadcast over `[B, H, N, N]`."""
    mask = mask[:, None, None] if mask.ndim == 2 else mask
    return torch.zeros(mask.shape).to(like).masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else mask


@pytest.mark.parametrize("name", PLACES)
def test_a_disc_is_one_where_the_image_stands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, call = build(name)
    start, grids = PLACES[name]
    dit_accel.accelerate(loop.transformer, DISC, strict=True)
    errors = {}
    original = AcceleratedAttention.forward

    def compared(self: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
        out = original(self, query, key, value, scale, mask)
        place = (0, grids[:1]) if self.layer.image_only else (0, grids * 2) if self.name in TWICE.get(name, ()) else (start, grids)
        pair = allowed(*place, key.shape[2])
        rows = pair if query.shape[2] == key.shape[2] else pair[start : start + query.shape[2]]  # from the image on
        bias = torch.zeros(rows.shape).masked_fill(~rows, -torch.inf)
        bias = bias + as_bias(mask, bias) if mask is not None else bias
        errors[self.name] = relative_error(out, F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale))
        return out

    monkeypatch.setattr(AcceleratedAttention, "forward", compared)
    loop(generator=None, num_inference_steps=1, **call)
    assert len(errors) == sum(isinstance(m, AcceleratedAttention) for m in loop.transformer.modules())
    assert max(errors.values()) < 1e-5, errors


def test_every_loop_has_its_place_written_down() -> None:
    module = importlib.import_module("tiny_transformers")
    assert {name for name, build in BUILDERS.items() if build.__module__ == module.__name__} == PLACES.keys()
    assert all(math.prod(grid) % 16 for _, grids in PLACES.values() for grid in grids)  # ragged blocks


def test_a_cache_of_keys_is_said_to_run_the_original() -> None:
    from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache

    loop, call = build("glm_image")
    del call["attention_mask"]
    cache = GlmImageKVCache(num_layers=2)
    cache.set_mode("write")
    loop(generator=None, num_inference_steps=1, kv_caches=cache, **call)
    cache.set_mode("read")
    expected = loop(generator=None, num_inference_steps=1, kv_caches=cache, **call)[0]
    dit_accel.accelerate(loop.transformer, DISC)
    with pytest.warns(UserWarning, match="original attention for calls with more keys than the sequence has tokens, as of a cache"):
        got = loop(generator=None, num_inference_steps=1, kv_caches=cache, **call)[0]
    assert torch.equal(got, expected)
    dit_accel.restore(loop.transformer)
    dit_accel.accelerate(loop.transformer, DISC, strict=True)
    with pytest.raises(FallbackError, match="as of a cache"):
        loop(generator=None, num_inference_steps=1, kv_caches=cache, **call)


def test_padded_gist_runs_the_original() -> None:
    loop, call = build("fibo2")
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 3:] = False
    call = {"hidden_states": call["hidden_states"].expand(2, -1, -1, -1), "encoder_attention_mask": mask,
            "encoder_hidden_states": call["encoder_hidden_states"].expand(2, -1, -1, -1)}  # fmt: skip
    expected = loop(generator=None, num_inference_steps=1, **call)[0]
    dit_accel.accelerate(loop.transformer, DISC)
    with pytest.warns(UserWarning, match="original attention for calls with an attention mask"):
        got = loop(generator=None, num_inference_steps=1, **call)[0]
    assert torch.equal(got, expected)


def test_rows_padded_behind_the_images_run_the_original() -> None:
    loop, call = build("joy_image_plus")
    call["shape_list"] = [[(1, 9, 11), (1, 6, 4)]]
    expected = loop(generator=None, num_inference_steps=1, **call)[0]
    dit_accel.accelerate(loop.transformer, DISC)
    with pytest.warns(UserWarning, match="original attention for calls with padding after the images"):
        got = loop(generator=None, num_inference_steps=1, **call)[0]
    assert torch.equal(got, expected)


ROLLED_OR_SHORT = pytest.mark.parametrize("name", ["framepack", "prx", "nucleus", "cosmos3", "flux3_with_reference"])


def gradients(loop: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    """Of every parameter of the transformer, after one step."""
    arguments = {k: x for k, x in call.items() if k != "hidden_states"}
    loop.predict(call["hidden_states"], torch.ones(len(call["hidden_states"])), arguments).square().sum().backward()
    return {name: p.grad for name, p in loop.transformer.named_parameters() if p.grad is not None}


@ROLLED_OR_SHORT
def test_keeping_everything_has_the_original_gradients(name: str) -> None:
    loop, call = build(name)
    expected = gradients(loop, call)
    loop, call = build(name)
    dit_accel.accelerate(loop.transformer, AttentionSpec((Disc(1000.0),), order=Raster(), block=(16, 16)), strict=True)
    got = gradients(loop, call)
    assert got.keys() == expected.keys()
    assert any(g.any() for g in expected.values())
    assert relative_error(*(torch.cat([g.flatten() for g in both.values()]) for both in (got, expected))) < 1e-5


@ROLLED_OR_SHORT
def test_it_compiles_to_one_graph(name: str) -> None:
    loop, call = build(name)
    dit_accel.accelerate(loop.transformer, DISC, strict=True)
    expected = loop(generator=None, num_inference_steps=1, **call)[0]  # sizes are read outside of a graph
    loop.transformer = torch.compile(loop.transformer, backend="eager", fullgraph=True)
    got = loop(generator=None, num_inference_steps=1, **call)[0]
    torch.compiler.reset()
    assert relative_error(got, expected) < 1e-6


def test_guidance_leaves_no_trace_of_another_history() -> None:
    """Two texts of unlike lengths in turns, as packed prompts are."""
    loop, call = build("cosmos3")
    text, video, sound = torch.arange(125).split([10, 105, 10])
    other = call | {"input_ids": text % 16, "text_indexes": text, "und_len": 10, "sequence_length": 125, "vision_sequence_indexes": video,
                    "position_ids": torch.arange(125).expand(3, -1), "vision_mse_loss_indexes": video, "sound_sequence_indexes": sound,
                    "sound_mse_loss_indexes": sound}  # fmt: skip
    dit_accel.accelerate(loop.transformer, DISC, strict=True)
    alone = [loop(generator=None, **c)[0] for c in (call, call, other, other)]
    turns = [loop(generator=None, **c)[0] for c in (call, other, call, other)]
    assert all(torch.equal(turns[n], alone[m]) for n, m in ((0, 0), (1, 2), (2, 1), (3, 3)))
    assert not torch.equal(alone[0], alone[2])
