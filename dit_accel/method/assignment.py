"""Which spec runs where: an `Assignment` of rules, from layers, heads, denoising steps, noise levels and sizes to a spec or the original.

    Assignment((Rule(Fovea(0.05)), Rule(None, steps=(0, 2)), Rule(Fovea(0.2), layers="single_*", heads=range(4))))

The last rule that fits wins; where no rule fits, the original attention runs. Of several ranges in one rule all must fit.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from dit_accel.errors import ArgumentError
from dit_accel.files import write_text
from dit_accel.method.checks import is_int, is_real, plain, require
from dit_accel.method.parts.base import Order
from dit_accel.method.spec import AttentionSpec

ORIGINAL = "original"  # in the place of a spec's text


@dataclass(frozen=True)
class Moment:
    """Where in its run a forward is.

    `step`: the denoising step, from 0, of the run itself: a run that starts late, as image to image does, begins at 0 as well. Evaluations
    of one step, as Heun's two, share its number. `noise`: the noise level in [0, 1], 1 for pure noise. Of flow matching it is σ of
    x = (1 − σ)·x0 + σ·noise, from the scheduler's sigmas; of other schedulers the timestep over the number of training timesteps.
    """

    step: int
    noise: float


class Group(NamedTuple):
    """Heads of one layer that run one spec, or the original attention where it is None."""

    spec: AttentionSpec | None
    heads: tuple[int, ...]


Steps = tuple[int, int | None]


@dataclass(frozen=True)
class Rule:
    """A spec, or None for the original attention, and where it applies; what is None applies to all.

    Args:
        spec: the method, or None.
        layers: patterns of attention modules' names in the transformer as the shell has them (`*`, `?`, `[0-3]`), any of which fits; one
            may be given as a text.
        heads: their numbers, from 0.
        steps: (first, end) of denoising steps, the end not among them, None for no end. See `Moment` for what a step is.
        noise: (low, high) of noise levels, low < σ <= high.
        tokens: (fewest, end) of the number of image tokens in the sequence, of all images, the end not among them.

    Raises ValueError for anything else.
    """

    spec: AttentionSpec | None
    layers: tuple[str, ...] = ("*",)
    heads: tuple[int, ...] | None = None
    steps: Steps | None = None
    noise: tuple[float, float] | None = None
    tokens: Steps | None = None

    def __post_init__(self) -> None:
        require(self.spec is None or isinstance(self.spec, AttentionSpec), "a rule's spec must be an AttentionSpec or None", self.spec)
        layers = (self.layers,) if isinstance(self.layers, str) else _tuple(self.layers)
        legal = layers is not None and len(layers) > 0 and all(isinstance(pattern, str) and pattern for pattern in layers)
        require(legal, "layers must be a pattern of layers' names, or a tuple of them", self.layers)
        object.__setattr__(self, "layers", layers)
        if self.heads is not None:
            heads = _tuple(self.heads)
            legal = heads is not None and len(heads) > 0 and all(is_int(n) and n >= 0 for n in heads) and len(set(heads)) == len(heads)
            require(legal, "heads must be None or different ints >= 0", self.heads)
            object.__setattr__(self, "heads", tuple(sorted(heads or ())))
        for name in ("steps", "tokens"):
            object.__setattr__(self, name, _range(name, getattr(self, name)))
        if self.noise is not None:
            noise = _tuple(self.noise) or ()
            legal = len(noise) == 2 and all(is_real(level) for level in noise) and 0 <= noise[0] < noise[1] <= 1
            require(legal, "noise must be None or (low, high) with 0 <= low < high <= 1", self.noise)
            object.__setattr__(self, "noise", tuple(map(float, noise)))

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.spec, self.layers, self.heads, self.steps, self.noise, self.tokens))

    def __hash__(self) -> int:
        return self._hash  # kept, because a forward looks many rules up

    @property
    def of_moments(self) -> bool:
        """Whether it depends on a forward's moment in its run."""
        return self.steps is not None or self.noise is not None

    @property
    def everywhere(self) -> bool:
        """Whether it applies everywhere and always."""
        return replace(self, spec=None) == Rule(None)

    def names(self, layer: str) -> bool:
        """Whether a layer is one of its layers."""
        return any(fnmatchcase(layer, pattern) for pattern in self.layers)

    def at(self, moment: Moment | None, tokens: int | None) -> bool:
        """Whether it fits a forward with so many image tokens, or of any size where that is None; a moment that is not known fits no range
        of steps or noise levels."""
        if self.of_moments and moment is None:
            return False
        step, noise = (moment.step, moment.noise) if moment is not None else (0, 1.0)
        level = self.noise is None or self.noise[0] < noise <= self.noise[1]
        return level and _inside(step, self.steps) and (tokens is None or _inside(tokens, self.tokens))

    def covers(self, other: "Rule") -> bool:
        """Whether it fits wherever another rule does, of one layer that both name."""
        heads = self.heads is None or (other.heads is not None and set(other.heads) <= set(self.heads))
        low, high = other.noise or (0.0, 1.0)
        noise = self.noise is None or (self.noise[0] <= low and high <= self.noise[1])
        return heads and noise and _contains(self.steps, other.steps) and _contains(self.tokens, other.tokens)

    @property
    def where(self) -> str:
        """Where it applies, in words, but for the layers; empty where that is always."""
        parts = [
            "" if self.heads is None else f"heads {in_words(self.heads)}",
            _range_in_words("steps", self.steps),
            "" if self.noise is None else f"noise {self.noise[0]:g} to {self.noise[1]:g}",
            _range_in_words("tokens", self.tokens),
        ]
        return ", ".join(part for part in parts if part)

    def __str__(self) -> str:
        layers = "" if self.layers == ("*",) else " or ".join(self.layers)
        return f"{', '.join(part for part in (layers, self.where) if part) or 'everywhere'}: {self.spec or ORIGINAL}"


class Rules(tuple[Rule, ...]):
    """Some rules of an assignment, in its order. The hash is kept: every layer of a forward looks its specs up by them."""

    @functools.cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        return self._hash


def specs_in(rules: Iterable[Rule]) -> tuple[AttentionSpec, ...]:
    """The specs of some rules, each once."""
    return tuple(dict.fromkeys(rule.spec for rule in rules if rule.spec is not None))


@functools.lru_cache(maxsize=256)
def without(rules: Rules, specs: frozenset[AttentionSpec]) -> Rules:
    """Rules with the original attention in the place of some specs."""
    return Rules(replace(rule, spec=None) if rule.spec in specs else rule for rule in rules) if specs else rules


@functools.lru_cache(maxsize=256)
def _fitting(assignment: "Assignment", numbers: tuple[int, ...]) -> Rules:
    """Those rules, from the last on that fits every layer and head; the same object each time."""
    fitting = [assignment.rules[n] for n in numbers]
    first = max((n for n, rule in enumerate(fitting) if rule.layers == ("*",) and rule.heads is None), default=0)
    return Rules(fitting[first:])


@functools.lru_cache(maxsize=4096)
def groups(rules: Rules, layer: str, heads: int) -> tuple[Group, ...]:
    """The specs that a layer of so many heads runs where these rules fit, each with its heads; each head is in one group."""
    named = [rule for rule in rules if rule.names(layer)]
    found: dict[AttentionSpec | None, list[int]] = {}
    for head in range(heads):
        fitting = (rule for rule in reversed(named) if rule.heads is None or head in rule.heads)
        found.setdefault(next((rule.spec for rule in fitting), None), []).append(head)
    return tuple(Group(spec, tuple(numbers)) for spec, numbers in found.items())


@dataclass(frozen=True)
class Assignment:
    """Rules, of which the last that fits wins; where none fits, the original attention runs. Frozen; JSON by `save` and `load`.

    Args:
        rules: the last one that fits wins.
        order: how tokens are cut into blocks, which all specs share; taken from them unless given. Blocks may differ in raster order.

    Raises ValueError for rules without any spec or of different orders.
    """

    rules: tuple[Rule, ...]
    order: Order | None = None

    def __post_init__(self) -> None:
        rules = _tuple(self.rules)
        legal = rules is not None and all(isinstance(rule, Rule) for rule in rules)
        require(legal, "rules must be a tuple of Rule", self.rules)
        object.__setattr__(self, "rules", rules)
        if not self.specs:
            raise ArgumentError(
                "an assignment requires a spec in one rule at least; to run the original attention everywhere, do not accelerate"
            )
        order = self.specs[0].order if self.order is None else self.order
        if other := next((spec for spec in self.specs if spec.order != order), None):
            raise ArgumentError(f"the specs of an assignment must have one order, but {other} has not {order}: give it that order")
        object.__setattr__(self, "order", order)

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.rules)

    def __hash__(self) -> int:
        return self._hash

    @classmethod
    def of(cls, method: "AttentionSpec | Assignment", *, dense_steps: int = 0) -> "Assignment":
        """A method as an assignment, a spec as that of one rule; the first `dense_steps` of every run keep the original attention."""
        found = method if isinstance(method, Assignment) else cls((Rule(method),))
        return cls((*found.rules, Rule(None, steps=(0, dense_steps)))) if dense_steps else found

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """Its specs, each once."""
        return specs_in(self.rules)

    @property
    def of_moments(self) -> bool:
        """Whether it depends on a forward's moment in its run."""
        return any(rule.of_moments for rule in self.rules)

    @property
    def dense_steps(self) -> int:
        """How many steps at the start of every run keep the original attention everywhere, by a last rule that says so and nothing else."""
        last = self.rules[-1]
        first, end = last.steps or (0, None)
        return end if first == 0 and end is not None and last == Rule(None, steps=(0, end)) else 0

    @property
    def after_dense_steps(self) -> "Assignment":
        """It without the rule of its `dense_steps`."""
        return Assignment(self.rules[:-1], self.order) if self.dense_steps else self

    @property
    def spec(self) -> AttentionSpec | None:
        """The spec that applies everywhere and always but for `dense_steps`, where there is one."""
        rules = self.after_dense_steps.rules
        return rules[0].spec if len(rules) == 1 and rules[0].everywhere else None

    def record(self) -> dict[str, Any]:
        """The JSON-ready form of the spec that applies everywhere, where there is one, else its own."""
        return self.to_dict() if self.spec is None else self.spec.to_dict()

    def at(self, moment: Moment | None, tokens: int | None) -> Rules:
        """The rules that fit a forward with so many image tokens, or of any size, from the last on that fits all of it; see `Rule.at`."""
        return _fitting(self, tuple(n for n, rule in enumerate(self.rules) if rule.at(moment, tokens)))

    def specs_of(self, layer: str) -> tuple[AttentionSpec, ...]:
        """The specs that a layer may run, each once."""
        return specs_in(self.rules_of(layer))

    def rules_of(self, layer: str) -> tuple[Rule, ...]:
        """The rules that name a layer and that no later one covers."""
        named = [rule for rule in self.rules if rule.names(layer)]
        return tuple(rule for n, rule in enumerate(named) if not any(later.covers(rule) for later in named[n + 1 :]))

    def check(self, models: Sequence[Mapping[str, int]]) -> None:
        """Raise ValueError where a rule names no layer of any model, or heads that a layer which it names lacks; a model: name -> heads."""
        every = {name: heads for layers in models for name, heads in layers.items()}
        for rule in self.rules:
            named = [(name, heads) for layers in models for name, heads in layers.items() if rule.names(name)]
            if not named:
                raise ArgumentError(f"no layer is named {' or '.join(rule.layers)}: name some of {', '.join(every)}")
            short = next(((name, heads) for name, heads in named if rule.heads is not None and rule.heads[-1] >= heads), None)
            if short is not None:
                raise ArgumentError(f"{short[0]} has {short[1]} heads, numbered from 0, which the rule does not fit: {rule}")

    @property
    def of_model(self) -> bool:
        """Whether it was made for one model, see `unlike`."""
        return False

    def unlike(self, transformer: str, heads: Mapping[str, int], weights: Callable[[], str]) -> str | None:
        """How a model differs from the one that it was made for, in words; None where it does not, or where it was made for none.

        `transformer`: its class; `heads`: by layer; `weights`: their hash, computed only where it is needed.
        """
        return None

    @property
    def learned(self) -> str | None:
        """The SHA-256 of what an adapter has learned, where it was made with that: `load_adapter` loads both."""
        return None

    @property
    def without_learned(self) -> "Assignment":
        """It as an assignment that was made with start values."""
        return self

    def __str__(self) -> str:
        if self.spec is None:
            return "; ".join(map(str, self.rules))
        return str(self.spec) + (f"; {self.rules[-1]}" if self.dense_steps else "")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form. A rule names its spec by its number in `specs`, null is the original attention; conditions that it lacks are
        left out."""
        specs = self.specs
        rules = []
        for rule in self.rules:
            conditions = {name: _listed(value) for name in CONDITIONS if (value := getattr(rule, name)) is not None}
            if rule.layers == ("*",):
                del conditions["layers"]
            rules.append({"spec": None if rule.spec is None else specs.index(rule.spec), **conditions})
        return {"order": specs[0].to_dict()["order"], "specs": [spec.to_dict() for spec in specs], "rules": rules}

    @classmethod
    def from_dict(cls, data: Any) -> "Assignment":
        """The inverse of `to_dict`. Raises ValueError at unknown or missing keys."""
        names = {"order", "specs", "rules"}
        require(isinstance(data, dict) and set(data) == names, f"an assignment must have exactly the keys {sorted(names)}", data)
        for name in ("specs", "rules"):
            require(isinstance(data[name], list), f"{name} of an assignment must be a list", data[name])
        specs = [AttentionSpec.from_dict(spec) for spec in data["specs"]]
        found = cls(tuple(_rule(rule, specs) for rule in data["rules"]))
        if unused := [n for n, spec in enumerate(specs) if spec not in found.specs]:
            raise ArgumentError(f"no rule of the assignment names its specs {unused}: remove them, or name them in a rule")
        require(data["order"] == found.to_dict()["order"], "order must be that of the specs", data["order"])
        return found

    def save(self, path: str | Path) -> Path:
        """Write it to a JSON file. Raises WriteError."""
        path = Path(path)
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Assignment":
        """Read what `save` wrote, or the JSON of one spec. Raises ValueError that names the file."""
        method = read_method(path)
        return cls.of(method)


AnyMethod = AttentionSpec | Assignment
CONDITIONS = ("layers", "heads", "steps", "noise", "tokens")
PLAN_FORMAT = "dit_accel plan 1"  # of a file that contains an assignment with the record of how it was found


def read_method(path: str | Path) -> AttentionSpec | Assignment:
    """The spec or the assignment that a JSON file contains, as it is or as that of a plan. Raises ValueError that names the file."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArgumentError(f"{path} can't be read as the JSON of a spec or an assignment: {error}") from None
    if isinstance(data, dict) and "assignment" in data:
        data = assignment_of_plan(path, data)
    try:
        return Assignment.from_dict(data) if isinstance(data, dict) and "rules" in data else AttentionSpec.from_dict(data)
    except ArgumentError as error:
        raise ArgumentError(f"{path} contains neither a spec nor an assignment: {error}") from None


def assignment_of_plan(path: str | Path, data: Any) -> Any:
    """The JSON of the assignment in that of a plan's file. Raises ArgumentError that names the file."""
    if not isinstance(data, dict) or data.get("format") != PLAN_FORMAT or set(data) != {"format", "assignment", "plan"}:
        raise ArgumentError(
            f"{path} must have the format {PLAN_FORMAT!r} and the keys format, assignment and plan alone: make it with dit-accel plan"
        )
    return data["assignment"]


def _rule(data: Any, specs: Sequence[AttentionSpec]) -> Rule:
    legal = isinstance(data, dict) and "spec" in data and set(data) <= {"spec", *CONDITIONS}
    require(legal, f"a rule must have the key spec and may have {', '.join(CONDITIONS)}", data)
    number = data["spec"]
    require(number is None or (is_int(number) and 0 <= number < len(specs)), "a rule's spec must be null or a number in specs", number)
    conditions = {name: tuple(value) if isinstance(value, list) else value for name, value in data.items() if name != "spec"}
    return Rule(None if number is None else specs[number], **conditions)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _tuple(value: Any) -> tuple[Any, ...] | None:
    """Of a tuple, list or range, with plain numbers; None of anything else."""
    return tuple(plain(list(value))) if isinstance(value, tuple | list | range) else None


def _range(name: str, value: Any) -> Steps | None:
    """(first, end), half-open; a Python range with a step of 1 too."""
    if value is None:
        return None
    pair = (value.start, value.stop) if isinstance(value, range) and value.step == 1 else _tuple(value) or ()
    legal = len(pair) == 2 and is_int(pair[0]) and pair[0] >= 0 and (pair[1] is None or (is_int(pair[1]) and pair[1] > pair[0]))
    require(legal, f"{name} must be None or (first, end), two ints with 0 <= first < end, the end None for no end", value)
    return pair[0], pair[1]


def _inside(number: int, bounds: Steps | None) -> bool:
    return bounds is None or (bounds[0] <= number and (bounds[1] is None or number < bounds[1]))


def _contains(outer: Steps | None, inner: Steps | None) -> bool:
    first, end = inner or (0, None)
    return outer is None or (outer[0] <= first and (math.inf if end is None else end) <= (math.inf if outer[1] is None else outer[1]))


def _range_in_words(name: str, bounds: Steps | None) -> str:
    if bounds is None:
        return ""
    first, end = bounds
    if end is None:
        return f"{name} from {first}"
    return f"{name[:-1]} {first}" if end == first + 1 else f"{name} {first} to {end - 1}"


def in_words(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as text: 0-3, 7."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and runs[-1][-1] == n - 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
