"""The built-in video model: a small Wan-architecture text-to-video pipeline that ships with the package, its clips, its training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import WanPipeline

WEIGHTS = Path(__file__).parent / "weights"
TEXT_TOKENS = 24  # `max_sequence_length` that its captions need; Wan's default of 512 only costs time


def builtin_video_pipeline(folder: str | Path = WEIGHTS, **kwargs: Any) -> "WanPipeline":
    """`WanPipeline.from_pretrained` on the folder that ships with the package or one that the training made; `kwargs` go to it.

    It films the things of its captions in motion ("a panda moving left on a blue background", "a star spinning"): 17 frames, 128 to 512
    pixels and more. Pass `max_sequence_length=24` and `guidance_scale=3` or so.
    """
    from diffusers import WanPipeline

    # diffusers loads components of other packages only where their modules have been imported
    import dit_accel.pipelines.builtin_video.autoencoder
    import dit_accel.pipelines.builtin_video.transformer  # noqa: F401

    return WanPipeline.from_pretrained(folder, **kwargs)
