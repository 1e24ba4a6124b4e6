"""What training and sharing ask of every family: its projections are found, its pipeline is recorded, its adapters load again."""

from pathlib import Path

import pytest
import torch
import torch.nn as nn
from test_families import SPARSE, Tiny, every_family

import dit_accel
from dit_accel.patch.anatomy import attention_layers, projection_names


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


@every_family
def test_an_adapter_loads_again(name: str, tiny: Tiny, tmp_path: Path) -> None:
    spec = SPARSE["sla"]
    dit_accel.accelerate(tiny.pipe, spec)
    with torch.no_grad():
        for transformer in tiny.transformers:
            for part, parameter in transformer.named_parameters():
                if ".dit_accel." in part:
                    parameter.add_(0.05)
    wanted = tiny.run()
    other = Tiny(name)
    for number, (transformer, fresh) in enumerate(zip(tiny.transformers, other.transformers, strict=True)):
        dit_accel.save_adapter(transformer, tmp_path / str(number))
        dit_accel.load_adapter(fresh, tmp_path / str(number))
    assert torch.equal(other.run(), wanted)
