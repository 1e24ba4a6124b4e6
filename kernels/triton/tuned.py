"""Tiles that were timed on the user's own GPUs (`dit-accel bench kernels --tune`): one JSON file in the user's cache folder.

Each entry holds for one GPU, its driver, version of Triton, source of the kernels, kernel, dtype and head dimension; any other takes the
table (`tables`).
"""

import functools
import hashlib
import json
import os
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from dit_accel.kernels.triton.tables import KERNELS, Tile

FORMAT = 2
OLDER = (1,)  # formats whose tiles don't say which kernels they were timed with: none of them holds any more


class Gpu(NamedTuple):
    """What a timed tile holds for: a GPU's name, its compute capability ("9.0") or architecture ("gfx942"), the versions of its driver and
    of Triton, and `source_hash`."""

    device: str
    capability: str
    driver: str
    triton: str
    source: str


@dataclass(frozen=True)
class Entry:
    """One timed tile, and where it holds."""

    device: str
    capability: str
    driver: str
    triton: str
    source: str
    kernel: str
    dtype: str
    head_dim: int  # padded to a power of two
    queries: int
    keys: int
    warps: int
    stages: int

    @property
    def gpu(self) -> Gpu:
        return Gpu(self.device, self.capability, self.driver, self.triton, self.source)

    @property
    def key(self) -> tuple[str, str, int]:
        return self.kernel, self.dtype, self.head_dim

    @property
    def tile(self) -> Tile:
        return Tile(self.queries, self.keys, self.warps, self.stages)


@functools.cache
def source_hash() -> str:
    """16 hexadecimal digits of the sources from which kernels and launches are made: another version's tiles may not suit them."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def cache_file() -> Path:
    """dit_accel/tiles.json in XDG_CACHE_HOME or, where that is no absolute path, in ~/.cache (XDG base directory specification)."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return Path(folder if os.path.isabs(folder) else os.path.expanduser("~/.cache")) / "dit_accel" / "tiles.json"


def read(path: Path) -> list[Entry]:
    """All entries of a file; none where there is no file, or one of an older format. Raises ValueError, with the reason, where it is
    damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is a JSON file of tiles, got {error}") from error
    shaped = isinstance(data, dict) and data.keys() == {"format", "tiles"} and isinstance(data["tiles"], list)
    if shaped and data["format"] in OLDER:
        return []
    if not shaped or data["format"] != FORMAT:
        raise ValueError(f"{path} is an object of format {FORMAT} and a list of tiles, got {str(data)[:80]}")
    return [_entry(path, row) for row in data["tiles"]]


def _entry(path: Path, row: Any) -> Entry:
    expected = {field.name: field.type for field in fields(Entry)}
    if not isinstance(row, dict) or {name: type(value) for name, value in row.items()} != expected:
        raise ValueError(f"{path}: a tile has the fields {', '.join(expected)}, got {row}")
    entry = Entry(**row)
    if entry.kernel not in KERNELS:
        raise ValueError(f"{path}: a kernel is one of {KERNELS}, got {entry.kernel!r}")
    sides = (16, 32, 64, 128, 256)
    if entry.queries not in sides or entry.keys not in sides or entry.warps not in (1, 2, 4, 8, 16) or not 1 <= entry.stages <= 8:
        raise ValueError(f"{path}: a tile has sides of {sides}, 1 to 16 warps (a power of two) and 1 to 8 stages, got {entry.tile}")
    return entry


def tiles_of(gpu: Gpu) -> dict[tuple[str, str, int], Tile]:
    """The tiles timed on a GPU with these versions. A damaged file is left out, with a warning that says why."""
    try:
        return {entry.key: entry.tile for entry in read(cache_file()) if entry.gpu == gpu}
    except ValueError as error:
        warnings.warn(f"the tuned tiles are left out: {error}; delete the file or tune again", stacklevel=2)
        return {}


def merged(old: list[Entry], new: list[Entry], gpu: Gpu, tried: set[tuple[str, str, int]]) -> dict[str, Any]:
    """A file's content after a GPU was tuned for the kernels `tried`: of those only the new entries stay."""
    kept = [entry for entry in old if entry.gpu != gpu or entry.key not in tried]
    return {"format": FORMAT, "tiles": [asdict(entry) for entry in (*kept, *new)]}
