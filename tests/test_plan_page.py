"""`plan.html`: every number of a plan's record is on its page, in its place."""

import itertools
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dit_accel import CLEAR, GNA, SLA, AttentionSpec, Fovea
from dit_accel.method import Raster, TopK
from dit_accel.planner.curve_chart import Axis, Mark, curve_chart, percent
from dit_accel.planner.names import short_name
from dit_accel.planner.pages import plan_page, write_plan_page
from dit_accel.planner.record import Asked, Candidate, Interval, LayerHeads, Learned, Plan, Point, Scaling

EXAMPLE = Path(__file__).with_name("plan_example.json")


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.load(EXAMPLE)


class Page(HTMLParser):
    """The tables of a page as rows of cells, the maps' cells with their attributes, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.cells: list[tuple[dict[str, str], str]] = []  # of the maps
        self.text, self.tags, self._cell = "", [], False
        self._map = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
            self._map = given.get("class") == "map"
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True
            if self._map and tag == "td":
                self.cells.append((given, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data
            if self._map and self.cells and self.tables[-1][-1][0] != "head":
                self.cells[-1] = (self.cells[-1][0], self.cells[-1][1] or data)

    def table(self, head: str) -> list[list[str]]:
        """The rows of the one table that has such a column."""
        (found,) = [rows for rows in self.tables if head in rows[0]]
        return found[1:]

    def beginning(self, *head: str) -> list[list[str]]:
        """All rows of the first table whose columns begin so."""
        return next(rows for rows in self.tables if rows[0][: len(head)] == list(head))


def test_every_head_of_every_range_has_what_it_got(plan: Plan) -> None:
    page = Page(plan_page(plan))
    letters = {row[0]: row for row in page.table("cost of a head")}
    order = sorted(plan.candidates, key=lambda each: each.cost)
    assert [row[1] for row in letters.values()] == [short_name(each.spec) for each in order]
    assert list(letters) == list("ABCDEFGHI")
    flat = [number for of_range in plan.chosen for layer in of_range for number in layer]
    maps = [rows for rows in page.tables if rows[0][:1] == ["head"]]
    shown = [cell for rows in maps for row in rows[1:] for cell in row[1:]]
    assert [letters[code][1] for code in shown] == [short_name(plan.candidates[number].spec) for number in flat]
    assert [row[0] for row in maps[0][1:]] == [layer.name for layer in plan.layers]
    assert len(maps) == len(plan.ranges)
    for row, each in zip(letters.values(), order, strict=True):
        assert row[2] == percent(each.cost)
        assert row[3] == percent(flat.count(plan.candidates.index(each)) / len(flat))


def test_pointing_at_a_head_tells_its_share_of_the_error(plan: Plan) -> None:
    page = Page(plan_page(plan))
    titles = [given["title"] for given, _ in page.cells]
    per_range = sum(layer.heads for layer in plan.layers)
    for number, errors in enumerate(plan.errors):
        own = titles[number * per_range : (number + 1) * per_range]
        shares = [float(re.findall(r"([\d.e-]+)\s% of the predicted", title)[0]) for title in own]
        flat = [error for layer in errors for error in layer]
        assert shares == pytest.approx([100 * error / sum(flat) for error in flat], rel=0.01)
        assert sum(shares) == pytest.approx(100, abs=1)
    assert titles[1].startswith("transformer_blocks.0.attn, head 1, noise levels 0 to 0.55: F, fovea:0.2; ")


def test_the_darker_the_dearer(plan: Plan) -> None:
    page = Page(plan_page(plan))
    by_letter = {code: float(re.findall(r"--got:hsl\(212 65% (\d+)%\)", given["style"])[0]) for given, code in page.cells}
    assert [by_letter[code] for code in sorted(by_letter)] == sorted(by_letter.values(), reverse=True)
    dark = {(given["style"].split("--err:")[1], given["title"]) for given, _ in page.cells}
    lightness = {float(re.findall(r"80% (\d+)%", style)[0]) for style, _ in dark}
    assert min(lightness) == 37  # the largest share of each range
    assert max(lightness) > 80


def test_the_numbers_are_in_the_tables(plan: Plan) -> None:
    page, made = Page(plan_page(plan)), plan.outcome
    rows = page.beginning("", "cost")[1:]
    assert rows[0] == ["this plan", percent(made.cost), percent(made.predicted), "4.85\xa0% [4.51\xa0%,\xa05.24\xa0%]"]
    assert len(rows) == 1 + len(plan.curve)
    assert ["uniform: B, fovea:0.05", "8.23\xa0%", "10\xa0%", "11\xa0% [10.2\xa0%,\xa011.9\xa0%]"] in rows
    assert [row[3].split("\xa0")[0] for row in page.table("round")] == ["5.8", "4.85"]
    assert [row[2] for row in page.table("measured at")] == [percent(error) for error in made.by_range]
    kept = dict(page.table("what it keeps at every size"))
    assert kept["B, fovea:0.05"] == "up to 5\xa0% of the blocks"
    assert len(kept) == len({n for rows in plan.chosen for row in rows for n in row} - {0})  # all but the original attention, once
    for text in (
        plan.model.weights,
        plan.prompts.sha256,
        "4 measured and 2 held out",
        "6.42×",
        "≤ 5\xa0%",
        "1,024 and 4,096 image tokens",
        "sketch",
    ):
        assert text in page.text


def test_a_page_has_no_script_and_loads_nothing(plan: Plan, tmp_path: Path) -> None:
    text = write_plan_page(plan, tmp_path / "plan.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "default-src 'none'" in text
    assert "url(" not in text
    assert "http" not in text.replace("http-equiv", "")


def test_names_are_text() -> None:
    plan = Plan.load(EXAMPLE)
    evil = "<script>alert(1)</script>\"'&"
    layers = tuple(replace(layer, name=evil) for layer in plan.layers)
    model = replace(plan.model, pipeline=evil, transformer=evil, loras={evil: evil})
    curve = (*plan.curve, Point("uniform", evil, 0.3, 0.1, None))
    page = Page(plan_page(replace(plan, layers=layers, model=model, curve=curve)))
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6


def changed(plan: Plan, **fields: Any) -> Page:
    return Page(plan_page(replace(plan, **fields)))


def test_other_plans(plan: Plan) -> None:
    page = changed(plan, asked=Asked(None, 3.0))
    assert "3×less attention, asked for" in page.text
    assert "asked for: " not in page.text
    alone = Interval(0.0485, None, None)
    page = changed(plan, outcome=replace(plan.outcome, verified=alone), prompts=replace(plan.prompts, held_out=1))
    assert "verified on 1 held-out prompt" in page.text
    assert page.beginning("", "cost")[1][3] == "4.85\xa0%"
    page = changed(plan, scaling=Scaling((4096,), ()))
    assert "Measured with 4,096 image tokens; other sizes are extrapolated." in page.text
    candidates = list(plan.candidates)
    number = 1
    for spec, words in (
        (Fovea(blocks=1), "1 block of 64 tokens"),
        (Fovea(radius=8), "the same places in tokens around each query"),
        (replace(Fovea(), keep=(TopK(0.1, blocks=3),)), "up to 10\xa0% of the blocks and 3 blocks of 64 tokens"),
        (
            replace(Fovea(), keep=(*Fovea(radius=8).keep, TopK(0.0, blocks=1))),
            "the same places in tokens around each query and 1 block of 64 tokens",
        ),
    ):
        candidates[number] = Candidate(spec, 0.05)
        assert words in [row[1] for row in changed(plan, candidates=tuple(candidates)).table("what it keeps at every size")]
    trained = changed(plan, trained=Learned("conv", "0" * 64))
    assert f"conv, SHA-256 {'0' * 64}" in trained.text
    assert "adapter" not in Page(plan_page(plan)).text
    page = changed(plan, curve=tuple(replace(point, verified=None) for point in plan.curve))
    assert "the curve and the settings are as predicted" in page.text
    assert "as verified, this" in Page(plan_page(plan)).text
    none = tuple(tuple(tuple(0.0 for _ in layer) for layer in of_range) for of_range in plan.errors)
    assert "0\xa0% of the predicted squared error" in changed(plan, errors=none).cells[0][0]["title"]
    chosen = tuple((of_range[0][:2], *of_range[1:]) for of_range in plan.chosen)
    errors = tuple((of_range[0][:2], *of_range[1:]) for of_range in plan.errors)
    layers = (LayerHeads("first", 2), *plan.layers[1:])
    page = changed(plan, chosen=chosen, errors=errors, layers=layers)  # layers of two numbers of heads
    assert [len(row) for row in page.beginning("head")] == [5, 3, 5, 5, 5, 5, 5]


def test_the_chart_is_logarithmic_and_joins_what_is_planned() -> None:
    marks = [
        Mark("planned", 0.1, 0.02, 0.01, 0.04, "", "one"),
        Mark("planned", 0.4, 0.005, None, None, "", "two"),
        Mark("uniform", 0, 0, None, None, "Z", "none"),
    ]
    text = curve_chart(marks, 0.01, "cost", "error")
    circles = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', text)]
    (line,) = re.findall(r'points="([^"]+)"', text)
    assert [tuple(map(float, point.split(","))) for point in line.split()] == circles
    assert len(circles) == 2
    x, y = Axis.around([0.1, 0.4], 70, 730), Axis.around([0.005, 0.04], 375, 20)
    assert circles[0] == pytest.approx((x.at(0.1), y.at(0.02)), abs=0.06)
    assert x.at(0.2) == pytest.approx((x.at(0.1) + x.at(0.4)) / 2)
    assert y.at(0.04) < y.at(0.02)
    assert x.ticks() == pytest.approx([0.09, 0.1, 0.2, 0.3, 0.4])
    low, high = (float(value) for value in re.findall(r'<line x1="[\d.]+" x2="[\d.]+" y1="([\d.]+)" y2="([\d.]+)"/>', text)[0])
    assert (low, high) == pytest.approx((y.at(0.01), y.at(0.04)), abs=0.06)
    assert f'y1="{y.at(0.01):.1f}"' in text.split('class="budget"')[1]
    assert math.isclose(y.at(0.005) - y.at(0.01), y.at(0.01) - y.at(0.02))
    assert curve_chart([], 0.1, "cost", "error") == ""


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.004, 0.3, [0.005, 0.01, 0.02, 0.05, 0.1, 0.2]),
        (0.11, 0.24, [0.12, 0.14, 0.16, 0.18, 0.2, 0.22, 0.24]),
        (0.45, 0.83, [0.5, 0.6, 0.7, 0.8]),
        (0.97, 1.03, [0.97, 0.98, 0.99, 1.0]),
    ],
)
def test_an_axis_has_numbers_however_short_it_is(low: float, high: float, ticks: list[float]) -> None:
    assert Axis(low, high, 0, 1).ticks() == pytest.approx(ticks)


def test_labels_of_points_in_one_place_are_next_to_each_other() -> None:
    marks = [Mark("uniform", 0.1, 0.2, None, None, label, "") for label in "ABC"] + [Mark("uniform", 0.5, 0.1, None, None, "D", "")]
    places = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="[\d.]+">[A-D]<', curve_chart(marks, None, "cost", "error"))]
    assert [b - a for a, b in itertools.pairwise(places[:3])] == pytest.approx([14, 14])
    assert places[3] > places[2] + 100


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (None, "original"),
        (Fovea(0.05), "fovea:0.05"),
        (Fovea(radius=8), "fovea:radius=8"),
        (Fovea(0.1, tile=(2, 8, 8)), "fovea:0.1,tile=2x8x8"),
        (CLEAR(16), "clear:16"),
        (CLEAR((2, 8, 8)), "clear:2x8x8"),
        (SLA(0.1), "sla:0.1"),
        (GNA(9), "gna:9"),
        (GNA((80, 80), stride=16), "Window(size=(80, 80), stride=16) + Tiles()"),
        (AttentionSpec((TopK(0.05),), order=Raster()), "TopK(density=0.05) + Raster()"),
    ],
)
def test_methods_are_called_as_users_type_them(spec: AttentionSpec | None, name: str) -> None:
    assert short_name(spec) == name
