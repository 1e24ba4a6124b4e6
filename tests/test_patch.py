"""`accelerate`, `restore` and `dense` on tiny FLUX pipelines: what is computed, what is left alone, what is refused."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from conftest import LAYERS, TEXT, fill_randomly, forward_arguments, normal, relative_error, run, tiny_transformer
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea
from dit_accel.errors import AlreadyAcceleratedError, BackendError, NotAcceleratedError, UnsupportedModelError
from dit_accel.patch import processor
from dit_accel.patch.state import operators_of

EXACT = {
    "fovea-radius": Fovea(radius=1000.0),
    "fovea-density": Fovea(1.0),
    "sla": SLA(1.0),
    "sla-all": SLA(1.0, "elu", "all", block=(128, 64)),
    "clear": CLEAR(1000.0),
    "gna": GNA(64),
    "gna-strided": GNA((31, 31), (4, 3)),
}
SPARSE = {
    "fovea": Fovea(),
    "fovea-radius": Fovea(radius=4.0),
    "clear": CLEAR(4.0),
    "clear-downsampled": CLEAR(4.0, downsample=2),
    "sla": SLA(0.2),
    "sla-bare": SLA(0.2, scope="none"),
    "gna": GNA((7, 5), (2, 1)),
    "gna-dilated": GNA(5, dilation=2),
}
INSIDE = {(y, x) for y in range(-3, 4) for x in range(-3, 4) if y * y + x * x < 9}  # CLEAR(3.0)


def by_id(specs: dict[str, AttentionSpec]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("spec", list(specs.values()), ids=list(specs))


def processors(pipe: Any) -> dict[str, Any]:
    return dict(pipe.transformer.attn_processors)


def assert_untouched(pipe: Any, before: dict[str, Any], output: Tensor) -> None:
    after = processors(pipe)
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before), "a processor is not the original object"
    assert not hasattr(pipe.transformer, "_dit_accel")
    assert not pipe.transformer._forward_hooks
    assert not pipe.transformer._forward_pre_hooks
    assert not [name for name, _ in pipe.transformer.named_modules() if "dit_accel" in name]
    assert torch.equal(run(pipe), output)


# What is computed


@by_id(EXACT)
@pytest.mark.parametrize(("height", "width", "batch"), [(272, 400, 2), (272, 400, 1), (16, 16, 1), (256, 256, 1)], ids=str)
def test_keeping_everything_equals_the_original(pipe: Any, spec: AttentionSpec, height: int, width: int, batch: int) -> None:
    expected = run(pipe, height, width, batch=batch)
    assert relative_error(run(dit_accel.accelerate(pipe, spec), height, width, batch=batch), expected) < 1e-5


@by_id(SPARSE)
@pytest.mark.parametrize("batch", [2, 1])
def test_every_method_is_deterministic_and_differs(pipe: Any, spec: AttentionSpec, batch: int, sparse_calls: list[Any]) -> None:
    original = run(pipe, batch=batch)
    dit_accel.accelerate(pipe, spec)
    first = run(pipe, batch=batch)
    assert len(sparse_calls) == 2 * LAYERS
    assert torch.equal(run(pipe, batch=batch), first)
    assert relative_error(first, original) > 1e-4


@pytest.mark.parametrize("place", [(0, 0), (16, 24), (8, 6), (5, 24)], ids=str)
@pytest.mark.parametrize("spec", [CLEAR(3.0), GNA(1)], ids=["clear", "gna-1"])
def test_a_token_reaches_its_neighbours_and_no_other(place: tuple[int, int], spec: AttentionSpec) -> None:
    transformer = dit_accel.accelerate(tiny_transformer(double=1, single=0), spec)
    arguments = forward_arguments()
    before = transformer(**arguments).sample[0]
    arguments["hidden_states"][0, place[0] * 25 + place[1]] += 1.0
    changed = (transformer(**arguments).sample[0] != before).any(-1).view(17, 25)
    reach = INSIDE if spec == CLEAR(3.0) else {(0, 0)}
    expected = {(place[0] + y, place[1] + x) for y, x in reach if 0 <= place[0] + y < 17 and 0 <= place[1] + x < 25}
    assert {(y, x) for y, x in changed.nonzero().tolist()} == expected


@pytest.mark.composes("ControlNet residuals")
@pytest.mark.parametrize("count", [1, 2], ids=["one-for-all-blocks", "one-per-block"])
@pytest.mark.parametrize("name", ["controlnet_block_samples", "controlnet_single_block_samples"])
def test_controlnet_residuals_meet_their_tokens(name: str, count: int) -> None:
    transformer = tiny_transformer()
    residuals = {name: [normal(1, 425, 32, seed=9 + i) for i in range(count)]}
    plain, expected = transformer(**forward_arguments()).sample, transformer(**forward_arguments(), **residuals).sample
    assert relative_error(plain, expected) > 0.1
    assert relative_error(dit_accel.accelerate(transformer, Fovea(1.0))(**forward_arguments(), **residuals).sample, expected) < 1e-5


@pytest.mark.parametrize("form", ["positional", "tuple", "batched-ids"])
def test_forms_of_one_forward_agree(form: str) -> None:
    transformer, arguments = dit_accel.accelerate(tiny_transformer(), Fovea(0.3)), forward_arguments()
    expected = transformer(**arguments).sample
    if form == "positional":
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids", "txt_ids", "guidance")
        got = transformer(*(arguments[name] for name in names)).sample
    elif form == "tuple":
        got = transformer(**arguments, return_dict=False)[0]
    else:
        got = transformer(**(arguments | {"img_ids": arguments["img_ids"][None]})).sample
    assert torch.equal(got, expected)


def test_layers_on_another_device_have_their_plan_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A transformer spread over several devices: the plan follows the layer, the layout is one."""
    transformer = dit_accel.accelerate(tiny_transformer(), Fovea(0.3))
    transformer(**forward_arguments())
    context, asked = transformer._dit_accel.context, []

    def attend(query: Tensor, key: Tensor, value: Tensor, spec: Any, layout: Any, plan: Any, *_: Any, text_bias: Any) -> tuple[Tensor]:
        asked.append((layout, plan))
        return (query,)

    monkeypatch.setattr(processor, "attend", attend)
    operator = next(iter(operators_of(transformer).values()))
    for device in ("cpu", "meta"):
        q = torch.empty(1, 2, 425 + TEXT, 16, device=device)
        processor.arranged(q, q, q, None, None, context.last, False, operator.attend)
    (layout, near), (there, far) = asked
    assert there == layout
    assert {near.coords.device.type, near.geometry.coords.device.type} == {"cpu"}
    assert {far.coords.device.type, far.geometry.coords.device.type} == {"meta"}


# The built-in pipeline


@pytest.fixture(scope="module")
def builtin() -> Any:
    from dit_accel.pipelines.builtin.components import make_pipeline

    pipe = make_pipeline()
    fill_randomly(pipe.transformer, scale=0.02)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, size: tuple[int, int]) -> Tensor:
    call = {"num_inference_steps": 1, "max_sequence_length": 32, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    return pipe("a panda on a blue background", height=size[0], width=size[1], **call).images


@pytest.mark.parametrize("size", [(272, 400), (16, 16)], ids=str)
@pytest.mark.parametrize("spec", [Fovea(1.0), SLA(1.0), CLEAR(1000.0)], ids=["fovea", "sla", "clear"])
def test_the_builtin_pipeline_keeping_everything(builtin: Any, spec: AttentionSpec, size: tuple[int, int]) -> None:
    expected = draw(builtin, size)
    dit_accel.accelerate(builtin, spec, strict=True)
    try:
        got = draw(builtin, size)
    finally:
        dit_accel.restore(builtin)
    assert relative_error(got, expected) < 1e-5
    assert torch.equal(draw(builtin, size), expected)


# What is left alone


@by_id(SPARSE)
def test_restore_leaves_nothing_behind(pipe: Any, spec: AttentionSpec) -> None:
    before, keys, output = processors(pipe), list(pipe.transformer.state_dict()), run(pipe)
    attributes = set(vars(pipe.transformer))
    accelerated = run(dit_accel.accelerate(pipe, spec))
    assert dit_accel.restore(pipe) is pipe
    assert list(pipe.transformer.state_dict()) == keys
    assert set(vars(pipe.transformer)) == attributes
    assert_untouched(pipe, before, output)
    assert torch.equal(run(dit_accel.accelerate(pipe, spec)), accelerated)


def test_restore_after_a_processor_was_made_anew_from_our_class(pipe: Any) -> None:
    output = run(pipe)
    dit_accel.accelerate(pipe, Fovea(0.1))
    attention = pipe.transformer.transformer_blocks[1].attn
    attention.set_processor(attention.processor.__class__())  # as load_ip_adapter does
    run(pipe)
    dit_accel.restore(pipe)
    assert {type(p).__name__ for p in processors(pipe).values()} == {"FluxAttnProcessor"}
    assert torch.equal(run(pipe), output)


@by_id(SPARSE)
def test_dense_is_the_original_bit_for_bit(pipe: Any, spec: AttentionSpec) -> None:
    original = run(pipe)
    accelerated = run(dit_accel.accelerate(pipe, spec))
    with dit_accel.dense(pipe) as same:
        assert same is pipe
        assert torch.equal(run(pipe), original)
        with dit_accel.dense(pipe.transformer):
            assert torch.equal(run(pipe), original)
        assert torch.equal(run(pipe), original)
    assert torch.equal(run(pipe), accelerated)


def test_dense_ends_with_its_block_whatever_happens(pipe: Any) -> None:
    accelerated = run(dit_accel.accelerate(pipe, Fovea(0.1)))

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), dit_accel.dense(pipe), dit_accel.dense(pipe):
        run(pipe, callback_on_step_end=fail)
    assert torch.equal(run(pipe), accelerated)


def test_a_bare_transformer_is_taken_and_returned(pipe: Any) -> None:
    before, output = processors(pipe), run(pipe)
    assert dit_accel.accelerate(pipe.transformer, Fovea(0.1)) is pipe.transformer
    assert not torch.equal(run(pipe), output)
    assert dit_accel.restore(pipe.transformer) is pipe.transformer
    assert_untouched(pipe, before, output)


@pytest.mark.parametrize("part", ["single_transformer_blocks.1", "transformer_blocks.0"])
def test_layers_patches_the_chosen_only(pipe: Any, part: str, sparse_calls: list[Any]) -> None:
    before = processors(pipe)
    dit_accel.accelerate(pipe, Fovea(0.1), layers=lambda name, module: name.startswith(part) and isinstance(module, nn.Module))
    run(pipe)
    assert list(operators_of(pipe)) == [f"{part}.attn"]
    assert [name for name, processor in processors(pipe).items() if processor is not before[name]] == [f"{part}.attn.processor"]
    assert len(sparse_calls) == 2


# What is refused


class NoPrimitive:
    """A processor that computes no attention with a primitive that can be rebound."""

    def __call__(self, attn: nn.Module, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any) -> Any:
        return hidden_states if encoder_hidden_states is None else (hidden_states, encoder_hidden_states)


def raising(name: str, module: nn.Module) -> bool:
    raise LookupError(f"not expected: {name} {type(module)}")


def in_two(pipe: Any, second: Any) -> Any:
    return SimpleNamespace(components={"transformer": pipe.transformer, "scheduler": None, "transformer_2": second})


REFUSED: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no-layer": (lambda p: dit_accel.accelerate(p, layers=lambda *_: False), UnsupportedModelError, r"single_transformer_blocks\.1\.attn"),
    "predicate-raises": (lambda p: dit_accel.accelerate(p, layers=raising), LookupError, "not expected"),
    "second-is-patched": (
        lambda p: dit_accel.accelerate(in_two(p, dit_accel.accelerate(tiny_transformer()))), AlreadyAcceleratedError, "restore",
    ),
    "spec-class": (lambda p: dit_accel.accelerate(p, Fovea), ValueError, "AttentionSpec"),
    "spec-name": (lambda p: dit_accel.accelerate(p, "fovea"), ValueError, "'fovea'"),
    "spec-number": (lambda p: dit_accel.accelerate(p, 0.1), ValueError, "0.1"),
    "steps-negative": (lambda p: dit_accel.accelerate(p, dense_steps=-1), ValueError, "-1"),
    "steps-share": (lambda p: dit_accel.accelerate(p, dense_steps=0.5), ValueError, "0.5"),
    "backend": (lambda p: dit_accel.accelerate(p, backend="sdpa"), BackendError, "'sdpa'"),
    "restore": (dit_accel.restore, NotAcceleratedError, "FluxPipeline"),
    "summary": (dit_accel.summary, NotAcceleratedError, "FluxPipeline"),
    "dense": (lambda p: dit_accel.dense(p).__enter__(), NotAcceleratedError, "FluxPipeline"),
}  # fmt: skip


@pytest.mark.parametrize(("call", "error", "says"), list(REFUSED.values()), ids=list(REFUSED))
def test_what_is_refused_changes_nothing(pipe: Any, call: Callable[[Any], Any], error: type[Exception], says: str) -> None:
    before, output = processors(pipe), run(pipe)
    with pytest.raises(error, match=says) as caught:
        call(pipe)
    assert caught.type is error
    assert_untouched(pipe, before, output)


@pytest.mark.parametrize("where", ["second-layer", "second-transformer"])
def test_a_processor_without_a_primitive_changes_nothing(pipe: Any, where: str) -> None:
    other = tiny_transformer(3)
    spoilt = pipe.transformer if where == "second-layer" else other
    spoilt.transformer_blocks[1].attn.set_processor(NoPrimitive())
    before, output = processors(pipe), run(pipe)
    with pytest.raises(UnsupportedModelError, match="NoPrimitive"):
        dit_accel.accelerate(pipe if where == "second-layer" else in_two(pipe, other))
    assert_untouched(pipe, before, output)


def test_patching_twice_keeps_the_first_patch(pipe: Any) -> None:
    first = run(dit_accel.accelerate(pipe, CLEAR(4.0)))
    with pytest.raises(AlreadyAcceleratedError, match=r"Disc\(radius=4\.0\)"):
        dit_accel.accelerate(pipe, Fovea())
    assert torch.equal(run(pipe), first)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), None], ids=["linear", "nothing"])
def test_an_unsupported_model_learns_what_is_supported(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match=f"in {type(model).__name__}: supported are FluxTransformer2DModel"):
        dit_accel.accelerate(model)


def test_an_unknown_transformer_learns_what_is_missing() -> None:
    from diffusers import UNet2DModel

    blocks = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "norm_num_groups": 4}
    model = UNet2DModel(8, layers_per_block=1, attention_head_dim=4, **blocks)
    words = r"no family is registered for UNet2DModel.*mid_block\.attentions\.N \(AttnProcessor2_0\).*where the grid comes from.*register"
    with pytest.raises(UnsupportedModelError, match=words):
        dit_accel.accelerate(model)
