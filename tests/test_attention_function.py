"""`as_attention_function`, the operator for any program that takes query, key and value."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import normal, relative_error
from helpers import disc_pairs
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

import dit_accel
from dit_accel.errors import ArgumentError, BackendError
from dit_accel.method.assignment import Assignment

LAYOUTS = {
    "text first": dit_accel.TokenLayout((1, 11, 13), text=7),
    "text last": dit_accel.TokenLayout((1, 11, 13), text=7, text_first=False),
    "no text": dit_accel.TokenLayout((3, 5, 9)),
    "one word": dit_accel.TokenLayout((1, 8, 8), text=1),
}


def inputs(layout: dit_accel.TokenLayout, heads: int = 4, keys: int = 4, width: int = 72, batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(normal(batch, n, layout.tokens, width, seed=seed) for seed, n in enumerate((heads, keys, keys)))


def dense(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("scale", [None, 0.03])
@pytest.mark.parametrize("keys", [4, 2, 1])
@pytest.mark.parametrize("order", ["BHND", "BNHD"])
def test_all_kept_is_dense_attention(layout: dit_accel.TokenLayout, scale: float | None, keys: int, order: Any) -> None:
    q, k, v = inputs(layout, keys=keys)
    function = dit_accel.as_attention_function(dit_accel.Fovea(1.0), layout, tensor_layout=order, scale=scale)
    got = function(q, k, v) if order == "BHND" else function(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert relative_error(got, dense(q, k, v, scale=scale)) < 1e-6


def test_the_scale_of_a_call_goes_first() -> None:
    layout = LAYOUTS["text first"]
    q, k, v = inputs(layout)
    function = dit_accel.as_attention_function(dit_accel.Fovea(1.0), layout, scale=0.5)
    assert relative_error(function(q, k, v, scale=0.02), dense(q, k, v, scale=0.02)) < 1e-6


@pytest.mark.parametrize("layout", [LAYOUTS["text first"], LAYOUTS["text last"]], ids=["first", "last"])
def test_it_is_the_method(layout: dit_accel.TokenLayout) -> None:
    """Against dense attention under a mask over pairs: discs among image tokens, everything to and from the text."""
    q, k, v = inputs(layout)
    pairs = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    pairs[layout.image_slice, layout.image_slice] = disc_pairs(layout.grids, 3)
    function = dit_accel.as_attention_function(dit_accel.CLEAR(3), layout)
    assert relative_error(function(q, k, v), dense(q, k, v, attn_mask=pairs)) < 1e-6


@pytest.mark.parametrize("axes", [2, 3, 4])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [LAYOUTS["text first"], LAYOUTS["text last"]], ids=["first", "last"])
def test_padded_text_is_masked(axes: int, kind: torch.dtype, layout: dit_accel.TokenLayout) -> None:
    q, k, v = inputs(layout)
    attended = torch.ones(2, layout.tokens, dtype=torch.bool)
    attended[0, layout.text_slice] = torch.tensor([True] * 3 + [False] * 4)
    for x in (k, v):
        x[0, :, layout.text_slice][:, 3:] = 1e4  # what padding may hold
    mask = attended if kind == torch.bool else torch.zeros(2, layout.tokens).masked_fill(~attended, -torch.inf).to(kind)
    mask = mask.reshape(2, *(1,) * (axes - 2), layout.tokens)
    got = dit_accel.as_attention_function(dit_accel.Fovea(1.0), layout)(q, k, v, mask=mask)
    assert relative_error(got, dense(q, k, v, attn_mask=attended[:, None, None])) < 1e-6


def test_what_a_mask_adds_to_all_logits_alike_changes_nothing() -> None:
    layout = LAYOUTS["text first"]
    q, k, v = inputs(layout)
    function, mask = dit_accel.as_attention_function(dit_accel.Fovea(1.0), layout), torch.full((1, layout.tokens), -3.0)
    mask[:, 2] = 1.5
    assert relative_error(function(q, k, v, mask=mask), dense(q, k, v, attn_mask=mask[:, None, None])) < 1e-6
    mask[:, 2] = torch.finfo(mask.dtype).min
    assert relative_error(function(q, k, v, mask=mask), dense(q, k, v, attn_mask=mask[:, None, None])) < 1e-6


def compiled(function: Any, **how: Any) -> Any:
    """Of one graph, forward and backward."""
    torch.compiler.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True, **how)


def assert_same(got: Tensor, expected: Tensor, leaves: Sequence[Tensor]) -> None:
    """Output and gradients to the bit: the same kernels run."""
    weights = normal(*expected.shape, seed=5)
    gradients = [torch.autograd.grad((x * weights).sum(), leaves) for x in (got, expected)]
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("method", [dit_accel.Fovea(0.3), dit_accel.SLA(0.3), dit_accel.CLEAR(3)])
def test_a_compiled_function_is_the_same(method: dit_accel.AttentionSpec) -> None:
    layout = LAYOUTS["text first"]
    leaves = [x.requires_grad_() for x in inputs(layout)]
    function, mask = dit_accel.as_attention_function(method, layout), torch.ones(2, layout.tokens, dtype=torch.bool)
    mask[0, 3:6] = False
    graph = compiled(function)
    assert_same(graph(*leaves, mask=mask), function(*leaves, mask=mask), leaves)
    assert_same(graph(*leaves, scale=0.05), function(*leaves, scale=0.05), leaves)
    assert_same(compiled(function, dynamic=True)(*leaves, mask=mask), function(*leaves, mask=mask), leaves)
    with pytest.raises(ArgumentError, match="mask must be the same for all image tokens"):
        graph(*leaves, mask=torch.arange(layout.tokens).expand(2, -1) != layout.tokens - 1)


def test_a_graph_has_the_functions_learned_tensors() -> None:
    """In a model of the other layout, of keys of fewer heads."""
    layout, method = LAYOUTS["no text"], dit_accel.SLA(0.5)
    params = method.make_parameters(heads=4, head_dim=72)
    torch.nn.init.normal_(params.proj.weight)
    leaves = [x.transpose(1, 2).contiguous().requires_grad_() for x in inputs(layout, keys=2)]
    function = dit_accel.as_attention_function(method, layout, params=params, tensor_layout="BNHD")
    graph = compiled(lambda q, k, v: 2 * function(q, k, v))
    for _ in range(2):
        assert_same(graph(*leaves), 2 * function(*leaves), [*leaves, *params.parameters()])
        torch.nn.init.normal_(params.proj.weight)  # a step of a training
    params = method.make_parameters(heads=4, head_dim=64)
    other = dit_accel.as_attention_function(method, layout, params=params, tensor_layout="BNHD")
    wrapped = pytest.raises(TorchDynamoException, match="on 4 heads of 72 requires parameters")
    with wrapped:
        compiled(other)(*leaves)


def test_graphs_of_several_functions_and_batches_are_their_own() -> None:
    """torch.compile keeps the graphs of all functions under the one line of code that they are."""
    layouts = [dit_accel.TokenLayout((1, *sides), text=7) for sides in ((11, 13), (13, 11))]
    functions = [dit_accel.as_attention_function(dit_accel.CLEAR(3), layout) for layout in layouts]
    graphs = [compiled(function) for function in functions]
    for batch in (1, 2, 3):
        results = []
        for function, graph in zip(functions, graphs, strict=True):
            leaves = [x.requires_grad_() for x in inputs(layouts[0], batch=batch)]
            results.append(graph(*leaves))
            assert_same(results[-1], function(*leaves), leaves)
        assert relative_error(*results) > 1e-2


def test_gradients_pass() -> None:
    layout = LAYOUTS["one word"]
    q, k, v = (x.requires_grad_() for x in inputs(layout))
    method = dit_accel.SLA(0.5)
    params = method.make_parameters(heads=4, head_dim=72)
    out = dit_accel.as_attention_function(method, layout, params=params, tensor_layout="BHND")(q, k, v)
    expected = dit_accel.attention(q, k, v, method, layout, params=params)
    weights = normal(*out.shape, seed=5)
    leaves = [q, k, v, *params.parameters()]
    got, exact = (torch.autograd.grad((x * weights).sum(), leaves) for x in (out, expected))
    assert all(torch.equal(a, b) and bool(a.isfinite().all()) for a, b in zip(got, exact, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spec": "fovea"}, "spec must be an AttentionSpec"),
        ({"spec": Assignment.of(dit_accel.Fovea())}, "spec must be an AttentionSpec.*pass one of its specs"),
        ({"layout": (1, 8, 8)}, "layout must be a TokenLayout"),
        ({"tensor_layout": "NHD"}, "tensor_layout must be one of BHND, BNHD, not 'NHD'"),
        ({"scale": 0}, "scale must be None or a number > 0, not 0"),
        ({"backend": "cuda"}, "backend"),
    ],
)
def test_what_makes_no_function_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dit_accel.as_attention_function(**{"spec": dit_accel.Fovea(), "layout": LAYOUTS["no text"], **change})


N = LAYOUTS["text first"].tokens


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, N, N, dtype=torch.bool), r"mask must be over keys.*not \(2, 150, 150\).*over pairs"),
        (torch.ones(1, 4, 1, N, dtype=torch.bool), "mask must be over keys"),
        (torch.ones(3, N, dtype=torch.bool), "mask must be over keys"),
        (torch.ones(2, N - 1, dtype=torch.bool), "mask must be over keys"),
        (torch.ones(2, N, dtype=torch.int64), "mask must be bool or floating, not torch.int64"),
        (torch.arange(2 * N).reshape(2, N) != N - 1, "mask must be the same for all image tokens"),
        (torch.zeros(2, N, dtype=torch.bool), "mask must be the same for all image tokens"),
        (torch.full((2, N), -torch.inf), "mask must be the same for all image tokens, but hides some of them"),
        (torch.full((2, N), -torch.inf).index_fill(1, torch.arange(7), 0), "mask must be the same for all image tokens"),
        (torch.full((2, N), torch.finfo(torch.bfloat16).min, dtype=torch.bfloat16), "mask must be the same for all image tokens"),
        (torch.full((1, N), torch.nan), "mask must be the same for all image tokens"),
        ([True] * N, "mask must be over keys.*not 'list'"),
    ],
)
def test_other_masks_are_refused(mask: Any, message: str) -> None:
    layout = LAYOUTS["text first"]
    function = dit_accel.as_attention_function(dit_accel.CLEAR(3), layout)
    with pytest.raises(ArgumentError, match=message):
        function(*inputs(layout), mask=mask)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 4, N + 1, 24)] * 3, r"the 150 tokens of grid \(1, 11, 13\) and 7 of text, not \(151, 151\)"),
        ([(2, N, 4, 24)] * 3, "the axes of BHND are batch, heads, tokens, channels"),
        ([(2, N, 96)] * 3, "must have 4 axes, BHND"),
        ([(2, 4, N, 24), (2, 3, N, 24), (2, 3, N, 24)], "heads a multiple of the keys'"),
        ([(2, 4, N, 24), (2, 4, N, 24), (2, 2, N, 24)], "must fit each other"),
        ([(2, 4, N, 24), (2, 4, 9, 24), (2, 4, 9, 24)], r"not \(150, 9\)"),
    ],
)
def test_other_shapes_are_refused(shapes: list[tuple[int, ...]], message: str) -> None:
    function = dit_accel.as_attention_function(dit_accel.CLEAR(3), LAYOUTS["text first"])
    with pytest.raises(ArgumentError, match=message):
        function(*(torch.zeros(shape) for shape in shapes))


def test_a_backend_that_cannot_says_why() -> None:
    layout = LAYOUTS["no text"]
    function = dit_accel.as_attention_function(dit_accel.Fovea(), layout, backend="cpu")
    with pytest.raises(BackendError, match="float64"):
        function(*(x.double() for x in inputs(layout)))
