"""The processes that share a sequence, read from diffusers' configuration, and what can't be shared so, with the reason."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

RING = (
    "a ring degree is not supported: a ring passes keys on part by part, and a method that chooses among all keys requires all of them at "
    "once. Use ContextParallelConfig(ulysses_degree=...) alone"
)


@dataclass(frozen=True)
class Ulysses:
    """`size` ranks of a process group, of which this process is `rank`. `equal`: whether all hold the same number of tokens."""

    group: Any
    size: int
    rank: int
    equal: bool

    @classmethod
    def of(cls, config: Any) -> "Ulysses | None":
        """Of a processor's `_parallel_config`, once diffusers has set it up; None where it is another kind of parallelism."""
        context = context_parallel(config)
        if context is None or context.ring_degree > 1 or context._ulysses_mesh is None:
            return None
        mesh = context._ulysses_mesh
        return cls(mesh.get_group(), mesh.size(), mesh.get_local_rank(), not getattr(context, "ulysses_anything", False))

    def shares(self, tokens: int) -> tuple[int, ...]:
        """How many tokens of a stream each rank holds: the first ranks one more where they are not equal."""
        each, more = divmod(tokens, self.size)
        return tuple(each + (rank < more) for rank in range(self.size))

    def shards(self, *streams: int) -> tuple[tuple[int, ...], ...]:
        """The tokens of each stream that each rank holds, `[rank][stream]`."""
        return tuple(zip(*(self.shares(tokens) for tokens in streams), strict=True))

    def total(self, tokens: int, device: torch.device) -> int:
        """The tokens of all ranks, each of which has so many: asked of them where the parts may differ."""
        if self.equal:
            return self.size * tokens
        count = torch.tensor(tokens, device=device)
        dist.all_reduce(count, group=self.group)
        return int(count)

    def agreed(self, decide: Callable[[], T]) -> T:
        """What the first rank decides, for all."""
        answer = [decide() if self.rank == 0 else None]
        dist.broadcast_object_list(answer, dist.get_global_rank(self.group, 0), group=self.group)
        return answer[0]  # type: ignore[return-value]


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
        return RING
    odd = next(((name, count) for name, count in heads.items() if count % context.ulysses_degree), None)
    if odd is None:
        return None
    fitting = [n for n in range(2, min(heads.values()) + 1) if not any(count % n for count in heads.values())]
    choices = f"choose {' or '.join(map(str, fitting))}" if fitting else "no number of processes divides the heads of all layers"
    return f"{odd[0]} has {odd[1]} heads, which ulysses_degree={context.ulysses_degree} does not divide: {choices}"
