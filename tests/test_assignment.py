"""Assignments: which rule wins, JSON and text, and that every layer and head runs what it is given, in any family and compiled."""

import contextlib
import copy
import dataclasses
import itertools
import json
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import LAYERS, TEXT, fill_randomly, forward_arguments, relative_error, run, tiny_pipe, tiny_transformer
from test_families import Tiny, original
from torch import Tensor
from torch._dynamo.utils import counters

import dit_accel
from dit_accel import CLEAR, GNA, SLA, Assignment, AttentionSpec, Fovea, Rule, TokenLayout, attention
from dit_accel.method.assignment import Moment, groups, read_method, specs_in, without
from dit_accel.method.text import parse_method
from dit_accel.operator import guard
from dit_accel.patch.anatomy import attention_layers
from dit_accel.patch.modes import at_moment, running
from dit_accel.patch.state import operators_of

A, B, C = Fovea(0.1), Fovea(0.3), CLEAR(3.0)
EVERY = Assignment(
    (
        Rule(A),
        Rule(B, layers=("single_*", "transformer_blocks.1.attn"), heads=(3, 1, 0)),
        Rule(None, steps=range(2)),
        Rule(C, noise=(0.2, 0.7), tokens=(64, None)),
    )
)

# Rules


def naive(rules: tuple[Rule, ...], layer: str, head: int, moment: Moment, tokens: int) -> AttentionSpec | None:
    """The last rule that fits, condition by condition."""
    found = None
    for rule in rules:
        patterns = [p[:-1] if p.endswith("*") else p for p in rule.layers]
        fits = [
            any(layer.startswith(p) if q.endswith("*") else layer == p for p, q in zip(patterns, rule.layers, strict=True)),
            rule.heads is None or head in rule.heads,
            rule.steps is None or moment.step in range(rule.steps[0], 99 if rule.steps[1] is None else rule.steps[1]),
            rule.noise is None or rule.noise[0] < moment.noise <= rule.noise[1],
            rule.tokens is None or tokens in range(rule.tokens[0], 999 if rule.tokens[1] is None else rule.tokens[1]),
        ]
        if all(fits):
            found = rule.spec
    return found


def any_rule(draw: random.Random, spec: AttentionSpec | None) -> Rule:
    heads = tuple(draw.sample(range(4), draw.randint(1, 3)))
    low = draw.randint(0, 3)
    return Rule(
        spec,
        layers=draw.choice(["*", "a.*", "b.1", ("a.0", "b.*")]),
        heads=draw.choice([None, heads]),
        steps=draw.choice([None, (low, None), (low, low + 2)]),
        noise=draw.choice([None, (0.0, 0.5), (0.5, 1.0)]),
        tokens=draw.choice([None, (10, 20), (15, None)]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_the_last_rule_that_fits_wins(seed: int) -> None:
    draw = random.Random(seed)
    assignment = Assignment(tuple(any_rule(draw, spec) for spec in draw.sample([A, B, C, None, None], 4)))
    layers, moments = ["a.0", "a.1", "b.0", "b.1"], [Moment(step, noise) for step in range(6) for noise in (0.25, 0.5, 1.0)]
    for layer, moment, tokens in itertools.product(layers, moments, (5, 10, 16, 20)):
        found = groups(assignment.at(moment, tokens), layer, 4)
        assert sorted(head for group in found for head in group.heads) == [0, 1, 2, 3]
        wanted = [naive(assignment.rules, layer, head, moment, tokens) for head in range(4)]
        assert [next(g.spec for g in found if head in g.heads) for head in range(4)] == wanted
        used = {spec for spec in wanted if spec is not None}
        assert used <= set(assignment.specs_of(layer))


def test_what_no_rule_fits_is_the_original() -> None:
    assignment = Assignment((Rule(A, layers="a", steps=(1, 2)),))
    assert groups(assignment.at(Moment(0, 1.0), 9), "a", 2) == ((None, (0, 1)),)
    assert groups(assignment.at(Moment(1, 1.0), 9), "a", 2) == ((A, (0, 1)),)
    assert groups(assignment.at(None, 9), "a", 2) == ((None, (0, 1)),)  # a moment that is not known
    assert assignment.specs_of("b") == ()


def test_a_rule_that_a_later_one_covers_is_no_rule_of_the_layer() -> None:
    assignment = Assignment((Rule(A), Rule(B, layers="a", steps=(2, 5)), Rule(C, layers="a", steps=(1, None))))
    assert assignment.rules_of("a") == (assignment.rules[0], assignment.rules[2])
    assert assignment.rules_of("b") == (assignment.rules[0],)
    assert Assignment((Rule(A), Rule(C))).specs_of("a") == (C,)


def test_one_spec_is_an_assignment_of_one_rule() -> None:
    one, late = Assignment.of(A), Assignment.of(A, dense_steps=3)
    assert (one.spec, one.dense_steps, str(one), one.record()) == (A, 0, str(A), A.to_dict())
    assert (late.spec, late.dense_steps, late.after_dense_steps, late.record()) == (A, 3, one, A.to_dict())
    assert late == Assignment((Rule(A), Rule(None, steps=(0, 3))))
    assert Assignment.of(EVERY) is EVERY
    assert (EVERY.spec, EVERY.dense_steps, EVERY.record()) == (None, 0, EVERY.to_dict())
    assert Assignment.of(EVERY, dense_steps=1).after_dense_steps == EVERY


# Text and JSON


def test_text_says_where_and_what() -> None:
    assert str(EVERY) == (
        f"everywhere: {A}; single_* or transformer_blocks.1.attn, heads 0-1, 3: {B}; steps 0 to 1: original; "
        f"noise 0.2 to 0.7, tokens from 64: {C}"
    )
    assert str(Rule(None, steps=(2, 3), tokens=(0, 100))) == "step 2, tokens 0 to 99: original"


def test_json_gives_the_same_assignment(tmp_path: Path) -> None:
    path = EVERY.save(tmp_path / "plan.json")
    assert Assignment.load(path) == EVERY == parse_method(str(path)) == Assignment.from_dict(json.loads(json.dumps(EVERY.to_dict())))
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]  # nothing temporary is left
    alone = tmp_path / "spec.JSON"
    alone.write_text(json.dumps(C.to_dict()))
    assert (parse_method(f" {alone} "), read_method(alone), Assignment.load(alone)) == (C, C, Assignment.of(C))


def changed(change: Any) -> dict[str, Any]:
    data = EVERY.to_dict()
    change(data)
    return data


WRONG_JSON: dict[str, tuple[Any, str]] = {
    "unknown-key": (changed(lambda d: d.update(more=1)), "has exactly the keys"),
    "missing-key": (changed(lambda d: d.pop("order")), "has exactly the keys"),
    "unknown-condition": (changed(lambda d: d["rules"][0].update(head=[0])), "a rule has the key spec and some of layers, heads"),
    "no-spec": (changed(lambda d: d["rules"][0].pop("spec")), "a rule has the key spec"),
    "number-of-no-spec": (changed(lambda d: d["rules"][0].update(spec=3)), "null or a number in specs"),
    "no-number": (changed(lambda d: d["rules"][0].update(spec=True)), "null or a number in specs"),
    "unused-spec": (changed(lambda d: d["specs"].append(GNA(3).to_dict())), r"no rule of the assignment names its specs \[3\]"),
    "other-order": (changed(lambda d: d.update(order=SLA(0.1).to_dict()["order"])), "order is that of the specs"),
    "damaged-spec": (changed(lambda d: d["specs"][0].pop("keep")), "a spec has exactly the keys"),
    "rules-no-list": (changed(lambda d: d.update(rules={})), "rules of an assignment is a list"),
    "heads": (changed(lambda d: d["rules"][1].update(heads=[])), "heads is None or some different ints"),
}


@pytest.mark.parametrize(("data", "message"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_damaged_json_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Assignment.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"plan\.json holds neither a spec nor an assignment"):
        parse_method(str(path))


@pytest.mark.parametrize("text", [None, "{", "[]", "3"])
def test_a_file_without_a_method_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json"):
        parse_method(str(tmp_path / "plan.json"))


WRONG: dict[str, tuple[Any, str]] = {
    "spec": (lambda: Rule("fovea"), "a rule's spec is an AttentionSpec or None"),
    "layers": (lambda: Rule(A, layers=()), "layers is a pattern"),
    "layer-no-text": (lambda: Rule(A, layers=(1,)), "layers is a pattern"),
    "heads-twice": (lambda: Rule(A, heads=(1, 1)), "heads is None or some different ints"),
    "heads-negative": (lambda: Rule(A, heads=(-1,)), "heads is None or some different ints"),
    "heads-share": (lambda: Rule(A, heads=0.5), "heads is None or some different ints"),
    "steps-turned": (lambda: Rule(A, steps=(3, 3)), "steps is None or"),
    "steps-number": (lambda: Rule(A, steps=3), "steps is None or"),
    "steps-stride": (lambda: Rule(A, steps=range(0, 6, 2)), "steps is None or"),
    "tokens": (lambda: Rule(A, tokens=(-1, 5)), "tokens is None or"),
    "noise": (lambda: Rule(A, noise=(0.5, 1.5)), "noise is None or"),
    "noise-turned": (lambda: Rule(A, noise=(0.5, 0.5)), "noise is None or"),
    "no-rules": (lambda: Assignment(()), "requires a spec in one rule at least"),
    "no-spec": (lambda: Assignment((Rule(None),)), "requires a spec in one rule at least"),
    "rules": (lambda: Assignment((A,)), "rules is a tuple of Rule"),
    "orders": (lambda: Assignment((Rule(A), Rule(SLA(0.1), layers="a"))), "share one order"),
    "given-order": (lambda: Assignment((Rule(A),), order=SLA(0.1).order), "share one order"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_rules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


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


def four_heads(assignment: Assignment | None = MIXED, blocks: int = 2) -> Any:
    transformer = tiny_transformer(double=blocks, single=blocks, heads=4)
    if assignment is not None:
        dit_accel.accelerate(transformer, assignment, strict=True)
        for operator in operators_of(transformer).values():
            fill_randomly(operator, seed=1, scale=0.3)
    return transformer


def test_every_head_runs_its_spec_with_its_parameters() -> None:
    transformer, layout = four_heads(), TokenLayout((1, 9, 14), TEXT)
    with watched(transformer) as calls, torch.no_grad():
        transformer(**forward_arguments(9, 14))
    assert len(calls) == LAYERS
    for name, (q, k, v, scale, mask), out in calls:
        operator = operators_of(transformer)[name]
        for head in range(4):
            q1, k1, v1 = (x[:, head : head + 1] for x in (q, k, v))
            spec = naive(MIXED.rules, name, head, Moment(0, 1.0), 9 * 14)
            if spec is None:
                wanted = F.scaled_dot_product_attention(q1, k1, v1, scale=scale)
            else:
                own = spec.make_parameters(heads=1, head_dim=q.shape[3])
                learned = dict(operator.params.named_parameters())
                with torch.no_grad():
                    for key, parameter in own.named_parameters():
                        value = learned[key]
                        parameter.copy_(value if value.shape == parameter.shape else value[head : head + 1])
                wanted = attention(q1, k1, v1, spec, layout, params=own, scale=scale)
            assert mask is None
            assert relative_error(out[:, head : head + 1], wanted) < 1e-5, (name, head)


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
    pipe.transformer._dit_accel.context._said.clear()
    with pytest.warns(UserWarning, match="in the place of TopK"):
        run(pipe, steps=1)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_run_the_same(way: Any) -> None:
    transformer = four_heads()
    with torch.no_grad():
        wanted, twin = transformer(**forward_arguments(9, 14)).sample, way(transformer)
        del transformer
        assert torch.equal(twin(**forward_arguments(9, 14)).sample, wanted)
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
        wanted = [transformer(**each).sample for each in arguments]
    ours: Any = transformer
    if way == "whole":
        ours = torch.compile(transformer, backend="eager", fullgraph=True)
    else:
        transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.no_grad():
        got = [ours(**each).sample for each in arguments]
        assert max(relative_error(*pair) for pair in zip(got, wanted, strict=True)) < 1e-5
        known = counters["stats"]["unique_graphs"]
        with running(transformer, Assignment(MIXED.rules[1:])):  # other specs for the same layers need no other graph
            assert relative_error(ours(**arguments[1]).sample, wanted[1]) > 1e-4
    assert counters["stats"]["unique_graphs"] == known


def test_rules_without_a_spec_keep_the_others() -> None:
    rules = (Rule(A), Rule(B, heads=(0,)))
    assert without(rules, [B]) == (Rule(A), Rule(None, heads=(0,)))
    assert without(rules, []) is rules


def test_what_a_later_rule_covers_is_not_asked() -> None:
    rules = Assignment((Rule(A), Rule(B, layers="a"), Rule(C, steps=(1, None)), Rule(None, heads=(0,)))).at(Moment(1, 1.0), 9)
    assert rules == (Rule(C, steps=(1, None)), Rule(None, heads=(0,)))
    assert specs_in(rules) == (C,)
