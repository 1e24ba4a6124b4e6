"""The table of docs/methods.md: what each part of the catalogue computes, whose it is, and what `catalogue.py` measured of it."""

import json
import math
from pathlib import Path
from typing import Any

PARTS = {  # name in `catalogue.py` -> what it is, its paper
    "top-k alone": ("softmax over the best blocks, the rest dropped", "SLA 2509.24006, untrained"),
    "Fovea, order 0": ("a pooled key for each other block: `s q·k̄ + log n + σ²/2`, value v̄", "ours"),
    "Fovea, order 1": ("two pooled keys a block by content, and their values' slope in q; blocks by error", "ours"),
    "Fovea, order 1, in groups": ("the same of four parts, far blocks in groups", "ours"),
    "own tile kept": ("the query's own block in addition to the best", "TransNormer 2210.10340"),
    "raster order": ("blocks of 64 tokens in a row in place of tiles", "SLA 2509.24006"),
    "ErrorProduct": ("blocks by log mass + log σ² + ½ log tr Var(v)", "ours"),
    "Estimated": ("blocks by log mass, `s q̄·k̄ + log n + σ²/2`", "SEA 2310.01777"),
    "Pyramid": ("blocks by a search down a tree of means", "HiP 2406.09827"),
    "Clusters": ("blocks by k-means clusters shared with the query's", "Routing 2003.05997"),
    "Gate": ("blocks by a learned score of their mean, largest and smallest keys", "SeerAttention 2410.13276"),
    "Among Stripes": ("the best of the tiles 1, 4, 9, ... away and those next to them", "Superlinear 2601.18401"),
    "SelfSaliency": ("blocks whose tokens attend to themselves", "STILL 2602.02180"),
    "Columns": ("the same blocks for all queries", "NAtS-L 2602.03681"),
    "Linear, Residual (SLA)": ("`out + (φ(q)H / φ(q)Z) W`, W = 0 at start", "SLA 2509.24006"),
    "Linear, Mass": ("linear attention as a share of one softmax, learned offset", "SLA, LoLCATs 2410.10254"),
    "Linear, Mass by query": ("the offset depends on the query, b + w·q", "SEA, NAtS-L"),
    "Linear, Norm": ("`out + g · rms(φ(q)H)`, g = 0 at start", "TransNormer 2210.10340"),
    "Linear elu, Mass": ("φ = elu + 1", "Linear Transformer 2006.16236"),
    "Linear relu, Mass": ("φ = relu", "SANA 2410.10629"),
    "Pooled, Mass by query": ("pooled keys, the offset depends on the query", "SEA, NAtS-L"),
    "Decayed, Mass": ("states weigh `exp(-a · distance in tiles)`", "TransNormerLLM 2307.14995"),
    "Routed, Mass": ("4 more states, of which a token writes and reads one", "SSE 2507.16577"),
    "Landmarks": ("softmax through the blocks' means as landmarks", "SOFT 2207.03341"),
    "Token, energy": ("one mean value for all queries, by `relu(q̄·k)`", "InfSA 2603.00175"),
    "Token, estimated": ("one mean value, by the estimated map's columns", "SEA 2310.01777"),
    "Ridge, Residual": ("v as a linear function of k, `q (KᵀK + r)⁻¹KᵀV`", "DeltaNet 2406.06484"),
    "DeltaScan, Residual": ("the delta rule over the tokens, both ways", "DeltaNet 2406.06484"),
    "Linear, third class left out": ("SLA without the least 10 % of blocks", "SLA 2509.24006"),
    "Linear, Hedgehog": ("φ = softmax of Wx and of -Wx", "Hedgehog 2402.04347"),
    "Linear, NormPower": ("φ(q) = (relu(±q)/‖q‖)^p, p by the query's length", "NaLaFormer 2506.21137"),
    "Linear, NormPreserving": ("φ = softmax of ±x turned by M, its length kept", "STILL 2602.02180"),
    "Linear, Taylor": ("exp to second order in 16 channels", "BASED 2402.18668"),
    "Linear, TokenSoftmax, Norm": ("φ(k) = softmax over the tokens", "LightNet 2405.21022"),
    "Linear elu, RankAugmented": ("keys weighed by the mean query", "RALA 2411.07635"),
    "Linear elu, KVGate": ("keys and values times exp(w·k), exp(u·k)", "LINA 2601.22630"),
    "Linear elu, Centred": ("`v̄ + g (LA - v̄)`", "InLine 2412.06590, MALA 2507.00698"),
    "Linear relu, Floored": ("the divisor is at least a floor", "L²ViT 2501.16182"),
    "Linear, PreConv": ("q and k of the rest convolved before", "LAWCAT 2509.18467"),
    "DepthwiseConv": ("Fovea + a convolution of V, 5 × 5", "LINA 2601.22630"),
    "DynamicConv": ("Fovea + a convolution of V by kernels of V's mean", "InLine 2412.06590"),
    "Concentration": ("Fovea + two convolutions of V with a gelu between", "L²ViT 2501.16182"),
    "OutputGate": ("Fovea · 2σ(w·q)", "MiniCPM-SALA, LT2 2605.20670"),
    "DiscBlocks 8": ("tiles that a disc of radius 8 touches + pooled keys", "ours"),
    "TopP 0.5": ("as many blocks as hold half of the estimated mass + pooled keys", "The Sparse Frontier 2504.17768"),
    "PowerTiles": ("near tiles, and those 2ⁿ away + pooled keys", "PowerAttention 2503.03588"),
    "PowerTiles without neighbours": ("the own tile, and those 2ⁿ away + pooled keys", "PowerAttention 2503.03588"),
    "Stripes": ("tiles 1, 4, 9, ... away + pooled keys", "Superlinear 2601.18401"),
}


Rows = dict[tuple[str, str, bool], dict[str, Any]]  # by model, name, and whether it was fitted


def _errors(rows: Rows, model: str, name: str, kind: str) -> str:
    found = [rows.get((model, name, fitted)) for fitted in (False, True)]
    return " → ".join(f"{row[kind]:.3f}" for row in found if row is not None)


def _best(rows: Rows, name: str) -> float:
    return min(rows[key]["velocity"] if (key := ("image-1024", name, fitted)) in rows else math.inf for fitted in (False, True))


def catalogue(folder: Path) -> str:
    """A row for each part, the best first by the image model's velocity error, then those that were not measured."""
    from tables import lines

    read = map(json.loads, (folder / "catalogue.jsonl").read_text().splitlines())
    rows: Rows = {(row["model"], row["name"], row["fitted"]): row for row in read}
    made = []
    for name in sorted(PARTS, key=lambda name: _best(rows, name)):
        row = rows.get(("image-1024", name, False))
        cost = f"{row['multiply_adds']:.1%} ({row['density']:.1%})".replace("%", " %") if row else ""
        errors = [_errors(rows, model, name, kind) for model in ("image-1024", "video-512") for kind in ("attention", "velocity")]
        made.append([name, *PARTS[name], cost, *errors])
    head = ["part", "what it computes", "paper", "multiply-adds (kept)", "image: attention", "velocity", "video: attention", "velocity"]
    return lines(head, made)
