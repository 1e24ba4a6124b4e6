"""From one call of `summarize_blocks` or `mix_slopes`, or its gradients, to kernel launches. Nothing here waits for the device.

Gradients are made of the parts that the kernel chose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dit_accel.kernels.arguments import MixtureArguments, Summaries, SummaryArguments, new_summaries
from dit_accel.kernels.triton import backward_linear, backward_parts, block_parts, launch_units, units_gradients
from dit_accel.kernels.triton.fallback import Place
from dit_accel.kernels.triton.launch import Launch, Run, cdiv, execute, mixing, precision_of, state_groups, sum_states, tf32_allowed, tiled
from dit_accel.kernels.triton.launch_choice import query_moments
from dit_accel.kernels.triton.tables import Machine, power
from dit_accel.kernels.triton.tuples import CutBlocks, Outer, PartGradients, Parts, States, constants_of, rows_of


def summarize(a: SummaryArguments, machine: Machine, run: Run = execute) -> Summaries:
    """What `arguments.Summaries` names, of key blocks of at most 128 tokens: a program holds all of one."""
    found, d = new_summaries(a), a.k.shape[3]
    q, k_start = image_of(a.q, a.text_q, a)[0], image_of(a.k, a.text, a)[1]
    q_mean, second = query_moments(q, a.q_starts, a.places_q, a.q_width, machine, run)
    metric = _metric(a, q, machine, run) if a.parts > 1 else None
    padded, width = max(16, power(d)), max(16, power(a.k_width))
    constants = {
        "D": d, "DP": padded, "BK": width, "PARTS": a.parts, "COUNT": a.log_count, "SLOPES": a.first_order,
        "ROWS": launch_units.rows_at_once(padded, machine.arch, a.k.dtype), "STEP": min(32, padded),
        "CW": _channels(padded, a.k.dtype, machine.arch),
        "PRECISION": _precision(a, machine),
    }  # fmt: skip
    arguments = {
        "k": rows_of(a.k), "v": rows_of(a.v), "metric": metric, "second": second, "starts": a.k_starts, "places": a.places_k,
        "found": Parts(
            found.k_mean, found.score_bias, found.pooled_k, found.pooled_v, found.pooled_bias, found.slope, found.tokens, found.spread,
            found.v_spread, found.part,
        ),
        "scale": a.scale, "cap": a.cap, "score_cap": a.score_cap, "heads": a.k.shape[1], "image_start_k": k_start,
        "k_blocks": len(a.k_starts) - 1, "k_width": a.k_width, "C": constants_of(block_parts.summarise_parts, constants),
    }  # fmt: skip
    grid = (len(a.k_starts) - 1, a.k.shape[0] * a.k.shape[1])
    run(Launch(block_parts.summarise_parts, grid, arguments, _warps(width * padded, a.k.dtype, machine.arch)))
    of_queries = {"q_mean": q_mean, "second": second} | ({} if metric is None else {"metric": metric})
    return found._replace(**{name: x.view(getattr(found, name).shape) for name, x in of_queries.items()})


def _warps(numbers: int, dtype: torch.dtype, arch: str) -> int:
    """Of a program that holds some tiles of so many numbers: the fewest that spill no register, as sums across warps are slow.

    Of more numbers 8 spill less than 16.
    """
    most = 8192 if arch not in ("sm_100", "sm_120") else 2048
    return 4 if numbers <= (min(most, 2048) if dtype == torch.float32 else most) else 8


def _channels(padded: int, dtype: torch.dtype, arch: str) -> int:
    """How many channels of a block are summarised at once: the most that spill no register."""
    if padded * dtype.itemsize <= 256:
        return padded
    if dtype == torch.float32:
        return 32 if arch in ("sm_90", "gfx942") else 16
    return 32 if arch == "sm_120" else 64


def image_of(x: Tensor, text: int, a: SummaryArguments) -> tuple[Tensor, int]:
    """The image's tokens of q, or of k or v, and the first of them."""
    start = text if a.text_first else 0
    return x[:, :, start : start + x.shape[2] - text], start


def _precision(a: SummaryArguments, machine: Machine) -> str:
    return precision_of(machine.arch, tf32=tf32_allowed()) if a.k.dtype == torch.float32 else "ieee"


def _metric(a: SummaryArguments, q: Tensor, machine: Machine, run: Run) -> Tensor:
    """The mean of q qᵀ over a head's queries `[BH, D, D]`, float32."""
    batch, heads, tokens, d = q.shape
    padded = max(16, power(d))
    if padded > 128:  # more than a program's registers hold
        wide = q.float().flatten(0, 1)
        return wide.mT @ wide / tokens
    place = Place("outer", padded, q.dtype, a.q_width, a.k_width)
    tile = place.tile(machine)
    chunk = cdiv(cdiv(tokens, state_groups(batch * heads, machine)), tile.queries) * tile.queries
    chunks = cdiv(tokens, chunk)
    products = q.new_empty((chunks, batch * heads, d, d), dtype=torch.float32)
    sums = q.new_empty((chunks, batch * heads, d), dtype=torch.float32)
    constants = {"D": d, "DP": padded, "BQ": tile.queries, "MAP": -1, "STAGES": tile.stages, "PRECISION": _precision(a, machine)}
    rows = rows_of(q)
    arguments = {
        "a": rows, "b": rows, "rest_pull": None, "states": States(products, sums), "most": None, "further": Outer(rows, rows, States()),
        "share": 1 / tokens, "programs": 0,
        "heads": heads, "rows": tokens, "first": 0, "chunk": chunk, "C": constants_of(backward_linear.outer_sums, constants),
    }  # fmt: skip
    tiled(run, Launch(backward_linear.outer_sums, (chunks, batch * heads), arguments, tile.warps), place)
    metric = q.new_empty((batch * heads, d, d), dtype=torch.float32)
    sum_states(States(products), States(metric), None, None, d, run)
    return metric


def gradients_of_summaries(
    grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: SummaryArguments, machine: Machine, run: Run = execute
) -> list[Tensor]:
    """Gradients of q, k and v, in their dtypes, from those of the results, as far as something depends on them."""
    given = {name: x.contiguous() for name, x in grads.items() if x is not None and x.numel()}
    found = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (a.q, a.k, a.v)]
    for x, text in zip(found, (a.text_q, a.text, a.text), strict=True):
        if text:
            x[:, :, slice(text) if a.text_first else slice(x.shape[2] - text, None)].zero_()
    second = _gradients_of_keys(given, results, a, (found[1], found[2]), machine, run).sum(1)
    if "second" in given:
        second += given["second"].flatten(0, 1)
    _gradients_of_queries(given.get("q_mean"), second, a, found[0], run)
    return found


def _gradients_of_keys(
    given: Mapping[str, Tensor],
    results: Mapping[str, Tensor],
    a: SummaryArguments,
    to: tuple[Tensor, Tensor],
    machine: Machine,
    run: Run,
) -> Tensor:
    """Those of the image's keys and values are written; that of the mean of q² is returned, `[BH, Tk, D]`, a summand for each block."""
    k_blocks, (batch, heads, _, d) = len(a.k_starts) - 1, a.k.shape
    found = a.k.new_empty((batch * heads, k_blocks, d), dtype=torch.float32)
    padded, width = max(16, power(d)), max(16, power(a.k_width))
    constants = {
        "D": d, "DP": padded, "BK": width, "PARTS": a.parts, "PRECISION": _precision(a, machine),
        **backward_parts.channels_at_once(d, padded, width, machine.arch, a.k.dtype), "STAGES": 1,
    }  # fmt: skip
    cut = CutBlocks(*(results[name] for name in ("pooled_k", "pooled_v", "tokens", "spread", "part")))
    grads = PartGradients(*(given.get(name) for name in ("pooled_k", "pooled_v", "pooled_bias", "spread", "slope")))
    arguments = {
        "k": rows_of(a.k), "v": rows_of(a.v), "cut": cut, "second": results["second"], "grads": grads, "dk": rows_of(to[0]),
        "dv": rows_of(to[1]), "dsecond": found, "starts": a.k_starts, "places": a.places_k, "scale": a.scale, "cap": a.cap,
        "heads": heads, "image_start_k": image_of(a.k, a.text, a)[1], "k_blocks": k_blocks, "k_width": a.k_width,
        "C": constants_of(backward_parts.gradient_parts, constants),
    }  # fmt: skip
    run(Launch(backward_parts.gradient_parts, (k_blocks, batch * heads), arguments, 8 if width * padded >= 4096 else 4))
    return found


def _gradients_of_queries(q_mean: Tensor | None, second: Tensor, a: SummaryArguments, dq: Tensor, run: Run) -> None:
    (batch, heads, tokens, d), blocks, rows = a.q.shape, len(a.q_starts) - 1, min(64, max(16, power(a.q_width)))
    constants = {"D": d, "DP": max(16, power(d)), "BQ": rows, "SUB_Q": cdiv(a.q_width, rows)}
    arguments = {
        "q": rows_of(a.q), "dq": rows_of(dq), "q_mean": q_mean, "second": second, "starts": a.q_starts, "places": a.places_q,
        "share": 2 / (tokens - a.text_q), "heads": heads, "image_start_q": image_of(a.q, a.text_q, a)[1], "q_blocks": blocks,
        "C": constants_of(backward_parts.gradient_queries, constants),
    }  # fmt: skip
    run(Launch(backward_parts.gradient_queries, (blocks * constants["SUB_Q"], batch * heads), arguments, 4))


def mix_slopes(a: MixtureArguments, machine: Machine, run: Run = execute) -> Tensor:
    """The mixtures `[B, H, n, D, D]`."""
    d = a.slope.shape[-1]
    out = a.weight.new_empty(*a.weight.shape[:3], d, d)
    constants = {"D": d, "DP": max(16, power(d)), "PRECISION": mixing(machine.arch, narrow=a.narrow)}
    launch_units.mix(a.weight, a.slope, None, out, constants, machine.arch, run)
    return out


def gradients_of_mixture(dout: Tensor, a: MixtureArguments, machine: Machine, run: Run = execute) -> list[Tensor]:
    """Gradients of weight and slope."""
    d = a.slope.shape[-1]
    constants = {"D": d, "DP": max(16, power(d)), "PRECISION": mixing(machine.arch, narrow=a.narrow)}
    mixture = units_gradients.Mixture(dout.contiguous(), a.slope, None, constants, machine, run)
    dslope, _ = mixture.slopes(a.weight)
    return [mixture.weights().view(a.weight.shape), dslope.view(a.slope.shape)]
