"""Two query blocks in one program: the union of their lists, and that results are those of one block in a program."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import CPU, DEVICE, attention_by, moved
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dit_accel.kernels.triton import block_pairs, calls, fallback, launch
from dit_accel.kernels.triton.fallback import Place, TooLargeError
from dit_accel.kernels.triton.launch import Launch
from dit_accel.kernels.triton.tables import TOGETHER, Machine, Tile
from dit_accel.kernels.triton.tuples import Paired, constants_of
from dit_accel.method import AttentionSpec, Mass, Pooled, Tiles, TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])
SPECS = {
    "fovea": Fovea(0.3),
    "fovea-radius": Fovea(radius=3),
    "clear": CLEAR(5),
    "clear-downsample": CLEAR(4, downsample=2),
    "fovea-frames": Fovea(0.3, tile=(2, 4, 8), first_frames=1),
    "top-k": AttentionSpec((TopK(0.4),)),
    "pooled-plain": AttentionSpec((TopK(0.3),), Pooled(log_count=False, variance=False), Mass(offset=False)),
}


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Launch]]:
    """Launches, with a tile of two query blocks wherever a program may hold them."""
    ran: list[Launch] = []
    execute = launch.execute

    def run(one: Launch) -> Any:
        ran.append(one)
        return execute(one)

    tuned = {
        (kernel, dtype, 1 << n): Tile(128, 32, 4, 2)
        for kernel in TOGETHER for dtype in ("float32", "float16", "bfloat16") for n in range(4, 9)
    }  # fmt: skip
    machine = Machine("sm_90", 4) if DEVICE.type == "cpu" else calls.machine_of(DEVICE)
    with calls.redirected(Machine(machine.arch, machine.units, tuned), run):
        yield ran


def together(ran: list[Launch]) -> list[int]:
    return [one.constants["TOGETHER"] for one in ran if one.kernel.__name__ == "attend_rows"]


def assert_equals_oracle(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, text_bias: Tensor | None = None) -> None:
    qkv, params = shape.inputs(dtype), random_parameters(spec, shape)
    exact, eager = (oracle(*qkv, spec, shape.layout, params, text_bias=text_bias, dtype=d) for d in (torch.float64, dtype))
    with torch.no_grad():
        got = attention_by("triton", spec, shape.layout, text_bias=text_bias)(qkv, params)
    for found, true, low, name in zip(got, exact, eager, ("output", "lse"), strict=True):
        assert_close_as_eager(found, true.detach(), low.detach(), name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_method(spec: AttentionSpec, dtype: torch.dtype, rows: list[Launch]) -> None:
    """Short blocks, an odd number of them."""
    grid = (2, 5, 12) if spec.order == Tiles((2, 4, 8)) else (1, 9, 20)
    assert_equals_oracle(spec, Shape(1, 1, 24, grid, 5), dtype)
    assert together(rows) == [2]


@pytest.mark.parametrize(
    "shape",
    [Shape(2, 1, 64, (1, 9, 20)), Shape(1, 1, 72, (1, 17, 16), 33, False), Shape(1, 1, 128, (1, 8, 16), 1)],
    ids=lambda shape: f"{shape.batch}x{shape.head_dim}",
)  # fmt: skip
@pytest.mark.parametrize("name", ["fovea", "fovea-radius", "clear"])
def test_odd_shapes(name: str, shape: Shape, rows: list[Launch]) -> None:
    assert_equals_oracle(SPECS[name], shape, torch.float32)
    assert together(rows) == [2]


@pytest.mark.parametrize("spec", [CLEAR(2, tile=(4, 4)), GNA((1, 5), tile=(4, 4)), Fovea(0.3, tile=(4, 4))], ids=["clear", "gna", "fovea"])
def test_narrow_blocks_are_one_in_a_program(spec: AttentionSpec, rows: list[Launch]) -> None:
    """A tile has 16 rows at least, which is no sign of two blocks of 8."""
    assert_equals_oracle(spec, Shape(1, 1, 24, (1, 2, 15), 5), torch.float32)
    assert together(rows) == [1]


def test_padded_text(rows: list[Launch]) -> None:
    shape = Shape(2, 1, 24, (1, 9, 20), 7)
    assert_equals_oracle(SPECS["fovea"], shape, torch.float16, shape.text_bias())
    assert together(rows) == [2]


def union_of_two(lists: Tensor, counts: Tensor, full: Tensor, masks: Tensor) -> list[dict[int, tuple[int, int, int]]]:
    """Of each two rows of lists `[Tq, n]`: by key block its code, and its masks in the first and the second, where it is kept in part."""
    found = []
    for row in range(0, len(lists), 2):
        union: dict[int, list[int]] = {}
        for half in range(min(2, len(lists) - row)):
            for n in range(int(counts[row + half])):
                whole = n < full[row + half]
                entry = union.setdefault(int(lists[row + half, n]), [0, 0, 0])
                entry[0] += (2 if whole else 1) * 4**half
                entry[1 + half] = 0 if whole else int(masks[row + half, n])
        found.append({block: tuple(entry) for block, entry in union.items()})
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("rows_of_lists", "width"), [(5, 7), (6, 40)])
def test_the_list_of_two_blocks_is_the_union_of_theirs(rows_of_lists: int, width: int) -> None:
    seed = torch.Generator().manual_seed(width)
    lists, counts, full = (torch.full((2, rows_of_lists, *more), -5, dtype=torch.int32) for more in ((width,), (), ()))
    masks = torch.randint(1, 99, lists.shape, generator=seed, dtype=torch.int32)
    for row in lists.flatten(0, 1):
        row[:] = torch.randperm(50, generator=seed)[:width]
    counts.copy_(torch.randint(0, width + 1, counts.shape, generator=seed))
    full.copy_((torch.rand(full.shape, generator=seed) * (counts + 1)).int())
    pairs = -(-rows_of_lists // 2)
    sizes = ((pairs, 2 * width), (pairs,), (pairs,), (pairs, 2 * width), (pairs, 2 * width, 2))
    found = Paired(*(torch.full((2, *size), -7, dtype=torch.int32, device=DEVICE) for size in sizes))
    constants = {"W": max(16, 1 << (width - 1).bit_length()), "N": 16, "PARTIAL": True}
    given: dict[str, Any] = dict(zip(("lists", "counts", "full", "mask_of"), moved([lists, counts, full, masks]), strict=True))
    given |= {"found": found, "q_blocks": rows_of_lists, "width": width, "C": constants_of(block_pairs.pair_lists, constants)}
    launch.execute(Launch(block_pairs.pair_lists, (pairs, 2), given, 1))
    blocks, counted, whole, codes, mask_of = moved(list(found), CPU)
    for head in range(2):
        for pair, union in enumerate(union_of_two(lists[head], counts[head], full[head], masks[head])):
            n = int(counted[head, pair])
            entries = zip(*(x[head, pair, :n].tolist() for x in (blocks, codes, mask_of)), strict=True)
            got = {block: (code, *(m if code >> 2 * half & 3 == 1 else 0 for half, m in enumerate(two))) for block, code, two in entries}
            assert n == len(union)
            assert got == union
            shared = [code == 10 for code in codes[head, pair, :n].tolist()]
            assert shared == [place < whole[head, pair] for place in range(n)]
            assert (blocks[head, pair, n:] == -7).all()


def test_nothing_is_read_of_memory_that_was_not_written(rows: list[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """Results are the same to the bit over NaN and places that there are not."""
    spec, shape = SPECS["clear-downsample"], Shape(1, 1, 24, (1, 9, 20), 5)
    made = Tensor.new_empty

    def poisoned(*given: Any, **named: Any) -> Tensor:
        x = made(*given, **named)
        return x.fill_(torch.nan if x.is_floating_point() else 1 << 30)

    def found() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return attention_by("triton", spec, shape.layout)(shape.inputs(torch.float16), random_parameters(spec, shape))

    plain = found()
    monkeypatch.setattr(Tensor, "new_empty", poisoned)
    assert all(map(torch.equal, found(), plain))
    assert together(rows) == [2, 2]


def test_groups_of_tiles(rows: list[Launch]) -> None:
    """Two blocks are of one span, which has one list of units and one slope: equal to one block in a program."""
    spec, shape = Fovea(0.3, order=1), Shape(1, 1, 24, (1, 9, 20), 5)
    params = random_parameters(spec, shape)
    own = attention_by("triton", spec, shape.layout)
    with torch.no_grad():
        both = own(shape.inputs(), params)
        assert together(rows) == [2]
        with calls.redirected(Machine("sm_90", 4), launch.execute):
            alone = own(shape.inputs(), params)
    torch.testing.assert_close(both, alone)


@pytest.mark.parametrize("name", ["fovea", "clear"])
def test_gradients(name: str, rows: list[Launch]) -> None:
    """The backward pass, of one block in a program, reads the lse that two made."""
    spec, shape = SPECS[name], Shape(2, 1, 24, (1, 9, 20), 5)
    exact, eager = (
        flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, shape.layout, p, dtype=d), spec, shape, d))
        for d in (torch.float64, torch.float16)
    )
    own = attention_by("triton", spec, shape.layout)
    with torch.autograd.set_multithreading_enabled(False):
        got = flat(gradients(lambda qkv, p: own(qkv, p.float()), spec, shape, torch.float16))
    assert_close_as_eager(got, exact, eager, "gradients")
    assert together(rows) == [2]


def test_calls_whose_blocks_share_nothing_have_one_in_a_program(rows: list[Launch]) -> None:
    """A window's bounds and slopes are a block's own, and a block of 16 tokens is no half of a tile."""
    shape = Shape(1, 1, 16, (1, 8, 16))
    for spec in (GNA(5), Fovea(0.5, order=1, parts=2), Fovea(0.5, tile=(4, 4)), SLA(0.5)):
        with torch.no_grad():
            attention_by("triton", spec, shape.layout)(shape.inputs(), random_parameters(spec, shape))
    assert together(rows) == [1, 1, 1, 1]
    assert all(one.constants["BQ"] <= 64 for one in rows if one.kernel.__name__ == "attend_rows")


def test_a_tile_of_two_blocks_that_does_not_fit_gives_way_to_the_tables() -> None:
    place = Place("rows_static", 128, torch.bfloat16, 64, 64, pairs=True)
    machine = Machine("sm_90", 132, {place.key: Tile(128, 64, 8, 2)})
    assert place.tile(machine) == Tile(128, 64, 8, 2)
    assert replace(place, pairs=False).tile(machine) == place.tile(Machine("sm_90", 132))
    refused = TooLargeError(place, OutOfResources(300_000, 232_448, "shared memory"))
    assert place.tile(fallback.lowered(machine, refused)) == place.tile(Machine("sm_90", 132))
