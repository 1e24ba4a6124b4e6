"""Forms of Fovea's rest and of its choice of blocks, untrained, against dense attention on captured queries, keys and values.

    python benchmarks/fovea_forms.py CAPTURES OUT.jsonl --set image-1024 --keep 0.05 --forms first

Of each captured layer some query tiles are drawn. The exact numerator and mass of every key block are computed once for a tile; a form is
then a choice of blocks, and what replaces the others. A line of OUT holds, for one layer and one way to keep, each form's squared error
and the squared size of the output by head. Lines that are there already are not computed again.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from fovea_layer import DAMPS, Form, Layer, Tile


def errors(layer: Layer, rule: str, forms: list[Form], tiles: list[int]) -> dict[str, Any]:
    """Squared errors of each form, and the squared size of the output, by head, summed over the tiles."""
    keeps = {(f.score, f.own): layer.keep(rule, f.score, f.own) for f in forms}
    found = {str(f): torch.zeros(layer.heads, dtype=torch.float64) for f in forms}
    size = torch.zeros(layer.heads, dtype=torch.float64)
    for number in tiles:
        tile = Tile(layer, number)
        size += tile.exact.square().sum((1, 2))
        for form in forms:
            kept = keeps[form.score, form.own][:, number]
            found[str(form)] += (tile.output(form, kept) - tile.exact).square().sum((1, 2))
    return {"size": size.tolist(), "forms": {name: x.tolist() for name, x in found.items()}}


FINAL = Form("bias_error2", 2, "head", "pooled", "one", "head", split="sign", joint=True)
PLAIN = Form("plain_H")


def _changed(form: Form, **choices: Iterable[Any]) -> list[Form]:
    """The form with each value of each field alone."""
    return [dataclasses.replace(form, **{name: value}) for name, values in choices.items() for value in values]


def _first_order(form: Form, **choices: Iterable[Any]) -> list[Form]:
    return _changed(dataclasses.replace(form, weights="tile"), **choices)


SCORES = ("mass", "mass_H", "mass_HM", "error1", "error", "error2", "plain_error", "bias_error2")
IN_ONE = dataclasses.replace(FINAL, parts=1, split="runs", joint=False)
FAMILIES: dict[str, list[Form]] = {
    "zeroth": [PLAIN, *_changed(PLAIN, score=SCORES, own=(True,), variance=("head", "tile", "none"), parts=(2, 4)), Form(own=True)],
    "first": [
        *_changed(PLAIN, weights=("pooled", "tile", "sub", "query")), Form(weights="tile"),
        *_first_order(PLAIN, damp=DAMPS, spread=("mean",), limit=(True,), delta=(True,), mass=(True,), parts=(2, 4)),
    ],
    "parts": [
        FINAL, IN_ONE, dataclasses.replace(FINAL, weights=None),
        *_changed(FINAL, parts=(4,), split=("runs", "cross", "lloyd", "crosslloyd"), joint=(False,), weights=("tile", "sub", "query"),
                  variance=("query", "none"), spread=("second", "mean"), own=(True,), limit=(True,), delta=(True,)),
    ],
    "scores": _changed(FINAL, score=(*SCORES, "product", "plain_H", "error2/2", "bias_error1", "bias_free2", "bias_mass_H")),
    "damping": [*_changed(FINAL, damp=DAMPS), *_changed(IN_ONE, damp=("none", "one", "two", "flat"))],
    "gains": [*_changed(FINAL, gain=("dot", "slope", "dot-min", "slope-min")), *_changed(IN_ONE, gain=("slope", "slope-min"))],
    "chosen": [FINAL, IN_ONE, *_changed(FINAL, parts=(4,)), dataclasses.replace(FINAL, weights=None), Form("bias_error2")],
}  # fmt: skip


def family(name: str) -> list[Form]:
    """Forms by the name of a list, or written as `score=error,parts=2;score=mass`; the first is today's."""
    made = list(FAMILIES.get(name, []))
    for text in [] if made else name.split(";"):
        values: dict[str, Any] = {}
        for part in filter(None, text.split(",")):
            key, _, value = part.partition("=")
            values[key] = int(value) if key == "parts" else value == "True" if value in ("True", "False") else value
        made.append(Form(**values))
    return [Form(), *(form for form in made if form != Form())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", action="append", dest="sets")
    parser.add_argument("--keep", action="append")
    parser.add_argument("--tile", default="8x8")
    parser.add_argument("--stress", type=float, default=1.0)
    parser.add_argument("--forms", default="first")
    parser.add_argument("--tiles", type=int, default=8, help="query tiles of each layer")
    parser.add_argument("--items", type=int, default=100, help="layers of each set")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    forms = family(args.forms)
    done = {json.loads(line)["key"] for line in args.out.read_text().splitlines()} if args.out.exists() else set()
    for name in args.sets:
        items = torch.load(args.captures / f"{name}.pt")
        for number, item in enumerate(items[:: max(1, len(items) // args.items)]):
            layer = None
            for rule in args.keep:
                key = f"{name} {args.tile} x{args.stress:g} {rule} {args.forms} {number} {args.tiles}"
                if key in done:
                    continue
                layer = layer or Layer(item, tuple(int(x) for x in args.tile.split("x")), args.stress)
                tiles = torch.randperm(layer.tiles, generator=torch.Generator().manual_seed(number))[: args.tiles].tolist()
                row = {"key": key, "set": name, "tile": args.tile, "stress": args.stress, "keep": rule, "item": number}
                with args.out.open("a") as file:
                    file.write(json.dumps(row | errors(layer, rule, forms, tiles)) + "\n")
            print(name, number, flush=True)


if __name__ == "__main__":
    main()
