"""`dit-accel doctor`: whether what is installed here works, part by part, and what to do where it does not.

Each check is made whatever the ones before it found, and imports what it needs by itself: a broken part must not hide the others.
"""

import importlib
import os
import platform
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from dit_accel.errors import ArgumentError
from dit_accel.measure.doctor_report import RIGHT, UNCHECKED, WRONG, Report

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "triton", "diffusers", "transformers", "accelerate", "peft", "safetensors", "numpy", "xformers")
REPORT = "report it with the file that `dit-accel doctor --json FILE` writes"
REINSTALL = "install dit_accel again where there is a C++17 compiler (g++ or clang++): pip install --force-reinstall --no-deps dit-accel"
QUICK_METHODS = ("fovea", "sla")  # between them they run every kernel


def examine(arch: str | None = None, *, quick: bool = False) -> Report:
    """All checks. `arch`: the GPU architecture that kernels are compiled for, the card's unless given; `quick`: less than a minute.

    Raises ValueError at an architecture that is not known.
    """
    if arch is not None:  # otherwise nothing of torch is imported before the check of the imports
        from dit_accel.kernels.triton.tables import ARCHITECTURES

        if arch not in ARCHITECTURES:
            raise ArgumentError(f"arch must be one of {', '.join(ARCHITECTURES)}, not {arch!r}")
    report = Report(_versions())
    for name, check in (
        ("imports", _imports),
        ("GPU", _card),
        ("CPU kernels", _cpu_kernels),
        ("compilation", lambda found: _compilation(found, arch, quick)),
        ("methods on the CPU", lambda found: _methods(found, quick, "cpu")),
        ("methods on the GPU", lambda found: _methods(found, quick, "triton")),
        ("tuned tiles", _tiles),
        ("times", lambda found: _times(found, quick)),
    ):
        _guarded(report, name, check)
    return report


def _guarded(report: Report, name: str, check: Callable[[Report], None]) -> None:
    try:
        check(report)
    except Exception as error:  # whatever a broken installation raises is what is looked for
        report.add(name, WRONG, f"could not be checked, because of {_described(error)}: {REPORT}")


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _versions() -> dict[str, str]:
    """Of everything that a bug may depend on."""
    from dit_accel import __version__

    found = {"dit_accel": __version__, "python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def card() -> "torch.device | None":
    """The current CUDA (or ROCm) device, or None."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None


def _imports(report: Report) -> None:
    """Whether the modules that a user's script imports first can be imported."""
    for module, package in (("torch", "torch"), ("diffusers", "diffusers"), ("dit_accel.patch.verbs", "dit-accel")):
        try:
            importlib.import_module(module)
        except Exception as error:  # a broken library raises anything
            report.add("imports", WRONG, f"{module} can't be imported ({_described(error)}): pip install --upgrade {package}")
            return
    report.add("imports", RIGHT, "torch, diffusers and the patch can be imported")


def _card(report: Report) -> None:
    """The GPU, its driver, and whether this torch can use them."""
    import torch

    from dit_accel.kernels import dispatch
    from dit_accel.kernels.triton import driver

    device = card()
    report.versions["driver"] = driver.version()
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"
    report.versions["torch is built for"] = f"ROCm {torch.version.hip}" if torch.version.hip else cuda
    if device is None:
        report.versions["card"] = "none"
        if driver.NVIDIA.exists():
            built = "is built for the CPU" if torch.version.cuda is None else f"finds no device (CUDA {torch.version.cuda})"
            says = f"there is an NVIDIA driver, but this torch {built}: install the build for that driver, as pytorch.org's start page says"
            report.add("GPU", WRONG, says)
        else:
            report.add("GPU", UNCHECKED, "no CUDA or ROCm device here")
        return
    properties = torch.cuda.get_device_properties(device)
    capability = properties.gcnArchName if torch.version.hip else f"{properties.major}.{properties.minor}"
    report.versions["card"] = f"{properties.name}, {capability}, {properties.total_memory / 2**30:.0f} GiB"
    chosen, reason = dispatch.choose("auto", device, torch.bfloat16, 128)
    if chosen == "triton":
        report.add("GPU", RIGHT, f"{properties.name}: the Triton kernels run there")
    else:
        todo = "pip install triton" if not dispatch.TRITON else "use another card; on this one every method runs in slow eager PyTorch"
        report.add("GPU", WRONG, f"the Triton kernels can't run on {properties.name}, because {reason}: {todo}")


def _cpu_kernels(report: Report) -> None:
    """Whether the compiled library is there and loads, and the instruction set that it runs."""
    from dit_accel.kernels.cpu import native
    from dit_accel.operator import bfloat16

    try:
        library = native.library()
    except Exception as error:  # the dynamic linker's, or one of another build
        report.add("CPU kernels", WRONG, f"the compiled CPU kernels can't be loaded ({_described(error)}): {REINSTALL}")
        return
    if library is None:
        report.add("CPU kernels", WRONG, f"the compiled CPU kernels are missing, so a CPU runs the slow reference: {REINSTALL}")
        return
    try:
        target = native.TARGETS[native.target()]
    except ValueError as error:
        report.add("CPU kernels", WRONG, f"{error}: unset it, or set one of these")
        return
    asked = "" if target == native.best_target() else f", as {native.TARGET_VARIABLE} asks, instead of {native.best_target()}"
    report.add("CPU kernels", RIGHT, f"loaded, {target}{asked}; bfloat16 by {bfloat16.described()}")


def _compilation(report: Report, arch: str | None, quick: bool) -> None:
    """Every kernel of every method (of two that have them all, where `quick`), in processes of their own."""
    from dit_accel.kernels import dispatch

    device = card()
    if arch is None and device is None:
        report.add("compilation", UNCHECKED, "no GPU here, and no architecture named by --arch")
        return
    if not dispatch.TRITON:
        report.add("compilation", WRONG, "the GPU kernels can't be compiled, because triton is not installed: pip install triton")
        return
    if dispatch.INTERPRETED:
        report.add("compilation", UNCHECKED, "TRITON_INTERPRET is set: nothing is compiled")
        return
    if arch is None and device is not None:
        from dit_accel.kernels.triton import calls

        arch = calls.machine_of(device).arch
    rows, failures = compiled(str(arch), quick)
    for method, why in failures.items():
        says = f"the kernels of {method} don't compile for {arch} with triton {report.versions['triton']} ({why})"
        report.add("compilation", WRONG, f"{says}: {REPORT}, and use another version of triton from 3.3 on meanwhile")
    if not failures:
        report.add("compilation", RIGHT, f"{len(rows)} kernels compile for {arch}", rows=rows)


def compiled(arch: str, quick: bool) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The compiled kernels, and by method the reason where they don't compile."""
    from dit_accel.measure import gpu_compile as bench_aot

    methods, head_dims = (QUICK_METHODS, [64]) if quick else (None, [64, 128])
    jobs = bench_aot.jobs(methods, [arch], head_dims, ["bfloat16"])
    rows: list[dict[str, Any]] = []
    failures: dict[str, str] = {}
    with ProcessPoolExecutor(min(len(jobs), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for job, future in [(job, pool.submit(job.run)) for job in jobs]:
            try:
                rows += future.result()
            except Exception as error:  # a compiler raises many kinds, and may end its process
                failures[job.method] = _described(error)
    kept = ("kernel", "method", "head_dim", "registers", "spilled", "shared")
    return [{name: row[name] for name in kept} for row in rows], failures


def _methods(report: Report, quick: bool, backend: str) -> None:
    """Every method's results by one backend's kernels against the reference."""
    import torch

    from dit_accel.kernels import dispatch
    from dit_accel.measure import doctor_smoke

    device, cpu = card(), torch.device("cpu")
    shapes: tuple[doctor_smoke.Shape, ...]
    dtypes: tuple[torch.dtype, ...]
    if backend == "cpu":
        where, shapes, dtypes = cpu, doctor_smoke.SMALL, (torch.float32, torch.bfloat16)
        broken = any(check.name == "CPU kernels" for check in report.faults)
        refusal = "the compiled CPU kernels are not right" if broken else dispatch.cpu_refusal(cpu, torch.float32, 64)
    elif device is None:
        where, shapes, dtypes = cpu, doctor_smoke.INTERPRETED, (torch.float32,)
        refusal = None if dispatch.INTERPRETED and dispatch.TRITON else "no GPU here, and TRITON_INTERPRET is not set"
    else:
        where, shapes, dtypes = device, doctor_smoke.ON_CARD, (torch.bfloat16, torch.float16)
        refusal = dispatch.triton_refusal(device, torch.bfloat16, 64)
    name = "methods on the CPU" if backend == "cpu" else "methods on the GPU" if device else "methods, interpreted"
    if refusal is not None:
        report.add(name, UNCHECKED, refusal)
        return
    for method in doctor_smoke.METHODS:
        for shape in shapes[:1] if quick else shapes:
            for dtype in dtypes:
                _method(report, name, method, shape, dtype, where, backend)
    if not any(check.name == name for check in report.faults):
        report.add(name, RIGHT, f"{', '.join(doctor_smoke.METHODS)}, forward and backward: equal to the reference")


def _method(report: Report, name: str, method: str, shape: Any, dtype: Any, device: Any, backend: str) -> None:
    """One method on one shape in one dtype; a sentence where something is wrong."""
    from dit_accel.measure import doctor_smoke

    what = f"{method} in {str(dtype).removeprefix('torch.')} on {shape}"
    advice = f'use backend="reference" for this method, and {REPORT}'
    try:
        found = doctor_smoke.differences(doctor_smoke.METHODS[method], shape, dtype, device, backend)
    except Exception as error:  # a kernel that does not compile, load or end
        report.add(name, WRONG, f"{what} fails ({_described(error)}): {advice}")
        return
    for one in found:
        if not one.right:
            by = f"differs from the reference by {one.error:.1e} of its size, where rounding explains {one.allowed:.1e}"
            numbers = {"method": method, "result": one.result, "error": one.error, "allowed": one.allowed}
            report.add(name, WRONG, f"{what}: the {one.result} {by}: {advice}", **numbers)


def _tiles(report: Report) -> None:
    """The file of tuned tiles: whether it can be read, and how many of them apply here."""
    from dit_accel.kernels.triton import tuned

    try:
        entries = tuned.read(tuned.cache_file())
    except ValueError as error:
        report.add("tuned tiles", WRONG, f"the file of tuned tiles is left out ({error}): delete it, or tune again")
        return
    device = card()
    if device is None or not entries:
        report.add("tuned tiles", UNCHECKED, f"{len(entries)} tiles were tuned" if entries else "none were tuned")
        return
    from dit_accel.kernels.triton import calls

    mine = sum(entry.gpu == calls.gpu_of(device) for entry in entries)
    report.add("tuned tiles", RIGHT, f"{mine} of {len(entries)} apply to this card, driver, version of Triton and of the kernels")


def _times(report: Report, quick: bool) -> None:
    """Milliseconds of a few forwards at FLUX's shape on a card, to be seen, not judged."""
    device = card()
    from dit_accel.kernels import dispatch

    if device is None or quick or not dispatch.TRITON:
        report.add("times", UNCHECKED, "left out by --quick" if quick else "taken on a GPU with triton alone")
        return
    from dit_accel.measure import doctor_times

    found = doctor_times.milliseconds(device)
    report.add("times", RIGHT, ", ".join(f"{name} {ms:.3f} ms" for name, ms in found.items()), milliseconds=found)
