"""Look at built-in video models: sheets of their clips' frames, and how often things move as the prompt says.

    python -m dit_accel.pipelines.builtin_video.look sheet SHEET.jpg builtin VIDEO --size 256
    python -m dit_accel.pipelines.builtin_video.look measure VIDEO --size 256 --count 40

A model is `builtin`, the one that ships, or a folder that the training exported. The motion is read off the pixels that differ from the
background, which the corners of all frames give: where their middle goes, or how many more they become.
"""

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw
from torch import Tensor

from dit_accel.pipelines.builtin.drawings import BACKGROUNDS, article
from dit_accel.pipelines.builtin_video import TEXT_TOKENS, WEIGHTS, builtin_video_pipeline
from dit_accel.pipelines.builtin_video.motion import DIRECTIONS, MOTIONS, NOUNS

FRAMES = 17
SHOWN = (0, 4, 8, 12, 16)  # frames of a row of a sheet
CELL = 160  # pixels of a frame on a sheet
INK = 0.3  # sum over the colours, of 3, that a pixel differs from the background by
GROWN = 1.8  # times as many pixels at the end as at the beginning
MOVED = 0.1  # of the side


def open_model(name: str, device: str) -> WanPipeline:
    """The model that ships for "builtin", else one that the training exported."""
    kind = torch.bfloat16 if device != "cpu" else torch.float32
    pipe = builtin_video_pipeline(WEIGHTS if name == "builtin" else name, dtype=kind)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(pipe: Any, prompt: str, size: int, steps: int, guidance: float, seed: int) -> Tensor:
    """One clip `[F, 3, size, size]` in [0, 1], float32, on the CPU."""
    call: dict[str, Any] = {"height": size, "width": size, "num_frames": FRAMES, "num_inference_steps": steps, "guidance_scale": guidance}
    call |= {"max_sequence_length": TEXT_TOKENS, "output_type": "pt"}
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), **call).frames[0].float().cpu()


def motion_of(clip: Tensor) -> str | None:
    """The one of MOTIONS that a clip `[F, 3, H, W]` shows most plainly; None where nothing moves or nothing is there."""
    _, _, height, width = clip.shape
    side = max(1, width // 32)
    ends = slice(None, side), slice(-side, None)
    corners = torch.cat([clip[:, :, rows, columns].flatten(2) for rows in ends for columns in ends], 2)
    ink = (clip - corners.transpose(0, 1).flatten(1).median(1).values.view(1, 3, 1, 1)).abs().sum(1) > INK  # [F, H, W]
    count = ink.sum((1, 2)).float()
    if not bool((count > 0).all()):
        return None
    first, last = (ink[part].float().sum((1, 2)) for part in (slice(None, 2), slice(-2, None)))
    if float(last.mean() / first.mean()) > GROWN:
        return "growing"
    rows = (ink.sum(2) * (torch.arange(height) / height)).sum(1) / count
    columns = (ink.sum(1) * (torch.arange(width) / width)).sum(1) / count
    down, right = (float(axis[-2:].mean() - axis[:2].mean()) for axis in (rows, columns))
    if max(abs(down), abs(right)) < MOVED:
        return None
    along = {word: down * way_down + right * way_right for word, (way_down, way_right) in DIRECTIONS.items()}
    return f"moving {max(along, key=lambda word: along[word])}"


def questions(count: int) -> list[tuple[str, str, str]]:
    """`count` times a thing, a motion and a background; motions in turn, the others drawn, always the same."""
    rng = random.Random(0)
    return [(rng.choice(NOUNS), MOTIONS[i % len(MOTIONS)], rng.choice(list(BACKGROUNDS))) for i in range(count)]


def measure(clip_of: Callable[[str, int], Tensor], count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Ask for `count` clips: how many move as asked, in all and by motion, and those that don't. `clip_of` is given a prompt and a seed."""
    right = dict.fromkeys(MOTIONS, 0)
    missed: list[dict[str, Any]] = []
    for seed, (noun, motion, colour) in enumerate(questions(count)):
        prompt = f"{article(noun)} {motion} on {article(colour)} background"
        seen = motion_of(clip_of(prompt, seed))
        right[motion] += seen == motion
        if seen != motion:
            missed.append({"prompt": prompt, "seed": seed, "seen": seen})
    return {"clips": count, "right": sum(right.values()), "by_motion": right}, missed


def write_sheet(path: Path, models: Sequence[str], args: argparse.Namespace) -> None:
    """Write a JPEG with a row per motion and model: five frames, from the same prompts and seeds."""
    rows = [(noun, motion, name) for noun, motion in zip(NOUNS[2:], MOTIONS, strict=False) for name in models]
    sheet = Image.new("RGB", (CELL * len(SHOWN), (CELL + 18) * len(rows)), "white")
    label = ImageDraw.Draw(sheet)
    for name in models:
        pipe = open_model(name, args.device)
        for row, (noun, motion, of) in enumerate(rows):
            if of != name:
                continue
            prompt, top = f"{article(noun)} {motion} on a light blue background", row * (CELL + 18)
            label.text((6, top + 2), f"{Path(name).name}: {prompt}", fill="black", font_size=12)
            clip = (draw(pipe, prompt, args.size, args.steps, args.guidance, row).clamp(0, 1) * 255).round().byte()
            for column, frame in enumerate(SHOWN):
                cell = Image.fromarray(clip[frame].permute(1, 2, 0).numpy()).resize((CELL, CELL), Image.Resampling.LANCZOS)
                sheet.paste(cell, (CELL * column, top + 18))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, quality=90)


def run_measure(args: argparse.Namespace) -> None:
    """Print the counts as JSON, and what was missed."""
    pipe = open_model(args.model, args.device)
    counts, missed = measure(lambda prompt, seed: draw(pipe, prompt, args.size, args.steps, args.guidance, seed), args.count)
    for row in [{"model": args.model, "size": args.size, "steps": args.steps} | counts, *missed]:
        print(json.dumps(row))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    sheet = commands.add_parser("sheet", help="the same prompts and seeds by several models")
    sheet.add_argument("out", type=Path)
    sheet.add_argument("models", nargs="+", help="builtin, or a folder that was exported")
    sheet.set_defaults(call=lambda args: write_sheet(args.out, args.models, args))
    measured = commands.add_parser("measure", help="how often things move as the prompt says")
    measured.add_argument("model", help="builtin, or a folder that was exported")
    measured.add_argument("--count", type=int, default=40, help="clips (40)")
    measured.set_defaults(call=run_measure)
    for command in (sheet, measured):
        command.add_argument("--size", type=int, default=256, help="pixels (256)")
        command.add_argument("--steps", type=int, default=16, help="denoising steps (16)")
        command.add_argument("--guidance", type=float, default=2.0, help="guidance scale (2)")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    args.call(args)


if __name__ == "__main__":
    main()
