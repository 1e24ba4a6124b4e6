"""Where tests run the Triton kernels, natively on a card or interpreted on the CPU, and what eager float32 is that they are compared with.

Tests make all tensors on the CPU. `moved` brings them to the kernels and the results back, through which gradients pass to where they were
made, so that whatever is compared is on the CPU.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.kernels import reference
from dit_accel.method import AttentionSpec
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout

CPU = torch.device("cpu")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # of the Triton kernels
Call = Callable[[Sequence[Tensor], AttentionParameters | None], tuple[Tensor, Tensor]]


def device_of(backend: str) -> torch.device:
    return DEVICE if backend == "triton" else CPU


class Poison(TorchDispatchMode):
    """Memory that is allocated inside holds what no result may depend on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.name() in ("aten::new_empty", "aten::empty.memory_format", "aten::empty_like"):
            found.fill_(math.nan if found.is_floating_point() else 77)
        return found


class Moved(AttentionParameters):
    """Parameters used on a device, whose gradients arrive at those that they were made of."""

    def __init__(self, kept: AttentionParameters, device: torch.device) -> None:
        super().__init__({name: x.detach().to(device, copy=True) for name, x in kept.named_parameters()})
        self.source = lambda: kept(device)  # a module would be a part of this one

    def forward(self, device: torch.device | None = None) -> Values:
        return self.source()


def moved(x: Any, device: torch.device = DEVICE) -> Any:
    """The same with all tensors in it on a device: in lists, tuples, dictionaries and dataclasses, and of parameters."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, AttentionParameters):
        return Moved(x, device)
    if isinstance(x, dict):
        return {name: moved(value, device) for name, value in x.items()}
    if isinstance(x, list | tuple):
        inner = [moved(value, device) for value in x]
        if all(new is old for new, old in zip(inner, x, strict=True)):
            return x
        return type(x)(*inner) if hasattr(x, "_fields") else type(x)(inner)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        inside = {field.name: getattr(x, field.name) for field in dataclasses.fields(x) if field.init}
        changed = {name: new for name, value in inside.items() if (new := moved(value, device)) is not value}
        return dataclasses.replace(x, **changed) if changed else x
    return x


def attention_by(backend: str, spec: AttentionSpec, layout: TokenLayout, **given: Any) -> Call:
    """`attention` with its lse as a function of query, key, value and parameters, which takes and gives tensors of the CPU."""

    def run(qkv: Sequence[Tensor], params: AttentionParameters | None = None) -> tuple[Tensor, Tensor]:
        device = device_of(backend)
        there = moved({**given, "params": params}, device)
        with eager() if backend == "reference" else contextlib.nullcontext():
            found = attention(*moved(list(qkv), device), spec, layout, backend=backend, return_lse=True, **there)
        return moved(found, CPU)

    return run


# Float32 on a card

# Whether what is compared here was multiplied on NVIDIA's tensor cores; conftest.py says so to the tests that are marked gpu
tensor_cores = False
KEPT = -1 << 13  # TF32 holds 10 of float32's 23 bits of mantissa
STEP = 8  # products that a tensor core adds to a sum at once


def truncated(x: Tensor) -> Tensor:
    """Float32 to TF32, toward zero, as a tensor core reads it."""
    return (x.view(torch.int32) & KEPT).view(torch.float32)


def rounded(x: Tensor) -> Tensor:
    """Float32 to TF32, to nearest."""
    return ((x.view(torch.int32) + (1 << 12)) & KEPT).view(torch.float32)


def toward_zero(x: Tensor) -> Tensor:
    """Float64 to float32, as a tensor core rounds its sums."""
    near = x.float()
    return torch.where(near.double().abs() > x.abs(), near.nextafter(torch.zeros_like(near)), near)


def added(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, `STEP` exact products at a time."""
    for first in range(0, a.shape[-1], STEP):
        some = slice(first, first + STEP)
        total = toward_zero(total.double() + a[..., some].double() @ b[..., some, :].double())
    return total


def card_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 as `input_precision="tf32x3"` has it: low parts times high parts, then high times high; low times low is left out.

    That each step's sum is cut toward zero is what errs most: all steps err to the same side. (In `tests/test_tf32x3.py`: as measured.)
    """
    a, b = a.contiguous(), b.contiguous()
    highs = rounded(a), rounded(b)
    lows = truncated(a - highs[0]), truncated(b - highs[1])
    none = torch.zeros((*torch.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1]))  # also of no channels at all
    return added(added(added(none, lows[0], highs[1]), highs[0], lows[1]), *highs)


class Product(torch.autograd.Function):
    """a `[.., M, K]` times b `[.., K, N]` by a rule, forward and backward."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, rule: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(a, b)
        ctx.rule = rule
        return rule(a.contiguous(), b.contiguous())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        of_a = ctx.rule(grad.contiguous(), b.mT.contiguous()).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None
        of_b = ctx.rule(a.mT.contiguous(), grad.contiguous()).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None
        return of_a, of_b, None


class CardProducts(TorchFunctionMode):
    """Inside, products of float32 matrices are `card_product`, and so are those of their backward passes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and not kwargs:
            a, b = args
            if a.dtype == b.dtype == torch.float32 and a.device.type == b.device.type == "cpu" and min(a.ndim, b.ndim) >= 2:
                return Product.apply(a, b, card_product)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Around a formula in torch: float32 errs as a card's float32 does, where that is what it is compared with, and else as torch's."""
    if not tensor_cores:
        yield
        return
    # what is computed again in the backward pass would be so by torch's own products
    once = mock.patch.object(reference, "checkpoint", lambda function, *args, **_: function(*args))
    with CardProducts(), once:
        yield
