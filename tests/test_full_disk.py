"""A disk that fills up, a folder that takes no files: an error that names it, nothing lost, no rubbish left, and the same command goes on.

The disk is full by the kernel's own limit on a file's size: every write past it fails, whatever library makes it.
"""

import contextlib
import dataclasses
import json
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import hires_fixtures as stages
import pytest
import torch
from distill_fixtures import CALL, PROMPTS, learn, prompt_pipe, same, state, student
from test_cli import SMALL, fail, make_tiny, succeed

from dit_accel import files, load_adapter, save_adapter
from dit_accel.errors import AdapterError, DitAccelError, WriteError
from dit_accel.finetune.data.collect import Samples, collect, damaged_runs

SAID = ".*File too large"


@contextlib.contextmanager
def full_from(name: str, limit: int = 64) -> Iterator[None]:
    """From the first write on whose file or folder has this in its name, files can't grow past `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    reached = []

    def watched(path: Path) -> Path:
        if name in path.name:
            reached.append(path)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        real = files._beside
        patch.setattr(files, "_beside", watched)
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reached


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Samples


@pytest.mark.parametrize("name", ["run-", "index.jsonl"])
def test_samples(tmp_path: Path, name: str) -> None:
    collect(prompt_pipe(), PROMPTS[:1], tmp_path, **CALL)
    before = contents(tmp_path)
    with full_from(name), pytest.raises(WriteError, match=f"{name}.* can't be written in {tmp_path}: {SAID}"):
        collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)
    after = contents(tmp_path)
    assert {key: after[key] for key in before} == before
    assert len(after) == len(before) + (name != "run-")
    assert damaged_runs(tmp_path) == {}
    assert len(collect(prompt_pipe(), PROMPTS[:2], tmp_path, **CALL)) == 4


@pytest.mark.parametrize("links", [True, False])
def test_a_new_folder_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    def refuse(source: Any, target: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (64, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        raise PermissionError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(files.os, "link", refuse)
    with (
        full_from("manifest.json", 64 if links else 10_000),
        pytest.raises(WriteError, match=f"manifest.json can't be written in {tmp_path}: {SAID}"),
    ):
        collect(prompt_pipe(), PROMPTS, tmp_path, **CALL)
    assert contents(tmp_path) == {}


# Checkpoints and logs

RUN: dict[str, Any] = {"steps": 6, "parameter_steps": 4, "checkpoint_every": 2, "train": "lora"}


@pytest.mark.parametrize("name", ["parameters-0000004", "checkpoint-0000004", "curve.png"])
def test_a_checkpoint(tmp_path: Path, name: str) -> None:
    with full_from(name), pytest.raises(WriteError, match=f"{name} can't be written in {tmp_path / 'run'}: {SAID}"):
        learn(student(), tmp_path / "run", **RUN)
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == []
    assert len(Samples(tmp_path / "run" / "samples")) == 4
    resumed, whole = student(), student()
    got, expected = (tiny.untimed(learn(pipe, tmp_path / folder, **RUN)) for pipe, folder in ((resumed, "run"), (whole, "whole")))
    assert got.resumed_from == {"parameters-0000004": 0, "checkpoint-0000004": 2, "curve.png": 2}[name]
    assert dataclasses.replace(got, resumed_from=0) == expected
    assert same(state(resumed.transformer), state(whole.transformer))


def test_a_log(tmp_path: Path) -> None:
    files.append_text(tmp_path / "log.jsonl", "{}\n" * 21)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64, hard))
    try:
        with pytest.raises(WriteError, match=f"log.jsonl can't be written in {tmp_path}: {SAID}"):
            files.append_text(tmp_path / "log.jsonl", "{}\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "log.jsonl").read_text().startswith("{}\n" * 21)


# Adapters


@pytest.mark.parametrize("limit", [64, 3000], ids=["at-once", "after-one-file"])
def test_an_adapter(tmp_path: Path, limit: int) -> None:
    pipe, adapter = student(), tmp_path / "adapter"
    learn(pipe, tmp_path / "run", train="lora", steps=1)
    save_adapter(pipe, adapter)
    before, expected = contents(adapter), tiny.draw(pipe)
    tiny.perturb(pipe)
    with full_from("stage", limit), pytest.raises(AdapterError, match=f"the adapter can't be written to {adapter}: .*too large"):
        save_adapter(pipe, adapter)
    assert contents(adapter) == before
    assert torch.equal(tiny.draw(load_adapter(prompt_pipe(), adapter)), expected)
    save_adapter(pipe, adapter)
    assert torch.equal(tiny.draw(load_adapter(prompt_pipe(), adapter)), tiny.draw(pipe))


# Pictures and their stages


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(folder)
    return str(folder)


def test_a_picture(model: str, tmp_path: Path) -> None:
    arguments = ["generate", "a panda", "--model", model, "--method", "none", "--steps", 1, *SMALL, "--out", tmp_path / "a.png"]
    succeed(*arguments)
    before = contents(tmp_path)
    with full_from("a.png"):
        said = fail(*arguments, "--seed", 1)
    assert said.startswith(f"a.png can't be written in {tmp_path}: File too large")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["stage-1-24x16.safetensors", "stage-1-24x16.json"])
def test_a_stage(tmp_path: Path, name: str) -> None:
    pipe, call = stages.make()
    asked = {"base": 12, "folder": tmp_path, "strength": 0.75}
    expected = stages.draw(pipe, call, **asked | {"folder": None})
    with full_from(name), pytest.raises(WriteError, match=f"{name} can't be written in {tmp_path}: {SAID}"):
        stages.draw(pipe, call, **asked)
    assert {"settings.json", "stage-0-12x8.json", "stage-0-12x8.safetensors"} <= set(contents(tmp_path))
    assert not any(key.startswith(".") for key in contents(tmp_path))
    seen = stages.Forwards(pipe)
    assert stages.same(stages.draw(pipe, call, **asked), expected)
    assert len(seen.tokens) == 6  # the first stage was kept


# Folders that take no files

UNWRITABLE: dict[str, Callable[[Path], Path]] = {
    "below-a-file": lambda folder: folder / "file" / "below",
    "read-only": lambda folder: Path("/proc/self"),  # takes no file from anybody, not even from root
}


@pytest.fixture(params=UNWRITABLE)
def unwritable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    folder = UNWRITABLE[request.param](tmp_path)
    if request.param == "read-only" and not folder.is_dir():
        pytest.skip("no folder here that is read-only to all")
    return folder


def untouched(pipe: Any) -> Any:
    """A pipeline that fails the test where it samples."""
    pipe.transformer.register_forward_pre_hook(lambda *_: pytest.fail("it sampled before the folder was checked"))
    return pipe


def test_nothing_is_sampled_for_a_folder_that_takes_no_files(tmp_path: Path, unwritable: Path) -> None:
    with pytest.raises(ValueError, match=f"the folder {unwritable} can't be written to"):
        collect(untouched(prompt_pipe()), PROMPTS, unwritable, **CALL)
    with pytest.raises(ValueError, match=f"the folder {unwritable} can't be written to"):
        learn(untouched(student()), unwritable)
    samples = [collect(prompt_pipe(), prompts, tmp_path / name, **CALL) for name, prompts in (("a", PROMPTS[:2]), ("b", PROMPTS[2:]))]
    with pytest.raises(ValueError, match=f"the folder {unwritable} can't be written to"):
        learn(untouched(student()), unwritable, *samples)
    pipe, call = stages.make()
    with pytest.raises(ValueError, match=f"the folder {unwritable} can't be written to"):
        stages.draw(untouched(pipe), call, folder=unwritable)
    with pytest.raises(AdapterError, match=f"the adapter can't be written to {unwritable}"):
        save_adapter(student(), unwritable)


def test_an_error_of_ours_is_one(tmp_path: Path) -> None:
    """Whoever catches the package's errors, as the command line does, or the system's catches it; the cause is kept."""
    with full_from("x.json"), pytest.raises(DitAccelError, match=r"x\.json") as raised:
        files.write_json(tmp_path / "x.json", {"text": "x" * 100})
    assert isinstance(raised.value, OSError)
    assert not isinstance(raised.value, ValueError)
    assert isinstance(raised.value.__cause__, OSError)
    files.write_json(tmp_path / "x.json", {})
    assert json.loads((tmp_path / "x.json").read_text()) == {}
