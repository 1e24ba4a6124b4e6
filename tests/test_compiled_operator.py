"""One function compiled once, called with one spec and one layout after the other: each result is that of the function as it is.

torch.compile keeps many graphs of a function and takes the first whose guards hold; numbers that have changed once become symbols, which
hold for any value. What a graph depends on must be among its guards, and what is calculated from a symbol is no constant for Python's `is`.
"""

import ast
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from helpers import Shape, random_parameters
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, TokenLayout
from dit_accel.method import (
    Centred,
    Concentration,
    DepthwiseConv,
    Disc,
    DiscBlocks,
    DynamicConv,
    FirstFrames,
    Floored,
    Hedgehog,
    KVGate,
    Linear,
    Mass,
    Norm,
    NormPower,
    NormPreserving,
    OutputGate,
    Pattern,
    Pooled,
    PreConv,
    RankAugmented,
    Raster,
    Residual,
    Taylor,
    Tiles,
    TokenSoftmax,
    TopK,
    Window,
)
from dit_accel.method.parts import (
    Among,
    Box,
    Clusters,
    Columns,
    ErrorProduct,
    Estimated,
    Gate,
    PowerTiles,
    Pyramid,
    SelfSaliency,
    Stripes,
    TopP,
    part_types,
)
from dit_accel.method.parts.states import Decayed, DeltaScan, Ridge, Routed
from dit_accel.method.parts.tokens import Landmarks, Token
from dit_accel.operator.attention import attend
from dit_accel.operator.blocks_of_grid import make_plan

CPU, SHAPE, TILE = torch.device("cpu"), Shape(1, 2, 8, (1, 13, 10), 5), (4, 4)
FOVEA, FEW = Fovea(0.3, tile=TILE), Fovea(0.1, tile=TILE)
ERROR = replace(FOVEA, keep=(TopK(0.3, score=ErrorProduct()),))
POOLED = (
    Pooled(), Pooled(parts=2), Pooled(parts=4), Pooled(parts=4, order=1), Pooled(parts=2, order=1), Pooled(order=1),
    Pooled(log_count=False), Pooled(log_count=False, parts=2), Pooled(variance=False, parts=2), Pooled(variance=False),
    Pooled(cap=0.5), Pooled(cap=0.2), Pooled(cap=0.2, parts=2), Pooled(cap=0.5, parts=2),
)  # fmt: skip
LINEAR = (
    Linear(Hedgehog(joint=True), "marginal"), Linear(NormPower(), weights=KVGate()), Linear(NormPreserving(), weights=RankAugmented()),
    Linear(Taylor(4), readout=Centred()), Linear("elu", readout=Floored(50.0)),
)  # fmt: skip
KEPT: tuple[tuple[Pattern, ...], ...] = (
    (TopK(0.3),), (TopK(0.5),), (TopK(0.3, correct_short=True),), (TopK(0.3, score=ErrorProduct()),),
    (TopK(0.3, score=ErrorProduct(cap=0.01)),), (TopP(0.3, at_most=0.8),), (TopP(0.9, at_most=0.8),), (Disc(2),), (Disc(3),),
    (DiscBlocks(3),), (DiscBlocks(5),), (Window((5, 5)),), (Window((7, 5)),), (Window((5, 5), stride=2),), (Box((2, 3)),), (Box((3, 2)),),
    (Box((3, 2)), TopK(0.3)), (FirstFrames(1),),
)  # fmt: skip
EXTRAS = (
    (), (DepthwiseConv(),), (DepthwiseConv(3),), (DepthwiseConv(3, frames=3),), (DynamicConv(), OutputGate()), (Concentration(3),),
    (OutputGate("channel"),),
)  # fmt: skip
CONVOLVED = replace(SLA(0.3, tile=TILE), extras=EXTRAS[1])
CATALOGUE: tuple[tuple[Pattern, ...], ...] = (
    (PowerTiles(near=0),), (Stripes(span=0),), (PowerTiles(),), (TopK(0.3, score=Estimated()),), (TopK(0.3, score=Gate()),),
    (TopK(0.3, score=Pyramid((2, 3), keep=0.4)),), (TopK(0.3, score=Clusters(3)),), (TopK(0.3, score=Clusters(4)),),
    (Columns(0.3),), (Columns(0.3, SelfSaliency()),), (TopK(0.3, score=SelfSaliency()), PowerTiles(near=0)),
    (Among(0.3, Stripes()),),
)  # fmt: skip
CHAINS: dict[str, Sequence[AttentionSpec]] = {
    "pooled": [replace(FOVEA, rest=rest) for rest in POOLED],
    "pooled of the worst": [replace(ERROR, rest=rest) for rest in (Pooled(), Pooled(order=1), Pooled(parts=2), Pooled(parts=4, order=1))],
    "in groups": [replace(FEW, rest=rest) for rest in (Pooled(opened=1), Pooled(opened=2), Pooled(parts=4, order=1, opened=2))],
    "linear": [*(replace(FOVEA, rest=rest) for rest in LINEAR), replace(FOVEA, rest=Linear(TokenSoftmax()), merge=Residual())],
    "rests": [
        *(replace(FOVEA, rest=rest) for rest in (Decayed(), Routed(2), Landmarks())),
        replace(FOVEA, rest=Token()), replace(FOVEA, rest=Token("estimated"), merge=Mass("query")),
        *(replace(FOVEA, rest=rest, merge=Residual()) for rest in (Ridge(), DeltaScan(decay=True))),
        *(replace(FOVEA, rest=Linear(), merge=merge) for merge in (Norm(), Mass(), Mass("query"))),
    ],
    "kept": [AttentionSpec(patterns, order=Tiles(TILE), block=(16, 16)) for patterns in KEPT],
    "catalogue": [AttentionSpec(patterns, order=Tiles(TILE), block=(16, 16)) for patterns in CATALOGUE],
    "presets": [
        Fovea(0.3, order=1, tile=TILE), FOVEA, replace(FOVEA, order=Tiles((2, 8))), replace(FOVEA, order=Raster()),
        replace(FOVEA, order=Raster(), block=(16, 32)), CLEAR(3, tile=TILE), CLEAR(3, downsample=2, tile=TILE),
        CLEAR(3, downsample=3, tile=TILE), SLA(0.3, block=(16, 16)), SLA(0.3, "elu", block=(16, 16)),
        SLA(0.3, scope="all", block=(16, 16)), SLA(0.3, scope="none", block=(16, 16)), SLA(0.3, tile=TILE), GNA(window=(5, 5), tile=TILE),
        GNA(window=(5, 7), stride=2, tile=TILE), Fovea(radius=3, tile=TILE),
    ],
    "extras": [replace(FOVEA, extras=extras) for extras in EXTRAS] + [
        CONVOLVED, replace(CLEAR(3, tile=TILE), extras=EXTRAS[1]), replace(SLA(0.3, tile=TILE), rest=PreConv(Linear())),
        replace(SLA(0.3, tile=TILE), rest=PreConv(Linear("elu"), 5)),
    ],
}  # fmt: skip
LAYOUTS = [
    TokenLayout((1, 13, 10), 5), TokenLayout((1, 10, 13), 5), TokenLayout((1, 26, 5), 5), TokenLayout((2, 13, 5), 5),
    TokenLayout((1, 13, 5), 5, references=((1, 5, 13),)), TokenLayout((1, 13, 10), 5, text_first=False), TokenLayout((1, 9, 15), 0),
    TokenLayout((1, 13, 10), 0), TokenLayout((1, 13, 10), 12), TokenLayout((1, 12, 10), 15), TokenLayout((1, 13, 10), 5, order=Tiles(TILE)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    """No graph of before, and as many graphs of one function as there are specs."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=64):
        yield
    torch.compiler.reset()


class Call:
    """One call of `attend`, and its result without torch.compile: output and lse, where `grad` the gradients of q, k and v too."""

    def __init__(
        self, spec: AttentionSpec, layout: TokenLayout = SHAPE.layout, scale: float | None = None, bias: Tensor | None = None,
        backend: str = "cpu", *, grad: bool = False,
    ) -> None:  # fmt: skip
        seed = torch.Generator().manual_seed(1)
        self.qkv = [(size * torch.randn(1, 2, layout.tokens, 8, generator=seed)).requires_grad_(grad) for size in (2.0, 1.0, 1.0)]
        plan, params = make_plan(spec, layout, CPU), random_parameters(spec, SHAPE).requires_grad_(False)
        self.given, self.bias = (spec, layout, plan, params(), scale, backend), bias
        self.expected = self.by(attend)

    def by(self, function: Callable[..., Any]) -> list[Tensor]:
        """The result of a function in the place of `attend`."""
        out, lse = function(*self.qkv, *self.given, text_bias=self.bias)
        gradients = torch.autograd.grad(out.square().sum() + lse.sum(), self.qkv) if out.requires_grad else ()
        return [out.detach(), lse.detach(), *gradients]


def assert_each_is_right(calls: Sequence[Call], dynamic: bool | None = None, backend: str = "eager") -> None:
    """Twice in turn: at the second time every graph is there.

    What follows a call differs from it, so that a graph of the one would err in the other.
    """
    for one, other in itertools.pairwise(calls):
        if one.qkv[0].shape == other.qkv[0].shape:
            assert relative_error(one.expected[0], other.expected[0]) > 1e-4
    compiled = torch.compile(attend, fullgraph=True, backend=backend, dynamic=dynamic)
    for number, call in (*enumerate(calls), *enumerate(calls)):
        errors = [relative_error(got, expected) for got, expected in zip(call.by(compiled), call.expected, strict=True)]
        assert max(errors) < 1e-5, f"call {number}, {call.given[0]}: {errors}"


@pytest.mark.parametrize("chain", CHAINS)
def test_one_function_computes_each_spec(chain: str) -> None:
    assert_each_is_right([Call(spec) for spec in CHAINS[chain]])


def test_no_part_is_left_out() -> None:
    tried = {type(part) for specs in CHAINS.values() for spec in specs for part in spec.parts()}
    assert tried == {kind for kind in part_types().values() if kind.__module__.startswith("dit_accel.")}


def test_patterns_look_at_fields_alone() -> None:
    """What a property calculates of symbols is a symbol: `case Pooled(plain=False)`, which asks for the constant, would never fit."""
    fields = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in part_types().items()}
    looked = [
        (node.cls.id, name)
        for path in Path(dit_accel.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.MatchClass) and isinstance(node.cls, ast.Name) and node.cls.id in fields
        for name in node.kwd_attrs
    ]
    assert ("Mass", "offset") in looked
    assert [(kind, name) for kind, name in looked if name not in fields[kind]] == []


def test_numbers_that_are_symbols_from_the_start_decide_the_same() -> None:
    assert_each_is_right([Call(spec) for spec in CHAINS["pooled of the worst"]], dynamic=True)


def test_gradients_by_a_compiled_backward_pass() -> None:
    assert_each_is_right([Call(spec, grad=True) for spec in (*CHAINS["pooled of the worst"][:3], CONVOLVED)], backend="aot_eager")


def test_the_reference_compiles_as_well() -> None:
    specs = (FOVEA, replace(FOVEA, rest=Pooled(opened=1)), CLEAR(3, tile=TILE))
    assert_each_is_right([Call(spec, backend="reference") for spec in specs])


@pytest.mark.parametrize("spec", [FOVEA, CLEAR(3, tile=TILE), CONVOLVED], ids=["selected", "static", "extra"])
def test_one_function_computes_each_layout(spec: AttentionSpec) -> None:
    assert_each_is_right([Call(spec, layout) for layout in LAYOUTS[: len(LAYOUTS) if spec is FOVEA else 5]])


def test_one_function_computes_each_scale_and_bias() -> None:
    bias = SHAPE.text_bias()
    of_text: list[dict[str, Any]] = [
        {"scale": 0.2}, {"scale": 0.3}, {"scale": 0.2, "bias": bias}, {"bias": bias}, {}, {"bias": bias.clamp_min(-1)}
    ]  # fmt: skip
    assert_each_is_right([Call(FOVEA, **given) for given in of_text])
