"""Proportional attention: off it changes not one bit, on it is CLEAR's formula."""

import math
from typing import Any

import pytest
import torch
from hires_fixtures import SIZE, TEXT, draw, make
from torch import Tensor

from dit_accel import CLEAR, Fovea, accelerate, restore
from dit_accel.patch.context import Context
from dit_accel.patch.state import CONTEXT


def scales(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float | None]]:
    """Grows by (tokens, scale) at every call of an operator."""
    from dit_accel.patch import processor

    found: list[tuple[int, float | None]] = []
    original: Any = processor.attend

    def noted(
        query: Tensor, key: Tensor, value: Tensor, spec: Any, layout: Any, plan: Any, params: Any, scale: Any, *more: Any, **k: Any
    ) -> Any:
        found.append((query.shape[2], scale))
        return original(query, key, value, spec, layout, plan, params, scale, *more, **k)

    monkeypatch.setattr(processor, "attend", noted)
    return found


def test_proportional_scale_is_clears_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    found = scales(pipe, monkeypatch)
    draw(pipe, call, strength=0.5, proportional=True)
    trained, tokens = 4 * 6 + TEXT, 8 * 12 + TEXT
    assert {n for n, _ in found} == {tokens}
    assert [scale for _, scale in found] == pytest.approx([math.sqrt(math.log(tokens, trained) / 16)] * len(found))
    assert getattr(pipe.transformer, CONTEXT).context.trained_tokens is None


def test_accelerate_scales_the_logits_as_the_operator_does(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    run = {**call, **SIZE, "num_inference_steps": 2, "output_type": "latent"}

    def latents_with(**settings: Any) -> Tensor:
        accelerate(pipe, CLEAR(30.0), **settings)  # all of the picture: dense attention
        try:
            found: Tensor = pipe(**run, generator=torch.Generator().manual_seed(0)).images
        finally:
            restore(pipe)
        return found

    with pytest.MonkeyPatch.context() as patch:
        off = scales(pipe, patch)
        plain = latents_with()
        assert {scale for _, scale in off} == {None}  # the operator's own: not one bit changes
    tokens = 8 * 12 + TEXT
    assert torch.equal(latents_with(trained_tokens=tokens), plain)  # sqrt(log N / log N) is 1
    scaled = latents_with(trained_tokens=30)
    factor = math.sqrt(math.log(tokens) / math.log(30))
    for module in (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks):
        for name in ("norm_q", "norm_added_q"):  # what multiplies the queries multiplies the logits
            if getattr(module.attn, name, None) is not None:
                getattr(module.attn, name).weight.data *= factor
    assert not torch.allclose(scaled, plain, rtol=1e-3)
    torch.testing.assert_close(latents_with(), scaled, rtol=0, atol=1e-5 * float(scaled.abs().max()))


@pytest.mark.parametrize("tokens", [1, 0, -3, True, 4608.0, "4608"])
def test_wrong_trained_tokens_are_refused(tokens: Any) -> None:
    pipe, _ = make()
    with pytest.raises(ValueError, match="trained_tokens must be a number of tokens >= 2 or None"):
        accelerate(pipe, trained_tokens=tokens)
    assert not hasattr(pipe.transformer, CONTEXT)


@pytest.mark.crossover
def test_scaled_logits_are_not_left_to_the_original() -> None:
    pipe, _ = make()
    context: Context = getattr(accelerate(pipe, Fovea(), trained_tokens=30).transformer, CONTEXT).context

    class Loses:
        loses = True

    context.crossovers[Fovea()] = Loses()  # type: ignore[assignment]
    with torch.no_grad():
        assert not context.left_to_original(Fovea())
        context.trained_tokens = None
        assert context.left_to_original(Fovea())
