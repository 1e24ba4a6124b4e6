"""Writing files so that a reader never sees half of one."""

import contextlib
import errno
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.errors import ArgumentError, WriteError

if TYPE_CHECKING:
    from torch import Tensor  # the command line checks folders without waiting for torch


def check_folder(folder: Path) -> None:
    """Make the folder if need be. Raises ValueError where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"the folder {folder} can't be written to: {error.strerror}") from error


NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}  # what file systems without hard links answer


def _beside(path: Path) -> Path:
    """A hidden name in the folder of `path` that no other process has, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


@contextlib.contextmanager
def failing_as_write_error(path: Path) -> Iterator[None]:
    """Turn an error of writing into a WriteError that names the file, its folder and the reason (a full disk, say)."""
    try:
        yield
    except WriteError:
        raise  # raised for one of the files inside
    except OSError as error:
        raise WriteError(f"{path.name} can't be written in {path.parent}: {error.strerror or error}") from error


def _to_disk(path: Path) -> None:
    """Wait until a file's contents are on the disk. A new name may get there first, and after a power cut be empty."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A name in the folder of `path` to write to, which takes its place at the end; nothing is left where that fails, and what was there
    stays."""
    temporary = _beside(path)
    try:
        with failing_as_write_error(path):
            yield temporary
            _to_disk(temporary)
            temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write to a temporary name in the folder of `path`, then rename."""
    with _temporary(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 to a temporary name in the folder of `path`, then rename."""
    write_bytes(path, text.encode())


def write_json(path: Path, data: Any) -> None:
    """Write JSON to a temporary name in the folder of `path`, then rename."""
    write_text(path, json.dumps(data, indent=1))


def create_json(path: Path, data: Any) -> None:
    """Write JSON unless the file is there. Of several processes that try at once one does, and no reader sees half of it."""
    temporary = _beside(path)
    with failing_as_write_error(path):
        try:
            temporary.write_text(json.dumps(data, indent=1))
            _to_disk(temporary)
            with contextlib.suppress(FileExistsError):
                try:
                    os.link(temporary, path)  # unlike a rename, it fails where another process was first
                except OSError as error:
                    if error.errno not in NO_LINKS:
                        raise
                    _create(path, temporary.read_text())
        finally:
            temporary.unlink(missing_ok=True)


def _create(path: Path, text: str) -> None:
    """Write a file that must not be there. As exclusive as a link, but a kill during the write leaves half of the file."""
    with path.open("x") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:
            path.unlink()
            raise


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 to a file, created if it does not exist; for logs, which a reader may see growing."""
    with failing_as_write_error(path), path.open("a", encoding="utf-8") as file:
        file.write(text)


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> Path:
    """Write safetensors to a temporary name in the folder of `path`, then rename. Tensors are written as they are, from any device."""
    with _temporary(path) as temporary:
        _save(temporary, tensors, metadata)
    return path


def _save(path: Path, tensors: "Mapping[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path, metadata)
    except SafetensorError as error:  # it tells of a full disk in its own class
        raise OSError(str(error)) from error


def replace_folder(path: Path, files: Mapping[str, Any]) -> None:
    """Write a folder of safetensors (a mapping of tensors) and JSON files under a temporary name, then rename it to `path`."""
    temporary, old = _beside(path), _beside(path)
    try:
        with failing_as_write_error(path):
            temporary.mkdir()
            for name, content in files.items():
                if name.endswith(".safetensors"):
                    _save(temporary / name, content)
                else:
                    (temporary / name).write_text(json.dumps(content, indent=1))
                _to_disk(temporary / name)
            if path.exists():
                path.replace(old)
            temporary.replace(path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not path.exists():
            old.replace(path)
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A hidden folder within `folder` to write several files to, which take their places together once all are written, or none does."""
    stage = _beside(folder / "stage")
    try:
        with failing_as_write_error(folder):
            stage.mkdir()
        yield stage  # the block's own errors stay what they are; what writes into it tells of its own
        with failing_as_write_error(folder):
            written = list(stage.iterdir())
            for file in written:
                _to_disk(file)
            for file in written:
                file.replace(folder / file.name)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
