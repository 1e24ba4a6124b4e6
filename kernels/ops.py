"""The operators as PyTorch knows them: functional, differentiable, with fake kernels for torch.compile; one name for every device.

`dit_accel::attention` is a whole accelerated layer's operator; `dit_accel::attention_backward` gives its gradients;
`dit_accel::select_blocks` chooses key blocks. Their arguments are those of `arguments`, after `implementation`: "cpu" (kernels/cpu) or
"triton" (kernels/triton, also on CPU tensors under Triton's interpreter).
"""

from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.arguments import DIFFERENTIABLE, Arguments, SelectionArguments, dense, gradient_like, schema
from dit_accel.kernels.cpu import calls


def attention(a: Arguments, implementation: str) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, N]`, float32 and natural."""
    out, lse = attention_op(implementation, *a)
    return out, lse


def select_blocks(a: SelectionArguments, implementation: str) -> Tensor:
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`. Not differentiated."""
    lists: Tensor = select_blocks_op(implementation, *a)
    return lists


def _implementation(name: str) -> Any:
    if name == "cpu":
        return calls
    from dit_accel.kernels.triton import calls as triton_calls  # where triton is missing nothing asks for it

    return triton_calls


@torch.library.custom_op("dit_accel::attention", mutates_args=(), schema=schema(Arguments, "(Tensor, Tensor)"))
def attention_op(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    out, lse = _implementation(implementation).attend(Arguments(*given))
    return out, lse


@attention_op.register_fake
def _(implementation: str, *given: Any) -> tuple[Tensor, Tensor]:
    q = Arguments(*given).q
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op(
    "dit_accel::attention_backward",
    mutates_args=(),
    schema=schema(Arguments, "Tensor[]", "Tensor dout", "Tensor? dlse", "Tensor out", "Tensor lse"),
)
def attention_backward_op(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    """Gradients of the differentiable arguments, in the order of their declaration; absent ones are empty."""
    grads: list[Tensor] = _implementation(implementation).gradients(dout, dlse, out, lse, Arguments(*given))
    return grads


@attention_backward_op.register_fake
def _(implementation: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *given: Any) -> list[Tensor]:
    return [gradient_like(name, Arguments(*given)) for name in DIFFERENTIABLE]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.implementation, *given = inputs
    a = Arguments(*given)
    tensors = {name: x for name, x in a._asdict().items() if isinstance(x, Tensor)}
    ctx.save_for_backward(*output, *tensors.values())
    without: dict[str, Any] = dict.fromkeys(tensors)
    ctx.saved, ctx.settings = tuple(tensors), a._replace(**without)


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    a = ctx.settings._replace(**dict(zip(ctx.saved, tensors, strict=True)))
    grads = dict(zip(DIFFERENTIABLE, attention_backward_op(ctx.implementation, dout, dlse, out, lse, *a), strict=True))
    return (None, *(grads.get(name) if name in ctx.saved else None for name in Arguments._fields))


attention_op.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=(), schema=schema(SelectionArguments, "Tensor"))
def select_blocks_op(implementation: str, *given: Any) -> Tensor:
    lists: Tensor = _implementation(implementation).select_blocks(SelectionArguments(*given))
    return lists


@select_blocks_op.register_fake
def _(implementation: str, *given: Any) -> Tensor:
    a = SelectionArguments(*given)
    return a.q.new_empty((a.q.shape[0] * a.q.shape[1], len(a.q_starts) - 1, a.top), dtype=torch.int32)
