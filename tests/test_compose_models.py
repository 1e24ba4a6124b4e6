"""What diffusers and its companions do to a model, with acceleration, on an image model of each kind and a video model."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly, relative_error
from distill_fixtures import CALL, PROMPTS, prompt_pipe, same, state
from test_families import SPARSE, WHOLE, Tiny

import dit_accel
from dit_accel import DistillConfig, Fovea
from dit_accel.errors import FallbackError
from dit_accel.patch.state import operators_of

MODELS = ("flux", "sd3", "wan", "cogvideox")
models = pytest.mark.parametrize("name", MODELS)
WHOLE_FOVEA, SPARSE_FOVEA = WHOLE["fovea"], SPARSE["fovea"]


@pytest.fixture
def tiny(name: str) -> Tiny:
    return Tiny(name)


def learned(tiny: Tiny) -> None:
    """The operators' parameters away from their start values: whatever loses them changes the output."""
    for operator in operators_of(tiny.pipe).values():
        fill_randomly(operator, seed=1, scale=0.3)


# What changes weights


@models
@pytest.mark.composes("torchao int8 weights")
def test_int8_weights(tiny: Tiny) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    exact = tiny.run()
    quantize_(tiny.pipe.transformer, Int8WeightOnlyConfig())
    expected = tiny.run()
    assert relative_error(expected, exact) > 1e-5, "nothing was quantised"
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=True)
    assert relative_error(tiny.run(), expected) < 1e-5
    dit_accel.restore(tiny.pipe)
    assert torch.equal(tiny.run(), expected)


@models
@pytest.mark.composes("torchao int8 weights")
def test_int8_weights_after_accelerating_leave_the_operators_alone(tiny: Tiny) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    dit_accel.accelerate(tiny.pipe, SPARSE["sla"], strict=True)
    learned(tiny)
    quantize_(tiny.pipe.transformer, Int8WeightOnlyConfig())
    parameters = [p for operator in operators_of(tiny.pipe).values() for p in operator.parameters()]
    assert {type(p) for p in parameters} == {torch.nn.Parameter}
    sparse = tiny.run()
    twin = Tiny(tiny.name)
    dit_accel.accelerate(twin.pipe, SPARSE["sla"], strict=True)
    learned(twin)
    assert 0 < relative_error(sparse, twin.run()) < 0.1


@models
@pytest.mark.composes("layerwise casting to float8")
def test_layerwise_casting(tiny: Tiny) -> None:
    exact = tiny.run()
    settings = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    tiny.pipe.transformer.enable_layerwise_casting(**settings)
    expected = tiny.run()
    assert relative_error(expected, exact) > 1e-5, "nothing was cast"
    twin = Tiny(tiny.name)
    dit_accel.accelerate(twin.pipe, WHOLE_FOVEA, strict=True)
    learned(twin)
    before = {name: p.clone() for name, p in twin.pipe.transformer.named_parameters() if ".dit_accel." in name}
    twin.pipe.transformer.enable_layerwise_casting(**settings)
    assert relative_error(twin.run(), expected) < 1e-5
    after = dict(twin.pipe.transformer.named_parameters())
    assert [name for name in before if not torch.equal(after[name], before[name])] == []


# SD3.5's second attention of a block fails when it is fused, with or without us
@pytest.mark.parametrize("name", [name for name in MODELS if name != "sd3"])
@pytest.mark.composes("fuse_qkv_projections, before and after")
@pytest.mark.parametrize("first", ["fuse", "accelerate"])
def test_fused_projections(tiny: Tiny, first: str, sparse_calls: list[Any]) -> None:
    transformer = tiny.pipe.transformer
    before = {n: m.processor for n, m in transformer.named_modules() if hasattr(m, "processor")}
    expected = tiny.run()
    if first == "fuse":
        transformer.fuse_qkv_projections()
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=True)
    if first == "accelerate":
        transformer.fuse_qkv_projections()
    assert relative_error(tiny.run(), expected) < 1e-5
    fused = len(sparse_calls)
    assert fused > 0
    transformer.unfuse_qkv_projections()
    assert relative_error(tiny.run(), expected) < 1e-5
    assert len(sparse_calls) == 2 * fused
    dit_accel.restore(tiny.pipe)
    after = {n: m.processor for n, m in transformer.named_modules() if hasattr(m, "processor")}
    assert [n for n in before if after[n] is not before[n]] == []
    assert torch.equal(tiny.run(), expected)


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
@pytest.mark.composes("LoRA through the pipeline: load, fuse, unfuse, unload")
def test_a_lora_file(tiny: Tiny, tmp_path: Path) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    maker, expected = Tiny(tiny.name), tiny.run()
    maker.pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    fill_randomly(maker.pipe.transformer, seed=5, scale=0.2)
    lora = get_peft_model_state_dict(maker.pipe.transformer)
    type(tiny.pipe).save_lora_weights(tmp_path, transformer_lora_layers=lora)
    tiny.pipe.load_lora_weights(tmp_path)
    with_lora = tiny.run()
    assert relative_error(with_lora, expected) > 1e-4
    tiny.pipe.unload_lora_weights()
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=True)
    tiny.pipe.load_lora_weights(tmp_path)
    assert relative_error(tiny.run(), with_lora) < 1e-5
    tiny.pipe.fuse_lora()
    assert relative_error(tiny.run(), with_lora) < 1e-4
    tiny.pipe.unfuse_lora()
    tiny.pipe.unload_lora_weights()
    assert relative_error(tiny.run(), expected) < 1e-4


# What skips work


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.composes("MagCache")
def test_magcache_skips_the_same_calls(tiny: Tiny, sparse_calls: list[Any]) -> None:
    from diffusers import MagCacheConfig

    steps = 6
    settings = {"threshold": 1.0, "max_skip_steps": 2, "retention_ratio": 0.2, "num_inference_steps": steps, "mag_ratios": [1.0] * steps}
    tiny.pipe.transformer.enable_cache(MagCacheConfig(**settings))
    expected = tiny.run(num_inference_steps=steps)
    tiny.pipe.transformer.disable_cache()
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=True)
    tiny.run(num_inference_steps=steps)
    every = len(sparse_calls)
    tiny.pipe.transformer.enable_cache(MagCacheConfig(**settings))
    assert relative_error(tiny.run(num_inference_steps=steps), expected) < 1e-4
    assert 0 < len(sparse_calls) - every < every


@pytest.mark.parametrize("name", ["flux", "wan"])
@pytest.mark.composes("cache-dit")
def test_cache_dit_skips_the_same_calls(tiny: Tiny, sparse_calls: list[Any]) -> None:
    import cache_dit

    def cached(pipe: Any) -> None:
        cache_dit.enable_cache(
            pipe,
            cache_config=cache_dit.DBCacheConfig(
                Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=2, residual_diff_threshold=10.0
            ),
        )

    plain = Tiny(tiny.name)
    cached(plain.pipe)
    expected = plain.run(num_inference_steps=6)
    dit_accel.accelerate(tiny.pipe, WHOLE_FOVEA, strict=True)
    tiny.run(num_inference_steps=6)
    every = len(sparse_calls)
    cached(tiny.pipe)
    assert relative_error(tiny.run(num_inference_steps=6), expected) < 1e-4
    assert 0 < len(sparse_calls) - every < every
    cache_dit.disable_cache(tiny.pipe)


# What moves and splits


@models
@pytest.mark.composes("group offload, by blocks and by leaves")
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload(tiny: Tiny, kind: str) -> None:
    dit_accel.accelerate(tiny.pipe, SPARSE_FOVEA, strict=True)
    learned(tiny)
    expected = tiny.run()
    settings = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    tiny.pipe.transformer.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_type=kind, **settings)
    assert torch.equal(tiny.run(), expected)


@models
@pytest.mark.composes("offload of the whole model (accelerate's hooks)")
def test_model_offload(tiny: Tiny) -> None:
    from accelerate import cpu_offload_with_hook

    dit_accel.accelerate(tiny.pipe, SPARSE_FOVEA, strict=True)
    learned(tiny)
    expected = tiny.run()
    _, hook = cpu_offload_with_hook(tiny.pipe.transformer, torch.device("cpu"))
    assert torch.equal(tiny.run(), expected)
    hook.offload()
    assert torch.equal(tiny.run(), expected)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_parallelism_of_another_kind_runs_the_original(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.patch import processor

    expected = tiny.run()
    original = processor.dispatch_attention_fn
    monkeypatch.setattr(processor, "dispatch_attention_fn", lambda *args, parallel_config, **kwargs: original(*args, **kwargs))

    def parallel() -> None:
        for module in tiny.pipe.transformer.modules():
            if hasattr(module, "dit_accel"):
                module.processor._parallel_config = object()  # as a library with a parallelism of its own does

    dit_accel.accelerate(tiny.pipe, SPARSE_FOVEA)
    parallel()
    with pytest.warns(UserWarning, match="original attention for calls with parallelism of another kind") as warned:
        assert relative_error(tiny.run(), expected) < 1e-5
    assert len([w for w in warned if "parallelism of another kind" in str(w.message)]) == 1
    dit_accel.restore(tiny.pipe)
    dit_accel.accelerate(tiny.pipe, SPARSE_FOVEA, strict=True)
    parallel()
    with pytest.raises(FallbackError, match="parallelism of another kind"):
        tiny.run()


@pytest.mark.parametrize("name", ["flux", "wan", "qwen_image"])
@pytest.mark.composes("compile_repeated_blocks(fullgraph=True)")
def test_compiled_blocks(tiny: Tiny) -> None:
    torch._dynamo.reset()
    dit_accel.accelerate(tiny.pipe, SPARSE_FOVEA, strict=True)
    expected = tiny.run()
    tiny.pipe.transformer.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    assert relative_error(tiny.run(), expected) < 1e-5
    torch._dynamo.reset()


# What saves


@models
@pytest.mark.composes("save_pretrained: the original model")
def test_a_saved_pipeline_is_the_original(tiny: Tiny, tmp_path: Path) -> None:
    transformer, expected = tiny.pipe.transformer, tiny.run()
    original = copy.deepcopy(transformer.state_dict())
    dit_accel.accelerate(tiny.pipe, SPARSE["sla"], strict=True)
    learned(tiny)
    sparse = tiny.run()
    tiny.pipe.save_pretrained(tmp_path / "pipe")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = type(transformer).from_pretrained(tmp_path / "pipe" / "transformer")
    assert same(state(again), original)
    assert torch.equal(tiny.run(), sparse)
    dit_accel.restore(tiny.pipe)
    transformer.save_pretrained(tmp_path / "plain")
    assert same(state(type(transformer).from_pretrained(tmp_path / "plain")), original)
    assert torch.equal(tiny.run(), expected)


@pytest.mark.parametrize("train", ["lora", "attention"])
@pytest.mark.composes("save_pretrained after distillation: the original model")
def test_a_saved_distilled_pipeline_is_the_original(train: Any, tmp_path: Path) -> None:
    pipe = prompt_pipe()
    original = copy.deepcopy(pipe.transformer.state_dict())
    dit_accel.accelerate(pipe, Fovea(0.2))
    dit_accel.distill(pipe, PROMPTS, DistillConfig(steps=2, train=train, output_dir=str(tmp_path / "run")), progress=False, **CALL)
    with_training = copy.deepcopy(pipe.transformer.state_dict())
    pipe.transformer.save_pretrained(tmp_path / "saved")
    assert same(state(type(pipe.transformer).from_pretrained(tmp_path / "saved")), original)
    after = pipe.transformer.state_dict()
    assert [name for name in with_training if not torch.equal(after[name], with_training[name])] == []


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    tiny = Tiny("flux")
    dit_accel.accelerate(tiny.pipe, SPARSE["sla"])
    other = copy.deepcopy(tiny.pipe.transformer)
    fill_randomly(other, seed=9, scale=0.1)
    other.save_pretrained(tmp_path)
    saved = type(other).from_pretrained(tmp_path)
    assert same(state(saved), {name: value for name, value in other.state_dict().items() if ".dit_accel." not in name})
