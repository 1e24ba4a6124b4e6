"""Files as others publish them, built from the documented names of their tensors around tiny random models."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tiny_video
import torch
from conftest import fill_randomly, normal, tiny_transformer
from distill_fixtures import same, state
from safetensors.torch import save_file
from torch import Tensor

from dit_accel import SLA, accelerate

Tensors = dict[str, Tensor]
DOUBLE, SINGLE, WIDTH, HEAD = 19, 38, 32, 16  # FLUX.1's depth, a tiny width
CLEAR_CALL: dict[str, Any] = {"height": 128, "width": 192}  # 8 × 12 tokens
VIDEO = {"height": 128, "width": 192, "num_frames": 9}  # 3 × 8 × 12 tokens: five blocks of 64
BLOCKS = 2
PARTS = ("weight", "bias")
TURBO = SLA(0.1, scope="all", block=(128, 64))
SHARED = SLA(0.2, scope="all")
# Wan's names -> diffusers', without the number of the block
OUTER = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
}
LINEARS = {
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"}, "self_attn.o": "attn1.to_out.0",
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"}, "cross_attn.o": "attn2.to_out.0",
    "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip
NORMS = {
    "self_attn.norm_q.weight": "attn1.norm_q.weight", "self_attn.norm_k.weight": "attn1.norm_k.weight",
    "cross_attn.norm_q.weight": "attn2.norm_q.weight", "cross_attn.norm_k.weight": "attn2.norm_k.weight",
    "norm3.weight": "norm2.weight", "norm3.bias": "norm2.bias", "modulation": "scale_shift_table",
}  # fmt: skip
# diffusers' names -> those of serving engines; the first that fits
ENGINES = {
    ".attn1.to_out.0.": ".to_out.", ".attn1.": ".", ".attn2.to_out.0.": ".attn2.to_out.", ".norm2.": ".self_attn_residual_norm.norm.",
    ".ffn.net.0.proj.": ".ffn.fc_in.", ".ffn.net.2.": ".ffn.fc_out.", ".text_embedder.linear_1.": ".text_embedder.fc_in.",
    ".text_embedder.linear_2.": ".text_embedder.fc_out.", ".time_embedder.linear_1.": ".time_embedder.mlp.fc_in.",
    ".time_embedder.linear_2.": ".time_embedder.mlp.fc_out.", ".time_proj.": ".time_modulation.linear.",
}  # fmt: skip
DIALECTS = {  # scheme, place of the projection in its block, prefix
    "official": ("wan", "self_attn.attn_op.local_attn", ""),
    "training": ("wan", "self_attn.attn_op.local_attn", "net."),
    "averaged": ("wan", "self_attn.attn_op.local_attn", "net_ema."),
    "diffusers": ("diffusers", "attn1.attn_op.local_attn", ""),
    "sglang": ("engines", "attn1.local_attn", ""),
    "fastvideo": ("engines", "attn1.attn_impl", ""),
}


# CLEAR


@functools.lru_cache(maxsize=1)
def _flux() -> Any:
    return tiny_transformer(double=DOUBLE, single=SINGLE)


def flux_pipe() -> Any:
    """A FLUX pipeline of 57 layers, equal to every other one made here."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = {"vae": None, "text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
    pipe = FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=copy.deepcopy(_flux()), **nothing)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clear_tensors(factor: int | None = None) -> Tensors:
    """What a file of CLEAR holds: 380 tensors, and 57 more where keys are pooled."""
    leaves = {f"transformer_blocks.{n}.attn": ("to_q", "to_k", "to_v", "to_out.0") for n in range(DOUBLE)}
    leaves |= {f"single_transformer_blocks.{n}.attn": ("to_q", "to_k", "to_v") for n in range(SINGLE)}
    tensors: Tensors = {}
    for layer, names in leaves.items():
        for name in names:
            tensors[f"{layer}.{name}.weight"] = 0.3 * normal(WIDTH, WIDTH, seed=len(tensors))
            tensors[f"{layer}.{name}.bias"] = 0.1 * normal(WIDTH, seed=len(tensors))
    if factor:
        shape = (1, 1, 1, factor, 1, factor, 1)
        tensors |= {f"{layer}.processor.spatial_weight": normal(*shape, seed=n).abs() / factor for n, layer in enumerate(leaves)}
    return {name: value.bfloat16() for name, value in tensors.items()}


# TurboDiffusion


def wan_transformer(**sizes: Any) -> Any:
    """A Wan transformer whose weights have int8 tiles of 128 and of less."""
    torch.manual_seed(0)
    model = tiny_video._wan_t(attention_head_dim=72, ffn_dim=160, num_layers=BLOCKS, **sizes)
    fill_randomly(model)
    return model.eval()


@functools.lru_cache(maxsize=1)
def _wan() -> Any:
    return wan_transformer()


def wan_pipe() -> tuple[Any, dict[str, Any]]:
    """A Wan pipeline equal to every other one made here, and the arguments of a call."""
    pipe, call = tiny_video.wan()
    pipe.register_modules(transformer=copy.deepcopy(_wan()))
    pipe.set_progress_bar_config(disable=True)
    return pipe, call | VIDEO


def wan_names(blocks: int = BLOCKS) -> dict[str, str]:
    """Wan's name of every tensor -> diffusers' name."""
    names = {f"{old}.{part}": f"{new}.{part}" for old, new in OUTER.items() for part in PARTS} | {"head.modulation": "scale_shift_table"}
    for n in range(blocks):
        names |= {f"blocks.{n}.{old}.{part}": f"blocks.{n}.{new}.{part}" for old, new in LINEARS.items() for part in PARTS}
        names |= {f"blocks.{n}.{old}": f"blocks.{n}.{new}" for old, new in NORMS.items()}
    return names


def turbo_values() -> tuple[Tensors, Tensors]:
    """New values of all parameters by diffusers' names, and of the projections as `blocks.N.weight` and `blocks.N.bias`."""
    state = _wan().state_dict()
    values = {name: x + 0.1 * normal(*x.shape, seed=n) for n, (name, x) in enumerate(sorted(state.items()))}
    projections = {f"blocks.{n}.weight": 0.5 * normal(72, 72, seed=100 + n) for n in range(BLOCKS)}
    projections |= {f"blocks.{n}.bias": 0.5 * normal(72, seed=200 + n) for n in range(BLOCKS)}
    return values, projections


def turbo_tensors(dialect: str, *, matrix: bool = True) -> Tensors:
    """The file with `turbo_values` in a dialect; `matrix`: the patch embedding in two dimensions."""
    scheme, place, prefix = DIALECTS[dialect]
    values, projections = turbo_values()
    tensors: Tensors = {}
    for old, new in wan_names().items():
        found = next(((a, b) for a, b in ENGINES.items() if a in new), ("", ""))
        name = {"wan": old, "diffusers": new, "engines": new.replace(*found, 1) if found[0] else new}[scheme]
        tensors[name] = values[new]
    tensors |= {f"{name.rpartition('.')[0]}.{place}.proj_l.{name.rpartition('.')[2]}": x for name, x in projections.items()}
    if matrix:
        tensors["patch_embedding.weight"] = tensors["patch_embedding.weight"].flatten(1)
    return {prefix + name: x.contiguous() for name, x in tensors.items()}


def quantised(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """The file with its blocks' linear weights as int8 tiles, and the values by Wan's names that those stand for."""
    made, meant = dict(tensors), {}
    for name in [f"blocks.{n}.{linear}" for n in range(BLOCKS) for linear in LINEARS]:
        weight = made.pop(f"{name}.weight")
        rows, columns = (-(-side // 128) for side in weight.shape)
        ints, scales, exact = torch.empty(weight.shape, dtype=torch.int8), torch.empty(rows, columns), torch.empty(weight.shape)
        for r in range(rows):
            for c in range(columns):
                tile = (slice(128 * r, 128 * r + 128), slice(128 * c, 128 * c + 128))
                scales[r, c] = weight[tile].abs().max() / 128
                ints[tile] = (weight[tile] / scales[r, c]).round().clamp(-128, 127)
                exact[tile] = ints[tile].float() * scales[r, c]
        made |= {f"{name}.int8_weight": ints, f"{name}.scale": scales}
        meant[f"{name}.weight"] = exact
    return made, meant


def turbo_by_hand(values: Tensors, projections: Tensors) -> Any:
    """A Wan pipeline with those weights and the method on."""
    pipe, _ = wan_pipe()
    put_in(pipe.transformer, values)
    accelerate(pipe, TURBO)
    names = {f"blocks.{n}.{part}": f"blocks.{n}.attn1.dit_accel.params.proj.{part}" for n in range(BLOCKS) for part in ("weight", "bias")}
    put_in(pipe.transformer, {names[name]: value for name, value in projections.items()})
    return pipe


# SimpleTuner


def shared_tensors(size: int = 72) -> Tensors:
    return {"proj_l.weight": turbo_values()[1]["blocks.0.weight"][:size, :size].clone(), "proj_l.bias": torch.arange(float(size)) / size}


# Files and models


def saved(tensors: Tensors, folder: Path, name: str = "published") -> Path:
    path = folder / f"{name}.safetensors"
    save_file(tensors, path)
    return path


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Fails unless a transformer has the same weights to the bit, the same processors, hooks and no patch after the block."""
    before, processors, hooks = state(model), dict(model.attn_processors), dict(model._forward_pre_hooks)
    yield
    assert same(state(model), before)
    assert all(model.attn_processors[name] is processor for name, processor in processors.items())
    assert dict(model._forward_pre_hooks) == hooks
    assert not hasattr(model, "_dit_accel")


def put_in(model: Any, values: Tensors) -> None:
    """Copy values into parameters, by name, each of them there."""
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
