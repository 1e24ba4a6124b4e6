"""MkDocs' hooks: the site has the repository's own pages at their own paths, so that one link works on GitHub and on the site.

README.md is the front page. A source file that a page links to becomes a page that shows it.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/*.md",
    "benchmarks/*.md",
    "pipelines/*/TRAINING.md",
    "pipelines/*/weights/*.md",
)
SHOWN = ("docs/site.css", "samples/*.gif", "samples/*.jpg", "samples/*.png", "pipelines/*/weights/*.jpg", "pipelines/*/weights/*.gif")
LINK = re.compile(r"(?<=\]\()([^)\s#]+\.py)(?=[)#])")


def _sources(page: Path) -> set[Path]:
    """The source files that a page links to."""
    found = {(page.parent / link).resolve() for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link}
    return {path for path in found if path.is_file()}


def on_files(files: Files, config: Any) -> Files:
    """Put the repository's pages and pictures in the place of those in docs/; the theme's own files stay."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    pages = [path for pattern in PAGES for path in sorted(ROOT.glob(pattern))]
    for path in [*pages, *(path for pattern in SHOWN for path in sorted(ROOT.glob(pattern)))]:
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    for path in sorted(set().union(*map(_sources, pages))):
        name = path.relative_to(ROOT).as_posix()
        text = f"---\nsearch: {{exclude: true}}\n---\n# {name}\n\n````python\n{path.read_text(encoding='utf-8')}````\n"
        shown = File.generated(config, f"{name}.md", content=text)
        shown.inclusion = InclusionLevel.NOT_IN_NAV
        files.append(shown)
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links to source files lead to the pages that show them; a comment that marks a table ends before the table begins.

    A search for a name finds the reference first, and the changelog last.
    """
    if weight := {"docs/api.md": 4, "docs/api-parts.md": 4, "CHANGELOG.md": 0.2}.get(page.file.src_uri):
        page.meta["search"] = {"boost": weight}
    linked = LINK.sub(r"\1.md", markdown)
    return re.sub(r"^(<!-- .* -->)\n(?=\|)", r"\1\n\n", linked, flags=re.M)
