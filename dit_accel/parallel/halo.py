"""Attention where each process keeps a band of the image's tokens, and receives of the others what its queries read of them.

For patterns that depend on places alone (`Static`) every process knows without a message what each of the others keeps, so each sends the
key blocks at the border of its band to the neighbours whose queries keep them. What a rest requires of the other keys is told (`far`); the
text's keys are gathered, and its queries, which see all keys, are spread: each process attends over its own part of the keys, and the owner
of a query merges the parts by their softmax masses.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.method.parameters import Values
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attend
from dit_accel.operator.bands import Band, Grounds, all_pairs
from dit_accel.operator.blocks_of_grid import Plan
from dit_accel.operator.layout import TokenLayout, layouts_of
from dit_accel.operator.plans import Plans
from dit_accel.parallel.far import Peers, Told, far_of, plan_told
from dit_accel.parallel.rows import Route, exchanged, to_all, to_owners

INSTEAD = "Use ContextParallelConfig(ulysses_degree=...) alone, or a method of static patterns: CLEAR(...), GNA(...), Fovea(radius=...)"


def refusal(spec: AttentionSpec) -> str | None:
    """Why a method can't run on bands; None where it can."""
    if spec.selection is not None:
        return f"{spec.selection} chooses among all keys by what they contain, and each process knows those near its own tokens alone"
    own = next((part for part in spec.parts() if part.own_tokens), spec.extras[0] if spec.extras else None)
    if own is not None:
        return f"{own} requires that each process has the tokens of all"
    if spec.rest is not None and spec.rest.far is None:
        return f"{spec.rest} requires far keys themselves, of which processes tell each other means, variances and sums alone"
    return None


@dataclass(frozen=True)
class Spread:
    """How a sequence is spread over the ranks of a group, of which this one is `rank`: so many tokens of the text and of the image each.

    `layout`: of the whole sequence, the image's tokens in memory order, rank by rank.
    """

    group: Any
    rank: int
    texts: tuple[int, ...]
    images: tuple[int, ...]
    layout: TokenLayout

    @property
    def text_rows(self) -> slice:
        """Where this rank's text is among its tokens."""
        count, image = self.texts[self.rank], self.images[self.rank]
        return slice(0, count) if self.layout.text_first else slice(image, image + count)

    @property
    def image_rows(self) -> slice:
        """Where its part of the image is."""
        count, image = self.texts[self.rank], self.images[self.rank]
        return slice(count, count + image) if self.layout.text_first else slice(0, image)


@dataclass(frozen=True)
class Border:
    """What one rank reads and sends of the image's keys, for one spec. `told`: what it knows of those that a rest is of."""

    band: Band
    keys: Route
    told: Told | None


def make_border(spec: AttentionSpec, spread: Spread, device: torch.device) -> Border:
    """A pure function of the spec, the layout, the parts and the rank, without a message."""
    grounds, rank = Grounds(spec, spread.layout, spread.images), spread.rank
    ends = torch.tensor([0, *spread.images]).cumsum(0)
    first, end = int(ends[rank]), int(ends[rank + 1])
    sent = []
    for other in range(len(spread.images)):
        keys = grounds.keys(other)
        sent.append((keys[(keys >= first) & (keys < end)] - first).to(device))
    band = grounds.band(rank, device)
    keys = band.keys.cpu()
    received = tuple(int(((keys >= low) & (keys < high)).sum()) for low, high in itertools.pairwise(ends))
    return Border(band, Route(tuple(sent), received), plan_told(spec.rest, grounds, rank, sent, device))


def attend_bands(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, spread: Spread, plans: Plans, params: Values, scale: float | None,
    backend: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The output `[B, H, own tokens, D]` of a spec that is not refused; all ranks call it alike.

    `bias` `[B, text]`: on the logits of the whole text's keys.
    """
    made = (spec, spread.layout.grids, spread.layout.order, spread.images, spread.rank, query.device)
    border = plans.kept(made, lambda: make_border(spec, spread, query.device))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    texts, images = ([x[:, :, rows] for x in (query, key, value)] for rows in (spread.text_rows, spread.image_rows))
    routes, given = [border.keys] * 2, images[1:]
    if spread.layout.text:
        routes, given = routes + [to_all(spread.texts, spread.rank, query.device)] * 3, given + texts
    keys, values, *of_text = exchanged(spread.group, routes, given)
    image = _image(images, (keys, values), of_text[1:], spec, spread, border, params, scale, backend, bias)
    if not spread.layout.text:
        return image
    exact, sizes = replace(spec, rest=None, merge=None), (spread.layout.text, spread.images[spread.rank])
    plan = plans.kept((exact, *sizes, query.device), lambda: all_pairs(exact, *sizes, query.device))
    text = _text(of_text[0], texts, images, spread, exact, plan, scale, backend, bias).to(image.dtype)
    return torch.cat([text, image] if spread.layout.text_first else [image, text], 2)


def _image(
    own: list[Tensor], read: tuple[Tensor, Tensor], text: list[Tensor], spec: AttentionSpec, spread: Spread, border: Border, params: Values,
    scale: float, backend: str, bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The output of this rank's image queries; `own`: its q, k and v, `read`: keys and values that its queries keep, `text`: all of its."""
    query, plan = own[0], border.band.plan
    keys, values = read
    if text:
        first = spread.layout.text_first
        keys, values = (torch.cat([x, y] if first else [y, x], 2) for x, y in zip(text, read, strict=True))
    of_keys = TokenLayout((1, 1, read[0].shape[2]), spread.layout.text, spread.layout.text_first)
    layouts = layouts_of(TokenLayout((1, 1, query.shape[2])), of_keys)
    far = None
    if spec.rest is not None and border.told is not None:
        peers = Peers(spread.group, spread.rank, len(spread.images))
        with torch.autocast(query.device.type, enabled=False):
            far = far_of(own[1], own[2], spec.rest, border.told, plan, params, scale, peers)
    return attend(query, keys, values, spec, layouts, plan, params, scale, backend, text_bias=bias, far=far)[0]


def _text(
    query: Tensor, text: list[Tensor], image: list[Tensor], spread: Spread, spec: AttentionSpec, plan: Plan, scale: float, backend: str,
    bias: Tensor | None,
) -> Tensor:  # fmt: skip
    """The output `[B, H, own text, D]` of this rank's text queries, of which `query` are those of all ranks; `plan`: of these over this
    rank's part of the image."""
    first, own = spread.layout.text_first, spread.texts[spread.rank]
    keys, values = (torch.cat([x, y] if first else [y, x], 2) for x, y in zip(text[1:], image[1:], strict=True))
    before = sum(spread.texts[: spread.rank])
    own_bias = None if bias is None or not own else bias[:, before : before + own]
    layouts = layouts_of(TokenLayout((1, 1, query.shape[2])), TokenLayout((1, 1, image[1].shape[2]), own, first))
    out, lse = attend(query, keys, values, spec, layouts, plan, {}, scale, backend, text_bias=own_bias)
    with torch.autocast(query.device.type, enabled=False):
        wide = torch.promote_types(query.dtype, torch.float32)
        part = torch.cat([out.to(wide), lse.to(wide)[..., None]], -1)
        (parts,) = exchanged(spread.group, [to_owners(spread.texts, spread.rank, query.device)], [part])
        each = parts.unflatten(2, (len(spread.texts), -1)).unbind(2)
        return reference.merge_partials([(x[..., :-1], x[..., -1]) for x in each])[0]


def gathered(key: Tensor, value: Tensor, group: Any, rank: int, tokens: Sequence[int]) -> tuple[Tensor, ...]:
    """Keys and values `[B, H, own tokens, D]` of all ranks, of which each has so many, in the order of the ranks. Differentiable."""
    return exchanged(group, [to_all(tokens, rank, key.device)] * 2, [key, value])
