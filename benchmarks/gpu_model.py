"""What an H100 is predicted to take with today's kernels, from times that were measured before; and what uneven lists cost. Without a card:

    python benchmarks/gpu_model.py            the operator's forward pass
    python benchmarks/gpu_model.py --tails    how much sooner its programs would end if the longest began first

A model, not a measurement. `gpu-h100.json` has the times of whole calls (in a CUDA graph: without the processor) with the kernels of its
day; what has changed since is added and subtracted by the numbers below.
"""

import argparse
import heapq
import json
from dataclasses import dataclass
from pathlib import Path

import gpu
import torch

from dit_accel.kernels.triton import calls
from dit_accel.kernels.triton.tables import Machine
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, GNA
from dit_accel.operator import composition
from dit_accel.operator.attention import start_values
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout

MEASURED = Path(__file__).parent / "gpu-h100.json"
HEAD_DIM = 128
# The card: measured, but for the clock
UNITS = 132  # multiprocessors
PROGRAMS = 2  # of `attend_rows` that fit one, by registers and shared memory
CLOCK = 1.755e9
CACHE_RATE = 4.2e12  # bytes a second that `attend_rows` reads from the second-level cache (4.05 to 4.4 in its three forms)
MEMORY_RATE = 3.0e12
DENSE_ROWS, MERGE_ROWS = 0.306e-3, 0.0185e-3  # seconds of the text's launches at 16,896 tokens and 24 heads
MEASURED_TOKENS, MEASURED_HEADS = 16896, 24
# The kernels: from their code
STEP, STEP_8 = 32768, 24832  # bytes of a step over 64 keys and values in 16 bits, and with keys in 8
POOLED_STEP = 1.5  # steps that one over 64 pooled keys is: it has a third matrix
TOGETHER_CYCLES = 2200  # of a step of two query blocks whose products and softmax do not overlap
ROUNDED = 3 * HEAD_DIM * 2 + 16  # bytes that rounding to 8 bits moves for each token: q and k read in 16 bits and written in 8, and scales
UNION = 1.63  # of the lists of two neighbouring query blocks over one, where blocks are chosen: the built-in model at 5 %
LAUNCH = 3e-6  # seconds between two kernels that one would not have
LAUNCHES_LESS = {"Fovea 5 %": 2, "Fovea radius 8": 3, "CLEAR radius 8": 2, "SLA 5 %": 0}  # where the text is among the image's programs
STATE_PARTS = 64  # of a head that SLA summed before
SLA_LAUNCHES_LESS = 2  # the choice's and the states' joined; one more where there is text
AIMS = {
    ("Fovea 5 %", 16384): 4.0,
    ("Fovea 5 %", 65536): 7.0,
    ("SLA 5 %", 16384): 3.8,
    ("SLA 5 %", 65536): 6.3,
}  # times as fast as dense attention

SPECS = {name: spec for name, spec in gpu.SPECS.items() if "order" not in name}  # its first order has a prediction of its own
UNEVEN = SPECS | {"GNA 17": GNA(17), "GNA 17, stride 4": GNA(17, stride=4), "CLEAR radius 16": CLEAR(16)}


@dataclass(frozen=True)
class Shape:
    """One call's tokens and heads, named as in `gpu-h100.json`."""

    name: str
    grid: tuple[int, int, int]
    text: int = 512
    heads: int = 24

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.text


SHAPES = (
    Shape("FLUX.1, 1024 x 1024", (1, 64, 64)),
    Shape("FLUX.1, 2048 x 2048", (1, 128, 128)),
    Shape("FLUX.1, 4096 x 4096", (1, 256, 256)),
    Shape("Wan 2.1 14B, 81 x 480 x 832", (21, 30, 52), 0, 40),
    Shape("Wan 2.1 14B, 81 x 720 x 1280", (21, 45, 80), 0, 40),
)
RAGGED = (*SHAPES[:4], Shape("FLUX.1, 1000 x 1400", (1, 62, 87)))


@dataclass(frozen=True)
class Steps:
    """Of each query block of a head the steps over 64 keys: of its list, of the text's keys, and of pooled keys; of each two neighbours the
    steps of their lists' union; and of each tile of the text's queries among them all that it sees."""

    listed: list[float]
    text: float
    pooled: float
    together: float
    of_text: list[float]


def steps_of(name: str, spec: AttentionSpec, shape: Shape) -> Steps:
    """Counted from the plan, and from what would be launched."""
    layout, device = TokenLayout(shape.grid, shape.text, order=spec.order), torch.device("cpu")
    plan = make_plan(spec, layout, device)
    blocks = len(plan.q_blocks.count)
    if plan.static is None:
        listed, together = [float(plan.top)] * blocks, plan.top * UNION / 2 * blocks
    else:
        counts = plan.static.valid.sum(-1)
        listed, together = counts.double().tolist(), unions(plan)
    rest = spec.rest is not None and name.startswith("Fovea")
    pooled = len(plan.k_blocks.count) / 64 * POOLED_STEP if rest else 0.0
    tiles = -(-shape.text // 64) if text_joins(spec, shape) else 0
    return Steps(listed, shape.text / 64, pooled, together, [shape.tokens / 64] * tiles)


def unions(plan: Plan) -> float:
    """Key blocks on the lists of each two neighbouring query blocks, all together."""
    index, valid = plan.static.index, plan.static.valid  # type: ignore[union-attr]
    kept = torch.zeros(len(index), len(plan.k_blocks.count), dtype=torch.bool)
    kept.scatter_(1, index.masked_fill(~valid, 0), valid.clone())
    kept[valid.any(-1), index[valid.any(-1), 0]] = True  # where padding wrote over a first entry
    if len(kept) % 2:
        kept = torch.cat([kept, torch.zeros_like(kept[:1])])
    return float((kept[::2] | kept[1::2]).sum())


def text_joins(spec: AttentionSpec, shape: Shape) -> bool:
    """Whether the text's queries are among the image's programs."""
    layout = TokenLayout(shape.grid, shape.text, order=spec.order)
    q = torch.empty(1, shape.heads, layout.tokens, HEAD_DIM, dtype=torch.bfloat16, device="meta")
    with torch.no_grad(), calls.recorded(Machine("sm_90", UNITS)) as found:
        composition.attend(q, q, q, spec, layout, make_plan(spec, layout, q.device), start_values(spec, q)(), 0.1, "triton")
    (rows,) = [one for one in found if one.kernel.__name__ == "attend_rows"]
    return rows.arguments["text_tiles"] is not None


def measured() -> dict[tuple[str, str], float]:
    """Seconds by shape and method, inside a CUDA graph where that was measured."""
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    return {(row["shape"], row["method"]): row.get("graph_ms", row["ms"]) / 1e3 for row in rows}


@dataclass(frozen=True)
class Predicted:
    """Seconds: the least and the most."""

    least: float
    most: float

    def written(self, dense: float) -> str:
        times = sorted({f"{x * 1e3:.2f}" for x in (self.least, self.most)}, key=float)
        ratios = sorted({f"{dense / x:.2f}" for x in (self.least, self.most)}, key=float)
        return f"{' to '.join(times)} ms ({' to '.join(ratios)}×)"


def predict(name: str, shape: Shape, before: float) -> dict[str, Predicted]:
    """With the table's tiles, with two query blocks in a program, and these with products in 8 bits."""
    steps, pairs = steps_of(name, SPECS[name], shape), shape.heads
    share = shape.tokens / MEASURED_TOKENS * shape.heads / MEASURED_HEADS
    least = most = before
    if steps.of_text:  # their keys are read at the rate of the text's own launch, or at that of the others
        alone = DENSE_ROWS * share
        saved = MERGE_ROWS * shape.heads / MEASURED_HEADS + LAUNCH * LAUNCHES_LESS[name]
        among = sum(steps.of_text) * shape.heads * STEP / CACHE_RATE
        least, most = (before - saved + x - alone for x in sorted((alone, among)))
    if name == "SLA 5 %":
        parts = STATE_PARTS - max(1, -(-4 * UNITS // shape.heads))
        keys = shape.tokens * shape.heads * HEAD_DIM * 2  # bytes that were read for the means and again for the states
        moved = parts * shape.heads * HEAD_DIM * (HEAD_DIM + 1) * 4 * 2 + keys
        saved = moved / MEMORY_RATE + LAUNCH * (SLA_LAUNCHES_LESS + (shape.text > 0))
        least, most = least - saved, most - saved
    found = {"as it is": Predicted(least, most)}
    exact = (sum(steps.listed) + len(steps.listed) * steps.text) * pairs
    if name != "SLA 5 %":
        halves = len(steps.listed) / 2
        union = (steps.together + halves * (steps.text + steps.pooled)) * pairs
        own = (sum(steps.listed) + 2 * halves * (steps.text + steps.pooled)) * pairs
        of_one = own * STEP / CACHE_RATE
        by_cache, by_cycles = union * STEP / CACHE_RATE, union * TOGETHER_CYCLES / CLOCK / UNITS
        known = min(1.0, before / of_one)  # where that is more than the whole call took, steps are shorter by as much
        least_two, most_two = (x - known * (of_one - y) for x, y in ((least, by_cache), (most, max(by_cache, by_cycles))))
        found["two blocks"] = Predicted(least_two, min(most, most_two))
        exact = (steps.together + halves * steps.text) * pairs
    rounding = ROUNDED * shape.tokens * shape.heads / MEMORY_RATE + LAUNCH
    change = rounding - (exact + sum(steps.of_text) * shape.heads) * (STEP - STEP_8) / CACHE_RATE
    last = found.get("two blocks", found["as it is"])
    found["8 bits"] = Predicted(min(last.least, last.least + change), last.most)
    return found


def show_times() -> None:
    times = measured()
    print("| operator, predicted | dense, measured | measured before | now | two query blocks, if tuned | and 8 bits, at best | aim |")
    print("|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        dense = times[shape.name, "dense"]
        for name in SPECS:
            before = times[shape.name, name]
            found, aim = predict(name, shape, before), AIMS.get((name, shape.tokens - shape.text))
            cells = [found["as it is"].written(dense), found["two blocks"].written(dense) if "two blocks" in found else ""]
            best = Predicted(found["8 bits"].least, found["8 bits"].least).written(dense)
            row = [f"{name}, {shape.name}", f"{dense * 1e3:.2f} ms", f"{before * 1e3:.2f} ms ({dense / before:.2f}×)", *cells, best]
            print(f"| {' | '.join([*row, '' if aim is None else f'{aim}×'])} |", flush=True)


def ends(lengths: list[float], slots: int) -> float:
    """When the last of some programs ends, of which `slots` run at once and the next begins where one ends."""
    running = [0.0] * slots
    for length in lengths:
        heapq.heapreplace(running, running[0] + length)
    return max(running)


def show_tails() -> None:
    print("| programs of `attend_rows` | lists, steps | rounds | now, over an even share | longest first |\n|---|---|---|---|---|")
    slots = UNITS * PROGRAMS
    for shape in RAGGED:
        for name, spec in UNEVEN.items():
            steps = steps_of(name, spec, shape)
            mine = [x + steps.text + steps.pooled for x in steps.listed]
            order = steps.of_text * shape.heads + mine * shape.heads
            even, now, sorted_ = sum(order) / slots, ends(order, slots), ends(sorted(order, reverse=True), slots)
            cells = f"{min(steps.listed):.0f} to {max(steps.listed):.0f} | {len(order) / slots:.1f} | {now / even - 1:+.1%}"
            print(f"| {name}, {shape.name} | {cells} | {sorted_ / now - 1:+.1%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tails", action="store_true")
    if parser.parse_args().tails:
        show_tails()
    else:
        show_times()


if __name__ == "__main__":
    main()
