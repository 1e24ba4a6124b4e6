"""What each part of the catalogue is worth: attention and velocity error at equal cost, untrained and after the first stage of training.

    python benchmarks/catalogue.py OUT.jsonl image-1024 --fit [NAME ...]
    python benchmarks/catalogue.py OUT.jsonl video-512 --fit

Every part runs in a spec of its own (`SPECS`), with the largest share of kept blocks whose multiply-adds are no more than those of Fovea at
5 %. With --fit, parts that learn are fitted by the first stage of `distill` (`STEPS` recorded forwards of other prompts) and measured
again. A line of OUT holds one spec's results; lines that are there already are not computed again.
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
from torch import Tensor

import dit_accel
from dit_accel import AttentionSpec, DistillConfig, TokenLayout
from dit_accel.finetune import teacher
from dit_accel.finetune.data.collect import Forward, collect
from dit_accel.finetune.distill import distill
from dit_accel.finetune.velocity import velocity_errors
from dit_accel.measure.capture import Captured, capture_qkv, exact_attention
from dit_accel.measure.quality import compared
from dit_accel.method import (
    Among,
    Centred,
    Clusters,
    Columns,
    Concentration,
    Decayed,
    DeltaScan,
    DepthwiseConv,
    DiscBlocks,
    DynamicConv,
    ErrorProduct,
    Estimated,
    Extra,
    Floored,
    Gate,
    Hedgehog,
    KVGate,
    Landmarks,
    Linear,
    Mass,
    Merge,
    Norm,
    NormPower,
    NormPreserving,
    OutputGate,
    Pattern,
    Pooled,
    PowerTiles,
    PreConv,
    Pyramid,
    RankAugmented,
    Raster,
    Residual,
    Rest,
    Ridge,
    Routed,
    Score,
    SelfSaliency,
    Stripes,
    Taylor,
    Tiles,
    Token,
    TokenSoftmax,
    TopK,
    TopP,
)
from dit_accel.operator.cost import multiply_adds
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
    "Gate": score(Gate()),
    "SelfSaliency": score(SelfSaliency()),
    "Columns": lambda density, order: AttentionSpec((Columns(density),), Pooled(), Mass(), order),
    "Among Stripes": lambda density, order: AttentionSpec((Among(density, Stripes()),), Pooled(), Mass(), order),
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
    "DeltaScan, Residual": rest(DeltaScan(), Residual()),
    "Linear, third class left out": rest(Linear(scope="marginal")),
    "Linear, Hedgehog": rest(Linear(Hedgehog())),
    "Linear, NormPower": rest(Linear(NormPower())),
    "Linear, NormPreserving": rest(Linear(NormPreserving())),
    "Linear, Taylor": rest(Linear(Taylor())),
    "Linear, TokenSoftmax, Norm": rest(Linear(TokenSoftmax()), Norm()),
    "Linear elu, RankAugmented": rest(Linear("elu", weights=RankAugmented())),
    "Linear elu, KVGate": rest(Linear("elu", weights=KVGate())),
    "Linear elu, Centred": rest(Linear("elu", readout=Centred())),
    "Linear relu, Floored": rest(Linear("relu", readout=Floored())),
    "Linear, PreConv": rest(PreConv(Linear())),
    "DepthwiseConv": extra(DepthwiseConv()),
    "DynamicConv": extra(DynamicConv()),
    "Concentration": extra(Concentration()),
    "OutputGate": extra(OutputGate()),
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


Captures = list[tuple[Captured, Tensor]]  # of every layer and forward, with the exact attention


def captures_of(pipe: Any, forwards: list[Forward]) -> Captures:
    with torch.no_grad():
        return [(captured, exact_attention(captured).output) for forward in forwards for captured in capture_qkv(pipe, forward)]


def attention_error(captures: Captures, spec: AttentionSpec, fitted: dict[str, Any]) -> float:
    """Mean over forwards and layers of the relative error with the layers' parameters, by name."""
    errors = []
    with torch.no_grad():
        for c, exact in captures:
            params, more = fitted[c.layer], {"scale": c.scale, "text_bias": c.text_bias}
            out = dit_accel.attention(c.query, c.key, c.value, spec, c.layout, params=params, **more)[:, :, c.layout.image_slice]
            errors.append(float((out.float() - exact).norm() / exact.norm()))
    return statistics.mean(errors)


class Remembered:
    """The original attention's outputs in the first stage, by their inputs: they are the same for every spec, and most of its time."""

    def __init__(self) -> None:
        self.compute, self.found = teacher._original, {}  # type: ignore[var-annotated]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
        given = (*(float(x.double().abs().sum()) for x in (query, key, value)), scale)
        if mask is not None:
            return self.compute(query, key, value, scale, mask)
        if given not in self.found:
            self.found[given] = self.compute(query, key, value, scale, mask).detach()
        return self.found[given]


def fit(pipe: Any, forwards: list[Forward], captures: Captures, training: Path, spec: AttentionSpec) -> dict[str, float]:
    """A spec's errors once the first stage has fitted what it learns."""
    dit_accel.accelerate(pipe, spec)
    try:
        with tempfile.TemporaryDirectory() as folder:
            still = {"steps": 1, "warmup_steps": 10**9}  # of the second stage, which must have a step: one that changes nothing
            config = DistillConfig(train="parameters", parameter_steps=STEPS, parameter_learning_rate=RATE, output_dir=folder, **still)
            distill(pipe, training / "training", config, held_out=training / "held-out", progress=False)
        (transformer,) = find_transformers(pipe)
        fitted = {name: operator.params for name, operator in operators_of(transformer).items()}
        with always(pipe):
            velocity = statistics.mean(velocity_errors(pipe, forwards))
    finally:
        dit_accel.restore(pipe)
    return {"attention": attention_error(captures, spec, fitted), "velocity": velocity}


def specs_of(names: list[str], kind: str, layout: TokenLayout, head_dim: int) -> dict[str, AttentionSpec]:
    """The specs by name, within the budget."""
    order = Tiles(TILES[kind])
    budget = multiply_adds(SPECS["Fovea, order 0"](0.05, order), layout, head_dim) * 1.001
    return {n: FIXED[n](0.05, order) if n in FIXED else dearest(SPECS[n], order, layout, head_dim, budget) for n in names}


def main() -> None:
    out, model, *names = Path(sys.argv[1]), *[argument for argument in sys.argv[2:] if argument != "--fit"]
    kind, size = model.split("-")
    rows = list(map(json.loads, out.read_text().splitlines())) if out.exists() else []
    done = {(row["name"], row["fitted"]) for row in rows if row["model"] == model}
    pipe, forwards, record = forwards_of(kind, int(size))
    captured = next(iter(capture_qkv(pipe, forwards[0])))
    specs = specs_of(names or [*SPECS, *FIXED], kind, TokenLayout(captured.layout.grid), captured.query.shape[-1])

    def write(name: str, *, fitted: bool, **row: Any) -> None:
        with out.open("a") as file:
            file.write(json.dumps({"model": model, "name": name, "fitted": fitted, "spec": str(specs[name]), **row}) + "\n")

    for name, row in compared(pipe, forwards, {name: spec for name, spec in specs.items() if (name, False) not in done}).items():
        write(name, fitted=False, attention=row["attention_error"], velocity=row["velocity_error"], density=row["density_kept"],
              multiply_adds=row["multiply_adds"])  # fmt: skip
    todo = {name: spec for name, spec in specs.items() if "--fit" in sys.argv and learned(spec) and (name, True) not in done}
    if not todo:
        return
    teacher._original, captures = Remembered(), captures_of(pipe, forwards)
    with tempfile.TemporaryDirectory() as folder:
        record(Path(folder))
        for name, spec in todo.items():
            write(name, fitted=True, **fit(pipe, forwards, captures, Path(folder), spec))


if __name__ == "__main__":
    main()
