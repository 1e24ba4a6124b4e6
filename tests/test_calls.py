"""From call to call of one accelerated pipeline: steps, sizes, texts, threads, and what `summary` tells of them."""

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from conftest import LAYERS, POOLED, TEXT, WIDTH, forward_arguments, normal, position_ids, relative_error, run, tiny_pipe, tiny_transformer
from torch import Tensor

import dit_accel
from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea
from dit_accel.errors import FallbackError

# Steps, sizes, threads


@pytest.mark.parametrize(("dense_steps", "steps"), [(1, 1), (0, 3), (1, 3), (2, 3), (3, 3), (7, 3)])
@pytest.mark.parametrize("guidance", ["two-passes", "batch-of-two", "none"])
def test_the_first_steps_of_every_run_are_dense(pipe: Any, dense_steps: int, steps: int, guidance: str, sparse_calls: list[Any]) -> None:
    dit_accel.accelerate(pipe, Fovea(0.1), dense_steps=dense_steps)
    negative = {"negative_prompt_embeds": normal(1, TEXT, WIDTH, seed=5), "negative_pooled_prompt_embeds": normal(1, POOLED, seed=6)}
    call = negative | {"true_cfg_scale": 2.0} if guidance == "two-passes" else {"batch": 2 if guidance == "batch-of-two" else 1}
    passes = 2 if guidance == "two-passes" else 1
    counts = []
    for _ in range(3):
        sparse_calls.clear()
        run(pipe, 64, 80, steps=steps, **call)
        counts.append(len(sparse_calls))
    assert counts == [max(0, steps - dense_steps) * LAYERS * passes] * 3


@pytest.mark.parametrize("start", [1 / 3, 0.2, 0.6, 1.0], ids=["where-it-stopped", "below", "between", "at-the-top"])
def test_a_run_that_starts_late_has_its_dense_steps_too(pipe: Any, start: float, sparse_calls: list[Any]) -> None:
    dit_accel.accelerate(pipe, Fovea(0.1), dense_steps=1)
    run(pipe, 64, 80, steps=3)  # timesteps 1, 2/3, 1/3
    sparse_calls.clear()
    run(pipe, 64, 80, steps=2, sigmas=[start, start / 2])  # as img2img does
    assert len(sparse_calls) == LAYERS


@pytest.mark.parametrize("guided", [True, False], ids=["two-passes", "one-pass"])
def test_steps_count_where_bfloat16_rounds_their_timesteps_together(pipe: Any, guided: bool, sparse_calls: list[Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=25.0)  # FLUX's own shift at 2048 pixels; 1e5 at 4096
    dit_accel.accelerate(pipe.to(torch.bfloat16), Fovea(0.1), dense_steps=2)
    negative = {"negative_prompt_embeds": normal(1, TEXT, WIDTH).bfloat16(), "negative_pooled_prompt_embeds": normal(1, POOLED).bfloat16()}
    run(pipe, 64, 80, steps=28, **(negative | {"true_cfg_scale": 2.0} if guided else {}))
    assert len(sparse_calls) == 26 * LAYERS * (1 + guided)


def test_a_size_leaves_no_trace_in_the_next(pipe: Any) -> None:
    dit_accel.accelerate(pipe, Fovea(0.2))
    first, other = run(pipe), run(pipe, 400, 272)  # as many tokens, another grid
    assert torch.equal(run(pipe, 64, 80), run(dit_accel.accelerate(tiny_pipe(), Fovea(0.2)), 64, 80))
    assert torch.equal(run(pipe, 400, 272), other)
    assert torch.equal(run(pipe), first)
    assert torch.equal(other, run(dit_accel.accelerate(tiny_pipe(), Fovea(0.2)), 400, 272))


def test_a_text_length_leaves_no_trace_in_the_next() -> None:
    transformer, short = dit_accel.accelerate(tiny_transformer(), CLEAR(3.0)), forward_arguments()
    long = short | {"encoder_hidden_states": normal(1, 20, WIDTH, seed=4), "txt_ids": torch.zeros(20, 3)}  # the same img_ids
    first, second = transformer(**short).sample, transformer(**long).sample
    assert torch.equal(transformer(**short).sample, first)
    assert torch.equal(second, dit_accel.accelerate(tiny_transformer(), CLEAR(3.0))(**long).sample)


def two_pipes() -> list[tuple[Any, tuple[int, int]]]:
    """Two pipelines with their own weights, method and size."""
    fovea = dit_accel.accelerate(tiny_pipe(1), Fovea(0.1), dense_steps=1)
    return [(fovea, (272, 400)), (dit_accel.accelerate(tiny_pipe(2), CLEAR(3.0)), (80, 208))]


def test_interleaved_pipelines_do_not_meet() -> None:
    alone = [run(pipe, *size, steps=3) for pipe, size in two_pipes()]
    (outer, size), (inner, small) = two_pipes()
    between: list[Tensor] = []

    def on_step_end(*_: Any) -> dict[str, Any]:
        between.append(run(inner, *small, steps=3))
        return {}

    assert torch.equal(run(outer, *size, steps=3, callback_on_step_end=on_step_end), alone[0])
    assert [torch.equal(x, alone[1]) for x in between] == [True] * 3


def test_pipelines_in_two_threads_do_not_meet() -> None:
    with ThreadPoolExecutor(1) as one:  # not the main thread, whose number of OpenMP threads may differ
        alone = [one.submit(run, pipe, *size, steps=4).result() for pipe, size in two_pipes()]
    with ThreadPoolExecutor(2) as pool:
        together = [f.result() for f in [pool.submit(run, pipe, *size, steps=4) for pipe, size in two_pipes()]]
    assert [relative_error(*pair) < 1e-6 for pair in zip(together, alone, strict=True)] == [True, True]


# Summary and fallbacks


def kept_by_hand(spec: AttentionSpec, height: int, width: int) -> float:
    """The share of pairs of tokens, counted pair by pair from their coordinates."""
    places = [(y, x) for y in range(height) for x in range(width)]
    if spec == CLEAR(4.0):
        pairs = sum((a - c) ** 2 + (b - d) ** 2 < 16 for a, b in places for c, d in places)
    elif spec == Fovea(radius=4.0):
        tile = {p: (sum(p[0] >= e for e in (5, 11)), sum(p[1] >= e for e in (6, 12, 18))) for p in places}  # 17 = 5+6+6, 25 = 6+6+6+7
        near = {(tile[p], tile[q]) for p in places for q in places if (p[0] - q[0]) ** 2 + (p[1] - q[1]) ** 2 < 16}
        pairs = sum((tile[p], tile[q]) in near for p in places for q in places)
    else:  # GNA((7, 5), (2, 1)): every window is whole
        pairs = len(places) * 7 * 5
    return pairs / len(places) ** 2


@pytest.mark.parametrize(
    ("spec", "asked", "kept", "parameters"),
    [
        pytest.param(Fovea(0.01), 0.01, 1 / 12, 2, id="fovea-below-one-tile"),
        pytest.param(Fovea(0.3), 0.3, 3 / 12, 2, id="fovea"),
        pytest.param(Fovea(1.0), 1.0, 1.0, 2, id="fovea-whole"),
        pytest.param(SLA(0.5), 0.5, 3 / 7, 16 * 16 + 16, id="sla"),
        pytest.param(Fovea(radius=4.0), None, kept_by_hand(Fovea(radius=4.0), 17, 25), 2, id="fovea-radius"),
        pytest.param(CLEAR(4.0), None, kept_by_hand(CLEAR(4.0), 17, 25), 0, id="clear"),
        pytest.param(GNA((7, 5), (2, 1)), None, kept_by_hand(GNA((7, 5)), 17, 25), 0, id="gna"),
    ],
)
def test_summary_counts_what_is_kept(pipe: Any, spec: AttentionSpec, asked: float | None, kept: float, parameters: int) -> None:
    dit_accel.accelerate(pipe, spec, backend="reference")
    assert {(row.tokens, row.density_kept) for row in dit_accel.summary(pipe, show=False)} == {(None, None)}
    run(pipe)
    rows = dit_accel.summary(pipe, show=False)
    assert {row.layer for row in rows} == {name.removesuffix(".processor") for name in pipe.transformer.attn_processors}
    assert {(r.method, r.tokens, r.density_asked, r.parameters, r.backend, r.why) for r in rows} == {
        (str(spec), 425 + TEXT, asked, parameters, "reference", "asked for")
    }
    assert [row.density_kept for row in rows] == pytest.approx([kept] * LAYERS, rel=1e-6)


def test_summary_names_a_processor_that_was_replaced(pipe: Any) -> None:
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    dit_accel.accelerate(pipe, Fovea(0.1), dense_steps=1)
    pipe.transformer.single_transformer_blocks[0].attn.set_processor(FluxAttnProcessor())
    backends = {row.layer: row.backend for row in dit_accel.summary(pipe, show=False)}
    assert [name for name, backend in backends.items() if backend == "original"] == ["single_transformer_blocks.0.attn"]
    dit_accel.restore(pipe)
    assert {type(p).__name__ for p in pipe.transformer.attn_processors.values()} == {"FluxAttnProcessor"}


UNKNOWN_GRIDS = {
    "hole-in-the-second": (torch.cat([position_ids(17, 25), position_ids(5, 5, image=1)[:-1]]), "not one raster"),
    "hole": (position_ids(18, 25)[:-1], "not one raster"),
    "columns-first": (position_ids(18, 25)[:, [0, 2, 1]], "not one raster"),
}


@pytest.mark.parametrize(("ids", "says"), list(UNKNOWN_GRIDS.values()), ids=list(UNKNOWN_GRIDS))
def test_an_unknown_grid_falls_back_to_the_original(ids: Tensor, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    transformer = tiny_transformer()
    unknown = forward_arguments() | {"hidden_states": normal(1, len(ids), 16), "img_ids": ids}
    expected, known = transformer(**unknown).sample, dit_accel.accelerate(tiny_transformer(), Fovea(0.1))(**forward_arguments()).sample
    dit_accel.accelerate(transformer, Fovea(0.1))
    with pytest.warns(UserWarning, match=says) as warned:
        outputs = [transformer(**unknown).sample for _ in range(2)]
    assert [torch.equal(x, expected) for x in outputs] == [True, True]
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transformer(**(unknown | {"img_ids": ids.clone()}))
        assert torch.equal(transformer(**forward_arguments()).sample, known)
    dit_accel.summary(transformer)
    assert re.search(rf"3 calls ran the original attention: .*{says}", " ".join(capsys.readouterr().out.split()))


def test_strict_refuses_every_call_that_would_fall_back() -> None:
    transformer = dit_accel.accelerate(tiny_transformer(), Fovea(0.1), strict=True)
    ids = UNKNOWN_GRIDS["hole"][0]
    unknown = forward_arguments() | {"hidden_states": normal(1, len(ids), 16), "img_ids": ids}
    with pytest.raises(FallbackError, match="not one raster"):
        transformer(**unknown)
    with pytest.raises(FallbackError, match="not one raster"):
        transformer(**unknown)
    transformer(**forward_arguments())


def test_ids_that_bfloat16_rounds_are_a_raster_still() -> None:
    transformer = dit_accel.accelerate(tiny_transformer(double=1, single=0), CLEAR(3.0), strict=True)
    arguments = forward_arguments(2, 300)
    arguments["img_ids"] = arguments["img_ids"].bfloat16()  # as in a bfloat16 pipeline; above 256 neighbours share an id
    transformer(**arguments)
    assert [row.tokens for row in dit_accel.summary(transformer, show=False)] == [600 + TEXT]
    assert dit_accel.summary(transformer, show=False)[0].density_kept == pytest.approx(4 * (5 * 300 - 6) / 600**2, rel=1e-6)
