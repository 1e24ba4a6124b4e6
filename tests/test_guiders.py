"""Guidance by diffusers' hooks and guiders, which find processors by class and intercept attention by function, at density 1."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import forward_arguments, normal, relative_error, tiny_transformer
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    LayerSkipConfig,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    SmoothedEnergyGuidanceConfig,
)
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode, apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import _apply_smoothed_energy_guidance_hook
from test_families import SPARSE, WHOLE, Tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dit_accel
from dit_accel.errors import FallbackError
from dit_accel.patch.interception import intercepted, through_modes

# what a hook skips of a block's attention, its scores and its feed-forward layer, and the models that take it as they are in diffusers
SKIPS: dict[str, tuple[dict[str, bool], tuple[str, ...]]] = {
    "scores": (
        {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
        ("cogview4", "qwen_image", "z_image", "pixart_sigma", "hunyuan_image", "latte"),
    ),
    "attention": ({"skip_attention": True, "skip_ff": False}, ("cogview4", "z_image", "pixart_sigma")),
    "block": ({"skip_attention": True, "skip_ff": True}, ("flux2", "cogview4", "wan", "hunyuan_video")),
    "feed-forward": ({"skip_attention": False, "skip_ff": True}, ("flux", "fibo")),
}


def skip(kind: str) -> LayerSkipConfig:
    return LayerSkipConfig(indices=[0], fqn="auto", **SKIPS[kind][0])


def hooked(tiny: Tiny, kind: str) -> None:
    config = skip(kind)
    names = ("transformer_blocks", "blocks", "layers")
    config.fqn = next(name for name in names if hasattr(tiny.pipe.transformer, name))
    apply_layer_skip(tiny.pipe.transformer, config)


@functools.lru_cache
def original(name: str, kind: str | None = None) -> Tensor:
    tiny = Tiny(name)
    if kind is not None:
        hooked(tiny, kind)
    return tiny.run()


@pytest.mark.composes("skip-layer and perturbed-attention guidance's hooks, before and after")
@pytest.mark.parametrize("first", ["hook", "accelerate"])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, (_, names) in SKIPS.items() for name in names])
def test_a_hook_skips_what_it_skips_of_the_original(name: str, kind: str, first: str) -> None:
    expected, tiny = original(name, kind), Tiny(name)
    assert relative_error(expected, original(name)) > 1e-3, "the hook has no effect"
    if first == "hook":
        hooked(tiny, kind)
    dit_accel.accelerate(tiny.pipe, WHOLE["fovea"], strict=True)
    if first == "accelerate":
        hooked(tiny, kind)
    assert relative_error(tiny.run(), expected) < 1e-5
    dit_accel.restore(tiny.pipe)
    assert torch.equal(tiny.run(), expected)


@pytest.mark.parametrize("first", ["hook", "accelerate"])
def test_blurred_queries_are_those_of_the_original(first: str) -> None:
    def blurred(tiny: Tiny) -> None:
        config = SmoothedEnergyGuidanceConfig([0], "transformer_blocks")
        _apply_smoothed_energy_guidance_hook(tiny.pipe.transformer, config, 3.0)

    plain, tiny = Tiny("cogview4"), Tiny("cogview4")
    blurred(plain)
    expected = plain.run()
    assert relative_error(expected, original("cogview4")) > 1e-3
    if first == "hook":
        blurred(tiny)
    dit_accel.accelerate(tiny.pipe, WHOLE["fovea"], strict=True)
    if first == "accelerate":
        blurred(tiny)
    assert relative_error(tiny.run(), expected) < 1e-5


# Guiders


GUIDERS: dict[str, Callable[[], Any]] = {
    "cfg": lambda: ClassifierFreeGuidance(guidance_scale=5.0),
    "apg": lambda: AdaptiveProjectedGuidance(guidance_scale=5.0),
    "pag": lambda: PerturbedAttentionGuidance(perturbed_guidance_config=skip("scores"), **ALWAYS["perturbed_guidance"]),
    "slg-layers": lambda: SkipLayerGuidance(skip_layer_config=skip("attention"), **ALWAYS["skip_layer_guidance"]),
    "slg-blocks": lambda: SkipLayerGuidance(skip_layer_config=skip("block"), **ALWAYS["skip_layer_guidance"]),
    "seg": lambda: SmoothedEnergyGuidance(seg_guidance_config=SmoothedEnergyGuidanceConfig([0]), **ALWAYS["seg_guidance"]),
}
ALWAYS: dict[str, Any] = {
    name: {f"{name}_start": 0.0, f"{name}_stop": 1.0} for name in ("perturbed_guidance", "skip_layer_guidance", "seg_guidance")
}


@functools.lru_cache
def recorded() -> list[dict[str, Any]]:
    """The arguments of CogView4's forwards with a prompt and with a negative one."""
    tiny, calls = Tiny("cogview4"), []
    tiny.pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    tiny.run(num_inference_steps=1, guidance_scale=5.0, negative_prompt_embeds=-tiny.call["prompt_embeds"])
    assert len(calls) == 2
    return calls


def guided(transformer: Any, guider: Any) -> Tensor:
    """What a guider makes of two steps, as diffusers' modular pipelines use it."""
    calls, out = recorded(), torch.zeros(())
    for step in range(2):
        guider.set_state(step=step, num_inference_steps=2, timestep=calls[0]["timestep"])
        batches = guider.prepare_inputs({"text": tuple(call["encoder_hidden_states"] for call in calls)})
        for batch in batches:
            guider.prepare_models(transformer)
            with torch.no_grad():
                batch.noise_pred = transformer(**{**calls[0], "encoder_hidden_states": batch.text, "return_dict": False})[0]
            guider.cleanup_models(transformer)
        out = out + guider(batches)[0]
    return out


@pytest.mark.composes("guiders: classifier-free, adaptive projected, perturbed-attention, skip-layer, smoothed-energy")
@pytest.mark.parametrize("kind", GUIDERS)
@pytest.mark.parametrize("name", ["cogview4"])
def test_a_guider_guides_as_it_does_the_original(name: str, kind: str, sparse_calls: list[Any]) -> None:
    plain, tiny = Tiny(name).pipe.transformer, Tiny(name)
    expected, unguided = guided(plain, GUIDERS[kind]()), guided(plain, ClassifierFreeGuidance(guidance_scale=1.0))
    assert relative_error(expected, unguided) > 1e-3
    if kind in ("pag", "slg-layers", "slg-blocks"):
        assert relative_error(expected, guided(plain, ClassifierFreeGuidance(guidance_scale=7.5))) > 1e-3, "no effect of its own"
    dit_accel.accelerate(tiny.pipe, WHOLE["fovea"], strict=True)
    for _ in range(2):
        assert relative_error(guided(tiny.pipe.transformer, GUIDERS[kind]()), expected) < 1e-5
    assert len(sparse_calls) > 0


# Function modes


class Doubling(TorchFunctionMode):
    """Doubles the query of every attention, and the output."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            query, *args = (kwargs.pop("query"),) if "query" in kwargs else args
            return 2 * func(2 * query, *args, **kwargs)
        return func(*args, **kwargs)


class Causal(TorchFunctionMode):
    """Makes every attention causal."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        changes = {"is_causal": True} if func is F.scaled_dot_product_attention else {}
        return func(*args, **(kwargs or {}) | changes)


def drawn(name: str, mode: Any, spec: Any = None, **settings: Any) -> Tensor:
    tiny = Tiny(name)
    if spec is not None:
        dit_accel.accelerate(tiny.pipe, spec, **settings)
    with mode:
        return tiny.run()


@pytest.mark.parametrize("name", ["flux", "krea2", "sd3", "fibo"])
def test_a_mode_that_changes_the_attention_changes_the_operator(name: str, sparse_calls: list[Any]) -> None:
    expected = drawn(name, Doubling())
    assert relative_error(expected, original(name)) > 1e-3
    assert relative_error(drawn(name, Doubling(), WHOLE["fovea"], strict=True), expected) < 1e-5
    assert len(sparse_calls) > 0


def test_a_mode_passes_gradients_on() -> None:
    gradients = []
    for accelerated in (False, True):
        transformer = tiny_transformer()
        if accelerated:
            dit_accel.accelerate(transformer, WHOLE["fovea"], strict=True)
        with Doubling():
            transformer(**forward_arguments()).sample.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for name, p in transformer.named_parameters() if "dit_accel" not in name]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5


def test_a_mode_that_makes_another_kind_of_attention_runs_the_original(sparse_calls: list[Any]) -> None:
    with pytest.warns(UserWarning, match="original attention for calls with a function mode that changes the mask, the tokens or the kind"):
        got = drawn("flux", Causal(), SPARSE["fovea"])
    assert torch.equal(got, drawn("flux", Causal()))
    assert not sparse_calls
    with pytest.raises(FallbackError, match="a function mode that changes"):
        drawn("flux", Causal(), SPARSE["fovea"], strict=True)


def test_a_default_device_changes_nothing(sparse_calls: list[Any]) -> None:
    expected, calls = drawn("flux", torch.no_grad(), SPARSE["fovea"]), len(sparse_calls)
    assert torch.equal(drawn("flux", torch.device("cpu"), SPARSE["fovea"]), expected)
    assert len(sparse_calls) == 2 * calls > 0


@pytest.mark.parametrize(
    ("mode", "fullgraph"),
    [(AttentionScoreSkipFunctionMode, False), (Doubling, False), (lambda: torch.device("cpu"), True), (contextlib.nullcontext, True)],
    ids=["skip", "doubling", "device", "none"],
)
def test_a_mode_is_honoured_around_a_compiled_graph(mode: Any, fullgraph: bool) -> None:
    torch._dynamo.reset()
    inputs, calls = [normal(1, 2, 9, 4, seed=seed) for seed in range(3)], []

    def operator(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        calls.append(1)
        return F.scaled_dot_product_attention(query, key, value, scale=0.7)

    def attend(*qkv: Tensor) -> Tensor:
        return through_modes(operator, *qkv) if intercepted(qkv[0]) else operator(*qkv)

    with mode():
        expected = F.scaled_dot_product_attention(*inputs, scale=0.7)
        got = torch.compile(attend, backend="eager", fullgraph=fullgraph)(*inputs)
    assert relative_error(got, expected) < 1e-6
    assert (not calls) == (mode is AttentionScoreSkipFunctionMode)
    torch._dynamo.reset()
