"""The nodes for ComfyUI, against a stand-in for its interface (`comfyui_stub`); `test_comfyui_host` is about ComfyUI itself."""

import contextlib
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import comfyui_stub as host
import pytest
import torch
from conftest import normal, relative_error
from helpers import disc_pairs
from torch import Tensor

import dit_accel
from dit_accel.errors import ArgumentError, DitAccelError, FallbackError, UnsupportedModelError
from dit_accel.integrations.comfyui import accelerator, calls, nodes
from dit_accel.integrations.comfyui.accelerator import OVERRIDE
from dit_accel.integrations.comfyui.install import accelerated, removed, sigma_range
from dit_accel.method.assignment import Assignment, Moment, Rule
from dit_accel.patch.mask_check import hides_image

WHOLE, SPARSE = dit_accel.Fovea(1.0), dit_accel.CLEAR(3)
STREAMS = [f"{kind}transformer_blocks.{n}.attn" for kind in ("", "single_") for n in range(2)]
FOLDER = Path(nodes.__file__).resolve().parent
ROOT = Path(__file__).resolve().parents[1]


def on(patcher: Any, method: Any = SPARSE, **options: Any) -> Any:
    return accelerated(patcher, Assignment.of(method), **options)


class Counted:
    """An override of another node: counts its calls and asks the one before it, or the original."""

    def __init__(self, previous: Any = None) -> None:
        self.calls, self.previous = 0, previous

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return function(*args, **kwargs) if self.previous is None else self.previous(function, *args, **kwargs)


@pytest.mark.parametrize("size", [(34, 47), (16, 16), (7, 90)])
@pytest.mark.parametrize("text", [1, 13, 77])
def test_all_kept_is_the_original(size: tuple[int, int], text: int) -> None:
    patcher = host.flux()
    original = host.run(patcher, size, text=text, batch=2)
    assert relative_error(host.run(on(patcher, WHOLE, strict=True), size, text=text, batch=2), original) < 2e-6
    assert torch.equal(host.run(patcher, size, text=text, batch=2), original)  # a clone was changed


def test_without_text_all_tokens_are_the_images() -> None:
    patcher = host.flux()
    assert relative_error(host.run(on(patcher, WHOLE, strict=True), text=0), host.run(patcher, text=0)) < 2e-6


def test_half_precision_errs_as_the_originals() -> None:
    exact = host.run(patcher := host.flux())
    eager = relative_error(host.run(patcher, dtype=torch.bfloat16), exact)
    assert relative_error(host.run(on(patcher, WHOLE, strict=True), dtype=torch.bfloat16), exact) < 1.5 * eager


@pytest.mark.parametrize("form", [{}, {"skip_output_reshape": True}, {"scale": 0.05}])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("keys", [4, 2])
@pytest.mark.parametrize("width", [24, 72])
def test_every_form_of_a_call_is_read(form: dict[str, Any], packed: bool, keys: int, width: int) -> None:
    """Heads apart or together, keys of fewer heads, any scale, and the output in the form that was asked for."""
    q, k, v = normal(2, 4, 50, width), normal(2, keys, 50, width, seed=1), normal(2, keys, 50, width, seed=2)
    if packed:
        q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    call = calls.read(q, k, v, 4, None, torch.float32, not packed, form.get("skip_output_reshape", False), scale=form.get("scale"))
    out = host.dense(call.query, call.key, call.value, 4, scale=call.scale, skip_reshape=True, skip_output_reshape=True)
    assert call.special is None
    assert relative_error(call.answer(out), host.dense(q, k, v, 4, skip_reshape=not packed, **form)) < 1e-6


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"causal": True}, "the argument causal"),
        ({"value": torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16)}, "query, key and value of float32, float32, bfloat16"),
        ({"key": torch.zeros(1, 3, 5, 8), "value": torch.zeros(1, 3, 5, 8)}, r"shapes \[1, 2, 5, 8\], \[1, 3, 5, 8\]"),
        ({"value": torch.zeros(1, 2, 5, 4)}, "shapes"),
        ({"mask": torch.zeros(1, 2, 5, 5)}, r"a.* mask of shape \[1, 2, 5, 5\]"),
        ({"mask": torch.ones(1, 1, 1, 5, dtype=torch.int64)}, "an attention mask of int64"),
    ],
)
def test_a_call_that_is_not_known_says_so(change: dict[str, Any], reason: str) -> None:
    same = torch.zeros(1, 2, 5, 8)
    call = calls.read(**{"query": same, "key": same, "value": same, "heads": 2, "skip_reshape": True, **change})
    assert re.search(reason, call.special or "")


def test_a_method_keeps_what_it_says_and_text() -> None:
    """Against the original under a mask over pairs: a disc around each token of the image, and all text."""
    patcher = host.flux()
    got = host.run(on(patcher, dit_accel.CLEAR(3), strict=True))
    pairs = torch.ones(13 + 17 * 24, 13 + 17 * 24, dtype=torch.bool)
    pairs[13:, 13:] = disc_pairs(((1, 17, 24),), 3)
    assert relative_error(got, host.run(patcher, mask=pairs)) < 2e-6


def over_keys(text: int = 13, image: int = 17 * 24) -> Tensor:
    """Adds to the logits: the last five tokens of the text are padding."""
    mask = torch.zeros(1, 1, text + image)
    mask[..., text - 5 : text] = torch.finfo(torch.float32).min
    return mask


@pytest.mark.parametrize("axes", [3, 4])
def test_padded_text_is_masked(axes: int) -> None:
    mask = over_keys() if axes == 3 else over_keys()[:, None]
    patcher = host.flux()
    got = host.run(on(patcher, WHOLE, strict=True), mask=mask)
    assert relative_error(got, host.run(patcher, mask=mask)) < 2e-6
    assert relative_error(got, host.run(patcher)) > 1e-3


def looking(monkeypatch: pytest.MonkeyPatch, waits: bool) -> list[Tensor]:
    """The masks that are looked at from now on, where a look waits for the device or not."""
    looked: list[Tensor] = []

    def look(mask: Tensor, *args: Any) -> bool:
        looked.append(mask)
        return hides_image(mask, *args)

    monkeypatch.setattr(accelerator, "hides_image", look)
    monkeypatch.setattr(accelerator, "waits", lambda device: waits)
    return looked


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_is_looked_at_once_a_forward(monkeypatch: pytest.MonkeyPatch, inference: bool) -> None:
    looked = looking(monkeypatch, waits=True)
    with torch.inference_mode(inference):
        mask = over_keys()
    host.run(on(host.flux(), WHOLE, strict=True), mask=mask, steps=3)
    assert len(looked) == 3


@pytest.mark.parametrize("inference", [False, True])
def test_a_mask_that_was_written_to_is_looked_at_again(inference: bool) -> None:
    with torch.inference_mode(inference):
        running, mask = accelerator.Running(Mock(), {}), over_keys()
        assert not running.hides_image(mask, 17 * 24)
        mask[..., -1] = -1e4
        assert running.hides_image(mask, 17 * 24)
        running.check()


@pytest.mark.parametrize("writes", [True, False])
def test_one_that_is_written_to_on_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch, writes: bool) -> None:
    """In inference mode no one counts what is written to a tensor, and a look at it in each layer would wait for the GPU."""
    looked, patcher = looking(monkeypatch, waits=True), on(host.flux(), WHOLE, strict=True)
    with torch.inference_mode():
        mask = over_keys()

        def write(*args: Any) -> None:
            mask[..., -1] = -1e4 if writes else 0.0

        patcher.model.diffusion_model.double_blocks[1].register_forward_pre_hook(write)
        with pytest.raises(DitAccelError, match="an attention mask was written to") if writes else contextlib.nullcontext():
            host.run(patcher, mask=mask)
    assert len(looked) == 1


def test_masks_over_the_image_and_over_pairs_leave_it_to_the_original(caplog: pytest.LogCaptureFixture) -> None:
    patcher, tokens = host.flux(), 13 + 17 * 24
    hidden, pairs = torch.zeros(1, 1, tokens), torch.zeros(tokens, tokens)
    hidden[..., -7:] = -1e4
    pairs[:50, 60:] = -1e4
    whole = (torch.arange(tokens) < 13)[None, None]  # hides all of it
    over_image = "an attention mask over image tokens"
    numbers = torch.zeros(whole.shape).masked_fill(~whole, -torch.inf)
    for mask, reason in ((hidden, over_image), (whole, over_image), (numbers, over_image), (pairs, "an attention mask of shape")):
        caplog.clear()
        assert torch.equal(host.run(on(patcher), mask=mask, steps=2), host.run(patcher, mask=mask, steps=2))
        assert [reason in record.message for record in caplog.records if record.levelno == logging.WARNING] == [True]  # once
        with pytest.raises(FallbackError, match=reason):
            host.run(on(patcher, strict=True), mask=mask)


def test_an_override_that_is_there_is_asked_for_what_is_left() -> None:
    patcher, before = host.flux(), Counted()
    patcher.model_options["transformer_options"][OVERRIDE] = before
    rules = Assignment((Rule(SPARSE), Rule(None, layers="single_*")))
    host.run(accelerated(patcher, rules), steps=2)
    assert before.calls == 2 * 2  # two single blocks in two steps


def test_an_override_that_comes_later_does_not_replace_it() -> None:
    patcher = on(host.flux())
    expected = host.run(patcher, steps=2)
    later = patcher.clone()
    options = later.model_options["transformer_options"]
    assert OVERRIDE not in options
    other = options[OVERRIDE] = Counted()
    assert torch.equal(host.run(later, steps=2), expected)
    assert other.calls == 0  # every call of this model is the image's
    assert options[OVERRIDE] is other


def test_the_last_node_of_ours_wins_and_can_be_taken_off() -> None:
    patcher, other = host.flux(), Counted()
    patcher.model_options["transformer_options"][OVERRIDE] = other
    twice = on(on(patcher, dit_accel.CLEAR(2)), WHOLE, strict=True)
    assert len(twice.wrappers["apply_model"]["dit_accel"]) == len(twice.callbacks["on_cleanup"]["dit_accel"]) == 1
    original = host.run(patcher)
    assert relative_error(host.run(twice), original) < 2e-6
    assert other.calls == 4  # of the original
    assert torch.equal(host.run(removed(twice)), original)
    assert other.calls == 8


def test_nothing_is_left_on_the_transformer() -> None:
    patcher = host.flux()
    modules = list(patcher.model.diffusion_model.modules())
    host.run(on(patcher))
    with pytest.raises(FallbackError):
        host.run(on(patcher, strict=True), mask=torch.zeros(421, 421))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)
    assert accelerator._running.get() is None


def test_two_models_that_share_weights_run_their_own_methods() -> None:
    patcher = host.flux()
    sparse, whole = on(patcher), on(patcher, WHOLE)
    first = host.run(sparse)
    assert relative_error(host.run(whole), host.run(patcher)) < 2e-6
    assert torch.equal(host.run(sparse), first)


def runs(patcher: Any, monkeypatch: pytest.MonkeyPatch, **how: Any) -> Counter[str]:
    """How many calls of each layer are accelerated."""
    seen: Counter[str] = Counter()
    own = accelerator.Accelerator._method

    def counted(self: Any, layer: Any, *args: Any) -> Tensor:
        seen[layer.name] += 1
        return own(self, layer, *args)

    monkeypatch.setattr(accelerator.Accelerator, "_method", counted)
    host.run(patcher, **how)
    return seen


def test_rules_name_layers_as_diffusers_does(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Assignment((Rule(SPARSE, layers=("transformer_blocks.1.attn", "single_transformer_blocks.*")),))
    expected = {"transformer_blocks.1.attn": 1, "single_transformer_blocks.0.attn": 1, "single_transformer_blocks.1.attn": 1}
    assert runs(accelerated(host.flux(), rules), monkeypatch) == expected
    with pytest.raises(ArgumentError, match="no layer is named blocks"):
        accelerated(host.flux(), Assignment((Rule(SPARSE, layers="blocks.*"),)))


def test_heads_may_have_methods_of_their_own() -> None:
    patcher = host.flux()
    rules = Assignment((Rule(WHOLE), Rule(dit_accel.Fovea(radius=100), heads=(1,)), Rule(None, heads=(0,), layers="single_*")))
    assert relative_error(host.run(accelerated(patcher, rules, strict=True)), host.run(patcher)) < 2e-6


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (Rule(None, steps=(0, 1)), 3),
        (Rule(None, steps=(1, None)), 1),
        (Rule(None, noise=(0.4, 1.0)), 1),
        (Rule(None, tokens=(0, 10)), 4),
        (Rule(None, tokens=(400, None)), 0),
    ],
)
def test_rules_of_steps_noise_and_sizes(rule: Rule, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = runs(accelerated(host.flux(), Assignment((Rule(SPARSE), rule))), monkeypatch, steps=4)
    assert set(seen.values()) == ({count} if count else set())


@pytest.mark.parametrize(("start", "end", "count"), [(0.0, 1.0, 4), (0.4, 1.0, 2), (0.0, 0.4, 2), (0.9, 1.0, 0)])
def test_a_part_of_the_sampling(start: float, end: float, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    patcher = host.flux()
    seen = runs(on(patcher, sigmas=sigma_range(patcher, start, end)), monkeypatch, steps=4)
    assert set(seen.values()) == ({count} if count else set())


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (-0.1, 1.0), (0.2, 1.1), (0.8, 0.3)])
def test_a_part_that_is_none_is_refused(start: float, end: float) -> None:
    with pytest.raises(ArgumentError, match="start_percent must be below end_percent"):
        sigma_range(host.flux(), start, end)


@pytest.mark.parametrize(("level", "step"), [(1.0, 0), (0.9, 0), (0.75, 1), (0.3, 2), (0.25, 3), (0.01, 3), (2.0, 0)])
def test_the_moment_is_read_from_the_schedule(level: float, step: int) -> None:
    options = {"sigmas": torch.tensor([level, level]), "sample_sigmas": torch.linspace(1, 0, 5)}
    assert accelerator.moment_of(options) == Moment(step, pytest.approx(min(1.0, level)))
    assert accelerator.moment_of({"sigmas": torch.tensor([level])}) is None


def test_a_size_at_which_the_original_is_faster_is_left_to_it(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = accelerator.guard.Crossover(2.0, 1.0)
    monkeypatch.setattr(accelerator.guard, "measured", lambda *args: slow)
    patcher = host.flux()
    assert torch.equal(host.run(on(patcher), steps=2), host.run(patcher, steps=2))
    lines = [record.message for record in caplog.records]
    assert len(lines) == 1
    assert "the original attention runs at 1×17×24 tokens, because it is faster there" in lines[0]
    for options in ({"strict": True}, {"parameters": {}}):  # as asked for, and with an adapter's weights
        assert not torch.equal(host.run(on(patcher, **options)), host.run(patcher))


class UNetModel(torch.nn.Module):
    """Not known."""


def test_a_model_that_is_not_known_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    patcher = host.Patcher(UNetModel())
    left = on(patcher)
    assert not left.wrappers.get("apply_model")
    assert OVERRIDE not in left.model_options["transformer_options"]
    assert "does not know where the image's tokens are in a UNetModel" in caplog.text
    with pytest.raises(UnsupportedModelError, match="UNetModel"):
        on(patcher, strict=True)


@pytest.mark.parametrize("what", ["wrapper", "module"])
def test_a_compiled_model_keeps_its_original(what: str, caplog: pytest.LogCaptureFixture) -> None:
    patcher = host.flux()
    original, fast = host.run(patcher), on(patcher)
    if what == "wrapper":
        fast.add_wrapper_with_key("apply_model", "torch.compile", lambda executor, *args, **kwargs: executor(*args, **kwargs))
    else:
        patcher.model.diffusion_model._orig_mod = None
    assert torch.equal(host.run(fast), original)
    assert "calls with torch.compile" in caplog.text


def test_a_compiled_block_keeps_its_original(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As other nodes compile them, one by one."""
    patcher = host.flux()
    blocks = patcher.model.diffusion_model.double_blocks
    blocks[0] = torch.compile(blocks[0], backend="eager")
    assert set(runs(on(patcher), monkeypatch, steps=2)) == set(STREAMS[1:])
    assert [record.message for record in caplog.records if "as in blocks that are compiled" in record.message] != []
    with pytest.raises(FallbackError, match="as in blocks that are compiled"):
        host.run(on(patcher, strict=True))


def test_another_signature_leaves_it_to_the_original(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a later ComfyUI may have."""
    patcher, fast = (found := host.flux()), on(found)
    monkeypatch.delattr(patcher.model.diffusion_model, "patch_size")
    assert torch.equal(host.run(fast), host.run(patcher))
    assert "arguments of Flux that this version does not know" in caplog.text


def test_a_second_call_of_the_transformer_has_no_grid_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """As nodes make that draw a picture in parts within one evaluation."""
    patcher = host.flux()
    transformer, grids = patcher.model.diffusion_model, iter([((1, 17, 24),), "no grid"])
    changed = replace(accelerator.host_of(transformer), grids=lambda arguments, transformer: next(grids))
    monkeypatch.setattr(accelerator, "host_of", lambda transformer: changed)
    fast = on(patcher)

    def twice(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        executor(*args, **kwargs)
        return executor(*args, **kwargs)

    fast.add_wrapper_with_key("apply_model", "another", twice)
    assert torch.equal(host.run(fast), host.run(patcher))


def test_another_place_of_the_image_leaves_it_to_the_original(caplog: pytest.LogCaptureFixture) -> None:
    """Versions of ComfyUI had a video before its text."""
    patcher, fast = (found := host.flux()), on(found)
    blocks = patcher.model.diffusion_model.single_blocks
    blocks[1].slice = [0, 408]
    host.run(fast)
    assert "calls with an image at tokens 0 to 408 of 421" in caplog.text
    found = accelerator.host_of(type("HunyuanVideo", (), {})())
    transformer = SimpleNamespace(double_blocks=[SimpleNamespace(flipped_img_txt=True)])
    assert "text behind the video" in str(found.grids({"x": torch.zeros(1, 16, 3, 8, 8)}, transformer))


def test_more_tokens_than_the_grid_and_the_text_leave_it_to_the_original(caplog: pytest.LogCaptureFixture) -> None:
    """As patches of other nodes may add."""
    patcher = host.flux()
    fast, block = on(patcher), patcher.model.diffusion_model.double_blocks[0]
    own = block.forward

    def longer(x: Tensor, *args: Any) -> Tensor:
        return own(torch.cat([x, x[:, :3]], 1), *args)[:, :-3]

    block.forward = longer
    host.run(fast)
    assert "a sequence of 424 tokens where the grid makes 408 and the text 13" in caplog.text


def test_the_nodes_do_it(tmp_path: Path) -> None:
    """By the names that workflows keep: of nodes, of inputs, of outputs."""
    assert nodes.NODE_DISPLAY_NAME_MAPPINGS.keys() == nodes.NODE_CLASS_MAPPINGS.keys() == {
        "DitAccelAccelerate", "DitAccelLoadAdapter", "DitAccelPlan",
    }  # fmt: skip
    inputs = {name: list(kind.INPUT_TYPES()["required"]) for name, kind in nodes.NODE_CLASS_MAPPINGS.items()}
    assert inputs == {
        "DitAccelAccelerate": ["model", "method", "start_percent", "end_percent", "strict"],
        "DitAccelLoadAdapter": ["model", "adapter", "lora_strength", "strict"],
        "DitAccelPlan": ["file"],
    }
    node, patcher = nodes.Accelerate(), host.flux()
    apply = getattr(node, node.FUNCTION)
    expected, original = host.run(on(patcher)), host.run(patcher)
    assert torch.equal(host.run(apply(model=patcher, method="clear:3", start_percent=0.0, end_percent=1.0, strict=True)[0]), expected)
    assert torch.equal(host.run(apply(on(patcher), "none", 0.0, 1.0, False)[0]), original)
    with pytest.raises(ArgumentError, match="method must be one of"):
        apply(patcher, "nonsense", 0.0, 1.0, False)
    Assignment.of(SPARSE).save(tmp_path / "plan.json")
    plan, text = nodes.Plan().read(str(tmp_path / "plan.json"))
    assert text == str(SPARSE)
    assert torch.equal(host.run(apply(patcher, "fovea", 0.0, 1.0, True, plan=plan)[0]), expected)
    assert nodes.Plan.IS_CHANGED(str(tmp_path / "plan.json")) != nodes.Plan.IS_CHANGED(str(tmp_path / "none.json")) == ()
    with pytest.raises(ArgumentError, match=r"none\.json can't be read"):
        nodes.Plan().read(str(tmp_path / "none.json"))


def test_a_link_to_the_folder_is_all_that_comfyui_requires(tmp_path: Path) -> None:
    """It runs `__init__.py` from a path, under a name that is no package's; nothing heavy and nothing of its own is imported then."""
    (command,) = re.findall(r"^ln -s .*$", (ROOT / "docs" / "servers.md").read_text(), re.M)
    (tmp_path / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    place = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", command], cwd=tmp_path, env=place, check=True)
    link = tmp_path / "ComfyUI" / "custom_nodes" / "dit_accel"
    assert link.resolve() == FOLDER
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("{link}", "{link}/__init__.py")
module = sys.modules["{link}"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(sorted(module.NODE_CLASS_MAPPINGS), sorted({{"diffusers", "comfy", "triton", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['DitAccelAccelerate', 'DitAccelLoadAdapter', 'DitAccelPlan'] []"
    assert importlib.util.find_spec("dit_accel.integrations.comfyui") is not None
