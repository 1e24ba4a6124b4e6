"""`dit-accel plan`: its options, and the checks of them, all made before anything is loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from dit_accel.cli import launched, options
from dit_accel.errors import ArgumentError

if TYPE_CHECKING:
    from dit_accel.method.spec import AttentionSpec
EPILOG = "Example: dit-accel plan --prompts prompts.txt --budget 0.05 --size 1024x1024 --out plan.json"


def plan(
    prompts: options.Prompts,
    out: Annotated[Path, typer.Option(help="JSON file of the plan, a method for every command; its page is written next to it.")],
    budget: Annotated[
        float | None, typer.Option(help="The largest mean relative error of the prediction on prompts like these.", show_default="0.05")
    ] = None,
    speed: Annotated[float | None, typer.Option(help="How many times less the attention shall cost, in place of a budget.")] = None,
    unit: Annotated[
        Literal["multiply-adds", "seconds"], typer.Option(help="Of costs: multiply-adds are counted, seconds timed on this machine.")
    ] = "multiply-adds",
    model: options.Model = "builtin",
    method: Annotated[
        list[str] | None, typer.Option(help="A candidate as in generate; may be repeated.", show_default="forms of Fovea, and none")
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            help="Adapter, a folder or hub id, whose specs are candidates as trained; OUT-adapter is written too where they were chosen."
        ),
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Prompts to verify on, in place of the last ones of --prompts.")] = None,
    ranges: Annotated[int, typer.Option(min=1, help="Ranges of noise levels that have a choice of their own, at most.")] = 3,
    folder: Annotated[
        Path | None, typer.Option(help="Where the work is kept, so that the same command continues.", show_default="OUT-work")
    ] = None,
    size: options.Size = "1024x1024",
    frames: options.Frames = None,
    steps: options.Steps = 8,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
) -> None:
    """Find which method each layer and head should run at which noise levels, within a budget of error or for a speed."""
    if launched.processes() > 1:
        raise ArgumentError("a plan is made by one process: start dit-accel plan by itself, without torchrun or accelerate launch")
    if out.suffix.lower() != ".json":
        raise ArgumentError(f"--out must name a JSON file, as in plan.json, next to which the page plan.html is written, not {out}")
    pixels = options.parse_size(size, model)
    call = options.call_arguments(model, pixels, steps, guidance, max_sequence_length)
    texts = options.read_prompts(prompts)
    held_out_texts = None if held_out is None else options.read_prompts(held_out)
    specs = None if not method else [_candidate(text) for text in dict.fromkeys(method)]
    options.check_file(out)
    adapter = out.with_name(f"{out.stem}-adapter")
    if trained is not None and adapter.resolve() == Path(trained).resolve():
        raise ArgumentError(
            f"the folder {adapter}, where the plan and what --trained has learned are written, is --trained itself: name another --out"
        )
    from dit_accel.cli.models import frames_call, load_pipeline
    from dit_accel.planner.checks import check_asked
    from dit_accel.planner.pages import write_plan_page
    from dit_accel.planner.planning import plan as make_plan
    from dit_accel.planner.trained import write_adapter

    check_asked(budget, speed)
    pipe = load_pipeline(model, dtype, device, sizes=[pixels], video=frames is not None)
    call |= frames_call(pipe, frames)
    pipe.set_progress_bar_config(disable=True)
    made = make_plan(
        pipe, texts, budget=budget, speed=speed, specs=specs, trained=trained, held_out=held_out_texts, unit=unit,
        ranges=ranges, seed=seed, folder=out.with_name(f"{out.stem}-work") if folder is None else folder, **call,
    )  # fmt: skip
    made.save(out)
    page = write_plan_page(made, out.with_suffix(".html"))
    written = [out, page]
    if trained is not None and made.trained is not None:
        written.append(write_adapter(pipe, trained, made, adapter))
    elif adapter.exists():  # of an earlier plan, or a user's own: not ours to remove
        reason = "" if trained is None else ", as no head got what --trained has learned"
        typer.echo(f"{adapter}, which was there before, is not of this plan{reason}: run {out} by itself, and remove the folder", err=True)
    got = made.outcome
    error = f"error on held-out prompts {got.verified.mean:.4f}, promised {got.verified.promised:.4f}"
    typer.echo(f"{got.speed:.2f}× less attention in {made.unit}; {error}")
    typer.echo(f"wrote {', '.join(map(str, written[:-1]))} and {written[-1]}")


def _candidate(text: str) -> "AttentionSpec | None":
    """The spec of a method's text, None for the original attention."""
    return None if text.strip() == "none" else options.parse_spec(text, reason="plan requires specs")
