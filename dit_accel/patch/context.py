"""What the operators of one transformer share: its settings, and the hooks that begin and end a forward at the transformer's boundary."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code

from dit_accel.errors import FallbackError
from dit_accel.kernels import capture, dispatch
from dit_accel.method.assignment import Assignment, Moment, Rules, specs_in, without
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import guard, lowering
from dit_accel.operator.guard import Crossover
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.plans import Plans
from dit_accel.parallel.ranks import Ranks
from dit_accel.patch.checkpointing import carry_forwards
from dit_accel.patch.forward import Forward, current, enter, leave
from dit_accel.patch.heads import Layer
from dit_accel.patch.mask_check import MaskCheck, given
from dit_accel.patch.routing import route
from dit_accel.patch.steps import Steps
from dit_accel.patch.tokens import Known, in_backward, token_of
from dit_accel.pipelines.family import Family, Grids

OUTSIDE = "an attention module that is called outside of its transformer's forward"
PARSED = 4  # position ids whose grids are kept: those of as many runs at once


@dataclass(eq=False)
class Settings:
    """What a user or a mode has chosen for one transformer; this, and nothing else of a context, is pickled and copied.

    `names`: of the transformer's forward arguments. `layers`: that are accelerated; an operator knows its own by its number. `enabled`:
    `dense(...)` switches it off. `always`: run the operators even where the original attention is faster, as training and measuring must.
    `trained`: the weights belong to the operators, so nothing else will do. `moment`: of every forward, where recorded ones are replayed
    one by one; else it is counted.
    `trained_tokens`: of the sequences that the model was trained on, where logits are to be scaled for longer ones, which the original
    attention does not do. `fallbacks`: how many calls ran their original attention, by the reason.
    """

    family: Family
    assignment: Assignment
    names: list[str]
    layers: tuple[Layer, ...]
    steps: Steps
    backend: str
    strict: bool
    trained_tokens: int | None = None
    enabled: bool = True
    always: bool = False
    trained: bool = False
    moment: Moment | None = None
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Context(Settings):
    """The settings of one transformer, and what is remembered from forward to forward: nothing that a result depends on.

    `layout`, `crossovers`: of the last forward in any thread, for `summary`; a spec has a crossover where one was to be measured. `last`:
    that forward; `device`: of its latents. A copy remembers nothing. `tag`: the context's name in compiled graphs; `token`: that of the
    forward while a graph of all of it is traced, else the tag. `known`: contexts and forwards by these names.
    """

    layout: TokenLayout | None = field(default=None, init=False)
    crossovers: dict[AttentionSpec, Crossover] = field(default_factory=dict, init=False)
    last: Forward | None = field(default=None, init=False)
    device: torch.device | None = field(default=None, init=False)
    plans: Plans = field(default_factory=Plans, init=False)
    mask_check: MaskCheck = field(default_factory=MaskCheck, init=False)
    known: dict[Forward | None, Known] = field(default_factory=dict, init=False)
    tag: Tensor = field(init=False)
    token: Tensor = field(init=False)
    _parsed: tuple[tuple[tuple[Any, ...], Grids | str], ...] = field(default=(), init=False)
    _reported: set[tuple[Grids, AttentionSpec]] = field(default_factory=set, init=False)  # reported as left to the original attention
    _agreed: dict[tuple[Any, ...], list[Crossover | None]] = field(default_factory=dict, init=False)  # among processes of one sequence
    _slow: set[str] = field(default_factory=set, init=False)  # what a user was warned of: GPUs without kernels

    def __post_init__(self) -> None:
        self.tag = self.token = token_of(self, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, setting.name) for setting in fields(Settings))

    @property
    def head_dim(self) -> int:
        """Channels per head of the first layer."""
        return self.layers[0].head_dim

    def left_to_original(self, spec: AttentionSpec) -> bool:
        """Whether the last forward left a spec's heads to the original attention because that is faster."""
        crossover = self.crossovers.get(spec)
        return crossover is not None and crossover.loses and not self._never_guarded(torch.is_grad_enabled())

    def _never_guarded(self, gradient: bool) -> bool:
        """Whether the method runs at every size, because it was asked for by name or its weights require it: nothing is measured then."""
        asked = self.backend != "auto" or self.strict or self.always or not self.enabled
        return asked or self.trained or self.trained_tokens is not None or gradient

    def fall_back(self, reason: str) -> None:
        """Record that a call runs its original attention: counted, a warning the first time, an error under strict."""
        if self.strict:
            raise FallbackError(f"strict=True requires every layer to be accelerated, but this call has {reason}")
        if reason not in self.fallbacks:
            warnings.warn(f"dit_accel: original attention for calls with {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def forward(self) -> Forward | None:
        """The forward that is running in this thread, or None.

        In a backward pass outside of one, blocks are recomputed that another checkpointing than diffusers' own dropped: the last one then.
        """
        found = current(self)
        return self.last if found is None and in_backward() else found

    def takes(self, forward: Forward | None, layer: Layer, q_len: int, kv_len: int, mask: object, special: str | None) -> bool:
        """Whether a call within a forward, or outside of any, is accelerated; one that should be and can't is recorded. See `route`."""
        if not self.enabled:
            return False
        if forward is None:
            self.fall_back(OUTSIDE)
            return False
        if forward.active and not forward.runs(layer):
            return False
        taken, reason = route(forward, layer.image_only, q_len, kv_len, mask, special)
        if taken:
            self.layout = forward.layout(layer.image_only, kv_len)
        elif reason is not None:
            self.fall_back(reason)
        return taken

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: begin a forward. Its arguments are left as they are: tokens keep the model's own order."""
        if torch.compiler.is_compiling():
            self._trace(dict(zip(self.names, args, strict=False)) | kwargs, module)
        else:
            self._begin_eagerly(module, args, kwargs)

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Forward hook, also called after an exception: end the forward."""
        if torch.compiler.is_compiling():
            self.token = self.tag
        else:
            leave(self)

    @torch.compiler.disable
    def _begin_eagerly(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.enabled:
            return
        if torch.is_grad_enabled():
            carry_forwards(module)
        enter(self, self._read(dict(zip(self.names, args, strict=False)) | kwargs, module))

    def _trace(self, arguments: dict[str, Any], transformer: Any) -> None:
        """`before` in a graph of the whole transformer: its operators do the same when they run."""
        family = self.family
        names = [name for name in family.ids if arguments.get(name) is not None]
        grids: Grids | str = () if family.ids else family.grid(arguments, transformer)
        words = "\n".join(f"{name}={value}" for name, value in arguments.items() if isinstance(value, str)) if family.ids else ""
        text, history = family.lengths(arguments, transformer)
        self.token = torch.ops.dit_accel.begin(
            self.tag, _first(arguments[family.latents]), arguments.get(family.timestep),
            [arguments[name] for name in names], "\n".join(names), words,
            [] if isinstance(grids, str) else [n for grid in grids for n in grid], grids if isinstance(grids, str) else "", text, history,
            list(given(arguments)), torch.is_grad_enabled(),
        )  # fmt: skip

    def _read(self, arguments: Mapping[str, Any], transformer: Any) -> Forward:
        """The forward with these arguments."""
        grids, (text, history) = self.grids(arguments, transformer), self.family.lengths(arguments, transformer)
        latents, timestep = _first(arguments[self.family.latents]), arguments.get(self.family.timestep)
        ranks = Ranks.of(getattr(transformer, "_parallel_config", None))
        masks = list(given(arguments))
        return self.begin(grids, text, history, timestep, latents, masks, gradient=torch.is_grad_enabled(), ranks=ranks)

    def begin(
        self, grids: Grids | str, text: int | None, history: int, timestep: Tensor | None, latents: Tensor, given_masks: list[Tensor], *,
        gradient: bool, ranks: Ranks | None = None,
    ) -> Forward:  # fmt: skip
        """The forward with these grids, or with a reason why they are not known; to be called once per forward."""
        family, trained_tokens = self.family, self.trained_tokens
        if isinstance(grids, str):
            self.layout, self.crossovers = None, {}
            self.fall_back(grids)
            return Forward(family, Rules(), (), text, history, trained_tokens, self.plans, active=False)
        if self.enabled and self.backend == "auto":
            self._warn_if_slow(latents)
        moment = self.moment
        if moment is None and self.enabled and self.assignment.of_moments:
            moment = self.steps.moment(timestep, latents, rising=family.timestep_rises)
        forward = Forward(family, Rules(), grids, text, history, trained_tokens, self.plans, active=True)
        rules = self.assignment.at(moment, forward.image)
        measured = self._measured(forward, specs_in(rules), latents, gradient, ranks)
        rules = without(rules, frozenset(spec for spec, found in measured.items() if found.loses))
        forward = replace(forward, rules=rules)
        active = self.enabled and bool(specs_in(rules))
        if active and self.mask_check.hides_image(given_masks, forward):
            active = False
            self.fall_back("an attention mask over image tokens")
        forward = replace(forward, active=active)
        self.last, self.device, self.crossovers = forward, latents.device, measured
        self.layout = forward.layout(False, forward.image + (text or 0))
        return forward

    def grids(self, arguments: Mapping[str, Any], transformer: Any) -> Grids | str:
        """The grids of the images, or why they are not known."""
        ids = tuple(arguments.get(name) for name in self.family.ids)
        for known, grids in self._parsed:  # parsing ids waits for the device; pipelines reuse one tensor for all steps
            if ids and all(a is b for a, b in zip(ids, known, strict=True)):
                return grids
        device = _first(arguments[self.family.latents]).device
        if any(isinstance(x, Tensor) and x.device == device for x in ids):
            capture.refuse(device, "the grid is read from position ids: captured ones must be the tensors of the run before")
        grids = self.family.grid(arguments, transformer)
        if ids:
            self._parsed = ((ids, grids), *self._parsed[: PARSED - 1])
        return grids

    def _measured(
        self, forward: Forward, specs: tuple[AttentionSpec, ...], latents: Tensor, gradient: bool, ranks: Ranks | None
    ) -> dict[AttentionSpec, Crossover]:
        """Whether each spec or the original attention is faster at this size, where that decides; a warning once where the original is.

        Processes that share the sequence must run the same: the first of them measures.
        """
        if self._never_guarded(gradient):
            return {}
        layout = forward.layout(False, forward.image + (forward.text or 0))

        def ask() -> list[Crossover | None]:
            return [guard.measured(spec, layout, self.head_dim, latents.dtype, latents.device) for spec in specs]

        if ranks is None or not specs:
            asked = ask()
        else:
            question = (specs, layout.grids, latents.dtype, ranks)
            asked = self._agreed[question] = self._agreed[question] if question in self._agreed else ranks.agreed(ask)
        known = {spec: found for spec, found in zip(specs, asked, strict=True) if found is not None}
        for spec, found in known.items():
            if not found.loses or (forward.grids, spec) in self._reported:
                continue
            self._reported.add((forward.grids, spec))
            which = f" in the place of {spec}" if len(self.assignment.specs) > 1 else ""
            sizes = " and ".join("×".join(str(n) for n in (grid[1:] if grid[0] == 1 else grid)) for grid in forward.grids)
            warnings.warn(
                f"dit_accel: the original attention runs at {sizes} tokens{which}, because it is faster there: {found}. "
                "accelerate(..., strict=True) runs the method all the same",
                stacklevel=2,
            )
        return known

    def _warn_if_slow(self, latents: Tensor) -> None:
        """Warn once that a GPU runs the eager reference, and what to install; here, because a model may be moved after `accelerate`."""
        linear = any(lowering.has_states(spec) for spec in self.assignment.specs)
        slow = dispatch.slow_on_gpu(latents.device, latents.dtype, self.head_dim, linear=linear)
        if slow is not None and slow not in self._slow:
            self._slow.add(slow)
            warnings.warn(f"dit_accel: {slow}", stacklevel=2)


# A compiled transformer's hooks run in frames of their own, outside of its graph: those frames are not compiled. Within the graph of a
# function that calls the transformer they are traced.
for hook in (Context.before, Context.after):
    skip_code(hook.__code__)


def _first(value: Any) -> Tensor:
    """The tensor, or the first of a list of them."""
    while isinstance(value, list | tuple):
        value = value[0]
    tensor: Tensor = value
    return tensor
