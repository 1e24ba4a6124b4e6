"""The states of a linear rest that the choice of blocks makes, and what a call does with them."""

from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, random_parameters, spread
from on_device import CPU, DEVICE, Poison, attention_by, moved
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import Arguments, check
from dit_accel.kernels.choosing import SelectionArguments, check_selection
from dit_accel.kernels.reference import FEATURE_MAPS
from dit_accel.kernels.triton import calls, launch_choice
from dit_accel.method import AttentionSpec, Linear, Mass, Tiles, TopK
from dit_accel.method.presets import SLA
from dit_accel.operator import lowering
from dit_accel.operator.plans import RECENT

pytestmark = pytest.mark.gpu

SHAPES = {
    "ragged": Shape(2, 2, 16, (1, 9, 11), 5),
    "video-text-last": Shape(1, 2, 24, (3, 4, 7), 3, text_first=False),
    "head-72": Shape(1, 1, 72, (1, 10, 9)),
}
SPECS = {
    "softmax": SLA(0.3, block=(16, 32)),
    "elu": SLA(0.3, "elu", block=(32, 16)),
    "relu-mass": AttentionSpec((TopK(0.3),), Linear("relu"), Mass(), Tiles((4, 4)), (16, 16)),
}
DTYPES = [torch.float32, torch.float16]
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def given(spec: AttentionSpec, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> tuple[Arguments, Tensor]:
    """The arguments that a call's own operator takes, and its output."""
    seen: list[Arguments] = []
    attend = ops.attention
    with monkeypatch.context() as patch, Poison(), torch.no_grad():
        patch.setattr(ops, "attention", lambda a, implementation: (seen.append(a), attend(a, implementation))[1])
        out, _ = attention_by("triton", spec, shape.layout)(shape.inputs(dtype), random_parameters(spec, shape))
    (a,) = seen
    return a, out


@pytest.mark.parametrize("together", [True, False], ids=["at-once", "through-memory"])
@every_dtype
@pytest.mark.parametrize(("shape", "spec"), spread(3, SHAPES, SPECS))
def test_they_are_sums_over_the_images_keys(
    shape: Shape, spec: AttentionSpec, dtype: torch.dtype, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not together:
        monkeypatch.setattr(launch_choice, "TOGETHER", 0)
    calls._records.clear()  # on a card a call would follow the record of one before
    RECENT.clear()
    (a, out), (again, same) = (given(spec, shape, dtype, monkeypatch) for _ in range(2))
    assert a.states is not None
    assert a.totals is not None
    assert a.mapped is not None
    for one, other in ((a.states, again.states), (a.totals, again.totals), (a.mapped, again.mapped), (out, same)):
        assert torch.equal(one, other)
    k, v = (moved(x, CPU)[:, :, shape.layout.image_slice].flatten(0, 1) for x in (a.k, a.v))
    heads, keys = k.shape[:2]
    wide, eager = (FEATURE_MAPS[spec.rest.feature_map](k.to(kind)) for kind in (torch.float64, torch.float32))  # type: ignore[union-attr]
    assert_close_as_eager(moved(a.mapped, CPU), wide, eager.to(dtype), "mapped")
    low = moved(a.mapped, CPU)
    exact, near = (low.to(kind).mT @ v.to(kind) / keys for kind in (torch.float64, torch.float32))
    states = moved(a.states, CPU)
    if dtype != torch.float32:
        assert states.shape[0] == heads + (a.weight is not None)
        assert states.shape[1] == 2
        rounded = near.to(dtype).float()
        near = rounded + (near - rounded).to(dtype).float()
        states = states.float().sum(1)
    assert_close_as_eager(states[:heads], exact, near, "states")
    assert_close_as_eager(moved(a.totals, CPU), low.double().sum(1) / keys, low.float().sum(1) / keys, "totals")
    if a.weight is not None and dtype != torch.float32:
        weight = moved(a.weight, CPU)
        assert (states[heads] - weight).abs().max() <= 2.0**-20 * weight.abs().max()


@every_dtype
@every_spec
def test_a_call_with_them_is_one_that_makes_them_itself(spec: AttentionSpec, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["ragged"]

    def own() -> list[Tensor]:
        def call(qkv: list[Tensor], params: Any) -> tuple[Tensor, Tensor]:
            return attention_by("triton", spec, shape.layout)(qkv, params.float())

        with torch.no_grad():
            out, lse = call(shape.inputs(dtype), random_parameters(spec, shape))
        return [out, lse, flat({name: x.float() for name, x in gradients(call, spec, shape, dtype).items()})]

    found = own()
    monkeypatch.setattr(lowering, "_chooses_states", lambda *_: False)
    calls._records.clear()
    RECENT.clear()
    for x, y in zip(found, own(), strict=True):
        assert torch.equal(x, y)


def test_the_features_are_made_again_for_the_gradients() -> None:
    """They are as large as the keys."""
    shape, spec = Shape(1, 2, 16, (1, 12, 12), 5), SLA(0.3, block=(16, 16))
    sizes: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.shape), x)[1], lambda x: x):
        attention_by("triton", spec, shape.layout)(shape.inputs(grad=True), random_parameters(spec, shape))
    assert (2, 16, 16) in sizes  # the states
    assert (2, 144, 16) not in sizes


def test_what_is_left_to_itself_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["ragged"]
    for spec in (SLA(0.3, "elu", "all", block=(16, 16)), SLA(0.7, block=(16, 16))):
        a, _ = given(spec, shape, torch.float32, monkeypatch)
        assert a.states is a.totals is a.mapped is None


def test_the_mean_of_a_block_without_tokens_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    """0 / 0 would be the largest of all scores on a card."""
    q, k, v = moved([torch.randn(1, 2, 32, 16, generator=torch.Generator().manual_seed(n)) for n in range(3)])
    starts = torch.tensor([0, 0, 16, 32], dtype=torch.int32, device=DEVICE)
    a = SelectionArguments(q=q, k=k, v=v, q_starts=starts[1:], k_starts=starts, q_width=16, k_width=16, top=1, states=True)
    made: list[Any] = []
    make = launch_choice._states
    monkeypatch.setattr(launch_choice, "_states", lambda *given: (made.append(make(*given)), made[-1])[1])
    found = calls.select_blocks(a)
    assert not made[0][0].k_mean[:, 0].any()
    assert torch.equal(found.lists, calls.select_blocks(a._replace(v=None, states=False)).lists)


def test_a_choice_of_states_says_what_it_requires() -> None:
    x, starts = torch.zeros(1, 1, 32, 16), torch.tensor([0, 16, 32], dtype=torch.int32)
    a = SelectionArguments(q=x, k=x, q_starts=starts, k_starts=starts, q_width=16, k_width=16, top=1, states=True)
    with pytest.raises(ValueError, match="made of k and v: give v"):
        check_selection(a)
    with pytest.raises(ValueError, match="pooled keys or linear"):
        check_selection(a._replace(v=x, pooled=True))
    with pytest.raises(ValueError, match="projection must be float32"):
        check_selection(a._replace(v=x, projection=torch.zeros(16, 16, dtype=torch.float16)))
    bias = torch.zeros(1, 1, 2)
    check_selection(a._replace(v=x, bias=bias))  # the values are for the states
    with pytest.raises(ValueError, match="values or a bias"):
        check_selection(a._replace(v=x, bias=bias, states=False))


def test_states_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, _ = given(SPECS["softmax"], SHAPES["ragged"], torch.float16, monkeypatch)
    check(a)
    for changed in ({"totals": None}, {"linear_all": True}, {"rest": "pooled"}):
        with pytest.raises(ValueError, match="states are given with totals"):
            check(a._replace(**changed))
    assert a.states is not None
    with pytest.raises(ValueError, match="states must be"):
        check(a._replace(states=a.states[1:]))
