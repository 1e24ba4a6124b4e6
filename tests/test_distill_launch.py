"""What is refused before anything is sampled, and what a launch's configuration does to a training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import PROMPTS, learn, same, state, student, untimed

from dit_accel.errors import DistillationError
from dit_accel.finetune import fit
from dit_accel.finetune import session as runs


@pytest.mark.parametrize(
    ("mode", "settings", "says"),
    [
        ("parameters", {"prompts": [*PROMPTS, PROMPTS[0]]}, "held-out prompts must not be trained on"),
        ("lora", {"train": "parameters"}, "leaves nothing to train"),
        ("lora", {"train": "lora", "parameter_steps": 3}, "nothing to fit"),
    ],
    ids=["prompt-on-both-sides", "nothing-to-train", "nothing-to-fit"],
)
def test_what_can_be_told_is_refused_before_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, settings: dict[str, Any], says: str
) -> None:
    monkeypatch.setattr(runs, "collect_prompts", lambda *_, **__: pytest.fail("prompts were sampled first"))
    with pytest.raises(DistillationError, match=says):
        learn(student(mode), tmp_path, **settings)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED", "MEGATRON_LM"])
def test_a_launch_that_would_spread_the_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    with pytest.raises(DistillationError, match=f"every process trains the whole model.*{kind}"):
        learn(student(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_accumulation_steps_of_a_launch_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for name in ("without", "with"):
        pipe = student("lora")
        result = learn(pipe, tmp_path / name, train="lora", max_grad_norm=1e-3)
        results.append((untimed(result), state(pipe.transformer)))
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1000000")  # enough for no gradient to be clipped
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_no_weight(tmp_path: Path) -> None:
    pipe = student("parameters")

    def overflow(gradient: torch.Tensor) -> torch.Tensor:
        return torch.full_like(gradient, float("inf"))

    own = [p for name, p in pipe.transformer.named_parameters() if ".dit_accel." in name]
    before = [p.detach().clone() for p in own]
    own[0].requires_grad_(True).register_hook(overflow)
    with pytest.raises(DistillationError, match="the gradient at step 0 is"):
        learn(pipe, tmp_path, train="parameters")
    assert all(torch.equal(p, was) for p, was in zip(own, before, strict=True))


def test_an_order_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    fit._order.cache_clear()
    first = fit._order("0 parameters 0", 7)
    assert sorted(first) == list(range(7))
    assert fit._order("0 parameters 0", 7) is first
    assert fit._order("0 parameters 1", 7) != first
