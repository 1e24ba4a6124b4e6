"""A video three times from the same noise, side by side: the original, Fovea untrained, and Fovea after learning from the original.

    python samples/video.py [STEPS]

Fovea keeps 10 % of the key blocks, 2×8×8 tiles of time and space. At this size attention is most of the work; smaller videos gain little.
"""

import sys
import time

import torch

from dit_accel import DistillConfig, Fovea, accelerate, builtin_video_pipeline, dense, distill, save_adapter, save_video, summary

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 100
call = {"num_frames": 17, "num_inference_steps": 12, "guidance_scale": 3.0, "max_sequence_length": 24}
things, motions = ["cat", "car", "ghost", "rocket"], ["moving left", "moving up", "growing"]
prompts = [f"a {thing} {motion} on a pink background" for thing in things for motion in motions]
pipe = accelerate(builtin_video_pipeline(), Fovea(0.1, tile=(2, 8, 8)))


def film(side: int = 768) -> torch.Tensor:
    start, noise = time.time(), torch.Generator("cpu").manual_seed(0)
    clip = pipe("a panda moving left on a blue background", height=side, width=side, generator=noise, output_type="pt", **call).frames[0]
    print(f"{time.time() - start:.1f} s")
    return clip


with dense(pipe):
    original = film()
untrained = film()
config = DistillConfig(steps=steps, train="attention", optimizer="muon", learning_rate=3e-4, attention_weight=0.0, output_dir="video/run")
result = distill(pipe, prompts, config, height=512, width=512, **call | {"num_inference_steps": 4})
save_adapter(pipe, "video/adapter")
print(f"held-out relative error: {result.error_before:.4f} before, {result.error_after:.4f} after {steps} steps")
distilled = film()
summary(pipe)
print("wrote", save_video(torch.cat([original, untrained, distilled], 3), "video/video.gif"), save_video(distilled, "video/video.mp4"))
