"""A small Wan-architecture text-to-video model: its parts, its clips of drawings in motion, its training.

No trained weights ship yet: `python -m dit_accel.pipelines.builtin_video.train` makes a folder that `video_pipeline` loads.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import WanPipeline

TEXT_TOKENS = 24  # `max_sequence_length` that its captions need; Wan's default of 512 only costs time


def video_pipeline(folder: str | Path, **kwargs: Any) -> "WanPipeline":
    """`WanPipeline.from_pretrained` on a folder that the training made; `kwargs` (dtype, ...) go to it.

    It films the things of its captions in motion ("a panda moving left on a blue background", "a star spinning"): 17 frames, 128 to 512
    pixels and more. Pass `max_sequence_length=24` and `guidance_scale=3` or so.
    """
    from diffusers import WanPipeline

    # diffusers loads components of other packages only where their modules have been imported
    import dit_accel.pipelines.builtin_video.autoencoder
    import dit_accel.pipelines.builtin_video.transformer  # noqa: F401

    return WanPipeline.from_pretrained(folder, **kwargs)
