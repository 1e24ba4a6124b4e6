"""`plan` and `dit-accel plan` on tiny pipelines of three families: the promise holds, choices are near the best, nothing is changed."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distill_fixtures import CALL, prompt_pipe
from peft import LoraConfig
from test_distill_guidance import CALLS, pipeline
from typer.testing import CliRunner, Result

import dit_accel
from dit_accel import CLEAR, SLA, Assignment, Fovea
from dit_accel.cli import models
from dit_accel.cli.app import app
from dit_accel.errors import AlreadyAcceleratedError, PlanError
from dit_accel.method import TopK
from dit_accel.patch.anatomy import attention_layers
from dit_accel.planner import aim, curves, measuring, planning, verified
from dit_accel.planner.record import Asked, Interval, Plan
from dit_accel.planner.work import Work

PROMPTS = ["a cat on a blue background", "a panda on a red background", "a frog left of a cactus", "a dog"]
SPECS = [None, Fovea(0.05, tile=(4, 4)), Fovea(0.35, tile=(4, 4)), Fovea(0.6, tile=(4, 4))]
FAMILIES = ("flux", "lora", "sd3", "wan")  # guidance embedded, in one pass, in two


def make(name: str) -> Any:
    pipe = pipeline("flux" if name == "lora" else name)
    if name == "lora":
        config = LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pipe.transformer.add_adapter(config, "sketch")
    return pipe


def call_of(name: str) -> dict[str, Any]:
    return CALLS["flux" if name == "lora" else name]


def drawn(pipe: Any, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        return pipe(prompt="a fox", generator=generator, output_type="latent", **call_of(name))[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_budget_holds_and_nothing_is_changed(name: str, tmp_path: Path) -> None:
    pipe = make(name)
    before, state = drawn(pipe, name), torch.get_rng_state()
    layers = {n: type(m) for n, m in pipe.transformer.named_modules()}
    uniform = dit_accel.plan(pipe, PROMPTS, speed=1.2, specs=SPECS, folder=tmp_path, progress=False, **call_of(name))
    budget = 0.9 * uniform.outcome.verified.mean
    plan = dit_accel.plan(pipe, PROMPTS, budget=budget, specs=SPECS, folder=tmp_path, progress=False, **call_of(name))
    assert plan.outcome.verified.promised <= budget
    assert plan.outcome.cost < 1
    assert plan.outcome.speed == pytest.approx(1 / plan.outcome.cost)
    assert len(plan.ranges) == 2  # the call has two steps
    assert [layer.name for layer in plan.layers] == list(attention_layers(pipe.transformer))
    assert all(len(row) == layer.heads for rows in plan.chosen for row, layer in zip(rows, plan.layers, strict=True))
    assert sum(error for rows in plan.errors for row in rows for error in row) == pytest.approx(2 * plan.outcome.predicted**2, rel=1e-4)
    assert set(plan.model.loras) == ({"sketch"} if name == "lora" else set())
    assert {n: type(m) for n, m in pipe.transformer.named_modules()} == layers
    assert torch.equal(drawn(pipe, name), before)
    assert torch.equal(torch.get_rng_state(), state)
    loaded = Assignment.load(plan.save(tmp_path / "plan.json"))
    dit_accel.accelerate(pipe, loaded)
    assert not torch.equal(drawn(pipe, name), before)


def test_a_plan_is_near_the_best_of_all_choices(tmp_path: Path) -> None:
    """Two layers of two heads with three candidates: all 81 choices, verified, against the plan of each budget."""
    pipe = prompt_pipe()
    # by the product of means, whose errors nearly add; by the error, in a model of random weights, two of four budgets cost 6 and 10 % more
    specs = (None, *(replace(spec, keep=(TopK(spec.keep[0].density, correct_short=True),)) for spec in SPECS[2:] if spec is not None))
    request = measuring.Request(pipe, tuple(PROMPTS[:3]), tuple(PROMPTS[3:]), specs, "multiply-adds", 1, 0, False, CALL)
    found = measuring.measured(request, Work.begin(tmp_path, request.settings()))
    every = []
    for flat in itertools.product(range(len(specs)), repeat=4):
        chosen = ((flat[:2], flat[2:]),)
        if found.accelerates(chosen):
            errors = found.held_out.errors(pipe.transformer, found.assignment(chosen))
            cost = sum(found.costs[name].each[n] for name, row in zip(found.heads, chosen[0], strict=True) for n in row)
            every.append((cost / sum(2 * own.each[0] for own in found.costs.values()), found.interval(errors).promised))
    for budget in sorted(error for _, error in every)[20::15]:
        got = aim.aim(found, Asked(budget, None))
        assert got.choice.cost <= 1.05 * min(cost for cost, error in every if error <= budget)


def test_a_number_of_blocks_is_a_rule_of_scaling(tmp_path: Path) -> None:
    specs = [Fovea(blocks=2, tile=(4, 4)), SPECS[2]]
    plan = dit_accel.plan(prompt_pipe(), PROMPTS[:2], speed=1.05, specs=specs, progress=False, **CALL)
    used = {(number, k) for k, rows in enumerate(plan.chosen) for row in rows for number in row if plan.candidates[number].spec == specs[0]}
    assert used
    assert {(rule.candidate, rule.range) for rule in plan.scaling.rules} == used
    assert {(rule.alpha, rule.beta) for rule in plan.scaling.rules} == {(32.0, 0.0)}
    assert Plan.load(plan.save(tmp_path / "plan.json")).scaling == plan.scaling


class Stop(Exception):  # noqa: N818
    pass


def test_a_stopped_plan_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"speed": 1.2, "specs": SPECS, "progress": False, **CALL}
    expected = dit_accel.plan(prompt_pipe(), PROMPTS[:3], **arguments)
    measured, left = curves.measure, iter(range(3))

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if next(left) == 2:
            raise Stop
        return measured(*args, **kwargs)

    monkeypatch.setattr(measuring, "measure", stopping)
    pipe = prompt_pipe()
    with pytest.raises(Stop):
        dit_accel.plan(pipe, PROMPTS[:3], folder=tmp_path, **arguments)
    assert not any("dit_accel" in name for name, _ in pipe.transformer.named_modules())
    assert len(list(tmp_path.glob("curves-*.safetensors"))) == 2
    calls: list[int] = []
    monkeypatch.setattr(measuring, "measure", lambda *a, **k: calls.append(1) or measured(*a, **k))
    found = dit_accel.plan(pipe, PROMPTS[:3], folder=tmp_path, **arguments)
    assert len(calls) == 2  # two prompts, two ranges
    assert found == expected
    assert found.outcome == expected.outcome
    monkeypatch.setattr(measuring, "measure", stopping)
    monkeypatch.setattr(verified.HeldOut, "errors", stopping)  # all is there
    assert dit_accel.plan(pipe, PROMPTS[:3], folder=tmp_path, **arguments) == expected
    with pytest.raises(PlanError, match="contains the work on a plan with other held-out prompts, prompts: name another folder"):
        dit_accel.plan(pipe, PROMPTS[1:], folder=tmp_path, **arguments)
    next(tmp_path.glob("curves-*.safetensors")).write_bytes(b"no")
    with pytest.raises(PlanError, match=r"curves-.* is damaged: delete it and run again"):
        dit_accel.plan(pipe, PROMPTS[:3], folder=tmp_path, **arguments)


NOT_FINITE = float("inf"), float("nan")
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"budget": 0.1, "speed": 2.0}, "give a budget or a speed, not both"),
    "budget": ({"budget": 0.0}, "budget must be a number above 0"),
    "speed": ({"speed": 1}, "speed must be a number above 1"),
    "one": ({"prompts": ["a"]}, "requires at least two prompts, one of them to verify on, not 1"),
    "text": ({"prompts": "a cat"}, "prompts must be a non-empty list"),
    "overlap": ({"held_out": PROMPTS[:1]}, "held-out prompts must not be measured"),
    "orders": ({"specs": [Fovea(tile=(4, 4)), SLA(0.3)]}, "the specs of a plan must have one order"),
    "none": ({"specs": [None]}, "specs must contain AttentionSpecs, at least one"),
    "unit": ({"unit": "flops"}, "unit must be 'multiply-adds' or 'seconds'"),
    "ranges": ({"ranges": 0}, "ranges must be a number of ranges"),
    "budget-infinite": ({"budget": NOT_FINITE[0]}, "budget must be a number above 0, and finite, not inf"),
    "speed-infinite": ({"speed": NOT_FINITE[0]}, "speed must be a number above 1, and finite, not inf"),
    "speed-nan": ({"speed": NOT_FINITE[1]}, "speed must be a number above 1, and finite, not nan"),
    "sizes": ({"sizes": [(112, 144)]}, "made at one size: give height and width in the place of sizes"),
    "unknown": ({"hight": 112}, "FluxPipeline takes no hight"),
    "generator": ({"generator": None}, "set for every run: leave generator out"),
    "no-json": ({"sigmas": {1.0}}, "call arguments must be numbers, strings, lists or None"),
    "prompts-none": ({"prompts": None}, "prompts must be a non-empty list of non-empty strings, not None"),
    "prompts-number": ({"prompts": 5}, "prompts must be a non-empty list of non-empty strings, not 5"),
    "held-out-number": ({"held_out": 5}, "held_out must be a non-empty list of non-empty strings, not 5"),
    "no-list": ({"specs": Fovea(0.1)}, r"pass a list, as in specs=\[None, Fovea\(0.1\)\]"),
    "no-specs": ({"specs": [["a"]]}, "specs must contain AttentionSpecs, at least one"),
    "seed-text": ({"seed": "a"}, "seed must be an int from 0 to .*, not 'a'"),
    "seed-fraction": ({"seed": 1.5}, "seed must be an int from 0 to .*, not 1.5"),
    "seed-negative": ({"seed": -1}, "seed must be an int from 0 to .*, not -1"),
    "steps": ({"num_inference_steps": 0}, "num_inference_steps must be an int >= 1, not 0"),
    "height": ({"height": 250}, "height must be a multiple of 16 pixels, the side of one token: not 250, but 256, for example"),
    "width": ({"width": "144"}, "width must be an int >= 1, not '144'"),
    "folder": ({"folder": 5}, "folder must be a path, not 5"),
    "progress": ({"progress": "no"}, "progress must be True, False or None"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_planned_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, message = REFUSED[case]
    monkeypatch.setattr(planning, "measured", lambda *_: pytest.fail("something was drawn"))
    with pytest.raises(ValueError, match=message):
        dit_accel.plan(prompt_pipe(), **{"prompts": PROMPTS, **CALL, **given})


def test_an_accelerated_pipeline_is_refused() -> None:
    pipe = dit_accel.accelerate(prompt_pipe(), CLEAR(2.0))
    with pytest.raises(AlreadyAcceleratedError, match=r"call restore\(\.\.\.\) before planning"):
        dit_accel.plan(pipe, PROMPTS, **CALL)


def test_what_is_out_of_reach_says_what_is_not(tmp_path: Path) -> None:
    pipe, arguments = prompt_pipe(), {"specs": SPECS[1:], "folder": tmp_path, "progress": False, **CALL}
    with pytest.raises(PlanError, match=r"no candidate reaches the speed 100: the fastest choice has \d"):
        dit_accel.plan(pipe, PROMPTS, speed=100, **arguments)
    with pytest.raises(
        PlanError, match="no choice of the candidates is within the budget 1e-06; the smallest that was reached is"
    ) as refused:
        dit_accel.plan(pipe, PROMPTS, budget=1e-6, **arguments)
    enough = float(str(refused.value).split("reached is ")[1].split(":")[0])
    assert dit_accel.plan(pipe, PROMPTS, budget=enough, **arguments).outcome.verified.promised <= enough
    least = dit_accel.plan(pipe, PROMPTS, speed=1.001, **arguments)
    assert all(n > 0 for rows in least.chosen for row in rows for n in row)  # the original attention may not be chosen
    assert isinstance(least, Plan)
    whole = {**arguments, "specs": [Fovea(1.0, tile=(4, 4))], "folder": None}
    for asked in ({"budget": 0.1}, {"speed": 1.1}):
        with pytest.raises(PlanError, match="at this size no candidate costs less than the original attention: plan at a larger size"):
            dit_accel.plan(pipe, PROMPTS[:2], **asked, **whole)


class Fake:
    """Measurements with a choice of every predicted error from `least` on, which are wrong by a factor that grows with the error."""

    def __init__(self, least: float, factor: float) -> None:
        self.least, self.factor, self.verified = least, factor, 0
        self.held_out = self

    def within(self, error: float) -> measuring.Choice | None:
        return None if error < self.least else measuring.Choice(((), error), 1 - error, error)  # type: ignore[arg-type]

    def gentlest(self) -> measuring.Choice | None:
        return self.within(self.least)

    def saves(self, choice: Any) -> bool:
        return True

    def verify(self, chosen: Any) -> list[float]:
        self.verified += 1
        return [chosen[1]]

    def interval(self, errors: Any) -> Interval:
        mean = errors[0] * (self.factor + 3 * errors[0])
        return Interval(mean, 0.9 * mean, 1.1 * mean)


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.3])
def test_predictions_are_corrected_until_the_promise_holds(budget: float) -> None:
    fake: Any = Fake(1e-4, 1.2)
    got = aim.aim(fake, Asked(budget, None))
    promised = got.verified.promised
    assert aim.NEAR * budget <= promised <= budget
    assert len(got.rounds) == fake.verified <= aim.ROUNDS
    fake.least = 0.9 * budget
    with pytest.raises(PlanError, match=rf"no choice of the candidates is within the budget {budget:g}; the smallest that was reached is"):
        aim.aim(fake, Asked(budget, None))


@pytest.mark.parametrize("least", [0.11, 0.125])
def test_a_budget_that_only_verification_reaches_holds(least: float) -> None:
    """Every prediction is above the budget, and twice too high."""
    fake: Any = Fake(least, 0.2)
    got = aim.aim(fake, Asked(0.1, None))
    assert least <= got.choice.predicted
    assert got.verified.promised <= 0.1
    assert len(got.rounds) == fake.verified <= aim.ROUNDS
    fake.factor = 0.9
    with pytest.raises(PlanError, match="the smallest that was reached is") as refused:
        aim.aim(fake, Asked(0.1, None))
    enough = float(str(refused.value).split("reached is ")[1].split(":")[0])
    assert aim.aim(fake, Asked(enough, None)).verified.promised <= enough


def test_the_public_name_is_the_function() -> None:
    assert dit_accel.plan is planning.plan


# The command


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def test_the_command_writes_a_plan_and_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: prompt_pipe())
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:2]))
    out = tmp_path / "plan.json"
    methods = [word for text in ("none", "fovea:0.05,tile=4x4", "fovea:0.6,tile=4x4") for word in ("--method", text)]
    given = ["--prompts", tmp_path / "prompts.txt", "--size", "144x112", "--steps", 2, "--max-sequence-length", 8, "--out", out, *methods]
    result = command(*given, "--speed", 1.2)
    assert result.exit_code == 0, result.output
    plan = Plan.load(out)
    assert plan.asked == Asked(None, 1.2)
    assert [candidate.spec for candidate in plan.candidates] == [None, SPECS[1], SPECS[3]]
    assert f"{plan.outcome.speed:.2f}× less attention in multiply-adds" in result.output
    assert f"{plan.outcome.verified.mean:.4f}, promised {plan.outcome.verified.high:.4f}" in " ".join(result.output.split())
    assert (tmp_path / "plan-work" / "settings.json").is_file()
    assert (tmp_path / "plan.html").stat().st_size > 1000
    refused = command(*given, "--speed", 100)
    assert refused.exit_code == 2
    assert "no candidate reaches the speed 100" in refused.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--budget", "0.1", "--speed", "2"], "give a budget or a speed, not both"),
        (["--size", "100x100"], "multiples of 16 pixels"),
        (["--method", "no-method"], "no-method"),
        (["--out", "folder.json"], "--out must name a file"),
        (["--out", "x.html"], "--out must name a JSON file, as in plan.json"),
        (["--out", "."], "--out must name a JSON file, as in plan.json"),
        (["--budget", "inf"], "budget must be a number above 0, and finite"),
    ],
)
def test_the_command_refuses_before_it_loads(words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("the pipeline was loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    result = command("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "plan.json", *words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "prompts.txt"]


def test_the_command_is_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("the pipeline was loaded"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "plan.json")
    assert result.exit_code == 2
    assert "a plan is made by one process: start dit-accel plan by itself" in " ".join(result.output.split())
