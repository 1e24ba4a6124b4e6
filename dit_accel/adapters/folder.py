"""Saving what acceleration and distillation added to a pipeline, and loading it elsewhere.

A folder has `dit_accel_config.json` (method, layers, base model, training record, checksums), `diffusion_pytorch_model.safetensors` (the
layers' own parameters), and, where they were trained, `pytorch_lora_weights.safetensors` (a LoRA in diffusers' own format, loadable alone)
or `attention_weights.safetensors` (full projections) or `transformer_weights.safetensors` (all of the transformer's weights, as some
published checkpoints bring them). Nothing is pickled. Loading checks everything before it changes anything. `importers` reads what others
published.
"""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn as nn
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.adapters.base_model import base_model_name, licence_of, public_name
from dit_accel.adapters.importers import Base, Checkpoint, import_file, local_file, plain_parameters
from dit_accel.adapters.learned import under
from dit_accel.adapters.model_card import CARD, PICTURES, write_card
from dit_accel.errors import AdapterError, ArgumentError
from dit_accel.files import staged, write_json, write_tensors
from dit_accel.method.assignment import Assignment
from dit_accel.method.spec import AttentionSpec
from dit_accel.patch.anatomy import OWN, attention_layers, check_unfused, find_transformers, heads_of, plain_name, projection_names
from dit_accel.patch.fingerprint import Fingerprint, fingerprint, known_hash, same_weights
from dit_accel.patch.fingerprint import check as check_fingerprint
from dit_accel.patch.heads import Layer, joint_parameters
from dit_accel.patch.holders import Holders, is_offloaded, is_plain
from dit_accel.patch.lora import ADAPTER, activate_lora, check_user_lora_unfused, switched_off
from dit_accel.patch.state import Patch, operators_of, patches_of
from dit_accel.patch.verbs import accelerate, restore
from dit_accel.patch.weights import replace_weights
from dit_accel.pipelines import class_of

P = TypeVar("P")
CONFIG, WEIGHTS = "dit_accel_config.json", "diffusion_pytorch_model.safetensors"
LORA, FULL = "pytorch_lora_weights.safetensors", "attention_weights.safetensors"
WHOLE = "transformer_weights.safetensors"
VERSION = 2
FIRST_VERSION = 1  # one spec, and how many first steps it leaves to the original attention, in the place of an assignment


class DitAccelAdapter(ModelMixin, ConfigMixin):
    """The learned parameters of all accelerated layers of one transformer, as a diffusers model (hub, revisions, `push_to_hub`)."""

    config_name = CONFIG

    @register_to_config
    def __init__(
        self,
        assignment: dict[str, Any],
        layers: dict[str, tuple[int, int]],  # attention module -> (heads, head_dim)
        base_model_class: str,
        base_model_name: str = "",
        base_model_hash: str = "",
        base_model_fingerprint: Fingerprint | None = None,
        training: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,  # file -> SHA-256
        version: int = VERSION,
    ) -> None:
        super().__init__()
        parsed = Assignment.from_dict(assignment)
        made = {
            name: joint_parameters(parsed.specs_of(name), Layer(name, heads, width, image_only=False))
            for name, (heads, width) in layers.items()
        }
        self.layers = nn.ModuleDict({name.replace(".", "__"): module for name, module in made.items()})
        self.register_buffer("format", torch.tensor(VERSION))  # methods without parameters still make a valid file


def save_adapter(pipe_or_transformer: object, folder: str | Path, *, training: dict[str, Any] | None = None) -> Path:
    """Write the adapter of an accelerated pipeline to a folder (created if it does not exist), with a model card made from its config.

    Args:
        pipe_or_transformer: after `accelerate`, `distill` or `load_adapter`; one transformer is accelerated.
        folder: for `dit_accel_config.json`, the weights as safetensors, and `README.md`, the card.
        training: a record kept in the config and shown on the card, as are the pictures in the folder.

    Returns the folder. Offloaded weights are read from where they are kept. Raises NotAcceleratedError, AdapterError where the folder can't
    be written or what was trained is not in the model as it was (its LoRA was unloaded, or its weights were quantised), or DitAccelError
    where the original can't be distinguished from it.
    """
    patches = patches_of(pipe_or_transformer)
    if len(patches) != 1:
        raise AdapterError(f"an adapter is of one transformer, but {len(patches)} are accelerated: pass one of them")
    model, patch = patches[0]
    operators = operators_of(model)
    folder = Path(folder)
    _check_complete(model, patch)
    holders, loaded_from = Holders(model), base_model_name(pipe_or_transformer, model)
    own = {
        f"layers.{name.replace('.', '__')}.{k}": holders.value(f"{name}{OWN}{k}")
        for name, operator in operators.items()
        for k in operator.params.state_dict()
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with staged(folder) as stage:  # what is there already stays whole until all is written
            written = {WEIGHTS: write_tensors(stage / WEIGHTS, {**own, "format": torch.tensor(VERSION)}, {"format": "pt"})}
            if ADAPTER in getattr(model, "peft_config", {}):
                written[LORA] = write_tensors(stage / LORA, *_lora(model, holders))
            if patch.weights:
                name, full = _full_weights(model, patch, holders)
                written[name] = write_tensors(stage / name, full, {"format": "pt"})
            adapter = DitAccelAdapter(
                assignment=patch.context.assignment.to_dict(),
                layers={name: (op.heads, op.head_dim) for name, op in operators.items()},
                base_model_class=class_of(model).__name__,
                base_model_name=public_name(loaded_from),
                base_model_hash=known_hash(model),
                base_model_fingerprint=fingerprint(model),
                training=training,
                files={name: _sha256(path) for name, path in written.items()},
            )
            config = json.loads(adapter.to_json_string())
            write_json(stage / CONFIG, config)
        for name in {LORA, FULL, WHOLE} - set(written):
            (folder / name).unlink(missing_ok=True)  # of an adapter saved here before
        write_card(folder, config, licence_of(loaded_from))
    except OSError as error:  # a WriteError is one
        raise AdapterError(f"the adapter can't be written to {folder}: {error}") from error
    return folder


def _check_complete(model: Any, patch: Patch) -> None:
    """Raise AdapterError where what belongs to the adapter is not in the model any more."""
    if patch.lora and ADAPTER not in getattr(model, "peft_config", {}):
        raise AdapterError(
            f"the LoRA {ADAPTER!r} that belongs to the adapter was removed from the model, by unload_lora_weights() or delete_adapters(), "
            "so that what was trained can't be saved any more: load the adapter again"
        )
    trained = {plain_name(name): p for name, p in model.named_parameters() if f".{ADAPTER}." in name or plain_name(name) in patch.weights}
    quantised = [name for name, p in trained.items() if not is_plain(p)]
    if quantised:
        raise AdapterError(
            f"what was trained was quantised ({quantised[0]} the first), which loses some of it: save the adapter before quantising"
        )


def _lora(model: Any, holders: Holders) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The trained LoRA as diffusers stores one: tensors and metadata."""
    values = {name: holders.value(name) for name, _ in model.named_parameters() if f".{ADAPTER}." in name and OWN not in name}
    lora = {f"transformer.{k}": v for k, v in get_peft_model_state_dict(model, values, adapter_name=ADAPTER).items()}
    settings = model.peft_config[ADAPTER].to_dict()
    patterns = ("rank_pattern", "alpha_pattern")  # empty ones, which diffusers 0.36 reads
    kept = {k: settings[k] for k in ("r", "lora_alpha", "target_modules", *patterns)}
    meta = {f"transformer.{k}": sorted(v) if isinstance(v, set) else v for k, v in kept.items()}
    return lora, {"format": "pt", "lora_adapter_metadata": json.dumps(meta)}


def _full_weights(model: Any, patch: Patch, holders: Holders) -> tuple[str, dict[str, Tensor]]:
    """The file for full weights and what goes in: all of them, or every projection, those too that were left alone."""
    names = set(plain_parameters(model))
    file = WHOLE if set(patch.weights) == names else FULL
    if file == FULL:
        projections = projection_names(model, patch.originals)
        names = {name for name in names if name.rpartition(".")[0] in projections}
    trained = patch.weights if patch.swapped else {}  # within dense() the patch holds the trained values
    return file, {name: trained[name] if name in trained else holders.value(name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_adapter(
    pipe: P, path_or_repo: str | Path, *, spec: AttentionSpec | Assignment | None = None, backend: str = "auto", strict: bool = False
) -> P:
    """Accelerate a pipeline or transformer as an adapter says, with its weights; returns the same object.

    Args:
        path_or_repo: a folder of `save_adapter` or its hub id, or a checkpoint that others published: a file, or
            `owner/name/file.safetensors` on the hub. Known are CLEAR's files, TurboDiffusion's Wan weights and SimpleTuner's SLA
            projection (`importers`). Their weights replace the transformer's own until `restore`; `dense` runs its own.
        spec: the method of a published checkpoint, where its file does not tell it. An adapter of `save_adapter` names its method itself;
            an `Assignment` given, as a plan that `plan(trained=...)` made, runs in its place with what the adapter has learned.
        backend: as in `accelerate`.
        strict: as in `accelerate`.

    A pipeline with two transformers takes one adapter for each: pass them by themselves. Raises AdapterError where files are missing,
    damaged or unknown, or where they belong to another architecture; the pipeline is unchanged then. Base weights other than those that
    an adapter was made with are reported as a warning.
    """
    models = find_transformers(pipe)
    if len(models) != 1:
        raise AdapterError(f"the pipeline has {len(models)} transformers, each with an adapter of its own: pass one of them")
    (model,) = models
    file = local_file(path_or_repo)
    if file is None:
        found = read_folder(local_folder(path_or_repo), model, spec)
    elif isinstance(spec, Assignment):
        raise AdapterError(f"an assignment requires an adapter that save_adapter wrote, not the published file {file}: give it one spec")
    else:
        found = import_file(file, model, spec)
    if isinstance(spec, Assignment) and spec.of_model and spec.learned is None:
        _warn_of_start_values(path_or_repo, strict=strict)
    if found.weights or found.lora:
        check_unfused(model, found.layers, AdapterError)
        if is_offloaded(model):
            raise AdapterError(f"{type(model).__name__} is offloaded: load the adapter before offloading")
    accelerate(pipe, found.assignment, layers=lambda name, _: name in found.layers, backend=backend, strict=strict)
    try:
        _install_weights(model, found)
        differs = found.base is not None and not same_base(model, found.base)
    except BaseException:
        restore(pipe)
        raise
    if found.base is not None and differs:
        warnings.warn(other_base(path_or_repo, found.base), stacklevel=2)
    return pipe


def _warn_of_start_values(path_or_repo: str | Path, *, strict: bool) -> None:
    """Say that a plan was made without what an adapter has learned; raise ArgumentError under `strict`."""
    message = f"the promised error of this plan is not valid here: it was made without what the adapter in {path_or_repo} has learned"
    if strict:
        raise ArgumentError(f"{message}; make it with trained={str(path_or_repo)!r}, or leave strict out")
    warnings.warn(f"dit_accel: {message}; make it with trained={str(path_or_repo)!r}", stacklevel=3)


def other_base(path_or_repo: str | Path, base: Base) -> str:
    """What is said of an adapter that was made with other weights than the model's."""
    return f"the adapter in {path_or_repo} was made with the weights of {base.name or 'another model'}, which differ from these"


def same_base(model: Any, base: Base) -> bool:
    """Whether a model has the weights that an adapter was made with; an adapter without a fingerprint tells of the exact ones alone."""
    if base.fingerprint is None:
        return known_hash(model) == base.hash
    return same_weights(model, base.fingerprint, base.hash)


def read_folder(folder: Path, model: Any, spec: AttentionSpec | Assignment | None = None) -> Checkpoint:
    """The tensors in a folder of `save_adapter`, checked against the model. `spec`: as `load_adapter`'s."""
    config = read_config(folder)
    if isinstance(spec, AttentionSpec):
        raise AdapterError(f"the adapter in {folder} names its method itself: leave spec={spec} out")
    tensors = {name: read_tensors(folder / name, digest) for name, digest in config["files"].items()}
    assignment = parse_assignment(folder, config)
    _check_architecture(model, config, assignment, tensors)
    prefixes = {f"layers.{layer.replace('.', '__')}.": f"{layer}{OWN}" for layer in config["layers"]}
    parts = {key: (prefix, ours) for prefix, ours in prefixes.items() for key in tensors[WEIGHTS] if key.startswith(prefix)}
    own = {ours + key.removeprefix(prefix): tensors[WEIGHTS][key] for key, (prefix, ours) in parts.items()}
    matters = config["base_model_hash"] and WHOLE not in tensors  # where all weights are the adapter's, the model's own don't
    found = Checkpoint(
        assignment,
        config["layers"],
        own,
        tensors.get(WHOLE, tensors.get(FULL, {})),
        tensors.get(LORA, {}),
        Base(config["base_model_name"], config["base_model_hash"], config["base_model_fingerprint"]) if matters else None,
        config["files"][WEIGHTS],
    )
    return found if spec is None else under(spec, found, model, folder)


def push_adapter(folder: str | Path, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Upload an adapter's folder, card and pictures to the hub repository `owner/name`, created if it does not exist; gives its address.

    The folder is checked first as `load_adapter` does. Raises AdapterError where it is damaged, or where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    folder = Path(folder)
    for name, digest in read_config(folder)["files"].items():
        read_tensors(folder / name, digest)
    api, shown = HfApi(token=token), [f"*{ending}" for ending in PICTURES]
    try:
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, allow_patterns=[CONFIG, WEIGHTS, LORA, FULL, WHOLE, CARD, *shown])
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise AdapterError(f"{folder} can't be uploaded to {repo!r}: {error}") from error
    return address


def parse_assignment(folder: Path, config: dict[str, Any]) -> Assignment:
    """The config's assignment, its other values checked on the way. Raises AdapterError."""
    layers = config["layers"]
    sizes = (
        isinstance(layers, dict)
        and layers
        and all(isinstance(v, list) and len(v) == 2 and all(type(n) is int and n >= 1 for n in v) for v in layers.values())
    )
    if not sizes:
        raise AdapterError(f"{folder / CONFIG} must have layers with [heads, width] each, not {layers}")
    try:
        if config["base_model_fingerprint"] is not None:
            check_fingerprint(config["base_model_fingerprint"])
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG} is damaged: {error}") from error
    try:
        assignment = Assignment.from_dict(config["assignment"])
        for name, (heads, width) in layers.items():
            if not assignment.specs_of(name):
                raise ArgumentError(f"no rule of its assignment gives a spec to the layer {name}")
            joint_parameters(assignment.specs_of(name), Layer(name, heads, width, image_only=False))
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG} is damaged: {error}") from error
    return assignment


def local_folder(path_or_repo: str | Path) -> Path:
    """The folder itself, or the local copy of a hub id. Raises AdapterError where it is neither."""
    folder = Path(path_or_repo)
    if folder.is_dir():
        return folder
    if isinstance(path_or_repo, Path) or path_or_repo.count("/") != 1 or path_or_repo.startswith((".", "/")):
        raise AdapterError(f"{str(path_or_repo)!r} is neither a folder made by save_adapter nor a hub id owner/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path_or_repo, allow_patterns=[CONFIG, WEIGHTS, LORA, FULL, WHOLE]))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path_or_repo!r} is neither a folder made by save_adapter nor the id of one on the hub: {error}") from error


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config with exactly the fields that DitAccelAdapter has; one of the first format in the form of today's."""
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"{CONFIG} in {folder} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{folder / CONFIG} must contain a JSON object, not a {type(config).__name__}")
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    if config.get("version") not in (VERSION, FIRST_VERSION):
        raise AdapterError(f"{folder / CONFIG} must have version {VERSION} or {FIRST_VERSION}, not {config.get('version')}")
    method = {"assignment"} if config["version"] == VERSION else {"spec", "dense_steps"}
    expected = method | {
        "layers", "base_model_class", "base_model_name", "base_model_hash", "base_model_fingerprint", "training", "files", "version",
    }  # fmt: skip
    config.setdefault("base_model_fingerprint", None)  # adapters that were saved before there were any
    if set(config) != expected:
        raise AdapterError(f"{folder / CONFIG} must have the fields {sorted(expected)}, not {sorted(config)}")
    if config["version"] == FIRST_VERSION:
        config["assignment"] = _assignment_of_first(folder, config.pop("spec"), config.pop("dense_steps"))
    files = config["files"]
    if not isinstance(files, dict) or WEIGHTS not in files or not set(files) <= {WEIGHTS, LORA, FULL, WHOLE} or {FULL, WHOLE} <= set(files):
        raise AdapterError(f"{folder / CONFIG} must name the files {WEIGHTS}, perhaps {LORA}, perhaps {FULL} or {WHOLE}, not {files}")
    return config


def _assignment_of_first(folder: Path, spec: Any, dense_steps: Any) -> dict[str, Any]:
    """What a config of the first format says, as an assignment."""
    if type(dense_steps) is not int or dense_steps < 0:
        raise AdapterError(f"{folder / CONFIG} must have dense_steps >= 0, not {dense_steps}")
    try:
        return Assignment.of(AttentionSpec.from_dict(spec), dense_steps=dense_steps).to_dict()
    except (ValueError, TypeError) as error:
        raise AdapterError(f"{folder / CONFIG} contains no spec: {error}") from error


def read_tensors(path: Path, digest: str) -> dict[str, Tensor]:
    """The tensors of a file of an adapter. Raises AdapterError where it is damaged or altered."""
    try:
        found = _sha256(path)
        if found != digest:
            raise AdapterError(f"{path} is damaged or altered: its SHA-256 is {found[:16]}, not {digest[:16]}")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{path} can't be read: {error}") from error


def _check_architecture(model: Any, config: dict[str, Any], assignment: Assignment, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Raise AdapterError unless class, layers and every tensor's name and shape fit the model, in both directions."""
    if LORA in tensors and ADAPTER in getattr(model, "peft_config", {}):
        raise AdapterError(f"the model already has a LoRA named {ADAPTER!r}; delete it first")
    if LORA in tensors and switched_off(model):
        raise AdapterError("LoRA is disabled on this model, and the adapter's would be too: call enable_lora() or delete_adapters() first")
    if LORA in tensors:
        check_user_lora_unfused(model, AdapterError)
    classes = [cls.__name__ for cls in type(model).__mro__]
    if config["base_model_class"] not in classes:
        raise AdapterError(f"the adapter is for a {config['base_model_class']}, not for a {type(model).__name__}")
    modules: dict[str, Any] = dict(model.named_modules())
    layers = attention_layers(model)
    for name, (heads, width) in config["layers"].items():
        got = heads_of(model, name, layers[name]) if name in layers else None
        if got != (heads, width):
            raise AdapterError(f"the adapter is for {name} with {heads} heads of {width}, but the model has {got or 'no such layer'}")
    try:
        assignment.check([{name: heads_of(model, name, module)[0] for name, module in layers.items()}])
    except ArgumentError as error:
        raise AdapterError(f"the adapter's assignment does not fit the model: {error}") from error
    own = DitAccelAdapter(assignment=assignment.to_dict(), layers=config["layers"], base_model_class=config["base_model_class"])
    _compare(WEIGHTS, {k: tuple(v.shape) for k, v in own.state_dict().items()}, tensors[WEIGHTS])
    projections = projection_names(model, config["layers"]) if {LORA, FULL} & set(tensors) else []
    if LORA in tensors:
        rank = next((v.shape[0] for k, v in tensors[LORA].items() if ".lora_A." in k), 1)
        expected = {f"transformer.{n}.lora_A.weight": (rank, modules[n].in_features) for n in projections}
        expected |= {f"transformer.{n}.lora_B.weight": (modules[n].out_features, rank) for n in projections}
        _compare(LORA, expected, tensors[LORA])
    parameters = {k: tuple(p.shape) for k, p in plain_parameters(model).items()}
    if FULL in tensors:
        _compare(FULL, {k: v for k, v in parameters.items() if k.rpartition(".")[0] in projections}, tensors[FULL])
    if WHOLE in tensors:
        _compare(WHOLE, parameters, tensors[WHOLE])


def _compare(file: str, expected: Mapping[str, tuple[int, ...]], got: dict[str, Tensor]) -> None:
    found = {k: tuple(v.shape) for k, v in got.items()}
    if found == expected:
        return
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    wrong = sorted(k for k in set(expected) & set(found) if expected[k] != found[k])
    shapes = [f"{k}: {found[k]}, not {expected[k]}" for k in wrong]
    raise AdapterError(f"{file} does not fit the model: missing {missing[:4]}, unknown {unknown[:4]}, wrong shapes {shapes[:4]}")


def _install_weights(model: Any, found: Checkpoint) -> None:
    with torch.no_grad():
        for name, value in found.own.items():
            model.get_parameter(name).copy_(value)
    if found.lora:
        active = model.active_adapters() if getattr(model, "peft_config", None) else []
        _load_lora(model, found.lora)
        activate_lora(model, active)
    (_, patch), *_ = patches_of(model)
    patch.context.trained, patch.lora = bool(found.lora or found.weights), bool(found.lora)
    replace_weights(model, patch, found.weights)


def _load_lora(model: Any, lora: dict[str, Tensor]) -> None:
    plain = {k.removeprefix("transformer."): v for k, v in lora.items()}
    rank = next(v.shape[0] for k, v in plain.items() if ".lora_A." in k)
    targets = sorted({k.rsplit(".lora_", 1)[0] for k in plain})
    flags = {plain_name(name): p.requires_grad for name, p in model.named_parameters()}
    gpus = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=gpus):  # it draws first values, which are replaced below
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), adapter_name=ADAPTER)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, value in plain.items():
            name = key.replace(".weight", f".{ADAPTER}.weight")
            parameters[name].data = value.to(parameters[name].device)
    for name, parameter in parameters.items():
        parameter.requires_grad_(flags.get(plain_name(name), False))
