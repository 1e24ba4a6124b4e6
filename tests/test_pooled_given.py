"""Pooled keys and slopes that the CPU kernels are given: forward and backward, against the formula over all pairs of tokens."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import SPAN, Arguments, check
from dit_accel.method import Mass, MeanProduct, Pooled, Tiles, TopK
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout
from dit_accel.operator.lists import Lists

GIVEN = ("pooled_k", "pooled_v", "pooled_bias", "slopes")
HEADS = 2


def problem(grid: tuple[int, int, int], text: int, dim: int, parts: int, dtype: torch.dtype = torch.float32) -> tuple[Plan, Arguments]:
    """Random pooled keys on a grid cut into tiles of 4 × 4; one of them has nothing in it."""
    spec = AttentionSpec((TopK(0.3, score=MeanProduct()),), Pooled(), Mass(), Tiles((4, 4)), (16, 16))
    plan = make_plan(spec, TokenLayout(grid, text), torch.device("cpu"))
    seed = torch.Generator().manual_seed(dim + parts)
    tokens, blocks = text + grid[0] * grid[1] * grid[2], len(plan.k_blocks.count)
    q, k, v = (torch.randn(1, HEADS, tokens, dim, generator=seed).to(dtype) for _ in range(3))
    chosen = torch.rand(HEADS, blocks, blocks, generator=seed).argsort(-1)[..., : max(1, blocks // 4)].sort(-1).values.to(torch.int32)
    lists, g = Lists.of_chosen(chosen), plan.geometry
    size = {"pooled_k": (parts * blocks, dim), "pooled_v": (parts * blocks, dim), "pooled_bias": (parts * blocks,)}
    given = {name: torch.randn(1, HEADS, *shape, generator=seed) for name, shape in size.items()}
    given["slopes"] = torch.randn(1, HEADS, blocks, dim, dim, generator=seed) / dim**0.5
    given["pooled_bias"][..., parts] = -torch.inf
    return plan, Arguments(
        q=q, k=k, v=v, lists=lists.index, counts=lists.counts, full=lists.full, q_starts=g.starts_q, k_starts=g.starts_k, coords=g.coords,
        text=text, text_first=True, scale=dim**-0.5, places_q=g.places_q, places_k=g.places_k, q_width=16, k_width=16,
        rest="pooled", **given,
    )  # fmt: skip


def on_lists(plan: Plan, a: Arguments, parts: int) -> Arguments:
    """The same with pooled keys of units, more of them than key blocks, of which each span of query blocks sees some."""
    seed, blocks, dim = torch.Generator().manual_seed(5), len(plan.k_blocks.count), a.q.shape[3]
    units, spans = blocks + 7, -(-blocks // SPAN)
    slots = torch.randperm(units, generator=seed)[:blocks]
    sees = torch.rand(1, HEADS, spans, units, generator=seed) < 0.4
    sees[0, 0, 0] = False  # nothing at all
    counts = sees.sum(-1).int()
    lists = sees.int().argsort(dim=-1, descending=True, stable=True)[..., : int(counts.max())].int().contiguous()
    size = {"pooled_k": (parts * units, dim), "pooled_v": (parts * units, dim), "pooled_bias": (parts * units,)}
    given = {name: torch.randn(1, HEADS, *shape, generator=seed) for name, shape in size.items()}
    given["slopes"] = torch.randn(1, HEADS, spans, dim, dim, generator=seed) / dim**0.5
    given["pooled_bias"][..., parts] = -torch.inf
    return a._replace(pool_lists=lists, pool_counts=counts, pool_slots=slots.int(), pool_parts=parts, **given)


def unseen(a: Arguments, kept: Tensor) -> Tensor:
    """Which pooled keys `[H, Tq, P]` a query block does not see, of those that it keeps `[H, Tq, Tk]` and the lists."""
    if a.pool_lists is None or a.pool_counts is None or a.pool_slots is None:
        return kept.repeat_interleave(a.pooled_k.shape[2] // kept.shape[-1], -1)  # type: ignore[union-attr]
    units = a.pooled_k.shape[2] // a.pool_parts  # type: ignore[union-attr]
    found = torch.ones(HEADS, kept.shape[1], units, dtype=torch.bool)
    for head, block in itertools.product(range(HEADS), range(kept.shape[1])):
        count = int(a.pool_counts[0, head, block // SPAN])
        found[head, block, a.pool_lists[0, head, block // SPAN, :count].long()] = False
        found[head, block, a.pool_slots[kept[head, block]].long()] = True
    return found.repeat_interleave(a.pool_parts, -1)


def oracle(plan: Plan, a: Arguments, x: dict[str, Tensor], offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same from masks of all tokens. `x`: what is differentiated, in any dtype."""
    q, k, v = x["q"], x["k"], x["v"]
    blocks, text, tokens = len(plan.k_blocks.count), a.text, a.q.shape[2]
    kept = Lists(a.lists, a.counts, a.full).kept(blocks)  # [H, Tq, Tk]
    block_of = torch.empty(tokens - text, dtype=torch.int64)
    for number, (index, valid) in enumerate(zip(plan.k_blocks.index, plan.k_blocks.valid, strict=True)):
        block_of[index[valid]] = number
    image = kept[:, block_of][:, :, block_of]
    see = torch.ones(HEADS, tokens, tokens, dtype=torch.bool)
    see[:, text:, text:] = image
    exact = (a.scale * q @ k.mT).masked_fill(~see, -torch.inf)
    far = a.scale * q @ x["pooled_k"].mT + x["pooled_bias"][:, :, None]
    if offset is not None:
        far = far + offset[:, None, None]
    hidden = torch.ones(HEADS, tokens, far.shape[-1], dtype=torch.bool)
    hidden[:, text:] = unseen(a, kept)[:, block_of]
    logits = torch.cat([exact, far.masked_fill(hidden, -torch.inf)], -1)
    weight = logits.softmax(-1)
    out = weight @ torch.cat([v, x["pooled_v"]], 2)
    if "slopes" in x:
        slopes = x["slopes"][:, :, block_of if a.pool_lists is None else block_of // SPAN]
        tilt = torch.einsum("bhnc,bhncd->bhnd", q[:, :, text:], slopes) * a.scale
        share = weight[:, :, text:, tokens:].sum(-1, keepdim=True)
        out = torch.cat([out[:, :, :text], out[:, :, text:] + share * tilt], 2)
    return out, logits.logsumexp(-1)


CASES = list(itertools.product([(1, 12, 10), (2, 6, 9)], [0, 5], [16, 72], [1, 2], [True, False]))


def both(plan: Plan, a: Arguments, names: list[str], offset: Tensor | None) -> list[list[Tensor]]:
    """Output, lse and gradients of the kernels, and of the oracle in float32 and in float64."""
    found = []
    for dtype in (None, torch.float32, torch.float64):
        x = {name: getattr(a, name).detach().to(dtype or getattr(a, name).dtype).requires_grad_() for name in names}
        own = None if offset is None else offset.detach().to(dtype or offset.dtype).requires_grad_()
        out, lse = ops.attention(a._replace(**x, offset=own), "cpu") if dtype is None else oracle(plan, a, x, own)
        seed = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=seed).to(out.dtype)).sum() + (
            lse * torch.randn(lse.shape, generator=seed).to(lse.dtype)
        ).sum()
        leaves = [*x.values(), *([] if own is None else [own])]
        found.append([out, lse, *torch.autograd.grad(loss, leaves)])
    return found


@pytest.mark.parametrize("lists", [False, True], ids=["all", "lists"])
@pytest.mark.parametrize(("grid", "text", "dim", "parts", "slopes"), CASES)
def test_forward_and_backward_are_the_formula(grid: Any, text: int, dim: int, parts: int, slopes: bool, lists: bool) -> None:
    plan, a = problem(grid, text, dim, parts)
    a = on_lists(plan, a, parts) if lists else a
    a = a if slopes else a._replace(slopes=None)
    names = ["q", "k", "v", *(name for name in GIVEN if getattr(a, name) is not None)]
    kernel, eager, exact = both(plan, a, names, torch.tensor([0.3, -0.4]))
    for name, mine, theirs, right in zip(["out", "lse", *names, "offset"], kernel, eager, exact, strict=True):
        error, allowed = ((x.double() - right).abs().max() for x in (mine, theirs))
        assert error <= 2 * allowed + 1e-6 * right.abs().max(), (name, float(error), float(allowed))


def test_bfloat16_is_within_its_rounding() -> None:
    plan, a = problem((1, 12, 10), 5, 64, 2, torch.bfloat16)
    names = ["q", "k", "v", *GIVEN]
    kernel, _, exact = both(plan, a, names, None)
    low = {name: getattr(a, name).bfloat16() for name in names}
    eager = oracle(plan, a, low)[0]
    error, allowed = ((x.double() - exact[0]).norm() for x in (kernel[0], eager))
    assert error <= 2 * allowed, (float(error), float(allowed))
    assert all(x.isfinite().all() for x in kernel)


def test_without_slopes_and_with_means_it_is_what_the_kernel_pools() -> None:
    plan, a = problem((1, 12, 10), 5, 24, 1)
    image = [x[:, :, 5:][:, :, plan.k_blocks.index] for x in (a.k, a.v)]
    mean = [(x * plan.k_blocks.valid[..., None]).sum(3) / plan.k_blocks.count[:, None] for x in image]
    bias = plan.k_blocks.count.log().expand(1, HEADS, -1).contiguous()
    given = a._replace(pooled_k=mean[0], pooled_v=mean[1], pooled_bias=bias, slopes=None)
    pooled = a._replace(pooled_k=None, pooled_v=None, pooled_bias=None, slopes=None, log_count=True)
    for mine, theirs in zip(ops.attention(given, "cpu"), ops.attention(pooled, "cpu"), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pooled_v": None}, "pooled_k, pooled_v and pooled_bias"),
        ({"log_count": True}, "without variance and log_count"),
        ({"rest": "none"}, "of a pooled rest"),
        ({"slopes": torch.zeros(1, 1)}, "slopes must be float32"),
        ({"pooled_bias": torch.zeros(1, HEADS, 3)}, "pooled_bias must be float32"),
        ({"pool_lists": torch.zeros(1, HEADS, 1, 2, dtype=torch.int32)}, "pool_lists requires pool_counts, pool_slots and pool_parts"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    _, a = problem((1, 8, 8), 0, 16, 1)
    with pytest.raises(ValueError, match=message):
        check(a._replace(**change))


def test_the_gpu_kernels_refuse_what_they_do_not_know() -> None:
    pytest.importorskip("triton")
    from dit_accel.kernels.triton import calls

    _, a = problem((1, 8, 8), 0, 16, 1)
    with pytest.raises(ValueError, match="not supported by the Triton kernels"):
        calls.attend(a)
