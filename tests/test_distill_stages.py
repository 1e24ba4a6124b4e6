"""The first stage of a distillation: each layer's own parameters, fitted to the teacher's attention on the teacher's inputs."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error as relative_norm
from distill_fixtures import flags, learn, prompt_pipe, same, state, unchanged
from test_families import Tiny as Family
from torch import Tensor

from dit_accel import CLEAR, SLA, AttentionSpec, Fovea, accelerate
from dit_accel.errors import DistillationError
from dit_accel.finetune import distill as distillation
from dit_accel.finetune import fit as fitting
from dit_accel.finetune import teacher
from dit_accel.finetune.config import DistillConfig
from dit_accel.finetune.data.collect import Samples
from dit_accel.finetune.losses import relative_error
from dit_accel.finetune.session import PARAMETER_STEPS
from dit_accel.finetune.velocity import predict
from dit_accel.method import Call, Columns, Cost, Gate, Mass, Pooled, Raster, Residual, Rest, Sizes, TopK
from dit_accel.operator.attention import attention
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of, patches_of

METHODS: dict[str, AttentionSpec] = {
    "sla": tiny.SPARSE, "sla-tiles": SLA(0.25, tile=(4, 4)), "fovea": Fovea(0.25, tile=(4, 4)), "clear-pooled": CLEAR(2.0, downsample=2),
}  # fmt: skip
STAGE: dict[str, Any] = {"parameter_steps": 8, "parameter_learning_rate": 0.05, "train": "parameters"}
TeacherCall = tuple[str, tuple[Any, ...], Any, Tensor]  # layer, q, k, v and so on, layout, the original attention's output


@pytest.fixture
def no_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_train", lambda run, checkpoint, progress: 0)


@pytest.fixture
def no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is learned of two prompts is kept, whether it serves others or not."""
    monkeypatch.setattr(fitting, "keep_better", lambda run, before: [])


def teacher_calls(pipe: Any, samples: Samples) -> list[TeacherCall]:
    """Every accelerated call of the teacher's forwards, two layers each, by hooks that put the original's output in the place of ours."""
    seen: list[TeacherCall] = []

    def hook(operator: Any, arguments: tuple[Any, ...], out: Tensor) -> Tensor:
        original = F.scaled_dot_product_attention(*arguments[:3])
        seen.append((operator.name, arguments[:3], operator.context.layout, original))
        return original

    hooks = [operator.register_forward_hook(hook) for operator in operators_of(pipe).values()]
    with torch.no_grad():
        for i in range(len(samples)):
            predict(pipe.transformer, samples[i].arguments)
    for handle in hooks:
        handle.remove()
    return seen


def errors(pipe: Any, calls: list[TeacherCall]) -> list[tuple[str, Tensor]]:
    """The relative error of the layer's operator, with its parameters as they are now, at each call."""
    found = []
    for name, arguments, layout, original in calls:
        operator = operators_of(pipe)[name]
        found.append((name, relative_error(attention(*arguments, *operator.specs, layout, params=operator.params), original)))
    return found


@pytest.mark.usefixtures("no_second_stage", "no_comparison")
@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_every_layer_comes_nearer_to_the_teacher(tmp_path: Path, spec: AttentionSpec) -> None:
    pipe, untrained = accelerate(prompt_pipe(), spec), accelerate(prompt_pipe(), spec)
    result = learn(pipe, tmp_path, **STAGE)
    calls = teacher_calls(untrained, Samples(tmp_path / "samples"))
    with torch.no_grad():
        before, after = errors(untrained, calls), errors(pipe, calls)
    for layer in operators_of(pipe):
        was, now = (sum(float(error) for name, error in found if name == layer) for found in (before, after))
        assert now < was, layer
    firsts = [float(before[i][1] + before[i + 1][1]) / 2 for i in range(0, len(before), 2)]
    rows = result.parameter_history
    assert min(abs(rows[0]["attention"] - first) for first in firsts) < 1e-5  # of the start values, on one recorded forward
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [json.loads(line) for line in (tmp_path / "parameters.jsonl").read_text().splitlines()] == rows
    assert result.error_fitted == result.error_after != result.error_before


@pytest.mark.usefixtures("no_second_stage", "no_comparison")
@pytest.mark.parametrize("spec", [tiny.SPARSE, METHODS["sla-tiles"]], ids=["raster", "tiles"])
@pytest.mark.parametrize("perturbed", [False, True], ids=["from-zero", "from-elsewhere"])
def test_least_squares_is_where_descent_would_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, perturbed: bool
) -> None:
    monkeypatch.setattr(fitting, "RIDGE", 1e-9)
    pipe = accelerate(prompt_pipe(), spec)
    if perturbed:
        tiny.perturb(pipe)
    learn(pipe, tmp_path, **STAGE | {"parameter_steps": 4})  # every forward once

    def gradient(student: Any) -> float:
        parameters = [p.requires_grad_() for op in operators_of(student).values() for p in op.params.parameters()]
        total = torch.stack([error for _, error in errors(student, calls)]).sum()
        return max(float(g.abs().max()) for g in torch.autograd.grad(total, parameters))

    untrained = accelerate(prompt_pipe(), spec)
    calls = teacher_calls(untrained, Samples(tmp_path / "samples"))
    assert gradient(pipe) < 2e-4 * gradient(untrained)


@pytest.mark.usefixtures("no_second_stage")
@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_layers_do_not_see_each_other(tmp_path: Path, spec: AttentionSpec) -> None:
    both, one = accelerate(prompt_pipe(), spec), accelerate(prompt_pipe(), spec, layers=lambda name, module: "single" in name)
    for pipe, name in ((both, "both"), (one, "one")):
        learn(pipe, tmp_path / name, **STAGE)
    assert len(operators_of(both)) == 2
    ((name, alone),) = operators_of(one).items()
    assert all(torch.equal(p, alone.params.get_parameter(k)) for k, p in operators_of(both)[name].params.named_parameters())


@pytest.mark.parametrize("spec", METHODS.values(), ids=METHODS)
def test_the_teacher_goes_its_way_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec) -> None:
    pipe, seen = accelerate(prompt_pipe(), spec), []
    real = fitting.predict

    def watched(transformer: Any, arguments: dict[str, Any]) -> Tensor:
        seen.append((real(transformer, arguments), tiny.text_of(arguments)))
        assert [name for name, p in transformer.named_parameters() if p.grad is not None and ".dit_accel.params." not in name] == []
        return seen[-1][0]

    monkeypatch.setattr(fitting, "predict", watched)
    before, requires = state(pipe.transformer), flags(pipe.transformer)
    learn(pipe, tmp_path, steps=1, learning_rate=1e-12, **STAGE | {"parameter_steps": 4})
    samples = Samples(tmp_path / "samples")
    assert len(seen) == len(samples) == 4
    recorded = [samples[i].prediction for i in range(4)]
    for out, _ in seen:
        assert not out.requires_grad
        assert min(float((out - r).abs().max() / r.abs().max()) for r in recorded) < 1e-5
    assert flags(pipe.transformer) == requires
    changed = {name for name, tensor in state(pipe.transformer).items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all(".dit_accel.params." in name for name in changed)


@pytest.mark.parametrize(
    "name", ["flux", "sd3", "wan", "chroma", "hunyuan_video", "qwen_image", "framepack", "prx", "nucleus", "motif_video", "fibo", "lumina"]
)
def test_every_kind_of_mask_and_sequence_leaves_the_teacher_as_it_is(name: str) -> None:
    model = Family(name)
    expected, seen = model.run(), []
    accelerate(model.pipe, SLA(0.3, tile=(2, 4, 2)))
    ((transformer, patch),) = patches_of(model.pipe)
    run: Any = SimpleNamespace(transformer=transformer, patch=patch)
    least = fitting.LeastSquares(operators_of(transformer))

    def learn(operator: Any, arguments: tuple[Any, ...], out: Tensor, original: Tensor) -> None:
        seen.append(float(relative_error(out, original)))
        least.learn(operator, arguments, out, original)

    with always(transformer), teacher.comparing_with_teacher(run, learn):
        got = model.run()
    assert relative_norm(got, expected) < 2e-5
    assert len(seen) >= 2
    assert max(seen) > 1e-4  # the operators did run
    least.update(0)
    assert all(bool(p.isfinite().all()) and bool(p.any()) for op in operators_of(transformer).values() for p in op.params.parameters())


def test_a_bfloat16_pipeline_is_fitted_in_float32(tmp_path: Path) -> None:
    pipe = accelerate(tiny.half_pipe(), tiny.SPARSE)
    rows = learn(pipe, tmp_path, **STAGE, steps=1).parameter_history
    exact = learn(accelerate(prompt_pipe(), tiny.SPARSE), tmp_path / "exact", **STAGE, steps=1).parameter_history
    assert {p.dtype for op in operators_of(pipe).values() for p in op.params.parameters()} == {torch.float32}
    assert [row["attention"] for row in rows] == pytest.approx([row["attention"] for row in exact], rel=0.1)


# Resuming

RESUMED: dict[str, Any] = {"steps": 4, "batch_size": 2, "parameter_steps": 5, "checkpoint_every": 2, "train": "parameters"}


@pytest.mark.parametrize("spec", [tiny.SPARSE, METHODS["fovea"]], ids=["least-squares", "descent"])
@pytest.mark.parametrize(("forward", "again"), [(7, 6), (10, 0), (12, 0)], ids=["inside", "between", "second"])
def test_an_interrupted_first_stage_resumes_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, forward: int, again: int
) -> None:
    """`forward`: of both stages, the one that is interrupted, two a step; `again`: how many the first stage has left to do."""
    stopped, resumed, whole = (accelerate(prompt_pipe(), spec) for _ in range(3))
    count = 0
    real = predict

    def counting(transformer: Any, arguments: dict[str, Any]) -> Tensor:
        nonlocal count
        count += 1
        if count == forward + 1:
            raise KeyboardInterrupt
        return real(transformer, arguments)

    def student_only(transformer: Any, arguments: dict[str, Any]) -> Tensor:
        return (counting if torch.is_grad_enabled() else real)(transformer, arguments)

    monkeypatch.setattr(fitting, "predict", counting)
    monkeypatch.setattr(distillation, "predict", student_only)
    with pytest.raises(KeyboardInterrupt):
        learn(stopped, tmp_path / "stopped", **RESUMED)
    count = 100
    got = learn(resumed, tmp_path / "stopped", **RESUMED)
    assert count == 100 + again + 8
    count = 100
    assert tiny.untimed(got) == tiny.untimed(learn(whole, tmp_path / "whole", **RESUMED))
    assert same(state(resumed.transformer), state(whole.transformer))
    for name, rows in (("parameters.jsonl", got.parameter_history), ("log.jsonl", got.history)):
        assert [json.loads(line) for line in (tmp_path / "stopped" / name).read_text().splitlines()] == rows


def test_a_resumed_second_stage_keeps_what_the_first_found(tmp_path: Path) -> None:
    first = learn(tiny.student(), tmp_path, **RESUMED)
    assert learn(tiny.student(), tmp_path, **RESUMED) == dataclasses.replace(first, resumed_from=4)
    assert first.error_fitted is not None


# When there is a first stage


@pytest.mark.parametrize(
    ("spec", "steps", "perturbed", "expected"),
    [
        (tiny.SPARSE, None, False, PARAMETER_STEPS), (tiny.SPARSE, None, True, 0), (tiny.SPARSE, 3, True, 3), (tiny.SPARSE, 0, False, 0),
        (METHODS["fovea"], None, False, 0), (METHODS["fovea"], 3, False, 3), (tiny.LORA_SPEC, None, False, 0),
        (tiny.LORA_SPEC, 0, False, 0),
    ],
)  # fmt: skip
def test_how_many_steps_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: AttentionSpec, steps: int | None, perturbed: bool, expected: int
) -> None:
    pipe, asked = accelerate(prompt_pipe(), spec), []
    if perturbed:
        tiny.perturb(pipe)
    monkeypatch.setattr(distillation, "fit", lambda run, progress: asked.append(run.parameter_steps))
    learn(pipe, tmp_path, steps=1, parameter_steps=steps)
    assert asked == [expected] * (expected > 0)


@pytest.mark.parametrize(
    ("method", "steps", "given", "expected"),
    [("sla", 2, None, 1e-3), ("sla", 0, None, 1e-2), ("fovea", 2, None, 1e-2), ("fovea", 0, None, 1e-2), ("sla", 2, 0.5, 0.5)],
)
def test_parameters_that_were_solved_for_are_trained_gently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, steps: int, given: float | None, expected: float
) -> None:
    rates: list[float] = []
    real = distillation.make_optimizers

    def watched(*arguments: Any) -> Any:
        (optimizer,) = real(*arguments)
        rates.append(optimizer.param_groups[0]["initial_lr"])
        return [optimizer]

    monkeypatch.setattr(distillation, "make_optimizers", watched)
    settings: dict[str, Any] = {"steps": 1, "parameter_steps": steps, "parameter_learning_rate": given, "train": "parameters"}
    learn(accelerate(prompt_pipe(), METHODS[method]), tmp_path, **settings)
    learn(accelerate(prompt_pipe(), METHODS[method]), tmp_path, **settings)  # resumed
    assert rates == [expected, expected]


def test_steps_with_nothing_to_fit_are_refused(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), tiny.LORA_SPEC)
    with unchanged(pipe), pytest.raises(DistillationError, match="parameter_steps=3 has nothing to fit"):
        learn(pipe, tmp_path, parameter_steps=3)


@pytest.mark.parametrize("value", [-1, 0.5, "3", True])
def test_a_bad_number_of_steps_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match="parameter_steps") as raised:
        DistillConfig(parameter_steps=value)
    assert repr(value) in str(raised.value)


def test_an_error_is_said_with_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "relative_error", lambda out, expected: relative_error(out, expected) * float("nan"))
    pipe = tiny.student()
    requires = flags(pipe.transformer)
    with pytest.raises(DistillationError, match="step 0 of the parameters"):
        learn(pipe, tmp_path, **STAGE)
    assert flags(pipe.transformer) == requires
    assert pipe.transformer._dit_accel.context.enabled


# A projection and other tensors in one spec


@dataclass(frozen=True)
class Softened(Rest):
    """One softmax over the means of all key blocks at a learned temperature, in which the output is not linear."""

    fit = "descent"

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        return {"softened.heat": torch.zeros(heads)}

    def __call__(self, call: Call) -> tuple[Tensor, Tensor]:
        q = call.q * call.per_head("softened.heat")[:, None, None].exp()
        return call.dense(q, call.key_means(call.k), call.key_means(call.v), scale=call.scale)

    def cost(self, sizes: Sizes) -> Cost:
        return Cost(2 * sizes.tokens * sizes.k_blocks * sizes.head_dim, passes=2)


@dataclass(frozen=True)
class Fixed(Softened):
    """The same whose temperature waits for the second stage."""

    fit = None


@pytest.mark.usefixtures("no_second_stage")
def test_a_projection_and_what_it_multiplies_are_both_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers are compared with themselves at other values: the projection alone comes nearer, and with the temperature nearer still."""
    settings, heats, ends = STAGE | {"parameter_steps": 24, "parameter_learning_rate": 0.1}, {}, {}
    monkeypatch.setattr(fitting, "RIDGE", 1e-6)
    for kind in (Softened, Fixed):
        spec = AttentionSpec((TopK(0.1),), kind(), Residual(), Raster(), (16, 16))
        pipe, planted = accelerate(prompt_pipe(), spec), spec.make_parameters(heads=2, head_dim=16)
        noise = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            planted.get_parameter("softened.heat").fill_(1.0)
            planted.get_parameter("proj.weight").copy_(torch.eye(16) + 0.3 * noise)
        context = patches_of(pipe)[0][1].context

        def plant(q: Tensor, k: Tensor, v: Tensor, *_: Any, spec: Any = spec, planted: Any = planted, context: Any = context) -> Tensor:
            return attention(q, k, v, spec, context.layout, params=planted).detach()

        monkeypatch.setattr(teacher, "_original", plant)
        rows = learn(pipe, tmp_path / kind.__name__, **settings).parameter_history
        heats[kind] = torch.cat([operator.params.get_parameter("softened.heat") for operator in operators_of(pipe).values()])
        ends[kind] = sum(row["attention"] for row in rows[-4:]) / 4
        assert ends[kind] < rows[0]["attention"] / 20
    assert not bool(heats[Fixed].any())  # a part that says neither keeps its start values
    assert 0.1 < float(heats[Softened].mean()) < 1
    assert ends[Softened] < 0.75 * ends[Fixed]


def test_steps_for_what_waits_for_the_second_stage_are_refused(tmp_path: Path) -> None:
    spec = AttentionSpec((TopK(0.1),), Fixed(), Mass(offset=False), Raster(), (16, 16))
    with pytest.raises(DistillationError, match=r"trained in the second stage alone: leave parameter_steps out"):
        learn(accelerate(prompt_pipe(), spec), tmp_path, parameter_steps=2)
    result = learn(pipe := accelerate(prompt_pipe(), spec), tmp_path / "run", steps=2, train="parameters")
    assert result.parameter_history == []
    assert all(bool(operator.params.get_parameter("softened.heat").any()) for operator in operators_of(pipe).values())


@pytest.mark.parametrize("keep", [TopK(0.1, score=Gate()), Columns(0.1)], ids=["gate", "columns"])
def test_what_only_chooses_blocks_can_not_be_trained_by_itself(keep: Any, tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), AttentionSpec((keep,), Pooled(), Mass(offset=False), Raster(), (16, 16)))
    for steps in (None, 2):
        with pytest.raises(DistillationError, match=r"only chooses blocks, which has no gradient. Train 'lora' or 'attention'"):
            learn(pipe, tmp_path, train="parameters", parameter_steps=steps)
    assert not any(tmp_path.iterdir())
