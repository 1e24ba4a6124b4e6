"""Loading a pipeline by name, without those start-up notices of the libraries that a user can't act on."""

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

from dit_accel.errors import ArgumentError, UnsupportedModelError

# loggers with the words that make up a notice to keep back; everything else these loggers say still reaches the user
NOTICES = (
    ("transformers.utils.import_utils", ("ImageProcessor", "requires torchvision (not installed)")),
    ("diffusers.pipelines.pipeline_utils", ("Expected types for vae", "PatchAutoencoder")),
    ("diffusers.pipelines.pipeline_utils", ("Expected types for vae", "ClipAutoencoder")),
    ("diffusers.pipelines.pipeline_utils", ("Expected types for text_encoder", "UMT5EncoderModel", "got", "T5EncoderModel")),
)


@contextlib.contextmanager
def without_notices() -> Iterator[None]:
    """Keep back `NOTICES`: no pipeline here uses an image processor, and the built-in autoencoders are of classes of their own."""
    added = []
    for name, words in NOTICES:
        logger = logging.getLogger(name)

        def passes(record: logging.LogRecord, words: tuple[str, ...] = words) -> bool:
            return not all(word in record.getMessage() for word in words)

        logger.addFilter(passes)
        added.append((logger, passes))
    try:
        yield
    finally:
        for logger, passes in added:
            logger.removeFilter(passes)


def load_pipeline(
    model: str, dtype: str = "auto", device: str = "auto", *, sizes: Sequence[tuple[int, int]] = (), video: bool = False
) -> Any:
    """The pipeline `builtin`, in a folder or on the hub, on a device. Raises ArgumentError where there is none, or where one of the sizes
    (height, width) to be drawn is no multiple of its tokens' side.

    `video`: the built-in one for videos; another has to be one that makes them.
    """
    import torch

    target = _device(device)
    if dtype == "auto":
        dtype = "bfloat16" if target.type == "cuda" else "float32"
    with without_notices():
        from diffusers import DiffusionPipeline

        # a saved copy of the built-in model loads only where the modules of its own classes have been imported
        import dit_accel.pipelines.builtin.autoencoder
        import dit_accel.pipelines.builtin.transformer
        import dit_accel.pipelines.builtin_video.autoencoder
        import dit_accel.pipelines.builtin_video.transformer  # noqa: F401
        from dit_accel import builtin_pipeline, builtin_video_pipeline

        settings = {_dtype_argument(): getattr(torch, dtype)}
        builtin = builtin_video_pipeline if video else builtin_pipeline
        try:
            made = builtin(**settings) if model == "builtin" else DiffusionPipeline.from_pretrained(model, **settings)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"model must be 'builtin', a folder in diffusers' format or a hub id, not {model!r}: {error}") from error
    _check_sizes(made, sizes)
    return made.to(target)


def _check_sizes(pipe: Any, sizes: Sequence[tuple[int, int]]) -> None:
    """Raise ArgumentError for a size that doesn't fit the pipeline's tokens; where their side is not known, the pipeline checks it."""
    from dit_accel.cli.options import check_size
    from dit_accel.pipelines import token_pixels

    try:
        unit = token_pixels(pipe, getattr(pipe, "transformer", None))
    except UnsupportedModelError:
        return
    for size in sizes:
        check_size(size, unit)


def frames_call(pipe: Any, frames: int | None) -> dict[str, int]:
    """The argument for a video of so many frames, or for a picture where it is None. ValueError where the pipeline makes the other."""
    from dit_accel.pipelines.video import frames_argument

    name = frames_argument(pipe)
    if (name is None) != (frames is None):
        made, advice = ("videos", "give its number of frames") if frames is None else ("pictures", "leave frames out")
        raise ArgumentError(f"{type(pipe).__name__} makes {made}: {advice}, or use another model")
    return {} if name is None or frames is None else {name: frames}


def _dtype_argument() -> str:
    """The argument of from_pretrained for the weights' type: old releases ignore the new name, new ones warn about the old."""
    from diffusers import __version__

    return "dtype" if tuple(int(part) for part in __version__.split(".")[:2]) >= (0, 42) else "torch_dtype"


def _device(name: str) -> Any:
    """The torch device of a name; of several processes that a launcher started, auto gives each its own GPU."""
    import torch

    if name == "auto":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ArgumentError(f"device must be auto, cpu, cuda or another torch device, not {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ArgumentError(f"device must be one of the {torch.cuda.device_count()} CUDA devices of this machine, not {name!r}")
    return device
