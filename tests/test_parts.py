"""What every part of a method keeps, those of samples/new_part.py among them: each registered part is tried, in a spec made around it."""

import dataclasses
import functools
import itertools
import json
import math
import pickle
import runpy
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import fill_randomly, relative_error, tiny_pipe
from distill_fixtures import CALL, PROMPTS, distill, prompt_pipe, quick
from helpers import Shape, assert_close_as_eager, flat, gradients, random_parameters
from on_device import CPU, attention_by, device_of, moved
from test_families import Tiny
from torch import Tensor

import dit_accel
from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.method import (
    Blockwise,
    Call,
    Clusters,
    Columns,
    Decayed,
    DeltaScan,
    Disc,
    DiscBlocks,
    Estimated,
    Extra,
    Features,
    FirstFrames,
    Gate,
    KeyWeight,
    Linear,
    Mass,
    Merge,
    Norm,
    Order,
    Part,
    Pattern,
    Pooled,
    PreConv,
    Pyramid,
    Raster,
    Readout,
    Rest,
    Routed,
    Score,
    Selection,
    SelfSaliency,
    Sizes,
    Tiles,
    Token,
    Tokenwise,
    TopK,
    TopP,
    Window,
)
from dit_accel.method.parts import Grid, part_types
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call
from dit_accel.operator.cost import kept_density, multiply_adds, passes
from dit_accel.operator.layout import coordinates, joint_partition
from dit_accel.patch.heads import Layer, parameters_of
from dit_accel.patch.state import operators_of

SAMPLE = Path(__file__).parents[1] / "samples" / "new_part.py"
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(dit_accel, "builtin_pipeline", tiny_pipe)
    NEW = runpy.run_path(str(SAMPLE))
TRIED: dict[Any, tuple[Any, ...]] = {
    float: (2.5, 0.4),
    int: (2,),
    bool: (False,),
    Rest: (Linear(),),
    Blockwise: (DiscBlocks(5.0),),
}  # values of fields that have no default
BLOCKS = (Tiles((4, 4)), Raster())
IN_LINEAR: dict[type[Part], str] = {Features: "feature_map", KeyWeight: "weights", Readout: "readout"}  # slots that are its fields
RAGGED = {
    "11x14-text-5": Shape(1, 2, 16, (1, 11, 14), 5),
    "video": Shape(2, 1, 24, (3, 5, 9)),
    "references-text-last": Shape(1, 2, 16, (1, 9, 6), 3, False, ((1, 7, 5),)),
}


def valid(make: Callable[..., Any], *choices: Any) -> Iterator[Any]:
    """What `make` makes of every combination of choices that it does not refuse."""
    for chosen in itertools.product(*choices):
        try:
            yield make(*chosen)
        except ValueError:
            continue


def words(hint: Any) -> tuple[Any, ...]:
    """The values of a field that names them."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def instances(kind: type[Part]) -> Iterator[Part]:
    """A part with values for the fields that must be given, and with each of its flags and words the other way."""
    hints = typing.get_type_hints(kind)
    needed = [field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]  # type: ignore[arg-type]
    values = [next((x for type_, x in TRIED.items() if type_ in (hints[name], *typing.get_args(hints[name]))), ()) for name in needed]
    for part in valid(lambda *given: kind(**dict(zip(needed, given, strict=True))), *values):
        yield part
        for field in dataclasses.fields(part):  # type: ignore[arg-type]
            for other in (not getattr(part, field.name),) if isinstance(getattr(part, field.name), bool) else words(hints[field.name]):
                if other != getattr(part, field.name):
                    yield from valid(functools.partial(dataclasses.replace, part, **{field.name: other}))


def of(slot: type[Part]) -> list[Any]:
    return [part for kind in part_types(slot).values() for part in instances(kind)]


def around(part: Part) -> AttentionSpec:
    """The first spec that takes the part."""
    top, block = TopK(0.3), lambda order: (order.block or 16,) * 2

    def spec(keep: tuple[Any, ...], rest: Any, merge: Any, order: Any) -> AttentionSpec:
        return AttentionSpec(keep, rest, merge, order, block(order))

    nothing: list[Any] = [None]
    if isinstance(part, Pattern):
        found = valid(spec, [(part,)], nothing, nothing, BLOCKS)
    elif isinstance(part, Score):
        found = valid(spec, [(dataclasses.replace(top, score=part),)], nothing, nothing, BLOCKS)
    elif isinstance(part, Rest):
        found = valid(spec, [(top,)], [part], of(Merge), BLOCKS)
    elif isinstance(part, Merge):
        found = valid(spec, [(top,)], [Linear(), *of(Rest)], [part], BLOCKS)
    elif name := next((field for slot, field in IN_LINEAR.items() if isinstance(part, slot)), ""):
        found = valid(spec, [(top,)], [Linear(**{"feature_map": "elu", name: part})], of(Merge), BLOCKS)  # type: ignore[arg-type]
    elif isinstance(part, Extra):
        found = valid(lambda order: AttentionSpec((top,), order=order, block=(16, 16), extras=(part,)), [Tiles((4, 4))])
    else:
        found = valid(lambda order: AttentionSpec((top,), order=order, block=(order.block or 16,) * 2), [part, Tiles((4, 4))])
    return next(found)


SPECS = {name: around(next(instances(kind))) for name, kind in part_types().items() if kind.__module__.startswith("dit_accel.")}
SPECS |= {name: around(next(instances(NEW[name]))) for name in ("Cross", "MeanOfRest")} | {"samples/new_part.py": NEW["SPEC"]}
FIRST = {
    "first-order": Pooled(parts=2, order=1),
    "four-parts": Pooled(variance=False, parts=4, order=1),
    "grouped": Pooled(parts=2, order=1, opened=1),
}
SPECS |= {name: AttentionSpec((DiscBlocks(2.5),), rest, Mass(), Tiles((4, 4)), (16, 16)) for name, rest in FIRST.items()}
SPECS |= {"two-parts": around(Pooled(parts=2)), "marginal": around(Linear("elu", "marginal", 0.4))}
SPECS |= {str(part): around(part) for slot in IN_LINEAR for kind in part_types(slot).values() for part in [*instances(kind)][1:]}
RESTS: dict[str, Part] = {
    "decayed-by-alibi": Decayed("relu", "alibi"),
    "estimated-token": Token("estimated"),
    "scan-with-decay": DeltaScan(decay=True),
    "two-routes": Routed(2, "elu"),
    "simple-norm": Norm("simple"),
    "norm-of-two": Norm("l2"),
    "mass-by-query": Mass("query"),
}
SPECS |= {name: around(part) for name, part in RESTS.items()}
SPECS |= {"two-parts": around(Pooled(parts=2)), "four-clusters": around(Clusters(4))}
CHOSEN = {
    "narrow-pyramid": TopK(0.2, score=Pyramid((2, 3), keep=0.4)),
    "mass-of-the-estimate": TopP(0.7, at_most=0.6, score=Estimated(cap=1.0)),
    "salient-columns": Columns(0.4, SelfSaliency()),
    "columns-of-a-gate": Columns(0.4, Gate()),
}
SPECS |= {name: AttentionSpec((keep,), Pooled(), Mass(), Tiles((4, 4)), (16, 16)) for name, keep in CHOSEN.items()}
every_part = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_shape = pytest.mark.parametrize("shape", RAGGED.values(), ids=RAGGED)


def test_every_registered_part_is_tried() -> None:
    slots = (Pattern, Score, Rest, *IN_LINEAR, Merge, Extra, Order)
    assert {name for slot in slots for name in part_types(slot)} == set(part_types())
    tried = {type(part).__name__ for spec in SPECS.values() for part in spec.parts()}
    assert {name for name, kind in part_types().items() if kind.__module__.startswith("dit_accel.")} <= tried


@every_part
def test_json_pickle_and_text(spec: AttentionSpec) -> None:
    assert AttentionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert hash(AttentionSpec.from_dict(spec.to_dict())) == hash(spec)
    if all(type(part).__module__.startswith("dit_accel.") for part in spec.parts()):  # a script's classes are not
        assert pickle.loads(pickle.dumps(spec)) == spec
    assert all(type(part).__name__ in str(spec) for part in spec.parts() if part not in (Mass(), TopK(0.3).score, Columns(0.3).score))


@every_shape
@every_part
def test_the_cpu_kernels_equal_the_reference(spec: AttentionSpec, shape: Shape) -> None:
    results = []
    for backend, dtype in (("cpu", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        function, params = attention_by(backend, spec, shape.layout), random_parameters(spec, shape, dtype)
        with torch.no_grad():
            found = function(shape.inputs(dtype), params)
        results.append([*found, flat(gradients(function, spec, shape, dtype))])
    for got, exact, eager, name in zip(*results, ("output", "lse", "gradients"), strict=True):
        assert_close_as_eager(got, exact.double(), eager, name)


@every_part
def test_a_head_does_not_depend_on_the_others(spec: AttentionSpec) -> None:
    """Nor on its number among them: a process of several has some of a layer's heads, and others may have another method."""
    shape, layer = dataclasses.replace(RAGGED["11x14-text-5"], heads=3), Layer("attn", 3, RAGGED["11x14-text-5"].head_dim, image_only=False)
    params, qkv = spec.make_parameters(heads=3, head_dim=shape.head_dim), shape.inputs()
    with torch.no_grad():
        every = attention(*qkv, spec, shape.layout, params=params, backend="reference")
        some = [x[:, 1:] for x in qkv]
        own = attention(*some, spec, shape.layout, params=parameters_of(params, spec, layer, (1, 2)), backend="reference")
    torch.testing.assert_close(own, every[:, 1:], rtol=1e-4, atol=1e-5)


@every_part
def test_gradients_are_those_of_the_output(spec: AttentionSpec) -> None:
    """Of a step into a random direction, in float64."""
    shape = RAGGED["11x14-text-5"]
    function, params, qkv = (
        attention_by("reference", spec, shape.layout),
        random_parameters(spec, shape, torch.float64),
        shape.inputs(torch.float64, grad=True),
    )
    learned = dict(params.named_parameters())
    seed = torch.Generator().manual_seed(1)
    tensors = [*qkv, *learned.values()]
    steps = [torch.randn(x.shape, generator=seed, dtype=torch.float64) for x in tensors]
    out = function(qkv, params)[0]
    pull = torch.randn(out.shape, generator=seed, dtype=torch.float64)
    grads = torch.autograd.grad(out, tensors, pull, allow_unused=True)
    said = sum((g * step).sum() for g, step in zip(grads, steps, strict=True) if g is not None)

    def at(t: float) -> Tensor:
        with torch.no_grad():
            moved = [x + t * step for x, step in zip(tensors, steps, strict=True)]
            other = random_parameters(spec, shape, torch.float64)
            for parameter, value in zip(other.parameters(), moved[3:], strict=True):
                parameter.copy_(value)
            return (function(moved[:3], other)[0] * pull).sum()

    torch.testing.assert_close(said, (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5, atol=1e-6)


TOKENWISE = {name: spec for name, spec in SPECS.items() if any(isinstance(p, Tokenwise) for p in spec.keep)}


@every_shape
@pytest.mark.parametrize("spec", TOKENWISE.values(), ids=TOKENWISE)
def test_a_pattern_of_tokens_is_what_it_allows(spec: AttentionSpec, shape: Shape) -> None:
    """Dense attention under the mask of all pairs; so `visits` misses no block, and calls none whole that is not."""
    layout, (pattern,) = dataclasses.replace(shape.layout, text=0), spec.tokenwise
    places = [F.pad(coordinates(grid, torch.arange(grid[0] * grid[1] * grid[2])), (0, 1), value=n) for n, grid in enumerate(layout.grids)]
    every = torch.cat(places)
    q, k, v = (x[:, :, : layout.image] for x in shape.inputs(torch.float64))
    expected = F.scaled_dot_product_attention(q, k, v, pattern.allowed(every, every, layout.grids))
    torch.testing.assert_close(attention(q, k, v, spec, layout), expected, rtol=1e-11, atol=1e-11)


STATIC = {name: spec for name, spec in SPECS.items() if spec.static} | {
    name: dataclasses.replace(SPECS["Disc"], keep=keep)
    for name, keep in {"two": (Disc(3.0), Window((1, 3), dilation=(1, 2))), "whole blocks": (DiscBlocks(2.0), FirstFrames(2))}.items()
}
LONG = {"5-frames": ((5, 24, 40),), "references": ((1, 40, 33), (1, 24, 16)), "one-row": ((1, 1, 700),)}


@pytest.mark.parametrize("grids", LONG.values(), ids=LONG)
@pytest.mark.parametrize("spec", STATIC.values(), ids=STATIC)
def test_lists_are_those_of_every_pair_of_blocks(spec: AttentionSpec, grids: tuple[Grid, ...]) -> None:
    """However many query blocks a plan looks at together."""
    found = make_plan(spec, TokenLayout(grids[0], references=grids[1:]), torch.device("cpu"))
    part = joint_partition(grids, spec.order, spec.block[0])
    raster = torch.cat([F.pad(coordinates(grid, torch.arange(math.prod(grid))), (0, 1), value=n) for n, grid in enumerate(grids)])
    inside = [raster[part.order][a:b] for a, b in itertools.pairwise(part.starts.tolist())]
    low, high = (torch.stack([getattr(block[:, :3], edge)(0) for block in inside]) for edge in ("amin", "amax"))
    visited, full = torch.zeros(2, len(inside), len(inside), dtype=torch.bool)
    for number, block in enumerate(inside):
        own = slice(number, number + 1)
        for pattern in spec.static:
            seen, every = pattern.visits(grids[int(block[0, 3])], (low[own], high[own], low, high))
            visited[number] |= seen[0]
            full[number] |= every[0]
    assert found.static is not None
    assert torch.equal(found.static.kept(len(inside)), visited)
    partial = torch.zeros_like(found.static.valid) if found.static.partial is None else found.static.partial
    assert torch.equal(dataclasses.replace(found.static, valid=found.static.valid & ~partial).kept(len(inside)), visited & full)


def whole(spec: AttentionSpec) -> AttentionSpec | None:
    """The same with every block kept, where that leaves dense attention at the start values."""
    if spec.rest is not None and not spec.rest.whole_blocks:
        return None
    score = spec.selection.score if spec.selection else TopK(1.0).score
    return dataclasses.replace(spec, keep=(TopK(1.0, score=score),))


WHOLE = {name: made for name, spec in SPECS.items() if not spec.static and (made := whole(spec)) is not None}


@pytest.mark.parametrize("spec", WHOLE.values(), ids=WHOLE)
def test_all_kept_is_dense_attention(spec: AttentionSpec) -> None:
    shape = RAGGED["11x14-text-5"]
    q, k, v = shape.inputs(torch.float64)
    out = attention(q, k, v, spec, shape.layout)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", list(part_types(Selection).values()), ids=lambda kind: kind.__name__)
def test_a_selection_keeps_at_most_what_it_says(kind: type[Selection]) -> None:
    pattern: Any = next(instances(kind))
    shape = RAGGED["11x14-text-5"]
    spec = AttentionSpec((pattern,), order=Tiles((4, 4)), block=(16, 16))
    q, k, v = shape.inputs()
    plan = make_plan(spec, shape.layout, torch.device("cpu"))
    call: Call = image_call(q, k, v, shape.layout, plan, spec.start_values(heads=2, head_dim=16), 0.25)
    lists = pattern.choose(call)
    blocks = len(plan.k_blocks.count)
    held = lists.valid.sum(-1)
    assert int(held.min()) >= 1
    assert int(held.max()) <= pattern.count(blocks) <= max(1, round(pattern.share * blocks))
    assert len({(row, *sorted(index)) for row, index in enumerate(lists.index.flatten(0, -2).tolist())}) == lists.index[..., 0].numel()
    assert all(len(set(index)) == len(index) for index in lists.index.flatten(0, -2).tolist())
    assert not lists.index.requires_grad


@every_part
def test_bfloat16_stays_finite(spec: AttentionSpec) -> None:
    shape = RAGGED["11x14-text-5"]
    qkv = [(4 * x).detach().requires_grad_() for x in shape.inputs(torch.bfloat16)]
    params = spec.make_parameters(heads=2, head_dim=16)
    out, lse = attention_by("cpu", spec, shape.layout)(qkv, params)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(x.isfinite().all() for x in (out, lse, *(x.grad for x in (*qkv, *params.parameters()) if x.grad is not None)))


@every_part
def test_its_cost_is_counted(spec: AttentionSpec) -> None:
    layout = TokenLayout((1, 32, 32))
    sizes = Sizes(1024, 64, 64, 64)
    costs = [part.cost(sizes) for part in spec.parts()]
    assert all(cost.multiply_adds >= 0 and cost.passes >= 0 for cost in costs)
    in_torch = isinstance(spec.rest, Linear) and not spec.rest.plain  # which writes features, and blocks' means once more
    assert 4 <= passes(spec) <= (14 if in_torch else 12 if spec.extras or spec.find(PreConv) else 8)
    added = sum(part.cost(sizes).multiply_adds for part in (*spec.keep, spec.rest, spec.merge, *spec.extras) if part is not None)
    assert multiply_adds(spec, layout, 64) >= kept_density(spec, layout) > 0
    assert (added > 0) == (spec.rest is not None or spec.selection is not None or bool(spec.extras))


def wan() -> Tiny:
    """With heads that the compiled kernels take."""
    tiny = Tiny("wan")
    config = {**tiny.pipe.transformer.config, "attention_head_dim": 16}
    tiny.pipe.transformer = type(tiny.pipe.transformer).from_config(config).eval()
    fill_randomly(tiny.pipe.transformer)
    return tiny


MODELS: dict[str, tuple[Callable[[], Tiny], dict[str, Any]]] = {
    "flux": (lambda: Tiny("flux"), {}),
    "wan": (wan, {"height": 128, "width": 96, "num_frames": 1}),
}


@pytest.mark.parametrize("model", MODELS)
@every_part
def test_a_model_runs_with_it_and_its_adapter_loads_again(spec: AttentionSpec, model: str, tmp_path: Path) -> None:
    build, call = MODELS[model]
    tiny, other = build(), build()
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    for seed, operator in enumerate(operators_of(tiny.pipe).values()):
        fill_randomly(operator.params, seed)
    drawn = tiny.run(**call)
    dit_accel.save_adapter(tiny.pipe, tmp_path / "adapter")
    dit_accel.load_adapter(other.pipe, tmp_path / "adapter")
    assert other.run(**call).equal(drawn)
    kept = {row.density_kept for row in dit_accel.summary(tiny.pipe, show=False)}
    dit_accel.restore(tiny.pipe)
    assert (relative_error(drawn, tiny.run(**call)) > 1e-4) == (kept != {1.0})


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.gpu)])
def test_the_samples_parts_run_on_every_backend(model: str, backend: str) -> None:
    (build, call), drawn = MODELS[model], {}
    spec = dataclasses.replace(NEW["SPEC"], order=Tiles((4, 4)), block=(16, 16))
    for name in ("reference", backend):
        tiny = build()
        tiny.pipe.to(device_of(backend))  # the rest of the model computes the same on one device
        dit_accel.accelerate(tiny.pipe, spec, strict=True, backend=name)
        drawn[name] = moved(tiny.run(**moved({**tiny.call, **call, "num_inference_steps": 1}, device_of(backend))), CPU)
        for row in dit_accel.summary(tiny.pipe, show=False):
            assert row.density_kept is not None
            assert row.density_kept < 1
            assert ("MeanOfRest and Mass in torch" in row.why) == (name != "reference")
    assert relative_error(drawn[backend], drawn["reference"]) < 1e-5


def test_the_samples_parts_learn_and_compile(tmp_path: Path) -> None:
    pipe, spec = prompt_pipe(), dataclasses.replace(NEW["SPEC"], order=Tiles((4, 4)), block=(16, 16))
    dit_accel.accelerate(pipe, spec)
    distill(pipe, PROMPTS, quick(tmp_path / "run", train="parameters"), progress=False, **CALL)
    learned = [dict(operator.params.named_parameters()) for operator in operators_of(pipe).values()]
    assert all(list(tensors) == ["mean.shift"] and tensors["mean.shift"].abs().min() > 1e-3 for tensors in learned)
    tiny = Tiny("flux")
    dit_accel.accelerate(tiny.pipe, spec, strict=True)
    drawn = tiny.run()
    tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert relative_error(tiny.run(), drawn) < 1e-6
