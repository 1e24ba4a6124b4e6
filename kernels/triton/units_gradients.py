"""The gradients of `group_units`, in torch, from the parts and the lists that the kernels made. Nothing waits for the device."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.arguments import SPAN
from dit_accel.kernels.grouping import DIFFERENTIABLE_GROUPING, MEMBERS, GroupingArguments, levels_of


class Found(NamedTuple):
    """Gradients of what there is of the units of all levels: pooled keys, values `[BH, P, D]`, biases and variances `[BH, P]`; and of the
    mean queries `[BH, q blocks, D]` and all slopes `[BH, D, units, D]`, None where nothing depends on them."""

    key: Tensor
    value: Tensor
    bias: Tensor
    spread: Tensor
    q_mean: Tensor | None = None
    slope: Tensor | None = None


def gradients_of_units(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: GroupingArguments) -> list[Tensor]:
    """Gradients of DIFFERENTIABLE_GROUPING; of no elements where the argument is absent."""
    if not a.q_mean.numel():  # an empty batch
        return [_shaped(None, getattr(a, name), a.q_mean) for name in DIFFERENTIABLE_GROUPING]
    given = {name: x.flatten(0, 1) for name, x in grads.items() if x is not None and x.numel()}
    made = {name: x.flatten(0, 1) for name, x in results.items() if x.numel()}
    levels = levels_of(a.tokens.shape[-1] // a.parts, a.roots)
    key, value, bias = (given.get(name, torch.zeros_like(made[name])) for name in ("joined_k", "joined_v", "joined_bias"))
    found = Found(key, value, bias, torch.zeros_like(bias))
    if "slopes" in given:
        found = _through_slopes(given["slopes"], found, made, levels, a)
    passed = found.bias * 0.5 * ((made["joined_spread"] / 2 <= a.cap) & (made["joined_tokens"] > 0))
    found = found._replace(key=found.key.clone(), value=found.value.clone(), spread=passed)
    dsecond = torch.zeros_like(a.second.flatten(0, 1))
    for level in range(len(levels) - 1, 0, -1):
        dsecond += _through_level(level, found, made, levels, a)
    pools = a.tokens.shape[-1]
    whole = {
        "q_mean": found.q_mean, "pooled_k": found.key[:, :pools], "pooled_v": found.value[:, :pools],
        "slope": None if found.slope is None else found.slope[:, :, : levels[0]], "second": dsecond, "spread": found.spread[:, :pools],
    }  # fmt: skip
    return [_shaped(whole[name], getattr(a, name), a.q_mean) for name in DIFFERENTIABLE_GROUPING]


def _shaped(x: Tensor | None, like: Tensor | None, any_: Tensor) -> Tensor:
    if like is None:
        return any_.new_empty(0)
    return torch.zeros_like(like) if x is None else x.reshape(like.shape).contiguous()


def _through_slopes(pull: Tensor, found: Found, made: Mapping[str, Tensor], levels: list[int], a: GroupingArguments) -> Found:
    """What comes back through the spans' matrices: to the slopes, the shares, and what these are of. `pull` `[BH, spans, D, D]`."""
    units, by_channel = sum(levels), pull.transpose(1, 2)  # [BH, D of k, spans, D of v]
    place = torch.arange(made["pool_lists"].shape[-1], device=pull.device)
    at = torch.where(place < made["pool_counts"][..., None], made["pool_lists"], units).long()  # what pads a list goes to a unit of its own
    shares = pull.new_zeros(*at.shape[:2], units + 1, a.parts).scatter_(2, at[..., None].expand(-1, -1, -1, a.parts), made["shares"])
    shares = shares[:, :, :units]
    tokens = made["joined_tokens"].unflatten(1, (-1, a.parts)).sum(-1).split(levels, 1)
    of_parent = [m / of.clamp_min(1).repeat_interleave(MEMBERS, 1) for m, of in itertools.pairwise(tokens)]
    own = list(shares.sum(-1).split(levels, -1))
    for level in range(len(levels) - 1, 0, -1):
        own[level - 1] = own[level - 1] + own[level].repeat_interleave(MEMBERS, -1) * of_parent[level - 1][:, None]
    slopes = [x for x in (None if a.slope is None else a.slope.flatten(0, 1), made.get("above")) if x is not None]
    down = list(torch.cat([torch.einsum("bcid,bcjd->bij", by_channel, x) for x in slopes], -1).split(levels, -1))
    for level in range(1, len(levels)):
        of_members = (down[level - 1] * of_parent[level - 1][:, None]).unflatten(-1, (-1, MEMBERS)).sum(-1)
        down[level] = down[level] + of_members
    back = torch.cat(down, -1)[..., None]  # to the sum of a unit's shares
    dlogits = (shares * (back - (shares * back).sum((2, 3), keepdim=True))).flatten(2)  # [BH, spans, P]
    means, within = _span_means(a)
    dmeans = a.scale * dlogits @ made["joined_k"]
    return Found(
        found.key + a.scale * dlogits.mT @ means, found.value, found.bias + dlogits.sum(1), found.spread,
        dmeans.repeat_interleave(SPAN, 1)[:, : len(within)] * within[:, None], torch.cat(own, -1).mT[:, None] @ by_channel,
    )  # fmt: skip


def _span_means(a: GroupingArguments) -> tuple[Tensor, Tensor]:
    """The mean query of each span `[BH, spans, D]`, and the share of each query block in its span's `[q blocks]`."""
    sizes = a.q_starts.diff().float()
    of_span = F.pad(sizes, (0, -len(sizes) % SPAN)).unflatten(0, (-1, SPAN)).sum(1)
    within = sizes / of_span.repeat_interleave(SPAN)[: len(sizes)]
    weighted = F.pad(a.q_mean.flatten(0, 1) * within[:, None], (0, 0, 0, -len(sizes) % SPAN))
    return weighted.unflatten(1, (-1, SPAN)).sum(2), within


def _through_level(level: int, found: Found, made: Mapping[str, Tensor], levels: list[int], a: GroupingArguments) -> Tensor:
    """What comes back through the moments of a level's groups joins the gradients of its members; that of the mean q² is returned.

    The distances' sums over a part are 0, so that nothing comes back through its means but what is theirs.
    """
    parts, first = a.parts, sum(levels[:level])
    mine = slice(first * parts, (first + levels[level]) * parts)
    below = slice((first - levels[level - 1]) * parts, first * parts)
    elements = {name: made[f"joined_{name}"][:, below].unflatten(1, (levels[level], -1)) for name in ("k", "v", "tokens")}
    of_group = {name: made[f"joined_{name}"][:, mine].unflatten(1, (-1, parts)) for name in ("k", "v", "tokens", "spread")}
    groups = slice(first - levels[0], first - levels[0] + levels[level])
    part, tokens = made["part"][:, groups], elements["tokens"]
    member = (part[:, :, None] == torch.arange(parts, device=part.device)[:, None]).float()  # [BH, T, parts, elements]
    share = member * tokens[:, :, None] / of_group["tokens"].clamp_min(1)[..., None]
    k_off, v_off = ((elements[x] - member.mT @ of_group[x]) * (tokens > 0)[..., None] for x in ("k", "v"))
    second = a.scale**2 * a.second.flatten(0, 1)[:, None, None]
    dspread = found.spread[:, mine].unflatten(1, (-1, parts))
    dk, dv = (share.mT @ x[:, mine].unflatten(1, (-1, parts)) for x in (found.key, found.value))
    if found.slope is not None:
        dslope = found.slope[:, :, first : first + levels[level]].transpose(1, 2)  # [BH, T, D of k, D of v]
        damp = 1 / (1 + of_group["spread"])
        of_all = tokens / tokens.sum(-1, keepdim=True).clamp_min(1)
        weight = (member.mT @ damp[..., None]) * of_all[..., None]
        of_key = v_off @ dslope.mT
        dk, dv = dk + weight * of_key, dv + weight * (k_off @ dslope)
        of_weight = (k_off * of_key).sum(-1) * of_all
        dspread = dspread - damp.square() * (member @ of_weight[..., None])[..., 0]
    of_elements = (share.mT @ dspread[..., None])[..., 0]
    dk = dk + 2 * second * of_elements[..., None] * k_off
    found.key[:, below] += dk.flatten(1, 2)
    found.value[:, below] += dv.flatten(1, 2)
    found.spread[:, below] += of_elements.flatten(1)
    return a.scale**2 * (of_elements[..., None] * k_off.square()).sum((1, 2))
