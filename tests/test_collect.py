"""A folder of samples that several processes fill, in several sizes, of pictures and videos; its manifest, its index and its commands."""

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import distill_fixtures as tiny
import pytest
import torch
import yaml
from conftest import fill_randomly
from distill_fixtures import CALL, PROMPTS, prompt_pipe, same, state, student
from test_cli import fail, make_tiny, run, succeed
from tiny_video import wan22_two_experts

from dit_accel import SLA, Fovea, accelerate, distill, files
from dit_accel.adapters.base_model import UNKNOWN, base_model_name, licence_of
from dit_accel.errors import DistillationError, WriteError
from dit_accel.finetune.data import collect as collecting
from dit_accel.finetune.data import store as cache
from dit_accel.finetune.data.collect import Samples, collect, damaged_runs, write_run

REST = {name: value for name, value in CALL.items() if name not in ("height", "width")}
SIZES = [(112, 144), (80, 208)]


def contents(folder: Path) -> dict[str, bytes]:
    """The files of all runs."""
    return {path.name: path.read_bytes() for path in folder.glob("run-*")}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / cache.INDEX).read_text().splitlines()]


# One manifest


def manifest(teacher: str) -> dict[str, Any]:
    return {"format": cache.FORMAT, "teacher": teacher, "model": "M", "call": {}, "base_model": "", "licence": UNKNOWN}


def test_of_many_that_come_at_once_one_makes_the_manifest(tmp_path: Path) -> None:
    count = 16
    barrier, refused = threading.Barrier(count), []

    def come(number: int) -> None:
        barrier.wait()
        try:
            cache.claim(tmp_path, manifest(f"teacher {number}"))
        except DistillationError as error:
            refused.append((number, str(error)))

    for turn in range(20):
        refused.clear()
        (tmp_path / cache.MANIFEST).unlink(missing_ok=True)
        threads = [threading.Thread(target=come, args=(number,)) for number in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winner = cache.read_manifest(tmp_path)["teacher"]
        assert {number for number, _ in refused} == {n for n in range(count) if f"teacher {n}" != winner}, turn
        assert all(f"contains samples of teacher '{winner}'" in text for _, text in refused)
        assert [path.name for path in tmp_path.iterdir()] == [cache.MANIFEST]


def test_one_that_is_made_between_the_look_and_the_writing_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def late(source: Any, target: Any) -> None:
        (tmp_path / cache.MANIFEST).write_text(json.dumps(manifest("another")))
        real(source, target)

    monkeypatch.setattr(files.os, "link", late)
    with pytest.raises(DistillationError, match="contains samples of teacher 'another', not"):
        collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    assert cache.read_manifest(tmp_path) == manifest("another")
    assert [path.name for path in tmp_path.iterdir()] == [cache.MANIFEST]


@pytest.mark.parametrize("first", [False, True], ids=["alone", "late"])
def test_file_systems_without_hard_links_do_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool) -> None:
    def refuse(source: Any, target: Any) -> None:
        if first:
            (tmp_path / cache.MANIFEST).write_text(json.dumps(manifest("another")))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", refuse)
    with pytest.raises(DistillationError, match="'another'") if first else contextlib.nullcontext():
        cache.claim(tmp_path, manifest("mine"))
    assert cache.read_manifest(tmp_path) == manifest("another" if first else "mine")
    assert [path.name for path in tmp_path.iterdir()] == [cache.MANIFEST]


def test_another_reason_for_no_manifest_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Any, target: Any) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(files.os, "link", refuse)
    with pytest.raises(WriteError, match=f"manifest.json can't be written in {tmp_path}: Disk quota exceeded"):
        cache.claim(tmp_path, manifest("mine"))
    assert list(tmp_path.iterdir()) == []


# Several processes, each with an order of its own


def test_what_another_made_meanwhile_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collect(prompt_pipe(), PROMPTS, tmp_path / "other", **CALL)
    made: list[str] = []
    real = collecting._collect_one

    def watched(pipe: Any, folder: Path, key: Any, call: Any) -> None:
        real(pipe, folder, key, call)
        made.append(key.prompt)
        if len(made) == 1:  # the others come from another process, one of them broken
            for path in (tmp_path / "other").glob("run-*"):
                if not (folder / path.name).exists():
                    (folder / path.name).write_bytes(path.read_bytes()[: -len(made)] if len(contents(folder)) == 1 else path.read_bytes())

    monkeypatch.setattr(collecting, "_collect_one", watched)
    samples = collect(prompt_pipe(), PROMPTS, tmp_path / "here", **CALL)
    assert len(made) == 2
    assert contents(tmp_path / "here") == contents(tmp_path / "other")
    assert [entry.prompt for entry in samples.entries] == PROMPTS


def test_each_process_has_an_order_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"{PROMPTS[0]} {i}" for i in range(30)]
    keys = [cache.Key(prompt, i, None) for i, prompt in enumerate(prompts)]
    cache.claim(tmp_path, manifest("mine"))
    collecting.processes(torch.device("cpu"))
    orders = [collecting._todo(tmp_path, keys, "", True) for _ in range(3)]
    assert all(sorted(order, key=keys.index) == keys for order in orders)
    assert orders[0] != orders[1] != orders[2]  # two equal ones: 1 in 30!


def test_leftovers_of_the_dead_are_cleared_and_never_read(tmp_path: Path) -> None:
    whole = collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    dead, living = (tmp_path / f".{whole.entries[0].file}.{name}" for name in ("dead", "living"))
    for path in (dead, living):
        path.write_bytes(b"half")
    os.utime(dead, (time.time() - cache.LEFTOVER - 60,) * 2)
    assert len(Samples(tmp_path)) == 2
    collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    assert (dead.exists(), living.exists()) == (False, True)
    assert damaged_runs(tmp_path) == {}


# The index is for people


def test_the_index_tells_the_files(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS, tmp_path, seed=7, **CALL)
    assert rows(tmp_path) == [{"file": entry.file, **dataclasses.asdict(entry), "size": [112, 144]} for entry in samples.entries]
    assert [(row["prompt"], row["seed"], row["forwards"]) for row in rows(tmp_path)] == [(p, 7 + i, 2) for i, p in enumerate(PROMPTS)]
    (tmp_path / cache.INDEX).unlink()
    assert [e.file for e in Samples(tmp_path).entries] == [e.file for e in samples.entries]
    collect(prompt_pipe(), PROMPTS[:1], tmp_path, seed=7, **CALL)
    assert len(rows(tmp_path)) == 3


def test_a_damaged_run_that_was_not_asked_for_is_only_named(tmp_path: Path) -> None:
    files_of = [entry.file for entry in collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL).entries]
    (tmp_path / files_of[1]).write_bytes(b"")
    assert len(collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)) == 2
    assert [row["file"] for row in rows(tmp_path) if "damaged" in row] == [files_of[1]]
    assert list(damaged_runs(tmp_path)) == [files_of[1]]


def test_the_last_to_write_the_index_leaves_none_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = collect(prompt_pipe(), PROMPTS, tmp_path / "all", **CALL).entries
    collect(prompt_pipe(), PROMPTS[:2], tmp_path / "some", **CALL)
    real = cache.write_text

    def late(path: Path, text: str) -> None:
        real(path, text)
        (tmp_path / "some" / entries[2].file).write_bytes((tmp_path / "all" / entries[2].file).read_bytes())

    monkeypatch.setattr(cache, "write_text", late)
    cache.write_index(tmp_path / "some")
    assert [row["file"] for row in rows(tmp_path / "some")] == [entry.file for entry in entries]


def test_one_run_is_written_by_itself(tmp_path: Path) -> None:
    cache.claim(tmp_path, manifest("mine"))
    arguments = {"hidden_states": torch.randn(1, 4, 2), "timestep": torch.tensor([0.5]), "settings": {"list": [1, None, "x"]}}
    path = write_run(tmp_path, "a cat", 3, [(arguments, torch.ones(1, 4, 2, dtype=torch.bfloat16))], torch.zeros(1, 4, 2), size=(32, 64))
    (entry,) = Samples(tmp_path).entries
    assert (entry.file, entry.prompt, entry.seed, entry.size, entry.forwards) == (path.name, "a cat", 3, (32, 64), 1)
    forward = Samples(tmp_path)[0]
    assert torch.equal(forward.arguments["hidden_states"], arguments["hidden_states"])
    assert forward.arguments["settings"] == arguments["settings"]
    assert (forward.prediction.dtype, forward.prompt, forward.seed) == (torch.bfloat16, "a cat", 3)


# Several sizes


def test_prompts_take_the_sizes_in_turn(tmp_path: Path) -> None:
    samples = collect(prompt_pipe(), PROMPTS, tmp_path, sizes=SIZES, **REST)
    tokens = {index: samples[positions[0]].arguments["hidden_states"].shape[1] for index, positions in enumerate(samples.runs())}
    assert tokens == {0: 63, 1: 65, 2: 63}
    assert [entry.size for entry in samples.entries] == [SIZES[0], SIZES[1], SIZES[0]]
    assert samples.manifest["call"] == REST
    alone = collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)  # the first and the third are there
    assert (len(alone), len(Samples(tmp_path))) == (6, 8)
    assert [entry.size for entry in alone.entries] == [SIZES[0]] * 3
    assert torch.equal(samples[0].prediction, alone[0].prediction)
    assert [row["size"] for row in rows(tmp_path)] == [list(e.size or ()) for e in Samples(tmp_path).entries]


BAD: dict[str, Any] = {"none": [], "one-side": [(16,)], "zero": [(0, 16)], "text": ["16x16"], "float": [(16.0, 16)], "flat": (16, 16)}


@pytest.mark.parametrize("sizes", BAD.values(), ids=BAD)
def test_bad_sizes_are_refused(tmp_path: Path, sizes: Any) -> None:
    with pytest.raises(DistillationError, match="sizes must be"):
        collect(prompt_pipe(), PROMPTS, tmp_path / "a", sizes=sizes, **REST)
    with pytest.raises(DistillationError, match="not both"):
        collect(prompt_pipe(), PROMPTS, tmp_path / "a", sizes=SIZES, **CALL)
    assert not (tmp_path / "a").exists()


RUN: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_every": 2, "train": "parameters", "parameter_steps": 2}


def learn_sizes(pipe: Any, folder: Path, **settings: Any) -> Any:
    config = tiny.quick(folder, **RUN | settings)
    return distill(pipe, [*PROMPTS, "a star"], config, held_out=["a rocket", "a tree"], progress=False, sizes=SIZES, **REST)


@pytest.mark.parametrize("flow", [0.0, 1.0], ids=["steps", "flow"])
def test_a_batch_of_several_sizes_is_learned_from_and_resumed(tmp_path: Path, flow: float) -> None:
    seen = tiny.student_forwards(pipe := student())
    whole = learn_sizes(pipe, tmp_path / "whole", flow_weight=flow)
    assert {arguments["hidden_states"].shape[1] for arguments, _ in seen} == {63, 65}
    assert {entry.size for entry in Samples(tmp_path / "whole" / "held-out").entries} == set(SIZES)
    assert all(math.isfinite(value) for row in whole.history for value in row.values())
    stopped, resumed = student(), student()
    tiny.stop_training(stopped, 7)
    with pytest.raises(KeyboardInterrupt):
        learn_sizes(stopped, tmp_path / "stopped", flow_weight=flow)
    got = learn_sizes(resumed, tmp_path / "stopped", flow_weight=flow)
    assert got.resumed_from == 2
    assert dataclasses.replace(tiny.untimed(got), resumed_from=0) == tiny.untimed(whole)
    assert same(state(resumed.transformer), state(pipe.transformer))


def test_other_sizes_are_another_run(tmp_path: Path) -> None:
    tiny.learn(student(), tmp_path, train="parameters")
    with pytest.raises(DistillationError, match="another run: its prompts"):
        distill(student(), PROMPTS, tiny.quick(tmp_path, train="parameters"), progress=False, sizes=SIZES[1:], **REST)


# Videos

CLIP: dict[str, Any] = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2, "max_sequence_length": 8}


def video_pipe() -> Any:
    """A tiny Wan pipeline that takes real prompts."""
    from dit_accel.pipelines.builtin_video.components import make_pipeline

    with torch.random.fork_rng():
        pipe = make_pipeline(num_layers=1)
    fill_randomly(pipe.transformer)
    with torch.no_grad():  # logits spread enough for the attention to choose
        for name, parameter in pipe.transformer.named_parameters():
            if name.endswith(("attn1.norm_q.weight", "attn1.norm_k.weight", "attn1.to_v.weight")):
                parameter.mul_(2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_videos_are_recorded_with_both_passes_of_guidance(tmp_path: Path) -> None:
    samples = collect(video_pipe(), ["a panda moving left"], tmp_path, guidance_scale=3.0, **CLIP)
    assert len(samples) == 4
    pairs = [(samples[i], samples[i + 1]) for i in (0, 2)]
    for with_prompt, without in pairs:
        assert torch.equal(with_prompt.arguments["hidden_states"], without.arguments["hidden_states"])
        assert not torch.equal(with_prompt.arguments["encoder_hidden_states"], without.arguments["encoder_hidden_states"])
        assert not torch.equal(with_prompt.prediction, without.prediction)
    assert samples[0].arguments["hidden_states"].shape == samples[0].latents.shape
    assert samples[0].latents.shape[2] > 1  # frames
    expected = video_pipe()(
        "a panda moving left", generator=torch.Generator().manual_seed(0), output_type="latent", guidance_scale=3.0, **CLIP
    ).frames
    assert torch.equal(samples[3].latents, expected)
    assert samples.manifest["call"]["num_frames"] == 9
    with pytest.raises(DistillationError, match=r"call.*num_frames"):
        collect(video_pipe(), ["a panda moving left"], tmp_path, guidance_scale=3.0, **CLIP | {"num_frames": 5})


@pytest.mark.parametrize("spec", [SLA(0.3, tile=(2, 2, 4)), Fovea(0.3, tile=(2, 2, 4))], ids=["sla", "fovea"])
def test_videos_are_learned_from(tmp_path: Path, spec: Any) -> None:
    pipe = accelerate(video_pipe(), spec)
    steps = 1 if spec.rest == SLA(0.3).rest else 0
    config = tiny.quick(tmp_path, steps=4, train="lora", parameter_steps=steps)
    call = CLIP | {"height": 64, "width": 96}
    prompts = ["a panda moving left", "a star spinning", "a rocket moving up"]
    seen = tiny.student_forwards(pipe)
    result = distill(pipe, prompts, config, progress=False, guidance_scale=3.0, **call)
    samples = Samples(tmp_path / "samples")
    assert len(samples) == 8
    assert result.error_before > 1e-4
    assert all(math.isfinite(value) for row in result.history for value in row.values())
    texts = {tiny.text_of(forward.arguments) for forward in map(samples.__getitem__, range(8))}
    assert len(texts) == 3  # two prompts and the empty one
    assert {tiny.text_of(arguments) for arguments, _ in seen} <= texts


def test_two_transformers_are_refused(tmp_path: Path) -> None:
    pipe, _ = wan22_two_experts()
    with pytest.raises(DistillationError, match="one transformer, but the pipeline has 2"):
        collect(pipe, PROMPTS, tmp_path)


# The base model's licence


def test_the_licence_is_what_a_card_on_this_machine_names(tmp_path: Path) -> None:
    from dit_accel.pipelines.builtin import WEIGHTS

    assert licence_of(str(WEIGHTS)) == licence_of(str(WEIGHTS / "transformer")) == "apache-2.0"
    assert licence_of("") == licence_of("nobody/nothing") == licence_of(str(tmp_path)) == licence_of("no such/name/at all") == UNKNOWN
    for front, expected in (
        ("license: mit\n", "mit"), ("license: other\nlicense_name: flux-1-dev\n", "flux-1-dev"), ("tags: []\n", UNKNOWN),
        ("license: [\n", UNKNOWN),
    ):  # fmt: skip
        (tmp_path / "README.md").write_text(f"---\n{front}---\n# A model\n")
        assert licence_of(str(tmp_path)) == expected
    (tmp_path / "part").mkdir()
    assert licence_of(str(tmp_path / "part")) == UNKNOWN  # of what lies above it, unless that is its pipeline


def test_the_base_model_has_one_name_wherever_it_lies() -> None:
    transformer = SimpleNamespace(config={"_name_or_path": "/cache/models--owner--some-model/snapshots/0a1b2c/transformer"})
    assert base_model_name(transformer, transformer) == "owner/some-model"
    assert base_model_name(SimpleNamespace(config={"_name_or_path": "owner/name"}), transformer) == "owner/name"
    assert base_model_name(SimpleNamespace(config={}), SimpleNamespace(config={"_name_or_path": "folder/of/mine"})) == "folder/of/mine"
    assert base_model_name(prompt_pipe(), prompt_pipe().transformer) == ""


# The commands

SMALL = ["--steps", "2", "--max-sequence-length", "16"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny pipeline and a card."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a panda\na cat\n")
    return file


def test_collect_shows_the_licence_and_checks(model: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    arguments = ["collect", "--prompts", prompts, "--out", out, "--model", model, "--size", "256x128", "--size", "128x128", *SMALL]
    text = succeed(*arguments)
    assert f"4 forwards in {out}" in text
    assert "licence of the base model: mit" in text
    assert [entry.size for entry in Samples(out).entries] == [(128, 256), (128, 128)]
    assert "2 runs, all whole" in succeed("collect", "--check", "--out", out)
    path = out / Samples(out).entries[0].file
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    result = run("collect", "--check", "--out", out)
    assert result.exit_code == 1
    assert path.name in result.stdout
    assert "1 of 2 runs are damaged" in result.stdout
    succeed(*arguments)
    assert path.read_bytes() == whole
    expected = "give one of --prompts, --pictures and --check, not"
    assert fail("collect", "--check", "--out", out, "--prompts", prompts) == f"{expected} --prompts and --check"
    assert fail("collect", "--out", out) == f"{expected} none"
    sizes = ["--size", "256x128", "--size", "128x128"]
    assert fail("collect", "--pictures", tmp_path, "--out", out, *sizes) == "--pictures takes one --size, not 256x128 and 128x128"
    assert "is no folder of samples made by collect" in fail("collect", "--check", "--out", tmp_path / "nowhere")


def test_sizes_and_licence_reach_the_adapter(model: str, prompts: Path, tmp_path: Path) -> None:
    held_out, out = tmp_path / "held-out.txt", tmp_path / "out"
    held_out.write_text("a rocket\na tree\n")
    arguments = ["distill", "--prompts", prompts, "--held-out", held_out, "--method", "clear:2", "--out", out, "--model", model]
    arguments += ["--size", "256x128", "--size", "128x256", "--lora-rank", 2, "--steps", 1, "--sampling-steps", 1]
    succeed(*arguments, "--max-sequence-length", 16)
    record = json.loads((out / "adapter" / "dit_accel_config.json").read_text())["training"]
    assert record["sampling"]["sizes"] == [[128, 256], [256, 128]]
    assert record["licence"] == "mit"
    card = (out / "adapter" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["license"] == "mit"
    assert "under the licence `mit`" in card


def test_videos_from_the_command_line(prompts: Path, tmp_path: Path) -> None:
    video_pipe().save_pretrained(tmp_path / "model")
    out, common = tmp_path / "out", ["--model", tmp_path / "model", "--frames", 9, "--size", "96x64", "--max-sequence-length", 8]
    arguments = ["--prompts", prompts, *common, "--guidance", 3]
    assert f"8 forwards in {out}" in succeed("collect", "--out", out, *arguments, "--steps", 2)
    assert Samples(out).manifest["call"]["num_frames"] == 9
    arguments += ["--method", "clear:1", "--steps", 2, "--sampling-steps", 2, "--lora-rank", 2]
    assert "after" in succeed("distill", "--out", tmp_path / "trained", *arguments)
    record = json.loads((tmp_path / "trained" / "adapter" / "dit_accel_config.json").read_text())["training"]
    assert (record["sampling"]["num_frames"], record["licence"]) == (9, UNKNOWN)
    assert "its licence unknown" in (tmp_path / "trained" / "adapter" / "README.md").read_text()
    assert (
        "makes videos: give its number of frames"
        in run("collect", "--out", tmp_path / "b", "--prompts", prompts, "--model", tmp_path / "model").stderr
    )
