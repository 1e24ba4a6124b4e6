"""Markdown tables of what `fovea_forms.py` and `fovea_velocity.py` wrote.

python benchmarks/fovea_tables.py rows chosen.jsonl       # a row for each set, tile, stress and way to keep: today, ratios of the others
python benchmarks/fovea_tables.py forms parts.jsonl ...  # a row for each form: mean and largest ratio to today's error over all of those
python benchmarks/fovea_tables.py velocity velocity.jsonl
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

Rows = dict[tuple[Any, ...], dict[str, list[float]]]  # condition -> form -> relative error of each layer


def read(files: list[str]) -> tuple[Rows, dict[str, float]]:
    """Errors, and for each form the largest ratio to today's in one head of one layer."""
    rows: Rows = defaultdict(lambda: defaultdict(list))
    worst: dict[str, float] = defaultdict(float)
    for line in (line for file in files for line in Path(file).read_text().splitlines()):
        row = json.loads(line)
        for form, errors in row["forms"].items():
            rows[row["set"], row["tile"], row["stress"], row["keep"]][form].append((sum(errors) / sum(row["size"])) ** 0.5)
            pairs = zip(errors, row["forms"]["today"], strict=True)
            worst[form] = max(worst[form], *((mine / max(today, 1e-30)) ** 0.5 for mine, today in pairs))
    return rows, worst


def ratios(rows: Rows, form: str) -> list[float]:
    """Of the mean error to today's, for every condition in which the form was tried."""
    return [statistics.mean(row[form]) / statistics.mean(row["today"]) for row in rows.values() if form in row]


def show(cells: list[Any]) -> None:
    print("| " + " | ".join(f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in cells) + " |")


def by_row(rows: Rows, worst: dict[str, float]) -> None:
    forms = [form for form in worst if form != "today"]
    show(["set", "tile", "logits ×", "kept", "today", *forms])
    show(["---"] * (5 + len(forms)))
    for (name, tile, stress, keep), row in rows.items():
        today = statistics.mean(row["today"])
        show([name, tile, f"{stress:g}", keep, today, *(statistics.mean(row[form]) / today for form in forms)])
    show(["mean", "", "", "", "", *(statistics.mean(ratios(rows, form)) for form in forms)])
    show(["largest", "", "", "", "", *(max(ratios(rows, form)) for form in forms)])
    show(["largest of one head of one layer", "", "", "", "", *(worst[form] for form in forms)])


def by_form(rows: Rows, worst: dict[str, float]) -> None:
    show(["form", "mean ratio", "largest", "largest of one head of one layer"])
    show(["---"] * 4)
    for mean, form in sorted((statistics.mean(ratios(rows, form)), form) for form in worst):
        show([f"`{form}`", mean, max(ratios(rows, form)), worst[form]])


def by_method(files: list[str]) -> None:
    show(["model", "method", "velocity error", "of each forward"])
    show(["---"] * 4)
    for row in (json.loads(line) for file in files for line in Path(file).read_text().splitlines()):
        show([row["model"], row["method"], statistics.mean(row["errors"]), ", ".join(f"{error:.3f}" for error in row["errors"])])


if __name__ == "__main__":
    kind, *files = sys.argv[1:]
    if kind == "velocity":
        by_method(files)
    else:
        {"rows": by_row, "forms": by_form}[kind](*read(files))
