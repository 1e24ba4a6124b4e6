"""One sequence in bands over several processes, with a halo: 2 and 4 of them over gloo equal one, and what is sent is what is counted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as D
import pytest
import torch
from conftest import tiny_transformer
from diffusers.models._modeling_parallel import ParallelConfig
from distill_fixtures import PROMPTS, prompt_pipe, quick, same, state
from halo_checks import PIPELINES
from parallel_checks import TRAINING, TRAINING_CALL
from safetensors.torch import load_file
from several import assert_one_lost_ends_the_other, found
from test_distill_processes import close

import dit_accel
from dit_accel import CLEAR, SLA, Assignment, Fovea, Rule, distill
from dit_accel.errors import ArgumentError, UnsupportedModelError
from dit_accel.method import AttentionSpec, DiscBlocks, Linear, Residual, Tiles
from dit_accel.method.parts import Centred, RankAugmented, Ridge, TokenSoftmax

ONE_PASS = [
    "halo_flux_text_0", "halo_flux_text_77", "halo_flux_pooled", "halo_flux_text_512_two_sizes_lora", "halo_flux_windows",
    "halo_flux_of_many_specs", "halo_wan_clip", "halo_wan_ragged", "halo_chronoedit", "halo_flux_linear_text_0",
    "halo_flux_linear_two_sizes_lora", "halo_flux_far_of_many_specs", "halo_wan_linear", "halo_wan_downsample",
]  # fmt: skip
IN_FOUR = [
    "halo_flux_text_77", "halo_flux_pooled", "halo_flux_of_many_specs", "halo_wan_clip", "halo_wan_ragged", "halo_bytes",
    "halo_far_is_not_read", "halo_flux_linear_text_0", "halo_flux_far_of_many_specs", "halo_wan_linear", "halo_wan_downsample",
]  # fmt: skip
IN_TWO = [
    *ONE_PASS, "halo_pipelines", "halo_original", "halo_bytes", "halo_training", "tiles_decoded", "tiles_decoded_under_autocast",
    "tiles_that_fail",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    return found(folder, 2, IN_TWO, "halo_checks")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found(tmp_path_factory.mktemp("four"), 4, IN_FOUR, "halo_checks")


# learned tensors with a gradient, in two layers: an offset each where the method has one, and what its rest learns
LEARNED = {
    "halo_flux_pooled": 2, "halo_flux_text_512_two_sizes_lora": 2, "halo_flux_of_many_specs": 2, "halo_wan_clip": 2,
    "halo_flux_linear_text_0": 2, "halo_flux_linear_two_sizes_lora": 4, "halo_flux_far_of_many_specs": 6, "halo_wan_linear": 10,
    "halo_wan_downsample": 2,
}  # fmt: skip


def assert_as_one(name: str, results: list[dict[str, Any]]) -> None:
    """Equal to one process to the rounding of what diffusers computes in float32, by our operator; what is learned has gradients."""
    for result in results:
        assert result[name]["output"] < 1e-6
        assert result[name]["gradients"] < 1e-5
        assert result[name]["heads"] == (2 if "specs" in name else 4)
        assert result[name]["learned"] == LEARNED.get(name, 0)


@pytest.mark.parametrize("name", ONE_PASS)
def test_two_processes_are_one(name: str, two: list[dict[str, Any]]) -> None:
    assert_as_one(name, two)


@pytest.mark.parametrize("name", [name for name in IN_FOUR if name in ONE_PASS])
def test_four_processes_are_one(name: str, four: list[dict[str, Any]]) -> None:
    assert_as_one(name, four)


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.composes("context parallelism: bands with a halo, of static patterns")
def test_pipelines_draw_the_same(name: str, two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["halo_pipelines"][name]["heads"] == [2]
        assert result["halo_pipelines"][name]["error"] < 1e-5


def test_masks_of_padded_text_and_bfloat16(two: list[dict[str, Any]]) -> None:
    for result in two:
        drawn = result["halo_pipelines"]
        assert {tuple(x["heads"]) for x in drawn.values()} == {(2,)}
        assert max(drawn[name]["error"] for name in ("padded text", "linear", "linear with padded text")) < 1e-5
        assert max(drawn[name]["error"] for name in ("bfloat16", "linear in bfloat16")) < 2**-7


def test_the_original_is_over_the_keys_of_all(two: list[dict[str, Any]]) -> None:
    for result in two:
        errors = result["halo_original"]
        assert errors["sparse"] > 1e-3
        assert max(errors["within"], errors["masked"]) < 1e-5


@pytest.mark.parametrize("method", ["clear", "fovea", "window", "linear", "features", "downsample"])
def test_the_bytes_are_those_of_the_formula(method: str, two: list[dict[str, Any]], four: list[dict[str, Any]]) -> None:
    for results in (two, four):
        measured = [result["halo_bytes"][method]["measured"] for result in results]
        assert measured == results[0]["halo_bytes"][method]["formula"]
        assert min(measured) > 0


def test_tiles_are_decoded_by_one_process_each(two: list[dict[str, Any]]) -> None:
    shares = [result["tiles_decoded"] for result in two]
    assert all(share["same"] and not share["left"] for share in shares)
    assert sum(share["own"] for share in shares) == shares[0]["tiles"] > 4
    assert abs(shares[0]["own"] - shares[1]["own"]) <= 1


def test_tiles_under_autocast_are_those_of_one_process(two: list[dict[str, Any]]) -> None:
    assert [result["tiles_decoded_under_autocast"] for result in two] == [True, True]


def test_a_process_that_can_not_decode_ends_the_others(two: list[dict[str, Any]]) -> None:
    """With its name, before any waits for its pixels; all go on from there."""
    others, failing = (result["tiles_that_fail"] for result in two)
    assert (failing["raised"], failing["message"]) == ("MemoryError", "no room for a tile")
    assert others["raised"] == "DecodingError"
    assert others["message"] == "process 1 of 2 could not decode its tiles, so none has the picture: MemoryError: no room for a tile"
    assert others["same"]
    assert failing["same"]


def test_decoding_within_decoding_and_a_function_of_ones_own_are_left_alone() -> None:
    """`generate_hires` shares the decoding by itself, also within a user's own block."""
    vae = D.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    pipe = SimpleNamespace(transformer=SimpleNamespace(_parallel_config=spread()), vae=vae)

    def own(z: Any, return_dict: bool = True) -> Any:
        return z

    vae.tiled_decode = own
    with dit_accel.shared_decoding(pipe):
        outer = vae.tiled_decode
        assert outer is not own
        with dit_accel.shared_decoding(pipe):
            assert vae.tiled_decode is outer
        assert vae.tiled_decode is outer
    assert vae.tiled_decode is own
    with pytest.raises(RuntimeError, match="lost"), dit_accel.shared_decoding(pipe):
        raise RuntimeError("lost")
    assert vae.tiled_decode is own
    del vae.tiled_decode
    with dit_accel.shared_decoding(pipe):
        pass
    assert "tiled_decode" not in vars(vae)


def test_an_autoencoder_of_other_tiles_is_refused() -> None:
    pipe = SimpleNamespace(transformer=SimpleNamespace(_parallel_config=spread()), vae=object())
    refused = pytest.raises(
        UnsupportedModelError, match="the tiles of object can't be decoded by several processes: leave shared_decoding out"
    )
    with refused, dit_accel.shared_decoding(pipe):
        pass


def spread() -> Any:
    """A configuration as one of two processes has it."""
    config = D.ContextParallelConfig(ring_degree=2)
    config._ring_mesh = SimpleNamespace(get_group=lambda: None, size=lambda: 2, get_local_rank=lambda: 0)
    return config


def with_linear(**fields: Any) -> AttentionSpec:
    return AttentionSpec((DiscBlocks(2),), Linear(**fields), Residual(), Tiles((8, 8)))


REFUSED = [
    SLA(0.3, tile=(8, 8)), Fovea(radius=2, order=1), Fovea(radius=2, parts=2), Fovea(radius=2, conv=3), with_linear(scope="marginal"),
    with_linear(feature_map=TokenSoftmax()), with_linear(weights=RankAugmented()), with_linear(readout=Centred()),
    AttentionSpec((DiscBlocks(2),), Ridge(), Residual(), Tiles((8, 8))),
]  # fmt: skip


@pytest.mark.parametrize("first", ["parallel", "accelerate"])
@pytest.mark.parametrize("spec", REFUSED, ids=str)
def test_what_bands_can_not_run_is_refused(spec: Any, first: str) -> None:
    """Before anything is changed, also where it is one of several methods."""
    model, method = tiny_transformer(), Assignment((Rule(CLEAR(2.0)), Rule(spec, heads=(0,))))
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    config = ParallelConfig(context_parallel_config=D.ContextParallelConfig(ring_degree=2))
    refused = pytest.raises(
        ArgumentError, match=r"a ring degree is not supported: .* Use ContextParallelConfig\(ulysses_degree=...\) alone"
    )
    if first == "parallel":
        model._parallel_config = config
        with refused:
            dit_accel.accelerate(model, method)
        assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
    else:
        dit_accel.accelerate(model, method)
        with refused:
            model.enable_parallelism(config=config)
        assert model._parallel_config is None


def test_heads_need_not_be_divisible() -> None:
    model = tiny_transformer(heads=6)
    model._parallel_config = ParallelConfig(context_parallel_config=D.ContextParallelConfig(ring_degree=4))
    dit_accel.accelerate(model, Fovea(radius=2))


def test_far_tokens_are_not_read(four: list[dict[str, Any]]) -> None:
    """The third process reads the last one's row of tiles."""
    assert [result["halo_far_is_not_read"] for result in four] == [True, True, False, False]


def test_training_in_bands_is_training(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """Losses, held-out errors and the LoRA are those of one process, and both processes agree to the bit."""
    pipe = dit_accel.accelerate(prompt_pipe(), CLEAR(2.0))
    one = distill(pipe, PROMPTS, quick(tmp_path, **TRAINING), progress=False, **TRAINING_CALL)
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in (one.history, *(x["halo_training"] for x in two))
    ]  # fmt: skip
    assert close(histories[0], histories[1])
    assert histories[1] == histories[2]
    first, second = (load_file(folder / f"banded-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    start_state, moved = state(dit_accel.accelerate(prompt_pipe(), CLEAR(2.0)).transformer), 0
    for name, expected in pipe.transformer.state_dict().items():
        if "lora" in name:
            step = float((expected - start_state.get(name, torch.zeros(()))).abs().max())
            moved += step > 0
            assert float((first[name] - expected).abs().max()) <= 1e-3 * step, name
    assert moved > 4


# A process that dies


DYING = """
import os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
import parallel_checks as checks
from dit_accel import Fovea, accelerate
torch.set_num_threads(1)
torch.accelerator.device_count = lambda: 1
dist.init_process_group("gloo", timeout=timedelta(seconds=5))
model = accelerate(checks.flux(), Fovea(radius=2, tile=(4, 4)), strict=True)
checks.ring(model, 2)
def stop(module, args):
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
if dist.get_rank() == 1:
    model.single_transformer_blocks[0].register_forward_pre_hook(stop)
try:
    with torch.no_grad():
        model(**checks.flux_call(6, 10, 12), return_dict=False)
except RuntimeError as error:
    Path(sys.argv[1], "error").write_text(str(error))
    raise
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_is_lost_ends_the_others(how: str, tmp_path: Path) -> None:
    """With an error, at the latest when the process group's timeout is over."""
    assert_one_lost_ends_the_other(DYING, how, tmp_path)
