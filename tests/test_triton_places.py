"""The Triton kernels find the tokens of a block by their places: the same bits as where the tokens lie in the order of the blocks."""

import dataclasses

import pytest
import torch
from helpers import Shape, random_parameters
from on_device import attention_by, moved
from torch import Tensor

from dit_accel.kernels import ops
from dit_accel.kernels.arguments import DIFFERENTIABLE, Arguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import calls
from dit_accel.method import TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec

pytestmark = pytest.mark.gpu

SHAPE = Shape(1, 2, 16, (1, 7, 9), 3)
SPECS = {
    "fovea": Fovea(0.3, tile=(4, 4)),
    "fovea-weighted": dataclasses.replace(Fovea(0.3, tile=(4, 4)), keep=(TopK(0.3, correct_short=True),)),
    "clear": CLEAR(3, tile=(4, 4)),
    "gna": GNA((3, 5), stride=(1, 2)),
    "sla": SLA(0.3, block=(16, 16)),
    "sla-all": SLA(0.3, "elu", "all", block=(16, 16)),
}


def given(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> tuple[Arguments, SelectionArguments | None]:
    """The arguments of one call, as the operators get them, with tokens in the order of their blocks."""
    whole: list[Arguments] = []
    choice: list[SelectionArguments] = []
    attend, select = ops.attention, ops.select_blocks
    monkeypatch.setattr(ops, "attention", lambda a, name: (whole.append(a), attend(a, name))[1])
    monkeypatch.setattr(ops, "select_blocks", lambda a, name: (choice.append(a), select(a, name))[1])
    with torch.no_grad():
        attention_by("triton", spec, SHAPE.layout)(SHAPE.inputs(), random_parameters(spec, SHAPE))
    a = whole[0]._replace(states=None, totals=None, mapped=None)  # by the choice, of the tokens as they lie
    return a._replace(places_q=None, places_k=None), choice[0]._replace(places_q=None, places_k=None) if choice else None


def shuffled(x: Tensor, first: int, places: Tensor) -> Tensor:
    """Image tokens `[B, H, N, ..]` from `first` on, each at its place."""
    found, image = x.clone(), slice(first, first + len(places))
    found[:, :, first + places] = x[:, :, image]
    return found


def assert_same(found: Tensor, exact: Tensor, image: slice) -> None:
    """The image's rows to the bit; the text's are sums over all rows as they lie in memory, in another order then."""
    assert torch.equal(found[:, :, image], exact[:, :, image])
    torch.testing.assert_close(found, exact)


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_places_are_read_as_if_the_tokens_were_reordered(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    a, choice = given(spec, monkeypatch)
    places = moved(torch.randperm(SHAPE.layout.image, generator=torch.Generator().manual_seed(5)))
    first, row = a.text if a.text_first else 0, places.to(torch.int32)
    inputs = {name: shuffled(getattr(a, name), first, places) for name in ("q", "k", "v")}
    there = a._replace(**inputs, places_q=row, places_k=row)
    rows = slice(first, first + len(places))
    out, lse = calls.attend(a)
    for found, exact in zip(calls.attend(there), (out, lse), strict=True):
        assert_same(found, shuffled(exact, first, places), rows)
    dout = moved(torch.randn(out.shape, generator=torch.Generator().manual_seed(6)))
    here = dict(zip(DIFFERENTIABLE, calls.gradients(dout, None, out, lse, a), strict=True))
    far = calls.gradients(shuffled(dout, first, places), None, shuffled(out, first, places), shuffled(lse, first, places), there)
    for name, found in zip(DIFFERENTIABLE, far, strict=True):
        if name not in inputs:
            torch.testing.assert_close(found, here[name])
        elif a.rest == "linear" and name != "q":  # holds a sum over all the image's queries
            torch.testing.assert_close(found, shuffled(here[name], first, places))
        else:
            assert_same(found, shuffled(here[name], first, places), rows)
    if choice is not None:
        inputs = {name: shuffled(getattr(choice, name), 0, places) for name in ("q", "k", "v") if getattr(choice, name) is not None}
        chosen = calls.select_blocks(choice._replace(**inputs, places_q=row, places_k=row))
        for found, exact in zip(chosen, calls.select_blocks(choice), strict=True):
            if found is chosen.mapped and choice.states:  # where the keys are
                assert torch.equal(found, shuffled(exact[None], 0, places)[0])
            else:
                assert torch.equal(found, exact)
