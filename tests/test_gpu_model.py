"""The programs that say without a card what a call on one takes: memory, and predicted times."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from dit_accel.kernels import dispatch
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.layout import TokenLayout

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not dispatch.TRITON, reason="records what Triton's launches would be")


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_memory
    import gpu_model

    yield gpu_memory, gpu_model
    for name in ("gpu_memory", "gpu_model"):
        del sys.modules[name]


def test_memory_is_what_is_allocated(programs: tuple[ModuleType, ModuleType]) -> None:
    memory, _ = programs
    heads, d, blocks, top = 3, 64, 16 * 16, 12
    plan, lists, scores, everything = memory.bytes_of(memory.SPECS["Fovea 5 %"], (1, 128, 128), 0, heads, d)
    assert plan > 16384 * 4
    assert lists == heads * blocks * (top + 1 + blocks // 32) * 4
    assert scores == 0  # a program holds them
    pooled = heads * blocks * d * 3 * 2  # in 16 bits
    assert lists + pooled + heads * 16384 * 4 <= everything < 2 * (lists + pooled + heads * (blocks * d * 3 + 16384) * 4)
    _, _, scores, everything = memory.bytes_of(memory.SPECS["Fovea 5 %"], (1, 512, 512), 0, heads, d)
    assert scores == heads * 4096**2 * 4 < everything


@pytest.mark.parametrize("grid", [(1, 24, 40), (1, 19, 27)])
def test_unions_are_of_two_neighbouring_lists(grid: tuple[int, int, int], programs: tuple[ModuleType, ModuleType]) -> None:
    _, model = programs
    spec = model.SPECS["CLEAR radius 8"]
    plan = make_plan(spec, TokenLayout(grid, 0, order=spec.order), model.torch.device("cpu"))
    lists = [set(row[held].tolist()) for row, held in zip(plan.static.index, plan.static.valid, strict=True)]
    pairs = [lists[n : n + 2] for n in range(0, len(lists), 2)]
    assert model.unions(plan) == sum(len(set.union(*pair)) for pair in pairs)


def test_the_longest_first_end_sooner(programs: tuple[ModuleType, ModuleType]) -> None:
    _, model = programs
    assert model.ends([1, 1, 1, 3], 2) == 4
    assert model.ends([3, 1, 1, 1], 2) == 3


def test_predictions_begin_at_what_was_measured(programs: tuple[ModuleType, ModuleType]) -> None:
    _, model = programs
    before = model.measured()
    for shape in model.SHAPES[:2]:
        for name in model.SPECS:
            found = model.predict(name, shape, before[shape.name, name])
            now = found["as it is"]
            assert 0.8 < now.least / before[shape.name, name] <= now.most / before[shape.name, name] < 1.1
            if name != "SLA 5 %":
                assert found["8 bits"].least <= found["two blocks"].least <= found["two blocks"].most <= now.most
