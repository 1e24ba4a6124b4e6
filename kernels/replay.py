"""A call of operators as the list of what it did, and the same again without deciding anything anew.

Two calls whose arguments agree in types, sizes, strides, alignment and numbers (`key_of`) run the same kernels with the same numbers, on
other memory. To find that out takes Python some hundred microseconds, more than a card takes for 4,096 tokens. So the first call is
recorded, torch's operators and our kernels in their order, and written as a Python function that does no more than them, which later calls
run. Backends add their kernels (`Recorder.kernel`).

A record holds no memory but constants that its owner holds as well (a plan's tensors) and what follows from them alone. What only kernels
read or write between them is cut from one allocation.
"""

import itertools
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.kernels.memory import Readers, arranged, placed

LIMIT = 512  # records, some tens of kilobytes each; the least recently used are dropped
HELD = 1 << 26  # bytes of constants that records hold together; beyond, the least recently used are dropped, the newest never
ALIGNED = 16  # bytes: Triton compiles a kernel for pointers that are divisible by so many, and of every pointer it is asked again
LARGE = 1 << 24  # bytes: larger pieces are allocated by themselves, find room in what is free, and are freed as early as before

EMPTY = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format)
COUNTING = torch.ops.aten.arange


class MovedError(Exception):
    """Some memory is aligned otherwise than when the record was made: its kernels are not the ones for it."""


def key_of(name: str, arguments: Sequence[Any], *more: Hashable) -> tuple[Hashable, ...]:
    """What two calls have in common where the one's record serves the other."""
    found: list[Hashable] = [name, *more]
    first: dict[int, int] = {}  # arguments that begin at one address are one to the record
    for number, x in enumerate(arguments):
        if isinstance(x, Tensor):
            address = x.data_ptr()
            found += (x.shape, x.stride(), x.dtype, x.device, address % ALIGNED, first.setdefault(address, number))
        else:
            found.append(x)
    return tuple(found)


class Record(NamedTuple):
    """What a call did: `play` does the same with other arguments of the same key, and gives what that gives. It raises MovedError where
    memory is aligned otherwise; what was done until then changed new memory alone.

    `source`: of `play`. `constants`: the tensors that were made of its owner's, which it reads in addition to these and its arguments.
    `readers`: the streams that read the constants.
    """

    play: Callable[[Sequence[Any]], Any]
    source: str
    constants: tuple[Tensor, ...]
    readers: Readers


class Piece(NamedTuple):
    """A tensor by its memory: the place of the one whose memory it is, how many bytes after that it begins, and its sizes."""

    place: int
    after: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    whole: bool  # it is that tensor

    @classmethod
    def of(cls, x: Tensor, place: int, after: int, *, whole: bool) -> "Piece":
        return cls(place, after, tuple(x.shape), x.stride(), x.dtype, whole)


class Given(NamedTuple):
    """A tensor that a kernel takes by its address."""

    piece: Piece


class Space(NamedTuple):
    """New memory: its place, bytes, and how torch makes it."""

    place: int
    bytes: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Step(NamedTuple):
    """What was done at once: `write` gives its lines of Python; `reads`: the places of which it takes something, `makes`: those that are
    there from then on."""

    write: Callable[["Writer"], Iterator[str]]
    reads: frozenset[int] = frozenset()
    makes: tuple[int, ...] = ()
    space: Space | None = None


class Writer:
    """The Python function of a record: names of constants, and where new memory is cut from."""

    def __init__(
        self, steps: Sequence[Step], inputs: dict[int, int], aligned: dict[int, int], whole: set[int], kept: frozenset[int]
    ) -> None:
        self.names: dict[str, Any] = {"MovedError": MovedError, "empty_strided": torch.empty_strided, "placed": placed}
        self._steps, self._inputs, self._aligned, self._kept = steps, inputs, aligned, kept
        self._ends = {place: number for number, step in enumerate(steps) for place in (*step.makes, *step.reads)}
        self._held: list[Tensor] = []
        cut = [(number, step.space) for number, step in enumerate(steps) if step.space is not None]
        cut = [(number, space) for number, space in cut if space.place not in whole and space.bytes <= LARGE]
        self._device = cut[0][1].device if cut else None
        cut = [(number, space) for number, space in cut if space.device == self._device]
        self._bytes, offsets = arranged([(number, self._ends[space.place], space.bytes) for number, space in cut])
        self._cut = {space.place: offset for (_, space), offset in zip(cut, offsets, strict=True)}

    def constant(self, x: Any) -> str:
        """What a constant is called."""
        if x is None or type(x) in (int, bool):
            return repr(x)
        name = f"c{len(self.names)}"
        self.names[name] = x
        return name

    def tensor(self, piece: Piece | Tensor) -> str:
        """A tensor, made where it is none of the function's names."""
        if isinstance(piece, Tensor):
            self._held.append(piece)
            return self.constant(piece)
        if piece.place in self._cut:
            sizes = self.constant((piece.size, piece.stride, piece.dtype))
            return f"placed(w, {self._cut[piece.place] + piece.after}, *{sizes})"
        name = f"x{piece.place}"
        if piece.whole:
            return name
        begin = piece.after // piece.dtype.itemsize
        return f"{name}.as_strided({self.constant(piece.size)}, {self.constant(piece.stride)}, {name}.storage_offset() + {begin})"

    def address(self, piece: Piece | Tensor) -> str:
        """Where it begins; 0 for a tensor of no elements."""
        if isinstance(piece, Tensor):
            self._held.append(piece)
            return repr(piece.data_ptr())
        if 0 in piece.size:
            return "0"
        if piece.place in self._cut:
            return f"p + {self._cut[piece.place] + piece.after}"
        return f"p{piece.place} + {piece.after}" if piece.after else f"p{piece.place}"

    def value(self, x: Any, of_tensor: Callable[[Any], str], *, kinds: bool = True) -> str:
        """What makes the same of other tensors; `kinds`: named tuples stay what they are."""
        if isinstance(x, (Piece, Given, Tensor)):
            return of_tensor(x.piece if isinstance(x, Given) else x)
        if isinstance(x, (tuple, list)) and has_tensors(x):
            inner = "".join(f"{self.value(y, of_tensor, kinds=kinds)}, " for y in x)
            make = getattr(type(x), "_make", None) if kinds else None
            return f"[{inner}]" if isinstance(x, list) else f"({inner})" if make is None else f"{self.constant(make)}(({inner}))"
        if isinstance(x, dict) and has_tensors(x):
            return f"{{{', '.join(f'{name!r}: {self.value(y, of_tensor, kinds=kinds)}' for name, y in x.items())}}}"
        return self.constant(x)

    def record(self, result: Any, held: Sequence[Tensor]) -> Record:
        """The function that does the steps and returns `result`; it reads the tensors `held`."""
        body = list(self._lines(result))
        source = "\n    ".join(["def play(arguments):", *body])
        exec(compile(source, "<record>", "exec"), self.names)  # of numbers and names of our own
        # among its own names it would keep itself, and with it constants, until Python looks for cycles
        return Record(self.names.pop("play"), source, (*held, *self._held), Readers(()))

    def _lines(self, result: Any) -> Iterator[str]:
        for place, number in self._inputs.items():
            yield f"x{place} = arguments[{number}]"
        yield from self._addresses(self._inputs)
        if self._cut:
            size = self.constant((self._bytes,))
            yield f"w = empty_strided({size}, (1,), dtype={self.constant(torch.uint8)}, device={self.constant(self._device)})"
            yield "p = w.data_ptr()"
            yield f"if p % {ALIGNED}: raise MovedError"
        for number, step in enumerate(self._steps):
            if step.space is not None and step.space.place in self._cut:
                continue
            yield from step.write(self)
            yield from self._addresses(step.makes)
            unread = [place for place in sorted({*step.reads, *step.makes}) if self._ends[place] == number and place not in self._cut]
            if names := [f"x{place}" for place in unread if place not in self._kept and place not in self._inputs]:
                yield f"del {', '.join(names)}"
        yield f"return {self.value(result, self.tensor)}"

    def _addresses(self, places: Any) -> Iterator[str]:
        """Read those that kernels take."""
        given = [place for place in places if place in self._aligned]
        for place in given:
            yield f"p{place} = x{place}.data_ptr()"
        moved = [f"p{place} % {ALIGNED} != {self._aligned[place]}" for place in given]
        if not any(self._aligned[place] for place in given):
            moved = [f"({' | '.join(f'p{place}' for place in given)}) % {ALIGNED}"]
        if given:
            yield f"if {' or '.join(moved)}: raise MovedError"


class Recorder(TorchDispatchMode):
    """Inside, what torch's operators and kernels do is noted. `record` then gives it, or None where it depends on something unknown.

    `constants`: tensors that the record may hold. `overlapping`: whether that is because an argument begins inside another, which other
    calls of the same key need not have.
    """

    def __init__(self, arguments: Sequence[Any], constants: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self._pieces = WeakTensorKeyDictionary()  # of the tensors that are alive: what is dead is no argument of what follows
        self._fixed = WeakTensorKeyDictionary()  # that follow from constants alone
        self._steps: list[Step] = []
        self._count = itertools.count()
        self._whole: set[int] = set()  # the places that more than kernels read
        self._aligned: dict[int, int] = {}  # of the places whose addresses kernels take, what is left of these over ALIGNED
        self._known, self._paused, self._constants = True, False, tuple(constants)
        for x in constants:
            self._fixed[x] = True
        self._held: list[Tensor] = []
        self.overlapping = False
        self._inputs: dict[int, int] = {}
        self._same: dict[int, int] = {}  # of arguments the first that begins at their address, in every call of the key
        first: dict[int, int] = {}
        for number, x in enumerate(arguments):
            if isinstance(x, Tensor) and x not in self._pieces:
                place = self._new(x)
                self._inputs[place], self._same[place] = number, first.setdefault(x.data_ptr(), place)

    def record(self, result: Any) -> Record | None:
        made = self._by_piece(result, whole=True)
        if not self._known:
            return None
        writer = Writer(self._steps, self._inputs, self._aligned, self._whole, frozenset(_places(made)))
        record, own = writer.record(made, self._held), set(map(id, self._constants))
        constants = tuple(x for x in record.constants if id(x) not in own)
        return record._replace(constants=constants, readers=Readers(constants))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._paused:  # what an interpreter does for a kernel, it does again
            return function(*args, **kwargs)
        result = function(*args, **kwargs)
        if function in EMPTY:
            return self._allocated(result)
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        if self._follows(function, args, kwargs):
            for x in outputs:
                if isinstance(x, Tensor):
                    self._fixed[x] = True
            return result
        if function.is_view and args[0] in self._pieces and is_part(result, args[0]):
            source = self._pieces[args[0]]
            for x in outputs:
                after = source.after + (x.storage_offset() - args[0].storage_offset()) * x.element_size()
                same = source.whole and after == 0 and (x.shape, x.stride()) == (source.size, source.stride)  # only detached
                self._pieces[x] = Piece.of(x, source.place, after, whole=same)
            return result
        self._note(function, args, kwargs, outputs, single=not isinstance(result, (tuple, list)))
        return result

    def _follows(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Whether what an operator gives follows from constants alone."""
        if not self._constants or function._schema.is_mutable or torch.Tag.nondeterministic_seeded in function.tags:
            return False
        given = list(_tensors((args, kwargs)))
        return all(x in self._fixed for x in given) if given else function.overloadpacket is COUNTING

    def _note(self, function: Any, args: Any, kwargs: Any, outputs: list[Any], *, single: bool) -> None:
        sized = torch.Tag.dynamic_output_shape not in function.tags
        changed = function._schema.is_mutable and any(x in self._fixed for x in outputs)
        if changed or not sized or not all(isinstance(x, Tensor) for x in outputs):
            self._known = False  # a constant that is none, or a size or number that Python goes on with
        given = self._by_piece(list(args), whole=True), self._by_piece(dict(kwargs), whole=True)
        new = [(n, self._new(x)) for n, x in enumerate(outputs) if isinstance(x, Tensor) and x not in self._pieces]

        def write(writer: Writer) -> Iterator[str]:
            positional = "".join(f"{writer.value(x, writer.tensor)}, " for x in given[0])
            named = "".join(f"{name}={writer.value(x, writer.tensor)}, " for name, x in given[1].items())
            call = f"{writer.constant(function)}({positional}{named})"
            if not new:
                yield call
            elif single:
                yield f"x{new[0][1]} = {call}"
            else:
                yield f"several = {call}"
                for number, place in new:
                    yield f"x{place} = several[{number}]"
                yield "del several"

        makes = tuple(place for _, place in new)
        self._steps.append(Step(write, frozenset(_places(given)), makes))

    def _allocated(self, x: Tensor) -> Tensor:
        """Note new memory: of its size in every call of the key, and made in a third of the time of the operator that did."""
        place = self._new(x)
        space = Space(place, x.untyped_storage().nbytes(), tuple(x.shape), x.stride(), x.dtype, x.device)

        def write(writer: Writer) -> Iterator[str]:
            sizes = f"{writer.constant(space.size)}, {writer.constant(space.stride)}"
            yield f"x{place} = empty_strided({sizes}, dtype={writer.constant(space.dtype)}, device={writer.constant(space.device)})"

        self._steps.append(Step(write, makes=(place,), space=space))
        return x

    def kernel(self, write: Callable[[Writer], Iterator[str]], given: Any) -> None:
        """Note a kernel that takes `given` (as `pieces` makes it)."""
        self._steps.append(Step(write, frozenset(_places(given))))

    def pieces(self, x: Any) -> Any:
        """What a kernel takes, its tensors by their memory."""
        return self._by_piece(x, whole=False)

    def at(self, address: int) -> Any:
        """What begins at an address, as `pieces` makes it; None for what follows from constants, whose address stays."""
        begin = [x for x in self._pieces if x.numel() and x.data_ptr() == address]
        memory = {(self._same.get(piece.place, piece.place), piece.after) for piece in map(self._pieces.__getitem__, begin)}
        fixed = [x for x in self._fixed if x.numel() and x.data_ptr() == address]
        if (sources := len(memory) + bool(fixed)) != 1:  # from elsewhere, or one argument begins inside another
            self._known, self.overlapping = False, self.overlapping or sources > 1
            return None
        if fixed:
            self._held.append(fixed[0])
            return None
        return self.pieces(begin[0])

    def _new(self, x: Tensor) -> int:
        place = next(self._count)
        self._pieces[x] = Piece.of(x, place, 0, whole=True)
        return place

    def _by_piece(self, x: Any, *, whole: bool) -> Any:
        """The same with `Piece` in the place of tensors that are to be read as those (`whole`), or `Given`; constants as they are."""
        if isinstance(x, Tensor):
            return self._piece(x, whole=whole)
        if isinstance(x, dict):
            return {name: self._by_piece(y, whole=whole) for name, y in x.items()}
        if isinstance(x, (tuple, list)) and any(True for _ in _tensors(x)):
            kind = getattr(type(x), "_make", type(x))
            return kind([self._by_piece(y, whole=whole) for y in x])
        return x

    def _piece(self, x: Tensor, *, whole: bool) -> Any:
        piece = self._pieces.get(x)
        if piece is None:
            self._known &= x in self._fixed  # else it comes from elsewhere
            return x
        if whole:
            self._whole.add(piece.place)
            return piece
        if x.numel():
            self._aligned.setdefault(piece.place, (x.data_ptr() - piece.after) % ALIGNED)
        return Given(piece)


def _tensors(x: Any) -> Iterator[Tensor]:
    """Those in it, at any depth."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _tensors(y)
    elif isinstance(x, dict):
        yield from _tensors(tuple(x.values()))


def has_tensors(x: Any) -> bool:
    """Whether there are some in it, by their memory or themselves, at any depth."""
    return any(True for _ in itertools.chain(_places(x), _tensors(x)))


def _places(x: Any) -> Iterator[int]:
    """Of the pieces in it."""
    if isinstance(x, Piece):
        yield x.place
    elif isinstance(x, (tuple, list)):
        for y in x:
            yield from _places(y)
    elif isinstance(x, dict):
        yield from _places(tuple(x.values()))


def is_part(x: Any, whole: Any) -> bool:
    """Whether a tensor, or each of several, is memory of `whole` by other sizes and strides alone."""
    if isinstance(x, (tuple, list)):
        return all(is_part(y, whole) for y in x)
    same = isinstance(x, Tensor) and isinstance(whole, Tensor) and x is not whole and x.dtype == whole.dtype
    return same and x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


class Records:
    """The records of calls by key, and the machine that each was made for; False where a call can't be recorded.

    Copies and pickles begin empty.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: dict[Hashable, tuple[Any, Record | bool]] = {}  # the least recently used first
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self.limit,)

    def get(self, key: Hashable, machine: Any) -> Record | bool | None:
        with self._lock:
            found = self._kept.pop(key, None)
            if found is None or found[0] is not machine:
                return None
            self._kept[key] = found
        return found[1]

    def clear(self) -> None:
        """Forget all: what calls do depends on something else from now on."""
        with self._lock:
            self._kept.clear()

    def put(self, key: Hashable, machine: Any, record: Record | bool) -> None:
        with self._lock:
            self._kept[key] = machine, record
            while len(self._kept) > self.limit or (len(self._kept) > 1 and self._held() > HELD):
                del self._kept[next(iter(self._kept))]

    def _held(self) -> int:
        """Bytes of the records' constants, views of the same memory once."""
        constants = (x for _, record in self._kept.values() if isinstance(record, Record) for x in record.constants)
        return sum({memory.data_ptr(): memory.nbytes() for memory in (x.untyped_storage() for x in constants)}.values())
