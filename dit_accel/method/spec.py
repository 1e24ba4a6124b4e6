"""What an accelerated attention computes: a frozen `AttentionSpec` of keep, rest, merge and order. The presets are in `presets`.

    out = merge(exact softmax over the kept keys, a cheap estimate of the rest)

A slot's value is a small dataclass; its type is the choice, its fields are that choice's numbers. Text tokens are never named here: every
query keeps all text keys, and text queries are dense, in every method. The resolution is no part of a spec: it comes with each call.
"""

import dataclasses
import math
import numbers
from dataclasses import dataclass
from typing import Any, Literal, get_args

from dit_accel.errors import ArgumentError
from dit_accel.method.parameters import AttentionParameters

FEATURE_MAPS = ("softmax", "elu", "relu")


def require(condition: bool, wanted: str, got: object) -> None:
    if not condition:
        raise ArgumentError(f"{wanted}, got {got!r}")


def unknown(slot: object, where: str) -> ValueError:
    """The error of code that has no case for a slot's type: what is not known is never computed as nothing."""
    return ValueError(f"{where} does not support {type(slot).__name__}, got {slot!r}: add a case for it there, or use another type")


def plain(value: Any) -> Any:
    """Numbers, in tuples and lists too, as Python's own int and float: NumPy's then compare, hash and go to JSON alike. Others as given."""
    if isinstance(value, tuple | list):
        return tuple(map(plain, value)) if isinstance(value, tuple) else list(map(plain, value))
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _with_plain_numbers(slot: Any) -> None:
    for field in dataclasses.fields(slot):
        object.__setattr__(slot, field.name, plain(getattr(slot, field.name)))


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _flag(name: str, value: object) -> None:
    require(isinstance(value, bool), f"{name} is True or False", value)


def _items(name: str, value: object) -> tuple[Any, ...]:
    require(isinstance(value, tuple | list), f"{name} is a tuple", value)
    return tuple(value)  # type: ignore[arg-type]


def is_real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _axes(name: str, value: int | tuple[int, ...]) -> int | tuple[int, ...]:
    """An int for all axes, or one int >= 1 per axis; a list (from JSON) becomes a tuple."""
    if isinstance(value, list):
        value = tuple(value)
    entries = value if isinstance(value, tuple) else (value,)
    wanted = f"{name} is an int >= 1 or a tuple of one to three of them"
    require(1 <= len(entries) <= 3 and all(is_int(v) and v >= 1 for v in entries), wanted, value)
    return value


# Keep


@dataclass(frozen=True)
class TopK:
    """The n = max(1, floor(density · key blocks)) key blocks with the largest pooled score (SLA, arXiv 2509.24006, eq. 2).

    `correct_short`: multiply a block's score by sqrt(tokens / block), because the mean over fewer tokens is noisier and wins too often.
    """

    density: float
    correct_short: bool = False

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        require(is_real(self.density) and 0 < self.density <= 1, "density is a share of key blocks in (0, 1]", self.density)
        _flag("correct_short", self.correct_short)

    def count(self, blocks: int) -> int:
        """How many of so many key blocks are kept; 0.29 of 100 are 29, although the product of floats is a little less."""
        return max(1, math.floor(self.density * blocks + 1e-9))


@dataclass(frozen=True)
class _Round:
    """A distance from the query, in tokens."""

    radius: float

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        legal = isinstance(self.radius, int | float) and not isinstance(self.radius, bool) and 0 < self.radius < 1e9
        require(legal, "radius is a number of tokens > 0 (and below 1e9)", self.radius)

    @property
    def reach(self) -> int:
        """The largest squared integer distance below radius², at least 0 (a token is close to itself)."""
        return max(0, math.ceil(self.radius * self.radius) - 1)


@dataclass(frozen=True)
class Disc(_Round):
    """Keys with dt² + dy² + dx² < radius² in token coordinates, strict, clipped at borders (CLEAR, arXiv 2412.16112)."""


@dataclass(frozen=True)
class DiscBlocks(_Round):
    """Every whole key block that holds a key closer than `radius` to some query of the query block: no partial blocks."""


@dataclass(frozen=True)
class Window:
    """NATTEN's window: exactly `size` keys per axis, shifted inwards at borders (arXiv 2403.04690, 2504.16922).

    An int holds for all axes of the grid, a pair for height and width, a triple for frames, height and width. An axis shorter than the
    window (after dilation) is kept whole.
    """

    size: int | tuple[int, ...]
    stride: int | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        for name in ("size", "stride", "dilation"):
            object.__setattr__(self, name, _axes(name, getattr(self, name)))
        for size, stride in zip(self.per_axis("size"), self.per_axis("stride"), strict=True):
            require(stride <= size, f"stride is at most the window's size {self.size}", self.stride)

    def per_axis(self, name: str) -> tuple[int, int, int]:
        """The field's values for (T, H, W): an int stands for every axis that `size` names, and axes not named are 1."""
        value = getattr(self, name)
        if isinstance(value, int):
            value = (value,) * (len(self.size) if isinstance(self.size, tuple) else 3)
        filled = (1,) * (3 - len(value)) + value
        return (filled[0], filled[1], filled[2])


@dataclass(frozen=True)
class Box:
    """Keys within `radius` of the query along every axis, strict (`|distance| < radius`), clipped at borders: the disc's box.

    An int holds for all axes of the grid, a pair for height and width, a triple for frames, height and width; an axis not named has 1.
    """

    radius: int | tuple[int, ...]

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        object.__setattr__(self, "radius", _axes("radius", self.radius))

    @property
    def radii(self) -> tuple[int, int, int]:
        """The radius per axis of (T, H, W)."""
        value = (self.radius,) * 3 if isinstance(self.radius, int) else self.radius
        filled = (1,) * (3 - len(value)) + value
        return (filled[0], filled[1], filled[2])


@dataclass(frozen=True)
class FirstFrames:
    """Every whole key block that holds a token of the first `count` frames of the grid, for every query: the given image of an
    image-to-video model, an attention sink."""

    count: int = 1

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        require(is_int(self.count) and self.count >= 1, "count is a number of frames >= 1", self.count)


Pattern = TopK | Disc | DiscBlocks | Window | Box | FirstFrames


# Rest


@dataclass(frozen=True)
class Linear:
    """Linear attention phi(q)·(phi(K)ᵀV) / phi(q)·sum phi(K), over the blocks not kept or over all (SLA, eq. 5)."""

    feature_map: Literal["softmax", "elu", "relu"] = "softmax"
    scope: Literal["complement", "all"] = "complement"

    def __post_init__(self) -> None:
        require(self.feature_map in FEATURE_MAPS, f"feature_map is one of {FEATURE_MAPS}", self.feature_map)
        require(self.scope in ("complement", "all"), "scope is 'complement' or 'all'", self.scope)


@dataclass(frozen=True)
class Pooled:
    """One pooled key and value for each block not kept (Fovea): logit s·q·k̄ + log n + min(s²/2 · Σ_d q_d² Var(k_d), cap).

    The second-order cumulant expansion of the block's true softmax mass. `log_count` and `variance` switch the last two terms.
    """

    log_count: bool = True
    variance: bool = True
    cap: float = 2.0

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        require(is_real(self.cap) and self.cap >= 0, "cap is a number >= 0", self.cap)
        _flag("log_count", self.log_count)
        _flag("variance", self.variance)


@dataclass(frozen=True)
class Downsampled:
    """CLEAR's learned pooled keys: each factor × factor patch of K and V summed with learned weights (1/factor² at start), seen by every
    image query as one ordinary key."""

    factor: int

    def __post_init__(self) -> None:
        _with_plain_numbers(self)
        require(is_int(self.factor) and self.factor >= 2, "downsample is None or an int >= 2", self.factor)


Rest = Linear | Pooled | Downsampled


# Merge


@dataclass(frozen=True)
class Residual:
    """out = exact + rest · Wᵀ + b with W, b learned, zero at start and shared by the heads (SLA)."""


@dataclass(frozen=True)
class Mass:
    """The two parts weighted by their softmax mass, exp(lse) and exp(log mass of the rest + c): one softmax over both.

    `offset`: c is learned, one per head, zero at start; without it c = 0.
    """

    offset: bool = True

    def __post_init__(self) -> None:
        _flag("offset", self.offset)


Merge = Residual | Mass


# Order


@dataclass(frozen=True)
class Raster:
    """Image tokens lie in memory row by row."""


@dataclass(frozen=True)
class Tiles:
    """Image tokens lie tile by tile; `shape` is the largest tile, (height, width) or (frames, height, width) in tokens.

    An axis that the tile does not divide is split evenly into shorter tiles, so that no tile is a sliver.
    """

    shape: tuple[int, ...] = (8, 8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", plain(_items("shape", self.shape)))
        ok = len(self.shape) in (2, 3) and all(is_int(side) and side >= 1 for side in self.shape)
        require(ok, "a tile's shape is two or three ints >= 1", self.shape)

    @property
    def sides(self) -> tuple[int, int, int]:
        """The shape as (frames, height, width)."""
        t, h, w = (1, *self.shape) if len(self.shape) == 2 else self.shape
        return (t, h, w)


Order = Raster | Tiles

_SLOTS: dict[str, type] = {kind.__name__: kind for kind in (*get_args(Pattern), *get_args(Rest), *get_args(Merge), *get_args(Order))}


@dataclass(frozen=True)
class AttentionSpec:
    """keep × rest × merge × order. Use a preset (`Fovea`, `CLEAR`, `SLA`, `GNA`) or fill the slots.

    `keep` is a union of patterns; `rest` and `merge` are both given or both None; `block` is (query, key) tokens per block, each a power
    of two from 16 to 128; in tile order both are the tile's number of tokens.
    """

    keep: tuple[Pattern, ...]
    rest: Rest | None = None
    merge: Merge | None = None
    order: Order = Tiles()
    block: tuple[int, int] = (64, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _items("keep", self.keep))
        object.__setattr__(self, "block", plain(_items("block", self.block)))
        require(len(self.keep) > 0 and all(isinstance(p, Pattern) for p in self.keep), f"keep holds some of {Pattern}", self.keep)
        require(sum(isinstance(p, TopK) for p in self.keep) <= 1, "keep holds TopK at most once", self.keep)
        require(self.rest is None or isinstance(self.rest, Rest), f"rest is None or one of {Rest}", self.rest)
        require(self.merge is None or isinstance(self.merge, Merge), f"merge is None or one of {Merge}", self.merge)
        require(isinstance(self.order, Order), f"order is one of {Order}", self.order)
        require((self.rest is None) == (self.merge is None), "rest and merge are both given or both None", (self.rest, self.merge))
        legal = len(self.block) == 2 and all(is_int(b) and 16 <= b <= 128 and b & (b - 1) == 0 for b in self.block)
        require(legal, "block is two powers of two from 16 to 128", self.block)
        if isinstance(self.order, Tiles):
            tokens = math.prod(self.order.sides)
            require(self.block == (tokens, tokens), f"in tile order {self.order.shape} block is {(tokens, tokens)}", self.block)
        self._check_combination()

    def _check_combination(self) -> None:
        boxes = [p for p in self.keep if isinstance(p, DiscBlocks)]
        require(not boxes or isinstance(self.order, Tiles), "DiscBlocks wants tile order: a raster block is no box", self.order)
        exact = [p for p in self.keep if not isinstance(p, TopK | DiscBlocks | FirstFrames)]
        blockwise = isinstance(self.rest, Pooled) or (isinstance(self.rest, Linear) and self.rest.scope == "complement")
        require(
            not (exact and blockwise), "a rest of the blocks not kept wants patterns of whole blocks (TopK, DiscBlocks, FirstFrames)", exact
        )
        joint = isinstance(self.rest, Downsampled | Pooled)
        require(not joint or isinstance(self.merge, Mass), "pooled and down-sampled keys merge by Mass()", self.merge)
        shifted = isinstance(self.rest, Downsampled) and isinstance(self.merge, Mass) and self.merge.offset
        require(not shifted, "down-sampled keys merge by Mass(offset=False): their learned weights scale them", self.merge)

    def make_parameters(self, *, heads: int, head_dim: int) -> AttentionParameters:
        """The learned part at its start values, float32; a module without parameters where the method has none."""
        projection: int | None = None
        offset: int | None = None
        factor: int | None = None
        match self.merge:
            case Residual():
                projection = head_dim
            case Mass(with_offset):
                offset = heads if with_offset else None
            case None:
                pass
            case _:
                raise unknown(self.merge, "make_parameters")
        match self.rest:
            case Downsampled(by):
                factor = by
            case Linear() | Pooled() | None:
                pass
            case _:
                raise unknown(self.rest, "make_parameters")
        return AttentionParameters(projection=projection, offset=offset, factor=factor)

    @property
    def density(self) -> float | None:
        """The share of key blocks asked for, where the spec names one."""
        return next((p.density for p in self.keep if isinstance(p, TopK)), None)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: every slot value as its fields plus `type`."""
        return {
            "keep": [_slot_to_dict(p) for p in self.keep],
            "rest": _slot_to_dict(self.rest) if self.rest else None,
            "merge": _slot_to_dict(self.merge) if self.merge else None,
            "order": _slot_to_dict(self.order),
            "block": list(self.block),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionSpec":
        """The inverse of `to_dict`. Raises ValueError at unknown or missing keys and types."""
        names = {"keep", "rest", "merge", "order", "block"}
        require(isinstance(data, dict) and set(data) == names, f"a spec has exactly the keys {sorted(names)}", data)
        return cls(
            keep=tuple(_slot_from_dict(p) for p in _items("keep", data["keep"])),
            rest=None if data["rest"] is None else _slot_from_dict(data["rest"]),
            merge=None if data["merge"] is None else _slot_from_dict(data["merge"]),
            order=_slot_from_dict(data["order"]),
            block=data["block"],
        )

    def __str__(self) -> str:
        parts = [*self.keep, *([self.rest, self.merge] if self.rest else []), self.order]
        return " + ".join(_short(p) for p in parts)


def _short(slot: Any) -> str:
    """The slot's type and the fields that differ from their defaults."""
    shown = [
        f"{f.name}={getattr(slot, f.name)}"
        for f in dataclasses.fields(slot)
        if f.default is dataclasses.MISSING or getattr(slot, f.name) != f.default
    ]
    return f"{type(slot).__name__}({', '.join(shown)})"


def _slot_to_dict(slot: Any) -> dict[str, Any]:
    fields = {f.name: getattr(slot, f.name) for f in dataclasses.fields(slot)}
    return {"type": type(slot).__name__, **{k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}}


def _slot_from_dict(data: Any) -> Any:
    named = isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] in _SLOTS
    require(named, f"a slot names its type, one of {sorted(_SLOTS)}", data)
    kind = _SLOTS[data["type"]]
    fields = {k: v for k, v in data.items() if k != "type"}
    known = {f.name for f in dataclasses.fields(kind)}
    needed = {f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING}
    require(needed <= set(fields) <= known, f"{kind.__name__} has the fields {sorted(known)}, {sorted(needed)} needed", sorted(fields))
    return kind(**fields)
