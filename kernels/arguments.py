"""The arguments of the operators, each declared once.

From the declarations come the operators' schemas and what travels through them (`Transport`), what their fake kernels and gradients need
to know, and the fields of the structs that the C++ library reads. A new argument is one line here, one in cpu/problem.h and its table of
fields, and wherever a kernel uses it.
"""

import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

RESTS = ("none", "pooled", "linear")
FEATURES = ("softmax", "elu", "relu")


class Mark(NamedTuple):
    """What a type alone does not say: a tensor has a gradient; it is `[B, H, N, D]` by strides; a string is one of these; only the GPU's
    kernels read it; it is kept for the gradients, which else make it anew."""

    differentiable: bool = False
    strided: bool = False
    choices: tuple[str, ...] = ()
    gpu: bool = False
    kept: bool = True


Rows = Annotated[Tensor, Mark(differentiable=True, strided=True)]  # `[B, H, N, D]`: a gradient has its dtype
ChosenFrom = Annotated[Tensor, Mark(strided=True)]
Learned = Annotated[Tensor | None, Mark(differentiable=True)]  # contiguous: a gradient is float32
OnGpu = Annotated[Tensor | None, Mark(gpu=True)]
Narrow = Annotated[bool, Mark(gpu=True)]  # whether a matrix product may round its operands to TF32, as where the tokens have 16 bits
Rest = Annotated[str, Mark(choices=RESTS)]
Feature = Annotated[str, Mark(choices=FEATURES)]

Int8 = Annotated[bool, Mark(gpu=True)]  # whether products of queries with kept keys and text are of both rounded to 8 bits

SPAN = 4  # query blocks in a row that see the same units
SAMPLE = 64  # keys and queries of the image that the mean key and the channels' balance are made of


class Arguments(NamedTuple):
    """The arguments of `dit_accel::attention`, but for the implementation's name. All contiguous but q, k and v.

    `q` `[B, H, Nq, D]` and `k`, `v` `[B, H, Nk, D]`: text and image, the text first where `text_first`. `text`: of k's tokens are text;
    `text_q`: of q's, None: as many. Text queries see all keys, all queries the text's keys.
    `lists` `[q blocks, n]`, or with a leading B·H, int32: visited key blocks, the `full` ones first, `counts` of them.
    `q_starts`, `k_starts` `[blocks + 1]`: first image token of each block, in the order of the blocks; `q_width`, `k_width`: the most
    tokens of a block.
    `coords` `[3, Nk + padding]` of the image's keys, read with windows alone; `windows` `[W, 3, 3, Nq + padding]`: first, last and residue
    that a query sees per axis; `residues` `[W, 3, Nk + padding]`: the keys' own, None where queries and keys are the same tokens.
    All in the order of the blocks, N without the text.
    `masks` `[M, q_width, ceil(k_width / 64)]` int64, in place of windows: bit j of word w of row i says whether place i of a
    query block keeps place 64·w + j of a key block; places past a short block's end are 0. `masks_t` `[M, k_width, ceil(q_width / 64)]`:
    the same with keys as rows. `mask_of` int32 in the shape of `lists`: the number of an entry's mask, read from `full` to `counts`.
    `places_q` `[Nq]`, `places_k` `[Nk]` int32: where each token of the blocks' order is among the image's tokens of q, and of k and v;
    None: they are in that order.
    `extra_k`, `extra_v` `[B, H, M, D]`: keys that all image queries see in addition.
    `pooled_k`, `pooled_v` `[B, H, P, D]`, `pooled_bias` `[B, H, P]` float32: the pooled keys of a "pooled" rest where the kernel does not
    pool itself, P / k blocks of them for each key block, one block after the other, and what joins their logits (-inf: never seen);
    `pooled_var` `[B, H, P, D]` float32: with `variance`, the variances of their keys.
    `slopes` `[B, H, q blocks, D, D]` float32: scale · q · slopes[I], times the share that pooled keys have of the query's softmax, is added
    to the output.
    `pool_lists` `[B, H, spans, n]`, `pool_counts` `[B, H, spans]`, `pool_slots` `[k blocks]` int32: pooled keys of units, `pool_parts` for
    each, of which the query blocks of a span, SPAN in a row, see those on its list, the first `counts` of it; a key block is the unit
    `pool_slots`, hidden from the query blocks that keep it. Then there are slopes for each span, and no variance. Without `pool_lists` all
    units are seen; without `pool_slots` they are the key blocks.
    `far_states` `[B, H, D + 1, D]` float32: Σ phi(k) vᵀ and, as the last row, Σ phi(k) of keys in addition to k's, which are in the rest
    of every query; of a "linear" rest.
    `offset` `[H]`, `weight` `[D, D]`, `bias` `[D]` float32: log mass offset and projection of the rest.
    `text_bias` `[B, text]` float32 and finite joins the logits of the text's keys.
    `bits` int32 `[.., q blocks, words]`: the lists as bits; `means` `[3, B·H, k blocks, D]` in q's dtype: means of the key blocks' keys and
    values, half the variances of their keys (of no meaning without `variance`). Both as `Chosen` has them, or None: they are made.
    `states`, `totals` `[B·H, D]` float32: the means of phi(k) vᵀ and phi(k) over the image's keys, the first `[B·H, D, D]` in float32, in
    a narrower type `[B·H, 2, D, D]`, sums of two, and the `weight` is one more. `mapped` `[B·H, image's keys, D]`: phi(k). All of a
    "linear" rest without `linear_all` whose lists hold at most half of the blocks, as `Chosen` has them, or None: they are made.
    `int8`: without gradients alone; see `reference.rounded_to_int8`.
    `rest`, `log_count`, `variance`, `cap`, `feature_map`, `linear_all`, `residual`: the rest and how it is merged.
    """

    q: Rows
    k: Rows
    v: Rows
    lists: Tensor
    counts: Tensor
    full: Tensor
    q_starts: Tensor
    k_starts: Tensor
    coords: Tensor
    q_width: int
    k_width: int
    text: int
    text_first: bool
    scale: float
    text_q: int | None = None
    windows: Tensor | None = None
    residues: Tensor | None = None
    masks: Tensor | None = None
    masks_t: Tensor | None = None
    mask_of: Tensor | None = None
    places_q: Tensor | None = None
    places_k: Tensor | None = None
    extra_k: Learned = None
    extra_v: Learned = None
    pooled_k: Learned = None
    pooled_v: Learned = None
    pooled_bias: Learned = None
    pooled_var: Learned = None
    slopes: Learned = None
    pool_lists: Tensor | None = None
    pool_counts: Tensor | None = None
    pool_slots: Tensor | None = None
    far_states: Learned = None
    offset: Learned = None
    weight: Learned = None
    bias: Learned = None
    text_bias: Tensor | None = None
    bits: OnGpu = None
    means: OnGpu = None
    states: OnGpu = None
    totals: OnGpu = None
    mapped: Annotated[Tensor | None, Mark(gpu=True, kept=False)] = None
    rest: Rest = "none"
    feature_map: Feature = "softmax"
    log_count: bool = False
    variance: bool = False
    linear_all: bool = False
    residual: bool = False
    int8: Int8 = False
    pool_parts: int = 1
    cap: float = 0.0


class SummaryArguments(NamedTuple):
    """The arguments of `dit_accel::summarize_blocks`, but for the implementation's name.

    `q`, `k`, `v`, text, starts, widths and places as in `Arguments`, all of q's text said by `text_q`. `parts`: 1, 2 or 4 pooled keys for
    a block, split by content. `scale`: of the logits. `cap`, `score_cap`: the most that half the variance of a block's logits adds to a
    pooled key's bias, and to the score. `log_count`: whether the logarithm of a part's number of tokens is in its bias. `first_order`:
    whether slopes are made.
    """

    q: Rows
    k: Rows
    v: Rows
    q_starts: Tensor
    k_starts: Tensor
    q_width: int
    k_width: int
    parts: int
    text: int
    text_q: int
    text_first: bool
    scale: float
    cap: float
    score_cap: float
    log_count: bool
    first_order: bool
    places_q: Tensor | None = None
    places_k: Tensor | None = None


class Summaries(NamedTuple):
    """What whole blocks are summarised to, all float32 but `part`. Differentiable: q_mean, pooled_k, pooled_v, pooled_bias, slope, second,
    spread.

    `q_mean` `[B, H, q blocks, D]`, `k_mean` `[B, H, k blocks, D]`: means of blocks. `score_bias` `[B, H, k blocks]`: what joins a block's
    logit in the score of the error that its pooled key would leave. `pooled_k`, `pooled_v` `[B, H, P, D]`, `pooled_bias` `[B, H, P]`: as in
    `Arguments`. `slope` `[B, H, D of k, k blocks, D of v]`: how a block's value changes with the query; of no elements unless it is asked
    for. `second` `[B, H, D]`: the mean of q²; `metric` `[B, H, D, D]`: that of q qᵀ, of no elements with one part. `tokens`, `spread`,
    `v_spread` `[B, H, P]`: each part's number of tokens, the variance of their logits, and the trace of that of their values. `part` `[B,
    H, k blocks, k_width]` uint8: the part of each token, 0 past a short block's end.
    """

    q_mean: Tensor
    k_mean: Tensor
    score_bias: Tensor
    pooled_k: Tensor
    pooled_v: Tensor
    pooled_bias: Tensor
    slope: Tensor
    second: Tensor
    metric: Tensor
    tokens: Tensor
    spread: Tensor
    v_spread: Tensor
    part: Tensor


class MixtureArguments(NamedTuple):
    """The arguments of `dit_accel::mix_slopes`, but for the implementation's name. The tensors are float32, contiguous and differentiable.

    `weight` `[B, H, n, T]`: of each of T units in each of n mixtures; `slope` `[B, H, D, T, D]`: as in `Summaries`. `narrow`: see `Narrow`.
    """

    weight: Tensor
    slope: Tensor
    narrow: Narrow = False


class Declared(NamedTuple):
    """One argument as it is declared."""

    name: str
    kind: type
    optional: bool
    mark: Mark


def _declared(name: str, hint: Any) -> Declared:
    mark = next((m for m in getattr(hint, "__metadata__", ()) if isinstance(m, Mark)), Mark())
    plain = hint.__origin__ if typing.get_origin(hint) is Annotated else hint
    optional = isinstance(plain, types.UnionType)
    kind = next(x for x in typing.get_args(plain) if x is not types.NoneType) if optional else plain
    return Declared(name, kind, optional, mark)


@functools.cache
def declared(arguments: type) -> tuple[Declared, ...]:
    """What a class of arguments declares, in order."""
    return tuple(_declared(name, hint) for name, hint in typing.get_type_hints(arguments, include_extras=True).items())


class Transport:
    """How the arguments of a class travel through an operator: each tensor by itself, all numbers as one list, all real numbers as another.

    Torch walks an operator's arguments in a time that is quadratic in how many there are, at every call with a gradient. A choice travels
    as its place, None among numbers as -1.
    """

    def __init__(self, kind: type) -> None:
        self.kind: Any = kind
        self.optional = {d.name for d in declared(kind) if d.optional}
        self.tensors = tuple(d.name for d in declared(kind) if d.kind is Tensor)
        self.passing = tuple(self.tensors.index(d.name) for d in declared(kind) if not d.mark.kept)
        # by place, because this runs at every call
        places = list(enumerate(declared(kind)))
        self._tensors = [place for place, d in places if d.kind is Tensor]
        self._reals = [place for place, d in places if d.kind is float]
        self._numbers = [(place, d) for place, d in places if d.kind not in (Tensor, float)]

    def schema(self, returns: str, *first: str) -> str:
        """The signature of an operator that takes the implementation's name, `first`, and then the arguments, as torch.library has it."""
        tensors = (f"Tensor{'?' if name in self.optional else ''} {name}" for name in self.tensors)
        return f"({', '.join(('str implementation', *first, *tensors, 'SymInt[] numbers', 'float[] reals'))}) -> {returns}"

    def pack(self, a: Any) -> list[Any]:
        """The arguments as the operator takes them. Raises ValueError at an unknown choice."""
        numbers = [_number(d, a[place]) for place, d in self._numbers]
        return [*[a[place] for place in self._tensors], numbers, [a[place] for place in self._reals]]

    def unpack(self, *given: Any) -> Any:
        """The arguments again."""
        *tensors, numbers, reals = given
        found: list[Any] = [None] * (len(tensors) + len(numbers) + len(reals))
        for places, values in ((self._tensors, tensors), (self._reals, reals)):
            for place, value in zip(places, values, strict=True):
                found[place] = value
        for (place, d), value in zip(self._numbers, numbers, strict=True):
            if d.mark.choices:
                found[place] = d.mark.choices[value]
            elif not (d.optional and value == -1):
                found[place] = bool(value) if d.kind is bool else value
        return self.kind._make(found)


def _number(d: Declared, value: Any) -> Any:
    """An argument among the numbers. Raises ValueError at an unknown choice."""
    if d.mark.choices:
        _check_choice(d.name, value, d.mark.choices)
        return d.mark.choices.index(value)
    return -1 if value is None else int(value) if d.kind is bool else value


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, not {value!r}")


ATTENTION = Transport(Arguments)
SUMMARY, MIXTURE = Transport(SummaryArguments), Transport(MixtureArguments)
DIFFERENTIABLE = {d.name: d for d in declared(Arguments) if d.mark.differentiable}


def gradient_like(name: str, a: Arguments) -> Tensor:
    """An empty tensor with the shape and dtype of an argument's gradient; of no elements where the argument is absent."""
    x: Tensor | None = getattr(a, name)
    if x is None:
        return a.q.new_empty(0, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=x.dtype if DIFFERENTIABLE[name].mark.strided else torch.float32)


def in_order(gradients: Mapping[str, Tensor | None], a: Arguments) -> list[Tensor]:
    """Gradients by argument as the list that an operator returns: in the order of the declaration, absent ones empty."""
    found = {name: gradients.get(name) for name in DIFFERENTIABLE}
    return [gradient_like(name, a) if x is None else x for name, x in found.items()]


def check(a: Arguments) -> None:
    """Raise ValueError at arguments that do not fit each other, as a kernel would read what is not there, and at an unknown choice."""
    for name, choices in (("rest", RESTS), ("feature_map", FEATURES)):
        _check_choice(name, getattr(a, name), choices)
    _check_numbers(a)
    _check_pooled(a)
    _check_far(a)
    _check_made(a)
    if a.masks is None and a.masks_t is None and a.mask_of is None:
        return
    if a.masks is None or a.masks_t is None or a.mask_of is None:
        given = [name for name in ("masks", "masks_t", "mask_of") if getattr(a, name) is not None]
        raise ValueError(f"bit masks require masks, masks_t and mask_of together, not {given} alone: give all three or none")
    for name, x, rows, columns in (("masks", a.masks, a.q_width, a.k_width), ("masks_t", a.masks_t, a.k_width, a.q_width)):
        words = -(-columns // 64)
        if x.dtype != torch.int64 or x.shape[1:] != (rows, words) or not x.is_contiguous():
            raise ValueError(f"{name} must be int64 [M, {rows}, {words}] and contiguous, not {x.dtype} {tuple(x.shape)}")
    if a.mask_of.dtype != torch.int32 or a.mask_of.shape != a.lists.shape or not a.mask_of.is_contiguous():
        found = f"{a.mask_of.dtype} {tuple(a.mask_of.shape)} for lists {tuple(a.lists.shape)}"
        raise ValueError(f"mask_of must be int32 in the shape of lists and contiguous, not {found}")


def _check_numbers(a: Arguments) -> None:
    (batch, heads, queries, channels), text_q = a.q.shape, text_queries(a)
    keys = a.k.shape[2]
    if a.k.shape != (batch, heads, keys, channels) or a.v.shape != a.k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (a.q, a.k, a.v))
        raise ValueError(f"q must be [B, H, Nq, D], and k and v [B, H, Nk, D] of the same B, H and D, not {shapes}")
    if not (0 <= text_q <= queries and 0 <= a.text <= keys):
        raise ValueError(f"the text must be a part of the tokens, not {text_q} of {queries} queries and {a.text} of {keys} keys")
    if queries - text_q != keys - a.text and a.windows is not None and a.residues is None:
        numbers = f"{queries} queries and {keys} keys, of which {text_q} and {a.text} are text"
        raise ValueError(f"windows require the keys' residues where queries and keys differ, as here ({numbers}): give residues")


def new_summaries(a: SummaryArguments) -> Summaries:
    """Empty tensors for the results of `dit_accel::summarize_blocks`."""
    heads, d, q_blocks, k_blocks = a.k.shape[:2], a.k.shape[3], len(a.q_starts) - 1, len(a.k_starts) - 1
    pools = a.parts * k_blocks
    sizes = {
        "q_mean": (q_blocks, d), "k_mean": (k_blocks, d), "score_bias": (k_blocks,), "pooled_k": (pools, d), "pooled_v": (pools, d),
        "pooled_bias": (pools,), "slope": (d, k_blocks, d), "second": (d,), "metric": (d, d), "tokens": (pools,), "spread": (pools,),
        "v_spread": (pools,),
    }  # fmt: skip
    absent = {"slope": not a.first_order, "metric": a.parts == 1}
    real = {
        name: a.k.new_empty(0 if absent.get(name) else (*heads, *size), dtype=torch.float32) for name, size in sizes.items()
    }  # fmt: skip
    return Summaries(**real, part=a.k.new_empty((*heads, k_blocks, a.k_width), dtype=torch.uint8))


def check_summary(a: SummaryArguments) -> None:
    """Raise ValueError at arguments that do not fit each other."""
    if a.k.ndim != 4 or a.q.shape[:2] != a.k.shape[:2] or a.q.shape[3] != a.k.shape[3] or a.v.shape != a.k.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (a.q, a.k, a.v))
        raise ValueError(f"q must be [B, H, Nq, D], and k and v [B, H, Nk, D] of the same B, H and D, not {shapes}")
    if a.parts not in (1, 2, 4):
        raise ValueError(f"parts must be 1, 2 or 4 pooled keys for a block, not {a.parts}")
    if not (0 <= a.text_q <= a.q.shape[2] and 0 <= a.text <= a.k.shape[2]):
        numbers = f"{a.text_q} of {a.q.shape[2]} queries and {a.text} of {a.k.shape[2]} keys"
        raise ValueError(f"the text must be a part of the tokens, not {numbers}")


def check_mixture(a: MixtureArguments) -> None:
    """Raise ValueError at arguments that do not fit each other."""
    (*heads, mixtures, units), d = a.weight.shape, a.slope.shape[-1]
    _check_floats({"weight": (a.weight, (*heads, mixtures, units)), "slope": (a.slope, (*heads, d, units, d))})


def _check_floats(given: Mapping[str, tuple[Tensor, Sequence[int]]]) -> None:
    for name, (x, shape) in given.items():
        if x.shape != tuple(shape) or x.dtype != torch.float32 or not x.is_contiguous():
            raise ValueError(f"{name} must be float32 {tuple(shape)} and contiguous, not {x.dtype} {tuple(x.shape)}")


def _check_pooled(a: Arguments) -> None:
    given = (a.pooled_k, a.pooled_v, a.pooled_bias)
    if all(x is None for x in (*given, a.pooled_var, a.slopes)):
        return
    if a.pooled_k is None or any(x is None for x in given) or a.rest != "pooled" or a.log_count:
        raise ValueError("pooled keys are given as pooled_k, pooled_v and pooled_bias of a pooled rest without log_count")
    if a.variance != (a.pooled_var is not None) or (a.variance and a.pool_lists is not None):
        raise ValueError("pooled_var is given with variance, and both only where there are no pool_lists")
    (batch, heads, _, channels), pools, blocks = a.q.shape, a.pooled_k.shape[2], len(a.k_starts) - 1
    states = len(a.q_starts) - 1
    if a.pool_lists is not None:
        states = -(-states // SPAN)
    if a.pool_lists is not None or a.pool_slots is not None:
        _check_units(a, pools, states)
    elif pools == 0 or pools % blocks:
        raise ValueError(f"each of {blocks} key blocks must have as many pooled keys, 1 or more, but {pools} is no multiple")
    shapes = {"pooled_k": (pools, channels), "pooled_v": (pools, channels), "pooled_bias": (pools,), "pooled_var": (pools, channels)}
    shapes["slopes"] = (states, channels, channels)
    for name, shape in shapes.items():
        x = getattr(a, name)
        if x is not None and (x.shape != (batch, heads, *shape) or x.dtype != torch.float32 or not x.is_contiguous()):
            expected = f"float32 {(batch, heads, *shape)} and contiguous"
            raise ValueError(f"{name} must be {expected}, not {x.dtype} {tuple(x.shape)} of strides {x.stride()}")


def _check_far(a: Arguments) -> None:
    if a.far_states is None:
        return
    if a.rest != "linear":
        raise ValueError(f"far_states are of a linear rest, not of {a.rest!r}")
    batch, heads, _, channels = a.q.shape
    _check_floats({"far_states": (a.far_states, (batch, heads, channels + 1, channels))})


def _check_made(a: Arguments) -> None:
    (batch, heads, _, channels), blocks = a.q.shape, len(a.k_starts) - 1
    states = (batch * heads,) if a.q.dtype == torch.float32 else (batch * heads + (a.weight is not None), 2)
    given: dict[str, tuple[Tensor | None, torch.dtype, tuple[int, ...]]] = {
        "bits": (a.bits, torch.int32, (*a.counts.shape, -(-blocks // 32))),
        "means": (a.means, a.q.dtype, (3, batch * heads, blocks, channels)),
        "states": (a.states, a.q.dtype, (*states, channels, channels)),
        "totals": (a.totals, torch.float32, (batch * heads, channels)),
        "mapped": (a.mapped, a.q.dtype, (batch * heads, a.k.shape[2] - a.text, channels)),
    }
    if a.states is not None and (a.totals is None or a.rest != "linear" or a.linear_all or a.far_states is not None):
        raise ValueError("states are given with totals, of a linear rest of what is not kept, without far_states")
    for name, (x, dtype, shape) in given.items():
        if x is not None and (x.dtype != dtype or x.shape != shape or not x.is_contiguous()):
            raise ValueError(f"{name} must be {dtype} {shape} and contiguous, not {x.dtype} {tuple(x.shape)} of strides {x.stride()}")


def _check_units(a: Arguments, pools: int, spans: int) -> None:
    if a.pool_slots is None or a.pool_parts not in (1, 2, 4) or pools == 0 or pools % a.pool_parts:
        raise ValueError("units require pool_slots, and pool_parts of 1, 2 or 4 pooled keys for each")
    if (a.pool_lists is None) != (a.pool_counts is None):
        raise ValueError("pool_lists and pool_counts are given together")
    shapes: dict[str, tuple[int, ...]] = {"pool_slots": (len(a.k_starts) - 1,)}
    if a.pool_lists is not None:
        shapes |= {"pool_counts": (*a.q.shape[:2], spans), "pool_lists": (*a.q.shape[:2], spans, a.pool_lists.shape[-1])}
    for name, shape in shapes.items():
        x = getattr(a, name)
        if x.shape != shape or x.dtype != torch.int32 or not x.is_contiguous():
            raise ValueError(f"{name} must be int32 {shape} and contiguous, not {x.dtype} {tuple(x.shape)} of strides {x.stride()}")


def text_queries(a: Arguments) -> int:
    """How many of q's tokens are text."""
    return a.text if a.text_q is None else a.text_q


def dense(x: Tensor) -> Tensor:
    """The tensor with its channels contiguous, which is all that compiled kernels ask; itself where they are."""
    return x if x.stride(-1) == 1 else x.contiguous()
