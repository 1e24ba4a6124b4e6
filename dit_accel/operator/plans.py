"""Who keeps plans: each model the ones that it uses, within so many bytes; without a holder a plan is gone."""

import dataclasses
import threading
from collections.abc import Callable, Hashable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.memory import Readers
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, make_plan, plan_key
from dit_accel.operator.layout import TokenLayout

LIMIT = 256 * 2**20  # bytes; a plan has about 10 MB at 65,536 tokens


class Kept(NamedTuple):
    """A plan, or another dataclass of tensors, its bytes, and the streams that read it."""

    value: Any
    bytes: int
    readers: Readers


class Plans:
    """The plans that a model uses, on all of its devices. The least recently used are dropped beyond `limit` bytes, the newest never.

    The text's length is no part of a plan, so that prompts of any length share one. Copies and pickles begin empty.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: dict[Hashable, Kept] = {}  # the most recently used last
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Plans, (self.limit,)

    def get(self, spec: AttentionSpec, layout: TokenLayout, device: torch.device) -> Plan:
        """`make_plan`, kept from then on."""
        plan: Plan = self.kept(plan_key(spec, layout, device), lambda: make_plan(spec, layout, device))
        return plan

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What is kept under a key, for the current stream: a plan, or another dataclass of tensors that is made of one; made where there
        is none."""
        with self._lock:
            kept = self._kept.pop(key, None)
            new = kept is None
            if kept is None:
                value = make()
                kept = Kept(value, plan_bytes(value), Readers(tensors_of(value)))
            self._kept[key] = kept
            if new:
                self._trim()
        kept.readers.join()
        return kept.value

    def _trim(self) -> None:
        """Drop the least recently used plans beyond the limit."""
        excess = sum(kept.bytes for kept in self._kept.values()) - self.limit
        for old in list(self._kept)[:-1]:
            if excess <= 0:
                break
            excess -= self._kept.pop(old).bytes

    def clear(self) -> None:
        """Drop all plans."""
        with self._lock:
            self._kept.clear()


def plan_bytes(value: Any) -> int:
    """Bytes of a plan's tensors."""
    return sum(x.nbytes for x in tensors_of(value))


def tensors_of(value: Any) -> list[Tensor]:
    """A plan's tensors, those of the dataclasses, dictionaries and tuples in it among them."""
    if isinstance(value, Tensor):
        return [value]
    inner: Iterable[Any] = ()
    if isinstance(value, dict):
        inner = value.values()
    elif isinstance(value, tuple):
        inner = value
    elif dataclasses.is_dataclass(value):
        inner = (getattr(value, field.name) for field in dataclasses.fields(value))
    return [x for one in inner for x in tensors_of(one)]


RECENT = Plans(limit=64 * 2**20)  # of those who call `attention` by itself, without a model
