"""The command line: a thin layer over the public names. Whatever needs torch is imported inside the commands, so that help is instant."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from dit_accel import files
from dit_accel.cli import doctor, evaluate, generate, options, plan, quality, recovery, view
from dit_accel.errors import ArgumentError, DitAccelError
from dit_accel.finetune.config import DistillConfig, OptimizerName, Trainable

HINTS = {
    "generate": "nothing was written; with --hires the same command continues after the last finished stage",
    "collect": "the same command continues with the prompts that are missing",
    "evaluate": "nothing was written; the same command starts over",
    "view": "nothing was written; the same command starts over",
    "plan": "the same command continues with what was measured so far",
    "distill": "the same command continues from the newest checkpoint, or with the samples recorded so far",
}


class Commands(TyperGroup):
    """All commands: a user's error becomes one line and exit code 2, an interruption a hint and 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except DitAccelError as error:  # a ValueError of another library may be a bug of ours: it keeps its traceback
            if ctx.params.get("traceback"):
                raise
            typer.echo("error: " + " ".join(str(error).split()), err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            typer.echo("interrupted: " + HINTS.get(ctx.invoked_subcommand or "", "run the same command again"), err=True)
            raise typer.Exit(130) from error


app = typer.Typer(cls=Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench = typer.Typer(no_args_is_help=True, help="Measure methods on a model: quality, what training recovers, or a denoising step's time.")
app.add_typer(bench, name="bench")


@app.callback()
def main(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from, for a bug report.")] = False,
) -> None:
    """Fast attention for diffusion transformers. Every command takes --help."""


@app.command(epilog="Example: dit-accel demo --out demo-out --quick")
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and its pictures.")] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller pictures and fewer steps.")] = False,
    seed: options.Seed = 0,
) -> None:
    """Show what the package does on the built-in model, as a report to open in a browser."""
    files.check_folder(out)
    from dit_accel.cli.models import without_notices

    with without_notices():
        from dit_accel.measure.demo import run_demo

        report = run_demo(out, quick=quick, seed=seed)
    typer.echo(f"wrote {report}")


app.command(epilog=generate.EPILOG)(generate.generate)


@app.command(epilog="Example: dit-accel collect --prompts prompts.txt --out samples --size 512x512 --steps 8")
def collect(
    out: Annotated[Path, typer.Option(help="Folder for the samples; complete ones in it are kept. Several machines may fill it at once.")],
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt per line; empty lines are skipped.")] = None,
    pictures: Annotated[
        Path | None,
        typer.Option(
            help="Folder of png, jpg or webp files, in place of prompts; captions in .txt files of their names or metadata.jsonl."
        ),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Only read every sample in the folder and name the damaged; exit code 1 where there are some."),
    ] = False,
    model: options.Model = "builtin",
    size: options.Sizes = None,
    frames: options.Frames = None,
    steps: options.Steps = 8,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
) -> None:
    """Record the original model drawing prompts, or on pictures of your own, as training data for distill (number i with seed + i)."""
    if [prompts is not None, pictures is not None, check].count(True) != 1:
        given = [
            name for name, value in (("--prompts", prompts), ("--pictures", pictures), ("--check", check or None)) if value is not None
        ]
        raise ArgumentError(f"give one of --prompts, --pictures and --check, not {' and '.join(given) or 'none'}")
    if check:
        _check_samples(out)
        return
    call = options.sampling_arguments(model, size, steps, guidance, max_sequence_length)
    texts = options.read_prompts(prompts) if prompts is not None else []
    if pictures is not None and not pictures.is_dir():
        raise ArgumentError(f"--pictures must be a folder, not {pictures}")
    if pictures is not None and "sizes" in call:
        raise ArgumentError(f"--pictures takes one --size, not {' and '.join(size or [])}")
    files.check_folder(out)
    from dit_accel.cli.models import frames_call, load_pipeline

    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call), video=frames is not None)
    call |= frames_call(pipe, frames)
    if pictures is not None:
        from dit_accel.finetune.data.pictures import collect_pictures

        samples = collect_pictures(pipe, pictures, out, seed=seed, **call)
    else:
        from dit_accel.finetune.data.collect import collect as collect_samples

        samples = collect_samples(pipe, texts, out, seed=seed, **call)
    if _is_main_process():
        typer.echo(f"{len(samples)} forwards in {out}; licence of the base model: {samples.manifest['licence']}")


def _check_samples(folder: Path) -> None:
    """Name the damaged runs of a folder; exit code 1 where there are some."""
    from dit_accel.finetune.data.collect import Samples, damaged_runs

    damaged = damaged_runs(folder)
    for name, wrong in damaged.items():
        typer.echo(f"{name}: {wrong}")
    count = len(list(folder.glob("run-*.safetensors")))
    if damaged:
        typer.echo(f"{len(damaged)} of {count} runs are damaged; collecting them again replaces them")
        raise typer.Exit(1)
    typer.echo(f"{count} runs, all whole; licence of the base model: {Samples(folder).manifest['licence']}")


def _is_main_process() -> bool:
    """Whether this process writes and speaks; the others that `accelerate launch` starts only share the work."""
    from accelerate import PartialState

    return bool(PartialState().is_main_process)


@app.command(epilog="Example: dit-accel distill --prompts prompts.txt --method clear:8 --steps 500 --out clear-r8")
def distill(
    prompts: Annotated[Path, typer.Option(help=options.PROMPTS_OR_SAMPLES)],
    out: Annotated[Path, typer.Option(help="Folder: the adapter goes to OUT/adapter; samples, checkpoints, log and curve.png to OUT/run.")],
    method: Annotated[str, typer.Option(help=options.METHOD_FORMS.removeprefix("none (the original attention), ") + ".")] = "fovea",
    vary: Annotated[
        list[str] | None,
        typer.Option(help="A method like --method's, of another density or radius, to draw one from at each step; may be repeated."),
    ] = None,
    model: options.Model = "builtin",
    held_out: Annotated[
        Path | None, typer.Option(help=f"For evaluation only: {options.PROMPTS_OR_SAMPLES} Unless given, a tenth of the prompts.")
    ] = None,
    train: Annotated[
        Trainable, typer.Option(help="parameters (the method's own), lora (also a LoRA on the attention) or attention (also its weights).")
    ] = DistillConfig.train,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = DistillConfig.steps,
    parameter_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Steps before them that fit the method's own parameters; unless given, 48 for sla or learned choices."),
    ] = DistillConfig.parameter_steps,
    batch_size: Annotated[int, typer.Option(min=1, help="Recorded forwards per training step.")] = DistillConfig.batch_size,
    optimizer: Annotated[
        OptimizerName, typer.Option(help="adamw, or muon for the attention's weights, which requires --train attention.")
    ] = DistillConfig.optimizer,
    learning_rate: Annotated[float, typer.Option(help="Rate of the LoRA or the attention's weights.")] = DistillConfig.learning_rate,
    parameter_learning_rate: Annotated[
        float | None, typer.Option(help="Rate of the method's own parameters; unless given, 0.001 for sla and 0.01 for others.")
    ] = DistillConfig.parameter_learning_rate,
    lora_rank: Annotated[int, typer.Option(min=1, help="Rank of the LoRA.")] = DistillConfig.lora_rank,
    checkpoint_every: Annotated[int, typer.Option(min=1, help="Training steps between checkpoints.")] = DistillConfig.checkpoint_every,
    evaluate_every: Annotated[
        int, typer.Option(min=0, help="Training steps between held-out evaluations, the points of the curve; 0: at start and end only.")
    ] = DistillConfig.evaluate_every,
    flow_weight: Annotated[
        float, typer.Option(min=0, help="Above 0: also learn the samples themselves, at drawn noise levels, as for pictures of your own.")
    ] = DistillConfig.flow_weight,
    mixed_precision: Annotated[
        Literal["no", "bf16"], typer.Option(help="Arithmetic of the training passes.")
    ] = DistillConfig.mixed_precision,
    sampling_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each recorded run.")] = 8,
    size: options.Sizes = None,
    frames: options.Frames = None,
    guidance: options.Guidance = None,
    max_sequence_length: options.TextLength = None,
    seed: options.Seed = DistillConfig.seed,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
) -> None:
    """Fine-tune a method towards the model's own original attention, and save it as an adapter. Continues where it was stopped.

    On several GPUs: accelerate launch -m dit_accel.cli distill ...
    """
    varied = [options.parse_spec(text, reason="--vary requires accelerated methods") for text in vary or []]
    config = DistillConfig(
        specs=tuple(varied), steps=steps, parameter_steps=parameter_steps, batch_size=batch_size, train=train,
        lora_rank=lora_rank, optimizer=optimizer, learning_rate=learning_rate,
        parameter_learning_rate=parameter_learning_rate, mixed_precision=mixed_precision,
        checkpoint_every=checkpoint_every, evaluate_every=evaluate_every, flow_weight=flow_weight, seed=seed, output_dir=str(out / "run"),
    )  # fmt: skip
    call = options.sampling_arguments(model, size, sampling_steps, guidance, max_sequence_length)
    source = options.read_prompts_or_samples(prompts)
    held_out_source = options.read_prompts_or_samples(held_out) if held_out else None
    spec = options.parse_accelerated(method, reason="distill requires an accelerated method")
    files.check_folder(out)
    from dit_accel import accelerate, save_adapter
    from dit_accel import distill as run_distillation
    from dit_accel.cli.models import frames_call, load_pipeline
    from dit_accel.finetune.data.collect import Samples

    pipe = load_pipeline(model, dtype, device, sizes=options.sizes_of(call), video=frames is not None)
    call |= frames_call(pipe, frames)
    accelerate(pipe, spec)
    result = run_distillation(pipe, source, config, held_out=held_out_source, **call)
    if not _is_main_process():
        return
    trained_on = Samples(source if isinstance(source, Path) else out / "run" / "samples")
    record = {
        # a path of this machine means nothing elsewhere
        "config": {name: value for name, value in config.to_dict().items() if name != "output_dir"},
        "prompts": len(trained_on.entries) if isinstance(source, Path) else len(source),
        "licence": trained_on.manifest["licence"],
        "sampling": call,
        "held_out_error_before": result.error_before,
        **({} if result.error_fitted is None else {"held_out_error_fitted": result.error_fitted}),
        "held_out_error_after": result.error_after,
    }
    folder = save_adapter(pipe, out / "adapter", training=record)
    if result.choice_loss is not None:
        typer.echo("held-out loss of the choice of blocks: {:.4f} before, {:.4f} after the first stage".format(*result.choice_loss))
    typer.echo(f"held-out relative error of the prediction: {result.error_before:.4f} before, {result.error_after:.4f} after")
    typer.echo(f"wrote {folder}")


app.command(epilog=evaluate.EPILOG)(evaluate.evaluate)
app.command(epilog=plan.EPILOG)(plan.plan)
app.command(epilog=view.EPILOG)(view.view)
bench.command(epilog=recovery.EPILOG)(recovery.recovery)
bench.command(epilog=quality.QUALITY)(quality.quality)
bench.command(epilog=quality.LOGITS)(quality.logits)


@bench.command(epilog="Example: dit-accel bench step --size 1024x1024 --size 2048x2048 --method fovea --method clear:16")
def step(
    model: options.Model = "builtin",
    size: Annotated[
        list[str] | None,
        typer.Option(help=f"{options.SIZE} May be repeated.", show_default="1024x1024"),
    ] = None,
    method: options.Methods = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    out: options.Result = None,
) -> None:
    """Measure the time of one denoising step, with each method and with the original attention."""
    sizes = [options.parse_size(text, model) for text in size or ["1024x1024"]]
    reason = "bench step requires accelerated methods (the original is always measured)"
    specs = [options.parse_accelerated(text, reason=reason) for text in method or ["fovea"]]
    if out:
        options.check_file(out)
    from dit_accel.cli.models import load_pipeline
    from dit_accel.measure.step import bench_step

    pipe, length = load_pipeline(model, dtype, device, sizes=sizes), options.text_length(model, max_sequence_length)
    bench_step(pipe, sizes=sizes, methods=specs, repeats=repeats, out=out, max_sequence_length=length)


@bench.command(epilog="Example: dit-accel bench draw --size 2048x2048 --method fovea --method clear:8")
def draw(
    prompt: Annotated[str, typer.Argument(help="What is drawn.")] = "a panda on a blue background",
    model: options.Model = "builtin",
    method: options.Methods = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="An adapter as in generate, measured in addition to the methods, or alone; may be repeated.")
    ] = None,
    size: options.Size = "1024x1024",
    frames: options.Frames = None,
    steps: options.Steps = 16,
    seed: options.Seed = 0,
    guidance: options.Guidance = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case.")] = 3,
    max_sequence_length: options.TextLength = None,
    dtype: options.Weights = "auto",
    device: options.Device = "auto",
    out: options.Result = None,
) -> None:
    """Measure the time of a whole picture or video, with each method and with the original attention."""
    pixels = options.parse_size(size, model)
    call = options.call_arguments(model, pixels, steps, guidance, max_sequence_length)
    reason = "bench draw requires accelerated methods (the original is always measured)"
    specs = [options.parse_accelerated(text, reason=reason) for text in method or ([] if adapter else ["fovea"])]
    if out:
        options.check_file(out)
    from dit_accel.cli.models import frames_call, load_pipeline
    from dit_accel.measure.draw import bench_draw

    pipe = load_pipeline(model, dtype, device, sizes=[pixels], video=frames is not None)
    pipe.set_progress_bar_config(disable=True)
    call |= frames_call(pipe, frames)
    bench_draw(pipe, prompt, methods=specs, adapters=adapter or [], repeats=repeats, seed=seed, out=out, **call)


@bench.command(epilog="Example: dit-accel bench kernels --out kernels.json")
def kernels(
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each case below 32,768 tokens; above it is one.")] = 5,
    largest: Annotated[int, typer.Option(min=4096, help="Leave out cases of more tokens than this.")] = 1 << 20,
    aot: Annotated[bool, typer.Option("--aot", help="Compile the GPU kernels instead, for GPUs that need not be here.")] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Time the GPU kernels' tiles on this GPU instead, and keep the fastest.")] = False,
    arch: Annotated[list[str] | None, typer.Option(help="With --aot: sm_80, sm_90, sm_100, sm_120 or gfx942; may be repeated.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="With --aot: only these methods; may be repeated.")] = None,
    head_dim: Annotated[list[int] | None, typer.Option(help="With --aot or --tune: 64, 128 or 256; may be repeated.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="With --aot or --tune: bfloat16 or float16; with --aot float32, with --tune int8 too; may be repeated."),
    ] = None,
    out: options.Result = None,
) -> None:
    """Measure the operator by itself against PyTorch's attention, show what the GPU kernels compile to, or tune them for this GPU."""
    if aot and tune:
        raise ArgumentError("give --aot or --tune, not both")
    if tune and (arch or method):
        raise ArgumentError("--arch and --method require --aot: --tune takes this GPU and every method")
    if out:
        options.check_file(out)
    if aot:
        from dit_accel.measure.gpu_compile import bench_aot, jobs

        bench_aot(jobs(method, arch, head_dim, dtype), out=out)
        return
    if tune:
        from dit_accel.measure.gpu_tune import bench_tune, work_of

        bench_tune(work_of(dtype, head_dim), out=out)
        return
    if arch or method or head_dim or dtype:
        raise ArgumentError("--arch and --method require --aot, --head-dim and --dtype require --aot or --tune")
    from dit_accel.measure.kernels import bench_kernels

    bench_kernels(repeats=repeats, largest=largest, out=out)


@app.command(epilog="Example: dit-accel estimate --gpu h100 --model flux --size 4096x4096 --method clear:16")
def estimate(
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, rtx4090, rtx5090 or mi300x.")] = "h100",
    model: Annotated[str, typer.Option(help="flux, sd3.5-large, qwen-image, hunyuan-video, wan-1.3b, wan-14b or builtin.")] = "flux",
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT in pixels, or one number for a square.")] = "4096",
    frames: Annotated[int, typer.Option(help="Frames of a video.")] = 1,
    method: Annotated[list[str] | None, typer.Option(help="A method as in generate; may be repeated.", show_default="fovea")] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many of these GPUs share the sequence.")] = 1,
    link: Annotated[str | None, typer.Option(help="With --devices: nvlink, pcie or ethernet.", show_default="nvlink")] = None,
    out: options.Result = None,
) -> None:
    """Estimate arithmetic, memory traffic and the least time of a model's attention on a GPU, or on several. Nothing is measured."""
    if link is not None and devices == 1:
        raise ArgumentError("--link requires --devices 2 or more")
    pixels = options.parse_size(size if "x" in size else f"{size}x{size}")
    specs = [
        options.parse_accelerated(text, reason="estimate requires accelerated methods (the original is always listed)")
        for text in method or ["fovea"]
    ]
    if out:
        options.check_file(out)
    from dit_accel.measure import estimate as roofline
    from dit_accel.measure import estimate_devices as several

    link = link or "nvlink"
    rows = [roofline.estimate(gpu, model, pixels, spec, frames=frames) for spec in [None, *specs]]
    shared: list[dict[str, Any]] = []
    for spec in [None, *specs] if devices > 1 else []:
        shared += several.estimate_devices(gpu, model, pixels, spec, devices=devices, link=link, frames=frames)
    if out:
        more = {"devices": devices, "link": link, "shared": shared} if shared else {}
        files.write_json(out, {"gpu": gpu, "model": model, "size": size, "frames": frames, "rows": rows, **more})
    roofline.show(gpu, model, rows)
    if shared:
        several.show(gpu, devices, link, shared)


@app.command(epilog="Example: dit-accel info --model builtin")
def info(
    model: Annotated[str | None, typer.Option(help="Also show which layers of this model would be accelerated.")] = None,
    adapter: Annotated[str | None, typer.Option(help="Also show what this adapter is (a folder, a hub id or a published file).")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Show what this method holds, weighs and reads; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON, for a bug report: no paths, user or machine names.")] = False,
) -> None:
    """Show versions, the machine, and which model families, methods and backends there are here."""
    if method and (model is not None or adapter is not None):
        raise ArgumentError("--method shows a method alone: leave --model and --adapter out")
    if method and as_json:
        raise ArgumentError("--json prints versions, the machine, a model and an adapter: leave --method out")
    specs = [options.parse_spec(text, reason="info --method requires accelerated methods") for text in method or []]
    from dit_accel.cli import info as cli_info

    if specs:
        for spec in specs:
            cli_info.show_frame(spec)
        return
    rows = cli_info.package_rows()
    if model is not None:
        rows |= cli_info.model_rows(model)
    if adapter is not None:
        rows |= cli_info.adapter_rows(adapter)
    cli_info.show_json(rows) if as_json else cli_info.show(rows)


app.command(epilog=doctor.EPILOG)(doctor.doctor)


@app.command(epilog="Example: dit-accel push clear-r8/adapter your-name/flux-clear-r8")
def push(
    adapter: Annotated[Path, typer.Argument(help="A folder made by distill or save_adapter; its pictures go along.")],
    repo: Annotated[str, typer.Argument(help="The hub repository, owner/name; created if it does not exist.")],
    private: Annotated[bool | None, typer.Option(help="Whether a new repository is private; unless given, the hub's default.")] = None,
) -> None:
    """Share an adapter with its model card on the Hugging Face hub, under the account that `hf auth login` has set."""
    from dit_accel import push_adapter

    typer.echo(push_adapter(adapter, repo, private=private))


if __name__ == "__main__":
    sys.exit(app())
