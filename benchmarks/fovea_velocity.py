"""Relative velocity error of the built-in models with forms of Fovea, untrained, and of the original rounded to bfloat16.

    python benchmarks/fovea_velocity.py OUT.jsonl image-1024 "fovea:0.05" "fovea:0.05,order=1" bfloat16

Models: `image-512`, `image-1024`, `image-2048`, `video-512`. A line of OUT holds a method's errors, one for each recorded forward. Lines
that are there already are not computed again.
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import fovea_captures as captures
import torch

import dit_accel
from dit_accel.finetune.data.collect import Forward
from dit_accel.finetune.velocity import on_device, predict, velocity_errors
from dit_accel.method.text import parse_method
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.modes import always


def forwards_of(model: str) -> tuple[Any, list[Forward]]:
    kind, size = model.split("-")
    if kind == "video":
        return captures.video_forwards()
    return captures.image_forwards(int(size), *((2, 2) if int(size) < 2048 else (1, 1)))


def in_bfloat16(pipe: Any, forwards: list[Forward]) -> list[float]:
    """The original with its weights and its inputs rounded."""
    (transformer,) = find_transformers(pipe)
    transformer.to(torch.bfloat16)
    errors = []
    for forward in forwards:
        arguments = {name: rounded(x) for name, x in on_device(forward.arguments, torch.device("cpu")).items()}
        prediction = predict(transformer, arguments).float()
        errors.append(((prediction - forward.prediction.float()).norm() / forward.prediction.float().norm()).item())
    transformer.float()
    return errors


def rounded(value: Any) -> Any:
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1 else value


def main() -> None:
    out, model, *methods = Path(sys.argv[1]), *sys.argv[2:]
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    done = {(row["model"], row["method"]) for row in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    methods = [method for method in methods if (model, method) not in done]
    pipe, forwards = forwards_of(model)
    for method in sorted(methods, key=lambda method: method == "bfloat16"):  # last: it rounds the weights
        if method == "bfloat16":
            errors = in_bfloat16(pipe, forwards)
        else:
            spec = parse_method(method)
            with always(dit_accel.accelerate(pipe, spec)):  # type: ignore[arg-type]
                errors = velocity_errors(pipe, forwards)
            dit_accel.restore(pipe)
        with out.open("a") as file:
            file.write(json.dumps({"model": model, "method": method, "errors": errors}) + "\n")
        print(f"{model} {method:50s} {statistics.mean(errors):.4f}", flush=True)


if __name__ == "__main__":
    main()
