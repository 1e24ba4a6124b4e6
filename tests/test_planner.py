"""What plans are made from: error curves against real substitutions, the knapsack against every choice, and the file."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LAYERS, forward_arguments, tiny_transformer
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, Assignment, AttentionSpec, Fovea
from dit_accel.errors import PlanError
from dit_accel.finetune.data.collect import Forward
from dit_accel.finetune.velocity import predict
from dit_accel.measure.capture import Captured, attending, original_attention
from dit_accel.method.assignment import Moment
from dit_accel.method.text import parse_method
from dit_accel.operator.attention import attention
from dit_accel.operator.cost import kept_pairs
from dit_accel.operator.layout import TokenLayout
from dit_accel.planner import curves, levels
from dit_accel.planner.candidates import default_candidates, multiply_adds, seconds
from dit_accel.planner.choose import Knapsack, Unit
from dit_accel.planner.names import short_name
from dit_accel.planner.record import Plan
from dit_accel.planner.verified import interval_of

EXAMPLE = Path(__file__).with_name("plan_example.json")
SPECS = (None, Fovea(0.05, tile=(4, 4)), Fovea(0.3, tile=(4, 4)), CLEAR(2.0, tile=(4, 4)))
PROBES = 16


def recorded(seed: int = 0, **arguments: Any) -> Forward:
    return Forward(forward_arguments(9, 14, seed=seed, **arguments), torch.empty(0), torch.empty(0), "", seed, 0)


def substituted(transformer: Any, forward: Forward, layer: str, head: int, spec: AttentionSpec) -> Tensor:
    """The prediction with a spec in one head of one layer, and exact attention everywhere else."""

    def attend(captured: Captured) -> Tensor:
        out = original_attention(captured)
        if captured.layer == layer:
            out[:, head] = attention(captured.query, captured.key, captured.value, spec, captured.layout, scale=captured.scale)[:, head]
        return out

    with torch.no_grad(), attending(transformer, attend):
        return predict(transformer, forward.arguments)


def ranks(values: Any) -> Any:
    return np.argsort(np.argsort(np.asarray(values)))


# Curves


@pytest.mark.parametrize("batch", [1, 2])  # guidance in two passes, and in one
def test_curves_are_what_substitutions_do(batch: int) -> None:
    transformer, forward = tiny_transformer(), recorded(batch=batch)
    with curves.prepared(transformer, SPECS[1]) as ready:
        found = curves.measure(ready, forward, SPECS, probes=PROBES, seed=0)
        exact = predict(ready, forward.arguments).detach()
        truth, estimate = [], []
        for layer, own in found.curves.items():
            for head, number in itertools.product(range(2), range(1, len(SPECS))):
                changed = substituted(ready, forward, layer, head, SPECS[number])  # type: ignore[arg-type]
                truth.append(float((changed - exact).square().sum() / exact.square().sum()))
                estimate.append(float(own[head, number]))
    assert len(found.curves) == LAYERS
    assert all(bool((own[:, 0] == 0).all()) for own in found.curves.values())  # the original attention
    assert np.corrcoef(ranks(truth), ranks(estimate))[0, 1] > 0.9
    ratio = np.log(np.array(estimate) / np.array(truth))
    assert abs(ratio.mean()) < 0.3
    assert ratio.std() < 0.6


def test_measuring_leaves_the_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradient checkpointing, which large models are measured under, gives the same curves."""
    transformer, forward = tiny_transformer(), recorded()
    transformer.requires_grad_(True)
    next(transformer.parameters()).grad = torch.ones_like(next(transformer.parameters()))
    before = {name: type(module) for name, module in transformer.named_modules()}
    found = []
    for large in (2**31, 0):
        monkeypatch.setattr(curves, "LARGE", large)
        with curves.prepared(transformer, SPECS[1]) as ready:
            assert ready.is_gradient_checkpointing == (large == 0)
            found.append(curves.measure(ready, forward, SPECS, probes=2, seed=0).curves)
    for name, own in found[0].items():
        torch.testing.assert_close(found[1][name], own)
    assert {name: type(module) for name, module in transformer.named_modules()} == before
    assert not transformer.is_gradient_checkpointing
    assert all(parameter.requires_grad for parameter in transformer.parameters())
    assert bool((next(transformer.parameters()).grad == 1).all())


def test_calls_that_are_not_accelerated_are_refused() -> None:
    forward = recorded()
    forward.arguments["img_ids"] = forward.arguments["img_ids"].flip(0)  # no raster
    refused = pytest.raises(PlanError, match="no layer of FluxTransformer2DModel would be accelerated")
    with curves.prepared(tiny_transformer(), SPECS[1]) as ready, pytest.warns(UserWarning, match="original attention"), refused:
        curves.measure(ready, forward, SPECS, probes=1, seed=0)


# Candidates and costs


@pytest.mark.parametrize("grid", [(1, 32, 32), (1, 64, 64), (5, 16, 24)])
def test_default_candidates_differ_on_their_grid(grid: tuple[int, int, int]) -> None:
    found = default_candidates(grid)
    assert found[0] is None
    assert len(set(found)) == len(found) > 8
    layout = TokenLayout(grid, 12)
    costs = multiply_adds(found, layout, 64)
    assert costs.each.argmin() == 1  # one tile alone
    assert costs.each[0] == 2 * 64 * layout.tokens**2
    Assignment(tuple(dit_accel.Rule(spec) for spec in found))  # of one order


def test_default_candidates_keep_as_much_at_every_size() -> None:
    """Of what a query sees exactly, as many tokens: within what borders take away."""
    specs = [spec for spec in default_candidates((1, 64, 64)) if spec is not None]
    kept = [[kept_pairs(spec, TokenLayout((1, side, side))) / side**2 for spec in specs] for side in (64, 256)]
    assert kept[1] == pytest.approx(kept[0], rel=0.3)
    pooled = [spec for spec in specs if spec.rest]
    assert [parse_method(short_name(spec)) for spec in pooled] == pooled


def test_seconds_are_those_of_a_call() -> None:
    q, k, v = (torch.randn(1, 4, 9 * 14 + 6, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    found = seconds(SPECS, Captured(q, k, v, TokenLayout((1, 9, 14), 6), "layer"))
    assert found.each.shape == found.start.shape == (len(SPECS),)
    assert bool((found.each > 0).all())
    assert bool((found.start >= 0).all())
    assert found.split > 0


def test_ranges_cover_all_noise_levels() -> None:
    moments = [Moment(n, level) for n, level in enumerate((1.0, 0.9, 0.8, 0.6, 0.3))]
    ranges = levels.ranges_of(moments, 3)
    assert [low for low, _ in ranges] == [pytest.approx(0.85), pytest.approx(0.7), 0.0]
    assert [high for _, high in ranges] == [1.0, *(low for low, _ in ranges[:-1])]
    assert [levels.place(moment.noise, ranges) for moment in moments] == [0, 0, 1, 2, 2]
    assert levels.ranges_of(moments[:1], 3) == [(0.0, 1.0)]


# Intervals


def test_an_interval_counts_how_much_prompts_differ() -> None:
    mean = 0.05
    alone, known = interval_of([mean], np.array([[0.0, 0.1]])), interval_of([mean] * 4, np.full((6, 3), 0.3))
    assert alone.high == pytest.approx(mean * (1 + 2.92 * 0.25))
    assert known.high == pytest.approx(mean * (1 + 1.895 * 0.25 * (2 / 7) ** 0.5 / 2))
    wide = interval_of([mean] * 2, np.array([[0.0, 0.1, 1], [0.0, 0.2, 1], [0.0, 0.3, 1]]))  # the first is the original attention
    assert wide.high == pytest.approx(mean * (1 + 2.132 * ((0.25 + 2 * 0.25**2) / 4) ** 0.5 / 2**0.5))
    assert wide.mean == mean
    assert wide.low == pytest.approx(2 * mean - (wide.high or 0))
    assert interval_of([0.0], np.zeros((1, 1))).high == 0


@pytest.mark.parametrize("spread", [0.1, 0.25])
def test_an_interval_holds_in_nine_of_ten(spread: float) -> None:
    """Two held-out and four measured prompts whose errors are lognormal: how often the mean of all prompts is above the upper end."""
    random, width = np.random.default_rng(0), np.log(1 + spread**2) ** 0.5
    errors = np.exp(random.normal(-(width**2) / 2, width, (4000, 6)))  # of mean 1
    beyond = np.mean([(interval_of(row[:2].tolist(), row[2:, None]).high or 0) < 1 for row in errors])
    assert beyond < 0.1


# The knapsack


def unit(random: Any, heads: int, candidates: int, start: float, split: float) -> Unit:
    cost = np.sort(random.uniform(0.03, 1, candidates))
    errors = np.exp(random.normal(-8, 2, (heads, 1)) - random.uniform(1, 6, (heads, 1)) * cost + random.normal(0, 0.3, (heads, candidates)))
    errors[:, -1] = 0
    return Unit(errors, cost, np.full(candidates, start), split)


def every(own: Unit, most: int) -> Any:
    heads, candidates = own.errors.shape
    choices = np.array([c for c in itertools.product(range(candidates), repeat=heads) if len(set(c)) <= most])
    return np.stack(own.totals(choices), 1)


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_choice_is_found(seed: int) -> None:
    """Three layers of two heads with four candidates: against all 4096 combinations; an odd seed has costs of calls and of splitting."""
    random = np.random.default_rng(seed)
    units = [unit(random, 2, 4, 0.05 * (seed % 2), 0.02 * (seed % 2)) for _ in range(3)]
    knapsack = Knapsack(units)
    all_of = np.array([np.sum(totals, 0) for totals in itertools.product(*(every(own, 3) for own in units))])
    for error in np.quantile(all_of[:, 1], [0.01, 0.1, 0.3, 0.6, 0.9]):
        point = knapsack.cheapest(error)
        assert point is not None
        totals = np.sum([np.stack(own.totals(choice[None]), 1)[0] for own, choice in zip(units, knapsack.solution(point), strict=True)], 0)
        assert totals == pytest.approx([knapsack.costs[point], knapsack.errors[point]])
        assert totals[1] <= error * (1 + 1e-9)
        assert totals[0] <= 1.01 * all_of[all_of[:, 1] <= error, 0].min()
    assert knapsack.cheapest(-1.0) is None
    assert knapsack.best(0.5 * knapsack.costs[0]) is None
    assert knapsack.errors[knapsack.best(1e9)] == 0


def test_many_heads_are_chosen_by_price() -> None:
    """A layer of eight heads with four candidates, against all choices of up to three of them."""
    own = unit(np.random.default_rng(0), 8, 4, 0.0, 0.01)
    choices, knapsack = every(own, 3), Knapsack([own])
    for error in np.quantile(choices[:, 1], [0.001, 0.01, 0.1, 0.5]):
        point = knapsack.cheapest(error)
        assert point is not None
        assert knapsack.costs[point] <= 1.1 * choices[choices[:, 1] <= error, 0].min()


def test_splitting_costs() -> None:
    errors = np.array([[1.0, 0.0], [0.0, 0.0]])  # the first head alone gains from the dear candidate
    cheap = Knapsack([Unit(errors, np.array([0.1, 0.2]), np.zeros(2), 0.0)])
    dear = Knapsack([Unit(errors, np.array([0.1, 0.2]), np.zeros(2), 0.5)])
    assert cheap.solution(cheap.cheapest(0.0) or 0)[0].tolist() == [1, 0]
    assert dear.solution(dear.cheapest(0.0) or 0)[0].tolist() == [1, 1]


# The file


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = Plan.load(EXAMPLE)
    again = Plan.load(plan.save(tmp_path / "plan.json"))
    assert again == plan
    assert vars(again).keys() >= {field.name for field in dataclasses.fields(Plan)}
    assert all(getattr(again, field.name) == getattr(plan, field.name) for field in dataclasses.fields(Plan))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(EXAMPLE.read_text())


def test_the_assignment_of_a_plan_is_a_method() -> None:
    plan = Plan.load(EXAMPLE)
    assert Assignment.load(EXAMPLE) == parse_method(str(EXAMPLE)) == Assignment(plan.rules)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("format"), "must have the format"),
        (lambda data: data["plan"].pop("curve"), "must have exactly the keys"),
        (lambda data: data["plan"].update(more=1), "must have exactly the keys"),
        (lambda data: data["plan"]["asked"].update(budget="5 %"), "asked.budget must be float"),
        (lambda data: data["plan"]["ranges"][0].pop("low"), "ranges must be NoiseRange"),
        (lambda data: data["assignment"].pop("rules"), "an assignment must have exactly the keys"),
    ],
)
def test_a_damaged_plan_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(EXAMPLE.read_text())
    change(data)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        Plan.load(path)
