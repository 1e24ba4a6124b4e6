"""Writing files: contents reach the disk before their name does, and where the disk refuses them the old ones stay."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_accel import files
from dit_accel.errors import WriteError

NEW = {"a": torch.ones(3)}


def stage(path: Path) -> None:
    with files.staged(path.parent) as folder:
        (folder / path.name).write_text("new")


WRITERS: dict[str, Callable[[Path], Any]] = {
    "bytes": lambda path: files.write_bytes(path, b"new"),
    "tensors": lambda path: files.write_tensors(path, NEW),
    "create": lambda path: files.create_json(path, {"new": 1}),
    "folder": lambda path: files.replace_folder(path, {"state.safetensors": NEW, "record.json": {"new": 1}}),
    "staged": stage,
}


def test_a_blocks_own_error_is_not_said_to_be_of_writing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file") as raised, files.staged(tmp_path):
        (tmp_path / "model.safetensors").read_bytes()
    assert not isinstance(raised.value, WriteError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", WRITERS)
def test_contents_are_on_the_disk_before_the_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "file", []

    def fsync(descriptor: int) -> None:
        assert not path.exists()
        synced.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    WRITERS[name](path)
    written = [path] if path.is_file() else list(path.iterdir())
    assert sorted(synced) == sorted(file.stat().st_ino for file in written)


@pytest.mark.parametrize("name", [name for name in WRITERS if name != "create"])
def test_a_disk_that_refuses_leaves_what_was_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WriteError, match=r"can't be written in .*: No space left on device"):
        WRITERS[name](path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_can_not_take_its_place_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder"
    files.replace_folder(path, {"record.json": {"old": 1}})
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if (self / "state.safetensors").exists() and target == path:
            raise OSError(errno.EIO, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(WriteError, match="Input/output error"):
        WRITERS["folder"](path)
    assert [file.name for file in path.iterdir()] == ["record.json"]
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    WRITERS["folder"](path)
    assert {file.name for file in path.iterdir()} == {"record.json", "state.safetensors"}
    assert list(tmp_path.iterdir()) == [path]
