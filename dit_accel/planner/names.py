"""Short names of methods: what a user types for them."""

from dit_accel.errors import ArgumentError
from dit_accel.method.assignment import ORIGINAL
from dit_accel.method.spec import AttentionSpec
from dit_accel.method.text import parse_method


def short_name(spec: AttentionSpec | None) -> str:
    """The text by which a command line names a spec, as fovea:0.05, where it has a short one; else all of its parts."""
    if spec is None:
        return ORIGINAL
    first, shape = spec.keep[0], getattr(spec.order, "shape", None)
    radius, size = (_joined(getattr(first, name, None)) for name in ("radius", "size"))
    tile = "" if shape is None else f",tile={_joined(shape)}"
    forms = [f"fovea:{spec.density:g}", f"sla:{spec.density:g}"] if spec.density is not None else []
    forms += [f"fovea:blocks={spec.selection.more}"] if spec.selection is not None and spec.selection.more else []
    forms += [f"fovea:radius={radius}", f"clear:{radius}"] if radius else []
    forms += [f"gna:{size}"] if size else []
    order, parts = (getattr(spec.rest, name, None) for name in ("order", "parts"))
    further = ("", f",order={order}", f",parts={parts}", f",order={order},parts={parts}") if parts else ("",)
    for text in (form + more + ending for form in forms for more in further for ending in ("", tile)):
        try:
            if parse_method(text) == spec:
                return text
        except ArgumentError:  # no method is called so
            continue
    return str(spec)


def _joined(value: object) -> str:
    if value is None:
        return ""
    return "x".join(map(str, value)) if isinstance(value, tuple) else f"{value:g}" if isinstance(value, float) else str(value)
