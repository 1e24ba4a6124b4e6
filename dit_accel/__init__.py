"""dit_accel: fast attention for diffusion transformers, patched into a stock diffusers pipeline in one call."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.adapter import load_adapter, push_adapter, save_adapter
    from dit_accel.finetune.config import DistillConfig
    from dit_accel.finetune.distill import distill
    from dit_accel.layers import summary
    from dit_accel.layout import TokenLayout
    from dit_accel.operator import attention
    from dit_accel.patch import accelerate, dense, restore
    from dit_accel.pipelines.builtin import builtin_pipeline
    from dit_accel.pipelines.builtin_video import builtin_video_pipeline
    from dit_accel.pipelines.hires import generate_hires
    from dit_accel.pipelines.video import save_video
    from dit_accel.presets import CLEAR, GNA, SLA, Fovea
    from dit_accel.spec import AttentionSpec

__version__ = "0.1.0"

# name -> module; imported on first use, so that `import dit_accel` loads neither diffusers nor triton
_HOMES = {
    "accelerate": "patch",
    "restore": "patch",
    "dense": "patch",
    "summary": "layers",
    "distill": "finetune.distill",
    "DistillConfig": "finetune.config",
    "save_adapter": "adapter",
    "load_adapter": "adapter",
    "push_adapter": "adapter",
    "Fovea": "presets",
    "CLEAR": "presets",
    "SLA": "presets",
    "GNA": "presets",
    "AttentionSpec": "spec",
    "TokenLayout": "layout",
    "attention": "operator",
    "builtin_pipeline": "pipelines.builtin",
    "builtin_video_pipeline": "pipelines.builtin_video",
    "generate_hires": "pipelines.hires",
    "save_video": "pipelines.video",
}

__all__ = [
    "CLEAR",
    "GNA",
    "SLA",
    "AttentionSpec",
    "DistillConfig",
    "Fovea",
    "TokenLayout",
    "accelerate",
    "attention",
    "builtin_pipeline",
    "builtin_video_pipeline",
    "dense",
    "distill",
    "generate_hires",
    "load_adapter",
    "push_adapter",
    "restore",
    "save_adapter",
    "save_video",
    "summary",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'dit_accel' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dit_accel.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
