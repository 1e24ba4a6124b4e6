"""One picture twice, from the same noise: with Fovea, which needs no training, and then with the model's original attention.

    python samples/generate.py ["a panda on a blue background"]

For FLUX.1 put `FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")` in place of `builtin_pipeline()`; the rest stays.
"""

import sys

import torch
from PIL import Image

from dit_accel import Fovea, accelerate, builtin_pipeline, dense, summary

prompt = sys.argv[1] if len(sys.argv) > 1 else "a panda on a blue background"
pipe = builtin_pipeline()


def draw() -> Image.Image:
    generator = torch.Generator("cpu").manual_seed(0)
    call = {"height": 1024, "width": 1024, "num_inference_steps": 16, "max_sequence_length": 32}
    return pipe(prompt, generator=generator, **call).images[0]


accelerate(pipe, Fovea(density=0.05))  # exact attention to 5 % of the key blocks, one pooled key for each other block
fast = draw()
summary(pipe)  # what ran in which layer, and the density that was kept

with dense(pipe):  # the original attention, same weights
    original = draw()

pair = Image.new("RGB", (2 * original.width, original.height))
pair.paste(original, (0, 0))
pair.paste(fast, (original.width, 0))
pair.save("generate.png")
print("wrote generate.png: original on the left, Fovea on the right")
