"""Tile sizes, warps and pipeline stages, by kernel, architecture and head dimension."""

from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
SHARED_LIMIT = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "sm_120": 101376, "gfx942": 65536}  # bytes a program can ask for


@dataclass(frozen=True)
class Tile:
    """Query rows and key rows of one step, warps of a program, stages of its loads' pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Machine:
    """What the launches depend on: one of ARCHITECTURES and the number of multiprocessors (compute units)."""

    arch: str
    units: int


def tile_for(kernel: str, arch: str, head_dim: int, itemsize: int, q_width: int, k_width: int) -> Tile:
    """The kernel's tile on an architecture for a (padded) head dimension, blocks at most `q_width` and `k_width` tokens wide."""
    widths = [max(16, 1 << (width - 1).bit_length()) for width in (q_width, k_width)]
    wide = head_dim * itemsize
    queries, keys, warps, stages = 64, 64, 4, 2
    if kernel in ("dense", "gradient_dense", "gradient_shared", "merge", "outer"):
        widths = [64, 64]
    if wide > 256:
        queries, keys = 64, 32
        warps = 8
    return Tile(min(queries, widths[0]), min(keys, widths[1]), warps, stages)
