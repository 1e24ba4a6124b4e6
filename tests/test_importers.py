"""Published checkpoints: what loads is exactly what the file holds; what does not fit is refused by name, the pipeline untouched."""

from pathlib import Path
from typing import Any

import pytest
import tiny_video
import torch
from conftest import run
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from distill_fixtures import add_lora, same, state
from published import (
    BLOCKS,
    CLEAR_CALL,
    DIALECTS,
    DOUBLE,
    LINEARS,
    PARTS,
    SHARED,
    SINGLE,
    TURBO,
    clear_tensors,
    flux_pipe,
    put_in,
    quantised,
    saved,
    shared_tensors,
    turbo_by_hand,
    turbo_tensors,
    turbo_values,
    untouched,
    wan_names,
    wan_pipe,
    wan_transformer,
)
from safetensors.torch import load_file
from torch import Tensor

from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, accelerate, dense, load_adapter, restore, save_adapter
from dit_accel.adapters.folder import CONFIG, FULL, WEIGHTS, WHOLE
from dit_accel.adapters.importers import TensorInfo, match_header
from dit_accel.adapters.model_card import CARD
from dit_accel.errors import AdapterError
from dit_accel.patch.state import operators_of

RELEASED = {
    "clear_local_8": CLEAR(8), "clear_local_16": CLEAR(16), "clear_local_32": CLEAR(32),
    "clear_local_8_down_4": CLEAR(8, downsample=4), "clear_local_16_down_4": CLEAR(16, downsample=4),
}  # fmt: skip


def picture(pipe: Any) -> Tensor:
    """What a FLUX pipeline draws in one step."""
    return run(pipe, steps=1, **CLEAR_CALL)


def film(pipe: Any, call: dict[str, Any]) -> Tensor:
    """The latents of a short film."""
    frames = pipe(**call | {"num_inference_steps": 1}, generator=torch.Generator().manual_seed(0)).frames
    assert bool(frames.isfinite().all()), "the pipeline drew NaN or infinity"
    return frames


# CLEAR


@pytest.fixture(scope="module")
def original() -> Tensor:
    return picture(flux_pipe())


@pytest.mark.parametrize("name", RELEASED)
def test_clear_loads_by_its_name(tmp_path: Path, original: Tensor, name: str) -> None:
    factor = 4 if "down" in name else None
    tensors = clear_tensors(factor)
    assert len(tensors) == (437 if factor else 380)
    pipe, by_hand = flux_pipe(), accelerate(flux_pipe(), RELEASED[name])
    before = state(pipe.transformer)
    assert load_adapter(pipe, saved(tensors, tmp_path, name)) is pipe
    assert pipe.transformer._dit_accel.context.assignment.spec == RELEASED[name]
    assert len(operators_of(pipe)) == DOUBLE + SINGLE
    assert pipe.transformer._dit_accel.context.trained  # nothing else will do for these weights, however fast it is

    pooling = {k.replace(".processor.", ".dit_accel.params."): v.reshape(4, 4) for k, v in tensors.items() if "spatial" in k}
    put_in(by_hand.transformer, {k: v for k, v in tensors.items() if "spatial" not in k} | pooling)
    assert same(state(pipe.transformer), state(by_hand.transformer))
    drawn = picture(pipe)
    assert torch.equal(drawn, picture(by_hand))
    assert not torch.equal(drawn, original)
    with dense(pipe):
        assert torch.equal(picture(pipe), original)
    restore(pipe)
    assert same(state(pipe.transformer), before)


def test_clear_keeps_out_what_is_far(tmp_path: Path) -> None:
    """Weights alone are not the method: with radius 8 of 12 columns the picture differs from the one without a patch."""
    pipe, plain = flux_pipe(), flux_pipe()
    load_adapter(pipe, saved(clear_tensors(), tmp_path, "clear_local_8"))
    put_in(plain.transformer, clear_tensors())
    assert not torch.equal(picture(pipe), picture(plain))


def test_clear_under_another_name_wants_its_radius(tmp_path: Path) -> None:
    pipe = flux_pipe()
    for factor, says in ((None, r"clear_local_16\.safetensors, or pass spec=CLEAR\(16\)"), (4, r"spec=CLEAR\(16, downsample=4\)")):
        with untouched(pipe.transformer), pytest.raises(AdapterError, match=says):
            load_adapter(pipe, saved(clear_tensors(factor), tmp_path, "attn_weights"))
    spec = CLEAR(8, downsample=4, tile=(4, 8))
    load_adapter(pipe, tmp_path / "attn_weights.safetensors", spec=spec)
    assert pipe.transformer._dit_accel.context.assignment.spec == spec


CONTRADICTIONS: dict[str, tuple[str, int | None, AttentionSpec | None, str]] = {
    "radius": ("clear_local_16", None, CLEAR(8), r"is of Disc\(radius=16\).*, not of spec=Disc\(radius=8\)"),
    "factor": ("clear_local_16_down_4", 4, CLEAR(16, downsample=2), r"factor=4.*by its name.*factor=2"),
    "factor-of-name": ("clear_local_16_down_2", 4, None, r"spatial_weight: \(1, 1, 1, 4, 1, 4, 1\).*, not \(1, 1, 1, 2, 1, 2, 1\)"),
    "no-pooling": ("clear_local_16_down_4", None, None, r"contains no pooling weights"),
    "pooling": ("clear_local_16", 4, None, r"contains pooling weights, which does not fit Disc\(radius=16\)"),
    "pooling-of-spec": ("attn_weights", 4, CLEAR(16), "contains pooling weights"),
    "method": ("attn_weights", None, GNA((3, 3)), r"require spec=CLEAR\(radius\), not Window"),
    "rest": ("attn_weights", None, Fovea(radius=8), r"require spec=CLEAR\(radius\), not DiscBlocks"),
}


@pytest.mark.parametrize(("name", "factor", "spec", "says"), CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_clear_is_not_loaded_against_what_it_says(
    tmp_path: Path, name: str, factor: int | None, spec: AttentionSpec | None, says: str
) -> None:
    pipe, file = flux_pipe(), saved(clear_tensors(factor), tmp_path, name)
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, file, spec=spec)


def test_clear_beside_a_users_lora(tmp_path: Path) -> None:
    pipe = flux_pipe()
    add_lora(pipe)
    before, drawn = state(pipe.transformer), picture(pipe)
    load_adapter(pipe, saved(clear_tensors(), tmp_path, "clear_local_8"))
    got = pipe.transformer.get_parameter("transformer_blocks.0.attn.to_q.base_layer.weight")
    assert torch.equal(got, clear_tensors()["transformer_blocks.0.attn.to_q.weight"].float())
    with dense(pipe):
        assert torch.equal(picture(pipe), drawn)
    restore(pipe)
    assert same(state(pipe.transformer), before)


def test_clear_goes_on_as_an_adapter_of_ours(tmp_path: Path) -> None:
    pipe = load_adapter(flux_pipe(), saved(clear_tensors(4), tmp_path, "clear_local_8_down_4"))
    folder = save_adapter(pipe, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {CARD, CONFIG, WEIGHTS, FULL}
    again = load_adapter(flux_pipe(), folder)
    assert same(state(again.transformer), state(pipe.transformer))
    assert torch.equal(picture(again), picture(pipe))
    other = flux_pipe()
    with untouched(other.transformer), pytest.raises(AdapterError, match="names its method itself"):
        load_adapter(other, folder, spec=CLEAR(8, downsample=4))


# TurboDiffusion


@pytest.mark.parametrize("matrix", [True, False], ids=["matrix", "convolution"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_turbo_loads_in_every_dialect(tmp_path: Path, dialect: str, matrix: bool) -> None:
    tensors = turbo_tensors(dialect, matrix=matrix)
    assert len(tensors) == 15 + 29 * BLOCKS  # 885 of the 30 blocks of 1.3B
    pipe, _ = wan_pipe()
    load_adapter(pipe, saved(tensors, tmp_path))
    assert same(state(pipe.transformer), state(turbo_by_hand(*turbo_values()).transformer))
    assert pipe.transformer._dit_accel.context.assignment.spec == TURBO
    assert pipe.transformer._dit_accel.context.trained


def test_turbo_draws_as_by_hand_and_gives_the_model_back(tmp_path: Path) -> None:
    pipe, call = wan_pipe()
    before, original = state(pipe.transformer), film(pipe, call)
    load_adapter(pipe, saved(turbo_tensors("official"), tmp_path))
    drawn = film(pipe, call)
    assert torch.equal(drawn, film(turbo_by_hand(*turbo_values()), call))
    unpatched, _ = wan_pipe()
    put_in(unpatched.transformer, turbo_values()[0])
    assert not torch.equal(drawn, film(unpatched, call))
    with dense(pipe):
        assert same({n: p for n, p in state(pipe.transformer).items() if ".dit_accel." not in n}, before)
        assert torch.equal(film(pipe, call), original)
    restore(pipe)
    assert same(state(pipe.transformer), before)
    assert torch.equal(film(pipe, call), original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_tiles_mean_what_the_format_says(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors, meant = quantised(turbo_tensors("official"))
    assert tensors["blocks.0.ffn.0.scale"].shape == (2, 2)  # 160 × 144 values
    pipe, _ = wan_pipe()
    load_adapter(pipe.to(dtype), saved(tensors, tmp_path))
    for old, new in wan_names().items():
        exact = meant.get(old, turbo_values()[0][new])
        assert torch.equal(pipe.transformer.get_parameter(new), exact.to(pipe.transformer.get_parameter(new).dtype)), old


def test_int8_tiles_under_diffusers_names(tmp_path: Path) -> None:
    tensors, meant = quantised(turbo_tensors("official"))
    names, marks = wan_names(), {".int8_weight": ".weight", ".scale": ".weight"}
    renamed = {}
    for name, value in tensors.items():
        mark = next((m for m in marks if name.endswith(m)), "")
        plain = name.removesuffix(mark) + ".weight" if mark else name
        target = names.get(plain, plain.replace("self_attn.", "attn1."))
        renamed[target.removesuffix(".weight") + mark if mark else target] = value
    pipe, _ = wan_pipe()
    load_adapter(pipe, saved(renamed, tmp_path))
    assert torch.equal(pipe.transformer.get_parameter("blocks.1.ffn.net.2.weight"), meant["blocks.1.ffn.2.weight"])


def test_turbo_takes_another_share(tmp_path: Path) -> None:
    pipe, _ = wan_pipe()
    load_adapter(pipe, saved(turbo_tensors("official"), tmp_path), spec=SLA(0.15, scope="all", block=(128, 64)))
    assert pipe.transformer._dit_accel.context.assignment.spec.density == 0.15


def test_turbo_goes_on_as_an_adapter_of_ours(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pipe, call = wan_pipe()
    load_adapter(pipe, saved(turbo_tensors("official"), tmp_path))
    folder = save_adapter(pipe, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {CARD, CONFIG, WEIGHTS, WHOLE}
    again, _ = wan_pipe()
    with torch.no_grad():
        again.transformer.proj_out.bias += 1  # all weights are the adapter's: another base changes nothing
    before = state(again.transformer)
    load_adapter(again, folder)
    assert not [warning for warning in recwarn if "differ" in str(warning.message)]
    assert same(state(again.transformer), state(pipe.transformer))
    assert torch.equal(film(again, call), film(pipe, call))
    assert same(load_file(save_adapter(again, tmp_path / "twice") / WHOLE), load_file(folder / WHOLE))
    restore(again)
    assert same(state(again.transformer), before)


def test_two_transformers_take_a_file_each(tmp_path: Path) -> None:
    pipe, _ = tiny_video.wan22_two_experts()
    pipe.register_modules(transformer=wan_transformer(), transformer_2=wan_transformer())
    file = saved(turbo_tensors("official"), tmp_path)
    with untouched(pipe.transformer), untouched(pipe.transformer_2), pytest.raises(AdapterError, match="has 2 transformers"):
        load_adapter(pipe, file)
    before = state(pipe.transformer_2)
    with untouched(pipe.transformer):
        assert load_adapter(pipe.transformer_2, file) is pipe.transformer_2
    load_adapter(pipe.transformer, file)
    assert same(state(pipe.transformer), state(pipe.transformer_2))
    restore(pipe)
    assert same(state(pipe.transformer_2), before)


# SimpleTuner


def test_a_shared_projection_goes_to_all_layers(tmp_path: Path) -> None:
    pipe, call = wan_pipe()
    original, before = film(pipe, call), state(pipe.transformer)
    file = saved(shared_tensors(), tmp_path)
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=r"does not tell its method: give spec=SLA"):
        load_adapter(pipe, file)
    load_adapter(pipe, file, spec=SHARED)
    for operator in operators_of(pipe).values():
        assert torch.equal(operator.params.proj.weight, shared_tensors()["proj_l.weight"])
        assert torch.equal(operator.params.proj.bias, shared_tensors()["proj_l.bias"])
    by_hand, _ = wan_pipe()
    accelerate(by_hand, SHARED)
    for n in range(BLOCKS):
        prefix = f"blocks.{n}.attn1.dit_accel.params."
        put_in(by_hand.transformer, {prefix + key.replace("proj_l", "proj"): x for key, x in shared_tensors().items()})
    assert torch.equal(film(pipe, call), film(by_hand, call))
    folder = save_adapter(pipe, tmp_path / "adapter")
    assert {path.name for path in folder.iterdir()} == {CARD, CONFIG, WEIGHTS}
    again, _ = wan_pipe()
    assert torch.equal(film(load_adapter(again, folder), call), film(pipe, call))
    with dense(pipe):
        assert torch.equal(film(pipe, call), original)
    assert same(state(restore(pipe).transformer), before)


def test_a_shared_projection_fits_any_family_of_its_head_size(tmp_path: Path) -> None:
    pipe = flux_pipe()
    file = saved(shared_tensors(), tmp_path)
    with untouched(pipe.transformer), pytest.raises(AdapterError, match=r"proj_l\.weight: \(72, 72\).*, not \(16, 16\)"):
        load_adapter(pipe, file, spec=SHARED)
    load_adapter(pipe, saved(shared_tensors(16), tmp_path), spec=SHARED)
    assert len(operators_of(pipe)) == DOUBLE + SINGLE


# The released sizes, by name and shape alone

WAN_SIZES = {  # layers, heads, width of the inner layer, channels: the 1.3B, the 14B and one half of the image-to-video A14B
    "1.3B": (30, 12, 8960, 16), "14B": (40, 40, 13824, 16), "I2V-A14B": (40, 40, 13824, 36),
}  # fmt: skip


@pytest.mark.parametrize("tiles", [False, True], ids=["floats", "int8"])
@pytest.mark.parametrize(("layers", "heads", "inner", "channels"), WAN_SIZES.values(), ids=WAN_SIZES)
def test_turbo_of_the_released_sizes_fits(layers: int, heads: int, inner: int, channels: int, tiles: bool) -> None:
    width = 128 * heads
    with torch.device("meta"):
        model = WanTransformer3DModel(
            num_attention_heads=heads, attention_head_dim=128, num_layers=layers, ffn_dim=inner, in_channels=channels, out_channels=16
        )
    state = model.state_dict()
    header = {old: TensorInfo(tuple(state[new].shape), "BF16") for old, new in wan_names(layers).items()}
    header["patch_embedding.weight"] = TensorInfo((width, channels * 4), "BF16")
    for n in range(layers):
        stem = f"blocks.{n}.self_attn.attn_op.local_attn.proj_l"
        header |= {f"{stem}.weight": TensorInfo((128, 128), "F32"), f"{stem}.bias": TensorInfo((128,), "F32")}
    assert len(header) == 15 + 29 * layers
    for name in [f"blocks.{n}.{linear}" for n in range(layers) for linear in LINEARS] if tiles else []:
        out, inputs = header.pop(f"{name}.weight").shape
        header[f"{name}.int8_weight"] = TensorInfo((out, inputs), "I8")
        header[f"{name}.scale"] = TensorInfo((out // 128, inputs // 128), "F32")
    spec, places, shapes = match_header(Path("turbo.safetensors"), header, model, None)
    assert spec == TURBO
    assert sorted(places.values()) == sorted(header)
    assert set(places) >= set(shapes) == set(state) | {f"blocks.{n}.attn1.dit_accel.params.proj.{x}" for n in range(layers) for x in PARTS}


@pytest.mark.parametrize("name", RELEASED)
def test_clear_of_the_released_size_fits(name: str) -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    small = clear_tensors(4 if "down" in name else None)
    header = {key: TensorInfo(tuple(value.shape) if "spatial" in key else (3072,) * value.ndim, "BF16") for key, value in small.items()}
    spec, places, _ = match_header(Path(f"{name}.safetensors"), header, model, None)
    assert spec == RELEASED[name]
    assert sorted(places.values()) == sorted(header)


# What the command line says


def test_info_says_what_a_file_is(tmp_path: Path) -> None:
    from dit_accel.cli.info import adapter_rows

    rows = adapter_rows(str(saved(clear_tensors(4), tmp_path, "clear_local_8_down_4")))
    assert "CLEAR" in rows["holds"]
    assert rows["method"] == str(CLEAR(8, downsample=4))
    assert rows["tensors"] == "437 of BF16"
    assert "spec=CLEAR(16)" in adapter_rows(str(saved(clear_tensors(), tmp_path)))["method"]
    tensors, _ = quantised(turbo_tensors("official"))
    rows = adapter_rows(str(saved(tensors, tmp_path)))
    assert "TurboDiffusion" in rows["holds"]
    assert rows["method"] == str(TURBO)
    assert rows["tensors"] == f"{len(tensors) - 20} of F32, 20 of I8"
