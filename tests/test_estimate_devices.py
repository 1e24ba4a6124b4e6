"""What several devices send each other, against counts by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import disc_pairs
from typer.testing import CliRunner

from dit_accel.cli.app import app
from dit_accel.errors import ArgumentError
from dit_accel.measure.estimate import estimate
from dit_accel.measure.estimate_devices import LINKS, estimate_devices
from dit_accel.method.assignment import Assignment, Rule
from dit_accel.method.parts import Disc, Linear, Residual
from dit_accel.method.parts.orders import _split
from dit_accel.method.presets import CLEAR, SLA, Fovea
from dit_accel.method.spec import AttentionSpec
from dit_accel.operator.bands import Grounds
from dit_accel.operator.layout import TokenLayout
from dit_accel.parallel import traffic
from dit_accel.parallel.ranks import shares


def test_heads_are_exchanged_four_times() -> None:
    """Of N/n tokens all heads but one's own, of q, k, v and the output."""
    assert traffic.ulysses(4096, 24, 128, 8) == 4 * (4096 / 8) * (24 * 7 / 8) * 128 * 2


@pytest.mark.parametrize(("ranks", "rows"), [(2, 16), (4, 16), (3, 17)])
def test_the_halo_by_brute_force(ranks: int, rows: int) -> None:
    """Tiles of about 4 × 4 on rows of 12 tokens; bands are runs of tokens, and of each tile that a disc touches all keys are sent."""
    spec, grid = CLEAR(3, tile=(4, 4)), (1, rows, 12)
    cuts = _split(rows, 4)
    tile = torch.tensor([sum(y >= cut for cut in cuts[1:]) * 3 + x // 4 for y in range(rows) for x in range(12)])
    band = torch.arange(ranks).repeat_interleave(torch.tensor(shares(12 * rows, ranks)))
    kept = disc_pairs((grid,), 3)
    sent = [0] * ranks
    for reader in range(ranks):
        # all queries of a tile read what any token of it may keep: blocks are looked at as boxes
        rows_of = torch.isin(tile, tile[band == reader])
        for token in torch.isin(tile, tile[kept[rows_of].any(0)]).nonzero().flatten().tolist():
            sent[int(band[token])] += int(band[token] != reader)
    assert traffic.sent_tokens(Grounds(spec, TokenLayout(grid), shares(12 * rows, ranks))) == sent
    if rows == 16:
        assert max(sent) == 4 * 12 * (1 if ranks == 2 else 2)


def test_what_is_told_of_a_rest() -> None:
    """Sums for each feature, however many tokens there are; keys of patches, of which those at a cut are in two bands."""
    clear, linear = CLEAR(8), AttentionSpec((Disc(8),), Linear(scope="all"), Residual())
    for side, ranks in ((64, 2), (64, 8), (128, 8)):
        layout = TokenLayout((1, side, side), 0)
        more = [b - a for a, b in zip(of(clear, layout, ranks), of(linear, layout, ranks), strict=True)]
        assert more == [(ranks - 1) * 24 * 128 * 129 * 4] * ranks
        patches = [b - a for a, b in zip(of(clear, layout, ranks), of(CLEAR(8, downsample=4), layout, ranks), strict=True)]
        assert patches == [(ranks - 1) * 24 * 2 * 128 * 4 * side * side // 16 // ranks] * ranks
    cut = [CLEAR(2, tile=(4, 4)), CLEAR(2, downsample=4, tile=(4, 4))]
    alone, both = (of(spec, TokenLayout((1, 6, 8)), 2) for spec in cut)  # three rows each, of patches of four: two, and these and two more
    assert [b - a for a, b in zip(alone, both, strict=True)] == [24 * 2 * 128 * 4 * patches for patches in (2, 4)]


def test_a_halo_does_not_grow_with_the_number_of_devices() -> None:
    """CLEAR's border is of rows of tiles; of text and pooled rows what is gathered nears a limit."""
    layout = TokenLayout((1, 128, 128), 0)
    assert {max(of(CLEAR(8), layout, ranks)) for ranks in (4, 8, 16)} == {2 * 24 * 128 * 2 * 2.0 * 8 * 128}
    pooled = [max(of(Fovea(radius=8), layout, ranks)) for ranks in (4, 16)]
    gathered = 3 * 24 * 128 * 4 * 128 * 128 / 64
    assert pooled[1] - pooled[0] == pytest.approx(gathered * (15 / 16 - 3 / 4))


def of(spec: AttentionSpec, layout: TokenLayout, ranks: int, heads: int = 24, head_dim: int = 128) -> list[int]:
    found = traffic.halo(spec, layout, heads, head_dim, ranks)
    assert found is not None
    return found


@pytest.mark.parametrize("spec", [Fovea(0.05), SLA(0.1), Fovea(radius=4, conv=3), Fovea(radius=4, order=1)])
def test_what_bands_can_not_run_has_no_halo(spec: AttentionSpec) -> None:
    assert traffic.halo(spec, TokenLayout((1, 16, 16)), 2, 64, 2) is None


def test_text_is_gathered_and_its_output_sent_back() -> None:
    layout = TokenLayout((1, 16, 16), 11)
    alone = of(CLEAR(3), TokenLayout((1, 16, 16)), 2, 2, 64)
    with_text = of(CLEAR(3), layout, 2, 2, 64)
    assert [b - a for a, b in zip(alone, with_text, strict=True)] == [
        own * 3 * 2 * 64 * 2 + (11 - own) * 2 * 65 * 4 for own in (6, 5)
    ]  # fmt: skip


def test_a_row_by_hand() -> None:
    """4,096 pixels: 256² image and 512 text tokens, 24 heads of 128."""
    ours, halo = estimate_devices("h100", "flux", (4096, 4096), CLEAR(16), devices=8, link="nvlink")
    tokens = 256**2 + 512
    assert ours["tokens"] == tokens
    assert ours["megabytes_sent"] == pytest.approx(4 * tokens * 3072 * 2 * 7 / 64 / 1e6)
    assert ours["exchange_ms"] == pytest.approx(ours["megabytes_sent"] / LINKS["nvlink"][0])
    whole = estimate("h100", "flux", (4096, 4096), CLEAR(16))["floor_ms"] / 57
    assert ours["one_device_ms"] == pytest.approx(whole)
    assert ours["total_ms"] == pytest.approx(whole / 8 + ours["exchange_ms"])
    assert halo["megabytes_sent"] * 1e6 == pytest.approx(2 * 2 * 16 * 256 * 3072 * 2 + 7 * 64 * (3 * 3072 * 2 + 24 * 129 * 4))


def test_what_can_not_be_shared_says_why() -> None:
    ours, halo = estimate_devices("h100", "flux", (1024, 1024), Fovea(0.05), devices=64, link="pcie")
    assert (ours["total_ms"], ours["why"]) == (None, "24 heads are not divisible by 64")
    assert halo["total_ms"] is None
    assert "chooses among all keys by what they contain" in halo["why"]
    mixed = Assignment((Rule(CLEAR(8)), Rule(CLEAR(16), heads=(0,))))
    assert estimate_devices("h100", "flux", (1024, 1024), mixed, devices=2, link="pcie")[1]["why"].startswith("its layers and heads have")
    assert len(estimate_devices("h100", "flux", (1024, 1024), None, devices=2, link="pcie")) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"link": "pigeon"}, "link must be one of .*not 'pigeon'"), ({"devices": 1}, "devices must be from 2 to 4096, not 1")],
)
def test_what_does_not_fit(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ArgumentError, match=reason):
        estimate_devices("h100", "flux", (1024, 1024), None, **({"devices": 2, "link": "pcie"} | change))  # type: ignore[arg-type]


def test_the_command_writes_both_tables(tmp_path: Path) -> None:
    several = ["--devices", "8", "--link", "ethernet", "--out", str(tmp_path / "e.json")]
    done = CliRunner().invoke(app, ["estimate", "--size", "1024", "--method", "clear:8", *several])
    assert done.exit_code == 0, done.output
    assert "12.5 GB/s from each" in " ".join(done.output.split())
    found = json.loads((tmp_path / "e.json").read_text())
    assert (found["devices"], found["link"], [row["how"] for row in found["shared"]]) == (8, "ethernet", ["ulysses", "ulysses", "halo"])
    assert all(math.isfinite(row["total_ms"]) for row in found["shared"])
    assert CliRunner().invoke(app, ["estimate", "--link", "pcie"]).exit_code != 0
