"""Tile sizes, warps and pipeline stages, by kernel, architecture and head dimension.

Where the entries come from: those of TIMED are the fastest of the candidates of `dit-accel bench kernels --tune` on a card of that
architecture (an H100, Triton 3.6.0, FLUX's 24 heads of 16,896 tokens). Some of them spill registers, and take a third to a half of the time
of tiles that don't: on Hopper 64 rows and four warps decide, because only they reach the tensor cores' widest instruction.
Any other entry was not timed: it is the first of a short list of candidates, from large tiles, few warps and three stages down to 16 × 16,
that Triton 3.9.0 compiles in bfloat16 and float16 without spilling a register and within the architecture's shared memory, for every method
that the kernel serves (`dit-accel bench kernels --aot` repeats the check); those of sm_90 do so under Triton 3.6.0 and 3.7.1 as well. Large
tiles first, because a tile's arithmetic intensity against the second-level cache is its number of query rows; few warps first, because each
holds a larger part of the products' operands. The kernels of float32 spill up to 64 bytes a thread at head dimensions up to 128
(`benchmarks/gpu-compile.md` has what was compiled). What `dit-accel bench kernels --tune` timed on a user's own GPU goes before the table
(`tuned`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a program can ask for


@dataclass(frozen=True)
class Tile:
    """Query rows and key rows of one step, warps of a program, stages of its loads' pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


Tuned = Mapping[tuple[str, str, int], Tile]  # by kernel, dtype ("bfloat16"; "int8": of products) and padded head dimension


@dataclass(frozen=True)
class Machine:
    """What the launches depend on: one of ARCHITECTURES, the number of multiprocessors (compute units), and tiles timed there."""

    arch: str
    units: int
    tuned: Tuned = field(default_factory=dict, hash=False)


TIMED = (("sm_90", 128),)  # architectures and head dimensions whose tiles for 16-bit numbers were chosen by a card's clock

# (kernel, head dimension in 16-bit numbers): query rows, key rows, warps, stages for each of ARCHITECTURES
_TILES: dict[tuple[str, int], tuple[tuple[int, int, int, int], ...]] = {
    ("rows", 64): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    ("rows", 128): ((32, 32, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
    ("rows", 256): ((32, 16, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 8, 2), (32, 32, 4, 2)),
    ("rows_variance", 64): ((64, 32, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    ("rows_variance", 128): ((32, 32, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
    ("rows_variance", 256): ((32, 16, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (16, 16, 8, 2), (32, 32, 4, 2)),
    ("rows_linear", 64): ((32, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (32, 64, 8, 2), (64, 64, 4, 3)),
    ("rows_linear", 128): ((32, 64, 8, 2), (64, 32, 4, 3), (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 4, 2)),
    ("dense", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("dense", 128): ((64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2), (64, 64, 4, 2)),
    ("dense", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("merge", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("merge", 128): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("merge", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    ("summarise", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3)),
    ("summarise", 128): ((64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 3)),
    ("summarise", 256): ((64, 32, 8, 2),) * 5,  # means alone: the linear rest ends at head dimension 128
    ("moments", 64): ((64, 64, 4, 3),) * 5,
    ("moments", 128): ((64, 64, 8, 2),) * 5,
    ("moments", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2)),
    ("gradient_rows", 64): ((64, 32, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2)),
    ("gradient_rows", 128): ((64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 4, 2)),
    ("gradient_rows", 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 16, 8, 2)),
    ("gradient_columns", 64): ((32, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (32, 64, 8, 2), (32, 64, 4, 2)),
    ("gradient_columns", 128): ((32, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 2)),
    ("gradient_columns", 256): ((32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (32, 32, 8, 2), (16, 16, 4, 2)),
    ("gradient_dense", 64): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("gradient_dense", 128): ((64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    ("gradient_dense", 256): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
    ("gradient_shared", 64): ((64, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 2)),
    ("gradient_shared", 128): ((64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 64, 4, 2)),
    ("gradient_shared", 256): ((32, 64, 8, 2), (32, 32, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)),
    ("pooled", 64): ((64, 32, 8, 2), (32, 64, 4, 2), (64, 64, 4, 3), (64, 32, 8, 2), (64, 64, 4, 2)),
    ("pooled", 128): ((64, 32, 8, 2), (64, 64, 8, 3), (64, 64, 8, 2), (32, 32, 8, 2), (32, 32, 4, 2)),
    ("pooled", 256): ((32, 16, 8, 2), (16, 16, 4, 2), (16, 16, 8, 2), (32, 16, 8, 2), (16, 16, 4, 2)),
    ("slopes", 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("slopes", 128): ((64, 64, 4, 2), (64, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2)),
    ("slopes", 256): ((64, 64, 8, 2),) * 5,
    ("linear", 64): ((64, 32, 8, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2), (64, 64, 4, 3)),
    ("linear", 128): ((32, 16, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 4, 2)),
    ("linear_columns", 64): ((32, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 3), (32, 64, 8, 2), (64, 64, 4, 3)),
    ("linear_columns", 128): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 2), (32, 64, 4, 2)),
    ("outer", 64): ((64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3)),
    ("outer", 128): ((64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 64, 4, 3)),
}
# float32 up to head dimension 128, on every architecture: operands of three products of TF32 parts take four times the registers of 16 bits
_TILES_32: dict[str, tuple[int, int, int, int]] = {
    "rows": (16, 32, 4, 2), "rows_variance": (16, 32, 4, 2), "rows_linear": (16, 32, 8, 2), "dense": (32, 32, 8, 2),
    "merge": (32, 32, 4, 3), "summarise": (32, 32, 8, 2), "moments": (32, 32, 8, 2), "gradient_rows": (16, 32, 8, 2),
    "gradient_columns": (32, 16, 8, 2), "gradient_dense": (16, 64, 8, 2), "gradient_shared": (64, 16, 8, 2),
    "pooled": (16, 16, 8, 2), "slopes": (16, 16, 8, 2), "linear": (16, 32, 8, 2), "linear_columns": (32, 16, 8, 2),
    "outer": (32, 32, 8, 2),
}  # fmt: skip
# where those spill or don't fit: by kernel, head dimension and architecture. On CDNA few warps have twice the registers each
_EXCEPTIONS_32: dict[tuple[str, int, str], tuple[int, int, int, int]] = {
    ("summarise", 128, "sm_80"): (32, 16, 8, 2),
    ("summarise", 128, "sm_120"): (32, 16, 8, 2),
    ("outer", 128, "sm_80"): (16, 32, 8, 2),
    ("outer", 128, "sm_120"): (16, 32, 8, 2),
    ("gradient_shared", 64, "gfx942"): (64, 16, 4, 2),
    ("gradient_rows", 128, "gfx942"): (16, 32, 4, 2),
    ("gradient_columns", 128, "gfx942"): (32, 16, 4, 2),
    ("gradient_dense", 128, "gfx942"): (32, 32, 4, 2),
    ("gradient_shared", 128, "gfx942"): (32, 32, 4, 2),
    ("linear_columns", 128, "gfx942"): (32, 16, 4, 2),
}
# lists that all heads share have tiles of their own, because neighbours among them overlap more: the same until a clock chooses
_SAME = {"rows_static": "rows", "rows_variance_static": "rows_variance"}
KERNELS = tuple(dict.fromkeys(name for kernel, _ in _TILES for name in (kernel, *(x for x, same in _SAME.items() if same == kernel))))
# pooled keys with variances that one step takes at most, at head dimensions from 128 on: their further products take the registers of two
# accumulators, and a third matrix in shared memory would leave room for one program on a multiprocessor instead of two
POOLS = {"rows": 32, "gradient_rows": 16}
_ANY_WIDTH = ("dense", "merge", "gradient_dense", "gradient_shared", "outer")  # their rows are no blocks of the plan
_MASKED = (
    "rows",
    "rows_variance",
    "rows_static",
    "rows_variance_static",
    "gradient_rows",
    "gradient_columns",
)  # a window's masks take registers: half the rows there, and no third stage
# of calls with pooled keys of units, where those spill: what is read for each key of a step takes registers
_LISTED: dict[tuple[str, int, str], tuple[int, int, int, int]] = {
    ("rows", 64, "sm_120"): (64, 32, 8, 2),
    ("rows_variance", 64, "sm_120"): (64, 32, 8, 2),
    ("gradient_rows", 64, "sm_80"): (64, 32, 8, 2),
    ("gradient_rows", 64, "sm_100"): (64, 32, 4, 3),
    ("gradient_rows", 128, "sm_80"): (64, 32, 8, 2),
    ("gradient_columns", 64, "sm_100"): (64, 32, 4, 2),
    ("pooled", 128, "sm_100"): (32, 64, 8, 2),
    ("pooled", 256, "sm_90"): (16, 16, 4, 3),
}
# of products of queries and keys in 8 bits (dtype int8), where those of 16 bits leave room: keys and queries take half the registers and
# half the shared memory. By kernel, head dimension and architecture
_TILES_8: dict[tuple[str, int, str], tuple[int, int, int, int]] = {
    ("rows_static", 64, "sm_120"): (64, 64, 4, 3),
    ("rows_static", 128, "sm_120"): (64, 32, 4, 3),
    ("rows_linear", 64, "sm_120"): (64, 64, 4, 3),
    ("dense", 64, "sm_120"): (64, 32, 4, 3),
    ("dense", 128, "sm_120"): (64, 64, 4, 2),
    ("rows_static", 128, "sm_80"): (64, 32, 4, 3),
    ("rows_variance", 64, "sm_80"): (64, 64, 4, 3),
    ("rows_variance", 128, "sm_80"): (64, 64, 8, 2),
    ("rows_variance_static", 64, "sm_80"): (64, 64, 4, 3),
    ("rows_variance_static", 128, "sm_80"): (64, 64, 8, 2),
    ("rows_linear", 64, "sm_80"): (64, 64, 4, 3),
    ("rows_linear", 128, "sm_80"): (64, 64, 8, 2),
    ("dense", 64, "sm_80"): (64, 64, 4, 2),
    ("rows_linear", 64, "sm_90"): (64, 64, 4, 3),
    ("rows_linear", 128, "sm_90"): (64, 64, 4, 3),
}
_LAST = (16, 16, 8, 2)
# of two query blocks of 64 in one program (`Call.pairs`), for each of ARCHITECTURES where one spills nothing. No launch takes them but
# where `--tune` found them faster
TOGETHER = ("rows", "rows_variance", *_SAME)
_WIDE, _FLAT = (128, 64, 8, 2), (128, 32, 8, 2)
_OF_TWO: dict[tuple[str, int], tuple[tuple[int, int, int, int] | None, ...]] = {
    ("rows", 64): (None, _WIDE, _WIDE, None, None),
    ("rows", 128): (None, _WIDE, _WIDE, None, None),
    ("rows_static", 64): (_FLAT, _WIDE, _WIDE, _FLAT, _FLAT),
    ("rows_static", 128): (None, _WIDE, _WIDE, _FLAT, _FLAT),
    ("rows_variance", 64): (_FLAT, _WIDE, _WIDE, _FLAT, None),
    ("rows_variance", 128): (None, _WIDE, _WIDE, None, None),
    ("rows_variance_static", 64): (_FLAT, _WIDE, _WIDE, _FLAT, None),
    ("rows_variance_static", 128): (None, _WIDE, _WIDE, None, None),
}

# kernels of blocks, of 16-bit numbers, among whose programs those of the text may be (`Call.joined`): as compiled they hold as much of a
# step on a multiprocessor as the kernel that does the text alone, or about. Elsewhere that one has smaller programs, more of which fit
JOINED = {
    ("rows", 128, "sm_90"), ("rows_variance", 128, "sm_90"), ("gradient_rows", 128, "sm_90"), ("gradient_columns", 128, "sm_90"),
    ("gradient_columns", 128, "sm_120"),
}  # fmt: skip


def power(n: int) -> int:
    """The least power of two that is not less."""
    return 1 << (n - 1).bit_length()


def holds_two(tile: Tile, q_width: int) -> bool:
    """Whether a tile of rows is of two query blocks, of which the widest has so many tokens."""
    return tile.queries == 128 and power(q_width) == 64


def tile_for(
    kernel: str, machine: Machine, head_dim: int, dtype: torch.dtype, q_width: int, k_width: int, *, windows: bool = False,
    lists: bool = False, pairs: bool = False,
) -> Tile:  # fmt: skip
    """The kernel's tile on a machine for a (padded) head dimension, blocks at most `q_width` and `k_width` tokens wide.

    `dtype`: that of the tokens, or int8 where queries and keys are multiplied in 8 bits. `windows`, `lists`: whether the call has windows,
    and pooled keys of units. `pairs`: whether a program may hold two query blocks.
    """
    own = _listed(kernel, machine.arch, head_dim, dtype, lists)
    tile = machine.tuned.get((kernel, str(dtype).removeprefix("torch."), head_dim)) or own
    if kernel in TOGETHER and tile.queries == 128 and power(q_width) < 128:  # a tile of two blocks, whose warps are too many for one
        if pairs and holds_two(tile, q_width):
            return replace(tile, keys=min(tile.keys, max(16, power(k_width))))
        tile = own
    queries, keys, warps, stages = tile.queries, tile.keys, tile.warps, tile.stages
    if windows and kernel in _MASKED:
        queries, keys, stages = max(16, queries // 2), max(16, keys // 2), min(stages, 2)
    if kernel not in _ANY_WIDTH:
        queries, keys = (min(x, max(16, 1 << (width - 1).bit_length())) for x, width in ((queries, q_width), (keys, k_width)))
    return Tile(queries, keys, warps, stages)


def _listed(kernel: str, arch: str, head_dim: int, dtype: torch.dtype, lists: bool) -> Tile:
    """The table's tile."""
    if dtype == torch.float32:
        own = _EXCEPTIONS_32.get((kernel, max(64, head_dim), arch), _TILES_32[_SAME.get(kernel, kernel)])
        return Tile(*(own if head_dim <= 128 else _LAST))
    if dtype == torch.int8 and (narrow := _TILES_8.get((kernel, max(64, head_dim), arch))):
        return Tile(*narrow)
    if lists and (place := (_SAME.get(kernel, kernel), max(64, head_dim), arch)) in _LISTED:
        return Tile(*_LISTED[place])
    row = _TILES.get((_SAME.get(kernel, kernel), max(64, head_dim)))
    return Tile(*(_LAST if row is None else row[ARCHITECTURES.index(arch)]))


def joins(kernel: str, arch: str, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the text may be among a kernel's programs."""
    return dtype != torch.float32 and (kernel.removesuffix("_static"), max(64, head_dim), arch) in JOINED


def tile_of_two(kernel: str, arch: str, head_dim: int) -> Tile | None:
    """A tile of two query blocks of 64 for 16-bit numbers that spills nothing on an architecture; None where there is none."""
    row = _OF_TWO.get((kernel, max(64, head_dim)))
    found = None if row is None else row[ARCHITECTURES.index(arch)]
    return None if found is None else Tile(*found)
