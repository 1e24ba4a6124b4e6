"""The operator, put together: choose blocks, exact part, rest, merge. One way for every backend.

The exact part (kept keys and text for the image's queries, all keys for the text's) runs in the backend's kernels; the rest and the merge
are what the spec's parts say in torch, but where one call of the compiled kernels does all of it (`lowering`).
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels import reference, xformers_rows
from dit_accel.kernels.blocks import BlockMap
from dit_accel.kernels.reference import Partial
from dit_accel.method.parameters import Values
from dit_accel.method.parts import Call
from dit_accel.method.parts.call import Visited
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import lowering
from dit_accel.operator.blocks_of_grid import Plan, listed_beside
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import Lists

Dense = Callable[..., Partial]  # `reference.dense_attention`, or xformers' with the same arguments but the bias


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Values, scale: float,
    backend: str, text_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, H, N, D]`, in the query's dtype, and lse `[B, H, N]`, by a backend's exact part."""
    if backend in lowering.COMPILED:
        return _compiled(query, key, value, spec, layout, plan, params, scale, backend, text_bias)
    dense = xformers_rows.dense_attention if backend == "xformers" else reference.dense_attention
    call = image_call(query, key, value, layout, plan, params, scale, dense)
    blocks = visited_blocks(call, spec, plan)
    image, text = _eager(query, key, value, call, blocks, layout, plan, text_bias)
    return _joined(query, layout, _merged(image, spec, call, blocks), text)


def _compiled(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Values, scale: float,
    backend: str, text_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if lowering.selects(spec):
        lists = lowering.lists(query, key, spec, layout, plan, backend)
    else:
        lists = Lists.from_map(visited_blocks(image_call(query, key, value, layout, plan, params, scale), spec, plan))
    if lowering.fuses(spec):
        return lowering.attend(query, key, value, spec, layout, plan, lists, params, scale, backend, text_bias)
    out, lse = lowering.exact(query, key, value, layout, plan, lists, scale, backend, text_bias)
    call = image_call(query, key, value, layout, plan, params, scale)
    out, lse = out.to(call.q.dtype).flatten(0, 1), lse.flatten(0, 1)
    image, text = ((out[:, part], lse[:, part]) for part in (layout.image_slice, layout.text_slice))
    return _joined(query, layout, _merged(image, spec, call, lists), text)


def _merged(exact: Partial, spec: AttentionSpec, call: Call, visited: Visited) -> Partial:
    """The image's rows with the rest."""
    if spec.rest is None or spec.merge is None:
        return exact
    call = dataclasses.replace(call, visited=visited)
    return spec.merge(exact, spec.rest(call), call)


def _joined(query: Tensor, layout: TokenLayout, image: Partial, text: Partial) -> tuple[Tensor, Tensor]:
    """The rows of the sequence."""
    parts = [text, image] if layout.text_first else [image, text]
    out, lse = (torch.cat(rows, 1) for rows in zip(*parts, strict=True)) if layout.text else image
    return out.to(query.dtype).unflatten(0, query.shape[:2]), lse.unflatten(0, query.shape[:2])


def image_call(
    query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, plan: Plan, params: Values, scale: float,
    dense: Dense = reference.dense_attention,
) -> Call:  # fmt: skip
    """What the parts are given of a call `[B, H, N, D]`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    q, k, v = (x[:, :, layout.image_slice].to(wide).flatten(0, 1) for x in (query, key, value))
    return Call(q, k, v, query.shape[1], scale, plan.coords, plan.q_blocks, plan.k_blocks, plan.prepared, params, dense=dense)


def visited_blocks(call: Call, spec: AttentionSpec, plan: Plan) -> BlockMap:
    """The static lists of the spec's patterns and, where it has a selection, the blocks chosen for this call in addition."""
    if spec.selection is None:
        return plan.static  # type: ignore[return-value]
    chosen = spec.selection.choose(call)
    return chosen if plan.static is None else listed_beside(plan.static, chosen.index, chosen.valid)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, call: Call, blocks: BlockMap, layout: TokenLayout, plan: Plan, text_bias: Tensor | None
) -> tuple[Partial, Partial]:
    """The exact part in torch: of the image's queries over their blocks and the text, and of the text's over everything."""
    image = reference.block_sparse_attention(
        call.q, call.k, call.v, blocks, plan.q_blocks, plan.k_blocks, scale=call.scale, tables=plan.geometry.tables
    )
    if not layout.text:
        return image, image
    q, k, v = (x.to(call.q.dtype).flatten(0, 1) for x in (query, key, value))
    text, bias = layout.text_slice, None if text_bias is None else text_bias.to(q.dtype).repeat_interleave(query.shape[1], 0)
    over_text = call.dense(call.q, k[:, text], v[:, text], *(() if bias is None else (bias,)), scale=call.scale)
    others = (0, layout.image) if layout.text_first else (layout.image, 0)
    rows = call.dense(q[:, text], k, v, *(() if bias is None else (F.pad(bias, others),)), scale=call.scale)
    return reference.merge_partials([image, over_text]), rows
