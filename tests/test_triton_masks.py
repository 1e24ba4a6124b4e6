"""The Triton kernels by bit masks and windows, with other queries than keys, against dense attention in float64."""

import pytest
import torch
from helpers import assert_close_as_eager
from on_device import CPU, eager, moved
from test_cpu_masks import Case, Windows, results
from torch import Tensor

from dit_accel.kernels import ops

pytestmark = pytest.mark.gpu


def run(case: Case, dtype: torch.dtype, inputs: list[Tensor] | None = None) -> list[dict[str, Tensor]]:
    """The results of the kernels, and of the oracle in float64 and in the kernels' dtype."""

    def own(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        return moved(ops.attention(moved(case.arguments(*qkv)), "triton"), CPU)

    formula = eager()(case.oracle)
    return [results(case, function, d, inputs) for function, d in ((own, dtype), (formula, torch.float64), (formula, dtype))]


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 70, (16, 16), text=5),
        Case(50, 50, (32, 24), text=3, shared=False),
        Case(80, 90, (72, 80)),
        Case(40, 150, (24, 128), text=2, text_first=False),
        Case(17, 90, (16, 32), text=5, text_q=0, head_dim=72),
        Case(48, 17, (24, 16), text=0, text_q=3, shared=False),
        Case(33, 70, (16, 72), text=3, text_q=7, text_first=False),
        Windows(30, 36, (16, 24), text=2, text_q=0, grid=(3, 3, 4)),
    ],
    ids=lambda case: f"{case.queries}x{case.keys}-{case.widths}",
)
def test_random_masks_equal_dense(case: Case) -> None:
    got, exact, low = run(case, torch.float32)
    for name, found in got.items():
        assert_close_as_eager(found, exact[name], low[name], name)


@pytest.mark.parametrize("case", [Case(33, 50, (16, 32), 3, 2, head_dim=72), Case(50, 33, (32, 16), 0, 2)], ids=["fewer", "more"])
def test_float16(case: Case) -> None:
    inputs = [x.half() for x in case.inputs(torch.float32)]
    got, exact, low = run(case, torch.float16, inputs)
    for name, found in got.items():
        assert_close_as_eager(found, exact[name], low[name], name)
