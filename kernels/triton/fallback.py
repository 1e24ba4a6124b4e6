"""A tile that a GPU can't hold gives way to a smaller one: only loading the kernel there shows it, as registers and shared memory differ
from one card, version of Triton and variant of a method to the next."""

from dataclasses import dataclass, replace
from typing import Any

import torch

from dit_accel.errors import BackendError
from dit_accel.kernels.triton.tables import Machine, Tile, holds_two, tile_for

Key = tuple[str, str, int]  # a machine's tuned tiles are kept under it: kernel, dtype, padded head dimension
WIDE = 1 << 20  # blocks so wide that they cut no tile


@dataclass(frozen=True)
class Place:
    """What a kernel's tile is looked up by, in addition to the machine: the arguments of `tables.tile_for`."""

    kernel: str
    head_dim: int
    dtype: torch.dtype
    q_width: int
    k_width: int
    windows: bool = False
    lists: bool = False
    pairs: bool = False

    @property
    def key(self) -> Key:
        return self.kernel, str(self.dtype).removeprefix("torch."), self.head_dim

    def tile(self, machine: Machine) -> Tile:
        """The tile that a launch takes."""
        return tile_for(
            self.kernel, machine, self.head_dim, self.dtype, self.q_width, self.k_width, windows=self.windows, lists=self.lists,
            pairs=self.pairs,
        )  # fmt: skip

    def uncut(self, machine: Machine) -> Tile:
        """The machine's own, before blocks and windows cut it."""
        return tile_for(self.kernel, machine, self.head_dim, self.dtype, WIDE, WIDE)


class TooLargeError(Exception):
    """A launch's tile needs more of a multiprocessor than there is; raised in place of Triton's OutOfResources, which names no tile."""

    def __init__(self, place: Place, error: Any) -> None:
        self.place, self.resource, self.required, self.limit = place, str(error.name), error.required, error.limit
        super().__init__(f"the GPU kernel {place.kernel!r} needs {error.required} of {error.name}, of which there are {error.limit}")


def lowered(machine: Machine, refused: TooLargeError) -> Machine:
    """The machine with the next smaller tile in place of one that was refused: the table's, where a tuned one was, or a part of it.

    Raises BackendError where there is none.
    """
    place = refused.place
    failed, own = place.tile(machine), place.uncut(machine)
    if place.key in machine.tuned:
        table = replace(machine, tuned={key: tile for key, tile in machine.tuned.items() if key != place.key})
        if holds_two(failed, place.q_width):
            return table
        if place.tile(table) == failed:  # the tuned one is of two blocks, which this call can't have, or cut to the same
            own = place.uncut(table)
        elif _size(place.uncut(table)) < _size(own):
            return table
    tile = own
    while (step := _smaller(tile, refused.resource)) is not None:
        tile = step
        smaller = replace(machine, tuned={**machine.tuned, place.key: tile})
        if place.tile(smaller) != failed:  # narrow blocks may have cut off as much before
            return smaller
    raise BackendError(f"{refused}, even with its smallest tile: use backend='reference' for this head dimension and dtype")


def _size(tile: Tile) -> int:
    """What shared memory and registers grow with."""
    return (tile.queries + tile.keys) * tile.stages


def _smaller(tile: Tile, resource: str) -> Tile | None:
    """One step down: fewer stages, then half of the longer side, down to 16 by 16 with one stage; of threads, half as many warps."""
    if resource == "threads":
        return replace(tile, warps=tile.warps // 2) if tile.warps > 1 else None
    if tile.stages > 2:
        return replace(tile, stages=tile.stages - 1)
    if max(tile.queries, tile.keys) > 16:
        return replace(tile, keys=tile.keys // 2) if tile.keys >= tile.queries else replace(tile, queries=tile.queries // 2)
    return replace(tile, stages=1) if tile.stages > 1 else None
