"""A call of an operator as the list of what it put on the stream, and the same again without deciding anything anew.

Two calls whose arguments agree in types, sizes, strides, alignment and numbers (`key_of`) launch the same kernels with the same numbers,
on other memory. To find that out takes Python some hundred microseconds, more than the card takes for 4,096 tokens. So the first call is
recorded, torch's operators and our launches in their order, and later ones follow the record. A record holds no memory: places of tensors,
and numbers.

Triton compiles a kernel for types, for integers that are 1 or divisible by 16, and for pointers that are divisible by 16: the first two
follow from the key, and of every pointer it is asked again.
"""

import functools
import threading
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from dit_accel.kernels.triton import launch
from dit_accel.kernels.triton.launch import Launch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

LIMIT = 512  # records, some tens of kilobytes each; the least recently used are dropped
ALIGNED = 16  # bytes
STREAM = 0  # the place of the current stream among a record's values

EMPTY = (torch.ops.aten.new_empty.default, torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format)

Values = list[Any]
Step = Callable[[Values], None]


class MovedError(Exception):
    """Some memory is aligned otherwise than when the record was made: its kernels are not the ones for it."""


def key_of(name: str, arguments: Sequence[Any], *more: Hashable) -> tuple[Hashable, ...]:
    """What two calls have in common where the one's record serves the other."""
    found: list[Hashable] = [name, *more]
    first: dict[int, int] = {}  # a tensor that is two arguments is one to the record
    for number, x in enumerate(arguments):
        if isinstance(x, Tensor):
            found += (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % ALIGNED, first.setdefault(id(x), number))
        else:
            found.append(x)
    return tuple(found)


class Record(NamedTuple):
    """What a call did. `initial`: the values that it begins with, constants at their places; `inputs`: the places of its arguments that are
    tensors, by their number; `steps`, and the places that nothing reads after each; `result` makes what it returned."""

    initial: Values
    inputs: list[tuple[int, int]]
    steps: list[tuple[Step, tuple[int, ...]]]
    result: Callable[[Values], Any]

    def play(self, arguments: Sequence[Any]) -> Any:
        """Do the same with other arguments of the same key. Raises MovedError where memory is aligned otherwise; what was done until then
        changed new memory alone."""
        values = self.initial.copy()
        for number, place in self.inputs:
            values[place] = arguments[number]
        for step, unread in self.steps:
            step(values)
            for place in unread:
                values[place] = None
        return self.result(values)


class Recorder(TorchDispatchMode):
    """Inside, what torch's operators and `run` do is noted. `record` then gives it, or None where it depends on something unknown."""

    def __init__(self, arguments: Sequence[Any]) -> None:
        super().__init__()
        self._initial: Values = [None]  # the stream's place
        self._places = WeakTensorKeyDictionary()  # of the tensors that are alive: what is dead is no argument of what follows
        self._pointers = WeakTensorKeyDictionary()
        self._views = WeakTensorKeyDictionary()  # the places of what they are views of, and how many bytes after that they begin
        self._steps: list[tuple[Step, tuple[int, ...]]] = []  # with the places that each reads
        self._known, self._launching, self._on_stream = True, False, False
        self._inputs = [(number, self._new(x)) for number, x in enumerate(arguments) if isinstance(x, Tensor)]

    def record(self, result: Any) -> Record | None:
        make, read = self._maker(result)
        if not self._known:
            return None
        left = Counter(place for _, places in self._steps for place in places)
        kept = set(read)
        steps = []
        for step, places in self._steps:
            left.subtract(places)
            unread = {place for place in places if not left[place] and place not in kept and self._initial[place] is None}
            steps.append((step, tuple(unread)))
        return Record(self._initial, self._inputs, steps, make)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._launching:  # what the interpreter does for a launch, it does again
            return function(*args, **kwargs)
        if function in EMPTY:
            return self._allocated(function(*args, **kwargs))
        result = function(*args, **kwargs)
        if function.is_view and is_part(result, args[0]):
            return self._viewed(args[0], result)
        made, of_args = self._maker(tuple(args))
        made_names, of_names = self._maker(dict(kwargs))
        outputs = list(result) if isinstance(result, (tuple, list)) else [result]
        places = [(n, self._new(x)) for n, x in enumerate(outputs) if isinstance(x, Tensor) and x not in self._places]
        single = not isinstance(result, (tuple, list))

        def step(values: Values) -> None:
            found = function(*made(values), **made_names(values))
            for number, place in places:
                values[place] = found if single else found[number]

        self._steps.append((step, (*of_args, *of_names, *(place for _, place in places))))
        return result

    def _allocated(self, x: Tensor) -> Tensor:
        """Note new memory: of its size in every call of the key, and made in a third of the time of the operator that did."""
        size, stride, dtype, device, place = x.shape, x.stride(), x.dtype, x.device, self._new(x)

        def step(values: Values) -> None:
            values[place] = torch.empty_strided(size, stride, dtype=dtype, device=device)

        self._steps.append((step, (place,)))
        return x

    def _viewed(self, of: Tensor, result: Any) -> Any:
        """Note views of a tensor, which later calls make only where more than their addresses is asked for."""
        place, after = self._source(of)
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self._views[x] = place, after + (x.storage_offset() - of.storage_offset()) * x.element_size()
        return result

    def _source(self, x: Tensor) -> tuple[int, int]:
        """The place of a tensor, or of the one that it is a view of, and how many bytes after that it begins."""
        found: tuple[int, int] | None = self._views.get(x)
        return (self._place(x), 0) if found is None else found

    def _made(self, x: Tensor, of: int, after: int) -> int:
        """The place of a view, which is made."""
        size, stride, offset, place = x.shape, x.stride(), after // x.element_size(), self._new(x)

        def step(values: Values) -> None:
            values[place] = values[of].as_strided(size, stride, values[of].storage_offset() + offset)

        self._steps.append((step, (of, place)))
        return place

    def run(self, one: Launch) -> None:
        """Launch, and note it."""
        self._launching = True
        try:
            compiled = launch.execute(one)
        finally:
            self._launching = False
        if isinstance(compiled, CompiledKernel):
            self._note_compiled(compiled, one)
        else:  # interpreted
            made, read = self._maker(one.arguments)
            self._steps.append((lambda values: launch.execute(one._replace(arguments=made(values))), read))

    def _note_compiled(self, compiled: Any, one: Launch) -> None:
        if not self._on_stream:
            self._on_stream = True
            self._steps.append((_read_stream, ()))
        grid = (*one.grid, 1, 1)[:3]
        given, read = self._flat(tuple(one.arguments[name] for name in one.kernel.arg_names))
        run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

        def step(values: Values) -> None:
            run(*grid, values[STREAM], function, packed, None, None, None, *given(values))

        self._steps.append((step, read))

    def _new(self, x: Tensor) -> int:
        self._initial.append(None)
        self._places[x] = len(self._initial) - 1
        return len(self._initial) - 1

    def _place(self, x: Tensor) -> int:
        """Where a tensor is among the values; one that comes from elsewhere makes the record useless."""
        place = self._places.get(x)
        if place is None and x in self._views:
            return self._made(x, *self._views[x])
        if place is None:
            self._known, place = False, STREAM
        return place

    def _constant(self, x: Any) -> int:
        self._initial.append(x)
        return len(self._initial) - 1

    def _pointer(self, x: Tensor, new: list[tuple[int, int, int, int]]) -> int:
        """The place of a tensor's address, which is read once: where it was not before, `new` gets what is to be read."""
        place = self._pointers.get(x)
        if place is None:
            place = self._pointers[x] = self._constant(None if x.numel() else 0)
            if x.numel():
                new.append((*self._source(x), x.data_ptr() % ALIGNED, place))
        return place

    def _maker(self, x: Any) -> tuple[Callable[[Values], Any], tuple[int, ...]]:
        """What makes the same of other tensors, and the places that it reads."""
        if isinstance(x, Tensor):
            place = self._place(x)
            return itemgetter(place), (place,)
        if isinstance(x, (tuple, list, dict)) and has_tensors(x):
            makers, places = zip(*(self._maker(y) for y in (x.values() if isinstance(x, dict) else x)), strict=True)
            read = tuple(place for some in places for place in some)
            kind = functools.partial(_dictionary, tuple(x)) if isinstance(x, dict) else getattr(type(x), "_make", type(x))
            return lambda values: kind([make(values) for make in makers]), read
        return lambda values: x, ()

    def _flat(self, x: tuple[Any, ...]) -> tuple[Callable[[Values], tuple[Any, ...]], tuple[int, ...]]:
        """What makes the arguments of a compiled kernel, addresses in the place of tensors: tuple by tuple, the inner ones first."""
        inner: list[tuple[Callable[[Values], Any], int]] = []
        read: list[int] = []
        new: list[tuple[int, int, int, int]] = []
        whole = self._tuple(x, inner, read, new)

        def make(values: Values) -> tuple[Any, ...]:
            for of, after, rest, place in new:
                pointer = values[of].data_ptr() + after
                if pointer % ALIGNED != rest:
                    raise MovedError
                values[place] = pointer
            for get, place in inner:
                values[place] = get(values)
            return whole(values)

        return make, tuple(read)

    def _tuple(
        self, x: tuple[Any, ...], inner: list[tuple[Callable[[Values], Any], int]], read: list[int], new: list[tuple[int, int, int, int]]
    ) -> Callable[[Values], Any]:
        places = []
        for y in x:
            if isinstance(y, Tensor):
                places.append(self._pointer(y, new))
                read.append(self._source(y)[0])
            elif isinstance(y, tuple) and has_tensors(y):
                get = self._tuple(y, inner, read, new)
                places.append(self._constant(None))
                inner.append((get, places[-1]))
            else:
                places.append(self._constant(y))
        return itemgetter(*places) if len(places) > 1 else lambda values: (values[places[0]],)


def _read_stream(values: Values) -> None:
    values[STREAM] = driver.active.get_current_stream(driver.active.get_current_device())


def is_part(x: Any, whole: Any) -> bool:
    """Whether a tensor, or each of several, is memory of `whole` by other sizes and strides alone."""
    if isinstance(x, (tuple, list)):
        return all(is_part(y, whole) for y in x)
    same = isinstance(x, Tensor) and isinstance(whole, Tensor) and x is not whole and x.dtype == whole.dtype
    return same and x.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


def _dictionary(names: tuple[str, ...], values: list[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


def has_tensors(x: Any) -> bool:
    """Whether there are some in it, at any depth."""
    return isinstance(x, Tensor) or (isinstance(x, (tuple, list)) and any(map(has_tensors, x))) or (
        isinstance(x, dict) and any(map(has_tensors, x.values()))
    )  # fmt: skip


def possible(device: torch.device) -> bool:
    """Whether calls on a device are recorded: NVIDIA's, unless a profiler follows Triton's launches."""
    return device.type == "cuda" and torch.version.hip is None and not hooked()


def hooked() -> bool:
    """Whether a hook is called at each of Triton's launches."""
    return any(getattr(hook, "calls", hook) for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook))


class Records:
    """The records of calls by key, and the machine that each was made for."""

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._kept: dict[Hashable, tuple[Any, Record]] = {}  # the least recently used first
        self._lock = threading.Lock()

    def get(self, key: Hashable, machine: Any) -> Record | None:
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

    def put(self, key: Hashable, machine: Any, record: Record) -> None:
        with self._lock:
            self._kept[key] = machine, record
            while len(self._kept) > self.limit:
                del self._kept[next(iter(self._kept))]
