"""From one call of `summarize_blocks` or `mix_slopes` to kernel launches and matrix products. Nothing here waits for the device.

The gradients are computed in torch, from the parts that the kernel chose.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from dit_accel.kernels.arguments import MixtureArguments, Summaries, SummaryArguments, new_summaries
from dit_accel.kernels.triton import backward_linear, block_parts, launch_units
from dit_accel.kernels.triton.fallback import Place
from dit_accel.kernels.triton.launch import STATE_GROUPS, Launch, Run, cdiv, execute, precision_of, tf32_allowed, tiled
from dit_accel.kernels.triton.launch_choice import query_moments
from dit_accel.kernels.triton.tables import Machine
from dit_accel.kernels.triton.tuples import Parts, States, constants_of, rows_of


def summarize(a: SummaryArguments, machine: Machine, run: Run = execute) -> Summaries:
    """What `arguments.Summaries` names, of key blocks of at most 128 tokens: a program holds all of one."""
    found, d = new_summaries(a), a.k.shape[3]
    q, k_start = image_of(a.q, a.text_q, a)[0], image_of(a.k, a.text, a)[1]
    q_mean, second = query_moments(q, a.q_starts, a.places_q, a.q_width, machine, run)
    metric = _metric(a, q, machine, run) if a.parts > 1 else None
    padded, width = max(16, 1 << (d - 1).bit_length()), max(16, 1 << (a.k_width - 1).bit_length())
    constants = {
        "D": d, "DP": padded, "BK": width, "PARTS": a.parts, "COUNT": a.log_count, "SLOPES": a.first_order,
        "ROWS": launch_units.rows_at_once(padded, machine.arch, wide=a.k.dtype == torch.float32),
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
    return 4 if numbers <= (min(most, 4096) if dtype == torch.float32 else most) else 8


def image_of(x: Tensor, text: int, a: SummaryArguments) -> tuple[Tensor, int]:
    """The image's tokens of q, or of k or v, and the first of them."""
    start = text if a.text_first else 0
    return x[:, :, start : start + x.shape[2] - text], start


def _precision(a: SummaryArguments, machine: Machine) -> str:
    return precision_of(machine.arch, tf32=tf32_allowed()) if a.k.dtype == torch.float32 else "ieee"


def _metric(a: SummaryArguments, q: Tensor, machine: Machine, run: Run) -> Tensor:
    """The mean of q qᵀ over a head's queries `[BH, D, D]`, float32."""
    batch, heads, tokens, d = q.shape
    padded = max(16, 1 << (d - 1).bit_length())
    if padded > 128:  # more than a program's registers hold
        wide = q.float().flatten(0, 1)
        return wide.mT @ wide / tokens
    place = Place("outer", padded, q.dtype, a.q_width, a.k_width)
    tile = place.tile(machine)
    chunk = cdiv(cdiv(tokens, STATE_GROUPS), tile.queries) * tile.queries
    chunks = cdiv(tokens, chunk)
    products = q.new_empty((chunks, batch * heads, d, d), dtype=torch.float32)
    sums = q.new_empty((chunks, batch * heads, d), dtype=torch.float32)
    constants = {"D": d, "DP": padded, "BQ": tile.queries, "MAP": -1, "STAGES": tile.stages, "PRECISION": _precision(a, machine)}
    arguments = {
        "a": rows_of(q), "b": rows_of(q), "relative": None, "factor": None, "states": States(products, sums), "share": 1 / tokens,
        "heads": heads, "rows": tokens, "first": 0, "chunk": chunk, "C": constants_of(backward_linear.outer_sums, constants),
    }  # fmt: skip
    tiled(run, Launch(backward_linear.outer_sums, (chunks, batch * heads), arguments, tile.warps), place)
    return products.sum(0)


def gradients_of_summaries(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: SummaryArguments) -> list[Tensor]:
    """Gradients of q, k and v, in their dtypes, from those of the results, as far as something depends on them."""
    given = {name: x.flatten(0, 1) for name, x in grads.items() if x is not None and x.numel()}
    (q, q_start), (k, k_start) = image_of(a.q, a.text_q, a), image_of(a.k, a.text, a)
    v = image_of(a.v, a.text, a)[0]
    places, counts = _places(a.k_starts, a.k_width, a.places_k)
    valid = torch.arange(a.k_width, device=k.device) < counts[:, None]
    keys, values = (x.flatten(0, 1).float()[:, places.flatten()].unflatten(1, places.shape) for x in (k, v))
    part, second = results["part"].flatten(0, 1), results["second"].flatten(0, 1)
    numbers = torch.arange(a.parts, device=k.device)
    member = ((part[:, :, None] == numbers[:, None]) & valid[:, None]).float()  # [BH, T, parts, width]
    share = member / member.sum(-1, keepdim=True).clamp_min(1)
    pooled_k, pooled_v = (results[name].flatten(0, 1).unflatten(1, (-1, a.parts)) for name in ("pooled_k", "pooled_v"))
    k_off, v_off = (x * valid[..., None] - member.mT @ mean for x, mean in ((keys, pooled_k), (values, pooled_v)))
    variance = share @ k_off.square()
    spread = a.scale**2 * (variance * second[:, None, None]).sum(-1)
    dspread = torch.zeros_like(spread)
    if "pooled_bias" in given:
        dspread = given["pooled_bias"].unflatten(1, (-1, a.parts)) * 0.5 * (spread / 2 < a.cap)
    if "spread" in given:
        dspread = dspread + given["spread"].unflatten(1, (-1, a.parts))
    dk, dv = (share.mT @ given[name].unflatten(1, (-1, a.parts)) if name in given else torch.zeros_like(keys)
              for name in ("pooled_k", "pooled_v"))  # fmt: skip
    if "slope" in given:
        damp = 1 / (1 + spread)
        inverse = 1 / counts.clamp_min(1)[:, None, None]
        weight = (member.mT @ damp[..., None]) * inverse
        dslope = given["slope"].transpose(1, 2)  # [BH, T, D of k, D of v]
        of_key = v_off @ dslope.mT
        dk, dv = dk + weight * of_key, dv + weight * (k_off @ dslope)
        dspread = dspread - damp.square() * (member @ ((k_off * of_key).sum(-1, keepdim=True) * inverse))[..., 0]
    dk = dk + 2 * k_off * (share.mT @ (a.scale**2 * second[:, None, None] * dspread[..., None]))
    dsecond = a.scale**2 * (variance * dspread[..., None]).sum((1, 2)) + given.get("second", 0)
    dq = 2 / q.shape[2] * q.flatten(0, 1).float() * dsecond[:, None]
    if "q_mean" in given:
        q_places, q_counts = _places(a.q_starts, a.q_width, a.places_q)
        inside = torch.arange(a.q_width, device=q.device) < q_counts[:, None]
        rows = (given["q_mean"] / q_counts[:, None])[:, :, None].expand(-1, -1, a.q_width, -1)
        dq[:, q_places[inside]] += rows[:, inside]
    found = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (a.q, a.k, a.v)]
    found[0][:, :, q_start : q_start + q.shape[2]] = dq.view(q.shape)
    for whole, x in ((found[1], dk), (found[2], dv)):
        tokens = x.new_empty(x.shape[0], k.shape[2], x.shape[-1])
        tokens[:, places[valid]] = x[:, valid]
        whole[:, :, k_start : k_start + k.shape[2]] = tokens.view(k.shape)
    return found


def _places(starts: Tensor, width: int, places: Tensor | None) -> tuple[Tensor, Tensor]:
    """The tokens of each block `[T, width]`, a short block's last again where it ends, and how many there are `[T]`."""
    first, end = starts[:-1].long(), starts[1:].long()
    token = torch.minimum(first[:, None] + torch.arange(width, device=starts.device), (end - 1)[:, None])
    return (token if places is None else places.long()[token]), end - first


def mix_slopes(a: MixtureArguments, machine: Machine, run: Run = execute) -> Tensor:
    """The mixtures `[B, H, n, D, D]`."""
    d = a.slope.shape[-1]
    out = a.weight.new_empty(*a.weight.shape[:3], d, d)
    constants = {"D": d, "DP": max(16, 1 << (d - 1).bit_length()), "PRECISION": precision_of(machine.arch, tf32=tf32_allowed())}
    launch_units.mix(a.weight, a.slope, None, out, constants, machine.arch, run)
    return out


def gradients_of_mixture(dout: Tensor, a: MixtureArguments) -> list[Tensor]:
    """Gradients of weight and slope."""
    pull = dout.flatten(0, 1).transpose(1, 2)  # [BH, D of k, n, D of v]
    dslope = a.weight.flatten(0, 1).mT[:, None] @ pull
    dweight = torch.einsum("bcid,bcjd->bij", pull, a.slope.flatten(0, 1))
    return [x.reshape(like.shape) for x, like in ((dweight, a.weight), (dslope, a.slope))]
