"""Whole denoising steps on a GPU: the transformers of FLUX.1 and Wan 2.1 14B in their own sizes, with random weights.

    python benchmarks/gpu_step.py --out benchmarks/gpu-step-h100.json
    python benchmarks/gpu_step.py --tiny                        (a look at the program, under TRITON_INTERPRET=1)

Seconds of one forward in bfloat16, by the clock, the card waited for; the median of a few after one that compiles and warms up. Random
weights take the time that trained ones do. What the pictures would look like is measured elsewhere.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

import dit_accel
from dit_accel.files import write_json
from dit_accel.measure.timing import machine
from dit_accel.method import AttentionSpec
from dit_accel.method.presets import CLEAR, SLA, Fovea

SPECS: dict[str, AttentionSpec] = {
    "Fovea 5 %": Fovea(0.05),
    "CLEAR radius 8": CLEAR(8),
    "SLA 5 %": SLA(0.05),
}
Arguments = dict[str, Any]


def filled(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model without memory, given some and random weights, small enough for its outputs to stay finite."""
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1:
            p.normal_(0, 0.02)
        else:
            p.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def flux(size: int, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> tuple[nn.Module, Arguments]:
    """FLUX.1's transformer and a forward's arguments at `size` × `size` pixels with 512 text tokens."""
    small = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "joint_attention_dim": 64}
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(guidance_embeds=True, **(small | {"axes_dims_rope": (4, 6, 6)} if tiny else {}))
    model = filled(model, device, dtype)
    side, text = size // 16, 512
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] += torch.arange(side, device=device)[:, None]
    ids[..., 2] += torch.arange(side, device=device)[None]
    made = {"hidden_states": (side * side, 64), "encoder_hidden_states": (text, model.config.joint_attention_dim)}
    arguments: Arguments = {name: torch.randn(1, *shape, device=device, dtype=dtype) for name, shape in made.items()}
    arguments |= {
        "pooled_projections": torch.randn(1, 768, device=device, dtype=dtype),
        "timestep": torch.full((1,), 0.5, device=device, dtype=dtype),
        "img_ids": ids.view(-1, 3), "txt_ids": torch.zeros(text, 3, device=device), "guidance": torch.full((1,), 3.5, device=device),
    }  # fmt: skip
    return model, arguments


def wan(frames: int, height: int, width: int, device: torch.device, dtype: torch.dtype, *, tiny: bool) -> tuple[nn.Module, Arguments]:
    """Wan 2.1's 14B transformer and a forward's arguments for a clip, with 512 text tokens."""
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "text_dim": 64}
    large = {"num_layers": 40, "num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824}
    with torch.device("meta"):
        model: Any = WanTransformer3DModel(**(small if tiny else large))
    rope = type(model.rope)(model.config.attention_head_dim, model.config.patch_size, model.config.rope_max_seq_len)
    del model.rope  # its tables are numbers, not weights
    model = filled(model, device, dtype)
    model.rope = rope.to(device)
    latents = (1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    text = torch.randn(1, 512, model.config.text_dim, device=device, dtype=dtype)
    video = torch.randn(latents, device=device, dtype=dtype)
    return model, {"hidden_states": video, "timestep": torch.full((1,), 500, device=device), "encoder_hidden_states": text}


CASES: dict[str, Callable[..., tuple[nn.Module, Arguments]]] = {
    "FLUX.1, 2048 x 2048": lambda *on, tiny: flux(128 if tiny else 2048, *on, tiny=tiny),
    "FLUX.1, 4096 x 4096": lambda *on, tiny: flux(128 if tiny else 4096, *on, tiny=tiny),
    "Wan 2.1 14B, 81 x 480 x 832": lambda *on, tiny: wan(*((5, 64, 64) if tiny else (81, 480, 832)), *on, tiny=tiny),
    "Wan 2.1 14B, 81 x 720 x 1280": lambda *on, tiny: wan(*((5, 64, 64) if tiny else (81, 720, 1280)), *on, tiny=tiny),
}


def seconds(model: nn.Module, arguments: Arguments, runs: int) -> float:
    """The median of a forward's seconds."""
    device = next(model.parameters()).device

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    taken = []
    with torch.no_grad():
        for _ in range(runs + 1):
            wait()
            start = time.perf_counter()
            model(**arguments, return_dict=False)
            wait()
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def measure(name: str, device: torch.device, dtype: torch.dtype, runs: int, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """A row for the original step and one for each method."""
    model, arguments = CASES[name](device, dtype, tiny=tiny)
    original = seconds(model, arguments, runs)
    yield {"case": name, "method": "original", "seconds": original}
    for title, spec in SPECS.items():
        dit_accel.accelerate(model, spec, strict=True, backend="triton")
        try:
            fast = seconds(model, arguments, runs)
        finally:
            dit_accel.restore(model)
        yield {"case": name, "method": title, "seconds": fast, "ratio": original / fast}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the rows as JSON")
    parser.add_argument("--tiny", action="store_true", help="tiny models, interpreted")
    parser.add_argument("--case", action="append", choices=list(CASES), help="which models and sizes (all)")
    parser.add_argument("--runs", type=int, default=3, help="forwards whose median is taken (3)")
    args = parser.parse_args()
    device, dtype = (torch.device("cpu"), torch.float16) if args.tiny else (torch.device("cuda"), torch.bfloat16)
    rows = []
    for name in args.case or CASES:
        for row in measure(name, device, dtype, args.runs, tiny=args.tiny):
            rows.append(row)
            ratio = f" {row['ratio']:6.2f}x" if "ratio" in row else ""
            print(f"{name:30} {row['method']:16} {row['seconds']:9.3f} s{ratio}", flush=True)
            if args.out is not None:  # after each row: an interruption loses no more than one
                write_json(args.out, {"machine": machine(), "dtype": str(dtype).removeprefix("torch."), "rows": rows})


if __name__ == "__main__":
    main()
