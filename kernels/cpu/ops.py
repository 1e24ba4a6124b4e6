"""The CPU kernels as PyTorch operators: functional, differentiable, with fake kernels for torch.compile.

`dit_accel::attention` is a whole accelerated layer's operator; `dit_accel::attention_backward` gives its gradients;
`dit_accel::select_blocks` chooses key blocks. Tensors are `[B, H, N, D]`, float32 or bfloat16; parameters and gradients float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.cpu import native

RESTS = ("none", "pooled", "linear")
FEATURES = ("softmax", "elu", "relu")

Optional = Tensor | None


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _dense(x: Tensor) -> Tensor:
    """Channels contiguous, which is all the kernels ask."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _problem(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, lists: Tensor, counts: Tensor, full: Tensor, q_starts: Tensor, k_starts: Tensor, coords: Tensor,
    windows: Tensor | None, text: int, text_first: bool, reach: int, method: Sequence[int], cap: float, scale: float,
) -> native.Problem:  # fmt: skip
    batch, heads, tokens, channels = q.shape
    image = tokens - text
    rest, log_count, variance, feature_map, linear_all, residual = method
    return native.Problem(
        batch=batch, heads=heads, channels=channels, text=text, text_start=0 if text_first else image, image=image,
        image_start=text if text_first else 0, q_blocks=len(q_starts) - 1, k_blocks=len(k_starts) - 1, list_width=lists.shape[-1],
        lists_per_head=int(lists.ndim == 3), extra=0 if extra_k is None else extra_k.shape[2], q=native.rows(q), k=native.rows(k),
        v=native.rows(v), q_starts=q_starts.data_ptr(), k_starts=k_starts.data_ptr(), lists=lists.data_ptr(), counts=counts.data_ptr(),
        full=full.data_ptr(), coords=coords.data_ptr(), windows=_pointer(windows), n_windows=0 if windows is None else windows.shape[0],
        reach=reach, extra_k=_pointer(extra_k), extra_v=_pointer(extra_v), offset=_pointer(offset), weight=_pointer(weight),
        bias=_pointer(bias), rest=rest, log_count=log_count, variance=variance, feature_map=feature_map, linear_all=linear_all,
        residual=residual, scale=scale, cap=cap, threads=torch.get_num_threads(),
    )  # fmt: skip


@torch.library.custom_op("dit_accel::attention", mutates_args=(), device_types="cpu")
def attention(
    q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None, extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, lists: Tensor, counts: Tensor, full: Tensor, q_starts: Tensor, k_starts: Tensor, coords: Tensor,
    windows: Tensor | None, text: int, text_first: bool, reach: int, method: Sequence[int], cap: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output (q's dtype and layout) and lse `[B, H, N]`.

    `lists` `[q blocks, n]`, or with a leading B·H, int32: visited key blocks, the `full` ones first, `counts` of them. `coords`
    `[3, N + padding]` of the image tokens; `windows` `[W, 3, 3, N + padding]` first, last and residue per axis. `method`: index in RESTS,
    log_count, variance, index in FEATURES, linear over all, residual merge.
    """
    q, k, v = (_dense(x) for x in (q, k, v))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    problem = _problem(
        q, k, v, extra_k, extra_v, offset, weight, bias, lists, counts, full, q_starts, k_starts, coords, windows, text, text_first,
        reach, method, cap, scale,
    )  # fmt: skip
    problem.out, problem.lse = native.rows(out), lse.data_ptr()
    native.call("forward", problem)
    return out, lse


@attention.register_fake
def _(q: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("dit_accel::attention_backward", mutates_args=(), device_types="cpu")
def attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None,
    extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None, bias: Tensor | None, lists: Tensor, counts: Tensor, full: Tensor,
    q_starts: Tensor, k_starts: Tensor, coords: Tensor, windows: Tensor | None, text: int, text_first: bool, reach: int,
    method: Sequence[int], cap: float, scale: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of q, k, v, extra_k, extra_v `[B, H, ·, D]`, offset `[H]`, weight `[D, D]` and bias `[D]`; absent ones are empty."""
    q, k, v, dout, out = (_dense(x) for x in (q, k, v, dout, out))
    problem = _problem(
        q, k, v, extra_k, extra_v, offset, weight, bias, lists, counts, full, q_starts, k_starts, coords, windows, text, text_first,
        reach, method, cap, scale,
    )  # fmt: skip
    dlse = None if dlse is None else dlse.contiguous()
    (batch, heads, _, channels), make = q.shape, lambda *size: torch.zeros(size, dtype=torch.float32)
    image_shape = tuple(q.shape)
    extra_shape = (0,) if extra_k is None else tuple(extra_k.shape)
    dq, dk, dv, dextra_k, dextra_v = make(*image_shape), make(*image_shape), make(*image_shape), make(*extra_shape), make(*extra_shape)
    doffset = make(batch, heads) if offset is not None else make(0)
    dweight, dbias = (make(batch, heads, channels, channels), make(batch, heads, channels)) if weight is not None else (make(0), make(0))
    problem.out, problem.lse, problem.dout, problem.dlse = native.rows(out), lse.data_ptr(), native.rows(dout), _pointer(dlse)
    problem.dq, problem.dk, problem.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    problem.dextra_k, problem.dextra_v = dextra_k.data_ptr(), dextra_v.data_ptr()
    problem.doffset = doffset.data_ptr() if offset is not None else None
    problem.dweight, problem.dbias = (dweight.data_ptr(), dbias.data_ptr()) if weight is not None else (None, None)
    native.call("backward", problem)
    shared = [
        doffset.sum(0) if offset is not None else doffset,
        *((dweight.sum((0, 1)), dbias.sum((0, 1))) if weight is not None else (dweight, dbias)),
    ]
    return [*(x.to(q.dtype) for x in (dq, dk, dv)), dextra_k, dextra_v, *shared]


@attention_backward.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, extra_k: Tensor | None,
    extra_v: Tensor | None, offset: Tensor | None, weight: Tensor | None, bias: Tensor | None, *args: Any,
) -> list[Tensor]:  # fmt: skip
    grads = [q.new_empty(q.shape) for _ in range(3)]
    return grads + [q.new_empty(0 if x is None else x.shape, dtype=torch.float32) for x in (extra_k, extra_v, offset, weight, bias)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *inputs[:15])
    ctx.settings = inputs[15:]


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    grads = torch.ops.dit_accel.attention_backward(dout, dlse, out, lse, *tensors, *ctx.settings)
    given = [None if x is None else grad for x, grad in zip(tensors[:8], grads, strict=True)]
    return (*given, *[None] * 13)


attention.register_autograd(_gradients, setup_context=_save)


@torch.library.custom_op("dit_accel::select_blocks", mutates_args=(), device_types="cpu")
def select_blocks(q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor, weight: Tensor | None, top: int) -> Tensor:
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`. q, k: image tokens."""
    q, k = _dense(q), _dense(k)
    batch, heads, _, channels = q.shape
    lists = torch.empty(batch * heads, len(q_starts) - 1, top, dtype=torch.int32)
    native.call(
        "select",
        native.Selection(
            batch=batch, heads=heads, channels=channels, q_blocks=len(q_starts) - 1, k_blocks=len(k_starts) - 1, top=top, q=native.rows(q),
            k=native.rows(k), q_starts=q_starts.data_ptr(), k_starts=k_starts.data_ptr(), weight=_pointer(weight), lists=lists.data_ptr(),
            threads=torch.get_num_threads(),
        ),
    )  # fmt: skip
    return lists


@select_blocks.register_fake
def _(q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor, weight: Tensor | None, top: int) -> Tensor:
    return torch.empty(q.shape[0] * q.shape[1], len(q_starts) - 1, top, dtype=torch.int32)
