"""What is read of a forward belongs to that forward: threads share a transformer, nothing outlives it, recomputed blocks find it again."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch
from conftest import LAYERS, TEXT, forward_arguments, normal, relative_error, tiny_transformer
from test_families import SPARSE, Tiny
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import dit_accel
from dit_accel import CLEAR, Fovea
from dit_accel.errors import FallbackError

OUTSIDE = "called outside of its transformer's forward"

# Threads


def pipelines(tiny: Tiny, count: int) -> list[Any]:
    """Pipelines around one transformer, each with a scheduler of its own."""
    kind = type(tiny.pipe)
    parts = {k: v for k, v in tiny.pipe.components.items() if k in kind._get_signature_keys(kind)[0]}
    made = [kind(**{**parts, "scheduler": copy.deepcopy(tiny.pipe.scheduler)}) for _ in range(count)]
    for pipe in made:
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("name", ["flux", "sd3", "wan", "z_image"])
@pytest.mark.parametrize("dense_steps", [0, 1])
def test_threads_on_one_transformer_draw_what_each_draws_alone(name: str, dense_steps: int) -> None:
    tiny, sizes = Tiny(name), [(32, 96), (96, 32), (48, 64)]  # as many tokens each
    dit_accel.accelerate(tiny.pipe, SPARSE["fovea"], strict=True, dense_steps=dense_steps)
    pipes, together = pipelines(tiny, len(sizes)), Barrier(len(sizes))

    def draw(number: int, wait: bool) -> Tensor:
        def meet(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
            if wait and step < 2:
                together.wait(60)
            return {}

        height, width = sizes[number]
        call = {**tiny.call, "height": height, "width": width, "num_inference_steps": 2 + number, "callback_on_step_end": meet}
        out = pipes[number](**call, generator=torch.Generator().manual_seed(number))
        return torch.as_tensor(getattr(out, "images", getattr(out, "frames", None)))

    with ThreadPoolExecutor(1) as one:
        alone = [one.submit(draw, number, False).result() for number in range(len(sizes))]
    with ThreadPoolExecutor(len(sizes)) as pool:
        drawn = [f.result() for f in [pool.submit(draw, number, True) for number in range(len(sizes))]]
    assert [torch.equal(*pair) for pair in zip(drawn, alone, strict=True)] == [True] * len(sizes)


def test_a_forward_in_the_middle_of_another_threads() -> None:
    """The second thread's whole forward runs between two layers of the first one's."""
    transformer = dit_accel.accelerate(tiny_transformer(), CLEAR(2.0), strict=True)
    sizes = [(17, 25), (25, 17)]
    alone = [transformer(**forward_arguments(*size)).sample for size in sizes]
    found: list[Tensor] = []

    def other(*_: Any) -> None:
        handle.remove()
        with ThreadPoolExecutor(1) as pool:
            found.append(pool.submit(lambda: transformer(**forward_arguments(*sizes[1])).sample).result())

    handle = transformer.transformer_blocks[1].register_forward_pre_hook(other)
    found.insert(0, transformer(**forward_arguments(*sizes[0])).sample)
    assert [torch.equal(*pair) for pair in zip(sorted(found, key=lambda x: not torch.equal(x, alone[0])), alone, strict=True)] == [True] * 2


def test_a_forward_inside_another_transformers() -> None:
    outer, inner = (dit_accel.accelerate(tiny_transformer(seed), CLEAR(2.0), strict=True) for seed in (0, 1))
    expected = [outer(**forward_arguments(17, 25)).sample, inner(**forward_arguments(5, 6)).sample]
    found: list[Tensor] = []
    outer.transformer_blocks[1].register_forward_pre_hook(lambda *_: found.append(inner(**forward_arguments(5, 6)).sample))
    assert torch.equal(outer(**forward_arguments(17, 25)).sample, expected[0])
    assert torch.equal(found[0], expected[1])


# After a forward


def attention(transformer: Any, x: Tensor) -> Tensor:
    """What one attention module makes of text and image tokens, called by itself."""
    arguments = forward_arguments()
    rope = transformer.pos_embed(torch.cat([arguments["txt_ids"], arguments["img_ids"]]))
    out: Tensor = transformer.single_transformer_blocks[0].attn(x, image_rotary_emb=rope)
    return out


class HookError(Exception):
    """What a hook of a user raises."""


@pytest.mark.parametrize("ends", ["returns", "raises", "never-began"])
@torch.no_grad()
def test_a_module_by_itself_runs_its_original_attention(ends: str) -> None:
    transformer, x = tiny_transformer(), normal(1, TEXT + 17 * 25, 32)
    expected = attention(transformer, x)
    dit_accel.accelerate(transformer, CLEAR(2.0))
    if ends == "returns":
        transformer(**forward_arguments())
    elif ends == "raises":

        def fail(*_: Any) -> None:
            raise HookError

        handle = transformer.single_transformer_blocks[1].register_forward_pre_hook(fail)
        with pytest.raises(HookError):
            transformer(**forward_arguments())
        handle.remove()
    with pytest.warns(UserWarning, match=OUTSIDE):
        assert torch.equal(attention(transformer, x), expected)
    assert [count for reason, count in transformer._dit_accel.context.fallbacks.items() if OUTSIDE in reason] == [1]


def test_strict_refuses_a_module_by_itself() -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), CLEAR(2.0), strict=True)
    transformer(**forward_arguments())
    with pytest.raises(FallbackError, match=OUTSIDE):
        attention(transformer, normal(1, TEXT + 17 * 25, 32))
    with dit_accel.dense(transformer):
        attention(transformer, normal(1, TEXT + 17 * 25, 32))


def test_an_interrupted_forward_is_gone_at_the_next() -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), CLEAR(2.0), strict=True)
    expected = transformer(**forward_arguments(25, 17)).sample

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = transformer.single_transformer_blocks[0].register_forward_pre_hook(interrupt)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            transformer(**forward_arguments())
    handle.remove()
    assert torch.equal(transformer(**forward_arguments(25, 17)).sample, expected)
    with pytest.raises(FallbackError, match=OUTSIDE):
        attention(transformer, normal(1, TEXT + 17 * 25, 32))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_has_the_settings_and_nothing_of_a_forward(way: Any) -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), Fovea(0.2), dense_steps=2, trained_tokens=99)
    transformer(**forward_arguments())
    context = transformer._dit_accel.context
    twin = way(transformer)._dit_accel.context
    assert (context.layout is None, context.last is None) == (False, False)
    assert (twin.layout, twin.last, twin.crossovers, twin._parsed) == (None, None, {}, ())
    assert (twin.assignment, twin.assignment.dense_steps, twin.trained_tokens) == (context.assignment, 2, 99)
    assert int(twin.tag) != int(context.tag)


# Blocks that are computed again in the backward pass


def gradients(transformer: Any) -> dict[str, Tensor]:
    """Of two forwards on grids of equal token numbers, that of a smaller one run between them and the backward pass."""
    transformer.zero_grad()
    outs = [transformer(**forward_arguments(*size, seed=n)).sample for n, size in enumerate([(10, 12), (12, 10)])]
    with torch.no_grad():
        transformer(**forward_arguments(4, 5))
    sum(out.square().mean() for out in outs).backward()  # type: ignore[union-attr]
    return {name: p.grad.clone() for name, p in transformer.named_parameters() if p.grad is not None}


def test_recomputed_blocks_run_in_their_own_forward(sparse_calls: list[Any]) -> None:
    transformer = dit_accel.accelerate(tiny_transformer().train(), CLEAR(2.0, downsample=2), strict=True)
    expected = gradients(transformer)
    transformer.enable_gradient_checkpointing()
    function = transformer._gradient_checkpointing_func
    sparse_calls.clear()
    got = gradients(transformer)
    assert len(sparse_calls) == (2 + 2 + 1) * LAYERS
    assert got.keys() == expected.keys()
    assert max(relative_error(got[name], expected[name]) for name in expected) < 1e-5
    dit_accel.restore(transformer)
    assert transformer._gradient_checkpointing_func is function


def test_blocks_recomputed_by_another_checkpointing(sparse_calls: list[Any]) -> None:
    """As FSDP wraps blocks; one forward at a time."""
    found = []
    for wrapped in (False, True):
        transformer = dit_accel.accelerate(tiny_transformer().train(), CLEAR(2.0), strict=True)
        for block in transformer.single_transformer_blocks if wrapped else ():
            block.forward = lambda *args, f=block.forward, **kwargs: checkpoint(f, *args, use_reentrant=False, **kwargs)
        transformer(**forward_arguments()).sample.square().mean().backward()
        found.append({name: p.grad for name, p in transformer.named_parameters() if p.grad is not None})
    assert len(sparse_calls) == 2 * LAYERS + 2
    assert max(relative_error(found[1][name], found[0][name]) for name in found[0]) < 1e-5
