"""The LoRA that distillation trains, after users fused or rescaled it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import SPARSE, add_lora, draw, learn, prompt_pipe, same, state

from dit_accel import accelerate, dense, load_adapter, restore, save_adapter
from dit_accel.errors import DistillationError, DitAccelError, UnsupportedModelError


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with a LoRA."""
    root = tmp_path_factory.mktemp("lora")
    learn(pipe := accelerate(prompt_pipe(), SPARSE), root / "run", train="lora")
    return save_adapter(pipe, root / "adapter")


def test_one_in_the_weights_is_never_taken_for_the_original(adapter: Path, tmp_path: Path) -> None:
    pipe = load_adapter(prompt_pipe(), adapter)
    before, picture = state(pipe.transformer), draw(pipe)
    pipe.transformer.fuse_lora()
    fused = state(pipe.transformer)
    assert not same(fused, before)

    def in_dense(pipe: Any) -> None:
        with dense(pipe):
            pass

    for use in (in_dense, restore, lambda pipe: save_adapter(pipe, tmp_path), lambda pipe: pipe.transformer.save_pretrained(tmp_path)):
        with pytest.raises(DitAccelError, match=r"fuse_lora\(\) put into them: call unfuse_lora"):
            use(pipe)
    assert same(state(pipe.transformer), fused)
    assert list(tmp_path.glob("*.safetensors")) == []
    pipe.transformer.unfuse_lora()
    torch.testing.assert_close(draw(pipe), picture)
    torch.testing.assert_close(draw(restore(pipe)), draw(prompt_pipe()))


def test_its_strength_outlives_dense(adapter: Path) -> None:
    pipe = load_adapter(prompt_pipe(), adapter)
    whole = draw(pipe)
    pipe.transformer.set_adapters(["dit_accel"], [0.25])
    weaker = draw(pipe)
    assert not torch.equal(weaker, whole)
    with dense(pipe), dense(pipe):
        assert torch.equal(draw(pipe), draw(prompt_pipe()))
    assert torch.equal(draw(pipe), weaker)


def test_projections_that_are_fused_after_loading_are_refused(adapter: Path) -> None:
    pipe = load_adapter(prompt_pipe(), adapter)
    picture = draw(pipe)
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(UnsupportedModelError, match=r"2 layers have fused projections.*unfuse_qkv_projections"):
        draw(pipe)
    pipe.transformer.unfuse_qkv_projections()
    assert torch.equal(draw(pipe), picture)


def test_none_is_trained_where_it_would_be_off(tmp_path: Path) -> None:
    add_lora(pipe := prompt_pipe())
    pipe.transformer.disable_lora()
    with pytest.raises(DistillationError, match="switched off"):
        learn(accelerate(pipe, SPARSE), tmp_path, train="lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("off", ["set_adapters", "disable_lora", "delete_adapters"])
def test_one_that_is_switched_off_is_told_of_once(adapter: Path, off: str) -> None:
    pipe = load_adapter(prompt_pipe(), adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe)
        with dense(pipe):
            draw(pipe)
    if off == "set_adapters":
        add_lora(pipe)
        pipe.transformer.set_adapters(["style"])
    elif off == "disable_lora":
        pipe.transformer.disable_lora()
    else:
        pipe.transformer.delete_adapters("dit_accel")
    with pytest.warns(UserWarning, match="what was trained is switched off: the LoRA 'dit_accel'"):
        draw(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(pipe)
