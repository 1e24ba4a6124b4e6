"""What one "Accelerate attention" node adds to a model: which calls of ComfyUI's attention it computes, and why it leaves the others.

While a model denoises, hooks on its transformer tell the grid of the latents and the module that is running; nothing is guessed from the
lengths of a call. They are there for the duration of one forward and change nothing that the model computes.
"""

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import DitAccelError, FallbackError, UnsupportedModelError
from dit_accel.integrations.comfyui import calls
from dit_accel.integrations.comfyui.hosts import HOSTS, Host, arguments_of, host_of
from dit_accel.kernels import dispatch
from dit_accel.method.assignment import Assignment, Moment, Rules, specs_in, without
from dit_accel.method.parameters import AttentionParameters
from dit_accel.operator import guard, lowering
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.plans import Plans
from dit_accel.patch.forward import Forward
from dit_accel.patch.heads import Layer, joint_parameters
from dit_accel.patch.mask_check import hides_image
from dit_accel.patch.processor import arranged, by_specs
from dit_accel.patch.routing import route
from dit_accel.pipelines.family import Family

log = logging.getLogger("dit_accel")
OVERRIDE = "optimized_attention_override"  # ComfyUI's name of what it calls in the place of its attention
FAMILY = Family("comfyui", (), "", lambda arguments, transformer: "", mask="keys")  # text first, padded text under masks over keys


@dataclass
class Running:
    """One forward of a model. `options`: ComfyUI's transformer_options; `forward`: None until the transformer begins and where it can't be
    accelerated; `module`: the one that is running, of those that call the image's attention; `asked`: whether it has called it; `masks`:
    those that were looked at, by what they are, and whether they hide image tokens; `altered`: whether one has changed since."""

    owner: "Accelerator"
    options: Mapping[str, Any]
    forward: Forward | None = None
    module: str | None = None
    asked: bool = False
    masks: dict[tuple[Any, ...], tuple[Tensor, Tensor | None, bool]] = field(default_factory=dict)
    altered: list[Tensor] = field(default_factory=list)

    def hides_image(self, mask: Tensor, image: int) -> bool:
        """`hides_image` of a mask that each layer is given: once for all of them, where it waits for the device.

        Tensors made in inference mode, as ComfyUI's are, don't count what is written to them: those on a GPU are compared with a copy,
        and `check` waits for the answers.
        """
        counted = not mask.is_inference()
        if not counted and not waits(mask.device):
            return hides_image(mask, image, True)
        what = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, mask._version if counted else None)
        if what not in self.masks:  # the mask is held, so that no other takes its place in memory
            self.masks[what] = mask, None if counted else mask.clone(), hides_image(mask, image, True)
        _, copy, answer = self.masks[what]
        if copy is not None:
            self.altered.append((copy != mask).any())
        return answer

    def check(self) -> None:
        """Raise DitAccelError where a mask has changed within the forward, after layers had been computed by what it was."""
        if self.altered and bool(torch.stack(self.altered).any()):
            raise DitAccelError(
                "an attention mask was written to while the model ran, so that layers were computed with another one: have the node that "
                'does so give a new tensor, or leave "Accelerate attention" out'
            )


def waits(device: torch.device) -> bool:
    """Whether a look at a tensor's values waits for the device."""
    return device.type != "cpu"


_running: ContextVar[Running | None] = ContextVar("running", default=None)


class Accelerator:
    """A method on one model.

    `transformer`: of a class in `hosts`. `parameters`: learned ones by the layer's name, from an adapter; others are at their start values.
    `sigmas`: (from, to), the noise levels at which it runs. `strict`: raise FallbackError where a call would have to run its original
    attention. Raises UnsupportedModelError or ArgumentError where the method does not fit the model.
    """

    def __init__(
        self, transformer: Any, assignment: Assignment, *, parameters: Mapping[str, AttentionParameters] | None = None,
        sigmas: tuple[float, float] | None = None, strict: bool = False, backend: str = "auto",
    ) -> None:  # fmt: skip
        self.host, self.assignment, self.sigmas, self.strict, self.backend = _require(transformer), assignment, sigmas, strict, backend
        self.layers = layers_of(transformer, self.host)
        self.head_dim = self.host.heads(transformer)[1]
        named = {layer.name: layer for pair in self.layers.values() for layer in pair}
        assignment.check([{name: layer.heads for name, layer in named.items()}])
        self.trained, given = parameters is not None, parameters or {}
        self.parameters = {
            name: given[name] if name in given else joint_parameters(specs, layer).requires_grad_(False)
            for name, layer in named.items()
            if (specs := assignment.specs_of(name))
        }
        self.plans = Plans()
        self._said: set[str] = set()

    # -- around a forward

    def around(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wrapper of a model's `apply_model(x, t, c_concat, c_crossattn, control, transformer_options, ...)`.

        The override is put into the options of each forward, before any that is there, so that none of another node can replace it.
        """
        call = inspect.signature(executor.original).bind(*args, **kwargs)
        options = call.arguments.get("transformer_options", {})
        transformer = executor.class_obj.diffusion_model
        if "torch.compile" in options.get("wrappers", {}).get("apply_model", {}) or hasattr(transformer, "_orig_mod"):
            self.leave("torch.compile: a graph of the whole model contains its original attention")
            return executor(*args, **kwargs)
        if not self._within(options):
            return executor(*args, **kwargs)
        call.arguments["transformer_options"] = {**options, OVERRIDE: Override(self, options.get(OVERRIDE))}
        running = Running(self, options)
        token = _running.set(running)
        try:
            with self._watched(transformer):
                out = executor(*call.args, **call.kwargs)
        finally:
            _running.reset(token)
        running.check()
        return out

    def _within(self, options: Mapping[str, Any]) -> bool:
        if self.sigmas is None or (level := _sigma(options)) is None:
            return True
        return self.sigmas[1] <= level <= self.sigmas[0]

    @contextlib.contextmanager
    def _watched(self, transformer: Any) -> Iterator[None]:
        """Hooks on the transformer, and on those modules that call the image's attention, until the forward ends."""
        modules = dict(transformer.named_modules())
        handles = [transformer.register_forward_pre_hook(self._begin, with_kwargs=True)]
        try:
            for name in self.layers:
                module = modules.get(name)
                if module is not None:
                    handles.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
                    handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _begin(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self._mine()
        if running is None:
            return
        running.forward = running.module = None  # of an earlier call of the transformer, where another node calls it several times
        try:
            arguments = arguments_of(transformer, args, kwargs)
            grids, text = self.host.grids(arguments, transformer), self.host.text(arguments, transformer)
        except (TypeError, KeyError, AttributeError) as error:  # of another version of ComfyUI
            self.leave(f"arguments of {type(transformer).__name__} that this version does not know ({error})")
            return
        if isinstance(grids, str):
            self.leave(grids)
            return
        moment = moment_of(running.options) if self.assignment.of_moments else None
        forward = Forward(FAMILY, Rules(), grids, text, 0, None, self.plans, active=True)
        rules = self._faster(self.assignment.at(moment, forward.image), forward, arguments["x"])
        running.forward = replace(forward, rules=rules)
        if specs_in(rules):
            sizes = " and ".join("×".join(map(str, grid)) for grid in grids)
            self.say(logging.INFO, f"{self.assignment} runs at {sizes} tokens")

    def _enter(self, name: str, module: Any, args: Any) -> None:
        if (running := self._mine()) is not None:
            running.module, running.asked = name, False

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        if (running := self._mine()) is None:
            return
        name, running.module = running.module, None
        if output is None or running.asked or running.forward is None or name is None:  # no output: an error is on its way
            return
        if any(running.forward.runs(layer) for layer in self.layers[name]):
            self.leave("an attention that asks for no override, as in blocks that are compiled")

    def _mine(self) -> Running | None:
        running = _running.get()
        return running if running is not None and running.owner is self else None

    def _faster(self, rules: Rules, forward: Forward, latents: Tensor) -> Rules:
        """The rules with the original attention in the place of specs that are measured to be slower at this size.

        An adapter's weights belong to its method, which runs at every size.
        """
        linear = any(lowering.has_states(spec) for spec in specs_in(rules))
        if slow := dispatch.slow_on_gpu(latents.device, latents.dtype, self.head_dim, linear=linear):
            self.say(logging.WARNING, slow)
        if self.strict or self.trained or self.backend != "auto":
            return rules
        layout = forward.layout(False, forward.image + (forward.text or 0))
        slower = set()
        for spec in specs_in(rules):
            found = guard.measured(spec, layout, self.head_dim, latents.dtype, latents.device)
            if found is not None and found.loses:
                slower.add(spec)
                sizes = " and ".join("×".join(map(str, grid)) for grid in forward.grids)
                self.say(logging.WARNING, f"the original attention runs at {sizes} tokens, because it is faster there than {spec}: {found}")
        return without(rules, frozenset(slower))

    # -- within it

    def attend(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The output of a call with the arguments of ComfyUI's attention, or None where its original attention is to run."""
        running = self._mine()
        if running is None or running.forward is None or running.module is None:
            return None  # of a text encoder or a control net, or cross-attention
        running.asked = True
        call, forward, pair = calls.read(*args, **kwargs), running.forward, self.layers[running.module]
        image_only = len(pair) > 1 and call.query.shape[2] == forward.images(True, 0)[1] and bool(forward.text)
        layer = pair[1] if image_only else pair[0]
        if not forward.runs(layer):
            return None
        tokens = call.key.shape[2]
        special = call.special
        # where single blocks say that the image is; what is in front of a video, counted as text here, is a part of it there
        first, end = kwargs.get("transformer_options", {}).get("img_slice", (forward.text, tokens))
        if special is None and not image_only and (first > forward.text or end != tokens):
            special = f"an image at tokens {first} to {end} of {tokens}"
        if special is None and (call.query.shape[1], call.query.shape[3]) != (layer.heads, layer.head_dim):
            special = f"{call.query.shape[1]} heads of {call.query.shape[3]} where {layer.heads} of {layer.head_dim} were expected"
        taken, reason = route(forward, image_only, call.query.shape[2], tokens, call.mask, special)
        if taken and call.mask is not None and running.hides_image(call.mask, forward.image):
            taken, reason = False, "an attention mask over image tokens"
        if not taken:
            if reason is not None:
                self.leave(reason)
            return None
        method = functools.partial(self._method, layer)
        return call.answer(arranged(call.query, call.key, call.value, call.scale, call.mask, forward, image_only, method))

    def _method(
        self, layer: Layer, query: Tensor, key: Tensor, value: Tensor, layout: TokenLayout, scale: float | None, bias: Tensor | None,
        forward: Forward,
    ) -> Tensor:  # fmt: skip
        params = self.parameters[layer.name](query.device)
        return by_specs(query, key, value, layout, scale, bias, forward, layer, params, self.backend)

    # -- what users are told

    def leave(self, reason: str) -> None:
        """Say, once for each reason, why calls run their original attention; an error under strict."""
        if self.strict:
            raise FallbackError(f"strict requires every image self-attention to be accelerated, but this call has {reason}")
        self.say(logging.WARNING, f"the original attention runs for calls with {reason}")

    def say(self, level: int, text: str) -> None:
        """Log a line once."""
        if text not in self._said:
            self._said.add(text)
            log.log(level, "dit_accel: %s", text)

    def forget(self, *args: Any) -> None:
        """Free what is kept on the device between forwards."""
        self.plans.clear()


class Override:
    """`optimized_attention_override` of a model: the accelerator's answer, else that of the override before it, else the original."""

    def __init__(self, accelerator: Accelerator, previous: Callable[..., Tensor] | None = None) -> None:
        self.accelerator, self.previous = accelerator, previous

    def __call__(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling() and (out := self.accelerator.attend(*args, **kwargs)) is not None:
            return out
        if self.previous is not None:
            return self.previous(function, *args, **kwargs)
        return function(*args, **kwargs)


def layers_of(transformer: Any, host: Host) -> dict[str, tuple[Layer, ...]]:
    """Name of a module -> its layers; the second, where there is one, sees the image alone."""
    heads, head_dim = host.heads(transformer)
    return {
        module: tuple(Layer(name, heads, head_dim, image_only=number == 1) for number, name in enumerate(names))
        for module, names in host.layers(transformer).items()
    }


def _require(transformer: Any) -> Host:
    host = host_of(transformer)
    if host is None:
        known = ", ".join(name for known in HOSTS for name in known.classes)
        raise UnsupportedModelError(
            f"dit_accel does not know where the image's tokens are in a {type(transformer).__name__} of ComfyUI, only in {known}"
        )
    return host


def _sigma(options: Mapping[str, Any]) -> float | None:
    """The noise level of a forward; reads device memory."""
    sigmas = options.get("sigmas")
    return float(sigmas.max()) if isinstance(sigmas, Tensor) and sigmas.numel() else None


def moment_of(options: Mapping[str, Any]) -> Moment | None:
    """The step and noise level, from ComfyUI's `sigmas` of a forward and `sample_sigmas` of its run; None where it gives none.

    An evaluation between two steps' levels belongs to the first, one at a step's own level (as Heun's second) to that step.
    """
    level, schedule = _sigma(options), options.get("sample_sigmas")
    if level is None or not isinstance(schedule, Tensor) or not len(schedule):
        return None
    reached = int((schedule.float() >= level * (1 - 1e-5)).sum())
    return Moment(min(max(0, reached - 1), max(0, len(schedule) - 2)), min(1.0, max(0.0, level)))
