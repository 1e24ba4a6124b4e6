"""Launches that a card would refuse, with stand-ins for what only a card has: tiles too large for it, and the capture of a CUDA graph."""

import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import forward_arguments, tiny_transformer
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from torch import Tensor
from triton.runtime.errors import OutOfResources

from dit_accel.errors import BackendError
from dit_accel.kernels import capture
from dit_accel.kernels.arguments import MixtureArguments
from dit_accel.kernels.triton import calls, fallback, launch
from dit_accel.kernels.triton.fallback import Place, TooLargeError
from dit_accel.kernels.triton.launch import Launch
from dit_accel.kernels.triton.tables import ARCHITECTURES, KERNELS, TOGETHER, Machine, Tile
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.attention import attention
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.plans import RECENT
from dit_accel.patch.verbs import accelerate

SHAPE = Shape(1, 1, 16, (1, 8, 11), 5)
ROWS = Place("rows", 128, torch.bfloat16, 64, 64)


# Tiles that do not fit


class SmallCard:
    """Runs launches, but for those of `kernels` with a tile of more than `most` rows, or of more warps: as a card without the memory."""

    def __init__(self, kernels: set[str], most: int) -> None:
        self.kernels, self.most = kernels, most
        self.ran: dict[str, int] = {}
        self.refused: list[str] = []
        self.execute = launch.execute

    def __call__(self, one: Launch) -> None:
        name = one.kernel.__name__
        rows = sum(one.constants.get(side, 0) for side in ("BQ", "BK"))
        if name in self.kernels and rows > self.most:
            self.refused.append(name)
            raise OutOfResources(300_000, 232_448, "shared memory")
        self.ran[name] = rows
        self.execute(one)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SmallCard]:
    """Makes a small card of the device that runs launches here; what was learned about it is forgotten afterwards."""
    monkeypatch.setattr(calls, "_fitting", {})
    monkeypatch.setattr(calls, "_warned", set())

    def make(kernels: set[str], most: int, tuned: dict[Any, Tile] | None = None) -> SmallCard:
        small = SmallCard(kernels, most)
        monkeypatch.setattr(launch, "execute", small)
        monkeypatch.setattr(calls, "machine_of", lambda device: Machine("sm_90", 4, tuned or {}))
        return small

    return make


def compute(spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Output and gradients by the Triton kernels."""

    def call(qkv: list[Tensor], params: Any) -> tuple[Tensor, Tensor]:
        return attention(*qkv, spec, SHAPE.layout, params=params, backend="triton", return_lse=True)

    with torch.no_grad():
        out, _ = call(SHAPE.inputs(), random_parameters(spec, SHAPE))
    return out, flat(gradients(call, spec, SHAPE, torch.float32))


def assert_right(spec: AttentionSpec, found: tuple[Tensor, Tensor]) -> None:
    exact, eager = (
        (
            oracle(*SHAPE.inputs(), spec, SHAPE.layout, random_parameters(spec, SHAPE), dtype=d)[0].detach(),
            flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, SHAPE.layout, p, dtype=d), spec, SHAPE, d)),
        )
        for d in (torch.float64, torch.float32)
    )
    for got, *compared in zip(found, exact, eager, strict=True):
        assert_close_as_eager(got, *compared)


CASES = {
    "fovea": (Fovea(0.3, tile=(8, 8)), {"attend_rows", "gradient_rows", "gradient_columns", "summarise"}),
    "sla": (SLA(0.3, block=(32, 32)), {"attend_rows", "linear_gradient", "linear_columns", "outer_sums"}),
}


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
@pytest.mark.parametrize(("spec", "kernels"), CASES.values(), ids=CASES)
def test_a_table_tile_that_does_not_fit_gives_way_to_a_smaller_one(
    spec: AttentionSpec, kernels: set[str], card: Callable[..., SmallCard]
) -> None:
    small = card(kernels, 40)
    with pytest.warns(UserWarning, match="smaller tile from now on") as warned:
        found = compute(spec)
    assert_right(spec, found)
    refused = set(small.refused)
    assert refused >= kernels - {"summarise", "outer_sums"}  # these hold one side only
    assert all(small.ran[name] <= 40 for name in refused)
    # one for each row of the table, and what it says
    assert len(warned) == len({str(one.message).split("'")[1] for one in warned})
    assert "needs 300000 of shared memory, of which there are 232448" in str(warned[0].message)
    small.refused.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = compute(spec)
    assert small.refused == []
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_a_tuned_tile_that_does_not_fit_gives_way_to_the_tables(card: Callable[..., SmallCard]) -> None:
    spec = CLEAR(4, tile=(8, 8))
    key = ("rows_static", "float32", 16)  # all heads have the same lists
    small = card({"attend_rows"}, 200, {key: Tile(256, 256, 8, 3), ("dense", "float32", 16): Tile(32, 32, 2, 2)})
    with torch.no_grad():
        attention(*SHAPE.inputs(), spec, SHAPE.layout, backend="triton")
    assert small.refused == []  # blocks of 64 tokens cut it
    small.most = 120
    with pytest.warns(UserWarning, match="the GPU kernel 'rows_static'"), torch.no_grad():
        found = attention(*SHAPE.inputs(), spec, SHAPE.layout, backend="triton")
    assert_close_as_eager(found, *(oracle(*SHAPE.inputs(), spec, SHAPE.layout, dtype=d)[0] for d in (torch.float64, torch.float32)))
    (kept,) = [machine.tuned for machine in calls._fitting.values()]
    assert kept[("dense", "float32", 16)] == Tile(32, 32, 2, 2)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_a_kernel_that_fits_with_no_tile_says_what_to_do(card: Callable[..., SmallCard]) -> None:
    card({"attend_rows"}, 0)
    with pytest.raises(BackendError, match=r"'rows_static' needs 300000 .* even with its smallest tile: use backend='reference'"):
        attention(*SHAPE.inputs(), CLEAR(4), SHAPE.layout, backend="triton")
    assert calls._warned == set()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_a_kernel_that_has_no_other_tile_says_what_to_do(card: Callable[..., SmallCard]) -> None:
    card({"summarise_parts"}, 0)
    with pytest.raises(BackendError, match=r"needs more of the GPU than there is: .* 300000.* use backend='reference'"):
        attention(*SHAPE.inputs(), Fovea(0.3, order=1, tile=(4, 4)), SHAPE.layout, backend="triton")


def steps_down(place: Place, machine: Machine) -> list[Tile]:
    """The tiles that are taken one after the other, as long as each is refused."""
    error = TooLargeError(place, OutOfResources(300_000, 232_448, "shared memory"))
    seen = [place.tile(machine)]
    try:
        while True:
            machine = fallback.lowered(machine, error)
            seen.append(place.tile(machine))
    except BackendError as refused:
        assert "even with its smallest tile" in str(refused)  # noqa: PT017
    return seen


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_step_is_smaller_and_the_last_is_refused(kernel: str, arch: str) -> None:
    for windows, lists in ((False, False), (True, False), (False, True)):
        place = replace(ROWS, kernel=kernel, windows=windows, lists=lists)
        side = 64 if kernel in TOGETHER else 128  # 128 query rows would be those of two blocks
        seen = steps_down(place, Machine(arch, 132, {place.key: Tile(side, side, 8, 4)}))
        assert 3 <= len(seen) <= 12
        assert len(set(seen)) == len(seen)
        sizes = [(tile.queries + tile.keys) * tile.stages for tile in seen]
        assert sizes == sorted(sizes, reverse=True)
        assert seen[-1] == replace(seen[-1], queries=16, keys=16, stages=1)


def test_a_tuned_tile_gives_way_to_the_tables_own_first() -> None:
    own = ROWS.tile(Machine("sm_90", 132))
    error = TooLargeError(ROWS, OutOfResources(300_000, 232_448, "shared memory"))
    wide = Machine("sm_90", 132, {ROWS.key: replace(own, stages=own.stages + 2)})
    assert ROWS.tile(fallback.lowered(wide, error)) == own
    narrow = Machine("sm_90", 132, {ROWS.key: replace(own, queries=own.queries // 4, keys=own.keys // 2, stages=2)})
    assert ROWS.tile(fallback.lowered(narrow, error)).keys < own.keys  # the table's would need more still


def test_too_many_threads_take_fewer_warps() -> None:
    error = TooLargeError(ROWS, OutOfResources(1024, 512, "threads"))
    machine = Machine("sm_90", 132, {ROWS.key: Tile(64, 64, 16, 2)})
    table = ROWS.tile(Machine("sm_90", 132))
    lower = ROWS.tile(fallback.lowered(machine, error))
    assert lower in (table, Tile(64, 64, 8, 2))
    with pytest.raises(BackendError, match="1024 of threads"):
        fallback.lowered(Machine("sm_90", 132, {ROWS.key: Tile(16, 16, 1, 1)}), error)


# Capturing a CUDA graph


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether a graph is being captured; nothing is kept or remembered from test to test."""
    now = [False]
    monkeypatch.setattr(capture, "capturing", lambda device: now[0])
    monkeypatch.setattr(capture, "_seen", {})
    monkeypatch.setattr(capture, "_kept", {})
    return lambda value: now.__setitem__(0, value)


def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    execute = launch.execute
    monkeypatch.setattr(launch, "execute", lambda one: (found.append(one.kernel.__name__), execute(one)))
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
@pytest.mark.parametrize("spec", [Fovea(0.3, tile=(4, 8)), CLEAR(4), SLA(0.3, block=(32, 32))], ids=str)
def test_a_first_call_inside_a_capture_is_refused_before_anything_is_launched(
    spec: AttentionSpec, capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    params, launched = random_parameters(spec, SHAPE), launches(monkeypatch)

    def call(dtype: torch.dtype = torch.float32, *, backward: bool = False) -> list[Tensor]:
        qkv = SHAPE.inputs(dtype, grad=backward)
        out = attention(*qkv, spec, SHAPE.layout, params=params, backend="triton")
        return [out.detach(), *(torch.autograd.grad(out.sum(), qkv) if backward else ())]

    plan = make_plan(spec, SHAPE.layout, torch.device("cpu"))
    capturing(True)
    with pytest.raises(BackendError, match=r"kernels are compiled and loaded\): run the pipeline once with these sizes before capturing"):
        call()
    assert launched == []
    capturing(False)
    exact = call()
    launched.clear()
    capturing(True)
    assert torch.equal(call()[0], exact[0])
    forward = len(launched)
    assert forward > 0
    with pytest.raises(BackendError, match="before capturing"):
        call(torch.float16)
    with pytest.raises(BackendError, match="before capturing"):  # the forward ran before, the backward not
        call(backward=True)
    assert len(launched) == 2 * forward
    capturing(False)
    call(backward=True)
    capturing(True)
    assert len(call(backward=True)) == 4
    del plan  # whoever holds a plan keeps it from being made anew


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
@pytest.mark.parametrize("changed", ["narrow", "tf32"])
def test_products_of_another_precision_are_a_first_call(
    changed: str, capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    a = MixtureArguments(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 16, 4, 16))

    def both(a: MixtureArguments) -> None:
        calls.mix_slopes(a)
        calls.gradients_of_mixture(torch.ones(1, 1, 3, 16, 16), a)

    both(a)
    capturing(True)
    both(a)
    if changed == "narrow":
        a = a._replace(narrow=True)
    else:
        monkeypatch.setattr(launch, "tf32_allowed", lambda: True)
    for call in (lambda: calls.mix_slopes(a), lambda: calls.gradients_of_mixture(torch.ones(1, 1, 3, 16, 16), a)):
        with pytest.raises(BackendError, match="before capturing"):
            call()


def test_a_plan_made_inside_a_capture_is_refused(capturing: Callable[[bool], None]) -> None:
    layout = Shape(1, 1, 16, (1, 9, 13), 3).layout
    capturing(True)
    with pytest.raises(BackendError, match="block lists are made and copied"):
        make_plan(CLEAR(3), layout, torch.device("cpu"))
    capturing(False)
    make_plan(CLEAR(3), layout, torch.device("cpu"))  # and the refusal is not cached
    spec, qkv = SLA(0.4242), [torch.zeros(1, 1, layout.tokens, 16) for _ in range(3)]  # a spec that no other test has
    capturing(True)
    with pytest.raises(BackendError, match="hand them over as `params`"):
        attention(*qkv, spec, layout)
    capturing(False)
    expected = attention(*qkv, spec, layout)
    capturing(True)
    assert torch.equal(attention(*qkv, spec, layout), expected)
    assert len(capture._kept) == 2  # the plan and the start values, which the graph reads


def plan_of_a_call(spec: AttentionSpec, capturing: Callable[[bool], None], *, captured: bool) -> weakref.ref[Tensor]:
    """The block borders of the plan that a call used, captured or not."""
    plan, params = make_plan(spec, SHAPE.layout, torch.device("cpu")), random_parameters(spec, SHAPE)
    attention(*SHAPE.inputs(), spec, SHAPE.layout, params=params, backend="triton")
    capturing(captured)
    attention(*SHAPE.inputs(), spec, SHAPE.layout, params=params, backend="triton")
    capturing(False)
    return weakref.ref(plan.geometry.starts_q)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_what_a_captured_call_reads_is_never_freed(capturing: Callable[[bool], None]) -> None:
    spec = CLEAR(4, tile=(4, 8))
    for captured in (False, True):
        held = plan_of_a_call(spec, capturing, captured=captured)
        RECENT.clear()
        gc.collect()
        assert (held() is not None) == captured


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_a_model_is_captured_after_one_run_with_the_same_position_ids(capturing: Callable[[bool], None]) -> None:
    model = accelerate(tiny_transformer(double=1, single=0), GNA(3), backend="triton")
    arguments = forward_arguments(3, 9)
    with torch.no_grad():
        capturing(True)
        with pytest.raises(BackendError, match="position ids"):
            model(**arguments)
        capturing(False)
        exact = model(**arguments).sample
        capturing(True)
        assert torch.equal(model(**arguments).sample, exact)
        kept = [weakref.ref(thing) for thing in capture._kept.values()]
        capturing(False)
        model(**forward_arguments(2, 8))
        model._dit_accel.context.plans.clear()
        RECENT.clear()
        gc.collect()
    assert len(kept) >= 1  # the plan
    assert all(ref() is not None for ref in kept)
    capture._kept.clear()
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_as_many_calls_are_remembered_as_said(capturing: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "SEEN", 2)
    for number in (1, 2, 1, 3):
        capture.ran(number)
    capturing(True)
    device = torch.device("cpu")
    assert capture.check(device, 1)
    assert capture.check(device, 3)
    with pytest.raises(BackendError):
        capture.check(device, 2)
