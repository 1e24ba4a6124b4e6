"""From the gradients of one call of `group_units`, or of a mixture of slopes, to kernel launches. Nothing here waits for the device, and
every sum has a fixed order."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.grouping import DIFFERENTIABLE_GROUPING, GroupingArguments
from dit_accel.kernels.triton import backward_parts, backward_units
from dit_accel.kernels.triton.launch import Launch, Run, cdiv, execute, full_rounds, mixing
from dit_accel.kernels.triton.launch_units import OfUnits
from dit_accel.kernels.triton.tables import Machine, power
from dit_accel.kernels.triton.tuples import JoinedElements, PartGradients, UnitGradients, constants_of

LANES = 128  # units that a program of one span holds at once, 4 warps


class Mixture:
    """The gradients of out = Σ weight · slope (`seen_units.mix_units`), from those of `pull` `[B, H, n, D, D]`."""

    def __init__(
        self, pull: Tensor, slope: Tensor, above: Tensor | None, constants: dict[str, Any], machine: Machine, run: Run
    ) -> None:  # fmt: skip
        self.pull, self.slope, self.above, self.constants, self.machine, self.run = pull, slope, above, constants, machine, run
        (batch, heads, self.spans, self.d), self.padded = pull.shape[:4], constants["DP"]
        self.bh = batch * heads
        self.sizes = {"spans": self.spans, "slots": slope.shape[3], "above": 0 if above is None else above.shape[3]}

    def launch(self, kernel: Any, grid: tuple[int, ...], warps: int, constants: dict[str, Any], **arguments: Any) -> None:
        given = self.sizes | arguments | {"pull": self.pull, "C": constants_of(kernel, self.constants | constants)}
        self.run(Launch(kernel, grid, given, warps))

    def weights(self) -> Tensor:
        """`[BH, n, slots + above]`."""
        rows = 64 if self.padded > 32 else 32
        columns = 32 if self.machine.arch in ("sm_80", "sm_120") else rows  # more spill there
        tiles = cdiv(self.sizes["slots"], columns) + cdiv(self.sizes["above"], columns)
        rounds = cdiv(self.spans, rows)
        splits = {1: 1, 2: 2, 3: 2}.get(full_rounds(tiles * rounds * self.bh, 2 * self.machine.units), 4)  # it divides a head's size
        found = self.pull.new_empty((splits, self.bh, self.spans, self.sizes["slots"] + self.sizes["above"]))
        constants = {"BQ": rows, "BK": columns, "BD": min(32, self.padded), "SPLITS": splits, "STAGES": 2}
        self.launch(
            backward_units.gradient_mixed_weights, (tiles, rounds * splits, self.bh), 4, constants, slope=self.slope,
            slope_above=self.above, dweight=found,
        )  # fmt: skip
        return found[0] if splits == 1 else found.sum(0)

    def slopes(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of `slope` and of `above`, of contiguous weights `[.., n, slots + above]`."""
        rows = 64
        found = torch.empty_like(self.slope)
        of_above = None if self.above is None else torch.empty_like(self.above)
        tiles = cdiv(self.sizes["slots"], rows) + cdiv(self.sizes["above"], rows)
        constants = {"BQ": rows, "BK": 16 if self.padded > 128 else 32, "STAGES": 2}
        self.launch(
            backward_units.gradient_mixed_slopes, (tiles, self.d, self.bh), 8 if self.padded > 64 else 4, constants, weight=weight,
            dslope=found, dslope_above=of_above,
        )  # fmt: skip
        return found, of_above


class Back(OfUnits):
    """What comes back of one call."""

    def __init__(
        self, grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: GroupingArguments, machine: Machine, run: Run
    ) -> None:  # fmt: skip
        super().__init__(a, machine, run)
        self.results, d = results, self.constants["D"]
        self.given = {name: x.contiguous() for name, x in grads.items() if x is not None and x.numel()}
        self.constants |= backward_parts.channels_at_once(d, self.constants["DP"], 16, machine.arch) | {"STAGES": 2}
        names = ("joined_k", "joined_v", "joined_tokens", "joined_spread")
        self.joined = JoinedElements(*(results[name] for name in names))
        self.grads = UnitGradients(self.empty(self.pools, d), self.empty(self.pools, d), self.empty(self.pools))

    def through_slopes(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """What comes back through the spans' matrices: to the logits of what they see `[BH, spans, P]`, to slopes, and to those above."""
        r, above = self.results, self.results["above"] if self.above else None
        constants = self.constants | {"PRECISION": mixing(self.machine.arch, narrow=self.a.narrow)}
        mixture = Mixture(self.given["slopes"], self.a.slope, above, constants, self.machine, self.run)  # type: ignore[arg-type]
        dlogits, own = self.empty(self.spans, self.pools), self.empty(self.spans, self.units)
        self.launch(
            backward_units.gradient_shares, (self.spans, self.bh), 4, {"W": min(LANES, max(16, power(self.units)))}, shares=r["shares"],
            pool_lists=r["pool_lists"], pool_counts=r["pool_counts"], tokens=r["joined_tokens"], dweight=mixture.weights(),
            dlogits=dlogits, own=own, pool_width=r["pool_lists"].shape[-1],
        )  # fmt: skip
        return dlogits, *mixture.slopes(own)

    def to_units(self, dlogits: Tensor | None) -> None:
        """The gradients of the units of all levels, but for what comes from the groups that they are in."""
        padded = self.constants["DP"]
        columns = 16 if padded > 128 else 32 if padded > 64 else 64
        given = PartGradients(*(self.given.get(name) for name in ("joined_k", "joined_v", "joined_bias")))
        constants = {"BQ": 16, "BK": columns, "STAGES": 2 if self.machine.arch.startswith("sm_") else 1}
        self.launch(
            backward_units.gradient_joined, (cdiv(self.pools, columns), self.bh), 8 if padded > 128 else 4, constants, joined=self.joined,
            given=given, dlogits=dlogits, q_mean=self.a.q_mean, q_starts=self.a.q_starts, grads=self.grads, scale=self.a.scale,
            cap=self.a.cap,
        )  # fmt: skip

    def mean_queries(self, dlogits: Tensor) -> Tensor:
        found = torch.empty_like(self.a.q_mean)
        self.launch(
            backward_units.gradient_mean_queries, (cdiv(self.spans, 16), self.bh), 4, {"BQ": 16, "BK": 32}, joined=self.joined,
            dlogits=dlogits, dq_mean=found, q_starts=self.a.q_starts, scale=self.a.scale,
        )  # fmt: skip
        return found

    def levels_down(self, of_above: Tensor | None) -> Tensor:
        """What comes back through the moments of groups joins the gradients of their members, from the last level down; that of the mean q²
        `[BH, D]` is returned."""
        dsecond, first = self.empty(self.above, self.constants["D"]), self.units
        for level in range(len(self.levels) - 1, 0, -1):
            first -= self.levels[level]
            self.launch(
                backward_parts.gradient_level, (self.levels[level], self.bh), 4, {}, joined=self.joined, part=self.results["part"],
                second=self.a.second, grads=self.grads, slope=of_above, dsecond=dsecond, scale=self.a.scale,
                first_below=first - self.levels[level - 1], members=self.levels[level - 1],
            )  # fmt: skip
        return dsecond.sum(1)


def gradients_of_units(
    grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: GroupingArguments, machine: Machine, run: Run = execute
) -> list[Tensor]:
    """Gradients of DIFFERENTIABLE_GROUPING; of no elements where the argument is absent."""
    back = Back(grads, results, a, machine, run)
    dlogits = dslope = of_above = dq_mean = None
    if "slopes" in back.given:
        dlogits, dslope, of_above = back.through_slopes()
        dq_mean = back.mean_queries(dlogits)
    back.to_units(dlogits)
    dsecond, pools = back.levels_down(of_above), a.tokens.shape[-1]
    found = {
        "q_mean": dq_mean, "pooled_k": back.grads.key[:, :pools], "pooled_v": back.grads.value[:, :pools], "slope": dslope,
        "second": dsecond, "spread": back.grads.spread[:, :pools],
    }  # fmt: skip
    return [_shaped(found[name], getattr(a, name), a.q_mean) for name in DIFFERENTIABLE_GROUPING]


def _shaped(x: Tensor | None, like: Tensor | None, any_: Tensor) -> Tensor:
    if like is None:
        return any_.new_empty(0)
    return torch.zeros_like(like) if x is None else x.reshape(like.shape).contiguous()
