"""torch.compile: no more graphs than the original model has, for any number of sizes, steps and modes, and the results of eager mode."""

import dataclasses
import itertools
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TEXT, fill_randomly, forward_arguments, normal, position_ids, relative_error, run, tiny_pipe, tiny_transformer
from peft import LoraConfig
from test_families import SPARSE, Tiny
from torch import Tensor
from torch._dynamo.utils import counters

import dit_accel
from dit_accel import CLEAR, SLA, Assignment, AttentionSpec, Fovea, Rule
from dit_accel.errors import FallbackError
from dit_accel.measure.capture import capture_inputs
from dit_accel.method import Pooled
from dit_accel.patch.state import operators_of

SIZES = [(17, 25), (20, 20), (16, 24), (24, 16), (10, 30), (30, 10), (12, 18), (13, 19), (8, 9), (9, 8)]  # some have equal token numbers
METHODS = {"fovea": Fovea(0.2), "sla": SLA(0.2), "clear-pooled": CLEAR(4.0, downsample=2)}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def small(spec: AttentionSpec | None = None, **settings: Any) -> Any:
    """A transformer of one block, accelerated with learned parameters away from their start values."""
    transformer = tiny_transformer(double=0, single=1)
    if spec is not None:
        dit_accel.accelerate(transformer, spec, **({"strict": True} | settings))
        for operator in operators_of(transformer).values():
            fill_randomly(operator, seed=1, scale=0.3)
    return transformer


def small_pipe() -> Any:
    """A pipeline around such a transformer, as it is."""
    pipe = tiny_pipe()
    pipe.transformer = small()
    return pipe


def compiled(transformer: Any, way: str, backend: str = "eager") -> Any:
    """The transformer as a whole, a function that calls it, or the transformer with its blocks compiled in place."""
    if way == "whole":
        return torch.compile(transformer, backend=backend, fullgraph=True)
    if way == "function":
        return torch.compile(lambda **arguments: transformer(**arguments), backend=backend, fullgraph=True)
    transformer.compile_repeated_blocks(backend=backend, fullgraph=True)
    return transformer


every_way = pytest.mark.parametrize("way", ["whole", "blocks", "function"])


def draw(transformer: Any, size: tuple[int, int], **changes: Any) -> Tensor:
    out: Tensor = transformer(**forward_arguments(*size, **changes), return_dict=False)[0]
    return out


# How many graphs


@every_way
@torch.no_grad()
def test_any_number_of_sizes_takes_the_graphs_of_the_original(way: str) -> None:
    stock = compiled(small(), way)
    for size in SIZES:
        draw(stock, size)
    expected = graphs()
    torch._dynamo.reset()
    counters.clear()
    eager, ours = small(Fovea(0.2)), compiled(small(Fovea(0.2)), way)
    assert [relative_error(draw(ours, size), draw(eager, size)) < 1e-5 for size in SIZES] == [True] * len(SIZES)
    assert 0 < graphs() <= expected


def test_another_family_takes_the_graphs_of_the_original() -> None:
    sizes, found = [(32, 48), (48, 32), (64, 64), (80, 48), (32, 96), (96, 80)], []
    for spec in (None, SPARSE["fovea"]):
        torch._dynamo.reset()
        counters.clear()
        tiny = Tiny("wan")
        if spec is not None:
            dit_accel.accelerate(tiny.pipe, spec, strict=True)
        expected = [tiny.run(height=h, width=w, num_inference_steps=1) for h, w in sizes]
        tiny.pipe.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
        got = [tiny.run(height=h, width=w, num_inference_steps=1) for h, w in sizes]
        assert max(relative_error(*pair) for pair in zip(got, expected, strict=True)) < 1e-5
        found.append(graphs())
    assert 0 < found[1] <= found[0]


@pytest.mark.parametrize("way", ["whole", "blocks"])
def test_dense_steps_and_switching_off_add_no_graph(way: str, sparse_calls: list[Any]) -> None:
    pipe = small_pipe()
    original = run(pipe, 64, 80)
    dit_accel.accelerate(pipe, Fovea(0.2), strict=True, dense_steps=2)
    expected, eager = run(pipe, 64, 80, steps=4), pipe.transformer
    sparse_calls.clear()
    pipe.transformer = compiled(eager, way)
    for _ in range(2):
        assert relative_error(run(pipe, 64, 80, steps=4), expected) < 1e-5
    assert len(sparse_calls) == 2 * 2
    known = graphs()
    with dit_accel.dense(pipe):
        assert relative_error(run(pipe, 64, 80), original) < 1e-5
    run(pipe, 64, 80, steps=1)
    assert len(sparse_calls) == 2 * 2
    assert graphs() == known


def test_loras_are_switched_on_compiled_blocks_with_dense_steps() -> None:
    def make() -> Any:
        pipe = small_pipe()
        for number, adapter in enumerate(("one", "two")):
            torch.manual_seed(number)
            pipe.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter)
        return dit_accel.accelerate(pipe, Fovea(0.2), strict=True, dense_steps=1)

    eager, ours = make(), make()
    ours.transformer.compile_repeated_blocks(backend="eager", fullgraph=True)
    drawn = []
    for adapters in (["one"], ["two"], ["one", "two"], None):
        for pipe in (eager, ours):
            if adapters is None:
                pipe.transformer.disable_adapters()
            else:
                pipe.transformer.enable_adapters()
                pipe.transformer.set_adapters(adapters)
        drawn.append(run(eager, 64, 80, steps=2))
        assert relative_error(run(ours, 64, 80, steps=2), drawn[-1]) < 1e-5
    assert relative_error(drawn[0], drawn[1]) > 1e-4


# What they compute


@pytest.mark.parametrize(("method", "way"), [("fovea", "blocks"), ("sla", "whole"), ("clear-pooled", "function")])
def test_gradients_are_those_of_eager_mode(method: str, way: str) -> None:
    found = []
    for compiles in (False, True):
        transformer = small(METHODS[method]).train()
        model = compiled(transformer, way, "aot_eager") if compiles else transformer
        outs = [draw(model, size) for size in ((6, 20), (20, 6))]  # both before the backward pass
        sum(out.square().mean() for out in outs).backward()  # type: ignore[union-attr]
        found.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    eager, ours = found
    assert [name for name in eager if ".dit_accel." in name]
    assert ours.keys() == eager.keys()
    assert max(relative_error(ours[name], eager[name]) for name in eager) < 1e-4


def test_gradients_of_a_dense_step_are_the_originals() -> None:
    stock, ours = small().train(), small(Fovea(0.2), dense_steps=1).train()
    for model in (stock, compiled(ours, "blocks", "aot_eager")):
        draw(model, (6, 20)).square().mean().backward()
    expected = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    assert max(relative_error(dict(ours.named_parameters())[name].grad, g) for name, g in expected.items()) < 1e-5  # type: ignore[arg-type]


@torch.no_grad()
def test_inductor_computes_the_same() -> None:
    eager, ours = small(Fovea(0.2)), compiled(small(Fovea(0.2)), "blocks", "inductor")
    assert relative_error(draw(ours, (6, 20)), draw(eager, (6, 20))) < 1e-5


@torch.no_grad()
def test_autocast_gives_its_dtype_as_in_the_original() -> None:
    exact = draw(small(Fovea(1.0)), (6, 20))
    with torch.autocast("cpu", torch.bfloat16):
        stock, ours = draw(small(), (6, 20)), draw(compiled(small(Fovea(1.0)), "blocks", "aot_eager"), (6, 20))
    assert ours.dtype == stock.dtype
    assert relative_error(ours, exact) < 2 * relative_error(stock, exact)


@torch.no_grad()
def test_threads_share_compiled_blocks() -> None:
    ours = compiled(small(CLEAR(2.0)), "blocks")
    sizes = [(6, 20), (20, 6)] * 4
    with ThreadPoolExecutor(1) as one:
        alone = [one.submit(draw, ours, size).result() for size in sizes]
    with ThreadPoolExecutor(4) as pool, torch.no_grad():
        drawn = list(pool.map(lambda size: draw(ours, size), sizes))
    assert [torch.equal(*pair) for pair in zip(drawn, alone, strict=True)] == [True] * len(sizes)


@every_way
@torch.no_grad()
def test_what_falls_back_is_said_and_refused_as_in_eager_mode(way: str) -> None:
    arguments = forward_arguments(6, 20) | {"img_ids": position_ids(20, 6)[torch.arange(120).flip(0)], "return_dict": False}
    expected = small()(**arguments)[0]
    transformer = small(Fovea(0.2), strict=False)
    ours = compiled(transformer, way)
    with pytest.warns(UserWarning, match="not one raster"):
        assert relative_error(ours(**arguments)[0], expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours(**arguments)
    assert sum(transformer._dit_accel.context.fallbacks.values()) == 2
    torch._dynamo.reset()
    with pytest.raises(FallbackError, match="not one raster"):
        compiled(small(Fovea(0.2)), way)(**arguments)


@torch.no_grad()
def test_a_compiled_block_by_itself_runs_its_original_attention() -> None:
    def block(transformer: Any) -> Tensor:
        arguments = forward_arguments(6, 20)
        rope = transformer.pos_embed(torch.cat([arguments["txt_ids"], arguments["img_ids"]]))
        x, time = normal(1, TEXT + 120, 32), normal(1, 32)
        return torch.cat(transformer.single_transformer_blocks[0](x[:, TEXT:], x[:, :TEXT], time, image_rotary_emb=rope), 1)

    expected, transformer = block(small()), compiled(small(CLEAR(2.0), strict=False), "blocks")
    draw(transformer, (6, 20))
    with pytest.warns(UserWarning, match="outside of its transformer's forward"):
        assert relative_error(block(transformer), expected) < 1e-6


def test_measuring_reads_the_layers_of_a_compiled_model() -> None:
    found = []
    for compiles in (False, True):
        transformer = small(Fovea(0.2))
        model = compiled(transformer, "blocks") if compiles else transformer
        if compiles:
            with torch.no_grad():
                draw(model, (6, 20))
        found.append(capture_inputs(model, SimpleNamespace(arguments=forward_arguments(6, 20))))  # type: ignore[arg-type]
    (eager,), (ours,) = found
    assert torch.equal(ours.query, eager.query)
    assert ours.layout == eager.layout


# PyTorch's rules for operators


@pytest.mark.parametrize("active", [True, False])
def test_the_operators_keep_pytorchs_rules(active: bool) -> None:
    transformer = small(SLA(0.3), dense_steps=0 if active else 9)
    context, (operator, *_) = transformer._dit_accel.context, operators_of(transformer).values()
    token = torch.ops.dit_accel.begin(
        context.tag, normal(1, 35, 16), torch.ones(1), [position_ids(5, 7)], "img_ids", "", [], "", TEXT, 0, [], True
    )
    q, k, v = (normal(1, TEXT + 35, 2, 16, seed=n).requires_grad_() for n in range(3))
    names, learned = zip(*operator.params().items(), strict=True)
    learned = [x.detach().requires_grad_() for x in learned]
    assert names == ("proj.weight", "proj.bias")
    arguments = (q, k, v, None, learned, "\n".join(names), token, operator.number, None, False, "default")
    torch.library.opcheck(torch.ops.dit_accel.layer.default, arguments)
    out = torch.ops.dit_accel.layer(*arguments)[0]
    assert (relative_error(out, torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2))
            > 1e-3) == active  # fmt: skip


def test_nothing_that_decides_is_recorded_in_a_cuda_graph() -> None:
    for name in ("begin", "layer", "layer_backward", "noted"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.dit_accel, name).default.tags


# Other methods of one compiled model


@pytest.mark.parametrize("way", ["whole", "blocks"])
@torch.no_grad()
def test_compiled_layers_run_what_they_are_given_next(way: str) -> None:
    fovea = Fovea(0.2)
    finer = [
        dataclasses.replace(fovea, rest=rest) for rest in (Pooled(parts=2), Pooled(parts=4), Pooled(cap=0.2), Pooled(parts=2, opened=1))
    ]
    apart = Assignment((Rule(finer[0]), Rule(CLEAR(3.0), layers="single_transformer_blocks.1.*")))
    turned = Assignment((Rule(CLEAR(3.0)), Rule(finer[0], layers="single_transformer_blocks.1.*")))
    specs = (fovea, Fovea(0.2, order=1), *finer, CLEAR(3.0), SLA(0.2), apart, turned)
    transformer, drawn = tiny_transformer(double=0, single=2), []
    model = compiled(transformer, way)
    with torch._dynamo.config.patch(recompile_limit=64):
        for given in (None, *specs, fovea, None):
            eager = tiny_transformer(double=0, single=2)
            for each in (transformer, eager) if given else ():
                dit_accel.accelerate(each, given, strict=True)
            drawn.append(draw(eager, (20, 20)))
            assert relative_error(draw(model, (20, 20)), drawn[-1]) < 1e-5, given
            if given:
                dit_accel.restore(transformer)
    assert min(relative_error(*pair) for pair in itertools.pairwise(drawn)) > 1e-4
