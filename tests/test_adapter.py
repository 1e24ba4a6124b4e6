"""Adapters on disk: a round trip is exact, and what is damaged or belongs elsewhere is refused with the pipeline untouched."""

import hashlib
import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from distill_fixtures import CALL, LORA_SPEC, MODES, SPARSE, SPECS, add_lora, draw, half_pipe, learn, prompt_pipe, same, state, unchanged
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel import CLEAR, GNA, AttentionSpec, Fovea, accelerate, dense, load_adapter, restore, save_adapter
from dit_accel.adapters.folder import CONFIG, FULL, LORA, WEIGHTS
from dit_accel.adapters.model_card import CARD
from dit_accel.errors import AdapterError, AlreadyAcceleratedError, NotAcceleratedError, UnsupportedModelError
from dit_accel.patch.anatomy import projection_names
from dit_accel.patch.state import operators_of

Tensors = dict[str, Tensor]
FILES = {"parameters": {WEIGHTS}, "lora": {WEIGHTS, LORA}, "attention": {WEIGHTS, FULL}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Tensor]]:
    """An adapter of each mode, SLA's parameters in all, and the picture that its pipeline draws."""
    made = {}
    for mode in MODES:
        root = tmp_path_factory.mktemp(mode)
        learn(pipe := accelerate(prompt_pipe(), SPARSE), root / "run", train=mode)
        made[mode] = (save_adapter(pipe, root / "adapter", training={"steps": 3}), draw(pipe))
    return made


def copied(source: Path, target: Path) -> Path:
    """A folder's copy, to be damaged."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def edit_config(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    config = json.loads((folder / CONFIG).read_text())
    change(config)
    (folder / CONFIG).write_text(json.dumps(config))


def edit_tensors(folder: Path, file: str, change: Callable[[Tensors], object]) -> None:
    """Rewrite a file and its checksum, so that only the contents are wrong."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    edit_config(folder, lambda config: config["files"].update({file: digest}))


# Round trips


@pytest.mark.parametrize("mode", MODES)
def test_what_was_trained_comes_back_to_the_bit(trained: dict[str, tuple[Path, Tensor]], mode: str) -> None:
    folder, picture = trained[mode]
    assert {path.name for path in folder.iterdir()} == FILES[mode] | {CONFIG, CARD}
    pipe = prompt_pipe()
    before, original, requires = (
        state(pipe.transformer),
        draw(pipe),
        {n: p.requires_grad for n, p in pipe.transformer.named_parameters()},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_adapter(pipe, folder) is pipe
    assert torch.equal(draw(pipe), picture)
    with dense(pipe):
        assert torch.equal(draw(pipe), original)
    restore(pipe)
    assert torch.equal(draw(pipe), original)
    assert same(state(pipe.transformer), before)
    assert {n: p.requires_grad for n, p in pipe.transformer.named_parameters()} == requires


def test_saving_what_was_loaded_gives_the_same_tensors(trained: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    for mode, (folder, _) in trained.items():
        again = save_adapter(load_adapter(prompt_pipe(), folder), tmp_path / mode)
        assert {path.name for path in again.iterdir()} == FILES[mode] | {CONFIG, CARD}
        assert all(same(load_file(again / name), load_file(folder / name)) for name in FILES[mode])


UNTRAINED: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.5), "fovea-radius": Fovea(radius=2.0), "clear": LORA_SPEC,
    "clear-pooled": CLEAR(2.0, downsample=2), "gna": GNA((3, 5)),
}  # fmt: skip


@pytest.mark.parametrize("spec", UNTRAINED.values(), ids=UNTRAINED)
@pytest.mark.parametrize("whole", [True, False], ids=["all-layers", "one-layer"])
def test_settings_come_back(tmp_path: Path, spec: AttentionSpec, whole: bool) -> None:
    pipe = accelerate(prompt_pipe(), spec, layers=None if whole else lambda name, _: name.startswith("single"), dense_steps=1)
    loaded = load_adapter(prompt_pipe(), save_adapter(pipe, tmp_path / "a" / "b"))
    assert torch.equal(draw(loaded), draw(pipe))
    assert loaded.transformer._dit_accel.context.assignment.spec == spec
    assert loaded.transformer._dit_accel.context.assignment.dense_steps == 1
    assert list(operators_of(loaded)) == list(operators_of(pipe))
    assert len(operators_of(loaded)) == (2 if whole else 1)


@pytest.mark.parametrize("mode", MODES)
def test_the_global_random_states_stay(trained: dict[str, tuple[Path, Tensor]], mode: str, tmp_path: Path) -> None:
    def states() -> list[Any]:
        return [random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()]

    pipe, before = prompt_pipe(), states()
    load_adapter(pipe, trained[mode][0])
    assert states() == before
    save_adapter(pipe, tmp_path / "adapter")
    restore(pipe)
    accelerate(pipe, SPARSE)
    assert states() == before


def test_a_bare_transformer_has_adapters_too(trained: dict[str, tuple[Path, Tensor]]) -> None:
    pipe = prompt_pipe()
    load_adapter(pipe.transformer, trained["lora"][0])
    assert torch.equal(draw(pipe), trained["lora"][1])


def test_bfloat16_comes_back_to_the_bit(tmp_path: Path) -> None:
    pipe = accelerate(half_pipe(), SPARSE)
    names = projection_names(pipe.transformer, pipe.transformer._dit_accel.originals)
    pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names), adapter_name="dit_accel")
    for name, parameter in pipe.transformer.named_parameters():  # as distillation leaves them
        if ".dit_accel." in name:
            parameter.data = parameter.data.float() + 1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    loaded = load_adapter(half_pipe(), save_adapter(pipe, tmp_path / "adapter"))
    assert same(state(loaded.transformer), state(pipe.transformer))
    assert torch.equal(draw(loaded), draw(pipe))


def test_a_users_lora_keeps_its_strength(trained: dict[str, tuple[Path, Tensor]]) -> None:
    pipe = prompt_pipe()
    add_lora(pipe, weight=0.5)
    picture = draw(pipe)
    with pytest.warns(UserWarning, match="differ"):
        load_adapter(pipe, trained["lora"][0])
    assert not torch.equal(draw(pipe), picture)
    with dense(pipe):
        assert torch.equal(draw(pipe), picture)
    assert torch.equal(draw(restore(pipe)), picture)


@pytest.mark.parametrize("through", ["pipeline", "transformer"])
def test_the_lora_file_loads_alone(trained: dict[str, tuple[Path, Tensor]], through: str, tmp_path: Path) -> None:
    folder, _ = trained["lora"]
    loaded, plain = load_adapter(prompt_pipe(), folder), prompt_pipe()
    if through == "pipeline":
        plain.load_lora_weights(str(folder), weight_name=LORA, adapter_name="alone")
    else:
        plain.transformer.load_lora_adapter(str(folder), weight_name=LORA, adapter_name="alone", prefix="transformer")
    picture = draw(plain)
    assert not torch.equal(picture, draw(prompt_pipe()))
    loaded.transformer._dit_accel.context.enabled = False  # the LoRA without the operators
    assert torch.equal(draw(loaded), picture)


def test_nothing_is_pickled_and_nothing_is_left_over(trained: dict[str, tuple[Path, Tensor]]) -> None:
    for folder, _ in trained.values():
        files = [path for path in folder.parent.rglob("*") if path.is_file() and path.name != "curve.png"]
        assert {path.suffix for path in files} == {".safetensors", ".json", ".jsonl", ".md"}
        assert list(folder.parent.rglob(".*")) == []
        for path in files:
            head = path.read_bytes()[:9]
            if path.suffix == ".md":
                assert head[:4] == b"---\n"
                continue
            assert head[8:] == b"{" if path.suffix == ".safetensors" else head[:1] == b"{"
        config = json.loads((folder / CONFIG).read_text())
        assert config["files"] == {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
        assert config["training"] == {"steps": 3}


# Refusals: each leaves the pipeline as it was


def cut(folder: Path, file: str) -> None:
    (folder / file).write_bytes((folder / file).read_bytes()[:-3])


def flip(folder: Path, file: str) -> None:
    data = bytearray((folder / file).read_bytes())
    data[-2] ^= 1
    (folder / file).write_bytes(data)


def emptied(folder: Path, file: str) -> None:
    (folder / file).write_bytes(b"")


def gone(folder: Path, file: str) -> None:
    (folder / file).unlink()


@pytest.mark.parametrize("damage", [cut, flip, emptied, gone])
@pytest.mark.parametrize(("mode", "file"), [(mode, file) for mode in MODES for file in sorted(FILES[mode])])
def test_a_damaged_file_is_named(
    trained: dict[str, tuple[Path, Tensor]], tmp_path: Path, mode: str, file: str, damage: Callable[[Path, str], None]
) -> None:
    folder = copied(trained[mode][0], tmp_path / "adapter")
    damage(folder, file)
    pipe = prompt_pipe()
    with unchanged(pipe), pytest.raises(AdapterError, match=file):
        load_adapter(pipe, folder)


def reshaped(tensors: Tensors) -> None:
    name = sorted(n for n in tensors if n != "format")[0]
    tensors[name] = torch.zeros(7, *tensors[name].shape[1:])


def dropped(tensors: Tensors) -> None:
    del tensors[sorted(n for n in tensors if n != "format")[0]]


def dropped_layer(tensors: Tensors) -> None:
    stem = sorted(n for n in tensors if n != "format")[0].split(".attn")[0].split("attn")[0]
    for name in [n for n in tensors if n.startswith(stem)]:
        del tensors[name]


def emptied_of_tensors(tensors: Tensors) -> None:
    tensors.clear()


def added(tensors: Tensors) -> None:
    tensors["one.more.weight"] = torch.zeros(2, 2)


@pytest.mark.parametrize("change", [reshaped, dropped, dropped_layer, emptied_of_tensors, added])
@pytest.mark.parametrize(("mode", "file"), [("parameters", WEIGHTS), ("lora", LORA), ("attention", FULL)], ids=MODES)
def test_tensors_that_do_not_fit_are_refused(
    trained: dict[str, tuple[Path, Tensor]], tmp_path: Path, mode: str, file: str, change: Callable[[Tensors], None]
) -> None:
    folder = copied(trained[mode][0], tmp_path / "adapter")
    edit_tensors(folder, file, change)
    pipe = prompt_pipe()
    with unchanged(pipe), pytest.raises(AdapterError, match=file):
        load_adapter(pipe, folder)


def test_a_weight_outside_the_attention_is_refused(trained: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder, pipe = copied(trained["attention"][0], tmp_path / "adapter"), prompt_pipe()
    edit_tensors(folder, FULL, lambda tensors: tensors.update({"proj_out.weight": torch.zeros_like(pipe.transformer.proj_out.weight)}))
    with unchanged(pipe), pytest.raises(AdapterError, match=r"proj_out\.weight"):
        load_adapter(pipe, folder)


def renamed_layers(config: dict[str, Any]) -> None:
    config["layers"] = {name.replace("transformer_blocks.0", "transformer_blocks.9"): sizes for name, sizes in config["layers"].items()}


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown-field": (lambda c: c.update(extra=1), "extra"),
    "missing-field": (lambda c: c.pop("training"), "training"),
    "first-format": (lambda c: c.update(version=1), "must have the fields .*dense_steps"),
    "version": (lambda c: c.update(version=99), "99"),
    "class": (lambda c: c.update(base_model_class="WanTransformer3DModel"), "WanTransformer3DModel.*FluxTransformer2DModel"),
    "layers": (renamed_layers, r"transformer_blocks\.9"),
    "no-layers": (lambda c: c.update(layers={}), "layers"),
    "heads": (lambda c: c.update(layers={name: [4, 8] for name in c["layers"]}), "4 heads of 8.*2, 16"),
    "layers-type": (lambda c: c.update(layers=[1]), "layers"),
    "layer-sizes": (lambda c: c.update(layers=dict.fromkeys(c["layers"], 3)), "layers"),
    "spec-field": (lambda c: c["assignment"]["specs"][0].update(extra=1), "extra"),
    "spec-slot": (lambda c: c["assignment"]["specs"][0]["keep"][0].update(type="Sphere"), "Sphere"),
    "spec-value": (lambda c: c["assignment"]["specs"][0]["keep"][0].update(density=3), "density"),
    "no-assignment": (lambda c: c.update(assignment=None), "an assignment must have exactly the keys"),
    "rule-field": (lambda c: c["assignment"]["rules"][0].update(extra=1), "a rule must have the key spec"),
    "rule-steps": (lambda c: c["assignment"]["rules"].append({"spec": None, "steps": [0, -1]}), "steps must be None or"),
    "rule-layer": (lambda c: c["assignment"]["rules"].append({"spec": 0, "layers": ["blocks.*"]}), r"no layer is named blocks\.\*"),
    "layer-without-spec": (
        lambda c: c["assignment"]["rules"][0].update(layers=["single_*"]),
        "gives a spec to the layer transformer",
    ),
    "files": (lambda c: c.update(files=None), "files"),
    "another-file": (lambda c: c["files"].update({"../x.safetensors": "0"}), "files"),
    "no-weights": (lambda c: c.update(files={}), "files"),
}


@pytest.mark.parametrize(("change", "says"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_fit_is_refused(
    trained: dict[str, tuple[Path, Tensor]], tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str
) -> None:
    folder = copied(trained["parameters"][0], tmp_path / "adapter")
    edit_config(folder, change)
    pipe = prompt_pipe()
    with unchanged(pipe), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, folder)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"null", b"\xff\xfe"], ids=str)
def test_a_config_that_is_none_is_refused(trained: dict[str, tuple[Path, Tensor]], tmp_path: Path, text: bytes) -> None:
    folder = copied(trained["parameters"][0], tmp_path / "adapter")
    (folder / CONFIG).write_bytes(text)
    with pytest.raises(AdapterError, match=CONFIG):
        load_adapter(prompt_pipe(), folder)


def other_sizes(**sizes: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = {k: v for k, v in prompt_pipe().transformer.config.items() if not k.startswith("_")}
        return prompt_pipe(transformer=FluxTransformer2DModel(**config | sizes).eval())

    return make


OTHERS = {
    "heads": (other_sizes(num_attention_heads=4, attention_head_dim=16), "4"),
    "head-dim": (other_sizes(attention_head_dim=8, axes_dims_rope=(4, 2, 2)), "8"),
    "fewer-layers": (other_sizes(num_single_layers=0), r"single_transformer_blocks\.0"),
}


@pytest.mark.parametrize(("make", "says"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("mode", MODES)
def test_another_architecture_is_refused(trained: dict[str, tuple[Path, Tensor]], mode: str, make: Callable[[], Any], says: str) -> None:
    pipe = make()
    with unchanged(pipe), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, trained[mode][0])


def test_what_is_no_flux_transformer_or_no_folder_is_refused(trained: dict[str, tuple[Path, Tensor]], tmp_path: Path) -> None:
    folder = trained["parameters"][0]
    with pytest.raises(UnsupportedModelError, match="Linear"):
        load_adapter(torch.nn.Linear(2, 2), folder)
    for path, says in ((tmp_path, CONFIG), (tmp_path / "nowhere", "nowhere"), (folder / CONFIG, CONFIG), ("./nowhere", "nowhere")):
        pipe = prompt_pipe()
        with unchanged(pipe), pytest.raises(AdapterError, match=says):
            load_adapter(pipe, path)


def test_an_accelerated_pipeline_takes_no_second(trained: dict[str, tuple[Path, Tensor]]) -> None:
    for mode in MODES:
        pipe = accelerate(prompt_pipe(), SPECS["lora"])
        with unchanged(pipe), pytest.raises(AlreadyAcceleratedError, match="already"):
            load_adapter(pipe, trained[mode][0])


@pytest.mark.parametrize("mode", MODES)
def test_saving_within_dense_writes_what_was_trained(trained: dict[str, tuple[Path, Tensor]], mode: str, tmp_path: Path) -> None:
    with dense(load_adapter(prompt_pipe(), trained[mode][0])) as pipe:
        folder = save_adapter(pipe, tmp_path / "adapter")
    assert torch.equal(draw(load_adapter(prompt_pipe(), folder)), trained[mode][1])


def test_no_lora_is_loaded_where_it_would_be_off(trained: dict[str, tuple[Path, Tensor]]) -> None:
    add_lora(pipe := prompt_pipe())
    pipe.transformer.disable_lora()
    with unchanged(pipe), pytest.raises(AdapterError, match="LoRA is disabled"):
        load_adapter(pipe, trained["lora"][0])


@pytest.mark.parametrize("mode", ["parameters", "lora"])
def test_quantised_weights_take_an_adapter(trained: dict[str, tuple[Path, Tensor]], mode: str, tmp_path: Path) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    def quantised() -> Any:
        quantize_((pipe := prompt_pipe()).transformer, Int8WeightOnlyConfig())
        return pipe

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*differ from these")  # they are the same weights
        load_adapter(pipe := quantised(), trained[mode][0])
        again = load_adapter(quantised(), save_adapter(pipe, tmp_path / "adapter"))
    assert torch.equal(draw(again), draw(pipe))


@pytest.mark.parametrize("mode", MODES)
def test_other_base_weights_are_warned_of(trained: dict[str, tuple[Path, Tensor]], mode: str) -> None:
    pipe = prompt_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1e-3
    with pytest.warns(UserWarning, match="differ"):
        load_adapter(pipe, trained[mode][0])
    assert draw(pipe, **CALL).shape == trained[mode][1].shape


def test_saving_needs_an_accelerated_pipeline_and_a_writable_folder(tmp_path: Path) -> None:
    with pytest.raises(NotAcceleratedError):
        save_adapter(prompt_pipe(), tmp_path / "a")
    (tmp_path / "file").write_text("")
    (tmp_path / "b" / WEIGHTS).mkdir(parents=True)
    pipe = accelerate(prompt_pipe(), SPARSE)
    for folder in (tmp_path / "file" / "a", tmp_path / "file", tmp_path / "b"):
        with unchanged(pipe), pytest.raises(AdapterError, match=str(folder)):
            save_adapter(pipe, folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["b", WEIGHTS, "file"])
