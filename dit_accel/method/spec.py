"""What an accelerated attention computes: a frozen `AttentionSpec` of keep, rest, merge, order and extras. The presets are in `presets`.

    out = extras(merge(exact softmax over the kept keys, a cheap estimate of the rest))

A slot's value is a part (`parts`); its type is the choice, its fields are that choice's numbers. Text tokens are never named here: every
query keeps all text keys, and text queries are dense, in every method. The resolution is no part of a spec: it comes with each call.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.method.checks import is_int, items, plain, require
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.parts.base import (
    Extra,
    Fit,
    Merge,
    Order,
    Part,
    Pattern,
    Rest,
    Selection,
    Static,
    Tokenwise,
    check_part,
    part_from_dict,
    part_types,
)
from dit_accel.method.parts.orders import Tiles

P = TypeVar("P", bound=Part)


@dataclass(frozen=True)
class AttentionSpec:
    """A method: keep × rest × merge × order × extras. Use a preset (`Fovea`, `CLEAR`, `SLA`, `GNA`) or fill the slots.

    Args:
        keep: patterns, of which each key that one of them keeps is attended to exactly; one at most chooses by each call (`TopK`, ...).
        rest: what estimates the other keys; None drops them.
        merge: how the exact part and the rest become one; given with `rest`, else None.
        order: how tokens are cut into blocks.
        block: (query, key) tokens per block, each a power of two from 16 to 128; in tile order both are the tile's number of tokens.
        extras: change the image's output one after the other.

    Frozen and hashable. Raises ValueError where parts don't go together.
    """

    keep: tuple[Pattern, ...]
    rest: Rest | None = None
    merge: Merge | None = None
    order: Order = Tiles()
    block: tuple[int, int] = (64, 64)
    extras: tuple[Extra, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", items("keep", self.keep))
        object.__setattr__(self, "block", plain(items("block", self.block)))
        object.__setattr__(self, "extras", items("extras", self.extras))
        patterns = len(self.keep) > 0 and all(isinstance(pattern, Pattern) for pattern in self.keep)
        require(patterns, f"keep must contain one or more of {list(part_types(Pattern))}", self.keep)
        for pattern in self.keep:
            check_part(pattern, Pattern, "each of keep")
        require(sum(isinstance(p, Selection) for p in self.keep) <= 1, "keep must contain one selection at most", self.keep)
        for name, slot, value in (("rest", Rest, self.rest), ("merge", Merge, self.merge)):
            if value is not None:
                check_part(value, slot, name)
        for extra in self.extras:
            check_part(extra, Extra, "each of extras")
        check_part(self.order, Order, "order")
        require((self.rest is None) == (self.merge is None), "rest and merge must both be given or both be None", (self.rest, self.merge))
        legal = len(self.block) == 2 and all(is_int(b) and 16 <= b <= 128 and b & (b - 1) == 0 for b in self.block)
        require(legal, "block must be two powers of two from 16 to 128", self.block)
        if (tokens := self.order.block) is not None:
            require(self.block == (tokens, tokens), f"block must be {(tokens, tokens)} in the order {self.order}", self.block)
        for part in self.parts():
            part.check(self)
        self.start_values(heads=1, head_dim=16)  # refuses two parts that share a name

    def parts(self) -> Iterator[Part]:
        """All parts, those that are fields of others among them."""
        for part in (*self.keep, self.rest, self.merge, self.order, *self.extras):
            if part is not None:
                yield from part.nested()

    def find(self, kind: type[P]) -> P | None:
        """The first part of a type or a slot, None where there is none."""
        return next((part for part in self.parts() if isinstance(part, kind)), None)

    @property
    def selection(self) -> Selection | None:
        """The pattern that chooses blocks call by call."""
        return next((pattern for pattern in self.keep if isinstance(pattern, Selection)), None)

    @property
    def static(self) -> tuple[Static, ...]:
        """The patterns that depend on the tokens' places alone."""
        return tuple(pattern for pattern in self.keep if isinstance(pattern, Static))

    @property
    def tokenwise(self) -> tuple[Tokenwise, ...]:
        """The patterns that decide token by token."""
        return tuple(pattern for pattern in self.keep if isinstance(pattern, Tokenwise))

    @property
    def density(self) -> float | None:
        """The share of key blocks asked for, where the spec names one, and not a number of them."""
        return None if self.selection is None or self.selection.more else self.selection.share

    def start_values(self, *, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The learned tensors by name, float32, as training starts from them. Raises ArgumentError where two parts use one name."""
        found: dict[str, Tensor] = {}
        for part in self.parts():
            own = part.parameters(heads, head_dim)
            if both := sorted(found.keys() & own.keys()):
                rule = f"{part} and another part of the spec both name a learned tensor {both[0]!r}"
                raise ArgumentError(f"{rule}: use one of them, or rename it in a part of your own")
            found |= own
        return found

    def make_parameters(self, *, heads: int, head_dim: int) -> AttentionParameters:
        """The learned part at its start values, float32; a module without parameters where the method has none."""
        return AttentionParameters(self.start_values(heads=heads, head_dim=head_dim))

    def fit(self, *, heads: int, head_dim: int) -> dict[str, Fit | None]:
        """How the first stage of a distillation finds each learned tensor, by the tensor's name: as its part says, see `Part.fit`."""
        return {name: part.fit for part in self.parts() for name in part.parameters(heads, head_dim)}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready form: every part as its fields plus `type`; no extras where there are none, as in files that know none."""
        extras = {"extras": [extra.to_dict() for extra in self.extras]} if self.extras else {}
        return extras | {
            "keep": [pattern.to_dict() for pattern in self.keep],
            "rest": self.rest.to_dict() if self.rest else None,
            "merge": self.merge.to_dict() if self.merge else None,
            "order": self.order.to_dict(),
            "block": list(self.block),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AttentionSpec":
        """The inverse of `to_dict`. Raises ValueError at unknown or missing keys and types."""
        names = {"keep", "rest", "merge", "order", "block"}
        legal = isinstance(data, dict) and set(data) - {"extras"} == names
        require(legal, f"a spec must have exactly the keys {sorted(names)}, and extras where it has some", data)
        return cls(
            keep=tuple(part_from_dict(p) for p in items("keep", data["keep"])),
            rest=None if data["rest"] is None else part_from_dict(data["rest"]),
            merge=None if data["merge"] is None else part_from_dict(data["merge"]),
            order=part_from_dict(data["order"]),
            block=data["block"],
            extras=tuple(part_from_dict(extra) for extra in items("extras", data.get("extras", ()))),
        )

    def __str__(self) -> str:
        return " + ".join(str(part) for part in (*self.keep, self.rest, self.merge, self.order, *self.extras) if part is not None)
