"""What a part of a method is: one frozen dataclass that carries everything that is true of it. One base class for each slot of a spec.

A part of one's own is a frozen dataclass derived from a slot's class (`Blockwise`, `Tokenwise`, `Intervals`, `Selection`, `Score`, `Rest`,
`Features`, `KeyWeight`, `Readout`, `Merge`, `Extra`, `Order`). Deriving registers it by its class's name, by which JSON and adapters find
it: import the module that defines it before a spec is read. What the slot's class leaves abstract must be given; Python refuses to make a
part that lacks any of it.
"""

import dataclasses
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from dit_accel.kernels.blocks import BlockMap
from dit_accel.kernels.reference import Partial
from dit_accel.method.checks import plain, require
from dit_accel.method.parts.call import Boxes, Call, Cost, Far, Frame, Grid, Ground, Sizes

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec

Fit = Literal["least_squares", "least_squares_by_channel", "descent", "choice"]

ADDED = "added"  # key of a field's metadata
_KINDS: dict[str, type["Part"]] = {}  # every class derived from Part, bases too, by name


class Part(ABC):  # noqa: B024 - what is abstract depends on the slot
    """A value of a slot.

    `fit`: how the first stage of a distillation finds its learned tensors: by gradient descent; by least squares, for a part that adds the
    rest times `proj.weight` `[D, D]`, plus `proj.bias` `[D]`, to the output; by least squares channel by channel, for a part in torch whose
    tensors are all `[H, D, ...]` and of which each channel of the output is linear in its own numbers alone; "choice": by descent of a loss
    of its own, for a part that chooses blocks (`choices.Chooser`); None: they keep their start values until the second stage.
    `starts`: whether a distillation begins by giving it other start values, by `start`. `own_tokens`: whether it requires that the queries
    are the keys' tokens, as where it moves values to the queries' places. `by_token`: of a feature map, a weight of keys or a readout,
    whether what it makes of a token depends on that token alone, not on its place or on other tokens.
    """

    fit: ClassVar[Fit | None] = None
    starts: ClassVar[bool] = False
    frame: Frame = Frame()
    own_tokens: bool = False
    by_token: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = _KINDS.get(cls.__name__, cls)
        if (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"a part is found by its class's name, and {cls.__name__} is {known.__module__}'s: give it another name")
        _KINDS[cls.__name__] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    def parameters(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The learned tensors of a layer, float32, at the values from which training starts. A name may have dots."""
        return {}

    def rates(self, head_dim: int) -> dict[str, float]:
        """How far a step of descent in the first stage moves a tensor's numbers, in terms of how far it moves a number that is added to
        logits; 1 for the tensors that are not named. One that is summed over D channels has 1/D."""
        return {}

    def start(self, call: Call) -> dict[str, Tensor]:
        """Of learned tensors `[H, ...]` the values from which a distillation starts, by the first call that it sees of a layer; those of
        `parameters` where a tensor is not named."""
        return {}

    def prepare(self, ground: Ground) -> dict[str, Tensor]:
        """Tensors that depend on the grid alone, made once for each plan: `Call.prepared`."""
        return {}

    def cost(self, sizes: Sizes) -> Cost:
        """What it costs in addition to the exact attention over the pairs of tokens that are kept."""
        return Cost()

    def check(self, spec: "AttentionSpec") -> None:  # noqa: B027 - most parts go with all others
        """Raise ArgumentError where the spec's other parts don't go with this one."""

    def nested(self) -> Iterator["Part"]:
        """This part, and those that are its fields."""
        yield self
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Part):
                yield from value.nested()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: the fields, and the class's name as `type`; an `added` field where it is not at its default."""
        found: dict[str, Any] = {"type": type(self).__name__}
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if ADDED not in field.metadata or value != field.default:
                found[field.name] = _to_json(value)
        return found

    def __str__(self) -> str:
        """The type and the fields that differ from their defaults."""
        shown = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if field.default is dataclasses.MISSING or getattr(self, field.name) != field.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


def added(default: Any) -> Any:
    """A field that a released version of the part lacks. JSON has it only where it is not at its default: that version reads what does not
    use it, and its checkpoints and folders of plans, which are compared with what is written, continue."""
    return dataclasses.field(default=default, metadata={ADDED: True})


def _to_json(value: Any) -> Any:
    if isinstance(value, Part):
        return value.to_dict()
    return [_to_json(entry) for entry in value] if isinstance(value, tuple) else value


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_from_json, value))
    return part_from_dict(value) if isinstance(value, dict) else value


def part_types(slot: type[Part] = Part) -> dict[str, type[Part]]:
    """The registered parts of a slot by name, sorted."""
    found = {name: kind for name, kind in sorted(_KINDS.items()) if issubclass(kind, slot) and _is_frozen(kind)}
    return {name: kind for name, kind in found.items() if not inspect.isabstract(kind)}


def _is_frozen(kind: type[Part]) -> bool:
    """Whether the class itself, not only one above it, is a frozen dataclass."""
    made = kind.__dict__.get("__dataclass_params__")
    return made is not None and made.frozen


def part_from_dict(data: Any) -> Any:
    """The inverse of `Part.to_dict`. Raises ArgumentError at unknown or missing fields and types."""
    known = part_types()
    named = isinstance(data, dict) and isinstance(data.get("type"), str) and data["type"] in known
    require(named, f"a part's type must be one of {list(known)}, or of a class whose module is imported first", data)
    kind = known[data["type"]]
    fields = {name: value for name, value in data.items() if name != "type"}
    allowed = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    needed = {field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING}  # type: ignore[arg-type]
    rule = f"{kind.__name__} must have the fields {sorted(allowed)}, of which {sorted(needed)} must be given"
    require(needed <= set(fields) <= allowed, rule, sorted(fields))
    return kind(**{name: _from_json(value) for name, value in fields.items()})


def check_part(value: object, slot: type[Part], name: str) -> None:
    """Raise ArgumentError unless the value is a part of a slot, and a frozen dataclass."""
    if not isinstance(value, slot):  # the types are listed for the message alone: a layout's check runs at every call
        require(False, f"{name} must be one of {list(part_types(slot))}", value)
    require(_is_frozen(type(value)), f"{name} must be a frozen dataclass", value, "decorate its class with @dataclass(frozen=True)")  # type: ignore[arg-type]


# Keep


class Pattern(Part):
    """Which keys a query attends to exactly. `whole_blocks`: none but whole key blocks, the same for all queries of a query block."""

    whole_blocks: ClassVar[bool]

    @property
    def frame(self) -> Frame:  # type: ignore[override]
        """A key for each token, none of them summed."""
        return Frame("k and v of the kept tokens, each by itself", f"kept or not: {self}", "softmax(s q·k) over them")


class Static(Pattern):
    """A pattern that depends on the tokens' places alone.

    `nested_boxes`: what is not visited from a box of queries isn't visited from any box inside it, so that a plan may look at many query
    blocks at once before it looks at each.
    """

    nested_boxes: ClassVar[bool] = False

    @abstractmethod
    def visits(self, grid: Grid, boxes: Boxes) -> tuple[Tensor, Tensor]:
        """Masks `[Tq, Tk]`: blocks that may contain a kept pair (none is missed), and blocks all of whose pairs are kept.

        `grid`: that of the query blocks, which are all in one image.
        """

    def pairs(self, grid: Grid) -> int | None:
        """How many pairs of one grid's tokens are kept, where that can be said without looking at all of them."""
        return None


class Blockwise(Static):
    """A static pattern of whole key blocks: `visits` gives the same mask twice."""

    whole_blocks = True


class Tokenwise(Static):
    """A static pattern that decides token by token.

    `invariant`: what is kept depends on the difference of the coordinates (t, y, x) alone, so that blocks which are placed alike need to be
    looked at once. `intervals`: along every axis it is an interval of keys, see `Intervals`.
    """

    whole_blocks = False
    nested_boxes = True  # a pair that is kept inside a box is kept inside the larger one
    invariant: ClassVar[bool] = False
    intervals: ClassVar[bool] = False
    reach: int = -1  # the largest squared distance of a kept pair, where nothing but the distance decides

    @abstractmethod
    def allowed(self, q: Tensor, k: Tensor, grids: tuple[Grid, ...]) -> Tensor:
        """Whether pairs are kept, `[..., Nq, Nk]`, of coordinates (t, y, x, image) `[..., Nq, 4]` and `[..., Nk, 4]`; on the CPU, when a
        plan is made."""


class Selection(Pattern):
    """A pattern that chooses key blocks by a score of each call. Fields: `score`, and what `share` is made of."""

    whole_blocks = True
    score: "Score"

    @property
    @abstractmethod
    def share(self) -> float:
        """The largest share of key blocks that is kept."""

    @property
    def more(self) -> int:
        """Key blocks that are kept in addition to the share, however many there are."""
        return 0

    def count(self, blocks: int) -> int:
        """The largest number of so many key blocks that is kept for a query block; 0.29 of 100 are 29, although the product of floats is a
        little less."""
        return min(blocks, max(1, math.floor(self.share * blocks + 1e-9) + self.more))

    @abstractmethod
    def choose(self, call: Call) -> BlockMap:
        """The chosen key blocks `[BH, Tq, n]` of each query block, without a gradient."""

    def cost(self, sizes: Sizes) -> Cost:
        return self.score.cost(sizes)


class Score(Part):
    """How much each key block matters to a query block.

    `mass`: its softmax estimates how the blocks share a query's attention, as `TopP` and `Columns` read it. `counts`: the number of a
    block's tokens is in it already.
    """

    mass: ClassVar[bool] = True
    counts: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, call: Call) -> Tensor:
        """`[BH, Tq, Tk]`, the larger the sooner kept, in the units of q·k: times the scale, logits."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...


# Rest, merge


class Rest(Part):
    """A cheap estimate of what the kept keys leave out."""

    @property
    def whole_blocks(self) -> bool:
        """Whether it is of the key blocks that are not kept, so that patterns must keep whole ones."""
        return False

    @property
    def far(self) -> type[Far] | None:
        """What `over` requires of keys that a call does not have; None: it can't be computed without all of them."""
        return None

    def over(self, call: Call, far: Far) -> Partial:
        """`__call__` where the call has some of the keys, those that its query blocks keep among them.

        Raises ValueError where what is given of the others is not of the kind `far`.
        """
        raise ValueError(f"{self} can't be computed of {type(far).__name__}: call it with all keys and values")

    def factors(self, call: Call) -> tuple[Tensor, Tensor]:
        """Of each of the call's keys the features `[BH, N, F]` and the value `[BH, N, D]` of which `FarSums` are made.

        Blocks, places and queries of the call are of no meaning. Raises ValueError where the rest is not of sums.
        """
        raise ValueError(f"{self} is not of sums over keys")

    def features(self, head_dim: int) -> int:
        """How many features F `factors` gives. Raises ValueError where the rest is not of sums."""
        raise ValueError(f"{self} is not of sums over keys")

    def in_part(self, prepared: Mapping[str, Tensor], tokens: slice) -> tuple[dict[str, Tensor], Tensor]:
        """What `prepare` makes for some consecutive ones of the tokens, and the numbers of the keys that these take part in: `keys_of`
        gives their share of them. Raises ValueError where the rest is not of `FarKeys`."""
        raise ValueError(f"{self} makes no keys of all tokens")

    def keys_of(self, x: Tensor, prepared: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> Tensor:
        """The keys or values `[BH, M, D]` that are sums over those of tokens `[BH, N, D]`. Raises ValueError as `in_part`."""
        raise ValueError(f"{self} makes no keys of all tokens")

    @abstractmethod
    def __call__(self, call: Call) -> Partial:
        """Output `[BH, N, D]` and the natural logarithm of its mass `[BH, N]`, in the units of the exact part's lse."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...

    def check(self, spec: "AttentionSpec") -> None:
        cut = [pattern for pattern in spec.keep if not pattern.whole_blocks]
        whole = ", ".join(name for name, kind in part_types(Pattern).items() if kind.whole_blocks)  # type: ignore[attr-defined]
        require(not (cut and self.whole_blocks), f"a rest of the blocks not kept requires patterns of whole blocks ({whole})", cut)


class Features(Part):
    """A feature map phi of linear attention, whose weight of key j is phi(q)·phi(k_j) >= 0.

    `over_tokens`: each of the keys' features is divided by its sum over the tokens of the rest, in place of the weights by theirs: the
    queries' features may then be negative, and the rest has no softmax mass.
    """

    over_tokens: ClassVar[bool] = False

    @abstractmethod
    def width(self, head_dim: int) -> int:
        """How many features F a token has."""

    @abstractmethod
    def __call__(self, x: Tensor, side: Literal["q", "k"], call: Call) -> Tensor:
        """The features `[BH, N, F]` of all queries or keys x `[BH, N, D]`."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...


class KeyWeight(Part):
    """How much each key and value counts in linear attention, the same for all queries."""

    @abstractmethod
    def __call__(self, phi_q: Tensor, phi_k: Tensor, call: Call) -> Partial:
        """The keys' features `[BH, N, F]` and the values `[BH, N, D]`, weighted."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...


class Readout(Part):
    """What linear attention makes of its weighted mean."""

    @abstractmethod
    def __call__(self, rest: Partial, mean: Partial, call: Call) -> Partial:
        """The rest's changed output and log mass.

        `rest`: its weighted mean of the values `[BH, N, D]` and log mass `[BH, N]`; `mean`: the plain mean of the same values, and the
        logarithm of their number. Where a query's rest has no keys, outputs are 0 and logarithms -inf.
        """

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...


class Merge(Part):
    """How the exact part and the rest become one."""

    @abstractmethod
    def __call__(self, exact: Partial, rest: Partial, call: Call) -> Partial:
        """Output `[BH, N, D]` and lse `[BH, N]` of the image's tokens."""


# Extras


class Extra(Part):
    """What changes the image's output once the exact part and the rest are one: nothing, at the start values. The lse stays."""

    own_tokens = True

    @abstractmethod
    def __call__(self, out: Tensor, call: Call) -> Tensor:
        """The changed output `[BH, N, D]` of the image's tokens."""

    @abstractmethod
    def cost(self, sizes: Sizes) -> Cost: ...


# Order


class Order(Part):
    """The order in which blocks take their tokens. `boxes`: each block is a box in space."""

    boxes: ClassVar[bool]

    @property
    def block(self) -> int | None:
        """Tokens of a block where the order decides them."""
        return None

    @abstractmethod
    def partition(self, grid: Grid, block: int) -> tuple[Tensor, Tensor]:
        """The raster index `[N]` of the token at each place, and the place where each block begins `[T + 1]`, the last of them N."""
