"""What kernels take: a tuple for each thing that belongs together, instead of a parameter for each pointer and number of it.

Strides are in the tuple of their tensor: Triton compiles anew for those that are 1 or divisible by 16, by which it knows that whole vectors
can be loaded. It does so with every integer in a tuple, whatever a kernel says of the parameter (as of 3.6 to 3.9); sizes change from call
to call, so that they stay parameters of their own (SIZES). Constants are one tuple of `tl.constexpr`, the last parameter `C` (`kernel`);
plain numbers there would be no constants before Triton 3.9.
"""

import functools
from collections import namedtuple
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret  # the interpreter takes constants as they are


class Rows(NamedTuple):
    """A tensor `[B, H, N, D]` with contiguous channels, and the strides of its first three axes."""

    base: Tensor
    b: int
    h: int
    n: int


def rows_of(x: Tensor) -> Rows:
    return Rows(x, x.stride(0), x.stride(1), x.stride(2))


class Pair(NamedTuple):
    """Something for keys and the same for values; None where there is none."""

    k: Tensor | None = None
    v: Tensor | None = None


class Lists(NamedTuple):
    """The block lists, the first token of each block and the places of the tokens, as `arguments.Arguments` has them.

    `codes`: those of the entries where two blocks have one list (`block_pairs.pair_lists`), else None.
    """

    blocks: Tensor
    counts: Tensor
    full: Tensor
    q_starts: Tensor
    k_starts: Tensor
    q_places: Tensor | None
    k_places: Tensor | None
    codes: Tensor | None = None


class Paired(NamedTuple):
    """Where `block_pairs.pair_lists` writes the lists of pairs of query blocks `[1 or BH, pairs, 2n]`, how many entries they have and how
    many of these both blocks keep whole `[1 or BH, pairs]`, the entries' codes, and their masks for both `[1 or BH, pairs, 2n, 2]` or None.
    """

    blocks: Tensor
    counts: Tensor
    full: Tensor
    codes: Tensor
    mask_of: Tensor | None


class Transposed(NamedTuple):
    """The lists by key block (`list_order.columns`), and the number of each entry's mask."""

    entries: Tensor
    indptr: Tensor
    mask_of: Tensor | None = None


class Predicate(NamedTuple):
    """For blocks that are kept in part: windows of the queries `[W, 3, 3, length_q]` with the coordinates of the keys `[3, length_k]`,
    which nothing else reads, and their residues `[W, 3, length_k]` (None: those of the windows); or bit masks `[M, rows, WORDS]` with the
    rows that a program holds, and the number of each list entry's mask."""

    coords: Tensor
    windows: Tensor | None
    residues: Tensor | None = None
    masks: Tensor | None = None
    mask_of: Tensor | None = None


class Int8(NamedTuple):
    """Queries `[BH, Nq, D]` and keys `[BH, Nk, D]` rounded to int8 (`int8.round_to_int8`); None where products have the inputs' type.

    Of each a scale, the queries' in log2 and with the logits'; of the image's keys `[BH, image]` in the order of the blocks too, and some
    more memory, which may be read. `shift` `[BH, Nq]`: what the mean key, which the keys are without, adds to a query's logits, in log2.
    """

    q: Tensor | None = None
    k: Tensor | None = None
    q_scale: Tensor | None = None
    k_scale: Tensor | None = None
    block_scale: Tensor | None = None
    shift: Tensor | None = None


class Keys(NamedTuple):
    """Inside a kernel: where the keys and the values of one head begin, the strides of their rows, and the keys' scales where they have
    8 bits."""

    k: Any
    v: Any
    k_n: Any
    v_n: Any
    scale: Any = None


class Queries(NamedTuple):
    """Inside a kernel: where one head's queries, their output's gradients, lse and delta begin, and the strides of the first two's rows."""

    q: Any
    dout: Any
    lse: Any
    delta: Any
    q_n: Any
    g_n: Any


class Row(NamedTuple):
    """Inside a kernel: one row (of query blocks) or column (of key blocks) of the lists, and the tokens of it that a program holds.

    `entries`: the other side's blocks; `mask_of`: the number of each entry's mask; `masks`: the program's rows of mask 0, `mask_size` words
    before those of mask 1; `token`, `valid`: its tokens in the blocks' order; `length_q`, `length_k`: see `Predicate`. Of two blocks
    with one list: the entries' `codes`, and of each token which `half` it is of (`mask_of` then has two numbers for an entry); else None.
    """

    entries: Any
    mask_of: Any
    masks: Any
    mask_size: Any
    token: Any
    valid: Any
    length_q: Any
    length_k: Any
    codes: Any
    half: Any


class Pooled(NamedTuple):
    """Means and half variances `[BH, Tk · PARTS, D]` of the key blocks, and the lists as bits `[BH or 1, Tq, words]`.

    Where pooled keys are given: what joins their logits `[BH, Tk · PARTS]`, and the query blocks' matrices `[BH, Tq, D, D]`, both float32.
    Where they are those of units on lists, `[BH, units · PARTS, D]`: the units of each span of query blocks `[BH, spans, n]` and how many
    there are `[BH, spans]`, matrices of spans, and as bits the units that are hidden from a query block (`block_means.hidden_bits`).
    """

    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    k_half: Tensor | None = None
    bits: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    lists: Tensor | None = None
    counts: Tensor | None = None


class Moments(NamedTuple):
    """What `block_choice.block_moments` makes of blocks, in float32, each None where it is not asked for.

    `q_mean` `[BH, Tq, D]`, `k_mean` and `k_var` `[BH, Tk, D]`: means and the keys' (biased) variances. `q_square` `[BH, groups, D]`: the
    mean of q² over all queries in as many summands. `error` `[BH, Tk]`: log n + ½ log tr Var(v). In the type of keys and values, as
    `Pooled` has them: `pooled_k`, `pooled_v`, `k_half` `[BH, Tk, D]`.
    """

    q_mean: Tensor | None = None
    q_square: Tensor | None = None
    k_mean: Tensor | None = None
    k_var: Tensor | None = None
    error: Tensor | None = None
    pooled_k: Tensor | None = None
    pooled_v: Tensor | None = None
    k_half: Tensor | None = None


class Taken(NamedTuple):
    """Where `block_choice.take_best` writes what `arguments.Chosen` names so."""

    lists: Tensor
    counts: Tensor
    bits: Tensor


class Parts(NamedTuple):
    """Where `block_parts.summarise_parts` writes what `arguments.Summaries` names so."""

    k_mean: Tensor
    score_bias: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    bias: Tensor
    slope: Tensor
    tokens: Tensor
    spread: Tensor
    v_spread: Tensor
    part: Tensor


class Elements(NamedTuple):
    """Pooled keys and values `[BH, P, D]` of units, and of each its number of tokens, the variance of their logits and the trace of that of
    their values `[BH, P]`."""

    key: Tensor
    value: Tensor
    tokens: Tensor
    spread: Tensor
    v_spread: Tensor


class Joined(NamedTuple):
    """`Elements` of the units of all levels, and their biases `[BH, P]`."""

    key: Tensor
    value: Tensor
    bias: Tensor
    tokens: Tensor
    spread: Tensor
    v_spread: Tensor


class Groups(NamedTuple):
    """What there is of units as wholes: the numbers of all levels' tokens `[BH, units]`, and of the groups the parts of their members'
    parts, mean keys `[BH, above, D]`, what joins their scores `[BH, above]`, and the slopes of what lies between their members' parts
    `[BH, D, above, D]`."""

    total: Tensor
    part: Tensor
    middle: Tensor
    score_bias: Tensor
    slope: Tensor


class Cut(NamedTuple):
    """Inside a kernel: elements `[R]` of a unit, tokens or parts of its members. Where their keys and values begin, the strides of their
    rows, their rows, which of them there are, and which part each is in; where the means of the unit's parts are; of each element its share
    of its part and of the unit, and the variance of its part's logits."""

    k: Any
    v: Any
    k_n: Any
    v_n: Any
    rows: Any
    valid: Any
    part: Any
    k_mean: Any
    v_mean: Any
    of_part: Any
    of_unit: Any
    spread: Any


class CutBlocks(NamedTuple):
    """Of `arguments.Summaries` what their gradients are made of: pooled_k, pooled_v, tokens, spread and part."""

    k_mean: Tensor
    v_mean: Tensor
    tokens: Tensor
    spread: Tensor
    part: Tensor


class PartGradients(NamedTuple):
    """Gradients of pooled keys and values `[BH, P, D]`, their biases and variances `[BH, P]`, and slopes `[BH, D, T, D]`; None where
    nothing depends on them."""

    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    spread: Tensor | None = None
    slope: Tensor | None = None


class JoinedElements(NamedTuple):
    """Of `Joined` what its gradients are made of."""

    key: Tensor
    value: Tensor
    tokens: Tensor
    spread: Tensor


class UnitGradients(NamedTuple):
    """Gradients of the pooled keys and values `[BH, P, D]` of the units of all levels, and of their variances `[BH, P]`."""

    key: Tensor
    value: Tensor
    spread: Tensor


class PooledGradients(NamedTuple):
    """Gradients `[BH, Tk · PARTS, D]` float32 of the pooled keys, values and half variances, `[BH, tiles]` of the offset, and
    `[BH, Tk · PARTS]` of the biases that are given."""

    k_mean: Tensor | None = None
    v_mean: Tensor | None = None
    k_half: Tensor | None = None
    offset: Tensor | None = None
    bias: Tensor | None = None


class Tilt(NamedTuple):
    """What comes back to the queries' first order `[B, H, Nq]`, float32: delta of the pooled keys, and their share of the softmax."""

    delta: Tensor | None = None
    share: Tensor | None = None


class States(NamedTuple):
    """Sums of the linear rest: `[BH, D, D]` (in two parts, see `primitives.split_dot`) and `[BH, D]`; phi of the image's keys
    `[BH, image_k, D]` in their type, where the visited blocks are no part of the rest."""

    state: Tensor | None = None
    total: Tensor | None = None
    mapped: Tensor | None = None


class Split(NamedTuple):
    """Of rows that were split over the keys the softmax over each part `[splits, BH, rows, D]` and its lse in log2 `[splits, BH, rows]`."""

    part: Tensor | None = None
    lse: Tensor | None = None


class Learned(NamedTuple):
    """The method's parameters: offset `[H]`, the projection's weight (in two parts) and bias."""

    offset: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Logits(NamedTuple):
    """What makes logits of products: a factor, a bias `[BH, N]` in log2 of each key or None, the cap of a pooled key's variance term."""

    scale: float
    bias: Tensor | None = None
    cap: float = 0.0


class Pull(NamedTuple):
    """What comes back from the output: its gradient, lse `[B, H, N]` and delta `[B, H, N]`."""

    dout: Rows
    lse: Tensor
    delta: Tensor


class LinearPull(NamedTuple):
    """What comes back to the linear rest's numerator `[BH, image, D]` and mass `[BH, image]`, over their rows' sizes `[BH, image]`; phi(q)
    `[BH, image, D]`; the largest size of each program that wrote these `[BH, programs]`."""

    num: Tensor
    den: Tensor
    size: Tensor
    mapped: Tensor
    most: Tensor


class Outer(NamedTuple):
    """Factors of a sum of outer products, and where `backward_linear.outer_sums` writes its parts; without a state there is no sum."""

    a: Rows
    b: Rows
    states: States


class Sums(NamedTuple):
    """Parts of a linear rest's gradients, and where their sums go (`block_sums.sum_tile`); without a state there are none. Kernels ask
    for a tensor: Triton 3.6 can't compare a tuple with None that has another tuple with None in it.

    `parts` `[groups, BH, ..]` of the states with the largest entry of each and what the sums are divided by (`scaled`); `of_weight`: those
    of the projection, over all heads, with `weight` `[D, D]` and its bias.
    """

    parts: States = States()
    found: States = States()
    scaled: Pair = Pair()
    of_weight: States = States()
    weight: States = States()


# of a call and of a launch: Triton compiles nothing anew for them
SIZES = [
    "heads", "tokens_q", "tokens_k", "image", "image_q", "image_k", "image_start", "image_start_q", "image_start_k", "text", "text_q",
    "text_start", "text_start_q", "extra_keys", "q_blocks", "k_blocks", "blocks", "width", "entries", "length_q", "length_k", "mask_size",
    "rows", "columns", "keys", "first", "begin", "end", "chunk", "splits", "group", "groups", "words", "top", "k_width", "units",
    "pool_width", "of_below", "first_below", "slots", "members", "above", "spans", "pools", "opened", "text_tiles", "merging", "summing",
    "programs",
]  # fmt: skip


def kernel(constants: str) -> Callable[[Any], Any]:
    """A kernel whose last parameter `C` holds these constants. Those that a device function reads it finds in `C` by their names:

    D, DP: channels, and those padded to a power of two; BQ, BK: query rows and key rows of a tile; SUB_Q, SUB_K: tiles of a block; STAGES
    of a loop's pipeline; PRECISION of products; OWN: the heads have lists of their own; TOGETHER: query blocks that a program holds; WORDS:
    of a bit mask's row; PARTS: pooled keys of a block (unit); SPAN: query blocks that see the same units; W: padded key blocks; GROUPS:
    padded summands; the rest says what a method has.
    """

    def make(function: Any) -> Any:
        made = triton.jit(do_not_specialize=SIZES)(function)
        made.constants = _constants_type(constants.split())
        return made

    return make


def _constants_type(fields: list[str]) -> Any:
    """The class of a kernel's `C`, which makes its hash once: Triton asks for it at every launch, and each constant's is made in Python."""

    class Constants(namedtuple("Fields", fields)):  # type: ignore[misc]
        def __hash__(self) -> int:
            found: int | None = self.__dict__.get("hash")
            if found is None:
                found = self.__dict__["hash"] = super().__hash__()
            return found

    return Constants


def constants_of(function: Any, given: dict[str, Any]) -> Any:
    """A kernel's `C` from values by name, of which it may take some. The same values give the same object, so that Triton, which looks
    a kernel up by it, need not compare constant by constant."""
    return _constants(function.constants, *map(given.__getitem__, function.constants._fields))


@functools.lru_cache(maxsize=4096, typed=True)  # a kernel tells True from 1
def _constants(kind: Any, *values: Any) -> Any:
    return kind(*(values if INTERPRETED else map(tl.constexpr, values)))
