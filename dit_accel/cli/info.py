"""The rows of `dit-accel info`: this machine, what the package can do here, a model, an adapter."""

import json
import os
import platform
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from dit_accel.console import console

if TYPE_CHECKING:
    from dit_accel.method import AttentionSpec

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "triton", "xformers")


def show(rows: Mapping[str, str]) -> None:
    """Print names and values in two columns."""
    table = Table.grid("", "", padding=(0, 2))
    for name, value in rows.items():
        table.add_row(Text(name), Text(value))
    console().print(table)


def show_json(rows: Mapping[str, str]) -> None:
    """Print the same as JSON, several lines as a list, without paths or the names of user and machine."""
    from dit_accel.measure.doctor_report import publishable

    content = {name: value.split("\n") if "\n" in value else value for name, value in rows.items()}
    print(json.dumps(publishable(content), indent=1))


def show_frame(spec: "AttentionSpec") -> None:
    """Print what a method holds of the tokens, what weighs it and how queries read it, part by part; text is always among the kept keys."""
    table = Table("part", "state", "gate", "readout", "learned by a head of 64", title=str(spec))
    for part in (*spec.keep, spec.rest, spec.merge, *spec.extras):
        if part is not None:
            learned = sum(x.numel() for each in part.nested() for x in each.parameters(1, 64).values())
            table.add_row(type(part).__name__, *part.frame, f"{learned:,}")
    console().print(table)


def package_rows() -> dict[str, str]:
    """Versions, machine, methods and backends."""
    import dit_accel

    versions = {"dit_accel": dit_accel.__version__, "python": platform.python_version()}
    return {**versions, **{name: _version(name) for name in LIBRARIES}, **_machine_rows(), **_method_rows()}


def _version(library: str) -> str:
    if library == "torch":
        import torch

        return str(torch.__version__)  # its metadata do not name the CUDA of a build from the package index
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def _machine_rows() -> dict[str, str]:
    import torch

    from dit_accel.operator.decisions import cpu_name

    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": f"{cpu_name()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} processors",
        "cuda devices": "\n".join(f"{d.name}, compute capability {d.major}.{d.minor}, {d.total_memory / 2**30:.0f} GiB" for d in devices)
        or "none",
    }


def _method_rows() -> dict[str, str]:
    import torch

    from dit_accel.kernels import dispatch, xformers_rows
    from dit_accel.method.text import METHODS
    from dit_accel.operator import bfloat16
    from dit_accel.pipelines import FAMILIES

    rows = {
        "families": "\n".join(f"{family.name} ({', '.join(family.classes)})" for family in FAMILIES),
        "methods": "\n".join(["none", *(", ".join(method.examples) for method in METHODS.values())]),
    }
    chosen, why = dispatch.choose("auto", torch.device("cpu"), torch.float32, 64)
    rows["backend auto"] = f"on this CPU runs {chosen} ({why})"
    refusal = dispatch.cpu_refusal(torch.device("cpu"), torch.float32, 64)
    rows["backend cpu"] = refusal or f"ready, {dispatch.CPU_TARGET}"
    rows["bfloat16 on cpu"] = refusal or bfloat16.described()
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows["backend triton"] = dispatch.triton_refusal(gpu, torch.float32, 64) or "ready"
    rows["backend xformers"] = xformers_rows.refusal(gpu, torch.float32, 64, gradient=False) or "ready"
    rows["backend reference"] = "ready"
    return rows


def model_rows(model: str) -> dict[str, str]:
    """The attention modules of a model that `accelerate` would replace."""
    from dit_accel import accelerate, summary
    from dit_accel.cli.models import load_pipeline

    pipe = load_pipeline(model, device="cpu")
    layers = [row.layer for row in summary(accelerate(pipe), show=False)]
    return {"model": f"{model} ({type(pipe).__name__})", f"{len(layers)} layers": "\n".join(layers)}


def adapter_rows(adapter: str) -> dict[str, str]:
    """The config of a saved adapter, or what a checkpoint that others published contains."""
    from dit_accel.adapters.folder import local_folder, read_config
    from dit_accel.adapters.importers import local_file
    from dit_accel.method.assignment import Assignment

    if file := local_file(adapter):
        return _published_rows(file)
    config = read_config(local_folder(adapter))
    rows = {
        "adapter": adapter,
        "method": str(Assignment.from_dict(config["assignment"])).replace("; ", "\n"),
        "layers": str(len(config["layers"])),
    }
    shown = ("base_model_class", "base_model_name", "base_model_hash", "training", "files", "version")
    return {**rows, **{name.replace("_", " "): _plain(config[name]) for name in shown}}


def _published_rows(file: Path) -> dict[str, str]:
    """The contents of a published checkpoint and the method it is run with, by its header alone."""
    from dit_accel.adapters.importers import method_of, read_header, recognise
    from dit_accel.errors import AdapterError

    header = read_header(file)
    kind = recognise(file, header)
    try:
        method = str(method_of(kind, file, header, None))
    except AdapterError as error:
        method = str(error)
    types = Counter(entry.dtype for entry in header.values())
    return {
        "published file": str(file),
        "holds": kind.value,
        "method": method,
        "tensors": ", ".join(f"{count} of {name}" for name, count in types.most_common()),
    }


def _plain(value: object) -> str:
    """A config's value as lines `name: value`."""
    if isinstance(value, Mapping):
        return "\n".join(f"{k}: {v}" for k, v in value.items()) or "-"
    return "-" if value in (None, "") else str(value)
