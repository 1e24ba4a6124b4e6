"""From one call of `group_units` to kernel launches. Nothing here waits for the device.

`Units.above` holds here what lies between the members of each group alone: a group's weight is its members' too, by their shares of its
tokens (`seen_units.weigh_units`), so that no matrix of theirs is read for it.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.grouping import MEMBERS, GroupingArguments, Units, levels_of, new_units
from dit_accel.kernels.triton import block_parts, seen_units
from dit_accel.kernels.triton.launch import Launch, Run, cdiv, execute, mixing, precision_of, tf32_allowed
from dit_accel.kernels.triton.tables import Machine, power
from dit_accel.kernels.triton.tuples import Elements, Groups, Joined, constants_of

SEEN = 1 << 28  # numbers of what spans see of units that are held at once: 1 GiB, or those of one head
LANES = 256  # entries of a list, or units, that a warp holds


def rows_at_once(padded: int, arch: str, tokens: torch.dtype | None = None) -> int:
    """Of a unit's matrix: 64, which the widest instructions of matrix units require, unless fewer are what spills fewer registers.
    `tokens`: the type of those of a block, None of groups."""
    if padded == 64 and arch == "sm_120" and tokens in (torch.float16, torch.float32):
        return 16
    return 32 if padded == 64 and (tokens == torch.float32 or arch in ("sm_80", "sm_120")) else 64


class OfUnits:
    """One call's sizes, forward or backward, and what all its kernels take."""

    def __init__(self, a: GroupingArguments, machine: Machine, run: Run) -> None:
        self.a, self.machine, self.run = a, machine, run
        (batch, heads, self.q_blocks, d), pools = a.q_mean.shape, a.tokens.shape[-1]
        self.bh, self.spans = batch * heads, cdiv(self.q_blocks, SPAN)
        self.levels = levels_of(pools // a.parts, a.roots)
        self.slots, self.units = self.levels[0], sum(self.levels)
        self.above, self.pools = self.units - self.slots, self.units * a.parts
        self.constants: dict[str, Any] = {
            "D": d, "DP": max(16, power(d)), "PARTS": a.parts, "MEMBERS": MEMBERS, "SPAN": SPAN, "LEVELS": len(self.levels),
            "PRECISION": precision_of(machine.arch, tf32=tf32_allowed()),
        }  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.a.q_mean.new_empty((self.bh, *shape), dtype=dtype)

    def launch(self, kernel: Any, grid: tuple[int, ...], warps: int, constants: dict[str, Any], **arguments: Any) -> None:
        """Launch with these constants and the call's, and the call's sizes, of which kernels take what they know."""
        names = ("q_blocks", "spans", "slots", "units", "above", "pools")
        sizes = {name: getattr(self, name) for name in names if name in kernel.arg_names}
        self.run(Launch(kernel, grid, {**sizes, **arguments, "C": constants_of(kernel, self.constants | constants)}, warps))


class Grouped(OfUnits):
    """Results of some heads (`found`), and what is between the launches."""

    def __init__(self, a: GroupingArguments, found: Units, machine: Machine, run: Run) -> None:
        super().__init__(a, machine, run)
        d = self.constants["D"]
        self.constants |= {"COUNT": a.log_count, "SLOPES": a.slope is not None, "ROWS": rows_at_once(power(d), machine.arch)}
        self.found = f = found
        self.joined = Joined(f.joined_k, f.joined_v, f.joined_bias, f.joined_tokens, f.joined_spread, self.empty(self.pools))
        self.groups = Groups(self.empty(self.units), f.part, self.empty(self.above, d), self.empty(self.above), f.above)
        self.logits = self.empty(self.spans, self.pools + self.above)

    def moments(self) -> None:
        """The units of each level from those of the one below."""
        a, first = self.a, 0
        below, of_below = Elements(a.pooled_k, a.pooled_v, a.tokens, a.spread, a.v_spread), self.slots
        for number, count in enumerate(self.levels[1:]):
            members = self.levels[number]
            self.launch(
                block_parts.group_level, (count, self.bh), 8 if self.constants["DP"] > 128 else 4, {"LOWEST": number == 0}, below=below,
                of_below=of_below, found=self.joined, groups=self.groups, metric=a.metric, second=a.second, scale=a.scale, cap=a.cap,
                score_cap=a.score_cap, first_below=first, members=members,
            )  # fmt: skip
            j = self.joined
            below, of_below, first = Elements(j.key, j.value, j.tokens, j.spread, j.v_spread), self.units, first + members
        if self.above == 0:
            self._alone()

    def _alone(self) -> None:
        """The key blocks, where there are no groups."""
        a, f = self.a, self.found
        for to, x in ((f.joined_k, a.pooled_k), (f.joined_v, a.pooled_v), (f.joined_tokens, a.tokens), (f.joined_spread, a.spread)):
            to.copy_(x)
        bias = (a.spread / 2).clamp(max=a.cap)
        f.joined_bias.copy_(bias + a.tokens.log() if a.log_count else bias.masked_fill(a.tokens == 0, -torch.inf))
        torch.sum(a.tokens.view(self.bh, self.slots, a.parts), -1, out=self.groups.total)

    def seen(self) -> Tensor:
        """What the spans see, as codes `[BH, spans, units]` (`seen_units`)."""
        a, f, padded = self.a, self.found, self.constants["DP"]
        columns, rows = 32 if padded > 128 else 64, 16
        tiles = cdiv(self.pools, columns) + cdiv(self.above, columns)
        self.launch(
            seen_units.span_logits, (cdiv(self.spans, rows), tiles, self.bh), 4, {"BQ": rows, "BK": columns, "BD": min(32, padded)},
            q_mean=a.q_mean, q_starts=a.q_starts, joined=self.joined, middle=self.groups.middle, score_bias=self.groups.score_bias,
            logits=self.logits, scale=a.scale,
        )  # fmt: skip
        codes, roots = self.empty(self.spans, self.units, dtype=torch.int32), power(a.roots)
        wide, entries = roots * MEMBERS ** (len(self.levels) - 1), power(f.pool_lists.shape[-1])
        constants = {"OWN": a.lists.ndim == 3, "ROOTS": roots, "N": 4, "LIST": entries}
        self.launch(
            seen_units.see_units, (self.spans, self.bh), min(16, max(1, max(wide, entries) // LANES)), constants, logits=self.logits,
            total=self.groups.total, lists=a.lists, counts=a.counts, place=a.place, codes=codes, pool_lists=f.pool_lists,
            pool_counts=f.pool_counts, shares=f.shares if f.shares.numel() else None, width=a.lists.shape[-1], opened=a.opened,
            pool_width=f.pool_lists.shape[-1],
        )  # fmt: skip
        return codes

    def slopes(self, codes: Tensor) -> None:
        """The spans' matrices."""
        f, own = self.found, self.empty(self.spans, self.units)
        self.launch(
            seen_units.weigh_units, (self.spans, self.bh), 4, {"W": min(LANES, max(16, power(self.units)))}, logits=self.logits,
            total=self.groups.total, codes=codes, shares=f.shares, own=own, pool_width=f.pool_lists.shape[-1],
        )  # fmt: skip
        constants = self.constants | {"PRECISION": mixing(self.machine.arch, narrow=self.a.narrow)}
        mix(own, self.a.slope, f.above if self.above else None, f.slopes, constants, self.machine.arch, self.run)


def mix(weight: Tensor, slope: Any, above: Tensor | None, out: Tensor, constants: dict[str, Any], arch: str, run: Run) -> None:
    """out `[B, H, n, D, D]` = Σ weight · slope (`seen_units.mix_units`)."""
    (batch, heads, spans, d), padded = out.shape[:4], constants["DP"]
    rows = 32 if arch in ("sm_80", "sm_120") else 64  # more spill there
    # of one product a step is as short as its copies take: two of them are under way
    tile = constants | {"BQ": rows, "BK": 16 if padded > 128 else 32, "STAGES": 3 if constants["PRECISION"] == "tf32" else 2}
    numbers = {"spans": spans, "slots": slope.shape[3], "above": 0 if above is None else above.shape[3]}
    given = {"weight": weight, "slope": slope, "slope_above": above, "out": out, "C": constants_of(seen_units.mix_units, tile)}
    run(Launch(seen_units.mix_units, (cdiv(spans, rows), d, batch * heads), given | numbers, 8 if padded > 64 or arch == "sm_120" else 4))


def group_units(a: GroupingArguments, machine: Machine, run: Run = execute) -> Units:
    """What `grouping.Units` names."""
    found = new_units(a)
    for some, of_them in _parts(a, found):
        call = Grouped(some, of_them, machine, run)
        call.moments()
        codes = call.seen()
        if a.slope is not None:
            call.slopes(codes)
    return found


def _parts(a: GroupingArguments, found: Units) -> Iterator[tuple[GroupingArguments, Units]]:
    """A call and its results by heads, as many at once as SEEN allows; heads depend on no other."""
    (batch, heads, blocks), pools = a.q_mean.shape[:3], a.tokens.shape[-1]
    units = sum(levels_of(pools // a.parts, a.roots))
    of_head = cdiv(blocks, SPAN) * (units * (a.parts + 3) - pools // a.parts)  # logits, codes and weights
    step = max(1, SEEN // of_head)
    if step >= batch * heads:
        yield a, found
        return
    for first in range(0, batch * heads, step):

        def cut(x: Any, begin: int = first) -> Any:  # `[B, H, ...]` as `[1, some, ...]`
            of_heads = isinstance(x, Tensor) and x.ndim > 2 and x.shape[:2] == (batch, heads)
            return x.flatten(0, 1)[None, begin : begin + step] if of_heads else x

        lists, counts = (x[first : first + step] if a.lists.ndim == 3 else x for x in (a.lists, a.counts))
        yield a._replace(**{name: cut(x) for name, x in a._asdict().items()})._replace(lists=lists, counts=counts), Units(*map(cut, found))
