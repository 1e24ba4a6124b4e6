"""CLEAR and SLA through whole models, against their definitions: the original model, whose calls of PyTorch's attention over the sequence
are answered by the dense oracle. Where image and text are in each model's sequence is written down here, not asked of the library."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_randomly, relative_error
from helpers import oracle
from test_families import Tiny
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, SLA, AttentionSpec, TokenLayout
from dit_accel.method.parameters import AttentionParameters
from dit_accel.patch.state import operators_of

SPECS = {
    "clear": CLEAR(2.0),
    "clear-pooled": CLEAR(2.0, downsample=2),
    "sla": SLA(0.3, block=(16, 16)),
    "sla-elu-all": SLA(0.2, "elu", "all"),
}
# the sequences that each model attends over, and what a call takes to have a grid worth it
SEQUENCES: dict[str, tuple[list[TokenLayout], dict[str, Any]]] = {
    "flux": ([TokenLayout((1, 8, 12), text=12)], {}),
    "sd3": ([TokenLayout((1, 8, 12), text=12, text_first=False), TokenLayout((1, 8, 12))], {}),  # its second attention: the image alone
    "wan": ([TokenLayout((3, 4, 6))], {"height": 64, "width": 96}),
    "hunyuan_video": ([TokenLayout((3, 4, 6), text=12, text_first=False)], {}),
}


def learned(spec: AttentionSpec, heads: int, head_dim: int) -> AttentionParameters:
    """The spec's parameters away from their start values, the same ones for every layer."""
    params = spec.make_parameters(heads=heads, head_dim=head_dim)
    fill_randomly(params, seed=1, scale=0.3)
    return params


def by_definition(
    spec: AttentionSpec, layouts: list[TokenLayout], stock: Callable[..., Tensor], answered: list[int]
) -> Callable[..., Tensor]:
    """PyTorch's attention `[B, H, N, D]`, but for self-attention over one of the sequences."""
    known = {layout.tokens: layout for layout in layouts}

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, scale: float | None = None, **kwargs: Any
    ) -> Tensor:
        layout = known.get(query.shape[2])
        if layout is None or key.shape[2] != query.shape[2]:
            return stock(query, key, value, attn_mask, *args, scale=scale, **kwargs)
        bias = None
        if attn_mask is not None:  # HunyuanVideo's `[B, 1, 1, N]`, true at what may be attended to; its text is placed last
            bias = torch.where(attn_mask[:, 0, 0, layout.image :], 0.0, -torch.inf).double()
        answered.append(layout.tokens)
        params = learned(spec, query.shape[1], query.shape[3])
        out, _ = oracle(query, key, value, spec, layout, params, scale=scale, text_bias=bias)
        return out.to(query.dtype)

    return attention


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_a_model_equals_the_definition(name: str, spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts, call = SEQUENCES[name]
    tiny = Tiny(name)
    answered: list[int] = []
    plain = tiny.run(**call)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(F, "scaled_dot_product_attention", by_definition(spec, layouts, F.scaled_dot_product_attention, answered))
        expected = tiny.run(**call)
    assert set(answered) == {layout.tokens for layout in layouts}
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    for operator in operators_of(tiny.pipe).values():
        operator.params.load_state_dict(learned(spec, operator.heads, operator.head_dim).state_dict())
    got = tiny.run(**call)
    assert relative_error(got, expected) < 1e-5
    assert relative_error(got, plain) > 1e-3
