"""Memory that a forward pass on a GPU takes in addition to its inputs and its output, by the functions that allocate it, without a card:

    python benchmarks/gpu_memory.py
    python benchmarks/gpu_memory.py --heads 40 --grid 21 45 80 --text 0

Tensors have sizes and no memory ("meta"). `plan` is kept between calls, for all layers. Of one layer's call: `lists`, the chosen blocks as
lists and as bits; `scores`, the most that one launch reads or writes of the scores of pairs of blocks (units); `in all`, the most that any
launch leaves in memory, from the first launch that writes it to the last that reads it.
"""

import argparse
from typing import Any

import torch
from gpu import SPECS

from dit_accel.kernels.triton import calls
from dit_accel.kernels.triton.launch import Launch
from dit_accel.kernels.triton.tables import Machine
from dit_accel.method import AttentionSpec
from dit_accel.operator import composition
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.plans import plan_bytes, tensors_of

GRIDS = ((1, 256, 256), (1, 512, 512), (1, 1024, 1024))
MACHINE = Machine("sm_90", 132)


def storages(x: Any) -> dict[int, int]:
    """Bytes of the memory of all tensors, each once."""
    return {y.untyped_storage()._cdata: y.untyped_storage().nbytes() for y in tensors_of(x)}


def of_blocks(one: Launch) -> bool:
    """Whether a kernel has scores of pairs of blocks or units; others call what makes logits so."""
    return one.kernel.__name__ in ("choose_blocks", "span_logits", "see_units", "weigh_units")


def bytes_of(spec: AttentionSpec, grid: tuple[int, int, int], text: int, heads: int, channels: int) -> tuple[int, int, int, int]:
    """Of the plan, the lists, the scores, and in all."""
    layout, device = TokenLayout(grid, text, order=spec.order), torch.device("meta")
    size = (1, layout.tokens, heads, channels)
    q, k, v = (torch.empty(size, dtype=torch.bfloat16, device=device).transpose(1, 2) for _ in range(3))
    plan, params = make_plan(spec, layout, device), start_values(spec, q)
    with torch.no_grad(), calls.recorded(MACHINE) as launches:
        out, _ = composition.attend(q, k, v, spec, layout, plan, params(), channels**-0.5, "triton")
    outside = storages((q, k, v, out, plan))
    used = [{key: size for key, size in storages(one.arguments).items() if key not in outside} for one in launches]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, some in enumerate(used):
        for key in some:
            first.setdefault(key, number)
            last[key] = number
    sizes = {key: size for some in used for key, size in some.items()}
    held = [sum(size for key, size in sizes.items() if first[key] <= number <= last[key]) for number in range(len(used))]
    scores = [storages(tuple(one.arguments.get(name) for name in ("scores", "codes", "logits"))) for one in launches if of_blocks(one)]
    chosen = storages(tuple(one.arguments.get("chosen") for one in launches))
    return plan_bytes(plan), sum(chosen.values()), max((sum(x.values()) for x in scores), default=0), max(held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--grid", type=int, nargs=3, action="append", help="tokens in time, height and width; may be repeated")
    parser.add_argument("--text", type=int, default=512)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--channels", type=int, default=128)
    parser.add_argument("--method", choices=tuple(SPECS), action="append")
    given = parser.parse_args()
    print("| method | tokens | plan | lists | scores | in all |\n|---|---|---|---|---|---|")
    for name in given.method or SPECS:
        for grid in given.grid or GRIDS:
            found = bytes_of(SPECS[name], tuple(grid), given.text, given.heads, given.channels)
            cells = " | ".join("" if not x else f"{x / 1e6:,.0f} MB" if x < 1e9 else f"{x / 1e9:,.1f} GB" for x in found)
            print(f"| {name} | {grid[0] * grid[1] * grid[2]:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
