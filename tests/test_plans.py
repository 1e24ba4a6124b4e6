"""Plans: one for all text lengths and layers, as many as fit into a number of bytes, none that outlives its model."""

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from conftest import forward_arguments, tiny_pipe, tiny_transformer
from helpers import Shape, kept_pairs
from test_families import Tiny
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea, TokenLayout, attention
from dit_accel.method import Box, Disc, FirstFrames, Tiles, TopK, Window
from dit_accel.operator import blocks_of_grid as plan
from dit_accel.operator import cost
from dit_accel.operator.blocks_of_grid import Plan, make_plan
from dit_accel.operator.cost import kept_density, visited_density
from dit_accel.operator.plans import RECENT, Plans, plan_bytes
from dit_accel.patch.state import patches_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Plan]]]:
    """Grows by every plan that is made."""
    refs: list[weakref.ref[Plan]] = []
    real = plan._new_plan

    def counted(key: plan.Key) -> Plan:
        new = real(key)
        refs.append(weakref.ref(new))
        return new

    RECENT.clear()
    monkeypatch.setattr(plan, "_alive", weakref.WeakValueDictionary())  # what other tests' models hold is no part of this
    monkeypatch.setattr(plan, "_new_plan", counted)
    yield refs
    RECENT.clear()


def alive(refs: list[weakref.ref[Plan]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in refs)


def test_prompts_of_any_length_share_a_plan(made: list[weakref.ref[Plan]]) -> None:
    tiny = Tiny("qwen_image")
    dit_accel.accelerate(tiny.pipe, Fovea(0.2, tile=(4, 4)))
    embeds, mask = tiny.call["prompt_embeds"], tiny.call["prompt_embeds_mask"]
    drawn = [
        tiny.run(prompt_embeds=embeds[:, :n], prompt_embeds_mask=torch.ones(1, n, dtype=mask.dtype), num_inference_steps=1)
        for n in range(3, 8)
    ]
    assert len(made) == 1
    assert not torch.equal(drawn[0], drawn[1])
    assert {row.tokens for row in dit_accel.summary(tiny.pipe, show=False)} != {None}


def test_layers_and_models_share_plans(made: list[weakref.ref[Plan]]) -> None:
    models = [dit_accel.accelerate(tiny_transformer(seed), CLEAR(2.0)) for seed in (0, 1)]
    for model in models:
        model(**forward_arguments())
    first = len(made)
    assert first <= 2  # in tile order, and what permutes into it
    for model in models:
        model(**forward_arguments(9, 12))
        model(**forward_arguments())
    assert len(made) == 2 * first


@pytest.mark.parametrize("end", ["restore", "delete"])
def test_plans_go_with_the_pipeline(end: str, made: list[weakref.ref[Plan]]) -> None:
    pipe = dit_accel.accelerate(tiny_pipe(), CLEAR(2.0))
    for size in ((17, 25), (9, 12)):
        pipe.transformer(**forward_arguments(*size))
    assert alive(made) == len(made) > 0
    if end == "restore":
        dit_accel.restore(pipe)
    else:
        del pipe
    assert alive(made) == 0


def test_switching_specs_keeps_plans(made: list[weakref.ref[Plan]]) -> None:
    """As training for several densities does at every step."""
    from dit_accel.patch.modes import running

    model, other = dit_accel.accelerate(tiny_transformer(), SLA(0.2)), SLA(0.4)
    for _ in range(3):
        model(**forward_arguments())
        with running(model, other):
            model(**forward_arguments())
    assert len(made) == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies_begin_without_plans(copied: object) -> None:
    plans = Plans(limit=123)
    plans.get(Fovea(), TokenLayout((1, 16, 16)), CPU)
    twin = copied(plans)  # type: ignore[operator]
    assert (twin.limit, len(twin._kept)) == (123, 0)


def bytes_of(value: object) -> int:
    """Of all tensors in a plan, its objects and dictionaries walked without asking them for their fields."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    held = value if isinstance(value, dict) else getattr(value, "__dict__", {}) if type(value).__module__.startswith("dit_accel") else {}
    return sum(map(bytes_of, held.values()))


def values(plans: Plans) -> list[Plan]:
    return [kept.value for kept in plans._kept.values()]


@pytest.mark.parametrize("spec", [Fovea(radius=4), CLEAR(4.0)], ids=["whole-blocks", "bit-masks"])
def test_bytes_are_the_bound(spec: AttentionSpec, made: list[weakref.ref[Plan]]) -> None:
    layouts = [TokenLayout((1, 32, side)) for side in range(32, 41)]
    sizes, masks = [], []
    for layout in layouts:
        one = make_plan(spec, layout, CPU)
        sizes.append(bytes_of(one))
        masks.append(sum(x.nbytes for x in (one.geometry.masks, one.geometry.masks_t) if x is not None))
    del one
    limit = sum(sizes[4:8]) + sizes[3] // 2
    assert (sum(sizes[3:8]) - sum(masks[3:8]) <= limit) == (spec == CLEAR(4.0))  # masks alone make a fifth one too much
    plans = Plans(limit=limit)
    for layout in layouts[:8]:
        plans.get(spec, layout, CPU)
    assert list(map(bytes_of, values(plans))) == list(map(plan_bytes, values(plans))) == sizes[4:8]
    assert [key[1][0][2] for key in plans._kept] == [36, 37, 38, 39]
    assert alive(made) == 4
    oldest = plans.get(spec, layouts[4], CPU)  # used again: now the newest
    plans.get(spec, layouts[8], CPU)
    assert oldest in values(plans)
    assert sum(map(bytes_of, values(plans))) <= limit


def test_one_plan_beyond_the_limit_is_kept() -> None:
    plans = Plans(limit=1)
    for side in (16, 24):
        newest = plans.get(Fovea(), TokenLayout((1, side, side)), CPU)
        assert values(plans) == [newest]


def test_bytes_count_every_tensor() -> None:
    made = make_plan(AttentionSpec((Window(5), TopK(0.2)), order=Tiles((8, 8))), TokenLayout((1, 17, 23)), CPU)
    tensors = {id(x): x for x in gc.get_referents(*gc.get_referents(made)) if isinstance(x, torch.Tensor)}
    assert plan_bytes(made) >= sum(x.nbytes for x in tensors.values()) > 0
    assert plan_bytes(made) >= made.coords.nbytes + made.geometry.coords.nbytes + made.q_blocks.index.nbytes


def test_calls_of_the_operator_share_their_plan(made: list[weakref.ref[Plan]]) -> None:
    for text in (0, 3, 5):
        shape = Shape(1, 1, 16, (1, 9, 11), text)
        for _ in range(2):
            attention(*shape.inputs(), CLEAR(2.0), shape.layout)
    assert len(made) == 1


def test_a_model_that_never_ran_holds_no_plan(made: list[weakref.ref[Plan]]) -> None:
    pipe = dit_accel.accelerate(tiny_pipe(), CLEAR(2.0))
    dit_accel.summary(pipe, show=False)
    ((_, patch),) = patches_of(pipe)
    assert made == []
    assert not patch.context.plans._kept


COUNTED = {
    "disc": AttentionSpec((Disc(2.5),), order=Tiles((4, 4)), block=(16, 16)),
    "window": GNA((3, 5), (1, 2), tile=(4, 4)),
    "dilated": GNA(3, dilation=2, tile=(4, 4)),
    "box": CLEAR((2, 4), tile=(4, 4)),
    "union": AttentionSpec((Disc(1.5), Window((1, 7)), FirstFrames(1)), order=Tiles((4, 4)), block=(16, 16)),
    "whole-blocks": Fovea(radius=3, tile=(4, 4), first_frames=1),
}


@pytest.mark.parametrize("spec", COUNTED.values(), ids=COUNTED)
@pytest.mark.parametrize("grids", [((1, 9, 7),), ((3, 5, 6),), ((1, 7, 6), (1, 9, 3))], ids=str)
def test_the_kept_share_is_a_count_of_pairs(
    spec: AttentionSpec, grids: tuple[tuple[int, int, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cost, "COUNTED_PAIRS", 5 * 16 * 16)  # more than one chunk
    cost._shares.cache_clear()
    layout = TokenLayout(grids[0], 5, references=grids[1:])
    x = torch.zeros(1, 1, layout.image, 8, dtype=torch.float64)
    pairs = kept_pairs(x, x, spec, grids).sum().item()
    assert kept_density(spec, layout) == pytest.approx(pairs / layout.image**2, abs=1e-12)
    assert kept_density(spec, layout) <= visited_density(spec, layout) <= 1
    assert not any(isinstance(pattern, Box) for pattern in spec.keep) or visited_density(spec, layout) > kept_density(spec, layout)


@pytest.mark.parametrize("spec", [Fovea(0.3), SLA(0.3)], ids=str)
def test_start_values_are_made_once_and_serve_training_after_inference(spec: AttentionSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 3, 24, (1, 8, 9), 2)
    with torch.inference_mode():
        expected = attention(*shape.inputs(), spec, shape.layout)
    monkeypatch.delattr(AttentionSpec, "make_parameters")
    qkv = shape.inputs(grad=True)
    out = attention(*qkv, spec, shape.layout)
    out.sum().backward()
    torch.testing.assert_close(out.detach(), expected, rtol=0, atol=0)
    assert all(x.grad is not None for x in qkv)


def test_every_stream_that_reads_a_plan_is_waited_for_before_its_memory_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named to the allocator once for every tensor, whichever of two models' plans it is."""
    told: list[tuple[int, int]] = []
    now = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: told.append((id(x), stream.cuda_stream)))
    tensors, plans = [torch.zeros(3), torch.zeros(2)], Plans()
    for stream in (0, 7, 0, 7, 9):
        now.cuda_stream = stream
        assert plans.kept("name", lambda: tuple(tensors)) == tuple(tensors)
    assert sorted(told) == sorted((id(x), stream) for x in tensors for stream in (0, 7, 9))
