"""Which sample of a batch the viewer looks at: the one with the prompt, in every family whose pipelines put guidance in a batch."""

import importlib
from typing import Any

import diffusers
import pytest
import torch
from conftest import fill_randomly
from tiny_parts import BUILDERS
from torch import Tensor

from dit_accel import CLEAR, accelerate
from dit_accel.measure.capture import Captured
from dit_accel.patch.anatomy import require_family
from dit_accel.patch.state import operators_of, patches_of
from dit_accel.planner.view import Watched, _watching

for part in ("tiny_image", "tiny_video", "tiny_pipelines"):
    importlib.import_module(part)
# what the tiny calls lack
GUIDED: dict[str, dict[str, Any]] = {"ltx2": {"guidance_scale": 3.0}, "mochi": {"num_inference_steps": 2}}  # it divides by steps - 1
BATCHES = (
    "allegro", "auraflow", "bria", "cogvideox", "cogvideox15", "cogview3plus", "easyanimate", "ernie_image_pipeline", "hidream",
    "hunyuan_dit", "latte", "ltx", "ltx2", "lumina_pipeline", "mochi", "pixart_sigma", "prx_pipeline", "sd3", "z_image",
)  # fmt: skip


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    pipe, call = BUILDERS[name]()
    if name == "latte":  # in a first layer's self-attention there is nothing of the text yet
        pipe.register_modules(transformer=type(pipe.transformer).from_config({**pipe.transformer.config, "num_layers": 2}))
    fill_randomly(pipe.transformer.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe, call | {"num_inference_steps": 1} | GUIDED.get(name, {})


def other(call: dict[str, Any], *, negative: bool) -> dict[str, Any]:
    """The call with another prompt, or with another negative one."""

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            return [changed(one) for one in value]
        return value.flip(-1) if isinstance(value, Tensor) and value.is_floating_point() and value.unique().numel() > 2 else value

    prompts = {name for name in call if "prompt" in name and name.startswith("negative") == negative}
    return call | {name: changed(call[name]) for name in prompts}


def looked_at(pipe: Any, call: dict[str, Any], layer: int = -1) -> tuple[Captured, Tensor]:
    """What is seen of a layer in the first step, and all the queries that it has there."""
    name, (model, _) = list(operators_of(pipe))[layer], *patches_of(pipe)
    wanted, queries = Watched((name,), (0,), (0,), 1e9), []
    operator = model.get_submodule(name).dit_accel
    with _watching(pipe, wanted), torch.no_grad():
        own = operator.attend
        operator.attend = lambda query, *rest: (queries.append(query), own(query, *rest))[1]
        pipe(**call, generator=torch.Generator().manual_seed(0))
    (head,) = wanted.found
    return head.captured, queries[0]


@pytest.mark.parametrize("name", BATCHES)
def test_what_is_seen_depends_on_the_prompt_and_not_on_the_negative_one(name: str) -> None:
    pipe, call = tiny(name)
    accelerate(pipe, CLEAR(2.0, tile=(4, 4)))
    seen, queries = looked_at(pipe, call)
    assert len(queries) > 1 or name == "mochi"  # which computes each sample by itself
    prompt, negative = (looked_at(pipe, other(call, negative=x))[0] for x in (False, True))
    for part in ("query", "key", "value"):
        own = getattr(seen, part)
        assert torch.allclose(getattr(negative, part), own, atol=1e-5)
        assert not torch.allclose(getattr(prompt, part), own, atol=1e-3)


def test_of_frames_in_the_batch_the_middle_one_is_seen() -> None:
    """As the picture is that of the middle one."""
    pipe, call = tiny("latte")
    accelerate(pipe, CLEAR(2.0, tile=(4, 4)))
    seen, queries = looked_at(pipe, call)
    assert len(queries) == 2 * 4
    assert torch.equal(seen.query, queries[4 + 2 : 4 + 3, :1])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_perturbed_sample_is_not_seen(guidance: float) -> None:
    """The last of a batch is the one with the prompt again, which a perturbed layer computes apart."""
    plain, call = tiny("pixart_sigma")
    pipe = diffusers.PixArtSigmaPAGPipeline(**plain.components, pag_applied_layers="blocks.1")
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, CLEAR(2.0, tile=(4, 4)))
    for layer, rows in ((0, 3), (1, 2)):
        seen, queries = looked_at(pipe, call | {"guidance_scale": guidance, "pag_scale": 2.0}, layer)
        assert len(queries) == rows - (guidance == 1)
        place = int(guidance > 1)
        assert torch.equal(seen.query, queries[place : place + 1, :1])
    _, queries = looked_at(pipe, call | {"guidance_scale": guidance, "pag_scale": 0.0})
    assert len(queries) == 1 + place


def samples_of(pipe: Any, call: dict[str, Any]) -> int:
    """How many samples the first call of its transformer has."""
    counts: list[int] = []
    latents = require_family(pipe.transformer).latents
    hook = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: counts.append(len(args[0] if args else kwargs[latents])), with_kwargs=True
    )
    with torch.no_grad():
        pipe(**call, generator=torch.Generator().manual_seed(0))
    hook.remove()
    return counts[0]


def test_every_pipeline_with_guidance_in_a_batch_is_tested() -> None:
    """None but these calls its transformer with more samples than prompts."""
    built = [name for name, build in BUILDERS.items() if build.__module__ != "tiny_transformers" and name not in ("sana", "dit")]
    assert sorted(name for name in built if samples_of(*tiny(name)) > 1) == sorted(BATCHES)
