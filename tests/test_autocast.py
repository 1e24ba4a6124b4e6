"""Autocast: the operator runs in the dtype in which torch's own attention would run."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import forward_arguments, relative_error, tiny_transformer
from helpers import random_parameters
from test_operator import RAGGED, SPECS, every_method, run

import dit_accel
from dit_accel import Fovea
from dit_accel.kernels import dispatch
from dit_accel.operator import attention as operator

AUTOCAST = [(torch.float32,) * 3, (torch.float32, torch.float32, torch.bfloat16), (torch.bfloat16,) * 3, (torch.float64,) * 3]


@every_method
@pytest.mark.parametrize("dtypes", AUTOCAST, ids=["float32", "normed", "bfloat16", "float64"])
def test_autocast_casts_what_it_casts_for_torchs_attention(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    params, spec = random_parameters(SPECS[name], RAGGED), SPECS[name]
    qkv = [x.to(dtype).requires_grad_() for x, dtype in zip(RAGGED.inputs(), dtypes, strict=True)]
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = run(qkv, spec, RAGGED.layout, params)
        assert out.dtype == F.scaled_dot_product_attention(*qkv).dtype
    inputs = [x.detach().to(out.dtype).requires_grad_() for x in qkv]
    whole, whole_lse = run(inputs, spec, RAGGED.layout, params)
    torch.testing.assert_close((out, lse), (whole, whole_lse), rtol=0, atol=0)
    towards = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    got = torch.autograd.grad(out, [*qkv, *params.parameters()], towards, allow_unused=True)
    expected = torch.autograd.grad(whole, [*inputs, *params.parameters()], towards, allow_unused=True)
    assert [x.dtype for x in got[:3] if x is not None] == list(dtypes)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=0, atol=0)


def normed_in_float32(transformer: Any) -> Any:
    """Norms of q and k that give float32 under autocast, as they do on a GPU."""
    for name, module in transformer.named_modules():
        if name.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            module.register_forward_hook(lambda module, args, output: output.float())
    return transformer


@pytest.mark.composes("autocast")
@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_the_operator_runs_in_its_dtype(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, choose = [], dispatch.choose
    monkeypatch.setattr(operator.dispatch, "choose", lambda *args, **kwargs: seen.append(args[2]) or choose(*args, **kwargs))
    plain, accelerated_ = (normed_in_float32(tiny_transformer(double=1, single=1)) for _ in range(2))
    dit_accel.accelerate(accelerated_, Fovea(1.0), strict=True)
    if compiled:
        torch._dynamo.reset()
        accelerated_.compile_repeated_blocks(backend="eager", fullgraph=True)
    with torch.no_grad():
        exact = plain(**forward_arguments()).sample
        with torch.autocast("cpu", torch.bfloat16):
            stock, got = (model(**forward_arguments()).sample for model in (plain, accelerated_))
    assert set(seen) == {torch.bfloat16}
    assert got.dtype == stock.dtype
    assert relative_error(got, exact) < 1.5 * relative_error(stock, exact)


def test_queries_and_values_of_two_dtypes_are_refused_as_by_torch() -> None:
    transformer = tiny_transformer(double=1, single=0).bfloat16()
    normed_in_float32(dit_accel.accelerate(transformer, Fovea(0.2)))
    arguments = {name: x.bfloat16() for name, x in forward_arguments().items()}
    with pytest.raises(ValueError, match="query, key and value must have one floating dtype and be on one device"):
        transformer(**arguments)
