"""Adapters on disk of both formats: those of an assignment come back as they were, and the first format still loads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly
from distill_fixtures import SPARSE, draw, prompt_pipe, same, state, unchanged
from safetensors.torch import load_file
from test_adapter import Tensors, copied, edit_config

from dit_accel import CLEAR, Assignment, Fovea, Rule, accelerate, load_adapter, save_adapter
from dit_accel.adapters.folder import CONFIG, LORA, WEIGHTS
from dit_accel.adapters.model_card import CARD
from dit_accel.errors import AdapterError
from dit_accel.patch.state import operators_of


def test_an_assignment_comes_back(tmp_path: Path) -> None:
    """Layers, heads and steps with specs of their own, and what each learned."""
    rules = (Rule(CLEAR(2.0, downsample=2)), Rule(Fovea(0.3), heads=(1,), steps=(1, None)), Rule(None, layers="transformer_blocks.*"))
    assignment = Assignment((*rules, Rule(Fovea(0.5), layers="transformer_blocks.*", noise=(0.0, 0.9))))
    pipe = accelerate(prompt_pipe(), assignment, dense_steps=1)
    for seed, operator in enumerate(operators_of(pipe).values()):
        fill_randomly(operator, seed, scale=0.3)
    folder = save_adapter(pipe, tmp_path / "adapter")
    loaded = load_adapter(prompt_pipe(), folder)
    assert loaded.transformer._dit_accel.context.assignment == Assignment.of(assignment, dense_steps=1)
    assert same(state(loaded.transformer), state(pipe.transformer))
    assert torch.equal(draw(loaded), draw(pipe))
    names = {name.rpartition("attn.")[2] for name in load_file(folder / WEIGHTS)}
    assert names == {"format", "spatial_weight", "offset"}
    card = (folder / CARD).read_text(encoding="utf-8")
    assert "# 3 methods by layer, head, step or size" in card
    assert all(f"- `{rule}`" in card for rule in loaded.transformer._dit_accel.context.assignment.rules)


def test_layers_that_the_assignment_leaves_alone_need_not_be_named(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), Assignment((Rule(Fovea(0.3)), Rule(None, layers="single_*"))))
    loaded = load_adapter(prompt_pipe(), save_adapter(pipe, tmp_path))
    assert list(operators_of(loaded)) == list(operators_of(pipe)) == ["transformer_blocks.0.attn"]
    assert torch.equal(draw(loaded), draw(pipe))


# The first format, as adapters were saved that had one spec

FIRST = Path(__file__).parent / "data" / "adapter-format-1"


def without_format(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != "format"}


@pytest.mark.filterwarnings("error")
def test_an_adapter_of_the_first_format_loads(tmp_path: Path) -> None:
    """SLA on the single block, a step of the original attention before it, parameters and a LoRA away from their start values."""
    pipe = load_adapter(prompt_pipe(), FIRST)
    assert pipe.transformer._dit_accel.context.assignment == Assignment.of(SPARSE, dense_steps=1)
    assert list(operators_of(pipe)) == ["single_transformer_blocks.0.attn"]
    stored = load_file(FIRST / WEIGHTS)
    own = operators_of(pipe)["single_transformer_blocks.0.attn"].params.state_dict()
    assert same({f"layers.single_transformer_blocks__0__attn.{name}": value for name, value in own.items()}, without_format(stored))
    again = save_adapter(pipe, tmp_path / "adapter")
    assert json.loads((again / CONFIG).read_text())["version"] == 2
    assert same(without_format(load_file(again / WEIGHTS)), without_format(stored))  # names on disk are the same
    assert same(load_file(again / LORA), load_file(FIRST / LORA))
    assert torch.equal(draw(load_adapter(prompt_pipe(), again)), draw(pipe))
    assert not torch.equal(draw(pipe), draw(prompt_pipe()))


FIRST_CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing-field": (lambda c: c.pop("dense_steps"), "dense_steps"),
    "spec-field": (lambda c: c["spec"].update(extra=1), "extra"),
    "spec-slot": (lambda c: c["spec"]["keep"][0].update(type="Sphere"), "Sphere"),
    "spec-value": (lambda c: c["spec"]["keep"][0].update(density=3), "density"),
    "spec-type": (lambda c: c.update(spec=None), "spec"),
    "dense-steps": (lambda c: c.update(dense_steps=-1), "dense_steps"),
    "second-format": (lambda c: c.update(version=2), "assignment"),
}


@pytest.mark.parametrize(("change", "says"), FIRST_CONFIGS.values(), ids=FIRST_CONFIGS)
def test_a_first_config_that_does_not_fit_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object], says: str) -> None:
    folder = copied(FIRST, tmp_path / "adapter")
    edit_config(folder, change)
    pipe = prompt_pipe()
    with unchanged(pipe), pytest.raises(AdapterError, match=says):
        load_adapter(pipe, folder)
