"""What only a card can show: bfloat16 in the tiles of the table, capture in a CUDA graph, torch.compile, no wait for the device, rivals."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import attention_by
from torch import Tensor

from dit_accel.errors import BackendError
from dit_accel.kernels.triton import calls, timing
from dit_accel.measure import gpu_tune
from dit_accel.measure import rivals as bench_rivals
from dit_accel.method import AttentionSpec, Linear, Mass, Tiles, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.attention import attend, attention
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="requires a CUDA device")]

CUDA = torch.device("cuda")
SPECS = {
    "fovea": Fovea(0.2),
    "fovea-radius": Fovea(radius=6),
    "clear": CLEAR(9),
    "clear-downsample": CLEAR(6, downsample=4),
    "sla": SLA(0.3, block=(64, 64)),
    "sla-all": SLA(0.3, "elu", "all", block=(64, 64)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("relu"), Mass(), Tiles((8, 8)), (64, 64)),
    "gna": GNA((9, 7), stride=(2, 3), dilation=(1, 2)),
}
STEP = Shape(1, 2, 64, (1, 24, 40), 20)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def on_card(qkv: list[Tensor], params: Any, spec: AttentionSpec, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    return attention_by("triton", spec, layout)(qkv, params.float())


@pytest.mark.parametrize("head_dim", [64, 128])
@half_types
@every_spec
def test_whole_tiles(spec: AttentionSpec, dtype: torch.dtype, head_dim: int) -> None:
    """Grids of many blocks, so that every loop takes several steps of its pipeline, forward and backward."""
    shape = Shape(1, 2, head_dim, (1, 40, 29), 77)
    exact, eager = (
        (
            oracle(*shape.inputs(dtype), spec, shape.layout, random_parameters(spec, shape), dtype=d)[0].detach(),
            flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, shape.layout, p, dtype=d), spec, shape, d)),
        )
        for d in (torch.float64, dtype)
    )
    with torch.no_grad():
        out, _ = on_card(shape.inputs(dtype), random_parameters(spec, shape), spec, shape.layout)
    assert_close_as_eager(out, exact[0], eager[0])
    own = gradients(lambda qkv, params: on_card(qkv, params, spec, shape.layout), spec, shape, dtype)
    assert_close_as_eager(flat(own), exact[1], eager[1], "gradients")


class Step:
    """A forward and backward on tensors that stay in place."""

    def __init__(self, spec: AttentionSpec, dtype: torch.dtype, shape: Shape = STEP) -> None:
        self.spec, self.layout = spec, shape.layout
        self.qkv = [x.to(CUDA, dtype).requires_grad_() for x in shape.inputs()]
        self.params = random_parameters(spec, shape).to(CUDA)
        self.plan = make_plan(spec, self.layout, CUDA)
        self.attend: Callable[..., tuple[Tensor, Tensor]] = attend

    def __call__(self) -> list[Tensor]:
        return self.results(self.qkv, self.params, "triton")

    def results(self, qkv: list[Tensor], params: AttentionParameters, backend: str) -> list[Tensor]:
        """Output, lse, and all gradients in one row."""
        out, lse = self.attend(*qkv, self.spec, self.layout, self.plan, params(), None, backend)
        grads = torch.autograd.grad([out, lse], [*qkv, *params.parameters()], [torch.ones_like(out), torch.ones_like(lse)])
        return [out.detach(), lse.detach(), torch.cat([x.flatten() for x in grads])]

    def refill(self, seed: int) -> None:
        generator = torch.Generator(CUDA).manual_seed(seed)
        with torch.no_grad():
            for x in self.qkv:
                x.copy_(torch.randn(x.shape, generator=generator, device=CUDA))

    def assert_right(self, got: list[Tensor]) -> None:
        """Compare with float64 and with the kernels launched one by one: some sums outside them are in no fixed order."""
        wide = [x.detach().double().requires_grad_() for x in self.qkv]
        self.attend, held = attend, self.attend
        exact = self.results(wide, copy.deepcopy(self.params).double(), "reference")
        for name, *tensors in zip(("output", "lse", "gradients"), got, exact, self(), strict=True):
            assert_close_as_eager(*tensors, name)
        self.attend = held


@half_types
@every_spec
def test_a_captured_graph_follows_its_inputs(spec: AttentionSpec, dtype: torch.dtype) -> None:
    step = Step(spec, dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles the kernels, which no capture may
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    for seed in (1, 2):
        step.refill(seed)
        graph.replay()
        step.assert_right([x.clone() for x in held])


def test_a_captured_graph_reads_its_plan_after_the_cache_dropped_it() -> None:
    """Seventeen other plans, and memory written over that was freed: the graph must still visit the blocks that it was captured with."""
    step = Step(SPECS["clear"], torch.bfloat16)
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = step()
    del step.plan
    for width in range(17):
        make_plan(step.spec, Shape(1, 1, 64, (1, 8, 8 + width)).layout, CUDA)
    gc.collect()
    junk = [torch.full((1 << 16,), -1, dtype=torch.int32, device=CUDA) for _ in range(64)]
    step.refill(1)
    graph.replay()
    step.plan = make_plan(step.spec, step.layout, CUDA)
    step.assert_right([x.clone() for x in held])
    assert len(junk) == 64


def test_a_first_call_inside_a_capture_says_what_to_do() -> None:
    step = Step(SPECS["fovea-radius"], torch.bfloat16, Shape(1, 2, 64, (1, 16, 23), 7))  # a size that no other test has
    with (
        pytest.raises(BackendError, match="run the pipeline once with these sizes before capturing"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        step()
    step.assert_right(step())  # and the card is as it was


@every_spec
def test_nothing_waits_for_the_card(spec: AttentionSpec) -> None:
    step = Step(spec, torch.bfloat16)
    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    step.assert_right(got)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="requires two CUDA devices")
def test_a_second_card_computes_what_the_first_does() -> None:
    spec, (first, second) = SPECS["fovea"], (torch.device("cuda", n) for n in range(2))
    found = []
    for device in (first, second):
        qkv = [x.to(device, torch.bfloat16).requires_grad_() for x in STEP.inputs()]
        out = attention(*qkv, spec, STEP.layout, backend="triton")
        out.float().square().sum().backward()
        found.append([out.detach().cpu(), *(x.grad.cpu() for x in qkv if x.grad is not None)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@every_spec
def test_compiles_without_a_break(spec: AttentionSpec) -> None:
    step = Step(spec, torch.bfloat16)
    step.attend = torch.compile(attend, fullgraph=True)
    step.assert_right(step())


def test_compiled_flex_attention_computes_the_operators_pairs() -> None:
    spec, dtype = CLEAR(9), torch.bfloat16
    layout = TokenLayout((1, 32, 24), 64, order=spec.order)
    seed = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.tokens, 64, generator=seed).to(CUDA, dtype) for _ in range(3))
    got = bench_rivals.flex(q, k, v, spec, layout)(q, k, v)
    exact = attention(q.double(), k.double(), v.double(), spec, layout, backend="reference")
    assert_close_as_eager(got, exact, attention(q, k, v, spec, layout, backend="triton"))


def test_a_trial_on_the_card_gives_seconds() -> None:
    work, machine = gpu_tune.Work("gradient_rows", "bfloat16", 64), calls.machine_of(CUDA)
    tile = gpu_tune.table_tile(work, machine)
    found = gpu_tune.run_trial(work, tile, machine=machine, measure=timing.seconds, device=CUDA, grid=(1, 16, 16), text=20, heads=2)
    assert isinstance(found, float)
    assert found > 0
