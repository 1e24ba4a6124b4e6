"""The tables of README.md and docs, from the JSON files in this folder; each function is given the folder and gives the table's lines."""

import functools
import json
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

METHODS = {  # a spec as the files name it -> its name in the step table
    "TopK(density=0.05, score=ErrorProduct()) + Pooled() + Mass() + Tiles()": "Fovea 5 %",
    "TopK(density=0.05, correct_short=True) + Pooled() + Mass() + Tiles()": "Fovea 5 %",  # as it was chosen before
    "DiscBlocks(radius=8) + Pooled() + Mass() + Tiles()": "Fovea radius 8",
    "Disc(radius=8) + Tiles()": "CLEAR radius 8",
    "TopK(density=0.1) + Linear() + Residual() + Raster()": "SLA 10 %",
}
KERNELS = {"dense: Fovea density 1": "everything kept (Fovea density 1)"}
HIDDEN_KERNELS = ("dense: SLA density 1, no linear branch", "dense: CLEAR past the grid")
PRESETS = {  # preset of the quality file -> its name in the table; bold ones need no training
    "top-k 5 %, tiles": "top-k 5 %, tiles", "SLA 10 %": "SLA 10 %", "CLEAR radius 8": "CLEAR radius 8",
    "CLEAR radius 16": "CLEAR radius 16", "GNA window 17": "GNA window 17", "Fovea 2 %": "**Fovea 2 %**", "Fovea 5 %": "**Fovea 5 %**",
    "Fovea radius 8": "**Fovea radius 8**", "Fovea 5 % without log n": "Fovea 5 % without `log n`",
    "Fovea 5 %, raster order": "Fovea 5 % in raster order",
}  # fmt: skip
COMBINED = {  # a method of recovery.json -> its name in the table of methods of like cost
    "sla:0.125": "SLA 12.5 %", "sla-pooled.json": "SLA's choice with pooled keys as the rest",
    "clear:6,tile=4x4": "CLEAR radius 6, tiles of 4×4",
    "clear-pooled.json": "discs of radius 5, whole tiles of 4×4, pooled keys",
}  # fmt: skip
PARALLEL = {"clear:8": "CLEAR radius 8", "fovea:radius=8": "Fovea radius 8", "fovea:0.05": "Fovea 5 %"}
TRAINED = {"fovea:0.05": "Fovea 5 %", "clear:8": "CLEAR radius 8", "sla:0.05": "SLA 5 %"}


def read(file: Path) -> dict[str, Any]:
    """A JSON file."""
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def lines(head: Sequence[str], rows: Sequence[Sequence[str]], record: dict[str, Any] | None = None) -> str:
    """A table in Markdown, and under it the machine of the file that it is from, where that says it."""
    made = [[f" {cell} " if cell else " " for cell in row] for row in [head, *rows]]
    made.insert(1, ["---"] * len(head))
    machine = (record or {}).get("machine")
    return "\n".join(f"|{'|'.join(row)}|" for row in made) + (f"\n\n*{described(machine)}*" if machine else "")


def described(machine: dict[str, Any]) -> str:
    """Processor or card, and version."""
    kernels = f" ({machine['target']})" if "target" in machine else ""
    place = machine.get("gpu") or f"{machine['processor']}{kernels}, {machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{place}, torch {machine['torch']}."


def figures(value: float, digits: int = 3) -> str:
    """A number with so many digits that count: 0.91, 2.62, 13.5, 194."""
    places = digits - 1 - (len(str(int(value))) - 1 if value >= 1 else 0)
    return f"{value:.{max(0, places)}f}"


def seconds(value: float) -> str:
    """37 ms, 1.34 s, 22.2 s."""
    return f"{round(value * 1000)} ms" if value < 0.9995 else f"{figures(value)} s"


def times(value: float, places: int) -> str:
    """1.9×, 27×."""
    return f"{value:.{places if value < 9.95 else 0}f}×"


def step(folder: Path, file: str = "step.json") -> str:
    """Seconds of a step by method and size, and attention's share."""
    rows = read(folder / file)["rows"]
    sizes = list(dict.fromkeys(tuple(row["size"]) for row in rows))
    first = {tuple(row["size"]): row for row in rows}

    def original(row: dict[str, Any]) -> str:
        value = row["original"]
        return f"{figures(value) if value >= 1 else f'{value:.2f}'} s ({row['original_share']:.0%})".replace("%", " %")

    def cell(row: dict[str, Any]) -> str:
        ratio = row["original"] / row["accelerated"]
        text = f"{figures(ratio) if ratio >= 1 else f'{ratio:.2f}'}×"
        return f"{f'**{text}**' if ratio < 1 else text} ({row['accelerated_share']:.0%})".replace("%)", " %)")

    made = [["original", *(original(first[size]) for size in sizes)]]
    for spec, name in METHODS.items():
        if not any(row["method"] == spec for row in rows):
            continue
        made.append([name, *(cell(next(r for r in rows if r["method"] == spec and tuple(r["size"]) == size)) for size in sizes)])
    return lines(["step", *(f"{width}×{height}" for height, width in sizes)], made, read(folder / file))


def kernels(folder: Path, file: str = "kernels.json", dtype: str | None = None) -> str:
    """Time of the operator against SDPA's; of one dtype, or of all."""
    made = []
    for row in read(folder / file)["rows"]:
        if row["method"] in HIDDEN_KERNELS or row["dtype"] != (dtype or row["dtype"]):
            continue
        name = KERNELS.get(row["method"], row["method"]) + (f", {row['text']} text tokens" if row["text"] else "")
        ratios = [times(row[key], 1 if row["tokens"] <= 4096 else 0) for key in ("ratio", "ideal")]
        made.append([name, f"{row['tokens']:,}", row["pass"], seconds(row["sdpa_seconds"]), seconds(row["seconds"]), *ratios])
    return lines(["operator", "tokens", "pass", "SDPA", "ours", "ratio", "ideal"], made, read(folder / file))


def recovery(folder: Path) -> str:
    """Errors by method and by what is trained."""
    record = read(folder / "recovery.json")
    made = []
    for method, name in TRAINED.items():
        rows = {row["train"]: row for row in record["rows"] if row["method"] == method}
        cells = [_after(rows[train]) for train in ("parameters", "lora", "attention")]
        made.append([name, f"{rows['attention']['error_untrained']:.3f}", *cells, _psnr(rows["attention"])])
    return lines(["method", "untrained", "own parameters", "LoRA", "attention's weights", "PSNR, dB"], made, record)


def combinations(folder: Path) -> str:
    """Errors of methods of like cost before and after as many steps, the best first."""
    record = read(folder / "recovery.json")
    rows = sorted((row for row in record["rows"] if row["method"] in COMBINED), key=lambda row: float(row["error_after"]))
    made = []
    for row in rows:
        cost = f"{row['multiply_adds']:.1%}".replace("%", " %")
        made.append([COMBINED[row["method"]], cost, f"{row['error_untrained']:.3f}", _after(row), _psnr(row)])
    return lines(["method", "multiply-adds", "untrained", f"after {record['settings']['train_steps']} steps", "PSNR, dB"], made, record)


def _after(row: dict[str, Any]) -> str:
    """The error after a training, and the share that is gone."""
    return "none" if "impossible" in row else f"{row['error_after']:.3f} ({row['recovered']:.0%})".replace("%", " %")


def _psnr(row: dict[str, Any]) -> str:
    return f"{row['psnr']['untrained']:.1f} → {row['psnr']['after']:.1f}"


def quality(folder: Path) -> str:
    """Errors without any training."""
    presets = read(folder / "quality.json")["presets"]
    made = []
    for preset, name in PRESETS.items():
        row = presets[preset]
        shares = [f"{row[key]:.1%}".replace("%", " %") for key in ("density_kept", "multiply_adds")]
        made.append([name, *(f"{row[key]:.3f}" for key in ("attention_error", "velocity_error")), f"{row['kept_mass']:.2f}", *shares])
    return lines(
        ["method", "attention error", "velocity error", "softmax mass kept", "density kept", "multiply-adds"],
        made,
        read(folder / "quality.json"),
    )


def video(folder: Path) -> str:
    """Seconds of whole videos, and how close they are to the original's."""
    rows = read(folder / "video.json")["rows"]
    made = [["original", figures(rows[0]["original"]), *[""] * 4]]
    for row in rows:
        error = f"{row['held_out_error']:.3f}" + (f" (untrained {row['untrained_error']:.3f})" if "untrained_error" in row else "")
        ratio = f"{row['original'] / row['accelerated']:.2f}×"
        made.append([row["name"], figures(row["accelerated"]), ratio, f"{row['psnr']:.1f}", f"{row['change']:.2f}", error])
    return lines(["method", "seconds", "ratio", "PSNR, dB", "change", "held-out velocity error"], made, read(folder / "video.json"))


def evaluate(folder: Path) -> str:
    """Errors of the prediction with their intervals."""
    rows = read(folder / "evaluate.json")["rows"]
    return lines(
        ["", "velocity error"],
        [[row["name"], f"{row['mean']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"] for row in rows],
        read(folder / "evaluate.json"),
    )


def milliseconds(value: float) -> str:
    """0.372 ms, 19.1 ms."""
    return f"{figures(value)} ms"


def gpu(folder: Path) -> str:
    """Time of the operator on a GPU by shape, and its ratio to the fastest dense attention."""
    rows = [row for row in read(folder / "gpu-h100.json")["rows"] if not row["method"].startswith("Flex")]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    backward = ", forward + backward"
    columns = [(shape, "") for shape in shapes] + [(row["shape"], backward) for row in rows if row["method"] == f"dense{backward}"]
    by_place = {(row["shape"], row["method"]): row for row in rows}

    def cell(method: str, shape: str, passes: str) -> str:
        row = by_place.get((shape, method + passes))
        if row is None:
            return ""
        return milliseconds(row["ms"]) + (f" ({times(row['ratio'], 2 if row['ratio'] < 2 else 1)})" if "ratio" in row else "")

    methods = dict.fromkeys(row["method"].removesuffix(backward) for row in rows)
    return lines(
        ["operator", *(shape + passes for shape, passes in columns)],
        [[m, *(cell(m, *at) for at in columns)] for m in methods],
        read(folder / "gpu-h100.json"),
    )


def gpu_step(folder: Path) -> str:
    """Seconds of a whole step of large models on a GPU, and the ratio to the original's."""
    record = read(folder / "gpu-step-h100.json")
    by_place = {(row["case"], row["method"]): row for row in record["rows"]}
    cases, methods = (list(dict.fromkeys(row[name] for row in record["rows"])) for name in ("case", "method"))

    def cell(case: str, method: str) -> str:
        row = by_place.get((case, method))
        if row is None:
            return ""
        return f"{figures(row['seconds'])} s" + (f" ({times(row['ratio'], 2 if row['ratio'] < 2 else 1)})" if "ratio" in row else "")

    return lines(["one step", *cases], [[m, *(cell(case, m) for case in cases)] for m in methods], record)


def short(folder: Path) -> str:
    """A few rows of the tables of steps, quality and distillation, one method a row."""
    steps, presets = read(folder / "step.json")["rows"], read(folder / "quality.json")["presets"]
    sizes = list(dict.fromkeys(tuple(row["size"]) for row in steps))
    made = []
    for spec, name in METHODS.items():
        ratios = {tuple(row["size"]): row["original"] / row["accelerated"] for row in steps if row["method"] == spec}
        if not ratios:  # Fovea 5 % has two names: the file has one of them
            continue
        texts = [f"{figures(ratios[size]) if ratios[size] >= 1 else f'{ratios[size]:.2f}'}×" for size in sizes]
        error = f"{presets[name]['velocity_error']:.3f}"
        made.append([name, *(f"**{text}**" if ratios[size] < 1 else text for size, text in zip(sizes, texts, strict=True)), error])
    return lines(["method", *(f"{width}×{height}" for height, width in sizes), "error, untrained"], made, read(folder / "step.json"))


def plans(folder: Path, file: str = "plan.json") -> str:
    """Plans against uniform settings, paired."""
    record = read(folder / file)
    made = []
    for pair in sorted(record["pairs"], key=lambda pair: pair["density"]):
        uniform, same, less = (pair[name] for name in ("uniform", "same_cost", "same_error"))
        ratios = [f"{x['error_ratio']['mean']:.2f} [{x['error_ratio']['low']:.2f}, {x['error_ratio']['high']:.2f}]" for x in (same, less)]
        costs = [f"{uniform['cost']:.3f}", f"{less['cost']:.3f}", f"{less['cost'] / uniform['cost']:.2f}"]
        errors = [f"{statistics.fmean(x['by_prompt']):.3f}" for x in (uniform, same)]
        made.append([f"Fovea {pair['density']:.0%}".replace("%", " %"), costs[0], *errors, ratios[0], *costs[1:], ratios[1]])
    head = ["uniform", "cost", "error", "planned at its cost: error", "ratio", "planned for its error: cost", "its share", "error, ratio"]
    return lines(head, made, record)


def composition(folder: Path) -> str:
    """How close methods are to the original together with other things."""
    record = read(folder / "composition.json")
    names = list(record["rows"][0]["methods"])

    def close(found: dict[str, float] | None) -> str:
        return "equal" if found is None else f"{found['psnr']:.1f}, {found['distance']:.3f}"

    def cell(row: dict[str, Any], name: str) -> str:
        found = row["methods"].get(name)
        if found is None:
            return ""
        return close(found["same"]) + (f", {found['velocity_error']:.3f}" if "velocity_error" in found else "")

    made = []
    for row in record["rows"]:
        cached = f" ({row['attention']:.0%} of attention)".replace("%", " %") if row["attention"] < 1 else ""
        last = close(row["methods"][names[0]]["plain"])
        made.append([row["name"] + cached, close(row["original"]), *(cell(row, name) for name in names), last])
    head = ["together with", "the original with it to that without", *names, f"{names[0]} with it to the original without"]
    return lines(head, made, record)


def parallel(folder: Path) -> str:
    """Wall time of two processes and of one, and what one of the two sends."""
    record, ways = read(folder / "parallel.json"), ("ulysses", "ring")
    made = []
    for row in record["rows"]:
        alone, cells = row["alone"]["seconds"], [f"{row['tokens']:,}", seconds(row["alone"]["seconds"])]
        for way in ways:
            taken = row.get(way)
            cells.append(
                "-" if taken is None else f"{seconds(taken['seconds'])} ({alone / taken['seconds']:.2f}×), {taken['megabytes']:.0f} MB"
            )
        made.append([PARALLEL[row["method"]], *cells])
    return lines(["method", "tokens", "one process", "two, ulysses_degree", "two, ring_degree"], made, record)


def int8(folder: Path) -> str:
    """Errors of products in 8 bits by form and method, and of Fovea 5 % where some channels are large."""
    errors, first = read(folder / "int8.json")["errors"], "Fovea 5 %"
    plain, stresses = errors["as captured"], {stress: of for stress, of in errors.items() if stress != "as captured"}

    def cell(of: dict[str, float], form: str) -> str:
        return f"{figures(100 * of[form])} %"

    made = [
        [form, *(cell(of, form) for of in plain.values()), *(cell(of[first], form) for of in stresses.values())] for form in plain[first]
    ]
    return lines(["products", *plain, *(f"{first}, {stress}" for stress in stresses)], made)


TABLES: dict[str, Callable[[Path], str]] = {
    "parallel": parallel,
    "composition": composition,
    "short": short,
    "plans": plans,
    "plans-video": functools.partial(plans, file="plan-video.json"),
    "step": step,
    "step-bfloat16": functools.partial(step, file="step-bfloat16.json"),
    "kernels": kernels,
    "kernels-amx": functools.partial(kernels, file="kernels-amx.json", dtype="bfloat16"),
    "int8": int8,
    "gpu": gpu,
    "gpu-step": gpu_step,
    "recovery": recovery,
    "combinations": combinations,
    "quality": quality,
    "video": video,
    "evaluate": evaluate,
}


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with each table after its marker replaced. Raises ValueError where a page has no place for one."""
    for name, table in tables.items():
        marker = f"<!-- table: {name} -->\n"
        if page.count(marker) != 1:
            raise ValueError(f"the page has {page.count(marker)} places for the table {name!r}: write {marker.strip()!r} above it, once")
        before, after = page.split(marker)
        page = before + marker + table + "\n" + re.sub(r"\A(\|[^\n]*\n)*(\n\*[^\n]*\*\n)?", "", after)
    return page
