"""Bands of a rest that is of all keys, by what each receives of those that it does not read: sums of features, and keys of patches."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Shape
from test_bands import CPU, CUT, SHAPE, TINY, attend_by, cut_in_bands, known

from dit_accel.kernels import reference
from dit_accel.kernels.arguments import Arguments, check
from dit_accel.method import AttentionSpec, Disc, DiscBlocks, Linear, Mass, Pooled, Residual, Tiles, Window
from dit_accel.method.parts import (
    Centred,
    FirstFrames,
    Floored,
    Hedgehog,
    KVGate,
    Norm,
    NormPower,
    NormPreserving,
    Routed,
    Taylor,
    TokenSoftmax,
)
from dit_accel.method.parts.call import Far, FarKeys, FarSums
from dit_accel.method.presets import CLEAR
from dit_accel.operator.bands import Grounds
from dit_accel.operator.layout import TokenLayout

FOUR = {"order": Tiles((4, 4)), "block": (16, 16)}
IN_KERNELS = {
    "softmax": AttentionSpec((DiscBlocks(3),), Linear(), Residual(), **FOUR),
    "relu-by-mass": AttentionSpec((DiscBlocks(2),), Linear("relu"), Mass(), **FOUR),
    "elu-by-mass-without-offset": AttentionSpec((DiscBlocks(2),), Linear("elu"), Mass(offset=False), **FOUR),
    "all-softmax-by-mass": AttentionSpec((Disc(3),), Linear(scope="all"), Mass(), **FOUR),
    "all-elu": AttentionSpec((Window((3, 5)),), Linear("elu", "all"), Residual(), **FOUR),
    "downsample": CLEAR(3, downsample=4, tile=(4, 4)),
}
IN_TORCH = {
    "hedgehog-gated-floored": AttentionSpec((DiscBlocks(2),), Linear(Hedgehog(), weights=KVGate(), readout=Floored(0.5)), Mass(), **FOUR),
    "taylor-inline": AttentionSpec((DiscBlocks(3),), Linear(Taylor(4), readout=Centred("inline")), Mass("query"), **FOUR),
    "all-norm-power-mala": AttentionSpec((Disc(3),), Linear(NormPower(), "all", readout=Centred("mala")), Residual(), **FOUR),
    "norm-preserving": AttentionSpec((DiscBlocks(2),), Linear(NormPreserving()), Norm(), **FOUR),
    "routed": AttentionSpec((DiscBlocks(2),), Routed(3), Mass(), **FOUR),
}
CLIP = Shape(2, 1, 24, (4, 5, 9), 7, False)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", (IN_KERNELS | IN_TORCH).values(), ids=IN_KERNELS | IN_TORCH)
def test_bands_with_what_is_far_are_the_whole(spec: AttentionSpec, backend: str) -> None:
    cut_in_bands(backend, spec, SHAPE, CUT)
    assert len(Grounds(spec, SHAPE.layout, CUT).keys(0)) < SHAPE.layout.image


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["softmax", "relu-by-mass", "all-elu", "downsample", "routed"])
def test_bfloat16_errs_as_an_eager_run_does(name: str, backend: str) -> None:
    cut_in_bands(backend, (IN_KERNELS | IN_TORCH)[name], SHAPE, CUT, torch.bfloat16)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("radius", "tokens"), [(9, (60, 94)), (10, (30, 94, 30)), (40, CUT)], ids=["some", "few", "nothing"])
@pytest.mark.parametrize("merge", [Residual(), Mass()], ids=["residual", "mass"])
def test_a_rest_of_few_blocks_or_none(merge: Residual | Mass, radius: int, tokens: tuple[int, ...], kind: torch.dtype) -> None:
    """No digit is lost where nearly everything is kept, and where everything is there is no rest."""
    for backend in ("cpu", "reference"):
        cut_in_bands(backend, AttentionSpec((DiscBlocks(radius),), Linear("relu"), merge, **FOUR), SHAPE, tokens, kind)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bands_of_a_clip_with_a_rest(backend: str) -> None:
    """Heads of 24, text last, and the first frame for all."""
    keep = (DiscBlocks(2), FirstFrames())
    cut_in_bands(backend, AttentionSpec(keep, Linear(), Mass(), Tiles((2, 4, 4)), (32, 32)), CLIP, (50, 65, 65))
    cut_in_bands(backend, CLEAR(2, downsample=2, tile=(2, 4, 4)), CLIP, (50, 65, 65))


@pytest.mark.parametrize("merge", [Residual(), Mass()], ids=["residual", "mass"])
def test_heads_of_72(merge: Residual | Mass) -> None:
    cut_in_bands("cpu", AttentionSpec((DiscBlocks(3),), Linear(), merge, **FOUR), replace(SHAPE, head_dim=72), CUT)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["softmax", "relu-by-mass", "all-elu", "downsample"])
def test_what_is_far_in_triton(name: str) -> None:
    cut_in_bands("triton", IN_KERNELS[name], TINY, (20, 34))


@pytest.mark.gpu
@pytest.mark.parametrize("merge", [Residual(), Mass()], ids=["residual", "mass"])
def test_what_is_far_in_triton_where_most_is_kept(merge: Residual | Mass) -> None:
    """The rest of the blocks that are read is summed block by block."""
    cut_in_bands("triton", AttentionSpec((DiscBlocks(4),), Linear(), merge, **FOUR), TINY, (10, 44))


def test_the_states_are_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = IN_KERNELS["softmax"]
    for name in ("linear_attention", "linear_attention_rest"):
        monkeypatch.setattr(reference, name, lambda *_, **__: pytest.fail("the rest ran in torch"))
    q, k, v = SHAPE.inputs()
    q, k, v = (x[:, :, SHAPE.layout.image_slice] for x in (q, k, v))
    grounds = Grounds(spec, SHAPE.layout, CUT)
    band, (first, end) = grounds.band(1, CPU), grounds.ranges[1]
    params = spec.make_parameters(heads=SHAPE.heads, head_dim=SHAPE.head_dim)
    far = known(spec, grounds, 1, band, [q, k, v], params)
    layouts = TokenLayout((1, 1, end - first)), TokenLayout((1, 1, len(band.keys)))
    given = (q[:, :, first:end], k[:, :, band.keys], v[:, :, band.keys], spec, layouts[0], band.plan)
    out, _ = attend_by("cpu", *given, lambda device: params(), None, layouts[1], far)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("spec", "far"),
    [
        (IN_KERNELS["softmax"], FarKeys(torch.zeros(2, 3, 16), torch.zeros(2, 3, 16))),
        (IN_KERNELS["downsample"], FarSums(torch.zeros(2, 16, 17))),
        (AttentionSpec((DiscBlocks(2),), Linear(scope="marginal"), Residual(), **FOUR), FarSums(torch.zeros(2, 16, 17))),
        (AttentionSpec((DiscBlocks(2),), Pooled(parts=2), Mass(), **FOUR), FarSums(torch.zeros(2, 16, 17))),
    ],
    ids=["linear", "downsample", "marginal", "two-parts"],
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_does_not_tell_a_rest_enough_is_refused(spec: AttentionSpec, far: Far, backend: str) -> None:
    grounds = Grounds(spec, SHAPE.layout, CUT)
    band, (first, end) = grounds.band(1, CPU), grounds.ranges[1]
    q, k, v = (torch.zeros(1, 2, n, 16) for n in (end - first, len(band.keys), len(band.keys)))
    params = spec.make_parameters(heads=2, head_dim=16)
    layouts = TokenLayout((1, 1, end - first)), TokenLayout((1, 1, len(band.keys)))
    with pytest.raises(ValueError, match=r"can't be computed of Far.*: call it with all keys and values"):
        attend_by(backend, q, k, v, spec, layouts[0], band.plan, lambda device: params(), None, layouts[1], far)


def test_features_over_tokens_are_not_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they say of single tokens: their sums over the tokens are those of the tokens that a call has."""
    monkeypatch.setattr(TokenSoftmax, "by_token", True)
    rest = Linear(TokenSoftmax())
    assert rest.far is None
    with pytest.raises(ValueError, match="is not of sums over keys"):
        rest.features(16)


def test_a_rest_without_sums_or_patches_says_so() -> None:
    given = {"factors": (None,), "features": (16,), "in_part": ({}, slice(0, 1)), "keys_of": (torch.zeros(1), {}, {})}
    for name, arguments in given.items():
        with pytest.raises(ValueError, match=r"is not of sums over keys|makes no keys of all tokens"):
            getattr(Pooled(), name)(*arguments)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rest": "none"}, "far_states are of a linear rest, not of 'none'"),
        ({"far_states": torch.zeros(1, 2, 16, 17)}, r"far_states must be float32 \(1, 2, 17, 16\) and contiguous"),
        ({"far_states": torch.zeros(1, 2, 17, 16).double()}, "far_states must be float32"),
        ({"far_states": torch.zeros(1, 2, 17, 1).expand(-1, -1, -1, 16)}, "far_states must be float32"),
    ],
    ids=["rest", "shape", "dtype", "strides"],
)
def test_states_that_do_not_fit_are_refused(given: dict[str, Any], message: str) -> None:
    q, starts, none = torch.zeros(1, 2, 16, 16), torch.tensor([0, 16], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
    a = Arguments(
        q=q, k=q, v=q, lists=none, counts=none[0], full=none[0], q_starts=starts, k_starts=starts, coords=none, q_width=16, k_width=16,
        text=0, text_first=True, scale=1.0, rest="linear", far_states=torch.zeros(1, 2, 17, 16),
    )  # fmt: skip
    check(a)
    with pytest.raises(ValueError, match=message):
        check(a._replace(**given))
