"""Pipelines that make videos: what they take, writing their clips, and how steadily those run."""

import importlib.util
import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image
from torch import Tensor

from dit_accel.errors import ArgumentError
from dit_accel.files import write_bytes

ENDINGS = (".gif", ".mp4")


def frames_argument(pipe: Any) -> str | None:
    """The argument of a pipeline's call for the number of frames; None where it makes pictures."""
    taken = inspect.signature(type(pipe).__call__).parameters
    return next((name for name in ("num_frames", "frames", "video_length") if name in taken), None)


def check_ending(path: Path) -> None:
    """Raise ValueError unless a clip can be written at a path of this name."""
    if path.suffix.lower() not in ENDINGS:
        raise ArgumentError(f"the name of a clip must end in {' or '.join(ENDINGS)}, not {path.name!r}")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise ArgumentError(
            f"writing {path.name} requires imageio[ffmpeg], which is not installed: pip install 'dit-accel[video]', or name a .gif"
        )


def save_video(frames: Tensor, path: str | Path, fps: int = 8) -> Path:
    """Write frames `[F, 3, H, W]` in [0, 1] as GIF (at most 256 colours a frame) or MP4, by the name's ending; the file appears when whole.

    `fps` is in frames per second. Sides of an MP4 are rounded up to multiples of 16 pixels by scaling. Raises ValueError where the ending
    is another, the frames have another shape, or MP4 requires a library that is not installed.
    """
    path = Path(path)
    check_ending(path)
    if frames.ndim != 4 or frames.shape[1] != 3 or not len(frames):
        raise ArgumentError(f"frames must have shape [F, 3, H, W] with F >= 1, not {tuple(frames.shape)}")
    if not 1 <= fps <= 100:
        raise ArgumentError(f"fps must be 1 to 100 frames a second, not {fps}")
    values = (frames.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(frame) for frame in values]
    with tempfile.TemporaryDirectory() as folder:  # the encoders write as they go
        name = str(Path(folder) / f"clip{path.suffix.lower()}")
        if path.suffix.lower() == ".gif":
            export_to_gif(pictures, name, fps)
        else:
            export_to_video(pictures, name, fps, quality=8.0)
        write_bytes(path, Path(name).read_bytes())
    return path


def compare_motion(frames: Tensor, originals: Tensor) -> dict[str, float]:
    """How a clip's changes from frame to frame `[F, 3, H, W]`, F > 1, in [0, 1], compare with the original's.

    `change`: their root mean square over the original's; above 1 it flickers more, or moves more. `change_difference`: the root mean
    square of the difference of both changes, in units of full brightness.
    """
    ours, original = (x.float().diff(dim=0) for x in (frames, originals))

    def size(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    return {"change": size(ours) / max(size(original), torch.finfo(torch.float32).tiny), "change_difference": size(ours - original)}
