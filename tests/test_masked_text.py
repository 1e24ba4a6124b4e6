"""What padded text holds: neither its keys nor its values reach any output or gradient, whatever they are, on every backend."""

import math

import pytest
import torch
from helpers import Shape
from on_device import attention_by
from torch import Tensor

from dit_accel.kernels import dispatch
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.method.spec import AttentionSpec

SPECS = {"fovea": Fovea(0.2), "clear": CLEAR(3, downsample=2), "sla": SLA(0.3)}
# masked: some of one sample's text; all of it, more than one tile of it
SHAPES = {"some": Shape(2, 1, 16, (1, 5, 7), 6), "a whole tile": Shape(1, 2, 16, (1, 5, 7), 70, False)}
RUNS = [
    *(
        pytest.param(backend, dtype, masked, held, SPECS, id=f"{backend}-{dtype}-{masked}-{held}")
        for backend, dtypes in (
            ("reference", (torch.float64, torch.float32)), ("cpu", (torch.float32, torch.bfloat16, torch.float16)),
        )
        for dtype in dtypes
        for masked in SHAPES
        for held in (math.nan, math.inf)
    ),
    *(
        pytest.param("triton", dtype, masked, held, [name], id=f"triton-{name}", marks=pytest.mark.gpu)
        for dtype, masked, held, name in (
            (torch.float32, "some", math.inf, "fovea"), (torch.float16, "a whole tile", math.nan, "clear"),
        )
    ),
]  # fmt: skip


def results(spec: AttentionSpec, shape: Shape, bias: Tensor, backend: str, dtype: torch.dtype, held: float | None) -> list[Tensor]:
    """Output, lse and the gradients of query, key and value, where the masked tokens' keys and values are `held`."""
    qkv = shape.inputs(dtype)
    text = slice(0, shape.text) if shape.text_first else slice(shape.layout.image, None)
    if held is not None:
        for x in qkv[1:]:
            x[:, :, text] = x[:, :, text].masked_fill((bias == -math.inf)[:, None, :, None], held)
    leaves = [x.requires_grad_() for x in qkv]
    out, lse = attention_by(backend, spec, shape.layout, text_bias=bias)(leaves)
    (out.double().square().sum() + lse.double().sin().sum()).backward()
    grads = [x.grad for x in leaves if x.grad is not None]
    assert len(grads) == 3
    return [x.detach() for x in (out, lse, *grads)]


@pytest.mark.parametrize(("backend", "dtype", "masked", "held", "names"), RUNS)
def test_nan_and_infinity_stay_in_padding(backend: str, dtype: torch.dtype, masked: str, held: float, names: list[str]) -> None:
    if backend == "cpu" and dispatch.cpu_refusal(torch.device("cpu"), dtype, 16):
        pytest.skip(dispatch.NOT_BUILT)
    shape = SHAPES[masked]
    bias = shape.text_bias(masked=masked == "a whole tile")
    for name in names:
        found, expected = (results(SPECS[name], shape, bias, backend, dtype, x) for x in (held, None))
        assert all(x.isfinite().all() for x in found), name
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
