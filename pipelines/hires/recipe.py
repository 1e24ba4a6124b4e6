"""The settings of a high-resolution picture and the sizes that it is drawn at on the way."""

import hashlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.pipelines import family_of
from dit_accel.pipelines.builtin.transformer import BuiltinTransformer2DModel


@dataclass(frozen=True)
class Recipe:
    """The arguments of `generate_hires`; sizes in pixels. Every field is checked."""

    height: int
    width: int
    base: int
    strength: float
    num_inference_steps: int
    seed: int
    ntk: float | None
    proportional: bool

    def __post_init__(self) -> None:
        for name in ("height", "width", "base", "num_inference_steps"):
            self._check(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an int >= 1")
        self._check("seed", type(self.seed) is int and self.seed >= 0, "an int >= 0")
        self._check("strength", type(self.strength) in (int, float) and 0 < self.strength <= 1, "a share of the steps in (0, 1]")
        positive = type(self.ntk) in (int, float) and 0 < self.ntk < math.inf  # type: ignore[operator]
        self._check("ntk", self.ntk is None or positive, "a factor > 0 or None")
        self._check("proportional", type(self.proportional) is bool, "True or False")

    def _check(self, name: str, ok: bool, required: str) -> None:
        if not ok:
            raise ArgumentError(f"{name} must be {required}, not {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-ready."""
        return asdict(self)

    def sizes(self, unit: int) -> list[tuple[int, int]]:
        """(height, width) of each stage in multiples of a token's side: the first with no side above `base`, then about doubled.

        Raises ValueError where the picture or the base does not fit.
        """
        if self.height % unit or self.width % unit:
            raise ArgumentError(f"height and width must be multiples of {unit} pixels, a token's side, not {self.height} and {self.width}")
        if self.base < unit:
            raise ArgumentError(f"base must be at least {unit} pixels, a token's side, not {self.base}")
        doublings = max(0, math.ceil(math.log2(max(self.height, self.width) / self.base)))
        steps = (2**n for n in range(doublings, -1, -1))
        return [(_rounded(self.height / step, unit), _rounded(self.width / step, unit)) for step in steps]


def _rounded(side: float, unit: int) -> int:
    return max(1, round(side / unit)) * unit


def rotary_embedding(transformer: Any) -> Any:
    """The transformer's rotary embedding whose base is read at every forward; None where there is none."""
    family = family_of(transformer)
    return None if family is None or family.rotary is None else getattr(transformer, family.rotary, None)


def rotary_factor(transformer: Any, asked: float | None) -> float:
    """Factor of a transformer's rotary base above the base size: as asked, else its family's, and 1 for the built-in model.

    Raises UnsupportedModelError where a factor was asked for and can't be applied.
    """
    embedding = rotary_embedding(transformer)
    if embedding is None:
        if asked not in (None, 1):
            raise UnsupportedModelError(
                f"ntk requires a rotary embedding that reads its base at every forward, which {type(transformer).__name__} does not have: "
                "leave ntk out, and its positions are not rescaled"
            )
        return 1.0
    if asked is not None:
        return asked
    family: Any = family_of(transformer)
    # the built-in model stretches its positions over a fixed canvas by itself
    factor: float = 1.0 if isinstance(transformer, BuiltinTransformer2DModel) else family.rotary_factor
    return factor


def check_positions(transformer: Any, size: tuple[int, int], unit: int) -> None:
    """Raise UnsupportedModelError where a picture of (height, width) pixels is larger than the transformer has positions for. `unit`:
    pixels of a token's side."""
    family = family_of(transformer)
    tokens = None if family is None or family.longest_side is None else family.longest_side(transformer)
    if tokens is not None and max(size) > tokens * unit:
        raise UnsupportedModelError(
            f"{type(transformer).__name__} has learned positions for {tokens * unit} pixels a side, fewer than {size[1]}×{size[0]}: "
            "ask for a smaller picture"
        )


def plain(value: Any) -> Any:
    """A call's argument as JSON: tensors as their checksum. Raises ValueError where it can't be kept and compared."""
    if isinstance(value, Tensor):
        raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(raw).hexdigest()}"
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise ArgumentError(
        f"with a folder, the call's arguments must be numbers, strings, tensors, lists or dicts of them, not {type(value).__name__}"
    )
