"""dit_accel: fast attention for diffusion transformers, patched into a stock diffusers pipeline in one call."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.adapters.folder import load_adapter, push_adapter, save_adapter
    from dit_accel.finetune.config import DistillConfig
    from dit_accel.finetune.distill import distill
    from dit_accel.integrations.function import as_attention_function
    from dit_accel.kernels.precision import (
        get_float32_attention_precision,
        get_query_key_products,
        set_float32_attention_precision,
        set_query_key_products,
    )
    from dit_accel.method.assignment import Assignment, Rule
    from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
    from dit_accel.method.spec import AttentionSpec
    from dit_accel.operator.attention import attention
    from dit_accel.operator.layout import TokenLayout
    from dit_accel.parallel.decoding import shared_decoding
    from dit_accel.patch.summary import summary
    from dit_accel.patch.verbs import accelerate, dense, restore
    from dit_accel.pipelines.builtin import builtin_pipeline
    from dit_accel.pipelines.builtin_video import builtin_video_pipeline
    from dit_accel.pipelines.hires import generate_hires
    from dit_accel.pipelines.video import save_video
    from dit_accel.planner.planning import plan
    from dit_accel.planner.view import view_attention

__version__ = "0.2.0"

# name -> module; imported on first use, so that `import dit_accel` loads neither diffusers nor triton
_HOMES = {
    "accelerate": "patch.verbs",
    "restore": "patch.verbs",
    "dense": "patch.verbs",
    "summary": "patch.summary",
    "distill": "finetune.distill",
    "DistillConfig": "finetune.config",
    "save_adapter": "adapters.folder",
    "load_adapter": "adapters.folder",
    "push_adapter": "adapters.folder",
    "plan": "planner.planning",
    "Fovea": "method.presets",
    "CLEAR": "method.presets",
    "SLA": "method.presets",
    "GNA": "method.presets",
    "AttentionSpec": "method.spec",
    "Assignment": "method.assignment",
    "Rule": "method.assignment",
    "TokenLayout": "operator.layout",
    "attention": "operator.attention",
    "as_attention_function": "integrations.function",
    "get_float32_attention_precision": "kernels.precision",
    "set_float32_attention_precision": "kernels.precision",
    "get_query_key_products": "kernels.precision",
    "set_query_key_products": "kernels.precision",
    "builtin_pipeline": "pipelines.builtin",
    "builtin_video_pipeline": "pipelines.builtin_video",
    "generate_hires": "pipelines.hires",
    "save_video": "pipelines.video",
    "shared_decoding": "parallel.decoding",
    "view_attention": "planner.view",
}

__all__ = [
    "CLEAR",
    "GNA",
    "SLA",
    "Assignment",
    "AttentionSpec",
    "DistillConfig",
    "Fovea",
    "Rule",
    "TokenLayout",
    "accelerate",
    "as_attention_function",
    "attention",
    "builtin_pipeline",
    "builtin_video_pipeline",
    "dense",
    "distill",
    "generate_hires",
    "get_float32_attention_precision",
    "get_query_key_products",
    "load_adapter",
    "plan",
    "push_adapter",
    "restore",
    "save_adapter",
    "save_video",
    "set_float32_attention_precision",
    "set_query_key_products",
    "shared_decoding",
    "summary",
    "view_attention",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    try:
        module = importlib.import_module(f"dit_accel.{_HOMES[name]}")
    except ModuleNotFoundError:
        if any(link.is_file() for link in (Path(__file__).with_name(name) for name in ("kernels", "finetune", "pipelines"))):
            raise ImportError(
                "this checkout of dit_accel has text files in the place of its symbolic links (dit_accel/kernels and others): "
                "run `git config core.symlinks true` and `git checkout -- dit_accel`, or install a wheel"
            ) from None
        raise
    value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
