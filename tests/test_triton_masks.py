"""The Triton kernels by bit masks: random lists and masks over ragged blocks, against dense attention in float64."""

import pytest
import torch
from helpers import assert_close_as_eager
from test_cpu_masks import Case, results

from dit_accel.kernels import ops

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.is_available(), reason="the cases are made on the CPU")]


@pytest.mark.parametrize(
    "case",
    [
        Case(70, 70, (16, 16), text=5),
        Case(90, 90, (32, 24), text=3, shared=False),
        Case(150, 150, (72, 80)),
        Case(150, 150, (24, 128), text=2, text_first=False),
    ],
    ids=lambda case: f"{case.widths}",
)
def test_random_masks_equal_dense(case: Case) -> None:
    got = results(case, lambda *qkv: ops.attention(case.arguments(*qkv), "triton"), torch.float32)
    exact, eager = (results(case, case.oracle, d) for d in (torch.float64, torch.float32))
    for name, found in got.items():
        assert_close_as_eager(found, exact[name], eager[name], name)
