"""Key blocks in groups: how they are grouped, who sees what of them, and the rest that comes of it against loops over the formulas."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_as_eager
from on_device import CPU, attention_by
from test_pooled_parts import cut, moments
from torch import Tensor

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.errors import ArgumentError
from dit_accel.kernels import dispatch
from dit_accel.kernels.blocks import pool_blocks
from dit_accel.method import DiscBlocks, ErrorProduct, Mass, Pooled, Raster, Sizes, Tiles, TopK
from dit_accel.method.parts import groups
from dit_accel.method.parts.content import moments_of
from dit_accel.operator import composition
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call, visited_blocks

TILES = Tiles((4, 4))
Block = tuple[int, int, int, int]  # a block's image and its place on the grid of blocks
Unit = tuple[int, tuple[int, ...]]  # its level and the key blocks in it


def grouped(rest: Pooled, keep: Any = None, order: Any = TILES) -> AttentionSpec:
    chosen = keep or TopK(0.15, score=ErrorProduct())
    return AttentionSpec((chosen,), rest, Mass(offset=False), order, (16, 16))


LAYOUTS = {
    "square": TokenLayout((1, 32, 32), 5),
    "ragged": TokenLayout((1, 27, 50), 0),
    "video": TokenLayout((3, 21, 30), 7, False),
    "strip": TokenLayout((1, 4, 200), 3),
    "references": TokenLayout((1, 20, 32), 4, references=((1, 17, 9), (1, 4, 4))),
    "few": TokenLayout((1, 8, 9), 2),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def inputs(layout: TokenLayout, dtype: torch.dtype = torch.float64, dim: int = 8) -> list[Tensor]:
    """Query, key and value `[1, 2, N, D]` that change slowly over the grid, so that some groups matter more than others."""
    seed, n = torch.Generator().manual_seed(1), layout.tokens
    x = torch.arange(n)[:, None] / n * torch.linspace(1, 9, dim)
    slow = torch.stack([torch.sin(x * (2 + h)) for h in range(2)])[None]
    return [(s * slow + 0.4 * torch.randn(1, 2, n, dim, generator=seed)).to(dtype) for s in (3.0, 1.0, 1.0)]


# The groups


@pytest.mark.parametrize("order", [TILES, Raster()], ids=["tiles", "raster"])
@every_layout
def test_groups_are_neighbours_four_by_four(layout: TokenLayout, order: Any) -> None:
    plan = make_plan(grouped(Pooled(opened=2), order=order), layout, CPU)
    slot, tokens, starts, roots = (plan.prepared[f"far_{name}"] for name in ("slot", "order", "starts", "roots"))
    assert sorted(tokens.tolist()) == list(range(layout.image))
    assert len(slot.unique()) == len(slot) == len(plan.k_blocks.count)
    for block, place in enumerate(slot.tolist()):  # each block's tokens are the run of its slot
        assert set(tokens[starts[place] : starts[place + 1]].tolist()) == set(plan.k_blocks.index[block].tolist())
    slots = len(starts) - 1
    depth = round(math.log(slots / len(roots), 4))
    assert slots == len(roots) * 4**depth
    assert len(roots) % 4 == 0
    assert torch.equal(starts[:: 4**depth].diff(), roots)
    for level in range(depth + 1):
        runs = starts[:: 4**level]
        units = [tokens[a:b] for a, b in itertools.pairwise(runs) if b > a]
        assert level == 0 or len(units) >= 4  # twice `opened`
        if order == TILES:  # a group is a box, without a hole, of one image
            for unit in units:
                places = plan.coords[unit]
                sides = places.amax(0) - places.amin(0) + 1
                assert (int(sides[3]), int(sides[:3].prod())) == (1, len(unit))
    next_level = (starts[:: 4 ** (depth + 1)].diff() > 0).sum() if slots >= 4 ** (depth + 1) else 0
    assert depth > 0 or len(slot) < 16 or int(next_level) < 4


@pytest.mark.parametrize("opened", [1, 3, 50])
@pytest.mark.parametrize("keep", [TopK(0.15, score=ErrorProduct()), DiscBlocks(5.0), TopK(1.0)], ids=["chosen", "disc", "all"])
@every_layout
def test_every_key_is_seen_once(layout: TokenLayout, keep: Any, opened: int) -> None:
    """By each query block: in a kept block or in one unit of one level."""
    spec = grouped(Pooled(opened=opened), keep)
    plan = make_plan(spec, layout, CPU)
    call = image_call(*inputs(layout), layout, plan, {}, 0.3)
    call = dataclasses.replace(call, visited=visited_blocks(call, spec, plan))
    runs, blocks = plan.prepared["far_starts"], len(plan.q_blocks.count)
    queries = groups.Queries.of(call, 1)
    by_level = groups.moments_by_level(moments_of(groups.key_slots(call), 1, slope=False), len(plan.prepared["far_roots"]), 1, queries)
    means = groups.span_means(pool_blocks(call.q, call.q_blocks)[0], call.q_blocks)
    found = groups.listed(call.kept.expand(2, -1, -1), groups.scores_of(means, by_level[1:], 2.0, queries), plan.prepared, opened)
    seen = ~groups.hidden(found, 1, blocks)
    times = torch.zeros(2, blocks, layout.image)
    for block, near in enumerate(call.kept.expand(2, -1, -1).unbind(-1)):
        times[:, :, plan.k_blocks.index[block][plan.k_blocks.valid[block]]] += near[..., None]
    at = 0
    for level in range(len(by_level)):
        for first, end in itertools.pairwise(runs[:: 4**level].tolist()):
            mine = plan.prepared["far_order"][first:end]
            times[:, :, mine] += seen[:, :, at, None]
            assert len(mine) or not seen[:, :, at].any()
            at += 1
    assert at == seen.shape[-1]
    assert bool((times == 1).all())


# The rest


def tree(blocks: list[Block], least: int) -> list[dict[Block, list[int]]]:
    """The units of each level and the key blocks in them."""
    found = [{block: [n] for n, block in enumerate(blocks)}]
    while True:
        above: dict[Block, list[int]] = {}
        for image in {unit[0] for unit in found[-1]}:
            mine = {unit: list(unit) for unit in found[-1] if unit[0] == image}
            for _ in range(2):
                longest = max((1, 2, 3), key=lambda axis: (max(place[axis] for place in mine.values()), -axis))
                for place in mine.values():
                    place[longest] //= 2
            for unit, place in mine.items():
                above.setdefault(tuple(place), []).extend(found[-1][unit])  # type: ignore[arg-type]
        if len(above) < least or len(above) == len(found[-1]):
            return found
        found.append(above)


def seen_by_span(levels: list[list[Unit]], near: set[int], score: Any, opened: int) -> list[Unit]:
    """The units that a span sees or keeps."""
    candidates, found = levels[-1], list[Unit]()
    for below in reversed(levels[:-1]):
        best = sorted(candidates, key=score)[-opened:]
        open_ = [unit for unit in candidates if unit in best or near & set(unit[1])]
        found += [unit for unit in candidates if unit not in open_]
        candidates = [unit for unit in below if any(set(unit[1]) <= set(group[1]) for group in open_)]
    return found + candidates


def dense(q: Tensor, k: Tensor, v: Tensor, text: tuple[Tensor, Tensor], plan: Any, near: Tensor, rest: Pooled, s: float) -> Tensor:
    """Output `[N, D]` of one head's image queries; `near` `[T, T]`: the blocks that each query block keeps."""
    tokens = [index[valid] for index, valid in zip(plan.k_blocks.index, plan.k_blocks.valid, strict=True)]
    corner = torch.stack([plan.coords[mine].amin(0) for mine in tokens])
    places = [[int((corner[corner[:, 3] == c[3], axis].unique() < c[axis]).sum()) for axis in range(3)] for c in corner]
    found = tree([(int(c[3]), *place) for c, place in zip(corner, places, strict=True)], 2 * rest.opened)  # type: ignore[operator,misc]
    levels = [[(number, tuple(blocks)) for blocks in level.values()] for number, level in enumerate(found)]
    second, metric = q.square().mean(0), q.T @ q / len(q)
    made: dict[Unit, Any] = {}
    for below, level in zip([[], *levels], levels, strict=False):
        for number, blocks in level:  # what a unit is, its parts, the tokens of each, and its slope
            mine = torch.cat([tokens[b] for b in blocks])
            members = [made[unit] for unit in below if set(unit[1]) <= set(blocks)]
            k_of, v_of = k.clone(), v.clone()  # each token for itself, or the part of a member that it is of
            for part, its in ((part, its) for m in members for part, its in zip(m[1], m[2], strict=True)):
                k_of[its], v_of[its] = part["k"], part["v"]
            whose = [mine[m] for m in cut(k_of[mine], metric, rest.parts)]
            parts = [moments(k[its], v[its], second, s) for its in whose]
            slope = sum(
                len(its) / len(mine) / (1 + p["sigma2"]) * moments(k_of[its], v_of[its], second, s)["cov"]
                for its, p in zip(whose, parts, strict=True)
            )
            slope = slope + sum(m[0]["n"] / len(mine) * m[3] for m in members)
            made[number, blocks] = moments(k[mine], v[mine], second, s), parts, whose, slope

    def bias(m: dict[str, Any]) -> Tensor:
        return m["n"] * 0 + math.log(m["n"]) + (m["sigma2"] / 2).clamp(max=2.0)

    out = torch.empty_like(q)
    for first in range(0, len(tokens), 4):
        mates = list(range(first, min(first + 4, len(tokens))))
        mean = q[torch.cat([tokens[i] for i in mates])].mean(0)

        def score(unit: Unit, mean: Tensor = mean) -> float:
            m = made[unit][0]
            return float(s * mean @ m["k"] + bias(m) + m["sigma2"].log() + m["v_var"].log() / 2)

        kept = {i: {j for j in range(len(tokens)) if near[i, j]} for i in mates}
        seen = seen_by_span(levels, set().union(*kept.values()), score, rest.opened)  # type: ignore[arg-type]
        share = [1 - sum(blocks[0] in kept[i] for i in mates) / len(mates) if level == 0 else 1.0 for level, blocks in seen]
        weights = torch.stack([c * sum((s * mean @ p["k"] + bias(p)).exp() for p in made[b][1]) for c, b in zip(share, seen, strict=True)])
        slope = torch.zeros(q.shape[1], q.shape[1], dtype=q.dtype)
        for unit, weight in zip(seen, weights / weights.sum().clamp_min(1e-300), strict=True):
            slope += weight * made[unit][3]
        for i in mates:
            mine = [unit for unit in seen if not (unit[0] == 0 and unit[1][0] in kept[i])]
            pools = [p for b in mine for p in made[b][1]]
            exact = torch.cat([tokens[j] for j in sorted(kept[i])])
            keys = torch.cat([k[exact], text[0], *(p["k"][None] for p in pools)])
            values = torch.cat([v[exact], text[1], *(p["v"][None] for p in pools)])
            extra = torch.cat(
                [torch.zeros(len(exact) + len(text[0]), dtype=q.dtype), torch.tensor([float(bias(p)) for p in pools], dtype=q.dtype)]
            )
            probability = (s * q[tokens[i]] @ keys.T + extra).softmax(-1)
            out[tokens[i]] = probability @ values
            if rest.order:
                far = probability[:, len(exact) + len(text[0]) :].sum(-1, keepdim=True)
                out[tokens[i]] += far * (s * q[tokens[i]] @ slope.T)
    return out


@pytest.mark.parametrize("rest", [Pooled(parts=4, order=1, opened=2), Pooled(opened=1), Pooled(parts=2, order=1, opened=3)], ids=str)
@pytest.mark.parametrize("name", ["square", "ragged", "video", "references"])
def test_the_rest_is_the_formula(name: str, rest: Pooled) -> None:
    layout = LAYOUTS[name]
    for keep in (TopK(0.15, score=ErrorProduct()), DiscBlocks(3.0)):
        spec = grouped(rest, keep)
        q, k, v = inputs(layout)
        got = attention(q, k, v, spec, layout, scale=0.3, backend="reference")[0, :, layout.image_slice]
        plan = make_plan(spec, layout, CPU)
        call = image_call(q, k, v, layout, plan, {}, 0.3)
        near = visited_blocks(call, spec, plan).kept(len(plan.k_blocks.count)).expand(2, -1, -1)
        for head in range(2):
            text = k[0, head, layout.text_slice], v[0, head, layout.text_slice]
            expected = dense(call.q[head], call.k[head], call.v[head], text, plan, near[head], rest, 0.3)
            torch.testing.assert_close(got[head], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cap", [0.0, 2.0], ids=["another-cap", "the-choices-cap"])
def test_the_cpu_kernels_open_what_the_reference_opens(cap: float) -> None:
    layout, keep = LAYOUTS["square"], TopK(0.05, score=ErrorProduct(2.0))
    q, k, v = inputs(layout)
    spec = grouped(Pooled(cap=cap, parts=2, order=1, opened=2), keep)
    expected = attention(q, k, v, spec, layout, backend="reference")
    got = attention(q.float(), k.float(), v.float(), spec, layout, backend="cpu")
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not dispatch.TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("rest", [Pooled(parts=4, order=1, opened=1), Pooled(opened=1)], ids=str)
def test_the_gpu_kernels_are_the_reference(rest: Pooled, monkeypatch: pytest.MonkeyPatch) -> None:
    """No part is given a call of its own."""
    layout, spec = TokenLayout((1, 7, 14), 3), grouped(rest)
    prepared = make_plan(spec, layout, CPU).prepared
    assert len(prepared["far_roots"]) < len(prepared["far_starts"]) - 1
    seed, found = torch.Generator().manual_seed(2), []
    weight = torch.randn(1, 1, layout.tokens, 8, generator=seed, dtype=torch.float64)
    for backend, dtype in (("reference", torch.float64), ("reference", torch.float32), ("triton", torch.float32)):
        leaves = [x[:, :1].to(dtype).requires_grad_() for x in inputs(layout)]
        if backend == "triton":
            monkeypatch.setattr(composition, "Call", None)
        out, _ = attention_by(backend, spec, layout, scale=0.3)(leaves)
        found.append([out.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), leaves)])
    for exact, eager, mine, name in zip(*found, ["out", *"qkv"], strict=True):
        assert_close_as_eager(mine, exact, eager, name)


@every_layout
def test_with_everything_kept_it_is_dense(layout: TokenLayout) -> None:
    q, k, v = inputs(layout)
    got = attention(q, k, v, grouped(Pooled(parts=4, order=1, opened=2), TopK(1.0)), layout, backend="reference")
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v), rtol=1e-11, atol=1e-11)


def test_with_all_groups_opened_it_is_every_block_by_itself() -> None:
    layout = LAYOUTS["ragged"]
    q, k, v = inputs(layout)
    alone = AttentionSpec((DiscBlocks(3.0),), Pooled(parts=2), Mass(offset=False), TILES, (16, 16))
    plan = make_plan(grouped(Pooled(opened=2), DiscBlocks(3.0)), layout, CPU)
    assert len(plan.prepared["far_roots"]) < len(plan.prepared["far_slot"])
    call = image_call(q, k, v, layout, plan, {}, 0.3)
    call = dataclasses.replace(call, visited=plan.static)
    got, lse = Pooled(parts=2, opened=10**6)(call)
    expected, lse_of = alone.rest(call)  # type: ignore[misc]
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, lse_of, rtol=1e-11, atol=1e-11)


def test_what_is_seen_grows_slowly() -> None:
    rest = Pooled(parts=4, order=1, opened=8)
    costs = [rest.cost(Sizes(n, n // 64, n // 64, 64)).multiply_adds / n for n in (1 << 14, 1 << 17, 1 << 20)]
    assert costs[2] < 2 * costs[0]
    assert Pooled(parts=4, order=1).cost(Sizes(1 << 20, 1 << 14, 1 << 14, 64)).multiply_adds / (1 << 20) > 20 * costs[2]


@pytest.mark.parametrize("opened", [0, -1, 1.5, True, "8"])
def test_a_wrong_number_of_groups_is_refused(opened: Any) -> None:
    with pytest.raises(ArgumentError, match="opened must be a number of groups >= 1, or None for no groups, not"):
        Pooled(opened=opened)
