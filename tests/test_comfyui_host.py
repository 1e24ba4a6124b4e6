"""The nodes in ComfyUI itself: its own sampling and transformers, tiny and random, on a CPU; `comfyui_host` says what that requires."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from comfyui_host import KINDS, TEXT, comfyui, embedder, pack, sampled, tiny_model, with_weights_of
from conftest import normal, position_ids, relative_error
from torch import Tensor

import dit_accel
from dit_accel.errors import AdapterError, FallbackError
from dit_accel.integrations.comfyui import accelerator, install, nodes
from dit_accel.integrations.comfyui.accelerator import OVERRIDE
from dit_accel.integrations.comfyui.adapter import AdapterForHost
from dit_accel.integrations.comfyui.install import accelerated
from dit_accel.method.assignment import Assignment, Rule

WHOLE = dit_accel.Fovea(1.0)
TOLERANCE = 3e-6  # float32: what two orders of the same sums differ by in these models
NAMES = list(KINDS)
SIDES = {"flux2": 1}  # latents on a token's side, where not 2


def on(model: Any, method: Any = WHOLE, **options: Any) -> Any:
    return accelerated(model, Assignment.of(method), **{"strict": True, **options})


def test_its_names_are_those_that_are_used() -> None:
    extension = comfyui().patcher_extension
    assert (extension.WrappersMP.APPLY_MODEL, extension.CallbacksMP.ON_CLEANUP) == (install.APPLY_MODEL, install.CLEANUP)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("text", "cfg"), [(TEXT, 1.0), (77, 3.0), (1, 1.0)])
def test_all_kept_is_its_own_picture(name: str, text: int, cfg: float) -> None:
    """With one prompt, with two in a batch, with any length of text, at sizes that whole tokens and tiles do not divide."""
    model = tiny_model(name)
    original = sampled(model, name, text=text, cfg=cfg)
    assert relative_error(sampled(on(model), name, text=text, cfg=cfg), original) < TOLERANCE
    assert torch.equal(sampled(model, name, text=text, cfg=cfg), original)


@pytest.mark.parametrize("name", NAMES)
def test_every_image_self_attention_is_computed_and_no_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    own = accelerator.Accelerator._method

    def counted(self: Any, layer: Any, query: Tensor, *args: Any) -> Tensor:
        seen.append(layer.name)
        return own(self, layer, query, *args)

    monkeypatch.setattr(accelerator.Accelerator, "_method", counted)
    model, steps = tiny_model(name), 2
    sampled(on(model), name, steps=steps)
    streams = [f"transformer_blocks.{n}.attn" for n in range(2)]
    layers = {
        "sd3": ["transformer_blocks.0.attn", "transformer_blocks.0.attn2", "transformer_blocks.1.attn"],
        "qwen-image": streams,
        "wan": ["blocks.0.attn1", "blocks.1.attn1"],
    }.get(name, [*streams, *(f"single_{layer}" for layer in streams)])
    assert sorted(seen) == sorted(layers * steps)


def shallow(name: str) -> Any:
    """A model of one attention layer: what a token's neighbours do to it goes no further."""
    changes: dict[str, dict[str, Any]] = {
        "sd3": {"depth": 1, "x_block_self_attn_layers": [], "context_embedder_config": embedder(64)},
        "qwen-image": {"num_layers": 1},
        "wan": {"num_layers": 1},
    }
    return tiny_model(name, **changes.get(name, {"depth": 1, "depth_single_blocks": 0}))


def tokens_of(latents: Tensor, side: int) -> Tensor:
    """The largest number in each token `[T, H, W]` of latents `[B, C, (T,) H, W]`."""
    found = latents.abs().amax((0, 1))
    found = found if found.ndim == 3 else found[None]
    return found.unflatten(1, (-1, side)).unflatten(3, (-1, side)).amax((2, 4))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [(0, 0), (5, 7), (-1, -1)])
def test_a_token_sees_its_disc(name: str, place: tuple[int, int]) -> None:
    """One token of the latents is changed: in a model of one layer, those tokens change whose disc it is in, by ComfyUI's own patches.

    That shows where rows, columns and frames are, whatever `hosts` says of it.
    """
    shape, side = tuple(n if n < 16 else n // 2 * 2 for n in KINDS[name].latents), SIDES.get(name, 2)  # ComfyUI pads with the other end
    model, noise, frame = on(shallow(name), dit_accel.CLEAR(2.5)), normal(*shape, seed=1), 1 if shape[2] == 3 else 0
    row, column = (n % (size // side) for n, size in zip(place, shape[-2:], strict=True))
    other = noise.clone()
    (other if len(shape) == 4 else other[:, :, frame])[..., row * side : (row + 1) * side, column * side : (column + 1) * side] += 2.0
    before, after = (sampled(model, name, steps=1, latents=shape, noise=x) for x in (noise, other))
    changes = tokens_of(after - before, side)
    t, y, x = torch.meshgrid(*(torch.arange(n) for n in changes.shape), indexing="ij")
    near = (t - frame) ** 2 + (y - row) ** 2 + (x - column) ** 2 < 2.5**2
    assert int(near.sum()) < near.numel() // 2
    assert float(changes[~near].max()) < 1e-5 * float(changes.max())
    assert float(changes[near].min()) > 1e-4 * float(changes[near].max())


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
@pytest.mark.parametrize("method", [dit_accel.CLEAR(2.5), WHOLE], ids=["clear", "whole"])
def test_a_reference_is_seen_at_its_place(name: str, method: Any) -> None:
    """Kontext's and Qwen-Image-Edit's pictures behind the drawn one, here of other sizes: one token of the second is changed."""
    size = (1,) * (len(KINDS[name].latents) - 4)
    first, second = (normal(1, 16, *size, *sides, seed=3) for sides in ((20, 30), (26, 24)))
    other = second.clone()
    other[..., 10:12, 6:8] += 2.0  # row 5, column 3
    model = shallow(name)
    shape = tuple(n if n < 16 else n // 2 * 2 for n in KINDS[name].latents)
    before, after = (sampled(on(model, method), name, steps=1, latents=shape, reference_latents=[first, x]) for x in (second, other))
    changes = tokens_of(after - before, 2)
    _, y, x = torch.meshgrid(*(torch.arange(n) for n in changes.shape), indexing="ij")
    near = (y - 5) ** 2 + (x - 3) ** 2 < 2.5**2
    if method is WHOLE:
        original = sampled(model, name, steps=1, latents=shape, reference_latents=[first, second])
        assert relative_error(before, original) < TOLERANCE
    else:
        assert float(changes[~near].max()) < 1e-5 * float(changes.max())
        assert float(changes[near].min()) > 1e-4 * float(changes[near].max())


MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any], int, tuple[tuple[int, int, int], ...]]] = {
    # name -> model, its changes, what its conditioning has, tokens before the image, grids
    "a picture before the video": ("wan", {"in_dim_ref_conv": 16}, {"reference_latents": [normal(1, 16, 1, 18, 22)]}, 99, ((3, 9, 11),)),
    "frames behind the video": ("wan", {}, {"time_dim_concat": normal(1, 16, 2, 18, 21)}, 0, ((5, 9, 11),)),
    "videos behind it": ("wan", {}, {"context_latents": [normal(1, 16, 2, 10, 13)]}, 0, ((3, 9, 11), (2, 5, 7))),
    "a frame in front": ("hunyuan-video", {}, {"ref_latent": normal(1, 16, 1, 18, 22)}, TEXT + 99, ((3, 9, 11),)),
    "a picture": ("hunyuan-video", {"patch_size": [2, 2], "axes_dim": [12, 12]}, {}, TEXT, ((1, 17, 23),)),
}


@pytest.mark.parametrize("what", MORE)
def test_whatever_else_is_in_the_sequence(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, changes, extra, text, grids = MORE[what]
    latents = {"a picture": (1, 16, 34, 46), "a picture before the video": (1, 16, 3, 18, 22)}.get(what)
    found: set[tuple[Any, Any]] = set()
    own = accelerator.Accelerator._method

    def noted(self: Any, layer: Any, query: Tensor, key: Tensor, value: Tensor, layout: Any, *args: Any) -> Tensor:
        found.add((layout.text, layout.grids))
        return own(self, layer, query, key, value, layout, *args)

    monkeypatch.setattr(accelerator.Accelerator, "_method", noted)
    model = tiny_model(name, **changes)
    assert relative_error(sampled(on(model), name, latents=latents, **extra), sampled(model, name, latents=latents, **extra)) < TOLERANCE
    assert found == {(text, grids)}


@pytest.mark.parametrize("name", ["qwen-image", "hunyuan-video"])
def test_padded_text_is_hidden(name: str) -> None:
    """Masks that these models make themselves."""
    model, mask = tiny_model(name), torch.ones(1, TEXT, dtype=torch.int64)
    mask[:, -4:] = 0
    original = sampled(model, name, attention_mask=mask)
    assert relative_error(sampled(on(model), name, attention_mask=mask), original) < TOLERANCE
    assert relative_error(sampled(model, name), original) > 1e-4


def test_a_mask_of_regions_leaves_it_to_the_original(caplog: pytest.LogCaptureFixture) -> None:
    tokens = TEXT + 17 * 24
    regions = torch.zeros(1, tokens, tokens)
    regions[:, TEXT : TEXT + 200, :5] = -1e4
    mask = {"attention_mask": regions, "attention_mask_img_shape": (17, 24)}
    model = tiny_model("flux")
    assert torch.equal(sampled(on(model, strict=False), "flux", **mask), sampled(model, "flux", **mask))
    assert [record.levelno for record in caplog.records if "an attention mask of shape" in record.message] == [logging.WARNING]
    with pytest.raises(FallbackError, match="an attention mask of shape"):
        sampled(on(model), "flux", **mask)


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("width", [40, 72])
def test_any_width_of_heads(heads: int, width: int) -> None:
    model = tiny_model("flux", hidden_size=heads * width, num_heads=heads, axes_dim=[8, (width - 8) // 2, (width - 8) // 2])
    assert relative_error(sampled(on(model), "flux"), sampled(model, "flux")) < TOLERANCE


@pytest.mark.parametrize("sampler", ["heun", "dpmpp_2m", "uni_pc"])
def test_other_samplers(sampler: str) -> None:
    model = tiny_model("sd3")
    assert relative_error(sampled(on(model), "sd3", sampler=sampler, steps=3), sampled(model, "sd3", sampler=sampler, steps=3)) < TOLERANCE


def test_steps_and_noise_levels_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    moments: list[Any] = []
    own = accelerator.moment_of
    monkeypatch.setattr(accelerator, "moment_of", lambda options: moments.append(own(options)) or moments[-1])
    model, assignment = tiny_model("qwen-image"), Assignment((Rule(WHOLE), Rule(None, steps=(0, 2))))
    sampled(accelerated(model, assignment), "qwen-image", steps=4)
    sigmas = comfyui().samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
    assert [moment.step for moment in moments] == [0, 1, 2, 3]
    assert [moment.noise for moment in moments] == pytest.approx(sigmas[:-1].tolist())


def test_a_part_of_its_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    own = accelerator.Accelerator._begin
    monkeypatch.setattr(accelerator.Accelerator, "_begin", lambda self, *args: calls.append("") or own(self, *args))
    model = tiny_model("wan")
    sampled(on(model, sigmas=install.sigma_range(model, 0.3, 1.0)), "wan", steps=10)
    assert 0 < len(calls) < 10


def test_another_nodes_override_is_asked_and_does_not_win() -> None:
    asked: list[tuple[int, int]] = []

    def other(function: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        asked.append((query.shape[1], key.shape[1]))
        return function(query, key, *args, **kwargs)

    model, steps = tiny_model("wan"), 2
    expected = sampled(on(model, dit_accel.CLEAR(2)), "wan", steps=steps)
    before = model.clone()
    before.model_options["transformer_options"][OVERRIDE] = other
    assert torch.equal(sampled(on(before, dit_accel.CLEAR(2)), "wan", steps=steps), expected)
    assert asked == [(3 * 9 * 11, TEXT)] * 2 * steps  # the cross-attention of two blocks
    after = on(model, dit_accel.CLEAR(2)).clone()
    after.model_options["transformer_options"][OVERRIDE] = other
    assert torch.equal(sampled(after, "wan", steps=steps), expected)
    assert len(asked) == 2 * 2 * steps


def test_as_many_words_as_tokens_are_no_self_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths of Wan's cross-attention equal those of its self-attention then."""
    text, seen, own = 3 * 9 * 11, [], accelerator.Accelerator._method
    monkeypatch.setattr(accelerator.Accelerator, "_method", lambda self, layer, *args: seen.append(layer.name) or own(self, layer, *args))
    model = tiny_model("wan")
    assert relative_error(sampled(on(model), "wan", text=text, steps=1), sampled(model, "wan", text=text, steps=1)) < TOLERANCE
    assert seen == ["blocks.0.attn1", "blocks.1.attn1"]


def lengthened(transformer: Any) -> Any:
    """An accelerated FLUX of diffusers with random parameters of the method, and with a LoRA in dit_accel's name."""
    from peft import LoraConfig

    from dit_accel.patch.lora import ADAPTER

    dit_accel.accelerate(transformer, dit_accel.SLA(0.2), strict=True)
    torch.manual_seed(9)
    lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"], init_lora_weights=False)
    transformer.add_adapter(lora, adapter_name=ADAPTER)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if ".dit_accel." in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return transformer


def test_an_adapter_from_diffusers_computes_the_same(tmp_path: Path) -> None:
    """The same weights in diffusers' FLUX and in ComfyUI's, then the adapter that was saved there: method, its parameters, and LoRA."""
    model, transformer = with_weights_of("flux")
    noise, text, pooled = normal(1, 16, 34, 46, seed=1), normal(1, TEXT, 32, seed=5), normal(1, 24, seed=6)

    def in_diffusers() -> Tensor:
        with torch.no_grad():
            velocity = transformer(
                hidden_states=pack(noise), encoder_hidden_states=text, pooled_projections=pooled, timestep=torch.ones(1),
                guidance=torch.full((1,), 3.5), img_ids=position_ids(17, 23), txt_ids=torch.zeros(TEXT, 3), return_dict=False,
            )[0]  # fmt: skip
        return pack(noise) - velocity

    def in_comfyui(patcher: Any) -> Tensor:
        return pack(model.model.latent_format.process_in(sampled(patcher, "flux", steps=1, noise=noise, latents=tuple(noise.shape))))

    assert relative_error(in_comfyui(model), original := in_diffusers()) < 1e-5
    dit_accel.save_adapter(lengthened(transformer), tmp_path / "adapter")
    expected = in_diffusers()
    assert relative_error(expected, original) > 0.02
    (patched,) = nodes.LoadAdapter().apply(model, str(tmp_path / "adapter"), 1.0, True)
    assert relative_error(in_comfyui(patched), expected) < 1e-5
    (weaker,) = nodes.LoadAdapter().apply(model, str(tmp_path / "adapter"), 0.5, True)
    assert relative_error(in_comfyui(weaker), expected) > 1e-3
    assert relative_error(in_comfyui(model), original) < 1e-5
    with pytest.raises(AdapterError, match="with 2 heads of 24, but this Flux has 4 of 12"):
        nodes.LoadAdapter().apply(tiny_model("flux", num_heads=4, axes_dim=[4, 4, 4]), str(tmp_path / "adapter"), 1.0, False)
    with pytest.raises(AdapterError, match="for a FluxTransformer2DModel, but a WanModel of ComfyUI is a WanTransformer3DModel"):
        nodes.LoadAdapter().apply(tiny_model("wan"), str(tmp_path / "adapter"), 1.0, False)


@pytest.mark.parametrize(
    ("name", "width", "layer"), [("sd3", 128, "transformer_blocks.0.attn"), ("qwen-image", 48, "transformer_blocks.1.attn")]
)
def test_a_lora_is_found_by_its_names_in_diffusers(name: str, width: int, layer: str) -> None:
    leaves = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "to_add_out")
    lora = {f"transformer.{layer}.{leaf}.lora_{side}.weight": 0.3 * normal(*((2, width) if side == "A" else (width, 2)), seed=n)
            for n, leaf in enumerate(leaves) for side in "AB"}  # fmt: skip
    model = tiny_model(name)
    patched = AdapterForHost(Assignment.of(WHOLE), {}, lora).with_lora(model, 1.0)
    assert relative_error(sampled(patched, name), sampled(model, name)) > 1e-3


def test_a_lora_that_is_not_found_is_refused() -> None:
    lora = {f"transformer.blocks.0.attn1.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    model = tiny_model("wan")
    with pytest.raises(AdapterError, match="finds places for 0 of the 1 layers of the adapter's LoRA in this WanModel"):
        AdapterForHost(Assignment.of(WHOLE), {}, lora).with_lora(model, 1.0)
