"""The table of docs/choose.md: how much faster each method is by model, size and machine, which to take, and their errors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tables import METHODS, described, lines, read, times

READY = ("Fovea 5 %", "Fovea radius 8")  # what needs no training
NAMES = (*READY, "CLEAR radius 8", "SLA 5 %")
WORTH = 1.1  # a method that has to be trained is taken where it is so many times as fast as what need not be
UNTRAINED = {name: name for name in NAMES} | {"SLA 5 %": "SLA 5 % (raster top-k while untrained)"}  # as quality.json names them
TRAINED = {"Fovea 5 %": "fovea:0.05", "CLEAR radius 8": "clear:8", "SLA 5 %": "sla:0.05"}  # as the files of recovery name them
VIDEO = {"Fovea 5 %": "Fovea 10 %, untrained", "SLA 5 %": "SLA 5 %, distilled"}  # as video.json names them


@dataclass(frozen=True)
class Speed:
    """How many times as fast as the original: a whole step, the attention operator by itself; None where it was not measured."""

    step: float | None = None
    attention: float | None = None
    density: str = ""  # where it isn't the one of the column

    def over(self, other: "Speed") -> float:
        """This speed as a multiple of another one: of steps where both were measured, else of the operator."""
        if self.step and other.step:
            return self.step / other.step
        return (self.attention or 0.0) / (other.attention or 1.0)

    def __str__(self) -> str:
        at = f" at {self.density}" if self.density else ""
        alone = f"attention {_ratio(self.attention)}" if self.attention else ""
        if self.step is None:
            return alone + at
        return _ratio(self.step) + (f" ({alone})" if alone else "") + at


def _ratio(value: float) -> str:
    text = times(value, 2 if value < 2 else 1)
    return f"**{text}**" if value < 1 else text


def _fastest(speeds: dict[str, Speed], names: tuple[str, ...]) -> str:
    best = next(name for name in names if name in speeds)
    for name in names:
        if name in speeds and speeds[name].over(speeds[best]) > 1:
            best = name
    return best


def advice(speeds: dict[str, Speed]) -> str:
    """What to take without training, and what is worth a training."""
    ready, best = _fastest(speeds, READY), _fastest(speeds, NAMES)
    without = ready if speeds[ready].over(Speed(1.0, 1.0)) > 1 else "nothing"
    trained = best not in READY and speeds[best].over(Speed(1.0, 1.0) if without == "nothing" else speeds[ready]) >= WORTH
    without, best = (name.replace("5 %", speeds[name].density or "5 %") if name in speeds else name for name in (without, best))
    return f"{without}; trained: {best}" if trained else without


def on_gpu(folder: Path) -> dict[str, dict[str, Speed]]:
    """Speeds on the GPU by case, from pictures to videos, the smallest first."""
    steps = {(row["case"], row["method"]): row.get("ratio") for row in read(folder / "gpu-step-h100.json")["rows"]}
    rows = [row for row in read(folder / "gpu-h100.json")["rows"] if row["method"] in NAMES]
    cases: dict[str, dict[str, Speed]] = {}
    for row in sorted(rows, key=lambda row: (row["shape"].startswith("Wan"), row["tokens"])):
        place = row["shape"], row["method"]
        cases.setdefault(f"{row['shape'].replace(' x ', '×')}, GPU", {})[row["method"]] = Speed(steps.get(place), row["ratio"])
    return cases


def on_cpu(folder: Path) -> dict[str, dict[str, Speed]]:
    """Speeds of the built-in models on a CPU by case."""
    cases: dict[str, dict[str, Speed]] = {}
    for row in read(folder / "step.json")["rows"]:
        name, density = METHODS[row["method"]], ""
        if name == "SLA 10 %":
            name, density = "SLA 5 %", "10 %"
        height, width = row["size"]
        speed = Speed(row["original"] / row["accelerated"], density=density)
        cases.setdefault(f"built-in model, {width}×{height}, CPU", {})[name] = speed
    record = read(folder / "video.json")
    rows = {row["name"]: row for row in record["rows"]}
    call = record["call"]
    cases[f"built-in video model, {call['num_frames']}×{call['height']}×{call['width']}, CPU"] = {
        name: Speed(rows[theirs]["original"] / rows[theirs]["accelerated"], density="10 %" if "10 %" in theirs else "")
        for name, theirs in VIDEO.items()
    }
    return cases


def _errors(folder: Path) -> list[list[str]]:
    """Rows of errors, untrained and distilled."""
    presets = read(folder / "quality.json")["presets"]
    record = read(folder / "recovery.json")
    trained = {row["method"]: row for row in record["rows"] if row["train"] == "attention"}
    fovea, distilled, sla = (read(folder / "video.json")["rows"][index] for index in range(3))
    video = {"Fovea 5 %": f"{fovea['held_out_error']:.3f} → {distilled['held_out_error']:.3f} at 10 %"}
    video["SLA 5 %"] = f"{sla['untrained_error']:.3f} → {sla['held_out_error']:.3f}"

    def recovered(row: dict[str, Any] | None) -> str:
        return f"{row['error_untrained']:.3f} → {row['error_after']:.3f}" if row else ""

    floor = f"the original in bfloat16: {record['floor']['error']:.3f}"
    return [
        ["*error*, pictures of 1024×1024, untrained", "", *(f"{presets[UNTRAINED[name]]['velocity_error']:.3f}" for name in NAMES)],
        ["*error*, 512×512, untrained → distilled", floor, *(recovered(trained.get(TRAINED.get(name, ""))) for name in NAMES)],
        ["*error*, videos of 512×512, untrained → distilled", "", *(video.get(name, "") for name in NAMES)],
    ]


def choose(folder: Path) -> str:
    """Speeds by case and method, what to take by them, and errors; the machines below."""
    cases = on_gpu(folder) | on_cpu(folder)
    made = [[case, advice(speeds), *(str(speeds.get(name, "")) for name in NAMES)] for case, speeds in cases.items()]
    machines = [read(folder / f"{name}.json")["machine"] for name in ("gpu-step-h100", "step", "video")]
    table = lines(["case", "take", *NAMES], made + _errors(folder))
    return f"{table}\n\n*{' '.join(described(machine) for machine in machines)}*"
