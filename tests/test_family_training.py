"""What training and sharing ask of every family: its projections are found, its pipeline is recorded, its adapters load again."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from test_families import NAMES, SPARSE, Tiny, every_family

import dit_accel
from dit_accel import pipelines
from dit_accel.errors import UnsupportedModelError
from dit_accel.patch.anatomy import attention_layers, projection_names
from dit_accel.pipelines import FAMILIES, family_of


@pytest.fixture
def tiny(name: str) -> Tiny:
    return Tiny(name)


@every_family
def test_every_linear_layer_of_the_attention_is_a_projection(tiny: Tiny) -> None:
    for transformer in tiny.transformers:
        layers = attention_layers(transformer)
        found = set(projection_names(transformer, layers))
        linear = {f"{layer}.{name}" for layer, m in layers.items() for name, part in m.named_modules() if isinstance(part, nn.Linear)}
        assert linear - found == set()


def test_every_layer_has_projections_and_every_declared_one_is_found() -> None:
    found: dict[str, set[str]] = {family.name: set() for family in FAMILIES}
    for transformer in (transformer for name in NAMES for transformer in Tiny(name).transformers):
        family: Any = family_of(transformer)
        for layer in attention_layers(transformer):
            names = projection_names(transformer, [layer])  # raises where there are none
            found[family.name] |= {name.removeprefix(f"{layer}.") for name in names}
    assert found == {family.name: set(family.projections) for family in FAMILIES}


def declare(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let FLUX's family be declared otherwise, as a user's may be."""
    changed = [dataclasses.replace(family, **changes) if family.name == "flux" else family for family in FAMILIES]
    monkeypatch.setattr(pipelines, "FAMILIES", changed)


@pytest.mark.parametrize("train", ["lora", "attention"])
def test_a_layer_without_declared_projections_is_not_trained(train: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    declare(monkeypatch, projections=("query", "key"))
    pipe = dit_accel.accelerate(Tiny("flux").pipe, SPARSE["fovea"])
    config = dit_accel.DistillConfig(steps=1, train=train, output_dir=str(tmp_path / "run"))  # type: ignore[arg-type]
    message = (
        r"transformer_blocks\.0\.attn \(FluxAttention\) has no projection to train: family 'flux' declares query, key, its linear layers "
        r"are to_q, to_k, .*\. Name them in Family\(projections=\.\.\.\)"
    )
    with pytest.raises(UnsupportedModelError, match=message):
        dit_accel.distill(pipe, ["a", "b"], config)
    assert not (tmp_path / "run").exists()


def test_a_family_whose_heads_are_elsewhere_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    declare(monkeypatch, heads=lambda module: (module.n_heads, module.width))
    with pytest.raises(UnsupportedModelError, match=r"family 'flux' looks for them \(.*n_heads.*\): say where in Family\(heads=\.\.\.\)"):
        dit_accel.accelerate(Tiny("flux").pipe, SPARSE["fovea"])


@every_family
def test_an_adapter_loads_again(name: str, tiny: Tiny, tmp_path: Path) -> None:
    spec = SPARSE["sla"]
    dit_accel.accelerate(tiny.pipe, spec)
    with torch.no_grad():
        for transformer in tiny.transformers:
            for part, parameter in transformer.named_parameters():
                if ".dit_accel." in part:
                    parameter.add_(0.05)
    expected = tiny.run()
    other = Tiny(name)
    for number, (transformer, fresh) in enumerate(zip(tiny.transformers, other.transformers, strict=True)):
        dit_accel.save_adapter(transformer, tmp_path / str(number))
        dit_accel.load_adapter(fresh, tmp_path / str(number))
    assert torch.equal(other.run(), expected)
