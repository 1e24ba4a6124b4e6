"""Specs: what they refuse and how they say it, their way through JSON, and what the presets fill in."""

import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import pytest

from dit_accel.method import (
    AttentionSpec,
    Disc,
    DiscBlocks,
    Downsampled,
    ErrorProduct,
    Linear,
    Mass,
    Pooled,
    Raster,
    Residual,
    Tiles,
    TopK,
    Window,
)
from dit_accel.method.presets import CLEAR, GNA, SLA, Fovea

PRESETS = {
    "fovea": Fovea(),
    "fovea-density": Fovea(density=0.2),
    "fovea-radius": Fovea(radius=8),
    "clear": CLEAR(16),
    "clear-fraction": CLEAR(7.5),
    "clear-downsample": CLEAR(8, downsample=4),
    "sla": SLA(0.05),
    "sla-all": SLA(0.1, "elu", "all"),
    "sla-none": SLA(0.1, scope="none", block=(128, 64)),
    "gna": GNA(7),
    "gna-axes": GNA((5, 24, 24), stride=(1, 8, 8), dilation=(1, 2, 2)),
}
every_preset = pytest.mark.parametrize("spec", PRESETS.values(), ids=PRESETS)


def refused(make: Callable[[], object], value: object, name: str) -> Any:
    return pytest.param(make, value, id=name)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        refused(lambda: TopK(math.nan), math.nan, "density-nan"),
        refused(lambda: TopK(math.inf), math.inf, "density-inf"),
        refused(lambda: TopK(0), 0, "density-0"),
        refused(lambda: TopK(-0.1), -0.1, "density-negative"),
        refused(lambda: TopK(1.5), 1.5, "density-1.5"),
        refused(lambda: TopK(True), True, "density-bool"),
        refused(lambda: TopK("0.1"), "0.1", "density-str"),  # type: ignore[arg-type]
        refused(lambda: TopK(None), None, "density-none"),  # type: ignore[arg-type]
        refused(lambda: Disc(-3), -3, "radius-negative"),
        refused(lambda: Disc(0), 0, "radius-0"),
        refused(lambda: Disc(math.nan), math.nan, "radius-nan"),
        refused(lambda: Disc(math.inf), math.inf, "radius-inf"),
        refused(lambda: Disc(True), True, "radius-bool"),
        refused(lambda: DiscBlocks(-3), -3, "disc-blocks-radius-negative"),
        refused(lambda: DiscBlocks(True), True, "disc-blocks-radius-bool"),
        refused(lambda: Window(5, stride=6), 6, "stride-past-window"),
        refused(lambda: Window((5, 9), stride=(2, 10)), (2, 10), "stride-past-window-on-one-axis"),
        refused(lambda: Window(0), 0, "window-0"),
        refused(lambda: Window(5.0), 5.0, "window-float"),  # type: ignore[arg-type]
        refused(lambda: Window(True), True, "window-bool"),
        refused(lambda: Window(()), (), "window-no-axis"),
        refused(lambda: Window((1, 2, 3, 4)), (1, 2, 3, 4), "window-four-axes"),
        refused(lambda: Window(5, dilation=0), 0, "dilation-0"),
        refused(lambda: Linear("hedgehog"), "hedgehog", "feature-map"),  # type: ignore[arg-type]
        refused(lambda: Linear(scope="none"), "none", "linear-scope"),  # type: ignore[arg-type]
        refused(lambda: Pooled(cap=-1), -1, "cap-negative"),
        refused(lambda: Pooled(cap=math.nan), math.nan, "cap-nan"),
        refused(lambda: Downsampled(1), 1, "downsample-1"),
        refused(lambda: Downsampled(2.0), 2.0, "downsample-float"),  # type: ignore[arg-type]
        refused(lambda: Downsampled(True), True, "downsample-bool"),
        refused(lambda: Tiles((8,)), (8,), "tile-one-side"),
        refused(lambda: Tiles((8, 0)), (8, 0), "tile-side-0"),
        refused(lambda: Tiles((8, 8.0)), (8, 8.0), "tile-float"),  # type: ignore[arg-type]
        refused(lambda: SLA(0), 0, "sla-density-0"),
        refused(lambda: SLA(0.1, scope="some"), "some", "sla-scope"),  # type: ignore[arg-type]
        refused(lambda: SLA(0.1, "hedgehog", "none"), "hedgehog", "sla-feature-map"),  # type: ignore[arg-type]
        refused(lambda: SLA(0.1, block=(64, 48)), (64, 48), "block-not-a-power-of-two"),
        refused(lambda: SLA(0.1, block=(8, 64)), (8, 64), "block-too-small"),
        refused(lambda: SLA(0.1, block=(64, 256)), (64, 256), "block-too-large"),
        refused(lambda: SLA(0.1, block=(64,)), (64,), "block-one-number"),  # type: ignore[arg-type]
        refused(lambda: AttentionSpec((Disc(4),), block=(64, 32)), (64, 32), "block-other-than-tile"),
        refused(lambda: CLEAR(8, downsample=1), 1, "clear-downsample-1"),
        refused(lambda: CLEAR(-1), -1, "clear-radius-negative"),
        refused(lambda: GNA(4, stride=5), 5, "gna-stride-past-window"),
        refused(lambda: Fovea(0), 0, "fovea-density-0"),
        refused(lambda: AttentionSpec(()), (), "keep-nothing"),
        refused(lambda: AttentionSpec((8,)), (8,), "keep-a-number"),  # type: ignore[arg-type]
        refused(lambda: AttentionSpec((TopK(0.1), TopK(0.2))), (TopK(0.1), TopK(0.2)), "two-top-k"),
        refused(lambda: AttentionSpec((TopK(0.1),), Pooled()), (Pooled(), None), "rest-without-merge"),
        refused(lambda: AttentionSpec((TopK(0.1),), None, Mass()), (None, Mass()), "merge-without-rest"),
        refused(lambda: AttentionSpec((TopK(0.1),), Mass(), Mass()), Mass(), "merge-as-rest"),  # type: ignore[arg-type]
        refused(lambda: AttentionSpec((TopK(0.1),), Pooled(), Pooled()), Pooled(), "rest-as-merge"),  # type: ignore[arg-type]
        refused(lambda: AttentionSpec((TopK(0.1),), order="tiles"), "tiles", "order-str"),  # type: ignore[arg-type]
        refused(lambda: AttentionSpec((Disc(4),), Pooled(), Mass()), [Disc(4)], "pooled-rest-of-a-disc"),
        refused(lambda: AttentionSpec((Window(4),), Linear(), Residual()), [Window(4)], "complement-of-a-window"),
        refused(lambda: AttentionSpec((TopK(0.1),), Pooled(), Residual()), Residual(), "pooled-through-a-projection"),
    ],
)
def test_refuses_and_shows_the_value(make: Callable[[], object], value: object) -> None:
    with pytest.raises(ValueError, match=re.escape(f"not {value!r}")):
        make()


def test_fovea_takes_one_of_density_and_radius() -> None:
    with pytest.raises(ValueError, match=r"density=0\.1.*radius=8"):
        Fovea(0.1, radius=8)


@every_preset
def test_survives_json(spec: AttentionSpec) -> None:
    again = AttentionSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
    assert again == spec
    assert hash(again) == hash(spec)


@every_preset
def test_is_frozen(spec: AttentionSpec) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.rest = None  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.keep[0].radius = 1  # type: ignore[misc, union-attr]


def changed(**change: Any) -> dict[str, Any]:
    """Fovea's dictionary with some keys replaced."""
    return {**Fovea(0.1).to_dict(), **change}


TOP = {"type": "TopK", "density": 0.1, "correct_short": False}


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        pytest.param(changed(keep=[{"type": "TopK"}]), "density", id="slot-without-its-field"),
        pytest.param(changed(keep=None), "None", id="keep-none"),
        pytest.param(changed(keep=[{"type": ["TopK"]}]), "TopK", id="type-not-a-name"),
        pytest.param(changed(block=None), "None", id="block-none"),
        pytest.param(changed(rest={}, merge=None), "{}", id="empty-rest"),
        pytest.param(changed(merge={"type": "Mass", "offset": "no"}), "'no'", id="flag-not-a-bool"),
        pytest.param(changed(density=0.1), "density", id="unknown-key"),
        pytest.param({"keep": [TOP]}, "merge", id="missing-keys"),
        pytest.param([], r"\[\]", id="not-a-dict"),
        pytest.param(changed(keep=[{**TOP, "type": "Topk"}]), "Topk", id="unknown-type"),
        pytest.param(changed(keep=[{"density": 0.1}]), "0.1", id="no-type"),
        pytest.param(changed(keep=[{**TOP, "radius": 3}]), "radius", id="unknown-field"),
        pytest.param(changed(keep=[{**TOP, "density": 7}]), "7", id="bad-field"),
        pytest.param(changed(order=None), "None", id="no-order"),
        pytest.param(changed(rest=TOP), "TopK", id="pattern-as-rest"),
        pytest.param(changed(block=[64, 63]), "63", id="bad-block"),
    ],
)
def test_from_dict_refuses(data: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=shown):
        AttentionSpec.from_dict(data)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(
            Fovea(),
            AttentionSpec((TopK(0.05, score=ErrorProduct()),), Pooled(True, True, 2.0), Mass(True), Tiles((8, 8)), (64, 64)),
            id="fovea",
        ),
        pytest.param(Fovea(radius=8), AttentionSpec((DiscBlocks(8),), Pooled(), Mass(), Tiles()), id="fovea-radius"),
        pytest.param(CLEAR(16), AttentionSpec((Disc(16),), None, None, Tiles()), id="clear"),
        pytest.param(CLEAR(8, downsample=4), AttentionSpec((Disc(8),), Downsampled(4), Mass(offset=False)), id="clear-downsample"),
        pytest.param(SLA(0.05), AttentionSpec((TopK(0.05, False),), Linear("softmax", "complement"), Residual(), Raster()), id="sla"),
        pytest.param(SLA(0.1, "elu", "all"), AttentionSpec((TopK(0.1),), Linear("elu", "all"), Residual(), Raster()), id="sla-all"),
        pytest.param(SLA(0.1, scope="none"), AttentionSpec((TopK(0.1),), None, None, Raster()), id="sla-none"),
        pytest.param(GNA(7, 2, 3), AttentionSpec((Window(7, 2, 3),), None, None, Tiles()), id="gna"),
    ],
)
def test_preset_fills_the_slots(spec: AttentionSpec, expected: AttentionSpec) -> None:
    assert spec == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        pytest.param(Window((5, 6), stride=2), [(1, 5, 6), (1, 2, 2), (1, 1, 1)], id="pair-with-one-stride"),
        pytest.param(Window(7, 3, 2), [(7, 7, 7), (3, 3, 3), (2, 2, 2)], id="int-for-all-axes"),
        pytest.param(Window((3, 5, 6), (1, 2, 3), (1, 1, 2)), [(3, 5, 6), (1, 2, 3), (1, 1, 2)], id="triple"),
    ],
)
def test_window_per_axis(window: Window, expected: list[tuple[int, int, int]]) -> None:
    assert [window.per_axis(name) for name in ("size", "stride", "dilation")] == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        pytest.param(CLEAR(8, downsample=4), {"spatial_weight": (4, 4)}, id="clear-downsample"),
        pytest.param(SLA(0.1), {"proj.weight": (40, 40), "proj.bias": (40,)}, id="sla"),
        pytest.param(Fovea(), {"offset": (3,)}, id="fovea"),
        pytest.param(SLA(0.1, scope="none"), {}, id="sla-none"),
        pytest.param(GNA(5), {}, id="gna"),
    ],
)
def test_parameters_have_the_methods_shapes(spec: AttentionSpec, expected: dict[str, tuple[int, ...]]) -> None:
    params = spec.make_parameters(heads=3, head_dim=40)
    assert {name: tuple(p.shape) for name, p in params.named_parameters()} == expected


@pytest.mark.parametrize(
    ("spec", "start"),
    [
        pytest.param(CLEAR(8, downsample=4), 1 / 16, id="average"),
        pytest.param(SLA(0.1), 0, id="zero"),
        pytest.param(Fovea(), 0, id="no-offset"),
    ],
)
def test_parameters_start_where_the_method_says(spec: AttentionSpec, start: float) -> None:
    assert {x for p in spec.make_parameters(heads=3, head_dim=8).parameters() for x in p.flatten().tolist()} == {start}


@pytest.mark.parametrize(
    ("spec", "expected"),
    [(Fovea(0.2), 0.2), (SLA(0.1), 0.1), (CLEAR(8), None), (Fovea(blocks=3), None)],
    ids=["fovea", "sla", "clear", "blocks"],
)
def test_density_is_the_one_asked_for(spec: AttentionSpec, expected: float | None) -> None:
    assert spec.density == expected


@pytest.mark.parametrize(
    ("density", "blocks", "of", "expected"),
    [(0.05, 0, 64, 3), (0.05, 0, 4, 1), (0.0, 3, 64, 3), (0.0, 3, 1024, 3), (0.0, 3, 2, 2), (0.25, 2, 16, 6), (0.01, 1, 16, 1)],
)
def test_a_share_and_a_number_of_blocks_add_up(density: float, blocks: int, of: int, expected: int) -> None:
    assert TopK(density, blocks=blocks).count(of) == expected


def test_what_version_0_2_has_is_written_as_it_writes_it() -> None:
    """It reads adapters without the fields that it lacks, and checkpoints of its distillations are compared with what is written."""
    written = {"type": "TopK", "density": 0.05, "correct_short": False, "score": {"type": "ErrorProduct", "cap": 2.0}}
    assert Fovea(0.05).to_dict()["keep"] == [written]
    assert Fovea(blocks=3).to_dict()["keep"] == [written | {"density": 0.0, "blocks": 3}]
    given = Fovea(0.05).to_dict()
    assert AttentionSpec.from_dict(given | {"keep": [written | {"blocks": 0}]}) == AttentionSpec.from_dict(given) == Fovea(0.05)


@pytest.mark.parametrize(("density", "blocks"), [(0.0, 0), (0.1, -1), (0.1, 1.0), (0.1, True), (-0.1, 1)])
def test_no_blocks_are_refused(density: float, blocks: Any) -> None:
    with pytest.raises(ValueError, match="must be"):
        TopK(density, blocks=blocks)


def test_reads_as_its_slots() -> None:
    assert str(SLA(0.05)) == "TopK(density=0.05) + Linear() + Residual() + Raster()"
