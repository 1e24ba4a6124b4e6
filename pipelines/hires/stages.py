"""Finished stages of a high-resolution picture on disk, so that the same call continues where it was stopped.

A folder has `settings.json`, and for each finished stage its final latents (safetensors) and, written after them, a JSON file with their
SHA-256. Every file is written to a temporary name and renamed.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.errors import StageError
from dit_accel.files import write_json, write_tensors

SETTINGS = "settings.json"


class Stages:
    """The stages in a folder, or none at all where the folder is None."""

    def __init__(self, folder: str | Path | None, settings: dict[str, Any]) -> None:
        """The folder is there already. Raises StageError where it belongs to other settings."""
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if not path.exists():
            left = sorted(file.name for file in self.folder.glob("stage-*"))
            if left:
                raise StageError(f"{path} is missing, but {left} are there: put it back, or name another folder")
            write_json(path, settings)
            return
        kept = _read_json(path)
        differs = [name for name in sorted({*kept, *settings}) if kept.get(name) != settings.get(name)]
        if differs:
            pairs = "; ".join(f"{name} was {kept.get(name)!r}, is {settings.get(name)!r}" for name in differs)
            raise StageError(f"{self.folder} contains stages of other settings. {pairs}")

    def _paths(self, number: int, size: tuple[int, int]) -> tuple[Path, Path]:
        if self.folder is None:
            raise StageError("no folder for the stages was given")
        name = f"stage-{number}-{size[1]}x{size[0]}"
        return self.folder / f"{name}.safetensors", self.folder / f"{name}.json"

    def load(self, number: int, size: tuple[int, int]) -> Tensor | None:
        """The final latents of a stage, or None where it is not finished. Raises StageError where a file is damaged or missing."""
        if self.folder is None:
            return None
        path, record = self._paths(number, size)
        if not record.exists():
            return None
        recorded, found = _read_json(record).get("sha256"), _sha256(path)
        if recorded != found:
            raise StageError(f"{path} is damaged: its SHA-256 is {found[:16]}, not {str(recorded)[:16]}; {_again(path, record)}")
        try:
            return load_file(path)["latents"]
        except (OSError, KeyError, SafetensorError) as error:
            raise StageError(f"{path} is damaged: {error}; {_again(path, record)}") from error

    def save(self, number: int, size: tuple[int, int], latents: Tensor, record: dict[str, Any]) -> None:
        """Keep a finished stage; `record` is written next to its checksum."""
        if self.folder is None:
            return
        path, record_path = self._paths(number, size)
        write_tensors(path, {"latents": latents})
        write_json(record_path, {"height": size[0], "width": size[1], **record, "sha256": _sha256(path)})


def _again(path: Path, record: Path) -> str:
    return f"delete {path.name} and {record.name}, and those of the stages after it, to draw it again"


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise StageError(f"{path} can't be read: {error.strerror}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StageError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise StageError(f"{path} is damaged: it contains no JSON object, but a {type(data).__name__}")
    return data
