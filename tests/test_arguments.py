"""The operators' arguments are declared once: what is made from the declarations says the same."""

import typing
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Largest, Shape
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from dit_accel import CLEAR, SLA, AttentionSpec, Fovea, TokenLayout, attention
from dit_accel.kernels import arguments, ops
from dit_accel.kernels.arguments import (
    Arguments,
    Feature,
    Learned,
    MixtureArguments,
    Rows,
    SummaryArguments,
    Transport,
)
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.cpu import native
from dit_accel.kernels.grouping import GroupingArguments


class Sample(NamedTuple):
    """One argument of each kind."""

    x: Rows
    y: Tensor
    learned: Learned
    z: Tensor | None
    count: int
    most: int | None
    size: float
    flag: bool
    name: Feature


def test_the_schema_says_what_is_declared() -> None:
    wanted = "(str implementation, Tensor first, Tensor x, Tensor y, Tensor? learned, Tensor? z, SymInt[] numbers, float[] reals)"
    assert Transport(Sample).schema("Tensor[]", "Tensor first") == f"{wanted} -> Tensor[]"


@pytest.mark.parametrize("most", [None, 0, 7])
def test_what_is_packed_is_unpacked(most: int | None) -> None:
    x, transport = torch.zeros(1), Transport(Sample)
    a = Sample(x=x, y=x + 1, learned=None, z=x + 2, count=5, most=most, size=0.5, flag=True, name="elu")
    again = transport.unpack(*transport.pack(a))
    assert [x is y or x == y for x, y in zip(again, a, strict=True)] == [True] * len(a)
    assert type(again.flag) is bool


def test_the_structs_fields_are_what_is_declared() -> None:
    kinds = {name: kind.__name__ for name, kind in native.declared_fields(Sample)}
    tensors, numbers = (
        dict.fromkeys(["y", "learned", "z"], "c_void_p"),
        {"count": "c_long", "most": "c_long", "size": "c_float", "flag": "c_int"},
    )
    assert kinds == {"x": "Rows", **tensors, **numbers, "name": "c_int"}


@pytest.mark.parametrize(
    ("op", "kind", "first"),
    [
        (ops.attention_op, Arguments, []),
        (ops.attention_backward_op, Arguments, ["dout", "dlse", "out", "lse"]),
        (ops.select_blocks_op, SelectionArguments, []),
        (ops.summarize_blocks_op, SummaryArguments, []),
        (ops.mix_slopes_op, MixtureArguments, []),
        (ops.mix_slopes_backward_op, MixtureArguments, ["dout"]),
        (ops.group_units_op, GroupingArguments, []),
    ],
    ids=[
        "attention",
        "attention_backward",
        "select_blocks",
        "summarize_blocks",
        "mix_slopes",
        "mix_slopes_backward",
        "group_units",
    ],
)
def test_the_operators_take_what_is_declared(op: Any, kind: Any, first: list[str]) -> None:
    taken = [a.name for a in op._opoverload._schema.arguments]
    tensors = [name for name, hint in typing.get_type_hints(kind).items() if hint in (Tensor, Tensor | None)]
    assert taken == ["implementation", *first, *tensors, "numbers", "reals"]


def given(**changed: Any) -> Arguments:
    q, numbers = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
    sizes = {"q_width": 4, "k_width": 4, "text": 0, "text_first": True, "scale": 1.0}
    tensors = dict.fromkeys(["lists", "counts", "full", "q_starts", "k_starts", "coords"], numbers)
    return Arguments(**{"q": q, "k": q, "v": q, **tensors, **sizes, **changed})


def test_gradients_come_in_the_order_of_the_declaration() -> None:
    a = given(weight=torch.zeros(8, 8), offset=torch.zeros(2))
    found = arguments.in_order({"weight": torch.ones(8, 8), "q": a.q + 1}, a)
    assert [name for name, x in zip(arguments.DIFFERENTIABLE, found, strict=True) if x.numel() and bool((x == 1).all())] == ["q", "weight"]
    like = [arguments.gradient_like(name, a) for name in arguments.DIFFERENTIABLE]
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in like]
    assert {name: x.dtype for name, x in zip(arguments.DIFFERENTIABLE, like, strict=True) if x.numel()} == {
        **dict.fromkeys(["q", "k", "v"], torch.bfloat16),
        **dict.fromkeys(["offset", "weight"], torch.float32),
    }


@pytest.mark.parametrize(("name", "value"), [("rest", "pool"), ("feature_map", "gelu")])
def test_an_unknown_choice_is_refused(name: str, value: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, not '{value}'"):
        arguments.ATTENTION.pack(given(**{name: value}))
    with pytest.raises(ValueError, match=f"{name} must be one of .*, not '{value}'"):
        arguments.check(given(**{name: value}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.ones(1, 2, 95, 8)}, r"v must have k's shape \(1, 2, 96, 8\), not \(1, 2, 95, 8\)"),
        ({"v": torch.ones(1, 2, 96, 8), "bias": torch.ones(1, 2, 6)}, "values or a bias, not both: leave v or bias out"),
        ({"pooled": True}, "made of k and v: give v, or leave pooled and states out"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_a_choice_are_refused(change: dict[str, Tensor], message: str) -> None:
    starts, x = torch.arange(0, 97, 16, dtype=torch.int32), torch.ones(1, 2, 96, 8)
    a = SelectionArguments(q=x, k=x, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=2)
    with pytest.raises(ValueError, match=message):
        ops.select_blocks(a._replace(**change), "cpu")


def test_what_watches_an_operator_sees_it() -> None:
    """Operators are called past torch's dispatcher only where that is all there is to see."""
    x, y, seen = torch.zeros(3), FakeTensorMode().from_tensor(torch.zeros(3)), list[bool]()

    def look(z: Tensor) -> Tensor:
        seen.append(ops.unwatched(z))
        return z + 1

    assert not ops.unwatched(x)  # a gradient may be recorded
    with torch.no_grad():
        assert ops.unwatched(x)
        assert not ops.unwatched(y)
        assert not ops.unwatched(x, y)
        assert not ops.unwatched(x, torch._neg_view(x))
        with Largest():
            look(x)
        with torch.autograd.profiler.profile():
            look(x)
        torch.func.vmap(look)(x)
        torch.compile(look, backend="eager", fullgraph=True)(x)
    with torch.inference_mode():
        assert ops.unwatched(x)
    assert seen
    assert not any(seen)


def test_an_operator_gives_the_same_watched_or_not() -> None:
    starts, x = torch.arange(0, 97, 16, dtype=torch.int32), torch.randn(1, 2, 96, 8, generator=torch.Generator().manual_seed(0))
    a = SelectionArguments(q=x, k=x, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=2)
    with torch.no_grad():
        found = ops.select_blocks(a, "cpu")
        with Largest():
            watched = ops.select_blocks(a, "cpu")
    assert type(found) is type(watched)
    assert all(torch.equal(one, other) for one, other in zip(found, watched, strict=True))


@pytest.mark.parametrize("negated", ["q", "k", "v"])
@pytest.mark.parametrize("spec", [CLEAR(2.0), Fovea(0.3), Fovea(0.3, order=1), SLA(0.3)], ids=str)
def test_a_lazily_negated_view_is_what_it_shows(spec: AttentionSpec, negated: str) -> None:
    """The imaginary part of a conjugate, say: its memory holds the opposite numbers."""
    inputs = dict(zip("qkv", Shape(1, 2, 16, (1, 10, 9), 3).inputs(), strict=True))
    view = torch._neg_view(-inputs[negated])
    assert view.is_neg()
    with torch.no_grad():
        expected = attention(*inputs.values(), spec, TokenLayout((1, 10, 9), 3), backend="cpu")
        found = attention(*(inputs | {negated: view}).values(), spec, TokenLayout((1, 10, 9), 3), backend="cpu")
    assert torch.equal(found, expected)


def test_compiled_kernels_leave_out_no_tangent() -> None:
    shape = Shape(1, 2, 16, (1, 9, 8), 5)
    (q, k, v), along = shape.inputs(), torch.ones(1, 2, shape.layout.tokens, 16)
    with forward_ad.dual_level():
        attention(q, k, v, CLEAR(3), shape.layout)  # has none
        dual = forward_ad.make_dual(q, along)
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="no forward-mode derivatives: use backend="):
                attention(dual, k, v, CLEAR(3), shape.layout, backend="cpu")
        found = forward_ad.unpack_dual(attention(dual, k, v, CLEAR(3), shape.layout, backend="reference")).tangent
    step = 1e-3
    near = [attention(q + sign * step * along, k, v, CLEAR(3), shape.layout, backend="reference") for sign in (1, -1)]
    torch.testing.assert_close(found, (near[0] - near[1]) / (2 * step), atol=2e-3, rtol=0)
