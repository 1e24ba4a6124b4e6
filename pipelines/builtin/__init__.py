"""The built-in model: a small FLUX-architecture text-to-image pipeline that ships with the package."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import FluxPipeline

WEIGHTS = Path(__file__).parent / "weights"
TOKEN_PIXELS = 16  # side of a token, of the built-in video model too
TEXT_TOKENS = 32  # `max_sequence_length` that its captions need; FLUX's default of 512 only costs time


def builtin_pipeline(**kwargs: Any) -> "FluxPipeline":
    """`FluxPipeline.from_pretrained` on the folder that ships with the package; `kwargs` (dtype, ...) go to it.

    It draws the things of its captions ("a panda on a blue background", "a cat left of a cactus") at 256 to 1024 pixels and more.
    """
    from diffusers import FluxPipeline

    # diffusers loads components of other packages only where their modules have been imported
    import dit_accel.pipelines.builtin.autoencoder
    import dit_accel.pipelines.builtin.transformer  # noqa: F401

    return FluxPipeline.from_pretrained(WEIGHTS, **kwargs)
