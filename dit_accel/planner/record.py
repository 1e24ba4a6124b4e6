"""A plan: an assignment together with the record of how it was found: what was measured, predicted and verified. JSON.

    {"format": ..., "assignment": {"order", "specs", "rules"}, "plan": {...}}

`Assignment.load` reads the assignment of a plan's file; `Plan.load` and `--method` read all of it.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.errors import ArgumentError
from dit_accel.files import write_text
from dit_accel.method.assignment import PLAN_FORMAT, Assignment, assignment_of_plan
from dit_accel.method.checks import is_real, require
from dit_accel.method.spec import AttentionSpec

UNITS = ("multiply-adds", "seconds")


@dataclass(frozen=True)
class Model:
    """What was planned for: classes of the pipeline and its transformer, the SHA-256 of the weights, and of each active LoRA by name."""

    pipeline: str
    transformer: str
    weights: str
    loras: dict[str, str]


@dataclass(frozen=True)
class Learned:
    """The adapter that candidates were measured with: the name of its folder or its hub id, and the SHA-256 of what it has learned."""

    adapter: str
    sha256: str


@dataclass(frozen=True)
class Asked:
    """What was asked for, one of the two: the largest relative error of the velocity, or how many times less attention."""

    budget: float | None
    speed: float | None


@dataclass(frozen=True)
class Size:
    """A size that was measured: `call`'s arguments of the size (height and width in pixels, num_frames), the grid (frames, height, width)
    in tokens, and the number of text tokens in the same sequence."""

    call: dict[str, int]
    grid: tuple[int, int, int]
    text: int

    @property
    def tokens(self) -> int:
        """Image tokens."""
        frames, height, width = self.grid
        return frames * height * width


@dataclass(frozen=True)
class Prompts:
    """How many prompts were measured and how many held out, the SHA-256 of all of them, and the seed of the first."""

    measured: int
    held_out: int
    sha256: str
    seed: int


@dataclass(frozen=True)
class NoiseRange:
    """low < noise level <= high, and the noise levels of the forwards that were measured in it."""

    low: float
    high: float
    levels: tuple[float, ...]


@dataclass(frozen=True)
class LayerHeads:
    """An attention module and its number of heads."""

    name: str
    heads: int


@dataclass(frozen=True)
class Candidate:
    """What a head may get, the original attention where `spec` is None; `cost` of one head as a share of the original attention's."""

    spec: AttentionSpec | None
    cost: float

    @property
    def name(self) -> str:
        return "original" if self.spec is None else str(self.spec)


@dataclass(frozen=True)
class Interval:
    """A mean over held-out prompts, and the ends of its interval, see `verified.interval_of`; None where they are not known, as of one
    prompt in plans of version 0.2."""

    mean: float
    low: float | None
    high: float | None

    @property
    def promised(self) -> float:
        """The error that is promised of other prompts: the upper end; of one prompt, in plans of version 0.2, its own error."""
        return self.mean if self.high is None else self.high


@dataclass(frozen=True)
class Point:
    """One setting on the curve of error against cost: "planned", or "uniform", one spec everywhere.

    `cost`: as a share of the original attention's; `predicted`: relative error of the velocity; `verified`: on held-out prompts.
    """

    kind: str
    name: str
    cost: float
    predicted: float
    verified: Interval | None


@dataclass(frozen=True)
class Round:
    """One verification: the predicted error that was aimed at, its cost, and what was measured on the held-out prompts."""

    predicted: float
    cost: float
    verified: Interval


@dataclass(frozen=True)
class Outcome:
    """Of the plan itself. `cost`: share of the original attention's; `speed`: its inverse. `predicted`: relative error of the velocity by
    the measurements alone; `factor`: by which verification found it to differ; `verified`: on held-out prompts, also range by range."""

    cost: float
    speed: float
    predicted: float
    factor: float
    verified: Interval
    by_range: tuple[float, ...]


@dataclass(frozen=True)
class SizeRule:
    """The density of a selection at other sizes: (alpha + beta · N) / N for N image tokens: beta alone is a fixed share, alpha a fixed
    number of tokens. `candidate`: whose; `range`: of which noise levels, by its place in `ranges`."""

    candidate: int
    range: int
    alpha: float
    beta: float


@dataclass(frozen=True)
class Scaling:
    """How the plan is used at other sizes: by `rules`, where none is given with the shares as they are. `measured`: image tokens of the
    sizes that were measured; beyond the smallest and the largest of them the plan is extrapolated."""

    measured: tuple[int, ...]
    rules: tuple[SizeRule, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan(Assignment):
    """An assignment that `plan` has found. Plans of the same rules are equal, whatever their records say; a plan does not equal an
    `Assignment` that is none: compare `Assignment(plan.rules)` with that.

    `unit` of costs: "multiply-adds" or "seconds". `chosen[range][layer][head]`: its candidate's place in `candidates`. `errors`, of the
    same shape: what it is predicted to add to the squared relative error of the velocity in that range, by the measurements alone.
    `trained`: the adapter with which it runs, None where all that learns has its start values.
    """

    version: str
    model: Model
    asked: Asked
    unit: str
    steps: int
    sizes: tuple[Size, ...]
    prompts: Prompts
    ranges: tuple[NoiseRange, ...]
    layers: tuple[LayerHeads, ...]
    candidates: tuple[Candidate, ...]
    chosen: tuple[tuple[tuple[int, ...], ...], ...]
    errors: tuple[tuple[tuple[float, ...], ...], ...]
    curve: tuple[Point, ...]
    rounds: tuple[Round, ...]
    outcome: Outcome
    scaling: Scaling
    trained: Learned | None = None

    @property
    def learned(self) -> str | None:
        """See `Assignment.learned`."""
        return None if self.trained is None else self.trained.sha256

    @property
    def without_learned(self) -> "Plan":
        """See `Assignment.without_learned`."""
        return dataclasses.replace(self, trained=None)

    @property
    def of_model(self) -> bool:
        """Whether it was made for one model: yes."""
        return True

    def unlike(self, transformer: str, heads: Mapping[str, int], weights: Callable[[], str]) -> str | None:
        """How a model differs from the one that was planned for, see `Assignment.unlike`."""
        again = "; make a plan with this model"
        if transformer != self.model.transformer:
            return f"it was made for {self.model.transformer}, not {transformer}{again}"
        for layer in self.layers:
            if (count := heads.get(layer.name)) is None:
                return f"it was made for a model with a layer {layer.name}, which this one lacks{again}"
            if count != layer.heads:
                return f"it was made for a model whose {layer.name} has {layer.heads} heads, not {count}{again}"
        if weights() != self.model.weights:
            return f"it was made for a {transformer} with other weights, or with the same in another dtype{again}"
        if self.trained is not None:
            adapter = self.trained.adapter
            return f"it was made with what the adapter {adapter} has learned; load both, load_adapter(pipe, {adapter!r}, spec=plan)"
        return None

    def save(self, path: str | Path) -> Path:
        """Write it to a JSON file. Raises WriteError."""
        path = Path(path)
        own = {field.name: _plain(getattr(self, field.name)) for field in _own_fields()}
        if self.trained is None:
            del own["trained"]  # as in plans of version 0.2
        write_text(path, json.dumps({"format": PLAN_FORMAT, "assignment": self.to_dict(), "plan": own}, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Read what `save` wrote. Raises ValueError that names the file."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"{path} can't be read as the JSON of a plan: {error}") from None
        rules = assignment_of_plan(path, data)
        try:
            assignment = Assignment.from_dict(rules)
            given, names = data["plan"], {field.name for field in _own_fields()}
            if not isinstance(given, dict) or set(given) | {"trained"} != names:
                raise ArgumentError(f"a plan must have exactly the keys {sorted(names)}")
            kinds = typing.get_type_hints(cls)
            found = cls(assignment.rules, assignment.order, **{name: _typed(given[name], kinds[name], name) for name in given})
            _check_ranges(found)
            return found
        except ArgumentError as error:
            raise ArgumentError(f"{path} contains no plan: {error}") from None


def is_plan(path: str | Path) -> bool:
    """Whether a method's JSON file, which can be read, is that of a plan."""
    return "assignment" in json.loads(Path(path).read_text(encoding="utf-8"))


def _check_ranges(plan: Plan) -> None:
    """Raise ArgumentError unless lengths fit each other and numbers are in their ranges."""
    require(plan.unit in UNITS, f"unit must be one of {', '.join(UNITS)}", plan.unit)
    asked = [value for value in (plan.asked.budget, plan.asked.speed) if value is not None]
    require(len(asked) == 1 and asked[0] > 0, "asked must be a budget or a speed, above 0", plan.asked)
    require(plan.steps >= 1, "steps must be >= 1", plan.steps)
    for name in ("sizes", "ranges", "layers", "candidates"):
        require(len(getattr(plan, name)) > 0, f"{name} must not be empty", getattr(plan, name))
    for own in plan.ranges:
        require(0 <= own.low < own.high <= 1, "a range must have 0 <= low < high <= 1", own)
    for size in plan.sizes:
        require(min(size.grid) >= 1 and size.text >= 0, "a size must have a grid of ints >= 1 and text >= 0", size)
    require(len({layer.name for layer in plan.layers}) == len(plan.layers), "layers must have different names", plan.layers)
    heads = [layer.heads for layer in plan.layers]
    for name in ("chosen", "errors"):
        lengths = [[len(row) for row in rows] for rows in getattr(plan, name)]
        if lengths != [heads] * len(plan.ranges):
            raise ArgumentError(
                f"{name} must have a list for each of {len(plan.ranges)} ranges, in it one for each of {len(heads)} layers, in it an entry "
                "for each head"
            )
    count = len(plan.candidates)
    for n in (n for rows in plan.chosen for row in rows for n in row):
        require(0 <= n < count, f"chosen must contain places in the {count} candidates, from 0", n)
    for error in (error for rows in plan.errors for row in rows for error in row):
        require(error >= 0, "errors must be >= 0", error)
    lengths_by_range = len(plan.outcome.by_range)
    require(
        lengths_by_range == len(plan.ranges), f"outcome.by_range must have {len(plan.ranges)} entries, one for each range", lengths_by_range
    )
    for rule in plan.scaling.rules:
        legal = 0 <= rule.candidate < count and 0 <= rule.range < len(plan.ranges)
        require(legal, "a rule of scaling must name one of the candidates and ranges, by their places from 0", rule)


def _own_fields() -> list[Any]:
    inherited = {field.name for field in dataclasses.fields(Assignment)}
    return [field for field in dataclasses.fields(Plan) if field.name not in inherited]


def _plain(value: Any) -> Any:
    """JSON-ready."""
    if isinstance(value, AttentionSpec):
        return value.to_dict()
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value read from JSON as a type of this module's dataclasses. Raises ArgumentError at another, and at unknown or missing keys."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return None if value is None else _typed(value, arguments[0], name)
    if origin is tuple and isinstance(value, list):
        repeated = len(arguments) == 2 and arguments[1] is Ellipsis
        if repeated or len(value) == len(arguments):
            return tuple(_typed(item, arguments[0 if repeated else n], name) for n, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {str(key): _typed(item, arguments[1], name) for key, item in value.items()}
    elif kind is AttentionSpec:
        return AttentionSpec.from_dict(value)
    elif dataclasses.is_dataclass(kind) and isinstance(value, dict):
        fields, hints = {field.name for field in dataclasses.fields(kind)}, typing.get_type_hints(kind)
        if set(value) == fields:
            return kind(**{key: _typed(item, hints[key], f"{name}.{key}") for key, item in value.items()})  # type: ignore[operator]
    elif kind is float and is_real(value):
        return float(value)
    elif kind in (int, str) and type(value) is kind:
        return value
    raise ArgumentError(f"{name} must be {kind.__name__ if isinstance(kind, type) else kind}, not {str(value)[:80]!r}")
