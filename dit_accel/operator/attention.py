"""`attention`: the one operator that every method is. It knows specs and layouts; the arithmetic is in `kernels`.

Letters: B batch, H heads, N tokens (text and image), D channels per head, T blocks. Words: `density` share of key blocks kept, `kept` and
`rest`, `grid` (T, H, W) in tokens, `block` in memory, `tile` in space, `lse` natural logarithm of softmax mass.
"""

import functools
from typing import Literal, overload

import torch
from torch import Tensor

import dit_accel.operator.bfloat16  # noqa: F401  the kernels ask it what computes bfloat16
from dit_accel.kernels import capture, dispatch
from dit_accel.kernels.memory import Readers
from dit_accel.method.parameters import AttentionParameters, Values
from dit_accel.method.parts.call import Far
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import composition, lowering
from dit_accel.operator.blocks_of_grid import Plan
from dit_accel.operator.layout import Layouts, TokenLayout
from dit_accel.operator.plans import RECENT


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, *, params: AttentionParameters | None = None,
    scale: float | None = None, text_bias: Tensor | None = None, backend: str = "auto", return_lse: Literal[False] = False,
) -> Tensor: ...  # fmt: skip


@overload
def attention(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout, *, params: AttentionParameters | None = None,
    scale: float | None = None, text_bias: Tensor | None = None, backend: str = "auto", return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    layout: TokenLayout,
    *,
    params: AttentionParameters | None = None,
    scale: float | None = None,
    text_bias: Tensor | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The attention that `spec` describes, over the tokens that `layout` describes.

    Args:
        query: `[B, H, N, D]`, floating, after q/k norm and rotary embedding; N = layout.tokens.
        key: of the query's shape, dtype and device. Under autocast all three are cast to its dtype first, as
            `scaled_dot_product_attention` casts them, and may differ in dtype.
        value: the same.
        spec: the method.
        layout: the grid of the image's tokens, their order in memory, the text's length and place.
        params: the method's learned part from `spec.make_parameters`; None means its start values.
        scale: of the logits; 1/sqrt(D) unless given.
        text_bias: `[B, layout.text]`, any floating dtype, natural-log units: added to the scaled logits of the text's keys, for every
            query. -inf masks a key: it is never attended, and neither its key nor its value changes anything. Not differentiated.
        backend: "auto", "cpu" (compiled kernels), "triton" (fused GPU kernels), "xformers" (its attention for
            the dense parts, without gradients) or "reference".
        return_lse: also return the natural log of the softmax mass `[B, H, N]` (float32; of the exact part under `Residual`).

    Returns the output `[B, H, N, D]` in the input's dtype, under autocast in autocast's. Differentiable in query, key, value and the
    parameters; the selection is not.
    Raises ValueError for shapes, dtypes, devices or parameters that don't fit and for a text_bias that requires grad, BackendError for a
    backend that can't run the call.
    """
    query, key, value = autocast(query, key, value)
    check_inputs(query, key, value, layout)
    if params is None:
        values = _frozen_start_values(spec, query)
    else:
        values = params()
        check_parameters(values, spec, query)
    check_text_bias(text_bias, query, layout)
    chosen = _choose(backend, spec, values, text_bias, query, key, value)
    if not torch.compiler.is_compiling():
        dispatch.warn_of_reference(backend, query.device)
    plan = RECENT.get(spec, layout, query.device)
    out, lse = _planned(query, key, value, spec, layout, plan, values, scale, chosen, text_bias)
    return (out, lse) if return_lse else out


def attend(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout | Layouts, plan: Plan, params: Values,
    scale: float | None, backend: str, *, text_bias: Tensor | None = None, far: Far | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`attention` without its checks of all but dtypes and `text_bias`, for callers that have the plan already: output and lse.

    `layout`, `far`: see `composition.attend`.
    """
    query, key, value = autocast(query, key, value)
    check_dtypes(query, key, value)
    check_text_bias(text_bias, query, layout.k if isinstance(layout, Layouts) else layout)
    chosen = _choose(backend, spec, params, text_bias, query, key, value)
    return _planned(query, key, value, spec, layout, plan, params, scale, chosen, text_bias, far)


def _planned(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, layout: TokenLayout | Layouts, plan: Plan, params: Values,
    scale: float | None, chosen: str, text_bias: Tensor | None, far: Far | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if not torch.compiler.is_compiling():
        capture.keep(query.device, plan)  # plans are cached for a while only, and a graph reads this one at every replay
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    run = functools.partial(composition.attend, query, key, value, spec, layout, plan, params, scale, chosen, text_bias, far)
    device = query.device.type
    if device != "meta" and not torch.is_autocast_enabled(device):
        return run()
    # it has done its part: the accumulators, the lse and the learned projection stay in float32 (float64 for float64 inputs)
    with torch.autocast(device, enabled=False):
        return run()


def _choose(backend: str, spec: AttentionSpec, params: Values, text_bias: Tensor | None, *tensors: Tensor) -> str:
    """The backend for this call."""
    query = tensors[0]
    return dispatch.choose(
        backend, query.device, query.dtype, query.shape[-1], linear=lowering.has_states(spec),
        gradient=lambda: _through_keys(spec, params, tensors), text_bias=text_bias is not None,
    )[0]  # fmt: skip


def _through_keys(spec: AttentionSpec, params: Values, tensors: tuple[Tensor, ...]) -> bool:
    """Whether a gradient passes through the attention: also where the rest has learned tensors, which may be in keys."""
    if not torch.is_grad_enabled() or any(x.requires_grad for x in tensors):
        return torch.is_grad_enabled()
    learns = [name for name, value in params.items() if value.requires_grad]
    if not learns or spec.rest is None:
        return False
    heads, head_dim = tensors[0].shape[1], tensors[0].shape[3]
    return any(name in part.parameters(heads, head_dim) for part in spec.rest.nested() for name in learns)


def start_values(spec: AttentionSpec, query: Tensor) -> AttentionParameters:
    """The spec's parameters at their start values, frozen, on the query's device."""
    params = spec.make_parameters(heads=query.shape[1], head_dim=query.shape[3])
    if any(True for _ in params.parameters()):
        capture.refuse(query.device, "the method's parameters are made and copied to the card; hand them over as `params`")
    return params.to(query.device).requires_grad_(False)


def _frozen_start_values(spec: AttentionSpec, query: Tensor) -> Values:
    """The same as the parts are given them, copied to the device once for all calls."""
    if torch.compiler.is_compiling():
        return start_values(spec, query)()
    values = kept_start_values(spec, query.shape[1], query.shape[3], query.device)
    capture.keep(query.device, values)
    return values


def kept_start_values(spec: AttentionSpec, heads: int, head_dim: int, device: torch.device) -> Values:
    """The spec's parameters at their start values, frozen, as the parts are given them, for the current stream; made once."""
    values, readers = _kept_start_values(spec, heads, head_dim, device)
    readers.join()
    return values


@functools.lru_cache(maxsize=64)
@torch.inference_mode(False)  # the tensors must serve training as well
def _kept_start_values(spec: AttentionSpec, heads: int, head_dim: int, device: torch.device) -> tuple[Values, Readers]:
    values = start_values(spec, torch.empty(1, heads, 0, head_dim, device=device))()
    return values, Readers(values.values())


@functools.lru_cache(maxsize=256)
def _parameter_shapes(spec: AttentionSpec, heads: int, head_dim: int) -> dict[str, tuple[int, ...]]:
    """Of the spec's parameters by name."""
    return {name: tuple(x.shape) for name, x in spec.start_values(heads=heads, head_dim=head_dim).items()}


def check_inputs(query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError unless the three are `[B, H, N, D]` of one dtype and device with N = layout.tokens."""
    if query.ndim != 4 or key.shape != query.shape or value.shape != query.shape:
        raise ValueError(
            f"query, key and value must have one shape [B, H, N, D], not {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        )
    if query.shape[2] != layout.tokens:
        raise ValueError(f"the layout {layout.grid} with {layout.text} text tokens requires {layout.tokens} tokens, not {query.shape[2]}")
    check_dtypes(query, key, value)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast gives to attention on their device; as they are without autocast and where they are float64."""
    device = tensors[0].device.type
    # asked of torch.amp.is_autocast_available, torch.compile would break its graph under torch 2.11
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def check_dtypes(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise ValueError unless the three have one floating dtype and one device."""
    if not query.is_floating_point() or len({(x.dtype, x.device) for x in (query, key, value)}) > 1:
        raise ValueError(
            "query, key and value must have one floating dtype and be on one device, not "
            + ", ".join(f"{x.dtype} on {x.device}" for x in (query, key, value))
            + ": convert or move them first"
        )


def check_text_bias(text_bias: Tensor | None, query: Tensor, layout: TokenLayout) -> None:
    """Raise ValueError unless the bias is `[B, layout.text]`, floating, on the query's device and without a gradient."""
    if text_bias is None:
        return
    expected = (query.shape[0], layout.text)
    if tuple(text_bias.shape) != expected:
        raise ValueError(f"text_bias must have shape [batch, text], here {expected}, not {tuple(text_bias.shape)}")
    if not text_bias.is_floating_point() or text_bias.device != query.device:
        raise ValueError(f"text_bias must be floating and on {query.device}, not {text_bias.dtype} on {text_bias.device}")
    if text_bias.requires_grad:
        raise ValueError("text_bias is not differentiated, but requires grad: detach it")


def check_parameters(params: Values, spec: AttentionSpec, query: Tensor) -> None:
    """Raise ValueError unless the parameters have the names and shapes of the spec's own, on the query's device."""
    expected = _parameter_shapes(spec, query.shape[1], query.shape[3])
    given = {name: tuple(x.shape) for name, x in params.items()}
    if expected != given:
        raise ValueError(f"{spec} on {query.shape[1]} heads of {query.shape[3]} requires parameters {expected}, not {given}")
    elsewhere = sorted({str(x.device) for x in params.values() if x.device != query.device})
    if elsewhere:
        raise ValueError(f"the parameters must be on {query.device}, not on {elsewhere}")
