"""What one head keeps of the attention: which pairs of tokens it computes exactly, and what share of each token's true softmax mass those
have."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dit_accel.kernels.blocks import BlockMap, Blocks
from dit_accel.measure.capture import Captured, exact_attention
from dit_accel.method.parameters import Values
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import composition
from dit_accel.operator.attention import attend
from dit_accel.operator.blocks_of_grid import Plan
from dit_accel.operator.plans import RECENT
from dit_accel.patch.heads import Layer, of_heads, values_of

PAIRS = 2048  # pairs of blocks whose masks are looked at together


@dataclass(frozen=True)
class Cut:
    """The image's tokens cut into blocks: `order` `[N]`, the tokens block by block, and `counts` `[T]`, how many each block has."""

    order: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, blocks: Blocks) -> "Cut":
        return cls(blocks.index[blocks.valid].cpu().numpy(), blocks.count.cpu().numpy())


@dataclass(frozen=True)
class KeptPairs:
    """Which pairs of the image's tokens one head computes exactly.

    `queries`, `keys`: their blocks. `visits` `[Tq, Tk]`: 0 where a pair of blocks is not kept, 1 where all of it is, 2 + n where mask n
    says which tokens. `masks` `[M, q width, bytes]`: bits by the keys' places in their block, the lowest of each byte first.
    """

    queries: Cut
    keys: Cut
    visits: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Head:
    """One head in one forward, on the CPU; `layer`, `head`, `step` say which.

    `noise`: the noise level. `spec`: None where the original attention runs, which keeps all. `query` `[image, D]`, `key` `[N, D]` float32,
    in `layout`; `scale` of the logits; `text_bias` `[text]` as in `Captured`. For each token of the image: `kept`, the share of its true
    softmax mass that is computed exactly, text included; `estimated`, the share that the method itself gives to all else, None where its
    rest is no part of the softmax; `error`, the relative error of its output.
    """

    layer: str
    head: int
    step: int
    noise: float
    spec: AttentionSpec | None
    captured: Captured
    pairs: KeptPairs | None
    kept: Tensor
    estimated: Tensor | None
    error: Tensor


@dataclass(frozen=True)
class Place:
    """Where a call is: an accelerated layer by the name that users are shown, and the step and noise level of the forward."""

    name: str
    layer: Layer
    step: int
    noise: float


def looked_at(place: Place, captured: Captured, groups: Sequence[tuple[AttentionSpec | None, tuple[int, ...]]], values: Values,
              heads: Sequence[int], backend: str) -> list[Head]:  # fmt: skip
    """The heads of one call that were asked for. `captured`: of one sample, with all heads; `groups`: the specs that they run."""
    found = []
    for spec, members in groups:
        own = tuple(head for head in members if head in heads)
        if not own:
            continue
        query, key, value = (of_heads(x.float(), own) for x in (captured.query, captured.key, captured.value))
        part = dataclasses.replace(captured, query=query, key=key, value=value)
        numbers = _original(part) if spec is None else _numbers(part, spec, values, place.layer, own, backend)
        for n, head in enumerate(own):
            found.append(Head(place.name, head, place.step, place.noise, spec, _of_head(part, n), *numbers.of(n)))
    return sorted(found, key=lambda seen: seen.head)


def _of_head(part: Captured, number: int) -> Captured:
    """One head of a call, on the CPU."""
    query, key, value = (x[:, number : number + 1].cpu() for x in (part.query, part.key, part.value))
    return dataclasses.replace(part, query=query, key=key, value=value, text_bias=None if part.text_bias is None else part.text_bias.cpu())


@dataclass(frozen=True)
class _Numbers:
    """`Head`'s of several heads; each tensor `[H, image]`."""

    pairs: list[KeptPairs] | None
    kept: Tensor
    estimated: Tensor | None
    error: Tensor

    def of(self, number: int) -> tuple[KeptPairs | None, Tensor, Tensor | None, Tensor]:
        pairs = None if self.pairs is None else self.pairs[number]
        return pairs, self.kept[number].cpu(), None if self.estimated is None else self.estimated[number].cpu(), self.error[number].cpu()


def _original(part: Captured) -> _Numbers:
    rows = part.query.shape[1], part.layout.image
    return _Numbers(None, torch.ones(rows), None, torch.zeros(rows))


def _numbers(part: Captured, spec: AttentionSpec, values: Values, layer: Layer, heads: tuple[int, ...], backend: str) -> _Numbers:
    alone = AttentionSpec(spec.keep, order=spec.order, block=spec.block)
    image, scale = part.layout.image_slice, part.query.shape[-1] ** -0.5 if part.scale is None else part.scale

    def run(method: AttentionSpec) -> tuple[Tensor, Tensor]:
        plan = RECENT.get(method, part.layout, part.query.device)
        own = values_of(values, method, layer, heads)
        out, lse = attend(part.query, part.key, part.value, method, part.layout, plan, own, scale, backend, text_bias=part.text_bias)
        return out[0, :, image].float(), lse[0, :, image].float()

    exact = exact_attention(part)
    out, whole = run(spec)
    _, kept = run(alone) if spec.rest is not None else (out, whole)
    plan = RECENT.get(spec, part.layout, part.query.device)
    own = values_of(values, spec, layer, heads)
    call = composition.image_call(part.query, part.key, part.value, part.layout, plan, own, scale)
    pairs = _pairs(composition.visited_blocks(call, spec, plan), plan, len(heads))
    share = (kept - exact.lse[0]).exp().clamp(0, 1)
    estimated = None if torch.equal(kept, whole) else 1 - (kept - whole).exp().clamp(0, 1)
    error = (out - exact.output[0]).norm(dim=-1) / exact.output[0].norm(dim=-1).clamp_min(1e-30)
    return _Numbers(pairs, share, estimated, error)


def _pairs(blocks: BlockMap, plan: Plan, heads: int) -> list[KeptPairs]:
    """Of each head."""
    queries, keys = Cut.of(plan.q_blocks), Cut.of(plan.k_blocks)
    index, valid = (x.expand(heads, -1, -1) for x in (blocks.index, blocks.valid))
    value, masks = torch.ones_like(index), np.zeros((0, 0, 0), np.uint8)
    if blocks.partial is not None:
        numbers, masks = _masks(plan)
        value = torch.where(blocks.partial.expand_as(index), numbers.expand(heads, -1, -1).gather(-1, index), value)
    visits = torch.zeros(heads, len(queries.counts), len(keys.counts), dtype=torch.int64, device=index.device)
    visits = visits.scatter_reduce(-1, index, value * valid, "amax").cpu()  # a block is on a list once, but for padding
    return [KeptPairs(queries, keys, own.numpy(), masks) for own in visits]


def _masks(plan: Plan) -> tuple[Tensor, np.ndarray]:
    """The masks of a plan's partial pairs of blocks, each once, and `[Tq, Tk]` which of them a pair has, from 2 on."""
    static, tables = plan.static, plan.geometry.tables
    partial = static.partial & static.valid  # type: ignore[union-attr, operator]
    rows, place = partial.nonzero(as_tuple=True)
    columns = static.index[rows, place]  # type: ignore[union-attr]
    numbers = None if static.mask_of is None else static.mask_of[rows, place]  # type: ignore[union-attr]
    packed = []
    for some in torch.arange(len(rows), device=rows.device).split(PAIRS):
        mask_of = None if numbers is None else numbers[some, None]
        kept = tables.kept(rows[some], columns[some, None], mask_of, plan.q_blocks, plan.k_blocks)
        packed.append(np.packbits(kept.cpu().numpy(), axis=-1, bitorder="little"))
    every = np.concatenate(packed)
    masks, which = np.unique(every.reshape(len(every), -1), axis=0, return_inverse=True)
    found = torch.zeros(len(plan.q_blocks.count), len(plan.k_blocks.count), dtype=torch.int64, device=rows.device)
    found[rows, columns] = 2 + torch.from_numpy(which.reshape(-1)).to(rows.device)
    return found, masks.reshape(len(masks), *every.shape[1:])
