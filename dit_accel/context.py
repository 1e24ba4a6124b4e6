"""What the operators of one transformer share during a forward: the grid, the step, and whether they are on. Nothing is global."""

import math
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel import crossover
from dit_accel.crossover import Crossover
from dit_accel.errors import FallbackError
from dit_accel.layout import TokenLayout
from dit_accel.pipelines.family import Family, Grids
from dit_accel.plan import Plan, make_plan
from dit_accel.spec import AttentionSpec


class Steps:
    """The index of the denoising step, counted from the timesteps that the transformers of one pipeline are called with."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The next forward begins a run."""
        self.index, self._timestep = 0, float("inf")
        self._latents: Tensor | None = None

    def observe(self, timestep: float, latents: Tensor) -> None:
        """A lower timestep is the next step, a higher one a new run.

        An equal one is the same step where the latents are the same too (guidance in two passes): in bfloat16 neighbouring timesteps
        can round to one value.
        """
        if timestep > self._timestep or self._timestep == float("inf"):
            self.index = 0
        elif timestep < self._timestep or self._latents is None or not _equal(latents, self._latents):
            self.index += 1
        self._timestep, self._latents = timestep, latents


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


class Context:
    """Per-model state, written by the hooks at the transformer's boundary and read by its operators.

    `enabled`: `dense(...)` switches it off. `always`: run the operators even where the original attention is faster, as training and
    measuring must. `trained`: the weights belong to the operators, so nothing else will do. `trained_tokens`: of the sequences that the
    model was trained on, where logits are to be scaled for longer ones, which the original attention does not do. `active`: the operators
    run in the forward at hand. `grids`: of the images in its sequence, or None where they are not known. `image`: tokens of all of them.
    `text`: how many other tokens there are, or None where only a call tells. `history`: how many of them stand before the image although
    text stands behind. `layout`, `plan`: of the last sequence. `crossover`: what was measured for the grid at hand, or None where nothing
    was to be.
    """

    def __init__(
        self, family: Family, spec: AttentionSpec, names: list[str], head_dim: int, steps: Steps, *, dense_steps: int, backend: str,
        strict: bool, trained_tokens: int | None = None,
    ) -> None:  # fmt: skip
        self.family, self.spec, self.names, self.head_dim, self.steps = family, spec, names, head_dim, steps
        self.dense_steps, self.backend, self.strict, self.trained_tokens = dense_steps, backend, strict, trained_tokens
        self.enabled, self.always, self.trained = True, False, False
        self.fallbacks: Counter[str] = Counter()
        self._said: set[Grids] = set()  # grids of which a user was told that they are left to the original
        self._forget()

    def _forget(self) -> None:
        self.active = False
        self.grids: Grids | None = None
        self.image = self.history = 0
        self.text: int | None = None
        self.layout: TokenLayout | None = None
        self.plan: Plan | None = None
        self.crossover: Crossover | None = None
        self._device = torch.device("cpu")
        self._layouts: dict[tuple[int, Grids, torch.device], tuple[TokenLayout, Plan]] = {}
        self._ids: tuple[Any, ...] = ()
        self._reason: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: settings only; geometry is read anew at the next forward."""
        state = dict(self.__dict__)
        twin = Context.__new__(Context)
        twin._forget()
        return {**state, **twin.__dict__, "steps": Steps()}

    def switch(self, spec: AttentionSpec) -> None:
        """Go on with another spec of the same order; what was made for the one before is made anew at the next forward."""
        self.spec = spec
        self._forget()

    @property
    def leaves(self) -> bool:
        """Whether the grid at hand is left to the original attention because that is faster."""
        if self.crossover is None or self.always or self.trained or self.trained_tokens is not None or torch.is_grad_enabled():
            return False
        return self.crossover.loses

    def scaled(self, scale: float | None, tokens: int, head_dim: int) -> float | None:
        """The scale of the logits in a sequence of so many tokens: as given, or CLEAR's proportional one (arXiv 2412.16112)."""
        if self.trained_tokens is None:
            return scale
        return (head_dim**-0.5 if scale is None else scale) * math.sqrt(math.log(tokens) / math.log(self.trained_tokens))

    def current(self) -> tuple[TokenLayout, Plan]:
        """Layout and plan of the last sequence."""
        if self.layout is None or self.plan is None:
            raise RuntimeError("an accelerated attention module was called outside its transformer's forward")
        return self.layout, self.plan

    def images(self, alone: bool, tokens: int) -> tuple[Grids, int, int | None]:
        """The grids of the images in a sequence of so many tokens, their tokens, and how many others there are, if that is known.

        `alone`: the module sees the drawn image only.
        """
        grids = self.grids or ()
        if alone:
            return grids[:1], math.prod(grids[0]), 0
        if self.family.twice and self.text is not None and tokens == 2 * self.image != self.image + self.text:
            return grids * 2, 2 * self.image, 0
        return grids, self.image, self.text

    def use(self, text: int, grids: Grids, device: torch.device) -> None:
        """Make the layout of these images with that many tokens beside them the current one, with its plan on the device of the layer
        that asks: a transformer's layers may be spread over several."""
        if (text, grids, device) not in self._layouts:
            self._add_layout(text, grids, device)
        self.layout, self.plan = self._layouts[text, grids, device]

    @torch.compiler.disable
    def _add_layout(self, text: int, grids: Grids, device: torch.device) -> None:
        layout = TokenLayout(grids[0], text, self.family.text_first, references=grids[1:])
        self._layouts[text, grids, device] = layout, make_plan(self.spec, layout, device)

    def fall_back(self, reason: str) -> None:
        """Record that a call runs its original attention: counted, said once, an error under strict."""
        if self.strict:
            raise FallbackError(f"strict=True wants every layer accelerated, but this call has {reason}")
        if reason not in self.fallbacks:
            warnings.warn(f"dit_accel: original attention for calls with {reason}", stacklevel=2)
        self.fallbacks[reason] += 1

    def before(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: read the grid and the step. The arguments are left as they are: tokens keep the model's own order."""
        self.active = False
        if not self.enabled:
            return
        self._observe(dict(zip(self.names, args, strict=False)) | kwargs, module)
        self.active = self.grids is not None and self.steps.index >= self.dense_steps and not self.leaves

    def _observe(self, arguments: Mapping[str, Any], transformer: Any) -> None:
        """Read what this forward says of grid and step; under torch.compile, outside of the graph unless it is known already."""
        if torch.compiler.is_compiling():
            family = self.family
            known = self._knows(_ids(family, arguments)) if family.ids else family.grid(arguments, transformer) == self.grids
            others = _others(family, arguments, transformer)
            if known and self.grids is not None and others == (self.text, self.history) and not self.dense_steps:
                return
            torch.compiler.disable(self._read)(arguments, transformer)
            return
        self._read(arguments, transformer)

    def _read(self, arguments: Mapping[str, Any], transformer: Any) -> None:
        family = self.family
        ids = _ids(family, arguments)
        text, self.history = _others(family, arguments, transformer)
        latents = _first(arguments[family.latents])
        if not self._knows(ids):  # parsing ids waits for the device; pipelines reuse one tensor for all steps
            grids: Grids | str = family.grid(arguments, transformer)
            if ids and len(grids) == 1:
                self.steps.forget()  # pipelines make new ids for every run; with reference images, for every step
            self._ids = ids
            self._reason = grids if isinstance(grids, str) else None
            known = None if isinstance(grids, str) else grids
        else:
            known = self.grids
        if known != self.grids or text != self.text or latents.device != self._device:
            self._set_geometry(known, text, latents)
        if self._reason is not None:
            self.fall_back(self._reason)
        elif self.dense_steps:
            timestep: Tensor = arguments[family.timestep]
            # tokens that are given, as the first frame of a video, have their own
            self.steps.observe(-float(timestep.min()) if family.rising else float(timestep.max()), latents)

    def _knows(self, ids: tuple[Any, ...]) -> bool:
        """Whether the grid was read from these very tensors."""
        return bool(ids) and len(ids) == len(self._ids) and all(a is b for a, b in zip(ids, self._ids, strict=True))

    def _set_geometry(self, grids: Grids | None, text: int | None, latents: Tensor) -> None:
        self.grids, self.text, self._device = grids, text, latents.device
        self._layouts, self.crossover = {}, None
        self.layout = self.plan = None
        if grids is None:
            return
        self.image = sum(math.prod(grid) for grid in grids)
        self.use(text or 0, grids, self._device)
        if self.backend == "auto" and not self.strict and self._device.type == "cpu":
            self.crossover = crossover.measured(self.spec, self.current()[0], self.head_dim, latents.dtype)
        if self.enabled and self.leaves and grids not in self._said:
            self._said.add(grids)
            sizes = " and ".join("×".join(str(n) for n in (grid[1:] if grid[0] == 1 else grid)) for grid in grids)
            warnings.warn(
                f"dit_accel: the original attention runs at {sizes} tokens, because it is faster there: {self.crossover}. "
                "accelerate(..., strict=True) runs the method all the same",
                stacklevel=2,
            )


def _ids(family: Family, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(arguments.get(name) for name in family.ids)


def _others(family: Family, arguments: Mapping[str, Any], transformer: Any) -> tuple[int | None, int]:
    """Text tokens, or None where only a call tells, and those before the image."""
    text = family.text(arguments) if family.text else None
    return text, family.history(arguments, transformer) if family.history else 0


def _first(value: Any) -> Tensor:
    """The tensor, or the first of a list of them."""
    while isinstance(value, list | tuple):
        value = value[0]
    tensor: Tensor = value
    return tensor
