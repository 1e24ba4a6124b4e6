"""Writing files so that a reader never sees half of one."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor  # the command line checks folders without waiting for torch


def check_folder(folder: Path) -> None:
    """Make the folder if need be. Raises ValueError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"wanted a folder that can be written to, got {folder}: {error.strerror}") from error


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to, which takes its place at the end; nothing is left behind where that fails."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name beside `path`, then rename."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 to a temporary name beside `path`, then rename."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary name beside `path`, then rename."""
    write_text(path, json.dumps(data, indent=1))


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> Path:
    """Write safetensors to a temporary name beside `path`, then rename. Tensors are written as they are, from any device."""
    from safetensors.torch import save_file

    with _temporary(path) as temporary:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata)
    return path


def replace_folder(path: Path, files: Mapping[str, Any]) -> None:
    """Write a folder of safetensors (a mapping of tensors) and JSON files beside `path`, then put it in place."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        for name, content in files.items():
            (write_tensors if name.endswith(".safetensors") else write_json)(temporary / name, content)
        if path.exists():
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
