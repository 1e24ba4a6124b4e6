"""The kernel for vLLM-Omni's SPARSE_ATTN backend, called as its dispatcher calls it.

vLLM-Omni requires a GPU build of vLLM, so its dispatcher stands here as its documentation has it (`called`): options, state and what models
add become one dictionary without None, and masks are handed over where `capabilities` says so.
"""

import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, relative_error
from helpers import disc_pairs
from torch import Tensor

import dit_accel
from dit_accel.errors import ArgumentError
from dit_accel.integrations import vllm_omni
from dit_accel.method.assignment import Assignment, Rule

ROOT = Path(__file__).resolve().parents[1]
GROUP = "vllm_omni.sparse_attn"
GRID, TOKENS = (3, 6, 7), 126
GEOMETRY = {"latent_shape": torch.tensor([[3, 12, 14]] * 2), "patch_size": torch.tensor([[1, 2, 2]] * 2)}


def plugin() -> Any:
    """What the entry point of the package's declaration leads to."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    assert list(declared) == ["dit_accel"]
    return EntryPoint("dit_accel", declared["dit_accel"], GROUP).load()


def called(
    tensors: tuple[Tensor, ...], static: dict[str, Any] | None = None, state: dict[str, Any] | None = None, *,
    extra: dict[str, Any] | None = None, mask: Tensor | None = None, causal: bool = False, scale: float = 0.1,
) -> Tensor:  # fmt: skip
    """As a layer of a server calls it."""
    function = plugin()
    params = {key: value for key, value in ((static or {}) | (state or {}) | (extra or {})).items() if value is not None}
    if mask is not None:
        assert function.capabilities["supports_attention_mask"]
        params["attn_mask"] = mask
    return function(*tensors, params, is_causal=causal, softmax_scale=scale)


def tensors(tokens: int = TOKENS, heads: int = 2, keys: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(normal(2, tokens, n, 32, seed=seed).to(dtype) for seed, n in enumerate((heads, keys, keys)))


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 0.1) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True).transpose(1, 2)


def test_nothing_of_vllm_is_imported() -> None:
    import sys

    assert plugin() is vllm_omni.attention
    assert not [name for name in sys.modules if name == "vllm" or name.startswith(("vllm.", "vllm_omni"))]


def test_full_attention_spans_are_left_to_the_dispatcher_to_refuse() -> None:
    assert plugin().capabilities == {"supports_attention_mask": True}


@pytest.mark.parametrize("keys", [2, 1])
@pytest.mark.parametrize(
    "state",
    [
        GEOMETRY,
        {name: value[:1] for name, value in GEOMETRY.items()},
        {name: value[0].tolist() for name, value in GEOMETRY.items()},
        {"grid": list(GRID), "latent_shape": None},
    ],
    ids=["samples", "one", "numbers", "given"],
)
def test_the_grid_is_read(state: dict[str, Any], keys: int) -> None:
    """Discs of the grid; the tokens of a frame are rows and columns."""
    q, k, v = tensors(keys=keys)
    got = called((q, k, v), {"method": "clear:2"}, {**state, "denoise_step_idx": torch.tensor([3, 3])}, extra={"another": object()})
    assert relative_error(got, dense(q, k, v, disc_pairs((GRID,), 2))) < 1e-6
    assert got.shape == q.shape


def test_without_a_method_it_is_fovea() -> None:
    given = tensors()
    layout = dit_accel.TokenLayout(GRID)
    expected = dit_accel.as_attention_function(dit_accel.Fovea(0.05), layout, tensor_layout="BNHD")(*given, scale=0.1)
    assert torch.equal(called(given, {}, GEOMETRY), expected)
    assert torch.equal(called(given, {"method": dit_accel.Fovea(0.05)}, GEOMETRY), expected)


def test_a_file_with_a_method(tmp_path: Path) -> None:
    Assignment.of(dit_accel.CLEAR(2)).save(tmp_path / "one.json")
    given = tensors()
    assert torch.equal(called(given, {"method": str(tmp_path / "one.json")}, GEOMETRY), called(given, {"method": "clear:2"}, GEOMETRY))
    Assignment((Rule(dit_accel.CLEAR(2)), Rule(None, layers="single_*"))).save(tmp_path / "several.json")
    with pytest.raises(ArgumentError, match="rules for layers and steps are not supported here"):
        called(given, {"method": str(tmp_path / "several.json")}, GEOMETRY)


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("masked", [False, True])
def test_text_in_the_sequence(place: str, masked: bool) -> None:
    q, k, v = tensors(TOKENS + 9)
    image = slice(9, None) if place == "first" else slice(0, TOKENS)
    pairs = torch.ones(1, 1, TOKENS + 9, TOKENS + 9, dtype=torch.bool)
    pairs[..., image, image] = disc_pairs((GRID,), 2)
    mask = torch.ones(2, TOKENS + 9, dtype=torch.bool)
    if masked:
        mask[:, [5, 6]] = place == "last"
        mask[:, [-2, -1]] = place == "first"
    got = called((q, k, v), {"method": "clear:2", "text": place}, GEOMETRY, mask=mask if masked else None)
    assert relative_error(got, dense(q, k, v, pairs & mask[:, None, None])) < 1e-6


@pytest.mark.parametrize("kind", [torch.int64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [TOKENS + 9, 20])
def test_a_mask_of_samples_and_keys_is_not_0_for_what_is_attended(kind: torch.dtype, tokens: int) -> None:
    """Qwen-Image's are ones and zeros of int64, which vLLM-Omni's backends read as bool."""
    given, mask = tensors(tokens), torch.ones(2, tokens, dtype=torch.bool)
    mask[1, 4:9] = False
    got = called(given, {"method": "fovea:1", "text": "first"}, GEOMETRY, mask=mask.to(kind))
    assert relative_error(got, dense(*given, mask[:, None, None])) < 1e-6


def test_a_sequence_without_an_image_is_computed_exactly() -> None:
    """As that of a text refiner, whose layers have the same role."""
    given, mask = tensors(20), torch.arange(20) < torch.tensor([[20], [13]])
    assert relative_error(called(given, {}, GEOMETRY), dense(*given)) < 1e-6
    assert relative_error(called(given, {}, GEOMETRY, mask=mask), dense(*given, mask[:, None, None])) < 1e-6


@pytest.mark.parametrize(
    ("static", "state", "how", "message"),
    [
        ({}, {}, {}, "the grid of the image is unknown"),
        ({}, {"latent_shape": GEOMETRY["latent_shape"]}, {}, "the grid of the image is unknown"),
        ({}, {**GEOMETRY, "latent_shape": torch.tensor([[3, 12, 14], [3, 14, 12]])}, {}, "latent_shape must be three ints.*same for all"),
        ({}, {**GEOMETRY, "patch_size": [0, 2, 2]}, {}, "patch_size must be three ints >= 1"),
        ({}, {**GEOMETRY, "latent_shape": [3, 13, 14]}, {}, r"latent_shape must be whole patches of \(1, 2, 2\), not \(3, 13, 14\)"),
        ({"grid": [6, 7]}, {}, {}, r"grid must be \(frames, height, width\)"),
        ({"method": "fast"}, GEOMETRY, {}, "method must be one of"),
        ({"method": "none"}, GEOMETRY, {}, "method must be one method for all layers"),
        ({"method": 3}, GEOMETRY, {}, "method must be one method for all layers"),
        ({"method": {"keep": "fovea"}}, GEOMETRY, {}, "method must be one method for all layers"),
        ({}, GEOMETRY, {"causal": True}, "does not compute causal attention"),
        ({}, GEOMETRY, {"mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool)}, "mask must be over keys"),
        ({}, GEOMETRY, {"mask": torch.arange(TOKENS).expand(2, -1) > 3}, "mask must be the same for all image tokens"),
    ],
)
def test_what_cannot_be_computed_raises(static: dict[str, Any], state: dict[str, Any], how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(tensors(), static, state, **how)


def test_text_of_an_unknown_place_and_cross_attention_raise() -> None:
    with pytest.raises(ArgumentError, match="text must be 'first' or 'last', because 130 tokens are more than the 126"):
        called(tensors(130), {}, GEOMETRY)
    q, k, v = tensors()
    with pytest.raises(ArgumentError, match="not 126 queries on 20 keys"):
        called((q, k[:, :20], v[:, :20]), {}, GEOMETRY)
