"""Attention methods as text, for command lines and configuration: `fovea:0.05`, `clear:8,downsample=4`, `gna:9x9,dilation=2`.

    NAME | NAME:VALUE | NAME:VALUE,KEY=VALUE,... | NAME:KEY=VALUE,... | FILE.json

VALUE alone is the method's first argument; keys are the argument names of the presets in `dit_accel.method`. 9x5 is (9, 5): height, width;
4x9x5 is frames, height, width. FILE.json contains a spec (`AttentionSpec.to_dict`) or an assignment of several (`Assignment.save`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dit_accel.errors import ArgumentError
from dit_accel.method.assignment import Assignment, read_method
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec


def _number(text: str) -> int | float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _axes(text: str) -> int | tuple[int, ...]:
    entries = tuple(int(entry) for entry in text.split("x"))
    return entries[0] if len(entries) == 1 else entries


def _radius(text: str) -> int | float | tuple[int, ...]:
    return tuple(int(entry) for entry in text.split("x")) if "x" in text else _number(text)


def _pair(text: str) -> tuple[int, int]:
    first, second = (int(entry) for entry in text.split("x"))
    return first, second


FILE = ".json"

Reader = tuple[Callable[[str], Any], str]  # turns text into a value or raises ValueError; what it requires, in words
NUMBER: Reader = (_number, "a number")
INTEGER: Reader = (int, "an integer")
AXES: Reader = (_axes, "an integer, or integers joined by x as in 9x9")
RADIUS: Reader = (_radius, "a number, or integers joined by x (a box)")
PAIR: Reader = (_pair, "two integers joined by x, as in 128x64")
WORD: Reader = (str, "a word")


MORE: dict[str, Reader] = {"tile": AXES, "first_frames": INTEGER}  # arguments of every preset


@dataclass(frozen=True)
class PresetSyntax:
    """A preset and how its arguments are read; the first of them may be given without its name."""

    preset: Callable[..., AttentionSpec]
    arguments: dict[str, Reader]
    examples: tuple[str, ...]
    required: bool = True  # the first argument

    @property
    def first(self) -> str:
        """The argument that may be given without its name."""
        return next(iter(self.arguments))


METHODS: dict[str, PresetSyntax] = {
    "fovea": PresetSyntax(
        Fovea, {"density": NUMBER, "radius": NUMBER, "blocks": INTEGER, "order": INTEGER, "parts": INTEGER, "conv": INTEGER} | MORE,
        ("fovea", "fovea:0.05", "fovea:0.05,order=1", "fovea:0.05,conv=5", "fovea:radius=8", "fovea:blocks=3"), required=False,
    ),
    "clear": PresetSyntax(CLEAR, {"radius": RADIUS, "downsample": INTEGER} | MORE, ("clear:16", "clear:8,downsample=4", "clear:2x8x8")),
    "sla": PresetSyntax(
        SLA, {"topk": NUMBER, "feature_map": WORD, "scope": WORD, "block": PAIR} | MORE, ("sla:0.1", "sla:0.1,scope=all,feature_map=elu")
    ),
    "gna": PresetSyntax(GNA, {"window": AXES, "stride": AXES, "dilation": AXES} | MORE, ("gna:80,stride=16", "gna:9x9,dilation=2")),
}  # fmt: skip


def parse_method(text: str) -> AttentionSpec | Assignment | None:
    """The spec that a text like `clear:16` names, or what a JSON file contains; None for `none`, the original attention.

    Raises ValueError that says what is required and shows the text.
    """
    if text.strip().lower().endswith(FILE):
        return read_method(text.strip())
    name, colon, rest = (part.strip() for part in text.partition(":"))
    name = name.lower()
    if name not in METHODS and name != "none":
        raise ArgumentError(f"method must be one of {', '.join(['none', *METHODS])} or a JSON file, not {text!r}")
    if name == "none":
        if colon:
            raise ArgumentError(f"none takes no arguments: write none, not {text!r}")
        return None
    method = METHODS[name]
    arguments = _read_arguments(name, method, rest, text) if colon else {}
    if method.required and method.first not in arguments:
        raise ArgumentError(f"{name} requires its {method.first}, as in {method.examples[0]}, which {text!r} lacks")
    try:
        return method.preset(**arguments)
    except ArgumentError as error:
        raise ArgumentError(f"{error} (in {text!r})") from None


def _read_arguments(name: str, method: PresetSyntax, rest: str, text: str) -> dict[str, Any]:
    """The arguments after the colon, by name."""
    found: dict[str, Any] = {}
    for position, part in enumerate(rest.split(",")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals and position == 0:
            key, value = method.first, key
        elif not equals:
            raise ArgumentError(f"{name} requires key=value after its first argument, not {part!r} in {text!r}")
        if key not in method.arguments:
            raise ArgumentError(f"{name} takes {', '.join(method.arguments)}, not {key!r} in {text!r}")
        if key in found:
            raise ArgumentError(f"{name} takes each argument once, but {key} is twice in {text!r}: remove one")
        read, required = method.arguments[key]
        try:
            found[key] = read(value)
        except ValueError:
            raise ArgumentError(f"{name}'s {key} must be {required}, not {value!r} in {text!r}") from None
    return found
