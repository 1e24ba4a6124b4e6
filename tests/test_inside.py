"""What a user has inside a model, between its first and its last layer: masks, hooks on blocks, caches of steps; with dense steps, too.

At density 1 an accelerated model is the original to rounding, whatever is in there.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import relative_error
from test_families import SPARSE, WHOLE, Tiny
from torch import Tensor

import dit_accel

STEPS = 4
TEXT = 12  # tokens of every model here that is given a mask
WHOLE_FOVEA = WHOLE["fovea"]


def blocks_of(tiny: Tiny) -> list[Any]:
    return [block for name in ("transformer_blocks", "blocks") for block in getattr(tiny.pipe.transformer, name, [])]


def weigh_by_place(tiny: Tiny) -> None:
    """After the first block, tokens of the image are weighted by their place, as a spatial control does."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        outputs = list(output) if isinstance(output, tuple) else [output]
        index = max(range(len(outputs)), key=lambda n: outputs[n].shape[1])
        outputs[index] = outputs[index] * torch.linspace(0.5, 1.5, outputs[index].shape[1])[:, None]
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    blocks_of(tiny)[0].register_forward_hook(hook)


def first_block(tiny: Tiny) -> None:
    from diffusers import FirstBlockCacheConfig

    tiny.pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))


def taylor(tiny: Tiny) -> None:
    from diffusers import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32)
    tiny.pipe.transformer.enable_cache(config)


def pyramid(tiny: Tiny) -> None:
    from diffusers import PyramidAttentionBroadcastConfig

    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500
    )
    tiny.pipe.transformer.enable_cache(config)


def magnitudes(tiny: Tiny) -> None:
    from diffusers import MagCacheConfig

    config = MagCacheConfig(threshold=0.5, max_skip_steps=3, retention_ratio=0.1, num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS))
    tiny.pipe.transformer.enable_cache(config)


def dual_blocks(tiny: Tiny) -> None:
    import cache_dit

    config = cache_dit.DBCacheConfig(Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=10.0)
    cache_dit.enable_cache(tiny.pipe, cache_config=config)


CACHES: dict[str, Callable[[Tiny], None]] = {
    "first-block": first_block, "taylor": taylor, "pyramid": pyramid, "magnitudes": magnitudes, "dual-blocks": dual_blocks,
}  # fmt: skip


# which of them each model takes as it is in diffusers, with an effect
CACHED = {
    "flux": tuple(CACHES), "flux2": ("pyramid", "magnitudes", "taylor", "dual-blocks"), "chroma": ("pyramid", "dual-blocks"), "fibo": (),
    "sd3": ("dual-blocks",),
    "qwen_image": ("first-block", "magnitudes"), "hunyuan_video": ("taylor",), "wan": ("first-block",),
}  # fmt: skip
# the argument that brings a mask, and the picture's rows and columns of tokens
MASKED = {
    "flux": ("joint_attention_kwargs", 8, 12), "flux2": ("attention_kwargs", 8, 12), "fibo": ("joint_attention_kwargs", 9, 14),
}  # fmt: skip
CASES = [(name, cache) for name, caches in CACHED.items() for cache in (None, *caches)]


def halves(name: str) -> dict[str, Any]:
    """The argument by which the picture's left and right half do not see each other."""
    argument, rows, columns = MASKED[name]
    left = torch.arange(rows * columns) % columns < columns // 2
    mask = torch.ones(1, 1, TEXT + len(left), TEXT + len(left), dtype=torch.bool)
    mask[..., TEXT:, TEXT:] = left[:, None] == left
    return {argument: {"attention_mask": mask}}


def draw(tiny: Tiny, cache: str | None, hooked: bool, masked: bool) -> Tensor:
    """What a model draws with these things of the user's inside."""
    if cache is not None:
        CACHES[cache](tiny)
    if hooked:
        weigh_by_place(tiny)
    named = tiny.name == "flux2" and cache == "taylor"  # its pipeline does not tell a cache which pass it is
    with tiny.pipe.transformer.cache_context("only") if named else contextlib.nullcontext():
        return tiny.run(num_inference_steps=STEPS, **(halves(tiny.name) if masked else {}))


@functools.lru_cache
def original(name: str, cache: str | None = None, hooked: bool = False, masked: bool = False) -> Tensor:
    """What the stock pipeline draws."""
    return draw(Tiny(name), cache, hooked, masked)


@pytest.mark.composes("step caches with dense steps, block hooks and masks")
@pytest.mark.parametrize("dense_steps", [0, 1])
@pytest.mark.parametrize("hooked", [False, True], ids=["alone", "hook-and-mask"])
@pytest.mark.parametrize(("name", "cache"), CASES)
def test_whatever_is_inside_meets_the_models_own_tokens(name: str, cache: str | None, hooked: bool, dense_steps: int) -> None:
    masked = hooked and name in MASKED
    expected = original(name, cache, hooked, masked)
    if cache or hooked:
        assert relative_error(expected, original(name)) > 1e-3, "it has no effect"
    tiny = Tiny(name)
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=not masked, dense_steps=dense_steps)
    assert relative_error(draw(tiny, cache, hooked, masked), expected) < 1e-5


@pytest.mark.parametrize("name", CACHED)
def test_blocks_see_tokens_in_the_models_own_order(name: str) -> None:
    seen = []
    for accelerated in (False, True):
        tiny = Tiny(name)
        if accelerated:
            dit_accel.accelerate(tiny.pipe, SPARSE["fovea"], strict=True)
        inputs: list[Tensor] = []
        blocks_of(tiny)[0].register_forward_pre_hook(
            lambda _, args, kwargs, into=inputs: into.extend(tensors(args, kwargs)), with_kwargs=True
        )
        tiny.run(num_inference_steps=1)
        seen.append(inputs)
    assert len(seen[0]) > 1
    assert [torch.equal(*pair) for pair in zip(*seen, strict=True)] == [True] * len(seen[0])


def tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    return [x.clone() for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
