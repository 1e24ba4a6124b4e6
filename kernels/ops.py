"""The operators as PyTorch knows them: functional, differentiable, with fake kernels for torch.compile; one name for every device.

`dit_accel::attention` is a whole accelerated layer's operator; `dit_accel::attention_backward` gives its gradients;
`dit_accel::select_blocks` chooses key blocks. Tensors are `[B, H, N, D]`; parameters and their gradients float32. `implementation` is
"cpu" (kernels/cpu) or "triton" (kernels/triton, also on CPU tensors under Triton's interpreter).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.arguments import Arguments, dense
from dit_accel.kernels.cpu import calls


def _implementation(name: str) -> Any:
    if name == "cpu":
        return calls
    from dit_accel.kernels.triton import calls as triton_calls  # where triton is missing nothing asks for it

    return triton_calls


@torch.library.custom_op("dit_accel::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, lists: Tensor, counts: Tensor, full: Tensor, q_starts: Tensor, k_starts: Tensor, coords: Tensor,
    windows: Tensor | None, places: Tensor | None, text_bias: Tensor | None, text: int, text_first: bool, reach: int,
    method: Sequence[int], cap: float, scale: float, implementation: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (q's dtype and layout) and lse `[B, H, N]`.

    `lists` `[q blocks, n]`, or with a leading B·H, int32: visited key blocks, the `full` ones first, `counts` of them. `coords`
    `[3, N + padding]` of the image tokens; `windows` `[W, 3, 3, N + padding]` first, last and residue per axis; both in the order of the
    blocks, as `q_starts` and `k_starts` count. `places` `[N]` int32: where each token of that order is among the image's tokens of q, k and
    v; None: they are in that order. The Triton kernels take none. `text_bias` `[B, text]` float32, contiguous and finite, joins the logits
    of the text's keys. `method`: see `Method`.
    """
    out, lse = _implementation(implementation).attend(
        Arguments(
            q, k, v, extra_k, extra_v, offset, weight, bias, lists, counts, full, q_starts, k_starts, coords, windows, places, text_bias,
            text, text_first, reach, method, cap, scale,
        )
    )  # fmt: skip
    return out, lse


@attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(dense(q)), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dit_accel::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None,
    extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None, bias: Tensor | None, lists: Tensor, counts: Tensor, full: Tensor,
    q_starts: Tensor, k_starts: Tensor, coords: Tensor, windows: Tensor | None, places: Tensor | None, text_bias: Tensor | None, text: int,
    text_first: bool, reach: int, method: Sequence[int], cap: float, scale: float, implementation: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, extra_k, extra_v `[B, H, ·, D]`, offset `[H]`, weight `[D, D]` and bias `[D]`; absent ones are empty."""
    arguments = Arguments(
        q, k, v, extra_k, extra_v, offset, weight, bias, lists, counts, full, q_starts, k_starts, coords, windows, places, text_bias, text,
        text_first, reach, method, cap, scale,
    )  # fmt: skip
    grads: list[Tensor] = _implementation(implementation).gradients(dout, dlse, out, lse, arguments)
    return grads


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None,
    extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None, bias: Tensor | None, *args: Any,
) -> list[Tensor]:  # fmt: skip
    grads = [q.new_empty(q.shape) for _ in range(3)]
    return grads + [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (extra_k, extra_v, offset, weight, bias)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:17])
    ctx.settings = inputs[17:]


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.dit_accel.attention_backward(dout, dlse, out, lse, *tensors, *ctx.settings)
    given = [None if x is None else grad for x, grad in zip(tensors[:8], grads, strict=True)]
    return (*given, *[None] * 16)


attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=())
def select_blocks(
    q: Tensor,
    k: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    weight: Tensor | None,
    top: int,
    widths: Sequence[int],
    implementation: str,
    places: Tensor | None = None,
) -> Tensor:
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`. q, k: image tokens.

    `widths`: the most tokens that a query block and a key block hold. `places`: as in `attention`.
    """
    lists: Tensor = _implementation(implementation).select_blocks(q, k, q_starts, k_starts, weight, top, widths, places)
    return lists


@select_blocks.register_fake
def _(
    q: Tensor,
    k: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    weight: Tensor | None,
    top: int,
    widths: Sequence[int],
    implementation: str,
    places: Tensor | None = None,
) -> Tensor:
    return q.new_empty((q.shape[0] * q.shape[1], len(q_starts) - 1, top), dtype=torch.int32)
