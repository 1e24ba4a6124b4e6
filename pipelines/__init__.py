"""One small declaration per diffusers family, and the model that ships with the package."""

from dit_accel.pipelines.families import FAMILIES, UNSUPPORTED
from dit_accel.pipelines.family import Family

__all__ = ["FAMILIES", "UNSUPPORTED", "Family", "class_of", "family_of", "register", "why_no_family"]


def family_of(model: object) -> Family | None:
    """The family of a transformer, by the names of its class and base classes; None where no family fits."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def why_no_family(model: object) -> str | None:
    """Why a transformer of diffusers has no family, by the names of its class and base classes; None where that is not known."""
    return next((f"{cls.__name__}'s {UNSUPPORTED[cls.__name__]}" for cls in type(model).__mro__ if cls.__name__ in UNSUPPORTED), None)


def class_of(model: object) -> type:
    """The class of a transformer that its family names. Raises ValueError where no family fits."""
    family = family_of(model)
    if family is None:
        raise ValueError(f"wanted a transformer of a registered family, got {type(model).__name__}")
    return next(cls for cls in type(model).__mro__ if cls.__name__ in family.classes)


def register(family: Family) -> None:
    """Make `accelerate` know one more family of transformers. Raises ValueError for a class that a family has already."""
    if not isinstance(family, Family):
        raise ValueError(f"family is a Family, got {family!r}")
    taken = {name: other.name for other in FAMILIES for name in other.classes if name in family.classes}
    if taken:
        raise ValueError(f"wanted classes that no family has, got {taken}")
    FAMILIES.append(family)
