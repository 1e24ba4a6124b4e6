"""The compiled library: which file is loaded, whether it is made from these sources, and whether its structs are Python's."""

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipe
from helpers import Shape

from dit_accel import CLEAR, accelerate, attention, summary
from dit_accel.errors import BackendError
from dit_accel.kernels import arguments, dispatch
from dit_accel.kernels.cpu import native, sources

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "kernels" / "cpu"
needs_library = pytest.mark.skipif(not native.library_file().exists(), reason="no compiler when the package was installed")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The sources and the library in a folder of their own, from where the package now loads it."""
    for file in (*CPU.glob("*.cpp"), *CPU.glob("*.h"), native.library_file()):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    caches = (native.library, native.refusal, native.best_target)
    for cached in caches:
        cached.cache_clear()
    yield tmp_path
    for cached in caches:
        cached.cache_clear()


@needs_library
def test_the_library_is_made_from_these_sources() -> None:
    """Where this fails, the installation is stale: install the package again."""
    assert native.refusal() is None


@needs_library
def test_one_library_serves_every_version_of_python(folder: Path) -> None:
    """It has no tag of one in its name, and asks for nothing of Python's."""
    (folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(b"as version 0.2.0 named it")
    assert native.library_file() == folder / "_native.so"
    assert native.library() is not None
    assert b"Py_" not in native.library_file().read_bytes()
    native.library_file().unlink()
    native.library.cache_clear()
    native.refusal.cache_clear()
    assert native.library() is None
    assert "were built by an earlier version: build them again by pip install" in str(native.refusal())


@needs_library
@pytest.mark.parametrize("name", ["forward.h", "select.h", "avx2.cpp", "problem.h", "new.h"])
def test_a_library_from_other_sources_is_refused(folder: Path, name: str) -> None:
    with (folder / name).open("a") as file:
        file.write("// one line more\n")
    assert native.library() is None
    assert native.best_target() == "none"
    assert re.search(r"built from other sources \([0-9a-f]{16}, now [0-9a-f]{16}\): build them again by pip install", str(native.refusal()))


@needs_library
@pytest.mark.parametrize("content", [b"", b"not a library"], ids=["empty", "text"])
def test_a_file_that_is_no_library_is_refused(folder: Path, content: bytes) -> None:
    native.library_file().write_bytes(content)
    assert native.library() is None
    assert "built from other sources (unknown, now " in str(native.refusal())


@needs_library
def test_line_ends_are_no_other_sources(folder: Path) -> None:
    for file in folder.glob("*.h"):
        file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert native.refusal() is None


def test_what_is_stale_is_told_to_whoever_takes_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "dit_accel's CPU kernels (x.so) were built from other sources (a, now b): build them again by pip install"
    monkeypatch.setattr(dispatch, "CPU_TARGET", "none")
    monkeypatch.setattr(dispatch, "NOT_BUILT", sentence)
    shape, pipe = Shape(1, 1, 8, (1, 4, 4)), tiny_pipe()
    for call in (lambda: accelerate(pipe), lambda: attention(*shape.inputs(), CLEAR(2), shape.layout)):
        with pytest.warns(UserWarning, match=re.escape(sentence) + "; until then the slower reference runs"):
            call()
    assert {(row.backend, row.why) for row in summary(pipe, show=False)} == {("reference", sentence)}
    with pytest.raises(BackendError, match=re.escape(sentence)):
        accelerate(tiny_pipe(), backend="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention(*shape.inputs(), CLEAR(2), shape.layout, backend="reference")


def table(kind: type[ctypes.Structure], **changed: tuple[int, int]) -> ctypes.Array[native.Field]:
    """A library's table of a struct's fields, some of them as (offset, size)."""
    rows = [(name, (getattr(kind, name).offset, getattr(kind, name).size)) for name, *_ in kind._fields_]
    made = [(name.encode(), *changed.get(name, place)) for name, place in rows]
    return (native.Field * (len(made) + 1))(*made, (None, 0, ctypes.sizeof(kind)))


@pytest.mark.parametrize("kind", [native.Rows, native.Problem, native.Selection, native.Summary, native.Mixture])
def test_equal_tables_pass_and_swapped_or_missing_fields_do_not(kind: type[ctypes.Structure]) -> None:
    native.compare_fields(kind, table(kind))
    first, second = (name for name, *_ in kind._fields_[1:3])
    places = [(getattr(kind, name).offset, getattr(kind, name).size) for name in (first, second)]
    with pytest.raises(RuntimeError, match=f"{kind.__name__} is not problem.h's: .*{first}"):
        native.compare_fields(kind, table(kind, **{first: places[1], second: places[0]}))
    short = table(kind)
    short[1].name = b"other"
    with pytest.raises(RuntimeError, match="other"):
        native.compare_fields(kind, short)


def test_two_int32_that_changed_places_are_seen() -> None:
    """They leave the struct's size as it is."""
    fields = list(native.Problem._fields_)
    at = [name for name, *_ in fields].index("log_count")
    fields[at], fields[at + 1] = fields[at + 1], fields[at]
    swapped = type("Problem", (ctypes.Structure,), {"_fields_": fields})
    assert ctypes.sizeof(swapped) == ctypes.sizeof(native.Problem)
    with pytest.raises(RuntimeError, match="log_count, variance"):
        native.compare_fields(swapped, table(native.Problem))


def test_every_field_of_the_header_is_in_the_librarys_table() -> None:
    header, api = (CPU / "problem.h").read_text(), (CPU / "api.cpp").read_text()
    for kind in (native.Rows, native.Problem, native.Selection):
        body = re.search(rf"struct {kind.__name__} \{{(.*?)\n\}};", header, re.DOTALL)
        assert body
        declarations = re.sub(r"//.*", "", body[1]).split(";")
        declared = [name for line in declarations for name in re.findall(r"(\w+)\s*(?:,|$)", line.strip())]
        listed = re.search(rf"#define STRUCT {kind.__name__}\n(.*?)#undef", api, re.DOTALL)
        assert listed
        assert re.findall(r"FIELD\((\w+)\)", listed[1]) == declared == [name for name, *_ in kind._fields_]


def test_numbers_of_rests_and_feature_maps_are_those_of_the_header() -> None:
    header = (CPU / "problem.h").read_text()
    for prefix, names in (("REST", arguments.RESTS), ("PHI", arguments.FEATURES)):
        found = re.findall(rf"{prefix}_(\w+) = (\d+)", header)
        assert [(name.lower(), int(number)) for name, number in found] == [(name, number) for number, name in enumerate(names)]


def test_the_build_tells_the_fingerprint(tmp_path: Path) -> None:
    """setup.py and the loading compute it alike, from any folder."""
    done = subprocess.run([sys.executable, CPU / "sources.py"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == sources.fingerprint(CPU)


def run_setup(folder: Path) -> subprocess.CompletedProcess[str]:
    """setup.py in a folder, told to print what it would build."""
    (folder / "setup.py").write_text((ROOT / "setup.py").read_text())
    code = "import runpy, setuptools as s; s.setup = lambda ext_modules, cmdclass: print(vars(ext_modules[0])); runpy.run_path('setup.py')"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)


def test_the_build_requires_nothing_but_the_package(tmp_path: Path) -> None:
    """A source distribution has real folders in the package and none of those that a checkout links to."""
    place = tmp_path / "dit_accel" / "kernels" / "cpu"
    shutil.copytree(CPU, place, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = run_setup(tmp_path)
    assert done.returncode == 0, done.stderr
    assert sources.fingerprint(CPU) in done.stdout
    assert "dit_accel/kernels/cpu/api.cpp" in done.stdout


def test_a_checkout_without_symbolic_links_is_not_built(tmp_path: Path) -> None:
    (tmp_path / "dit_accel").mkdir()
    (tmp_path / "dit_accel" / "kernels").write_text("../kernels")
    done = run_setup(tmp_path)
    assert done.returncode != 0
    assert "git config core.symlinks true" in done.stderr


REFUSED = """
import ctypes, torch

class Stack(ctypes.Structure):
    _fields_ = [("space", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]

# Linux refuses tiles to a process whose stack for signals could not hold them
space = ctypes.create_string_buffer(4096)
assert ctypes.CDLL(None).sigaltstack(ctypes.byref(Stack(ctypes.addressof(space), 0, 4096)), None) == 0
from dit_accel import CLEAR
from dit_accel.kernels.cpu import native
from dit_accel.operator.attention import attention
from dit_accel.operator.layout import TokenLayout

x = torch.randn(1, 1, 64, 16, dtype=torch.bfloat16)
assert attention(x, x, x, CLEAR(2), TokenLayout((1, 8, 8)), backend="cpu").isfinite().all()
print(native.best_target())
"""


@needs_library
@pytest.mark.skipif(native.best_target() != "amx", reason="this CPU has no AMX")
def test_without_the_systems_permission_the_next_best_serves() -> None:
    done = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.split() == ["avx512bf16"], done.stderr[-2000:]


@needs_library
@pytest.mark.parametrize("target", sorted({*native.targets_of("x86_64"), *native.targets_of("aarch64")}))
def test_every_instruction_set_is_built_where_the_others_are(target: str) -> None:
    """A source file for each, named in the steps that build them one by one."""
    assert (CPU / f"{target}.cpp").exists()
    for step in ("cross", "sanitize"):
        assert re.search(rf"for source in [\w ]*\b{target}\b", (ROOT / ".ci" / step).read_text())


@needs_library
@pytest.mark.skipif(native.best_target() != "amx", reason="this CPU has no AMX")
def test_tiles_are_released(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies bfloat16 by tiles, too, and shares the thread with us: before and after it gets the same."""
    monkeypatch.setenv(native.TARGET_VARIABLE, "amx")
    shape, seed = Shape(1, 1, 16, (1, 8, 8)), torch.Generator().manual_seed(0)
    a, b = (torch.randn(96, 96, generator=seed).to(torch.bfloat16) for _ in range(2))
    before = a @ b
    for _ in range(2):
        attention(*shape.inputs(torch.bfloat16), CLEAR(2), shape.layout, backend="cpu")
        torch.testing.assert_close(a @ b, before, rtol=0, atol=0)
