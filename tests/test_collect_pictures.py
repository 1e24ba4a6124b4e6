"""A user's own pictures as training data: how they are read, what is recorded of them, that a distillation takes it, what is refused."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import numpy as np
import pytest
import tiny_image
import torch
from distill_fixtures import learn
from PIL import Image
from test_distill_processes import launch
from torch import Tensor
from typer.testing import CliRunner

from dit_accel import CLEAR, accelerate, builtin_pipeline
from dit_accel.cli import app as cli
from dit_accel.errors import DistillationError, UnsupportedModelError
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.data.pictures import collect_pictures, cropped, decoded, read_pictures
from dit_accel.finetune.flow import Flow
from dit_accel.finetune.velocity import predict, velocity_error
from dit_accel.pipelines import family_of
from dit_accel.pipelines.hires import latents as forms

CALL = tiny.CALL
FAMILIES = ["flux", "chroma", "ovis_image", "longcat_image", "z_image", "sd3", "auraflow", "lumina2", "hunyuan_image"]


def picture(seed: int, size: tuple[int, int] = (160, 120)) -> Image.Image:
    """Coloured rectangles, (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.NEAREST)


def fill(folder: Path, count: int = 3, first: int = 0) -> Path:
    """A folder of pictures, with captions next to them."""
    folder.mkdir(parents=True)
    for i in range(first, first + count):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture\n number {i} \n")
    return folder


def prompted(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline that takes a prompt and leaves it for the embeddings that it is made with, and the rest of its call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipe, call = getattr(tiny_image, name)()
    sizes = {key: call.pop(key) for key in ("height", "width", "num_inference_steps")}
    del call["output_type"]
    kind = type(pipe)

    @functools.wraps(kind.__call__)
    def call_with_embeddings(self: Any, prompt: str, **more: Any) -> Any:
        return kind.__call__(self, **{**call, **more})

    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": call_with_embeddings})
    pipe.set_progress_bar_config(disable=True)
    return pipe, sizes


# How pictures are read


def test_captions_stand_beside_the_pictures(tmp_path: Path) -> None:
    found = read_pictures(fill(tmp_path / "a"))
    assert [(p.path.name, p.caption) for p in found] == [(f"{i}.png", f"picture number {i}") for i in range(3)]
    assert len({p.digest for p in found}) == 3


def test_captions_stand_in_metadata(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    picture(0).save(tmp_path / "train" / "a.webp", lossless=True)
    picture(1).save(tmp_path / "b.JPG")
    rows = [{"file_name": "train/a.webp", "text": "one", "more": 3}, {"file_name": "b.JPG", "text": "two"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    assert [(p.path.name, p.caption) for p in read_pictures(tmp_path)] == [("b.JPG", "two"), ("a.webp", "one")]


def test_a_picture_covers_the_size_and_is_cropped_around_its_centre() -> None:
    values = np.zeros((40, 120, 3), dtype=np.uint8)
    values[:, 40:80] = (255, 0, 51)  # the middle third
    tensor = cropped(Image.fromarray(values), (80, 80))  # the square of 40, twice as large
    assert tensor.shape == (1, 3, 80, 80)
    inner = tensor[0, :, 8:-8, 8:-8]  # the filter reaches over the edge
    assert torch.allclose(inner, torch.tensor([1.0, -1.0, -0.6]).view(3, 1, 1).expand(3, 64, 64), atol=1e-6)


def test_a_picture_lies_as_its_camera_was_held(tmp_path: Path) -> None:
    upright, exif = picture(0), Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    upright.rotate(90, expand=True).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.array(decoded(tmp_path / "a.png")), np.array(upright))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK", "1"])
def test_every_mode_becomes_three_colours_on_white(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    if mode in ("RGBA", "LA", "P"):
        clear = Image.new("RGBA", (8, 8), (10, 20, 30, 0))
        clear.paste((0, 0, 0, 255), (0, 0, 4, 8))
        clear.convert(mode).save(path, **({"transparency": clear.convert("P").getpixel((7, 7))} if mode == "P" else {}))
    else:
        Image.new("RGB", (8, 8), "white").convert(mode).save(path)
    found = decoded(path)
    assert found.mode == "RGB"
    assert found.getpixel((7, 4)) == (255, 255, 255)
    if mode in ("RGBA", "LA"):
        assert found.getpixel((1, 4)) == (0, 0, 0)


# What is recorded


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_predicts_at_every_level_of_the_picture(tmp_path: Path, name: str) -> None:
    pipe, call = prompted(name)
    call["num_inference_steps"] = 3
    samples = collect_pictures(pipe, fill(tmp_path / "pictures", 2), tmp_path / "samples", seed=5, **call)
    sampled = collect(pipe, ["picture number 0"], tmp_path / "sampled", **call)
    assert len(samples) == 2 * len(sampled)
    family = family_of(pipe.transformer)
    assert family is not None
    whole = 1000.0 if name in ("sd3", "hunyuan_image") else 1.0
    flow = Flow(family.timestep, family.latents, whole, family.timestep_rises)
    for i in range(len(samples)):
        forward, other = samples[i], sampled[i % len(sampled)]
        image = cropped(picture(0 if i < len(sampled) else 1), (call["height"], call["width"]))
        x0 = forms.packed(pipe, forms.encode(pipe, image))
        assert torch.equal(forward.latents, x0)
        assert forward.latents.shape == other.latents.shape
        assert forward.latents.dtype == other.latents.dtype
        assert set(forward.arguments) == set(other.arguments)
        for key in set(forward.arguments) - {flow.latents}:
            assert same_value(forward.arguments[key], other.arguments[key]), key
        sigma, items = flow.sigma_of(forward.arguments), list(forward.arguments[flow.latents])
        assert len(items) == len(list(other.arguments[flow.latents]))
        noise = (items[0].reshape(x0.shape) - (1 - sigma) * x0) / sigma
        assert 0.8 < float(noise.std()) < 1.2
        assert all(torch.equal(item, items[0]) for item in items)
        with torch.no_grad():
            assert torch.equal(predict(pipe.transformer, forward.arguments), forward.prediction)
    levels = flow.levels(samples, 0)
    assert levels == flow.levels(sampled, 0)
    assert len(levels) == 4
    for run in samples.runs():  # guidance in two calls shows both the same
        seen = [next(iter(samples[position].arguments[flow.latents])) for position in run]
        assert len({item.numpy().tobytes() for item in seen}) == 3


def same_value(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(same_value(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


def test_an_accelerated_pipeline_records_its_original(tmp_path: Path) -> None:
    pictures, pipe = fill(tmp_path / "pictures", 1), tiny.picture_pipe()
    plain = collect_pictures(pipe, pictures, tmp_path / "plain", **CALL)
    ours = collect_pictures(accelerate(pipe, CLEAR(2.0)), pictures, tmp_path / "ours", **CALL)
    assert ours.teacher == plain.teacher
    assert all(torch.equal(ours[i].prediction, plain[i].prediction) for i in range(len(plain)))
    assert all(torch.equal(ours[i].arguments["hidden_states"], plain[i].arguments["hidden_states"]) for i in range(len(plain)))


def test_the_seed_is_the_noise(tmp_path: Path) -> None:
    pictures, pipe = fill(tmp_path / "pictures", 1), tiny.picture_pipe()
    first, again, other = (collect_pictures(pipe, pictures, tmp_path / str(i), seed=s, **CALL) for i, s in enumerate((3, 3, 4)))
    held = [samples[0].arguments["hidden_states"] for samples in (first, again, other)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])
    assert not torch.equal(first[0].arguments["hidden_states"], first[1].arguments["hidden_states"])


def test_what_is_there_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, pipe = fill(tmp_path / "pictures", 2), tiny.picture_pipe()
    first = collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)
    kept = [first[i].prediction for i in range(len(first))]
    picture(7).save(pictures / "7.png")
    (pictures / "7.txt").write_text("another")
    calls: list[str] = []
    real = pipe.encode_prompt
    monkeypatch.setattr(pipe, "encode_prompt", lambda prompt, **more: calls.append(prompt) or real(prompt=prompt, **more))
    more = collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)
    assert calls == ["another"]
    assert len(more) == 3 * CALL["num_inference_steps"]
    assert all(torch.equal(more[i].prediction, kept[i]) for i in range(len(kept)))


# Each of two processes: it records its share and leaves what it can read.
CHILD = """
import sys
from pathlib import Path
import torch
from accelerate import PartialState
from distill_fixtures import CALL, picture_pipe
from dit_accel.finetune.data.pictures import collect_pictures
torch.set_num_threads(1)
PartialState(cpu=True)
folder = Path(sys.argv[1])
samples = collect_pictures(picture_pipe(), folder / "pictures", folder / "shared", **CALL)
(folder / f"{PartialState().process_index}.txt").write_text(str(len(samples)))
PartialState().destroy_process_group()
"""


def test_two_processes_share_the_pictures(tmp_path: Path) -> None:
    pictures = fill(tmp_path / "pictures", 3)
    launch(tmp_path, child=CHILD)
    alone = collect_pictures(tiny.picture_pipe(), pictures, tmp_path / "alone", **CALL)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == [str(len(alone))] * 2
    shared = Samples(tmp_path / "shared")
    assert shared.manifest == alone.manifest
    for i in range(len(alone)):
        assert torch.equal(shared[i].arguments["hidden_states"], alone[i].arguments["hidden_states"])
        assert torch.allclose(shared[i].prediction, alone[i].prediction, atol=1e-5)


# A distillation takes it


def test_a_distillation_learns_from_pictures(tmp_path: Path) -> None:
    pipe = accelerate(tiny.picture_pipe(), CLEAR(2.0))
    source = collect_pictures(pipe, fill(tmp_path / "pictures"), tmp_path / "samples", **CALL)
    held_out = collect_pictures(pipe, fill(tmp_path / "others", 1, first=9), tmp_path / "held-out", **CALL)
    assert velocity_error(pipe, held_out) > 0.001
    result = learn(pipe, tmp_path / "run", source, held_out, train="attention", steps=30, learning_rate=3e-3)
    assert result.error_after < 0.97 * result.error_before


def test_other_pictures_under_the_same_captions_are_another_run(tmp_path: Path) -> None:
    """Each time the same captions, seeds and call; `first` tells the pictures apart."""
    recorded = []
    for first in (0, 5):
        folder = fill(tmp_path / f"pictures-{first}", 2, first)
        for i in range(2):
            (folder / f"{first + i}.txt").write_text(f"picture number {i}")
        recorded.append(collect_pictures(tiny.picture_pipe(), folder, tmp_path / f"samples-{first}", **CALL))
    held_out = collect_pictures(tiny.picture_pipe(), fill(tmp_path / "others", 1, first=9), tmp_path / "held-out", **CALL)
    run: dict[str, Any] = {"held_out": held_out, "train": "parameters", "steps": 2, "checkpoint_every": 1}
    learn(tiny.student(), tmp_path / "run", recorded[0], **run)
    with pytest.raises(DistillationError, match="another run: its prompts"):
        learn(tiny.student(), tmp_path / "run", recorded[1], **run)
    assert learn(tiny.student(), tmp_path / "run", recorded[0], **run).resumed_from == 2


def test_flow_matching_learns_the_pictures_themselves(tmp_path: Path) -> None:
    """A trained model knows the way from noise to pictures of its kind: an error of 1 would be one that knows nothing of them."""
    pipe = builtin_pipeline()
    pipe.set_progress_bar_config(disable=True)
    call = {"height": 128, "width": 128, "num_inference_steps": 3, "max_sequence_length": 16}
    (tmp_path / "pictures").mkdir()
    for i, caption in enumerate(tiny.PROMPTS):
        draw = pipe(caption, generator=torch.Generator().manual_seed(i), **call | {"num_inference_steps": 6})
        draw.images[0].save(tmp_path / "pictures" / f"{i}.png")
        (tmp_path / "pictures" / f"{i}.txt").write_text(caption)
    accelerate(pipe, CLEAR(2.0))
    source = collect_pictures(pipe, tmp_path / "pictures", tmp_path / "samples", **call)
    errors = []
    for forward in (source[i] for i in range(len(source))):
        sigma = float(forward.arguments["timestep"])
        way = (forward.arguments["hidden_states"] - forward.latents) / sigma
        errors.append(float((forward.prediction - way).square().mean() / way.square().mean()))
    assert sum(errors) / len(errors) < 0.5
    held_out = collect_pictures(pipe, fill(tmp_path / "others", 1, first=9), tmp_path / "held-out", **call)
    settings: dict[str, Any] = {"train": "attention", "learning_rate": 3e-4, "flow_weight": 1.0, "attention_weight": 0.0}
    rows = tiny.steps_of(learn(pipe, tmp_path / "run", source, held_out, steps=12, **settings))
    assert sum(row["flow"] for row in rows) / len(rows) < 0.6


def test_a_random_model_is_refused_flow_matching_on_pictures(tmp_path: Path) -> None:
    pipe = accelerate(tiny.picture_pipe(), CLEAR(2.0))
    source = collect_pictures(pipe, fill(tmp_path / "pictures"), tmp_path / "samples", **CALL)
    held_out = collect_pictures(pipe, fill(tmp_path / "others", 1, first=9), tmp_path / "held-out", **CALL)
    with pytest.raises(DistillationError, match="point from pictures to noise"):
        learn(pipe, tmp_path / "run", source, held_out, train="attention", flow_weight=0.5)


def test_pictures_and_sampled_runs_are_not_mixed(tmp_path: Path) -> None:
    pipe = tiny.picture_pipe()
    collect_pictures(pipe, fill(tmp_path / "pictures", 1), tmp_path / "a", **CALL)
    with pytest.raises(DistillationError, match="contains samples of call"):
        collect(pipe, ["a cat"], tmp_path / "a", **CALL)
    collect(pipe, ["a cat"], tmp_path / "b", **CALL)
    with pytest.raises(DistillationError, match="contains samples of call"):
        collect_pictures(pipe, tmp_path / "pictures", tmp_path / "b", **CALL)


# What is refused, before anything is written


def truncated(folder: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "0.jpg")
    (folder / "0.jpg").write_bytes((folder / "0.jpg").read_bytes()[:1500])


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-picture": (lambda f: (f / "1.png").write_text("hello"), r"1\.png is damaged or missing"),
    "flipped": (lambda f: (f / "1.png").write_bytes((f / "1.png").read_bytes()[:-30]), r"1\.png is damaged or missing"),
    "truncated": (truncated, r"0\.jpg is damaged or missing"),
    "no-caption": (lambda f: (f / "2.txt").unlink(), r"2\.png has no caption in 2\.txt"),
    "blank-caption": (lambda f: (f / "2.txt").write_text(" \n"), r"2\.png has no caption in 2\.txt"),
    "no-text": (lambda f: (f / "2.txt").write_bytes(b"\xff\xfe\xff"), r"2\.txt is not UTF-8 text"),
    "sixteen-bits": (lambda f: Image.new("I;16", (8, 8)).save(f / "0.png"), r"0\.png has mode I;16: convert it to 8 bits a colour"),
    "empty": (empty, "has none"),
    "not-listed": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "x"}'), r"1\.png has no caption in"),
    "not-there": (lambda f: (f / "metadata.jsonl").write_text('{"file_name": "z.png", "text": "x"}'), r"0\.png has no caption in"),
    "no-json": (lambda f: (f / "metadata.jsonl").write_text("{}\n{"), "line 1 of .*metadata"),
    "metadata-of-bytes": (lambda f: (f / "metadata.jsonl").write_bytes(b"\xff"), r"metadata\.jsonl is not UTF-8 text"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_what_is_wrong_is_named(tmp_path: Path, damage: Callable[[Path], object], says: str) -> None:
    damage(fill(tmp_path / "pictures"))
    with pytest.raises(ValueError, match=says):
        collect_pictures(tiny.picture_pipe(), tmp_path / "pictures", tmp_path / "samples", **CALL)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("sizes", [{"height": 113}, {"width": None}, {"height": 0}, {"width": 144.0}], ids=str)
def test_a_size_that_is_none_is_refused(tmp_path: Path, sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="multiples of 16 pixels"):
        collect_pictures(tiny.picture_pipe(), fill(tmp_path / "pictures"), tmp_path / "samples", **CALL | sizes)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize("name", ["flux2", "qwen_image", "pixart_sigma"])
def test_another_family_is_refused_by_name(tmp_path: Path, name: str) -> None:
    pipe, call = prompted(name)
    with pytest.raises(UnsupportedModelError, match=type(pipe).__name__):
        collect_pictures(pipe, fill(tmp_path / "pictures"), tmp_path / "samples", **call)
    assert not (tmp_path / "samples").exists()


def test_another_picture_under_a_name_is_refused(tmp_path: Path) -> None:
    pictures, pipe = fill(tmp_path / "pictures", 2), tiny.picture_pipe()
    collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)
    picture(8).save(pictures / "1.png")
    with pytest.raises(ValueError, match=r"another picture in place of .*1\.png"):
        collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)


def test_a_damaged_sample_is_made_again(tmp_path: Path) -> None:
    pictures, pipe = fill(tmp_path / "pictures", 2), tiny.picture_pipe()
    samples = collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "samples").glob("run-*")}
    (samples.folder / samples.entries[0].file).write_bytes(b"half a file")
    collect_pictures(pipe, pictures, tmp_path / "samples", **CALL)
    assert {path.name: path.read_bytes() for path in (tmp_path / "samples").glob("run-*")} == whole


def test_a_caption_in_metadata_may_hold_any_character(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    picture(0).save(folder / "0.png")
    row = {"file_name": "0.png", "text": "a cat\u2028on a\x85mat"}
    (folder / "metadata.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert [found.caption for found in read_pictures(folder)] == ["a cat on a mat"]


# The command


def run(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


def test_the_command(tmp_path: Path) -> None:
    folder = fill(tmp_path / "pictures", 1)
    out = tmp_path / "samples"
    result = run("collect", "--pictures", folder, "--out", out, "--steps", 2, "--size", "256x128", "--seed", 4)
    assert result.exit_code == 0, result.output
    assert f"2 forwards in {out}" in result.output
    (entry,) = Samples(out).entries
    assert (entry.prompt, entry.seed, entry.size) == ("picture number 0", 4, (128, 256))
    assert Samples(out)[0].latents.shape == (1, 8 * 16, 32)


@pytest.mark.parametrize("both", [False, True])
def test_the_command_wants_one_source(tmp_path: Path, both: bool) -> None:
    given = ["--pictures", fill(tmp_path / "pictures"), "--prompts", tmp_path / "p.txt"] if both else []
    result = run("collect", "--out", tmp_path / "samples", *given)
    assert result.exit_code == 2
    expected = "give one of --prompts, --pictures and --check, not"
    assert f"{expected} {'--prompts and --pictures' if both else 'none'}" in result.stderr


def test_the_command_names_what_is_no_folder(tmp_path: Path) -> None:
    result = run("collect", "--pictures", tmp_path / "nowhere", "--out", tmp_path / "samples")
    assert result.exit_code == 2
    assert "--pictures must be a folder, not" in result.stderr
