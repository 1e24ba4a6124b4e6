"""One sequence over several processes: 2 and 4 of them over gloo equal one, forward and backward, and what can't be shared is refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers as D
import pytest
import torch
from conftest import tiny_transformer
from distill_fixtures import PROMPTS, prompt_pipe, quick, same, state
from parallel_checks import CHECKS, PIPELINES, TRAINING, TRAINING_CALL
from safetensors.torch import load_file
from several import assert_one_lost_ends_the_other, found
from test_distill_processes import close
from test_families import SPARSE, Tiny

import dit_accel
from dit_accel import CLEAR, Fovea, distill
from dit_accel.cli.launched import processes
from dit_accel.errors import ArgumentError, DitAccelError, UnsupportedModelError
from dit_accel.finetune.data.collect import Forward
from dit_accel.measure.capture import capture_inputs
from dit_accel.method.assignment import Group
from dit_accel.operator.cost import computed_pairs
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel.balance import balanced, heads_of_ranks
from dit_accel.patch.sharing import BROKEN
from dit_accel.pipelines import UNSUPPORTED

IN_FOUR = ["flux_text_77", "flux_of_many_specs", "wan_ragged"]
ONE_PASS = [
    "flux_text_0", "flux_text_77", "flux_text_512_two_sizes_lora", "flux_of_many_specs", "wan_clip", "wan_ragged", "chronoedit",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    own = [name for name, function in CHECKS.items() if function.__module__ == "parallel_checks"]  # test_halo adds others
    return found(folder, 2, own)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return found(tmp_path_factory.mktemp("four"), 4, IN_FOUR)


def assert_as_one(result: dict[str, float], heads: int) -> None:
    """Equal to one process to the rounding of what diffusers computes in float32, on that many heads in each process."""
    assert result["output"] < 1e-6
    assert result["gradients"] < 1e-5
    assert result["heads"] <= heads


@pytest.mark.parametrize("name", ONE_PASS)
def test_two_processes_are_one(name: str, two: list[dict[str, Any]]) -> None:
    for result in two:
        assert_as_one(result[name], 2)
    assert two[0][name]["learned"] == two[1][name]["learned"] >= (0 if name == "chronoedit" else 2)


@pytest.mark.parametrize("name", IN_FOUR)
def test_four_processes_are_one(name: str, four: list[dict[str, Any]]) -> None:
    for result in four:
        assert_as_one(result[name], 1)


@pytest.mark.parametrize("name", [*PIPELINES, "ltx", "helios"])
@pytest.mark.composes("context parallelism: Ulysses, of every class that has a plan of it")
def test_pipelines_draw_the_same(name: str, two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["pipelines"][name]["heads"] == [1]
        assert result["pipelines"][name]["error"] < 1e-5


def test_the_mask_of_padded_text_is_gathered(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["padded_text"]["heads"] == [1]
        assert result["padded_text"]["error"] < 1e-5


def test_bfloat16_is_sent_as_it_is(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["half"]["heads"] == [1]
        assert result["half"]["error"] < 2**-7


def test_the_original_runs_in_parallel_too(two: list[dict[str, Any]]) -> None:
    for result in two:
        errors = result["dense_and_restored"]
        assert errors["sparse"] > 1e-3
        assert max(errors["within"], errors["after"]) < 1e-5


def test_all_do_what_the_first_process_measured(two: list[dict[str, Any]]) -> None:
    assert [result["one_decision"] for result in two] == [[[1], []], [[1], []]]


def test_the_bytes_are_those_of_the_formula(two: list[dict[str, Any]]) -> None:
    for result in two:
        assert result["bytes_sent"]["measured"] == result["bytes_sent"]["formula"] > 0
        assert result["bytes_sent"]["messages"] == 4  # two for each layer


def test_training_in_parts_is_training(two: list[dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    """Losses, held-out errors and the LoRA are those of one process, and all processes agree to the bit."""
    pipe = dit_accel.accelerate(prompt_pipe(), CLEAR(2.0))
    one = distill(pipe, PROMPTS, quick(tmp_path, **TRAINING), progress=False, **TRAINING_CALL)
    histories = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in (one.history, *(x["distilled"]["history"] for x in two))
    ]
    assert close(histories[0], histories[1])
    assert histories[1] == histories[2]
    assert len({row["loss"] for row in histories[0][1:]}) == 3
    first, second = (load_file(folder / f"run-{rank}.safetensors") for rank in (0, 1))
    assert same(first, second)
    start, moved = state(dit_accel.accelerate(prompt_pipe(), CLEAR(2.0)).transformer), 0
    for name, expected in pipe.transformer.state_dict().items():
        if "lora" in name:
            step = float((expected - start.get(name, torch.zeros(()))).abs().max())
            moved += step > 0
            assert float((first[name] - expected).abs().max()) <= 1e-3 * step, name
    assert moved > 4
    assert len(list((folder / "run" / "samples").glob("run-*.safetensors"))) == 2


def test_the_first_stage_is_not_for_parts(two: list[dict[str, Any]]) -> None:
    assert all("the first stage can't be run by processes that share a sequence" in result["distilled"]["refused"] for result in two)


def test_the_command_is_shared_by_the_processes_of_a_launch(two: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(two):
        assert result["command"] == {"codes": [0, 0], "spoke": rank == 0, "heads": [2], "same": True if rank == 0 else None}


def test_a_launch_that_can_not_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ArgumentError, match="WORLD_SIZE must be the number of processes that were started, not 'many'"):
        processes()


def test_what_diffusers_itself_can_not_share(two: list[dict[str, Any]]) -> None:
    """The limits that docs/parallel.md names."""
    assert "broadcast shape" in two[0]["broken_in_diffusers"]["mask"]
    assert "must match the size" in two[0]["broken_in_diffusers"]["rope"]


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
model = accelerate(checks.flux(), Fovea(0.3, tile=(4, 4)), strict=True)
checks.ulysses(model, 2)
call = checks.flux_call(6, 10, 12)
def stop(module, args):
    if sys.argv[2] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
if dist.get_rank() == 1:
    model.single_transformer_blocks[0].register_forward_pre_hook(stop)
Path(sys.argv[1], f"ready-{dist.get_rank()}").touch()
try:
    with torch.no_grad():
        model(**call, return_dict=False)
except RuntimeError as error:
    Path(sys.argv[1], "error").write_text(str(error))
    raise
"""


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_process_that_is_lost_ends_the_others(how: str, tmp_path: Path) -> None:
    """With an error, at the latest when the process group's timeout is over."""
    assert_one_lost_ends_the_other(DYING, how, tmp_path)


# What is refused, before anything is changed


def parallel(**degrees: int) -> Any:
    """A configuration as `enable_parallelism` leaves it on a model."""
    return D.models._modeling_parallel.ParallelConfig(context_parallel_config=D.ContextParallelConfig(**degrees))


REFUSED = {
    "ring": ({"ring_degree": 2}, ArgumentError, "a ring degree is not supported: .* Use ContextParallelConfig\\(ulysses_degree"),
    "both": ({"ring_degree": 2, "ulysses_degree": 2}, ArgumentError, "a ring degree is not supported"),
    "heads": (
        {"ulysses_degree": 4},
        ArgumentError,
        "transformer_blocks.0.attn has 6 heads, which ulysses_degree=4 does not divide: choose 2 or 3 or 6",
    ),
}


@pytest.mark.parametrize("first", ["parallel", "accelerate"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_shared_is_refused(case: str, first: str) -> None:
    degrees, error, message = REFUSED[case]
    model = tiny_transformer(heads=6)
    processors = [m.processor for m in model.modules() if hasattr(m, "processor")]
    if first == "parallel":
        model._parallel_config = parallel(**degrees)
        with pytest.raises(error, match=message):
            dit_accel.accelerate(model, Fovea(0.3))
        assert [m.processor for m in model.modules() if hasattr(m, "processor")] == processors
        assert not hasattr(model, "_dit_accel")
    else:
        dit_accel.accelerate(model, Fovea(0.3))
        with pytest.raises(error, match=message):
            model.enable_parallelism(config=D.ContextParallelConfig(**degrees))
        assert model._parallel_config is None
        assert all(m.processor._parallel_config is None for m in model.modules() if hasattr(m, "dit_accel"))
    assert isinstance(error("x"), DitAccelError)


def test_a_family_without_a_plan_is_refused() -> None:
    model = Tiny("sd3").pipe.transformer
    dit_accel.accelerate(model, SPARSE["fovea"])
    with pytest.raises(UnsupportedModelError, match=r"family 'sd3' does not say how its sequence is split: .*sharded"):
        model.enable_parallelism(config=D.ContextParallelConfig(ulysses_degree=2), cp_plan={})


@pytest.mark.parametrize(("name", "why"), [("ltx2", "between sound and video"), ("helios", "whose keys it scales")])
def test_what_diffusers_plan_gets_wrong_is_refused(name: str, why: str) -> None:
    model = Tiny(name).pipe.transformer
    dit_accel.accelerate(model, SPARSE["fovea"])
    with pytest.raises(UnsupportedModelError, match=f"context parallelism of {type(model).__name__} is wrong: .*{why}.* one process"):
        model.enable_parallelism(config=D.ContextParallelConfig(ulysses_degree=2))


def test_a_class_with_a_plan_is_shared_or_refused() -> None:
    """Every class of diffusers with a plan: those of `PIPELINES` and ChronoEdit draw the same, MiniMax-H3 can't be accelerated at all."""
    planned = {
        name
        for name in dir(D)
        if name.endswith(("Transformer2DModel", "Transformer3DModel")) and getattr(getattr(D, name), "_cp_plan", None) is not None
    }
    tried = {type(t).__name__ for name in (*PIPELINES, "ltx") for t in Tiny(name).transformers}
    refused = {broken for broken, _, _ in BROKEN} | set(UNSUPPORTED)
    assert planned - tried - refused - {"ChronoEditTransformer3DModel"} == set()
    assert {"FluxTransformer2DModel", "WanTransformer3DModel", "MiniMaxH3Transformer3DModel"} <= planned


def test_each_layer_s_backend_is_looked_at() -> None:
    """diffusers looks at the first one alone, and others would compute attention among one process's tokens."""
    model = tiny_transformer()
    model.single_transformer_blocks[1].attn.processor._attention_backend = "_native_math"
    dit_accel.accelerate(model, Fovea(0.3))
    with pytest.raises(ArgumentError, match=r"single_transformer_blocks.1.attn has the attention backend '_native_math', which does not"):
        model.enable_parallelism(config=D.ContextParallelConfig(ulysses_degree=2))


def test_a_processor_that_does_not_know_of_it_is_refused() -> None:
    class Own:
        __call__ = D.models.transformers.transformer_flux.FluxAttnProcessor.__call__
        _attention_backend = None

    model = tiny_transformer()
    model.transformer_blocks[0].attn.processor = Own()
    model._parallel_config = parallel(ulysses_degree=2)
    with pytest.raises(UnsupportedModelError, match=r"Own of transformer_blocks.0.attn does not know of context parallelism"):
        dit_accel.accelerate(model, Fovea(0.3))


def spread() -> Any:
    """A configuration as one of two processes has it."""
    config = parallel(ulysses_degree=2)
    config.context_parallel_config._ulysses_mesh = SimpleNamespace(get_group=lambda: None, size=lambda: 2, get_local_rank=lambda: 0)
    return config


def test_stages_are_kept_by_one_process_alone(tmp_path: Path) -> None:
    pipe = dit_accel.builtin_pipeline()
    pipe.transformer._parallel_config = spread()
    with pytest.raises(ArgumentError, match="stages can't be kept by processes that share a picture"):
        dit_accel.generate_hires(pipe, "a panda", height=256, width=256, base=128, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_captured_in_one_process_alone() -> None:
    model = dit_accel.accelerate(tiny_transformer(), Fovea(0.3))
    model._parallel_config = spread()
    with pytest.raises(ArgumentError, match="can't be captured while processes share a sequence"):
        capture_inputs(model, Forward({}, torch.empty(0), torch.empty(0), "", 0, 0))


def test_enable_parallelism_is_the_class_s_own_again_after_restore() -> None:
    model = dit_accel.accelerate(tiny_transformer(), Fovea(0.3))
    assert "enable_parallelism" in vars(model)
    dit_accel.restore(model)
    assert "enable_parallelism" not in vars(model)


# Which process computes which heads


def test_equal_heads_stay_together() -> None:
    assert balanced([1.0] * 6, 3) == ((0, 1), (2, 3), (4, 5))


def test_dear_heads_are_spread() -> None:
    assert balanced([8.0, 7.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0], 2) == ((0, 1, 5, 6), (2, 3, 4, 7))


def test_heads_that_can_not_be_spread_are_refused() -> None:
    with pytest.raises(ValueError, match="6 heads can't be spread evenly over 4 processes"):
        balanced([1.0] * 6, 4)


def test_costs_are_those_of_the_specs() -> None:
    """Two heads of the original attention are as dear as several sparse ones, so that no process has both."""
    layout = TokenLayout((1, 32, 32), 16)
    groups = (Group(Fovea(0.05, tile=(8, 8)), (0, 1, 4, 5, 6, 7)), Group(None, (2, 3)))
    ranks = heads_of_ranks(groups, layout, 16, 2)
    assert [len(heads) for heads in ranks] == [4, 4]
    assert [sum(head in (2, 3) for head in heads) for heads in ranks] == [1, 1]
    assert computed_pairs(None, layout, 16) > computed_pairs(groups[0].spec, layout, 16)
