"""What `dit-accel bench kernels --tune` tries: the kernels with a tile, the candidates of each, and the passes in which they run."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from dit_accel.kernels import dispatch
from dit_accel.kernels.precision import int8_products
from dit_accel.kernels.triton.tables import TOGETHER, Machine, Tile, tile_for, tile_of_two
from dit_accel.measure.gpu_compile import DTYPES, METHODS
from dit_accel.operator import composition, lowering
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

GRID, TEXT, HEADS = (1, 128, 128), 512, 24  # FLUX at 2048 pixels: of fewer tokens 5 % are 3 blocks, and the loop over them hides nothing
HEAD_DIMS = (64, 128, 256)
TUNED = DTYPES | {"int8": torch.int8}  # the last: products of queries and keys in 8 bits, of bfloat16 tokens
STEPS = ((4, 3), (4, 2), (8, 3), (8, 2))  # warps and stages
WIDE = ((128, 64), (64, 64), (64, 32), (32, 32))  # rows held and rows of a step, of 16-bit numbers at head dimension 64 and 128
TWO = ((128, 64), (128, 32))  # of two query blocks in a program
NARROW = ((64, 32), (32, 32), (32, 16), (16, 16))  # at 256


@dataclass(frozen=True)
class Kernel:
    """A row of the tile table: the functions that have its tile, methods with all their variants, what a program holds, and whether its
    loops have a pipeline, so that stages are of any use; and whether it is tried with one head: of many the text is put among other
    programs (`launch.Call.joined`)."""

    functions: tuple[str, ...]
    methods: tuple[str, ...]
    holds_keys: bool = False
    pipeline: bool = True
    of_one_head: bool = False


# with what only some of its tiles leave to launches of their own
ROWS = ("attend_rows", "pair_lists", "dense_rows")
KERNELS = {
    "rows": Kernel(ROWS, ("fovea, order 1", "fovea, groups", "gna")),
    "rows_static": Kernel(ROWS, ("clear",)),
    "rows_variance": Kernel(ROWS, ("fovea",)),
    "rows_variance_static": Kernel(ROWS, ("fovea, radius",)),
    "rows_linear": Kernel(ROWS, ("sla", "sla, all")),
    "dense": Kernel(("dense_rows",), ("fovea",), of_one_head=True),
    "merge": Kernel(("deltas",), ("fovea",), pipeline=False),
    "summarise": Kernel(("summarise",), ("fovea", "sla"), True),
    "moments": Kernel(("block_moments",), ("fovea",), True, pipeline=False),
    "gradient_rows": Kernel(("gradient_rows", "gradient_dense_rows"), ("fovea", "clear", "gna", "sla")),
    "gradient_columns": Kernel(("gradient_columns", "gradient_shared_keys"), ("fovea", "clear", "gna", "sla"), True),
    "gradient_dense": Kernel(("gradient_dense_rows",), ("fovea",), of_one_head=True),
    "gradient_shared": Kernel(("gradient_shared_keys",), ("fovea",), True, of_one_head=True),
    "pooled": Kernel(("gradient_pooled",), ("fovea",), True),
    "slopes": Kernel(("tilted_deltas", "gradient_slopes"), ("fovea, order 1",)),
    "linear": Kernel(("linear_gradient",), ("sla", "sla, all")),
    "linear_columns": Kernel(("linear_columns",), ("sla", "sla, all"), True),
    "outer": Kernel(("outer_sums",), ("sla",)),
}


@dataclass(frozen=True)
class Work:
    """One entry to tune: a row of the table, a dtype's name, a head dimension (a power of two)."""

    kernel: str
    dtype: str
    head_dim: int

    @property
    def key(self) -> tuple[str, str, int]:
        """Its place among a machine's tuned tiles."""
        return self.kernel, self.dtype, self.head_dim


def kernels_of(dtype: str) -> list[str]:
    """The kernels that have a tile for a type of TUNED."""
    return [kernel for kernel in KERNELS if dtype != "int8" or kernel.startswith("rows") or kernel == "dense"]


def methods_of(kernel: str, head_dim: int) -> list[str]:
    """The methods that run a kernel at a head dimension."""
    return [m for m in KERNELS[kernel].methods if head_dim <= dispatch.LINEAR_LIMIT or not lowering.has_states(METHODS[m])]


def candidates(work: Work, machine: Machine) -> list[Tile]:
    """The tiles to try, the table's own first; widths past a block of 64 tokens are cut off, and what is then the same tried once."""
    two = tile_of_two(work.kernel, machine.arch, work.head_dim) is not None
    shapes = NARROW if work.head_dim > 128 else (*TWO, *WIDE[1:3]) if two else WIDE
    found = [table_tile(work, machine)]
    for held, streamed in shapes:
        queries, keys = (streamed, held) if KERNELS[work.kernel].holds_keys else (held, streamed)
        for warps, stages in STEPS:
            own = Machine(machine.arch, machine.units, {work.key: Tile(queries, keys, warps, stages)})
            if KERNELS[work.kernel].pipeline or stages == found[0].stages:
                found.append(table_tile(work, own))
    return list(dict.fromkeys(found))


def table_tile(work: Work, machine: Machine) -> Tile:
    """The tiles of a machine for blocks of 64 tokens."""
    return tile_for(work.kernel, machine, work.head_dim, TUNED[work.dtype], 64, 64, pairs=work.kernel in TOGETHER)


def forward_backward(method: str, work: Work, device: torch.device, grid: tuple[int, int, int] = GRID, text: int = TEXT,
                     heads: int = HEADS, *, empty: bool = False) -> None:  # fmt: skip
    """A pass on random values, or on memory as it is (`empty`), where nothing is to be computed; forward alone for products in 8 bits."""
    spec, seed = METHODS[method], torch.Generator(device).manual_seed(0)
    layout = TokenLayout(grid, text)
    heads = 1 if KERNELS[work.kernel].of_one_head else heads
    narrow = work.dtype == "int8"
    size, dtype = (1, heads, layout.tokens, work.head_dim), torch.bfloat16 if narrow else DTYPES[work.dtype]
    if empty:
        made = [torch.empty(size, device=device, dtype=dtype) for _ in range(3)]
    else:
        made = [torch.randn(size, generator=seed, device=device).to(dtype) for _ in range(3)]
    q, k, v = (x.requires_grad_(not narrow) for x in made)
    params = start_values(spec, q).requires_grad_(not narrow)
    with int8_products() if narrow else nullcontext():
        out, _ = composition.attend(q, k, v, spec, layout, make_plan(spec, layout, device), params(), work.head_dim**-0.5, "triton")
    if not narrow:
        out.backward(torch.empty_like(out) if empty else torch.ones_like(out))
