"""What the trainers of the built-in models share: a run's state, its update, its loop and its files."""

import argparse
import copy
import json
import math
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import safe_open
from torch import Tensor

from dit_accel.files import append_text, replace_folder, write_tensors
from dit_accel.muon import Muon

PARTS = ("transformer", "text_encoder", "text_encoder_2")  # what learns, where a pipeline has it; the autoencoder is fitted apart
WINDOW, LONGEST = 0.04, 200  # the averaged weights cover this share of the steps so far, and as many steps at most
LEVEL = 0.5  # share of the budget from which on the learning rates fall, unless a run says so
MOST_DROPPED = 5  # steps in a row
ROW = 20  # steps of a line of the log, between which nothing waits for the device
STATE = "state"  # a folder
SHARD = 16 << 20  # bytes of a file of the state, at most: some machines take no larger files back
SHARDS = 7  # with the log, eight files
LOG = "log.jsonl"
LARGE = 1 << 14  # numbers of a tensor that is written in bfloat16


Step = tuple[str, Tensor, Tensor]  # the kind of a batch; its loss and its gradient's norm, which are no numbers where it was left out


@dataclass
class Run:
    """All that changes while training: the model, its average, the optimizers, the random numbers, steps and seconds so far."""

    pipe: Any
    average: Any
    optimizers: list[torch.optim.Optimizer]
    rng: random.Random
    step: int = 0
    spent: float = 0.0
    level: float = LEVEL

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.pipe.transformer.parameters()).device


def parameters(pipe: Any) -> dict[str, nn.Parameter]:
    """The parameters that learn, by name."""
    modules = {part: pipe.components[part] for part in PARTS if part in pipe.components}
    return {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}


def new_run(pipe: Any, rng: random.Random, rates: tuple[float, float], device: str | torch.device = "cpu") -> Run:
    """The run before its first step: Muon for the transformer blocks' matrices, AdamW for everything else, with those learning rates."""
    pipe.to(device)
    named = parameters(pipe)
    matrices = {n: p for n, p in named.items() if p.ndim == 2 and n.startswith("transformer.") and "blocks." in n}
    others = [p for name, p in named.items() if name not in matrices]
    optimizers: list[torch.optim.Optimizer] = [Muon(matrices.values(), lr=rates[0])]
    # fused: the others ask the host whether a gradient is finite
    optimizers.append(torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return Run(pipe, copy.deepcopy(pipe), optimizers, rng)


def rate(step: int, progress: float, level: float = LEVEL) -> float:
    """Learning-rate factor: 100 steps of warm-up, constant to `level` of the budget, then linear to 3 %."""
    return min(1.0, (step + 1) / 100) * (1.0 if progress < level else 1 - 0.97 * min(1.0, (progress - level) / (1 - level)))


def update(run: Run, loss: Tensor, progress: float, *, bf16: bool) -> tuple[Tensor, Tensor]:
    """One update by a loss; `progress` is the share of the budget that is spent. Gives the loss and the gradient's norm.

    A step whose gradient is not finite changes nothing, and gives NaN: one is bad luck in bfloat16, and taken it would make every weight
    NaN. The device alone knows of it, so that nothing waits for it here.
    """
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters(run.pipe).values(), 1.0)
    finite = norm.isfinite()
    with torch.autocast(run.device.type, torch.bfloat16, enabled=bf16):  # Muon's products too; they are a fifth of a step in float32
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * rate(run.step, progress, run.level)
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # as torch's gradient scaler tells its optimizers
            optimizer.step()
            optimizer.zero_grad()
    _average(run, finite)
    run.step += 1
    return torch.where(finite, loss.detach().float(), math.nan), torch.where(finite, norm, math.nan)


def _average(run: Run, finite: Tensor) -> None:
    """Move the averaged weights towards the trained ones, where the step was taken."""
    share = finite / min(max(1.0, WINDOW * run.step), LONGEST)
    average, trained = ([p.detach() for p in parameters(pipe).values()] for pipe in (run.average, run.pipe))
    way = list(torch._foreach_sub(trained, average))
    torch._foreach_mul_(way, share)
    torch._foreach_add_(average, way)


def clock_of(device: torch.device) -> Callable[[], float]:
    """Seconds that count towards a budget: on a CPU those of its threads' work, so that a machine that is busy with other things does not
    shorten a training; of a clock elsewhere."""
    if device.type == "cpu":
        return lambda: time.process_time() / torch.get_num_threads()
    return time.monotonic


def train(run: Run, take_step: Callable[[float], Step], out: Path, minutes: float) -> None:
    """Steps until the budget is spent, with a line of log every 20 and a checkpoint every three minutes, at least one half-way. A line
    names the kinds of batch of which steps were left out, and how many.

    `take_step` is given the share of the budget that is spent. Minutes are those of `clock_of`. Raises ArithmeticError after more than
    MOST_DROPPED steps in a row that were left out; the state on disk is then the last good one.
    """
    clock = clock_of(run.device)
    start, saved_at = clock() - run.spent, time.monotonic()
    recent: list[Step] = []
    dropped = 0
    while (progress := run.spent / (60 * minutes)) < 1:
        recent.append(take_step(progress))
        run.spent = clock() - start
        due = time.monotonic() - saved_at > min(180.0, 30 * minutes)
        if due or len(recent) == ROW:
            dropped = _write_row(run, recent, dropped, out / LOG)  # waits for the device
            recent = []
        if due:
            save_state(run, out / STATE)
            saved_at = time.monotonic()
    if recent:
        _write_row(run, recent, dropped, out / LOG)
        run.spent = clock() - start
    save_state(run, out / STATE)


def _write_row(run: Run, steps: list[Step], dropped: int, path: Path) -> int:
    """Append a line about the latest steps to the log. Gives how many of the latest were left out in a row, given the number before."""
    losses: dict[str, list[float]] = {}
    left_out: dict[str, int] = {}
    numbers = torch.stack([torch.stack([loss, norm]) for _, loss, norm in steps]).tolist()
    most = dropped
    for (kind, _, _), (loss, _) in zip(steps, numbers, strict=True):
        if math.isfinite(loss):
            losses.setdefault(kind, []).append(loss)
            dropped = 0
        else:
            left_out[kind] = left_out.get(kind, 0) + 1
            dropped += 1
            most = max(most, dropped)
    mean = {kind: round(sum(found) / len(found), 4) for kind, found in sorted(losses.items())}
    row: dict[str, Any] = {"step": run.step, "minutes": round(run.spent / 60, 2), "loss": mean}
    norm = numbers[-1][1]
    row |= {"grad_norm": round(norm, 3)} if math.isfinite(norm) else {}
    append_text(path, json.dumps(row | ({"left_out": left_out} if left_out else {})) + "\n")
    if most > MOST_DROPPED:
        raise ArithmeticError(
            f"gradients of {most} steps in a row up to step {run.step} were not finite: go on from an earlier state, at a lower rate"
        )
    return dropped


def add_run_arguments(command: argparse.ArgumentParser, minutes: float) -> None:
    """What the commands that train have in common: data, out, budget, device, size of batches and seed."""
    command.add_argument("data", type=Path, help="folder of drawings that the image model's `prepare` wrote, or the unpacked package")
    command.add_argument("out", type=Path)
    command.add_argument(
        "--minutes", type=float, default=minutes, help="the whole budget, over all starts; on a CPU only its threads' work counts"
    )
    command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    command.add_argument("--bf16", action="store_true", help="compute in bfloat16; always on with CUDA; for CPUs with AVX-512 BF16 or AMX")
    command.add_argument("--factor", type=_factor, default=1.0, help="this many times larger batches; below 1 where memory is full")
    command.add_argument("--seed", type=int, default=0)


def _factor(text: str) -> float:
    """A finite number above 0, of a command line."""
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text}")
    return value


# Files


def save_state(run: Run, folder: Path) -> None:
    """Write all that a run needs to go on to a folder, as safetensors files of SHARD bytes at most; under a temporary name first.

    The autoencoder's network is not part of it: it is trained apart.
    """
    tensors = {"torch_rng": torch.get_rng_state()} | _weights(run)
    for number, optimizer in enumerate(run.optimizers):
        for index, values in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{index}.{name}": value for name, value in values.items()}
    shards = _shards(tensors)
    numbers = {"step": run.step, "spent": run.spent, "rng": run.rng.getstate(), "files": len(shards)}
    stamp = torch.frombuffer(bytearray(json.dumps(numbers).encode()), dtype=torch.uint8)  # in each file: files of two steps don't mix
    replace_folder(folder, {f"{number}.safetensors": shard | {"numbers": stamp} for number, shard in enumerate(shards)})


def _shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors in as few groups as go into files of SHARD bytes: largest first, each into the first group with room."""
    shards: list[dict[str, Tensor]] = []
    free: list[int] = []
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        takes = tensor.nbytes + 256  # its row in the header
        place = next((i for i, left in enumerate(free) if left >= takes), len(free))
        if place == len(free):
            shards.append({})
            free.append(SHARD - (1 << 14))  # the step and the state of random numbers are in each
        shards[place][name] = tensor
        free[place] -= takes
    return shards


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and numbers that `save_state` wrote. Raises ValueError where files are missing or of different steps."""
    saved: dict[str, Tensor] = {}
    found: list[bytes] = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            saved |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  a safetensors file is no mapping
        found.append(bytes(saved.pop("numbers").tolist()))
    numbers = json.loads(found[0]) if found else {"files": None}
    if len(set(found)) != 1 or len(found) != numbers["files"]:
        raise ValueError(f"{folder} does not contain one whole state: copy all files of one")
    return saved, numbers


def load_state(run: Run, folder: Path) -> None:
    """Bring a new run to where `save_state` left another."""
    saved, numbers = read_state(folder)
    load_weights(run, saved)
    for number, optimizer in enumerate(run.optimizers):
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in saved.items():
            if name.startswith(f"optimizer.{number}."):
                _, _, index, key = name.split(".")
                states.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    run.step, run.spent = numbers["step"], numbers["spent"]
    version, internal, gauss = numbers["rng"]
    run.rng.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(saved["torch_rng"])


def load_weights(run: Run, saved: dict[str, Tensor]) -> None:
    """Copy a state's weights, average and projection into a run. Raises ValueError where one is missing."""
    targets = _weights(run)
    if missing := sorted(name for name, target in targets.items() if name not in saved or saved[name].shape != target.shape):
        raise ValueError(f"the state lacks {len(missing)} tensors of this model, like {missing[0]}: another model's, or a file is missing")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(saved[name])
        for name, value in run.average.vae.named_buffers():
            value.copy_(saved[f"vae.{name}"])


def _weights(run: Run) -> dict[str, Tensor]:
    """What a state contains of the models, by name."""
    found: dict[str, Tensor] = {f"vae.{name}": value for name, value in run.pipe.vae.named_buffers()}
    for part, pipe in (("model", run.pipe), ("average", run.average)):
        found |= {f"{part}.{name}": p.detach() for name, p in parameters(pipe).items()}
    return found


def save_pipeline(pipe: Any, folder: Path) -> None:
    """Write the pipeline with its large tensors in bfloat16 (see `narrow`), to a temporary name; rename."""
    temporary, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    pipe.save_pretrained(temporary)
    for file in temporary.rglob("*.safetensors"):
        narrow(file)
    if folder.exists():
        folder.replace(old)
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def narrow(file: Path) -> None:
    """Rewrite a file of weights with its float32 tensors of LARGE numbers or more in bfloat16: half the size.

    They load as float32 again: diffusers reads into the modules' own dtype, transformers into the one that the folder's config.json names.
    Small tensors (norms, biases, the autoencoders' projections) stay as they are, since they take no room.
    """
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  a safetensors file is no mapping
        metadata = opened.metadata()
    large = {name: x for name, x in tensors.items() if x.dtype == torch.float32 and x.numel() >= LARGE}
    write_tensors(file, tensors | {name: x.bfloat16() for name, x in large.items()}, metadata)
