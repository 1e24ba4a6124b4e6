"""Which instruction set computes bfloat16: measured once for all processes, never in the tests themselves, whose clocks are given."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from helpers import Shape

from dit_accel import CLEAR, attention
from dit_accel.kernels.cpu import native
from dit_accel.operator import bfloat16, decisions

pytestmark = pytest.mark.skipif(native.library() is None, reason="no compiler when the package was installed")
ALL = ("amx", "avx512bf16", "avx512", "avx2")


@pytest.fixture
def measuring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A process that may measure and has chosen nothing yet, on a CPU with everything, and a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(decisions.VARIABLE)
    monkeypatch.delenv(native.TARGET_VARIABLE, raising=False)
    monkeypatch.setattr(native, "best_target", lambda: "amx")
    monkeypatch.setattr(native, "BFLOAT16", fresh())
    bfloat16.choice.cache_clear()
    yield tmp_path
    bfloat16.choice.cache_clear()


def fresh() -> native.Bfloat16:
    made = native.Bfloat16()
    made.chooser = lambda: bfloat16.choice().target
    return made


def took(*seconds: float) -> Callable[..., decisions.Seconds]:
    return lambda *_: seconds


@pytest.mark.parametrize("fastest", range(4))
def test_the_fastest_serves_bfloat16_and_the_best_serves_float32(fastest: int, measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times = [2.0, 2.0, 2.0, 2.0]
    times[fastest] = 1.0
    monkeypatch.setattr(bfloat16, "measured", took(*times))
    assert native.TARGETS[native.target(bfloat16=True)] == ALL[fastest]
    assert native.TARGETS[native.target()] == "amx"
    file = next((measuring / "dit_accel" / "bfloat16").glob("*.json"))
    says = str(bfloat16.choice())
    assert says.startswith(f"{ALL[fastest]}, the fastest of amx {times[0] * 1e3:.2f} ms, avx512bf16 {times[1] * 1e3:.2f} ms, avx512 ")
    assert says.endswith(f"measured once, kept in {file}")
    assert bfloat16.described() == says


def test_on_arm64_products_of_matrices_are_measured_against_neon(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TARGETS", native.targets_of("aarch64"))
    monkeypatch.setattr(native, "best_target", lambda: "bfmmla")
    monkeypatch.setattr(bfloat16, "measured", lambda names: (2.0, 1.0) if names == ("bfmmla", "portable") else ())
    assert native.TARGETS[native.target(bfloat16=True)] == "portable"
    assert native.TARGETS[native.target()] == "bfmmla"


def test_ties_go_to_the_newest(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", took(1.0, 1.0, 1.0, 1.0))
    assert bfloat16.choice().target == "amx"


def test_another_process_finds_the_choice(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", took(3.0, 2.0, 1.0, 4.0))
    first = bfloat16.choice()
    monkeypatch.setattr(bfloat16, "measured", pytest.fail)
    bfloat16.choice.cache_clear()
    assert bfloat16.choice() == first


def test_a_process_keeps_its_choice(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens to the file, and however many threads ask at once."""
    asked: list[int] = []
    monkeypatch.setattr(bfloat16, "measured", lambda *_: asked.append(1) or (3.0, 2.0, 1.0, 4.0))
    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(native.target(bfloat16=True))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    next((measuring / "dit_accel" / "bfloat16").glob("*.json")).unlink()
    assert [native.TARGETS[n] for n in [*found, native.target(bfloat16=True)]] == ["avx512"] * 5
    assert len(asked) == 1


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 1}'], ids=["empty", "list", "half"])
def test_a_damaged_file_is_made_again(content: str, measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", took(3.0, 2.0, 1.0, 4.0))
    bfloat16.choice()
    file = next((measuring / "dit_accel" / "bfloat16").glob("*.json"))
    file.write_text(content)
    bfloat16.choice.cache_clear()
    assert bfloat16.choice().target == "avx512"
    assert '"avx512": 1.0' in file.read_text()


def test_without_a_folder_the_choice_is_the_processs_own(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (measuring / "dit_accel").write_text("a file in the folder's place")
    monkeypatch.setattr(bfloat16, "measured", took(3.0, 2.0, 1.0, 4.0))
    assert bfloat16.choice().target == "avx512"
    assert str(bfloat16.choice()).endswith("measured for this process alone")


def test_the_environment_names_one(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", pytest.fail)
    monkeypatch.setenv(native.TARGET_VARIABLE, "portable")
    assert native.target(bfloat16=True) == native.target() == 0
    assert bfloat16.described() == f"portable, as {native.TARGET_VARIABLE} asks"


def test_with_measuring_off_the_newest_serves(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", pytest.fail)
    monkeypatch.setenv(decisions.VARIABLE, "off")
    assert str(bfloat16.choice()) == "amx, the newest here, as DIT_ACCEL_GUARD lets nothing be measured"


@pytest.mark.parametrize("best", ["portable", "avx2"])
def test_where_there_is_one_nothing_is_measured(best: str, measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bfloat16, "measured", pytest.fail)
    monkeypatch.setattr(native, "best_target", lambda: best)
    assert str(bfloat16.choice()) == f"{best}, the only one here"


def test_what_is_measured_is_each_candidates_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is given, and so are the calls: the least of three rounds after a first one that does not count, each in its turn."""
    ran: list[str] = []
    monkeypatch.setattr(bfloat16.calls, "attend", lambda _: ran.append(native.TARGETS[native.target(bfloat16=True)]))
    ticks = iter([0, 1, 0, 1, 0, 5, 0, 9, 0, 4, 0, 8, 0, 6, 0, 7])
    assert bfloat16.measured(("avx512", "avx2"), lambda: float(next(ticks))) == (4.0, 7.0)
    assert ran == ["avx512", "avx2"] * 4


def test_the_call_that_is_measured_is_a_right_one() -> None:
    out, _ = bfloat16.calls.attend(a := bfloat16._call())
    rows = slice(0, bfloat16.BLOCK), slice(0, bfloat16.BLOCK * bfloat16.VISITS)  # the first block visits the first eight
    right = torch.nn.functional.scaled_dot_product_attention(
        *(x[:, :, r].double() for x, r in zip(a[:3], (rows[0], rows[1], rows[1]), strict=True))
    )
    torch.testing.assert_close(out[:, :, rows[0]].double(), right, rtol=0, atol=0.02)


def test_a_call_runs_what_was_chosen(measuring: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a call on bfloat16 asks, compiled or not."""
    monkeypatch.undo()
    asked: list[str] = []
    chooser = native.Bfloat16()
    chooser.chooser = lambda: asked.append("") or "portable"
    monkeypatch.setattr(native, "BFLOAT16", chooser)
    monkeypatch.delenv(native.TARGET_VARIABLE, raising=False)
    shape = Shape(1, 1, 16, (1, 8, 8))
    attention(*shape.inputs(), CLEAR(2), shape.layout, backend="cpu")
    assert asked == []
    inputs = shape.inputs(torch.bfloat16)
    compiled = torch.compile(lambda *x: attention(*x, CLEAR(2), shape.layout, backend="cpu"), backend="eager")
    found = [compiled(*inputs), attention(*inputs, CLEAR(2), shape.layout, backend="cpu")]
    assert asked == [""]
    with native.running("portable"):
        found.append(attention(*inputs, CLEAR(2), shape.layout, backend="cpu"))
    assert all(torch.equal(x, found[0]) for x in found)


PROGRAM = """
import random
from dit_accel.operator import bfloat16
from dit_accel.kernels.cpu import native
native.best_target = lambda: "amx"
bfloat16.measured = lambda *_: tuple(random.random() for _ in range(4))
print(bfloat16.choice().target)
"""


def test_processes_that_start_at_once_choose_alike(tmp_path: Path) -> None:
    """By times that are random."""
    env = {key: value for key, value in os.environ.items() if key != decisions.VARIABLE} | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True, env=env) for _ in range(3)]
    printed = [process.communicate()[0].strip() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(printed)) == 1
