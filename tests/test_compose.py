"""An accelerated pipeline with what diffusers, peft, accelerate and torch.compile do to a model."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import LAYERS, fill_randomly, forward_arguments, normal, relative_error, run, tiny_pipe, tiny_transformer

import dit_accel
from dit_accel import CLEAR, SLA, AttentionSpec, Fovea
from dit_accel.patch.state import operators_of

METHODS = pytest.mark.parametrize("spec", [Fovea(0.2), CLEAR(4.0, downsample=2), SLA(0.2)], ids=["fovea", "clear", "sla"])


def accelerated(target: Any, spec: AttentionSpec, **settings: Any) -> Any:
    """`accelerate`, with learned parameters away from their start values: whatever loses them changes the output."""
    dit_accel.accelerate(target, spec, **settings)
    for operator in operators_of(target).values():
        fill_randomly(operator, seed=1, scale=0.3)
    return target


def processors(pipe: Any) -> dict[str, Any]:
    return dict(pipe.transformer.attn_processors)


def same_objects(pipe: Any, before: dict[str, Any]) -> bool:
    after = processors(pipe)
    return list(after) == list(before) and all(after[name] is before[name] for name in before)


# LoRA, IP-Adapter, fused projections


def add_lora(pipe: Any, targets: Any = ("to_q", "to_k", "to_v", "to_out.0")) -> None:
    from peft import LoraConfig

    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets if isinstance(targets, str) else list(targets)))
    fill_randomly(nn.ParameterList(p for name, p in pipe.transformer.named_parameters() if "lora_" in name), seed=2, scale=0.1)


@pytest.mark.composes("LoRA by peft, before and after")
@METHODS
def test_lora_before_and_after_agree(pipe: Any, spec: AttentionSpec) -> None:
    before, plain, other = processors(pipe), run(pipe), tiny_pipe()
    sparse = run(accelerated(other, spec))
    add_lora(pipe)
    with_lora = run(pipe)
    add_lora(other)
    got = run(accelerated(pipe, spec))
    assert torch.equal(got, run(other))
    assert relative_error(got, sparse) > 1e-3, "LoRA has no effect"
    pipe.transformer.fuse_lora()
    assert relative_error(run(pipe), got) < 1e-4
    pipe.transformer.unfuse_lora()
    dit_accel.restore(pipe)
    assert same_objects(pipe, before)
    assert relative_error(run(pipe), with_lora) < 1e-4
    pipe.transformer.delete_adapters("default")
    assert relative_error(run(pipe), plain) < 1e-4


@METHODS
def test_lora_on_all_linear_layers_leaves_the_operators_alone(pipe: Any, spec: AttentionSpec) -> None:
    add_lora(accelerated(pipe, spec), "all-linear")
    names = [name for name, _ in pipe.transformer.named_parameters() if "lora_" in name]
    assert any(".to_q." in name for name in names)
    assert not [name for name in names if "dit_accel" in name]


def add_ip_adapter(pipe: Any) -> dict[str, Any]:
    """A hand-made IP-Adapter of four tokens on the double blocks; returns the call's arguments that feed it."""
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    for index, block in enumerate(pipe.transformer.transformer_blocks):
        processor = FluxIPAdapterAttnProcessor(hidden_size=32, cross_attention_dim=20, num_tokens=(4,), scale=0.8)
        fill_randomly(processor, seed=index, scale=0.3)
        block.attn.set_processor(processor)
    return {"joint_attention_kwargs": {"ip_hidden_states": [normal(1, 4, 20, seed=8)]}}


@pytest.mark.composes("IP-Adapter")
@pytest.mark.parametrize(("height", "width"), [(32, 32), (16, 16), (272, 400)], ids=str)
def test_an_ip_adapter_keeps_its_own_attention(pipe: Any, height: int, width: int) -> None:
    plain = run(pipe, height, width)  # at 32 × 32 the image has as many tokens as the adapter
    call = add_ip_adapter(pipe)
    before, keys, expected = processors(pipe), list(pipe.transformer.state_dict()), run(pipe, height, width, **call)
    assert relative_error(expected, plain) > 1e-3
    dit_accel.accelerate(pipe, Fovea(1.0), strict=True)
    assert set(keys) <= set(pipe.transformer.state_dict())
    assert relative_error(run(pipe, height, width, **call), expected) < 1e-5
    dit_accel.restore(pipe)
    assert same_objects(pipe, before)
    assert list(pipe.transformer.state_dict()) == keys
    assert torch.equal(run(pipe, height, width, **call), expected)


def test_restore_keeps_an_ip_adapter_scale_set_meanwhile(pipe: Any) -> None:
    call = add_ip_adapter(pipe)
    dit_accel.accelerate(pipe, Fovea(1.0))
    for block in pipe.transformer.transformer_blocks:
        block.attn.processor.scale = [0.1]  # as set_ip_adapter_scale does
    expected = run(pipe, **call)
    assert relative_error(run(dit_accel.restore(pipe), **call), expected) < 1e-5


@pytest.mark.parametrize("first", ["fuse", "accelerate"])
def test_fused_projections(pipe: Any, first: str) -> None:
    before, expected = processors(pipe), run(accelerated(tiny_pipe(), Fovea(0.2)))
    if first == "fuse":
        pipe.transformer.fuse_qkv_projections()
    accelerated(pipe, Fovea(0.2))
    if first == "accelerate":
        pipe.transformer.fuse_qkv_projections()
    assert pipe.transformer.transformer_blocks[0].attn.fused_projections
    assert relative_error(run(pipe), expected) < 1e-4
    pipe.transformer.unfuse_qkv_projections()
    dit_accel.restore(pipe)
    assert same_objects(pipe, before)


# Dtypes, places, backends, caches


@pytest.mark.composes("dtype changes")
@METHODS
def test_casting_to_bfloat16_and_back(spec: AttentionSpec) -> None:
    pipe, expected = accelerated(tiny_pipe(), spec), run(accelerated(tiny_pipe(), spec))
    pipe.to(torch.bfloat16)
    low = run(pipe)
    assert low.dtype == torch.bfloat16
    assert relative_error(low, expected) < 0.1
    pipe.to(torch.float32)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    assert relative_error(run(pipe), expected) < 0.1


def test_keeping_everything_in_bfloat16(pipe: Any) -> None:
    exact = run(pipe)
    low = run(pipe.to(torch.bfloat16))
    got = run(dit_accel.accelerate(pipe, Fovea(1.0)))
    assert relative_error(got, exact) < 1.5 * relative_error(low, exact)


def cpu_offload(transformer: Any) -> None:
    from accelerate import cpu_offload

    cpu_offload(transformer, execution_device=torch.device("cpu"))


def group_offload(transformer: Any, kind: str) -> None:
    transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)


OFFLOADS: dict[str, Callable[[Any], None]] = {
    "sequential": cpu_offload,
    "leaves": lambda t: group_offload(t, "leaf_level"),
    "blocks": lambda t: group_offload(t, "block_level"),
}


@pytest.mark.composes("sequential offload (accelerate's hooks)")
@METHODS
@pytest.mark.parametrize("offload", list(OFFLOADS.values()), ids=list(OFFLOADS))
def test_offloading_keeps_the_learned_parameters(pipe: Any, spec: AttentionSpec, offload: Callable[[Any], None]) -> None:
    before, expected = processors(pipe), run(accelerated(pipe, spec))
    offload(pipe.transformer)
    assert torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe), expected)
    dit_accel.restore(pipe)
    assert same_objects(pipe, before)
    assert torch.equal(run(pipe), run(tiny_pipe()))


@pytest.mark.composes("set_attention_backend")
def test_setting_an_attention_backend_keeps_the_operators(pipe: Any, sparse_calls: list[Any]) -> None:
    expected = run(accelerated(pipe, Fovea(0.2)))
    pipe.transformer.set_attention_backend("native")
    sparse_calls.clear()
    assert torch.equal(run(pipe), expected)
    assert len(sparse_calls) == 2 * LAYERS


def caches() -> dict[str, Any]:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, TaylorSeerCacheConfig

    return {
        "first-block": FirstBlockCacheConfig(threshold=0.5),
        "taylor": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 1001), current_timestep_callback=lambda: 500
        ),
    }


@pytest.mark.composes("FirstBlockCache, TaylorSeer, PyramidAttentionBroadcast")
@pytest.mark.parametrize("name", ["first-block", "taylor", "pyramid"])
def test_a_cache_skips_the_same_calls_as_without_us(pipe: Any, name: str, sparse_calls: list[Any]) -> None:
    pipe.transformer.enable_cache(caches()[name])
    expected = run(pipe, steps=6)
    pipe.transformer.disable_cache()
    dit_accel.accelerate(pipe, Fovea(1.0))
    pipe.transformer.enable_cache(caches()[name])
    assert relative_error(run(pipe, steps=6), expected) < 1e-4
    assert LAYERS <= len(sparse_calls) < 6 * LAYERS
    pipe.transformer.disable_cache()
    dit_accel.restore(pipe)
    assert torch.equal(run(pipe), run(tiny_pipe()))


# Training, copying


@pytest.mark.composes("gradient checkpointing")
@METHODS
def test_gradient_checkpointing_changes_no_gradient(spec: AttentionSpec) -> None:
    gradients = []
    for checkpointing in (False, True):
        transformer = accelerated(tiny_transformer(), spec).train()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        transformer(**forward_arguments()).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    plain, checked = gradients
    assert [name for name in plain if ".dit_accel." in name]
    assert list(plain) == list(checked)
    assert [name for name in plain if relative_error(checked[name], plain[name]) > 1e-6] == []


def twin(value: Any, way: str) -> Any:
    return copy.deepcopy(value) if way == "deepcopy" else pickle.loads(pickle.dumps(value))


@pytest.mark.composes("deepcopy and pickle")
@METHODS
@pytest.mark.parametrize("adapter", [True, False], ids=["ip-adapter", "plain"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copy_lives_its_own_life(pipe: Any, way: str, adapter: bool, spec: AttentionSpec) -> None:
    call = add_ip_adapter(pipe) if adapter else {}
    original = run(pipe, **call)
    expected = run(accelerated(pipe, spec), **call)
    other = copy.copy(pipe)
    other.transformer = twin(pipe.transformer, way)
    assert torch.equal(run(other, **call), expected)
    assert not {id(p) for p in other.transformer.parameters()} & {id(p) for p in pipe.transformer.parameters()}
    with dit_accel.dense(other):
        assert torch.equal(run(pipe, **call), expected)
    dit_accel.restore(other)
    assert torch.equal(run(other, **call), original)
    assert {type(p) for p in processors(other).values()}.isdisjoint({type(p) for p in processors(pipe).values()})
    assert torch.equal(run(pipe, **call), expected)
    dit_accel.restore(pipe)
    assert not torch.equal(run(dit_accel.accelerate(other, CLEAR(2.0)), **call), original)
    assert torch.equal(run(pipe, **call), original)


def test_a_whole_pipeline_can_be_copied(pipe: Any) -> None:
    expected = run(accelerated(pipe, Fovea(0.2), dense_steps=1))
    other = copy.deepcopy(pipe)
    dit_accel.restore(pipe)
    assert torch.equal(run(other), expected)
    assert torch.equal(run(dit_accel.restore(other)), run(pipe))


def test_the_copy_of_an_original_is_no_patch(pipe: Any) -> None:
    original, other = run(pipe), copy.deepcopy(pipe)
    run(accelerated(other, Fovea(0.2)))
    assert torch.equal(run(pipe), original)


# torch.compile


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = pytest.mark.parametrize("spec", [Fovea(0.2), CLEAR(4.0)], ids=["fovea", "clear"])


@pytest.mark.composes("torch.compile of the transformer")
@COMPILED
@pytest.mark.parametrize("way", ["fullgraph-aot_eager", "breaks-eager"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_compiling_the_transformer(spec: AttentionSpec, way: str) -> None:
    transformer, arguments = accelerated(tiny_transformer(double=1, single=1), spec), forward_arguments()
    expected = accelerated(tiny_transformer(double=1, single=1), spec)(**arguments).sample
    fullgraph, backend = way.startswith("fullgraph"), way.split("-")[1]
    with torch.no_grad():
        if fullgraph:
            transformer(**arguments)  # the grid is read outside of the graph
        compiled = torch.compile(transformer, backend=backend, fullgraph=fullgraph)
        got = [compiled(**arguments, return_dict=False)[0] for _ in range(2)]
    assert [relative_error(x, expected) < 1e-5 for x in got] == [True, True]


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_transformer_follows_the_size() -> None:
    sizes = [(6, 20), (20, 6), (7, 20)]  # the first two have as many tokens
    eager = accelerated(tiny_transformer(double=1, single=0), Fovea(0.2))
    expected = [eager(**forward_arguments(*size)).sample for size in sizes]
    compiled = torch.compile(accelerated(tiny_transformer(double=1, single=0), Fovea(0.2)), backend="eager")
    with torch.no_grad():
        got = [compiled(**forward_arguments(*size), return_dict=False)[0] for size in sizes]
    assert [relative_error(*pair) < 1e-5 for pair in zip(got, expected, strict=True)] == [True] * 3


@pytest.mark.parametrize("region", ["repeated-blocks", "in-place", "component"])
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_pipeline_runs_its_steps(pipe: Any, region: str) -> None:
    before, original, expected = processors(pipe), run(pipe), run(accelerated(tiny_pipe(), Fovea(0.2), dense_steps=1), steps=3)
    accelerated(pipe, Fovea(0.2), dense_steps=1)
    if region == "repeated-blocks":
        pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    elif region == "in-place":
        pipe.transformer.compile(backend="eager")
    else:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    assert relative_error(run(pipe, steps=3), expected) < 1e-5
    assert relative_error(run(pipe, steps=3), expected) < 1e-5
    with dit_accel.dense(pipe):
        assert relative_error(run(pipe), original) < 1e-5
    assert relative_error(run(pipe, steps=3), expected) < 1e-5
    dit_accel.restore(pipe)
    assert same_objects(pipe, before)
    assert relative_error(run(pipe), original) < 1e-5
