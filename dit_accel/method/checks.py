"""What the fields of parts and specs may be, and the errors that say so."""

import math
import numbers
from typing import Any

from dit_accel.errors import ArgumentError


def require(condition: bool, rule: str, given: object, advice: str = "") -> None:
    """Raise ArgumentError, unless the condition holds, with the rule ("x must be ..."), what was given instead, and what to do."""
    if not condition:
        raise ArgumentError(f"{rule}, not {given!r}{f': {advice}' if advice else ''}")


def plain(value: Any) -> Any:
    """Numbers, in tuples and lists too, as Python's own int and float: NumPy's then compare, hash and go to JSON alike. Others as given."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def is_int(value: object) -> bool:
    """Whether a value is an int; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_real(value: object) -> bool:
    """Whether a value is a finite int or float; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flag(name: str, value: object) -> None:
    """Raise ArgumentError unless the value is a bool."""
    require(isinstance(value, bool), f"{name} must be True or False", value)


def items(name: str, value: object) -> tuple[Any, ...]:
    """A tuple or a list, as a tuple. Raises ArgumentError for anything else."""
    require(isinstance(value, tuple | list), f"{name} must be a tuple", value)
    return tuple(value)  # type: ignore[arg-type]


def axes(name: str, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """An int >= 1 for all axes, or one to three of them, one per axis; a list (from JSON) becomes a tuple. Raises ArgumentError."""
    if isinstance(value, list):
        value = tuple(value)
    entries = value if isinstance(value, tuple) else (value,)
    rule = f"{name} must be an int >= 1 or a tuple of one to three of them"
    require(1 <= len(entries) <= 3 and all(is_int(v) and v >= 1 for v in entries), rule, value)
    return value
