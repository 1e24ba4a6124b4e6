"""The processes that share a sequence, read from diffusers' configuration, and what can't be shared so, with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

BOTH = (
    "a ring degree is not supported together with a ulysses_degree above 1. Use ContextParallelConfig(ulysses_degree=...), or "
    "ContextParallelConfig(ring_degree=...) for a method of static patterns"
)


@dataclass(frozen=True)
class Ranks:
    """`size` ranks of a process group, of which this process is `rank`. `equal`: whether all hold the same number of tokens. `bands`:
    whether each computes its own tokens, as under a ring degree (`halo`); else all tokens of some heads (`exchange`)."""

    group: Any
    size: int
    rank: int
    equal: bool
    bands: bool

    @classmethod
    def of(cls, config: Any) -> "Ranks | None":
        """Of a processor's `_parallel_config`, once diffusers has set it up; None where it is another kind of parallelism."""
        context = context_parallel(config)
        if context is None or (context.ring_degree > 1 and context.ulysses_degree > 1):
            return None
        bands = context.ring_degree > 1
        mesh = context._ring_mesh if bands else context._ulysses_mesh
        if mesh is None:
            return None
        anything = getattr(context, "ring_anything" if bands else "ulysses_anything", False)
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank(), not anything, bands)

    def shares(self, tokens: int) -> tuple[int, ...]:
        """How many tokens of a stream each rank holds: the first ranks one more where they are not equal."""
        return shares(tokens, self.size)

    def shards(self, *streams: int) -> tuple[tuple[int, ...], ...]:
        """The tokens of each stream that each rank holds, `[rank][stream]`."""
        return tuple(zip(*(self.shares(tokens) for tokens in streams), strict=True))

    def total(self, tokens: int, device: torch.device) -> int:
        """The tokens of all ranks, each of which has so many: asked of them where the parts may differ."""
        return sum(self.counts(tokens, device))

    def counts(self, tokens: int, device: torch.device) -> tuple[int, ...]:
        """The tokens of each rank, of which this one has so many: asked of them where the parts may differ."""
        if self.equal:
            return (tokens,) * self.size
        own = torch.tensor([tokens], device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self.group)
        return tuple(int(count) for count in found)

    def agreed(self, decide: Callable[[], T]) -> T:
        """What the first rank decides, for all."""
        answer = [decide() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, dist.get_global_rank(self.group, 0), group=self.group)
        return answer[0]  # type: ignore[return-value]

    def all_of(self, answer: T) -> list[T]:
        """What each rank says, known to all."""
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, answer, group=self.group)
        return answers


def shares(tokens: int, ranks: int) -> tuple[int, ...]:
    """How many of so many tokens each of some ranks holds: the first ranks one more where they are not equal."""
    each, more = divmod(tokens, ranks)
    return tuple(each + (rank < more) for rank in range(ranks))


def context_parallel(config: Any) -> Any:
    """diffusers' ContextParallelConfig, or the one in a ParallelConfig; None where there is none."""
    config = getattr(config, "context_parallel_config", config)
    return config if hasattr(config, "ulysses_degree") else None


def refusal(config: Any, heads: dict[str, int]) -> str | None:
    """Why layers of so many heads, by their names, can't run under a configuration; None where they can."""
    context = context_parallel(config)
    if context is None:
        return None
    if context.ring_degree > 1:
        return BOTH if context.ulysses_degree > 1 else None
    odd = next(((name, count) for name, count in heads.items() if count % context.ulysses_degree), None)
    if odd is None:
        return None
    fitting = [n for n in range(2, min(heads.values()) + 1) if not any(count % n for count in heads.values())]
    choices = f"choose {' or '.join(map(str, fitting))}" if fitting else "no number of processes divides the heads of all layers"
    return f"{odd[0]} has {odd[1]} heads, which ulysses_degree={context.ulysses_degree} does not divide: {choices}"
