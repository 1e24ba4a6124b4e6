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

from dit_accel.kernels.triton import calls, replay
from dit_accel.method import AttentionSpec, Pooled
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.attention import attention

SHAPE = Shape(1, 1, 16, (1, 6, 8), 3)
SPECS: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.3, tile=(4, 4)), "fovea-1": Fovea(0.3, tile=(4, 4), order=1, parts=2),
    "fovea-groups": replace(Fovea(0.1, tile=(4, 4), order=1), rest=Pooled(parts=4, order=1, opened=1)), "sla": SLA(0.3, block=(16, 16)),
    "clear": CLEAR(2),
}  # fmt: skip


@pytest.fixture
def plays(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Calls on the CPU are recorded as those on a card are; their records, at each time that one is played."""
    found: list[Any] = []
    play = replay.Record.play
    monkeypatch.setattr(replay, "possible", lambda device: True)
    monkeypatch.setattr(calls, "_records", replay.Records())
    monkeypatch.setattr(replay.Record, "play", lambda record, arguments: (found.append(record), play(record, arguments))[1])
    return found


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


def test_a_record_holds_no_memory_and_frees_what_nothing_reads_any_more() -> None:
    x = torch.zeros(4)
    alive: list[list[int]] = []

    def note(values: list[Any]) -> None:
        alive.append([place for place, value in enumerate(values) if isinstance(value, Tensor)])

    with replay.Recorder([x]) as recorder:
        result = ((x + 1) * 2 - 3).add_(1)
    record = recorder.record(result)
    assert record is not None
    assert not any(isinstance(value, Tensor) for value in record.initial)
    steps = [step for one in record.steps for step in (one, (note, ()))]
    assert torch.equal(record._replace(steps=steps).play([x]), result)
    assert [len(places) for places in alive] == [1, 1, 1, 1]


def test_views_are_made_only_where_they_are_read() -> None:
    """Of a view that only kernels read no more than the address is made, of another the view itself; of inputs that begin elsewhere too."""
    x = torch.arange(64.0)
    with replay.Recorder([x]) as recorder:
        parts = x[16:48].view(2, 16).unbind(0)
        address, _ = recorder._flat((parts[1], 3))
        result = parts[0] + 1, x[:0]
    record = recorder.record(result)
    assert record is not None
    assert len(record.steps) == 3  # of what is read and of what is returned; the sum
    memory = torch.arange(80.0)
    for y in (x, memory[16:]):
        values = record.initial.copy()
        values[record.inputs[0][1]] = y
        assert address(values)[0] == y.data_ptr() + 32 * 4
        found = record.play([y])
        assert torch.equal(found[0], y[16:32] + 1)
        assert found[1].shape == (0,)


@pytest.mark.parametrize(
    "other",
    [replace(SHAPE, text=4), replace(SHAPE, heads=2), replace(SHAPE, head_dim=24)],
    ids=["text", "heads", "head-dim"],
)
def test_other_sizes_have_a_record_of_their_own(other: Shape, plays: list[Any]) -> None:
    with torch.no_grad():
        for shape in (SHAPE, other):
            attention(*shape.inputs(), SPECS["clear"], shape.layout, backend="triton")
    assert plays == []
    assert len(calls._records._kept) == 2


def key(*arguments: Any) -> Any:
    return replay.key_of("attend", arguments, False)


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
    with replay.Recorder([x]) as recorder:
        recorder._steps.append(recorder._flat((x, 3)))
        y = x + 1
    record = recorder.record(y)
    assert record is not None
    assert torch.equal(record.play([torch.full((64,), 2.0)]), torch.full((64,), 3.0))
    with pytest.raises(replay.MovedError):
        record.play([torch.zeros(65)[1:]])


def test_a_call_that_reads_a_tensor_from_elsewhere_has_no_record() -> None:
    x, elsewhere = torch.zeros(4), torch.ones(4)
    with replay.Recorder([x]) as recorder:
        y = x + elsewhere
    assert recorder.record(y) is None


def test_the_least_recently_used_records_are_dropped() -> None:
    records, machine = replay.Records(2), object()
    for name in "ab":
        records.put(name, machine, name)  # type: ignore[arg-type]
    assert records.get("a", machine) == "a"
    records.put("c", machine, "c")  # type: ignore[arg-type]
    assert [records.get(name, machine) for name in "abc"] == ["a", None, "c"]
    assert records.get("a", object()) is None  # tiles of another machine


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
