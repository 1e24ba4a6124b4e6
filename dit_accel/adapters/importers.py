"""Checkpoints that others published: recognised by the names of their tensors, checked against a transformer, ready for `load_adapter`.

- CLEAR's files (arXiv 2412.16112) for FLUX.1: q, k, v and output weights of every attention, and the pooling weights of the `down`
  variants. Radius and factor are in the file's name.
- TurboDiffusion's weights (arXiv 2512.16093) for Wan: the whole transformer and the projection of SLA's linear part in every layer, as
  floats or int8 tiles, under any of the names in `wan_names`. They are distilled to one to four steps as well, so they require a few-step
  sampler in addition to the method.
- One SLA projection for all layers, as SimpleTuner trains it: the state of one module of SLA's released code (arXiv 2509.24006). Where
  text and image share the attention, that code put the text into blocks too, and ours never does: there it is a start for a distillation.

Every tensor must have its place and every place its tensor; names, shapes and types are compared before a value is read. Only safetensors
are read: a pickle can run code.
"""

import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_accel.adapters.wan_names import INT8, SCALE, bare, dequantised, is_wan, schemes, tile_grid, wan_parameter
from dit_accel.errors import AdapterError
from dit_accel.method import AttentionSpec, Disc, Downsampled, Linear, Residual
from dit_accel.method.assignment import Assignment
from dit_accel.method.presets import CLEAR, SLA
from dit_accel.patch.anatomy import OWN, attention_layers, heads_of, plain_name
from dit_accel.pipelines import class_of

Shape = tuple[int, ...]
Places = dict[str, str]  # parameter of the accelerated transformer -> the file's tensor
Required = dict[str, tuple[Shape, ...]]  # parameter -> the shapes that its tensor may have in the file
SUFFIX = ".safetensors"
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
FLOATS = ("BF16", "F16", "F32", "F64")  # as safetensors names types
CLEAR_NAME = re.compile(r"clear_local_(\d+)(?:_down_(\d+))?")
CLEAR_WEIGHT = re.compile(r"(?:single_)?transformer_blocks\.\d+\.attn\.(?:to_[qkv]|to_out\.0)\.(?:weight|bias)")
CLEAR_POOLING = re.compile(r"((?:single_)?transformer_blocks\.\d+\.attn)\.processor\.spatial_weight")
CLEAR_LEAVES = ("to_q", "to_k", "to_v", "to_out.0")
SHARED = {"proj_l.weight": "proj.weight", "proj_l.bias": "proj.bias"}
TURBO = SLA(0.1, scope="all", block=(128, 64))  # as the released weights are run


class Kind(Enum):
    """The published files that are known."""

    CLEAR = "attention weights of CLEAR (arXiv 2412.16112), for FluxTransformer2DModel"
    TURBO = "weights of TurboDiffusion (arXiv 2512.16093), for WanTransformer3DModel"
    SHARED = "one SLA projection for all layers (SimpleTuner)"


class TensorInfo(NamedTuple):
    """Shape and type of one tensor in a file's header; `dtype` as safetensors names it."""

    shape: Shape
    dtype: str


Header = Mapping[str, TensorInfo]


class Base(NamedTuple):
    """The weights that an adapter was made with: name, exact hash, and a fingerprint (`fingerprint`) where there is one."""

    name: str
    hash: str
    fingerprint: dict[str, list[str]] | None


@dataclass(frozen=True)
class Checkpoint:
    """The tensors that `load_adapter` installs in one transformer, checked against it.

    `own`: the method's parameters by their names in the accelerated transformer. `weights`: values for the transformer's own parameters,
    by name. `lora`: a LoRA as diffusers saves it. `base`: the weights that it was made with, where they matter. `digest`: the SHA-256 of
    the file that `own` is from, of a folder of `save_adapter`.
    """

    assignment: Assignment
    layers: Collection[str]
    own: dict[str, Tensor]
    weights: dict[str, Tensor]
    lora: dict[str, Tensor] = field(default_factory=dict)
    base: Base | None = None
    digest: str | None = None


# Finding and reading


def local_file(path_or_repo: str | Path) -> Path | None:
    """The published file that is meant, fetched where it is `owner/name/file.safetensors` on the hub; None for a folder or a hub id.

    Raises AdapterError for a file of another type, with the way to convert a pickle, or where there is none.
    """
    path, text = Path(path_or_repo), str(path_or_repo)
    if path.is_dir() or not (path.is_file() or path.suffix in (SUFFIX, *PICKLES)):
        return None
    if path.suffix in PICKLES:
        _refuse_pickle(path)
    if path.suffix != SUFFIX:
        raise AdapterError(f"{text} is neither a folder made by save_adapter nor a {SUFFIX} file")
    if path.is_file():
        return path
    if isinstance(path_or_repo, Path) or text.startswith((".", "/", "~")) or text.count("/") < 2:
        raise AdapterError(f"{text!r} is not there: name a file, or owner/name/file{SUFFIX} of the hub")
    from huggingface_hub import hf_hub_download

    owner, name, file = text.split("/", 2)
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{text!r} can't be downloaded: name a file, or owner/name/file{SUFFIX} of the hub: {error}") from error


def _refuse_pickle(path: Path) -> NoReturn:
    raise AdapterError(
        f"{path} is not a {SUFFIX} file but a pickle, which can run code when it is read. Convert it once, if you trust its origin: "
        "python -c 'import torch; from safetensors.torch import save_file; "
        f'tensors = torch.load("{path}", map_location="cpu", weights_only=True); '
        f'save_file({{name: x.clone() for name, x in tensors.items()}}, "{path.with_suffix(SUFFIX)}")\'. '
        'Of SimpleTuner\'s sla_attention.pt save tensors["state"]["128:bf16"], the entry of the model\'s head size'
    )


def read_header(file: Path) -> Header:
    """Shapes and types of a file's tensors. Raises AdapterError where it is no whole safetensors file."""
    try:
        with safe_open(file, framework="pt") as handle:
            slices = {key: handle.get_slice(key) for key in handle.keys()}  # noqa: SIM118 - the handle is no mapping
            return {key: TensorInfo(tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{file} can't be read as {SUFFIX}: {error}") from error


def recognise(file: Path, header: Header) -> Kind:
    """Which kind of published file this is, by its tensors' names. Raises AdapterError where it is none."""
    if any(key in SHARED for key in header):
        return Kind.SHARED
    if is_wan(header):
        return Kind.TURBO
    if any(CLEAR_WEIGHT.fullmatch(key) or CLEAR_POOLING.fullmatch(key) for key in header):
        return Kind.CLEAR
    known = "; ".join(kind.value for kind in Kind)
    raise AdapterError(f"{file} is no published checkpoint that is known ({known}): its tensors are {sorted(header)[:4]} of {len(header)}")


def import_file(file: Path, model: Any, spec: AttentionSpec | None = None) -> Checkpoint:
    """A published file, checked against a transformer, which is not changed. `spec`: the method, where the file does not tell it.

    Raises AdapterError where the file is damaged or unknown, is for another class, or has unknown, missing or wrongly shaped tensors, and
    where `spec` contradicts what the file says.
    """
    spec, places, shapes = match_header(file, read_header(file), model, spec)
    parameters = plain_parameters(model)
    values = _read(file, places, shapes, {name: p.dtype for name, p in parameters.items()})
    weights = {name: values.pop(name) for name in list(values) if name in parameters}
    return Checkpoint(Assignment.of(spec), list(attention_layers(model)), values, weights)


def match_header(file: Path, header: Header, model: Any, spec: AttentionSpec | None) -> tuple[AttentionSpec, Places, dict[str, Shape]]:
    """The method, each parameter's tensor in the file, and its shape in the accelerated model. Raises AdapterError as `import_file`."""
    kind = recognise(file, header)
    spec = method_of(kind, file, header, spec)
    wanted_class = {Kind.CLEAR: "FluxTransformer2DModel", Kind.TURBO: "WanTransformer3DModel"}.get(kind)
    if wanted_class not in (None, class_of(model).__name__):
        raise AdapterError(f"{file} contains {kind.value}, which don't fit a {type(model).__name__}")
    layers = {name: heads_of(model, name, module) for name, module in attention_layers(model).items()}
    shapes = {name: tuple(p.shape) for name, p in plain_parameters(model).items()}
    learned = {f"{n}{OWN}{k}": tuple(p.shape) for n, (h, d) in layers.items() for k, p in _learned(spec, h, d)}
    match kind:
        case Kind.CLEAR:
            places, required = _clear_places(header, layers, shapes, learned)
        case Kind.TURBO:
            places, required = _turbo_places(file, header, shapes, learned)
        case Kind.SHARED:
            places = {name: key for name in learned for key in header if SHARED.get(key) == name.partition(OWN)[2]}
            required = {name: (shape,) for name, shape in learned.items()}
    _compare(file, header, places, required)
    return spec, places, shapes | learned


def _learned(spec: AttentionSpec, heads: int, head_dim: int) -> Iterable[tuple[str, nn.Parameter]]:
    return spec.make_parameters(heads=heads, head_dim=head_dim).named_parameters()


def plain_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """A transformer's own parameters by the names that they have without LoRA and without acceleration."""
    return {plain_name(name): p for name, p in model.named_parameters() if OWN not in name and ".lora_" not in name}


# Methods


def method_of(kind: Kind, file: Path, header: Header, spec: AttentionSpec | None) -> AttentionSpec:
    """The method that a file's weights were made for: as the file says, or as `spec` does. Raises AdapterError where the two disagree."""
    if kind is Kind.CLEAR:
        return _clear_method(file, header, spec)
    if spec is None and kind is Kind.SHARED:
        raise AdapterError(f"{file} does not tell its method: give spec=SLA(topk, scope='all'), with 0.2 for SimpleTuner's own default")
    spec = spec or TURBO
    if spec.find(Linear) is None or spec.find(Residual) is None:
        raise AdapterError(f"{file} contains {kind.value}, which requires spec=SLA(...) with a linear rest, not {spec}")
    return spec


def _clear_method(file: Path, header: Header, spec: AttentionSpec | None) -> AttentionSpec:
    """CLEAR with the radius and the factor of the file's name, or `spec`."""
    pooled = any(CLEAR_POOLING.fullmatch(key) for key in header)
    if named := CLEAR_NAME.fullmatch(file.stem):
        published = CLEAR(int(named[1]), downsample=int(named[2]) if named[2] else None)
        if spec is not None and (published.keep[0] not in spec.keep or published.rest != spec.rest):
            raise AdapterError(f"{file} is of {published} by its name, not of spec={spec}: leave spec out")
        spec = spec or published
    if spec is None:
        down, more = ("_down_4", ", downsample=4") if pooled else ("", "")
        raise AdapterError(
            f"{file} does not tell its radius: give it its published name, as clear_local_16{down}{SUFFIX}, or pass spec=CLEAR(16{more})"
        )
    factors = spec.find(Downsampled)
    if spec.find(Disc) is None or spec.rest != factors:
        raise AdapterError(f"{file} contains {Kind.CLEAR.value}, which require spec=CLEAR(radius), not {spec}")
    if pooled != (factors is not None):
        raise AdapterError(f"{file} contains {'' if pooled else 'no '}pooling weights, which does not fit {spec}")
    return spec


# Where each parameter's tensor is


def _clear_places(
    header: Header, layers: Collection[str], shapes: Mapping[str, Shape], learned: Mapping[str, Shape]
) -> tuple[Places, Required]:
    """Parameters have diffusers' names; pooling weights `[f, f]` have the shape `[1, 1, 1, f, 1, f, 1]`."""
    names = (f"{layer}.{leaf}.{part}" for layer in layers for leaf in CLEAR_LEAVES for part in ("weight", "bias"))
    required: Required = {name: (shapes[name],) for name in names if name in shapes}
    required |= {name: ((1, 1, 1, f, 1, f, 1),) for name, (f, _) in learned.items()}
    return {CLEAR_POOLING.sub(rf"\1{OWN}spatial_weight", key): key for key in header}, required


def _turbo_places(file: Path, header: Header, shapes: Mapping[str, Shape], learned: Mapping[str, Shape]) -> tuple[Places, Required]:
    """All parameters of the transformer and the projections. The patch embedding may be a matrix, a weight int8 with its scales."""
    found, stems = schemes(header)
    if len(found) != 1 or len(stems) > 1:
        raise AdapterError(f"{file} must have one naming scheme of Wan's weights, not {found} with projections under {stems}")
    places: Places = {}
    for key, name in bare(header).items():
        parameter = wan_parameter(name, found[0])
        if parameter in places:
            raise AdapterError(f"{file} has {parameter} twice, as {places[parameter]} and {key}")
        places[parameter] = key
    required: Required = {name: (shape,) for name, shape in {**shapes, **learned}.items()}
    patch = shapes.get("patch_embedding.weight", ())
    required["patch_embedding.weight"] = (patch, (patch[0], math.prod(patch[1:])))
    quantised = [name for name, key in places.items() if key.endswith(INT8)]
    required |= {_scale_of(name): (tile_grid(header[places[name]].shape),) for name in quantised}
    return places, required


def _scale_of(weight: str) -> str:
    return weight.removesuffix(".weight") + SCALE


def _compare(file: Path, header: Header, places: Places, required: Required) -> None:
    """Raise AdapterError unless the tensors are those that are expected, each of an expected shape and a type that can be read."""
    missing = [name.replace(f"{OWN}proj.", ".proj_l.").replace(OWN, ".processor.") for name in required if name not in places]
    unknown = set(header) - {key for name, key in places.items() if name in required}
    wrong = {}
    for name in set(required) & set(places):
        entry, types = header[places[name]], ("I8",) if places[name].endswith(INT8) else FLOATS
        if entry.shape not in required[name] or entry.dtype not in types:
            shapes = " or ".join(str(shape) for shape in required[name])
            wrong[places[name]] = f"{places[name]}: {entry.shape} of {entry.dtype}, not {shapes} of {' or '.join(types)}"
    if missing or unknown or wrong:
        lists = {"missing": sorted(missing), "unknown": sorted(unknown), "wrong": sorted(wrong.values())}
        faults = "; ".join(f"{len(items)} {what}: {', '.join(items[:4])}" for what, items in lists.items() if items)
        raise AdapterError(f"{file} does not fit the model: {faults}")


def _read(file: Path, places: Places, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """The values of the parameters in `shapes` that the file has, in the given types where one is given."""
    tensors = {}
    with safe_open(file, framework="pt") as handle:
        for name, key in places.items():
            if name in shapes:
                value = handle.get_tensor(key)
                if key.endswith(INT8):
                    value = dequantised(value, handle.get_tensor(places[_scale_of(name)]))
                tensors[name] = value.reshape(shapes[name]).to(dtypes.get(name, value.dtype))
    return tensors
