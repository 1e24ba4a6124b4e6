"""Make what README and docs show: every table and picture, from one machine and the code as it is.

    make figures                                  (hours on two cores)
    python benchmarks/figures.py step quality     (some of them)
    python benchmarks/figures.py --tables         (the tables alone, from the files that are here)

Each figure is a few commands and the files that they leave; files are replaced when all of a figure's commands have ended well. The tables
of README.md and docs, each after a line `<!-- table: NAME -->`, are written from the JSON files next to this one (`tables.py`).
"""

import argparse
import contextlib
import io
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from catalogue_table import catalogue
from choose_table import choose
from PIL import Image, ImageSequence
from tables import TABLES, TRAINED, fill, read

from dit_accel import AttentionSpec, TokenLayout
from dit_accel.files import write_bytes, write_json, write_text
from dit_accel.kernels.cpu import native
from dit_accel.measure.timing import graphics_card
from dit_accel.method import DiscBlocks, Mass, Pooled, Raster, Tiles, TopK
from dit_accel.operator.cost import multiply_adds

ROOT = Path(__file__).resolve().parent.parent
PAGES: dict[str, dict[str, Callable[[Path], str]]] = {  # page -> its tables
    "README.md": {"short": TABLES["short"]},
    "docs/measured.md": {
        name: TABLES[name]
        for name in ("step", "step-bfloat16", "kernels", "kernels-amx", "quality", "evaluate", "recovery", "combinations")
    },
    "docs/choose.md": {"choose": choose},
    "docs/gpu.md": {name: TABLES[name] for name in ("gpu-step", "gpu", "int8")},
    "docs/plans.md": {name: TABLES[name] for name in ("plans", "plans-video")},
    "docs/video.md": {"video": TABLES["video"]},
    "docs/methods.md": {"catalogue": catalogue},
    "docs/models.md": {"composition": TABLES["composition"]},
    "docs/parallel.md": {"parallel": TABLES["parallel"]},
}
CLIP = "a panda moving left on a blue background"
PANDA = "a panda on a blue background"
GHOST = "a ghost on a green background"
STEPPED = "--method fovea --method fovea:radius=8 --method clear:8 --method sla:0.1"
LEARN = (  # from clips of the model's own
    "distill --prompts clips.txt --held-out held-out.txt --frames 17 --size 512x512 --sampling-steps 4 --guidance 3 "
    "--max-sequence-length 24 --train attention --optimizer muon"
)


@dataclass(frozen=True)
class Figure:
    """Arguments of Python, one list per command, run in an empty folder; and for each file that they leave where it is kept."""

    commands: tuple[tuple[str, ...], ...]
    files: dict[str, str]
    prepare: Callable[[Path], None] | None = None  # writes what the commands read
    finish: Callable[[Path], None] | None = None  # changes what they wrote
    target: str | None = None  # the instruction set of the CPU kernels that it is about; on other machines it stays as it is
    card: str | None = None  # likewise the GPU's name, or a part of it


def words(text: str) -> tuple[str, ...]:
    """Arguments of Python for a `dit-accel` command, quoted as in a shell."""
    return ("-m", "dit_accel.cli", *shlex.split(text))


def captions(folder: Path) -> None:
    """120 captions as the demo makes them, four held-out ones last, and the four of the evaluation."""
    from dit_accel.measure.demo import HELD_OUT, training_prompts

    held_out = (*HELD_OUT, "a ghost", "a rocket above a cat on a white background")
    (folder / "120.txt").write_text("\n".join([*training_prompts(120, held_out), *held_out]) + "\n")
    (folder / "4.txt").write_text("\n".join(training_prompts(4, HELD_OUT)) + "\n")


def combinations(folder: Path) -> None:
    """The captions, and the methods without a name that are compared with plain SLA and CLEAR, as files of their specs."""
    captions(folder)
    specs = {
        "clear-pooled": AttentionSpec((DiscBlocks(5),), Pooled(), Mass(), Tiles((4, 4)), (16, 16)),
        "sla-pooled": AttentionSpec((TopK(0.19),), Pooled(), Mass(), Raster()),
    }
    for name, spec in specs.items():
        write_json(folder / f"{name}.json", spec.to_dict())


def finish_recovery(folder: Path) -> None:
    """Write each method's multiply-adds to the rows of recovery.json, and draw the curves of those that were trained in three ways."""
    from dit_accel.finetune.curve import draw_recovery

    record = read(folder / "recovery.json")
    height, width = (record["settings"]["call"][side] // 16 for side in ("height", "width"))
    for row in record["rows"]:
        row["multiply_adds"] = multiply_adds(AttentionSpec.from_dict(row["spec"]), TokenLayout((1, height, width)), head_dim=64)
    write_json(folder / "recovery.json", record)
    trained = {"parameters": "own parameters", "lora": "LoRA", "attention": "weights"}
    rows = [row | {"method": name, "train": trained[row["train"]]} for row in record["rows"] if (name := TRAINED.get(row["method"]))]
    write_bytes(folder / "recovery.png", draw_recovery(record | {"rows": rows}))


def clips(folder: Path) -> None:
    """The captions of the clips that the video adapters learn from, and those of the held-out ones."""
    pairs = [
        f"a {thing} moving {way} on a pink background" for thing in ("cat", "car", "ghost", "rocket") for way in ("left", "up", "down")
    ]
    (folder / "clips.txt").write_text("\n".join(pairs) + "\n")
    (folder / "held-out.txt").write_text("a panda moving left on a blue background\na star moving up on a gray background\n")


def add_errors(folder: Path) -> None:
    """Write the adapters' held-out errors, from their own records, to the rows of video.json, and what is drawn there in words."""
    record = read(folder / "video.json")
    fovea, sla = (read(folder / name / "adapter" / "dit_accel_config.json")["training"] for name in ("fovea", "sla"))
    before, after = "held_out_error_before", "held_out_error_after"
    errors = [
        {"held_out_error": fovea[before]},
        {"held_out_error": fovea[after]},
        {"held_out_error": sla[after], "untrained_error": sla[before]},
    ]
    names = ("Fovea 10 %, untrained", "Fovea 10 %, distilled", "SLA 5 %, distilled")
    record["rows"] = [row | {"name": name} | error for row, name, error in zip(record["rows"], names, errors, strict=True)]
    write_json(folder / "video.json", record)


def finish_video(folder: Path) -> None:
    """Write the errors, and the clip at half its size: it goes into every checkout."""
    add_errors(folder)
    clip = folder / "video" / "video.gif"
    with Image.open(clip) as film:
        times = film.info["duration"]
        frames = [frame.convert("RGB").resize((film.width // 2, film.height // 2)) for frame in ImageSequence.Iterator(film)]
    data = io.BytesIO()
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)
    write_bytes(clip, data.getvalue())


def gather_errors(folder: Path) -> None:
    """Write evaluate.json: the velocity errors of both methods and of the original in bfloat16."""
    found = {name: read(folder / name / "results.json") for name in ("fovea", "clear")}
    errors = [("Fovea 5 %", "fovea", "method"), ("CLEAR radius 8", "clear", "method"), ("the original in bfloat16", "fovea", "bfloat16")]
    rows = [{"name": name} | found[folder_name]["measures"][side]["velocity_error"] for name, folder_name, side in errors]
    write_json(folder / "evaluate.json", {"machine": found["fovea"]["machine"], "prompts": found["fovea"]["prompts"], "rows": rows})


def shrink(source: str, side: int) -> tuple[str, ...]:
    """Python that writes a picture to picture.jpg with no side above `side` pixels."""
    return ("-c", f"from PIL import Image; i = Image.open({source!r}).convert('RGB'); i.thumbnail(({side}, {side})); i.save('picture.jpg')")


def recovery(options: str) -> tuple[str, ...]:
    """`dit-accel bench recovery` with the same number of steps for all."""
    return words(f"bench recovery --optimizer muon --train-steps 200 --prompts 120.txt --held-out 4 --out recovery.json {options}")


SIX = ("--size", "1024", "--steps", "4", "--measured", "6")  # plans of six prompts


FIGURES: dict[str, Figure] = {
    "step": Figure(
        (
            words(f"bench step --size 512x512 --size 1024x1024 --size 2048x2048 --size 4096x4096 {STEPPED} --out step.json"),
            words(f"bench step --dtype bfloat16 --size 1024x1024 --size 2048x2048 {STEPPED} --out step-bfloat16.json"),
        ),
        {name: f"benchmarks/{name}" for name in ("step.json", "step-bfloat16.json")},
    ),
    "parallel": Figure(
        ((str(ROOT / "benchmarks" / "parallel.py"), "--out", "parallel.json"),), {"parallel.json": "benchmarks/parallel.json"}
    ),
    "kernels": Figure(
        (words("bench kernels --repeats 3 --out kernels.json"),), {"kernels.json": "benchmarks/kernels.json"}, target="avx512bf16"
    ),
    "kernels-amx": Figure(
        (words("bench kernels --repeats 3 --largest 16448 --out kernels-amx.json"),), {"kernels-amx.json": "benchmarks/kernels-amx.json"},
        target="amx",
    ),
    "gpu": Figure(((str(ROOT / "benchmarks" / "gpu.py"), "--out", "gpu.json"),), {"gpu.json": "benchmarks/gpu-h100.json"}, card="H100"),
    "gpu-step": Figure(
        ((str(ROOT / "benchmarks" / "gpu_step.py"), "--out", "gpu-step.json"),), {"gpu-step.json": "benchmarks/gpu-step-h100.json"},
        card="H100",
    ),
    "int8": Figure(
        (
            (str(ROOT / "benchmarks" / "fovea_captures.py"), "captures", "image-1024"),
            (str(ROOT / "benchmarks" / "int8.py"), "captures/image-1024.pt", "int8.json"),
        ),
        {"int8.json": "benchmarks/int8.json"},
    ),
    "quality": Figure((words("bench quality --size 1024x1024 --steps 5 --out quality.json"),), {"quality.json": "benchmarks/quality.json"}),
    "catalogue": Figure(
        tuple((str(ROOT / "benchmarks" / "catalogue.py"), "catalogue.jsonl", model, "--fit") for model in ("image-1024", "video-512")),
        {"catalogue.jsonl": "benchmarks/catalogue.jsonl"},
    ),
    "plans": Figure(
        ((str(ROOT / "benchmarks" / "plan.py"), "--size", "1024", "--steps", "4", "--work", "work", "--out", "plan.json"),),
        {"plan.json": "benchmarks/plan.json"},
    ),
    "plans-video": Figure(
        (
            (str(ROOT / "benchmarks" / "plan.py"), "--size", "256", "--frames", "17", "--steps", "4", "--held-out", "4",
             "--densities", "0.1", "0.2", "0.4", "--work", "work", "--out", "plan-video.json"),
        ),
        {"plan-video.json": "benchmarks/plan-video.json"},
    ),
    "plans-limits": Figure(
        (
            (str(ROOT / "benchmarks" / "plan.py"), *SIX, "--densities", "0.05", "--work", "work", "--out", "plan-six.json"),
            (str(ROOT / "benchmarks" / "plan_limits.py"), *SIX, "--work", "work", "--out", "plan-limits.json"),
        ),
        {"plan-limits.json": "benchmarks/plan-limits.json"},
    ),
    "plans-elsewhere": Figure(
        ((str(ROOT / "benchmarks" / "plan_sizes.py"), "--densities", "0.05", "0.1", "--work", "work", "--out", "plan-sizes.json"),),
        {"plan-sizes.json": "benchmarks/plan-sizes.json"},
    ),
    "plans-promise": Figure(
        tuple(
            (str(ROOT / "benchmarks" / "plan_seeds.py"), "--size", size, "--work", f"work-{size}", "--out", name)
            for size, name in (("256", "plan-seeds.json"), ("512", "plan-seeds-512.json"))
        ),
        {name: f"benchmarks/{name}" for name in ("plan-seeds.json", "plan-seeds-512.json")},
    ),
    "composition": Figure(
        ((str(ROOT / "benchmarks" / "composition.py"), "--size", "512", "--prompts", "1", "--out", "composition.json"),),
        {"composition.json": "benchmarks/composition.json"},
    ),
    "recovery": Figure(
        (
            recovery("--method fovea:0.05 --method clear:8 --method sla:0.05"),
            recovery(
                "--train attention --method clear:6,tile=4x4 --method sla:0.125 --method clear-pooled.json --method sla-pooled.json"
            ),
        ),
        {"recovery.json": "benchmarks/recovery.json", "recovery.png": "samples/recovery.png"},
        combinations,
        finish_recovery,
    ),
    "evaluate": Figure(
        tuple(words(f"evaluate --prompts 4.txt --method {m} --size 512x512 --steps 8 --out {m[:5]}") for m in ("fovea:0.05", "clear:8")),
        {"evaluate.json": "benchmarks/evaluate.json"},
        captions,
        gather_errors,
    ),
    "demo": Figure((words("demo --out demo"),), {"demo/sheet.jpg": "samples/demo.jpg"}),
    "hires": Figure(
        (
            words(f"generate '{GHOST}' --hires --size 4096x4096 --base 512 --strength 0.2 --seed 2 --out ghost.png"),
            shrink("ghost.png", 512),
        ),
        {"picture.jpg": "samples/high-resolution.jpg"},
    ),
    "video": Figure(
        (
            (str(ROOT / "samples" / "video.py"), "60"),
            words(f"{LEARN} --method fovea:0.1,tile=2x8x8 --learning-rate 1e-4 --steps 60 --out fovea"),
            words(f"{LEARN} --method sla:0.05,tile=4x4x4 --learning-rate 6e-4 --steps 90 --out sla"),
            words(
                f"bench draw '{CLIP}' --frames 17 --size 768x768 --steps 6 --guidance 3 --method fovea:0.1,tile=2x8x8 "
                "--adapter fovea/adapter --adapter sla/adapter --max-sequence-length 24 --out video.json"
            ),
        ),
        {"video/video.gif": "samples/video.gif", "video.json": "benchmarks/video.json"},
        clips,
        finish_video,
    ),
    "viewer": Figure(
        (
            words(f"view --prompt '{PANDA}' --size 1024x1024 --method fovea:0.05 --layer 3 --head 0 --head 1 --step 4 --out view.html"),
            (str(ROOT / "benchmarks" / "viewer_picture.py"), "view.html", "picture.jpg", "0.4", "0.42"),
        ),
        {"picture.jpg": "samples/viewer.jpg"},
    ),
    "sheets": Figure(
        (
            ("-m", "dit_accel.pipelines.builtin.look", "sheet", "pictures.jpg", "builtin", "--size", "512", "--size", "1024"),
            ("-m", "dit_accel.pipelines.builtin_video.look", "sheet", "clips.jpg", "builtin"),
        ),
        {"pictures.jpg": "pipelines/builtin/weights/sample.jpg", "clips.jpg": "pipelines/builtin_video/weights/sample.jpg"},
    ),
}  # fmt: skip


def make(name: str, work: Path | None = None) -> None:
    """Run a figure's commands in an empty folder, or in one of its name in `work`, where commands that were stopped go on, and keep their
    files. Raises RuntimeError where a command fails: nothing is replaced."""
    figure = FIGURES[name]
    if figure.target not in (None, native.TARGETS[native.target()]):
        print(f"{name}: stays as it is, it is about CPUs with {figure.target}", flush=True)
        return
    if figure.card is not None and figure.card not in str(graphics_card().get("gpu")):
        print(f"{name}: stays as it is, it is about the {figure.card}", flush=True)
        return
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if work is None else work / name
        folder.mkdir(parents=True, exist_ok=True)
        if figure.prepare:
            figure.prepare(folder)
        for command in figure.commands:
            print(f"{name}: {' '.join(command)}", flush=True)
            if status := subprocess.run([sys.executable, *command], cwd=folder).returncode:
                raise RuntimeError(f"{name}: the command above ended with status {status}; its files are as they were")
        if figure.finish:
            figure.finish(folder)
        for made, kept in figure.files.items():
            shutil.copyfile(folder / made, ROOT / kept)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(FIGURES)}; all unless given")
    parser.add_argument("--work", type=Path, help="keep what the commands write in this folder, and go on with what is there")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    args = parser.parse_args(arguments)
    if wrong := sorted(set(args.names) - set(FIGURES)):
        parser.error(f"no figure is called {wrong[0]!r}: {', '.join(FIGURES)}")
    for name in [] if args.tables else args.names or FIGURES:
        make(name, args.work and args.work.resolve())
    for name, tables in PAGES.items():
        page = ROOT / name
        write_text(page, fill(page.read_text(), {name: table(ROOT / "benchmarks") for name, table in tables.items()}))


if __name__ == "__main__":
    main()
