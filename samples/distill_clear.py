"""CLEAR drops what is outside a disc, which an untrained model does not forgive: distil it from the model's own original attention.

    python samples/distill_clear.py [STEPS]

The pipeline records itself on a few prompts, a LoRA learns to give the same predictions with CLEAR, and the result is saved as an
adapter that `load_adapter` puts on a fresh pipeline. Interrupted, the same command continues from the newest checkpoint.
"""

import sys

from dit_accel import CLEAR, DistillConfig, accelerate, builtin_pipeline, distill, load_adapter, save_adapter, summary

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 200
things = ["panda", "cat", "cactus", "rocket", "frog"]
colours = ["blue", "red", "green", "yellow"]
prompts = [f"a {thing} on a {colour} background" for thing in things for colour in colours]

pipe = accelerate(builtin_pipeline(), CLEAR(radius=8))
config = DistillConfig(steps=steps, train="lora", lora_rank=16, output_dir="clear-r8/run")
call = {"height": 512, "width": 512, "num_inference_steps": 8, "max_sequence_length": 32}
result = distill(pipe, prompts, config, **call)  # a tenth of the prompts is held out
print(f"held-out relative error: {result.error_before:.4f} before, {result.error_after:.4f} after {steps} steps")

folder = save_adapter(pipe, "clear-r8/adapter", training=config.to_dict())
fresh = load_adapter(builtin_pipeline(), folder)
summary(fresh)
print(f"wrote {folder}: dit-accel generate PROMPT --adapter {folder}")
