"""A method of one's own, put together from slots: exact attention to the best 2 % of key blocks and to every tile near the query, one
pooled key for each block that is left, and one softmax over both. The near tiles keep texture sharp, the best blocks what is far away.

    python samples/custom_spec.py

`DiscBlocks` is the disc in whole tiles; pooled keys represent whole blocks, so `Disc`, which cuts blocks, does not go with them.
"""

import torch

from dit_accel import AttentionSpec, accelerate, builtin_pipeline, dense, summary
from dit_accel.method import DiscBlocks, ErrorProduct, Mass, Pooled, Tiles, TopK

spec = AttentionSpec(
    keep=(TopK(density=0.02, score=ErrorProduct()), DiscBlocks(radius=4)),
    rest=Pooled(variance=True),
    merge=Mass(offset=True),  # one learnable number per head, zero before any training
    order=Tiles((8, 8)),
    block=(64, 64),  # one tile per block
)
pipe = accelerate(builtin_pipeline(), spec)


def latents() -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    call = {"height": 1024, "width": 1024, "num_inference_steps": 8, "max_sequence_length": 32}
    return pipe("a cat left of a cactus", generator=generator, output_type="latent", **call).images


ours = latents()
summary(pipe)
with dense(pipe):
    original = latents()
print(f"relative difference of the final latents from the original's: {(ours - original).norm() / original.norm():.4f}")
