"""Tuning without a GPU: which tiles are tried, which stay, the file they are kept in, and that launches take them from it."""

import json
import stat
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import CPU, DEVICE, attention_by
from rich.console import Console
from torch import Tensor
from triton.runtime.errors import OutOfResources, PTXASError

from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch
from dit_accel.kernels.triton import ahead, calls, driver, launch, tables, timing, tuned
from dit_accel.kernels.triton.tables import ARCHITECTURES, Machine, Tile, tile_for
from dit_accel.measure import gpu_candidates, gpu_tune, gpu_tune_ahead
from dit_accel.measure.gpu_tune import KERNELS, Result, Work
from dit_accel.method import TopK
from dit_accel.method.presets import SLA, Fovea

HERE = tuned.Gpu("NVIDIA H100", "9.0", "580.65.06", "3.9.0", "0123456789abcdef")
HOPPER = Machine("sm_90", 132)
ROWS = Work("rows", "bfloat16", 64)


@pytest.fixture
def nothing_ahead(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Nothing is compiled before it is timed; grows by the target and the number of kernels to tune."""
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(gpu_tune_ahead, "compile_ahead", lambda work, machine, target, shown: asked.append((target, len(work))))
    monkeypatch.setattr(ahead, "current_target", lambda: "a target")
    return asked


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of tiles, in a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "dit_accel" / "tiles.json"


# What is tried


def test_every_row_of_the_table_can_be_tuned() -> None:
    assert tuple(KERNELS) == tables.KERNELS
    assert {work.kernel for work in gpu_tune.work_of(head_dims=[128])} == set(KERNELS)
    assert not {"rows_linear", "linear", "linear_columns", "outer"} & {work.kernel for work in gpu_tune.work_of(head_dims=[256])}


@pytest.mark.parametrize("work", gpu_tune.work_of(["float16", "int8"], [64, 128, 256]), ids=str)
def test_candidates_are_few_and_the_tables_own_is_first(work: Work) -> None:
    for arch in ARCHITECTURES:
        tried = gpu_tune.candidates(work, Machine(arch, 132))
        assert tried[0] == tile_for(work.kernel, Machine(arch, 132), work.head_dim, gpu_candidates.TUNED[work.dtype], 64, 64)
        assert len(set(tried)) == len(tried)
        assert (8 if KERNELS[work.kernel].pipeline else 4) <= len(tried) <= 17


@pytest.mark.gpu
def test_products_in_8_bits_have_tiles_of_their_own() -> None:
    works = {work.kernel: work for work in gpu_tune.work_of(["int8"], [64])}
    assert set(works) == {"rows", "rows_static", "rows_variance", "rows_variance_static", "rows_linear", "dense"}
    for kernel, method, function in (("rows_static", "clear", "attend_rows"), ("dense", "fovea", "dense_rows")):
        own = Machine("sm_120", 132, {works[kernel].key: Tile(32, 16, 2, 3), (kernel, "bfloat16", 64): Tile(16, 16, 4, 2)})
        with calls.recorded(own) as launches:
            gpu_candidates.forward_backward(method, works[kernel], torch.device("cpu"), (1, 16, 16), 64, 2, empty=True)
        (one,) = [one for one in launches if one.kernel.__name__ == function]
        assert one.arguments["int8"].q is not None
        assert (one.constants["BQ"], one.constants["BK"], one.warps, one.constants["STAGES"]) == (32, 16, 2, 3)
        assert not any(one.kernel.__name__.startswith("gradient") for one in launches)


def test_unknown_work_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of .*not 'float32'"):
        gpu_tune.work_of(["float32"])
    with pytest.raises(ValueError, match=r"head_dim must be one of .*not 72"):
        gpu_tune.work_of(None, [72])


# What stays


def timer(times: dict[Tile, float | str], otherwise: float | str = 9.0) -> Any:
    return lambda work, tile: times.get(tile, otherwise)


def test_the_fastest_tile_stays_and_those_of_no_use_are_listed() -> None:
    own, fast, broken = (gpu_tune.candidates(ROWS, HOPPER)[i] for i in (0, 2, 3))
    result = gpu_tune.tune(ROWS, HOPPER, timer({own: 2.0, fast: 1.0, broken: "spills 8 registers"}))
    assert result.chosen == fast
    assert result.skipped == {broken: "spills 8 registers"}
    (entry,) = gpu_tune.entries([result], HERE)
    assert (entry.gpu, entry.key, entry.tile) == (HERE, ("rows", "bfloat16", 64), fast)


def test_the_tables_tile_stays_where_none_is_clearly_faster() -> None:
    own, near = gpu_tune.candidates(ROWS, HOPPER)[:2]
    result = gpu_tune.tune(ROWS, HOPPER, timer({own: 1.0, near: 0.98}))
    assert result.chosen == own
    assert gpu_tune.entries([result], HERE) == []


def test_another_tile_stays_where_the_tables_is_of_no_use() -> None:
    own, other = gpu_tune.candidates(ROWS, HOPPER)[:2]
    assert gpu_tune.tune(ROWS, HOPPER, timer({own: "does not compile", other: 1.0})).chosen == other
    nothing = gpu_tune.tune(ROWS, HOPPER, timer({}, "does not compile"))
    assert nothing.chosen is None
    assert gpu_tune.entries([nothing], HERE) == []


def test_what_is_shown_names_every_skipped_tile(capsys: pytest.CaptureFixture[str]) -> None:
    own, fast, broken = gpu_tune.candidates(ROWS, HOPPER)[:3]
    result = Result(ROWS, own, {own: 0.002, fast: 0.001}, {broken: "spills 8 registers"})
    gpu_tune.show([result, Result(ROWS, own)], Console(width=200))
    shown = capsys.readouterr().out
    assert "2.00×" in shown
    assert "skipped: rows, bfloat16, D 64" in shown
    assert "spills 8 registers" in shown


# A trial


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["dense", "linear", "gradient_columns"])
def test_a_trial_measures_that_kernel_with_that_tile_on_real_values(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KERNELS, kernel, gpu_candidates.Kernel(KERNELS[kernel].functions, ("sla",)))
    measured: list[launch.Launch] = []

    def measure(one: launch.Launch) -> float:
        launch.execute(one)
        given = [one.arguments[name].base for name in ("q", "k", "v")] + list(one.arguments["pull"][1:] if "pull" in one.arguments else ())
        assert all(bool(x.isfinite().all()) for x in given)
        measured.append(one)
        return 0.5

    arguments: dict[str, Any] = {"machine": Machine("sm_90", 4), "device": DEVICE, "grid": (1, 4, 8), "text": 3, "heads": 1}
    work, tile = Work(kernel, "float16", 64), Tile(32, 16, 2, 2)
    assert gpu_tune.run_trial(work, tile, measure=measure, **arguments) == 0.5 * len(measured)
    # and of a kernel that leaves the text to launches of their own, with this tile, these
    assert {one.kernel.__name__ for one in measured} == {*KERNELS[kernel].functions} - {"pair_lists"}
    one = measured[0]
    assert one.kernel.__name__ == KERNELS[kernel].functions[0]
    assert {one.constants[name] for name in ("BQ", "BK") if name in one.constants} == {32, 16}
    assert (one.warps, one.constants["STAGES"]) == (2, 2)
    assert gpu_tune.run_trial(work, tile, measure=lambda one: "does not compile", **arguments) == "does not compile"


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available(), reason="a stand-in for a card")
def test_another_kernel_that_does_not_fit_does_not_end_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[launch.Launch] = []
    execute = launch.execute

    def small_card(one: launch.Launch) -> None:
        if one.kernel.__name__ == "gradient_columns" and one.constants["BQ"] + one.constants["BK"] > 48:
            raise OutOfResources(300_000, 232_448, "shared memory")
        execute(one)

    monkeypatch.setattr(launch, "execute", small_card)
    monkeypatch.setitem(KERNELS, "dense", gpu_candidates.Kernel(("dense_rows",), ("clear",)))
    arguments: dict[str, Any] = {"machine": Machine("sm_90", 4), "device": CPU, "grid": (1, 4, 8), "text": 3, "heads": 1}

    def measure(one: launch.Launch) -> float:
        measured.append(one)
        execute(one)
        return 0.5

    assert gpu_tune.run_trial(Work("dense", "float16", 64), Tile(32, 16, 2, 2), measure=measure, **arguments) == 0.5
    assert len(measured) > 1  # began anew, and counted one pass
    assert {(one.constants["BQ"], one.constants["BK"]) for one in measured} == {(32, 16)}


class Compiled:
    """A kernel as Triton shows it: started on a grid it gives what was compiled, or fails."""

    def __init__(self, spills: int = 0, error: Exception | None = None) -> None:
        self.n_spills, self.error = spills, error

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return self.start

    def start(self, num_warps: int) -> "Compiled":
        if self.error is not None:
            raise self.error
        return self


def test_a_kernel_that_does_not_compile_is_not_timed_and_one_that_spills_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it spills is seen in its time alone."""
    monkeypatch.setattr(timing, "do_bench", lambda function, return_mode: {"median": 250.0}[return_mode])
    for spills in (0, 3):
        assert timing.seconds(launch.Launch(Compiled(spills), (1,), {}, 4)) == 0.25
    monkeypatch.setattr(timing, "do_bench", lambda *_, **__: pytest.fail("timed"))
    for error in (OutOfResources(300_000, 232_448, "shared memory"), PTXASError("a\nb"), RuntimeError("no pass")):
        assert str(timing.seconds(launch.Launch(Compiled(error=error), (1,), {}, 4))).startswith("does not compile: ")


# The file


def entry(**change: Any) -> tuned.Entry:
    return tuned.Entry(**{**HERE._asdict(), "kernel": "rows", "dtype": "bfloat16", "head_dim": 64, "queries": 32, "keys": 64, "warps": 8,
                          "stages": 3, **change})  # fmt: skip


def test_only_the_same_gpu_driver_triton_and_kernels_read_a_tile(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(json.dumps(tuned.merged([], [entry(), entry(device="NVIDIA A100", warps=4)], HERE, set())))
    assert tuned.tiles_of(HERE) == {("rows", "bfloat16", 64): Tile(32, 64, 8, 3)}
    for name in HERE._fields:
        assert tuned.tiles_of(HERE._replace(**{name: "another"})) == {}


def test_tuning_other_kernels_keeps_what_was_tuned_for_these() -> None:
    """Two environments with two versions of the package share one file."""
    newer = HERE._replace(source="fedcba9876543210")
    content = tuned.merged([entry()], [entry(source=newer.source, warps=4)], newer, {ROWS_KEY})
    assert [(row["source"], row["warps"]) for row in content["tiles"]] == [(HERE.source, 8), (newer.source, 4)]


def test_the_hash_changes_with_any_source_of_the_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(tuned.source_hash()) == 16
    for file in Path(tuned.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(tuned, "__file__", str(tmp_path / "tuned.py"))
    assert tuned.source_hash.__wrapped__() == tuned.source_hash()
    (tmp_path / "forward.py").write_text("# another\n")
    assert tuned.source_hash.__wrapped__() != tuned.source_hash()


DRIVERS = {
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\nGCC version:  12.2.0\n": "550.54.15",
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@host)\n": "580.65.06",
    "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  575.57  Release Build\n": "575.57",
    "": "none",
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a driver answers here")
@pytest.mark.parametrize(("text", "version"), DRIVERS.items(), ids=DRIVERS.values())
def test_the_drivers_version_is_read_from_its_kernel_module(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "NVIDIA", tmp_path / "version")
    (tmp_path / "version").write_text(text)
    assert driver.version.__wrapped__() == version


def test_tiles_of_an_older_format_are_not_used_and_make_no_noise(cache: Path) -> None:
    """They don't say which kernels they were timed with."""
    cache.parent.mkdir()
    cache.write_text(json.dumps({"format": 1, "tiles": [{"device": HERE.device, "kernel": "rows"}]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.tiles_of(HERE) == {}


def test_tuning_again_replaces_what_was_tuned_and_nothing_else() -> None:
    old = [entry(), entry(kernel="dense"), entry(device="NVIDIA A100")]
    content = tuned.merged(old, [entry(kernel="merge")], HERE, {("rows", "bfloat16", 64), ("merge", "bfloat16", 64)})
    assert [(row["device"], row["kernel"]) for row in content["tiles"]] == [
        ("NVIDIA H100", "dense"), ("NVIDIA A100", "rows"), ("NVIDIA H100", "merge")
    ]  # fmt: skip


def test_without_a_file_there_is_nothing(cache: Path) -> None:
    assert tuned.cache_file() == cache
    assert tuned.tiles_of(HERE) == {}


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.cache_file() == tmp_path / ".cache" / "dit_accel" / "tiles.json"


DAMAGED = {
    "no-json": ("{", "got Expecting property name"),
    "no-text": (b"\xff\xfe\xfa", "got 'utf-8' codec"),
    "another-format": ('{"format": 3, "tiles": []}', "an object of format 2"),
    "a-list": ("[]", "an object of format 2"),
    "a-field-missing": ('{"format": 2, "tiles": [{"kernel": "rows"}]}', "a tile has the fields device"),
    "a-word-for-a-number": (json.dumps({"format": 2, "tiles": [{**vars(entry()), "warps": "8"}]}), "a tile has the fields device"),
    "an-unknown-kernel": (json.dumps({"format": 2, "tiles": [{**vars(entry()), "kernel": "row"}]}), "a kernel is one of .* got 'row'"),
    "an-odd-tile": (json.dumps({"format": 2, "tiles": [{**vars(entry()), "queries": 48}]}), "a tile has sides of"),
}


@pytest.mark.parametrize(("content", "says"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_left_out_with_a_reason(cache: Path, content: str | bytes, says: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match=f"tuned tiles are left out: .*{says}"):
        assert tuned.tiles_of(HERE) == {}


def test_the_command_writes_what_launches_read(
    cache: Path, nothing_ahead: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_tune, "_device", lambda: CPU)
    monkeypatch.setattr(calls, "gpu_of", lambda device: HERE)
    own, fast = gpu_tune.candidates(ROWS, calls.INTERPRETED)[:2]
    monkeypatch.setattr(gpu_tune, "run_trial", lambda work, tile, **_: 1.0 if tile == fast else 2.0)
    gpu_tune.bench_tune([ROWS], out=tmp_path / "out.json")
    assert tuned.tiles_of(HERE) == {ROWS_KEY: fast}
    assert [path.name for path in cache.parent.iterdir()] == ["tiles.json"]
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert Tile(**row["chosen"]) == fast
    assert Tile(**row["table"]) == own

    def interrupted(work: Work, tile: Tile, **_: Any) -> float:
        if work.kernel == "dense":
            raise KeyboardInterrupt
        return 2.0 - (tile == own)

    monkeypatch.setattr(gpu_tune, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_tune.bench_tune([ROWS, Work("dense", "bfloat16", 64)])
    assert tuned.tiles_of(HERE) == {}  # the table's tile is the fastest now, and that is kept
    cache.write_text("{")
    with pytest.raises(ValueError, match="is a JSON file of tiles"):
        gpu_tune.bench_tune([ROWS])
    assert cache.read_text() == "{"
    assert nothing_ahead == [("a target", 1), ("a target", 2)]


ROWS_KEY = ("rows", "bfloat16", 64)


def test_a_folder_that_cannot_be_written_to_is_refused_before_any_work(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_tune, "_device", lambda: CPU)
    monkeypatch.setattr(gpu_tune, "run_trial", lambda *_, **__: pytest.fail("worked"))
    cache.parent.write_text("a file")
    with pytest.raises(ValueError, match="can't be written to"):
        gpu_tune.bench_tune([ROWS])
    assert stat.S_ISREG(cache.parent.stat().st_mode)


def test_a_cuda_device_reads_its_tiles(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"triton": calls.triton.__version__, "driver": driver.version(), "source": tuned.source_hash()}
    cache.parent.mkdir()
    cache.write_text(json.dumps(tuned.merged([], [entry(**versions)], HERE, set())))
    properties = type("Properties", (), {"name": HERE.device, "major": 9, "minor": 0, "multi_processor_count": 132, "gcnArchName": ""})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    machine = calls.machine_of.__wrapped__(torch.device("cuda"))
    assert machine == Machine("sm_90", 132, {ROWS_KEY: Tile(32, 64, 8, 3)})


@pytest.mark.parametrize(
    ("interpreted", "triton", "says"),
    [
        (True, True, "TRITON_INTERPRET=1 interprets its kernels: unset it"),
        (False, True, "a CUDA device, and there is none"),
        (False, False, "triton, which is not"),
    ],
)
def test_a_machine_without_a_gpu_is_refused(interpreted: bool, triton: bool, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", interpreted)
    monkeypatch.setattr(dispatch, "TRITON", triton)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match=says):
        gpu_tune.bench_tune([ROWS])


# What a tile changes


@pytest.mark.gpu
@pytest.mark.parametrize(
    "spec", [replace(Fovea(0.3, tile=(4, 8)), keep=(TopK(0.3, correct_short=True),)), SLA(0.3, block=(32, 32))], ids=str
)
def test_a_tuned_tile_changes_nothing_beyond_rounding(spec: Any) -> None:
    shape = Shape(1, 1, 16, (1, 8, 11), 5)
    tiles = {(kernel, "float32", 16): Tile(16, 32, 2, 2) for kernel in KERNELS}
    default, own = Machine("sm_90", 4), Machine("sm_90", 4, tiles)
    seen: dict[str, set[int]] = {"default": set(), "own": set()}

    def compute(name: str, machine: Machine) -> tuple[Tensor, Tensor]:
        def execute(one: launch.Launch) -> None:
            if one.kernel.__name__ not in ("multiply", "choose_by_means", "sum_states"):  # have one tile
                seen[name].add(one.warps)
            launch.execute(one)

        call = attention_by("triton", spec, shape.layout)
        with calls.redirected(machine, execute), torch.autograd.set_multithreading_enabled(False):
            out, _ = call(shape.inputs(), random_parameters(spec, shape))
            return out.detach(), flat(gradients(call, spec, shape, torch.float32))

    results = {"default": compute("default", default), "own": compute("own", own)}
    exact, eager = (
        (
            oracle(*shape.inputs(), spec, shape.layout, random_parameters(spec, shape), dtype=d)[0].detach(),
            flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, shape.layout, p, dtype=d), spec, shape, d)),
        )
        for d in (torch.float64, torch.float32)
    )
    for found in results.values():
        for got, *wanted in zip(found, exact, eager, strict=True):
            assert_close_as_eager(got, *wanted)
    assert seen["own"] - {1} == {2}
    assert seen["default"] - {1, 2}
