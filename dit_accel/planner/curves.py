"""What each candidate would do to the model's prediction in each layer and head, from one recorded forward: measured, not substituted.

To first order a difference δ in the output of a head changes the prediction by J·δ, whose squared size is E⟨r, J·δ⟩² = E⟨Jᵀr, δ⟩² over
random r of independent normal numbers. One backward pass from r gives Jᵀr of all layers and heads at once, and all candidates share it; δ
is computed from the layer's own q, k and v. The mean over a few r scatters, so ⟨Jᵀr, δ⟩² is summed over blocks of neighbouring tokens:
what two blocks do to the prediction is taken as unrelated, which scatters far less (built-in model, 512 px, 8 probes, 360 substitutions of
one head: the logarithm of estimate over truth has a standard deviation of 0.28, and of 0.54 without blocks).
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.finetune.data.collect import Forward
from dit_accel.finetune.surroundings import model_kept
from dit_accel.finetune.velocity import on_device, predict
from dit_accel.measure.capture import Captured, attending, original_attention
from dit_accel.method import AttentionSpec, TopK
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout, joint_memory_order
from dit_accel.patch.anatomy import require_family
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.planner.candidates import Candidates, seconds
from dit_accel.planner.trained import Trained

TOGETHER = 64  # tokens, neighbours in memory, whose effects on the prediction are added before they are squared
LARGE = 2**31  # bytes of weights from which on activations are computed again in the backward pass


@dataclass(frozen=True)
class Shape:
    """Of a layer's calls in one forward: the layout, channels per head, and how many calls there are."""

    layout: TokenLayout
    head_dim: int
    calls: int

    def plain(self) -> list[Any]:
        """JSON-ready."""
        return [self.layout.grids, self.layout.text, self.layout.text_first, self.head_dim, self.calls]

    @classmethod
    def read(cls, data: list[Any]) -> "Shape":
        grids, text, first, head_dim, calls = data
        image, *references = (tuple(grid) for grid in grids)
        return cls(TokenLayout(image, text, first, references=tuple(references)), head_dim, calls)


@dataclass(frozen=True)
class Measured:
    """Of one forward, by layer. `curves`: `[H, C]`, what each candidate in each head adds to the squared relative error of the
    prediction."""

    curves: dict[str, Tensor]
    shapes: dict[str, Shape]


@dataclass(frozen=True)
class Call:
    """One call of a layer: its inputs, and its output as it is in the forward's graph."""

    inputs: Captured
    output: Tensor


@contextlib.contextmanager
def prepared(transformer: Any, spec: AttentionSpec) -> Iterator[Any]:
    """A transformer whose attention can be watched and differentiated for the length of a `with` block, in a spec's order; afterwards all
    is as it was."""
    with model_kept(transformer):
        transformer.requires_grad_(False)
        large = sum(p.numel() * p.element_size() for p in transformer.parameters()) > LARGE
        accelerate(transformer, AttentionSpec((TopK(1.0),), order=spec.order, block=spec.block))
        try:
            if large and getattr(transformer, "_supports_gradient_checkpointing", False):
                transformer.enable_gradient_checkpointing()
            yield transformer
        finally:
            restore(transformer)


def measure(
    transformer: Any, forward: Forward, specs: Sequence[AttentionSpec | None], *, probes: int, seed: int, trained: Trained | None = None
) -> Measured:
    """The curves of one recorded forward of a `prepared` transformer, of each candidate; None is the original attention, with zeros.

    `probes`: random directions of the prediction, each a backward pass. `trained`: what specs have learned, else their start values.
    Layers whose calls aren't accelerated are left out; raises PlanError where that is all of them.
    """
    size, calls, gradients = _differentiated(transformer, forward, probes, seed)
    found: dict[str, Tensor] = {}
    shapes: dict[str, Shape] = {}
    with torch.no_grad():
        for call, own in zip(calls, gradients, strict=True):
            name, errors = call.inputs.layer, _errors(call, own, specs, trained) / size
            before = shapes.get(name)
            shapes[name] = Shape(call.inputs.layout, call.inputs.query.shape[-1], 1 if before is None else before.calls + 1)
            found[name] = errors if before is None else found[name] + errors
    return Measured(found, shapes)


def check_finite(found: Measured, specs: Sequence[AttentionSpec | None], noise: float) -> None:
    """Raise PlanError, naming layer, candidate and noise level, where an error is no finite number; `specs`: those of `curves`."""
    for layer, errors in found.curves.items():
        broken = (~errors.isfinite()).any(0).nonzero().flatten().tolist()
        if not broken:
            continue
        spec = specs[broken[0]]
        if spec is None:
            raise PlanError(
                f"the original model's prediction is not finite at noise level {noise:g}: load the pipeline in a dtype with a larger "
                "range, bfloat16 or float32"
            )
        raise PlanError(
            f"the error of {spec} in {layer} at noise level {noise:g} is not a finite number: leave this candidate out of specs, or "
            "load the pipeline in a dtype with a larger range, bfloat16 or float32"
        )


def _differentiated(transformer: Any, forward: Forward, probes: int, seed: int) -> tuple[float, list[Call], list[list[Tensor]]]:
    """The squared size of a prediction with exact attention, every call of its layers, and of each call its output's gradients from the
    probes, on the CPU."""
    calls: list[Call] = []
    recording = True

    def attend(captured: Captured) -> Tensor:
        out = original_attention(captured)
        if not out.requires_grad:
            out.requires_grad_()  # where the graph begins
        if recording:  # gradient checkpointing calls once more
            query, key, value = (x.detach() for x in (captured.query, captured.key, captured.value))
            calls.append(Call(replace(captured, query=query, key=key, value=value), out))
        return out

    with attending(transformer, attend), torch.enable_grad():
        prediction = predict(transformer, forward.arguments)
        recording = False
        if not calls:
            raise PlanError(f"no layer of {type(transformer).__name__} would be accelerated in these calls: summary(pipe) tells why")
        generator = torch.Generator().manual_seed(seed)
        gradients: list[list[Tensor]] = [[] for _ in calls]
        for number in range(probes):
            probe = torch.randn(prediction.shape, generator=generator).to(prediction)
            outputs = [call.output for call in calls]
            found = torch.autograd.grad(prediction, outputs, probe, retain_graph=number + 1 < probes, allow_unused=True)
            for own, gradient, call in zip(gradients, found, calls, strict=True):
                own.append((torch.zeros_like(call.output) if gradient is None else gradient).cpu())
    size = max(float(prediction.detach().float().square().sum()), 1e-30)
    return size, [replace(call, output=call.output.detach()) for call in calls], gradients


def first_grid(transformer: Any, forward: Forward) -> tuple[int, int, int]:
    """The grid of a recorded forward's image."""
    family = require_family(transformer)
    arguments = on_device(forward.arguments, next(transformer.parameters()).device)
    grids = family.grid(arguments, transformer)
    if isinstance(grids, str):
        raise PlanError(f"the grid of {type(transformer).__name__} isn't known in these calls: {grids}")
    return grids[0]


def measured_seconds(transformer: Any, forward: Forward, specs: Candidates) -> dict[str, list[Any]]:
    """The costs of each layer of a `prepared` transformer in seconds, JSON-ready; layers of one shape are measured once."""
    found: dict[str, list[Any]] = {}
    known: dict[Any, list[Any]] = {}

    def attend(captured: Captured) -> Tensor:
        shape = (captured.layout, captured.query.shape)
        if captured.layer not in found:
            if shape not in known:
                known[shape] = seconds(specs, captured).plain()
            found[captured.layer] = known[shape]
        return original_attention(captured)

    with attending(transformer, attend), torch.no_grad():
        predict(transformer, forward.arguments)
    return found


def _errors(call: Call, gradients: Sequence[Tensor], specs: Sequence[AttentionSpec | None], trained: Trained | None) -> Tensor:
    """E ‖J·δ‖² of each head and candidate in one call, `[H, C]` float32 on the CPU."""
    inputs = call.inputs
    image, heads = inputs.layout.image_slice, inputs.query.shape[1]
    exact = call.output[:, :, image].float()
    device = exact.device
    columns = []
    for spec in specs:
        if spec is None:
            columns.append(torch.zeros(heads))
            continue
        params = None if trained is None else trained.parameters(spec, inputs.layer, heads, inputs.query.shape[-1]).to(device)
        out = attention(
            inputs.query, inputs.key, inputs.value, spec, inputs.layout, params=params, scale=inputs.scale, text_bias=inputs.text_bias
        )
        difference = out[:, :, image].float() - exact
        order = joint_memory_order(inputs.layout.grids, spec.order).to(device)
        total = torch.zeros(heads, device=device)
        for gradient in gradients:
            effect = (gradient.to(device)[:, :, image].float() * difference).sum(-1)[..., order]
            blocks = F.pad(effect, (0, -effect.shape[-1] % TOGETHER)).unflatten(-1, (-1, TOGETHER)).sum(-1)
            total += blocks.square().sum((0, 2))
        columns.append((total / len(gradients)).cpu())
    return torch.stack(columns, 1)
