"""The tables of docs/models.md, written from the outcomes of the tests of this run: `pytest tests --matrix docs/models.md`.

A row's cell is "yes" where every test of it passed, "no" where one failed, "-" where there is none. conftest takes these hooks.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# columns of the families' table: heading -> the tests that fill it
COLUMNS = {
    "all kept = original": {"test_keeping_everything_equals_the_original"},
    "methods run, restore is exact": {"test_every_method_runs"},
    "first steps dense": {"test_the_first_steps_are_dense"},
    "two prompts at once": {"test_two_at_a_time_are_two_alone"},
    "padded text masked": {"test_padded_text_changes_nothing", "test_prompts_of_two_lengths_equal_the_original"},
    "adapter loads again": {"test_an_adapter_loads_again"},
}

Outcomes = defaultdict[str, list[bool]]
KEY = pytest.StashKey[tuple[dict[str, Outcomes], dict[str, dict[str, None]]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", metavar="FILE", help="write the tables of this page from the outcomes")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = (defaultdict(lambda: defaultdict(list)), defaultdict(dict))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: Any, call: Any) -> Iterator[None]:
    """Notes on a test's report which cells it fills: (the row, its column, the tiny model); a process of several sends it to the first."""
    report: Any = yield
    if item.config.getoption("--matrix") and (report.when == "call" or not report.passed):
        from tiny_parts import BUILDERS  # it imports triton, which reads the environment that conftest has yet to set

        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        name = parameters.get("name")
        name = name if name in BUILDERS else "flux"  # what test_compose.py and test_patch.py are about
        cells = [("family", column, name) for column, tests in COLUMNS.items() if item.originalname in tests]
        cells += [("together", mark.args[0], name) for mark in item.iter_markers("composes")]
        report.user_properties.append(("cells", cells))
    return report


class Collector:
    """Keeps what the reports of all processes say, in the one that writes the page."""

    def __init__(self, config: pytest.Config) -> None:
        self.outcomes, self.models = config.stash[KEY]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for key, cells in report.user_properties:
            if key == "cells" and (report.when == "call" or not report.passed):
                for kind, what, name in cells:
                    self._add(kind, what, name, report.passed)

    def _add(self, kind: str, what: str, name: str, passed: bool) -> None:
        if kind == "family":
            self.outcomes[f"family {name}"][what].append(passed)
        else:
            self.outcomes[f"together {what}"][""].append(passed)
            self.models[what][name] = None


def pytest_sessionstart(session: pytest.Session) -> None:
    if session.config.getoption("--matrix") and not hasattr(session.config, "workerinput"):
        session.config.pluginmanager.register(Collector(session.config))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--matrix")
    if not path or session.config.option.collectonly or hasattr(session.config, "workerinput"):
        return
    outcomes, models = session.config.stash[KEY]
    page = Path(path).read_text(encoding="utf-8")
    for name, table in (("families", families(outcomes)), ("together", together(outcomes, models))):
        page, count = re.subn(rf"(<!-- tests: {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}\n{t}\n{m[2]}", page, flags=re.S)
        if count != 1:
            raise pytest.UsageError(f"{path} must have one place between '<!-- tests: {name} -->' and '<!-- end -->', not {count}")
    Path(path).write_text(page, encoding="utf-8")


def _cell(outcomes: list[bool]) -> str:
    return "-" if not outcomes else "yes" if all(outcomes) else "no"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [head, ["---"] * len(head), *rows])


def families(outcomes: dict[str, Outcomes]) -> str:
    """A row per tiny pipeline that the tests build, or loop in its place."""
    from test_families import LOOPS, NAMES, Tiny

    rows = []
    for name in sorted(NAMES):
        tiny = Tiny(name)
        classes = ", ".join(dict.fromkeys(type(t).__name__ for t in tiny.transformers))
        pipeline = "a loop of steps" if name in LOOPS else f"`{type(tiny.pipe).__name__}`"
        cells = [_cell(outcomes[f"family {name}"][column]) for column in COLUMNS]
        rows.append([name.replace("_", " "), pipeline, f"`{classes}`", *cells])
    return _table(["tested as", "pipeline", "transformer", *COLUMNS], rows)


def together(outcomes: dict[str, Outcomes], models: dict[str, dict[str, None]]) -> str:
    """A row per thing that acceleration works together with."""
    rows = [[what, ", ".join(sorted(models[what])), _cell(outcomes[f"together {what}"][""])] for what in sorted(models, key=str.lower)]
    return _table(["together with", "on tiny models of", "works"], rows)
