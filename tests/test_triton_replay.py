"""A call that is put on the stream again from its record: the same results on other memory, and never a kernel that is not for it."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Shape, random_parameters
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels import replay as records
from dit_accel.kernels.memory import CUT, arranged
from dit_accel.kernels.replay import Record, Recorder, Records, key_of
from dit_accel.kernels.triton import calls, replay
from dit_accel.method import AttentionSpec, Pooled
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.plans import RECENT

SHAPE = Shape(1, 1, 16, (1, 6, 8), 3)
SPECS: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.3, tile=(4, 4)), "fovea-1": Fovea(0.3, tile=(4, 4), order=1, parts=2),
    "fovea-groups": replace(Fovea(0.1, tile=(4, 4), order=1), rest=Pooled(parts=4, order=1, opened=1)), "sla": SLA(0.3, block=(16, 16)),
    "clear": CLEAR(2),
}  # fmt: skip


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """Calls on the CPU are recorded as those on a card are; their records, at each time that one is played."""
    found: list[Record] = []
    get = Records.get

    def noted(kept: Records, key: Any, machine: Any) -> Any:
        record = get(kept, key, machine)
        return noting(record, found) if isinstance(record, Record) else record

    monkeypatch.setattr(replay, "possible", lambda device: True)
    monkeypatch.setattr(calls, "_records", Records())
    monkeypatch.setattr(Records, "get", noted)
    RECENT.clear()
    return found


def noting(record: Record, found: list[Record]) -> Record:
    """The record, which is added to those found when it is played."""
    return record._replace(play=lambda arguments: (found.append(record), record.play(arguments))[1])


def compute(name: str, seed: int) -> list[Tensor]:
    """Output, lse and all gradients."""
    spec, shape = SPECS[name], replace(SHAPE, grid=(1, 12, 16)) if name == "fovea-groups" else SHAPE
    torch.manual_seed(seed)
    qkv = [torch.randn(shape.batch, shape.heads, shape.layout.tokens, shape.head_dim).requires_grad_() for _ in range(3)]
    params = random_parameters(spec, shape).requires_grad_()
    bias = torch.randn(shape.batch, shape.text) if name == "clear" else None
    out, lse = attention(*qkv, spec, shape.layout, params=params, text_bias=bias, backend="triton", return_lse=True)
    grads = torch.autograd.grad((out * torch.randn_like(out)).sum() + lse.sin().sum(), [*qkv, *params.parameters()])
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.parametrize("name", SPECS)
def test_a_record_gives_what_the_call_itself_gives(name: str, plays: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    compute(name, 0)
    assert plays == []
    got = compute(name, 1)
    assert len(plays) >= 2  # forward and backward
    assert len(calls._records._kept) == len(plays)  # none was made anew
    monkeypatch.setattr(replay, "possible", lambda device: False)
    expected = compute(name, 1)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def forward(name: str, seed: int, *, text: int = SHAPE.text, biased: bool = False) -> list[Tensor]:
    """Output and lse of a call without gradients."""
    spec, shape = SPECS[name], replace(SHAPE, text=text, grid=(1, 12, 16) if name == "fovea-groups" else SHAPE.grid)
    torch.manual_seed(seed)
    qkv = [torch.randn(shape.batch, shape.heads, shape.layout.tokens, shape.head_dim) for _ in range(3)]
    params, bias = random_parameters(spec, shape), torch.randn(shape.batch, shape.text) if biased else None
    with torch.no_grad():
        return list(attention(*qkv, spec, shape.layout, params=params, text_bias=bias, backend="triton", return_lse=True))


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", SPECS)
def test_one_record_serves_a_whole_call_without_gradients(
    name: str, biased: bool, plays: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two sizes in turns, other numbers and other learned parameters each time."""
    calls_made = [(seed, text) for seed in (1, 2) for text in (SHAPE.text, 5)]
    for text in (SHAPE.text, 5):
        forward(name, 0, text=text, biased=biased)
    assert plays == []
    assert calls._records._kept == {}
    got = [forward(name, seed, text=text, biased=biased) for seed, text in calls_made]
    assert len(plays) == len(got)
    assert plays[0] is plays[2] is not plays[1] is plays[3]
    monkeypatch.setattr(replay, "possible", lambda device: False)
    for found, (seed, text) in zip(got, calls_made, strict=True):
        expected = forward(name, seed, text=text, biased=biased)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", SPECS)
def test_what_kernels_write_for_each_other_is_one_allocation(name: str, plays: list[Record]) -> None:
    """In addition to output and lse, and to what torch's operators read."""
    for seed in (0, 1):
        forward(name, seed)
    source = plays[0].source
    read_by_torch = {"fovea-1": 7, "fovea-groups": 3}
    assert source.count("empty_strided(") == 2 + ("w = " in source) + read_by_torch.get(name, 0)
    assert (name in read_by_torch) == bool(operators_of(plays[0]))


def operators_of(record: Record) -> list[Any]:
    """Torch's operators that a record calls."""
    return [x for x in record.play.__globals__.values() if isinstance(x, torch._ops.OpOverload)]


def test_a_gradient_a_watcher_and_a_change_of_what_is_allowed_end_a_whole_record(
    plays: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward("clear", 0)
    x = torch.randn(1, 1, SHAPE.layout.tokens, 16, requires_grad=True)
    attention(x, x, x, SPECS["clear"], SHAPE.layout, backend="triton").sum().backward()
    assert x.grad is not None
    assert plays == []
    monkeypatch.setattr(calls.launch, "tf32_allowed", lambda: True)
    forward("clear", 0)
    assert plays == []
    monkeypatch.setattr(replay, "possible", lambda device: False)  # a profiler follows launches
    forward("clear", 0)
    assert plays == []


def test_an_exception_leaves_no_record_and_no_mode(plays: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    attend = calls.launch.attend

    def fails(*_: Any) -> Any:
        raise RuntimeError("no")

    monkeypatch.setattr(calls.launch, "attend", fails)
    with pytest.raises(RuntimeError, match="no"):
        forward("clear", 0)
    assert ops._one.get() is False
    monkeypatch.setattr(calls.launch, "attend", attend)
    first, second = (forward("clear", 0) for _ in range(2))
    assert len(plays) == 1
    assert torch.equal(first[0], second[0])


def test_pieces_in_use_at_once_do_not_overlap_and_others_share_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        first, length, size = (torch.randint(0, most, (12,), generator=generator) for most in (20, 6, 3000))
        spaces = [(int(a), int(a + b), int(c) + 1) for a, b, c in zip(first, length, size, strict=True)]
        total, begins = arranged(spaces)
        for n, (a, b) in enumerate(zip(spaces, begins, strict=True)):
            assert b % CUT == 0
            assert b + a[2] <= total
            for other, begin in zip(spaces[:n], begins, strict=False):
                if a[0] <= other[1] and other[0] <= a[1]:
                    assert b + a[2] <= begin or begin + other[2] <= b
    assert arranged([(0, 1, 300), (2, 3, 200), (4, 4, 100)]) == (300, [0, 0, 0])
    assert arranged([(0, 2, 300), (1, 3, 200), (3, 4, 100)]) == (584, [0, 384, 0])


def test_a_record_holds_no_memory_and_frees_what_nothing_reads_any_more() -> None:
    x = torch.zeros(4)
    with Recorder([x]) as recorder:
        result = ((x + 1) * 2 - 3).add_(1)
    record = recorder.record(result)
    assert record is not None
    assert record.constants == ()
    assert not any(isinstance(value, Tensor) for value in record.play.__globals__.values())
    assert torch.equal(record.play([torch.ones(4)]), torch.full((4,), 2.0))
    assert record.source.count("del x") == 2  # of three new tensors the last is returned


def test_what_follows_from_constants_is_calculated_once() -> None:
    x, constant = torch.zeros(4), torch.arange(4)
    with Recorder([x], [constant]) as recorder:
        result = x + (constant * 2 + torch.arange(4))[None, 1:].sum()
        assert bool((constant >= 0).all())
    record = recorder.record(result)
    assert record is not None
    assert len(record.constants) == 1
    assert torch.equal(record.play([torch.ones(4)]), torch.full((4,), 19.0))


def test_what_python_goes_on_with_and_a_constant_that_is_written_to_have_no_record() -> None:
    x, constant = torch.ones(4), torch.arange(4.0)
    with Recorder([x], [constant]) as recorder:
        result = x * float(x.sum())
    assert recorder.record(result) is None
    with Recorder([x], [constant]) as recorder:
        result = x * constant.add_(1)
    assert recorder.record(result) is None
    with Recorder([x], [constant]) as recorder:
        result = x[x > 0]  # whose size is not that of another call
    assert recorder.record(result) is None


def test_views_are_made_only_where_they_are_read() -> None:
    """Of a view that only kernels read no more than the address is made, of another the view itself; of inputs that begin elsewhere too."""
    x = torch.arange(64.0)
    seen: list[int] = []
    with Recorder([x]) as recorder:
        parts = x[16:48].view(2, 16).unbind(0)
        given = recorder.pieces((parts[1], 3))
        recorder.kernel(lambda writer: iter([f"{writer.constant(seen.append)}({writer.value(given[0], writer.address)})"]), given)
        result = parts[0] + 1, x[:0]
    record = recorder.record(result)
    assert record is not None
    assert record.source.count("as_strided") == 2  # of what is read and of what is returned
    memory = torch.arange(80.0)
    for y in (x, memory[16:]):
        found = record.play([y])
        assert seen.pop() == y.data_ptr() + 32 * 4
        assert torch.equal(found[0], y[16:32] + 1)
        assert found[1].shape == (0,)


@pytest.mark.parametrize(
    "other",
    [replace(SHAPE, text=4), replace(SHAPE, heads=2), replace(SHAPE, head_dim=24)],
    ids=["text", "heads", "head-dim"],
)
def test_other_sizes_have_a_record_of_their_own(other: Shape, plays: list[Any]) -> None:
    for shape in (SHAPE, other):
        q, k, v = (x.requires_grad_() for x in shape.inputs())
        attention(q, k, v, SPECS["clear"], shape.layout, backend="triton")
        with torch.no_grad():
            attention(q, k, v, SPECS["clear"], shape.layout, backend="triton")
    assert plays == []
    assert len(calls._records._kept) == 2


def key(*arguments: Any) -> Any:
    return key_of("attend", arguments, False)


def test_the_key_tells_apart_all_that_a_kernel_is_compiled_for() -> None:
    memory = torch.zeros(65)
    x = memory[:64]
    same = key(torch.zeros(64), 1.0, None)
    assert key(x, 1.0, None) == same
    others = [
        key(memory[1:], 1.0, None), key(memory[::2][:32], 1.0, None), key(x.view(8, 8), 1.0, None), key(x.to(torch.bfloat16), 1.0, None),
        key(x, 2.0, None), key(x, 1.0, torch.zeros(64)), key(x.to("meta"), 1.0, None),
    ]  # fmt: skip
    assert same not in others
    assert len(set(others)) == len(others)


def test_one_tensor_as_two_arguments_is_no_record_for_two() -> None:
    y, z = torch.zeros(64), torch.zeros(64)
    assert key(y, y, z) != key(y, z, z) != key(y, z, y)
    assert key(y, y, z) == key(z, z, y)


def test_memory_that_is_aligned_otherwise_is_refused_by_the_record() -> None:
    """Also where the key does not say so: what a kernel is compiled for is asked of every pointer."""
    x = torch.zeros(64)
    with Recorder([x]) as recorder:
        given = recorder.pieces((x,))
        recorder.kernel(lambda writer: iter([writer.value(given[0], writer.address)]), given)
        y = x + 1
    record = recorder.record(y)
    assert record is not None
    assert torch.equal(record.play([torch.full((64,), 2.0)]), torch.full((64,), 3.0))
    with pytest.raises(records.MovedError):
        record.play([torch.zeros(65)[1:]])


def test_a_call_that_reads_a_tensor_from_elsewhere_has_no_record() -> None:
    x, elsewhere = torch.zeros(4), torch.ones(4)
    with Recorder([x]) as recorder:
        y = x + elsewhere
    assert recorder.record(y) is None


def test_the_least_recently_used_records_are_dropped() -> None:
    kept, machine = Records(2), object()
    for name in "ab":
        kept.put(name, machine, name)  # type: ignore[arg-type]
    assert kept.get("a", machine) == "a"
    kept.put("c", machine, "c")  # type: ignore[arg-type]
    assert [kept.get(name, machine) for name in "abc"] == ["a", None, "c"]
    assert kept.get("a", object()) is None  # tiles of another machine


COMPILED = """
import itertools
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import calls, replay
from dit_accel.kernels.triton.tables import Machine

launched, numbers = [], itertools.count()

class Launcher:
    def __init__(self, source, metadata):
        pass
    def __call__(self, *arguments):
        launched.append(arguments)

class Driver:
    launcher_cls = Launcher
    class utils:
        load_binary = staticmethod(lambda name, binary, shared, device: (1, next(numbers), 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 7)

def flat(x):
    if isinstance(x, tuple):
        return [z for y in x for z in flat(y)]
    return [("memory", x.data_ptr() % 16, x.data_ptr()) if isinstance(x, torch.Tensor) else getattr(x, "value", x)]

machine = Machine("sm_90", 132)
calls.machine_of = lambda device: machine
starts = torch.tensor([0, 32, 64], dtype=torch.int32)
driver.set_active(Driver())

def launches(offset, stride, recorded):
    replay.possible = lambda device: recorded
    launched.clear()
    memory = [torch.zeros(2 * 64 * stride + offset, dtype=torch.bfloat16)[offset:] for _ in range(2)]
    rows = [x.view(1, 2, 64, stride)[..., :16] for x in memory]
    calls.select_blocks(SelectionArguments(*rows, q_starts=starts, k_starts=starts, q_width=32, k_width=32, top=1))
    return [list(one) for one in launched], [x.data_ptr() for x in rows]

variants = set()
for offset, stride in ((0, 16), (4, 16), (0, 20)):
    own, _ = launches(offset, stride, False)
    launches(offset, stride, True)
    again, pointers = launches(offset, stride, True)
    assert len(calls._records._kept) == len(variants) + 1, calls._records._kept.keys()
    assert len(own) == len(again) == 2
    for a, b in zip(own, again):
        assert a[:6] == b[:6]  # grid, stream, kernel and its warps
        given, replayed = flat(tuple(a[9:])), flat(tuple(b[9:]))
        assert len(given) == len(replayed)
        for x, y in zip(given, replayed):
            assert (type(y) is int and y % 16 == x[1]) if isinstance(x, tuple) else x == y, (x, y)
    assert [rows[0] for rows in again[0][9:11]] == pointers  # the tokens whose means are taken
    variants.add(tuple(one[4] for one in again))
print(len(variants), len({kernels[0] for kernels in variants}))
"""


def test_a_record_launches_what_triton_would() -> None:
    """The same kernels and numbers; others for memory that is not aligned and strides that are not divisible by 16.

    In a process of its own: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1:] == ["3 3"], done.stdout + done.stderr
