"""Recording a pipeline's own forwards: what is stored, what is skipped, what is refused."""

import contextlib
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from distill_fixtures import CALL, MODES, PROMPTS, SPARSE, SPECS, add_lora, draw, prompt_pipe, quick, same, state
from safetensors.torch import load_file, save
from torch import Tensor

from dit_accel import accelerate, dense, distill
from dit_accel.errors import DistillationError
from dit_accel.finetune.data import record
from dit_accel.finetune.data.collect import Key, Samples, collect, damaged_runs
from dit_accel.finetune.velocity import on_device, predict, velocity_error, velocity_errors
from dit_accel.patch.weights import teacher_hash

ARGUMENTS = {
    "hidden_states", "timestep", "guidance", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids", "joint_attention_kwargs",
}  # fmt: skip


@contextlib.contextmanager
def watched(transformer: Any) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """Clones of the arguments and the output of every forward, taken by hooks of the test's own."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        arguments = {k: v.clone() if isinstance(v, Tensor) else v for k, v in kwargs.items() if k != "return_dict"}
        seen.append((arguments, output[0].clone()))

    handle = transformer.register_forward_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    return type(left) is type(right) and left == right


def assert_stored(samples: Samples, seen: list[tuple[dict[str, Any], Tensor]]) -> None:
    assert len(samples) == len(seen)
    for forward, (arguments, output) in zip([samples[i] for i in range(len(samples))], seen, strict=True):
        assert set(forward.arguments) == set(arguments)
        assert [name for name, value in arguments.items() if not equal(value, forward.arguments[name])] == []
        assert equal(output, forward.prediction)


# What is stored


def test_forwards_are_stored_as_they_were(tmp_path: Path) -> None:
    pipe = prompt_pipe()
    with watched(pipe.transformer) as seen:
        collect(pipe, PROMPTS[:1], tmp_path, seed=5, **CALL)  # of two at once, either may come first
        samples = collect(pipe, PROMPTS[:2], tmp_path, seed=5, **CALL)
    assert_stored(samples, seen)
    assert set(samples[0].arguments) == ARGUMENTS
    assert [(f.prompt, f.seed, f.index) for f in map(samples.__getitem__, range(4))] == [
        (PROMPTS[0], 5, 0), (PROMPTS[0], 5, 1), (PROMPTS[1], 6, 0), (PROMPTS[1], 6, 1),
    ]  # fmt: skip
    assert samples.runs() == [[0, 1], [2, 3]]
    assert equal(samples[3].latents, draw(prompt_pipe(), PROMPTS[1], 6))
    assert samples.timesteps(2, "timestep") == [1.0, pytest.approx(seen[3][0]["timestep"].item(), abs=0)]


def test_tuples_come_back_as_tuples(tmp_path: Path) -> None:
    """Nucleus takes the size of each sample as a tuple, and a list as the sizes of several images."""
    sizes = [(1, 9, 14), (1, 9, 14)]
    arguments = {"img_shapes": sizes, "nested": ([1, (2,)], {"a": (2.5, None)})}
    path = record.write(tmp_path, Key("a cat", 0), "", [(arguments, torch.zeros(1))], torch.zeros(1))
    assert record.damage(path, "") is None
    with record.opened(path, "") as run:
        found = run.read(0).arguments
    assert equal(found["img_shapes"], sizes)
    assert equal(found["nested"], arguments["nested"])
    assert equal(on_device(found, torch.device("cpu"))["nested"], arguments["nested"])


def test_a_callers_error_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    arguments = {"t": torch.tensor([0.5])}
    path = record.write(tmp_path, Key("a cat", 0), "", [(arguments, torch.zeros(1))], torch.zeros(1))
    for error in (KeyError("mine"), ValueError("mine"), OSError("mine"), IndexError("mine"), TypeError("mine"), AttributeError("mine")):
        with pytest.raises(type(error), match="mine") as raised, record.opened(path, ""):
            raise error
        assert raised.value is error
    with record.opened(path, "") as run:
        with pytest.raises(IndexError):
            run.read(1)
        with pytest.raises(DistillationError, match="'x' is no argument of the recorded forwards, which have t"):
            run.argument("x")
        assert run.argument("t") == [torch.tensor([0.5])]


def test_replaying_gives_the_stored_prediction(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    transformer = prompt_pipe().transformer
    with torch.no_grad():
        assert [torch.equal(predict(transformer, f.arguments), f.prediction) for f in samples] == [True] * 6
    assert velocity_error(transformer, samples) == 0.0


def test_tensors_that_forwards_share_are_stored_once(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL | {"num_inference_steps": 4})
    stored = load_file(tmp_path / samples.entries[0].file)
    shared = len({"guidance", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids"})
    assert len(stored) == shared + 4 * len({"hidden_states", "timestep", "prediction"}) + len({"latents"})


def test_guidance_in_two_passes_records_both(tmp_path: Path) -> None:
    pipe, call = prompt_pipe(), CALL | {"true_cfg_scale": 3.0, "negative_prompt": "a frog"}
    with watched(pipe.transformer) as seen:
        samples = collect(pipe, PROMPTS[:1], tmp_path, **call)
    assert_stored(samples, seen)
    first, second = samples[0].arguments, samples[1].arguments
    assert len(samples) == 4
    assert torch.equal(first["hidden_states"], second["hidden_states"])
    assert not torch.equal(first["encoder_hidden_states"], second["encoder_hidden_states"])
    assert not torch.equal(samples[0].prediction, samples[1].prediction)


class InPlace(FlowMatchEulerDiscreteScheduler):
    """Writes the next latents over the ones that the model was given."""

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> tuple[Tensor]:  # type: ignore[override]
        (stepped,) = super().step(model_output, timestep, sample.clone(), return_dict=False)
        return (sample.copy_(stepped),)


def test_arguments_are_those_of_their_time_where_the_scheduler_writes_in_place(tmp_path: Path) -> None:
    pipe = prompt_pipe(scheduler=InPlace())
    with watched(pipe.transformer) as seen:
        samples = collect(pipe, PROMPTS[:1], tmp_path, **CALL)
    assert_stored(samples, seen)


# The original model's outputs


def test_an_accelerated_pipeline_records_its_original(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), SPARSE)
    samples, expected = collect(pipe, PROMPTS[:1], tmp_path / "a", **CALL), collect(prompt_pipe(), PROMPTS[:1], tmp_path / "b", **CALL)
    assert samples.teacher == expected.teacher
    assert [torch.equal(samples[i].prediction, expected[i].prediction) for i in range(2)] == [True, True]
    assert torch.equal(samples[0].latents, expected[0].latents)
    assert velocity_error(pipe, samples) > 1e-2  # on again afterwards


@pytest.mark.parametrize("mode", MODES)
def test_a_distilled_pipeline_records_its_original(tmp_path: Path, mode: Any) -> None:
    pipe = accelerate(prompt_pipe(), SPECS[mode])
    distill(pipe, PROMPTS, quick(tmp_path / "run", train=mode), progress=False, **CALL)
    trained = state(pipe.transformer)
    samples, expected = collect(pipe, PROMPTS[:1], tmp_path / "a", **CALL), collect(prompt_pipe(), PROMPTS[:1], tmp_path / "b", **CALL)
    assert samples.teacher == expected.teacher == teacher_hash(prompt_pipe().transformer)
    assert [torch.equal(samples[i].prediction, expected[i].prediction) for i in range(2)] == [True, True]
    assert same(state(pipe.transformer), trained)


def test_the_teacher_has_one_name_inside_dense_too(tmp_path: Path) -> None:
    pipe = accelerate(prompt_pipe(), SPECS["attention"])
    distill(pipe, PROMPTS, quick(tmp_path / "run", train="attention"), progress=False, **CALL)
    with dense(pipe):
        inside = teacher_hash(pipe.transformer)
    assert inside == teacher_hash(pipe.transformer)


@pytest.mark.parametrize("config", [None, {"disable": True}, {"disable": False, "desc": "x"}, {"leave": False}], ids=str)
def test_the_progress_bar_is_as_before(tmp_path: Path, config: dict[str, Any] | None) -> None:
    pipe = prompt_pipe()
    del pipe._progress_bar_config
    if config is not None:
        pipe.set_progress_bar_config(**config)
    collect(pipe, PROMPTS[:1], tmp_path, **CALL)
    assert getattr(pipe, "_progress_bar_config", {}) == (config or {})
    with pytest.raises(TypeError):
        collect(pipe, PROMPTS[:1], tmp_path / "other", **CALL, no_such_argument=1)
    assert getattr(pipe, "_progress_bar_config", {}) == (config or {})


# Resuming


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_what_is_there_is_skipped(tmp_path: Path) -> None:
    collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    before, contents = stamps(tmp_path), (tmp_path / "manifest.json").read_text()
    pipe = prompt_pipe()
    with watched(pipe.transformer) as seen:
        samples = collect(pipe, PROMPTS, tmp_path, **CALL)
    assert (len(seen), len(samples)) == (0, 6)
    assert (stamps(tmp_path), (tmp_path / "manifest.json").read_text()) == (before, contents)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_missing_run_alone_is_collected(tmp_path: Path, lost: int) -> None:
    whole = collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    predictions = {(f.prompt, f.index): f.prediction for f in map(whole.__getitem__, range(6))}
    (tmp_path / whole.entries[lost].file).unlink()
    pipe = prompt_pipe()
    with watched(pipe.transformer) as seen:
        samples = collect(pipe, PROMPTS, tmp_path, **CALL)
    assert len(seen) == 2
    again = {(f.prompt, f.index): f.prediction for f in map(samples.__getitem__, range(6))}
    assert again.keys() == predictions.keys()
    assert all(torch.equal(again[k], predictions[k]) for k in again)


def test_an_interrupted_collection_continues(tmp_path: Path) -> None:
    pipe = prompt_pipe()
    calls = iter(range(10))

    def stop(module: Any, args: Any) -> None:
        if next(calls) == 3:  # the second forward of the second prompt
            raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        collect(pipe, PROMPTS, tmp_path, **CALL)
    hook.remove()
    assert len(Samples(tmp_path)) == 2
    assert not pipe.transformer._forward_hooks
    with watched(pipe.transformer) as seen:
        samples = collect(pipe, PROMPTS, tmp_path, **CALL)
    assert len(seen) == 4
    with torch.no_grad():
        assert [torch.equal(predict(pipe.transformer, f.arguments), f.prediction) for f in samples] == [True] * 6


def test_a_sample_whose_file_is_gone_is_collected_again(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    (tmp_path / samples.entries[0].file).unlink()
    again = collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    assert sorted((f.prompt, f.index) for f in map(again.__getitem__, range(len(again)))) == [(p, i) for p in PROMPTS[:2] for i in (0, 1)]


def test_only_what_was_asked_for_is_given(tmp_path: Path) -> None:
    collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    samples = collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    assert {samples[i].prompt for i in range(len(samples))} == {PROMPTS[0]}


def test_call_arguments_may_be_tuples(tmp_path: Path) -> None:
    for _ in range(2):
        assert len(collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL, sigmas=(1.0, 0.5))) == 2


# Refusals


def other_weights() -> Any:
    pipe = prompt_pipe()
    with torch.no_grad():
        pipe.transformer.proj_out.bias[0] += 1e-3
    return pipe


def with_lora() -> Any:
    pipe = prompt_pipe()
    add_lora(pipe)
    return pipe


@pytest.mark.parametrize(
    ("make", "call", "says"),
    [
        pytest.param(other_weights, {}, "teacher", id="one-weight"),
        pytest.param(with_lora, {}, "teacher", id="lora"),
        pytest.param(prompt_pipe, {"num_inference_steps": 3}, "call.*3", id="steps"),
        pytest.param(prompt_pipe, {"guidance_scale": 2.0}, "call.*guidance_scale", id="one-more-argument"),
    ],
)
def test_a_folder_of_another_teacher_or_call_is_refused(tmp_path: Path, make: Callable[[], Any], call: dict[str, Any], says: str) -> None:
    collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    contents = (tmp_path / "manifest.json").read_text()
    with pytest.raises(DistillationError, match=says):
        collect(make(), PROMPTS, tmp_path, **CALL | call)
    assert (tmp_path / "manifest.json").read_text() == contents
    assert len(stamps(tmp_path)) == 1


@pytest.mark.parametrize("prompts", [[], [""], ["a cat", "  "], ["a cat", 3], [None]], ids=str)
def test_blank_prompts_are_refused(tmp_path: Path, prompts: list[Any]) -> None:
    with pytest.raises(DistillationError, match="prompts must be a non-empty list of non-empty strings"):
        collect(prompt_pipe(), prompts, tmp_path / "new", **CALL)
    assert not (tmp_path / "new").exists()


def test_a_call_that_json_cannot_hold_is_refused_before_sampling(tmp_path: Path) -> None:
    pipe = prompt_pipe()
    with watched(pipe.transformer) as seen, pytest.raises(DistillationError, match="latents"):
        collect(pipe, PROMPTS[:1], tmp_path, **CALL, latents=torch.zeros(1, 63, 16))
    assert seen == []


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


DAMAGE: dict[str, Callable[[bytes], bytes | None]] = {
    "empty": lambda data: b"",
    "half-a-header": lambda data: data[:100],
    "half": lambda data: data[: len(data) // 2],
    "one-byte-short": lambda data: data[:-1],
    "garbage": lambda data: b"\x00\xff" * 50,
    "header": lambda data: flipped(data, 9),
    "another-file": lambda data: save({"latents": torch.zeros(1)}),
    "trailing": lambda data: data + b"x",
    "gone": lambda data: None,
}
READS: dict[str, Callable[[Samples], object]] = {"forward": lambda s: s[1], "timesteps": lambda s: s.timesteps(0, "timestep")}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes | None], read: Callable[[Samples], object]) -> None:
    samples = collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    path = tmp_path / samples.entries[0].file
    whole = path.read_bytes()
    data = damage(whole)
    path.unlink()
    if data is not None:
        path.write_bytes(data)
        assert list(damaged_runs(tmp_path)) == [path.name]
        with pytest.raises(DistillationError, match=path.name):
            read(Samples(tmp_path))
    with pytest.raises(DistillationError, match=path.name):
        read(samples)
    collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    assert path.read_bytes() == whole
    assert damaged_runs(tmp_path) == {}


def test_no_flipped_bit_is_taken_for_good(tmp_path: Path) -> None:
    path = tmp_path / collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL).entries[0].file
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        assert list(damaged_runs(tmp_path)) == [path.name], (at, bit)
    path.write_bytes(flipped(whole, len(whole) - 1))
    assert len(Samples(tmp_path)) == 2  # headers alone don't show it
    with pytest.raises(DistillationError, match=f"{path.name}.*has another checksum"):
        [samples[i] for samples in [Samples(tmp_path)] for i in (0, 1)]


def test_a_run_under_anothers_name_is_named(tmp_path: Path) -> None:
    first, second = (tmp_path / entry.file for entry in collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL).entries)
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(DistillationError, match=f"{first.name}.*is the run of the prompt '{PROMPTS[1]}'"):
        Samples(tmp_path)
    collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    assert first.read_bytes() == whole


@pytest.mark.parametrize(("make", "call"), [(other_weights, {}), (prompt_pipe, {"guidance_scale": 2.0})], ids=["weights", "call"])
def test_a_run_copied_from_another_folder_is_named(tmp_path: Path, make: Callable[[], Any], call: dict[str, Any]) -> None:
    (entry,) = collect(prompt_pipe(), PROMPTS[:1], tmp_path / "a", **CALL).entries
    collect(make(), PROMPTS[:1], tmp_path / "b", **CALL | call)
    shutil.copy(tmp_path / "b" / entry.file, tmp_path / "a")
    with pytest.raises(DistillationError, match=f"{entry.file}.*other weights or with other call arguments"):
        Samples(tmp_path / "a")


MANIFESTS = [b"", b"{", b"[]", b"null", b"{}", b'{"format": "dit_accel samples 1"}', b'{"format": "dit_accel samples 2"}', b"\xff\xfe"]


@pytest.mark.parametrize("text", MANIFESTS, ids=str)
def test_a_broken_manifest_is_named(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(DistillationError, match=str(tmp_path)):
        Samples(tmp_path)
    with pytest.raises(DistillationError, match=str(tmp_path)):
        collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)


def test_a_truncated_manifest_is_named(tmp_path: Path) -> None:
    collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DistillationError, match=str(tmp_path)):
        collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    with pytest.raises(DistillationError, match="nowhere"):
        Samples(tmp_path / "nowhere")


def test_velocity_errors_compare_with_the_recorded_teacher(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    student = accelerate(prompt_pipe(), SPARSE).transformer
    with torch.no_grad():
        expected = [((predict(student, f.arguments) - f.prediction).norm() / f.prediction.norm()).item() for f in samples]
    assert velocity_errors(student, [samples[i] for i in range(4)]) == pytest.approx(expected, rel=1e-6)
    assert velocity_error(student, samples) == pytest.approx(sum(expected) / 4, rel=1e-6)


class PictureFirst(FluxPipeline):
    """Takes a picture before the prompt, as edit models and FLUX.2 do."""

    def __call__(self, image: Any = None, prompt: Any = None, **call: Any) -> Any:
        if image is not None:
            raise TypeError(f"expected a picture, got {image!r}")
        return super().__call__(prompt, **call)


def test_a_pipeline_that_takes_a_picture_first_is_given_its_prompt(tmp_path: Path) -> None:
    parts = {k: v for k, v in prompt_pipe().components.items() if k not in ("image_encoder", "feature_extractor")}
    pipe = PictureFirst(**parts)
    pipe.set_progress_bar_config(disable=True)
    samples = collect(pipe, PROMPTS[:1], tmp_path / "first", **CALL)
    expected = collect(prompt_pipe(), PROMPTS[:1], tmp_path / "stock", **CALL)
    assert [torch.equal(a.prediction, b.prediction) for a, b in zip(samples, expected, strict=True)] == [True] * len(expected)
