"""The viewer of attention: what its page contains, against direct computations; runs that stay as they are; what is refused."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_image
import tiny_video
import torch
from conftest import fill_randomly
from distill_fixtures import half_pipe, picture_pipe
from helpers import Shape, kept_pairs, oracle
from test_cli import fail, make_tiny, succeed
from tiny_parts import emb
from torch import Tensor
from view_fixtures import CALL, Page

import dit_accel
from dit_accel import CLEAR, GNA, SLA, Assignment, AttentionSpec, Fovea, Rule, accelerate, view_attention
from dit_accel.errors import ArgumentError, NotAcceleratedError
from dit_accel.measure.capture import Captured
from dit_accel.measure.evaluation import draw
from dit_accel.method import Downsampled, Mass, TopK
from dit_accel.operator.layout import TokenLayout
from dit_accel.patch.heads import Layer
from dit_accel.patch.state import operators_of, patches_of
from dit_accel.planner.kept import Place, looked_at
from dit_accel.planner.names import short_name
from dit_accel.planner.text_tokens import labels_of_text
from dit_accel.planner.view_page import about_bytes, rounded, view_page

PROMPT = "a cat on a blue background"
DOUBLE, SINGLE = "transformer_blocks.0.attn", "single_transformer_blocks.0.attn"
SMALL = {"tile": (4, 4)}  # several tiles in 7 × 9 tokens
METHODS: dict[str, AttentionSpec] = {
    "fovea": Fovea(0.3, **SMALL),
    "fovea-radius": Fovea(radius=2, **SMALL),
    "clear": CLEAR(2.5, **SMALL),
    "clear-downsample": CLEAR(2, downsample=2, **SMALL),
    "sla": SLA(0.4, block=(16, 32)),
    "window": GNA((3, 5), stride=(1, 3), **SMALL),
    "dilated": GNA(3, dilation=2, **SMALL),
    "union": AttentionSpec((*CLEAR(2, **SMALL).keep, TopK(0.3)), order=CLEAR(2, **SMALL).order, block=(16, 16)),
}


def viewed(method: Any, out: Path, pipe: Any = None, **arguments: Any) -> Page:
    """The page of a tiny pipeline with a method."""
    pipe = accelerate(picture_pipe() if pipe is None else pipe, method)
    return Page.read(view_attention(pipe, PROMPT, out / "view.html", **({"seed": 3} | CALL | arguments)))


@pytest.fixture
def inputs(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], list[Any]]:
    """What the operators of a pipeline's runs are given, by layer and step of three."""
    from dit_accel.patch import processor

    found: dict[tuple[str, int], list[Any]] = {}
    original, counts = processor.by_specs, {}

    def counted(*args: Any) -> Tensor:
        layer = args[7].name
        counts[layer] = counts.get(layer, -1) + 1
        found[layer, counts[layer]] = [x.clone() for x in args[:3]] + [args[3]]
        return original(*args)

    monkeypatch.setattr(processor, "by_specs", counted)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_and_its_share_are_the_oracles(name: str, inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    spec = METHODS[name]
    page = viewed(spec, tmp_path, layers=1, heads=[0, 1], steps=1)
    q, k, v, layout = inputs[SINGLE, 1]
    assert page.names == [(SINGLE, 0, 1), (SINGLE, 1, 1)]
    q_image, k_image = q[:, :, layout.image_slice], k[:, :, layout.image_slice]
    expected = kept_pairs(q_image, k_image, spec, layout.grids, v=v[:, :, layout.image_slice])
    alone = AttentionSpec(spec.keep, order=spec.order, block=spec.block)
    with torch.no_grad():
        out, _ = oracle(q, k, v, spec, layout)
    _, kept_lse = oracle(q, k, v, alone, layout)
    weights = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)[0, :, layout.image_slice]
    exact = weights @ v[0].double()
    lse = (q.double() @ k.double().mT * q.shape[-1] ** -0.5).logsumexp(-1)[0, :, layout.image_slice]
    for view in page.views:
        head = view["head"]
        kept = page.kept(view)
        assert np.array_equal(kept, expected.expand(1, 2, -1, -1)[0, head].numpy())
        assert np.allclose(page.weights(view), weights[head].numpy(), atol=1e-3 * weights[head].max().item())
        share = (kept_lse[0, head, layout.image_slice] - lse[head]).exp().numpy()
        assert np.allclose(page.shares(view, "kept"), share, atol=2e-4)
        on_kept = page.weights(view)[:, layout.text_slice].sum(1) + (page.weights(view)[:, layout.image_slice] * kept).sum(1)
        assert np.allclose(on_kept, share, atol=1e-3)  # what the page adds up is what was measured
        error = (out[0, head, layout.image_slice] - exact[head]).norm(dim=-1) / exact[head].norm(dim=-1)
        assert np.allclose(page.shares(view, "error"), error.clamp(max=1).numpy(), atol=1e-3)
        assert view["rest"] == (spec.rest is not None)
        assert view["method"] == short_name(spec)


def test_what_the_method_gives_to_the_estimated_is_its_own_softmax(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    spec = METHODS["fovea"]
    (view,) = (page := viewed(spec, tmp_path, layers=0, steps=2)).views
    q, k, v, layout = inputs[DOUBLE, 2]
    with torch.no_grad():
        _, whole = oracle(q, k, v, spec, layout)
    _, kept = oracle(q, k, v, AttentionSpec(spec.keep, order=spec.order, block=spec.block), layout)
    expected = 1 - (kept - whole).exp()[0, 0, layout.image_slice].numpy()
    assert 0.05 < expected.mean() < 0.95
    assert np.allclose(page.shares(view, "estimated"), expected, atol=1e-3)
    for name in ("sla", "clear"):  # a rest that is added is no part of the softmax
        (other,) = viewed(METHODS[name], tmp_path, layers=0).views
        assert other["estimated"] is None


def test_the_run_is_the_one_without_the_viewer_and_the_pipeline_stays_as_it_was(tmp_path: Path) -> None:
    assignment = Assignment(
        (Rule(METHODS["fovea"]), Rule(None, layers=DOUBLE, heads=(1,)), Rule(METHODS["clear"], steps=(1, 2)), Rule(None, steps=(0, 1)))
    )
    pipe = accelerate(picture_pipe(), assignment)
    expected = draw(pipe, PROMPT, 3, CALL)
    seen = []
    original = dit_accel.planner.view.view_page
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "dit_accel.planner.view.view_page", lambda heads, pictures, *rest: seen.append(pictures) or original(heads, pictures, *rest)
        )
        view_attention(pipe, PROMPT, tmp_path / "view.html", layers=[0, 1], seed=3, **CALL)
    assert torch.allclose(seen[0], expected, atol=1e-5)
    assert patches_of(pipe)[0][1].context.assignment == assignment
    assert all("attend" not in vars(operator) for operator in operators_of(pipe).values())
    assert torch.equal(draw(pipe, PROMPT, 3, CALL), expected)


def test_heads_show_what_they_run_at_each_step(tmp_path: Path) -> None:
    fovea, clear = METHODS["fovea"], METHODS["clear"]
    assignment = Assignment((Rule(fovea), Rule(clear, heads=(1,)), Rule(None, steps=(0, 1)), Rule(None, layers=SINGLE, heads=(0,))))
    page = viewed(assignment, tmp_path, layers="*", heads=[0, 1], steps=[0, 2])
    assert page.names == [(layer, head, step) for step in (0, 2) for layer in (DOUBLE, SINGLE) for head in (0, 1)]
    methods = [view["method"] for view in page.views]
    assert methods == ["original"] * 4 + ["fovea:0.3,tile=4x4", "clear:2.5,tile=4x4", "original", "clear:2.5,tile=4x4"]
    for view in page.views:
        if view["method"] == "original":
            assert view["pairs"] is None
            assert page.kept(view).all()
            assert (page.shares(view, "kept") == 1).all()
            assert (page.shares(view, "error") == 0).all()
    noise = {view["step"]: view["noise"] for view in page.views}
    assert noise[0] == 1.0 > noise[2] > 0


def test_learned_parameters_are_those_of_the_head(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    spec = AttentionSpec(CLEAR(2, **SMALL).keep, Downsampled(2), Mass(offset=False), CLEAR(2, **SMALL).order, (16, 16))
    pipe = accelerate(picture_pipe(), spec)
    for operator in operators_of(pipe).values():
        fill_randomly(operator.params, scale=1.0)
    page = Page.read(view_attention(pipe, PROMPT, tmp_path / "view.html", layers=1, heads=1, steps=1, **CALL))
    q, k, v, layout = inputs[SINGLE, 1]
    out, _ = oracle(q, k, v, spec, layout, operators_of(pipe)[SINGLE].params)
    start, _ = oracle(q, k, v, spec, layout)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error, other = ((x - exact)[0, 1, layout.image_slice].norm(dim=-1) / exact[0, 1, layout.image_slice].norm(dim=-1) for x in (out, start))
    assert (error - other).abs().max() > 0.01
    assert np.allclose(page.shares(page.views[0], "error"), error.clamp(max=1).detach().numpy(), atol=1e-3)


@pytest.mark.parametrize("name", ["fovea", "clear", "union"])
def test_reference_images_are_among_the_keys(name: str, tmp_path: Path) -> None:
    spec, shape = METHODS[name], Shape(1, 2, 16, (1, 5, 6), 3, False, ((1, 4, 7),))
    q, k, v = shape.inputs()
    place, captured = Place("layer", Layer("layer", 2, 16, False), 0, 1.0), Captured(q, k, v, shape.layout, "layer")
    with torch.no_grad():
        heads = looked_at(place, captured, [(spec, (0, 1))], spec.make_parameters(heads=2, head_dim=16)(), [1], "auto")
    path = tmp_path / "view.html"
    path.write_text(view_page(heads, torch.rand(1, 3, 40, 48), None, {"pipeline": "", "prompt": "", "seed": 0, "call": {}}))
    (view,) = (page := Page.read(path)).views
    assert page.layout(view) == {"grids": [[1, 5, 6], [1, 4, 7]], "image": 58, "image_start": 0, "text_start": 58}
    expected = kept_pairs(q[:, :, :58], k[:, :, :58], spec, shape.layout.grids, v=v[:, :, :58])
    assert np.array_equal(page.kept(view), expected.expand(1, 2, -1, -1)[0, 1].numpy())


def test_bfloat16_pipelines(tmp_path: Path) -> None:
    torch.manual_seed(0)
    from tiny_parts import kl

    pipe = half_pipe()
    pipe.register_modules(vae=kl(latent=4, factor_log2=3).eval().to(torch.bfloat16))
    (view,) = (page := viewed(METHODS["fovea"], tmp_path, pipe)).views
    assert np.isfinite(page.weights(view)).all()
    assert 0 < page.shares(view, "kept").mean() < 1


def video_pipe(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny video pipeline that takes prompts, with guidance in two passes: the prompt's text is not the other's."""
    torch.manual_seed(0)
    pipe, call = getattr(tiny_video, name)()
    for model in (pipe.transformer, getattr(pipe, "transformer_2", None)):
        if model is not None:
            fill_randomly(model)
    pipe.encode_prompt = lambda prompt, **_: (2 * emb(1, 12, 32), -emb(1, 12, 32))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {k: v for k, v in call.items() if "prompt" not in k and k != "output_type"}


def test_a_video_of_the_pass_with_the_prompt(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    pipe, call = video_pipe("wan")
    accelerate(pipe, CLEAR(1.5, tile=(2, 4, 4)))
    page = Page.read(view_attention(pipe, "a panda", tmp_path / "view.html", layers=1, steps=1, **call))
    (view,) = page.views
    assert page.layout(view)["grids"] == [[3, 2, 3]]
    assert len(page.data["pictures"]) == 3
    assert view["labelled"] is False
    q = inputs["blocks.1.attn1", 2][0]  # two passes a step
    assert not torch.allclose(q, inputs["blocks.1.attn1", 3][0], atol=1e-3)
    own = page.array(view["q"]).reshape(-1, view["width"]) * page.array(view["q_scale"])
    assert np.allclose(own, q[0, 0].numpy(), atol=1e-3)


def test_layers_of_two_transformers_have_their_names(tmp_path: Path) -> None:
    pipe, call = video_pipe("wan22_two_experts")
    accelerate(pipe, CLEAR(1.5, tile=(2, 4, 4)))
    page = Page.read(view_attention(pipe, "a panda", tmp_path / "view.html", layers="transformer*.blocks.0.*", steps=[0, 1], **call))
    assert [(layer, step) for layer, _, step in page.names] == [("transformer.blocks.0.attn1", 0), ("transformer_2.blocks.0.attn1", 1)]


def edit_pipe() -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline that edits a picture, whose tokens follow the drawn one's."""
    torch.manual_seed(0)
    pipe, call = tiny_image.flux_kontext()
    fill_randomly(pipe.transformer)
    pipe.encode_prompt = lambda prompt, **_: (emb(1, 12, 32), emb(1, 24), torch.zeros(12, 3))
    pipe.set_progress_bar_config(disable=True)
    return pipe, {k: v for k, v in call.items() if "prompt" not in k and k != "output_type"}


def test_an_edit_models_picture_is_among_the_keys(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    pipe, call = edit_pipe()
    accelerate(pipe, METHODS["fovea"])
    path = view_attention(pipe, "make it red", tmp_path / "view.html", layers=1, heads=1, steps=1, **call)
    (view,) = (page := Page.read(path)).views
    q, k, v, layout = inputs[SINGLE, 1]
    assert [tuple(grid) for grid in page.layout(view)["grids"]] == list(layout.grids)
    assert len(layout.grids) == 2
    q, k, v = (x[:, :, layout.image_slice] for x in (q, k, v))
    expected = kept_pairs(q, k, METHODS["fovea"], layout.grids, v=v)
    assert np.array_equal(page.kept(view), expected[0, 1].numpy())
    assert "image tensor" not in path.read_text()


def test_text_is_named_where_that_is_certain() -> None:
    pipe = picture_pipe()
    labels = labels_of_text(pipe, PROMPT, 8, CALL)
    assert labels is not None
    assert labels[:2] == ["a", "cat"]
    assert len(labels) == 8
    assert labels_of_text(pipe, PROMPT, 12, CALL) is None  # other text may be among so many
    assert labels_of_text(pipe, PROMPT, 0, CALL) is None
    pipe.register_modules(text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)  # which of two is it?
    assert labels_of_text(pipe, PROMPT, 8, CALL) is None


def test_masked_text_has_no_mass(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    pipe, call = tiny_video.hunyuan_video()
    fill_randomly(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    texts = {k: v for k, v in call.items() if "prompt" in k}
    pipe.encode_prompt = lambda **_: (texts["prompt_embeds"], texts["pooled_prompt_embeds"], texts["prompt_attention_mask"])
    accelerate(pipe, CLEAR(1.5, tile=(2, 4, 4)))
    call = {k: v for k, v in call.items() if "prompt" not in k and k != "output_type"}
    page = Page.read(view_attention(pipe, "a panda", tmp_path / "view.html", layers=0, steps=1, **call))
    (view,) = page.views
    layout = page.layout(view)
    text = page.weights(view)[:, layout["text_start"] :]
    assert layout["text_start"] == layout["image"]
    assert int((text.max(0) == 0).sum()) == 3
    assert np.allclose(
        page.shares(view, "kept"), text.sum(1) + (page.weights(view)[:, : layout["image"]] * page.kept(view)).sum(1), atol=1e-3
    )


def test_rounding_keeps_the_weights() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1, 1, 1, 100, 1, 1, 0])
    integers, unit = rounded(x)
    assert integers.dtype == np.int16
    assert np.abs(integers * unit - x.numpy()).max() <= 0.51 * unit.max()
    assert (integers[:, 7] == 0).all()


# The page


def test_a_page_loads_nothing_and_takes_any_prompt(tmp_path: Path) -> None:
    prompt = 'a cat </script><script>alert("x")</script> & <b>'
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    text = view_attention(pipe, prompt, tmp_path / "view.html", **CALL).read_text()
    assert "default-src 'none'" in text
    assert "alert(" not in text.replace("alert(&quot;x&quot;)", "")
    assert text.count("<script") == 2
    assert "http://" not in text
    assert "https://" not in text
    assert "&lt;/script&gt;" in text


def test_a_layer_at_1024_pixels_is_below_eight_megabytes() -> None:
    assert 4 * about_bytes(TokenLayout((1, 64, 64), 32), 64) < 8e6  # four heads of the built-in model
    assert about_bytes(TokenLayout((1, 64, 64), 512), 128) < 4e6  # a head of FLUX.1


def test_the_forecast_of_the_size_is_right(tmp_path: Path) -> None:
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    layout = TokenLayout((1, 7, 9), 8)
    one = view_attention(pipe, PROMPT, tmp_path / "a.html", layers=[0], **CALL).stat().st_size
    two = view_attention(pipe, PROMPT, tmp_path / "b.html", layers=[0, 1], **CALL).stat().st_size
    assert two - one == pytest.approx(about_bytes(layout, 16), rel=0.5)


def test_too_large_a_page_is_refused_at_the_first_call(inputs: dict[tuple[str, int], list[Any]], tmp_path: Path) -> None:
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    with pytest.raises(ArgumentError, match=r"about 0.013 MB with 2 views of 63 tokens, and 0.01 MB is the most: ask for fewer layers"):
        view_attention(pipe, PROMPT, tmp_path / "view.html", layers=[0, 1], megabytes=0.01, **CALL)
    assert inputs == {}
    assert list(tmp_path.iterdir()) == []
    assert all("attend" not in vars(operator) for operator in operators_of(pipe).values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 2}, "no accelerated layer is 2: name some of 0 transformer_blocks.0.attn, 1 single"),
        ({"layers": ["nothing.*"]}, "no accelerated layer is 'nothing"),
        ({"layers": []}, "layers must be one or more"),
        ({"heads": 2}, "has 2 heads, numbered from 0, and no head 2"),
        ({"heads": []}, "heads must be one or more numbers >= 0"),
        ({"heads": "0"}, "heads must be one or more numbers >= 0"),
        ({"heads": None}, "heads must be one or more numbers >= 0, not None"),
        ({"heads": 1.5}, "heads must be one or more numbers >= 0, not 1.5"),
        ({"steps": 1.5}, "steps must be one or more numbers >= 0, not 1.5"),
        ({"layers": 1.5}, "layers must be one or more numbers or names, not 1.5"),
        ({"layers": [1.5]}, "no accelerated layer is 1.5"),
        ({"seed": "a"}, "seed must be an int from 0 to .*, not 'a'"),
        ({"seed": 1.5}, "seed must be an int from 0 to .*, not 1.5"),
        ({"seed": -1}, "seed must be an int from 0 to .*, not -1"),
        ({"seed": 2**64}, "seed must be an int from 0 to"),
        ({"seed": None}, "seed must be an int from 0 to .*, not None"),
        ({"num_images_per_prompt": 3}, "num_images_per_prompt must be 1, not 3: the page shows one"),
        ({"num_images_per_prompt": None}, "num_images_per_prompt must be 1, not None"),
        ({"steps": 3}, "the run has 3 steps, numbered from 0, and no step 3"),
        ({"steps": [-1]}, "steps must be one or more numbers >= 0"),
        ({"megabytes": 0}, "megabytes must be a number > 0"),
        ({"nonsense": 1}, "FluxPipeline takes no nonsense"),
        ({"generator": 1}, "leave generator out"),
    ],
)
def test_what_there_is_not_is_refused_before_anything_runs(
    arguments: dict[str, Any], message: str, tmp_path: Path, sparse_calls: list[tuple[int, ...]]
) -> None:
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    with pytest.raises(ArgumentError, match=message):
        view_attention(pipe, PROMPT, tmp_path / "view.html", **(CALL | arguments))
    assert sparse_calls == []
    assert list(tmp_path.iterdir()) == []


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(NotAcceleratedError):
        view_attention(picture_pipe(), PROMPT, tmp_path / "view.html", **CALL)
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    with pytest.raises(ArgumentError, match="must name a file, not the folder"):
        view_attention(pipe, PROMPT, tmp_path, **CALL)
    with pytest.raises(ArgumentError, match="non-empty strings"):
        view_attention(pipe, " ", tmp_path / "view.html", **CALL)
    pipe, call = video_pipe("wan22_two_experts")
    accelerate(pipe, CLEAR(1.5, tile=(2, 4, 4)))
    with pytest.raises(ArgumentError, match="num_videos_per_prompt must be 1, not 2"):
        view_attention(pipe, "a panda", tmp_path / "view.html", num_videos_per_prompt=2, **call)
    with pytest.raises(
        dit_accel.errors.FallbackError, match=r"nothing was seen of transformer_2.blocks.0.attn1: it does not run in the steps"
    ):
        view_attention(pipe, "a panda", tmp_path / "view.html", layers="*blocks.0.*", steps=0, **call)
    assert list(tmp_path.iterdir()) == []


def test_where_no_page_can_be_written_nothing_runs(tmp_path: Path, sparse_calls: list[tuple[int, ...]]) -> None:
    pipe = accelerate(picture_pipe(), METHODS["fovea"])
    (tmp_path / "file").touch()
    for out, message in ((tmp_path / "file" / "view.html", "the folder .*file can't be written to"), (3, "out must be the name of a file")):
        with pytest.raises(ArgumentError, match=message):
            view_attention(pipe, PROMPT, out, **CALL)  # type: ignore[arg-type]
    assert sparse_calls == []
    view_attention(pipe, PROMPT, str(tmp_path / "new" / "view.html"), num_images_per_prompt=1, **CALL)
    assert (tmp_path / "new" / "view.html").exists()


@pytest.mark.parametrize("name", ["error", "kept", "estimated", "query", "key"])
def test_numbers_that_are_none_are_refused(name: str) -> None:
    """As integers they would be zeros."""
    shape = Shape(1, 2, 16, (1, 5, 6), 3, False)
    q, k, v = shape.inputs()
    place, captured = Place("blocks.4", Layer("blocks.4", 2, 16, False), 7, 1.0), Captured(q, k, v, shape.layout, "blocks.4")
    spec = METHODS["fovea"]
    with torch.no_grad():
        (head,) = looked_at(place, captured, [(spec, (0, 1))], spec.make_parameters(heads=2, head_dim=16)(), [1], "auto")
    number = getattr(head.captured, name) if name in ("query", "key") else getattr(head, name)
    number[..., -1] = torch.nan
    with pytest.raises(ArgumentError, match=r"of blocks.4, head 1, step 7: NaN or infinity"):
        view_page([head], torch.rand(1, 3, 40, 48), None, {"pipeline": "", "prompt": "", "seed": 0, "call": {}})


# The command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tiny pipeline."""
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny().save_pretrained(folder)
    return str(folder)


def test_the_command(model: str, tmp_path: Path) -> None:
    out = tmp_path / "view.html"
    small = ["--size", "256x128", "--max-sequence-length", "16", "--steps", 2, "--model", model]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = succeed(
            "view", "--prompt", "a panda", *small, "--method", "fovea:0.5", "--layer", 0, "--layer", "single_*", "--step", 1, "--out", out
        )
    assert text == f"wrote {out}\n"
    assert Page.read(out).names == [(DOUBLE, 0, 1), (SINGLE, 0, 1)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", " "], "a prompt must not be empty"),
        (["--prompt", "a cat", "--method", "none"], "view requires an accelerated method"),
        (["--prompt", "a cat", "--method", "clear:8", "--adapter", "x"], "--adapter names the method itself"),
        (["--prompt", "a cat", "--step", "8"], "the run has 8 steps, numbered from 0, and no step 8"),
        (["--prompt", "a cat", "--megabytes", "nan"], "--megabytes must be a number > 0"),
        (["--prompt", "a cat", "--out", "."], "--out must name a file"),
    ],
)
def test_the_command_refuses(arguments: list[str], message: str) -> None:
    assert message in fail("view", *arguments)
