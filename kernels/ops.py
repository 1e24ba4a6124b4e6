"""The operators as PyTorch knows them: functional, differentiable, with fake kernels for torch.compile; one name for every device.

`dit_accel::attention` is a whole accelerated layer's operator; `dit_accel::attention_backward` gives its gradients;
`dit_accel::select_blocks` chooses key blocks. Their arguments are those of `arguments`, packed, after `implementation`: "cpu"
(kernels/cpu) or "triton" (kernels/triton, also on CPU tensors under Triton's interpreter).
"""

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.arguments import ATTENTION, DIFFERENTIABLE, SELECTION, Arguments, SelectionArguments, dense, gradient_like
from dit_accel.kernels.cpu import calls


def attention(a: Arguments, implementation: str) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, Nq]`, float32 and natural."""
    out, lse = attention_op(implementation, *ATTENTION.pack(a))
    return out, lse


def select_blocks(a: SelectionArguments, implementation: str) -> Tensor:
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`. Not differentiated."""
    lists: Tensor = select_blocks_op(implementation, *SELECTION.pack(a))
    return lists


def _implementation(name: str) -> Any:
    if name == "cpu":
        return calls
    from dit_accel.kernels.triton import calls as triton_calls  # where triton is missing nothing asks for it

    return triton_calls


@torch.library.custom_op("dit_accel::attention", mutates_args=(), schema=ATTENTION.schema("(Tensor, Tensor)"))
def attention_op(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    out, lse = _implementation(implementation).attend(ATTENTION.unpack(*given))
    return out, lse


@attention_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    q = ATTENTION.unpack(*given).q
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "dit_accel::attention_backward",
    mutates_args=(),
    schema=ATTENTION.schema("Tensor[]", "Tensor dout", "Tensor? dlse", "Tensor out", "Tensor lse"),
)
def attention_backward_op(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    """Gradients of the differentiable arguments, in the order of their declaration; absent ones are empty."""
    grads: list[Tensor] = _implementation(implementation).gradients(dout, dlse, out, lse, ATTENTION.unpack(*given))
    return grads


@attention_backward_op.register_fake
def _(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    return [gradient_like(name, ATTENTION.unpack(*given)) for name in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.implementation, *tensors, ctx.numbers, ctx.reals = inputs
    ctx.save_for_backward(*output, *tensors)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = attention_backward_op(ctx.implementation, dout, dlse, out, lse, *tensors, ctx.numbers, ctx.reals)
    given = {name for name, x in zip(ATTENTION.tensors, tensors, strict=True) if x is not None}
    found = {name: grad for name, grad in zip(DIFFERENTIABLE, grads, strict=True) if name in given}
    return (None, *(found.get(name) for name in ATTENTION.tensors), None, None)


attention_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=(), schema=SELECTION.schema("Tensor"))
def select_blocks_op(implementation: str, *given: Any) -> Tensor:
    lists: Tensor = _implementation(implementation).select_blocks(SELECTION.unpack(*given))
    return lists


@select_blocks_op.register_fake
def _(implementation: str, *given: Any) -> Tensor:
    a = SELECTION.unpack(*given)
    return a.q.new_empty((a.q.shape[0] * a.q.shape[1], len(a.q_starts) - 1, a.top), dtype=torch.int32)
