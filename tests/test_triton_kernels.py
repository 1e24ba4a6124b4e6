"""The Triton kernels against the oracle: natively where there is a CUDA device (`pytest -m gpu`), else under Triton's interpreter."""

import inspect
import math
from typing import Any

import pytest
import torch
from helpers import Shape, assert_close_as_eager, flat, gradients, oracle, random_parameters
from on_device import DEVICE, attention_by, moved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch, ops
from dit_accel.kernels.arguments import ATTENTION, Arguments
from dit_accel.kernels.choosing import SelectionArguments
from dit_accel.kernels.triton import (
    backward,
    backward_linear,
    block_choice,
    block_means,
    calls,
    forward,
    launch,
    launch_backward,
    launch_choice,
    primitives,
)
from dit_accel.kernels.triton.tables import Machine
from dit_accel.method import AttentionSpec, Linear, Mass, Pooled, Raster, Tiles, TopK
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.layout import TokenLayout

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE.type == "cuda" else [])  # the interpreter can't multiply bfloat16
SPECS = {
    "fovea": Fovea(0.2),
    "fovea-radius": Fovea(radius=3),
    "clear": CLEAR(4),
    "clear-downsample": CLEAR(3, downsample=2),
    "sla": SLA(0.3, block=(32, 16)),
    "sla-all": SLA(0.3, "elu", "all", block=(16, 32)),
    "linear-mass": AttentionSpec((TopK(0.2),), Linear("relu"), Mass(), Tiles((4, 4)), (16, 16)),
    "pooled-plain": AttentionSpec((TopK(0.1),), Pooled(log_count=False, variance=False), Mass(offset=False), Raster(), (16, 32)),
    "gna": GNA((4, 6), stride=(2, 3), dilation=(1, 2)),
}
SMALL = Shape(1, 2, 24, (1, 9, 11), 5)

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_spec = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def run(
    qkv: list[Tensor], spec: AttentionSpec, layout: TokenLayout, params: Any = None, text_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return attention_by("triton", spec, layout, text_bias=text_bias)(qkv, params)


def assert_equals_oracle(
    spec: AttentionSpec, shape: Shape, dtype: torch.dtype = torch.float32, text_bias: Tensor | None = None
) -> None:  # fmt: skip
    qkv, params = shape.inputs(dtype), random_parameters(spec, shape)
    exact, eager = (oracle(*qkv, spec, shape.layout, params, text_bias=text_bias, dtype=d) for d in (torch.float64, dtype))
    with torch.no_grad():
        got = run(qkv, spec, shape.layout, params, text_bias)
    assert got[0].dtype == dtype
    assert_close_as_eager(got[0], exact[0].detach(), eager[0].detach())
    assert_close_as_eager(got[1], exact[1].detach(), eager[1].detach(), "lse")


def own_gradients(
    spec: AttentionSpec, shape: Shape, dtype: torch.dtype = torch.float32, text_bias: Tensor | None = None
) -> dict[str, Tensor]:
    return gradients(lambda qkv, params: run(qkv, spec, shape.layout, params.float(), text_bias), spec, shape, dtype)


@every_dtype
@every_spec
def test_every_method(spec: AttentionSpec, dtype: torch.dtype) -> None:
    assert_equals_oracle(spec, SMALL, dtype)


@pytest.mark.parametrize(
    ("name", "head_dim"), [("fovea", d) for d in (8, 16, 40, 72, 96, 128, 160, 256)] + [("sla", d) for d in (8, 16, 40, 72, 96, 128)]
)
def test_every_head_dim(name: str, head_dim: int) -> None:
    assert_equals_oracle(SPECS[name], Shape(1, 1, head_dim, (1, 6, 9), 3))


@pytest.mark.parametrize(
    ("grid", "text", "text_first"),
    [
        ((1, 1, 1), 0, True), ((1, 3, 50), 0, True), ((1, 13, 7), 77, True), ((3, 5, 7), 1, False), ((1, 1, 65), 130, False),
        ((1, 8, 8), 0, True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", ["fovea", "fovea-radius", "clear", "sla", "gna"])
def test_every_grid_and_text(name: str, grid: tuple[int, int, int], text: int, text_first: bool) -> None:
    heads = 8 if grid == (1, 1, 1) else 1  # one token, but enough numbers for a mean error
    assert_equals_oracle(SPECS[name], Shape(1, heads, 16, grid, text, text_first))


@every_dtype
@every_spec
def test_every_gradient(spec: AttentionSpec, dtype: torch.dtype) -> None:
    exact, eager = (
        gradients(lambda qkv, p, d=d: oracle(*qkv, spec, SMALL.layout, p, dtype=d), spec, SMALL, d) for d in (torch.float64, dtype)
    )
    got = own_gradients(spec, SMALL, dtype)
    inputs, learned = ("query", "key", "value"), sorted(got.keys() - {"query", "key", "value"})
    assert_close_as_eager(*(flat({name: grads[name] for name in inputs}) for grads in (got, exact, eager)), "inputs")
    if sum(got[name].numel() for name in learned) > 9:  # the error of two numbers is luck: all together, then
        assert_close_as_eager(*(flat({name: grads[name] for name in learned}) for grads in (got, exact, eager)), "learned")
    assert_close_as_eager(*(flat(grads) for grads in (got, exact, eager)), "all")


@pytest.mark.parametrize("scale", [2.0**11, 2.0**-4], ids=["large", "small"])
@pytest.mark.parametrize("name", ["sla", "linear-mass"])
def test_float16_gradients_of_a_linear_rest_at_any_scale(name: str, scale: float) -> None:
    """Gradients of 1/32 at a loss scale of 2¹⁶, and small ones, rows up to 2⁸ apart: none passes float16's end on the way or gets lost."""
    spec, layout = SPECS[name], SMALL.layout
    row = 2.0 ** torch.linspace(-8, 0, layout.tokens)

    def weighted(found: tuple[Tensor, Tensor], factor: float = 1.0) -> tuple[Tensor, Tensor]:
        out, lse = found
        weight = (factor * row).to(out.dtype)
        return out * weight[:, None], lse * weight.to(lse.dtype)

    exact, eager = (
        gradients(lambda qkv, p, d=d: weighted(oracle(*qkv, spec, layout, p, dtype=d)), spec, SMALL, d)
        for d in (torch.float64, torch.float16)
    )
    got = gradients(lambda qkv, p: weighted(run(qkv, spec, layout, p.float()), scale), spec, SMALL, torch.float16)
    back = {name: x.double() / scale for name, x in got.items()}
    for names in (["query", "key", "value"], sorted(got)):
        own, *wanted = (flat({name: grads[name] for name in names}) for grads in (back, exact, eager))
        assert_close_as_eager(own.half(), *wanted)


@pytest.mark.parametrize("shape", [Shape(2, 2, 8, (1, 5, 7)), Shape(1, 2, 72, (2, 4, 7), 33, False)], ids=["no-text", "video-text-last"])
@pytest.mark.parametrize("name", ["fovea", "clear", "clear-downsample", "sla", "linear-mass"])
def test_gradients_at_odd_shapes(name: str, shape: Shape) -> None:
    spec = SPECS[name]
    exact, eager = (
        flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, shape.layout, p, dtype=d), spec, shape, d))
        for d in (torch.float64, torch.float32)
    )
    assert_close_as_eager(flat(own_gradients(spec, shape)), exact, eager, "gradients")


TEXT_LAST = Shape(2, 2, 8, (2, 4, 5), 70, False)


@pytest.mark.parametrize(
    ("shape", "masked", "dtype"),
    [
        *(pytest.param(Shape(2, 1, 24, (1, 5, 7), 5), False, dtype, id=f"two-masks-{dtype}") for dtype in DTYPES),
        pytest.param(TEXT_LAST, False, torch.float32, id="text-last"),
        pytest.param(Shape(1, 2, 16, (1, 6, 7), 70), True, torch.float32, id="all-masked"),
    ],
)
@pytest.mark.parametrize("name", ["fovea", "clear-downsample", "linear-mass"])
def test_a_bias_of_the_texts_keys(name: str, shape: Shape, masked: bool, dtype: torch.dtype) -> None:
    spec, bias = SPECS[name], shape.text_bias(masked=masked)
    assert_equals_oracle(spec, shape, dtype, bias)
    exact, eager = (
        flat(gradients(lambda qkv, p, d=d: oracle(*qkv, spec, shape.layout, p, text_bias=bias, dtype=d), spec, shape, d))
        for d in (torch.float64, dtype)
    )
    assert_close_as_eager(flat(own_gradients(spec, shape, dtype, bias)), exact, eager, "gradients")


@every_dtype
def test_masked_keys_change_no_bit(dtype: torch.dtype) -> None:
    shape, bias, found = TEXT_LAST, TEXT_LAST.text_bias(), []
    for other in (None, 50.0):
        qkv = shape.inputs(dtype)
        for sample, gone in enumerate(bias == -math.inf):
            for x in qkv[1:]:
                if other is not None:
                    x[sample][:, shape.layout.image :][:, gone] = other
        leaves = [x.requires_grad_() for x in qkv]
        out, lse = run(leaves, SPECS["fovea"], shape.layout, text_bias=bias)
        (out.float().square().sum() + lse.sin().sum()).backward()
        found.append([out.detach(), lse.detach(), *(x.grad for x in leaves)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    for grad in found[0][3:]:
        assert not grad[:, :, shape.layout.image :].transpose(1, 2)[bias == -math.inf].any()


@pytest.mark.parametrize("spec", [Fovea(1.0), Fovea(radius=40), CLEAR(40), SLA(1.0), GNA(99)], ids=str)
def test_all_blocks_kept_is_dense(spec: AttentionSpec) -> None:
    shape = Shape(1, 2, 16, (1, 9, 10), 6)
    qkv = shape.inputs()
    wanted, eager = (torch.nn.functional.scaled_dot_product_attention(*(x.to(d) for x in qkv)) for d in (torch.float64, torch.float32))
    assert_close_as_eager(run(qkv, spec, shape.layout)[0], wanted, eager)


@every_spec
def test_strided_inputs_amid_poison(spec: AttentionSpec) -> None:
    shape = Shape(2, 3, 40, (1, 7, 9), 6)
    plain = shape.inputs()
    wide = torch.full((2, shape.layout.tokens + 4, 5, 3 * 47), math.nan)  # odd: a row may begin amid a vector
    views = [wide[:, 2:-2, 1:4, 47 * i : 47 * i + 40].transpose(1, 2) for i in range(3)]  # [B, H, N, D] of a fused projection
    for view, x in zip(views, plain, strict=True):
        view.copy_(x)
    views = [moved(wide)[:, 2:-2, 1:4, 47 * i : 47 * i + 40].transpose(1, 2) for i in range(3)]
    torch.testing.assert_close(run(views, spec, shape.layout), run(plain, spec, shape.layout), rtol=0, atol=0)


@every_spec
def test_one_nan_stays_in_sight(spec: AttentionSpec) -> None:
    shape = Shape(1, 1, 16, (1, 8, 8))
    for which in range(3):
        qkv = shape.inputs()
        qkv[which][0, 0, 9, 3] = math.nan
        assert run(qkv, spec, shape.layout)[0][0, 0, 9].isnan().any()


@pytest.mark.parametrize("name", ["fovea", "sla"])
def test_again_is_the_same_to_the_bit(name: str) -> None:
    first, second = (own_gradients(SPECS[name], SMALL) for _ in range(2))
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_offsets_past_32_bits() -> None:
    shape = Shape(1, 1, 16, (1, 4, 4), 1)
    plain, far = shape.inputs(torch.float16), 2**27 + 8  # 17 rows this far apart reach past 2³¹ elements
    views = [torch.empty(17 * far, dtype=torch.float16, device=DEVICE).as_strided((1, 1, 17, 16), (0, 0, far, 1)) for _ in plain]
    for view, x in zip(views, plain, strict=True):
        view.copy_(x)
    torch.testing.assert_close(run(views, CLEAR(2), shape.layout), run(plain, CLEAR(2), shape.layout), rtol=0, atol=0)


# The launches


def test_columns_are_the_lists_transposed() -> None:
    lists = torch.tensor([[[0, 2, 1], [2, 0, 0], [1, 2, 0]]], dtype=torch.int32)
    counts, full = torch.tensor([[3, 1, 2]], dtype=torch.int32), torch.tensor([[1, 1, 0]], dtype=torch.int32)
    entries, indptr, numbers = launch_backward.columns(lists, counts, full, 3, mask_of=torch.arange(9, dtype=torch.int32).view(1, 3, 3))
    found = [entries[0, a:b].tolist() for a, b in zip(indptr[0, :-1], indptr[0, 1:], strict=True)]
    assert found == [[0], [], [], [0, 2], [1], [0, 2]]  # block 0 whole, partly; block 1 whole, partly; ...
    assert numbers is not None
    assert numbers[0, :6].tolist() == [0, 2, 6, 3, 1, 7]  # of the same entries, where they were


def test_no_constant_has_a_string_for_a_default() -> None:
    """Before Triton 3.7 such a default is no constant, and no kernel that uses it compiles."""
    modules = (backward, backward_linear, forward, primitives, block_choice, block_means)
    functions = {f.__name__: f for module in modules for f in vars(module).values() if hasattr(f, "arg_names") and hasattr(f, "fn")}
    assert {"tile", "attend_rows", "linear_columns", "choose_blocks"} <= functions.keys()
    wrong = [
        (name, parameter.name)
        for name, function in functions.items()
        for parameter in inspect.signature(function.fn).parameters.values()
        if isinstance(parameter.default, str)
    ]
    assert wrong == []


def launches(spec: AttentionSpec, shape: Shape) -> list[launch.Launch]:
    """What a forward would launch, without running any of it."""
    with calls.recorded(Machine("sm_90", 132)) as found, torch.no_grad():
        run(shape.inputs(), spec, shape.layout, random_parameters(spec, shape))
    return found


@pytest.mark.parametrize(("spec", "passes"), [(SLA(0.1), 8), (SLA(0.1, "softmax", "all"), 8), (Fovea(0.1), 8), (CLEAR(4), 4)], ids=str)
def test_passes_over_memory(spec: AttentionSpec, passes: int) -> None:
    """Tensors of N × d that the kernels of a forward read or write, each counted once per kernel (the released SLA makes about 34)."""
    shape = Shape(1, 2, 32, (1, 32, 32))
    size = math.prod((2, 32, 32, 32))
    found = 0
    for one in launches(spec, shape):
        seen = {x.data_ptr() for x in one.arguments.values() if isinstance(x, Tensor) and x.numel() >= size}
        found += len(seen)
    assert found <= passes


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="the tensors are on a second CUDA device, and there is one")
def test_kernels_start_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton starts a kernel on the current device, wherever its tensors are; a model may lie on the second."""
    current, seen = [0], []

    def exchange(device: int) -> int:
        before, current[0] = current[0], device if device >= 0 else current[0]
        return before

    for name in ("_exchange_device", "_maybe_exchange_device"):
        monkeypatch.setattr(torch.cuda, name, exchange)
    for module, name in ((launch, "attend"), (launch_backward, "gradients"), (launch_choice, "select_blocks")):
        nothing = launch_backward.Gradients(*[None] * len(launch_backward.Gradients._fields))  # type: ignore[arg-type]
        monkeypatch.setattr(module, name, lambda *_, nothing=nothing: seen.append(current[0]) or nothing)
    with FakeTensorMode(), calls.redirected(Machine("sm_90", 132), seen.append):
        q = torch.empty(1, 2, 32, 8, device="cuda:1")
        a = Arguments(
            q=q, k=q, v=q, lists=q, counts=q, full=q, q_starts=q, k_starts=q, coords=q, q_width=16, k_width=16, text=0, text_first=True,
            scale=1.0,
        )  # fmt: skip
        calls.attend(a)
        calls.gradients(q, None, q, q, a)
        calls.select_blocks(SelectionArguments(q=q, k=q, q_starts=q, k_starts=q, q_width=16, k_width=16, top=1))
    assert seen == [1, 1, 1]
    assert current == [0]


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("setting", ["older", "newer"])
def test_either_setting_of_tf32_is_followed(setting: str, allowed: bool) -> None:
    matmul = torch.backends.cuda.matmul
    try:
        if setting == "older":
            torch.set_float32_matmul_precision("high" if allowed else "highest")
        else:
            matmul.fp32_precision = "tf32" if allowed else "ieee"
        with calls.recorded(Machine("sm_90", 132)) as found, torch.no_grad():
            run(SMALL.inputs(), SPECS["clear"], SMALL.layout)
    finally:
        matmul.fp32_precision = "ieee"
        torch.set_float32_matmul_precision("highest")
    assert {one.constants["PRECISION"] for one in found if "PRECISION" in one.constants} == {"tf32" if allowed else "tf32x3"}


@every_spec
def test_nothing_waits_for_the_device(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pass looks at a tensor's values: fake tensors, which have none, go through."""
    arguments: list[Any] = []
    real = launch.attend
    monkeypatch.setattr(launch, "attend", lambda a, machine, run=launch.execute: (arguments.append(a), real(a, machine, run))[1])
    run(SMALL.inputs(), spec, SMALL.layout, random_parameters(spec, SMALL), SMALL.text_bias())
    count = 0

    def tally(one: launch.Launch) -> None:
        nonlocal count
        count += 1

    with FakeTensorMode() as mode, torch.no_grad():
        fake = arguments[0]._replace(**{k: mode.from_tensor(x) for k, x in arguments[0]._asdict().items() if isinstance(x, Tensor)})
        out, lse = real(fake, Machine("sm_90", 132), tally)
        launch_backward.gradients(out, lse, out, lse, fake, Machine("sm_90", 132), tally)
        assert count >= 6


@pytest.mark.parametrize(
    ("spec", "biased"), [*((spec, False) for spec in SPECS.values()), (SPECS["fovea"], True)], ids=[*SPECS, "fovea-biased"]
)
def test_obeys_the_rules_of_operators(spec: AttentionSpec, biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[tuple[Arguments, str]] = []
    shape, real = Shape(1, 1, 8, (1, 4, 5), 3), ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: (found.append(args), real(*args))[1])
    run(shape.inputs(grad=True), spec, shape.layout, random_parameters(spec, shape), shape.text_bias() if biased else None)
    a, implementation = found[0]
    given = [x.detach().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in ATTENTION.pack(a)]
    torch.library.opcheck(
        ops.attention_op, (implementation, *given), test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


# Refusals


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "reason"),
    [
        ("meta", torch.float32, 64, "the tensors are on meta"),
        (str(DEVICE), torch.float64, 64, "take float32, bfloat16 or float16, not torch.float64"),
        (str(DEVICE), torch.float32, 36, "head_dim of 8 to 256 in steps of 8, not 36"),
    ],
)
def test_says_why_not(device: str, dtype: torch.dtype, head_dim: int, reason: str) -> None:
    assert reason in str(dispatch.triton_refusal(torch.device(device), dtype, head_dim))
    with pytest.raises(BackendError, match="'triton' can't run this call"):
        dispatch.choose("triton", torch.device(device), dtype, head_dim)


def test_a_linear_rest_ends_at_128() -> None:
    assert dispatch.triton_refusal(DEVICE, torch.float32, 160) is None
    assert "linear rest up to head_dim 128, not 160" in str(dispatch.triton_refusal(DEVICE, torch.float32, 160, linear=True))


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert dispatch.triton_refusal(torch.device("cuda"), torch.float32, 64) == "triton is not installed"


def test_a_cpu_tensor_is_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    assert dispatch.triton_refusal(torch.device("cpu"), torch.float32, 64) == "the tensors are on cpu"
