"""`plan.html`: what a plan gave to each head, its curve of error against cost, and what was measured, predicted and verified.

One file without any script, which loads nothing.
"""

import html
import math
from pathlib import Path
from string import Template

from dit_accel.files import write_text
from dit_accel.measure.pages import table
from dit_accel.method.spec import AttentionSpec
from dit_accel.planner.curve_chart import Mark, curve_chart, percent
from dit_accel.planner.names import short_name
from dit_accel.planner.record import Interval, Plan
from dit_accel.planner.view_page import asset

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def write_plan_page(plan: Plan, path: str | Path) -> Path:
    """Write the page of a plan to an HTML file; returns its path. Raises WriteError."""
    path = Path(path)
    write_text(path, plan_page(plan))
    return path


def plan_page(plan: Plan) -> str:
    """The page."""
    codes = _codes(plan)
    names = [short_name(each.spec) for each in plan.candidates]
    known = {each.name: number for number, each in enumerate(plan.candidates)}
    values = {
        "policy": POLICY, "css": asset("page.css") + asset("plan.css"), "pipeline": html.escape(plan.model.pipeline), "cards": _cards(plan),
        "chart": _chart(plan, codes, names, known), "errors": _errors(plan), "legend": _legend(plan, codes, names),
        "maps": _maps(plan, codes, names),
        "points": _points(plan, codes, names, known), "rounds": _rounds(plan), "ranges": _ranges(plan), "sizes": _sizes(plan, codes, names),
        "facts": _facts(plan),
    }  # fmt: skip
    return Template(asset("plan.html")).substitute(values)


def _codes(plan: Plan) -> list[str]:
    """A letter for each candidate, in the order of their costs; two letters from the 27th on."""
    order = sorted(range(len(plan.candidates)), key=lambda number: plan.candidates[number].cost)
    codes = [""] * len(order)
    for place, number in enumerate(order):
        codes[number] = (LETTERS[place // 26 - 1] if place >= 26 else "") + LETTERS[place % 26]
    return codes


def _interval(found: Interval | None) -> str:
    return "–" if found is None else percent(found.mean) + _ends(found)


def _ends(found: Interval) -> str:
    return "" if found.low is None or found.high is None else f" [{percent(found.low)},\N{NO-BREAK SPACE}{percent(found.high)}]"


def _card(number: str, words: str) -> str:
    return f'<li><b>{html.escape(number)}</b><span class="small">{html.escape(words)}</span></li>'


def _cards(plan: Plan) -> str:
    made, asked = plan.outcome, plan.asked
    if asked.budget is not None:
        goal = _card(f"≤ {percent(asked.budget)}", "velocity error, asked for")
    else:
        goal = _card(f"{asked.speed:g}×", "less attention, asked for")
    held_out = f"{plan.prompts.held_out} held-out prompt{'s' * (plan.prompts.held_out != 1)}"
    return "".join(
        [
            _card(f"{made.speed:.3g}×", f"less attention, by {plan.unit}: {percent(made.cost)} of the original’s"),
            _card(percent(made.verified.mean), f"velocity error, verified on {held_out}{_ends(made.verified)}"),
            goal,
        ]
    )


def _chart(plan: Plan, codes: list[str], names: list[str], known: dict[str, int]) -> str:
    marks = []
    for point in plan.curve:
        found = point.verified or Interval(point.predicted, None, None)
        state = "verified" if point.verified else "predicted, not verified"
        number = known.get(point.name)
        name = point.name if number is None else f"{codes[number]}, {names[number]}"
        label = codes[number] if number is not None else ""
        tip = f"{point.kind}: {name}; cost {percent(point.cost)}, error {percent(found.mean)} ({state})"
        marks.append(Mark(point.kind, point.cost, found.mean, found.low, found.high, label, tip))
    made = plan.outcome
    tip = f"this plan as predicted: cost {percent(made.cost)}, error {percent(made.predicted)}"
    marks.append(Mark("forecast", made.cost, made.predicted, None, None, "", tip))
    tip = f"this plan: cost {percent(made.cost)}, error {percent(made.verified.mean)} (verified)"
    marks.append(Mark("chosen", made.cost, made.verified.mean, made.verified.low, made.verified.high, "this plan", tip))
    return curve_chart(marks, plan.asked.budget, f"cost: share of the original attention’s {plan.unit}", "relative error of the velocity")


def _errors(plan: Plan) -> str:
    """Which errors the chart shows, in words."""
    this = "this plan’s as verified on held-out prompts, with its 90 % interval, and hollow as predicted"
    verified = [point.verified is not None for point in plan.curve]
    others = "verified" if all(verified) else "predicted" if not any(verified) else "verified where they were, else predicted"
    return f"Errors of the curve and the settings are as {others}, {this}."


def _legend(plan: Plan, codes: list[str], names: list[str]) -> str:
    """The candidates, cheapest first, with how often each was chosen."""
    taken = [0] * len(codes)
    for of_range in plan.chosen:
        for of_layer in of_range:
            for number in of_layer:
                taken[number] += 1
    every = max(1, sum(taken))
    rows = []
    for number in sorted(range(len(codes)), key=lambda number: plan.candidates[number].cost):
        cost = plan.candidates[number].cost
        cells = f"<td>{html.escape(names[number])}</td><td>{percent(cost)}</td><td>{percent(taken[number] / every)}</td>"
        rows.append(f'<tr><td><i class="cell" style="{_by_cost(plan, cost)}">{codes[number]}</i></td>{cells}</tr>')
    head = "<tr><th></th><th>candidate</th><th>cost of a head</th><th>of all heads and ranges</th></tr>"
    return f'<table class="legend">{head}{"".join(rows)}</table>'


def _by_cost(plan: Plan, cost: float) -> str:
    """The colour of a cost among those of the candidates: the darker the dearer."""
    costs = [each.cost for each in plan.candidates if each.cost > 0]
    low, high = min(costs), max(costs)
    share = 0.0 if cost <= low else math.log(cost / low) / math.log(high / low)
    return f"--got:hsl(212 65% {92 - 66 * share:.0f}%);--ink-got:{'#10131a' if share < 0.55 else '#fff'}"


def _by_error(share: float, top: float) -> str:
    """The colour of a share of the error: the darker the more."""
    place = math.sqrt(share / top) if top > 0 else 0.0
    return f"--err:hsl(12 80% {95 - 58 * place:.0f}%);--ink-err:{'#10131a' if place < 0.7 else '#fff'}"


def _maps(plan: Plan, codes: list[str], names: list[str]) -> str:
    """A table of layers and heads for each range of noise levels."""
    made = []
    widest = max(layer.heads for layer in plan.layers)
    head = "".join(f'<th scope="col">{number}</th>' for number in range(widest))
    for of_range, chosen, errors in zip(plan.ranges, plan.chosen, plan.errors, strict=True):
        total = sum(map(sum, errors))
        top = max((error / total for layer in errors for error in layer), default=0.0) if total > 0 else 0.0
        words = f"noise levels {of_range.low:g} to {of_range.high:g}"
        rows = []
        for layer, got, of_layer in zip(plan.layers, chosen, errors, strict=True):
            cells = []
            for number, (which, error) in enumerate(zip(got, of_layer, strict=True)):
                share = error / total if total > 0 else 0.0
                tip = (
                    f"{layer.name}, head {number}, {words}: {codes[which]}, {names[which]}; {percent(share)} of the predicted squared error"
                )
                style = f"{_by_cost(plan, plan.candidates[which].cost)};{_by_error(share, top)}"
                cells.append(f'<td style="{style}" title="{html.escape(tip)}">{codes[which]}</td>')
            rows.append(f'<tr><th scope="row">{html.escape(layer.name)}</th>{"".join(cells)}</tr>')
        caption = f"<caption>{words[0].upper()}{words[1:]}</caption>"
        made.append(
            f'<div class="scroll"><table class="map">{caption}<tr><th scope="col">head</th>{head}</tr>{"".join(rows)}</table></div>'
        )
    return "".join(made)


def _scroll(head: list[str], rows: list[list[str]]) -> str:
    return f'<div class="scroll">{table(head, rows)}</div>'


def _points(plan: Plan, codes: list[str], names: list[str], known: dict[str, int]) -> str:
    rows = []
    for point in sorted(plan.curve, key=lambda point: (point.kind != "planned", point.cost)):
        number = known.get(point.name)
        name = point.name if number is None else f"{codes[number]}, {names[number]}"
        rows.append(
            [
                "planned" if point.kind == "planned" else f"{point.kind}: {name}",
                percent(point.cost),
                percent(point.predicted),
                _interval(point.verified),
            ]
        )
    made = plan.outcome
    rows.insert(0, ["this plan", percent(made.cost), percent(made.predicted), _interval(made.verified)])
    return _scroll(["", "cost", "predicted error", "verified error"], rows)


def _rounds(plan: Plan) -> str:
    rows = [
        [str(number), percent(each.predicted), percent(each.cost), _interval(each.verified)] for number, each in enumerate(plan.rounds, 1)
    ]
    return _scroll(["round", "predicted error", "cost", "verified error"], rows)


def _ranges(plan: Plan) -> str:
    rows = []
    for of_range, error in zip(plan.ranges, plan.outcome.by_range, strict=True):
        levels = ", ".join(f"{level:.2f}" for level in of_range.levels)
        rows.append([f"{of_range.low:g} to {of_range.high:g}", levels, percent(error)])
    return _scroll(["noise levels", "measured at", "verified error"], rows)


def _sizes(plan: Plan, codes: list[str], names: list[str]) -> str:
    measured = [f"{n:,}" for n in sorted(plan.scaling.measured)]
    between = f"sizes that are not between {measured[0]} and {measured[-1]} tokens" if len(measured) > 1 else "other sizes"
    words = f"<p>Measured with {' and '.join(measured)} image tokens; {between} are extrapolated.</p>"
    used = sorted({number for rows in plan.chosen for row in rows for number in row}, key=lambda number: plan.candidates[number].cost)
    rows = [[f"{codes[n]}, {names[n]}", _elsewhere(spec)] for n in used if (spec := plan.candidates[n].spec) is not None]
    return words + (_scroll(["candidate", "what it keeps at every size"], rows) if rows else "")


def _elsewhere(spec: AttentionSpec) -> str:
    """What a spec keeps at any size, in words."""
    chosen, found = spec.selection, []
    if spec.static:
        found.append("the same places in tokens around each query")
    if chosen is not None and chosen.share:
        found.append(f"up to {percent(chosen.share)} of the blocks")
    if chosen is not None and chosen.more:
        found.append(f"{chosen.more} block{'s' * (chosen.more != 1)} of {spec.block[1]} tokens")
    return " and ".join(found)


def _facts(plan: Plan) -> str:
    model, asked = plan.model, plan.prompts
    rows = [
        ["pipeline and transformer", f"{model.pipeline}, {model.transformer}"],
        ["weights, SHA-256", model.weights],
        *([f"LoRA {name}, SHA-256", digest] for name, digest in model.loras.items()),
        *([f"size {n}", _size(size.call, size.grid, size.text)] for n, size in enumerate(plan.sizes, 1)),
        *(
            []
            if plan.trained is None
            else [["what learns is that of the adapter", f"{plan.trained.adapter}, SHA-256 {plan.trained.sha256}"]]
        ),
        ["error that is promised of other prompts", f"at most {percent(plan.outcome.verified.promised)}"],
        ["steps of a run", str(plan.steps)],
        ["prompts", f"{asked.measured} measured and {asked.held_out} held out, the first from seed {asked.seed}; SHA-256 {asked.sha256}"],
        ["verification found the error to be", f"{plan.outcome.factor:.3g} times the prediction"],
        ["costs are", f"{plan.unit} of attention, as a share of the original’s"],
        ["made by", f"dit_accel {plan.version}"],
    ]
    cells = "".join(f"<tr><th scope='row'>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts">{cells}</table></div>'


def _size(call: dict[str, int], grid: tuple[int, int, int], text: int) -> str:
    arguments = ", ".join(f"{name} {value}" for name, value in call.items())
    return f"{arguments}: {grid[0]} × {grid[1]} × {grid[2]} tokens and {text} of text"
