"""TurboDiffusion's Wan weights: which tensor is which parameter of diffusers' transformer, and what its int8 tiles mean.

The same weights go about in three naming schemes, with the projection of SLA's linear part under four names:

    scheme     query of a block's self-attention      projection of that block
    Wan        blocks.N.self_attn.q.weight            blocks.N.self_attn.attn_op.local_attn.proj_l.weight
    diffusers  blocks.N.attn1.to_q.weight             blocks.N.attn1.attn_op.local_attn.proj_l.weight
    engines    blocks.N.to_q.weight                   blocks.N.attn1.local_attn.proj_l.weight, blocks.N.attn1.attn_impl.proj_l.weight

Training's own saves put `net.` or `net_ema.` before every name.
"""

import re
from collections.abc import Collection

import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from torch import Tensor

from dit_accel.patch.anatomy import OWN

PREFIXES = ("net.", "net_ema.")
TILE = 128  # int8 weights have one scale per TILE × TILE values
INT8, SCALE = ".int8_weight", ".scale"
PROJECTION = re.compile(
    r"blocks\.(\d+)\.(self_attn\.attn_op\.local_attn|attn1\.attn_op\.local_attn|attn1\.local_attn|attn1\.attn_impl)\.proj_l\.(weight|bias)"
)
QUERIES = {"wan": r"blocks\.\d+\.self_attn\.q\.", "diffusers": r"blocks\.\d+\.attn1\.to_q\.", "engines": r"blocks\.\d+\.to_q\."}
# how engines (FastVideo, SGLang) name what diffusers names otherwise
ENGINES = {
    r"^(blocks\.\d+)\.(to_[qkv]|norm_[qk])\.": r"\1.attn1.\2.",
    r"^(blocks\.\d+)\.to_out\.": r"\1.attn1.to_out.0.",
    r"^(blocks\.\d+)\.attn2\.to_out\.": r"\1.attn2.to_out.0.",
    r"^(blocks\.\d+)\.self_attn_residual_norm\.norm\.": r"\1.norm2.",
    r"^(blocks\.\d+)\.ffn\.fc_in\.": r"\1.ffn.net.0.proj.",
    r"^(blocks\.\d+)\.ffn\.fc_out\.": r"\1.ffn.net.2.",
    r"^condition_embedder\.(text_embedder|time_embedder)\.(?:mlp\.)?fc_in\.": r"condition_embedder.\1.linear_1.",
    r"^condition_embedder\.(text_embedder|time_embedder)\.(?:mlp\.)?fc_out\.": r"condition_embedder.\1.linear_2.",
    r"^condition_embedder\.time_modulation\.linear\.": "condition_embedder.time_proj.",
    r"^patch_embedding\.proj\.": "patch_embedding.",
}


def bare(keys: Collection[str]) -> dict[str, str]:
    """Each key -> itself without the prefix of a training's save."""
    prefix = next((p for p in PREFIXES if any(key.startswith(p) for key in keys)), "")
    return {key: key.removeprefix(prefix) for key in keys}


def is_wan(keys: Collection[str]) -> bool:
    """Whether any key names a projection or a query of a Wan transformer, in any scheme."""
    return any(PROJECTION.fullmatch(key) or _scheme_of(key) for key in bare(keys).values())


def schemes(keys: Collection[str]) -> tuple[list[str], list[str]]:
    """The naming schemes of a file, and where its projections are in their blocks. More than one of either means that two are mixed."""
    names = bare(keys).values()
    found = {scheme for name in names if (scheme := _scheme_of(name))}
    return sorted(found), sorted({match[2] for name in names if (match := PROJECTION.fullmatch(name))})


def _scheme_of(name: str) -> str | None:
    return next((scheme for scheme, query in QUERIES.items() if re.match(query, name)), None)


def wan_parameter(name: str, scheme: str) -> str:
    """The parameter of an accelerated WanTransformer3DModel that a tensor is; a name of no known kind comes back as it is.

    An int8 weight is its weight, and its scale comes as the parameter's name with `.scale` for `.weight`.
    """
    if match := PROJECTION.fullmatch(name):
        return f"blocks.{match[1]}.attn1{OWN}proj.{match[3]}"
    plain = name.removesuffix(INT8) + ".weight" if name.endswith(INT8) else name
    if scheme == "wan":
        converted: dict[str, None] = convert_wan_transformer_to_diffusers({plain: None})
        return next(iter(converted))
    if scheme == "engines":
        for pattern, replacement in ENGINES.items():
            plain = re.sub(pattern, replacement, plain)
    return plain


def tile_grid(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of an int8 weight."""
    return tuple(-(-side // TILE) for side in shape)


def dequantised(weight: Tensor, scale: Tensor) -> Tensor:
    """float32 `[out, in]`: int8 values times the scale `[out / 128, in / 128]` of their tile, border tiles being cut off."""
    rows, columns = (torch.arange(side) // TILE for side in weight.shape)
    return weight.float() * scale.float()[rows][:, columns]
