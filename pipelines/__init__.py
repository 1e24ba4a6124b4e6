"""One small declaration per diffusers family, and the model that ships with the package."""

from typing import Any

from dit_accel.errors import UnsupportedModelError
from dit_accel.pipelines.families import FAMILIES, UNSUPPORTED
from dit_accel.pipelines.family import Family
from dit_accel.pipelines.grids import patch

__all__ = ["FAMILIES", "UNSUPPORTED", "Family", "class_of", "family_of", "register", "token_pixels", "why_no_family"]

# what pipelines call the number of pixels on a latent's side
SCALES = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_spatial_scale_factor")


def family_of(model: object) -> Family | None:
    """The family of a transformer, by the names of its class and base classes; None where no family fits."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if names & set(family.classes)), None)


def why_no_family(model: object) -> str | None:
    """The reason that a transformer of diffusers has no family, by the names of its class and bases; None where that is not known."""
    return next((f"{cls.__name__}'s {UNSUPPORTED[cls.__name__]}" for cls in type(model).__mro__ if cls.__name__ in UNSUPPORTED), None)


def class_of(model: object) -> type:
    """The class of a transformer that its family names. Raises ValueError where no family fits."""
    family = family_of(model)
    if family is None:
        raise ValueError(f"{type(model).__name__} belongs to no registered family")
    return next(cls for cls in type(model).__mro__ if cls.__name__ in family.classes)


def token_pixels(pipe: Any, transformer: Any) -> int:
    """Side in pixels of one token of a pipeline's pictures. Raises UnsupportedModelError where family and configuration do not tell it."""
    family, scale = family_of(transformer), next((getattr(pipe, name) for name in SCALES if hasattr(pipe, name)), None)
    try:
        side = (family and family.patch) or patch(transformer)[-1]
    except AttributeError:  # no patch_size
        side = None
    if scale is None or side is None:
        missing = f"{type(pipe).__name__} has none of {', '.join(SCALES)}" if scale is None else "set Family(patch=...)"
        raise UnsupportedModelError(f"the side of one token of {type(transformer).__name__} in pixels is not known: {missing}")
    return int(scale * side)


def register(family: Family) -> None:
    """Make `accelerate` know one more family of transformers. Raises ValueError for a class that a family has already."""
    if not isinstance(family, Family):
        raise ValueError(f"family must be a Family, not {family!r}")
    taken = {name: other.name for other in FAMILIES for name in other.classes if name in family.classes}
    if taken:
        raise ValueError(f"these classes belong to a family already: {taken}")
    FAMILIES.append(family)
