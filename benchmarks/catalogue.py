"""What each part of the catalogue is worth: attention and velocity error at equal cost, untrained and after the first stage of training.

    python benchmarks/catalogue.py OUT.jsonl image-1024 [NAME ...]
    python benchmarks/catalogue.py OUT.jsonl video-512

Every part runs in a spec of its own (`SPECS`), with the largest share of kept blocks whose multiply-adds are no more than those of Fovea at
5 %. Parts that learn are fitted by the first stage of `distill` (`STEPS` recorded forwards of other prompts) and measured again.
A line of OUT holds one spec's results; lines that are there already are not computed again.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fovea_captures as captures
import torch

import dit_accel
from dit_accel import AttentionSpec, DistillConfig, TokenLayout
from dit_accel.finetune.data.collect import Forward, collect
from dit_accel.finetune.distill import distill
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.capture import attention_errors, capture_qkv, deviation, exact_attention
from dit_accel.method import (
    Clusters,
    Columns,
    Decayed,
    DepthwiseConv,
    DiscBlocks,
    ErrorProduct,
    Estimated,
    Extra,
    Landmarks,
    Linear,
    Mass,
    Merge,
    Norm,
    Pattern,
    Pooled,
    PowerTiles,
    Pyramid,
    Raster,
    Residual,
    Rest,
    Ridge,
    Routed,
    Score,
    SelfSaliency,
    Stripes,
    Tiles,
    Token,
    TopK,
    TopP,
)
from dit_accel.operator.cost import kept_density, multiply_adds
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of

STEPS, RATE = 16, 0.3  # large, as an offset may have to go far in few steps
TILES = {"image": (8, 8), "video": (4, 4, 4)}
TRAINING = {  # prompts to fit on, and the held-out one that distill asks for, which nothing here looks at
    "image": ("a rocket on a yellow background", "a heart on a green background", "a red apple", "a ghost on a pink background", "a cat"),
    "video": (
        "a star moving right on a red background", "a cat moving up on a pink background", "a car growing on a green background",
        "a ghost moving down on a blue background", "a rocket moving left on a yellow background",
    ),
}  # fmt: skip
MASS = Mass()
Make = Callable[[float, Any], AttentionSpec]  # of a density and an order


def rest(part: Rest | None, merge: Merge = MASS, **options: Any) -> Make:
    """The part as the rest of the best blocks."""
    return lambda density, order: AttentionSpec((TopK(density, **options),), part, None if part is None else merge, order)


def score(part: Score) -> Make:
    """The part chooses the blocks, and pooled keys are the rest."""
    return rest(Pooled(), score=part)


def keep(*patterns: Pattern) -> Make:
    """The patterns with pooled keys as the rest; their own numbers decide the density."""
    return lambda density, order: AttentionSpec(patterns, Pooled(), Mass(), order)


def extra(*parts: Extra) -> Make:
    """The parts after Fovea of order 0."""
    return lambda density, order: AttentionSpec((TopK(density, correct_short=True),), Pooled(), Mass(), order, extras=parts)


SPECS: dict[str, Make] = {
    "top-k alone": rest(None),
    "Fovea, order 0": rest(Pooled(), correct_short=True),
    "Fovea, order 1": rest(Pooled(parts=2, order=1), score=ErrorProduct()),
    "Fovea, order 1, in groups": rest(Pooled(parts=4, order=1, opened=8), score=ErrorProduct()),
    "own tile kept": lambda density, order: AttentionSpec((TopK(density), DiscBlocks(1)), Pooled(), Mass(), order),
    "raster order": lambda density, order: AttentionSpec((TopK(density),), Pooled(), Mass(), Raster()),
    "ErrorProduct": score(ErrorProduct()),
    "Estimated": score(Estimated()),
    "Pyramid": score(Pyramid()),
    "Clusters": score(Clusters()),
    "SelfSaliency": score(SelfSaliency()),
    "Columns": lambda density, order: AttentionSpec((Columns(density),), Pooled(), Mass(), order),
    "Linear, Residual (SLA)": rest(Linear(), Residual()),
    "Linear, Mass": rest(Linear()),
    "Linear, Mass by query": rest(Linear(), Mass("query")),
    "Linear, Norm": rest(Linear(), Norm()),
    "Linear elu, Mass": rest(Linear("elu")),
    "Linear relu, Mass": rest(Linear("relu")),
    "Pooled, Mass by query": rest(Pooled(), Mass("query")),
    "Decayed, Mass": rest(Decayed(slopes="alibi")),
    "Routed, Mass": rest(Routed()),
    "Landmarks": rest(Landmarks()),
    "Token, energy": rest(Token()),
    "Token, estimated": rest(Token("estimated")),
    "Ridge, Residual": rest(Ridge(), Residual()),
    "DepthwiseConv": extra(DepthwiseConv()),
}
FIXED: dict[str, Make] = {
    "DiscBlocks 8": keep(DiscBlocks(8)),
    "TopP 0.5": keep(TopP(0.5, 0.2)),
    "PowerTiles": keep(PowerTiles()),
    "PowerTiles without neighbours": keep(PowerTiles(near=0)),
    "Stripes": keep(Stripes(span=0)),
}


def dearest(make: Make, order: Tiles, layout: TokenLayout, head_dim: int, budget: float) -> AttentionSpec:
    """The spec with the most kept blocks, of a whole number, whose multiply-adds are within the budget; with one block if none is."""
    blocks = len(order.partition(layout.grid, 64)[1]) - 1
    specs = [make(count / blocks, order) for count in range(1, max(2, int(0.25 * blocks)))]
    fitting = [spec for spec in specs if multiply_adds(spec, layout, head_dim) <= budget]
    return fitting[-1] if fitting else specs[0]


def forwards_of(kind: str, size: int) -> tuple[Any, list[Forward], Callable[[Path], None]]:
    """The pipeline, the forwards that are measured, and what records forwards of other prompts in a folder."""
    if kind == "video":
        pipe, measured = captures.video_forwards(4)
        call = {"height": size, "width": size, "num_frames": 17, "num_inference_steps": 4, "max_sequence_length": 24, "guidance_scale": 1.0}
    else:
        pipe, measured = captures.image_forwards(size, 2, 2)
        call = {"height": size, "width": size, "num_inference_steps": 4, "max_sequence_length": 32}

    def record(folder: Path) -> None:
        collect(pipe, TRAINING[kind][:-1], folder / "training", **call)
        collect(pipe, TRAINING[kind][-1:], folder / "held-out", **call | {"num_inference_steps": 1})

    return pipe, measured, record


def learned(spec: AttentionSpec) -> bool:
    """Whether the first stage fits anything of it."""
    return any(spec.fit(heads=1, head_dim=64).values())


def attention_error(pipe: Any, forwards: list[Forward], spec: AttentionSpec, fitted: dict[str, Any] | None = None) -> float:
    """Mean over forwards and layers of the relative error; `fitted`: the layers' parameters by name."""
    errors = []
    with torch.no_grad():
        for forward in forwards:
            for captured in capture_qkv(pipe, forward):
                if fitted is None:
                    errors.append(attention_errors(captured, {"it": spec})["it"][0])
                else:
                    found = deviation(captured, exact_attention(captured), spec, fitted[captured.layer])
                    errors.append(float((found.error.sum() / found.size.sum()).sqrt()))
    return statistics.mean(errors)


def measure(pipe: Any, forwards: list[Forward], training: Path, spec: AttentionSpec) -> dict[str, float]:
    """A spec's errors at its start values and, where it learns, after the first stage."""
    row = {"attention": attention_error(pipe, forwards, spec)}
    with always(dit_accel.accelerate(pipe, spec)):
        row["velocity"] = statistics.mean(velocity_errors(pipe, forwards))
    try:
        if not learned(spec):
            return row
        with tempfile.TemporaryDirectory() as folder:
            still = {"steps": 1, "warmup_steps": 10**9}  # of the second stage, which must have a step: one that changes nothing
            config = DistillConfig(train="parameters", parameter_steps=STEPS, parameter_learning_rate=RATE, output_dir=folder, **still)
            distill(pipe, training / "training", config, held_out=training / "held-out", progress=False)
        (transformer,) = find_transformers(pipe)
        fitted = {name: operator.params for name, operator in operators_of(transformer).items()}
        with always(pipe):
            row["velocity_fitted"] = statistics.mean(velocity_errors(pipe, forwards))
    finally:
        dit_accel.restore(pipe)
    return row | {"attention_fitted": attention_error(pipe, forwards, spec, fitted)}


def main() -> None:
    out, model, *names = Path(sys.argv[1]), *sys.argv[2:]
    kind, size = model.split("-")
    done = {(row["model"], row["name"]) for row in map(json.loads, out.read_text().splitlines())} if out.exists() else set()
    wanted = [name for name in names or [*SPECS, *FIXED] if (model, name) not in done]
    pipe, forwards, record = forwards_of(kind, int(size))
    captured = next(iter(capture_qkv(pipe, forwards[0])))
    layout, head_dim, order = TokenLayout(captured.layout.grid), captured.query.shape[-1], Tiles(TILES[kind])
    budget = multiply_adds(SPECS["Fovea, order 0"](0.05, order), layout, head_dim) * 1.001
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
        for name in wanted:
            spec = FIXED[name](0.05, order) if name in FIXED else dearest(SPECS[name], order, layout, head_dim, budget)
            row = {"model": model, "name": name, "spec": str(spec)} | measure(pipe, forwards, Path(folder), spec)
            row |= {"density": kept_density(spec, layout), "multiply_adds": multiply_adds(spec, layout, head_dim)}
            with out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print({key: round(x, 4) if isinstance(x, float) else x for key, x in row.items()}, flush=True)


if __name__ == "__main__":
    main()
