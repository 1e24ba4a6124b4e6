"""The pages in a real Chromium: `dit-accel view`'s, clicked and driven by keys, and a plan's. Skipped where there is no Chromium."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distill_fixtures import picture_pipe
from test_plan_page import EXAMPLE
from test_view import PROMPT, SMALL, edit_pipe, video_pipe
from view_fixtures import CALL, Page

from dit_accel import CLEAR, Assignment, Fovea, Rule, accelerate, view_attention
from dit_accel.planner.pages import write_plan_page
from dit_accel.planner.record import Plan

pytestmark = pytest.mark.browser

Opened = Callable[..., Any]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Opened]:
    """Opens a file; at the end nothing may have been logged, and nothing but the file loaded."""
    logged: list[str] = []
    contexts: list[Any] = []

    def open_file(path: Path, **settings: Any) -> Any:
        context = chromium.new_context(**({"viewport": {"width": 1100, "height": 900}} | settings))
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: logged.append(str(error)))
        page.on("request", lambda request: logged.append(request.url) if not request.url.startswith(("data:", path.as_uri())) else None)
        page.goto(path.as_uri())
        return page

    yield open_file
    for context in contexts:
        context.close()
    assert logged == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of two layers, two heads and two steps; head 1 is a disc, and all are the original in step 0."""
    assignment = Assignment((Rule(Fovea(0.3, **SMALL)), Rule(CLEAR(2.5, **SMALL), heads=(1,)), Rule(None, steps=(0, 1))))
    pipe = accelerate(picture_pipe(), assignment)
    out = tmp_path_factory.mktemp("view") / "view.html"
    return view_attention(pipe, PROMPT, out, layers=[0, 1], heads=[0, 1], steps=[0, 2], seed=3, **CALL)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipe, call = video_pipe("wan")
    accelerate(pipe, CLEAR(1.5, tile=(2, 4, 4)))
    return view_attention(pipe, "a panda", tmp_path_factory.mktemp("video") / "view.html", layers=1, steps=1, **call)


def click(page: Any, canvas: str, row: int, column: int, grid: tuple[int, int]) -> None:
    """Click the middle of a token."""
    box = page.locator(f"#{canvas}").bounding_box()
    page.mouse.click(box["x"] + box["width"] * (column + 0.5) / grid[1], box["y"] + box["height"] * (row + 0.5) / grid[0])


def shares(page: Any) -> dict[str, float]:
    return page.evaluate("Object.fromEntries([...document.querySelectorAll('#shares li')].map((x) => [x.dataset.name, +x.dataset.share]))")


def where(page: Any) -> str:
    return page.inner_text("#where")


def choose(page: Any, **chosen: object) -> None:
    for name, value in chosen.items():
        page.select_option(f"#{name}", str(value))


def test_a_click_shows_what_the_token_keeps(opened: Opened, picture: Path) -> None:
    page, data = opened(picture), Page.read(picture)
    choose(page, layer="single_transformer_blocks.0.attn", step=2)
    for head in (0, 1):
        choose(page, head=head)
        (view,) = [
            view for view in data.views if (view["layer"], view["head"], view["step"]) == ("single_transformer_blocks.0.attn", head, 2)
        ]
        weights, kept = data.weights(view), data.kept(view)
        for canvas, row, column in (("left", 2, 3), ("right", 6, 8)):
            click(page, canvas, row, column, (7, 9))
            assert where(page) == f"Token at row {row + 1}, column {column + 1}"
            token = row * 9 + column
            text, image = weights[token, :8].sum(), (weights[token, 8:] * kept[token]).sum()
            assert shares(page) == pytest.approx({"text": text, "image": image, "rest": 1 - text - image}, abs=1e-6)
        assert ("estimated" in page.inner_text("#shares")) == (head == 0)
        assert ("lost" in page.inner_text("#shares")) == (head == 1)
    assert page.inner_text("#ran") == f"clear:2.5,tile=4x4, noise level {view['noise']:.2f}"
    assert page.evaluate("document.querySelectorAll('#text li .word')[1].textContent") == "cat"


def test_all_tokens_are_those_of_the_data(opened: Opened, picture: Path, video: Path) -> None:
    for path in (picture, video):
        page, data = opened(path), Page.read(path)
        data.views[:] = data.views[-2:]
        script = """() => {
            const data = JSON.parse(document.getElementById("data").textContent), read = makeReader(data.arrays);
            return data.views.slice(-2).map((_, n, views) => {
                const view = readView(data, read, data.views.length - views.length + n), tokens = [...Array(view.image).keys()];
                return [tokens.map((t) => [...weightsOf(view, t)]), tokens.map((t) => [...keptOf(view, t)])];
            });
        }"""
        for view, (weights, kept) in zip(data.views, page.evaluate(script), strict=True):
            assert np.allclose(weights, data.weights(view), atol=1e-9)
            assert np.array_equal(np.array(kept, bool), data.kept(view))


def test_keys_move_the_token(opened: Opened, picture: Path) -> None:
    page = opened(picture)
    assert where(page) == "Token at row 4, column 5"  # the middle
    page.focus("#left")
    for key, place in [
        ("ArrowUp", (3, 5)), ("ArrowLeft", (3, 4)), ("ArrowDown", (4, 4)), ("ArrowRight", (4, 5)), ("Shift+ArrowRight", (4, 9)),
        ("ArrowRight", (4, 9)), ("Home", (4, 1)), ("End", (4, 9)), ("PageUp", (1, 9)), ("PageDown", (7, 9)),
    ]:  # fmt: skip
        page.keyboard.press(key)
        assert where(page) == f"Token at row {place[0]}, column {place[1]}"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "right"
    page.keyboard.press("ArrowLeft")
    assert where(page) == "Token at row 7, column 8"


def pixels(page: Any, canvas: str) -> np.ndarray:
    """The mean colour of the middle of each token of a 7 × 9 grid, `[7, 9, 3]`."""
    script = """(id) => {
        const canvas = document.getElementById(id), [h, w] = [7, 9], context = canvas.getContext("2d"), found = [];
        for (let y = 0; y < h; y++) for (let x = 0; x < w; x++) {
            const side = canvas.width / w, data = context.getImageData((x + 0.35) * side, (y + 0.35) * side, 0.3 * side, 0.3 * side).data;
            for (let c = 0; c < 3; c++) found.push(data.filter((_, i) => i % 4 === c).reduce((a, b) => a + b) / (data.length / 4));
        }
        return found;
    }"""
    return np.array(page.evaluate(script, canvas)).reshape(7, 9, 3)


def test_the_pictures_show_it(opened: Opened, picture: Path) -> None:
    page, data = opened(picture), Page.read(picture)
    choose(page, layer="transformer_blocks.0.attn", head=1, step=2)
    (view,) = [view for view in data.views if (view["layer"], view["head"], view["step"]) == ("transformer_blocks.0.attn", 1, 2)]
    click(page, "left", 3, 4, (7, 9))
    page.wait_for_function("document.getElementById('left').width > 300")
    token, shown = 3 * 9 + 4, pixels(page, "left").sum(-1)
    kept = data.kept(view)[token].reshape(7, 9)
    assert 0 < kept.sum() < 63
    choose(page, head=0, step=0)  # the original keeps all: the picture itself
    whole = pixels(page, "left").sum(-1)
    other = np.ones((7, 9), bool)
    other[3, 4] = False  # under the mark
    assert np.allclose(shown[kept & other], whole[kept & other], atol=12)
    assert (shown[~kept] < 0.35 * whole[~kept] + 30).all()
    choose(page, head=1, step=2)
    heat = pixels(page, "right").sum(-1)[other]
    weights = data.weights(view)[token, 8:].reshape(7, 9)[other]
    assert np.corrcoef(heat.argsort().argsort(), weights.argsort().argsort())[0, 1] > 0.9
    choose(page, shown="mass")
    mass = data.shares(view, "kept").reshape(7, 9)[other]
    assert np.corrcoef(pixels(page, "left").sum(-1)[other].argsort().argsort(), mass.argsort().argsort())[0, 1] > 0.9
    page.click("#worst")
    worst = int(data.shares(view, "error").argmax())
    assert where(page) == f"Token at row {worst // 9 + 1}, column {worst % 9 + 1}"


def test_pointing_tells_one_weight(opened: Opened, picture: Path) -> None:
    page = opened(picture)
    box = page.locator("#right").bounding_box()
    page.mouse.move(box["x"] + 3, box["y"] + 3)
    assert page.inner_text("#under").startswith("Row 1, column 1: ")
    assert page.inner_text("#under").endswith(("kept", "estimated"))


def test_a_video_has_frames(opened: Opened, video: Path) -> None:
    page = opened(video)
    assert page.inner_text("#frame-number") == "2 of 3"
    assert not page.is_visible("#text-field")
    page.focus("#left")
    page.keyboard.press("PageDown")
    assert where(page) == "Token at frame 3, row 2, column 2"
    page.focus("#frame")
    page.keyboard.press("Home")
    assert where(page) == "Token at frame 1, row 2, column 2"
    assert sum(shares(page).values()) == pytest.approx(1)
    assert set(shares(page)) == {"image", "rest"}


def test_a_reference_image_has_a_board_of_its_own(opened: Opened, tmp_path: Path) -> None:
    pipe, call = edit_pipe()
    accelerate(pipe, Fovea(0.3, **SMALL))
    path = view_attention(pipe, "make it red", tmp_path / "view.html", layers=1, **call)
    page, data = opened(path), Page.read(path)
    (_, h, w), (_, rows, columns) = data.layout(data.views[0])["grids"]
    choose(page, grid=1)
    page.focus("#left")
    for key in ("Home", "PageUp"):
        page.keyboard.press(key)
    assert where(page) == "Token at row 1, column 1"
    weights = data.weights(data.views[0])[h * w]  # the first token of the second image
    assert shares(page)["text"] == pytest.approx(weights[:12].sum(), abs=1e-6)
    assert page.evaluate("document.getElementById('left').width / document.getElementById('left').height") == pytest.approx(columns / rows)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1100])
def test_pages_fit_their_window_in_light_and_dark(opened: Opened, picture: Path, tmp_path: Path, scheme: str, width: int) -> None:
    plan = write_plan_page(Plan.load(EXAMPLE), tmp_path / "plan.html")
    for path in (picture, plan):
        page = opened(path, color_scheme=scheme, viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ground, ink = (page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color"))
        brightness = [sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in (ground, ink)]
        assert (brightness[0] > 700 > 100 > brightness[1]) if scheme == "light" else (brightness[0] < 100 < 650 < brightness[1])


def test_without_javascript_the_means_and_the_picture_are_there(opened: Opened, picture: Path) -> None:
    page = opened(picture, java_script_enabled=False)
    assert page.is_visible(".still img")
    assert not page.is_visible("#left")
    assert "head 1, step 2: clear:2.5,tile=4x4" in page.inner_text("table")


def test_a_plan_is_coloured_by_what_heads_got_or_by_their_error(opened: Opened, tmp_path: Path) -> None:
    page = opened(write_plan_page(Plan.load(EXAMPLE), tmp_path / "plan.html"), java_script_enabled=False)
    cell = page.locator(".map td").first
    assert cell.inner_text() == "D"
    colours = [cell.evaluate("(cell) => getComputedStyle(cell).backgroundColor")]
    page.check("#by-error")
    colours.append(cell.evaluate("(cell) => getComputedStyle(cell).backgroundColor"))
    blue, red = (list(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) for colour in colours)
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    box = page.locator("svg").bounding_box()
    assert box["width"] > 500
    assert page.locator("svg .chosen").is_visible()
    assert page.locator("svg g.uniform").count() == 8
