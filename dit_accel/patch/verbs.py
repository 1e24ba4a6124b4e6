"""The verbs, the only code that changes a user's model: `accelerate`, `restore`, `dense`."""

import contextlib
import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.nn as nn

import dit_accel.patch.compiled  # noqa: F401  its operators are found by name
from dit_accel.errors import AlreadyAcceleratedError, ArgumentError, DitAccelError, UnsupportedModelError
from dit_accel.kernels import dispatch
from dit_accel.method.assignment import Assignment
from dit_accel.method.presets import Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import decisions, lowering
from dit_accel.patch.anatomy import attention_layers, check_not_parallel, find_transformers, forward_names, heads_of, require_family
from dit_accel.patch.checkpointing import drop_carried
from dit_accel.patch.context import Context
from dit_accel.patch.fingerprint import known_hash
from dit_accel.patch.heads import Layer
from dit_accel.patch.lora import ADAPTER, delete_lora, scale_own_lora, zero_own_lora
from dit_accel.patch.modes import check_trained_tokens
from dit_accel.patch.processor import AcceleratedAttention, AcceleratedProcessor, accelerated_copy
from dit_accel.patch.saving import EnableParallelism, SaveOriginal, UnloadLora
from dit_accel.patch.sharing import check_sharing
from dit_accel.patch.state import CONTEXT, Patch, patches_of
from dit_accel.patch.steps import Steps
from dit_accel.patch.weights import check_exchange, check_removal, hide, only_original, record_inseparable, rename, swap_weights, tolerate

P = TypeVar("P")


def accelerate(
    pipe_or_transformer: P,
    spec: AttentionSpec | Assignment | None = None,
    *,
    layers: Callable[[str, nn.Module], bool] | None = None,
    dense_steps: int = 0,
    backend: str = "auto",
    strict: bool = False,
    trained_tokens: int | None = None,
) -> P:
    """Replace the image self-attention of a stock pipeline (all its transformers) or of a bare transformer; returns the same object.

    Args:
        pipe_or_transformer: a diffusers pipeline, or one of its transformers.
        spec: the method, or an `Assignment` of several to layers, heads, steps, noise levels and sizes; `Fovea()` unless given, which needs
            no training.
        layers: which attention modules, as a predicate on (name, module); all unless given.
        dense_steps: the first denoising steps of every run that keep the original attention, short for a last rule
            `Rule(None, steps=(0, dense_steps))`. Steps are counted by the scheduler of the pipeline that runs; those of a transformer in a
            loop without a scheduler by its timesteps.
        backend: which implementation; "auto" chooses, and `summary` tells.
        strict: raise FallbackError where a call would have to run its original attention, and run the method where that is slower. The
            original attention that an assignment names raises nothing. A plan that was made for another model, of which a warning tells
            else, raises ArgumentError.
        trained_tokens: how many tokens, text and image, the sequences had that the model was trained on (4608 for FLUX.1). Given, the
            logits of a sequence of N tokens are scaled by sqrt(log N / log trained_tokens), CLEAR's proportional attention for high
            resolution, and the method runs even where it is slower.

    Where the original attention is clearly faster than a spec (measured once per size and machine, see `guard`; DIT_ACCEL_GUARD=off in
    the environment measures nothing) an untrained patch runs it under backend "auto". Heads of one layer that have different specs run
    group by group; those with the original attention in PyTorch's.
    Call it after loading LoRA or an IP-Adapter, before quantising, offloading or compiling. Raises UnsupportedModelError,
    AlreadyAcceleratedError, BackendError or ValueError before anything is changed.
    """
    spec = Fovea() if spec is None else spec
    if not isinstance(spec, AttentionSpec | Assignment):
        raise ValueError(f"spec must be an AttentionSpec (Fovea, CLEAR, SLA, GNA, ...) or an Assignment of some, not {spec!r}")
    if not isinstance(dense_steps, int) or isinstance(dense_steps, bool) or dense_steps < 0:
        raise ValueError(f"dense_steps must be a number of steps >= 0, not {dense_steps!r}")
    check_trained_tokens(trained_tokens)
    dispatch.check(backend)
    check_not_parallel(pipe_or_transformer)
    decisions.enabled()  # refuses what the environment can't mean
    models = find_transformers(pipe_or_transformer)
    for model in models:
        if it := getattr(model, CONTEXT, None):
            raise AlreadyAcceleratedError(
                f"{type(model).__name__} is accelerated already, with {it.context.assignment}; call restore(...) first"
            )
    assignment = Assignment.of(spec, dense_steps=dense_steps)
    chosen, heads = [_layers(model, layers) for model in models], []
    for model, found in zip(models, chosen, strict=True):
        known = {layer.name: layer.heads for layer in found}
        heads.append({name: known.get(name, sys.maxsize) for name in attention_layers(model)})  # what is not chosen has any
    assignment.check(heads)
    used = [[layer for layer in found if assignment.specs_of(layer.name)] for found in chosen]
    if not any(used):
        names = [layer.name for layer in chosen[0]]
        raise UnsupportedModelError(f"{assignment} gives no spec to a chosen layer: choose others than {names}, or add a rule for them")
    settings: dict[str, Any] = {"steps": Steps(), "backend": backend, "strict": strict, "trained_tokens": trained_tokens}
    # whatever can fail fails here; a transformer without any layer that has a spec is left alone
    prepared = [(model, *_prepare(model, assignment, found, settings)) for model, found in zip(models, used, strict=True) if found]
    _check_planned_for(spec, models, strict=strict)
    for model, context, modules in prepared:
        _install(model, context, modules)
    dispatch.warn_of_reference(backend, next(models[0].parameters()).device)
    return pipe_or_transformer


def _check_planned_for(method: AttentionSpec | Assignment, models: list[Any], *, strict: bool) -> None:
    """Warn where a plan was made for another model; raise ArgumentError under `strict`. Weights are read for a plan alone."""
    if not isinstance(method, Assignment) or not method.of_model:
        return
    for model in models:
        heads = {name: heads_of(model, name, module)[0] for name, module in attention_layers(model).items()}
        try:
            difference = method.unlike(type(model).__name__, heads, functools.partial(known_hash, model))
        except DitAccelError as error:
            difference = f"its model's weights can't be compared with these ({error})"
        if difference is not None:
            message = f"the promised error of this plan is not valid here: {difference}"
            if strict:
                raise ArgumentError(f"{message}, or leave strict out")
            warnings.warn(f"dit_accel: {message}", stacklevel=3)


def _layers(model: Any, layers: Callable[[str, nn.Module], bool] | None) -> list[Layer]:
    """The attention modules that a user's predicate chooses, all without one. Raises UnsupportedModelError where there is none."""
    family = require_family(model)
    every = attention_layers(model)
    names = [name for name, module in every.items() if layers is None or layers(name, module)]
    if not names:
        raise UnsupportedModelError(f"no layer was chosen in {type(model).__name__}; its attention modules are {list(every)}")
    alone = {name for name in names if family.image_only is not None and re.fullmatch(family.image_only, name)}
    return [Layer(name, *heads_of(model, name, every[name]), name in alone) for name in names]


def _prepare(
    model: Any, assignment: Assignment, layers: list[Layer], settings: dict[str, Any]
) -> tuple[Context, list[tuple[str, Any, AcceleratedAttention, Any]]]:
    """Context, and (name, module, operator, processor) for each layer; the model is not changed."""
    every = {layer.name: model.get_submodule(layer.name) for layer in layers}
    check_sharing(model, getattr(model, "_parallel_config", None), require_family(model), layers, assignment)
    if any(p.device.type == "meta" for module in every.values() for p in module.parameters()):
        raise UnsupportedModelError(
            f"{type(model).__name__} is offloaded (its weights are on the meta device): accelerate it before offloading"
        )
    for spec in assignment.specs:
        for head_dim in {layer.head_dim for layer in layers if spec in assignment.specs_of(layer.name)}:
            dispatch.check_model(settings["backend"], head_dim, linear=lowering.has_states(spec))
    context = Context(require_family(model), assignment, forward_names(model), tuple(layers), **settings)
    modules = []
    for number, (name, module) in enumerate(every.items()):
        operator = AcceleratedAttention(context, layers[number], number)
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
        model.register_forward_pre_hook(patch.accelerate_new_processors),
        model.register_forward_pre_hook(context.before, with_kwargs=True),
        model.register_forward_hook(context.after, always_call=True),
        model.register_load_state_dict_pre_hook(rename),
        model.register_load_state_dict_post_hook(tolerate),
        model.register_state_dict_post_hook(hide),
    ]
    setattr(model, CONTEXT, patch)
    stand_ins = (SaveOriginal(model, only_original), UnloadLora(model, record_inseparable), EnableParallelism(model, _check_sharing))
    for stand_in in stand_ins:
        if hasattr(model, stand_in.name):
            setattr(model, stand_in.name, stand_in)


def _check_sharing(model: Any, config: Any) -> None:
    """Before an accelerated model is spread over processes: raise ValueError where it can't be."""
    context: Context = getattr(model, CONTEXT).context
    check_sharing(model, config, context.family, list(context.layers), context.assignment)


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
        for stand_in in (SaveOriginal, UnloadLora, EnableParallelism):
            vars(model).pop(stand_in.name, None)
        drop_carried(model)
        delattr(model, CONTEXT)
    return pipe_or_transformer


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
        scales = zero_own_lora(model)
    context.enabled = False
    try:
        yield
    finally:
        if getattr(model, CONTEXT, None) is patch:
            if outermost:
                check_exchange(model, patch)  # what was done to the model meanwhile is to be undone first; it is the original until then
                swap_weights(model, patch)
                scale_own_lora(model, scales)
            context.enabled = before
