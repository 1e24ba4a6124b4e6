"""Padded text: attended to by nobody, in every method, whatever form the family's mask has."""

import re
from typing import Any

import pytest
import torch
from conftest import normal, relative_error
from test_families import SPARSE, WHOLE, Tiny
from torch import Tensor

import dit_accel
from dit_accel import AttentionSpec, TokenLayout
from dit_accel.errors import FallbackError
from dit_accel.patch import masks

# pipelines whose padded text changes nothing without us: the others attend to it or pool it, and so do we
MASKED = (
    "qwen_image", "krea2", "hunyuan_video", "hunyuan_video15", "hunyuan_image", "nucleus_pipeline", "motif_video_pipeline",
)  # fmt: skip
PADDING = 4


def padded(call: dict[str, Any], noise: int = 0, padding: int = PADDING) -> dict[str, Any]:
    """The call with the last text tokens of every prompt masked, and filled with other numbers for each `noise`."""
    changed = dict(call)
    for name, mask in call.items():
        if "mask" not in name or not isinstance(mask, Tensor):
            continue
        prompt = name.replace("_attention_mask", "_embeds") if "attention" in name else name.replace("_mask", "")
        assert prompt in call, f"no embeddings for {name}"
        changed[name], changed[prompt] = mask.clone(), call[prompt].clone()
        changed[name][:, -padding:] = 0
        changed[prompt][:, -padding:] += normal(*call[prompt][:, -padding:].shape, seed=noise)
    return changed


def two_prompts(call: dict[str, Any]) -> dict[str, Any]:
    """A batch of two prompts, of which the second is shorter."""
    short = padded(call, padding=PADDING + 1)
    batched = dict(call)
    for name, value in call.items():
        if isinstance(value, Tensor) and ("prompt" in name):
            batched[name] = torch.cat([value, short[name]])
    return batched


@pytest.mark.parametrize("name", [*MASKED, "prx_pipeline"])
@pytest.mark.parametrize("spec", SPARSE.values(), ids=SPARSE)
def test_padded_text_changes_nothing(name: str, spec: AttentionSpec) -> None:
    tiny = Tiny(name)
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    first, second = (tiny.run(**padded(tiny.call, noise)) for noise in (1, 2))
    assert torch.equal(first, second)
    assert relative_error(first, tiny.run()) > 1e-5, "the mask has no effect"


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("spec", WHOLE.values(), ids=WHOLE)
def test_prompts_of_two_lengths_equal_the_original(name: str, spec: AttentionSpec) -> None:
    tiny = Tiny(name)
    call = two_prompts(tiny.call)
    expected = tiny.run(**call)
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    assert relative_error(tiny.run(**call), expected) < 1e-5


def test_a_family_whose_mask_adds_numbers() -> None:
    tiny = Tiny("chroma")
    call = padded(tiny.call)
    expected = tiny.run(**call)
    dit_accel.accelerate(tiny.pipe, WHOLE["fovea"], strict=True)
    assert relative_error(tiny.run(**call), expected) < 1e-5
    assert relative_error(tiny.run(), expected) > 1e-5, "the mask has no effect"


def hiding(call: dict[str, Any], name: str) -> dict[str, Any]:
    """The call with every third image token masked as well."""
    if name == "fibo":
        mask = call["joint_attention_kwargs"]["attention_mask"].clone()
        mask[..., 12::3] = False
        return call | {"joint_attention_kwargs": {"attention_mask": mask}}
    mask = torch.cat([call["prompt_attention_mask"], torch.ones(1, 96)], dim=1)
    mask[:, 12::3] = 0
    return call | {"mask": mask}


@pytest.mark.parametrize("name", ["fibo", "chroma"])
def test_a_mask_over_image_tokens_runs_the_original(name: str, sparse_calls: list[Any]) -> None:
    drawn = []
    for accelerated in (False, True):
        tiny = Tiny(name)
        call = hiding(tiny.call, name)
        if (mask := call.pop("mask", None)) is not None:  # only the transformer takes it
            tiny.pipe._prepare_attention_mask = lambda *_, mask=mask, **__: mask
        if accelerated:
            dit_accel.accelerate(tiny.pipe, SPARSE["fovea"])
        tiny.call = call
        if accelerated:
            with pytest.warns(UserWarning, match="original attention for calls with an attention mask over image tokens"):
                drawn.append(tiny.run())
        else:
            drawn.append(tiny.run())
    assert torch.equal(*drawn)
    assert relative_error(drawn[0], Tiny(name).run()) > 1e-3, "the mask has no effect"
    assert not sparse_calls
    plain = Tiny(name)
    dit_accel.accelerate(plain.pipe, SPARSE["fovea"], strict=True)
    plain.run()
    assert sparse_calls


def test_a_mask_that_was_written_to_is_looked_at_again() -> None:
    tiny = Tiny("fibo")
    dit_accel.accelerate(tiny.pipe, SPARSE["fovea"], strict=True)
    tiny.run()
    tiny.call["joint_attention_kwargs"]["attention_mask"][..., 20] = False
    with pytest.raises(FallbackError, match="an attention mask over image tokens"):
        tiny.run()


FIRST, LAST = TokenLayout((1, 2, 3), 4), TokenLayout((1, 2, 3), 4, text_first=False)
KEYS = torch.tensor([[True, True, False, True], [False, True, True, True]])
INF = float("inf")
BIAS = torch.tensor([[0, 0, -INF, 0], [-INF, 0, 0, 0]])


@pytest.mark.parametrize("layout", [FIRST, LAST], ids=["text-first", "text-last"])
@pytest.mark.parametrize("form", ["[B, N]", "[B, 1, 1, N]", "[B, 1, N, N]"])
def test_every_form_of_a_mask_is_one_bias(layout: TokenLayout, form: str) -> None:
    image = torch.ones(2, layout.image, dtype=torch.bool)
    mask = torch.cat([KEYS, image] if layout.text_first else [image, KEYS], dim=1)
    if form == "[B, 1, 1, N]":
        mask = mask[:, None, None]
    if form == "[B, 1, N, N]":
        mask = (mask[:, :, None] & mask[:, None])[:, None]
    assert masks.refusal(mask, "pairs", layout.tokens, layout.text) is None
    assert torch.equal(masks.text_bias(mask, layout, 2), BIAS)
    assert not masks.differs_by_row(mask)


def test_numbers_are_a_bias_against_that_of_image_keys() -> None:
    mask = torch.cat([KEYS, torch.ones(2, 6, dtype=torch.bool)], dim=1).float()
    pairs = (mask[:, :, None] * mask[:, None])[:, None]
    assert torch.equal(masks.text_bias(pairs, FIRST, 2), KEYS.float() - 1)
    assert masks.differs_by_row(pairs)


def test_a_mask_is_rolled_as_its_tokens_are() -> None:
    keys = torch.cat([KEYS[:, :1], torch.ones(2, 6, dtype=torch.bool), KEYS[:, 1:]], dim=1)  # one token is before the image
    pairs = (keys[:, :, None] & keys[:, None])[:, None]
    moved = torch.cat([keys[:, 1:], keys[:, :1]], dim=1)
    assert torch.equal(masks.rolled(keys, -1), moved)
    assert torch.equal(masks.rolled(keys[:, None, None], -1), moved[:, None, None])
    assert torch.equal(masks.rolled(pairs, -1), (moved[:, :, None] & moved[:, None])[:, None])


@pytest.mark.parametrize(
    ("mask", "kind", "text", "says"),
    [
        pytest.param(None, None, 4, None, id="no-mask"),
        pytest.param(torch.ones(1, 2, 10, 10), "ones", 0, None, id="ones"),
        pytest.param(torch.ones(1, 10), None, 4, "an attention mask$", id="undeclared"),
        pytest.param("causal", "keys", 4, "an attention mask$", id="no-tensor"),
        pytest.param(torch.ones(1, 10), "keys", 0, "an attention mask over image tokens", id="no-text"),
        pytest.param(torch.ones(1, 1, 10, 10), "keys", 4, r"shape \[1, 1, 10, 10\] over 10 tokens", id="pairs-undeclared"),
        pytest.param(torch.ones(1, 9), "keys", 4, r"shape \[1, 9\] over 10 tokens", id="other-length"),
    ],
)
def test_masks_that_are_not_understood(mask: object, kind: str | None, text: int, says: str | None) -> None:
    reason = masks.refusal(mask, kind, 10, text)
    assert reason is None if says is None else reason is not None and re.search(says, reason)
