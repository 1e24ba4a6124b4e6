"""Self-generated training data: what the denoiser was called with while the pipeline itself sampled with its original attention.

Every forward of a run is kept with its arguments and the teacher's prediction, and the run's final latents. All conditioning, timestep
and sign conventions are the pipeline's own, so nothing here knows a model family, nor whether it makes pictures or videos. How a folder of
runs is kept, and shared by several processes, is in `store`.
"""

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import tqdm
from torch import Tensor

from dit_accel.adapters.base_model import base_model_name, licence_of
from dit_accel.errors import DistillationError
from dit_accel.files import check_folder
from dit_accel.finetune.data.record import Forward, Key, Size, check_arguments, damage
from dit_accel.finetune.data.store import FORMAT, Samples, claim, damaged_runs, remove_leftovers, write_index, write_run
from dit_accel.finetune.processes import from_main, gathered, processes, share, sharing, together, writes
from dit_accel.finetune.surroundings import processes_kept
from dit_accel.patch.anatomy import find_transformers, forward_names
from dit_accel.patch.fingerprint import known_hash
from dit_accel.patch.state import CONTEXT
from dit_accel.patch.verbs import dense

__all__ = ["Forward", "Key", "Recorder", "Samples", "as_one", "collect", "damaged_runs", "original", "record_runs", "write_run"]


def _copied(value: Any) -> Any:
    """Nested arguments with their tensors cloned to the CPU: schedulers may write into theirs."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, list | tuple):
        copies = [_copied(v) for v in value]
        return tuple(copies) if isinstance(value, tuple) else copies
    return {k: _copied(v) for k, v in value.items()} if isinstance(value, dict) else value


class Recorder:
    """Hooks a transformer and keeps (arguments, output) of each forward, on the CPU. `to_write`: they are to be written to a file, so
    that a forward with arguments that no file can contain raises DistillationError before it is computed."""

    def __init__(self, transformer: Any, names: Sequence[str], *, to_write: bool = False) -> None:
        self.transformer, self.names, self.to_write = transformer, names, to_write
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
        if self.to_write:
            check_arguments(arguments)
        # models may take entries out of the dicts they are given: keep copies
        self.arguments = {k: _copied(v) for k, v in arguments.items() if k != "return_dict"}

    def _after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        prediction = as_one(output[0] if isinstance(output, tuple) else output.sample)
        self.forwards.append((self.arguments, prediction.detach().cpu().clone()))


def as_one(prediction: Any) -> Tensor:
    """A prediction as one tensor; some denoisers give a list of its items."""
    return prediction if isinstance(prediction, Tensor) else torch.stack(list(prediction))


@contextlib.contextmanager
def original(pipe: Any) -> Iterator[None]:
    """The original model, whether or not the pipeline is accelerated."""
    accelerated = any(hasattr(m, CONTEXT) for m in find_transformers(pipe))
    with dense(pipe) if accelerated else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _without_progress_bar(pipe: Any) -> Iterator[None]:
    quiet = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**quiet, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**quiet)


def collect(
    pipe: Any, prompts: Sequence[str], folder: str | Path, *, seed: int = 0, sizes: Sequence[Size] | None = None, **call: Any
) -> Samples:
    """Record the pipeline sampling each prompt (seed, seed + 1, ...) with its original attention; `call` goes to the pipeline.

    Runs that are complete in the folder are skipped, so an interrupted collection continues; damaged ones are made again. Processes that
    `accelerate launch` starts share the prompts. Others, on any machine that sees the folder, may be started and stopped at will: they take
    the prompts in orders of their own and look again before each whether another has made it meanwhile.

    Args:
        sizes: (height, width) in pixels, several of them in turn: prompt i is sampled at sizes[i % len(sizes)]. `height` and `width` among
            the call's arguments are one size. Runs of several sizes may be in one folder.

    Raises DistillationError where the folder was made by other weights or with other call arguments or where there are no prompts, and
    ValueError where nothing can be written to the folder, before anything is sampled.
    """
    return collect_prompts(pipe, prompts, folder, seed, sizes, call, contents=True)


def collect_prompts(
    pipe: Any, prompts: Sequence[str], folder: str | Path, seed: int, sizes: Sequence[Size] | None, call: dict[str, Any], *, contents: bool
) -> Samples:
    """`collect`; without `contents` only the headers of runs that are there are checked, which takes no time for large folders. Damaged
    numbers are then found when they are read."""
    prompts = list(prompts)
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise DistillationError(f"prompts must be a non-empty list of non-empty strings, not {prompts!r}")
    shapes, call = _sizes(sizes, call)

    def make(key: Key) -> None:
        _collect_one(pipe, Path(folder), key, call)

    keys = [Key(prompt, seed + i, shapes[i % len(shapes)]) for i, prompt in enumerate(prompts)]
    return record_runs(pipe, folder, keys, make, call, contents=contents)


def record_runs(
    pipe: Any, folder: str | Path, keys: Sequence[Key], make: Callable[[Key], None], call: dict[str, Any], *, contents: bool = True
) -> Samples:
    """Have `make` write all runs that the folder lacks; what `collect` says of the folder, its processes and errors is true here.

    `call`: what else the runs depend on, the same for all of the folder. `contents`: runs that are there are read in full to be checked.
    """
    transformer, *others = find_transformers(pipe)
    if others:
        raise DistillationError(f"samples are of one transformer, but the pipeline has {1 + len(others)}")
    try:
        stored = json.loads(json.dumps(call))
    except TypeError as error:
        raise DistillationError(f"call arguments must be numbers, strings, lists or None, which {sorted(call)} are not: {error}") from error
    with processes_kept(), sharing(transformer):
        return _recorded(pipe, transformer, Path(folder), keys, make, stored, contents)


def _recorded(
    pipe: Any, transformer: Any, folder: Path, keys: Sequence[Key], make: Callable[[Key], None], call: Any, contents: bool
) -> Samples:
    """The runs of a folder, those that it lacks made before."""
    name = base_model_name(pipe, transformer)
    check_folder(folder)
    made_by = {"format": FORMAT, "teacher": known_hash(transformer), "model": type(transformer).__name__, "call": call}
    maker = claim(folder, {**made_by, "base_model": name, "licence": licence_of(name)})
    state = processes(next(transformer.parameters()).device)
    shown = None if state.is_main_process else True  # to tqdm: unless this is no terminal
    if state.is_main_process:
        remove_leftovers(folder)
    todo = _todo(folder, keys, maker, shown, contents)
    with _without_progress_bar(pipe):
        # in each round, every process makes one run, or all of them one together
        count, number = (1, 0) if together() else (state.num_processes, state.process_index)
        for first in tqdm(range(0, len(todo), count), desc="collect", disable=shown):
            for key in todo[first : first + count][number:][:1]:
                missing = damage(folder / key.file, maker, contents=contents) is not None  # still: another may have made it meanwhile
                if from_main(missing) if together() else missing:
                    make(key)
            state.wait_for_everyone()
    if state.is_main_process:
        write_index(folder)
    state.wait_for_everyone()
    return Samples(folder, keys)


def _sizes(sizes: Sequence[Size] | None, call: dict[str, Any]) -> tuple[list[Size | None], dict[str, Any]]:
    """The sizes to sample at in turn, and the call's other arguments. Raises DistillationError where they are none."""
    if sizes is None:
        if call.get("height") is None or call.get("width") is None:
            return [None], call
        sizes = [(call["height"], call["width"])]
    elif {"height", "width"} & set(call):
        raise DistillationError(f"give sizes, or height and width, not both: {sizes!r} and {sorted({'height', 'width'} & set(call))}")
    shapes: list[Size | None] = [(s[0], s[1]) for s in sizes if isinstance(s, list | tuple) and len(s) == 2]
    if not shapes or len(shapes) != len(sizes) or not all(type(side) is int and side > 0 for s in shapes for side in s or ()):
        raise DistillationError(f"sizes must be one or more (height, width) in pixels, not {sizes!r}")
    return shapes, {name: value for name, value in call.items() if name not in ("height", "width")}


def _todo(folder: Path, keys: Sequence[Key], maker: str, shown: bool | None, contents: bool = True) -> list[Key]:
    """The runs that are missing or damaged, in an order that this program's processes share and others don't."""
    mine = tqdm(share(len(keys)), desc="check", disable=shown, leave=False)
    missing = gathered([keys[i] for i in mine if damage(folder / keys[i].file, maker, contents=contents) is not None])
    random.Random().shuffle(missing)
    return list(from_main(missing))


def _collect_one(pipe: Any, folder: Path, key: Key, call: dict[str, Any]) -> None:
    """Sample one prompt and write its file."""
    (transformer,) = find_transformers(pipe)
    shape = {} if key.size is None else {"height": key.size[0], "width": key.size[1]}
    generator = torch.Generator("cpu").manual_seed(key.seed)
    with original(pipe), Recorder(transformer, forward_names(transformer), to_write=True) as recorder, torch.no_grad():
        # by name: edit models, FLUX.2 among them, take pictures first
        latents = pipe(prompt=key.prompt, generator=generator, output_type="latent", **call, **shape)[0]  # pictures or videos
    if writes():
        write_run(folder, key.prompt, key.seed, recorder.forwards, latents, size=key.size)
