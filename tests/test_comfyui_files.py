"""What the ComfyUI nodes read from files, plans and adapters, against a stand-in for ComfyUI's interface (`comfyui_stub`)."""

import json
from pathlib import Path

import comfyui_stub as host
import pytest
import torch
from conftest import normal, relative_error
from safetensors.torch import load_file
from test_comfyui import ROOT, STREAMS, on

import dit_accel
from dit_accel.errors import AdapterError, ArgumentError
from dit_accel.integrations.comfyui import hosts, nodes


def test_a_plan_that_was_made_for_another_model_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    patcher, example = host.flux(), ROOT / "tests" / "plan_example.json"
    transformer = patcher.model.diffusion_model
    transformer.num_heads = 4
    transformer.single_blocks.extend(host.Block(transformer.hidden_size) for _ in range(3))
    plan, _ = nodes.Plan().read(str(example))
    nodes.Accelerate().apply(patcher, "", 0.0, 1.0, True, plan=plan)
    nodes.Accelerate().apply(patcher, f" {example}", 0.0, 1.0, True)
    assert not caplog.records
    other = tmp_path / "plan.json"
    other.write_text(example.read_text().replace("FluxTransformer2DModel", "ChromaTransformer2DModel"))
    message = "not valid here: it was made for ChromaTransformer2DModel, not FluxTransformer2DModel; make a plan with this model, in"
    nodes.Accelerate().apply(patcher, str(other), 0.0, 1.0, False)
    assert [message in record.getMessage() for record in caplog.records] == [True]
    with pytest.raises(ArgumentError, match=message):
        nodes.Accelerate().apply(patcher, "", 0.0, 1.0, True, plan=nodes.Plan().read(str(other))[0])
    data = json.loads(example.read_text())
    data["plan"]["trained"] = {"adapter": "conv-adapter", "sha256": "0" * 64}
    other.write_text(json.dumps(data))
    with pytest.raises(ArgumentError, match='the adapter conv-adapter has learned; give the node "Load dit_accel adapter" the folder'):
        nodes.Accelerate().apply(patcher, "", 0.0, 1.0, True, plan=nodes.Plan().read(str(other))[0])
    assert not patcher.wrappers


def test_a_method_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    """ComfyUI runs a node again when `IS_CHANGED` gives something else; it calls that with the inputs that are not linked."""
    file = tmp_path / "method.json"
    inputs = {"method": str(file), "start_percent": 0.0, "end_percent": 1.0, "strict": False}
    states = [nodes.Accelerate.IS_CHANGED(**inputs)]
    for radius in (3, 16):
        dit_accel.Assignment.of(dit_accel.CLEAR(radius)).save(file)
        states.append(nodes.Accelerate.IS_CHANGED(**inputs))
        assert nodes.Accelerate.IS_CHANGED(**inputs) == states[-1] == nodes.Plan.IS_CHANGED(file=str(file))
    assert states[0] == ()
    assert len(set(states)) == 3
    assert nodes.Accelerate.IS_CHANGED(**inputs | {"method": "clear:3"}) == ()


def test_a_node_whose_file_another_node_names_runs_again() -> None:
    """ComfyUI gives None for such an input, and runs a node again whose answer is not equal to itself."""
    linked = {"start_percent": 0.0, "end_percent": 1.0, "strict": False, "model": None, "plan": None}
    answers = [
        nodes.Accelerate.IS_CHANGED(method=None, **linked), nodes.Plan.IS_CHANGED(file=None), nodes.LoadAdapter.IS_CHANGED(adapter=None),
    ]  # fmt: skip
    assert all(answer != answer for answer in answers)
    assert nodes.Accelerate.IS_CHANGED(method="clear:3", **linked) == ()


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Made in diffusers, for a FLUX with layers of the stand-in's size; its method's parameters are random."""
    from diffusers import FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=host.WIDTH, num_attention_heads=host.HEADS,
        joint_attention_dim=32, pooled_projection_dim=24, axes_dims_rope=(8, 8, 8),
    )  # fmt: skip
    dit_accel.accelerate(transformer, dit_accel.SLA(0.2))
    own = [parameter for name, parameter in transformer.named_parameters() if ".dit_accel." in name]
    for n, parameter in enumerate(own):
        parameter.data.copy_(0.3 * normal(*parameter.shape, seed=n))
    assert len(own) >= 4
    return dit_accel.save_adapter(transformer, tmp_path / "adapter")


def test_an_adapter_that_was_saved_anew_is_loaded_anew(adapter: Path) -> None:
    inputs = {"adapter": f" {adapter}", "lora_strength": 1.0, "strict": True}
    before = nodes.LoadAdapter.IS_CHANGED(**inputs)
    assert nodes.LoadAdapter.IS_CHANGED(**inputs) == before != ()
    weights = adapter / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert nodes.LoadAdapter.IS_CHANGED(**inputs) != before
    assert nodes.LoadAdapter.IS_CHANGED(adapter="owner/name") == ()


def test_an_adapter_brings_its_method_and_parameters(adapter: Path) -> None:
    patcher = host.flux()
    (patched,) = nodes.LoadAdapter().apply(patcher, str(adapter), 1.0, True)
    got, start = host.run(patched), host.run(on(patcher, dit_accel.SLA(0.2), strict=True))
    assert relative_error(got, start) > 1e-3
    tensors = load_file(adapter / "diffusion_pytorch_model.safetensors")
    parameters = {name: dit_accel.SLA(0.2).make_parameters(heads=host.HEADS, head_dim=host.WIDTH) for name in STREAMS}
    for name, own in parameters.items():
        own.load_state_dict({key: tensors[f"layers.{name.replace('.', '__')}.{key}"] for key in own.state_dict()})
    assert torch.equal(host.run(on(patcher, dit_accel.SLA(0.2), parameters=parameters)), got)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("", "neither a folder made by save_adapter nor a hub id"),
        ("class", "is for a ChromaTransformer2DModel, but a Flux of ComfyUI is a FluxTransformer2DModel or a Flux2Transformer2DModel"),
        ("heads", "is for .*transformer_blocks.0.attn with 2 heads of 24, but this Flux has 4 of 12"),
        ("layers", "is for transformer_blocks.1.attn with 2 heads of 24, but this Flux has no such layer"),
        ("damaged", "is damaged or altered"),
        ("full", "weights of the model itself .*not supported in ComfyUI"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter: Path, change: str, message: str) -> None:
    patcher = host.flux()
    transformer, config = patcher.model.diffusion_model, adapter / "dit_accel_config.json"
    if change == "heads":
        transformer.num_heads = 4
    elif change == "layers":
        del transformer.double_blocks[1]
    elif change == "class":
        config.write_text(json.dumps({**json.loads(config.read_text()), "base_model_class": "ChromaTransformer2DModel"}))
    elif change == "damaged":
        file = adapter / "diffusion_pytorch_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    elif change == "full":
        data = json.loads(config.read_text())
        config.write_text(json.dumps({**data, "files": {**data["files"], "attention_weights.safetensors": "0"}}))
    with pytest.raises(AdapterError, match=message):
        nodes.LoadAdapter().apply(patcher, str(adapter) if change else str(adapter / "none"), 1.0, False)
    assert not patcher.wrappers


def test_each_class_has_those_of_diffusers_that_adapters_are_made_for() -> None:
    import diffusers

    assert {name for known in hosts.HOSTS for name in known.classes} == hosts.SOURCES.keys()
    assert [name for names in hosts.SOURCES.values() for name in names if not hasattr(diffusers, name)] == []


def test_an_adapter_without_a_place_is_refused() -> None:
    with pytest.raises(ArgumentError, match="adapter must be a folder or owner/name on the hub"):
        nodes.LoadAdapter().apply(host.flux(), " ", 1.0, False)
