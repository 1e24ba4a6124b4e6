"""The linear rest of the Triton kernels where most blocks are visited, and what it and the choice of blocks are multiplied by."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, block_of, flat, gradients, oracle, random_parameters
from on_device import CPU, DEVICE, attention_by, moved
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels.blocks import Blocks, pool_blocks, select_blocks
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import calls, launch, launch_choice
from dit_accel.kernels.triton.tables import Machine
from dit_accel.method import AttentionSpec, Linear, Mass, Tiles, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.presets import SLA

pytestmark = pytest.mark.gpu

SHAPE = Shape(1, 1, 16, (1, 8, 16))  # 8 blocks


def spec_of(density: float, merge: str) -> AttentionSpec:
    if merge == "residual":
        return SLA(density, block=(16, 16))
    return AttentionSpec((TopK(density),), Linear("softmax"), Mass(), Tiles((4, 4)), (16, 16))


@pytest.mark.parametrize(("density", "merge"), [(0.5, "residual"), (0.65, "mass"), (0.75, "residual"), (0.99, "mass"), (0.99, "residual")])
def test_a_linear_rest_of_few_blocks_does_not_cancel(density: float, merge: str) -> None:
    spec, dtype = spec_of(density, merge), torch.float16
    far = 6.0 if density > 0.5 else 0.0
    near = torch.arange(16) < 8
    own_side = near == (block_of(SHAPE.layout.grids, spec.order, 16) % 2 == 0)[:, None]  # [N, D]

    def spread(qkv: list[Tensor]) -> list[Tensor]:  # of every second block the features lie apart from the queries': e⁻⁶ of the mass
        return [qkv[0] + (far * near).to(qkv[0].dtype), qkv[1] + (far * own_side).to(qkv[1].dtype), qkv[2]]

    def own(qkv: list[Tensor], params: AttentionParameters) -> tuple[Tensor, Tensor]:
        return attention_by("triton", spec, SHAPE.layout)(spread(qkv), params.float())

    def eager(qkv: list[Tensor], params: AttentionParameters, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        return oracle(*spread(qkv), spec, SHAPE.layout, params, dtype=dtype)

    qkv, params = SHAPE.inputs(dtype), random_parameters(spec, SHAPE)
    with torch.no_grad():
        found, exact, low = own(qkv, params), eager(qkv, params, torch.float64), eager(qkv, params, dtype)
    assert_close_as_eager(found[0], exact[0], low[0])
    assert_close_as_eager(found[1], exact[1], low[1], "lse")
    exact_grads, low_grads = (gradients(lambda x, p, d=d: eager(x, p, d), spec, SHAPE, d) for d in (torch.float64, dtype))
    grads = gradients(own, spec, SHAPE, dtype)
    for names in (("query", "key", "value"), sorted(grads)):
        got, *wanted = (flat({name: some[name] for name in names}) for some in (grads, exact_grads, low_grads))
        assert_close_as_eager(got, *wanted, ", ".join(names))


def test_lists_go_on_with_what_is_not_on_them() -> None:
    lists = torch.tensor([[[1, 3, 0], [2, 0, 0], [4, 1, 2]]], dtype=torch.int32)
    counts = torch.tensor([[2, 1, 3]], dtype=torch.int32)
    found = launch.complement(lists, counts, 5)
    assert found.dtype == torch.int32
    assert found.tolist() == [[[1, 3, 0, 2, 4], [2, 0, 1, 3, 4], [4, 1, 2, 0, 3]]]


# Products that no setting of the user's may round


@pytest.fixture
def medium() -> Iterator[None]:
    """Products of float32 may be rounded to TF32 on a GPU, to bfloat16 on a CPU."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


class Products(TorchDispatchMode):
    """Counts torch's own matrix products of float32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split("::")[1].split(".")[0] in ("mm", "bmm", "addmm", "baddbmm") and args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


def close_scores() -> tuple[Tensor, Tensor, Tensor]:
    """q and k `[1, 1, 256, 16]` whose block scores differ in the fifth digit, and the starts of blocks of 16."""
    seed = torch.Generator().manual_seed(0)
    base = torch.randn(16, generator=seed)
    q, k = (moved(base + 1e-4 * torch.randn(1, 1, 256, 16, generator=seed)) for _ in range(2))
    return q, k, torch.arange(0, 257, 16, dtype=torch.int32, device=DEVICE)


@pytest.mark.usefixtures("medium")
def test_the_choice_of_blocks_is_that_of_float64() -> None:
    q, k, starts = close_scores()
    cut = Blocks.from_starts(starts.long())
    q_mean, k_mean = (pool_blocks(x.flatten(0, 1).double(), cut)[0] for x in (q, k))
    score = q_mean @ k_mean.mT
    gap = score.sort(-1, descending=True).values
    clear = ((gap[..., 3] - gap[..., 4]) > 1e-5)[0]  # of four: elsewhere float32's own rounding decides
    assert clear.sum() >= 8
    wanted = score.topk(4, -1).indices.sort(-1).values
    with Products() as products:
        a = SelectionArguments(q=q, k=k, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=4)
        own = launch_choice.select_blocks(a, calls.machine_of(DEVICE)).lists.long()
        eager = select_blocks(*(pool_blocks(x.flatten(0, 1), cut)[0] for x in (q, k)), 4).index.sort(-1).values
    for found in (own, eager):
        torch.testing.assert_close(found[:, clear], wanted[:, clear], rtol=0, atol=0)
    assert products.count == 0


@pytest.mark.usefixtures("medium")
def test_a_product_follows_no_setting() -> None:
    seed = torch.Generator().manual_seed(1)
    for rows, columns, channels, shared in ((5, 70, 24, False), (40, 33, 128, True), (16, 16, 40, False)):
        a, b = torch.randn(3, rows, channels, generator=seed), torch.randn(1 if shared else 3, columns, channels, generator=seed)
        found = moved(launch.multiply(moved(a), moved(b), calls.machine_of(DEVICE), launch.execute), CPU)
        exact = a.double() @ b.double().mT
        # by hand: an eager float32 product, whatever torch's own is allowed
        eager = (a[:, :, None] * b[:, None]).sum(-1)
        assert_close_as_eager(found, exact, eager)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"])
@pytest.mark.usefixtures("medium")
def test_the_projection_of_a_state_follows_no_setting(arch: str) -> None:
    """Under TF32, allowed: only the products that the user calls attention round their operands."""
    shape, spec = Shape(1, 1, 16, (1, 8, 8)), SLA(0.3, "elu", "all", block=(16, 16))
    with calls.recorded(Machine(arch, 132)) as seen, torch.no_grad():
        attention_by("triton", spec, shape.layout)(shape.inputs(), random_parameters(spec, shape))
    products = [one for one in seen if one.kernel is launch.block_means.multiply]
    assert len(products) == 1  # the state's projection
    assert {one.constants["PRECISION"] for one in products} == {"ieee" if arch == "gfx942" else "tf32x3"}
    assert math.prod(products[0].arguments["out"].shape) == 16 * 16
