"""The CPU kernels on tensors: float32 or bfloat16, parameters and gradients float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.kernels.arguments import Arguments, Method, dense
from dit_accel.kernels.cpu import native


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _with_dense_rows(a: Arguments) -> Arguments:
    return a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v))


def _problem(a: Arguments) -> native.Problem:
    batch, heads, tokens, channels = a.q.shape
    image, method = tokens - a.text, Method(*a.method)
    return native.Problem(
        batch=batch, heads=heads, channels=channels, text=a.text, text_start=0 if a.text_first else image, image=image,
        image_start=a.text if a.text_first else 0, q_blocks=len(a.q_starts) - 1, k_blocks=len(a.k_starts) - 1,
        list_width=a.lists.shape[-1], lists_per_head=int(a.lists.ndim == 3), extra=0 if a.extra_k is None else a.extra_k.shape[2],
        q=native.rows(a.q), k=native.rows(a.k), v=native.rows(a.v), q_starts=a.q_starts.data_ptr(), k_starts=a.k_starts.data_ptr(),
        lists=a.lists.data_ptr(), counts=a.counts.data_ptr(), full=a.full.data_ptr(), coords=a.coords.data_ptr(),
        places=_pointer(a.places), windows=_pointer(a.windows), n_windows=0 if a.windows is None else a.windows.shape[0],
        reach=a.reach, extra_k=_pointer(a.extra_k), extra_v=_pointer(a.extra_v), offset=_pointer(a.offset), weight=_pointer(a.weight),
        bias=_pointer(a.bias), text_bias=_pointer(a.text_bias), rest=method.rest, log_count=method.log_count, variance=method.variance,
        feature_map=method.feature_map, linear_all=method.linear_all, residual=method.residual, scale=a.scale, cap=a.cap,
        threads=torch.get_num_threads(),
    )  # fmt: skip


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, N]`."""
    a = _with_dense_rows(a)
    out, lse = torch.empty_like(a.q), a.q.new_empty(a.q.shape[:3], dtype=torch.float32)
    problem = _problem(a)
    problem.out, problem.lse = native.rows(out), lse.data_ptr()
    native.call("forward", problem)
    return out, lse


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments) -> list[Tensor]:
    """Gradients of the first eight arguments; absent ones are empty."""
    a, dout, out = _with_dense_rows(a), dense(dout), dense(out)
    problem = _problem(a)
    dlse = None if dlse is None else dlse.contiguous()
    (batch, heads, _, channels), make = a.q.shape, lambda *size: torch.zeros(size, dtype=torch.float32)
    image_shape = tuple(a.q.shape)
    extra_shape = (0,) if a.extra_k is None else tuple(a.extra_k.shape)
    dq, dk, dv, dextra_k, dextra_v = make(*image_shape), make(*image_shape), make(*image_shape), make(*extra_shape), make(*extra_shape)
    doffset = make(batch, heads) if a.offset is not None else make(0)
    dweight, dbias = (make(batch, heads, channels, channels), make(batch, heads, channels)) if a.weight is not None else (make(0), make(0))
    problem.out, problem.lse, problem.dout, problem.dlse = native.rows(out), lse.data_ptr(), native.rows(dout), _pointer(dlse)
    problem.dq, problem.dk, problem.dv = dq.data_ptr(), dk.data_ptr(), dv.data_ptr()
    problem.dextra_k, problem.dextra_v = dextra_k.data_ptr(), dextra_v.data_ptr()
    problem.doffset = doffset.data_ptr() if a.offset is not None else None
    problem.dweight, problem.dbias = (dweight.data_ptr(), dbias.data_ptr()) if a.weight is not None else (None, None)
    native.call("backward", problem)
    shared = [
        doffset.sum(0) if a.offset is not None else doffset,
        *((dweight.sum((0, 1)), dbias.sum((0, 1))) if a.weight is not None else (dweight, dbias)),
    ]
    return [*(x.to(a.q.dtype) for x in (dq, dk, dv)), dextra_k, dextra_v, *shared]


def select_blocks(
    q: Tensor, k: Tensor, q_starts: Tensor, k_starts: Tensor, weight: Tensor | None, top: int, widths: Sequence[int],
    places: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The `top` best key blocks of each query block, ascending: int32 `[B·H, q blocks, top]`."""
    q, k = dense(q), dense(k)
    batch, heads, _, channels = q.shape
    lists = torch.empty(batch * heads, len(q_starts) - 1, top, dtype=torch.int32)
    native.call(
        "select",
        native.Selection(
            batch=batch, heads=heads, channels=channels, q_blocks=len(q_starts) - 1, k_blocks=len(k_starts) - 1, top=top, q=native.rows(q),
            k=native.rows(k), q_starts=q_starts.data_ptr(), k_starts=k_starts.data_ptr(), places=_pointer(places), weight=_pointer(weight),
            lists=lists.data_ptr(), threads=torch.get_num_threads(),
        ),
    )  # fmt: skip
    return lists
