"""A tiny FLUX pipeline that takes real prompts, and short runs of collect and distill on it."""

import contextlib
import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import fill_randomly
from torch import Tensor

from dit_accel import CLEAR, SLA, AttentionSpec, DistillConfig, Fovea

PROMPTS = ["a cat on a blue background", "a panda on a red background", "a frog left of a cactus"]
CALL: dict[str, Any] = {"height": 144, "width": 112, "num_inference_steps": 2, "max_sequence_length": 8}  # 9 × 7 tokens, 8 of text
SPARSE = SLA(0.25, block=(16, 16))
LORA_SPEC = CLEAR(2.0)
SPECS: dict[str, AttentionSpec] = {"parameters": SPARSE, "lora": LORA_SPEC, "attention": LORA_SPEC}  # by what is trained
MODES = tuple(SPECS)


@functools.lru_cache(maxsize=1)
def _template() -> Any:
    """Seeded parts, made once; copies are handed out."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    from dit_accel.pipelines.builtin.components import TEXT_WIDTH, make_text_encoders, make_tokenizer

    torch.manual_seed(0)
    first, second = make_tokenizer(32, begin=True), make_tokenizer(512, begin=False)
    clip, t5 = make_text_encoders(len(first))
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=TEXT_WIDTH, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
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
    base = {"steps": 3, "warmup_steps": 0, "lora_rank": 2, "learning_rate": 1e-2, "checkpoint_every": 100, "output_dir": str(folder)}
    return DistillConfig(**(base | settings))


def add_lora(pipe: Any, name: str = "style", weight: float = 0.5) -> None:
    """A user's own LoRA on the attention, with random values and a strength of its own."""
    from peft import LoraConfig

    with torch.random.fork_rng():
        torch.manual_seed(7)
        lora = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        pipe.transformer.add_adapter(lora, adapter_name=name)
    pipe.transformer.set_adapters([name], [weight])


@contextlib.contextmanager
def leaves_alone(pipe: Any) -> Iterator[None]:
    """Fails unless the pipeline is unpatched, with the same weights, flags and picture, after the block."""
    flags = {name: p.requires_grad for name, p in pipe.transformer.named_parameters()}
    processors = dict(pipe.transformer.attn_processors)
    weights, picture = state(pipe.transformer), draw(pipe)
    yield
    assert not hasattr(pipe.transformer, "_dit_accel")
    assert pipe.transformer.attn_processors == processors
    assert same(state(pipe.transformer), weights)
    assert {name: p.requires_grad for name, p in pipe.transformer.named_parameters()} == flags
    assert torch.equal(draw(pipe), picture)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a run keeps its files."""
    return tmp_path / "run"


__all__ = [name for name in dir() if not name.startswith("_")] + ["Fovea"]
