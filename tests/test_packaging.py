"""The layout of the project: what an import costs, what lies where, and who may import whom."""

import ast
import importlib
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dit_accel
import dit_accel.method
from dit_accel.method.parts import part_types

ROOT = Path(__file__).resolve().parents[1]
LINKS = ("kernels", "finetune", "pipelines")
MAX_LINES = 450

GROUND = {"errors", "clock", "console", "files", "muon"}  # what every package may use
BELOW_PATCH = {"kernels", "method", "operator"}
BELOW_ADAPTERS = BELOW_PATCH | {"parallel", "patch", "pipelines"}
# package -> the other packages that it may import
ARROWS: dict[str, set[str]] = {
    "kernels": set(),
    "method": {"kernels"},
    "operator": {"kernels", "method"},
    "parallel": BELOW_PATCH,
    "pipelines": set(),  # families are declarations
    "patch": BELOW_PATCH | {"parallel", "pipelines"},
    "pipelines.hires": BELOW_ADAPTERS,  # a recipe, placed above the patch though its folder is next to the families that the patch uses
    "adapters": BELOW_ADAPTERS,
    "integrations": BELOW_ADAPTERS | {"adapters", "planner.record"},  # of the planner, what a plan's file contains
    "finetune": BELOW_ADAPTERS | {"adapters"},
    "measure": BELOW_ADAPTERS | {"adapters", "finetune"},
    "planner": BELOW_ADAPTERS | {"adapters", "finetune", "measure"},
    "cli": BELOW_ADAPTERS | {"adapters", "finetune", "measure", "planner"},
}
# what needs the standard library and torch alone
TORCH_ONLY = {"errors", "clock", "kernels", "method", "operator", "patch.masks", "integrations.function", "integrations.vllm_omni",
              "integrations.comfyui.nodes"}  # fmt: skip
DIFFUSERS = {"adapters", "cli", "finetune", "measure", "patch", "pipelines", "planner"}


def package_files() -> dict[str, Path]:
    """Dotted name below dit_accel ("" for the package itself) -> file."""
    files = list((ROOT / "dit_accel").rglob("*.py"))  # which follows no links
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


def needed(file: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in the file, but for types alone."""
    alone = [node for node in ast.walk(tree(file)) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = {node.lineno for block in alone for node in ast.walk(block) if isinstance(node, ast.ImportFrom)}
    found = set()
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and node.lineno not in skipped and (node.module or "").startswith("dit_accel"):
            home = (node.module or "").removeprefix("dit_accel").removeprefix(".")
            names = {f"{home}.{alias.name}".removeprefix(".") for alias in node.names}
            found |= names & FILES.keys() or {home}
    return found - {""}


def within(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def forbidden(name: str, imported: str) -> bool:
    """Whether module `name` of the package must not import `imported`."""
    package, library = name.split(".")[0], imported.split(".")[0]
    if not library:  # a relative import, which would hide where it leads
        return True
    if library == "dit_accel":
        target = imported.removeprefix("dit_accel.")
        if package == "" or target == "__version__" or within(target, GROUND | {package}):
            return False
        if package == "cli" and imported in {"dit_accel", *(f"dit_accel.{name}" for name in dit_accel.__all__)}:
            return False
        home = max((row for row in ARROWS if within(name, {row})), key=len, default="")
        return not within(target, ARROWS.get(home, set()))
    if library in sys.stdlib_module_names:
        return False
    if library == "triton":
        return not within(name, {"kernels.triton"})
    if library == "xformers":
        return name != "kernels.xformers_rows"
    if library == "diffusers":
        return package not in DIFFUSERS
    return within(name, TORCH_ONLY) and library != "torch"


def test_packages_import_along_the_arrows() -> None:
    wrong = [f"{name or 'dit_accel'} -> {target}" for name, file in FILES.items() for target in imports(file) if forbidden(name, target)]
    assert wrong == []


def test_no_imports_form_a_circle() -> None:
    modules = {name: needed(file) - {name} for name, file in FILES.items() if name}
    assert sum(map(len, modules.values())) > 500
    order = list(TopologicalSorter(modules).static_order())  # raises CycleError, which names the circle
    assert set(order) == set(modules)


def test_every_module_is_in_a_package() -> None:
    assert {name.split(".")[0] for name in FILES} - {""} == GROUND | {row.split(".")[0] for row in ARROWS}


@pytest.mark.parametrize(
    ("name", "imported"),
    [
        ("errors", "dit_accel.method.spec"),
        ("kernels.blocks", "triton"),
        ("kernels.blocks", "dit_accel.method.spec.Disc"),
        ("method.spec", "diffusers.FluxPipeline"),
        ("method.spec", "dit_accel.operator.layout"),
        ("operator.attention", "numpy"),
        ("operator.attention", "dit_accel.patch.context"),
        ("operator.blocks_of_grid", "dit_accel.Fovea"),
        ("patch.processor", ".masks"),
        ("patch.verbs", "dit_accel.finetune.distill"),
        ("adapters.folder", "dit_accel.integrations.function"),
        ("integrations.vllm_omni", "vllm_omni.diffusion"),
        ("adapters.folder", "dit_accel.finetune.distill"),
        ("measure.step", "dit_accel.cli.app"),
        ("pipelines.families", "dit_accel.patch.verbs"),
        ("pipelines.hires.latents", "dit_accel.finetune.distill"),
        ("pipelines.training", "dit_accel.finetune.distill"),
    ],
)
def test_wrong_arrows_are_seen(name: str, imported: str) -> None:
    assert forbidden(name, imported)


def test_samples_use_public_names_only() -> None:
    public = {"__version__", *dit_accel.__all__, *(f"method.{slot}" for slot in dit_accel.method.__all__)}
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


def slot_cases(file: Path, slots: set[str]) -> Iterator[str]:
    """Where a file tells parts apart by their type."""
    for node in ast.walk(tree(file)):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            asked = [node.args[1]]
        elif isinstance(node, ast.MatchClass):
            asked = [node.cls]
        elif isinstance(node, ast.Compare) and any(isinstance(operator, ast.Is | ast.IsNot) for operator in node.ops):
            asked = list(node.comparators)
        names = {name.id if isinstance(name, ast.Name) else name.attr for part in asked for name in ast.walk(part)
                 if isinstance(name, ast.Name | ast.Attribute)}  # fmt: skip
        yield from (f"{file.name}:{node.lineno} {name}" for name in sorted(names & slots))


def test_parts_are_told_apart_by_the_method_and_the_lowering_alone() -> None:
    """What is true of a part is in its class, so that a new one is one class."""
    bases = {"Part", "Pattern", "Static", "Blockwise", "Tokenwise", "Intervals", "Selection", "Score", "Rest", "Merge", "Order"}
    slots = bases | {name for name, kind in part_types().items() if kind.__module__.startswith("dit_accel.")}
    allowed = {name for name in FILES if within(name, {"method", "operator.lowering"})}
    assert sum(len(list(slot_cases(FILES[name], slots))) for name in allowed) > 10
    wrong = []
    for name in FILES.keys() - allowed:
        ours = {item.rpartition(".")[2] for item in imports(FILES[name]) if item.startswith("dit_accel.method")}  # nn.Linear is not
        wrong += slot_cases(FILES[name], slots & ours)
    assert wrong == []


def test_files_are_short() -> None:
    files = [*FILES.values(), *(f for name in ("tests", "samples", "benchmarks") for f in (ROOT / name).rglob("*.py"))]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines()) for f in files}
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("name", LINKS)
def test_working_folders_are_linked_into_the_package(name: str) -> None:
    link = ROOT / "dit_accel" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_a_checkout_without_symbolic_links_says_so(tmp_path: Path) -> None:
    package = tmp_path / "dit_accel"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "dit_accel" / "__init__.py").read_text())
    for name in LINKS:
        (package / name).write_text(f"../{name}")  # what git writes where it can't make a link
    code = "import dit_accel; dit_accel.builtin_pipeline"
    # without site-packages, where an editable installation leads to the packages of another checkout
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert "ImportError: this checkout of dit_accel has text files in the place of its symbolic links" in done.stderr
    assert "git config core.symlinks true" in done.stderr


def test_kernels_shadows_no_other_package() -> None:
    """With an __init__.py, the folder at the root would be found in place of Hugging Face's `kernels`, which diffusers looks for."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert importlib.import_module("dit_accel.kernels.reference")


# the Triton kernels, and libraries that neither torch nor diffusers imports by itself
LATE = {"dit_accel.kernels.triton.calls", "imageio", "matplotlib", "rich", "torchmetrics", "typer"}
HEAVY = LATE | {"diffusers", "jinja2", "numpy", "peft", "torch", "transformers", "triton"}
STAGES = f"""
import json, sys
def imported():
    return sorted({HEAVY} & sys.modules.keys())
import dit_accel
stages = [imported()]
dit_accel.Fovea(0.05)
stages.append(imported())
sys.path.append("tests")
from tiny_image import flux
pipe, call = flux()
dit_accel.accelerate(pipe, dit_accel.Fovea(0.05))
pipe(**call)
stages.append(imported())
dit_accel.summary(pipe, show=False)
for name in dit_accel.__all__:
    getattr(dit_accel, name)
stages.append(imported())
print(json.dumps(stages))
"""


def test_what_is_not_used_is_not_imported() -> None:
    """By `import dit_accel`, a preset, an accelerated pipeline on a CPU, and all public names."""
    done = subprocess.run([sys.executable, "-c", STAGES], cwd=ROOT, capture_output=True, text=True, check=True)
    package, preset, accelerated, names = (set(stage) for stage in json.loads(done.stdout.splitlines()[-1]))
    assert package == set()
    assert preset <= {"torch", "numpy"}
    assert "diffusers" in accelerated
    assert LATE & (accelerated | names) == set()


def test_the_lowest_versions_that_are_declared_are_those_that_are_tested() -> None:
    """`.ci/lowest` runs on the pins; torch and triton are the environment's own there."""
    declared = dict(
        d.partition(";")[0].split(">=") for d in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    pinned = dict(line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if not line.startswith("#"))
    assert {name: version for name, version in declared.items() if name not in ("torch", "triton")} == {
        name: short(pinned[name], version) for name, version in declared.items() if name in pinned
    }


def short(pin: str, version: str) -> str:
    """A pinned version with as many numbers as another, where all further ones are zero."""
    numbers, count = pin.split("."), len(version.split("."))
    return ".".join(numbers[:count]) if set(numbers[count:]) <= {"0"} else pin


def test_each_version_has_its_changes() -> None:
    heads = [line.removeprefix("## ") for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert heads[:2] == ["Unreleased", dit_accel.__version__]


@pytest.mark.parametrize("name", dit_accel.__all__)
def test_public_name_resolves(name: str) -> None:
    assert getattr(dit_accel, name) is not None


def test_public_names_have_homes() -> None:
    assert set(dit_accel.__all__) == set(dit_accel._HOMES)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        dit_accel.nonsense  # noqa: B018
