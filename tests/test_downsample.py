"""Down-sampled keys (CLEAR's pooled keys): sums of one order, from counts that the plan holds."""

from typing import Any

import torch
from helpers import coordinates
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.method import CLEAR, Downsampled
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

# on a GPU they add in whichever order threads arrive, or make numbers anew that depend on the grid alone
FORBIDDEN = ("index_add", "scatter_add", "scatter_reduce", "index_put", "bincount", "index_reduce", "histc")


class Names(TorchDispatchMode):
    """Collects the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(func.name())
        return func(*args, **(kwargs or {}))


def test_no_sum_depends_on_the_order_of_threads() -> None:
    spec, layout = CLEAR(3, downsample=4), TokenLayout((2, 7, 9))
    plan = make_plan(spec, layout, torch.device("cpu"))
    x, weight = torch.randn(3, layout.image, 8, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    with Names() as names:
        Downsampled(4).keys_of(x, plan.prepared, {"spatial_weight": weight}).sin().sum().backward()
    assert x.grad is not None
    assert weight.grad is not None
    assert len(names.found) > 3
    assert [name for name in names.found if any(part in name for part in FORBIDDEN)] == []


def test_the_plan_holds_the_tokens_of_each_patch() -> None:
    grid = (2, 7, 9)
    plan = make_plan(CLEAR(3, downsample=4), TokenLayout(grid), torch.device("cpu"))
    t, y, x = coordinates((grid,)).unbind(-1)
    cells, patch_tokens = (plan.prepared[name] for name in ("cells", "patch_tokens"))
    assert patch_tokens.tolist() == torch.stack([t, y // 4, x // 4]).unique(dim=1, return_counts=True)[1].tolist()
    assert len(cells.unique()) == len(t)
    assert cells.div(16, rounding_mode="floor").bincount().tolist() == patch_tokens.tolist()
