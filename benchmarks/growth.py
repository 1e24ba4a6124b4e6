"""How the time of Fovea's forward pass grows with the number of tokens, at a fixed number of tiles that each query tile keeps.

    python benchmarks/growth.py [--sides 128 181 256 362 512] [--kept 13] [--heads 1] [--rounds 5] [--forms "order 1, in groups"]
        [--out benchmarks/growth.json]

One head of 64 channels on a square grid, 8x8 tiles, float32 on one thread: processor time, so that what else runs on the machine disturbs
it little; the sizes take turns. Queries and keys are a field that is smooth over some 16 tokens and noise, as neighbours in a picture are
alike, so that the tiles that are kept are near the query and in a few more places. `--random`: noise alone, which scatters them, the worst
case for groups, as every kept tile opens all groups above it. Of each form the medians, the exponent of N through them (least squares of
the logarithms), and that between neighbours. A form is left out of the sizes that take longer than `--limit` seconds a call.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.method import ErrorProduct, Mass, Pooled, Tiles, TopK

CHANNELS, SMOOTH = 64, 16
FORMS = {"order 0": Pooled(), "order 1, in groups": Pooled(parts=4, order=1, opened=8), "order 0, in groups": Pooled(opened=8)}


def spec_of(rest: Pooled, side: int, kept: int) -> AttentionSpec:
    """So many tiles kept for each query tile."""
    tiles = math.ceil(side / 8) ** 2
    return AttentionSpec((TopK(min(1.0, kept / tiles), score=ErrorProduct()),), rest, Mass(), Tiles((8, 8)))


def inputs(side: int, heads: int, smooth: bool) -> list[Tensor]:
    """Query, key and value."""
    seed = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, heads, side * side, CHANNELS, generator=seed) for _ in range(3)]
    if not smooth:
        return noise
    coarse = torch.randn(heads, CHANNELS, side // SMOOTH + 2, side // SMOOTH + 2, generator=seed)
    field = F.interpolate(coarse, size=(side, side), mode="bilinear").flatten(2).mT[None]
    return [(field + x / 2).contiguous() for x in noise]


def seconds(rest: Pooled, side: int, kept: int, heads: int, smooth: bool = True) -> float:
    """Processor time of one forward pass."""
    q, k, v = inputs(side, heads, smooth)
    spec, layout = spec_of(rest, side, kept), TokenLayout((1, side, side))
    start = time.thread_time()
    attention(q, k, v, spec, layout, backend="cpu")
    return time.thread_time() - start


def exponent(tokens: list[int], times: list[float]) -> float:
    """The slope of log time in log tokens, by least squares."""
    return statistics.linear_regression([math.log(n) for n in tokens], [math.log(t) for t in times]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description="growth of Fovea's time with the number of tokens")
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 181, 256, 362, 512])
    parser.add_argument("--kept", type=int, default=13)
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--random", action="store_true")
    parser.add_argument("--limit", type=float, default=20.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    found: dict[str, dict[int, list[float]]] = {name: {side: [] for side in args.sides} for name in args.forms}
    for number in range(args.rounds + 1):
        for name in args.forms:
            for side in args.sides:
                took = seconds(FORMS[name], side, args.kept, args.heads, not args.random)
                if number:  # the first one makes the plan
                    found[name][side].append(took)
                if took > args.limit:
                    break
    rows = []
    for name, by_side in found.items():
        tokens = [side * side for side, times in by_side.items() if times]
        medians = [statistics.median(times) for times in by_side.values() if times]
        steps = [exponent(tokens[i : i + 2], medians[i : i + 2]) for i in range(len(tokens) - 1)]
        rows.append({"form": name, "tokens": tokens, "seconds": medians, "exponent": exponent(tokens, medians), "steps": steps})
        shown = ", ".join(f"{n:,}: {t:.3f} s" for n, t in zip(tokens, medians, strict=True))
        print(f"{name}: N^{rows[-1]['exponent']:.2f} ({', '.join(f'{x:.2f}' for x in steps)}); {shown}", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"kept": args.kept, "heads": args.heads, "channels": CHANNELS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
