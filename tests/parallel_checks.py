"""What the processes of a context-parallel run compare with one process alone, within themselves: `run_all` in each of them."""

import copy
import functools
import json
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers as D
import diffusers.hooks.context_parallel as context_parallel
import pytest
import torch
import torch.distributed as dist
from conftest import fill_randomly, position_ids, relative_error
from distill_fixtures import CALL, PROMPTS, prompt_pipe, quick
from peft import LoraConfig
from safetensors.torch import save_file
from test_families import SPARSE, Tiny
from tiny_transformers import kept, make
from torch import Tensor
from typer.testing import CliRunner

import dit_accel
from dit_accel import CLEAR, SLA, Assignment, Fovea, Rule, distill
from dit_accel.cli.app import app
from dit_accel.errors import DistillationError
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import guard
from dit_accel.parallel import halo, traffic
from dit_accel.patch import processor

TRAINING: dict[str, Any] = {"train": "lora", "attention_weight": 0.5, "flow_weight": 0.5, "gradient_checkpointing": True, "batch_size": 2}
TRAINING_CALL: dict[str, Any] = CALL | {"width": 128}  # 7 × 8 tokens and 8 of text
FOLDER: list[Path] = []  # of this run
CHECKS: dict[str, Callable[[int], Any]] = {}
Answer = dict[str, float]
Spread = Callable[..., None]


def check(function: Callable[[int], Any]) -> Callable[[int], Any]:
    """Add a function of the number of processes; what it returns is written, by its name."""
    CHECKS[function.__name__] = function
    return function


def run_all(folder: Path, names: Sequence[str]) -> None:
    """Run some checks in this process of several, and leave what each found, or how it failed."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a machine without a GPU has none
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    context_parallel._all_gather_anything = gathered
    found: dict[str, Any] = {}
    FOLDER[:] = [folder]
    try:
        for name in names:
            try:
                found[name] = CHECKS[name](dist.get_world_size())
            except Exception:
                found[name] = traceback.format_exc()
                break  # the others wait for this one: what follows would be told of this check's failure
    finally:
        (folder / f"found-{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


def gathered(tensor: Tensor, dim: int, group: Any) -> Tensor:
    """diffusers' gathering of parts that differ in size, which it leaves to NCCL: gloo gathers equal ones."""
    sizes = [0] * dist.get_world_size(group)
    dist.all_gather_object(sizes, tensor.shape[dim], group=group)
    padding = [0, 0] * (tensor.ndim - dim - 1) + [0, max(sizes) - tensor.shape[dim]]
    padded = torch.nn.functional.pad(tensor, padding).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes, strict=True)], dim)


def ulysses(model: Any, count: int, *, anything: bool = False, **settings: Any) -> None:
    """Spread a model over so many processes."""
    model.enable_parallelism(config=D.ContextParallelConfig(ulysses_degree=count, ulysses_anything=anything), **settings)


def ring(model: Any, count: int, *, anything: bool = False, **settings: Any) -> None:
    """The same, so that each has a band of the tokens."""
    model.enable_parallelism(config=D.ContextParallelConfig(ring_degree=count, ring_anything=anything), **settings)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def flux(heads: int = 4) -> Any:
    """A FLUX transformer in float64: what differs is rounding, not a choice of blocks."""
    torch.manual_seed(0)
    model = D.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=heads,
        joint_attention_dim=32, pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill_randomly(model, 0)
    return model.double().eval()


def flux_call(height: int, width: int, text: int, *, batch: int = 1, seed: int = 0) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, height * width, 16, seed=seed), "encoder_hidden_states": normal(batch, text, 32, seed=seed + 1),
        "pooled_projections": normal(batch, 24, seed=seed + 2), "timestep": torch.full((batch,), 0.7).double(),
        "guidance": torch.full((batch,), 3.5).double(), "img_ids": position_ids(height, width), "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


def wan(heads: int = 4, kind: Any = D.WanTransformer3DModel) -> Any:
    torch.manual_seed(0)
    model = kind(
        patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=32, freq_dim=64,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    fill_randomly(model, 0)
    return model.double().eval()


def wan_call(frames: int, height: int, width: int, text: int = 12, *, batch: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": normal(batch, 16, frames, 2 * height, 2 * width, seed=0), "encoder_hidden_states": normal(batch, text, 32, seed=1),
        "timestep": torch.full((batch,), 700.0).double(),
    }  # fmt: skip


LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def ready(model: Any, method: Any, count: int, *, first: str, anything: bool, lora: bool, spread: Spread = ulysses) -> None:
    """Accelerate a model, its operators away from their start values, and spread it over processes, in either order; 1: not at all."""
    if lora:
        torch.manual_seed(1)
        model.add_adapter(copy.deepcopy(LORA))
        model.double()
    if count > 1 and first == "parallel":
        spread(model, count, anything=anything)
    dit_accel.accelerate(model, method, strict=True)
    for seed, module in enumerate(m.dit_accel for m in model.modules() if hasattr(m, "dit_accel")):
        fill_randomly(module.double(), seed, 0.3)
        module.requires_grad_(True)
    if count > 1 and first == "accelerate":
        spread(model, count, anything=anything)


def passed(model: Any, call: dict[str, Any], *, summed: bool) -> dict[str, Tensor]:
    """The output and all gradients of a forward, those of all processes added where they share it."""
    model.zero_grad()
    call = {name: x.clone().requires_grad_() if x.dtype == torch.float64 else x for name, x in call.items()}
    out = model(**call, return_dict=False)[0]
    (out * normal(*out.shape, seed=9)).sum().backward()
    named = {**dict(model.named_parameters()), **{name: x for name, x in call.items() if x.requires_grad}}
    grads = {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in named.items()}
    if summed:
        for gradient in grads.values():
            dist.all_reduce(gradient)
    return {"output": out.detach(), **grads}


def compared(
    make_model: Callable[[], Any], calls: Sequence[dict[str, Any]], method: Any, count: int, *, first: str = "parallel",
    anything: bool = False, lora: bool = False, checkpointing: bool = False, spread: Spread = ulysses,
) -> Answer:  # fmt: skip
    """How far the output and the gradients, each against the largest of its kind, are from those of one process, over some calls."""
    alone, together = make_model(), make_model()
    ready(alone, method, 1, first=first, anything=anything, lora=lora)
    ready(together, method, count, first=first, anything=anything, lora=lora, spread=spread)
    if checkpointing:
        together.enable_gradient_checkpointing()
    errors: Answer = {"output": 0.0, "gradients": 0.0}
    for call in calls:
        expected = passed(alone, call, summed=False)
        got, heads = counted(functools.partial(passed, together, call, summed=True))
        errors["heads"] = max(heads, default=0)  # none where a process has heads with the original attention alone
        errors["output"] = max(errors["output"], relative_error(got.pop("output"), expected.pop("output")))
        largest = max(float(x.norm()) for x in expected.values())
        for name, x in expected.items():
            errors["gradients"] = max(errors["gradients"], float((got[name] - x).norm()) / max(float(x.norm()), 1e-6 * largest))
        errors["learned"] = sum(float(x.norm()) > 0 for name, x in expected.items() if ".dit_accel." in name)
    return errors


# FLUX: text and image, each split by itself


@check
def flux_text_0(count: int) -> Answer:
    return compared(flux, [flux_call(6, 10, 0)], Fovea(0.3, tile=(4, 4)), count)


@check
def flux_text_77(count: int) -> Answer:
    """77 tokens of text and 7 × 9 of the image, which no number of processes divides."""
    return compared(flux, [flux_call(7, 9, 77)], Fovea(0.3, tile=(4, 4)), count, anything=True)


@check
def flux_text_512_two_sizes_lora(count: int) -> Answer:
    calls = [flux_call(6, 10, 512), flux_call(10, 14, 512, batch=2, seed=5)]
    return compared(flux, calls, SLA(0.3, tile=(4, 4)), count, first="accelerate", lora=True)


@check
def flux_of_many_specs(count: int) -> Answer:
    """Heads that differ in cost, one of them with the original attention, and what is learned of each."""
    rules = (Rule(Fovea(0.3, tile=(4, 4))), Rule(SLA(0.5, tile=(4, 4)), heads=(0, 1)), Rule(None, heads=(2,)))
    return compared(flux, [flux_call(6, 10, 12)], Assignment(rules), count, checkpointing=True)


@check
def wan_clip(count: int) -> Answer:
    return compared(wan, [wan_call(3, 4, 6), wan_call(2, 6, 10, 7)], Fovea(0.3, tile=(2, 4, 4)), count, first="accelerate")


@check
def wan_ragged(count: int) -> Answer:
    """3 × 5 × 7 tokens."""
    return compared(wan, [wan_call(3, 5, 7)], SLA(0.3, tile=(2, 4, 2)), count, anything=True, lora=True)


@check
def chronoedit(count: int) -> Answer:
    call = wan_call(2, 4, 6)
    return compared(lambda: wan(kind=D.ChronoEditTransformer3DModel), [call], CLEAR(2.0, tile=(4, 4)), count)


# Whole pipelines, with guidance


def counted(run: Callable[[], Any]) -> tuple[Any, set[int]]:
    """What it returns, and the numbers of heads that the operator was given meanwhile."""
    heads: set[int] = set()
    original = processor.attend
    processor.attend = halo.attend = lambda query, *rest, **more: heads.add(query.shape[1]) or original(query, *rest, **more)
    try:
        return run(), heads
    finally:
        processor.attend = halo.attend = original


def sampled(
    build: Callable[[], Tiny], count: int, *, anything: bool = True, spread: Spread = ulysses, method: str | AttentionSpec = "clear",
    **settings: Any,
) -> dict[str, Any]:  # fmt: skip
    """How far a picture or clip is from that of one process, and the heads of each operator."""
    expected, shared = build(), build()
    for tiny in (expected, shared):
        dit_accel.accelerate(tiny.pipe, SPARSE[method] if isinstance(method, str) else method, strict=True)
    for transformer in shared.transformers:
        spread(transformer, count, anything=anything, **settings)
    drawn, heads = counted(shared.run)
    return {"error": relative_error(drawn, expected.run()), "heads": sorted(heads)}


def stock(build: Callable[[], Tiny], count: int) -> str:
    """What a model that is not accelerated raises under context parallelism."""
    tiny = build()
    ulysses(tiny.pipe.transformer, count, anything=True)
    try:
        tiny.run()
    except RuntimeError as error:
        return str(error)
    return ""


PIPELINES = (
    "flux", "flux_kontext", "flux2", "flux2_with_reference", "qwen_image", "qwen_image_edit_plus", "wan", "wan22_two_experts", "wan_i2v",
)  # fmt: skip


def interleaved_ltx2() -> Tiny:
    """With a rotary embedding of three axes: diffusers splits no other."""
    tiny = Tiny("ltx2")
    old = tiny.pipe.transformer
    tiny.pipe.transformer = type(old).from_config({**old.config, "rope_type": "interleaved"})
    return tiny


def without_masks(tiny: Tiny) -> Tiny:
    """A pipeline whose text is not padded: its transformer requires no masks."""

    def drop(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {name: None if name.endswith("attention_mask") else value for name, value in kwargs.items()}

    tiny.pipe.transformer.register_forward_pre_hook(drop, with_kwargs=True)
    return tiny


def helios_loop() -> Tiny:
    """With earlier frames in its sequence, a number of tokens that no number of processes divides."""
    tiny = Tiny("helios")
    tiny.pipe.transformer = make("helios", is_amplify_history=False)
    tiny.pipe.components = {"transformer": tiny.pipe.transformer}
    fill_randomly(tiny.pipe.transformer.eval(), 0)
    return tiny


def helios_plan(count: int) -> Any:
    """That of the class, which is for its 40 layers."""
    model = make("helios")
    absent = tuple(f"blocks.{n}." for n in range(len(model.blocks), 40))
    return {name: part for name, part in model._cp_plan.items() if not name.startswith(absent)}


@check
def pipelines(count: int) -> dict[str, Any]:
    found: dict[str, Any] = {name: sampled(lambda: Tiny(name), count) for name in PIPELINES}  # noqa: B023
    found["ltx"] = sampled(lambda: without_masks(Tiny("ltx")), count)
    found["helios"] = sampled(helios_loop, count, cp_plan=helios_plan(count))
    return found


def bytes_of(run: Callable[[], Any]) -> list[int]:
    """What each message that this process sends to others has in it."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def counting(received: Tensor, given: Tensor, incoming: Any, outgoing: list[int], **settings: Any) -> Any:
        sent.append((given.numel() - outgoing[dist.get_rank()]) * given.element_size())
        return original(received, given, incoming, outgoing, **settings)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(dist, "all_to_all_single", counting)
        run()
    return sent


@check
def bytes_sent(count: int) -> dict[str, float]:
    """What a process sends to others in one forward of FLUX's two layers, and what the formula says of float64."""
    model = flux()
    dit_accel.accelerate(model, Fovea(0.3, tile=(4, 4)), strict=True)
    ulysses(model, count)
    sent = bytes_of(lambda: model(**flux_call(6, 10, 12), return_dict=False))
    return {"measured": sum(sent), "formula": 2 * traffic.ulysses(72, 4, 16, count, width=8), "messages": len(sent)}


def trained(count: int, spread: Spread, name: str) -> list[dict[str, Any]]:
    """The history of a LoRA trained by all on parts of each sequence, whose weights are left in a file; see the test."""
    pipe = prompt_pipe()
    dit_accel.accelerate(pipe, CLEAR(2.0))
    spread(pipe.transformer, count)
    result = distill(pipe, PROMPTS, quick(FOLDER[0] / name, **TRAINING), progress=False, **TRAINING_CALL)
    weights = {k: v.contiguous() for k, v in pipe.transformer.state_dict().items()}
    save_file(weights, FOLDER[0] / f"{name}-{dist.get_rank()}.safetensors")
    return result.history


@check
def distilled(count: int) -> dict[str, Any]:
    """With samples and checkpoints, which the main process writes."""
    history = trained(count, ulysses, "run")
    pipe = dit_accel.accelerate(prompt_pipe(), SLA(0.25, block=(16, 16)))
    ulysses(pipe.transformer, count)
    try:
        distill(pipe, PROMPTS, quick(FOLDER[0] / "refused", parameter_steps=2), progress=False, **TRAINING_CALL)
        refused = ""
    except DistillationError as error:
        refused = str(error)
    return {"history": history, "refused": refused}


@check
def command(count: int) -> dict[str, Any]:
    """`dit-accel generate` as torchrun starts it, against one process: whether this one wrote, and what."""
    words = ["generate", "a panda", "--size", "128x160", "--steps", "1", "--method", "fovea:0.2", "--strict", "--out"]
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        together, alone = Path(name, "together.png"), Path(name, "alone.png")
        (first, heads) = counted(lambda: CliRunner().invoke(app, [*words, str(together)], catch_exceptions=False))
        patch.setenv("WORLD_SIZE", "1")
        second = CliRunner().invoke(app, [*words, str(alone)], catch_exceptions=False)
        same = together.read_bytes() == alone.read_bytes() if together.exists() else None
    return {"codes": [first.exit_code, second.exit_code], "spoke": "wrote" in first.output, "heads": sorted(heads), "same": same}


@check
def broken_in_diffusers(count: int) -> dict[str, str]:
    return {"mask": stock(lambda: Tiny("ltx"), count), "rope": stock(lambda: without_masks(interleaved_ltx2()), count)}


def with_padded_text() -> Tiny:
    """Qwen-Image under a mask of its text, which is split as the text is."""
    tiny = Tiny("qwen_image")
    tiny.call |= {"negative_prompt_embeds": normal(1, 12, 16, seed=3).float(), "negative_prompt_embeds_mask": kept(1, 12, 7).long()}
    return tiny


@check
def padded_text(count: int) -> dict[str, Any]:
    return sampled(with_padded_text, count)


def in_bfloat16() -> Tiny:
    tiny = Tiny("flux")
    tiny.pipe.to(torch.bfloat16)
    tiny.call |= {name: x.bfloat16() for name, x in tiny.call.items() if isinstance(x, Tensor)}
    return tiny


@check
def half(count: int) -> dict[str, Any]:
    return sampled(in_bfloat16, count)


@check
def dense_and_restored(count: int) -> dict[str, float]:
    """The original model under context parallelism, within `dense` and after `restore`."""
    tiny, expected = Tiny("flux"), Tiny("flux").run()
    dit_accel.accelerate(tiny.pipe, SPARSE["fovea"])
    ulysses(tiny.pipe.transformer, count)
    sparse = relative_error(tiny.run(), expected)
    with dit_accel.dense(tiny.pipe):
        within = relative_error(tiny.run(), expected)
    dit_accel.restore(tiny.pipe)
    return {"sparse": sparse, "within": within, "after": relative_error(tiny.run(), expected)}


@check
def one_decision(count: int) -> list[list[int]]:
    """The heads that each process's operators were given, where they disagree whether the method is faster: the first decides."""
    tiny = Tiny("flux")
    dit_accel.accelerate(tiny.pipe, SPARSE["fovea"])
    ulysses(tiny.pipe.transformer, count)
    found = []
    for first_says in (1.0, 9.0):
        seconds = first_says if dist.get_rank() == 0 else 10.0 - first_says
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "measured", lambda *_: guard.Crossover(seconds, 2.0))  # noqa: B023
            found.append(sorted(counted(lambda: tiny.run(height=32 if first_says < 2 else 48))[1]))  # noqa: B023
    return found
