"""Distillation: it learns, refuses what can't be learnt, resumes to the bit, and leaves the teacher and all else as they were."""

import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import forked
import pytest
import torch
from distill_fixtures import CALL, MODES, PROMPTS, SPECS, draw, flags, learn, prompt_pipe, same, state, student, unchanged, untimed

from dit_accel import CLEAR, SLA, DistillConfig, Fovea, accelerate, dense, distill, load_adapter, restore, save_adapter
from dit_accel.errors import AdapterError, DistillationError, NotAcceleratedError
from dit_accel.finetune import distill as distillation
from dit_accel.finetune.data.collect import Samples, collect, write_run
from dit_accel.patch.state import CONTEXT

# It learns


@pytest.mark.parametrize("mode", MODES)
def test_losses_and_held_out_error_fall(tmp_path: Path, mode: Any) -> None:
    pipe = student(mode)
    tiny.perturb(pipe)
    result = learn(pipe, tmp_path, steps=24, train=mode, evaluate_every=10, learning_rate=5e-3, parameter_learning_rate=1e-2, lora_rank=8)
    rows = tiny.steps_of(result)
    assert [row["step"] for row in result.history] == list(range(25))
    weight = DistillConfig.attention_weight
    assert all(row["loss"] == pytest.approx(row["prediction"] + weight * row["attention"], rel=1e-5) for row in rows)
    assert [row["step"] for row in rows if "held_out_error" in row] == [10, 20, 24]
    for name in ("loss", "attention"):
        assert sum(row[name] for row in rows[-4:]) < 0.9 * sum(row[name] for row in rows[:4]), name
    assert result.error_after < 0.99 * result.error_before
    assert result.resumed_from == 0
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == result.history


WEIGHTINGS = {"prediction": (1.0, 0.0, 0.0), "attention": (0.0, 2.0, 0.0), "flow": (0.0, 0.0, 1.0), "all": (0.5, 2.0, 3.0)}


@pytest.mark.parametrize("weights", WEIGHTINGS.values(), ids=WEIGHTINGS)
def test_each_loss_is_logged_apart(tmp_path: Path, weights: tuple[float, float, float]) -> None:
    named = dict(zip(("prediction", "attention", "flow"), weights, strict=True))
    result = learn(student(), tmp_path, steps=1, train="parameters", **{f"{name}_weight": w for name, w in named.items()})
    (row,) = tiny.steps_of(result)
    assert set(row) == {"step", "loss", "prediction", "held_out_error", "seconds"} | {name for name, weight in named.items() if weight}
    assert row["loss"] == pytest.approx(sum(w * row[name] for name, w in named.items() if w), rel=1e-5)


def test_layers_are_compared_in_one_order_of_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "_first_error", lambda run: 1.0)  # or it would refuse a student that is its teacher
    (row,) = tiny.steps_of(learn(accelerate(prompt_pipe(), Fovea(1.0)), tmp_path, steps=1))
    assert row["attention"] < 1e-9  # 7 × 9 tokens are two tiles side by side
    assert row["prediction"] < 1e-9


@pytest.mark.parametrize(("mode", "rate"), [("lora", "learning_rate"), ("attention", "learning_rate"), ("lora", "parameter_learning_rate")])
def test_each_group_has_its_learning_rate(tmp_path: Path, mode: Any, rate: str) -> None:
    pipe = accelerate(prompt_pipe(), tiny.SPARSE)
    before = state(pipe.transformer)
    learn(pipe, tmp_path, steps=1, train=mode, **{rate: 1e-12})
    after = state(pipe.transformer)
    own = {name for name in after if ".dit_accel.params." in name}
    rest = {name for name in after if ".lora_B.dit_accel." in name} if mode == "lora" else {n for n in before if ".attn.to_v.weight" in n}
    moved = {n: float((after[n] - before.get(n, torch.zeros(()))).abs().max()) for n in own | rest}
    slow, fast = (rest, own) if rate == "learning_rate" else (own, rest)
    assert slow
    assert max(moved[name] for name in slow) < 1e-9
    assert max(moved[name] for name in fast) > 1e-4


def test_parameters_mode_leaves_a_lora_as_it_is(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), tiny.SPARSE)
    learn(pipe, tmp_path / "first", train="lora")
    before = {name: tensor for name, tensor in state(pipe.transformer).items() if ".lora_" in name}
    learn(pipe, tmp_path / "second", train="parameters")
    assert before
    assert all(torch.equal(state(pipe.transformer)[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("mode", MODES)
def test_gradient_checkpointing_changes_no_value(tmp_path: Path, mode: Any) -> None:
    plain, saving = student(mode), student(mode)
    results = [learn(p, tmp_path / name, train=mode, gradient_checkpointing=g) for p, name, g in ((plain, "a", False), (saving, "b", True))]
    assert same(state(plain.transformer), state(saving.transformer))
    assert untimed(results[0]) == untimed(results[1])
    assert not saving.transformer.is_gradient_checkpointing


def test_a_batch_is_the_mean_of_its_forwards(tmp_path: Path) -> None:
    rows = {n: learn(student(), tmp_path / str(n), steps=1, train="parameters", batch_size=n).history[-1] for n in (1, 2, 64)}
    samples, transformer = Samples(tmp_path / "1" / "samples"), student().transformer
    means = []
    for forward in (samples[i] for i in range(len(samples))):
        with torch.no_grad():
            error = distillation.predict(transformer, forward.arguments) - forward.prediction
        means.append(float(error.square().mean() / forward.prediction.square().mean()))
    assert min(abs(rows[1]["prediction"] - x) for x in means) < 1e-6
    assert min(abs(rows[2]["prediction"] - (x + y) / 2) for x in means for y in means) < 1e-6
    assert rows[64]["prediction"] == pytest.approx(sum(means) / len(means), rel=0.2)


def test_flow_matching_draws_levels_of_the_run_and_learns_noise_minus_latents(tmp_path: Path) -> None:
    seen = tiny.student_forwards(pipe := student())
    call = CALL | {"sigmas": [0.9, 0.8]}
    config = tiny.quick(tmp_path, steps=24, train="parameters", flow_weight=1.0, attention_weight=0.0, parameter_learning_rate=1e-6)
    rows = tiny.steps_of(distill(pipe, PROMPTS, config, progress=False, **call))
    samples, sigmas = Samples(tmp_path / "samples"), []
    latents = {tiny.text_of(f.arguments): f.latents for f in map(samples.__getitem__, range(len(samples)))}
    assert len(seen) == len(rows) == 24
    for row, (arguments, prediction) in zip(rows, seen, strict=True):
        sigma, x0 = float(arguments["timestep"]), latents[tiny.text_of(arguments)]
        noise = (arguments["hidden_states"] - (1 - sigma) * x0) / sigma
        assert 0.7 < float(noise.std()) < 1.3 or sigma < 0.05
        assert row["flow"] == pytest.approx(float((prediction - noise + x0).square().mean() / (noise - x0).square().mean()), rel=1e-3)
        sigmas.append(sigma)
    assert 0 < min(sigmas) < max(sigmas) <= 0.9
    assert 4 <= sum(s >= 0.8 for s in sigmas) <= 20  # every second one, as the levels are 0.9, 0.8, 0


# What is trained on


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    seen = tiny.student_forwards(pipe := student())
    learn(pipe, tmp_path, steps=12, train="parameters")
    trained = {tiny.text_of(arguments) for arguments, _ in seen}
    parts = [Samples(tmp_path / name) for name in ("samples", "held-out")]
    texts = [{tiny.text_of(part[i].arguments) for i in range(len(part))} for part in parts]
    assert [len(part) for part in texts] == [2, 1]
    assert trained == texts[0]
    assert not trained & texts[1]


def test_prompts_added_to_an_interrupted_run_stay_apart(tmp_path: Path) -> None:
    for name, prompts, seed in (("samples", PROMPTS[:1], 0), ("held-out", PROMPTS[1:2], 1_000_000)):
        collect(prompt_pipe(), prompts, tmp_path / "a" / name, seed=seed, **CALL)  # stopped here; then the user adds the third prompt
    seen = tiny.student_forwards(pipe := student())
    late, fresh = learn(pipe, tmp_path / "a", steps=12, train="parameters"), learn(student(), tmp_path / "b", steps=12, train="parameters")
    assert len({tiny.text_of(arguments) for arguments, _ in seen}) == 2
    assert untimed(late) == untimed(fresh)


@pytest.mark.parametrize(("prompts", "held_out"), [([PROMPTS[0]] * 2, None), (PROMPTS, PROMPTS[1:2])], ids=["twice", "in-both"])
def test_a_prompt_on_both_sides_is_refused(tmp_path: Path, prompts: list[str], held_out: list[str] | None) -> None:
    with pytest.raises(DistillationError, match="held"):
        learn(student(), tmp_path, prompts, held_out, train="parameters")


def test_other_prompts_are_another_run(tmp_path: Path) -> None:
    learn(student(), tmp_path, PROMPTS[:2], train="parameters")
    with pytest.raises(DistillationError, match="another run"):
        learn(student(), tmp_path, PROMPTS[1:], train="parameters")


@pytest.mark.parametrize("part", ["samples", "held-out"])
def test_other_numbers_under_the_same_prompts_and_seeds_are_another_run(tmp_path: Path, part: str) -> None:
    learn(student(), tmp_path / "a", train="parameters")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    samples = Samples(tmp_path / "b" / part)
    entry, forwards = samples.entries[-1], [samples[i] for i in samples.runs()[-1]]
    forwards[-1].prediction[0, -1, -1] += 1
    pairs = [(forward.arguments, forward.prediction) for forward in forwards]
    write_run(samples.folder, entry.prompt, entry.seed, pairs, forwards[0].latents, size=entry.size)
    assert Samples(samples.folder).contents != samples.contents
    with pytest.raises(DistillationError, match="another run: its contents"):  # of samples that it recorded itself,
        learn(student(), tmp_path / "b", train="parameters")
    folders = {name: tmp_path / ("b" if name == part else "a") / name for name in ("samples", "held-out")}
    with pytest.raises(DistillationError, match="another run: its contents"):  # or that it was given
        learn(student(), tmp_path / "a", *folders.values(), train="parameters")
    copies = [Samples(shutil.copytree(tmp_path / "a" / name, tmp_path / "moved" / name)) for name in ("samples", "held-out")]
    assert learn(student(), tmp_path / "a", *copies, train="parameters").resumed_from == 3


def test_samples_on_disk_give_the_same_result(tmp_path: Path) -> None:
    first = learn(pipe := student(), tmp_path / "a", train="parameters")
    given = learn(other := student(), tmp_path / "b", tmp_path / "a" / "samples", Samples(tmp_path / "a" / "held-out"), train="parameters")
    assert untimed(first) == untimed(given)
    assert same(state(pipe.transformer), state(other.transformer))


# The teacher, and what is left behind


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lora", [False, True], ids=["plain", "user-lora"])
def test_the_original_stays_as_it_was(tmp_path: Path, mode: Any, lora: bool) -> None:
    pipe = prompt_pipe()
    if lora:
        tiny.add_lora(pipe, weight=0.5)
    for name, parameter in pipe.transformer.named_parameters():
        parameter.requires_grad_("norm" not in name and "single" not in name)
    before, requires, picture, processors = (
        state(pipe.transformer),
        flags(pipe.transformer),
        draw(pipe),
        pipe.transformer.attn_processors,
    )
    accelerate(pipe, SPECS[mode])
    student_picture = draw(pipe)
    learn(pipe, tmp_path, train=mode)
    assert flags(pipe.transformer) | requires == flags(pipe.transformer)
    assert not torch.equal(draw(pipe), student_picture)
    with dense(pipe):
        assert torch.equal(draw(pipe), picture)
    restore(pipe)
    assert torch.equal(draw(pipe), picture)
    assert same(state(pipe.transformer), before)
    assert flags(pipe.transformer) == requires
    assert pipe.transformer.attn_processors == processors
    assert (getattr(pipe.transformer, "peft_config", {}).keys() == {"style"}) == lora


def test_attention_mode_trains_below_a_lora(tmp_path: Path) -> None:
    pipe = prompt_pipe()
    tiny.add_lora(pipe)  # on to_q and to_v
    before = state(pipe.transformer)
    learn(accelerate(pipe, tiny.SPARSE), tmp_path, train="attention")
    moved = {name for name, tensor in state(pipe.transformer).items() if name in before and not torch.equal(tensor, before[name])}
    assert any(".to_k.weight" in name for name in moved)
    assert any(".to_q.base_layer.weight" in name for name in moved)
    assert not any(".lora_" in name for name in moved)


# Resuming

RUN = {"steps": 6, "batch_size": 2, "checkpoint_every": 2}


def assert_resumes(folder: Path, mode: Any, **settings: Any) -> None:
    """The run in `folder`, continued, ends as one that was never interrupted."""
    whole, resumed = student(mode), student(mode)
    expected, got = learn(whole, folder.parent / "whole", train=mode, **settings), learn(resumed, folder, train=mode, **settings)
    assert 0 < got.resumed_from < settings["steps"]
    assert same(state(resumed.transformer), state(whole.transformer))
    assert untimed(got) == dataclasses.replace(untimed(expected), resumed_from=got.resumed_from)
    rows = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert rows == list(range(settings["steps"] + 1))


@pytest.mark.parametrize(("number", "mode"), [(signal.SIGKILL, "lora"), (signal.SIGINT, "attention")], ids=["killed", "interrupted"])
def test_a_killed_run_resumes_to_the_bit(tmp_path: Path, number: signal.Signals, mode: str) -> None:
    folder, errors = tmp_path / "killed", tmp_path / "stderr.txt"
    child = forked.start(tiny.CHILD, folder, {}, errors, mode, str(torch.get_num_threads()))
    try:
        deadline = time.monotonic() + 90
        while not (folder / "checkpoint-0000002" / "record.json").exists() and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if child.pid and child.is_alive():
            os.kill(child.pid, number)
        child.join(60)
    finally:
        child.kill()
    assert child.exitcode in (-number, 128 + number), errors.read_text()[-3000:]
    assert_resumes(folder, mode, **RUN)


@pytest.mark.parametrize("settings", [{}, {"flow_weight": 1.0, "evaluate_every": 2}], ids=["steps", "flow"])
@pytest.mark.parametrize("mode", MODES)
def test_an_error_at_a_step_leaves_a_run_that_resumes(tmp_path: Path, mode: Any, settings: dict[str, Any]) -> None:
    pipe = student(mode)
    before = flags(pipe.transformer)
    tiny.stop_training(pipe, 7)  # the second forward of the fourth step
    with pytest.raises(KeyboardInterrupt):
        learn(pipe, tmp_path / "stopped", train=mode, **RUN | settings)
    assert_resumes(tmp_path / "stopped", mode, **RUN | settings)
    assert {**flags(pipe.transformer), **before} == flags(pipe.transformer)
    assert not pipe.transformer.training


def test_a_finished_run_is_kept(tmp_path: Path) -> None:
    first = learn(pipe := student(), tmp_path, train="parameters")
    again = learn(other := student(), tmp_path, train="parameters")
    assert again == dataclasses.replace(first, resumed_from=3)
    assert same(state(other.transformer), state(pipe.transformer))


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    learn(student(), tmp_path, train="parameters")
    path = tmp_path / "checkpoint-0000003" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DistillationError, match="checkpoint-0000003"):
        learn(student(), tmp_path, train="parameters")


# Refusals


def other_weights() -> Any:
    pipe = prompt_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1e-3
    return accelerate(pipe, tiny.SPARSE)


REFUSALS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "not-accelerated": (prompt_pipe, {}, "is not accelerated: call accelerate"),
    "fovea-whole": (lambda: accelerate(prompt_pipe(), Fovea(1.0)), {"gradient_checkpointing": True}, "agree to rounding"),
    "clear-whole": (lambda: accelerate(prompt_pipe(), CLEAR(50.0)), {"train": "attention"}, "agree to rounding"),
    "one-block": (lambda: accelerate(prompt_pipe(), SLA(0.5)), {"train": "parameters"}, "agree to rounding"),
    "nothing-to-train": (lambda: student("lora"), {"train": "parameters"}, "leaves nothing to train"),
    "other-weights": (other_weights, {"train": "parameters"}, "teacher"),
    "other-config": (student, {"train": "parameters", "learning_rate": 1e-5}, "another run.*learning_rate"),
    "other-spec": (lambda: accelerate(prompt_pipe(), SLA(0.5, block=(16, 16))), {"train": "parameters"}, "another run.*spec"),
    "one-prompt": (student, {"prompts": PROMPTS[:1]}, "at least two prompts"),
    "no-prompts": (student, {"prompts": []}, "at least two prompts"),
    "blank-prompt": (student, {"prompts": ["a cat", " "]}, "prompts must be"),
    "no-held-out-samples": (student, {"prompts": Path("somewhere")}, "held_out"),
    "no-samples": (student, {"prompts": Path("nowhere"), "held_out": PROMPTS[:1]}, "nowhere"),
}


@pytest.mark.parametrize(("make", "settings", "says"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_leaves_the_pipeline_alone(tmp_path: Path, make: Callable[[], Any], settings: dict[str, Any], says: str) -> None:
    if says.startswith(("another run", "teacher")):
        learn(student(), tmp_path, train="parameters")
    pipe = make()
    with unchanged(pipe), pytest.raises((DistillationError, NotAcceleratedError), match=says):
        learn(pipe, tmp_path, **settings)


def test_bfloat16_tells_rounding_from_a_difference(tmp_path: Path) -> None:
    with pytest.raises(DistillationError, match="agree to rounding"):
        learn(accelerate(tiny.half_pipe(), Fovea(1.0)), tmp_path / "a")
    assert learn(accelerate(tiny.half_pipe(), Fovea(0.5)), tmp_path / "b", steps=1).error_before > 0.05


def test_each_run_has_its_precision(tmp_path: Path) -> None:
    results = [learn(student(), tmp_path / p, steps=1, train="parameters", mixed_precision=p) for p in ("no", "bf16", "no")]
    no, half, again = (untimed(result).history[-1] for result in results)
    assert no == again != half
    assert half["loss"] == pytest.approx(no["loss"], rel=0.05)


def test_a_nan_loss_is_an_error_and_leaves_the_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "relative_error", lambda value, target: value.sum() * float("nan"))
    pipe = student()
    before = flags(pipe.transformer)
    with pytest.raises(DistillationError, match="step 0"):
        learn(pipe, tmp_path, train="parameters")
    assert (flags(pipe.transformer), pipe.transformer.training) == (before, False)


NUMBERS = [-1, float("nan"), float("inf"), "x", None, True]
BAD: dict[str, list[Any]] = {
    **{name: [0, -1, 1.5, "3", None, True] for name in ("steps", "batch_size", "lora_rank", "checkpoint_every")},
    **{name: [-1, 0.5, "3", None, True] for name in ("warmup_steps", "evaluate_every", "seed")},
    **{name: [0, *NUMBERS] for name in ("learning_rate", "max_grad_norm")},
    "parameter_learning_rate": [0, *(x for x in NUMBERS if x is not None)],
    **{name: list(NUMBERS) for name in ("weight_decay", "prediction_weight", "attention_weight", "flow_weight")},
    "train": ["all", None, "LoRA", ["lora"]], "mixed_precision": ["fp32", None, True], "gradient_checkpointing": ["yes", 1, None],
    "output_dir": [None, 3, ""],
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values], ids=str)
def test_a_bad_setting_is_named_with_its_value(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as raised:
        DistillConfig(**{name: value})
    assert repr(value) in str(raised.value)
    with pytest.raises(ValueError, match="at least one of"):
        DistillConfig(prediction_weight=0, attention_weight=0)


def test_dense_steps_do_not_hide_the_method_from_the_training(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), tiny.LORA_SPEC, dense_steps=1)
    result = learn(pipe, tmp_path, steps=1)
    assert result.error_before > 1e-4
    assert pipe.transformer._dit_accel.context.assignment.dense_steps == 1


# What is refused with fused projections


def test_trained_weights_are_not_put_beside_fused_projections(tmp_path: Path) -> None:
    trained, fused = student("lora"), prompt_pipe()
    learn(trained, tmp_path / "run", train="lora", steps=1)
    save_adapter(trained, tmp_path / "adapter")
    fused.transformer.fuse_qkv_projections()
    with pytest.raises(AdapterError, match=r"2 layers have fused projections"):
        load_adapter(fused, tmp_path / "adapter")
    assert not hasattr(fused.transformer, CONTEXT)
    with pytest.raises(DistillationError, match="fused projections"):
        learn(accelerate(fused, SPECS["lora"]), tmp_path / "other", train="lora")
    assert not (tmp_path / "other").exists()


def test_a_file_of_prompts_is_no_folder_of_samples(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    with pytest.raises(DistillationError, match=r"prompts\.txt is a file: pass its lines"):
        learn(student("lora"), tmp_path / "run", str(tmp_path / "prompts.txt"), train="lora")
