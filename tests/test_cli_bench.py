"""What the commands that measure give to the functions behind them."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import fail, succeed

from dit_accel import CLEAR, GNA
from dit_accel.cli import models
from dit_accel.cli.quality import BENCH_PROMPTS


def test_demo_and_bench_are_thin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.measure import demo, gpu_tune, kernels
    from dit_accel.measure import quality as bench
    from dit_accel.measure import step as bench_step

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a panda\n\n a cat on a blue background \n")
    calls: list[dict[str, Any]] = []

    def run_demo(out: Path, **settings: Any) -> Path:
        calls.append({"out": out, **settings})
        return out / "report.html"

    monkeypatch.setattr(demo, "run_demo", run_demo)
    monkeypatch.setattr(bench, "bench_quality", lambda pipe, **settings: calls.append(settings))
    monkeypatch.setattr(bench_step, "bench_step", lambda pipe, **settings: calls.append(settings))
    monkeypatch.setattr(kernels, "bench_kernels", lambda **settings: calls.append(settings))
    monkeypatch.setattr(gpu_tune, "bench_tune", lambda work, **settings: calls.append({"kernels": len(work), **settings}))
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: None)
    assert "report.html" in succeed("demo", "--out", tmp_path / "demo", "--quick", "--seed", 3)
    succeed("bench", "quality", "--size", "64x32", "--prompts", prompts, "--steps", 4, "--out", tmp_path / "q.json")
    (tmp_path / "spec.json").write_text(json.dumps(GNA(3).to_dict()))
    succeed("bench", "quality", "--size", "64x32", "--method", "clear:3", "--method", tmp_path / "spec.json", "--levels", 2)
    succeed("bench", "step", "--size", "64x32", "--size", "32x32", "--method", "clear:3", "--model", "other", "--repeats", 2)
    succeed("bench", "kernels", "--repeats", 3, "--largest", 4096, "--out", tmp_path / "k.json")
    succeed("bench", "kernels", "--tune", "--dtype", "float16", "--head-dim", 64, "--out", tmp_path / "t.json")
    shown = ["a panda", "a cat on a blue background"]
    assert calls == [
        {"out": tmp_path / "demo", "quick": True, "seed": 3},
        {"size": (32, 64), "prompts": shown, "steps": 4, "out": tmp_path / "q.json", "max_sequence_length": 32, "levels": 3, "specs": None},
        {
            "size": (32, 64),
            "prompts": BENCH_PROMPTS,
            "steps": 8,
            "levels": 2,
            "out": None,
            "max_sequence_length": 32,
            "specs": {"clear:3": CLEAR(3), str(tmp_path / "spec.json"): GNA(3)},
        },
        {"sizes": [(32, 64), (32, 32)], "methods": [CLEAR(3)], "repeats": 2, "out": None, "max_sequence_length": None},
        {"repeats": 3, "largest": 4096, "out": tmp_path / "k.json"},
        {"kernels": len(gpu_tune.KERNELS), "out": tmp_path / "t.json"},
    ]


@pytest.mark.parametrize("command", ["quality", "logits"])
def test_more_levels_than_steps_are_refused_before_a_model_is_loaded(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: pytest.fail("a model was loaded"))
    message = "--steps must be more than the 4 noise levels that are looked at, not 4"
    assert message in fail("bench", command, "--steps", 4, "--levels", 4)
