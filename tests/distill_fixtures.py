"""A tiny FLUX pipeline that takes real prompts, and short runs of collect and distill on it."""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly
from tiny_parts import kl
from torch import Tensor

from dit_accel import CLEAR, SLA, AttentionSpec, DistillConfig, accelerate, distill
from dit_accel.finetune import fit as fitting
from dit_accel.finetune.distill import DistillResult
from dit_accel.patch.state import operators_of

PROMPTS = ["a cat on a blue background", "a panda on a red background", "a frog left of a cactus"]
CALL: dict[str, Any] = {"height": 112, "width": 144, "num_inference_steps": 2, "max_sequence_length": 8}  # 7 × 9 tokens, 8 of text
SPARSE = SLA(0.25, block=(16, 16))
LORA_SPEC = CLEAR(2.0)
SPECS: dict[str, AttentionSpec] = {"parameters": SPARSE, "lora": LORA_SPEC, "attention": LORA_SPEC}  # by what is trained
MODES = tuple(SPECS)


@functools.lru_cache(maxsize=1)
def _template() -> Any:
    """Seeded parts, made once; copies are handed out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from dit_accel.pipelines.builtin.components import POOLED_WIDTH, TEXT_WIDTH, make_text_encoders, make_tokenizer
    from dit_accel.pipelines.builtin.drawings import vocabulary

    torch.manual_seed(0)
    first, second = make_tokenizer(32, vocabulary(), begin=True), make_tokenizer(512, vocabulary(), begin=False)
    clip, t5 = make_text_encoders(len(first))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=POOLED_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill_randomly(transformer, 0)
    with torch.no_grad():  # logits spread enough for the attention to choose
        for name, parameter in transformer.named_parameters():
            if name.endswith(("norm_q.weight", "norm_k.weight", "to_v.weight")):
                parameter.mul_(2.0)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=clip.eval(), tokenizer=first, text_encoder_2=t5.eval(),
        tokenizer_2=second, transformer=transformer.eval(),
    )  # fmt: skip


def prompt_pipe(**parts: Any) -> Any:
    """A pipeline equal to every other one made here, but for `parts`; its transformer is its own."""
    from diffusers import FluxPipeline

    whole = dict(_template().components)
    whole |= {"transformer": copy.deepcopy(whole["transformer"]), "scheduler": copy.deepcopy(whole["scheduler"])} | parts
    pipe = FluxPipeline(**{k: v for k, v in whole.items() if k not in ("image_encoder", "feature_extractor")})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_pipe() -> Any:
    """`prompt_pipe` with an autoencoder, so that it draws pictures."""
    torch.manual_seed(0)
    return prompt_pipe(vae=kl(latent=4, factor_log2=3).eval())


def stop_training(pipe: Any, count: int) -> None:
    """Interrupt a training, as Ctrl+C does, before its forward number `count` (from 0) that has gradients."""
    calls = iter(range(1_000_000))

    def stop(module: Any, args: Any) -> None:
        if module.training and torch.is_grad_enabled() and next(calls) == count:
            raise KeyboardInterrupt

    pipe.transformer.register_forward_pre_hook(stop)


@contextlib.contextmanager
def fit_stops(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    """The first stage is interrupted before its step number `count` (from 0), for the length of a `with` block."""
    real = fitting._step

    def interrupted(run: Any, fitter: Any, step: int) -> Any:
        if step == count:
            raise KeyboardInterrupt
        return real(run, fitter, step)

    with monkeypatch.context() as patch:
        patch.setattr(fitting, "_step", interrupted)
        yield


def half_pipe() -> Any:
    """`prompt_pipe` in bfloat16."""
    parts = {name: copy.deepcopy(_template().components[name]) for name in ("text_encoder", "text_encoder_2")}
    return prompt_pipe(**parts).to(torch.bfloat16)


def student(mode: str = "parameters") -> Any:
    """An accelerated pipeline that the mode can train."""
    return accelerate(prompt_pipe(), SPECS[mode])


def draw(pipe: Any, prompt: str = PROMPTS[0], seed: int = 0, **call: Any) -> Tensor:
    """The packed latents that a pipeline draws for a prompt."""
    latents = pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **(CALL | call)).images
    assert bool(latents.isfinite().all()), "the pipeline drew NaN or infinity"
    return latents


def state(module: Any) -> dict[str, Tensor]:
    """A copy of all parameters and buffers."""
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Equal names and equal bits."""
    return sorted(left) == sorted(right) and all(torch.equal(left[name], right[name]) for name in left)


def quick(folder: Path, **settings: Any) -> DistillConfig:
    """A few fast steps."""
    base = {
        "steps": 3,
        "parameter_steps": 0,
        "warmup_steps": 0,
        "lora_rank": 2,
        "learning_rate": 1e-2,
        "checkpoint_every": 100,
        "output_dir": str(folder),
    }
    return DistillConfig(**(base | settings))


def learn(pipe: Any, folder: Path, prompts: Any = PROMPTS, held_out: Any = None, **settings: Any) -> DistillResult:
    """Distil in place, quickly."""
    return distill(pipe, prompts, quick(folder, **settings), held_out=held_out, progress=False, **CALL)


def steps_of(result: DistillResult) -> list[dict[str, float]]:
    """The rows of training steps, without those of the errors before them."""
    return [row for row in result.history if row["step"] > 0]


def untimed(result: DistillResult) -> DistillResult:
    """The result without `seconds`, which no two runs share."""
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in part] for part in (result.history, result.parameter_history)]
    return dataclasses.replace(result, history=rows[0], parameter_history=rows[1])


def student_forwards(pipe: Any) -> list[tuple[dict[str, Any], Tensor]]:
    """Grows by the arguments and the output of every training forward of the student."""
    seen: list[tuple[dict[str, Any], Tensor]] = []

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if module.training and torch.is_grad_enabled():
            seen.append((kwargs, output[0].detach().clone()))

    pipe.transformer.register_forward_hook(hook, with_kwargs=True)
    return seen


def text_of(arguments: dict[str, Any]) -> bytes:
    """What tells one prompt's forwards from another's."""
    embeddings: Tensor = arguments["encoder_hidden_states"]
    return embeddings.numpy().tobytes()


def perturb(pipe: Any) -> None:
    """Move the method's own parameters away from where they are good."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (p for operator in operators_of(pipe).values() for p in operator.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)


def add_lora(pipe: Any, name: str = "style", weight: float = 0.5) -> None:
    """A user's own LoRA on the attention, with random values and a strength of its own."""
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(7)
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(lora, adapter_name=name)
    pipe.transformer.set_adapters([name], [weight])


def flags(transformer: Any) -> dict[str, bool]:
    """Whether each parameter but ours requires a gradient, by the name it has without any LoRA."""
    own = {name: p.requires_grad for name, p in transformer.named_parameters() if ".dit_accel." not in name}
    return {name.replace(".base_layer.", "."): flag for name, flag in own.items()}


@contextlib.contextmanager
def unchanged(pipe: Any) -> Iterator[None]:
    """Fails unless the pipeline has the same patch or none, weights, flags, mode and picture after the block."""
    model = pipe.transformer
    before = (
        dict(model.attn_processors),
        flags(model),
        model.training,
        model.is_gradient_checkpointing,
        getattr(model, "_dit_accel", None),
    )
    weights, picture = state(model), draw(pipe)
    yield
    after = (dict(model.attn_processors), flags(model), model.training, model.is_gradient_checkpointing, getattr(model, "_dit_accel", None))
    assert same(state(model), weights)
    for was, now in zip(before, after, strict=True):
        assert was == now
    assert torch.equal(draw(pipe), picture)


# A run in a process of its own: folder, mode, threads. Steps are slow once there is a checkpoint, so that it can be killed.
CHILD = """
import signal, sys, time, torch
from pathlib import Path
from distill_fixtures import learn, student
signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(int(sys.argv[3]))
pipe, folder = student(sys.argv[2]), Path(sys.argv[1])
pipe.transformer.register_forward_pre_hook(lambda *_: time.sleep(0.3 * any(folder.glob("checkpoint-*"))))
learn(pipe, folder, train=sys.argv[2], steps=6, batch_size=2, checkpoint_every=2)
"""
