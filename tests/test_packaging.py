"""The house: what an import costs, what lies where, and who may import whom."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dit_accel
import dit_accel.spec

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "finetune", "pipelines")
MAX_LINES = 450

# room -> the rooms of dit_accel that it may import besides its own; the package itself and the programs of the CLI may import all
ARROWS: dict[str, set[str]] = {
    "errors": {"layout", "parameters", "spec"},
    "console": set(),
    "files": {"errors"},
    "layout": {"errors", "parameters", "spec"},
    "parameters": {"errors", "layout", "spec"},
    "spec": {"errors", "layout", "parameters"},
    "presets": {"errors", "spec"},
    "kernels": {"errors"},
    "geometry": {"kernels"},
    "plan": {"errors", "geometry", "kernels", "layout", "parameters", "spec"},
    "plans": {"layout", "plan", "spec"},
    "fused": {"errors", "geometry", "kernels", "layout", "parameters", "plan", "spec"},
    "operator": {"errors", "fused", "kernels", "layout", "parameters", "plan", "plans", "spec"},
    "decisions": {"errors", "files"},
    "crossover": {"decisions", "kernels", "layout", "operator", "plan", "spec"},
    "context": {
        "mask_check",
        "checkpointing",
        "crossover",
        "errors",
        "forward",
        "kernels.capture",
        "kernels.dispatch",
        "layout",
        "pipelines.family",
        "plan",
        "plans",
        "routing",
        "spec",
        "steps",
        "tokens",
    },
    "masks": {"layout"},
    "processor": {"context", "errors", "forward", "interception", "layout", "masks", "operator", "parameters", "plan", "rewriting", "spec"},
    "pipelines": {"errors", "files", "layout", "spec"},
    "pipelines.training": {"files", "finetune.muon"},
    "pipelines.builtin.train": {"files", "pipelines"},
    "pipelines.builtin_video.train": {"files", "pipelines"},
    "pipelines.hires": {"anatomy", "console", "errors", "files", "layout", "patch", "pipelines", "plan", "spec", "weights"},
    "saving": set(),
    "lora": {"anatomy", "errors"},
    "anatomy": {"errors", "pipelines"},
    "holders": {"errors", "files"},
    "weights": {"anatomy", "errors", "holders", "lora"},
    "patch": {
        "anatomy",
        "checkpointing",
        "compiled",
        "context",
        "crossover",
        "errors",
        "kernels.dispatch",
        "layout",
        "lora",
        "mask_check",
        "parameters",
        "pipelines",
        "plan",
        "presets",
        "processor",
        "saving",
        "spec",
        "steps",
        "weights",
    },
    "layers": {"console", "context", "errors", "kernels.dispatch", "patch", "plan", "processor", "spec"},
    "wan_names": {"anatomy", "patch"},
    "fingerprint": {"patch", "weights"},
    "importers": {"anatomy", "errors", "patch", "pipelines", "presets", "spec", "wan_names"},
    "base_model": set(),
    "model_card": {"base_model", "files", "spec"},
    "adapter": {
        "anatomy",
        "base_model",
        "context",
        "errors",
        "files",
        "fingerprint",
        "holders",
        "importers",
        "layout",
        "lora",
        "model_card",
        "operator",
        "parameters",
        "patch",
        "pipelines",
        "processor",
        "spec",
        "weights",
    },
    "method_text": {"errors", "presets", "spec"},
    "pictures": {"files"},
    "report": {"files"},
    "finetune": {
        "adapter",
        "anatomy",
        "base_model",
        "context",
        "errors",
        "files",
        "fingerprint",
        "holders",
        "layout",
        "lora",
        "operator",
        "parameters",
        "patch",
        "pipelines",
        "processor",
        "spec",
        "weights",
    },
    "forward": {"layout", "pipelines.family", "plan", "plans", "spec"},
    "steps": set(),
    "tokens": {"forward"},
    "routing": {"forward", "masks"},
    "checkpointing": {"forward"},
    "compiled": {"context", "errors", "forward", "layout", "parameters", "plan", "processor", "tokens"},
    "mask_check": {"forward"},
    "interception": set(),
    "rewriting": {"errors"},
}
# rooms that need the standard library and torch alone
TORCH_ONLY = {
    "crossover",
    "decisions",
    "errors",
    "fused",
    "geometry",
    "kernels",
    "layout",
    "masks",
    "operator",
    "parameters",
    "plan",
    "plans",
    "spec",
    "steps",
}
PROGRAMS = ("bench", "cli", "demo", "doctor", "estimate", "evaluation")
DIFFUSERS = {
    "adapter",
    "bench",
    "cli_info",
    "cli_models",
    "compiled",
    "demo",
    "evaluation",
    "finetune",
    "holders",
    "interception",
    "lora",
    "patch",
    "pipelines",
    "processor",
    "rewriting",
    "wan_names",
}


def package_files() -> dict[str, Path]:
    """Dotted name below dit_accel ("" for the package itself) -> file."""
    files = list((ROOT / "dit_accel").glob("*.py"))
    for name in LINKS:
        files += (ROOT / name).rglob("*.py")
    dotted = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in files}
    return {name.removeprefix("dit_accel.").removesuffix("__init__").removesuffix("."): f for name, f in sorted(dotted.items())}


FILES = package_files()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imports(file: Path) -> Iterator[str]:
    """The dotted name of everything that a file imports, wherever in the file; `from a import b` is "a.b"."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def within(name: str, rooms: set[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def forbidden(name: str, imported: str) -> bool:
    """Whether module `name` of the package must not import `imported`."""
    room, library = name.split(".")[0], imported.split(".")[0]
    if not library:  # a relative import, which would hide where it leads
        return True
    if library == "dit_accel":
        target = imported.removeprefix("dit_accel.")
        free = room == "" or room.startswith(PROGRAMS)
        # the recipe and the trainers stand above the patch, though they live beside the families that the patch stands on
        home = next((r for r in ARROWS if "." in r and within(name, {r})), room)
        return not (free or target == "__version__" or within(target, ARROWS.get(home, set()) | {home}))
    if library in sys.stdlib_module_names:
        return False
    if library == "triton":
        return not within(name, {"kernels.triton"})
    if library == "xformers":
        return name != "kernels.xformers_rows"
    if library == "diffusers":
        return room not in DIFFUSERS
    return room in TORCH_ONLY and library != "torch"


def test_rooms_import_along_the_arrows() -> None:
    wrong = [f"{name or 'dit_accel'} -> {target}" for name, file in FILES.items() for target in imports(file) if forbidden(name, target)]
    assert wrong == []


def test_every_module_has_its_arrows() -> None:
    rooms = {name.split(".")[0] for name in FILES} - {""}
    assert {room for room in rooms if not room.startswith(PROGRAMS)} <= set(ARROWS)


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("spec", "diffusers.FluxPipeline"),
        ("spec", "dit_accel.patch"),
        ("kernels.blocks", "triton"),
        ("kernels.blocks", "dit_accel.spec.Disc"),
        ("patch", "dit_accel.kernels.reference"),
        ("patch", "dit_accel.finetune.distill"),
        ("operator", "numpy"),
        ("processor", ".spec.Disc"),
        ("plan", "dit_accel.Fovea"),
        ("pipelines.families", "dit_accel.patch"),
        ("pipelines.hires.latents", "dit_accel.finetune.distill"),
        ("pipelines.training", "dit_accel.finetune.distill"),
        ("pipelines.builtin.components", "dit_accel.finetune.muon"),
    ],
)
def test_wrong_arrows_are_seen(name: str, imported: str) -> None:
    assert forbidden(name, imported)


def test_samples_use_public_names_only() -> None:
    public = {"__version__", *dit_accel.__all__, *(f"spec.{slot}" for slot in dit_accel.spec._SLOTS)}
    public |= {"pipelines.Family", "pipelines.register"}  # for transformers that diffusers does not have
    wrong = []
    for file in sorted((ROOT / "samples").rglob("*.py")):
        names = [name.removeprefix("dit_accel.") for name in imports(file) if name.startswith("dit_accel.")]
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dit_accel":
                names.append(node.attr)
        wrong += [f"{file.name}: {name}" for name in names if name not in public]
    assert wrong == []


def test_no_assert_guards_the_package() -> None:
    """`python -O` drops them, and a user deserves a message."""
    found = [f"{file.relative_to(ROOT)}:{n.lineno}" for file in FILES.values() for n in ast.walk(tree(file)) if isinstance(n, ast.Assert)]
    assert found == []


def test_files_are_short() -> None:
    files = [*FILES.values(), *(f for name in ("tests", "samples", "benchmarks") for f in (ROOT / name).rglob("*.py"))]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("name", LINKS)
def test_working_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "dit_accel" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_kernels_shadows_no_other_package() -> None:
    """With an __init__.py, the folder at the root would be found in place of Hugging Face's `kernels`, which diffusers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.import_module("dit_accel.kernels.reference")


def test_import_is_light() -> None:
    code = "import sys, dit_accel; print(sorted({'torch', 'triton', 'diffusers', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", dit_accel.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(dit_accel, name) is not None


def test_public_names_have_homes() -> None:
    assert set(dit_accel.__all__) == set(dit_accel._HOMES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dit_accel.nonsense  # noqa: B018
