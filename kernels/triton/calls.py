"""The Triton kernels on tensors: float32, bfloat16 or float16, parameters and their gradients float32."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

import triton
from dit_accel.errors import BackendError
from dit_accel.kernels import capture
from dit_accel.kernels.arguments import (
    Arguments,
    MixtureArguments,
    Summaries,
    SummaryArguments,
    check,
    check_mixture,
    check_summary,
    dense,
    in_order,
)
from dit_accel.kernels.choosing import Chosen, SelectionArguments, check_selection
from dit_accel.kernels.grouping import GroupingArguments, Units, check_grouping
from dit_accel.kernels.precision import get_query_key_products
from dit_accel.kernels.replay import MovedError, Record, Records, key_of
from dit_accel.kernels.triton import (
    driver,
    fallback,
    launch,
    launch_backward,
    launch_choice,
    launch_parts,
    launch_units,
    replay,
    tuned,
    units_gradients,
)
from dit_accel.kernels.triton.launch import Launch, Run
from dit_accel.kernels.triton.tables import Machine
from triton.runtime.errors import OutOfResources

T = TypeVar("T")

NOT_FITTING = "a GPU kernel that holds whole blocks needs more of the GPU than there is"
MOST_HEADS = 65534  # one less than a grid has along its second and third axis (CUDA C++ programming guide): a projection takes one too
INTERPRETED = Machine("sm_90", 4)  # few units, so that short reductions are split as long ones are on a device


class Redirected(NamedTuple):
    """The machine whose tiles are taken, what is done with a launch, whether that runs it, and whether it is the device's own."""

    machine: Machine
    run: Run
    runs: bool
    own: bool = False


_redirected: ContextVar[Redirected | None] = ContextVar("redirected", default=None)


@contextlib.contextmanager
def redirected(machine: Machine, run: Run, *, runs: bool = True, own: bool = False) -> Iterator[None]:
    """Inside, this thread's launches have the tiles of `machine` and go to `run`."""
    token = _redirected.set(Redirected(machine, run, runs, own))
    try:
        yield
    finally:
        _redirected.reset(token)


@contextlib.contextmanager
def recorded(machine: Machine) -> Iterator[list[Launch]]:
    """Collect what would be launched on `machine`, on tensors of any device, and run nothing: results hold whatever memory held."""
    found: list[Launch] = []
    with redirected(machine, found.append, runs=False):
        yield found


@functools.cache
def machine_of(device: torch.device) -> Machine:
    """The architecture whose tiles suit a device, its number of multiprocessors, and the tiles that were timed on it."""
    if device.type == "cpu":
        return INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    timed = tuned.tiles_of(gpu_of(device))
    if torch.version.hip:
        return Machine("gfx942", properties.multi_processor_count, timed)
    # 8.6 and 8.9 are consumer chips: tensor cores as on 8.0, shared memory as on 12.0
    exact = {(8, 0): "sm_80", (8, 7): "sm_80", (9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}
    return Machine(exact.get((properties.major, properties.minor), "sm_120"), properties.multi_processor_count, timed)


def gpu_of(device: torch.device) -> tuned.Gpu:
    """What tiles timed on a device are kept under."""
    properties = torch.cuda.get_device_properties(device)
    capability = properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}"
    return tuned.Gpu(properties.name, capability, driver.version(), triton.__version__, tuned.source_hash())


_fitting: dict[torch.device, Machine] = {}  # in place of `machine_of`: with smaller tiles for the kernels that did not fit the device
_warned: set[tuple[torch.device, fallback.Key]] = set()  # of which a user was warned


_records = Records()


def together(
    records: Records, about: Hashable, tensors: Sequence[Tensor | None], constants: Callable[[], Sequence[Tensor]],
    function: Callable[[], T],
) -> T:  # fmt: skip
    """What a function gives that calls several operators on `tensors` and `constants`, no gradient being recorded: recorded as one, in
    `records`, which live as long as the constants. `about`: what else it depends on."""
    x = tensors[0]
    if x is None or _redirected.get() is not None or not replay.possible(x.device):
        return function()
    switches = launch.tf32_allowed(), get_query_key_products()
    machine, key = _fitting.get(x.device) or machine_of(x.device), key_of("together", tensors, about, switches)
    record = records.get(key, machine)
    if isinstance(record, Record):
        if record.constants:
            capture.keep(x.device, record.constants)  # the plan may drop the record
            record.readers.join()
        with contextlib.suppress(MovedError), torch.cuda.device_of(x):
            return record.play(tensors)
    if record is not None or capture.capturing(x.device):
        return function()

    def anew(machine: Machine) -> T:
        with replay.Recorder(tensors, constants()) as recorder, redirected(machine, recorder.run, own=True):
            result = function()
        record = recorder.record(result)
        if record is not None and record.constants and x.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # later calls read them on other streams
        records.put(key, machine, record or False)
        return result

    with torch.cuda.device_of(x):
        return _fitted(x.device, anew)


def _run(name: str, x: Tensor, arguments: Sequence[Any], signature: Callable[[], Hashable], function: Callable[[Machine, Run], T]) -> T:
    """Launch on the device of `x`, or where a redirection says. What was launched for `arguments` of the same sizes is launched again
    without asking `function`, which depends on nothing else.

    `signature`: what decides which kernels are compiled and loaded. Raises BackendError where that would be inside a CUDA graph's capture,
    where no tile fits, and of more heads than a grid has programs.
    """
    elsewhere, device = _redirected.get(), x.device
    if x.shape[0] * x.shape[1] > MOST_HEADS:
        raise BackendError(
            f"the GPU kernels take at most {MOST_HEADS:,} heads of all samples together, not {x.shape[0]:,} times {x.shape[1]:,}: cut the "
            "batch, or use backend='reference'"
        )
    tf32 = x.dtype == torch.float32 and launch.tf32_allowed()
    if elsewhere is not None:
        result = function(elsewhere.machine, elsewhere.run)
        if elsewhere.own:
            capture.ran((device, tf32, signature()))
        return result
    key, machine = None, _fitting.get(device) or machine_of(device)
    if replay.possible(device):
        key = key_of(name, arguments, tf32, torch.is_autocast_enabled("cuda"))
        record = _records.get(key, machine)
        if isinstance(record, Record):
            with contextlib.suppress(MovedError):
                return record.play(arguments)
    call = device, tf32, signature()
    captured = capture.check(device, call)
    if key is None or captured:
        result = _fitted(device, lambda machine: function(machine, launch.execute))
    else:
        result = _fitted(device, lambda machine: _recorded(key, machine, arguments, function))
    if not captured:
        capture.ran(call)
    return result


def _recorded(key: Hashable, machine: Machine, arguments: Sequence[Any], function: Callable[[Machine, Run], T]) -> T:
    with replay.Recorder(arguments) as recorder:
        result = function(machine, recorder.run)
    if record := recorder.record(result):
        _records.put(key, machine, record)
    return result


def _fitted(device: torch.device, function: Callable[[Machine], T]) -> T:
    """What the function makes with the device's tiles. Its launches write to new memory alone, so that all of them are put on the stream
    again where a tile is too large for the device, with the next smaller one."""
    refusals: dict[fallback.Key, fallback.TooLargeError] = {}
    while True:
        machine = _fitting.get(device) or machine_of(device)
        try:
            result = function(machine)
        except fallback.TooLargeError as error:
            refusals.setdefault(error.place.key, error)
            _fitting[device] = fallback.lowered(machine, error)
        except OutOfResources as error:  # of a kernel that holds whole blocks and has no smaller tile
            raise BackendError(f"{NOT_FITTING}: {error}; use backend='reference' for this head dimension and dtype") from error
        else:
            break
    for key, refused in refusals.items():
        _warn(device, key, refused)
    return result


def _warn(device: torch.device, key: fallback.Key, refused: fallback.TooLargeError) -> None:
    """Warn, once for each kernel and device."""
    if (device, key) not in _warned:
        _warned.add((device, key))
        warnings.warn(
            f"{refused}: on {device} it runs with a smaller tile from now on. `dit-accel bench kernels --tune` finds the fastest that fits",
            stacklevel=2,
        )


def _signature(name: str, a: Arguments) -> Hashable:
    """What decides which kernels a call loads. Made at every call, so no more than what all else follows from: type, sizes, strides."""
    windows = 0 if a.windows is None else len(a.windows)
    settings = tuple(isinstance(x, Tensor) or x for x in a if not isinstance(x, float))  # numbers, and which tensors there are
    sizes = (a.q.shape, a.k.shape, a.q.stride(), a.k.stride(), a.v.stride(), a.lists.shape, len(a.k_starts), windows)
    return (name, a.q.dtype, *sizes, *settings)


def attend(a: Arguments) -> tuple[Tensor, Tensor]:
    """Output (q's dtype and layout) and lse `[B, H, N]`."""
    with torch.cuda.device_of(a.q):
        return _run("attend", a.q, a, lambda: _signature("attend", a), lambda machine, run: launch.attend(_dense(a), machine, run))


def gradients(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, a: Arguments) -> list[Tensor]:
    """Gradients of the differentiable arguments; absent ones are empty."""

    def function(machine: Machine, run: Run) -> list[Tensor]:
        given, of_lse = _dense(a), None if dlse is None else dlse.contiguous()
        found = launch_backward.gradients(dense(dout), of_lse, dense(out), lse, given, machine, run)
        return in_order(found._asdict(), given)

    def signature() -> Hashable:
        return _signature("gradients", a), dout.stride(), dlse is None

    with torch.cuda.device_of(a.q):
        return _run("gradients", a.q, (dout, dlse, out, lse, *a), signature, function)


def select_blocks(a: SelectionArguments) -> Chosen:
    """The `top` best key blocks of each query block, ascending."""

    def signature() -> Hashable:
        blocks = len(a.q_starts), len(a.k_starts)
        sizes = [None if x is None else (x.shape, x.stride()) for x in (a.q, a.k, a.v)]
        given = (x is None for x in (a.weight, a.bias, a.projection))
        return "select_blocks", a.q.dtype, *sizes, *blocks, *given, a.top, a.pooled, a.states, a.feature_map

    def function(machine: Machine, run: Run) -> Chosen:
        check_selection(a)
        given = a._replace(q=dense(a.q), k=dense(a.k), v=None if a.v is None else dense(a.v))
        return launch_choice.select_blocks(given, machine, run)

    with torch.cuda.device_of(a.q):
        chosen = _run("select_blocks", a.q, a, signature, function)
    elsewhere = _redirected.get()
    if elsewhere is not None and not elsewhere.runs:  # lists must name blocks that there are
        chosen.lists.zero_()
        chosen.counts.fill_(a.top)
    return chosen


def summarize_blocks(a: SummaryArguments) -> Summaries:
    """Means, scores, pooled keys and slopes of blocks."""

    def signature() -> Hashable:
        settings = tuple(isinstance(x, Tensor) or x for x in a if not isinstance(x, float))
        sizes = (y for x in (a.q, a.k, a.v) for y in (x.shape, x.stride()))
        return "summarize_blocks", a.k.dtype, *sizes, len(a.k_starts), *settings

    def function(machine: Machine, run: Run) -> Summaries:
        check_summary(a)
        return launch_parts.summarize(a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v)), machine, run)

    with torch.cuda.device_of(a.k):
        return _run("summarize_blocks", a.k, a, signature, function)


def gradients_of_summaries(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: SummaryArguments) -> list[Tensor]:
    """Gradients of q, k and v, in their dtypes, from those of the results, as far as something depends on them."""

    def function(machine: Machine, run: Run) -> list[Tensor]:
        given = a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v))
        return launch_parts.gradients_of_summaries(grads, results, given, machine, run)

    def signature() -> Hashable:
        settings = tuple(isinstance(x, Tensor) or x for x in a if not isinstance(x, float))
        sizes = (y for x in (a.q, a.k, a.v) for y in (x.shape, x.stride()))
        return "gradients_of_summaries", a.k.dtype, *sizes, len(a.k_starts), *settings, *(x is None for x in grads.values())

    with torch.cuda.device_of(a.k):
        return _run("gradients_of_summaries", a.k, (*grads.values(), *results.values(), *a), signature, function)


def mix_slopes(a: MixtureArguments) -> Tensor:
    """The mixtures `[B, H, n, D, D]`."""

    def function(machine: Machine, run: Run) -> Tensor:
        check_mixture(a)
        return launch_parts.mix_slopes(a, machine, run)

    def signature() -> Hashable:
        return "mix_slopes", a.weight.shape, a.slope.shape, a.narrow

    with torch.cuda.device_of(a.slope):
        return _run("mix_slopes", a.slope, a, signature, function)


def gradients_of_mixture(dout: Tensor, a: MixtureArguments) -> list[Tensor]:
    """Gradients of weight and slope."""

    def function(machine: Machine, run: Run) -> list[Tensor]:
        return launch_parts.gradients_of_mixture(dout, a, machine, run)

    def signature() -> Hashable:
        return "gradients_of_mixture", a.weight.shape, a.slope.shape, a.narrow

    with torch.cuda.device_of(a.slope):
        return _run("gradients_of_mixture", a.slope, (dout, *a), signature, function)


def group_units(a: GroupingArguments) -> Units:
    """Pooled keys of groups, what query blocks see of them, and slopes."""

    def function(machine: Machine, run: Run) -> Units:
        check_grouping(a)
        return launch_units.group_units(a, machine, run)

    def signature() -> Hashable:
        settings = tuple(x.shape if isinstance(x, Tensor) else x for x in a if not isinstance(x, float))
        return "group_units", *settings

    with torch.cuda.device_of(a.q_mean):
        found = _run("group_units", a.q_mean, a, signature, function)
    elsewhere = _redirected.get()
    if elsewhere is not None and not elsewhere.runs:  # lists must name units that there are
        found.pool_lists.zero_()
        found.pool_counts.zero_()
    return found


def gradients_of_units(grads: Mapping[str, Tensor | None], results: Mapping[str, Tensor], a: GroupingArguments) -> list[Tensor]:
    """Gradients of DIFFERENTIABLE_GROUPING; of no elements where the argument is absent."""

    def function(machine: Machine, run: Run) -> list[Tensor]:
        return units_gradients.gradients_of_units(grads, results, a, machine, run)

    def signature() -> Hashable:
        settings = tuple(x.shape if isinstance(x, Tensor) else x for x in a if not isinstance(x, float))
        return "gradients_of_units", *settings, *(x is None for x in grads.values())

    with torch.cuda.device_of(a.q_mean):
        return _run("gradients_of_units", a.q_mean, (*grads.values(), *results.values(), *a), signature, function)


def _dense(a: Arguments) -> Arguments:
    """With channels contiguous. Raises ValueError at arguments that do not fit each other."""
    check(a)
    return a._replace(q=dense(a.q), k=dense(a.k), v=dense(a.v))
