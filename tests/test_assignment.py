"""Assignments by themselves: which rule wins, JSON and text."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dit_accel import CLEAR, GNA, SLA, Assignment, AttentionSpec, Fovea, Rule
from dit_accel.method.assignment import Moment, Rules, groups, read_method, specs_in, without
from dit_accel.method.text import parse_method

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
        expected = [naive(assignment.rules, layer, head, moment, tokens) for head in range(4)]
        assert [next(g.spec for g in found if head in g.heads) for head in range(4)] == expected
        used = {spec for spec in expected if spec is not None}
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
    "unknown-key": (changed(lambda d: d.update(more=1)), "must have exactly the keys"),
    "missing-key": (changed(lambda d: d.pop("order")), "must have exactly the keys"),
    "unknown-condition": (changed(lambda d: d["rules"][0].update(head=[0])), "a rule must have the key spec and may have layers, heads"),
    "no-spec": (changed(lambda d: d["rules"][0].pop("spec")), "a rule must have the key spec"),
    "number-of-no-spec": (changed(lambda d: d["rules"][0].update(spec=3)), "null or a number in specs"),
    "no-number": (changed(lambda d: d["rules"][0].update(spec=True)), "null or a number in specs"),
    "unused-spec": (changed(lambda d: d["specs"].append(GNA(3).to_dict())), r"no rule of the assignment names its specs \[3\]"),
    "other-order": (changed(lambda d: d.update(order=SLA(0.1).to_dict()["order"])), "order must be that of the specs"),
    "damaged-spec": (changed(lambda d: d["specs"][0].pop("keep")), "a spec must have exactly the keys"),
    "rules-no-list": (changed(lambda d: d.update(rules={})), "rules of an assignment must be a list"),
    "heads": (changed(lambda d: d["rules"][1].update(heads=[])), "heads must be None or different ints"),
}


@pytest.mark.parametrize(("data", "message"), WRONG_JSON.values(), ids=WRONG_JSON)
def test_damaged_json_is_refused(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        Assignment.from_dict(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"plan\.json contains neither a spec nor an assignment"):
        parse_method(str(path))


@pytest.mark.parametrize("text", [None, "{", "[]", "3"])
def test_a_file_without_a_method_is_named(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ValueError, match=r"plan\.json"):
        parse_method(str(tmp_path / "plan.json"))


WRONG: dict[str, tuple[Any, str]] = {
    "spec": (lambda: Rule("fovea"), "a rule's spec must be an AttentionSpec or None"),
    "layers": (lambda: Rule(A, layers=()), "layers must be a pattern"),
    "layer-no-text": (lambda: Rule(A, layers=(1,)), "layers must be a pattern"),
    "heads-twice": (lambda: Rule(A, heads=(1, 1)), "heads must be None or different ints"),
    "heads-negative": (lambda: Rule(A, heads=(-1,)), "heads must be None or different ints"),
    "heads-share": (lambda: Rule(A, heads=0.5), "heads must be None or different ints"),
    "steps-turned": (lambda: Rule(A, steps=(3, 3)), "steps must be None or"),
    "steps-number": (lambda: Rule(A, steps=3), "steps must be None or"),
    "steps-stride": (lambda: Rule(A, steps=range(0, 6, 2)), "steps must be None or"),
    "tokens": (lambda: Rule(A, tokens=(-1, 5)), "tokens must be None or"),
    "noise": (lambda: Rule(A, noise=(0.5, 1.5)), "noise must be None or"),
    "noise-turned": (lambda: Rule(A, noise=(0.5, 0.5)), "noise must be None or"),
    "no-rules": (lambda: Assignment(()), "requires a spec in one rule at least"),
    "no-spec": (lambda: Assignment((Rule(None),)), "requires a spec in one rule at least"),
    "rules": (lambda: Assignment((A,)), "rules must be a tuple of Rule"),
    "orders": (lambda: Assignment((Rule(A), Rule(SLA(0.1), layers="a"))), "must have one order"),
    "given-order": (lambda: Assignment((Rule(A),), order=SLA(0.1).order), "must have one order"),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_rules_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rules_without_a_spec_keep_the_others() -> None:
    rules = Rules((Rule(A), Rule(B, heads=(0,))))
    assert without(rules, frozenset([B])) == (Rule(A), Rule(None, heads=(0,)))
    assert without(rules, frozenset()) is rules


def test_what_a_later_rule_covers_is_not_asked() -> None:
    rules = Assignment((Rule(A), Rule(B, layers="a"), Rule(C, steps=(1, None)), Rule(None, heads=(0,)))).at(Moment(1, 1.0), 9)
    assert rules == (Rule(C, steps=(1, None)), Rule(None, heads=(0,)))
    assert specs_in(rules) == (C,)
