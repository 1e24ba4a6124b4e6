"""What the operators of one transformer share: its settings, and the hooks that begin and end a forward at the transformer's boundary."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.eval_frame import skip_code

from dit_accel import crossover
from dit_accel.checkpointing import carry_forwards
from dit_accel.crossover import Crossover
from dit_accel.errors import FallbackError
from dit_accel.forward import Forward, current, enter, leave
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.family import Family, Grids
from dit_accel.routing import route
from dit_accel.spec import AttentionSpec, Raster
from dit_accel.steps import Steps
from dit_accel.tokens import Known, in_backward, token_of

OUTSIDE = "an attention module that is called outside of its transformer's forward"
PARSED = 4  # position ids whose grids are kept: those of as many runs at once


@dataclass(eq=False)
class Settings:
    """What a user or a mode has chosen for one transformer; this, and nothing else of a context, is pickled and copied.

    `names`: of the transformer's forward arguments. `enabled`: `dense(...)` switches it off. `in_order`: permute tokens even while off, so
    that a teacher's layers line up with the student's. `always`: run the operators even where the original attention is faster, as training
    and measuring must. `trained`: the weights belong to the operators, so nothing else will do. `trained_tokens`: of the sequences that the
    model was trained on, where logits are to be scaled for longer ones, which the original attention does not do. `fallbacks`: how many
    calls ran their original attention, by the reason.
    """

    family: Family
    spec: AttentionSpec
    names: list[str]
    head_dim: int
    steps: Steps
    dense_steps: int
    backend: str
    strict: bool
    trained_tokens: int | None = None
    enabled: bool = True
    in_order: bool = False
    always: bool = False
    trained: bool = False
    fallbacks: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Context(Settings):
    """The settings of one transformer, and what is remembered from forward to forward: nothing that a result depends on.

    `layout`, `crossover`: of the last forward in any thread, for `summary`; the crossover is None where nothing was to be measured. `last`:
    that forward. A copy remembers nothing. `tag`: the context's name in compiled graphs; `token`: that of the forward while a graph of
    all of it is traced, else the tag. `known`: what such names stand for.
    """

    layout: TokenLayout | None = field(default=None, init=False)
    crossover: Crossover | None = field(default=None, init=False)
    last: Forward | None = field(default=None, init=False)
    known: dict[Forward | None, Known] = field(default_factory=dict, init=False)
    tag: Tensor = field(init=False)
    token: Tensor = field(init=False)
    _parsed: tuple[tuple[tuple[Any, ...], Grids | str], ...] = field(default=(), init=False)
    _said: set[Grids] = field(default_factory=set, init=False)  # grids of which a user was told that they are left to the original

    def __post_init__(self) -> None:
        self.tag = self.token = token_of(self, None)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, setting.name) for setting in fields(Settings))

    def switch(self, spec: AttentionSpec) -> None:
        """Go on with another spec of the same order from the next forward on."""
        self.spec, self.layout = spec, None

    @property
    def leaves(self) -> bool:
        """Whether the last forward's grid is left to the original attention because that is faster."""
        return self._leaves(self.crossover, torch.is_grad_enabled())

    def _leaves(self, measured: Crossover | None, gradient: bool) -> bool:
        if measured is None or self.always or self.trained or self.trained_tokens is not None or gradient:
            return False
        return measured.loses

    def fall_back(self, reason: str) -> None:
        """Record that a call runs its original attention: counted, said once, an error under strict."""
        if self.strict:
            raise FallbackError(f"strict=True wants every layer accelerated, but this call has {reason}")
        if reason not in self.fallbacks:
            warnings.warn(f"dit_accel: original attention for calls with {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def forward(self) -> Forward | None:
        """The forward that is running in this thread, or None.

        In a backward pass outside of one, blocks are recomputed that another checkpointing than diffusers' own dropped: the last one then.
        """
        found = current(self)
        return self.last if found is None and in_backward() else found

    def takes(self, forward: Forward | None, alone: bool, q_len: int, kv_len: int, mask: object, special: str | None) -> bool:
        """Whether a call within a forward, or outside of any, is accelerated; one that should be and can't is recorded. See `route`."""
        if not self.enabled:
            return False
        if forward is None:
            self.fall_back(OUTSIDE)
            return False
        taken, reason = route(forward, alone, q_len, kv_len, mask, special)
        if taken:
            self.layout = forward.layout(alone, kv_len)
        elif reason is not None:
            self.fall_back(reason)
        return taken

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: begin a forward, and bring image tokens into the spec's memory order."""
        if torch.compiler.is_compiling():
            return self._trace(dict(zip(self.names, args, strict=False)) | kwargs, module)
        return self._begin_eagerly(module, args, kwargs)

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook, also called after an exception: end the forward, and bring the output's tokens back into raster order."""
        return self._trace_end(output) if torch.compiler.is_compiling() else self._end_eagerly(output)

    @torch.compiler.disable
    def _begin_eagerly(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not (self.enabled or self.in_order):
            return None
        if torch.is_grad_enabled():
            carry_forwards(module)
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        forward = self._read(arguments, module)
        enter(self, forward)
        if not forward.permuted:
            return None
        order = forward.orders(_first(arguments[self.family.latents]).device)[0]
        return (), self._permuted(arguments, lambda x: x.index_select(-2, order))

    @torch.compiler.disable
    def _end_eagerly(self, output: Any) -> Any:
        forward = current(self)
        leave(self)
        if forward is None or not forward.permuted or output is None:
            return None
        return _with_first(output, lambda x: x.index_select(-2, forward.orders(x.device)[1]))

    def _permuted(self, arguments: dict[str, Any], permute: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """The arguments, of which those with a row per image token are in another order."""
        present = [name for name in self.family.per_token if arguments.get(name) is not None]
        return arguments | {name: _map_tensors(arguments[name], permute) for name in present}

    def _trace(self, arguments: dict[str, Any], transformer: Any) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """`before` in a graph of the whole transformer: its operators do the same when they run."""
        family = self.family
        names = [name for name in family.ids if arguments.get(name) is not None]
        grids: Grids | str = () if family.ids else family.grid(arguments, transformer)
        words = "\n".join(f"{name}={value}" for name, value in arguments.items() if isinstance(value, str)) if family.ids else ""
        text = family.text(arguments) if family.text else None
        history = family.history(arguments, transformer) if family.history else 0
        self.token = torch.ops.dit_accel.begin(
            self.tag, _first(arguments[family.latents]), arguments.get(family.timestep),
            [arguments[name] for name in names], "\n".join(names), words,
            [] if isinstance(grids, str) else [n for grid in grids for n in grid], grids if isinstance(grids, str) else "", text, history,
            torch.is_grad_enabled(),
        )  # fmt: skip
        if not self._orders_tokens():
            return None
        return (), self._permuted(arguments, lambda x: torch.ops.dit_accel.reorder(x, self.token, False))

    def _trace_end(self, output: Any) -> Any:
        """`after` in a graph of the whole transformer."""
        token, self.token = self.token, self.tag
        if output is None or not self._orders_tokens():
            return None
        return _with_first(output, lambda x: torch.ops.dit_accel.reorder(x, token, True))

    def _orders_tokens(self) -> bool:
        """Whether accelerated forwards have their tokens in another order than the raster's."""
        return bool(self.family.per_token) and not isinstance(self.spec.order, Raster)

    def _read(self, arguments: Mapping[str, Any], transformer: Any) -> Forward:
        """What a forward's arguments say of it."""
        family = self.family
        grids = self.grids(arguments, transformer)
        text = family.text(arguments) if family.text else None
        history = family.history(arguments, transformer) if family.history else 0
        latents = _first(arguments[family.latents])
        return self.begin(grids, text, history, arguments.get(family.timestep), latents, gradient=torch.is_grad_enabled())

    def begin(
        self, grids: Grids | str, text: int | None, history: int, timestep: Tensor | None, latents: Tensor, *, gradient: bool
    ) -> Forward:
        """The forward with these grids, or with a reason why they are not known; to be called once per forward."""
        family, trained_tokens = self.family, self.trained_tokens
        if isinstance(grids, str):
            self.layout = self.crossover = None
            self.fall_back(grids)
            return Forward(family, self.spec, (), text, history, trained_tokens, active=False, permuted=False)
        forward = Forward(family, self.spec, grids, text, history, trained_tokens, active=True, permuted=self._orders_tokens())
        measured = self._measured(forward, latents, gradient)
        active = self.enabled and not self._leaves(measured, gradient)
        if self.enabled and self.dense_steps:
            active = self.steps.index(timestep, latents) >= self.dense_steps and active
        if not active:
            forward = replace(forward, active=False, permuted=forward.permuted and self.in_order)
        self.last, self.layout, self.crossover = forward, forward.layout(False, forward.image + (text or 0)), measured
        return forward

    def grids(self, arguments: Mapping[str, Any], transformer: Any) -> Grids | str:
        """The grids of the images, or why they are not known."""
        ids = tuple(arguments.get(name) for name in self.family.ids)
        for known, grids in self._parsed:  # parsing ids waits for the device; pipelines reuse one tensor for all steps
            if ids and all(a is b for a, b in zip(ids, known, strict=True)):
                return grids
        grids = self.family.grid(arguments, transformer)
        if ids:
            self._parsed = ((ids, grids), *self._parsed[: PARSED - 1])
        return grids

    def _measured(self, forward: Forward, latents: Tensor, gradient: bool) -> Crossover | None:
        """Whether the method or the original attention is faster at this size, where that decides; said once where the original is."""
        if self.backend != "auto" or self.strict or latents.device.type != "cpu":
            return None
        found = crossover.measured(self.spec, forward.layout(False, forward.image + (forward.text or 0)), self.head_dim, latents.dtype)
        if self.enabled and self._leaves(found, gradient) and forward.grids not in self._said:
            self._said.add(forward.grids)
            sizes = " and ".join("×".join(str(n) for n in (grid[1:] if grid[0] == 1 else grid)) for grid in forward.grids)
            warnings.warn(
                f"dit_accel: the original attention runs at {sizes} tokens, because it is faster there: {found}. "
                "accelerate(..., strict=True) runs the method all the same",
                stacklevel=2,
            )
        return found


# A compiled transformer's hooks run in frames of their own, outside of its graph: as such they are not compiled. Within the graph of a
# function that calls the transformer they are traced.
for hook in (Context.before, Context.after):
    skip_code(hook.__code__)


def _with_first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A transformer's output with its first tensor changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    output.sample = change(output.sample)
    return output


def _first(value: Any) -> Tensor:
    """The tensor, or the first of a list of them."""
    while isinstance(value, list | tuple):
        value = value[0]
    tensor: Tensor = value
    return tensor


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return function(value)
