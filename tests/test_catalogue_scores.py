"""The catalogue's scores and selections: each equals its formula, written densely in float64, and finds what its paper says it finds."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import Shape, block_of, random_parameters
from test_catalogue_patterns import under_mask
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from dit_accel import AttentionSpec, TokenLayout, attention
from dit_accel.errors import ArgumentError
from dit_accel.method import (
    Call,
    Clusters,
    Columns,
    ErrorProduct,
    Estimated,
    Gate,
    Mass,
    MeanProduct,
    Pattern,
    Pooled,
    Pyramid,
    Raster,
    Score,
    SelfSaliency,
    Tiles,
    TopK,
    TopP,
)
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call

TILE = Tiles((4, 4))
SHAPES = {
    "11x14-text-5": Shape(1, 2, 16, (1, 11, 14), 5),
    "video": Shape(2, 1, 24, (3, 5, 9)),
    "references-text-last": Shape(1, 2, 16, (1, 9, 6), 3, False, ((1, 7, 5),)),
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
Blocks = list[Tensor]  # for each block the numbers of its tokens, image after image in raster order


def tiles_of(shape: Shape) -> Blocks:
    number = block_of(shape.layout.grids, TILE, 16)
    return [(number == n).nonzero().flatten() for n in range(int(number.max()) + 1)]


def image_tokens(shape: Shape) -> list[Tensor]:
    """q, k, v `[BH, N, D]` of the image, float64."""
    first = shape.layout.text if shape.layout.text_first else 0
    return [x[:, :, first : first + shape.layout.image].flatten(0, 1) for x in shape.inputs(torch.float64)]


def call_of(shape: Shape, keep: Pattern, qkv: list[Tensor] | None = None, learned: dict[str, Tensor] | None = None) -> Call:
    """What the part is given of the image tokens `[BH, N, D]`."""
    spec, layout = AttentionSpec((keep,), order=TILE, block=(16, 16)), dataclasses.replace(shape.layout, text=0)
    tokens = [x.unflatten(0, (shape.batch, shape.heads)) for x in (image_tokens(shape) if qkv is None else qkv)]
    values = spec.start_values(heads=shape.heads, head_dim=shape.head_dim) if learned is None else learned
    return image_call(*tokens, layout, make_plan(spec, layout, torch.device("cpu")), values, shape.head_dim**-0.5)


def scored(shape: Shape, score: Score, qkv: list[Tensor] | None = None, learned: dict[str, Tensor] | None = None) -> Tensor:
    return score(call_of(shape, TopK(0.3, score=score), qkv, learned))


def pairwise(blocks: Blocks, of_pair: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """`[BH, T, T]` of a function `[BH]` of two blocks."""
    return torch.stack([torch.stack([of_pair(i, j) for j in blocks], -1) for i in blocks], -2)


# The formulas


def naive_estimate(q: Tensor, k: Tensor, blocks: Blocks, scale: float, cap: float = 4.0) -> Tensor:
    def of_pair(i: Tensor, j: Tensor) -> Tensor:
        spread = scale**2 * (q[:, i].square().mean(1) * k[:, j].var(1, correction=0)).sum(-1)
        return scale * (q[:, i].mean(1) * k[:, j].mean(1)).sum(-1) + math.log(len(j)) + (spread / 2).clamp(max=cap)

    return pairwise(blocks, of_pair)


def naive_saliency(q: Tensor, k: Tensor, blocks: Blocks, scale: float) -> Tensor:
    found = []
    for j in blocks:
        own = (scale * q[:, j] @ k[:, j].mT).softmax(-1).diagonal(dim1=-2, dim2=-1)
        found.append(own.topk(math.ceil(len(j) / 16), -1).values.mean(-1))
    return torch.stack(found, -1)[:, None].expand(-1, len(blocks), -1)


def naive_gate(q: Tensor, k: Tensor, blocks: Blocks, weight: Tensor) -> Tensor:
    def of_pair(i: Tensor, j: Tensor) -> Tensor:
        keys = k[:, j]
        features = torch.cat([keys.mean(1), keys.max(1).values, keys.min(1).values], -1)
        return torch.einsum("bd,bfd,bf->b", q[:, i].mean(1), weight.repeat(len(q) // len(weight), 1, 1), features)

    return pairwise(blocks, of_pair)


def naive_pyramid(q: Tensor, k: Tensor, blocks: Blocks, levels: tuple[int, ...], keep: float) -> Tensor:
    """Query block by query block, node by node."""
    score = torch.full((len(q), len(blocks), len(blocks)), -torch.inf, dtype=torch.float64)
    for b in range(len(q)):
        for number, i in enumerate(blocks):

            def product(first: int, length: int, b: int = b, i: Tensor = i) -> float:
                tokens = torch.cat(blocks[first : first + length])
                return float(q[b, i].mean(0) @ k[b, tokens].mean(0))

            width = math.prod(levels)
            nodes, reached = list(range(0, len(blocks), width)), math.ceil(len(blocks) / width)
            for children in levels:
                count = math.ceil(keep * reached - 1e-9)
                best = sorted(nodes, key=lambda first, width=width: -product(first, width))[:count]  # type: ignore[misc]
                narrow = width // children
                nodes = [child for first in best for child in range(first, min(first + width, len(blocks)), narrow)]
                reached, width = min(count * children, math.ceil(len(blocks) / narrow)), narrow
            for j in nodes:
                score[b, number, j] = product(j, 1)
    return score


def naive_clusters(q: Tensor, k: Tensor, blocks: Blocks, count: int) -> Tensor:
    found = []
    for queries, keys in zip(normalize(q, dim=-1), normalize(k, dim=-1), strict=True):
        seeds = [keys[(keys @ keys.mean(0)).argmin()]]
        while len(seeds) < count:
            seeds.append(keys[torch.stack([keys @ seed for seed in seeds]).amax(0).argmin()])
        centres = torch.stack(seeds)
        for _ in range(5):
            nearest = torch.cdist(keys, centres).argmin(-1)
            centres = torch.stack(
                [normalize(keys[nearest == c].sum(0), dim=0) if (nearest == c).any() else centres[c] for c in range(count)]
            )
        of_q, of_k = (torch.cdist(x, centres).argmin(-1) for x in (queries, keys))
        together = (of_q[:, None] == of_k).double()[None]
        found.append(pairwise(blocks, lambda i, j, together=together: together[:, i][..., j].mean((1, 2))))
    return torch.cat(found)


def random_weight(shape: Shape) -> Tensor:
    start = torch.eye(3 * shape.head_dim, shape.head_dim, dtype=torch.float64)
    return start + 0.2 * torch.randn(shape.heads, *start.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


NAIVE: dict[str, tuple[Score, Callable[[Tensor, Tensor, Blocks, Shape], Tensor]]] = {
    "estimated": (Estimated(), lambda q, k, blocks, shape: naive_estimate(q, k, blocks, shape.head_dim**-0.5) * shape.head_dim**0.5),
    "saliency": (SelfSaliency(), lambda q, k, blocks, shape: naive_saliency(q, k, blocks, shape.head_dim**-0.5)),
    "gate": (Gate(), lambda q, k, blocks, shape: naive_gate(q, k, blocks, random_weight(shape))),
    "pyramid": (Pyramid((2, 3), keep=0.4), lambda q, k, blocks, shape: naive_pyramid(q, k, blocks, (2, 3), 0.4)),
    "clusters": (Clusters(5), lambda q, k, blocks, shape: naive_clusters(q, k, blocks, 5)),
}


@every_shape
@pytest.mark.parametrize(("score", "naive"), NAIVE.values(), ids=NAIVE)
def test_a_score_is_its_formula(score: Score, naive: Callable[..., Tensor], shape: Shape) -> None:
    q, k, _ = image_tokens(shape)
    learned = {"gate.weight": random_weight(shape)}
    expected = naive(q, k, tiles_of(shape), shape)
    torch.testing.assert_close(scored(shape, score, learned=learned), expected, rtol=1e-9, atol=1e-9)
    assert float(expected.masked_fill(expected == -torch.inf, 0).std()) > 0.01


def mask_of(kept: Tensor, shape: Shape) -> Tensor:
    """`[B, H, N, N]` of blocks `[BH, T, T]`."""
    number = block_of(shape.layout.grids, TILE, 16)
    return kept[:, number][:, :, number].unflatten(0, (shape.batch, shape.heads))


def top_blocks(score: Tensor, density: float) -> Tensor:
    count = max(1, math.floor(density * score.shape[-1] + 1e-9))
    return torch.zeros_like(score, dtype=torch.bool).scatter(-1, score.topk(count, -1).indices, True)


@every_shape
@pytest.mark.parametrize("name", ["estimated", "saliency", "gate"])
def test_its_best_blocks_are_attended_to(name: str, shape: Shape) -> None:
    score, naive = NAIVE[name]
    q, k, _ = image_tokens(shape)
    spec = AttentionSpec((TopK(0.3, score=score),), order=TILE, block=(16, 16))
    params = random_parameters(spec, shape, torch.float64)
    with torch.no_grad():
        for parameter in params.parameters():
            parameter.copy_(random_weight(shape))
        found = attention(*shape.inputs(torch.float64), spec, shape.layout, params=params)
    kept = mask_of(top_blocks(naive(q, k, tiles_of(shape), shape), 0.3), shape)
    torch.testing.assert_close(found, under_mask(shape.inputs(torch.float64), kept, shape.layout), rtol=1e-9, atol=1e-9)


# What they find


def test_the_estimate_of_constant_tiles_is_the_true_mass() -> None:
    shape, scale = SHAPES["11x14-text-5"], 16**-0.5
    blocks, (q, k, v) = tiles_of(shape), image_tokens(shape)
    for i in blocks:
        q[:, i], k[:, i] = q[:, i[:1]], k[:, i[:1]]
    logits = scale * q @ k.mT
    true = pairwise(blocks, lambda i, j: logits[:, i[0]][:, j].logsumexp(-1))
    torch.testing.assert_close(scale * scored(shape, Estimated(), [q, k, v]), true, rtol=1e-11, atol=1e-11)


def test_the_variance_makes_the_estimate_better() -> None:
    """Of keys with a normal distribution, at logits as wide as a model's."""
    shape, scale = Shape(1, 1, 16, (1, 32, 32)), 16**-0.5
    blocks, (q, k, v) = tiles_of(shape), image_tokens(shape)
    q, k = q / 2, k * torch.linspace(0.2, 2, len(k[0]))[:, None]  # rows further down spread more
    logits = scale * q @ k.mT
    true = pairwise(blocks, lambda i, j: logits[:, i][:, :, j].logsumexp(-1).mean(-1))
    without, with_variance = (scale * scored(shape, score, [q, k, v]) for score in (Estimated(cap=0.0), Estimated()))
    assert (with_variance - true).square().mean() < 0.5 * (without - true).square().mean()


def test_a_search_that_opens_everything_is_the_plain_product() -> None:
    for shape in SHAPES.values():
        torch.testing.assert_close(scored(shape, Pyramid(keep=1.0)), scored(shape, MeanProduct()), rtol=1e-12, atol=1e-12)


def test_a_search_finds_the_best_blocks_of_constant_nodes() -> None:
    shape = Shape(1, 2, 16, (1, 32, 32))  # 64 tiles, 16 to a node
    blocks, (q, k, v) = tiles_of(shape), image_tokens(shape)
    for first in range(0, 64, 16):
        node = torch.cat(blocks[first : first + 16])
        k[:, node] = k[:, node[:1]]
    found, plain = scored(shape, Pyramid(keep=0.25), [q, k, v]), scored(shape, MeanProduct(), [q, k, v])
    reached = found > -torch.inf
    assert reached.sum(-1).eq(4).all()  # 1 of 4 nodes, 1 of its 4, and its 4 tiles
    torch.testing.assert_close(found[reached], plain[reached], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.amax(-1), plain.amax(-1), rtol=1e-12, atol=1e-12)


def test_planted_clusters_are_found() -> None:
    """Tiles of four kinds along four far directions: a query tile's kin are exactly those of its own kind."""
    shape = Shape(1, 2, 16, (1, 16, 16))
    kind, blocks = torch.arange(16) * 7 % 4, tiles_of(shape)
    q, k, v = image_tokens(shape)
    for number, i in enumerate(blocks):
        for x in (q, k):
            x[:, i] = 0.1 * x[:, i] + torch.eye(16, dtype=torch.float64)[int(kind[number])] * 3
    found = scored(shape, Clusters(4), [q, k, v])
    torch.testing.assert_close(found, (kind[:, None] == kind).double().expand(2, -1, -1))
    assert bool((scored(shape, Clusters(1)) == 1).all())


def test_a_gate_starts_as_the_product_of_means() -> None:
    for shape in SHAPES.values():
        torch.testing.assert_close(scored(shape, Gate()), scored(shape, MeanProduct()), rtol=1e-12, atol=1e-12)
    (weight,) = Gate().parameters(32, 128).values()
    assert 32 * weight.numel() * 2 == 100_663_296  # bytes in bfloat16 of 32 layers; published: 101 MB


@every_shape
def test_a_gates_goal_is_that_of_the_dense_map(shape: Shape) -> None:
    (q, k, v), blocks, scale = image_tokens(shape), tiles_of(shape), shape.head_dim**-0.5
    weights = (scale * q @ k.mT).softmax(-1)
    largest = pairwise(blocks, lambda i, j: weights[:, i][:, :, j].amax((1, 2)))
    found = Gate("mass").goal(call_of(shape, TopK(0.3, score=Gate("mass"))))
    torch.testing.assert_close(found, largest / largest.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)

    lse, out = (scale * q @ k.mT).logsumexp(-1), weights @ v
    energy = []
    for j in blocks:
        spread = scale**2 * (q.square().mean(1) * k[:, j].var(1, correction=0)).sum(-1)
        bias = math.log(len(j)) + (spread / 2).clamp(max=2.0)
        p = (scale * (q @ k[:, j].mean(1)[..., None])[..., 0] + bias[:, None] - lse).exp()[..., None]
        a = weights[:, :, j]
        energy.append((a @ v[:, j] - p * v[:, j].mean(1, keepdim=True) - out * (a.sum(-1, keepdim=True) - p)).square().sum(-1))
    root = torch.stack([torch.stack([e[:, i].mean(-1) for e in energy], -1).sqrt() for i in blocks], 1)
    found = Gate().goal(call_of(shape, TopK(0.3, score=Gate())))
    torch.testing.assert_close(found, root / root.sum(-1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_a_fitted_gate_finds_planted_blocks() -> None:
    """In some tiles one key is long and the others cancel it: the mean sees nothing, the largest channel does."""
    shape = Shape(1, 1, 16, (1, 32, 32))
    q, k, v = (0.1 * x for x in image_tokens(shape))
    planted, blocks = torch.arange(64) % 8 == 3, tiles_of(shape)
    q[..., 0] += 4
    for number in planted.nonzero().flatten().tolist():
        i = blocks[number]
        k[:, i[5], 0] += 3
        k[:, i, 0] -= k[:, i, 0].mean()
    gate = Gate("mass")
    call = call_of(shape, TopK(0.125, score=gate), [q, k, v])
    keys = torch.stack([torch.cat([k[:, i].mean(1), k[:, i].amax(1), k[:, i].amin(1)], -1) for i in blocks], 1)
    means = torch.stack([q[:, i].mean(1) for i in blocks], 1)
    goal = gate.goal(call)
    assert float(goal[..., planted].sum(-1).min()) > 0.5
    weight = call.learned["gate.weight"].double().requires_grad_()
    optimizer = torch.optim.AdamW([weight], lr=0.05, weight_decay=0.0)
    for _ in range(40):
        optimizer.zero_grad()
        cross_entropy((call.scale * means @ (keys @ weight).mT).flatten(0, 1), goal.flatten(0, 1)).backward()
        optimizer.step()

    def recall(learned: Tensor) -> float:
        best = gate(dataclasses.replace(call, learned={"gate.weight": learned.detach()})).topk(8, -1).indices
        return float(planted[best].double().mean())

    assert recall(call.learned["gate.weight"]) < 0.6
    assert recall(weight) == 1.0


def test_ranking_by_its_own_weight_is_ranking_by_stills_divergence() -> None:
    """KL(softmax with the token itself ‖ softmax without it, its place filled with ε) grows with p_jj, whatever the other logits are."""
    seed, eps = torch.Generator().manual_seed(0), 1e-6
    logits = 3 * torch.randn(4000, 16, generator=seed, dtype=torch.float64)
    p = logits.softmax(-1)
    without = torch.cat([torch.full((4000, 1), eps, dtype=torch.float64), (1 - eps) * logits[:, 1:].softmax(-1)], -1)
    divergence = (p * (p / without).log()).sum(-1)
    order = p[:, 0].argsort()
    above = p[order, 0] > 2 * eps
    assert bool((divergence[order].diff()[above[1:]] > 0).all())


# Selections


@every_shape
@pytest.mark.parametrize("score", [Estimated(), SelfSaliency()], ids=["mass", "saliency"])
def test_columns_are_the_same_for_all_queries(score: Score, shape: Shape) -> None:
    spec = AttentionSpec((Columns(0.3, score),), order=TILE, block=(16, 16))
    (q, k, _), blocks, scale = image_tokens(shape), tiles_of(shape), shape.head_dim**-0.5
    params = random_parameters(spec, shape, torch.float64)
    (weight,) = params.parameters()
    plain = naive_estimate(q, k, blocks, scale) if score == Estimated() else scale * naive_saliency(q, k, blocks, scale)
    means = torch.stack([k[:, j].mean(1) for j in blocks], 1)
    learned = (means * weight.detach().repeat(shape.batch, 1)[:, None]).sum(-1)
    for values, added in ((params, learned), (None, torch.zeros_like(learned))):
        column = plain.softmax(-1).mean(1, keepdim=True).log() + added[:, None]
        kept = mask_of(top_blocks(column, 0.3).expand(-1, len(blocks), -1), shape)
        with torch.no_grad():
            found = attention(*shape.inputs(torch.float64), spec, shape.layout, params=values)
        torch.testing.assert_close(found, under_mask(shape.inputs(torch.float64), kept, shape.layout), rtol=1e-9, atol=1e-9)


def test_all_columns_are_dense_attention() -> None:
    shape = SHAPES["11x14-text-5"]
    qkv = shape.inputs(torch.float64)
    found = attention(*qkv, AttentionSpec((Columns(1.0),), Pooled(), Mass(), TILE, (16, 16)), shape.layout)
    torch.testing.assert_close(found, torch.nn.functional.scaled_dot_product_attention(*qkv), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mass", [0.3, 0.6, 0.9, 1e-9, 1.0])
@every_shape
def test_coverage_keeps_the_fewest_blocks_of_the_estimated_map(mass: float, shape: Shape) -> None:
    """The Sparse Frontier's budget (arXiv 2504.17768): sorted shares until their sum reaches the mass; 1 block at least, all at 1."""
    (q, k, _), blocks = image_tokens(shape), tiles_of(shape)
    share = naive_estimate(q, k, blocks, shape.head_dim**-0.5).softmax(-1)
    best = share.sort(-1, descending=True)
    needed = (best.values.cumsum(-1) < mass).sum(-1, keepdim=True) + 1
    kept = torch.zeros_like(share, dtype=torch.bool).scatter(-1, best.indices, torch.arange(len(blocks)) < needed)
    if mass in (1e-9, 1.0):
        kept = top_blocks(share, 1e-9) if mass < 1 else torch.ones_like(kept)
    spec = AttentionSpec((TopP(mass, at_most=1.0, score=Estimated()),), order=TILE, block=(16, 16))
    found = attention(*shape.inputs(torch.float64), spec, shape.layout)
    expected = under_mask(shape.inputs(torch.float64), mask_of(kept, shape), shape.layout)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# What is refused


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "counted twice": (lambda: TopK(0.1, correct_short=True, score=Estimated()), "correct_short must be False with Estimated"),
    "no mass": (lambda: TopP(0.5, score=Clusters()), "the score of TopP must be one of the softmax mass"),
    "no mass of an error": (lambda: TopP(0.5, score=ErrorProduct()), "the score of TopP must be one of the softmax mass"),
    "no levels": (lambda: Pyramid(()), "levels must be one or more numbers of children >= 2"),
    "no children": (lambda: Pyramid((4, 1)), "levels must be one or more numbers of children >= 2"),
    "nothing opened": (lambda: Pyramid(keep=0.0), "keep must be a share of nodes"),
    "no clusters": (lambda: Clusters(0), "count must be a number of clusters from 1 to 1024"),
    "a cap below 0": (lambda: Estimated(cap=-1), "cap must be a number >= 0"),
    "another target": (lambda: Gate("loss"), "target must be one of"),  # type: ignore[arg-type]
    "no columns": (lambda: Columns(0), "density must be a share of key blocks"),
    "no score": (lambda: Columns(0.5, 3), "score must be one of"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_fields_out_of_range_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        make()


def test_choices_of_all_tokens_queries_say_so() -> None:
    assert [part.own_tokens for part in (SelfSaliency(), Columns(0.3), Estimated(), Gate(), Clusters(), Pyramid())] == [True] * 2 + [
        False
    ] * 4


def test_raster_blocks_are_scored_too() -> None:
    shape = Shape(1, 1, 16, (1, 10, 10), 3)
    for score in (Estimated(), Gate(), Pyramid(), Clusters(), SelfSaliency()):
        spec = AttentionSpec((TopK(0.4, score=score),), order=Raster(), block=(32, 16))
        assert spec.selection is not None
        found = attention(*shape.inputs(), spec, TokenLayout((1, 10, 10), 3))
        assert found.isfinite().all()
