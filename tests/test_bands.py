"""Queries that are a band of the keys' grid, as each of several devices has them: rows of the whole grid's operator, on every backend."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, oracle, random_parameters
from on_device import CPU, attention_by, device_of, moved
from test_composition import FOREIGN, SMALL
from test_parts import SPECS as PARTS
from torch import Tensor

from dit_accel.kernels import reference
from dit_accel.kernels.blocks import BlockMap, Blocks
from dit_accel.method import Disc, Linear, Mass, Pooled, Raster, TopK
from dit_accel.method.parts.call import Call, Far, FarBlocks, FarKeys, FarSums, Moments
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator import composition, lowering
from dit_accel.operator.attention import attention
from dit_accel.operator.bands import Band, Grounds, all_pairs
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.layout import TokenLayout, layouts_of
from dit_accel.operator.lists import PADDING, Lists

SHAPE = Shape(1, 2, 16, (1, 11, 14), 5)
TINY = Shape(1, 2, 24, (1, 6, 9), 3)  # for the interpreter
SPECS = {
    "fovea": replace(Fovea(0.2, tile=(4, 4)), keep=(TopK(0.2, correct_short=True),)),  # the error's score is of all queries of a head
    "fovea-radius": Fovea(radius=4, tile=(4, 4)),
    "clear": CLEAR(3, tile=(4, 4)),
    "clear-downsample": CLEAR(3, downsample=4, tile=(4, 4)),
    "gna": GNA((3, 5), stride=(1, 2), dilation=(2, 1), tile=(4, 4)),
    "sla": SLA(0.3, "relu", block=(16, 32)),
    "sla-all": SLA(0.2, "elu", "all", tile=(4, 4)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("softmax"), Mass(), SMALL, (16, 16)),
}


def band(plan: Plan, first: int, end: int) -> tuple[Plan, Tensor]:
    """The plan with the query blocks from `first` to `end` alone, and the image tokens that are in them, ascending."""
    g, blocks = plan.geometry, slice(first, end)
    begin, stop = int(g.starts_q[first]), int(g.starts_q[end])
    places = torch.arange(len(plan.coords)) if g.places_q is None else g.places_q.long()
    rows = places[begin:stop].sort().values
    number = torch.zeros(len(places), dtype=torch.long).index_put((rows,), torch.arange(len(rows)))
    q = plan.q_blocks
    own = Blocks(
        number[q.index[blocks]], q.valid[blocks], q.count[blocks], q.place[rows] - first * q.index.shape[1], bool(q.valid[blocks].all()),
        q.consecutive,
    )  # fmt: skip
    static = None if plan.static is None else BlockMap(**{name: _rows(x, blocks) for name, x in vars(plan.static).items()})
    windows = None if g.windows is None else torch.nn.functional.pad(g.windows[..., begin:stop], (0, PADDING)).contiguous()
    geometry = replace(
        g, starts_q=g.starts_q[first : end + 1] - begin, windows=windows, places_q=number[places[begin:stop]].int(),
        lists=None if g.lists is None else Lists(**{name: _rows(x, blocks) for name, x in vars(g.lists).items()}),
        residues=None if g.windows is None else g.windows[:, :, 2].contiguous(),
    )  # fmt: skip
    return replace(plan, q_blocks=own, static=static, geometry=geometry), rows


def _rows(x: Any, blocks: slice) -> Any:
    return x[blocks].contiguous() if isinstance(x, Tensor) else x


def attend_by(
    backend: str, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, layout: TokenLayout, plan: Plan, params: Any, bias: Tensor | None,
    key_layout: TokenLayout, far: Far | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`composition.attend` on tensors of the CPU."""
    device = device_of(backend)
    *qkv, plan, bias, far = moved([q, k, v, plan, bias, far], device)
    layouts = layouts_of(layout, key_layout)
    found = composition.attend(*qkv, spec, layouts, plan, params(device), 0.3, backend, text_bias=bias, far=far)
    return moved(found, CPU)


def compare(backend: str, spec: AttentionSpec, shape: Shape, text: int, blocks: tuple[int, int]) -> None:
    """Output, lse and gradients of the band and the first `text` of the text's queries with those rows of the oracle."""
    layout = shape.layout
    plan, image = band(make_plan(spec, layout, CPU), *blocks)
    at = (layout.text_slice.start, layout.image_slice.start)
    parts = [torch.arange(text) + at[0], image + at[1]]
    rows = torch.cat(parts if layout.text_first else parts[::-1])
    queries = TokenLayout((1, 1, len(image)), text, layout.text_first)
    bias, known = shape.text_bias(), spec in SPECS.values()  # the oracle knows no part that was made in a test

    def run(dtype: torch.dtype, own: bool) -> list[Tensor]:
        q, k, v = inputs = shape.inputs(dtype, grad=True)
        params = random_parameters(spec, shape, dtype)
        if own:
            out, lse = attend_by(backend, q[:, :, rows], k, v, spec, queries, plan, params, bias, layout)
        else:
            reference = attention_by("reference", spec, layout, scale=0.3, text_bias=bias)
            whole = oracle(q, k, v, spec, layout, params, scale=0.3, text_bias=bias, dtype=dtype) if known else reference(inputs, params)
            out, lse = (x[:, :, rows] for x in whole)
        seed = torch.Generator().manual_seed(7)
        sum((x * torch.randn(x.shape, generator=seed).to(x.dtype)).sum() for x in (out, lse)).backward()  # type: ignore[union-attr]
        learned = {name: p.grad for name, p in params.named_parameters() if p.grad is not None}
        return [out, lse, flat({name: x.grad for name, x in zip("qkv", inputs, strict=True)} | learned)]  # type: ignore[misc]

    results = (run(torch.float32, True), run(torch.float64, False), run(torch.float32, False))
    for *three, name in zip(*results, ("output", "lse", "gradients"), strict=True):
        assert_close_as_eager(*three, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("text", "blocks"), [(0, (2, 5)), (2, (0, 4))], ids=["inner", "first"])
@pytest.mark.parametrize("spec", (SPECS | FOREIGN).values(), ids=SPECS | FOREIGN)
def test_a_band_is_rows_of_the_whole(spec: AttentionSpec, text: int, blocks: tuple[int, int], backend: str) -> None:
    compare(backend, spec, SHAPE, text, blocks)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["fovea", "clear-downsample", "gna", "sla", "sla-all"])
def test_a_band_in_one_kernel(name: str) -> None:
    compare("triton", SPECS[name], TINY, 0 if name == "gna" else 2, (1, 3))


@pytest.mark.gpu
def test_a_band_by_parts() -> None:
    compare("triton", FOREIGN["top-p-pooled"], TINY, 1, (1, 3))


@pytest.mark.parametrize("name", ["fovea", "sla", "linear-mass", "clear-downsample"])
def test_the_rest_of_a_band_in_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "fuses", lambda spec, *_: spec.rest is None)
    compare("cpu", SPECS[name], SHAPE, 2, (1, 4))


CUT = (37, 60, 57)  # tokens of bands that end within rows and within tiles
WITH_REST = {
    "fovea": SPECS["fovea-radius"],
    "fovea-without-offset": replace(SPECS["fovea-radius"], merge=Mass(offset=False)),
    "no-variance": replace(SPECS["fovea-radius"], rest=Pooled(variance=False)),
    "means-alone": replace(SPECS["fovea-radius"], rest=Pooled(log_count=False, variance=False)),
    "offset-by-query": replace(SPECS["fovea-radius"], merge=Mass("query")),  # whose rest runs in torch
}
CUTTABLE = {name: replace(SPECS[name], rest=None, merge=None) for name in ("fovea-radius", "clear", "gna")} | {
    "blocks-of-two-sizes": AttentionSpec((Disc(3),), order=Raster(), block=(16, 32)),
}


def known(spec: AttentionSpec, grounds: Grounds, number: int, band: Band, images: list[Tensor], params: Any) -> Far | None:
    """What the rest of a band requires of the keys that it does not read, of q, k and v `[B, H, N, D]` of the whole image."""
    if spec.rest is None:
        return None
    wide = torch.promote_types(images[0].dtype, torch.float32)
    k, v = (x.to(wide).flatten(0, 1) for x in images[1:])
    if spec.rest.far is FarBlocks:
        pieces = grounds.pieces(number, CPU)
        return FarBlocks(Moments.of(k, v, grounds.whole.k_blocks), pieces.kept, pieces.slots)
    if spec.rest.far is FarKeys:
        return FarKeys(*(spec.rest.keys_of(x, grounds.whole.prepared, params()) for x in (k, v)))
    unread = torch.ones(k.shape[1], dtype=torch.bool).index_fill(0, band.keys, False)
    k, v = k[:, unread], v[:, unread]
    own = Call(k, k, v, images[0].shape[1], 0.3, grounds.whole.coords, band.plan.q_blocks, band.plan.k_blocks, {}, params())
    features, values = spec.rest.factors(own)
    assert features.shape[-1] == spec.rest.features(v.shape[-1])
    return FarSums(features.mT @ torch.cat([values, torch.ones_like(values[..., :1])], -1))


def cut_in_bands(
    backend: str, spec: AttentionSpec, shape: Shape, tokens: tuple[int, ...], kind: torch.dtype = torch.float32
) -> None:  # fmt: skip
    """Output and gradients of all bands, each over the keys that it reads and what it knows of the others, with those of the whole."""
    layout, bias = shape.layout, shape.text_bias()
    grounds = Grounds(spec, layout, tokens)
    rows = layout.image_slice.start

    def in_bands(inputs: list[Tensor], params: Any) -> Tensor:
        images = [x[:, :, layout.image_slice] for x in inputs]
        words = [x[:, :, layout.text_slice] for x in inputs]
        found = []
        for number, (first, end) in enumerate(grounds.ranges):
            band = grounds.band(number, CPU)
            keys, values = (
                torch.cat([w, x[:, :, band.keys]] if layout.text_first else [x[:, :, band.keys], w], 2)
                for w, x in zip(words[1:], images[1:], strict=True)
            )
            of_keys = TokenLayout((1, 1, len(band.keys)), layout.text, layout.text_first)
            given = (images[0][:, :, first:end], keys, values, spec, TokenLayout((1, 1, end - first)), band.plan)
            far = known(spec, grounds, number, band, images, params)
            found.append(attend_by(backend, *given, params, bias, of_keys, far)[0])
        return torch.cat(found, 2)

    def run(dtype: torch.dtype, *, cut: bool) -> list[Tensor]:
        inputs, params = shape.inputs(dtype, grad=True), random_parameters(spec, shape, dtype)
        if cut:
            out = in_bands(inputs, params)
        else:
            out = attention_by("reference", spec, layout, scale=0.3, text_bias=bias)(inputs, params)[0]
            out = out[:, :, rows : rows + layout.image]
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(dtype)).sum().backward()
        learned = {name: p.grad for name, p in params.named_parameters() if p.grad is not None}
        return [out, flat({name: x.grad for name, x in zip("qkv", inputs, strict=True)} | learned)]

    results = (run(kind, cut=True), run(torch.float64, cut=False), run(kind, cut=False))
    for *three, name in zip(*results, ("output", "gradients"), strict=True):
        assert_close_as_eager(*three, name)  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("spec", (CUTTABLE | WITH_REST).values(), ids=[*CUTTABLE, *(f"{name}-rest" for name in WITH_REST)])
def test_bands_that_cut_tiles_are_the_whole(spec: AttentionSpec, backend: str) -> None:
    cut_in_bands(backend, spec, SHAPE, CUT)
    assert len(Grounds(spec, SHAPE.layout, CUT).keys(0)) < SHAPE.layout.image


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bands_of_a_clip(backend: str) -> None:
    cut_in_bands(backend, CLEAR(2, tile=(2, 4, 4), first_frames=1), Shape(2, 1, 24, (4, 5, 9), 7, False), (50, 65, 65))


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("queries", "keys", "text", "dim"), [(13, 99, 3, 24), (77, 5, 0, 16), (64, 64, 70, 16)])
def test_queries_of_text_see_all_keys(queries: int, keys: int, text: int, dim: int, backend: str) -> None:
    plan = all_pairs(CLEAR(2.0), queries, keys, CPU)
    seed, bias = torch.Generator().manual_seed(3), torch.randn(2, text, generator=torch.Generator().manual_seed(4)) if text else None
    q, k, v = (torch.randn(2, 2, n, dim, generator=seed) for n in (queries, keys + text, keys + text))

    def run(dtype: torch.dtype, *, own: bool) -> list[Tensor]:
        x = [y.to(dtype).requires_grad_() for y in (q, k, v)]
        if own:
            out, lse = attend_by(
                backend, *x, CLEAR(2.0), TokenLayout((1, 1, queries)), plan, lambda device: {}, bias, TokenLayout((1, 1, keys), text)
            )
        else:
            logits = 0.3 * x[0] @ x[1].mT
            logits = logits if bias is None else logits + torch.nn.functional.pad(bias.to(dtype), (0, keys))[:, None, None]
            out, lse = logits.softmax(-1) @ x[2], logits.logsumexp(-1)
        return [out, lse, flat(dict(zip("qkv", torch.autograd.grad(out.square().sum() + lse.sin().sum(), x), strict=True)))]

    results = (run(torch.float32, own=True), run(torch.float64, own=False), run(torch.float32, own=False))
    for *three, name in zip(*results, ("output", "lse", "gradients"), strict=True):
        assert_close_as_eager(*three, name)  # type: ignore[arg-type]


def test_a_plan_of_other_tokens_is_refused() -> None:
    q, k, v = (torch.randn(1, 2, n, 16) for n in (20, 50, 50))
    with pytest.raises(ValueError, match="q_starts must end with the 20 image tokens of q, not with 13"):
        attend_by(
            "cpu",
            q,
            k,
            v,
            CLEAR(2.0),
            TokenLayout((1, 1, 20)),
            all_pairs(CLEAR(2.0), 13, 50, CPU),
            lambda device: {},
            None,
            TokenLayout((1, 1, 50)),
        )


def test_the_rest_of_cut_bands_is_in_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = SHAPE.inputs()
    attention(q, k, v, WITH_REST["fovea"], SHAPE.layout, scale=0.3, backend="reference")
    monkeypatch.setattr(reference, "pooled_attention", lambda *_, **__: pytest.fail("the pooled keys ran in torch"))
    spec, grounds = WITH_REST["fovea"], Grounds(WITH_REST["fovea"], SHAPE.layout, CUT)
    band, pieces, image = grounds.band(1, CPU), grounds.pieces(1, CPU), SHAPE.layout.image_slice
    q, k, v = (x[:, :, image] for x in (q, k, v))
    first, end = grounds.ranges[1]
    far = FarBlocks(Moments.of(k.flatten(0, 1), v.flatten(0, 1), grounds.whole.k_blocks), pieces.kept, pieces.slots)
    layouts = [TokenLayout((1, 1, end - first)), TokenLayout((1, 1, len(band.keys)))]
    params = random_parameters(spec, SHAPE, torch.float32)
    given = (q[:, :, first:end], k[:, :, band.keys], v[:, :, band.keys], spec, layouts_of(*layouts), band.plan, params(), 0.3)
    assert composition.attend(*given, "cpu", far=far)[0].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [CUTTABLE["clear"], CUTTABLE["gna"], WITH_REST["fovea"], WITH_REST["no-variance"]])
def test_cut_bands_in_triton(spec: AttentionSpec) -> None:
    cut_in_bands("triton", spec, TINY, (20, 34))


def test_text_at_two_ends_is_refused() -> None:
    layout = SHAPE.layout
    with pytest.raises(ValueError, match="the text is last among the queries and first among the keys: move it"):
        layouts_of(replace(layout, text_first=False), layout)


# Every registered part. What depends on all queries of a head, the split of a block and its variance among them, is the same in the whole
# as in the part of it where the queries of one image are those of the other, or these with the sign turned.

PAIR = Shape(1, 2, 16, (1, 11, 14), 5)  # an image of 12 tiles, which are spans of 4 query blocks with and without those of a second
VIDEO = Shape(2, 1, 24, (4, 5, 9), 7, False)
SHORT = Shape(1, 1, 16, (1, 4, 13), 3)  # for the interpreter
CASES = {"more-keys": (PAIR, 2, True), "more-queries-video-text-last": (VIDEO, 0, False)}
OTHERS = [pytest.param(spec, *case, id=f"{name}-{which}") for name, spec in PARTS.items() for which, case in CASES.items()]
Run = tuple[Tensor, Tensor]


def of_one_image(shape: Shape, spec: AttentionSpec) -> tuple[TokenLayout, Plan, TokenLayout]:
    """Queries of the first of two images, keys of both: the layout of the queries, their plan, the layout of the keys."""
    layout = replace(shape.layout, references=(shape.grid,))
    whole = make_plan(spec, layout, CPU)
    alone = make_plan(spec, shape.layout, CPU)
    plan, rows = band(whole, 0, len(alone.q_blocks.count))
    assert rows.equal(torch.arange(shape.layout.image))
    return shape.layout, plan, layout


def of_two_images(shape: Shape, spec: AttentionSpec) -> tuple[TokenLayout, Plan, TokenLayout]:
    """Queries of two images that lie over each other, keys of the first alone."""
    plan, layout = make_plan(spec, shape.layout, CPU), shape.layout
    g, q, n = plan.geometry, plan.q_blocks, layout.image
    places = torch.arange(n) if g.places_q is None else g.places_q.long()
    blocks = Blocks(
        torch.cat([q.index, q.index + n]), *(x.repeat(2, *[1] * (x.ndim - 1)) for x in (q.valid, q.count)),
        torch.cat([q.place, q.place + q.index.numel()]), q.even, q.consecutive,
    )  # fmt: skip
    windows = None if g.windows is None else torch.nn.functional.pad(g.windows[..., :n].repeat(1, 1, 1, 2), (0, PADDING))
    geometry = replace(
        g, starts_q=torch.cat([g.starts_q[:-1], g.starts_q + n]), windows=windows, places_q=torch.cat([places, places + n]).int(),
        lists=None if g.lists is None else Lists(**{name: _repeated(x) for name, x in vars(g.lists).items()}),
        residues=None if g.windows is None else g.windows[:, :, 2].contiguous(),
    )  # fmt: skip
    static = None if plan.static is None else BlockMap(**{name: _repeated(x) for name, x in vars(plan.static).items()})
    return replace(layout, references=(shape.grid,)), replace(plan, q_blocks=blocks, static=static, geometry=geometry), layout


def _repeated(x: Any) -> Any:
    return x.repeat(2, *[1] * (x.ndim - 1)).contiguous() if isinstance(x, Tensor) else x


def against_the_whole(backends: tuple[str, ...], spec: AttentionSpec, shape: Shape, *, more_keys: bool, text: int) -> None:
    """Output, lse and gradients with those of whole calls; `more_keys` than queries, or more queries; `text` queries of the text's."""
    of_q, plan, of_k = (of_one_image if more_keys else of_two_images)(shape, spec)
    of_q, bias, seed = replace(of_q, text=text), shape.text_bias(), torch.Generator().manual_seed(2)
    heads, d = (shape.batch, shape.heads), shape.head_dim
    starts = [torch.randn(*heads, n, d, generator=seed) for n in (shape.layout.image, shape.text, of_k.tokens, of_k.tokens)]
    pull = [torch.randn(*heads, of_q.tokens, *size, generator=seed) for size in ((d,), ())]

    def joined(words: Tensor, *images: Tensor) -> Tensor:
        return torch.cat([words, *images] if of_k.text_first else [*images, words], 2)

    def whole(x: Tensor, words: Tensor, k: Tensor, v: Tensor, params: Any) -> Run:
        found = [
            attention_by("reference", spec, of_k, scale=0.3, text_bias=bias)([joined(words, *images), k, v], params)
            for images in (((x, x),) if more_keys else ((x,), (-x,)))
        ]
        own = slice(of_k.image_slice.start, of_k.image_slice.start + shape.layout.image)
        rows = [[part[:, :, own] for part in result] for result in found]
        said = [part[:, :, of_k.text_slice][:, :, :text] for part in found[0]]
        out, lse = (joined(said[i], *(image[i] for image in rows)) for i in range(2))
        return out, lse

    def part(backend: str, x: Tensor, words: Tensor, k: Tensor, v: Tensor, params: Any) -> Run:
        q = joined(words[:, :, :text], *((x,) if more_keys else (x, -x)))
        return attend_by(backend, q, k, v, spec, of_q, plan, params, bias, of_k)

    def run(dtype: torch.dtype, function: Callable[..., Run]) -> list[Tensor]:
        given = [(s * x).to(dtype).requires_grad_() for s, x in zip((2, 2, 1, 1), starts, strict=True)]
        params = random_parameters(spec, shape, dtype)
        out, lse = function(*given, params)
        sum((a * b.to(dtype)).sum() for a, b in zip((out, lse), pull, strict=True)).backward()  # type: ignore[union-attr]
        # of a few learned numbers, each a sum over all tokens: as their root mean square, so that not they alone decide
        learned = [p.grad / out.numel() ** 0.5 for p in params.parameters() if p.grad is not None]
        return [out, lse, torch.cat([torch.zeros(0) if x is None else x.flatten() for x in (*(x.grad for x in given), *learned)])]

    exact, eager = run(torch.float64, whole), run(torch.float32, whole)
    for backend in backends:
        own = run(torch.float32, functools.partial(part, backend))
        for *three, name in zip(own, exact, eager, ("output", "lse", "gradients"), strict=True):
            assert_close_as_eager(*three, f"{name} of {backend}")


@pytest.mark.parametrize(("spec", "shape", "text", "more_keys"), OTHERS)
def test_every_part_takes_other_queries_than_keys(spec: AttentionSpec, more_keys: bool, shape: Shape, text: int) -> None:
    if any(part.own_tokens for part in spec.parts()):
        with pytest.raises(ValueError, match="requires that queries and keys are the same tokens: give one layout, or leave the part out"):
            against_the_whole(("reference",), spec, shape, more_keys=more_keys, text=text)
        return
    against_the_whole(("reference", "cpu"), spec, shape, more_keys=more_keys, text=text)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "more_keys"),
    [("first-order", True), ("grouped", True), ("ErrorProduct", False), ("TopP", False), ("Cross", True), ("MeanOfRest", False)],
)
def test_other_queries_than_keys_in_triton(name: str, more_keys: bool) -> None:
    against_the_whole(("triton",), PARTS[name], SHORT, more_keys=more_keys, text=1)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("seen", [0, 2])
@pytest.mark.parametrize("spec", [SPECS["fovea"], SPECS["sla"], SPECS["clear-downsample"], FOREIGN["top-p-pooled"]])
def test_more_text_queries_than_text_keys(spec: AttentionSpec, seen: int, backend: str) -> None:
    """As where the other keys of the text are masked."""
    layout, first = SHAPE.layout, SHAPE.layout.text_slice.start
    fewer = replace(layout, text=seen)
    own = torch.cat([torch.arange(first, first + seen), torch.arange(layout.tokens)[layout.image_slice]])
    bias = torch.zeros(SHAPE.batch, layout.text).index_fill(1, torch.arange(seen, layout.text), -torch.inf)
    q, k, v = SHAPE.inputs(torch.float64)
    params = random_parameters(spec, SHAPE, torch.float64)
    expected = attention(q, k, v, spec, layout, params=params, scale=0.3, text_bias=bias, backend="reference", return_lse=True)
    dtype = torch.float64 if backend == "reference" else torch.float32
    given = (q.to(dtype), k[:, :, own].to(dtype), v[:, :, own].to(dtype), spec, layouts_of(layout, fewer), make_plan(spec, layout, CPU))
    found = composition.attend(*given, params.to(dtype)(), 0.3, backend)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-11 if dtype == torch.float64 else 1e-4, atol=1e-5)
