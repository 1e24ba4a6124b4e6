"""`dit-accel doctor`: every method, forward and backward, by the compiled kernels against the reference in float64, on small inputs.

What may differ is measured, not guessed: twice what the reference itself errs in float32, or for narrower types twice what rounding the
inputs to them changes, and one rounding of the result.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap
from dit_accel.method import AttentionSpec, Call, Linear, Mass, Tiles, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator import attention as operator
from dit_accel.operator import composition
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout

METHODS: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.2),
    "fovea-radius": Fovea(radius=6),
    "sla": SLA(0.3, block=(64, 64)),
    "sla-all": SLA(0.3, "elu", "all", block=(64, 64)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("relu"), Mass(), Tiles((8, 8)), (64, 64)),
    "clear": CLEAR(6),
    "clear-downsample": CLEAR(6, downsample=4),
    "gna": GNA((9, 7), stride=(2, 3), dilation=(1, 2)),
}
SPREAD = (1.2, 4.0)  # of the channels of queries, in turns
Pass = Callable[[list[Tensor], AttentionParameters], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """The sizes of one call."""

    grid: tuple[int, int, int]
    text: int
    heads: int
    head_dim: int

    @property
    def layout(self) -> TokenLayout:
        return TokenLayout(self.grid, self.text)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Query, key and value, the same ones on every machine; logits spread enough for the softmax to choose.

        Every other query is small and every other large, so that hardly a half variance is near its cap: there its gradient jumps, and
        which side it is on is a matter of rounding.
        """
        seed = torch.Generator().manual_seed(self.head_dim + self.text)
        size = (1, self.heads, self.layout.tokens, self.head_dim)
        q, k, v = (torch.randn(size, generator=seed, dtype=torch.float64) for _ in range(3))
        spread = torch.tensor(SPREAD, dtype=torch.float64).repeat(-(-self.layout.tokens // 2))[: self.layout.tokens, None]
        return [x.to(dtype) for x in (q * spread, k, v)]

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.grid))} + {self.text} tokens, head size {self.head_dim}"


# ragged in every way that kernels care about; the interpreter takes a thousand times as long
SMALL = (Shape((1, 21, 26), 5, 2, 64), Shape((3, 7, 9), 3, 1, 24))
INTERPRETED = (Shape((1, 12, 10), 5, 1, 16),)
ON_CARD = (Shape((1, 64, 64), 512, 2, 128), Shape((3, 29, 37), 77, 2, 64))


@dataclass(frozen=True)
class Difference:
    """How far a result ("output", "lse" or "gradients") is from the exact one, and how far it may be, both as shares of its size."""

    result: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        return self.error <= self.allowed  # not where it is NaN


def differences(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, device: torch.device, backend: str) -> list[Difference]:
    """The results of a backend's kernels on the shape's inputs, compared. Raises what the kernels raise."""
    unrounded = [x.to(device, torch.float64) for x in shape.inputs(torch.float64)]
    qkv = [x.to(dtype) for x in unrounded]
    layout, plan = shape.layout, make_plan(spec, shape.layout, device)

    def by_kernels(given: list[Tensor], params: AttentionParameters) -> tuple[Tensor, Tensor]:
        q, k, v = given
        return operator.attend(q, k, v, spec, layout, plan, params(), None, backend)

    def by_formula(given: list[Tensor], params: AttentionParameters) -> tuple[Tensor, Tensor]:
        q, k, v = given
        return operator.attend(q, k, v, spec, layout, plan, params(), None, "reference")

    got = _results(by_kernels, qkv, _parameters(spec, shape, device, torch.float32))
    with _choices() as chosen:
        exact = _results(by_formula, [x.double() for x in qkv], _parameters(spec, shape, device, torch.float64))
    with _choices(chosen):
        given, precision = (qkv, dtype) if dtype == torch.float32 else (unrounded, torch.float64)
        moved = _results(by_formula, given, _parameters(spec, shape, device, precision))
    return [_difference(name, got[name], exact[name], moved[name], dtype) for name in exact]


def _parameters(spec: AttentionSpec, shape: Shape, device: torch.device, dtype: torch.dtype) -> AttentionParameters:
    """The spec's parameters away from their start values."""
    params = spec.make_parameters(heads=shape.heads, head_dim=shape.head_dim)
    seed = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in params.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=seed))
    return params.to(device, dtype)


def _results(function: Pass, qkv: list[Tensor], params: AttentionParameters) -> dict[str, Tensor]:
    """The output, the lse, and all gradients in one row, of a loss in which both results take part."""
    given = [x.detach().requires_grad_() for x in qkv]
    seed = torch.Generator().manual_seed(5)
    results = function(given, params)
    pulls = [torch.randn(x.shape, generator=seed).to(x.device, x.dtype) for x in results]
    grads = torch.autograd.grad(results, [*given, *params.parameters()], pulls)
    out, lse = (x.detach() for x in results)
    return {"output": out, "lse": lse, "gradients": torch.cat([x.double().flatten() for x in grads])}


@contextlib.contextmanager
def _choices(given: list[BlockMap] | None = None) -> Iterator[list[BlockMap]]:
    """Notes which blocks the reference visits, or has it visit those: a block that only rounding prefers is no measure of rounding."""
    original, noted = composition.visited_blocks, list(given or [])

    def visited(call: Call, spec: AttentionSpec, plan: Plan) -> BlockMap:
        if given is None:
            noted.append(original(call, spec, plan))
        return noted[-1]

    composition.visited_blocks = visited
    try:
        yield noted
    finally:
        composition.visited_blocks = original


def _difference(name: str, got: Tensor, exact: Tensor, moved: Tensor, dtype: torch.dtype) -> Difference:
    size = float(exact.square().mean().sqrt())
    error, change = (float((x.double() - exact).square().mean().sqrt()) / size for x in (got, moved))
    return Difference(name, error, 2 * change + torch.finfo(dtype).eps / 2)
