"""Self-generated training data: what the denoiser was called with while the pipeline itself sampled with its original attention.

One safetensors file per prompt and seed holds every forward of that run: its arguments (tensors that several forwards share are stored
once), the teacher's prediction, and the final latents. All conditioning, timestep and sign conventions are the pipeline's own, so nothing
here knows a model family. A manifest beside the files names prompts, seeds, call arguments and the teacher's hash.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_accel.errors import DistillationError
from dit_accel.files import write_json, write_tensors
from dit_accel.finetune.processes import gathered, processes
from dit_accel.patch import CONTEXT, dense, find_transformers, forward_names, teacher_hash

FORMAT = "dit_accel samples 1"


@dataclass
class Forward:
    """One recorded forward: keyword arguments of the denoiser, the teacher's prediction, and where it comes from."""

    arguments: dict[str, Any]
    prediction: Tensor
    latents: Tensor  # the run's final latents, in the denoiser's own token form
    prompt: str
    seed: int
    index: int


def _copied(value: Any) -> Any:
    """Nested arguments with their tensors cloned to the CPU: schedulers may write into theirs."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, list | tuple):
        return [_copied(v) for v in value]
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class Recorder:
    """Hooks a transformer and keeps (arguments, output) of each forward, on the CPU."""

    def __init__(self, transformer: Any, names: Sequence[str]) -> None:
        self.transformer, self.names = transformer, names
        self.arguments: dict[str, Any] = {}  # of the latest forward
        self.forwards: list[tuple[dict[str, Any], Tensor]] = []

    def __enter__(self) -> "Recorder":
        before = self.transformer.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        self._hooks = [before, self.transformer.register_forward_hook(self._after)]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        # models may take entries out of the dicts they are given: keep copies
        self.arguments = {k: _copied(v) for k, v in arguments.items() if k != "return_dict"}

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        prediction = as_one(output[0] if isinstance(output, tuple) else output.sample)
        self.forwards.append((self.arguments, prediction.detach().cpu().clone()))


def as_one(prediction: Any) -> Tensor:
    """A prediction as one tensor; some denoisers give a list of its items."""
    return prediction if isinstance(prediction, Tensor) else torch.stack(list(prediction))


class _Packer:
    """Turns nested arguments into JSON with references to tensors, each distinct tensor kept once."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._seen: dict[str, str] = {}

    def pack(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            cpu = value.detach().cpu().clone(memory_format=torch.contiguous_format)  # of one expanded item, contiguous() keeps stride 0
            # by content: pipelines pass equal embeddings as new tensors at every step
            raw = cpu.flatten().view(torch.uint8).numpy().tobytes() if cpu.numel() else b""
            key = hashlib.sha256(raw + f"{cpu.dtype}{tuple(cpu.shape)}".encode()).hexdigest()
            if key not in self._seen:
                self._seen[key] = f"t{len(self.tensors)}"
                self.tensors[self._seen[key]] = cpu
            return {"tensor": self._seen[key]}
        if isinstance(value, list | tuple):
            return [self.pack(item) for item in value]
        if isinstance(value, dict):
            return {"dict": {k: self.pack(v) for k, v in value.items()}}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise DistillationError(f"wanted tensors, numbers, strings, lists or dicts as the denoiser's arguments, got {type(value).__name__}")


def _unpack(value: Any, read: Any) -> Any:
    if isinstance(value, dict) and set(value) == {"tensor"}:
        return read(value["tensor"])
    if isinstance(value, dict):
        return {k: _unpack(v, read) for k, v in value["dict"].items()}
    return [_unpack(item, read) for item in value] if isinstance(value, list) else value


class Samples:
    """A folder of recorded runs, read lazily. `len` counts forwards; `teacher` is the hash of the weights that made them.

    Raises DistillationError where the folder holds no readable manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            manifest = json.loads((self.folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise DistillationError(f"wanted a folder of samples made by collect, got {self.folder}: {error}") from error
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        if found != FORMAT or not {"teacher", "model", "call", "runs"} <= set(manifest):
            raise DistillationError(f"{self.folder} wants a manifest of the format {FORMAT!r}, got {found!r} or one with fields missing")
        self.manifest = manifest
        self.teacher: str = manifest["teacher"]
        self._number(manifest["runs"])

    def _number(self, runs: list[dict[str, Any]]) -> None:
        """Hold these runs, their forwards numbered one after the other."""
        self.manifest["runs"] = runs
        self._index = [(run, i) for run in runs for i in range(run["forwards"])]

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, position: int) -> Forward:
        run, index = self._index[position]
        path = self.folder / run["file"]
        with _opened(path) as file:
            meta = json.loads(file.metadata()["run"])
            arguments = _unpack({"dict": meta["forwards"][index]["arguments"]}, file.get_tensor)
            prediction = file.get_tensor(meta["forwards"][index]["prediction"]["tensor"])
            return Forward(arguments, prediction, file.get_tensor("latents"), run["prompt"], run["seed"], index)

    def only(self, wanted: Sequence[tuple[str, int]]) -> "Samples":
        """Narrow to the runs of these prompts and seeds, in this order; returns itself."""
        runs = {(run["prompt"], run["seed"]): run for run in self.manifest["runs"]}
        self._number([runs[key] for key in wanted])
        return self

    def runs(self) -> list[list[int]]:
        """Positions of the forwards of each run, in order."""
        positions: dict[str, list[int]] = {}
        for position, (run, _) in enumerate(self._index):
            positions.setdefault(run["file"], []).append(position)
        return list(positions.values())

    def timesteps(self, position: int, name: str) -> list[float]:
        """The values of argument `name` over the run that a forward belongs to."""
        run, _ = self._index[position]
        with _opened(self.folder / run["file"]) as file:
            forwards = json.loads(file.metadata()["run"])["forwards"]
            return [float(file.get_tensor(f["arguments"][name]["tensor"]).flatten()[0]) for f in forwards]


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A sample's file; whatever is wrong with it names it."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DistillationError(f"wanted a readable sample, got a damaged {path}: {error}; delete it and collect again") from error


@contextlib.contextmanager
def original(pipe: Any) -> Iterator[None]:
    """The original model, whether or not the pipeline is accelerated."""
    accelerated = any(hasattr(m, CONTEXT) for m in find_transformers(pipe))
    with dense(pipe) if accelerated else contextlib.nullcontext():
        yield


def collect(pipe: Any, prompts: Sequence[str], folder: str | Path, *, seed: int = 0, **call: Any) -> Samples:
    """Record the pipeline sampling each prompt (seed, seed + 1, ...) with its original attention; `call` goes to the pipeline.

    What the folder holds already is skipped, so an interrupted run continues. Several processes (`accelerate launch`) share the prompts and
    the folder. Raises DistillationError where the folder was made by other
    weights or with other call arguments, or where there are no prompts.
    """
    prompts = list(prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise DistillationError(f"prompts is a non-empty list of non-empty strings, got {prompts!r}")
    (transformer,) = find_transformers(pipe)

    def make(number: int) -> dict[str, Any]:
        return _collect_one(pipe, transformer, Path(folder), prompts[number], seed + number, call)

    return record_runs(pipe, folder, [(prompt, seed + i) for i, prompt in enumerate(prompts)], make, call)


def record_runs(
    pipe: Any, folder: str | Path, wanted: Sequence[tuple[str, int]], make: Callable[[int], dict[str, Any]], call: dict[str, Any]
) -> Samples:
    """Have `make(i)` write the run of the i-th (prompt, seed) and give its manifest entry, for all that the folder lacks; what `collect`
    says of the folder and of several processes holds."""
    (transformer,) = find_transformers(pipe)
    try:
        stored = json.loads(json.dumps(call))
    except TypeError as error:
        raise DistillationError(f"call arguments are numbers, strings, lists or None, got {sorted(call)}: {error}") from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"format": FORMAT, "teacher": teacher_hash(transformer), "model": type(transformer).__name__, "call": stored}
    manifest: dict[str, Any] = {**settings, "runs": []}
    if (folder / "manifest.json").exists():
        manifest = Samples(folder).manifest
        for name, value in settings.items():
            if manifest[name] != value:
                raise DistillationError(f"{folder} holds samples of {name} {manifest[name]!r}, wanted {value!r}; name another folder")
    state = processes(next(transformer.parameters()).device)
    manifest["runs"] = [run for run in manifest["runs"] if (folder / run["file"]).exists()]
    state.wait_for_everyone()  # all have read the folder before one writes to it
    have = {(run["prompt"], run["seed"]) for run in manifest["runs"]}
    todo = [i for i, key in enumerate(wanted) if key not in have]
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    rounds = range(0, len(todo), state.num_processes)  # in each, every process makes one run
    try:
        for first in tqdm(rounds, desc="collect", disable=None if state.is_main_process else True):
            mine = todo[first : first + state.num_processes][state.process_index :][:1]
            manifest["runs"] += gathered([make(i) for i in mine])
            if state.is_main_process:
                write_json(folder / "manifest.json", manifest)
    finally:
        pipe.set_progress_bar_config(**quiet)
    if state.is_main_process:
        write_json(folder / "manifest.json", manifest)
    state.wait_for_everyone()
    return Samples(folder).only(list(wanted))


def _collect_one(pipe: Any, transformer: Any, folder: Path, prompt: str, seed: int, call: dict[str, Any]) -> dict[str, Any]:
    """Sample one prompt and write its file; returns its manifest entry."""
    generator = torch.Generator("cpu").manual_seed(seed)
    with original(pipe), Recorder(transformer, forward_names(transformer)) as recorder, torch.no_grad():
        output = pipe(prompt, generator=generator, output_type="latent", **call)
    return write_run(folder, prompt, seed, recorder.forwards, output.images if hasattr(output, "images") else output.frames)


def write_run(folder: Path, prompt: str, seed: int, forwards: Sequence[tuple[dict[str, Any], Tensor]], latents: Tensor) -> dict[str, Any]:
    """Write the file of one run, its forwards as (arguments, prediction); returns its manifest entry."""
    packer = _Packer()
    packed = [
        {"arguments": {k: packer.pack(v) for k, v in arguments.items()}, "prediction": packer.pack(prediction)}
        for arguments, prediction in forwards
    ]
    name = f"run-{hashlib.sha256(f'{seed} {prompt}'.encode()).hexdigest()[:16]}.safetensors"
    write_tensors(
        folder / name, {**packer.tensors, "latents": latents.clone()}, {"run": json.dumps({"prompt": prompt, "forwards": packed})}
    )
    return {"file": name, "prompt": prompt, "seed": seed, "forwards": len(packed)}
