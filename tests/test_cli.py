"""The command line: what is refused and how, help, and every command on a tiny pipeline loaded from a folder."""

import json
import logging
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly
from PIL import Image
from typer.testing import CliRunner, Result

import dit_accel
from dit_accel.cli import models, options
from dit_accel.cli.app import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [["demo"], ["generate"], ["collect"], ["distill"], ["evaluate"], ["view"], ["info"], ["doctor"]]
COMMANDS += [["bench", name] for name in ("quality", "logits", "step", "draw", "kernels")]
LAYERS = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
# 128 image tokens: two tiles
SMALL = ["--size", "256x128", "--max-sequence-length", "16"]


def make_tiny() -> Any:
    """The built-in pipeline's parts around a random FLUX transformer with 1 + 1 blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from dit_accel.pipelines.builtin.autoencoder import PatchAutoencoder
    from dit_accel.pipelines.builtin.components import POOLED_WIDTH, TEXT_WIDTH, make_text_encoders, make_tokenizer
    from dit_accel.pipelines.builtin.drawings import vocabulary

    torch.manual_seed(0)
    clip_tokenizer, t5_tokenizer = make_tokenizer(32, vocabulary(), begin=True), make_tokenizer(512, vocabulary(), begin=False)
    clip, t5 = make_text_encoders(len(clip_tokenizer))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill_randomly(transformer)
    autoencoder = PatchAutoencoder(width=32, num_blocks=1)
    autoencoder.basis.normal_(std=0.05)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=autoencoder, text_encoder=clip, tokenizer=clip_tokenizer, text_encoder_2=t5,
        tokenizer_2=t5_tokenizer, transformer=transformer,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("a panda\n\n a cat on a blue background \n")
    return file


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})


def succeed(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(*arguments: object) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stdout == ""
    (line,) = [text for text in result.stderr.splitlines() if text.strip() and "it/s" not in text]  # but for progress bars
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a test failure: an error has to be found before."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a model was loaded before the arguments were checked")

    monkeypatch.setattr(models, "load_pipeline", refuse)


# Errors, each found before a model is loaded


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("1023x1024", "width and height must be multiples of 16 pixels, the side of one token: not 1023x1024, but 1024x1024, for example"),
        ("1024x770", "width and height must be multiples of 16 pixels, the side of one token: not 1024x770, but 1024x768, for example"),
        ("0x64", "width and height must be at least 1 pixel, not '0x64'"),
        ("1024", "size must be WIDTHxHEIGHT in pixels, as in 1024x768, not '1024'"),
        ("-16x16", "size must be WIDTHxHEIGHT in pixels, as in 1024x768, not '-16x16'"),
        ("bigxbig", "size must be WIDTHxHEIGHT in pixels, as in 1024x768, not 'bigxbig'"),
    ],
)
@pytest.mark.usefixtures("no_models")
def test_bad_sizes(size: str, message: str, prompts: Path, tmp_path: Path) -> None:
    assert fail("generate", "x", f"--size={size}", "--out", tmp_path / "a.png") == message
    assert fail("collect", "--prompts", prompts, "--out", tmp_path / "c", f"--size={size}") == message
    assert fail("distill", "--prompts", prompts, "--out", tmp_path / "d", f"--size={size}") == message
    assert fail("bench", "quality", f"--size={size}") == message
    assert fail("bench", "step", "--size", "64x64", f"--size={size}") == message


def test_size_is_width_by_height() -> None:
    assert options.parse_size("1024X768") == (768, 1024)


@pytest.mark.parametrize("command", ["collect", "distill"])
@pytest.mark.usefixtures("no_models")
def test_bad_prompts(command: str, tmp_path: Path) -> None:
    file, out = tmp_path / "p.txt", tmp_path / "out"
    expected = "prompts must be a text file with one prompt per line, but"
    assert fail(command, "--prompts", file, "--out", out) == f"{expected} {file} can't be read: No such file or directory"
    file.write_text("\n  \n")
    assert fail(command, "--prompts", file, "--out", out) == f"{expected} {file} has none"
    file.write_bytes(b"\xff\xfe\xfa")
    assert fail(command, "--prompts", file, "--out", out) == f"{expected} {file} can't be read: not UTF-8"
    assert not out.exists()


@pytest.mark.usefixtures("no_models")
def test_unwritable_outputs(prompts: Path, tmp_path: Path) -> None:
    blocked = prompts / "below"  # a folder can't be made below a file
    expected = f"the folder {blocked} can't be written to: Not a directory"
    assert fail("demo", "--out", blocked) == expected
    assert fail("collect", "--prompts", prompts, "--out", blocked) == expected
    assert fail("distill", "--prompts", prompts, "--out", blocked) == expected
    assert fail("generate", "x", "--out", blocked / "a.png") == expected
    assert fail("bench", "quality", "--out", blocked / "a.json") == expected
    assert fail("bench", "step", "--out", blocked / "a.json") == expected
    assert fail("bench", "kernels", "--out", blocked / "a.json") == expected
    assert fail("bench", "step", "--out", tmp_path) == f"--out must name a file, not the folder {tmp_path}"
    for name in ("a.txt", "a"):
        text = fail("generate", "x", "--out", tmp_path / name)
        assert text == f"--out must name a picture, as in image.png or image.jpg, not {tmp_path / name}"


@pytest.mark.usefixtures("no_models")
def test_bad_methods(prompts: Path, tmp_path: Path) -> None:
    expected = "method must be one of none, fovea, clear, sla, gna or a JSON file, not 'flash'"
    assert fail("generate", "x", "--method", "flash", "--out", tmp_path / "a.png") == expected
    assert fail("distill", "--prompts", prompts, "--out", tmp_path, "--method", "flash") == expected
    assert fail("bench", "step", "--method", "fovea", "--method", "flash") == expected
    assert "requires an accelerated method, not 'none'" in fail("distill", "--prompts", prompts, "--out", tmp_path, "--method", "none")
    assert "requires accelerated methods (the original is always measured), not 'none'" in fail("bench", "step", "--method", "none")
    assert "bench quality requires accelerated methods, not 'none'" in fail("bench", "quality", "--method", "none")
    for more in (["--method", "fovea"], ["--dense-steps", "2"]):
        assert "leave --method and --dense-steps out" in fail("generate", "x", "--adapter", "somewhere", *more)


@pytest.mark.usefixtures("no_models")
def test_bad_settings(prompts: Path, tmp_path: Path) -> None:
    text = fail("distill", "--prompts", prompts, "--out", tmp_path / "d", "--learning-rate", "0")
    assert text == "learning_rate must be a number > 0, not 0.0"
    assert fail("bench", "kernels", "--tune", "--aot") == "give --aot or --tune, not both"
    assert "require --aot: --tune takes this GPU and every method" in fail("bench", "kernels", "--tune", "--method", "fovea")
    assert "--head-dim and --dtype require --aot or --tune" in fail("bench", "kernels", "--dtype", "float16")
    for arguments in (["generate", "x", "--steps", "0"], ["generate", "x", "--dtype", "int8"], ["generate"], ["nonsense"]):
        result = run(*arguments)
        assert result.exit_code == 2
        assert "Traceback" not in result.output


def test_bad_models_and_devices(model: str, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.png"]
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in (str(empty), "nobody/nothing"):
        expected = f"model must be 'builtin', a folder in diffusers' format or a hub id, not '{name}': "
        assert fail("generate", "x", "--model", name, *out).startswith(expected)
    assert fail("generate", "x", "--device", "abacus", *out) == "device must be auto, cpu, cuda or another torch device, not 'abacus'"
    assert "CUDA devices of this machine, not 'cuda:99'" in fail("generate", "x", "--device", "cuda:99", *out)
    text = fail("generate", "x", "--model", model, *SMALL, "--adapter", empty, *out)
    assert text.startswith(f"dit_accel_config.json in {empty} can't be read")
    assert fail("info", "--adapter", empty).startswith(f"dit_accel_config.json in {empty} can't be read")


def test_traceback_on_request(tmp_path: Path) -> None:
    result = run("--traceback", "generate", "x", "--size", "1x1", "--out", tmp_path / "a.png")
    assert isinstance(result.exception, ValueError)


@pytest.mark.parametrize(
    ("command", "hint"),
    [("generate", "nothing was written"), ("collect", "continues with the prompts that are missing"), ("distill", "newest checkpoint")],
)
def test_interruption(command: str, hint: str, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_pipeline", interrupt)
    out = tmp_path / "a.png"
    result = run(command, *(["x"] if command == "generate" else ["--prompts", prompts]), "--out", out)
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted: ")
    assert hint in result.stderr
    assert not out.is_file()


def test_other_exceptions_keep_their_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "load_pipeline", lambda *_, **__: 1 / 0)
    assert isinstance(run("generate", "x", "--out", tmp_path / "a.png").exception, ZeroDivisionError)


# Help


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help(command: list[str]) -> None:
    text = succeed(*command, "--help")
    assert f"Example: dit-accel {' '.join(command)}" in text
    assert "Usage:" in text


def test_help_is_light() -> None:
    code = (
        "import sys\nfrom dit_accel.cli.app import app\ntry:\n    app(['--help'])\nexcept SystemExit as e:\n    assert not e.code\n"
        "print(sorted({'torch', 'triton', 'diffusers', 'transformers', 'peft', 'accelerate'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(command[0] in done.stdout for command in COMMANDS)
    assert done.stdout.splitlines()[-1] == "[]"


# Commands


def test_info(model: str) -> None:
    text = succeed("info", "--model", model)
    rows = {line.split("  ")[0].strip(): line for line in text.splitlines()}
    assert dit_accel.__version__ in rows["dit_accel"]
    assert torch.__version__ in rows["torch"]
    assert "FluxTransformer2DModel" in rows["families"]
    for name in ("diffusers", "triton", "cpu", "threads", "cuda devices", "methods", "backend auto", "backend cpu", "backend reference"):
        assert name in rows
    assert "clear:8,downsample=4" in text
    assert "2 layers" in rows
    assert all(layer in text for layer in LAYERS)


def test_info_as_json_has_no_names(model: str) -> None:
    told = json.loads(succeed("info", "--model", model, "--json"))
    assert told["dit_accel"] == dit_accel.__version__
    assert told["2 layers"] == LAYERS
    assert str(Path(model).parent) not in json.dumps(told)
    assert "leave --method out" in fail("info", "--json", "--method", "fovea")


def test_info_of_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.cli import info as cli_info

    monkeypatch.setattr(cli_info, "LIBRARIES", ("no-such-library",))
    assert cli_info.package_rows()["no-such-library"] == "not installed"


def test_generate(model: str, tmp_path: Path) -> None:
    files = {method: tmp_path / f"{i}.png" for i, method in enumerate(("none", "clear:2", "clear:1000"))}
    for method, file in files.items():
        text = succeed("generate", "a panda", "--model", model, "--method", method, "--steps", 2, *SMALL, "--out", file)
        assert f"wrote {file}" in text
        assert ("original attention in every layer" in text) == (method == "none")
        assert all(layer in text for layer in LAYERS) == (method != "none")
    original, sparse, whole = (torch.tensor(list(Image.open(file).tobytes()), dtype=torch.float) for file in files.values())
    assert Image.open(files["none"]).size == (256, 128)
    assert (sparse - original).abs().max() > 1
    assert (whole - original).abs().max() <= 1  # a disc that covers the picture is dense attention
    assert sorted(tmp_path.iterdir()) == sorted(files.values())  # no temporary file is left


def test_strict_generate_is_refused_in_one_line(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.patch import context

    monkeypatch.setattr(context.Context, "grids", lambda *_: "no grid today")
    arguments = ["generate", "a panda", "--model", model, "--steps", "1", *SMALL, "--out", tmp_path / "a.png"]
    result = run(*arguments, "--strict")
    assert result.exit_code == 2
    assert "error: strict=True requires every layer to be accelerated, but this call has no grid today" in result.stderr
    assert not (tmp_path / "a.png").exists()


def test_collect_distill_generate(model: str, prompts: Path, tmp_path: Path) -> None:
    samples, out, picture = tmp_path / "samples", tmp_path / "out", tmp_path / "a.png"
    text = succeed("collect", "--prompts", prompts, "--out", samples, "--model", model, "--steps", 2, *SMALL)
    assert f"4 forwards in {samples}" in text

    held_out = tmp_path / "held-out.txt"
    held_out.write_text("a rocket\n")
    arguments = ["distill", "--prompts", samples, "--held-out", held_out, "--method", "clear:2", "--out", out, "--model", model]
    arguments += ["--train", "lora", "--lora-rank", "2", "--steps", "2", "--sampling-steps", "2", "--checkpoint-every", "1", *SMALL]
    text = succeed(*arguments)
    before, after = (float(x) for x in re.findall(r"([0-9.]+) (?:before|after)", text))
    assert before > 0
    assert after > 0
    config = json.loads((out / "adapter" / "dit_accel_config.json").read_text())
    record = config["training"]
    assert record["prompts"] == 2
    assert record["config"]["lora_rank"] == 2
    assert "output_dir" not in record["config"]
    assert record["sampling"]["width"] == 256
    assert record["held_out_error_before"] == pytest.approx(before, abs=1e-4)
    assert record["held_out_error_after"] == pytest.approx(after, abs=1e-4)
    assert (out / "run" / "checkpoint-0000002").is_dir()

    assert f"{after:.4f} after" in succeed(*arguments)  # finished already: resumes at the end

    text = succeed("generate", "a cat", "--model", model, "--adapter", out / "adapter", "--steps", 2, *SMALL, "--out", picture)
    assert "Disc(radius=2)" in text
    assert picture.is_file()
    text = succeed("info", "--adapter", out / "adapter")
    assert "Disc(radius=2)" in text
    assert f"held_out_error_before: {record['held_out_error_before']}" in text


def test_each_launched_process_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.cli.models import _device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for environment, index in (({"LOCAL_RANK": "1"}, 1), ({"LOCAL_RANK": "0"}, 0), ({}, 0)):
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        assert _device("auto") == torch.device("cuda", index)


def test_distill_from_prompts(model: str, prompts: Path, tmp_path: Path) -> None:
    arguments = ["distill", "--prompts", prompts, "--model", model, "--steps", "1", "--sampling-steps", "1", *SMALL]
    varied = ["--vary", "clear:2,downsample=2", "--vary", "clear:4,downsample=2", "--parameter-steps", "1"]
    succeed(*arguments, "--method", "clear:2,downsample=2", "--train", "parameters", *varied, "--out", tmp_path / "a")
    record = json.loads((tmp_path / "a" / "adapter" / "dit_accel_config.json").read_text())["training"]
    assert [spec["keep"][0]["radius"] for spec in record["config"]["specs"]] == [2, 4]
    assert record["config"]["parameter_steps"] == 1
    assert record["held_out_error_fitted"] > 0
    assert (tmp_path / "a" / "adapter" / "diffusion_pytorch_model.safetensors").is_file()
    result = run(*arguments, "--method", "clear:1000", "--out", tmp_path / "b")
    assert result.exit_code == 2
    assert "error: student and teacher agree to rounding" in result.stderr


def test_notices_are_kept_back_and_warnings_are_not(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("diffusers.pipelines.pipeline_utils")
    before, propagate, logger.propagate = list(logger.filters), logger.propagate, True
    try:
        with caplog.at_level("WARNING"), models.without_notices():
            logger.warning("Expected types for vae: (AutoencoderKL,), got PatchAutoencoder.")
            logger.warning("Expected types for text_encoder: (CLIPTextModel,), got Linear.")
        logger.warning("Expected types for vae: (AutoencoderKL,), got PatchAutoencoder.")
    finally:
        logger.propagate = propagate
    assert ["vae" in record.getMessage() for record in caplog.records] == [False, True]
    assert logger.filters == before


# Samples


def test_wrong_high_resolution_is_refused_before_a_model_is_loaded(no_models: None, tmp_path: Path) -> None:
    out = ["--out", tmp_path / "a.png"]
    assert fail("generate", "x", "--base", "64", "--proportional", *out) == "--base, --proportional requires --hires"
    assert fail("generate", "x", "--hires", "--strength", "0", *out) == "strength must be a share of the steps in (0, 1], not 0.0"
    assert fail("generate", "x", "--hires", "--ntk", "nan", *out) == "ntk must be a factor > 0, not nan"
    (tmp_path / "b-stages").write_text("")
    assert "can't be written to" in fail("generate", "x", "--hires", "--out", tmp_path / "b.png")


def test_generate_in_high_resolution_continues(model: str, tmp_path: Path) -> None:
    arguments = ["generate", "a panda", "--hires", "--base", 128, "--method", "clear:2", "--strength", 0.5, "--steps", 2, *SMALL]
    arguments += ["--model", model, "--strict", "--proportional", "--out", tmp_path / "a.png"]
    text = succeed(*arguments)
    assert "Forecast, not a measurement" in text
    picture = Image.open(tmp_path / "a.png")
    assert picture.size == (256, 128)
    stages = tmp_path / "a-stages"
    names = sorted(file.name for file in stages.glob("stage-*.safetensors"))
    assert names == ["stage-0-128x64.safetensors", "stage-1-256x128.safetensors"]
    (tmp_path / "a.png").unlink()
    assert "Forecast" not in succeed(*arguments)  # nothing is left to draw
    assert Image.open(tmp_path / "a.png").tobytes() == picture.tobytes()
    assert "seed was 0, is 1" in fail(*arguments, "--seed", 1)


@pytest.mark.parametrize("name", ["generate", "distill_clear", "custom_spec"])
def test_samples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import FluxPipeline

    call = FluxPipeline.__call__

    def small(self: Any, prompt: str, **settings: Any) -> Any:
        return call(self, prompt, **{**settings, "height": 128, "width": 256, "num_inference_steps": 1})

    script = ROOT / "samples" / f"{name}.py"
    monkeypatch.setattr(FluxPipeline, "__call__", small)
    monkeypatch.setattr(dit_accel, "builtin_pipeline", make_tiny)
    monkeypatch.setattr(sys, "argv", [str(script), *(["1"] if name == "distill_clear" else [])])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    made = {"generate": "generate.png", "distill_clear": "clear-r8/adapter/pytorch_lora_weights.safetensors"}
    assert name not in made or (tmp_path / made[name]).is_file()


def test_samples_are_short() -> None:
    lengths = {file.name: len(file.read_text().splitlines()) for file in (ROOT / "samples").glob("*.py")}
    del lengths["new_family.py"]  # a toy transformer and its family, which test_families.py counts
    assert {name: n for name, n in lengths.items() if n > 40} == {}
