"""How times are measured on a device, and the provenance of a measurement: processor, GPU, versions."""

import platform
from collections.abc import Callable
from typing import Any

import diffusers
import torch

from dit_accel.clock import timed
from dit_accel.errors import BackendError
from dit_accel.kernels import dispatch
from dit_accel.kernels.triton import driver
from dit_accel.operator.decisions import cpu_name


def graphics_card() -> dict[str, Any]:
    """The first GPU: name, memory in GiB, the driver's version, and what torch was built for; {} without one."""
    if not torch.cuda.is_available():
        return {}
    found = torch.cuda.get_device_properties(0)
    built = {"cuda": torch.version.cuda} if torch.version.hip is None else {"rocm": torch.version.hip}
    return {"gpu": found.name, "gpu_memory": round(found.total_memory / 2**30, 1), "driver": driver.version()} | built


def machine() -> dict[str, Any]:
    """The provenance of a measurement, JSON-ready."""
    return graphics_card() | {
        "processor": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
    }


def clock_of(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """The function that times a call on a device, in seconds: once on a CPU, the median of many runs on a GPU.

    Raises BackendError on a GPU without Triton, whose timer is used.
    """
    if device.type == "cpu":
        return timed
    if not dispatch.TRITON:
        raise BackendError("measuring on a GPU requires triton, which is not installed: pip install triton")
    from dit_accel.kernels.triton import timing

    return timing.median_seconds
