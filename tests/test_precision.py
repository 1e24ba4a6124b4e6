"""float32 attention that may round its factors: off until it is asked for, within the rule of low precision, and only where AMX serves."""

import re
import threading
from collections.abc import Iterator

import pytest
import torch
from helpers import Shape, assert_close_as_eager, oracle, random_parameters
from test_cpu_kernels import SPECS, TARGETS, every_spec, gradients_of_rounded, run
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, TokenLayout
from dit_accel.errors import ArgumentError
from dit_accel.kernels.cpu import native
from dit_accel.method import AttentionSpec
from dit_accel.operator import guard

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")
SHAPES = [Shape(1, 2, 64, (1, 16, 24), 9), Shape(2, 1, 40, (1, 13, 11), 21)]


@pytest.fixture
def medium() -> Iterator[None]:
    dit_accel.set_float32_attention_precision("medium")
    yield
    dit_accel.set_float32_attention_precision("highest")


def test_nothing_is_rounded_unless_it_is_asked_for() -> None:
    assert dit_accel.get_float32_attention_precision() == "highest"


@pytest.mark.parametrize("name", ["high", "bf16", "", None, True])
def test_another_name_is_refused(name: str) -> None:
    said = re.escape(f"the precision of float32 attention must be one of ('highest', 'medium'), not {name!r}")
    with pytest.raises(ArgumentError, match=said):
        dit_accel.set_float32_attention_precision(name)
    assert dit_accel.get_float32_attention_precision() == "highest"


@pytest.mark.usefixtures("medium")
def test_it_is_set_for_all_threads() -> None:
    """As torch's own switch is."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(dit_accel.get_float32_attention_precision()))
    thread.start()
    thread.join()
    assert found == ["medium"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.head_dim))
def test_it_computes_what_bfloat16_does_where_amx_serves(
    target: str, shape: Shape, medium: None, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """The results are not rounded: those of bfloat16 are, and the lse, which is float32 there too, is the same bit for bit."""
    monkeypatch.setenv(native.TARGET_VARIABLE, target)
    qkv, spec = shape.inputs(), CLEAR(4)
    out, lse = run(qkv, spec, shape.layout)
    assert out.dtype == lse.dtype == torch.float32
    rounded_out, rounded_lse = run([x.bfloat16() for x in qkv], spec, shape.layout)
    dit_accel.set_float32_attention_precision("highest")
    exact_out, exact_lse = run(qkv, spec, shape.layout)
    if target == "amx":
        assert torch.equal(lse, rounded_lse)
        assert torch.equal(out.bfloat16(), rounded_out)
        assert not torch.equal(lse, exact_lse)
    else:
        assert torch.equal(lse, exact_lse)
        assert torch.equal(out, exact_out)


@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.head_dim))
@pytest.mark.parametrize("spec", [SPECS["clear"], SPECS["fovea-radius"], SPECS["gna"]], ids=["clear", "fovea-radius", "gna"])
def test_outputs_err_as_eager_bfloat16_does(spec: AttentionSpec, shape: Shape) -> None:
    """Of methods whose choice of keys no rounding changes."""
    qkv, params = shape.inputs(), random_parameters(spec, shape)
    with torch.no_grad():
        exact = oracle(*qkv, spec, shape.layout, params, dtype=torch.float64)
        eager = oracle(*(x.bfloat16() for x in qkv), spec, shape.layout, params, dtype=torch.bfloat16)
        got = run(qkv, spec, shape.layout, params)
    for name, *three in zip(("output", "lse"), got, exact, eager, strict=True):
        assert_close_as_eager(*three, name)


@every_spec
@pytest.mark.usefixtures("medium")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.head_dim))
def test_gradients_err_as_eager_bfloat16_does(spec: AttentionSpec, shape: Shape) -> None:
    """Of every method, on inputs that are bfloat16 already, so that both choose the same keys; the gradients are float32."""
    params = random_parameters(spec, shape).requires_grad_(False)

    def formula(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return oracle(*qkv, spec, shape.layout, params, dtype=qkv[0].dtype)

    exact, eager = (gradients_of_rounded(dtype, shape, formula) for dtype in (torch.float64, torch.bfloat16))
    got = gradients_of_rounded(torch.float32, shape, lambda *qkv: run(list(qkv), spec, shape.layout, params))
    assert {x.dtype for x in got} == {torch.float32}
    for name, *three in zip(("query", "key", "value"), got, exact, eager, strict=True):
        assert_close_as_eager(*three, name)


@pytest.mark.crossover
def test_what_the_guard_measured_without_it_is_another_question(medium: None, monkeypatch: pytest.MonkeyPatch) -> None:
    timed: list[str] = []
    monkeypatch.setattr(guard, "_measure", lambda *_: timed.append("") or (1.0, 2.0))
    for precision in ("medium", "highest", "medium"):
        dit_accel.set_float32_attention_precision(precision)
        guard.measured(CLEAR(2), TokenLayout((1, 8, 8)), 16, torch.float32, torch.device("cpu"))
    assert len(timed) == 2
