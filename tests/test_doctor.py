"""`dit-accel doctor`: what it says where all is right, and that it names each broken part, says what to do and exits with 1."""

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from dit_accel import files
from dit_accel.cli.app import app
from dit_accel.errors import WriteError
from dit_accel.kernels import dispatch, ops
from dit_accel.kernels.cpu import native
from dit_accel.kernels.triton import driver, tuned
from dit_accel.measure import doctor, doctor_report, doctor_smoke
from dit_accel.measure.doctor_report import RIGHT, UNCHECKED, WRONG, Check, Report
from dit_accel.method import TopK
from dit_accel.operator import bfloat16
from dit_accel.operator.blocks_of_grid import make_plan
from dit_accel.operator.composition import image_call

CPU = torch.device("cpu")
HALVES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two methods on one small size, by the CPU's kernels alone, and a cache folder without tiles."""
    monkeypatch.setattr(doctor_smoke, "METHODS", {name: doctor_smoke.METHODS[name] for name in ("fovea", "sla")})
    monkeypatch.setattr(doctor_smoke, "SMALL", (doctor_smoke.Shape((1, 12, 10), 5, 1, 16),))
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(doctor, "card", lambda: None)
    monkeypatch.setattr(driver, "NVIDIA", tmp_path / "no driver")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["doctor", *map(str, arguments)])


def fault(*arguments: object) -> str:
    """The one fault that the command ends with."""
    done = run("--quick", *arguments)
    assert done.exit_code == 1, done.output
    assert "1 fault:" in done.output
    return " ".join(done.output.split("1 fault:")[1].split())


# All is right


def test_a_sound_installation_exits_with_0(tmp_path: Path) -> None:
    done = run("--quick", "--json", tmp_path / "doctor.json")
    assert done.exit_code == 0, done.output
    assert "all that can be checked here is right" in done.output
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert report["right"] is True
    states = {check["name"]: check["state"] for check in report["checks"]}
    assert states == {
        "imports": RIGHT, "GPU": UNCHECKED, "CPU kernels": RIGHT, "compilation": UNCHECKED, "methods on the CPU": RIGHT,
        "methods, interpreted": UNCHECKED, "tuned tiles": UNCHECKED, "times": UNCHECKED,
    }  # fmt: skip
    versions = report["versions"]
    assert {"python", "torch", "triton", "diffusers", "dit_accel", "driver", "card"} <= versions.keys()
    assert versions["torch"] == torch.__version__


def test_the_instruction_set_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    report, asks = Report({}), f"as {native.TARGET_VARIABLE} asks"
    doctor._cpu_kernels(report)
    monkeypatch.setenv(native.TARGET_VARIABLE, "portable")
    doctor._cpu_kernels(report)
    assert [check.says for check in report.checks] == [
        f"loaded, {native.best_target()}; bfloat16 by {bfloat16.choice()}",
        f"loaded, portable, {asks}, instead of {native.best_target()}; bfloat16 by portable, {asks}",
    ]


@pytest.mark.gpu
def test_every_method_is_compared_by_the_interpreter_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("a card runs them natively")
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    monkeypatch.setattr(doctor_smoke, "METHODS", {"fovea": doctor_smoke.METHODS["fovea"]})
    monkeypatch.setattr(doctor_smoke, "INTERPRETED", (doctor_smoke.Shape((1, 8, 9), 3, 1, 16),))
    report = Report({})
    doctor._methods(report, True, "triton")
    assert [(check.name, check.state) for check in report.checks] == [("methods, interpreted", RIGHT)]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_allowed_is_little_and_the_kernels_are_within(dtype: torch.dtype) -> None:
    most = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    for spec in doctor_smoke.METHODS.values():
        for shape in doctor_smoke.SMALL:
            found = doctor_smoke.differences(spec, shape, dtype, CPU, "cpu")
            assert [one.result for one in found] == ["output", "lse", "gradients"]
            assert all(one.right and one.allowed < most for one in found)
    assert not doctor_smoke.Difference("output", float("nan"), 1.0).right


ORIGINAL = {name: getattr(doctor_smoke, name) for name in ("METHODS", "SMALL", "INTERPRETED", "ON_CARD")}


def test_rounding_decides_no_choice_of_blocks() -> None:
    """Where two blocks are as good as each other, kernels may take the other one: no error, but it would be taken for one."""
    for shape in (*ORIGINAL["SMALL"], *ORIGINAL["INTERPRETED"], *ORIGINAL["ON_CARD"]):
        for dtype in HALVES:
            qkv = [x.double() for x in shape.inputs(dtype)]
            for spec in ORIGINAL["METHODS"].values():
                if any(isinstance(pattern, TopK) for pattern in spec.keep):
                    assert gap(qkv, spec, shape) > 1e-5


def gap(qkv: list[torch.Tensor], spec: Any, shape: Any) -> float:
    """The smallest difference between the last chosen and the first other block's score, as a share of the scores' size."""
    plan = make_plan(spec, shape.layout, CPU)
    scores = spec.selection.score(image_call(*qkv, shape.layout, plan, {}, qkv[0].shape[-1] ** -0.5))
    scores = scores * plan.prepared.get("short_weight", torch.ones(())).double()
    ordered = scores.sort(-1, descending=True).values
    if plan.top == ordered.shape[-1]:
        return 1.0
    return float((ordered[..., plan.top - 1] - ordered[..., plan.top]).min() / scores.std())


# Broken situations


def test_a_missing_library_of_cpu_kernels_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    monkeypatch.setattr(dispatch, "CPU_TARGET", "none")
    text = fault()
    assert text.startswith("CPU kernels: the compiled CPU kernels are missing, so a CPU runs the slow reference: install dit_accel again")


def test_a_library_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("_native.so was built from other sources")

    monkeypatch.setattr(native, "library", broken)
    assert "can't be loaded (RuntimeError: _native.so was built from other sources): install dit_accel again" in fault()


def test_an_instruction_set_that_the_cpu_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.TARGET_VARIABLE, "sse9")
    report = Report({})
    doctor._cpu_kernels(report)
    assert report.faults[0].says.endswith("not 'sse9': unset it, or set one of these")


def test_a_method_that_computes_something_else_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    original = ops._implementation("cpu").attend

    def wrong(a: Any) -> Any:
        out, lse = original(a)
        return (out * 1.1 if a.weight is not None else out), lse  # SLA alone has a projection

    monkeypatch.setattr(ops._implementation("cpu"), "attend", wrong)
    done = run("--quick", "--json", tmp_path / "doctor.json")
    assert done.exit_code == 1
    report = json.loads((tmp_path / "doctor.json").read_text())
    faults = [check for check in report["checks"] if check["state"] == WRONG]
    assert report["right"] is False
    assert {check["numbers"]["method"] for check in faults} == {"sla"}
    assert {"float32", "bfloat16"} == {check["says"].split()[2] for check in faults}
    assert faults[0]["says"].startswith(
        "sla in float32 on 1x12x10 + 5 tokens, head size 16: the output differs from the reference by 1.0e-01"
    )
    assert 'use backend="reference" for this method' in faults[0]["says"]


def test_a_wrong_gradient_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = ops._implementation("cpu").gradients
    monkeypatch.setattr(ops._implementation("cpu"), "gradients", lambda *given: [-x for x in original(*given)])
    found = doctor_smoke.differences(doctor_smoke.METHODS["fovea"], doctor_smoke.SMALL[0], torch.float32, CPU, "cpu")
    assert [(one.result, one.right) for one in found] == [("output", True), ("lse", True), ("gradients", False)]


def test_a_kernel_that_raises_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError("the CPU kernels found no memory for forward")

    monkeypatch.setattr(ops._implementation("cpu"), "attend", broken)
    report = Report({})
    doctor._methods(report, True, "cpu")
    assert len(report.faults) == len(report.checks) == 2 * 2
    assert "fovea in float32 on" in report.faults[0].says
    assert "fails (MemoryError: the CPU kernels found no memory for forward)" in report.faults[0].says


def test_without_triton_an_architecture_can_not_be_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    assert fault("--arch", "sm_90") == (
        "compilation: the GPU kernels can't be compiled, because triton is not installed: pip install triton"
    )
    assert run("--quick").exit_code == 0  # a machine without a GPU has no use for it


def a_card(monkeypatch: pytest.MonkeyPatch, major: int = 9) -> None:
    """A card as torch shows it, on which nothing can run here."""
    shown = SimpleNamespace(name="NVIDIA H100", major=major, minor=0, total_memory=80 << 30, multi_processor_count=132, gcnArchName="")
    monkeypatch.setattr(doctor, "card", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: shown)
    monkeypatch.setattr(dispatch, "_capability", lambda device: (major, 0))


def test_a_card_without_triton_or_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(monkeypatch)
    report = Report({})
    doctor._card(report)
    assert report.checks == [Check("GPU", RIGHT, "NVIDIA H100: the Triton kernels run there")]
    assert report.versions["card"] == "NVIDIA H100, 9.0, 80 GiB"
    monkeypatch.setattr(dispatch, "TRITON", False)
    doctor._card(report)
    assert report.faults[0].says == "the Triton kernels can't run on NVIDIA H100, because triton is not installed: pip install triton"
    monkeypatch.setattr(dispatch, "TRITON", True)
    a_card(monkeypatch, 7)
    doctor._card(report)
    assert "compute capability 8.0, this GPU has 7.0: use another card" in report.faults[1].says


def test_a_torch_that_does_not_see_the_card_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "version").write_text("")
    monkeypatch.setattr(driver, "NVIDIA", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", None)
    report = Report({})
    doctor._card(report)
    assert "there is an NVIDIA driver, but this torch is built for the CPU: install the build" in report.faults[0].says


def test_kernels_that_do_not_compile_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "compiled", lambda arch, quick: ([], {"sla": f"CompilationError: at 3:4 for {arch}"}))
    text = fault("--arch", "sm_90")
    assert "the kernels of sla don't compile for sm_90 with triton" in text
    assert "(CompilationError: at 3:4 for sm_90): report it with the file that" in text


class Pool:
    """Runs jobs here."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Any) -> Any:
        return SimpleNamespace(result=function)


def test_each_method_compiles_or_fails_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_accel.measure import gpu_compile as bench_aot

    def compile_one(job: Any) -> list[dict[str, Any]]:
        if job.method == "sla":
            raise RuntimeError("no pass")
        return [{"kernel": "attend_rows", "method": job.method, "head_dim": 64, "registers": 9, "spilled": 0, "shared": 5, "code": 7}]

    monkeypatch.setattr(doctor, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(bench_aot.Job, "run", compile_one)
    rows, failures = doctor.compiled("sm_90", True)
    assert rows == [{"kernel": "attend_rows", "method": "fovea", "head_dim": 64, "registers": 9, "spilled": 0, "shared": 5}]
    assert failures == {"sla": "RuntimeError: no pass"}
    assert len(doctor.compiled("sm_90", False)[0]) == 2 * (len(bench_aot.EVERY) - 1)


def test_an_unknown_architecture_is_refused_before_anything_is_checked() -> None:
    done = run("--arch", "sm_75")
    assert done.exit_code == 2
    assert "arch must be one of sm_80, sm_90, sm_100, sm_120, gfx942, not 'sm_75'" in done.output


def test_a_damaged_file_of_tiles_is_named() -> None:
    path = tuned.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert "tuned tiles: the file of tuned tiles is left out" in (text := fault())
    assert text.endswith("delete it, or tune again")


def test_a_check_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(report: Report) -> None:
        raise OSError("libcuda.so.1: wrong ELF class")

    monkeypatch.setattr(doctor, "_card", broken)
    monkeypatch.setattr(doctor, "_methods", lambda *_: None)
    report = doctor.examine(quick=True)
    assert [check.name for check in report.checks] == ["imports", "GPU", "CPU kernels", "compilation", "tuned tiles", "times"]
    assert report.faults[0].says.startswith("could not be checked, because of OSError: libcuda.so.1: wrong ELF class: report it")


def test_a_library_that_can_not_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    report = Report({})
    doctor._imports(report)
    assert "diffusers can't be imported (ModuleNotFoundError" in report.faults[0].says
    assert report.faults[0].says.endswith("pip install --upgrade diffusers")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from dit_accel.cli.app import app
app(["doctor", "--quick"])
"""


def test_without_torch_the_rest_is_still_examined() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "imports: torch can't be imported (ModuleNotFoundError: " in done.stdout
    assert "pip install --upgrade torch" in done.stdout


# The report


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user, a machine and a home folder that are to stay private."""
    monkeypatch.setattr(getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(platform, "node", lambda: "render7.studio.example")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Jane Doe"))


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("no /home/Jane Doe/secret/x.so here", "no …/x.so here"),
        ("'/opt/jdoe/venv/lib/libcuda.so.1': wrong", "'…/libcuda.so.1': wrong"),
        (r"C:\Users\jdoe\venv\x.dll", "…/x.dll"),
        ("jdoe@render7.studio.example said no to jdoe on render7", "<user>@<host> said no to <user> on <host>"),
        ("A100-SXM4-80GB, 3/4 and/or jdoes", "A100-SXM4-80GB, 3/4 and/or jdoes"),
    ],
)
def test_nothing_private_is_written(text: str, written: str, identity: None) -> None:
    report = Report({"card": text})
    report.add("GPU", WRONG, text, rows=[{"of": (text,)}])
    cleaned = report.as_json()
    assert cleaned["versions"]["card"] == cleaned["checks"][0]["says"] == cleaned["checks"][0]["numbers"]["rows"][0]["of"][0] == written


def test_a_user_without_a_name_can_be_examined(identity: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert Report({"card": "jdoe"}).as_json()["versions"] == {"card": "jdoe"}


def test_the_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "doctor.json"
    path.write_text("before")

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "_to_disk", full)
    with pytest.raises(WriteError, match="No space left"):
        Report({}).write(path)
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["doctor.json"]


def test_a_file_that_can_not_be_written_is_refused_before_anything_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: pytest.fail("checked"))
    done = run("--json", tmp_path)
    assert done.exit_code == 2
    assert "--json must name a file, not the folder" in done.output


def test_help_waits_for_no_torch() -> None:
    code = "import sys, dit_accel.cli.app, dit_accel.cli.doctor; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_formats_have_numbers() -> None:
    assert Report({}).as_json() == {"format": doctor_report.FORMAT, "right": True, "versions": {}, "checks": []}
