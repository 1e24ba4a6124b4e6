"""Finished stages on disk: the same call continues to the same bits, another is refused, damage is named; and the forecast before."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hires_fixtures import TEXT, Forwards, draw, make, same
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel import CLEAR, Assignment, Rule, accelerate, builtin_pipeline, restore
from dit_accel.errors import StageError
from dit_accel.operator.cost import multiply_adds
from dit_accel.pipelines import hires
from dit_accel.pipelines.hires import forecast, latents, memory

# Stopping and resuming


def test_the_same_arguments_draw_the_same_picture() -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    torch.manual_seed(1)
    first = draw(pipe, call)
    torch.manual_seed(2)
    assert same(draw(pipe, call), first)
    assert not same(draw(pipe, call, seed=1), first)
    assert not same(draw(pipe, call, strength=0.3), first)


def test_a_stopped_picture_continues_to_the_same_bits(tmp_path: Path) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    asked = {"base": 12, "folder": tmp_path / "stages", "strength": 0.75}  # three stages of 4, 3 and 3 steps
    expected = draw(pipe, call, **{**asked, "folder": None})
    seen = Forwards(pipe)
    seen.fail_at = 5  # in the second stage
    with pytest.raises(KeyboardInterrupt):
        draw(pipe, call, **asked)
    assert sorted(file.name for file in (tmp_path / "stages").iterdir()) == [
        "settings.json",
        "stage-0-12x8.json",
        "stage-0-12x8.safetensors",
    ]
    assert pipe.transformer.pos_embed.theta == 10000
    again, call = make()  # another process
    accelerate(again, CLEAR(3.0))
    seen = Forwards(again)
    assert same(draw(again, call, **asked), expected)
    assert len(seen.tokens) == 6
    seen.tokens.clear()
    assert same(draw(again, call, **asked), expected)  # all of it is there
    assert seen.tokens == []


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    kept = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    seen = Forwards(pipe)
    for changed, words in [
        ({"strength": 0.6}, "strength was 0.7, is 0.6"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"ntk": 2.0}, "ntk was 10.0, is 2.0"),
        ({"guidance_scale": 5.0}, "call was"),
        ({"prompt_embeds": call["prompt_embeds"] + 1}, "call was"),
    ]:
        with pytest.raises(StageError, match="other settings") as error:
            draw(pipe, {**call, **changed}, folder=tmp_path)
        assert words in str(error.value)
        assert str(error.value).count(" was ") == 1
    accelerate(pipe, CLEAR(3.0))
    with pytest.raises(StageError, match="method was None, is"):
        draw(pipe, call, folder=tmp_path)
    restore(pipe)
    pipe.transformer.proj_out.weight.data[0, 0] += 1
    with pytest.raises(StageError, match=r"weights was '[0-9a-f]+', is"):
        draw(pipe, call, folder=tmp_path)
    assert seen.tokens == []
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("damage", ["cut", "bit", "missing", "record", "settings"])
def test_a_damaged_stage_is_named(damage: str, tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    file = tmp_path / {"record": "stage-1-48x32.json", "settings": "settings.json"}.get(damage, "stage-1-48x32.safetensors")
    data = bytearray(file.read_bytes())
    if damage == "bit":
        data[-1] ^= 1
    file.write_bytes(data if damage == "bit" else data[: len(data) // 2])
    if damage == "missing":
        file.unlink()
    seen = Forwards(pipe)
    with pytest.raises(StageError, match=file.name):
        draw(pipe, call, folder=tmp_path)
    assert seen.tokens == []


def test_stages_without_their_settings_are_refused(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(StageError, match=r"settings.json is missing, but \['stage-0"):
        draw(pipe, call, folder=tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pipe, call = make()
    pipe.encode_prompt = lambda **_: pytest.fail("the text was encoded before the folder was checked")
    with pytest.raises(ValueError, match="can't be written to"):
        draw(pipe, call, folder=tmp_path / "file")


def test_weights_that_are_offloaded_cannot_be_compared(tmp_path: Path) -> None:
    pipe, call = make()
    pipe.vae.decoder.conv_out.to("meta")
    with pytest.raises(ValueError, match="requires weights that can be read, but AutoencoderKL is offloaded: leave the folder out"):
        draw(pipe, call, folder=tmp_path)


def test_settings_are_readable_json(tmp_path: Path) -> None:
    pipe, call = make()
    draw(pipe, call, folder=tmp_path, strength=0.5)
    settings = json.loads((tmp_path / "settings.json").read_text())
    assert (settings["height"], settings["width"], settings["strength"], settings["version"]) == (32, 48, 0.5, hires.VERSION)
    record = json.loads((tmp_path / "stage-1-48x32.json").read_text())
    assert (record["height"], record["width"], record["steps"], record["sigma"], record["seed"]) == (32, 48, 2, 0.5, 1)


# The forecast


def test_the_forecast_names_what_is_to_come(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pipe, call = make()
    accelerate(pipe, CLEAR(3.0))
    seen = Forwards(pipe)
    draw(pipe, call, forecast=True, strength=0.5, folder=tmp_path)
    text = capsys.readouterr().out
    assert "Forecast, not a measurement" in text
    assert "24×16" in text
    assert "48×32" in text
    assert f"method: {CLEAR(3.0)}" in text
    assert seen.tokens == [24, 24] + [24] * 4 + [96] * 2  # two forwards, then the stages
    (tmp_path / "stage-1-48x32.json").unlink()
    draw(pipe, call, forecast=True, strength=0.5, folder=tmp_path)
    rows = [line for line in capsys.readouterr().out.splitlines() if "×" in line and "│" in line]
    assert len(rows) == 1
    assert "48×32" in rows[0]


def test_after_the_forecast_an_offloaded_transformer_has_left_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, call = make()
    events: list[str] = []
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", lambda: events.append("freed"))
    timed = forecast.timed_forward
    monkeypatch.setattr(forecast, "timed_forward", lambda *args: events.append("timed") or timed(*args))
    pipe.transformer.register_forward_pre_hook(lambda *_: events.append("forward"))
    draw(pipe, call, forecast=True)
    assert events[events.index("timed") :][:4] == ["timed", "forward", "forward", "freed"]


def test_forecast_counts_what_torch_counts() -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    pipe, call = make()
    shape = forecast.Shape.of(pipe.transformer, 4, TEXT)

    def first(size: tuple[int, int]) -> tuple[Any, Any]:
        return latents.first_forward(pipe, pipe.transformer, {**call, "height": size[0], "width": size[1], "num_inference_steps": 1})

    timed = forecast.timed_forward(pipe.transformer, *first((16, 24)))
    counts = []
    for size in ((16, 24), (32, 48)):
        args, kwargs = first(size)
        # torch counts no fused attention on a CPU
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            pipe.transformer(*args, **kwargs)
        counts.append(counter.get_total_flops())
    expected = counts[1] / counts[0]
    assert forecast.forward_seconds(timed, shape, (16, 24), (32, 48), None) / timed.seconds == pytest.approx(expected, rel=1e-6)
    # half of the heads of one layer of four keep the original attention, and all in the first forward
    rules = (Rule(CLEAR(2.0)), Rule(None, heads=(0,), layers="single_*.1.attn"), Rule(None, steps=(0, 1)))
    first_step, later = forecast.Stage((128, 128), (1.0, 0.5), Assignment(rules)).rules(1024)
    at = (None, Assignment.of(CLEAR(2.0)).at(None, 1024), later, first_step)
    original, method, mixed, begun = (forecast.forward_seconds(timed, shape, (16, 24), (128, 128), chosen) for chosen in at)
    share = multiply_adds(CLEAR(2.0), shape.layout((128, 128)), 16)
    saved = (1 - share) * 2 * 1024**2 * 32 * 4 / (counts[0] / 2)
    assert (original - method) / timed.seconds == pytest.approx(saved, rel=1e-6)
    assert 0 < share < 1
    assert (original - mixed) / (original - method) == pytest.approx(7 / 8)
    assert begun == original


def test_memory_grows_with_the_picture_and_shrinks_with_tiles() -> None:
    pipe, _ = make()
    transformer = pipe.transformer
    small, large, tiled = (
        memory.memory_bytes(pipe, transformer, 32, side**2 // 16, (side, side), tile) for side, tile in ((32, None), (64, None), (64, 32))
    )
    assert large["denoising"] == 4 * small["denoising"] == 4 * memory.LIVE * 64 * 32 * 4
    assert large["autoencoder"] == pytest.approx(4 * small["autoencoder"], rel=0.05)
    assert tiled["autoencoder"] == small["autoencoder"] + 64 * 64 * 24
    expected = sum(p.numel() * 4 for part in (pipe.transformer, pipe.vae) for p in part.parameters())
    assert small["weights"] == large["weights"] == expected


def test_peak_counts_what_lives_together() -> None:
    def run() -> None:
        x = torch.empty(1000)
        y = x * 2  # two of 4,000 bytes live
        x = y.view(10, 100).add_(1)  # a view and an addition in place add none; the first is freed
        z = x[:5].clone()  # 2,000 more
        del x, y
        torch.cat([z, z])  # and 4,000 in addition to the 2,000

    assert memory.peak_bytes(run, FakeTensorMode()) == 8000


def test_an_autoencoders_peak_is_its_widest_layer() -> None:
    """The built-in decoder's widest: a block's input, its hidden layer and the next at half the picture's resolution, 32 channels."""
    pipe = builtin_pipeline()
    found = memory.autoencoder_bytes(pipe, (256, 256))
    assert 2.5 < found / (4 * 32 * 128 * 128) < 5
    assert memory.autoencoder_bytes(pipe, (512, 512)) == pytest.approx(4 * found, rel=0.01)


def test_a_forecast_leaves_an_offloaded_autoencoders_weights() -> None:
    """The hooks of offloading move weights at each call of the autoencoder; here to another type, as there is no other device."""
    pipe, _ = make()
    moves = SimpleNamespace(pre_forward=lambda module, *args: module.to(torch.float64))
    pipe.vae._hf_hook = moves
    before, numbers = {name: p.clone() for name, p in pipe.vae.state_dict().items()}, torch.get_rng_state()
    memory.autoencoder_bytes(pipe, (32, 32))
    assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(p, before[name]) for name, p in pipe.vae.state_dict().items())
