"""The exact part of the CPU kernels by bit masks and windows, with other queries than keys, against dense attention in float64."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers import assert_close_as_eager, spread
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import ATTENTION, Arguments
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
    text_q: int | None = None  # as many
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
        return self._by_blocks(kept, visited, whole)

    def _by_blocks(self, kept: Tensor, visited: Tensor, whole: Tensor) -> Tensor:
        """Kept pairs, but none where a block is not visited and all where it is whole."""
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
        seed = torch.Generator().manual_seed(2)
        text_q = self.text if self.text_q is None else self.text_q
        tokens = (self.queries + text_q, self.keys + self.text, self.keys + self.text)
        sizes = [(BATCH, HEADS, n, self.head_dim) for n in tokens]
        return [(s * torch.randn(size, generator=seed)).to(dtype) for s, size in zip((2.0, 1.0, 1.0), sizes, strict=True)]

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Arguments:
        lists, counts, full, of = (x[0] if self.shared else x for x in (self.lists, self.counts, self.full, self.mask_of))
        given = {
            "lists": lists, "counts": counts, "full": full, "mask_of": of, "masks": self.masks, "masks_t": self.masks_t,
            "q_starts": self.q_starts, "k_starts": self.k_starts, "q_width": self.widths[0], "k_width": self.widths[1],
            "coords": torch.zeros(3, self.keys + 16, dtype=torch.int32), "text": self.text, "text_q": self.text_q,
            "text_first": self.text_first, "scale": self.head_dim**-0.5,
        }  # fmt: skip
        return Arguments(q=q, k=k, v=v, **(given | changed))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Dense attention in the dtype given: text queries see all, all see the text's keys."""
        kept = torch.ones(BATCH, HEADS, q.shape[2], k.shape[2], dtype=torch.bool)
        text_q = q.shape[2] - self.queries
        rows, columns = (text_q, self.text) if self.text_first else (0, 0)
        dense = self.dense.expand(BATCH * HEADS, -1, -1).unflatten(0, (BATCH, HEADS))
        kept[:, :, rows : rows + self.queries, columns : columns + self.keys] = dense
        logits = (self.head_dim**-0.5 * q @ k.mT).masked_fill(~kept, -torch.inf)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)


def results(case: Case, function: Any, dtype: torch.dtype, inputs: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Output, lse and the gradients of a loss of both."""
    qkv = [x.to(dtype, copy=True).requires_grad_() for x in inputs or case.inputs(torch.float32)]
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
    assert_equals_dense(Case(150, 150, widths, text, text_first=text != 7, head_dim=head_dim, shared=shared))


NUMBERS = {"17-150": (17, 150), "150-17": (150, 17), "61-200": (61, 200), "200-61": (200, 61)}
TEXT_QUERIES = {"0": 0, "5": 5, "77": 77}


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize(
    ("numbers", "text", "text_q", "widths", "target"),
    spread(4, NUMBERS, TEXTS, TEXT_QUERIES, {"16-64": (16, 64), "65-20": (65, 20)}, {t: t for t in TARGETS}),
    indirect=["target"],
)
def test_other_queries_than_keys_equal_dense(numbers: tuple[int, int], text: int, text_q: int, widths: tuple[int, int]) -> None:
    assert_equals_dense(Case(*numbers, widths, text, text_q, text_first=text_q != 5, shared=text != 7))


@dataclass
class Windows(Case):
    """Random windows of `queries` over the keys of a grid, whatever the blocks are."""

    grid: tuple[int, int, int] = (1, 1, 1)

    def _dense(self, visited: Tensor, whole: Tensor, seed: torch.Generator) -> Tensor:
        self.coords = torch.cartesian_prod(*(torch.arange(n) for n in self.grid)).T.int()
        size, number = (2, 3, self.queries), 2
        first = torch.randint(-2, 9, size, generator=seed)
        self.windows = torch.stack([first, first + torch.randint(2, 9, size, generator=seed), torch.randint(0, 2, size, generator=seed)], 2)
        self.residues = torch.randint(0, 2, (number, 3, self.keys), generator=seed)
        low, high, mine = (x[..., None] for x in self.windows.unbind(2))
        seen = (low <= self.coords[None, :, None]) & (self.coords[None, :, None] <= high) & (mine == self.residues[:, :, None])
        axes = slice(0 if self.grid[0] > 1 else 1, None)  # an image has no windows along time
        kept = seen[:, axes].all(1).any(0).expand(len(visited), -1, -1).clone()
        return self._by_blocks(kept, visited, whole)

    def arguments(self, q: Tensor, k: Tensor, v: Tensor, **changed: Any) -> Arguments:
        pad = lambda x: torch.nn.functional.pad(x, (0, 16)).int().contiguous()  # noqa: E731
        tables = {"coords": pad(self.coords), "windows": pad(self.windows), "residues": pad(self.residues)}
        return super().arguments(q, k, v, masks=None, masks_t=None, mask_of=None, **tables, **changed)


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("grid", [(1, 9, 17), (3, 6, 7)], ids=["image", "video"])
@pytest.mark.parametrize("queries", [40, 300])
def test_windows_of_other_queries_than_keys_equal_dense(grid: tuple[int, int, int], queries: int) -> None:
    assert_equals_dense(Windows(queries, math.prod(grid), (48, 32), text=7, text_q=0, grid=grid))


@pytest.mark.usefixtures("target")
def test_places_of_queries_and_keys_are_their_own() -> None:
    case = Case(90, 150, (32, 64), 7, 3)
    q, k, v = case.inputs(torch.float32)
    wanted = ops.attention(case.arguments(q, k, v), "cpu")
    seed = torch.Generator().manual_seed(3)
    places_q, places_k = torch.randperm(90, generator=seed), torch.randperm(150, generator=seed)
    rows, columns = (torch.cat([torch.arange(n), x + n]) for n, x in ((3, places_q), (7, places_k)))
    moved = [torch.empty_like(x).index_copy(2, at, x) for x, at in ((q, rows), (k, columns), (v, columns))]
    got = ops.attention(case.arguments(*moved, places_q=places_q.int(), places_k=places_k.int()), "cpu")
    torch.testing.assert_close([x[:, :, rows] for x in got], list(wanted), rtol=0, atol=0)


@pytest.mark.parametrize("numbers", [(150, 150), (61, 200)], ids=["equal", "other"])
def test_obeys_the_rules_of_operators(numbers: tuple[int, int]) -> None:
    case = Case(*numbers, (32, 64), 7, 3)
    a = case.arguments(*(x.requires_grad_() for x in case.inputs(torch.float32)))
    torch.library.opcheck(ops.attention_op, ("cpu", *ATTENTION.pack(a)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"windows": torch.zeros(1, 3, 3, 77, dtype=torch.int32)},
            r"require the keys' residues where queries and keys differ, as here \(64 queries and 203 keys, of which 3 and",
        ),
        ({"text_q": 65}, "the text must be a part of the tokens, not 65 of 64 queries"),
        ({"v": torch.zeros(2, 2, 204, 24)}, r"k and v \[B, H, Nk, D\] of the same B, H and D, not"),
    ],
    ids=["windows", "text", "shape"],
)
def test_refuses_what_other_queries_than_keys_can_not_have(changed: dict[str, Any], said: str) -> None:
    case = Case(61, 200, (32, 64), 3, 3)
    a = case.arguments(*case.inputs(torch.float32))
    with pytest.raises(ValueError, match=said):
        ops.attention(a._replace(**changed), "cpu")


@pytest.mark.usefixtures("target")
@pytest.mark.parametrize("widths", WIDTHS.values(), ids=WIDTHS)
def test_bfloat16_masks(widths: tuple[int, int]) -> None:
    case = Case(110, 150, widths, 7, 3)
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
        ({"masks": torch.zeros(1, 32, 2, dtype=torch.int64)}, r"masks must be int64 \[M, 32, 1\] and contiguous, not torch.int64 \(1, 32"),
        ({"masks_t": torch.zeros(1, 64, 1, dtype=torch.int32)}, r"masks_t must be int64 \[M, 64, 1\] and contiguous, not torch.int32"),
        ({"mask_of": torch.zeros(2, 3, dtype=torch.int32)}, "mask_of must be int32 in the shape of lists"),
    ],
    ids=["absent", "words", "dtype", "mask-of"],
)
def test_refuses_masks_that_do_not_fit(changed: dict[str, Any], said: str) -> None:
    case = Case(150, 150, (32, 64))
    with pytest.raises(ValueError, match=said):
        ops.attention(case.arguments(*case.inputs(torch.float32), **changed), "cpu")
