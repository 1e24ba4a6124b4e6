"""What runs under an assignment: every layer and head what it is given, in any family, eager and compiled; and `summary` of it."""

import contextlib
import copy
import dataclasses
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, TEXT, fill_randomly, forward_arguments, relative_error, run, tiny_pipe, tiny_transformer
from test_assignment import A, B, C, naive
from test_families import Tiny, original
from torch import Tensor
from torch._dynamo.utils import counters

import dit_accel
from dit_accel import CLEAR, GNA, SLA, Assignment, AttentionSpec, Fovea, Rule, TokenLayout, attention
from dit_accel.method.assignment import Moment
from dit_accel.operator import guard
from dit_accel.patch.anatomy import attention_layers
from dit_accel.patch.modes import at_moment, running
from dit_accel.patch.state import operators_of

REFUSED: dict[str, tuple[tuple[Rule, ...], str]] = {
    "no-layer": ((Rule(A), Rule(B, layers="blocks.*")), r"no layer is named blocks\.\*: name some of transformer_blocks\.0\.attn"),
    "no-head": ((Rule(A), Rule(B, heads=(0, 2))), r"transformer_blocks\.0\.attn has 2 heads, numbered from 0"),
    "shapes": (
        (Rule(CLEAR(3.0, downsample=2)), Rule(CLEAR(3.0, downsample=4), heads=(0,))),
        r"share what they learn by name, but .* has spatial_weight of the shape \(4, 4\)",
    ),
}


@pytest.mark.parametrize(("rules", "message"), REFUSED.values(), ids=REFUSED)
def test_an_assignment_that_does_not_fit_changes_nothing(rules: tuple[Rule, ...], message: str, pipe: Any) -> None:
    before = {name: type(module) for name, module in pipe.transformer.named_modules()}
    with pytest.raises(ValueError, match=message):
        dit_accel.accelerate(pipe, Assignment(rules))
    assert {name: type(module) for name, module in pipe.transformer.named_modules()} == before
    assert not hasattr(pipe.transformer, "_dit_accel")


# What runs


@contextlib.contextmanager
def watched(transformer: Any) -> Iterator[list[tuple[str, tuple[Any, ...], Tensor]]]:
    """Layer, arguments and output of every call of an operator."""
    calls: list[tuple[str, tuple[Any, ...], Tensor]] = []
    hooks = [
        op.register_forward_hook(lambda op, args, out: calls.append((op.name, args, out))) for op in operators_of(transformer).values()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


MIXED = Assignment(
    (
        Rule(SLA(0.3, tile=(4, 4)), heads=(0, 2)),
        Rule(Fovea(0.2, tile=(4, 4)), layers="single_*", heads=(1, 3)),
        Rule(CLEAR(3.0, downsample=2, tile=(4, 4)), layers="transformer_blocks.0.*"),
        Rule(GNA(5, tile=(4, 4)), layers="transformer_blocks.0.*", heads=(1,)),
    )
)


def four_heads(assignment: Assignment | None = MIXED, blocks: int = 2, backend: str = "auto") -> Any:
    transformer = tiny_transformer(double=blocks, single=blocks, heads=4)
    if assignment is not None:
        dit_accel.accelerate(transformer, assignment, strict=True, backend=backend)
        for operator in operators_of(transformer).values():
            fill_randomly(operator, seed=1, scale=0.3)
    return transformer


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_head_runs_its_spec_with_its_parameters(backend: str) -> None:
    transformer, layout = four_heads(backend=backend), TokenLayout((1, 9, 14), TEXT)
    with watched(transformer) as calls, torch.no_grad():
        transformer(**forward_arguments(9, 14))
    assert len(calls) == LAYERS
    for name, (q, k, v, scale, mask), out in calls:
        operator = operators_of(transformer)[name]
        for head in range(4):
            q1, k1, v1 = (x[:, head : head + 1] for x in (q, k, v))
            spec = naive(MIXED.rules, name, head, Moment(0, 1.0), 9 * 14)
            if spec is None:
                expected = F.scaled_dot_product_attention(q1, k1, v1, scale=scale)
            else:
                own = spec.make_parameters(heads=1, head_dim=q.shape[3])
                learned = dict(operator.params.named_parameters())
                with torch.no_grad():
                    for key, parameter in own.named_parameters():
                        value = learned[key]
                        parameter.copy_(value if value.shape == parameter.shape else value[head : head + 1])
                expected = attention(q1, k1, v1, spec, layout, params=own, scale=scale)
            assert mask is None
            assert relative_error(out[:, head : head + 1], expected) < 1e-5, (name, head)


def test_a_layer_learns_the_union_of_what_its_specs_learn() -> None:
    names = {name: {k for k, _ in op.params.named_parameters()} for name, op in operators_of(four_heads()).items()}
    assert names["transformer_blocks.0.attn"] == {"spatial_weight"}  # its other rules are covered
    assert names["transformer_blocks.1.attn"] == {"proj.weight", "proj.bias"}
    assert names["single_transformer_blocks.0.attn"] == {"proj.weight", "proj.bias", "offset"}
    assert operators_of(four_heads())["single_transformer_blocks.1.attn"].params.offset.shape == (4,)


def test_gradients_reach_every_spec_that_runs() -> None:
    transformer = four_heads()
    transformer(**forward_arguments(9, 14)).sample.square().sum().backward()
    for name, operator in operators_of(transformer).items():
        for key, parameter in operator.params.named_parameters():
            assert parameter.grad is not None, (name, key)
            assert bool(parameter.grad.any()), (name, key)
    offset = operators_of(transformer)["single_transformer_blocks.0.attn"].params.offset
    assert (offset.grad != 0).tolist() == [False, True, False, True]  # of the heads that have the spec


@pytest.mark.parametrize(
    "name", ["flux", "sd3", "wan", "z_image", "hunyuan_video", "chroma", "framepack", "ltx", "lumina2", "pixart_sigma"]
)
def test_keeping_everything_in_some_heads_equals_the_original(name: str) -> None:
    tiny = Tiny(name)
    rules = (Rule(Fovea(1.0, tile=(4, 4)), heads=(0,)), Rule(CLEAR(1000.0, tile=(4, 4)), steps=(1, None)), Rule(None, heads=(1,)))
    dit_accel.accelerate(tiny.pipe, Assignment(rules), strict=True)
    assert relative_error(tiny.run(), original(name)) < 1e-5


@pytest.mark.parametrize("name", ["flux", "sd3", "wan"])
def test_the_original_in_all_layers_but_some(name: str, sparse_calls: list[Any]) -> None:
    tiny = Tiny(name)
    first, *others = attention_layers(tiny.transformers[0])
    dit_accel.accelerate(tiny.pipe, Assignment((Rule(Fovea(0.2, tile=(4, 4)), layers=first),)), strict=True)
    assert set(operators_of(tiny.pipe)) == {first}
    drawn = tiny.run()
    assert len(sparse_calls) > 0
    dit_accel.restore(tiny.pipe)
    dit_accel.accelerate(tiny.pipe, Fovea(0.2, tile=(4, 4)), strict=True, layers=lambda n, _: n == first)
    assert torch.equal(tiny.run(), drawn)
    assert others


def test_steps_noise_and_tokens_decide_forward_by_forward(pipe: Any, sparse_calls: list[Any]) -> None:
    counts = []
    for rule in (
        Rule(A), Rule(A, steps=(1, 3)), Rule(A, noise=(0.0, 0.5)), Rule(A, tokens=(17 * 25, None)), Rule(A, tokens=(0, 17 * 25)),
    ):  # fmt: skip
        dit_accel.accelerate(pipe, Assignment((rule,)), strict=True)
        sparse_calls.clear()
        run(pipe, steps=4)
        counts.append(len(sparse_calls) / LAYERS)
        below = sum(sigma <= 0.5 for sigma in pipe.scheduler.sigmas[:4].tolist())
        dit_accel.restore(pipe)
    assert counts == [4, 2, below, 4, 0]
    assert 0 < below < 4


def test_dense_steps_are_short_for_a_rule() -> None:
    drawn = []
    for spec, dense_steps in ((A, 2), (Assignment((Rule(A), Rule(None, steps=(0, 2)))), 0), (Assignment.of(A), 2)):
        drawn.append(run(dit_accel.accelerate(tiny_pipe(), spec, dense_steps=dense_steps, strict=True), steps=3))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_switching_keeps_what_is_known_of_grids_and_runs(pipe: Any, monkeypatch: pytest.MonkeyPatch, sparse_calls: list[Any]) -> None:
    """Another assignment at every step: the grid is read once, and steps go on being counted."""
    dit_accel.accelerate(pipe, Assignment((Rule(A, steps=(1, None)), Rule(B, steps=(3, None)))), strict=True)
    context, read = pipe.transformer._dit_accel.context, []
    family = dataclasses.replace(context.family, grid=lambda *a: read.append(1) or real(*a))
    real, context.family = context.family.grid, family
    counts: list[int] = []
    with contextlib.ExitStack() as stack:

        def switch(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            counts.append(len(sparse_calls) // LAYERS)
            stack.close()
            stack.enter_context(running(pipe, B if step % 2 else Assignment((Rule(A, steps=(2, None)),))))
            return {}

        run(pipe, steps=6, callback_on_step_end=switch)
    assert counts == [0, 0, 1, 2, 3, 4]  # step 1 has no rule after the switch at the end of step 0, later ones have one
    assert len(read) == 1
    assert context.assignment.rules[0] == Rule(A, steps=(1, None))


def test_another_method_needs_the_parameters_that_the_layers_have(pipe: Any) -> None:
    dit_accel.accelerate(pipe, CLEAR(3.0), strict=True)
    with running(pipe, GNA(5)):
        run(pipe, steps=1)
    with (
        pytest.raises(ValueError, match=r"requires offset of the shape \(2,\)"),
        running(pipe, Assignment((Rule(Fovea(0.1), heads=(0,)),))),
    ):
        pass
    with pytest.raises(ValueError, match=r"no layer is named blocks\.\*"), running(pipe, Assignment((Rule(GNA(5), layers="blocks.*"),))):
        pass
    assert pipe.transformer._dit_accel.context.assignment == Assignment.of(CLEAR(3.0))


def test_forwards_at_a_given_moment(sparse_calls: list[Any]) -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), Assignment((Rule(A, steps=(3, None), noise=(0.0, 0.5)),)))
    ran = []
    for moment in (Moment(3, 0.5), Moment(2, 0.5), Moment(3, 0.6)):
        with at_moment(transformer, moment), torch.no_grad():
            transformer(**forward_arguments())
        ran.append(len(sparse_calls))
        sparse_calls.clear()
    assert ran == [LAYERS, 0, 0]


@pytest.mark.crossover
@pytest.mark.filterwarnings("ignore:dit_accel. the original attention runs")
def test_the_guard_decides_spec_by_spec(pipe: Any, monkeypatch: pytest.MonkeyPatch, sparse_calls: list[Any]) -> None:
    asked = []

    def measured(spec: AttentionSpec, *_: Any) -> guard.Crossover:
        asked.append(spec)
        return guard.Crossover(2.0 if spec == B else 1.0, 1.0)

    monkeypatch.setattr(guard, "measured", measured)
    dit_accel.accelerate(pipe, Assignment((Rule(A), Rule(B, layers="single_*"), Rule(B, heads=(1,)))))
    run(pipe, steps=1)
    assert {*asked} == {A, B}
    assert [shape[1] for shape in sparse_calls] == [1] * 2  # head 0 of the double blocks
    backends = {(row.layer.partition("_")[0], row.method, row.backend) for row in dit_accel.summary(pipe, show=False)}
    assert ("single", str(B), "original") in backends
    assert {backend for _, method, backend in backends if method == str(A)} <= {"cpu", "reference"}
    pipe.transformer._dit_accel.context._reported.clear()
    with pytest.warns(UserWarning, match="in the place of TopK"):
        run(pipe, steps=1)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_run_the_same(way: Any) -> None:
    transformer = four_heads()
    with torch.no_grad():
        expected, twin = transformer(**forward_arguments(9, 14)).sample, way(transformer)
        del transformer
        assert torch.equal(twin(**forward_arguments(9, 14)).sample, expected)
    assert twin._dit_accel.context.assignment == MIXED


# Summary


def test_summary_shows_equal_layers_in_one_row(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    rules = (Rule(A), Rule(B, layers="single_*.0.*", heads=(0,)), Rule(None, layers="transformer_blocks.1.*"), Rule(C, tokens=(9999, None)))
    pipe = dit_accel.accelerate(tiny_pipe(), Assignment(rules), dense_steps=1, strict=True)
    run(pipe, steps=2)
    capsys.readouterr()
    rows = dit_accel.summary(pipe)
    shown = capsys.readouterr().out
    assert "transformer_blocks.0.attn, single_transformer_blocks.0-1.attn (3 layers)" in shown
    assert "the first 1 steps of every run keep the original attention" in shown
    assert "the original attention runs in transformer_blocks.1.attn" in shown
    assert [(row.layer, row.where, row.method) for row in rows if row.layer == "single_transformer_blocks.0.attn"] == [
        ("single_transformer_blocks.0.attn", where, str(spec)) for where, spec in (("", A), ("heads 0", B), ("tokens from 9999", C))
    ]
    assert all(row.density_kept is not None for row in rows)


def test_summary_names_the_layers_that_are_not_accelerated(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pipe = dit_accel.accelerate(tiny_pipe(), Assignment((Rule(A, layers="single_*"),)))
    dit_accel.summary(pipe)
    assert "not accelerated: transformer_blocks.0-1.attn (2 layers)" in capsys.readouterr().out


# Compiled


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_compiled_heads_and_layers_run_their_specs(way: str) -> None:
    transformer = four_heads(Assignment((*MIXED.rules, Rule(None, noise=(0.9, 1.0)))), blocks=1)
    arguments = [forward_arguments(9, 14, time=time) for time in (0.95, 0.7)]
    with torch.no_grad():
        expected = [transformer(**each).sample for each in arguments]
    ours: Any = transformer
    if way == "whole":
        ours = torch.compile(transformer, backend="eager", fullgraph=True)
    else:
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.no_grad():
        got = [ours(**each).sample for each in arguments]
        assert max(relative_error(*pair) for pair in zip(got, expected, strict=True)) < 1e-5
        known = counters["stats"]["unique_graphs"]
        with running(transformer, Assignment(MIXED.rules[1:])):  # other specs for the same layers need no other graph
            assert relative_error(ours(**arguments[1]).sample, expected[1]) > 1e-4
    assert counters["stats"]["unique_graphs"] == known
