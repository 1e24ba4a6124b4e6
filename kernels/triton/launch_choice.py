"""From one call of `select_blocks` to kernel launches, and the moments of blocks that other calls take too. Nothing here waits for the
device."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_accel.kernels.arguments import FEATURES
from dit_accel.kernels.choosing import Chosen, SelectionArguments, new_chosen
from dit_accel.kernels.triton import block_choice, block_means
from dit_accel.kernels.triton.fallback import Place
from dit_accel.kernels.triton.launch import (
    SUMMING,
    Launch,
    Run,
    cdiv,
    execute,
    multiply,
    precision_of,
    state_groups,
    sum_states,
    tf32_allowed,
    tiled,
)
from dit_accel.kernels.triton.tables import Machine
from dit_accel.kernels.triton.tuples import Moments, Pooled, States, Sums, Taken, constants_of, rows_of

SCORES = 1 << 28  # block scores held at once, 1 GiB: those of one head of a million tokens; of 24 heads they would be 24
TOGETHER = 512  # key blocks whose scores a program's registers hold, for 16 query blocks
GROUPS = 32  # summands of the mean of q² of a head: enough programs to fill a device, few enough to sum wherever it is read


class StateSums(NamedTuple):
    """A linear rest's states by groups of key blocks, where their sums go, and the projection that goes with these."""

    parts: States = States()
    found: States = States()
    projection: Tensor | None = None


def select_blocks(a: SelectionArguments, machine: Machine, run: Run = execute) -> Chosen:
    """The `top` best key blocks of each query block, ascending, by the product of block means or by the error of their pooled keys; and
    what a rest reads of all blocks, where it is asked for.

    Two launches up to TOGETHER key blocks.
    """
    chosen, sums = new_chosen(a, gpu=True), StateSums()
    if a.states:
        moments, sums = _states(a, chosen, machine, run)
        groups = 0
    else:
        moments, groups = _moments(a, chosen, machine, run)
    taken = Taken(chosen.lists, chosen.counts, chosen.bits)
    if len(a.k_starts) - 1 <= TOGETHER:
        _choose_at_once(a, moments, groups, taken, sums, machine, run)
    else:
        _choose(a, moments, groups, taken, machine, run)
        if a.states:
            of_weight = None if sums.projection is None else chosen.states[a.q.shape[0] * a.q.shape[1] :]
            sum_states(sums.parts, sums.found, sums.projection, of_weight, a.q.shape[3], run)
    return chosen


def _states(a: SelectionArguments, chosen: Chosen, machine: Machine, run: Run) -> tuple[Moments, StateSums]:
    """The means of all blocks, `chosen.mapped` and the parts of the states, in one launch: `Call.linear_rest` has the same."""
    (batch, heads, tokens, d), image, v = a.q.shape, a.k.shape[2], a.k if a.v is None else a.v
    blocks, bh, padded = (len(a.q_starts) - 1, len(a.k_starts) - 1), batch * heads, max(16, 1 << (d - 1).bit_length())
    group = cdiv(blocks[1], state_groups(bh, machine))
    groups = cdiv(blocks[1], group)
    sizes = (bh, blocks[0], d), (bh, blocks[1], d), (groups, bh, d, d), (groups, bh, d)
    q_mean, k_mean, state, total = (a.q.new_empty(size, dtype=torch.float32) for size in sizes)
    moments, parts = Moments(q_mean=q_mean, k_mean=k_mean), States(state, total, chosen.mapped)
    place = Place("summarise", padded, a.q.dtype, a.q_width, a.k_width)
    tile = place.tile(machine)
    constants = {
        "D": d, "DP": padded, "BQ": tile.queries, "BK": tile.keys, "SUB_Q": cdiv(a.q_width, tile.queries),
        "SUB_K": cdiv(a.k_width, tile.keys), "VALUES": False, "VARIANCE": False, "STATES": True, "MAP": FEATURES.index(a.feature_map),
        "PRECISION": precision_of(machine.arch, tf32=tf32_allowed()) if a.q.dtype == torch.float32 else "ieee",
    }  # fmt: skip
    arguments: dict[str, Any] = {
        "q": rows_of(a.q), "k": rows_of(a.k), "v": rows_of(v), "out": None, "pull": None, "dlse": None, "moments": Moments(q_mean=q_mean),
        "pooled": Pooled(k_mean=k_mean), "states": parts, "q_starts": a.q_starts, "starts": a.k_starts, "q_places": a.places_q,
        "places": a.places_k, "heads": heads, "tokens_q": tokens, "image": image, "image_start": 0, "q_blocks": blocks[0],
        "blocks": blocks[1], "group": group, "groups": groups, "C": constants_of(block_means.summarise, constants),
    }  # fmt: skip
    tiled(run, Launch(block_means.summarise, (groups + blocks[0], bh), arguments, tile.warps), place)
    narrow = None if a.q.dtype == torch.float32 else a.projection
    return moments, StateSums(parts, States(chosen.states, chosen.totals), narrow)


def _moments(a: SelectionArguments, chosen: Chosen, machine: Machine, run: Run) -> tuple[Moments, int]:
    """What the scores are made of, and how many summands the mean of q² has; `chosen.means` is written where it is asked for."""
    if a.v is None and _single(a):
        return Moments(q_mean=a.q, k_mean=a.k), 0
    blocks, d, bh = (len(a.q_starts) - 1, len(a.k_starts) - 1), a.q.shape[3], a.q.shape[0] * a.q.shape[1]
    group = cdiv(blocks[0], GROUPS)
    groups = cdiv(blocks[0], group)
    sizes = [bh * blocks[0] * d, bh * blocks[1] * d]
    if a.v is not None:
        sizes += [bh * groups * d, bh * blocks[1] * d, bh * blocks[1]]
    # one allocation for all
    q_mean, k_mean, *further = a.q.new_empty(sum(sizes), dtype=torch.float32).split(sizes)
    moments = Moments(q_mean=q_mean, k_mean=k_mean)
    if a.v is not None:
        moments = moments._replace(q_square=further[0], k_var=further[1], error=further[2])
    pooled = dict(zip(("pooled_k", "pooled_v", "k_half"), chosen.means.unbind() if a.pooled else (), strict=False))
    block_moments(a, moments._replace(**pooled), group, machine, run)
    return moments, groups


def _single(a: SelectionArguments) -> bool:
    """Whether q and k are means already: float32, each block of one token."""
    ordered = a.places_q is None and a.places_k is None and a.q.is_contiguous() and a.k.is_contiguous()
    return ordered and a.q_width == a.k_width == 1 and a.q.dtype == torch.float32


def block_moments(a: SelectionArguments, found: Moments, group: int, machine: Machine, run: Run) -> None:
    """Write what there is of `found`; no key is read where nothing of it is of keys."""
    batch, heads, tokens, channels = a.q.shape
    padded = max(16, 1 << (channels - 1).bit_length())
    place = Place("moments", padded, a.q.dtype, a.q_width, a.k_width)
    tile = place.tile(machine)
    constants = {
        "D": channels, "DP": padded, "BQ": tile.queries, "BK": tile.keys, "SUB_Q": cdiv(a.q_width, tile.queries),
        "SUB_K": cdiv(a.k_width, tile.keys),
    }  # fmt: skip
    q_blocks = len(a.q_starts) - 1
    k_blocks = 0 if found.k_mean is None else len(a.k_starts) - 1
    arguments = {
        "q": rows_of(a.q), "k": rows_of(a.k), "v": rows_of(a.k if a.v is None else a.v), "found": found, "q_starts": a.q_starts,
        "k_starts": a.k_starts, "q_places": a.places_q, "k_places": a.places_k, "share": 1 / tokens, "heads": heads, "q_blocks": q_blocks,
        "k_blocks": k_blocks, "group": group, "C": constants_of(block_choice.block_moments, constants),
    }  # fmt: skip
    grid = (cdiv(q_blocks, group) + k_blocks, batch * heads)
    tiled(run, Launch(block_choice.block_moments, grid, arguments, tile.warps), place)


def query_moments(q: Tensor, starts: Tensor, places: Tensor | None, width: int, machine: Machine, run: Run) -> tuple[Tensor, Tensor]:
    """Means `[BH, Tq, D]` of blocks of queries, and the mean of q² over all of them `[BH, D]`, float32."""
    bh, blocks, d = q.shape[0] * q.shape[1], len(starts) - 1, q.shape[3]
    group = cdiv(blocks, GROUPS)
    means, squares = (q.new_empty((bh, n, d), dtype=torch.float32) for n in (blocks, cdiv(blocks, group)))
    a = SelectionArguments(q, q, starts, starts, width, width, 1, places_q=places)
    block_moments(a, Moments(q_mean=means, q_square=squares), group, machine, run)
    return means, squares.sum(1)


def _choose_at_once(
    a: SelectionArguments, moments: Moments, groups: int, taken: Taken, sums: StateSums, machine: Machine, run: Run
) -> None:  # fmt: skip
    """Scores and the best of them in one launch, and the sums of states."""
    queries, keys, d = len(a.q_starts) - 1, len(a.k_starts) - 1, a.q.shape[3]
    padded, wide = max(16, 1 << (d - 1).bit_length()), max(32, 1 << (keys - 1).bit_length())
    constants = {
        "D": d, "DP": padded, "BQ": 16, "BD": min(padded, 32 if wide <= 256 else 16), "W": wide, "GROUPS": GROUPS,
        **SUMMING, "PRECISION": precision_of(machine.arch),
    }  # fmt: skip
    programs, heads, of_states = cdiv(queries, 16), a.q.shape[0] * a.q.shape[1], Sums()
    if sums.parts.state is not None:
        of_states, groups = Sums(sums.parts._replace(mapped=None), sums.found), len(sums.parts.state)
        programs += cdiv(d * d, SUMMING["E"])
    arguments = {
        "found": moments, "weight": a.weight, "bias": a.bias, "chosen": taken, "sums": of_states, "projection": sums.projection,
        "scale": a.scale, "cap": a.score_cap, "heads": heads, "q_blocks": queries, "k_blocks": keys, "groups": groups, "top": a.top,
        "C": constants_of(block_choice.choose_by_means, constants),
    }  # fmt: skip
    grid = (programs, heads + (sums.projection is not None))
    run(Launch(block_choice.choose_by_means, grid, arguments, 4 if wide <= 256 else 8))


def _choose(a: SelectionArguments, moments: Moments, groups: int, taken: Taken, machine: Machine, run: Run) -> None:
    """The same where a program can't hold the scores: they go through memory, for some heads at a time."""
    bh, queries, keys, d = a.q.shape[0] * a.q.shape[1], len(a.q_starts) - 1, len(a.k_starts) - 1, a.q.shape[3]
    bias = _biases(a, moments, groups, run) if a.by_error else None if a.bias is None else a.bias.flatten(0, 1)
    q_mean, k_mean = (x.view(bh, blocks, d) for x, blocks in ((moments.q_mean, queries), (moments.k_mean, keys)) if x is not None)
    wide = max(32, 1 << (keys - 1).bit_length())
    for some, rows in _parts(bh, queries, keys):
        scores = multiply(q_mean[some, rows], k_mean[some], machine, run)
        arguments = {
            "scores": scores, "weight": a.weight, "bias": None if bias is None else bias[some],
            "chosen": Taken(*(x[some, rows] for x in taken)), "rows": scores.shape[1], "blocks": keys, "top": a.top,
            "C": constants_of(block_choice.choose_blocks, {"W": wide}),
        }  # fmt: skip
        run(Launch(block_choice.choose_blocks, (scores.shape[0] * scores.shape[1],), arguments, min(16, max(1, wide // 512))))


def _parts(bh: int, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Heads and query blocks whose scores are held at once, each pair contiguous in memory: all query blocks of some heads, or some of
    one head."""
    heads, rows = max(1, SCORES // (queries * keys)), max(1, SCORES // keys)
    for first in range(0, bh, heads):
        for row in range(0, queries, rows):
            yield slice(first, first + heads), slice(row, row + rows)


def _biases(a: SelectionArguments, moments: Moments, groups: int, run: Run) -> Tensor:
    """What joins the products of means `[BH, Tk]`."""
    (batch, heads, _, d), keys = a.q.shape, len(a.k_starts) - 1
    bias = a.q.new_empty((batch * heads, keys), dtype=torch.float32)
    padded = max(16, 1 << (d - 1).bit_length())
    constants = {"D": d, "DP": padded, "BK": 32, "GROUPS": GROUPS}
    arguments: dict[str, Any] = {
        "found": moments, "bias": bias, "scale": a.scale, "cap": a.score_cap, "k_blocks": keys, "groups": groups,
        "C": constants_of(block_choice.score_biases, constants),
    }  # fmt: skip
    run(Launch(block_choice.score_biases, (cdiv(keys, 32), batch * heads), arguments, 4))
    return bias
