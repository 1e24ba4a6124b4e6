"""One recorded run on disk: a safetensors file whose name, record and tensors prove each other.

The header's metadata is one entry, the SHA-256 of the run's record and the record, as JSON: prompt, seed, size, what made it, and the
arguments and prediction of every forward. Tensors are named by the SHA-256 of their content, so that what several forwards share is stored
once, and so that the record's checksum vouches for every number. The file's name is made from prompt, seed and size. Nothing in a file
tells when or where it was written: two processes that record one run write the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.files import write_tensors

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Key:
    """The identity of a run in its folder. `size` is None where the pipeline chose it; `picture`: the SHA-256 of a picture's file, None
    where the pipeline sampled."""

    prompt: str
    seed: int
    size: Size | None = None
    picture: str | None = None

    @property
    def file(self) -> str:
        """The name of the run's file."""
        shape = "" if self.size is None else f"{self.size[0]}x{self.size[1]}"
        text = f"{self.seed} {shape} {self.picture or ''} {self.prompt}"
        return f"run-{hashlib.sha256(text.encode()).hexdigest()[:24]}.safetensors"


@dataclass(frozen=True, kw_only=True)
class RunRecord(Key):
    """A run as the header of its file tells it; `sha256` is its record's, which covers all of its contents."""

    forwards: int
    sha256: str


@dataclass
class Forward:
    """One recorded forward: keyword arguments of the denoiser, the teacher's prediction, and where it comes from."""

    arguments: dict[str, Any]
    prediction: Tensor
    latents: Tensor  # the run's final latents, in the denoiser's own token form
    prompt: str
    seed: int
    index: int


def checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's type, shape and numbers."""
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    if tensor.numel():
        flat = tensor.contiguous().as_strided((tensor.numel(),), (1,))  # one number may have any stride, which `view` refuses
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_arguments(arguments: dict[str, Any]) -> None:
    """Raise DistillationError where a forward has an argument that no file can contain, as a cache of keys and values."""
    for name, value in arguments.items():
        if kind := _foreign(value):
            raise DistillationError(
                f"the denoiser's argument {name} contains a {kind}, which samples can't keep: they are made of tensors, numbers, strings, "
                "lists, tuples and dicts. Models that are called so can't be distilled"
            )


def _foreign(value: Any) -> str | None:
    """The name of the first class in nested arguments that a file can't contain."""
    if isinstance(value, list | tuple | dict):
        return next(filter(None, map(_foreign, value.values() if isinstance(value, dict) else value)), None)
    return None if value is None or isinstance(value, Tensor | bool | int | float | str) else type(value).__name__


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Nested arguments as JSON with references to tensors, which are added by content: pipelines pass equal embeddings as new tensors."""
    if isinstance(value, Tensor):
        cpu = value.detach().cpu().contiguous()
        name = checksum(cpu)
        tensors.setdefault(name, cpu)
        return {"tensor": name}
    if isinstance(value, list):
        return [_pack(item, tensors) for item in value]
    if isinstance(value, tuple):  # not as a list: some models take a size as a tuple and several sizes as a list
        return {"tuple": [_pack(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": {k: _pack(v, tensors) for k, v in value.items()}}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"not checked before: {type(value).__name__}")


def write(folder: Path, key: Key, maker: str, forwards: Sequence[tuple[dict[str, Any], Tensor]], latents: Tensor) -> Path:
    """Write one run, all at once; returns its path. `maker` is what `StoredRun` compares."""
    for arguments, _ in forwards:
        check_arguments(arguments)
    tensors: dict[str, Tensor] = {}
    record = {
        **dataclasses.asdict(key), "maker": maker, "latents": _pack(latents, tensors),
        "forwards": [
            {"arguments": {k: _pack(v, tensors) for k, v in arguments.items()}, "prediction": _pack(prediction, tensors)}
            for arguments, prediction in forwards
        ],
    }  # fmt: skip
    text = json.dumps(record)
    return write_tensors(folder / key.file, tensors, {"run": f"{hashlib.sha256(text.encode()).hexdigest()} {text}"})


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Whatever goes wrong while this module reads a file becomes a DistillationError that names the file. Holds no caller's code, whose
    own errors would be blamed on the file."""
    try:
        yield
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise DistillationError(f"{path} is a damaged sample: {error}; delete it or collect again to replace it") from error


class StoredRun:
    """An open run file; what is read of it is checked. `maker`: of the folder it is in. Raises DistillationError for whatever is wrong
    with the file, by name."""

    def __init__(self, file: Any, path: Path, maker: str) -> None:
        self._file, self._path = file, path
        with _blamed(path):
            self._read_record(path.name, maker)

    def _read_record(self, name: str, maker: str) -> None:
        """Read and check the header. Raises ValueError, saying what is wrong, or whatever reading it raises."""
        file = self._file
        digest, _, text = (file.metadata() or {}).get("run", "").partition(" ")
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError("its record has another checksum than it should")
        record = json.loads(text)
        size = None if record["size"] is None else (record["size"][0], record["size"][1])
        self.forwards, self.latents = record["forwards"], record["latents"]
        self.entry = RunRecord(
            record["prompt"], record["seed"], size, record["picture"], forwards=len(self.forwards), sha256=digest,
        )  # fmt: skip
        if self.entry.file != name:
            raise ValueError(f"it is the run of the prompt {self.entry.prompt!r}, seed {self.entry.seed}, size {size} under another's name")
        if record["maker"] != maker:
            raise ValueError("it was made by other weights or with other call arguments than the folder's manifest says")

    def _tensor(self, name: str) -> Tensor:
        value: Tensor = self._file.get_tensor(name)
        if checksum(value) != name:
            raise ValueError(f"tensor {name[:16]} has another checksum than it should")
        return value

    def _unpack(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._unpack(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "tuple" in value:
            return tuple(self._unpack(item) for item in value["tuple"])
        return self._tensor(value["tensor"]) if "tensor" in value else {k: self._unpack(v) for k, v in value["dict"].items()}

    def read(self, index: int) -> Forward:
        """One forward. Raises IndexError where the run has fewer."""
        stored, entry = self.forwards[index], self.entry
        with _blamed(self._path):
            arguments = {k: self._unpack(v) for k, v in stored["arguments"].items()}
            return Forward(arguments, self._unpack(stored["prediction"]), self._unpack(self.latents), entry.prompt, entry.seed, index)

    def argument(self, name: str) -> list[Any]:
        """The value of one argument in every forward. Raises DistillationError where a forward was not given it."""
        with _blamed(self._path):
            arguments = [forward["arguments"] for forward in self.forwards]
            missing = next((given for given in arguments if name not in given), None)
        if missing is not None:
            raise DistillationError(f"{name!r} is no argument of the recorded forwards, which have {', '.join(sorted(missing))}")
        with _blamed(self._path):
            return [self._unpack(given[name]) for given in arguments]

    def check(self, contents: bool) -> None:
        """Look for every tensor that the record names; `contents`: and read each, one at a time."""
        with _blamed(self._path):
            names = set(self._file.keys())
            for name in sorted(names if contents else ()):
                self._tensor(name)
            if lost := set(_references([self.latents, self.forwards])) - names:
                raise ValueError(f"tensor {min(lost)[:16]} is missing")


def _references(value: Any) -> Iterator[str]:
    """Names of the tensors that packed values refer to."""
    if isinstance(value, list):
        for item in value:
            yield from _references(item)
    elif isinstance(value, dict):
        if isinstance(value.get("tensor"), str):
            yield value["tensor"]
        else:
            yield from _references(list(value.values()))


@contextlib.contextmanager
def opened(path: Path, maker: str) -> Iterator[StoredRun]:
    """A run's file. Raises DistillationError for whatever is wrong with it, by name; errors of the `with` block pass as they are."""
    with contextlib.ExitStack() as stack:
        with _blamed(path):
            file = stack.enter_context(safe_open(path, "pt"))
        yield StoredRun(file, path, maker)


def damage(path: Path, maker: str, *, contents: bool = True) -> str | None:
    """What is wrong with a run's file, or None. `contents`: every byte of it is read; without, its header alone, whatever the file's size:
    a file that was cut off is found all the same, and wrong numbers when they are read."""
    if not path.exists():
        return f"{path.name} is not there"
    try:
        with opened(path, maker) as run:
            run.check(contents)
    except DistillationError as error:
        return str(error)
    return None
