"""The operator, put together: choose blocks, exact part, rest, merge, extras. One way for every backend.

The exact part (kept keys and text for the image's queries, all keys for the text's) runs in the backend's kernels; the rest and the merge
are what the spec's parts say in torch, but where one call of the compiled kernels does both of them (`lowering`); extras always are.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from dit_accel.kernels import ops, reference, xformers_rows
from dit_accel.kernels.blocks import BlockMap
from dit_accel.kernels.reference import Partial
from dit_accel.method.parameters import Values
from dit_accel.method.parts import Call
from dit_accel.method.parts.call import Far
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import lowering
from dit_accel.operator.blocks_of_grid import Plan, with_chosen
from dit_accel.operator.layout import Layouts, TokenLayout, layouts_of
from dit_accel.operator.lists import Lists
from dit_accel.operator.plans import tensors_of

Dense = Callable[..., Partial]  # `reference.dense_attention`, or xformers' with the same arguments but the bias


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout | Layouts, plan: Plan, params: Values,
    scale: float, backend: str, text_bias: Tensor | None = None, far: Far | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, H, Nq, D]`, in the query's dtype, and lse `[B, H, Nq]`, by a backend's exact part.

    `layout`: of all tokens, or, where key and value `[B, H, Nk, D]` are other tokens than query, `layouts_of` both; then the plan's query
    blocks are of the query's tokens, all else in it is of the keys'. `far`: where these keys are some of all, what the rest requires of the
    others (`Rest.far`). Raises ValueError where parts of the spec require that queries and keys are the same tokens, and where inputs have
    forward-mode tangents, which compiled kernels would leave out.
    """
    if isinstance(layout, Layouts) and (own := [part for part in spec.parts() if part.own_tokens]):
        raise ValueError(f"{own[0]} requires that queries and keys are the same tokens: give one layout, or leave the part out")
    layouts = layout if isinstance(layout, Layouts) else layouts_of(layout, layout)
    if backend in lowering.COMPILED:
        if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
            _refuse_tangents(query, key, value)
        run = functools.partial(_compiled, query, key, value, spec, layouts, plan, params, scale, backend, text_bias, far)
        if torch.compiler.is_compiling() or far is not None or not lowering.compiles(spec):
            return run()
        tensors = (query, key, value, text_bias, *params.values())
        about = layouts.q.text, layouts.k.text, layouts.text_first, scale, tuple(params)
        return ops.as_one(backend, plan.records, about, tensors, lambda: tensors_of(plan), run)
    dense = xformers_rows.dense_attention if backend == "xformers" else reference.dense_attention
    call = _image_call(query, key, value, layouts, plan, params, scale, dense)
    blocks = visited_blocks(call, spec, plan)
    image, text = _eager(query, key, value, call, blocks, layouts, plan, text_bias)
    call = dataclasses.replace(call, visited=blocks)
    return _joined(query, layouts.q, _changed(_merged(image, spec, call, far), spec, call), text)


def _refuse_tangents(*inputs: Tensor) -> None:
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise ValueError('compiled kernels have no forward-mode derivatives: use backend="reference", or backward()')


def _compiled(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layouts: Layouts, plan: Plan, params: Values, scale: float,
    backend: str, text_bias: Tensor | None, far: Far | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = functools.partial(_image_call, query, key, value, layouts, plan, params, scale)
    made = lowering.summaries(query, key, value, spec, layouts, plan, scale, backend)
    if lowering.selects(spec):
        lists, chosen = lowering.lists(query, key, value, spec, layouts, plan, params, scale, backend, made)
    else:
        lists, chosen = Lists.from_map(visited_blocks(given(), spec, plan)), {}
    fused = lowering.fuses(spec)
    if fused:
        if far is not None:
            rest = lowering.rest_of_far(spec, far, query.shape[1], params)
        else:
            rest = lowering.rest_of(key, value, spec, layouts, plan, params, scale, lists, made, chosen, backend)
        out, lse = lowering.attend(query, key, value, layouts, plan, lists, scale, backend, text_bias, rest)
        if not spec.extras:
            return out, lse
    else:
        out, lse = lowering.exact(query, key, value, layouts, plan, lists, scale, backend, text_bias)
    call = dataclasses.replace(given(), visited=lists)
    out, lse = out.to(call.q.dtype).flatten(0, 1), lse.flatten(0, 1)
    image, text = ((out[:, part], lse[:, part]) for part in (layouts.q.image_slice, layouts.q.text_slice))
    if not fused:
        image = _merged(image, spec, call, far)
    return _joined(query, layouts.q, _changed(image, spec, call), text)


def _merged(exact: Partial, spec: AttentionSpec, call: Call, far: Far | None) -> Partial:
    """The image's rows with the rest."""
    if spec.rest is None or spec.merge is None:
        return exact
    rest = spec.rest(call) if far is None else spec.rest.over(call, far)
    return spec.merge(exact, rest, call)


def _changed(image: Partial, spec: AttentionSpec, call: Call) -> Partial:
    """The image's rows after the extras."""
    out, lse = image
    for extra in spec.extras:
        out = extra(out, call)
    return out, lse


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
    return _image_call(query, key, value, layouts_of(layout, layout), plan, params, scale, dense)


def _image_call(
    query: Tensor, key: Tensor, value: Tensor, layouts: Layouts, plan: Plan, params: Values, scale: float,
    dense: Dense = reference.dense_attention,
) -> Call:  # fmt: skip
    wide, (of_q, of_k) = torch.promote_types(query.dtype, torch.float32), layouts
    q, k, v = (x[:, :, side.image_slice].to(wide).flatten(0, 1) for x, side in ((query, of_q), (key, of_k), (value, of_k)))
    sides = plan.coords, plan.q_blocks, plan.k_blocks
    return Call(q, k, v, query.shape[1], scale, *sides, plan.prepared, params, dense=dense, grids=plan.key[1])


def visited_blocks(call: Call, spec: AttentionSpec, plan: Plan) -> BlockMap:
    """The static lists of the spec's patterns and, where it has a selection, the blocks chosen for this call in addition."""
    if spec.selection is None:
        return plan.static  # type: ignore[return-value]
    chosen = spec.selection.choose(call)
    return chosen if plan.static is None else with_chosen(plan.static, chosen.index, chosen.valid)


def _eager(
    query: Tensor, key: Tensor, value: Tensor, call: Call, blocks: BlockMap, layouts: Layouts, plan: Plan, text_bias: Tensor | None
) -> tuple[Partial, Partial]:
    """The exact part in torch: of the image's queries over their blocks and the text, and of the text's over everything."""
    image = reference.block_sparse_attention(
        call.q, call.k, call.v, blocks, plan.q_blocks, plan.k_blocks, scale=call.scale, tables=plan.geometry.tables
    )
    queries, keys = layouts
    if not (queries.text or keys.text):
        return image, image
    q, k, v = (x.to(call.q.dtype).flatten(0, 1) for x in (query, key, value))
    bias = None if text_bias is None or not keys.text else text_bias.to(q.dtype).repeat_interleave(query.shape[1], 0)
    if keys.text:
        over_text = call.dense(
            call.q, k[:, keys.text_slice], v[:, keys.text_slice], *(() if bias is None else (bias,)), scale=call.scale
        )  # fmt: skip
        image = reference.merge_partials([image, over_text])
    if not queries.text:
        return image, image
    others = (0, keys.image) if keys.text_first else (keys.image, 0)
    return image, call.dense(q[:, queries.text_slice], k, v, *(() if bias is None else (F.pad(bias, others),)), scale=call.scale)
