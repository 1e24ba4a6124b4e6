"""Calls of the CPU's kernels that follow a record: equal to the bit to those that decide everything anew, and what ends one."""

import copy
import dataclasses
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from helpers import Shape, random_parameters
from test_cpu_kernels import SPECS, every_dtype
from torch import Tensor

from dit_accel.kernels import precision, replay
from dit_accel.kernels.cpu import calls, native
from dit_accel.kernels.replay import Record, Records
from dit_accel.method import AttentionSpec, Pooled
from dit_accel.method.presets import CLEAR, Fovea
from dit_accel.operator.attention import attention
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.plans import RECENT, tensors_of

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")

ALL = SPECS | {
    "fovea-1": Fovea(0.2, order=1),
    "fovea-parts": dataclasses.replace(Fovea(0.2), rest=Pooled(parts=2, order=1)),
    "static-and-chosen": dataclasses.replace(Fovea(0.2), keep=(*Fovea(0.2).keep, *Fovea(radius=3).keep)),
}
SHAPES = {
    "ragged": Shape(2, 2, 72, (1, 13, 11), 5), "no-text": Shape(1, 2, 16, (1, 16, 16)),
    "video-text-last": Shape(1, 3, 24, (3, 6, 7), 3, False), "groups": Shape(1, 1, 8, (1, 64, 64), 7),
}  # fmt: skip


@pytest.fixture(autouse=True)
def plays(monkeypatch: pytest.MonkeyPatch) -> list[Record]:
    """The records at each time that one is played."""
    found: list[Record] = []
    get = Records.get

    def noted(kept: Records, key: Any, machine: Any) -> Any:
        record = get(kept, key, machine)
        if isinstance(record, Record):
            return record._replace(play=lambda arguments: (found.append(record), record.play(arguments))[1])
        return record

    monkeypatch.setattr(Records, "get", noted)
    RECENT.clear()
    return found


def inputs(shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """As models have them: channels next to each other, heads behind tokens."""
    generator = torch.Generator().manual_seed(seed)
    size = (shape.batch, shape.layout.tokens, shape.heads, shape.head_dim)
    return [torch.randn(size, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def parameters(spec: AttentionSpec, shape: Shape, seed: int) -> Any:
    """Others for each seed."""
    found = random_parameters(spec, shape)
    with torch.no_grad():
        for x in found.parameters():
            x.mul_(1 + seed)
    return found


@torch.no_grad()
def run(spec: AttentionSpec, shape: Shape, seed: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> list[Tensor]:
    """Output and lse."""
    given, of_text = inputs(shape, seed, dtype), torch.randn(shape.batch, shape.text) if bias else None
    params = parameters(spec, shape, seed)
    return list(attention(*given, spec, shape.layout, params=params, text_bias=of_text, backend="cpu", return_lse=True))


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def anew(spec: AttentionSpec, shape: Shape, seed: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """`run` past all records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calls, "together", lambda *given: given[-1]())
        return run(spec, shape, seed, dtype)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("spec", ALL.values(), ids=ALL)
def test_a_record_gives_what_the_call_itself_gives(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, plays: list[Record]) -> None:
    """With other tokens and other learned parameters."""
    run(spec, shape, 0, dtype)
    assert plays == []
    got = [run(spec, shape, seed, dtype) for seed in (1, 2)]
    assert len(plays) == 2
    assert equal(got[0], anew(spec, shape, 1, dtype))
    assert equal(got[1], anew(spec, shape, 2, dtype))
    assert len(plays) == 2


def test_sizes_types_and_strides_in_turns_have_records_of_their_own(plays: list[Record]) -> None:
    spec = Fovea(0.2)
    turns = [(SHAPES["ragged"], torch.float32), (SHAPES["no-text"], torch.bfloat16), (SHAPES["ragged"], torch.float16)]
    for shape, dtype in turns:
        run(spec, shape, 0, dtype)
    assert plays == []
    for _ in range(2):
        for shape, dtype in turns:
            assert equal(run(spec, shape, 1, dtype), anew(spec, shape, 1, dtype))
    assert len(plays) == 6
    assert len(set(map(id, plays))) == 3
    q, k, v = inputs(SHAPES["ragged"], 1)
    with torch.no_grad():
        params = parameters(spec, SHAPES["ragged"], 1)
        other = attention(q.contiguous(), k, v, spec, SHAPES["ragged"].layout, params=params, backend="cpu")
    assert len(plays) == 6
    assert torch.equal(other, run(spec, SHAPES["ragged"], 1)[0])


@torch.no_grad()
@pytest.mark.parametrize("same", [lambda x: x, lambda x: x.view_as(x)], ids=["tensor", "view"])
@pytest.mark.parametrize("spec", [ALL["clear"], ALL["fovea"], ALL["sla"]], ids=["clear", "fovea", "sla"])
def test_tokens_that_are_the_same_memory_have_records_of_their_own(spec: AttentionSpec, same: Any, plays: list[Record]) -> None:
    """One tensor as key and value, or two views of one: where this call comes first, the others are recorded all the same."""
    shape = SHAPES["ragged"]
    params = parameters(spec, shape, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, spec, shape.layout, params=params, backend="cpu")

    for seed in (1, 2, 3):
        q, k, v = inputs(shape, seed)
        got, separate, other = attend(q, k, same(k)), attend(q, k, k.clone()), attend(q, k, v)
        assert torch.equal(got, separate)
        assert not torch.equal(other, separate)
    assert len(plays) == 7  # all but the first with the same memory and the first with memory of each one's own
    assert len(set(map(id, plays))) == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["fovea", "sla", "clear"])
def test_tokens_that_begin_inside_others_take_no_record_from_calls_of_the_same_key(name: str, plays: list[Record]) -> None:
    """Where the values begin at the first image token's key, no address tells the two apart."""
    spec, shape = ALL[name], SHAPES["ragged"]
    shift, params = shape.text, parameters(spec, shape, 1)

    def wide() -> Tensor:
        return torch.randn(shape.batch, shape.layout.tokens + shift, shape.heads, shape.head_dim).transpose(1, 2)

    def attend(*qkv: Tensor) -> Tensor:
        return attention(*qkv, spec, shape.layout, params=params, backend="cpu")

    (q, k, v), both = [wide()[:, :, shift:] for _ in range(3)], wide()
    for _ in range(2):
        overlapping = both[:, :, :-shift], both[:, :, shift:]
        assert torch.equal(attend(q, *overlapping), attend(q, *(x.clone() for x in overlapping)))
    plays.clear()
    got = [attend(q, k, v) for _ in range(3)]
    assert len(plays) >= 2
    assert all(torch.equal(x, attend(q.clone(), k.clone(), v.clone())) for x in got)


def test_threads_instruction_sets_and_precision_have_records_of_their_own(plays: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = Fovea(radius=3), SHAPES["ragged"]
    run(spec, shape, 0)
    torch.set_num_threads(2)
    try:
        run(spec, shape, 0)
    finally:
        torch.set_num_threads(1)
    monkeypatch.setenv(native.TARGET_VARIABLE, "portable")
    run(spec, shape, 0)
    monkeypatch.setattr(calls, "get_float32_attention_precision", lambda: "medium")
    run(spec, shape, 0)
    assert plays == []
    assert precision.get_float32_attention_precision() == "highest"


def test_gradients_and_watchers_are_computed_as_ever(plays: list[Record]) -> None:
    spec, shape = CLEAR(3), SHAPES["ragged"]
    run(spec, shape, 0)
    q, k, v = (x.requires_grad_() for x in inputs(shape, 0))
    attention(q, k, v, spec, shape.layout, backend="cpu").sum().backward()
    assert q.grad is not None
    with torch.autograd.profiler.profile() as profile, torch.no_grad():
        attention(q, k, v, spec, shape.layout, backend="cpu")
    assert "dit_accel::attention" in {event.name for event in profile.function_events}
    assert plays == []


def test_inference_mode_makes_and_follows_records(plays: list[Record]) -> None:
    """Also what follows from constants, made in it and read outside of it."""
    for spec, shape in ((Fovea(0.2, order=1), SHAPES["groups"]), (SPECS["sla"], SHAPES["ragged"])):
        with torch.inference_mode():
            first = run(spec, shape, 0)
        assert equal(run(spec, shape, 0), first)
        with torch.inference_mode():
            again = run(spec, shape, 1)
        assert equal(anew(spec, shape, 1), again)
    assert len(plays) == 4


def test_a_failed_call_leaves_no_record(plays: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = CLEAR(3), SHAPES["ragged"]
    with monkeypatch.context() as patch:
        patch.setattr(native, "call", lambda name, argument: native.fail(name))
        with pytest.raises(MemoryError, match="found no memory for forward"):
            run(spec, shape, 0)
    assert native.noting.get() is None
    first = run(spec, shape, 0)
    assert equal(run(spec, shape, 0), first)
    assert len(plays) == 1


def test_a_library_without_memory_says_so_from_a_record_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = CLEAR(3), SHAPES["ragged"]
    monkeypatch.setattr(native, "function", lambda name: lambda *_: 1)
    run(spec, shape, 0)
    with pytest.raises(MemoryError, match="found no memory for forward"):
        run(spec, shape, 0)


def test_threads_share_a_record() -> None:
    spec, shape = Fovea(0.2), SHAPES["ragged"]
    run(spec, shape, 0)
    expected = [anew(spec, shape, seed) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            got = list(pool.map(lambda seed: run(spec, shape, seed), range(8)))
            assert all(map(equal, got, expected))


def test_memory_between_kernels_is_no_part_of_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filled with NaN before."""
    spec, shape, empty = Fovea(0.2, order=1), SHAPES["groups"], torch.empty_strided

    def poisoned(size: Any, stride: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        x = empty(size, stride, dtype=dtype, device=device)
        return x.fill_(255 if dtype == torch.uint8 else torch.nan if dtype.is_floating_point else -1)

    monkeypatch.setattr(torch, "empty_strided", poisoned)
    run(spec, shape, 0)
    got = run(spec, shape, 1)
    assert equal(got, anew(spec, shape, 1))
    assert all(bool(x.isfinite().all()) for x in got)


def test_large_memory_is_allocated_by_itself(plays: list[Record], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, shape = Fovea(0.2, order=1), SHAPES["groups"]
    counts = []
    for most in (replay.LARGE, 0):
        monkeypatch.setattr(replay, "LARGE", most)
        RECENT.clear()
        run(spec, shape, 0)
        assert equal(run(spec, shape, 1), anew(spec, shape, 1))
        counts.append(plays[-1].source.count("empty_strided("))
    assert counts[1] > counts[0] + 5


def test_a_plans_records_go_with_it_and_no_copy_has_them() -> None:
    spec, shape = CLEAR(3), SHAPES["ragged"]
    plan = make_plan(spec, shape.layout, torch.device("cpu"))
    run(spec, shape, 0)
    assert len(plan.records._kept) == 1
    copied, moved = copy.deepcopy(plan.records), pickle.loads(pickle.dumps(plan.records))
    assert copied._kept == moved._kept == {}
    assert dataclasses.replace(plan, top=1).records._kept == {}


@pytest.mark.parametrize("spec", [ALL["fovea-1"], ALL["static-and-chosen"]], ids=["fovea-1", "static-and-chosen"])
def test_without_a_plan_its_records_are_gone_at_once(spec: AttentionSpec) -> None:
    """Python looks for cycles when it likes to, and what waits for that holds memory of a card."""
    shape = SHAPES["ragged"]
    run(spec, shape, 0)
    plan = make_plan(spec, shape.layout, torch.device("cpu"))
    record = next(iter(plan.records._kept.values()))[1]
    assert isinstance(record, Record)
    assert record.constants
    alive = [weakref.ref(x) for x in (record.play, *record.constants, *tensors_of(plan))]
    gc.disable()
    try:
        del plan, record
        RECENT.clear()
        assert [one() for one in alive if one() is not None] == []
    finally:
        gc.enable()


def test_constants_of_records_have_a_limit_in_bytes(monkeypatch: pytest.MonkeyPatch, plays: list[Record]) -> None:
    """Which grow with heads and tokens, and each length of text has its own."""
    spec, shape = ALL["static-and-chosen"], SHAPES["ragged"]
    lengths = [dataclasses.replace(shape, text=text) for text in (1, 2, 3)]
    run(spec, lengths[0], 0)
    kept = make_plan(spec, shape.layout, torch.device("cpu")).records
    one = kept._held()
    assert one > 0
    for most, number in ((1, 1), (2 * one, 2)):  # one record is kept whatever it holds
        monkeypatch.setattr(replay, "HELD", most)
        for other in lengths:
            run(spec, other, 0)
        assert len(kept._kept) == number
        assert kept._held() == number * one
    plays.clear()
    assert equal(run(spec, lengths[-1], 1), anew(spec, lengths[-1], 1))
    assert len(plays) == 1
