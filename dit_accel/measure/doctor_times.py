"""`dit-accel doctor` on a GPU: how long a forward takes, next to PyTorch's attention on the same tensors."""

import functools

import torch
import torch.nn.functional as F

from dit_accel.kernels.triton import timing
from dit_accel.measure.kernels import ON_GPU, Case, inputs
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.operator.attention import attention, start_values

SIDE, TEXT = 128, 512  # FLUX at 2048 pixels
METHODS = {"fovea:0.05": Fovea(0.05), "clear:8": CLEAR(8), "sla:0.05": SLA(0.05)}


def milliseconds(device: torch.device) -> dict[str, float]:
    """Medians by the card's events: PyTorch's attention, then each method with its selection and its rest."""
    found: dict[str, float] = {}
    with torch.no_grad():
        for name, spec in METHODS.items():
            case = Case(name, spec, SIDE, TEXT, device=device, **ON_GPU)
            q, k, v = inputs(case)
            if not found:
                found["scaled_dot_product_attention"] = timing.median_seconds(functools.partial(F.scaled_dot_product_attention, q, k, v))
            call = functools.partial(attention, q, k, v, spec, case.layout, params=start_values(spec, q), backend="triton")
            found[name] = timing.median_seconds(call)
    return {name: seconds * 1e3 for name, seconds in found.items()}
