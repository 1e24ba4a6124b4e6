"""A folder of recorded runs, which several processes, also of several machines on a shared folder, may fill at once.

    manifest.json            what all runs of the folder share: format, teacher, model, call, licence; made once, then only compared
    run-<name>.safetensors   one for each run, see `run_file`
    index.jsonl              a line for each run, for people: file, prompt, seed, size, forwards, checksum

The run files are the one source of truth. Each appears whole, by a rename, and proves its own contents, so there is no list that one
process could overwrite for another, and no lock that a killed one could leave. An index that each appended to would be a second truth: a
kill between the two writes, or a network folder where appended lines tear, makes it a wrong one. So nothing reads the index: it is made
anew from the files' headers whenever a collection ends.
"""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.files import create_json, write_text
from dit_accel.finetune.data import record
from dit_accel.finetune.data.record import Forward, Key, RunRecord, Size

FORMAT = "dit_accel samples 2"
MANIFEST, INDEX = "manifest.json", "index.jsonl"
SHARED = ("format", "teacher", "model", "call")  # what has to be the same for all that write to a folder
NOTES = ("base_model", "licence")  # as the process that made the folder knew them
LEFTOVER = 24 * 3600  # seconds after which a temporary file has no living writer


def read_manifest(folder: Path) -> dict[str, Any]:
    """The settings that all runs of a folder share. Raises DistillationError where there is no readable manifest of this format."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise DistillationError(f"{folder} is no folder of samples made by collect: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != FORMAT or set(manifest) != {*SHARED, *NOTES}:
        raise DistillationError(
            f"the manifest of {folder} must have the format {FORMAT!r} and the fields {[*SHARED, *NOTES]}, not {found!r} or other fields: "
            "collect into a new folder"
        )
    return dict(manifest)


def claim(folder: Path, manifest: Mapping[str, Any]) -> str:
    """Make the folder's manifest, or compare: of several processes that come at once, one makes it and all others find it. Returns
    `maker_of` it.

    Raises DistillationError where the folder contains runs of another teacher or call.
    """
    if not (folder / MANIFEST).exists():
        create_json(folder / MANIFEST, manifest)
    found = read_manifest(folder)
    for name in SHARED:
        if found[name] != manifest[name]:
            raise DistillationError(f"{folder} contains samples of {name} {found[name]!r}, not {manifest[name]!r}: name another folder")
    return maker_of(found)


def maker_of(manifest: Mapping[str, Any]) -> str:
    """The mark that the runs of a folder have, by which one copied from elsewhere is recognised."""
    return hashlib.sha256(json.dumps([manifest[name] for name in SHARED], sort_keys=True).encode()).hexdigest()


def write_run(
    folder: str | Path, prompt: str, seed: int, forwards: Sequence[tuple[dict[str, Any], Tensor]], latents: Tensor, *,
    size: Size | None = None, picture: str | None = None,
) -> Path:  # fmt: skip
    """Write one run to a folder that has a manifest; returns its file.

    Args:
        forwards: of each forward the denoiser's keyword arguments (tensors, numbers, strings, lists and dicts of them) and the teacher's
            prediction.
        latents: the run's final latents, in the form of the denoiser's own input.
        size, picture: parts of what tells runs apart, see `Key`.
    """
    folder = Path(folder)
    return record.write(folder, Key(prompt, seed, size, picture), maker_of(read_manifest(folder)), forwards, latents)


def run_paths(folder: Path) -> list[Path]:
    """The files of all runs. What is being written has another name."""
    return sorted(folder.glob("run-*.safetensors"))


class Samples:
    """A folder of recorded runs, read lazily. `len` counts forwards; `teacher` is the hash of the weights that made them.

    `entries` are its runs in the order of their seeds, or those asked for by `keys`, in that order. Raises DistillationError where the
    folder contains no readable manifest, or where one of the runs is missing or damaged; what the header does not show is found when it is
    read.
    """

    def __init__(self, folder: str | Path, keys: Sequence[Key] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.teacher: str = self.manifest["teacher"]
        self._maker = maker_of(self.manifest)
        paths = run_paths(self.folder) if keys is None else [self.folder / key.file for key in keys]
        self.entries = [_entry(path, self._maker) for path in paths]
        if keys is None:
            self.entries.sort(key=lambda entry: (entry.seed, entry.file))
        self._index = [(entry, i) for entry in self.entries for i in range(entry.forwards)]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> Forward:
        entry, index = self._index[position]
        with record.opened(self.folder / entry.file, self._maker) as run:
            return run.read(index)

    @property
    def contents(self) -> str:
        """SHA-256 over what the runs' headers prove, in order: other numbers in any tensor give another, and none is read for it."""
        return hashlib.sha256("".join(entry.sha256 for entry in self.entries).encode()).hexdigest()

    def runs(self) -> list[list[int]]:
        """Positions of the forwards of each run, in order."""
        positions: dict[str, list[int]] = {}
        for position, (entry, _) in enumerate(self._index):
            positions.setdefault(entry.file, []).append(position)
        return list(positions.values())

    def timesteps(self, position: int, name: str) -> list[float]:
        """The values of argument `name` over the run that a forward belongs to."""
        return [float(value.flatten()[0]) for value in self.argument(position, name)]

    def argument(self, position: int, name: str) -> list[Any]:
        """Argument `name` in every forward of the run that a forward belongs to."""
        entry, _ = self._index[position]
        with record.opened(self.folder / entry.file, self._maker) as run:
            return run.argument(name)


def _entry(path: Path, maker: str) -> RunRecord:
    with record.opened(path, maker) as run:
        return run.entry


def readable_runs(folder: Path) -> list[RunRecord]:
    """The runs of a folder whose headers can be read; damaged ones, which a collection makes again, are left out."""
    maker, entries = maker_of(read_manifest(folder)), []
    for path in run_paths(folder):
        with contextlib.suppress(DistillationError):
            entries.append(_entry(path, maker))
    return entries


def damaged_runs(folder: str | Path) -> dict[str, str]:
    """The damaged run files of a folder and what is wrong with each; every byte is read, one tensor at a time."""
    folder = Path(folder)
    maker = maker_of(read_manifest(folder))
    found = {path.name: record.damage(path, maker) for path in run_paths(folder)}
    return {name: wrong for name, wrong in found.items() if wrong is not None}


def write_index(folder: Path) -> None:
    """Make the index anew from the run files, again where another process added one meanwhile: the last to write leaves none out."""
    maker = maker_of(read_manifest(folder))
    listed: list[Path] | None = None
    while listed != (paths := run_paths(folder)):
        rows = [_index_row(path, maker) for path in paths]
        rows.sort(key=lambda row: (row.get("seed", -1), row["file"]))
        write_text(folder / INDEX, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        listed = paths


def _index_row(path: Path, maker: str) -> dict[str, Any]:
    try:
        entry = _entry(path, maker)
    except DistillationError as error:
        return {"file": path.name, "damaged": str(error)}
    return {"file": entry.file, **dataclasses.asdict(entry)}


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that killed processes left: those that nobody has written to for a day, by the folder's own clock."""
    for path in folder.glob(".*.*"):
        if path.name.startswith((".run-", f".{MANIFEST}.", f".{INDEX}.")):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > LEFTOVER:
                    path.unlink()
