"""What was trained, with every kind of offloading: the original comes back to the bit, what is saved is what was trained."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from conftest import fill_randomly, forward_arguments, normal, tiny_transformer
from distill_fixtures import CALL, PROMPTS, prompt_pipe, same, state
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from dit_accel import SLA, accelerate, dense, load_adapter, restore, save_adapter
from dit_accel.adapters.importers import plain_parameters
from dit_accel.errors import AdapterError, DistillationError, DitAccelError
from dit_accel.finetune.data.collect import collect
from dit_accel.finetune.distill import distill
from dit_accel.patch.anatomy import projection_names
from dit_accel.patch.holders import Holders
from dit_accel.patch.lora import ADAPTER
from dit_accel.patch.state import operators_of
from dit_accel.patch.weights import replace_weights, teacher_hash, weights_hash

CPU = torch.device("cpu")
SPEC = SLA(0.3, block=(16, 16))
TRAINED = ("parameters", "lora", "attention", "all")


def small() -> Any:
    return tiny_transformer(double=1, single=1)


def run(transformer: Any) -> Tensor:
    with torch.no_grad():
        # of a batch of two: torch's product of a matrix and one row rounds otherwise on some CPUs where the matrix lies otherwise in memory
        output: Tensor = transformer(**forward_arguments(5, 6, batch=2)).sample
    assert bool(output.isfinite().all())
    return output


def train(transformer: Any, what: str) -> None:
    """As a distillation leaves an accelerated transformer, with random numbers for what it learns."""
    patch = transformer._dit_accel
    for operator in operators_of(transformer).values():
        fill_randomly(operator, seed=1, scale=0.3)
    names = projection_names(transformer, patch.originals)
    if what == "lora":
        transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=names, init_lora_weights=False), adapter_name=ADAPTER)
        patch.lora = True
    elif what != "parameters":
        plain = plain_parameters(transformer)
        chosen = [name for name in plain if what == "all" or name.rpartition(".")[0] in names]
        replace_weights(transformer, patch, {n: plain[n].detach() + 0.1 * normal(*plain[n].shape, seed=i) for i, n in enumerate(chosen)})
    patch.context.trained = what != "parameters"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter by what was trained."""
    made = {}
    for what in TRAINED:
        torch.manual_seed(0)
        train(transformer := accelerate(small(), SPEC), what)
        made[what] = save_adapter(transformer, tmp_path_factory.mktemp(what))
    return made


def group(kind: str, to_disk: bool = False) -> Callable[[Any, Path], None]:
    def offload(transformer: Any, folder: Path) -> None:
        path = {"offload_to_disk_path": str(folder / "groups")} if to_disk else {}
        transformer.enable_group_offload(CPU, CPU, offload_type=kind, num_blocks_per_group=1, **path)

    return offload


def by_accelerate(way: str, **settings: Any) -> Callable[[Any, Path], None]:
    def offload(transformer: Any, folder: Path) -> None:
        import accelerate

        place = {"offload_dir": str(folder / "offloaded")} if way == "disk_offload" else {}
        getattr(accelerate, way)(transformer, execution_device=CPU, **place, **settings)

    return offload


OFFLOADS: dict[str, Callable[[Any, Path], None]] = {
    "none": lambda transformer, folder: None,
    "model": by_accelerate("cpu_offload_with_hook"),
    "sequential": by_accelerate("cpu_offload"),
    "sequential-whole-blocks": by_accelerate("cpu_offload", preload_module_classes=["FluxTransformerBlock"]),
    "disk": by_accelerate("disk_offload"),
    "blocks": group("block_level"),
    "leaves": group("leaf_level"),
    "blocks-to-disk": group("block_level", to_disk=True),
    "leaves-to-disk": group("leaf_level", to_disk=True),
}


def files(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {path.name: load_file(path) for path in folder.glob("*.safetensors")}


@pytest.mark.composes("offloading of all kinds, after loading an adapter of each kind")
@pytest.mark.parametrize("what", TRAINED)
@pytest.mark.parametrize("way", OFFLOADS)
def test_the_original_and_what_was_trained(adapters: dict[str, Path], way: str, what: str, tmp_path: Path) -> None:
    transformer = small()
    weights, original, teacher = state(transformer), run(transformer), teacher_hash(transformer)
    trained = run(load_adapter(transformer, adapters[what]))
    every = weights_hash(transformer)
    assert not torch.equal(trained, original)
    OFFLOADS[way](transformer, tmp_path)
    for used in (False, True):  # right after offloading, and after a forward
        with dense(transformer):
            assert torch.equal(run(transformer), original)
        assert torch.equal(run(transformer), trained), used
    assert (teacher_hash(transformer), weights_hash(transformer)) == (teacher, every)
    for inside in (False, True):
        if inside:
            with dense(transformer):
                folder = save_adapter(transformer, tmp_path / "inside")
        else:
            folder = save_adapter(transformer, tmp_path / "outside")
        ours, theirs = files(folder), files(adapters[what])
        assert list(ours) == list(theirs)
        assert all(same(ours[name], theirs[name]) for name in ours)
    transformer.save_pretrained(tmp_path / "saved")
    assert same(state(type(transformer).from_pretrained(tmp_path / "saved")), weights)
    if (way, what) == ("sequential-whole-blocks", "lora"):
        with pytest.raises(DitAccelError, match="remove_hook_from_submodules"):
            restore(transformer)
        assert torch.equal(run(transformer), trained)
        remove_hook_from_submodules(transformer)
    assert torch.equal(run(restore(transformer)), original)
    assert torch.equal(run(transformer), original)


@pytest.mark.parametrize("way", ["sequential", "leaves-to-disk"])
def test_samples_are_the_originals(adapters: dict[str, Path], way: str, tmp_path: Path) -> None:
    pipe, plain = prompt_pipe(), prompt_pipe()
    train(accelerate(pipe, SPEC).transformer, "attention")
    for p, name in ((pipe, "weights"), (plain, "plain weights")):  # both, because torch's products of one row depend on where a matrix lies
        (tmp_path / name).mkdir()
        OFFLOADS[way](p.transformer, tmp_path / name)
    samples = [collect(p, PROMPTS[:1], tmp_path / name, **CALL) for p, name in ((pipe, "ours"), (plain, "plain"))]
    assert torch.equal(samples[0][0].prediction, samples[1][0].prediction)
    assert samples[0].teacher == samples[1].teacher
    with pytest.raises(DistillationError, match="distil before offloading"):
        distill(pipe, samples[0], held_out=samples[1])


@pytest.mark.parametrize("what", ["lora", "attention"])
def test_an_adapter_is_loaded_before_offloading(adapters: dict[str, Path], what: str, tmp_path: Path) -> None:
    for way in ("sequential", "blocks", "leaves-to-disk"):
        OFFLOADS[way](transformer := small(), tmp_path)
        with pytest.raises(AdapterError, match="load the adapter before offloading"):
            load_adapter(transformer, adapters[what])
        assert not hasattr(transformer, "_dit_accel")
        assert torch.equal(run(transformer), run(small()))


# Quantised weights


def quantise(transformer: Any) -> Any:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(transformer, Int8WeightOnlyConfig())
    return transformer


@pytest.mark.parametrize("what", ["parameters", "lora"])
def test_weights_quantised_beside_an_adapter(adapters: dict[str, Path], what: str, tmp_path: Path) -> None:
    original = run(quantise(small()))
    transformer = quantise(load_adapter(small(), adapters[what]))
    trained = run(transformer)
    with dense(transformer):
        assert torch.equal(run(transformer), original)
    assert torch.equal(run(transformer), trained)
    if what == "lora":
        with pytest.raises(AdapterError, match="what was trained was quantised"):
            save_adapter(transformer, tmp_path / "again")
        assert not (tmp_path / "again").exists()
    else:
        again, first = files(save_adapter(transformer, tmp_path / "again")), files(adapters[what])
        assert all(same(again[name], first[name]) for name in first)
    assert torch.equal(run(restore(transformer)), original)


@pytest.mark.parametrize("what", ["attention", "all"])
def test_trained_weights_that_were_quantised_are_never_exchanged(adapters: dict[str, Path], what: str, tmp_path: Path) -> None:
    transformer = quantise(load_adapter(small(), adapters[what]))
    trained = run(transformer)

    def in_dense() -> None:
        with dense(transformer):
            pytest.fail("dense began")

    for verb in (in_dense, lambda: restore(transformer), lambda: transformer.save_pretrained(tmp_path / "saved")):
        with pytest.raises(DitAccelError, match=r"can't be exchanged, because it is a Int8Tensor.*before the model is quantised"):
            verb()
    with pytest.raises(AdapterError, match="what was trained was quantised"):
        save_adapter(transformer, tmp_path / "again")
    assert torch.equal(run(transformer), trained)


@pytest.mark.parametrize("what", ["attention", "all"])
def test_quantised_weights_take_no_trained_ones(adapters: dict[str, Path], what: str) -> None:
    transformer = quantise(small())
    original = run(transformer)
    with warnings.catch_warnings(), pytest.raises(DitAccelError, match="Int8Tensor"):
        load_adapter(transformer, adapters[what])
    assert not hasattr(transformer, "_dit_accel")
    assert torch.equal(run(transformer), original)


# What nobody is known to have


def test_a_value_that_is_not_there_is_not_made_up(adapters: dict[str, Path], tmp_path: Path) -> None:
    transformer = load_adapter(small(), adapters["attention"])
    transformer.single_transformer_blocks.to("meta")
    before = dict(transformer._dit_accel.weights)
    for verb in (restore, teacher_hash, weights_hash, lambda t: save_adapter(t, tmp_path / "a")):
        with pytest.raises(DitAccelError, match="offloaded in a way that is not supported"):
            verb(transformer)
    assert transformer._dit_accel.weights == before
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_file_that_can_not_be_written_changes_nothing(adapters: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    from dit_accel import files as writing

    transformer = load_adapter(small(), adapters["attention"])
    OFFLOADS["leaves-to-disk"](transformer, tmp_path)
    trained, calls, real = run(transformer), iter(range(100)), writing._save

    def full(*args: Any) -> None:
        if next(calls) == 3:
            raise OSError(28, "No space left on device")
        real(*args)

    monkeypatch.setattr(writing, "_save", full)
    with pytest.raises(DitAccelError, match="No space left"):
        restore(transformer)
    assert not list(tmp_path.rglob(".*"))
    assert torch.equal(run(transformer), trained)
    monkeypatch.undo()
    assert torch.equal(run(restore(transformer)), run(small()))


def test_the_copies_that_streams_load_from_are_exchanged() -> None:
    """A stand-in for a GPU's group offload with streams, which a CPU does not have."""
    transformer = small()
    group("leaf_level")(transformer, Path())
    linear, name = transformer.transformer_blocks[0].attn.to_q, "transformer_blocks.0.attn.to_q.weight"
    held = linear._diffusers_hook.get_hook("group_offloading").group
    held.cpu_param_dict, held.low_cpu_mem_usage = {linear.weight: linear.weight.data}, True
    new = torch.ones_like(linear.weight)
    before = Holders(transformer).exchange({name: new})
    assert torch.equal(before[name], small().get_parameter(name))
    assert torch.equal(held.cpu_param_dict[linear.weight], new)
    assert torch.equal(linear.weight, new)
