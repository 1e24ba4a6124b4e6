"""The text's queries and keys among the programs of blocks: as by themselves, in fewer launches."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import attention_by
from torch import Tensor

from dit_accel.kernels.triton import calls, launch
from dit_accel.kernels.triton.tables import Machine, Tile
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.layout import TokenLayout

pytestmark = pytest.mark.gpu

OF_TEXT = ("dense", "gradient_dense", "gradient_shared")
SPECS = {
    "fovea": Fovea(0.2),
    "fovea-radius": Fovea(radius=3),
    "clear": CLEAR(4),
    "gna": GNA((4, 6), stride=(2, 3), dilation=(1, 2)),
    "sla": SLA(0.3, block=(32, 16)),
    "sla-all": SLA(0.3, "elu", "all", block=(16, 32)),
    "sla-left": SLA(0.7, block=(16, 16)),
}
SHAPES = {
    "first": Shape(1, 2, 24, (1, 9, 11), 5),
    "last": Shape(2, 1, 16, (1, 8, 13), 37, text_first=False),
    "one": Shape(1, 1, 32, (2, 5, 7), 1),
}
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def machine(units: int = 1) -> Machine:
    """One of so few multiprocessors that there is always as much else to do, where the text's tiles are no taller than those of blocks."""
    return Machine("sm_90", units, {(name, "float32", d): Tile(16, 16, 4, 2) for name in OF_TEXT for d in (16, 32)})


def counted(function: Callable[[], Any], units: int = 1) -> tuple[Any, Counter[str]]:
    """What the function gives with `machine`, and its launches."""
    found: Counter[str] = Counter()

    def run(one: launch.Launch) -> None:
        found[one.kernel.__name__] += 1
        launch.execute(one)

    everywhere = patch.object(launch, "joins", lambda *_: True)
    with everywhere, torch.autograd.set_multithreading_enabled(False), calls.redirected(machine(units), run):
        return function(), found


def by_kernels(spec: AttentionSpec, shape: Shape, bias: Tensor | None = None) -> Callable[..., tuple[Tensor, Tensor]]:
    return attention_by("triton", spec, shape.layout, text_bias=bias)


@every_shape
@every_spec
def test_results_are_those_of_the_formulas(spec: AttentionSpec, shape: Shape) -> None:
    qkv, params = shape.inputs(), random_parameters(spec, shape)
    with torch.no_grad():
        (out, lse), found = counted(lambda: by_kernels(spec, shape)(qkv, params))
    assert found["attend_rows"] == 1
    assert "dense_rows" not in found
    exact, eager = (oracle(*qkv, spec, shape.layout, params, dtype=d) for d in (torch.float64, torch.float32))
    assert_close_as_eager(out, exact[0].detach(), eager[0].detach())
    assert_close_as_eager(lse, exact[1].detach(), eager[1].detach(), "lse")


def test_text_sees_no_pooled_further_keys() -> None:
    test_results_are_those_of_the_formulas(CLEAR(3, downsample=2), SHAPES["first"])


def test_text_in_programs_of_two_query_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = machine().tuned | {("rows_static", "float32", 16): Tile(128, 64, 4, 2)}
    monkeypatch.setitem(globals(), "machine", lambda units: Machine("sm_90", units, wide))
    seen: list[Any] = []
    monkeypatch.setattr(launch, "execute", lambda one, execute=launch.execute: (seen.append(one.constants), execute(one)))
    test_results_are_those_of_the_formulas(CLEAR(4), Shape(1, 1, 16, (1, 16, 16), 37))
    assert [constants["TOGETHER"] for constants in seen if "TOGETHER" in constants] == [2]


@every_spec
def test_gradients_are_those_of_the_formulas(spec: AttentionSpec) -> None:
    shape = SHAPES["first"]
    _assert_gradients(spec, shape, None)


@pytest.mark.parametrize("masked", [False, True], ids=["biased", "all-masked"])
@pytest.mark.parametrize("name", ["fovea", "clear", "sla"])
def test_gradients_under_a_bias(name: str, masked: bool) -> None:
    shape = SHAPES["last"]
    _assert_gradients(SPECS[name], shape, shape.text_bias(masked=masked))


def _assert_gradients(spec: AttentionSpec, shape: Shape, bias: Tensor | None) -> None:
    def own() -> dict[str, Tensor]:
        return gradients(lambda qkv, params: by_kernels(spec, shape, bias)(qkv, params.float()), spec, shape, torch.float32)

    got, found = counted(own)
    assert found["gradient_rows"] == found["gradient_columns"] == 1
    assert not {"gradient_dense_rows", "gradient_shared_keys"} & {*found}
    exact, eager = (
        gradients(lambda qkv, params, d=d: oracle(*qkv, spec, shape.layout, params, text_bias=bias, dtype=d), spec, shape, d)
        for d in (torch.float64, torch.float32)
    )
    for name in ("query", "key", "value"):
        assert_close_as_eager(got[name], exact[name], eager[name], name)
    assert_close_as_eager(flat(got), flat(exact), flat(eager), "all")  # the error of what few numbers are learned is luck


@pytest.mark.parametrize("shape", [SHAPES["first"], SHAPES["last"]], ids=["first", "last"])
def test_the_first_order_is_as_with_launches_of_their_own(shape: Shape) -> None:
    """No slope joins the text's rows, and none of their share goes back to one."""
    spec = Fovea(0.2, order=1, parts=2)

    def own() -> dict[str, Tensor]:
        return gradients(lambda qkv, params: by_kernels(spec, shape)(qkv, params.float()), spec, shape, torch.float32)

    (joined, one), (apart, more) = counted(own), counted(own, units=132)
    assert one.total() < more.total()
    for name, x in joined.items():
        torch.testing.assert_close(x, apart[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["fovea", "sla"])
def test_they_are_by_themselves_where_a_device_had_nothing_else_to_do(name: str) -> None:
    shape, spec = SHAPES["first"], SPECS[name]

    def own() -> list[Tensor]:
        return flat(gradients(lambda qkv, params: by_kernels(spec, shape)(qkv, params.float()), spec, shape, torch.float32))

    _, found = counted(own, units=132)
    assert found["dense_rows"] == found["gradient_dense_rows"] == found["gradient_shared_keys"] == 1


LARGE = {  # forward and backward, of FLUX.1's sizes at 1024 × 1024
    "fovea": (Fovea(0.05), 3, 4),
    "fovea-radius": (Fovea(radius=8), 2, 5),
    "clear": (CLEAR(8), 1, 3),
    "sla": (SLA(0.05), 4, 6),
}


@pytest.mark.parametrize(("spec", "forward", "backward"), LARGE.values(), ids=LARGE)
def test_launches_of_a_large_call(spec: AttentionSpec, forward: int, backward: int) -> None:
    layout = TokenLayout((1, 64, 64), 512)
    qkv = [torch.empty(1, 24, layout.tokens, 128, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    params = random_parameters(spec, Shape(1, 24, 128, layout.grid, 512)).requires_grad_()
    with calls.recorded(Machine("sm_90", 132)) as found:
        out, _ = attention_by("triton", spec, layout)(qkv, params)
        count = len(found)
        out.sum().backward()
    assert (count, len(found) - count) == (forward, backward), [one.kernel.__name__ for one in found]


@pytest.mark.parametrize(("name", "held"), [("fovea", float("nan")), ("fovea", float("inf")), ("sla", float("nan"))])
def test_what_is_padded_may_hold_anything(name: str, held: float) -> None:
    shape, spec = SHAPES["last"], SPECS[name]
    bias, params = shape.text_bias(), random_parameters(spec, shape)
    gone = torch.zeros(shape.batch, shape.layout.tokens, dtype=torch.bool)
    gone[:, shape.layout.text_slice] = bias.isinf()

    def own(value: float) -> list[Tensor]:
        q, k, v = shape.inputs()
        qkv = [q, *(x.masked_fill(gone[:, None, :, None], value) for x in (k, v))]
        qkv = [x.requires_grad_() for x in qkv]
        out, lse = by_kernels(spec, shape, bias)(qkv, params)
        (out.sum() + lse.sum()).backward()
        return [out.detach(), lse.detach(), *(x.grad for x in qkv if x.grad is not None)]

    (expected, one), (got, _) = counted(lambda: own(0.0)), counted(lambda: own(held))
    assert "gradient_shared_keys" not in one
    assert len(got) == len(expected) == 5
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)
