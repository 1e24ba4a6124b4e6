"""The site: built with warnings as errors, everything public is in its reference, and it works in a browser without any other host."""

import functools
import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from test_cli import ROOT

import dit_accel
import dit_accel.errors
import dit_accel.method

pytestmark = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="requires mkdocs: pip install 'dit-accel[docs]'")

REFERENCE = ("docs/api.md", "docs/api-parts.md")


def build(out: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(config), "--site-dir", str(out)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"})


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("site")
    done = build(out)
    assert done.returncode == 0, done.stderr
    return out


class Read(HTMLParser):
    """What a page loads, where it links to, the places in it, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.links: list[str] = []
        self.places: set[str] = set()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loaded = given.get("src") or (
            given.get("href") if tag == "link" and given.get("rel") not in ("canonical", "next", "prev") else None
        )
        self.loads += [loaded] if loaded else []
        self.links += [given["href"] or ""] if tag == "a" and "href" in given else []
        self.places |= {place for place in (given.get("id"), given.get("name")) if place}

    def handle_data(self, data: str) -> None:
        self.text += data


def named() -> list[str]:
    """What the pages of the reference name, in their order."""
    return [name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.M)]


def test_everything_public_is_in_the_reference_once() -> None:
    found = named()
    assert len(set(found)) == len(found) > 100
    shown = {name.rpartition(".")[2] for name in found}
    errors = {name for name, kind in vars(dit_accel.errors).items() if isinstance(kind, type)}
    types = {"Boxes", "Grid"}  # names of types, which the page says in words
    assert ({*dit_accel.__all__, *dit_accel.method.__all__} | errors) - types - shown == set()


def test_what_is_public_has_a_purpose_in_one_line() -> None:
    """The first line of a docstring is a sentence by itself, as lists and tooltips show it."""
    for name in dit_accel.__all__:
        first = (getattr(dit_accel, name).__doc__ or "").split("\n")[0]
        assert first, name
        assert len(first) > 20, name


@pytest.mark.parametrize("page", REFERENCE)
def test_each_name_of_the_reference_has_its_text(site: Path, page: str) -> None:
    read = Read(site / page.replace(".md", ".html"))
    named = re.findall(r"^::: (\S+)$", (ROOT / page).read_text(), re.M)
    assert [name for name in named if name not in read.places] == []
    assert ":::" not in read.text


def test_the_reference_has_arguments_shapes_and_errors(site: Path) -> None:
    text = " ".join(Read(site / "docs" / "api.html").text.split())
    for part in (
        "layers: Callable",
        "[B, H, N, D]",
        "Raises UnsupportedModelError",
        "gradient_checkpointing",
        "dit_accel.set_float32_attention_precision",
    ):
        assert part in text
    assert "density: float" in " ".join(Read(site / "docs" / "api-parts.html").text.split())


def test_every_page_is_reached_from_the_front_page_and_every_link_leads_somewhere(site: Path) -> None:
    pages = {path: Read(path) for path in site.rglob("*.html") if path.name != "404.html"}
    seen, open_pages, broken = set(), [site / "index.html"], []
    while open_pages:
        page = open_pages.pop()
        if page in seen:
            continue
        seen.add(page)
        for link in pages[page].links:
            name, _, place = link.partition("#")
            target = (page.parent / name).resolve() if name else page
            if "://" in link:
                continue
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (target.suffix == ".html" and place and place not in pages[target].places):
                broken.append(f"{page.relative_to(site)}: {link}")
            elif target.suffix == ".html":
                open_pages.append(target)
    assert broken == []
    assert set(pages) - seen == set()
    assert len(seen) > 25


def test_pages_load_nothing_from_another_host(site: Path) -> None:
    for path in site.rglob("*.html"):
        assert [name for name in Read(path).loads if "//" in name] == []


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert "\nhooks:" in config
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text("[gone](gone.md), [place](#gone)\n")
    config = re.sub(r"^(hooks|watch):.*\n", "", config, flags=re.M)
    config = re.sub(r"^nav:\n(?:[ ].*\n)+", "", config, flags=re.M)
    (tmp_path / "mkdocs.yml").write_text(config)
    done = build(tmp_path / "out", tmp_path / "mkdocs.yml")
    assert done.returncode != 0
    assert "'gone.md'" in done.stderr
    assert "#gone" in done.stderr


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the site is served on this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Any]:
    """A page of the browser; at the end nothing may have been logged, failed, or been asked of another host."""
    wrong: list[str] = []
    context = chromium.new_context(viewport={"width": 1300, "height": 900})
    page = context.new_page()
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda response: wrong.append(f"{response.status} {response.url}") if response.status >= 400 else None)
    page.on("request", lambda request: wrong.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None)
    yield page
    context.close()
    assert wrong == []


@pytest.mark.browser
def test_the_front_page_is_the_readme_with_its_picture(page: Any, address: str) -> None:
    page.goto(address)
    assert page.inner_text("h1").startswith("dit_accel")
    assert page.evaluate("document.querySelector('article img').naturalWidth") > 500
    page.click("article a:has-text('docs/choose.md') >> nth=0")
    page.wait_for_url("**/docs/choose.html")
    assert page.inner_text("h1").startswith("Which method")


@pytest.mark.browser
def test_the_reference_is_reached_and_shows_a_signature(page: Any, address: str) -> None:
    page.goto(address)
    page.click("nav.md-tabs a:has-text('Reference')")
    page.wait_for_url("**/docs/api.html")
    text = page.inner_text("article")
    assert "accelerate(" in text
    assert "dense_steps" in text
    page.goto(f"{address}docs/api.html#dit_accel.generate_hires")
    assert page.evaluate("Math.abs(document.getElementById('dit_accel.generate_hires').getBoundingClientRect().top) < 400")


@pytest.mark.browser
def test_the_search_finds_a_function(page: Any, address: str) -> None:
    page.goto(address)
    page.click("input.md-search__input")
    page.locator("input.md-search__input").press_sequentially("generate_hires")
    first = page.locator(".md-search-result__item").first
    first.wait_for(timeout=30_000)
    assert first.locator("a[href*='docs/api.html'][href*='#dit_accel.generate_hires']").count() == 1
    first.locator("a").first.click()
    page.wait_for_url("**/docs/api.html*")
    assert "generate_hires(" in page.inner_text("article")


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index.html", "docs/api.html", "docs/api-parts.html", "docs/methods.html"])
def test_pages_fit_a_phone(chromium: Any, address: str, name: str, scheme: str) -> None:
    context = chromium.new_context(viewport={"width": 360, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address + name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    context.close()
