"""What others see of an accelerated model: flags, state dicts, wrappers, copies, memory."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import fill_randomly, forward_arguments, tiny_transformer
from distill_fixtures import add_lora, draw, prompt_pipe, same, state
from peft import LoraConfig, get_peft_model
from test_families import SPARSE, Tiny
from test_offloaded_weights import TRAINED, train

from dit_accel import SLA, AttentionSpec, Fovea, accelerate, dense, load_adapter, restore, save_adapter, summary
from dit_accel.adapters.base_model import public_name
from dit_accel.adapters.folder import CONFIG
from dit_accel.adapters.model_card import CARD
from dit_accel.errors import AdapterError, DitAccelError, UnsupportedModelError
from dit_accel.patch.state import operators_of

SPECS: dict[str, AttentionSpec] = {"fovea": Fovea(0.2), "sla": SLA(0.2)}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(transformer: Any) -> torch.Tensor:
    with torch.no_grad():
        output: torch.Tensor = transformer(**forward_arguments()).sample
    return output


# Flags


@specs
@pytest.mark.parametrize("lora", [True, False], ids=["lora", "plain"])
def test_a_frozen_model_stays_frozen(spec: AttentionSpec, lora: bool) -> None:
    transformer = tiny_transformer().requires_grad_(False)
    if lora:
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    before = [name for name, p in transformer.named_parameters() if p.requires_grad]
    accelerate(transformer, spec)
    assert [name for name, p in transformer.named_parameters() if p.requires_grad] == before
    assert bool(before) == lora


@specs
def test_a_model_that_learns_learns_ours(spec: AttentionSpec) -> None:
    transformer = tiny_transformer()
    transformer.single_transformer_blocks.requires_grad_(False)
    accelerate(transformer, spec)
    ours = {name: p.requires_grad for name, p in transformer.named_parameters() if ".dit_accel." in name}
    assert ours == {name: not name.startswith("single") for name in ours}


# State dicts


@pytest.mark.parametrize("what", TRAINED)
def test_the_originals_state_dict_loads_into_the_live_model(what: str) -> None:
    transformer, plain = tiny_transformer(), tiny_transformer(seed=1).state_dict()
    train(accelerate(transformer, SLA(0.2)), what)
    ours = {name: value for name, value in state(transformer).items() if ".dit_accel." in name}
    transformer.load_state_dict(plain)
    after = state(transformer)
    assert same({name: after[name] for name in ours}, ours)
    assert same({n.replace(".base_layer.", "."): v for n, v in after.items() if n not in ours}, plain)


def test_a_state_dict_that_lacks_more_is_refused() -> None:
    transformer, plain = accelerate(tiny_transformer(), SLA(0.2)), tiny_transformer().state_dict()
    del plain["proj_out.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"proj_out\.bias\""):
        transformer.load_state_dict(plain)


@pytest.mark.parametrize("what", TRAINED)
def test_a_state_dict_made_in_dense_loads_into_a_plain_model(what: str) -> None:
    transformer = tiny_transformer()
    original = state(transformer)
    train(accelerate(transformer, SLA(0.2)), what)
    live = state(transformer)
    assert [name for name in live if ".dit_accel." in name], "checkpoints of the live model hold what it learns"
    with dense(transformer):
        inside = transformer.state_dict()
        assert list(inside) == list(original)
        assert same(inside, original)
        (plain := tiny_transformer(seed=1)).load_state_dict(inside)
        folder = transformer.state_dict(prefix="model.")
        assert list(folder) == [f"model.{name}" for name in original]
    assert same(state(plain), original)
    assert same(state(transformer), live)
    transformer.load_state_dict(live)


def test_an_average_of_the_originals_weights_is_saved(tmp_path: Path) -> None:
    from diffusers.training_utils import EMAModel

    transformer = accelerate(tiny_transformer(), SLA(0.2))
    weights = [p for name, p in transformer.named_parameters() if ".dit_accel." not in name]
    average = EMAModel(weights, model_cls=type(transformer), model_config=transformer.config)
    average.save_pretrained(str(tmp_path))
    assert same(state(type(transformer).from_pretrained(tmp_path)), state(tiny_transformer()))


# Wrappers


def test_what_peft_wraps_is_found() -> None:
    wrapped = get_peft_model(tiny_transformer(), LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    original = run(wrapped)
    assert accelerate(wrapped, Fovea(0.1)) is wrapped
    assert not torch.equal(run(wrapped), original)
    assert len(summary(wrapped, show=False)) == 4
    assert torch.equal(run(restore(wrapped)), original)


def test_ddp_is_looked_into_but_accelerated_before(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(accelerate(tiny_transformer(), Fovea(0.1)))
        assert len(summary(wrapped, show=False)) == 4
        restore(wrapped)
        with pytest.raises(UnsupportedModelError, match="wrapped in DistributedDataParallel: accelerate the transformer itself first"):
            accelerate(wrapped)
    finally:
        torch.distributed.destroy_process_group()


def test_another_wrapper_is_named() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = tiny_transformer(double=1, single=0)

    with pytest.raises(UnsupportedModelError, match=r"FluxTransformer2DModel is wrapped in Wrapper.*pass the transformer itself"):
        accelerate(Wrapper())


# One transformer in two places


def test_one_transformer_in_two_places_is_one(tmp_path: Path) -> None:
    tiny = Tiny("wan22_two_experts")
    tiny.pipe.register_modules(transformer_2=tiny.pipe.transformer)
    original = tiny.run()
    accelerate(tiny.pipe, SPARSE["fovea"], strict=True)
    sparse = tiny.run()
    assert not torch.equal(sparse, original)
    with dense(tiny.pipe):
        assert torch.equal(tiny.run(), original)
    assert len(summary(tiny.pipe, show=False)) == len(operators_of(tiny.pipe))
    save_adapter(tiny.pipe, tmp_path)
    restore(tiny.pipe)
    assert torch.equal(tiny.run(), original)
    load_adapter(tiny.pipe, tmp_path, strict=True)
    assert torch.equal(tiny.run(), sparse)


# Memory


@specs
def test_a_deleted_model_is_gone_at_once(spec: AttentionSpec) -> None:
    gc.collect()
    gc.disable()
    try:
        transformer = accelerate(tiny_transformer(), spec)
        run(transformer)
        with dense(transformer):
            run(transformer)
        left = weakref.ref(transformer)
        del transformer
        assert left() is None
    finally:
        gc.enable()


# LoRA that went away


def lora_pipe() -> Any:
    train(accelerate(pipe := prompt_pipe(), SLA(0.3, block=(16, 16))).transformer, "lora")
    return pipe


@pytest.mark.parametrize("way", ["unload_lora_weights", "delete_adapters"])
def test_an_adapter_without_its_lora_is_not_saved(way: str, tmp_path: Path) -> None:
    pipe = lora_pipe()
    pipe.unload_lora_weights() if way == "unload_lora_weights" else pipe.transformer.delete_adapters("dit_accel")
    with pytest.raises(AdapterError, match=r"'dit_accel' that belongs to the adapter was removed.*load the adapter again"):
        save_adapter(pipe, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    assert torch.equal(draw(restore(pipe)), draw(prompt_pipe()))


@pytest.mark.parametrize("what", ["lora", "attention"])
def test_a_lora_that_was_fused_and_unloaded_is_in_the_original_for_good(what: str, tmp_path: Path) -> None:
    train(accelerate(pipe := prompt_pipe(), SLA(0.3, block=(16, 16))).transformer, what)
    add_lora(pipe)
    pipe.transformer.set_adapters(["style", "dit_accel"] if what == "lora" else ["style"])
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    weights = state(pipe.transformer)
    for verb in (restore, lambda p: dense(p).__enter__(), lambda p: save_adapter(p, tmp_path), lambda p: p.save_pretrained(tmp_path)):
        with pytest.raises(DitAccelError, match="was removed" if verb is save_adapter else "unloaded|was removed"):
            verb(pipe)
    assert same(state(pipe.transformer), weights)


@pytest.mark.parametrize("first", [True, False], ids=["fused-before", "fused-after"])
def test_a_lora_in_trained_weights_is_taken_out_before_they_are_exchanged(first: bool) -> None:
    pipe = prompt_pipe()
    add_lora(pipe)
    if first:
        pipe.transformer.fuse_lora()
    original = draw(pipe)
    train(accelerate(pipe, SLA(0.3, block=(16, 16))).transformer, "attention")
    pipe.transformer.unfuse_lora() if first else pipe.transformer.fuse_lora()
    weights = state(pipe.transformer)
    with pytest.raises(DitAccelError, match=r"'style'.*call fuse_lora\(\)" if first else r"'style'.*call unfuse_lora\(\)"):
        restore(pipe)
    assert same(state(pipe.transformer), weights)
    pipe.transformer.fuse_lora() if first else pipe.transformer.unfuse_lora()
    assert torch.equal(draw(restore(pipe)), original)


def test_restoring_within_dense_gives_the_original() -> None:
    transformer, weights = tiny_transformer(), state(tiny_transformer())
    train(accelerate(transformer, SLA(0.2)), "all")
    with dense(transformer):
        restore(transformer)
        assert same(state(transformer), weights)
    assert same(state(transformer), weights)


# Names


def test_a_local_folder_is_named_by_its_last_part(tmp_path: Path) -> None:
    folder = tmp_path / "home" / "FLUX.1-mine"
    prompt_pipe().transformer.save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    for target, name in ((prompt_pipe(), str(folder)), (tiny_transformer(), str(folder / "transformer"))):
        target.register_to_config(_name_or_path=name)
        saved = save_adapter(accelerate(target, Fovea(0.2)), tmp_path / "adapter")
        assert json.loads((saved / CONFIG).read_text())["base_model_name"] == "FLUX.1-mine"
        assert str(tmp_path) not in "".join(path.read_text() for path in (saved / CONFIG, saved / CARD))
        assert "license: mit" in (saved / CARD).read_text()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/name", "owner/name"),
        ("", ""),
        ("/home/me/models/FLUX", "FLUX"),
        ("./FLUX/", "FLUX"),
        ("models/of/mine", "mine"),
        ("C:\\models\\FLUX", "FLUX"),
    ],
)
def test_what_is_told_of_a_name(name: str, shown: str) -> None:
    assert public_name(name) == shown


def test_what_has_parameters_learns_them_after_all() -> None:
    """Distillation opens what was frozen with its layer."""
    from dit_accel.finetune.config import DistillConfig
    from dit_accel.finetune.trainables import set_trainable

    transformer = accelerate(tiny_transformer().requires_grad_(False), SLA(0.2))
    fill_randomly(transformer, 3)
    opened = set_trainable(transformer, transformer._dit_accel, DistillConfig(train="parameters"))
    assert opened
    assert all(".dit_accel." in name for name in opened)
