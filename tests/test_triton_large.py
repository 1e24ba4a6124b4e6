"""Products in the Triton kernels that pass 2³¹, at a million tokens and with thousands of heads: the interpreter, which looks at every
32-bit product, runs the last programs of each launch on memory that nothing else touches."""

import dataclasses
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch
from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.precision import int8_products
from dit_accel.kernels.triton import calls, launch, launch_backward
from dit_accel.kernels.triton.launch import Launch, Run
from dit_accel.kernels.triton.tables import TOGETHER, Machine, tile_of_two
from dit_accel.measure.gpu_compile import METHODS
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator import composition
from dit_accel.operator.attention import attention, start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not dispatch.INTERPRETED, reason="runs some programs of a launch, which only the interpreter can"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # memory that nothing was written to is divided by
]

UNITS = 4096  # multiprocessors: what is cut into parts to fill them is short


class Last:
    """Runs the first and the last program of the last head of each launch; `ran` has the kernels' names."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.ran: set[str] = set()
        builder, self.grid, self.place = interpreter.interpreter_builder, (1, 1, 1), (0, 0, 0)
        # where the interpreter looks at products
        monkeypatch.setattr(builder, "options", dataclasses.replace(builder.options, debug=True, sanitize_overflow=True))
        dim, index = builder.set_grid_dim, builder.set_grid_idx
        monkeypatch.setattr(builder, "set_grid_dim", lambda *_: dim(*self.grid))
        monkeypatch.setattr(builder, "set_grid_idx", lambda *_: index(*self.place))
        # tensors as they are, not copied before and after
        monkeypatch.setattr(interpreter.GridExecutor, "_init_args_hst", lambda _, given, named: (given, named))
        monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)

    def __call__(self, one: Launch) -> None:
        self.grid = (*one.grid, 1, 1)[:3]  # type: ignore[assignment]
        x, *others = (n - 1 for n in self.grid)
        for first in sorted({0, x}):
            self.place = (first, *others)  # type: ignore[assignment]
            launch.execute(one._replace(grid=(1, 1, 1)))
        self.ran.add(one.kernel.__name__)


@pytest.fixture
def last(monkeypatch: pytest.MonkeyPatch) -> Last:
    return Last(monkeypatch)


def untouched(heads: int, tokens: int, channels: int, *, by_token: bool) -> Tensor:
    """A tensor `[1, H, N, D]` in float16, the heads of a token next to each other (`by_token`) or the tokens of a head. Its memory is none
    before it is written to."""
    if by_token:
        return torch.empty(1, tokens, heads, channels, dtype=torch.float16).transpose(1, 2)
    return torch.empty(1, heads, tokens, channels, dtype=torch.float16)


def run(
    spec: AttentionSpec,
    layout: TokenLayout,
    heads: int,
    channels: int,
    last: Run,
    *,
    backward: bool,
    by_token: bool,
    together: bool = False,
    narrow: bool = False,
) -> None:
    q, k, v, pull = (untouched(heads, layout.tokens, channels, by_token=by_token) for _ in range(4))
    params, plan = start_values(spec, q[:, :, :1]), make_plan(spec, layout, q.device)
    params.requires_grad_(backward)
    for x in (q, k, v):
        x.requires_grad_(backward)
    two = {(kernel, "float16", channels): tile_of_two(kernel, "sm_90", channels) for kernel in TOGETHER} if together else {}
    machine, products = Machine("sm_90", UNITS, two), int8_products() if narrow else nullcontext()  # type: ignore[arg-type]
    with torch.autograd.set_multithreading_enabled(False), calls.redirected(machine, last, runs=False), products:
        out, _ = composition.attend(q, k, v, spec, layout, plan, params(), 0.1, "triton")
        if backward:
            out.backward(pull)


HEADS = {"fovea, groups": 9000}  # slopes of all heads pass 2³¹ as well


@pytest.mark.parametrize("name", ["fovea", "fovea, radius", "fovea, groups", "clear", "gna", "sla", "sla, all"])
def test_no_product_passes_32_bits_with_thousands_of_heads(name: str, last: Last) -> None:
    run(METHODS[name], TokenLayout((1, 32, 32), 64), HEADS.get(name, 31000), 64, last, backward=True, by_token=False)
    deltas = "summarise" if name.startswith("sla") else "deltas"
    assert {"attend_rows", "gradient_rows", "gradient_columns", deltas} <= last.ran


@pytest.mark.parametrize("name", ["fovea", "fovea, radius", "clear"])
@pytest.mark.parametrize("way", ["together", "narrow"])
def test_nor_of_two_query_blocks_in_a_program_nor_with_products_in_8_bits(name: str, way: str, last: Last) -> None:
    settings = {"backward": False, "by_token": False, way: True}
    run(METHODS[name], TokenLayout((1, 32, 32), 64), 31000, 64, last, **settings)
    assert {"attend_rows", {"together": "pair_lists", "narrow": "round_to_int8"}[way]} <= last.ran


@pytest.mark.parametrize("spec", [Fovea(0.001), Fovea(radius=8), CLEAR(8), SLA(0.001)], ids=["fovea", "radius", "clear", "sla"])
def test_no_product_passes_32_bits_at_a_million_tokens(spec: AttentionSpec, last: Last) -> None:
    run(spec, TokenLayout((1, 1024, 1024), 512), 24, 128, last, backward=False, by_token=True)
    assert "attend_rows" in last.ran


@triton.jit(do_not_specialize=["rows"])
def narrow(x: Any, rows: Any) -> None:
    tl.load(x + tl.program_id(1) * rows)


def test_a_product_that_passes_them_would_be_seen(last: Last) -> None:
    """What the tests above would do at a head's number that was not made 64 bits wide."""
    with pytest.raises(Exception, match="int32 overflow"):
        last(Launch(narrow, (1, 31000), {"x": untouched(1, 1, 1, by_token=True), "rows": 70000}, 1))


def test_more_heads_than_a_grid_has_programs_are_refused() -> None:
    q = torch.empty(4096, 16, 20, 8)
    with pytest.raises(BackendError, match="at most 65,534 heads of all samples together, not 4,096 times 16: cut the batch"):
        attention(q, q, q, CLEAR(2), TokenLayout((1, 4, 5), 0), backend="triton")


@pytest.mark.parametrize("name", ["sla", "sla, all"])
def test_as_many_heads_as_are_taken_have_programs(name: str) -> None:
    """Of a projection too, which some launches take as one head more."""
    found: list[Launch] = []
    settings: dict[str, Any] = {"backward": True, "by_token": False}
    run(METHODS[name], TokenLayout((1, 16, 16), 0), calls.MOST_HEADS, 8, found.append, **settings)
    assert {"attend_rows", "gradient_rows"} <= {one.kernel.__name__ for one in found}
    assert max(max(one.grid[1:]) for one in found) == 65535


def test_more_pairs_of_blocks_than_32_bits_count_are_refused() -> None:
    """A million tokens, all of them kept in blocks of 16."""
    n, starts = 2**16, torch.arange(2**16 + 1, dtype=torch.int32, device="meta") * 16
    q = torch.empty(1, 1, 16 * n, 8, device="meta")
    lists, counts = (torch.empty(n, *size, dtype=torch.int32, device="meta") for size in ((n,), ()))
    coords = torch.empty(3, 16 * n + 16, dtype=torch.int32, device="meta")
    a = Arguments(q, q, q, lists, counts, counts, starts, starts, coords, 16, 16, text=0, text_first=True, scale=1.0)
    lse = torch.empty(1, 1, 16 * n, device="meta")
    with pytest.raises(ValueError, match=r"less than 2³¹ pairs .* not 4,294,967,296: keep fewer key blocks"):
        launch_backward.gradients(q, None, q, lse, a, Machine("sm_90", 132), lambda one: None)
