"""The only code that touches a user's model: `accelerate`, `restore`, `dense`."""

import contextlib
import hashlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from dit_accel.context import Context, Steps
from dit_accel.errors import AlreadyAcceleratedError, DitAccelError, NotAcceleratedError, UnsupportedModelError
from dit_accel.kernels import dispatch
from dit_accel.lora import ADAPTER, check_apart, scale_lora, silence_lora, unwrap_lora, works
from dit_accel.mask_check import MaskCheck
from dit_accel.pipelines import FAMILIES, class_of, family_of, why_no_family
from dit_accel.presets import Fovea
from dit_accel.processor import AcceleratedAttention, AcceleratedProcessor, accelerated_copy
from dit_accel.saving import SaveOriginal
from dit_accel.spec import AttentionSpec

P = TypeVar("P")
CONTEXT = "_dit_accel"  # attribute of an accelerated transformer
OWN = ".dit_accel.params."  # in the names of a method's own parameters
# what distillation trains of an attention module, where it is there
PROJECTIONS = (
    "to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",
    "to_query", "to_key", "to_value", "out_layer", "img_qkv_proj", "txt_kv_proj",
    "img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj",
    "to_q_t", "to_k_t", "to_v_t", "to_out_t", "to_out", "to_gate",
    "to_qkv_mlp_proj",  # of FLUX.2's parallel blocks, with their MLP's first layer in one
)  # fmt: skip


@dataclass
class Patch:
    """What undoes the patch of one transformer: its context, the original processors, the hooks, the weights that distillation changed."""

    context: Context
    originals: dict[str, list[tuple[Any, Any]]]  # module name -> (original processor, ours), the newest last
    hooks: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> its other value: the original, or in dense() the trained
    lora: bool = False  # whether a LoRA of ours belongs to the patch and was not found switched off

    def take_over(self, model: Any, args: Any = None) -> None:
        """Forward pre-hook: accelerate processors that were put in since, as fuse_qkv_projections and loading an IP-Adapter do."""
        if torch.compiler.is_compiling():
            return
        if self.context.trained:
            check_unfused(model, self.originals, UnsupportedModelError)
        if self.lora and not works(model):
            self.lora = False  # said once
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
        dense_steps: the first denoising steps of every run that keep the original attention.
        backend: which implementation; "auto" chooses, and `summary` tells.
        strict: raise FallbackError where a call would have to run its original attention, and run the method where that is slower.
        trained_tokens: how many tokens, text and image, the sequences had that the model was trained on (4608 for FLUX.1). Given, the
            logits of a sequence of N tokens are scaled by sqrt(log N / log trained_tokens), CLEAR's proportional attention for high
            resolution, and the method runs even where it is slower.

    Where the original attention is faster (measured once per size, on a CPU) an untrained patch runs it under backend "auto".
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
    models = find_transformers(pipe_or_transformer)
    for model in models:
        if hasattr(model, CONTEXT):
            patch: Patch = getattr(model, CONTEXT)
            raise AlreadyAcceleratedError(
                f"{type(model).__name__} is accelerated already, with {patch.context.spec}; call restore(...) first"
            )
    settings: dict[str, Any] = {
        "steps": Steps(), "dense_steps": dense_steps, "backend": backend, "strict": strict, "trained_tokens": trained_tokens,
    }  # fmt: skip
    prepared = [_prepare(model, spec, layers, settings) for model in models]  # whatever can fail fails here
    for model, (context, modules) in zip(models, prepared, strict=True):
        _install(model, context, modules)
    if backend == "auto" and models[0].device.type == "cpu" and dispatch.CPU_TARGET == "none":
        warnings.warn(f"{dispatch.NOT_BUILT}; until then the slower reference runs", stacklevel=2)
    return pipe_or_transformer


def check_trained_tokens(tokens: int | None) -> None:
    """Raise ValueError unless it is None or a number of tokens whose logarithm can divide."""
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 2):
        raise ValueError(f"trained_tokens is a number of tokens >= 2 or None, got {tokens!r}")


def find_transformers(pipe_or_transformer: object) -> list[Any]:
    """The transformers of supported families in a pipeline, or the given transformer. Raises UnsupportedModelError if there is none."""
    target = getattr(pipe_or_transformer, "_orig_mod", pipe_or_transformer)  # torch.compile's wrapper
    components = getattr(target, "components", None)
    if isinstance(target, nn.Module) or not isinstance(components, dict):
        candidates = [target]
    else:
        candidates = [getattr(c, "_orig_mod", c) for c in components.values() if isinstance(c, nn.Module)]
    found = [c for c in candidates if family_of(c)]
    if not found:
        raise UnsupportedModelError(_why_unsupported(candidates))
    return found


def _why_unsupported(candidates: list[Any]) -> str:
    """What was found instead of a supported transformer, and what is missing to support it."""
    if reasons := [reason for c in candidates if (reason := why_no_family(c))]:
        return reasons[0]
    names = [type(c).__name__ for c in candidates]
    found = {type(c).__name__: n for c in candidates if isinstance(c, nn.Module) and (n := _attention_modules(c))}
    if not found:
        supported = ", ".join(name for family in FAMILIES for name in family.classes)
        return f"no transformer of a supported family: wanted one of {supported}, got {', '.join(sorted(set(names))) or 'nothing'}"
    kinds = "; ".join(f"{name}: {', '.join(modules)}" for name, modules in found.items())
    return (
        f"no family is registered for {' or '.join(found)}. Its attention modules are {kinds}. What is missing is a declaration of which "
        "of them are image self-attention, where the grid comes from and where the text stands: "
        "dit_accel.pipelines.register(Family(...)), as samples/new_family.py shows"
    )


def _attention_modules(model: nn.Module) -> list[str]:
    """Names of the modules with an attention processor, numbers as N, and what processes each."""
    found = {re.sub(r"\d+", "N", name): type(m.processor).__name__ for name, m in model.named_modules() if hasattr(m, "processor")}
    return [f"{name} ({processor})" for name, processor in found.items()]


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
    context = Context(family, spec, forward_names(model), shapes[chosen[0][0]][1], **settings)
    modules = []
    for name, module in chosen:
        heads, head_dim = shapes[name]
        alone = family.alone is not None and re.fullmatch(family.alone, name) is not None
        operator = AcceleratedAttention(spec, context, name, heads=heads, head_dim=head_dim, alone=alone)
        modules.append((name, module, operator.to(next(module.parameters()).device), accelerated_copy(module.processor)))
    return context, modules


def attention_layers(model: Any) -> dict[str, Any]:
    """The attention modules that `accelerate` replaces in a transformer, by name; none where no family fits."""
    family = family_of(model)
    return {name: m for name, m in model.named_modules() if family is not None and re.fullmatch(family.modules, name)}


def projection_names(model: Any, layers: Iterable[str]) -> list[str]:
    """Full names of the linear projections of those attention modules: what distillation trains."""
    modules = dict(model.named_modules())
    names = [f"{layer}.{leaf}" for layer in layers for leaf in PROJECTIONS]
    return [n for n in names if isinstance(modules.get(n), nn.Linear) or hasattr(modules.get(n), "base_layer")]


def check_unfused(model: Any, layers: Iterable[str], error: type[DitAccelError]) -> None:
    """Raise `error` where the q, k and v projections of those attention modules are fused: a LoRA or trained weights would do nothing."""
    fused = [name for name in layers if getattr(model.get_submodule(name), "fused_projections", False)]
    if fused:
        raise error(
            f"wanted projections that are not fused, as fused ones run neither a LoRA nor trained weights, got {len(fused)} fused layers "
            f"({fused[0]} the first): call unfuse_qkv_projections() before"
        )


def heads_of(name: str, module: Any) -> tuple[int, int]:
    """Number of query heads of an attention module and channels per head. Raises UnsupportedModelError where they can't be told."""
    heads = next((n for name in ("heads", "num_heads", "num_attention_heads") if (n := getattr(module, name, None))), None)
    projection = getattr(module, "to_q", None) or getattr(module, "to_query", None)
    width = getattr(module, "inner_dim", None) or getattr(projection, "out_features", None)
    head_dim = width // heads if isinstance(width, int) and isinstance(heads, int) else getattr(module, "head_dim", None)
    if not isinstance(heads, int) or not isinstance(head_dim, int):
        raise UnsupportedModelError(f"{name} ({type(module).__name__}) tells neither heads and inner_dim nor heads and head_dim")
    return heads, head_dim


def forward_names(model: Any) -> list[str]:
    """Names of a supported transformer's forward arguments, from its family's class (subclasses may hide them)."""
    owner: Any = class_of(model)
    return list(inspect.signature(owner.forward).parameters)[1:]


def _install(model: Any, context: Context, modules: list[tuple[str, Any, AcceleratedAttention, Any]]) -> None:
    originals = {}
    for name, module, operator, processor in modules:
        originals[name] = [(module.processor, processor)]
        module.dit_accel = operator.train(module.training)
        module.processor = processor
    patch = Patch(context, originals)
    patch.hooks = [
        model.register_forward_pre_hook(patch.take_over),
        model.register_forward_pre_hook(context.before, with_kwargs=True),
        model.register_forward_pre_hook(MaskCheck(context).before, with_kwargs=True),
    ]
    setattr(model, CONTEXT, patch)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = SaveOriginal(model, only_original)


def restore(pipe_or_transformer: P) -> P:
    """Undo `accelerate` and `distill`: the original processor objects and weights, no operators, no LoRA of ours, no hooks.

    Raises NotAcceleratedError if there is nothing to undo, and DitAccelError where `fuse_lora` put our LoRA into the weights.
    """
    patches = patches_of(pipe_or_transformer)
    for model, _ in patches:
        check_apart(model)
    for model, patch in patches:
        _swap_weights(model, patch)
        if ADAPTER in getattr(model, "peft_config", {}):
            flags = {plain_name(name): p.requires_grad for name, p in model.named_parameters()}
            model.delete_adapters(ADAPTER)
            unwrap_lora(model)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(flags[plain_name(name)])
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
        vars(model).pop("save_pretrained", None)
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
    NotAcceleratedError, or DitAccelError where `fuse_lora` put what distillation trained into the weights.
    """
    patches = patches_of(pipe_or_transformer)
    for model, _ in patches:
        check_apart(model)
    before = [patch.context.enabled for _, patch in patches]
    scales: list[dict[str, float]] = [{} for _ in patches]
    try:
        for number, ((model, patch), enabled) in enumerate(zip(patches, before, strict=True)):
            if enabled:
                _swap_weights(model, patch)
                scales[number] = silence_lora(model)
            patch.context.enabled = False
        yield pipe_or_transformer
    finally:
        for (model, patch), enabled, scale in zip(patches, before, scales, strict=True):
            if enabled and not patch.context.enabled:
                _swap_weights(model, patch)
                scale_lora(model, scale)
            patch.context.enabled = enabled


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


def _swap_weights(model: Any, patch: Patch) -> None:
    """Exchange the trained values of fully trained weights with the original ones, in place; without them, nothing."""
    for name, other in patch.weights.items():
        parameter = model.get_parameter(name)
        patch.weights[name] = parameter.data
        parameter.data = other.to(parameter.device, parameter.dtype)


def plain_name(name: str) -> str:
    """A parameter's name without the level that PEFT puts in."""
    return name.replace(".base_layer.", ".")


def _ours(name: str) -> bool:
    """Whether a name in a state dict is a method's own parameter or of the LoRA that distillation trains."""
    return f".{ADAPTER}." in name


def _original_weights(model: nn.Module) -> dict[str, Tensor]:
    """The user's own values of weights that stand changed in the model. Raises DitAccelError where they can't be told."""
    check_apart(model)
    patch: Patch | None = getattr(model, CONTEXT, None)
    return patch.weights if patch and patch.context.enabled else {}


def only_original(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of an accelerated transformer as it would be without `accelerate` and `distill`; a user's own LoRA stays in it."""
    originals = _original_weights(model)
    kept = {name: value for name, value in state.items() if not _ours(name)}
    if set(getattr(model, "peft_config", {})) <= {ADAPTER}:
        kept = {plain_name(name): value for name, value in kept.items()}
    return {name: originals.get(plain_name(name), value) for name, value in kept.items()}


def weights_hash(transformer: nn.Module) -> str:
    """SHA-256 of all weights that a forward uses, a method's own and every LoRA's among them."""
    return _hash((name, name, tensor) for name, tensor in transformer.state_dict().items())


def teacher_hash(transformer: nn.Module) -> str:
    """SHA-256 of the original weights: all parameters but those that acceleration and distillation add or change back."""
    originals = _original_weights(transformer)
    own = [(name, plain_name(name), tensor) for name, tensor in transformer.state_dict().items() if not _ours(name)]
    return _hash((name, plain, originals.get(plain, tensor)) for name, plain, tensor in own)


def _hash(tensors: Iterable[tuple[str, str, Tensor]]) -> str:
    """Of (name to sort by, name, tensor)."""
    digest = hashlib.sha256()
    for _, name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        for part in _stored(tensor.detach()):
            digest.update(part.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _stored(tensor: Any) -> Iterator[Tensor]:
    """A tensor itself, or the plain tensors that a quantised one is made of: torchao's refuse to be seen as bytes."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _stored(getattr(tensor, name))
