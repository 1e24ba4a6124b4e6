"""Bit masks of partial blocks in the CPU kernels, against dense attention in float64 under the same masks."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_close_as_eager, spread
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import Arguments
from dit_accel.kernels.cpu import native

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")

TARGETS = native.TARGETS[: native.TARGETS.index(native.best_target()) + 1] if native.library() else ()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH, HEADS = 2, 2


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instruction set that this CPU has, one after the other."""
    monkeypatch.setenv(native.TARGET_VARIABLE, request.param)


def words(kept: Tensor) -> Tensor:
    """Rows of booleans `[..., n]` as rows of 64 bits: int64 `[..., ceil(n / 64)]`."""
    bits = torch.nn.functional.pad(kept.long(), (0, -kept.shape[-1] % 64)).unflatten(-1, (-1, 64))
    return (bits << torch.arange(64)).sum(-1)


def starts(tokens: int, width: int, seed: torch.Generator) -> Tensor:
    """Blocks of at most `width` tokens, most of them shorter; the first is full."""
    cuts = [0, min(width, tokens)]
    while cuts[-1] < tokens:
        cuts.append(min(tokens, cuts[-1] + int(torch.randint(1, width + 1, (), generator=seed))))
    return torch.tensor(cuts, dtype=torch.int32)


@dataclass
class Case:
    """Random lists and masks over `queries` and `keys` image tokens, in blocks of at most `widths`."""

    queries: int
    keys: int
    widths: tuple[int, int]
    text: int = 0
    text_first: bool = True
    head_dim: int = 24
    shared: bool = True  # one set of lists for all heads

    def __post_init__(self) -> None:
        seed = torch.Generator().manual_seed(1)
        self.q_starts, self.k_starts = starts(self.queries, self.widths[0], seed), starts(self.keys, self.widths[1], seed)
        (rows, columns), heads = (len(self.q_starts) - 1, len(self.k_starts) - 1), 1 if self.shared else BATCH * HEADS
        visited = torch.rand(heads, rows, columns, generator=seed) < 0.5
        visited[:, :, 0] = True  # whole or not, every query keeps something of it
        whole = visited & (torch.rand(visited.shape, generator=seed) < 0.3)
        kind = visited.int() + whole.int()
        order = kind.argsort(dim=-1, descending=True, stable=True)
        self.counts, self.full = visited.sum(-1, dtype=torch.int32), whole.sum(-1, dtype=torch.int32)
        self.lists = order[..., : int(self.counts.max())].to(torch.int32).contiguous()
        self.dense = self._dense(visited, whole, seed)
        self.masks, self.masks_t, self.mask_of = self._masks()

    def _spans(self, of: Tensor) -> list[slice]:
        return [slice(a, b) for a, b in zip(of.tolist(), of.tolist()[1:], strict=False)]

    def _dense(self, visited: Tensor, whole: Tensor, seed: torch.Generator) -> Tensor:
        """`[L, queries, keys]`: which pairs of image tokens are kept."""
        kept = torch.rand(len(visited), self.queries, self.keys, generator=seed) < 0.3
        kept[:, :, 0] = True
        for i, rows in enumerate(self._spans(self.q_starts)):
            for j, columns in enumerate(self._spans(self.k_starts)):
                kept[:, rows, columns] &= visited[:, i, j, None, None]
                kept[:, rows, columns] |= whole[:, i, j, None, None]
        return kept

    def _masks(self) -> tuple[Tensor, Tensor, Tensor]:
        """A mask for each partial entry; those that are not read have numbers far out of range."""
        of, found = torch.full(self.lists.shape, 2**30, dtype=torch.int32), []
        q_spans, k_spans = self._spans(self.q_starts), self._spans(self.k_starts)
        for head, i in torch.cartesian_prod(torch.arange(len(self.lists)), torch.arange(len(q_spans))).tolist():
            for n in range(int(self.full[head, i]), int(self.counts[head, i])):
                part = self.dense[head, q_spans[i], k_spans[int(self.lists[head, i, n])]]
                mask = torch.zeros(self.widths, dtype=torch.bool)
                mask[: part.shape[0], : part.shape[1]] = part
                of[head, i, n] = len(found)
                found.append(mask)
        every = torch.stack(found) if found else torch.zeros(1, *self.widths, dtype=torch.bool)
        return words(every), words(every.mT), of

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        sizes = [(BATCH, HEADS, n + self.text, self.head_dim) for n in (self.queries, self.keys, self.keys)]
        seed = torch.Generator().manual_seed(2)
        return [(s * torch.randn(size, generator=seed)).to(dtype) for s, size in zip((2.0, 1.0, 1.0), sizes, strict=True)]

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Arguments:
        lists, counts, full, of = (x[0] if self.shared else x for x in (self.lists, self.counts, self.full, self.mask_of))
        given = {
            "lists": lists, "counts": counts, "full": full, "mask_of": of, "masks": self.masks, "masks_t": self.masks_t,
            "q_starts": self.q_starts, "k_starts": self.k_starts, "q_width": self.widths[0], "k_width": self.widths[1],
            "coords": torch.zeros(3, self.keys + 16, dtype=torch.int32), "text": self.text, "text_first": self.text_first,
            "scale": self.head_dim**-0.5,
        }  # fmt: skip
        return Arguments(q=q, k=k, v=v, **(given | changed))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Dense attention in the dtype given: text queries see all, all see the text's keys."""
        kept = torch.ones(BATCH, HEADS, q.shape[2], k.shape[2], dtype=torch.bool)
        first = self.text if self.text_first else 0
        dense = self.dense.expand(BATCH * HEADS, -1, -1).unflatten(0, (BATCH, HEADS))
        kept[:, :, first : first + self.queries, first : first + self.keys] = dense
        logits = (self.head_dim**-0.5 * q @ k.mT).masked_fill(~kept, -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)


def results(case: Case, function: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output, lse and the gradients of a loss of both."""
    qkv = [x.to(dtype).requires_grad_() for x in case.inputs(torch.float32)]
    out, lse, seed = *function(*qkv), torch.Generator().manual_seed(7)
    sum((x * torch.randn(x.shape, generator=seed).to(x.dtype)).sum() for x in (out, lse)).backward()  # type: ignore[union-attr]
    named = dict(zip(("query", "key", "value"), (x.grad for x in qkv), strict=True))
    return {"output": out.detach(), "lse": lse.detach(), **{k: x for k, x in named.items() if x is not None}}


def assert_equals_dense(case: Case) -> None:
    got = results(case, lambda *qkv: ops.attention(case.arguments(*qkv), "cpu"), torch.float32)
    exact, eager = (results(case, case.oracle, d) for d in (torch.float64, torch.float32))
    for name, x in got.items():
        assert_close_as_eager(x, exact[name], eager[name], name)


WIDTHS = {"16-16": (16, 16), "64-64": (64, 64), "32-128": (32, 128), "128-48": (128, 48), "20-65": (20, 65)}
TEXTS = {"0": 0, "7": 7, "77": 77}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    ("widths", "text", "head_dim", "shared", "target"),
    spread(5, WIDTHS, TEXTS, {"8": 8, "24": 24, "64": 64}, {"shared": True, "per-head": False}, {t: t for t in TARGETS}),
    indirect=["target"],
)
def test_random_masks_equal_dense(widths: tuple[int, int], text: int, head_dim: int, shared: bool) -> None:
    assert_equals_dense(Case(150, 150, widths, text, text != 7, head_dim, shared))


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_bfloat16_masks(widths: tuple[int, int]) -> None:
    case = Case(150, 150, widths, 7)
    qkv = case.inputs(torch.bfloat16)
    got = ops.attention(case.arguments(*qkv), "cpu")
    exact, eager = (case.oracle(*(x.to(d) for x in qkv)) for d in (torch.float64, torch.bfloat16))
    for name, *three in zip(("output", "lse"), got, exact, eager, strict=True):
        assert_close_as_eager(*three, name)  # type: ignore[arg-type]


@pytest.mark.usefixtures("target")
def test_a_key_that_a_query_does_not_keep_has_no_part() -> None:
    """Not even where it is NaN."""
    case = Case(150, 150, (32, 64))
    q, k, v = case.inputs(torch.float32)
    wanted = ops.attention(case.arguments(q, k, v), "cpu")
    unseen = ~case.dense[0]
    for row in (3, 77, 149):
        broken = k.clone()
        broken[:, :, unseen[row]] = math.nan
        got = ops.attention(case.arguments(q, broken, v), "cpu")
        torch.testing.assert_close([x[:, :, row] for x in got], [x[:, :, row] for x in wanted], rtol=0, atol=0)


def test_threads_change_no_bit() -> None:
    case, found, threads = Case(150, 150, (32, 64), 7), [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(results(case, lambda *qkv: ops.attention(case.arguments(*qkv), "cpu"), torch.float32))
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"masks_t": None}, "require masks, masks_t and mask_of together"),
        ({"masks": torch.zeros(1, 32, 2, dtype=torch.int64)}, r"masks is int64 \[M, 32, 1\] and contiguous, got torch.int64 \(1, 32, 2\)"),
        ({"masks_t": torch.zeros(1, 64, 1, dtype=torch.int32)}, r"masks_t is int64 \[M, 64, 1\] and contiguous, got torch.int32"),
        ({"mask_of": torch.zeros(2, 3, dtype=torch.int32)}, "mask_of is int32 in the shape of lists"),
    ],
    ids=["absent", "words", "dtype", "mask-of"],
)
def test_refuses_masks_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    case = Case(150, 150, (32, 64))
    with pytest.raises(ValueError, match=said):
        ops.attention(case.arguments(*case.inputs(torch.float32), **changed), "cpu")
