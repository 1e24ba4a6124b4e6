"""One clip twice, from the same noise: with Fovea in tiles of frames, rows and columns, and with the model's original attention beside it.

    pip install "dit-accel[video]"
    python samples/video.py ["a panda moving left on a blue background" [SIZE]]

For Wan 2.1 put `WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers")` in place of `builtin_video_pipeline()`; the rest stays.
"""

import sys

import numpy as np
import torch
from diffusers.utils import export_to_gif, export_to_video
from PIL import Image

from dit_accel import Fovea, accelerate, builtin_video_pipeline, dense, summary

prompt = sys.argv[1] if len(sys.argv) > 1 else "a panda moving left on a blue background"
size = int(sys.argv[2]) if len(sys.argv) > 2 else 512  # 17 frames of 512 pixels are 5 × 32 × 32 tokens
pipe = builtin_video_pipeline()


def film() -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(0)
    call = {"height": size, "width": size, "num_frames": 17, "num_inference_steps": 20, "guidance_scale": 3.0, "max_sequence_length": 24}
    frames: np.ndarray = pipe(prompt, generator=generator, **call).frames[0]  # [F, H, W, 3] in [0, 1]
    return frames


accelerate(pipe, Fovea(density=0.10, tile=(1, 8, 8)))
fast = film()
summary(pipe)  # what ran in which layer, and the density that was kept

with dense(pipe):  # the original attention, same weights
    original = film()

both = np.concatenate([original, fast], axis=2)
export_to_video(list(both), "video.mp4", fps=8)
export_to_gif([Image.fromarray((frame * 255).round().astype(np.uint8)) for frame in both], "video.gif", fps=8)
print("wrote video.mp4 and video.gif: original on the left, Fovea on the right")
