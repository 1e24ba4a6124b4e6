"""The measurements: captured queries, errors against dense attention, multiply-adds, alternating times, and the demo's report."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import dit_accel.measure.demo as demo
from dit_accel.clock import timed
from dit_accel.errors import BackendError, NotAcceleratedError
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.velocity import predict
from dit_accel.kernels.triton import driver
from dit_accel.measure import kernels, timing
from dit_accel.measure import rivals as bench_rivals
from dit_accel.measure.capture import attention_errors, capture_qkv, record_step
from dit_accel.measure.quality import bench_quality, rounding_errors, spread
from dit_accel.measure.step import bench_step, step_times
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec, TopK
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.cost import kept_density, multiply_adds, visited_density
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.anatomy import find_transformers
from dit_accel.patch.state import patches_of
from dit_accel.pipelines.builtin import builtin_pipeline
from dit_accel.pipelines.builtin.drawings import held_out

CALL = {"height": 256, "width": 256, "num_inference_steps": 3, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def pipe() -> object:
    loaded = builtin_pipeline()
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.fixture(scope="module")
def samples(pipe: object, tmp_path_factory: pytest.TempPathFactory) -> Samples:
    return collect(pipe, ["a panda", "a cat"], tmp_path_factory.mktemp("samples"), **CALL)


def test_capture_sees_every_layer_and_leaves_nothing(pipe: object, samples: Samples) -> None:
    captured = list(capture_qkv(pipe, samples[1]))
    (transformer,) = find_transformers(pipe)
    assert len(captured) == 6
    assert captured[0].query.shape == (1, 4, 16 * 16 + 8, 64)
    assert not any("dit_accel" in name for name, _ in transformer.named_modules())


def test_errors_are_zero_where_all_is_kept_and_grow_with_what_is_left_out(pipe: object, samples: Samples) -> None:
    captured = next(iter(capture_qkv(pipe, samples[1])))
    specs = {"all": Fovea(1.0), "fovea": Fovea(0.25), "disc": CLEAR(2)}
    errors = attention_errors(captured, specs)
    assert errors["all"][0] < 1e-5
    assert errors["all"][1] == pytest.approx(1.0, abs=1e-5)
    assert 1e-5 < errors["fovea"][0] < errors["disc"][0]
    assert 0 < errors["disc"][1] < 1


def test_spread_takes_levels_of_every_run_without_the_first_step(samples: Samples) -> None:
    assert [(f.prompt, f.index) for f in spread(samples, 2)] == [("a panda", 1), ("a panda", 2), ("a cat", 1), ("a cat", 2)]


@pytest.mark.parametrize(
    ("spec", "share"),
    [
        (AttentionSpec((TopK(1.0),)), 1.0 + 1 / 2 / 64**2),
        (Fovea(0.05), 3 / 64 + 1.5 / 64 + 65 / 64 / 2 / 64**2),
        (SLA(0.05, scope="all"), 3 / 64 + 64 / 4096 + 1 / 2 / 64**2),
        (CLEAR(8, downsample=4), 484 / 64**2 + 1 / 16),
    ],
    ids=["dense", "fovea", "sla-all", "clear-down"],
)
def test_multiply_adds(spec: AttentionSpec, share: float) -> None:
    assert multiply_adds(spec, TokenLayout((1, 64, 64)), 64) == pytest.approx(share)


def test_visited_is_the_published_share_of_tiles() -> None:
    """11.8 %, 3.2 %: tiles of 8×8 that a disc of radius 8 touches, on grids of 64 and 128."""
    assert visited_density(CLEAR(8), TokenLayout((1, 64, 64))) == pytest.approx(0.118, abs=5e-4)
    assert visited_density(CLEAR(8), TokenLayout((1, 128, 128))) == pytest.approx(0.032, abs=5e-4)
    assert kept_density(CLEAR(8), TokenLayout((1, 128, 128))) == pytest.approx(183 / 16384, rel=5e-3)


def test_the_original_and_all_methods_take_turns(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    order, times = [], iter(range(1, 100))

    def step(transformer: object, names: list[str], arguments: object) -> tuple[float, list[float]]:
        assert len(names) == 6
        order.append(str(patch[0][1].context.assignment) if (patch := accelerated(pipe)) else "original")
        return float(next(times)), [0.25, 0.5]

    monkeypatch.setattr("dit_accel.measure.step._step", step)
    methods = [CLEAR(2), Fovea(0.5)]
    rows = step_times(pipe, record_step(pipe, (64, 96), 8), methods, 3)
    assert order == [*map(str, methods), "original", *(["original", *map(str, methods)] * 3)]
    assert [(row["original"], row["accelerated"]) for row in rows] == [(7.0, 8.0), (7.0, 9.0)]  # the medians of 4, 7, 10 and so on
    assert (rows[0]["original_attention"], rows[0]["accelerated_share"]) == (0.375, 0.75 / 8)


def accelerated(pipe: object) -> list[Any]:
    """The patches of a pipeline, none where it is the original."""
    try:
        return patches_of(pipe)
    except NotAcceleratedError:
        return []


def test_record_step_computes_nothing(pipe: object) -> None:
    arguments = record_step(pipe, (64, 96), 8)
    assert arguments["hidden_states"].shape == (1, 24, 32)
    assert arguments["encoder_hidden_states"].shape[1] == 8


def test_benchmarks_write_what_they_print(pipe: object, tmp_path: Path) -> None:
    table = bench_quality(
        pipe, size=(64, 96), prompts=["a cat"], steps=3, levels=2, out=tmp_path / "q.json", max_sequence_length=8, specs={"f": Fovea(0.5)}
    )
    assert 0 < table["f"]["attention_error"] < 1
    assert 0 < table["f"]["velocity_error"] < 1
    record = json.loads((tmp_path / "q.json").read_text())
    assert record["presets"] == table
    assert table["f"]["attention_error"] <= table["f"]["worst_layer"]
    assert table["f"]["velocity_error"] <= table["f"]["worst_forward"]
    assert 0 < record["bfloat16"]["velocity_error"] < 0.1
    rows = bench_step(pipe, sizes=[(64, 96)], methods=[Fovea(0.5)], repeats=1, out=tmp_path / "s.json", max_sequence_length=8)
    assert rows[0]["original"] > 0
    assert (tmp_path / "q.json").exists()
    assert (tmp_path / "s.json").exists()


def test_rounding_leaves_the_weights_as_they_were(pipe: Any, samples: Samples) -> None:
    before = {name: x.clone() for name, x in pipe.transformer.state_dict().items()}
    given = [samples[0], samples[1]]
    first, again = rounding_errors(pipe, given), rounding_errors(pipe, given)
    assert first == again
    assert all(torch.equal(x, before[name]) for name, x in pipe.transformer.state_dict().items())
    pipe.transformer.to(torch.bfloat16)
    try:
        vectors = ("hidden_states", "encoder_hidden_states", "pooled_projections", "img_ids", "txt_ids")
        rounded = [{name: x.bfloat16() if name in vectors else x for name, x in f.arguments.items()} for f in given]
        exact = torch.stack([predict(pipe.transformer, arguments).float() for arguments in rounded])
        assert rounding_errors(pipe, given) is None
    finally:
        pipe.transformer.to(torch.float32)
        pipe.transformer.load_state_dict(before)
    teacher = torch.stack([f.prediction for f in given])
    assert first == pytest.approx([((a - b).norm() / b.norm()).item() for a, b in zip(exact, teacher, strict=True)])


def test_the_mask_picture_shows_what_is_seen(pipe: object, samples: Samples, tmp_path: Path) -> None:
    from PIL import Image

    captured = next(iter(capture_qkv(pipe, samples[1])))
    demo.mask_picture(captured, CLEAR(2), tmp_path / "m.png")
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "m.png").convert("L").resize((16, 16), 0)))
    assert int((picture > 0).sum()) == 9  # the query and the 8 tokens around it


def test_the_demo_trains_on_none_of_the_prompts_it_shows() -> None:
    shown = [*demo.HELD_OUT, *demo.FULL.prompts, *demo.QUICK.prompts]
    prompts = demo.training_prompts(200, shown)
    assert len(set(prompts)) == 200
    assert not set(prompts) & set(shown)
    assert prompts[:60] == demo.training_prompts(60, shown)
    noun, colour = demo.HELD_OUT[0].removeprefix("a ").removesuffix(" background").split(" on a ")
    assert held_out(noun, colour), "the model's own training knew this pair"


def test_the_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = demo.Scale(192, 2, ("a panda",), 128, 2, 2, 2, 192, 1)
    monkeypatch.setattr(demo, "QUICK", small)
    monkeypatch.setattr(demo, "METHODS", {"CLEAR radius 2": CLEAR(2)})
    demo.run_demo(tmp_path / "out", quick=True)
    monkeypatch.setattr(demo, "QUICK", demo.Scale(192, 2, ("a panda",), 144, 2, 2, 2, 192, 1))  # another size into the same folder
    report = demo.run_demo(tmp_path / "out", quick=True, seed=1).read_text()
    assert report.count("data:image/jpeg;base64,") == 2 * 2 + 2
    assert "http" not in report.replace("http-equiv", "")
    assert (tmp_path / "out" / "clear-radius-2-distilled-0.png").exists()


def test_the_demo_refuses_a_folder_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="can't be written to"):
        demo.run_demo(tmp_path / "file" / "out")


def test_kernel_benchmarks_write_what_they_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [dataclasses.replace(case, side=case.side // 8) for case in kernels.CASES if case.side <= 128]
    monkeypatch.setattr(kernels, "CASES", small)
    monkeypatch.setattr(kernels, "SCALING", (CLEAR(3), (8, 16)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = kernels.bench_kernels(repeats=2, out=tmp_path / "k.json")
    assert json.loads((tmp_path / "k.json").read_text())["rows"] == result["rows"]
    assert {(row["method"], row["pass"]) for row in result["rows"]} == {
        (case.name, "forward + backward" if case.backward else "forward") for case in kernels.cases_on(device)
    }
    assert all(row["error"] < (1e-2 if row["dtype"] == "bfloat16" else 1e-5) for row in result["rows"])
    assert all(row["seconds"] > 0 and row["sdpa_seconds"] > 0 for row in result["rows"])
    assert result["growth"]["tokens"] == [64, 256]
    if device.type == "cpu":
        assert all(
            row["flex_seconds"] is row["natten_seconds"] is None and row["missing"].keys() == {"flex", "natten"} for row in result["rows"]
        )
        shown = " ".join(capsys.readouterr().out.split())
        assert "no FlexAttention where: FlexAttention is compiled on CUDA devices" in shown
        assert "no NATTEN where: NATTEN computes windows (GNA) alone" in shown


def test_rivals_take_their_turns_and_say_what_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    case = kernels.Case("clear", CLEAR(3), 16)
    runs = []

    def attention(q: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        runs.append(q.shape)
        return q

    def broken(*_: Any) -> Any:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(bench_rivals, "flex_refusal", lambda *_: None)
    monkeypatch.setattr(bench_rivals, "flex", lambda *_: attention)
    (row,) = kernels.measure([case], 3)
    assert runs == [(1, 4, 256, 64)] * 5  # once to compile, once with the others, and three times measured
    assert row["flex_seconds"] > 0
    assert row["missing"] == {"natten": "NATTEN computes windows (GNA) alone"}
    monkeypatch.setattr(bench_rivals, "flex", broken)
    (row,) = kernels.measure([case], 1)
    assert row["flex_seconds"] is None
    assert row["missing"]["flex"] == "failed: no kernel image"


def test_a_cpu_is_timed_by_its_clock_and_a_gpu_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dit_accel.kernels.triton import timing as gpu_timing

    card = torch.device("cuda")
    assert timing.clock_of(torch.device("cpu")) is timed
    given: list[object] = []
    monkeypatch.setattr(gpu_timing, "do_bench", lambda function, return_mode: given.append((function, return_mode)) or 250.0)
    assert timing.clock_of(card)(given.clear) == 0.25
    assert given == [(given.clear, "median")]
    monkeypatch.setattr(kernels.dispatch, "TRITON", False)
    with pytest.raises(BackendError, match="measuring on a GPU requires triton"):
        timing.clock_of(card)


def test_a_gpu_measures_in_bfloat16() -> None:
    cases = kernels.cases_on(torch.device("cuda"))
    assert {(case.dtype, case.heads, case.head_dim, case.device.type) for case in cases} == {(torch.bfloat16, 24, 128, "cuda")}
    assert len({(case.name, case.side, case.backward) for case in cases}) == len(cases)


def test_the_arithmetic_of_a_kept_whole_is_that_of_dense_attention() -> None:
    case = kernels.Case("all", SLA(1, scope="none"), 8, text=5)
    pairs = case.layout.tokens**2 + 1 / 2  # the selection's products of one block with one
    assert kernels.arithmetic(case) == pytest.approx(4 * kernels.HEADS * kernels.HEAD_DIM * pairs)


def test_a_measurement_names_the_card_it_was_made_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not {"gpu", "driver", "cuda"} & set(machine())
    card = SimpleNamespace(name="A Card", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)  # a build for the CPU has none
    monkeypatch.setattr(driver, "version", driver.version.__wrapped__)  # not what was read before
    monkeypatch.setattr(driver, "NVIDIA", tmp_path / "version")
    assert machine() | {"gpu": "A Card", "gpu_memory": 80.0, "cuda": "13.0", "driver": "CUDA 13.0"} == machine()
    driver.NVIDIA.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\nGCC version: 12\n")
    assert machine()["driver"] == "580.65.06"
    driver.NVIDIA.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n")
    assert machine()["driver"] == "580.65.06"
