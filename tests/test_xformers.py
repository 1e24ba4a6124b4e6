"""The xformers backend with a stand-in for the library, which has no kernels without a CUDA device."""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, oracle, random_parameters
from torch import Tensor

from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch, xformers_rows
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attention

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, torch.Size]]:
    """A stand-in that computes on the CPU, pads its lse as the real one may, and keeps the shapes of queries and keys."""
    seen: list[tuple[torch.Size, torch.Size]] = []

    def partial(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        seen.append((query.shape, key.shape))
        scores = torch.einsum("bmhk,bnhk->bhmn", query, key) * scale
        out = torch.einsum("bhmn,bnhk->bmhk", scores.softmax(-1), value)
        return out, torch.nn.functional.pad(scores.logsumexp(-1), (0, 3), value=math.nan)

    ops, fmha = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha")
    fmha.memory_efficient_attention_partial = partial  # type: ignore[attr-defined]
    ops.fmha = fmha  # type: ignore[attr-defined]
    for name, module in (("xformers", ModuleType("xformers")), ("xformers.ops", ops), ("xformers.ops.fmha", fmha)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(xformers_rows, "refusal", lambda *_, **__: None)
    return seen


@pytest.mark.parametrize("spec", [Fovea(0.3), CLEAR(4), CLEAR(3, downsample=2), SLA(0.3, block=(16, 16))], ids=str)
@pytest.mark.parametrize("text_first", [True, False])
def test_equals_the_oracle(spec: AttentionSpec, text_first: bool, calls: list[tuple[torch.Size, torch.Size]]) -> None:
    shape = Shape(2, 2, 24, (1, 9, 11), 7, text_first)
    qkv, params = shape.inputs(), random_parameters(spec, shape)
    exact, eager = (oracle(*qkv, spec, shape.layout, params, dtype=d) for d in (torch.float64, torch.float32))
    with torch.no_grad():
        out, lse = attention(*qkv, spec, shape.layout, params=params, backend="xformers", return_lse=True)
    assert_close_as_eager(out, exact[0].detach(), eager[0].detach())
    assert_close_as_eager(lse, exact[1].detach(), eager[1].detach(), "lse")
    assert (torch.Size([4, 7, 1, 24]), torch.Size([4, 106, 1, 24])) in calls  # the text's rows
    assert (torch.Size([4, 99, 1, 24]), torch.Size([4, 7, 1, 24])) in calls  # the text's keys


def test_without_text_nothing_is_dense(calls: list[tuple[torch.Size, torch.Size]]) -> None:
    shape = Shape(1, 1, 16, (1, 8, 8))
    with torch.no_grad():
        attention(*shape.inputs(), CLEAR(3), shape.layout, backend="xformers")
    assert calls == []


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "gradient", "reason"),
    [
        ("cpu", torch.float32, 64, False, "requires a CUDA device, the tensors are on cpu"),
        ("cuda", torch.float64, 64, False, "not torch.float64 of 64"),
        ("cuda", torch.float16, 260, False, "not torch.float16 of 260"),
        ("cuda", torch.float16, 64, True, "no gradient of the lse"),
    ],
)
def test_says_why_not(device: str, dtype: torch.dtype, head_dim: int, gradient: bool, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    assert reason in str(xformers_rows.refusal(torch.device(device), dtype, head_dim, gradient=gradient))
    with pytest.raises(BackendError, match="backend 'xformers' can't run this call"):
        dispatch.choose("xformers", torch.device(device), dtype, head_dim, gradient=lambda: gradient)


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", False)
    assert "pip install dit-accel[xformers]" in str(xformers_rows.refusal(CUDA, torch.float16, 64, gradient=False))


def test_auto_takes_it_where_triton_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (8, 0))
    assert dispatch.choose("auto", CUDA, torch.float16, 64)[0] == "triton"
    assert dispatch.choose("auto", CUDA, torch.float16, 160, linear=True)[0] == "xformers"
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert dispatch.choose("auto", CUDA, torch.float16, 64) == ("xformers", "the dense parts; triton is not installed")
    assert dispatch.choose("auto", CUDA, torch.float16, 64, gradient=lambda: True)[0] == "reference"


def test_a_bias_is_refused_by_name_and_left_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    shape = Shape(1, 1, 16, (1, 4, 4), 2)
    with pytest.raises(BackendError, match="xformers takes no bias of the text's keys"):
        attention(*shape.inputs(), CLEAR(2), shape.layout, text_bias=shape.text_bias(), backend="xformers")
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert dispatch.choose("auto", CUDA, torch.float16, 64)[0] == "xformers"
    assert dispatch.choose("auto", CUDA, torch.float16, 64, text_bias=True)[0] == "reference"


def test_a_gradient_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_rows, "INSTALLED", True)
    shape = Shape(1, 1, 16, (1, 4, 4), 2)
    with pytest.raises(BackendError, match="no gradient of the lse"):
        attention(*shape.inputs(grad=True), CLEAR(2), shape.layout, backend="xformers")


@pytest.mark.parametrize("learned", [True, False])
def test_learned_pooling_requires_a_gradient_though_its_inputs_are_frozen(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def choose(*args: Any, gradient: Callable[[], bool], **others: Any) -> tuple[str, str]:
        seen.append(gradient())
        return "reference", ""

    monkeypatch.setattr(dispatch, "choose", choose)
    spec, shape = CLEAR(3, downsample=2), Shape(1, 2, 16, (1, 8, 8))
    params = random_parameters(spec, shape).requires_grad_(learned)
    attention(*(x.detach() for x in shape.inputs()), spec, shape.layout, params=params)
    assert set(seen) == {learned}
