"""From one call of the operator to kernel launches: buffers, grids and tiles. Nothing here waits for the device.

`execute` runs a launch; anything else that takes one (a recorder, a compiler ahead of time) may take its place.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_accel.kernels.arguments import FEATURES, SAMPLE, SPAN, Arguments, text_queries
from dit_accel.kernels.triton import block_means, block_pairs, block_sums, forward, int8
from dit_accel.kernels.triton.fallback import Place, TooLargeError
from dit_accel.kernels.triton.list_order import complement
from dit_accel.kernels.triton.tables import POOLS, Machine, Tile, holds_two, joins, power
from dit_accel.kernels.triton.tuples import (
    Int8,
    Learned,
    Lists,
    Logits,
    Moments,
    Pair,
    Paired,
    Pooled,
    Predicate,
    Split,
    States,
    constants_of,
    rows_of,
)
from triton.runtime.errors import OutOfResources

LOG2E = 1.4426950408889634
STATE_GROUPS = 64  # partial states per head at most
SUMMING = {"E": 512, "N": 8}  # entries of a program that sums parts of states, and parts that it reads at once
MOST_PAIRED = 1024  # key blocks on a list whose union with its neighbour's a program's registers make
INT8_ROWS = 64  # that a program rounds
MOST_PARTS = 8  # that a program is cut into only to fill a device's last round


class Launch(NamedTuple):
    """One kernel on one grid."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int

    @property
    def constants(self) -> dict[str, Any]:
        """The kernel's constants by name."""
        given = self.arguments.get("C")
        if given is None:
            return {name: value for name, value in self.arguments.items() if name.isupper()}
        return {name: getattr(value, "value", value) for name, value in given._asdict().items()}


Run = Callable[[Launch], Any]
Flags = dict[str, Any]  # constants of a method, by name


def cdiv(a: int, b: int) -> int:
    """Quotient, rounded up. Triton's own may be called inside kernels and takes some microseconds outside."""
    return -(-a // b)


def execute(launch: Launch) -> Any:
    """Put the kernel on the current stream; what Triton compiled it to, None under its interpreter."""
    return launch.kernel[launch.grid](**launch.arguments, num_warps=launch.warps)


def tiled(run: Run, launch: Launch, place: Place) -> None:
    """Hand on a launch whose tile was looked up at `place`. Raises TooLargeError where the GPU can't hold that tile."""
    try:
        run(launch)
    except OutOfResources as error:
        raise TooLargeError(place, error) from error


def mask_words(masks: Tensor | None) -> tuple[int, int]:
    """Words of a bit mask's row, and of a mask."""
    return (0, 0) if masks is None else (masks.shape[2], masks.shape[1] * masks.shape[2])


def tf32_allowed() -> bool:
    """Whether products of float32 matrices may round their operands, as torch's own on a GPU.

    Asked of the newer of torch's two settings, which the older one writes too: once a user writes the newer, torch raises at reading the
    older.
    """
    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def mixing(arch: str, *, narrow: bool) -> str:
    """`precision_of` mixtures of slopes: where tokens have 16 bits, slopes are made and multiplied by queries as no more than that."""
    return precision_of(arch, tf32=narrow or tf32_allowed())


def precision_of(arch: str, *, tf32: bool = False) -> str:
    """How float32 matrices are multiplied on an architecture: operands rounded to TF32 where that is allowed, else as exact as float32.

    Three products of TF32 parts are, on NVIDIA's tensor cores; AMD's matrix instructions take float32 itself.
    """
    if not arch.startswith("sm_"):
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


def multiply(a: Tensor, b: Tensor, machine: Machine, run: "Run") -> Tensor:
    """a `[batch, rows, D]` times b `[batch or 1, columns, D]` transposed, float32 and contiguous, whatever the user allows torch's own."""
    (batch, rows, channels), columns = a.shape, b.shape[1]
    padded = max(16, 1 << (channels - 1).bit_length())
    width = 64 if padded <= 128 else 32  # wide tiles of wide rows spill on sm_100
    out = a.new_empty(batch, rows, columns)
    arguments = {
        "a": a, "b": b, "out": out, "a_batch": a.stride(0), "b_batch": 0 if len(b) == 1 else b.stride(0), "rows": rows, "columns": columns,
        "D": channels, "DP": padded, "BQ": 32, "BK": width, "BD": min(32, padded), "PRECISION": precision_of(machine.arch),
    }  # fmt: skip
    run(Launch(block_means.multiply, (cdiv(rows, 32), cdiv(columns, width), batch), arguments, 4))
    return out


def sum_states(parts: States, found: States, weight: Tensor | None, of_weight: Tensor | None, channels: int, run: "Run") -> None:
    """Launch the kernel: of matrices `[groups, BH, D, D]` and vectors `[groups, BH, D]` or None."""
    groups, heads = (0, 0) if parts.state is None else parts.state.shape[:2]
    tiles = cdiv(channels * channels, SUMMING["E"])
    arguments = {
        "parts": States(parts.state, parts.total), "weight": weight, "found": found, "of_weight": of_weight, "groups": groups,
        "heads": heads, "C": constants_of(block_sums.sum_states, {"D": channels, **SUMMING}),
    }  # fmt: skip
    run(Launch(block_sums.sum_states, (tiles, heads + (weight is not None)), arguments, 4))


class Rests(NamedTuple):
    """What represents the rest: pooled keys and the lists as bits, or linear states."""

    pooled: Pooled = Pooled()
    states: States = States()


def full_rounds(programs: int, slots: int) -> int:
    """Into how many parts each of `programs` equal programs is cut, so that they end soonest where `slots` run at once."""
    programs = max(1, programs)  # an empty batch has none

    def cost(parts: int) -> float:  # 1 where every round is full; and parts are written and summed
        return cdiv(programs * parts, slots) * slots / (programs * parts) + 0.02 * parts

    return min(range(1, max(MOST_PARTS, cdiv(slots, programs)) + 1), key=cost)


def state_groups(bh: int, machine: Machine) -> int:
    """How many partial states each head has at most: programs for two rounds of a device, because all of them are written and read."""
    return min(STATE_GROUPS, max(1, cdiv(4 * machine.units, max(1, bh))))


class Call:
    """One call's sizes, and the arguments that its kernels share."""

    def __init__(self, a: Arguments, machine: Machine, run: Run) -> None:
        self.a, self.machine, self.run = a, machine, run
        self.batch, self.heads, self.tokens_q, self.channels = a.q.shape
        self.bh, self.tokens_k, self.text_q = self.batch * self.heads, a.k.shape[2], text_queries(a)
        self.image_q, self.image_k = self.tokens_q - self.text_q, self.tokens_k - a.text
        self.text_start_q, self.image_start_q = (0, self.text_q) if a.text_first else (self.image_q, 0)
        self.text_start, self.image_start_k = (0, a.text) if a.text_first else (self.image_k, 0)
        self.q_blocks, self.k_blocks = len(a.q_starts) - 1, len(a.k_starts) - 1
        self.q_width, self.k_width, self.residual = a.q_width, a.k_width, a.residual
        self.pooled, self.linear = a.rest == "pooled", a.rest == "linear"
        pools = self.k_blocks if a.pooled_k is None else a.pooled_k.shape[2]
        self.parts = pools // self.k_blocks if a.pool_slots is None else a.pool_parts  # pooled keys of a unit
        self.units = pools // self.parts  # what is pooled: the key blocks, or what lists name
        self.span = 1 if a.pool_lists is None else SPAN  # query blocks that see the same
        # the linear rest is summed block by block where fewer blocks are left than visited: a difference of sums would lose it
        left = self.linear and not a.linear_all and 2 * a.lists.shape[-1] > self.k_blocks
        self.flags: Flags = {
            "COUNT": a.log_count, "VARIANCE": a.variance, "MAP": FEATURES.index(a.feature_map), "ALL": a.linear_all, "LEFT": left,
            "POOLED": self.pooled, "PARTS": self.parts, "SPAN": self.span, "LINEAR": self.linear, "RESIDUAL": self.residual,
            "EXTRA": a.extra_k is not None, "WINDOWS": 0 if a.windows is None else len(a.windows), "OWN": a.lists.ndim == 3,
            "PARTIAL": a.windows is not None or a.masks is not None, "WORDS": mask_words(a.masks)[0],
        }  # fmt: skip
        index = complement(a.lists, a.counts, self.k_blocks) if left else a.lists
        self.lists = Lists(index, a.counts, a.full, a.q_starts, a.k_starts, a.places_q, a.places_k)
        self.predicate = Predicate(a.coords, a.windows, a.residues, a.masks, a.mask_of)
        self.learned = Learned(a.offset, a.weight, a.bias)  # the weight: see `summed`
        self.logits = Logits(a.scale, self._key_bias(), a.cap)
        self.unbiased = self.logits._replace(bias=None)  # for kernels that read no text's key: they are not compiled twice
        self.sizes = self._sizes()
        # whether two query blocks may share a program of `attend_rows`: there is no slope of their own, and no window's bounds of both
        alone = self.linear or a.windows is not None or (a.slopes is not None and self.span == 1)
        self.pairs = not alone and self.q_blocks > 1 and self.lists.blocks.shape[-1] <= MOST_PAIRED
        self.padded = max(16, 1 << (self.channels - 1).bit_length())
        self.precision = precision_of(machine.arch, tf32=tf32_allowed()) if a.q.dtype == torch.float32 else "ieee"

    def _key_bias(self) -> Tensor | None:
        """What joins the logits of each key `[BH, Nk]`, in log2; by head, because a sample's number costs registers."""
        if self.a.text_bias is None:
            return None
        of_all = F.pad(self.a.text_bias * LOG2E, (self.text_start, self.tokens_k - self.text_start - self.a.text))
        return of_all.repeat_interleave(self.heads, 0)

    def _sizes(self) -> dict[str, int]:
        a = self.a
        return {
            "heads": self.heads, "tokens_q": self.tokens_q, "tokens_k": self.tokens_k, "image_q": self.image_q, "image_k": self.image_k,
            "image_start_q": self.image_start_q, "image_start_k": self.image_start_k, "text": a.text, "text_q": self.text_q,
            "text_start": self.text_start, "text_start_q": self.text_start_q, "q_blocks": self.q_blocks, "k_blocks": self.k_blocks,
            "extra_keys": 0 if a.extra_k is None else a.extra_k.shape[2], "width": self.lists.blocks.shape[-1],
            "length_q": 0 if a.windows is None else a.windows.shape[-1], "length_k": a.coords.shape[-1],
            "mask_size": mask_words(a.masks)[1], "units": self.units, "pool_width": 0 if a.pool_lists is None else a.pool_lists.shape[-1],
        }  # fmt: skip

    def place(self, kernel: str) -> Place:
        """What the kernel's tile is looked up by, for this call's widths and types."""
        pairs = kernel == "rows" and self.pairs
        narrow = self.a.int8 and kernel in ("rows", "dense")
        if kernel == "rows":
            kernel = "rows_linear" if self.linear else "rows_variance" if self.flags["VARIANCE"] else kernel
            kernel += "_static" if pairs and not self.flags["OWN"] else ""
        return Place(
            kernel, self.padded, torch.int8 if narrow else self.a.q.dtype, self.q_width, self.k_width, self.a.windows is not None,
            self.a.pool_slots is not None, pairs,
        )  # fmt: skip

    def tile(self, kernel: str) -> Tile:
        """The kernel's tile for this call."""
        return self.place(kernel).tile(self.machine)

    def start(self, kernel: Any, name: str, grid: tuple[int, ...], *, flags: Flags | None = None, **arguments: Any) -> None:
        """Launch with the tile's constants, further flags and the call's sizes, of which kernels take what they know."""
        tile = self.tile(name)
        constants = {
            "D": self.channels, "DP": self.padded, "BQ": tile.queries, "BK": tile.keys, "BP": self._pools(name, tile),
            "STAGES": tile.stages,
            "SUB_Q": cdiv(self.q_width, tile.queries), "SUB_K": cdiv(self.k_width, tile.keys), "PRECISION": self.precision,
            **self.flags, **(flags or {}),
        }  # fmt: skip
        sizes = {name: size for name, size in self.sizes.items() if name in kernel.arg_names}
        given = {**sizes, **arguments, "C": constants_of(kernel, constants)}
        tiled(self.run, Launch(kernel, grid, given, tile.warps), self.place(name))

    def _pools(self, kernel: str, tile: Tile) -> int:
        """The pooled keys of one step."""
        return min(tile.keys, POOLS.get(kernel, tile.keys)) if self.flags["VARIANCE"] and self.padded >= 128 else tile.keys

    def rows(self) -> dict[str, Any]:
        """q, k and v with their strides."""
        return {name: rows_of(getattr(self.a, name)) for name in "qkv"}

    def splits(self, tiles: int, length: int, step: int) -> tuple[int, int]:
        """How many chunks of how many rows a reduction over `length` rows is cut into, so that `tiles` programs fill the device, its last
        round too."""
        count = full_rounds(tiles * self.bh, 2 * self.machine.units)
        chunk = cdiv(cdiv(length, count), step) * step
        return cdiv(length, chunk), chunk

    def joined(self, kernel: str, alone: str) -> int | None:
        """In how many tiles the text's queries (keys, of a kernel that holds these) are put among the programs of blocks; None where they
        have launches of their own, with the tile of `alone`.

        Each tile of them goes through all tokens, which is as long as many blocks' programs take: one among these is not split, so long as
        the device has as much else to do meanwhile. And no program holds fewer rows than by itself.
        """
        of_keys = kernel == "gradient_columns"
        own, other = self.tile(kernel), self.tile(alone)
        rows, least, width = (own.keys, other.keys, self.k_width) if of_keys else (own.queries, other.queries, self.q_width)
        text, blocks, length = (self.a.text, self.k_blocks, self.tokens_q) if of_keys else (self.text_q, self.q_blocks, self.tokens_k)
        if not text or rows < least or not joins(self.place(kernel).kernel, self.machine.arch, self.padded, self.a.q.dtype):
            return None
        seen = self.text_q if of_keys else self.a.text + (self.units * self.parts if self.pooled else 0)
        listed = self.a.lists.shape[-1] * (self.q_blocks / self.k_blocks * self.q_width if of_keys else self.k_width)
        tiles = cdiv(text, rows)
        every = tiles * length + blocks * cdiv(width, rows) * (listed + seen)  # rows that are read by all programs of a head
        return tiles if length * 2 * self.machine.units <= every * self.bh else None

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.a.q.new_empty(shape, dtype=dtype)

    def pooled_rest(self) -> Rests:
        """Means and half variances of the key blocks, or the pooled keys that are given, in the input's type, and the lists as bits."""
        a, kind = self.a, self.a.q.dtype
        if a.means is not None:
            pooled = Pooled(*a.means.unbind())
        elif a.pooled_k is not None and a.pooled_v is not None:
            half = None if a.pooled_var is None else (a.pooled_var / 2).to(kind)
            pooled = Pooled(a.pooled_k.to(kind), a.pooled_v.to(kind), half, None, a.pooled_bias, a.slopes, a.pool_lists, a.pool_counts)
        else:
            pooled = Pooled(*(self.empty(self.bh, self.k_blocks, self.channels, dtype=kind) for _ in range(3)))
            self._summarise(1, pooled, States(), {"VALUES": True, "VARIANCE": a.variance})
        return Rests(pooled=pooled._replace(bits=self._hidden_bits()))

    def _hidden_bits(self) -> Tensor:
        """The units that a query block does not see, as bits `[BH or 1, Tq, words]`."""
        a, words = self.a, cdiv(self.units, 32)
        if a.bits is not None and a.pool_slots is None:
            return a.bits
        tile = min(32, max(1, 1 << (words - 1).bit_length()))
        arguments: dict[str, Any] = {"lists": a.lists, "counts": a.counts, "width": a.lists.shape[-1], "words": words, "W": tile, "N": 32}
        arguments["slots"] = a.pool_slots
        kernel, shape = block_means.list_bits, a.counts.shape
        if a.pool_lists is not None:
            kernel, shape = block_means.hidden_bits, torch.Size((self.bh, self.q_blocks))
            arguments |= {
                "pool_lists": a.pool_lists, "pool_counts": a.pool_counts, "pool_width": a.pool_lists.shape[-1],
                "q_blocks": self.q_blocks, "OWN": self.flags["OWN"], "SPAN": self.span,
            }  # fmt: skip
        bits = a.q.new_empty((*shape, words), dtype=torch.int32)
        self.run(Launch(kernel, (shape.numel(), cdiv(words, tile)), arguments | {"bits": bits}, 1))
        return bits

    def linear_rest(self, of_queries: Flags | None = None) -> Rests:
        """The mean over the image's keys of phi(k)·vᵀ and of phi(k), and phi(k) itself; where the rest is summed block by block nothing, or
        what `far_states` add to these means, which is a last group else. `of_queries`: what `summarise` takes to make deltas as well.
        """
        a, far = self.a, self._far()
        if self.flags["LEFT"]:
            return Rests(states=far)
        if a.states is not None:  # by the choice of blocks
            mapped = a.mapped
            if of_queries is not None:
                mapped = self.empty(self.bh, self.image_k, self.channels, dtype=a.q.dtype)
                self._summarise(1, Pooled(), States(mapped=mapped), {}, of_queries)
            if a.weight is not None and a.states.ndim == 4:
                self.learned = self.learned._replace(weight=a.states[self.bh :])
            return Rests(states=States(a.states, a.totals, mapped))
        group = cdiv(self.k_blocks, state_groups(self.bh, self.machine))
        groups = cdiv(self.k_blocks, group)
        given = int(far.state is not None)
        states = self.empty(groups + given, self.bh, self.channels, self.channels)
        totals = self.empty(groups + given, self.bh, self.channels)
        if far.state is not None and far.total is not None:
            states[groups:].copy_(far.state)
            totals[groups:].copy_(far.total)
        mapped = None if a.linear_all else self.empty(self.bh, self.image_k, self.channels, dtype=self.a.q.dtype)
        self._summarise(group, Pooled(), States(states, totals, mapped), {"STATES": True}, of_queries)
        return Rests(states=States(states, totals, mapped))

    def _far(self) -> States:
        """`far_states` over the number of the image's keys, as a group of one."""
        if self.a.far_states is None:
            return States()
        mean = self.a.far_states.flatten(0, 1) / self.image_k
        return States(mean[None, :, :-1].contiguous(), mean[None, :, -1].contiguous())

    def summed(self, parts: States, kind: torch.dtype | None = None) -> States:
        """Sums over a first axis of matrices `[groups, BH, D, D]` and vectors `[groups, BH, D]`; in a type narrower than float32 (`kind`,
        the input's unless given) matrices are the sums of two, `[BH, 2, D, D]`, and from then on so is the learned weight."""
        if parts.state is not None and parts.state is self.a.states:  # they are
            return parts
        kind, d = kind or self.a.q.dtype, self.channels
        weight = self.learned.weight if kind != torch.float32 and self.learned.weight is self.a.weight else None
        if parts.state is None and weight is None:
            return parts
        two = () if kind == torch.float32 else (2,)
        found = States()
        if parts.state is not None:
            total = None if parts.total is None else self.empty(self.bh, d)
            found = States(self.empty(self.bh, *two, d, d, dtype=kind), total)
        of_weight = None if weight is None else self.empty(*two, d, d, dtype=kind)
        sum_states(parts, found, weight, of_weight, d, self.run)
        if weight is not None:
            self.learned = self.learned._replace(weight=of_weight)
        return found._replace(mapped=parts.mapped)

    def _summarise(self, group: int, pooled: Pooled, states: States, flags: Flags, of_queries: Flags | None = None) -> None:
        a, groups = self.a, cdiv(self.k_blocks, group)
        programs = groups + (0 if of_queries is None else cdiv(self.tokens_q, self.tile("summarise").queries))
        flags = {"VALUES": False, "VARIANCE": False, "STATES": False, **flags}
        self.start(
            block_means.summarise, "summarise", (programs, self.bh), **self.rows(), moments=Moments(), pooled=pooled, states=states,
            q_starts=a.q_starts, starts=a.k_starts, q_places=a.places_q, places=a.places_k, image=self.image_k,
            image_start=self.image_start_k, blocks=self.k_blocks, group=group, groups=groups, flags=flags,
            **(of_queries or {"out": None, "pull": None, "dlse": None}),
        )  # fmt: skip

    def paired(self) -> tuple[Lists, Predicate]:
        """One list for each two neighbouring query blocks."""
        a, (rows, width) = self.a, (self.bh if self.flags["OWN"] else 1, self.a.lists.shape[-1])
        of_lists = (rows, cdiv(self.q_blocks, 2))
        blocks, codes = (self.empty(*of_lists, 2 * width, dtype=torch.int32) for _ in range(2))
        counts, full = (self.empty(*of_lists, dtype=torch.int32) for _ in range(2))
        mask_of = None if a.mask_of is None else self.empty(*of_lists, 2 * width, 2, dtype=torch.int32)
        constants = {"W": max(16, 1 << (width - 1).bit_length()), "N": 16, "PARTIAL": self.flags["PARTIAL"]}
        arguments: dict[str, Any] = {
            "lists": a.lists, "counts": a.counts, "full": a.full, "mask_of": a.mask_of, "q_blocks": self.q_blocks, "width": width,
            "found": Paired(blocks, counts, full, codes, mask_of), "C": constants_of(block_pairs.pair_lists, constants),
        }  # fmt: skip
        self.run(Launch(block_pairs.pair_lists, of_lists[::-1], arguments, 1 if width <= 64 else 4))
        return self.lists._replace(blocks=blocks, counts=counts, full=full, codes=codes), self.predicate._replace(mask_of=mask_of)

    def in_8_bits(self) -> Int8:
        """Queries and keys rounded to int8, where the call asks for their products."""
        a, groups = self.a, cdiv(self.tokens_q, INT8_ROWS)
        if not a.int8:
            return Int8()
        q, k = (self.empty(self.bh, n, self.channels, dtype=torch.int8) for n in (self.tokens_q, self.tokens_k))
        q_scale, k_scale, shift = (self.empty(self.bh, n) for n in (self.tokens_q, self.tokens_k, self.tokens_q))
        found = Int8(q, k, q_scale, k_scale, self.empty(self.bh * self.image_k + max(16, power(self.k_width))), shift)
        arguments: dict[str, Any] = {"q": rows_of(a.q), "k": rows_of(a.k), "found": found, "places": a.places_k, "scale": a.scale}
        arguments |= {name: size for name, size in self.sizes.items() if name in int8.round_to_int8.arg_names}
        constants = {"D": self.channels, "DP": self.padded, "BQ": INT8_ROWS, "N": SAMPLE}
        arguments |= {"groups": groups, "C": constants_of(int8.round_to_int8, constants)}
        self.run(Launch(int8.round_to_int8, (groups + cdiv(self.tokens_k, INT8_ROWS), self.bh), arguments, 4))
        return found

    def rest(self) -> Rests:
        """What the kernels read of the rest."""
        return self.pooled_rest() if self.pooled else self.linear_rest() if self.linear else Rests()


def attend(a: Arguments, machine: Machine, run: Run = execute) -> tuple[Tensor, Tensor]:
    """Output in q's layout and lse `[B, H, Nq]` of one call (see `ops.attention`)."""
    call = Call(a, machine, run)
    out, lse = torch.empty_like(a.q), call.empty(*a.q.shape[:3])
    pooled, states = call.rest()
    if states.state is not None and a.weight is not None and call.residual and call.flags["ALL"]:
        whole = call.summed(states, torch.float32)
        if whole.state is not None:  # the projection, once per head instead of once per query
            state = multiply(whole.state, a.weight[None], machine, run)[None]
            states = whole._replace(state=call.summed(States(state)).state)
    else:
        states = call.summed(states)
    tile = call.tile("rows")
    together = 2 if call.pairs and holds_two(tile, call.q_width) else 1
    lists, predicate = call.paired() if together > 1 else (call.lists, call.predicate)
    narrow = call.in_8_bits()
    joined = call.joined("rows", "dense")
    split, splits, merging = _dense_rows(call, narrow) if call.text_q and not joined else (Split(), 0, 0)
    programs = (joined or 0) + cdiv(call.q_blocks, together) * cdiv(call.q_width, tile.queries) + merging
    call.start(
        forward.attend_rows, "rows", (programs, call.bh), **call.rows(), int8=narrow, extra=Pair(a.extra_k, a.extra_v), out=rows_of(out),
        lse=lse, lists=lists, predicate=predicate, pooled=pooled, states=states, learned=call.learned, logits=call.logits,
        width=lists.blocks.shape[-1], text_tiles=joined, split=split, splits=splits, merging=merging, flags={"TOGETHER": together},
    )  # fmt: skip
    return out, lse


def _dense_rows(call: Call, narrow: Int8) -> tuple[Split, int, int]:
    """The text's queries over all keys, split over the keys; into how many parts, and how many programs of `attend_rows` merge these."""
    rows, tile = call.text_q, call.tile("dense")
    tiles = cdiv(rows, tile.queries)
    splits, chunk = call.splits(tiles, call.tokens_k, tile.keys)
    split = Split(call.empty(splits, call.bh, rows, call.channels), call.empty(splits, call.bh, rows))
    call.start(
        forward.dense_rows, "dense", (tiles, call.bh, splits), **call.rows(), int8=narrow, split=split, logits=call.logits,
        first=call.text_start_q, rows=rows, chunk=chunk,
    )  # fmt: skip
    return split, splits, cdiv(rows, call.tile("rows").queries)
