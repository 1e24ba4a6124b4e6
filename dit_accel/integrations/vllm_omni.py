"""A kernel of vLLM-Omni's SPARSE_ATTN backend, found there by the entry point `dit_accel` of the group `vllm_omni.sparse_attn`.

    extra={"backend": "dit_accel", "method": "fovea:0.05"}

Nothing of vLLM-Omni is imported. Its dispatcher merges static options, the state of a forward and what a model adds into one dictionary,
without what is None, and hands masks over only where `attention.capabilities` says so. What can't be computed raises: a server must never
run another attention than the one that it was started with without saying so.
"""

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.integrations.function import AttentionFunction, as_attention_function
from dit_accel.method.assignment import Assignment
from dit_accel.method.checks import is_int, plain, require
from dit_accel.method.parts import Grid
from dit_accel.method.spec import AttentionSpec
from dit_accel.method.text import parse_method
from dit_accel.operator.layout import TokenLayout

PLACES = ("first", "last")
ONE_METHOD = "method must be one method for all layers"
ADVICE = "write it as fovea:0.05, or name a file with one spec; rules for layers and steps are not supported here"


def attention(query: Tensor, key: Tensor, value: Tensor, params: dict[str, Any], is_causal: bool, softmax_scale: float) -> Tensor:
    """Self-attention by the method that `params` names, `[batch, tokens, heads, channels]` in and out.

    Read from `params`, all else in it is ignored: `method`, a method as text ("fovea:0.05" unless given) or a file with a spec; `grid`,
    (frames, height, width) in tokens, else from the framework's `latent_shape` and `patch_size` (`[samples, 3]` each); `text`, "first" or
    "last", where the tokens that are not the grid's are, required where there are any; `attn_mask`, over keys, the same for all image
    tokens: `[B, N]` of any dtype is not 0 for what is attended, as in vLLM-Omni's own backends; with more axes it is bool, or added to the
    logits. A sequence that is shorter than the grid is none of the image (a text refiner's) and gets exact attention.

    Raises ArgumentError for a causal call, an unknown geometry, samples of several sizes and masks over pairs; it never computes another
    method in their place.
    """
    if is_causal:
        raise ArgumentError("dit_accel does not compute causal attention: choose it for the roles of image or video self-attention alone")
    if query.shape[1] != key.shape[1]:
        raise ArgumentError(
            f"dit_accel computes self-attention, not {query.shape[1]} queries on {key.shape[1]} keys: choose another backend for the role "
            "of cross-attention"
        )
    grid = grid_of(params)
    image, tokens = grid[0] * grid[1] * grid[2], query.shape[1]
    mask = params.get("attn_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = mask.bool()
    if tokens < image:
        return _exact(query, key, value, mask, softmax_scale)
    text, method = params.get("text"), params.get("method", "fovea:0.05")
    if tokens > image:
        rule = f"text must be 'first' or 'last', because {tokens} tokens are more than the {image} of the grid {grid}"
        require(text in PLACES, rule, text, "add it to the backend's extra")
    require(isinstance(method, str | Assignment | AttentionSpec), ONE_METHOD, method, ADVICE)
    function = _function(_spec(method), grid, tokens - image, text != "last")
    return function(query, key, value, mask=mask, scale=softmax_scale)


attention.capabilities = {"supports_attention_mask": True}  # type: ignore[attr-defined]


def grid_of(params: dict[str, Any]) -> Grid:
    """(frames, height, width) in tokens. Raises ArgumentError where nothing tells it, or samples differ."""
    if (given := params.get("grid")) is not None:
        return TokenLayout(tuple(given) if isinstance(given, list | tuple) else given).grid
    sizes, sides = params.get("latent_shape"), params.get("patch_size")
    if sizes is not None and sides is not None:
        latents, patches = _of_one_sample("latent_shape", sizes), _of_one_sample("patch_size", sides)
        # what is left over may be cut off or padded, and text would take up the difference
        whole = all(size % side == 0 for size, side in zip(latents, patches, strict=True))
        require(whole, f"latent_shape must be whole patches of {patches}", latents, "give the grid in tokens as grid")
        frames, height, width = (size // side for size, side in zip(latents, patches, strict=True))
        return TokenLayout((frames, height, width)).grid
    raise ArgumentError(
        "the grid of the image is unknown, because vLLM-Omni gives no latent_shape and patch_size for this model: give "
        "grid=[frames, height, width] in tokens in the backend's extra, if all requests have one size"
    )


def _of_one_sample(name: str, value: Any) -> tuple[int, ...]:
    """Three ints, from themselves or from a tensor or list `[samples, 3]` with equal rows; reads device memory."""
    rows = value.tolist() if isinstance(value, Tensor) else plain(value)
    rows = rows if isinstance(rows, list | tuple) and rows and isinstance(rows[0], list | tuple) else [rows]
    found = {tuple(row) if isinstance(row, list | tuple) else (row,) for row in rows}
    first = next(iter(found))
    legal = len(found) == 1 and len(first) == 3 and all(is_int(n) and n >= 1 for n in first)
    require(legal, f"{name} must be three ints >= 1, the same for all samples", rows, "put sizes into batches of their own")
    return first


@functools.lru_cache(maxsize=64)
def _spec(method: str | AttentionSpec) -> AttentionSpec:
    found = parse_method(method) if isinstance(method, str) else method
    if isinstance(found, Assignment):
        found = found.spec or found
    require(isinstance(found, AttentionSpec), ONE_METHOD, method, ADVICE)
    return found  # type: ignore[return-value]


@functools.lru_cache(maxsize=256)
def _function(spec: AttentionSpec, grid: Grid, text: int, text_first: bool) -> AttentionFunction:
    return as_attention_function(spec, TokenLayout(grid, text, text_first), tensor_layout="BNHD")


def _exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if mask is not None:
        mask = mask[:, None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
        mask = mask if mask.dtype.is_floating_point else mask.bool()
    return F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
