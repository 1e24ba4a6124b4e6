"""What a distillation finds in the process and in the model is there again afterwards, whether it ends, fails or is interrupted."""

import contextlib
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import distill_fixtures as tiny
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from distill_fixtures import PROMPTS, learn, student, untimed

from dit_accel import distill
from dit_accel.finetune.data.collect import Samples, collect
from dit_accel.finetune.distill import DistillResult
from dit_accel.method.assignment import Assignment
from dit_accel.patch.anatomy import plain_name
from dit_accel.patch.lora import ADAPTER

ENDINGS: dict[str, type[BaseException] | None] = {"success": None, "error": ArithmeticError, "interrupt": KeyboardInterrupt}
# what is trained, and settings; the first stage trains in the teacher's forwards, the others in the student's
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "fit": ("parameters", {"parameter_steps": 2}), "parameters": ("parameters", {}), "lora": ("lora", {}), "attention": ("attention", {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _accelerate() -> Iterator[None]:
    """accelerate as in a fresh process, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def process() -> dict[str, Any]:
    """All of the process's state that training code is known to touch."""
    backends = torch.backends
    hooks = [value for name, value in vars(torch.nn.modules.module).items() if name.startswith("_global_") and isinstance(value, dict)]
    threads = sorted(thread.name for thread in threading.enumerate() if thread.name != "tqdm_monitor")
    return {
        "accelerate": [dict(state._shared_state) for state in (PartialState, AcceleratorState, GradientState)],
        "autocast": (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_autocast_cache_enabled()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads(), threads),
        "random": (random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().tolist()),
        "backends": (
            torch.get_float32_matmul_precision(), backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32, backends.cudnn.benchmark,
            backends.cudnn.deterministic, backends.mkldnn.enabled, backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype(), torch.get_default_device(),
        ),
        "environment": dict(os.environ),
        "signals": signal.getsignal(signal.SIGINT),
        "hooks": [dict(found) for found in hooks],
    }  # fmt: skip


def model(pipe: Any) -> dict[str, Any]:
    """What the user set of the transformer, by names without our LoRA and our parameters."""
    transformer, kinds = pipe.transformer, ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = {plain_name(name): p for name, p in transformer.named_parameters() if ADAPTER not in name}
    modules = {name: m for name, m in transformer.named_modules() if ADAPTER not in name and not hasattr(m, "base_layer")}
    modules = {name.replace(".base_layer", ""): m for name, m in modules.items()}
    context = transformer._dit_accel.context
    active = transformer.active_adapters() if getattr(transformer, "peft_config", None) else []
    scales = [{k: v for k, v in m.scaling.items() if k != ADAPTER} for m in transformer.modules() if hasattr(m, "scaling")]
    return {
        "flags": {name: p.requires_grad for name, p in plain.items()},
        "gradients": {name: None if p.grad is None else p.grad.tolist() for name, p in plain.items()},
        "modes": {name: m.training for name, m in modules.items()},
        "hooks": {name: [list(getattr(m, kind)) for kind in kinds] for name, m in modules.items()},
        "checkpointing": transformer.is_gradient_checkpointing,
        "lora": ([name for name in active if name != ADAPTER], [x for x in scales if x]),
        "patch": (context.enabled, context.always, context.assignment, context.moment),
        "bar": dict(pipe._progress_bar_config),
    }


def particular(mode: str) -> Any:
    """A student whose user has left nothing at its default."""
    pipe = student(mode)
    if mode == "lora":
        tiny.add_lora(pipe)
    context = pipe.transformer._dit_accel.context
    context.assignment = Assignment.of(context.assignment, dense_steps=1)
    pipe.transformer.train()
    pipe.transformer.x_embedder.eval()
    for number, parameter in enumerate(pipe.transformer.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    weight = pipe.transformer.x_embedder.weight
    weight.grad = torch.ones_like(weight)
    return pipe


def end(pipe: Any, error: type[BaseException] | None) -> None:
    """Have the second forward of the first stage that trains raise."""
    calls = iter(range(1_000_000))

    def stop(module: Any, args: Any) -> None:
        if error is not None and torch.is_grad_enabled() and next(calls) == 1:  # sampling and evaluating take none
            raise error

    block = pipe.transformer.transformer_blocks[0]  # inside the model, where the patch's own hooks are at work
    block.register_forward_pre_hook(stop)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Samples]]:
    """Samples to train and to evaluate on, of a pipeline with a user's LoRA ("lora") and without."""
    pipes = {"plain": tiny.prompt_pipe(), "lora": tiny.prompt_pipe()}
    tiny.add_lora(pipes["lora"])
    folder = tmp_path_factory.mktemp("samples")
    parts = (PROMPTS[:1], PROMPTS[1:2])
    return {k: [collect(pipe, prompts, folder / f"{k} {prompts[0]}", **tiny.CALL) for prompts in parts] for k, pipe in pipes.items()}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_everything_is_as_it_was(tmp_path: Path, recorded: dict[str, list[Samples]], stage: str, ending: str) -> None:
    mode, settings = STAGES[stage]
    pipe, error = particular(mode), ENDINGS[ending]
    end(pipe, error)
    before, own = process(), model(pipe)
    settings = {"gradient_checkpointing": True, "mixed_precision": "bf16", "train": mode} | settings
    with contextlib.nullcontext() if error is None else pytest.raises(error):
        samples, held_out = recorded.get(mode, recorded["plain"])
        distill(pipe, samples, tiny.quick(tmp_path, steps=2, **settings), held_out=held_out, progress=False)
    after = process()
    for name, value in before.items():
        assert after[name] == value, name
    for name, value in model(pipe).items():
        # layers of a LoRA are new; whatever was there is as it was
        assert (value if name not in ("modes", "hooks") else {layer: value[layer] for layer in own[name]}) == own[name], name


def test_a_users_accelerator_lives_on(tmp_path: Path) -> None:
    mine = Accelerator(cpu=True, mixed_precision="bf16")
    learn(student("lora"), tmp_path, train="lora")
    assert mine.mixed_precision == "bf16"
    with mine.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> DistillResult:
    """What a training gives in a process that has nothing of its own."""
    return untimed(learn(student("lora"), tmp_path_factory.mktemp("expected"), train="lora"))


def test_the_precision_is_the_configs_and_no_accelerators(tmp_path: Path, expected: DistillResult) -> None:
    Accelerator(cpu=True, mixed_precision="bf16")
    assert untimed(learn(student("lora"), tmp_path / "full", train="lora")) == expected
    half = learn(student("lora"), tmp_path / "half", train="lora", mixed_precision="bf16")
    assert half.history[-1]["loss"] != expected.history[-1]["loss"]


@pytest.mark.parametrize("switched_off", [torch.no_grad, torch.inference_mode])
def test_gradients_that_a_caller_switched_off_are_taken(tmp_path: Path, expected: DistillResult, switched_off: Any) -> None:
    pipe = student("lora")
    with switched_off():
        got = learn(pipe, tmp_path, train="lora")
        assert not torch.is_grad_enabled()
    assert untimed(got) == expected


def test_collecting_leaves_accelerate_alone(tmp_path: Path) -> None:
    collect(tiny.prompt_pipe(), PROMPTS[:1], tmp_path, **tiny.CALL)
    assert PartialState._shared_state == {}
    Accelerator(mixed_precision="bf16", cpu=True)
