"""One small adapter per diffusers family, and the model that ships with the package."""

from dit_accel.pipelines.family import Family
from dit_accel.pipelines.flux import FLUX

FAMILIES: tuple[Family, ...] = (FLUX,)


def family_of(model: object) -> Family | None:
    """The family of a transformer, by the names of its class and base classes; None where no family fits."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return next((family for family in FAMILIES if family.model_class in names), None)
