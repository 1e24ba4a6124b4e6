"""The estimator against published counts and counts by hand."""

import json
from pathlib import Path

import pytest
import torch
from helpers import disc_pairs, window_pairs
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.measure.estimate import MODELS, estimate, gigaflops, tile_visits
from dit_accel.method import Disc, Window
from dit_accel.method.assignment import Assignment, Rule
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea
from dit_accel.operator.cost import passes
from dit_accel.operator.layout import TokenLayout


@pytest.mark.parametrize(
    ("side", "expected"),
    [(1024, [63.5, 86.6, 154.1]), (2048, [246.2, 352.6, 724.3]), (4096, [979.3, 1433.2, 3141.7]), (8192, [3915.4, 5789.2, 13085.0])],
)
def test_published_arithmetic_of_clear(side: int, expected: list[float]) -> None:
    """CLEAR, tables 2, 3 and 7: GFLOP per layer of FLUX at radius 8, 16 and 32."""
    layout, found = TokenLayout((1, side // 16, side // 16), 512), []
    for radius in (8, 16, 32):
        (disc,) = CLEAR(radius).keep
        assert isinstance(disc, Disc)
        found.append(round(gigaflops(disc.pairs(layout.grid), layout, MODELS["flux"]), 1))
    assert found == expected


@pytest.mark.parametrize(("side", "expected"), [(1024, 260.9), (2048, 3507.9), (4096, 53604.4)])
def test_published_arithmetic_of_flux(side: int, expected: float) -> None:
    assert round(estimate("h100", "flux", (side, side), None)["gflop_kept"], 1) == expected


@pytest.mark.parametrize(("stride", "visited"), [((1, 1), 84), ((16, 1), 60), ((16, 16), 50)])
def test_published_tiles_of_natten(stride: tuple[int, int], visited: int) -> None:
    (window,) = GNA((80, 80), stride=stride).keep
    assert isinstance(window, Window)
    assert tile_visits(window, (1, 256, 256), (1, 16, 16), (1, 16, 8)) == (visited, 512)


@pytest.mark.parametrize("grid", [(1, 9, 7), (4, 5, 6)], ids=str)
def test_pairs_by_brute_force(grid: tuple[int, int, int]) -> None:
    (disc,), (window,) = CLEAR(3.5).keep, GNA(5, stride=2, dilation=2).keep
    assert isinstance(disc, Disc)
    assert isinstance(window, Window)
    assert disc.pairs(grid) == int(disc_pairs((grid,), 3.5).sum())
    assert window.pairs(grid) == int(window_pairs((grid,), window).sum())


def test_a_floor_by_hand() -> None:
    """The built-in model at 512 pixels: 1,024 image and 32 text tokens, 4 heads of 64, 6 layers."""
    row = estimate("a100", "builtin", (512, 512), None)
    flop, size = 4 * 1056**2 * 256, 4 * 1056 * 256 * 2
    assert row["gflop_kept"] * 1e9 == pytest.approx(flop)
    assert row["floor_ms"] == pytest.approx(6 * max(flop / 312e12, size / 2039e9) * 1e3)
    assert row["bound"] == "arithmetic"


def test_shares_of_a_small_grid() -> None:
    image, model = 4096, MODELS["flux"]
    row = estimate("h100", "flux", (1024, 1024), SLA(0.25, scope="none"))
    layout = TokenLayout((1, 64, 64), 512)
    assert row["gflop_kept"] == pytest.approx(gigaflops(image**2 / 4, layout, model))
    assert estimate("h100", "flux", (1024, 1024), Fovea(0.25))["gflop_computed"] > row["gflop_computed"]


def test_passes_are_those_of_the_launches() -> None:
    """At least as many as test_triton_kernels.py counts from the GPU kernels' launches."""
    assert [passes(spec) for spec in (None, CLEAR(8), SLA(0.1), Fovea(0.05), Fovea(radius=8))] == [4, 4, 8, 9, 6]


def test_an_assignment_is_the_mean_of_its_layers_and_heads(tmp_path: Path) -> None:
    """Half of the heads of FLUX's 19 double blocks keep the original attention, of its 57 blocks in all."""
    rules = (Rule(CLEAR(8)), Rule(None, layers="transformer_blocks.*", heads=range(12)), Rule(CLEAR(32), tokens=(0, 4096)))
    path = Assignment(rules).save(tmp_path / "plan.json")
    original, method = (estimate("h100", "flux", (2048, 2048), spec) for spec in (None, CLEAR(8)))
    done = CliRunner().invoke(app, ["estimate", "--size", "2048", "--method", str(path), "--out", str(tmp_path / "rows.json")])
    assert done.exit_code == 0, done.output
    row, part = json.loads((tmp_path / "rows.json").read_text())["rows"][1], 19 / 57 / 2
    for name in ("gflop_kept", "gflop_computed", "megabytes"):
        assert row[name] == pytest.approx(part * original[name] + (1 - part) * method[name])
    assert row["published_seconds"] is None


def test_an_assignment_that_differs_by_step_has_no_estimate() -> None:
    with pytest.raises(ValueError, match="an estimate is of one forward"):
        estimate("h100", "flux", (1024, 1024), Assignment((Rule(CLEAR(8), steps=(1, None)),)))
    with pytest.raises(ValueError, match="no layer is named"):
        estimate("h100", "flux", (1024, 1024), Assignment((Rule(CLEAR(8), layers="blocks.*"),)))


def test_video_tokens() -> None:
    """Wan at 81 frames of 832 × 480: 21 × 30 × 52 = 32,760 tokens."""
    assert estimate("rtx5090", "wan-1.3b", (480, 832), None, frames=81)["tokens"] == 32760


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"gpu": "gtx1080"}, r"gpu must be one of .*not 'gtx1080'"),
        ({"model": "sdxl"}, r"model must be one of .*not 'sdxl'"),
        ({"size": (1000, 1024)}, "multiples of 16 pixels"),
        ({"frames": 5}, "it makes images"),
        ({"model": "wan-14b", "frames": 80}, "1 plus a multiple of 4"),
    ],
)
def test_refusals(change: dict[str, object], reason: str) -> None:
    given = {"gpu": "h100", "model": "flux", "size": (1024, 1024), "spec": None, "frames": 1} | change
    with pytest.raises(ValueError, match=reason):
        estimate(**given)  # type: ignore[arg-type]


def test_command(tmp_path: Path) -> None:
    out = tmp_path / "estimate.json"
    done = CliRunner().invoke(app, ["estimate", "--size", "2048", "--method", "clear:8", "--method", "fovea", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert "An estimate, not a measurement" in done.output
    rows = json.loads(out.read_text())["rows"]
    assert [round(row["gflop_kept"], 1) for row in rows[:2]] == [3507.9, 246.2]
    assert rows[1]["published_seconds"] == 15.67
    assert rows[2]["published_seconds"] is None
    assert torch.tensor([row["floor_ms"] for row in rows]).isfinite().all()
