"""The only code that touches a user's model: `accelerate`, `restore`, `dense`."""

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

import dit_accel.patch.compiled  # noqa: F401  its operators are found by name
from dit_accel.errors import AlreadyAcceleratedError, NotAcceleratedError, UnsupportedModelError
from dit_accel.kernels import dispatch
from dit_accel.method.presets import Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import guard, lowering
from dit_accel.patch.anatomy import CONTEXT, attention_layers, check_not_parallel, check_unfused, find_transformers, forward_names, heads_of
from dit_accel.patch.checkpointing import drop_carried
from dit_accel.patch.context import Context
from dit_accel.patch.lora import ADAPTER, delete_lora, scale_lora, silence_lora, works
from dit_accel.patch.processor import AcceleratedAttention, AcceleratedProcessor, accelerated_copy
from dit_accel.patch.saving import SaveOriginal, UnloadLora
from dit_accel.patch.steps import Steps
from dit_accel.patch.weights import check_exchange, check_removal, hide, only_original, rename, seal, swap_weights, tolerate
from dit_accel.pipelines import family_of

P = TypeVar("P")


@dataclass
class Patch:
    """What undoes the patch of one transformer: its context, the original processors, the hooks, the weights that distillation changed."""

    context: Context
    originals: dict[str, list[tuple[Any, Any]]]  # module name -> (original processor, ours), the newest last
    hooks: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> its other value: the original, or in dense() the trained
    swapped: bool = False  # whether the originals are in the model, as in dense()
    fused: set[tuple[str, str]] = field(default_factory=set)  # (name in `weights`, LoRA in it) when the original was put aside
    sealed: list[str] = field(default_factory=list)  # LoRA that were unloaded while fused into trained weights, or that are ours
    lora: bool = False  # whether a LoRA of ours belongs to the patch
    told: bool = False  # that it is switched off

    def take_over(self, model: Any, args: Any = None) -> None:
        """Forward pre-hook: accelerate processors that were put in since, as fuse_qkv_projections and loading an IP-Adapter do."""
        if torch.compiler.is_compiling():
            return
        if self.context.trained:
            check_unfused(model, self.originals, UnsupportedModelError)
        if self.lora and not self.told and not works(model):
            self.told = True
            warnings.warn(
                f"what was trained is switched off: the LoRA {ADAPTER!r} is not among the active adapters; name it in set_adapters(...)",
                stacklevel=2,
            )
        for name, pairs in self.originals.items():
            module = model.get_submodule(name)
            if isinstance(module.processor, AcceleratedProcessor):
                continue
            try:
                ours = accelerated_copy(module.processor)
            except UnsupportedModelError as error:
                self.context.fall_back(f"a processor that was put in after accelerate(...): {error}")
                continue
            pairs.append((module.processor, ours))
            module.processor = ours


def accelerate(
    pipe_or_transformer: P,
    spec: AttentionSpec | None = None,
    *,
    layers: Callable[[str, nn.Module], bool] | None = None,
    dense_steps: int = 0,
    backend: str = "auto",
    strict: bool = False,
    trained_tokens: int | None = None,
) -> P:
    """Replace the image self-attention of a stock pipeline (all its transformers) or of a bare transformer; returns the same object.

    Args:
        spec: the method; `Fovea()` unless given, which needs no training.
        layers: which attention modules, as a predicate on (name, module); all unless given.
        dense_steps: the first denoising steps of every run that keep the original attention, counted by the scheduler of the pipeline that
            runs; those of a transformer in a loop without a scheduler by its timesteps.
        backend: which implementation; "auto" chooses, and `summary` tells.
        strict: raise FallbackError where a call would have to run its original attention, and run the method where that is slower.
        trained_tokens: how many tokens, text and image, the sequences had that the model was trained on (4608 for FLUX.1). Given, the
            logits of a sequence of N tokens are scaled by sqrt(log N / log trained_tokens), CLEAR's proportional attention for high
            resolution, and the method runs even where it is slower.

    Where the original attention is clearly faster (measured once per size and machine, see `crossover`; DIT_ACCEL_GUARD=off in the
    environment measures nothing) an untrained patch runs it under backend "auto".
    Call it after loading LoRA or an IP-Adapter, before quantising, offloading or compiling. Raises UnsupportedModelError,
    AlreadyAcceleratedError, BackendError or ValueError before anything is changed.
    """
    spec = Fovea() if spec is None else spec
    if not isinstance(spec, AttentionSpec):
        raise ValueError(f"spec is an AttentionSpec (Fovea, CLEAR, SLA, GNA, ...), got {spec!r}")
    if not isinstance(dense_steps, int) or isinstance(dense_steps, bool) or dense_steps < 0:
        raise ValueError(f"dense_steps is a number of steps >= 0, got {dense_steps!r}")
    check_trained_tokens(trained_tokens)
    dispatch.check(backend)
    check_not_parallel(pipe_or_transformer)
    guard.enabled()  # refuses what the environment can't mean
    models = find_transformers(pipe_or_transformer)
    for model in models:
        if it := getattr(model, CONTEXT, None):
            raise AlreadyAcceleratedError(f"{type(model).__name__} is accelerated already, with {it.context.spec}; call restore(...) first")
    settings: dict[str, Any] = {
        "steps": Steps(), "dense_steps": dense_steps, "backend": backend, "strict": strict, "trained_tokens": trained_tokens,
    }  # fmt: skip
    prepared = [_prepare(model, spec, layers, settings) for model in models]  # whatever can fail fails here
    for model, (context, modules) in zip(models, prepared, strict=True):
        _install(model, context, modules)
    dispatch.warn_of_reference(backend, next(models[0].parameters()).device)
    return pipe_or_transformer


def check_trained_tokens(tokens: int | None) -> None:
    """Raise ValueError unless it is None or a number of tokens whose logarithm can divide."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 2):
        raise ValueError(f"trained_tokens is a number of tokens >= 2 or None, got {tokens!r}")


def _prepare(
    model: Any, spec: AttentionSpec, layers: Callable[[str, nn.Module], bool] | None, settings: dict[str, Any]
) -> tuple[Context, list[tuple[str, Any, AcceleratedAttention, Any]]]:
    """Context, and (name, module, operator, processor) for each layer; the model is not changed."""
    family = family_of(model)
    if family is None:  # find_transformers lets none through
        raise UnsupportedModelError(f"{type(model).__name__} belongs to no supported family")
    every = attention_layers(model)
    chosen = [(name, m) for name, m in every.items() if layers is None or layers(name, m)]
    if not chosen:
        raise UnsupportedModelError(f"no layer was chosen in {type(model).__name__}; its attention modules are {list(every)}")
    if any(p.device.type == "meta" for _, m in chosen for p in m.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded (its weights are on the meta device): accelerate it before offloading"
        )
    shapes = {name: heads_of(name, module) for name, module in chosen}
    for head_dim in {width for _, width in shapes.values()}:
        dispatch.check_model(settings["backend"], head_dim, linear=lowering.has_states(spec))
    context = Context(family, spec, forward_names(model), shapes[chosen[0][0]][1], **settings)
    modules = []
    for name, module in chosen:
        heads, head_dim = shapes[name]
        alone = family.alone is not None and re.fullmatch(family.alone, name) is not None
        operator = AcceleratedAttention(spec, context, name, heads=heads, head_dim=head_dim, alone=alone)
        modules.append((name, module, operator.to(next(module.parameters()).device), accelerated_copy(module.processor)))
    return context, modules


def _install(model: Any, context: Context, modules: list[tuple[str, Any, AcceleratedAttention, Any]]) -> None:
    originals = {}
    for name, module, operator, processor in modules:
        originals[name] = [(module.processor, processor)]
        learns = any(p.requires_grad for key, p in module.named_parameters() if ".lora_" not in key)
        module.dit_accel = operator.train(module.training).requires_grad_(learns)  # a frozen model stays frozen until it is distilled
        module.processor = processor
    patch = Patch(context, originals)
    patch.hooks = [
        model.register_forward_pre_hook(patch.take_over),
        model.register_forward_pre_hook(context.before, with_kwargs=True),
        model.register_forward_hook(context.after, always_call=True),
        model.register_load_state_dict_pre_hook(rename),
        model.register_load_state_dict_post_hook(tolerate),
        model.register_state_dict_post_hook(hide),
    ]
    setattr(model, CONTEXT, patch)
    for stand_in in (SaveOriginal(model, only_original), UnloadLora(model, seal)):
        if hasattr(model, stand_in.name):
            setattr(model, stand_in.name, stand_in)


def restore(pipe_or_transformer: P) -> P:
    """Undo `accelerate` and `distill`: the original processor objects and weights, no operators, no LoRA of ours, no hooks.

    Raises NotAcceleratedError if there is nothing to undo, and DitAccelError, before anything is changed, where the original weights can't
    be put back: `fuse_lora` put a LoRA into trained weights, say, or they were quantised.
    """
    patches = patches_of(pipe_or_transformer)
    for model, patch in patches:
        check_exchange(model, patch)
        check_removal(model)
    for model, patch in patches:
        if not patch.swapped:
            swap_weights(model, patch)
        if ADAPTER in getattr(model, "peft_config", {}):
            delete_lora(model)
        for name, pairs in patch.originals.items():
            module = model.get_submodule(name)
            original = next((original for original, ours in pairs if ours is module.processor), None)
            if original is not None:
                original.__dict__.update(module.processor.__dict__)  # a scale or backend set meanwhile
                module.processor = original
            elif isinstance(module.processor, AcceleratedProcessor):  # made anew from our class, as loading an IP-Adapter does
                module.processor.__class__ = module.processor._dit_accel_base
            del module.dit_accel
        for hook in patch.hooks:
            hook.remove()
        for stand_in in (SaveOriginal, UnloadLora):
            vars(model).pop(stand_in.name, None)
        drop_carried(model)
        delattr(model, CONTEXT)
    return pipe_or_transformer


def patches_of(pipe_or_transformer: object) -> list[tuple[Any, Patch]]:
    """The accelerated transformers and their patches. Raises NotAcceleratedError if there is none."""
    found = [(model, getattr(model, CONTEXT)) for model in find_transformers(pipe_or_transformer) if hasattr(model, CONTEXT)]
    if not found:
        raise NotAcceleratedError(
            f"wanted a pipeline or transformer patched by accelerate(...), got an unpatched {type(pipe_or_transformer).__name__}"
        )
    return found


def operators_of(pipe_or_transformer: object) -> dict[str, AcceleratedAttention]:
    """The operators of all accelerated layers by the name of their attention module."""
    return {name: model.get_submodule(name).dit_accel for model, patch in patches_of(pipe_or_transformer) for name in patch.originals}


@contextlib.contextmanager
def dense(pipe_or_transformer: P) -> Iterator[P]:
    """The original model, same weights, for the length of a `with` block: operators off, and what distillation trained off as well.

    Not between a forward and its backward under gradient checkpointing: the recomputation would run the original. Raises
    NotAcceleratedError, or DitAccelError where the original weights can't be put in, as `restore` does.
    """
    patches = patches_of(pipe_or_transformer)
    for model, patch in patches:
        check_exchange(model, patch)
    with contextlib.ExitStack() as stack:
        for model, patch in patches:
            stack.enter_context(_dense(model, patch))
        yield pipe_or_transformer


@contextlib.contextmanager
def _dense(model: Any, patch: Patch) -> Iterator[None]:
    """`dense` of one transformer. The outermost of several exchanges the weights; none does once `restore` has undone the patch."""
    context, outermost = patch.context, not patch.swapped
    before, scales = context.enabled, {}
    if outermost:
        swap_weights(model, patch)
        scales = silence_lora(model)
    context.enabled = False
    try:
        yield
    finally:
        if getattr(model, CONTEXT, None) is patch:
            if outermost:
                check_exchange(model, patch)  # what was done to the model meanwhile is to be undone first; it is the original until then
                swap_weights(model, patch)
                scale_lora(model, scales)
            context.enabled = before


@contextlib.contextmanager
def _set(pipe_or_transformer: object, name: str, change: Callable[[Any], Any]) -> Iterator[None]:
    """An attribute of all patches' contexts changed for the length of a `with` block."""
    contexts = [patch.context for _, patch in patches_of(pipe_or_transformer)]
    before = [getattr(context, name) for context in contexts]
    for context, value in zip(contexts, before, strict=True):
        setattr(context, name, change(value))
    try:
        yield
    finally:
        for context, value in zip(contexts, before, strict=True):
            setattr(context, name, value)


@contextlib.contextmanager
def always(pipe_or_transformer: P) -> Iterator[P]:
    """The method at every size, even where the original attention is faster, for the length of a `with` block. For training and measuring.

    Raises NotAcceleratedError.
    """
    with _set(pipe_or_transformer, "always", lambda _: True):
        yield pipe_or_transformer


@contextlib.contextmanager
def proportional(pipe_or_transformer: P, trained_tokens: int) -> Iterator[P]:
    """`trained_tokens` of `accelerate`, for the length of a `with` block, where the patch has none.

    Raises ValueError or NotAcceleratedError.
    """
    check_trained_tokens(trained_tokens)
    with _set(pipe_or_transformer, "trained_tokens", lambda own: trained_tokens if own is None else own):
        yield pipe_or_transformer


@contextlib.contextmanager
def running(pipe_or_transformer: P, spec: AttentionSpec) -> Iterator[P]:
    """Another spec with the same parameters, order and blocks, for the length of a `with` block. Raises NotAcceleratedError."""
    patches = patches_of(pipe_or_transformer)
    before = [patch.context.spec for _, patch in patches]
    try:
        for model, patch in patches:
            _switch(model, patch, spec)
        yield pipe_or_transformer
    finally:
        for (model, patch), own in zip(patches, before, strict=True):
            _switch(model, patch, own)


def _switch(model: Any, patch: Patch, spec: AttentionSpec) -> None:
    if patch.context.spec == spec:
        return
    patch.context.switch(spec)
    for name in patch.originals:
        model.get_submodule(name).dit_accel.spec = spec
