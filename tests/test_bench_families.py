"""What measuring and recording ask of a model, in every family: one step is timed, its attention is compared, its arguments are kept."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import SPARSE, Tiny, every_family

import dit_accel
from dit_accel.errors import DistillationError
from dit_accel.finetune.data import record
from dit_accel.finetune.data.collect import Recorder, collect
from dit_accel.finetune.data.record import Forward, Key, check_arguments
from dit_accel.measure import step as bench_step
from dit_accel.measure.capture import record_step
from dit_accel.measure.evaluation import attention_deviations
from dit_accel.measure.step import image_tokens, step_times
from dit_accel.patch.anatomy import forward_names

UNKEPT = {"glm_image_pipeline"}  # their arguments can't be written


@every_family
def test_a_step_is_measured_and_recorded(name: str, tmp_path: Path) -> None:
    tiny = Tiny(name)
    model = tiny.transformers[0]
    with Recorder(model, forward_names(model), to_write=name not in UNKEPT) as recorder:
        tiny.run()
    arguments, prediction = recorder.forwards[0]
    (row,) = step_times(tiny.pipe, arguments, [SPARSE["clear"]], 1)
    assert 0 < row["original_attention"] < row["original"]
    assert 0 < row["accelerated_share"] < 1
    dit_accel.accelerate(tiny.pipe, SPARSE["clear"])
    found = attention_deviations(model, [Forward(arguments, prediction, prediction, "a cat", 0, 0)])
    assert len(found) > 0
    for calls in found.values():
        assert all(0 < float(call.mass.mean()) <= 1 + 1e-5 and float(call.size.min()) > 0 for call in calls)
        assert all(bool(call.error.isfinite().all()) for call in calls)
    assert image_tokens(model, arguments) == tiny.context().last.image
    if name not in UNKEPT:
        path = record.write(tmp_path, Key("a cat", 0), "", recorder.forwards[:1], prediction)
        with record.opened(path, "") as run:
            assert torch.equal(run.read(0).prediction, prediction)


def test_a_step_of_two_experts_is_recorded_where_it_runs() -> None:
    tiny = Tiny("wan22_two_experts")
    seen: dict[str, Any] = {}

    class Prompted:
        """The pipeline with its prompt's embeddings put in, as tiny ones have no text encoder."""

        components = tiny.pipe.components

        def __call__(self, prompt: str, generator: torch.Generator, **call: Any) -> Any:
            seen.update(call)
            return tiny.pipe(**{**tiny.call, "generator": generator, **call})

    arguments = record_step(Prompted(), (32, 32))
    assert seen["num_inference_steps"] == 1
    assert image_tokens(tiny.transformers[0], arguments) > 0


def test_a_large_step_is_measured_once_whatever_holds_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latents as `[B, C, T, H, W]` have few entries in the dimension in which others have their tokens."""
    tiny = Tiny("wan")
    (model,) = tiny.transformers
    with Recorder(model, forward_names(model)) as recorder:
        tiny.run()
    calls = []
    monkeypatch.setattr(bench_step, "_step", lambda *_: calls.append(1) or (1.0, [0.5]))
    for large, count in ((image_tokens(model, recorder.arguments), 3), (1 << 20, 6)):
        calls.clear()
        monkeypatch.setattr(bench_step, "LARGE", large)
        step_times(tiny.pipe, recorder.arguments, [SPARSE["clear"]], 2)
        assert len(calls) == count


def test_arguments_that_no_file_holds_are_refused_before_the_first_forward(tmp_path: Path) -> None:
    tiny = Tiny("glm_image_pipeline")
    (model,) = tiny.transformers
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("the model ran first"))

    class Prompted(type(tiny.pipe)):  # type: ignore[misc]
        def __call__(self, prompt: str, **call: Any) -> Any:
            return super().__call__(**{**tiny.call, **call})

    tiny.pipe.__class__ = Prompted
    with pytest.raises(DistillationError, match="the denoiser's argument kv_caches contains a GlmImageKVCache, which samples can't keep"):
        collect(tiny.pipe, ["a cat"], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_nested_arguments_are_looked_into() -> None:
    check_arguments({"a": [1, (2.0, None)], "b": {"c": torch.ones(1), "d": "x"}})
    with pytest.raises(DistillationError, match="argument b contains a set"):
        check_arguments({"a": 1, "b": {"c": [{1}]}})
