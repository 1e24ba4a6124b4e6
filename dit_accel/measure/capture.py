"""Inputs of the attention in a running pipeline, and how far a method is from exact attention on them."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.finetune.data.collect import Forward, Recorder
from dit_accel.finetune.velocity import predict
from dit_accel.kernels import reference
from dit_accel.method import AttentionSpec, Tiles, TopK
from dit_accel.method.parameters import AttentionParameters
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel.ranks import Ranks
from dit_accel.patch.anatomy import find_transformers, forward_names
from dit_accel.patch.modes import always
from dit_accel.patch.state import operators_of
from dit_accel.patch.verbs import accelerate, restore


@dataclass(frozen=True)
class Captured:
    """Queries, keys and values `[B, H, N, D]` of one layer in one forward, and their layout.

    `scale`: of the logits, 1/sqrt(D) where None. `text_bias` `[B, text]`: added to the text keys' logits, -inf where they are padding.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    layout: TokenLayout
    layer: str
    scale: float | None = None
    text_bias: Tensor | None = None

    @property
    def key_bias(self) -> Tensor | None:
        """`text_bias` over all keys, `[B, N]`."""
        if self.text_bias is None:
            return None
        bias = self.text_bias.new_zeros(len(self.text_bias), self.layout.tokens)
        bias[:, self.layout.text_slice] = self.text_bias
        return bias


def original_attention(captured: Captured) -> Tensor:
    """The original attention `[B, H, N, D]` of a layer's inputs, in their dtype."""
    over_keys = captured.key_bias
    mask = None if over_keys is None else over_keys[:, None, None].to(captured.query.dtype)
    return torch.nn.functional.scaled_dot_product_attention(captured.query, captured.key, captured.value, mask, scale=captured.scale)


@contextlib.contextmanager
def attending(transformer: Any, attend: Callable[[Captured], Tensor]) -> Iterator[None]:
    """A function of the inputs in the place of every accelerated layer's method, for the length of a `with` block.

    Raises ArgumentError for a transformer that is spread over processes.
    """
    if Ranks.of(getattr(transformer, "_parallel_config", None)) is not None:
        raise ArgumentError("attention inputs can't be captured while processes share a sequence: capture them in one process")

    def in_place_of(layer: str) -> Callable[..., Tensor]:
        def attended(
            query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None, forward: Any
        ) -> Tensor:
            scale = forward.scaled(scale, key.shape[2], query.shape[3])
            return attend(Captured(query, key, value, layout, layer, scale, bias))

        return attended

    operators = operators_of(transformer)
    try:
        for name, operator in operators.items():
            operator.attend = in_place_of(name)  # type: ignore[method-assign]
        with always(transformer), torch.compiler.set_stance("force_eager"):  # graphs do not call the operators' modules
            yield
    finally:
        for operator in operators.values():
            vars(operator).pop("attend", None)


def capture_inputs(transformer: Any, forward: Forward) -> list[Captured]:
    """The attention inputs of every accelerated layer in one recorded forward, computed with exact attention in the method's place."""
    found: list[Captured] = []

    def attend(captured: Captured) -> Tensor:
        found.append(captured)
        return original_attention(captured)

    with torch.no_grad(), attending(transformer, attend):
        predict(transformer, forward.arguments)
    return found


def capture_qkv(pipe: Any, forward: Forward) -> Iterator[Captured]:
    """The attention inputs of every layer while the original model runs one recorded forward."""
    accelerate(pipe, AttentionSpec((TopK(1.0),), order=Tiles()))
    try:
        found = capture_inputs(find_transformers(pipe)[0], forward)
    finally:
        restore(pipe)
    yield from found


@dataclass(frozen=True)
class Exact:
    """Softmax attention of image queries over all keys: output `[B, H, image, D]` and log of the softmax mass `[B, H, image]`, float32."""

    output: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Deviation:
    """A method against `Exact`, by head `[H]`: squared error and squared size of the output, and the softmax mass that is kept exactly."""

    error: Tensor
    size: Tensor
    mass: Tensor


def exact_attention(captured: Captured) -> Exact:
    """Dense attention of the layer's image tokens."""
    q, k, v = (x.float().flatten(0, 1) for x in (captured.query, captured.key, captured.value))
    heads = captured.query.shape[1]
    bias = None if captured.key_bias is None else captured.key_bias.repeat_interleave(heads, 0)
    scale = captured.query.shape[-1] ** -0.5 if captured.scale is None else captured.scale
    out, lse = reference.dense_attention(q, k, v, bias, scale=scale)
    return Exact(*(x.unflatten(0, (-1, heads))[:, :, captured.layout.image_slice] for x in (out, lse)))


def deviation(captured: Captured, exact: Exact, spec: AttentionSpec, params: AttentionParameters | None = None) -> Deviation:
    """How far a method is from exact attention in one layer; `params`: what it has learned there, its start values unless given."""

    def run(spec: AttentionSpec, params: AttentionParameters | None) -> tuple[Tensor, Tensor]:
        q, k, v, more = captured.query, captured.key, captured.value, {"scale": captured.scale, "text_bias": captured.text_bias}
        out, lse = attention(q, k, v, spec, captured.layout, params=params, return_lse=True, **more)  # type: ignore[call-overload]
        return out[:, :, captured.layout.image_slice].float(), lse[:, :, captured.layout.image_slice]

    out, kept = run(spec, params)
    if spec.rest is not None:
        _, kept = run(dataclasses.replace(spec, rest=None, merge=None, extras=()), None)
    error = (out - exact.output).square().sum((0, 2, 3))
    return Deviation(error, exact.output.square().sum((0, 2, 3)), (kept - exact.lse).exp().mean((0, 2)))


def attention_errors(captured: Captured, specs: dict[str, AttentionSpec]) -> dict[str, tuple[float, float]]:
    """For each spec: relative error of the image tokens' output against dense attention, and the softmax mass of what it keeps exactly."""
    exact = exact_attention(captured)
    found = {name: deviation(captured, exact, spec) for name, spec in specs.items()}
    return {name: ((d.error.sum() / d.size.sum()).sqrt().item(), d.mass.mean().item()) for name, d in found.items()}


def record_step(pipe: Any, size: tuple[int, int], max_sequence_length: int | None = None) -> dict[str, Any]:
    """The denoiser's arguments in the first step of a run at `size` (height, width); the step itself is not computed."""
    call: dict[str, Any] = {"height": size[0], "width": size[1], "num_inference_steps": 1, "output_type": "latent"}
    if max_sequence_length is not None:
        call["max_sequence_length"] = max_sequence_length
    recorders = [Recorder(transformer, forward_names(transformer)) for transformer in find_transformers(pipe)]
    with contextlib.ExitStack() as stack, contextlib.suppress(_Recorded), torch.no_grad():
        for recorder in recorders:
            stack.enter_context(recorder)
            stack.enter_context(_stop_before_forward(recorder.transformer))
        pipe(prompt="a panda on a blue background", generator=torch.Generator().manual_seed(0), **call)
    return next(recorder.arguments for recorder in recorders if recorder.arguments)


class _Recorded(Exception):  # noqa: N818
    """Raised to leave the pipeline once its first step's arguments are known."""


@contextlib.contextmanager
def _stop_before_forward(transformer: Any) -> Iterator[None]:
    def stop(module: Any, args: Any, kwargs: Any) -> None:
        raise _Recorded

    hook = transformer.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
