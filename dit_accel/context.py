"""What the operators of one transformer share during a forward: the grid, the step, and whether they are on. Nothing is global."""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel import crossover
from dit_accel.crossover import Crossover
from dit_accel.errors import FallbackError
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.family import Family
from dit_accel.plan import Plan, make_plan
from dit_accel.spec import AttentionSpec, Raster


class Context:
    """Per-model state, written by the hooks at the transformer's boundary and read by its operators.

    `enabled`: `dense(...)` switches it off. `in_order`: permute tokens even while off, so that a teacher's layers line up with the
    student's. `always`: run the operators even where the original attention is faster, as training and measuring must. `trained`: the
    weights belong to the operators, so nothing else will do. `active`: the operators run in the forward at hand. `step`: index of the
    denoising step. `crossover`: what was measured for the grid at hand, or None where nothing was to be.
    """

    def __init__(
        self, family: Family, spec: AttentionSpec, names: list[str], head_dim: int, *, dense_steps: int, backend: str, strict: bool
    ) -> None:
        self.family, self.spec, self.names, self.head_dim = family, spec, names, head_dim
        self.dense_steps, self.backend, self.strict = dense_steps, backend, strict
        self.enabled, self.in_order, self.always, self.trained = True, False, False, False
        self.fallbacks: Counter[str] = Counter()
        self._said: set[tuple[int, int, int]] = set()  # grids of which a user was told that they are left to the original
        self._forget()

    def _forget(self) -> None:
        self.active = False
        self.permuted = False
        self.layout: TokenLayout | None = None
        self.plan: Plan | None = None
        self.crossover: Crossover | None = None
        self._orders: tuple[Tensor, Tensor] | None = None
        self._ids: Tensor | None = None
        self.step, self._timestep = 0, float("inf")
        self._latents: Tensor | None = None
        self._reason: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: settings only; geometry is read anew at the next forward."""
        state = dict(self.__dict__)
        twin = Context.__new__(Context)
        twin._forget()
        return {**state, **twin.__dict__}

    @property
    def tokens(self) -> int:
        """Tokens of the sequence in the forward at hand."""
        return self.layout.tokens if self.layout else -1

    @property
    def leaves(self) -> bool:
        """Whether the grid at hand is left to the original attention because that is faster."""
        if self.crossover is None or self.always or self.trained or torch.is_grad_enabled():
            return False
        return self.crossover.loses

    def current(self) -> tuple[TokenLayout, Plan]:
        """Layout and plan of the forward at hand."""
        if self.layout is None or self.plan is None:
            raise RuntimeError("an accelerated attention module was called outside its transformer's forward")
        return self.layout, self.plan

    def fall_back(self, reason: str) -> None:
        """Record that a call runs its original attention: counted, said once, an error under strict."""
        if self.strict:
            raise FallbackError(f"strict=True wants every layer accelerated, but this call has {reason}")
        if reason not in self.fallbacks:
            warnings.warn(f"dit_accel: original attention for calls with {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Forward pre-hook: read the grid and the step, and bring image tokens into the spec's memory order."""
        self.active = self.permuted = False
        if not (self.enabled or self.in_order):
            return None
        arguments = dict(zip(self.names, args, strict=False)) | kwargs
        self._observe(arguments)
        if self.layout is None:
            return None
        self.active = self.enabled and self.step >= self.dense_steps and not self.leaves
        self.permuted = self._orders is not None and (self.active or self.in_order)
        if not self.permuted:
            return None
        order = self._orders[0]  # type: ignore[index]
        for name in self.family.per_token:
            if arguments.get(name) is not None:
                arguments[name] = _map_tensors(arguments[name], lambda x: x.index_select(-2, order))
        return (), arguments

    def after(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Forward hook: bring the output's tokens back into raster order."""
        if not self.permuted:
            return None
        order = self._orders[1]  # type: ignore[index]
        if isinstance(output, tuple):
            return (output[0].index_select(-2, order), *output[1:])
        output.sample = output.sample.index_select(-2, order)
        return output

    def _observe(self, arguments: Mapping[str, Any]) -> None:
        """Read what this forward says of grid and step; under torch.compile, outside of the graph unless it is known already."""
        if not torch.compiler.is_compiling():
            self._read(arguments)
            return
        known = self.layout is not None and arguments["img_ids"] is self._ids
        if not known or self.family.text(arguments) != self.layout.text or self.dense_steps:  # type: ignore[union-attr]
            torch.compiler.disable(self._read)(arguments)

    def _read(self, arguments: Mapping[str, Any]) -> None:
        ids = arguments.get("img_ids")
        if ids is None or ids is not self._ids:  # parsing ids waits for the device; pipelines reuse one tensor for all steps
            grid = self.family.grid(arguments)
            self._ids = ids
            self._timestep = float("inf")  # pipelines make new ids for every run
            self._reason = grid if isinstance(grid, str) else None
            if isinstance(grid, str):
                self.layout = self.plan = self._orders = None
            else:
                self._set_geometry(grid, self.family.text(arguments), arguments["hidden_states"])
        elif self.layout is not None and self.layout.text != self.family.text(arguments):
            self._set_geometry(self.layout.grid, self.family.text(arguments), arguments["hidden_states"])
        if self._reason is not None:
            self.fall_back(self._reason)
        elif self.dense_steps:
            self._count_step(float(arguments[self.family.timestep].flatten()[0]), arguments["hidden_states"])

    def _set_geometry(self, grid: tuple[int, int, int], text: int, hidden: Tensor) -> None:
        device, dtype = hidden.device, hidden.dtype
        self.layout = TokenLayout(grid, text, self.family.text_first, self.spec.order)
        self.plan = make_plan(self.spec, self.layout, device)
        if isinstance(self.spec.order, Raster):
            self._orders = None
        else:
            inverse = make_plan(self.spec, TokenLayout(grid), device)
            self._orders = (inverse.to_memory, inverse.to_raster)  # type: ignore[assignment]
        self.crossover = None
        if self.backend == "auto" and not self.strict and device.type == "cpu":
            self.crossover = crossover.measured(self.spec, self.layout, self.head_dim, dtype)
        if self.enabled and self.leaves and grid not in self._said:
            self._said.add(grid)
            size = f"{grid[1]}×{grid[2]} tokens" if grid[0] == 1 else f"{grid[0]}×{grid[1]}×{grid[2]} tokens"
            warnings.warn(
                f"dit_accel: the original attention runs at {size}, because it is faster there: {self.crossover}. "
                "accelerate(..., strict=True) runs the method all the same",
                stacklevel=2,
            )

    def is_image_alone(self, length: int) -> bool:
        """Whether a call of this length has the image's tokens without the text's."""
        return self.layout is not None and self.layout.text > 0 and length == self.layout.image

    def _count_step(self, timestep: float, latents: Tensor) -> None:
        """A lower timestep is the next step, a higher one a new run.

        An equal one is the same step where the latents are the same too (guidance in two passes): in bfloat16 neighbouring timesteps
        can round to one value.
        """
        if timestep > self._timestep or self._timestep == float("inf"):
            self.step = 0
        elif timestep < self._timestep or self._latents is None or not torch.equal(latents, self._latents):
            self.step += 1
        self._timestep, self._latents = timestep, latents


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_map_tensors(item, function) for item in value)
    return function(value)
